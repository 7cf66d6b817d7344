// What ranks exchange, if the parameters are spread over ranks: a row of doubles each, with its sums and a signature.
// Rows with different signatures show that the ranks are not about to take the same step; nothing is then written, and
// Python words the error (python/fastnlcg/tensors/ranks.py).
#pragma once

#include <cstring>

#include "step_args.h"

namespace fastnlcg {

// Which exchange a row belongs to.
enum class ExchangeId : std::int32_t {
  first_pass,
  repeated_pass,
  later_pass,
  diagnostics,
  full_batch,
  load,
  make_state
};
constexpr const char* kExchangeNames[] = {"first_pass", "repeated_pass", "later_pass", "diagnostics",
                                          "full_batch", "load",          "make_state"};

// That of the exchange after a pass of a step.
template <class Pass>
NLCG_HD constexpr ExchangeId exchange_after() {
  return Pass::kFirstPass       ? ExchangeId::first_pass
         : Pass::kOnlyIfClipped ? ExchangeId::repeated_pass
                                : ExchangeId::later_pass;
}

// The columns of a row. Those from kStepNumber on are its signature.
enum Column {
  kSum0,
  kSum1,
  kSum2,
  kLargestElement,
  kGs,
  kShs,
  kChanged,   // 1 if other parameters have gradients than in the last step
  kSegments,  // parameters with gradients
  kFoundInf,
  kLoss,
  kStepNumber,
  kExchangeId,
  kDigest,  // digest_of() what all ranks must have alike
  kColumns
};
struct RankRow {
  double column[kColumns];
};
static_assert(sizeof(RankRow) == kColumns * sizeof(double));

NLCG_HD void sign_row(RankRow& row, double step, ExchangeId exchange, double digest) {
  row.column[kStepNumber] = step;
  row.column[kExchangeId] = static_cast<double>(exchange);
  row.column[kDigest] = digest;
}

// Whether all ranks are about to take the same step. `replicas`: they have the same parameters and gradients, so they
// have the same sums, to the bit; but if one is not finite, all ranks skip the step.
NLCG_HD bool ranks_agree(const RankRow* all, int ranks, bool replicas) {
  bool agree = true;
  for (int rank = 1; rank < ranks; ++rank) {
    for (int column = replicas ? kSum0 : kStepNumber; column < kColumns; ++column) {
      if (column > kLargestElement && column < kStepNumber) continue;
      const double difference = all[rank].column[column] - all[0].column[column];
      if (difference != 0.0 && difference - difference == 0.0) agree = false;
    }
  }
  return agree;
}

// What this rank contributes to the first decision, besides the sums of the first pass. Of the sums over the last move
// each rank keeps its own share from the step before; over_ranks() adds the shares up.
NLCG_HD void contribute(RankRow& row, const Scalars& now, double active_set, double loss, double segments,
                        double found_inf) {
  row.column[kGs] = now.gs;
  row.column[kShs] = now.shs;
  row.column[kChanged] = now.active_set == active_set ? 0.0 : 1.0;
  row.column[kSegments] = segments;
  row.column[kFoundInf] = found_inf;
  row.column[kLoss] = loss;
}

// One column over the ranks, in their order: the largest, the mean of the losses, or the sum over the owned ranks, which
// is not finite if any rank's is not.
NLCG_HD double over_ranks(const RankRow* all, const double* owned, int ranks, int column) {
  double x = 0.0;
  for (int rank = 0; rank < ranks; ++rank) {
    const double y = all[rank].column[column];
    if (column == kLargestElement) {
      x = y > x ? y : x;
    } else if (column == kLoss) {
      x += y / static_cast<double>(ranks);
    } else {
      x += owned[rank] != 0.0 ? y : y - y;  // y - y is NaN if y is not finite: all ranks then skip the step
    }
  }
  return x;
}

// A digest of the options, of every group's lr, weight_decay, sign and kind, and of `agreed`, in 53 bits: equal on ranks
// that may step together.
inline double digest_of(const Options& options, const Group* groups, std::int64_t n_groups, double agreed) {
  std::uint64_t hash = 1469598103934665603u;  // FNV-1a, over the bits of doubles
  const auto add = [&](double x) {
    std::uint64_t bits;
    if (x != x) x = 0.0;  // an lr on the device, which the host does not know
    std::memcpy(&bits, &x, sizeof(bits));
    for (int k = 0; k < 64; k += 8) hash = (hash ^ (bits >> k & 0xff)) * 1099511628211u;
  };
  each_option(options, [&](const char*, const auto& value) { add(static_cast<double>(value)); });
  for (std::int64_t k = 0; k < n_groups; ++k) {
    add(groups[k].lr), add(groups[k].weight_decay), add(groups[k].sign);
    if (groups[k].matrices) add(static_cast<double>(k));
  }
  add(agreed);
  return static_cast<double>(hash >> 11);
}

}  // namespace fastnlcg
