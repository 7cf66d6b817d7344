// Random bits for stochastic rounding. They depend on the step, the parameter's index, the element's index in the whole
// parameter and what is rounded alone: they are the same on every machine, in replicas, in shards and in a resumed run.
#pragma once

#include <cstdint>

#include "step_args.h"

namespace fastnlcg {

// One round of the mixer "lowbias32" of Chris Wellons' hash-prospector (public domain).
template <class U>
NLCG_HD U mixed(U x) {
  x = x ^ (x >> 16);
  x = x * 0x7feb352du;
  x = x ^ (x >> 15);
  x = x * 0x846ca68bu;
  return x ^ (x >> 16);
}
struct Rounding {
  bool stochastic;
  std::uint32_t key;  // of the step, the parameter, and what is rounded
  Shard shard;
  bool of_state;
  int shift;  // of state: the sixteen bits to use begin here
};
NLCG_HD std::uint32_t mixed_step_and_parameter(double step, const Shard& shard) {
  const auto of_step = mixed(static_cast<std::uint32_t>(static_cast<std::uint64_t>(step)) + 0x9e3779b9u);
  return of_step ^ mixed(shard.parameter + 0x85ebca6bu);
}
NLCG_HD Rounding rounding_of(const Options& o, double step, const Shard& shard) {
  return {o.stochastic_rounding, mixed(mixed_step_and_parameter(step, shard)), shard, false, 0};
}
// Of state in bfloat16, which is always rounded so. The direction and the diagonal have the two halves of one number.
enum class StateArray : std::uint32_t { grad_prev, direction, diagonal };
NLCG_HD Rounding rounding_of_state(StateArray array, double step, const Shard& shard) {
  const std::uint32_t salt = array == StateArray::grad_prev ? 0xc2b2ae35u : 0x27d4eb2fu;
  const std::uint32_t key = mixed(mixed_step_and_parameter(step, shard) ^ salt);
  return {true, key, shard, true, array == StateArray::diagonal ? 16 : 0};
}
// The index of a segment's element `l` in the whole parameter.
NLCG_HD std::uint64_t global_index(const Shard& shard, std::int64_t l) {
  const std::int64_t skipped = shard.run == 0 ? 0 : l / shard.run * shard.skip;
  return static_cast<std::uint64_t>(shard.begin + l + skipped);
}
// The same of consecutive elements, with one division for all.
class Places {
 public:
  NLCG_HD Places(const Shard& shard, std::int64_t l) : index_(static_cast<std::uint64_t>(shard.begin + l)), left_(0) {
    if (shard.run == 0) return;
    const std::int64_t runs = l / shard.run;
    index_ += static_cast<std::uint64_t>(runs * shard.skip);
    left_ = shard.run - (l - runs * shard.run);
  }
  NLCG_HD std::uint64_t next(const Shard& shard) {
    const std::uint64_t index = index_++;
    if (--left_ == 0) {
      index_ += static_cast<std::uint64_t>(shard.skip);
      left_ = shard.run;
    }
    return index;
  }

 private:
  std::uint64_t index_;
  std::int64_t left_;  // until the end of the run; negative without runs
};
// Random bits for an element, from the halves of that index: the high half first, which is the same for many.
NLCG_HD std::uint32_t mixed_high(const Rounding& rounding, std::uint32_t high) {
  if (rounding.of_state) return high == 0u ? rounding.key : mixed(rounding.key ^ mixed(high));
  return mixed(high + 0x85ebca6bu) ^ rounding.key;
}
template <class U>
NLCG_HD U random_bits(const Rounding& rounding, U low, U of_high) {
  if (rounding.of_state) return mixed(static_cast<U>(low ^ of_high)) >> rounding.shift;
  return mixed(static_cast<U>(mixed(static_cast<U>(low ^ rounding.key)) + of_high));
}

}  // namespace fastnlcg
