// Blocks of sixteen lanes over the vectors of simd.h: loads, stores and sums. Arithmetic is written with plain
// operators, so the functions of elementwise.h take vectors as they take floats. No formula of the method is here.
//
// In an unnamed namespace, like simd.h: step_cpu.cpp includes it once per instruction set.
#pragma once
#ifdef NLCG_ELEMENTWISE
#error "include lanes.h before elementwise.h: its functions need to see the overloads for vectors"
#endif

#include <cstdint>

#include "half.h"
#include "simd.h"
#include "step_args.h"

namespace fastnlcg {
namespace {

// Sixteen consecutive elements are one block: the lanes of a sum. Element i of the flat index always adds to lane
// i mod 16, whatever the width of the vector that carries it, hence the same bits from every instruction set.
constexpr int kBlock = static_cast<int>(kBlockElements);
constexpr int kDoubles = kVectorBytes / 8;         // doubles per vector
constexpr int kDoubleVectors = kBlock / kDoubles;  // vectors of doubles per block

template <class S>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Float;
};
template <>
struct VectorOf<double> {
  using type = Double;
};
template <class S>
using Vector = typename VectorOf<S>::type;
template <class S>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(S));
template <class S>
constexpr int kVectors = kBlock / kLanes<S>;  // per block

NLCG_INLINE Float absolute(Float x) { return bits_of<Float>(bits_of<Bits32>(x) & 0x7fffffffu); }
NLCG_INLINE Double absolute(Double x) { return bits_of<Double>(bits_of<Bits64>(x) & 0x7fffffffffffffffu); }

template <class V, class S>
NLCG_INLINE V broadcast(S x) {
  return x - V{};  // x - 0, not x + 0: the sign of a zero stays
}

// ---- memory <-> vectors of the state's type ----------------------------------------------------------------------

template <class S>
NLCG_INLINE Vector<S> load(const S* from) {
  Vector<S> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}
template <class S>
NLCG_INLINE void store(S* to, Vector<S> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

NLCG_INLINE Bits32 load_16bit(const void* from) {
  Bits16 v;
  __builtin_memcpy(&v, from, sizeof(v));
  return zero_extend(v);
}
NLCG_INLINE void store_16bit(void* to, Bits32 u) {
  const Bits16 v = truncate(u);
  __builtin_memcpy(to, &v, sizeof(v));
}
NLCG_INLINE Float load(const BFloat16* from) { return decode_bf16<Float>(load_16bit(from)); }
NLCG_INLINE Float load(const Float16* from) { return decode_f16<Float>(load_16bit(from)); }
NLCG_INLINE void store(BFloat16* to, Float v) { store_16bit(to, encode_bf16<Bits32>(v)); }
NLCG_INLINE void store(Float16* to, Float v) { store_16bit(to, encode_f16<Bits32>(v)); }

// The same for the elements of a segment's parameter, or of its state, from element `l` on.
template <class E, class V>
NLCG_INLINE void store_rounded(E* to, V v, const Rounding&, std::int64_t) {
  store(to, v);
}
// Random bits for the lanes of a vector, whose first is element `l`.
NLCG_INLINE Bits32 random_lanes(const Rounding& rounding, std::int64_t l) {
  const std::uint64_t first = global_index(rounding.shard, l);
  const auto first_low = static_cast<std::uint32_t>(first);
  Bits32 low = {}, of_high = {};
  if (rounding.shard.run == 0 && first_low <= UINT32_MAX - kLanes<float>) {  // one high half for all
    for (int lane = 0; lane < kLanes<float>; ++lane) low[lane] = static_cast<std::uint32_t>(lane);
    low += first_low;
    of_high = Bits32{} + mixed_high(rounding, static_cast<std::uint32_t>(first >> 32));
  } else {
    for (int lane = 0; lane < kLanes<float>; ++lane) {
      const std::uint64_t index = global_index(rounding.shard, l + lane);
      low[lane] = static_cast<std::uint32_t>(index);
      of_high[lane] = mixed_high(rounding, static_cast<std::uint32_t>(index >> 32));
    }
  }
  return random_bits(rounding, low, of_high);
}
NLCG_INLINE void store_rounded(BFloat16* to, Float v, const Rounding& rounding, std::int64_t l) {
  if (!rounding.stochastic) return store(to, v);
  store_16bit(to, encode_bf16_stochastic(v, random_lanes(rounding, l)));
}

// ---- sums in double ----------------------------------------------------------------------------------------------

NLCG_INLINE Wide1 widen(Double x) { return {{x}}; }
NLCG_INLINE Wide1 load_wide(const double* from) { return {{load(from)}}; }
NLCG_INLINE Wide2 load_wide(const BFloat16* from) { return widen(load(from)); }

// The sixteen lanes of one sum.
struct Accumulator {
  Double lane[kDoubleVectors] = {};

  // lanes of vector k of the block += a * b
  NLCG_INLINE void add_product(int k, const Wide2& a, const Wide2& b) {
    lane[2 * k] = add_exact_product(lane[2 * k], a.v[0], b.v[0]);
    lane[2 * k + 1] = add_exact_product(lane[2 * k + 1], a.v[1], b.v[1]);
  }
  NLCG_INLINE void add_product(int k, const Wide1& a, const Wide1& b) { lane[k] += a.v[0] * b.v[0]; }
  // lanes of vector k of the block += x
  NLCG_INLINE void add(int k, const Wide2& x) {
    lane[2 * k] += x.v[0];
    lane[2 * k + 1] += x.v[1];
  }

  double total() const {  // a fixed tree: 8, 4, 2, 1
    double x[kBlock];
    __builtin_memcpy(x, lane, sizeof(x));
    for (int width = kBlock / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) x[i] += x[i + width];
    }
    return x[0];
  }
};

}  // namespace
}  // namespace fastnlcg
