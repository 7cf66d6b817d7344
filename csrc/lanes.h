// SIMD vectors of the width this file is compiled for, in GCC's vector extensions: arithmetic is written with plain
// operators, so the functions of nlcg_math.h take a vector wherever they take a float. Loads, stores, the operations
// without an operator and the double-precision accumulators are all there is here; no formula of the method.
//
// Included by step_cpu.cpp only, once per instruction set. Everything is in an unnamed namespace: a function compiled
// for AVX-512 must never be the copy that the linker keeps for the baseline.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "half.h"
#include "step_args.h"

namespace fastnlcg {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define NLCG_INLINE inline __attribute__((always_inline))

// Sixteen consecutive elements are one block: the lanes of a sum. Element i of the flat index always adds to lane
// i mod 16, whatever the width of the vector that carries it, hence the same bits from every instruction set.
constexpr int kBlock = static_cast<int>(kBlockElements);
constexpr int kDoubles = kVectorBytes / 8;         // doubles per vector
constexpr int kDoubleVectors = kBlock / kDoubles;  // vectors of doubles per block

using Double = double __attribute__((vector_size(kVectorBytes)));
using Float = float __attribute__((vector_size(kVectorBytes)));
using Bits32 = std::uint32_t __attribute__((vector_size(kVectorBytes)));
using Bits16 = std::uint16_t __attribute__((vector_size(kVectorBytes / 2)));

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

using Bits64 = std::uint64_t __attribute__((vector_size(kVectorBytes)));
NLCG_INLINE Float absolute(Float x) { return bits_of<Float>(bits_of<Bits32>(x) & 0x7fffffffu); }
NLCG_INLINE Double absolute(Double x) { return bits_of<Double>(bits_of<Bits64>(x) & 0x7fffffffffffffffu); }
#if defined(__AVX512F__)
NLCG_INLINE Float square_root(Float x) { return _mm512_sqrt_ps(x); }
NLCG_INLINE Double square_root(Double x) { return _mm512_sqrt_pd(x); }
#elif defined(__AVX2__)
NLCG_INLINE Float square_root(Float x) { return _mm256_sqrt_ps(x); }
NLCG_INLINE Double square_root(Double x) { return _mm256_sqrt_pd(x); }
#else
NLCG_INLINE Float square_root(Float x) { return _mm_sqrt_ps(x); }
NLCG_INLINE Double square_root(Double x) { return _mm_sqrt_pd(x); }
#endif

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

// A store that does not read the line first. Needs alignment to the vector, and a fence before other threads read.
NLCG_INLINE void store_streaming(float* to, Float v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, v);
#elif defined(__AVX2__)
  _mm256_stream_ps(to, v);
#else
  _mm_stream_ps(to, v);
#endif
}
NLCG_INLINE void store_streaming(double* to, Double v) {
#if defined(__AVX512F__)
  _mm512_stream_pd(to, v);
#elif defined(__AVX2__)
  _mm256_stream_pd(to, v);
#else
  _mm_stream_pd(to, v);
#endif
}

NLCG_INLINE Bits32 load_16bit(const void* from) {
  Bits16 v;
  __builtin_memcpy(&v, from, sizeof(v));
#if defined(__AVX512F__)
  return reinterpret_cast<Bits32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, Bits32);
#endif
}
NLCG_INLINE void store_16bit(void* to, Bits32 u) {
#if defined(__AVX512F__)
  const Bits16 v = reinterpret_cast<Bits16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(u)));
#else
  const Bits16 v = __builtin_convertvector(u, Bits16);
#endif
  __builtin_memcpy(to, &v, sizeof(v));
}
NLCG_INLINE Float load(const BFloat16* from) { return decode_bf16<Float>(load_16bit(from)); }
NLCG_INLINE Float load(const Float16* from) { return decode_f16<Float>(load_16bit(from)); }
NLCG_INLINE void store(BFloat16* to, Float v) { store_16bit(to, encode_bf16<Bits32>(v)); }
NLCG_INLINE void store(Float16* to, Float v) { store_16bit(to, encode_f16<Bits32>(v)); }

// The same for elements `l` and on of a segment's parameter.
template <class E, class V>
NLCG_INLINE void store_rounded(E* to, V v, const Rounding&, std::int64_t) {
  store(to, v);
}
NLCG_INLINE void store_rounded(BFloat16* to, Float v, const Rounding& rounding, std::int64_t l) {
  if (!rounding.stochastic) return store(to, v);
  Bits32 low, high;
  const std::uint64_t first = number_of(rounding.place, l);
  const auto first_low = static_cast<std::uint32_t>(first);
  if (rounding.place.run == 0 && first_low <= UINT32_MAX - kLanes<float>) {  // one high half for all
    for (int lane = 0; lane < kLanes<float>; ++lane) low[lane] = static_cast<std::uint32_t>(lane);
    low += first_low;
    high = Bits32{} + static_cast<std::uint32_t>(first >> 32);
  } else {
    for (int lane = 0; lane < kLanes<float>; ++lane) {
      const std::uint64_t number = number_of(rounding.place, l + lane);
      low[lane] = static_cast<std::uint32_t>(number);
      high[lane] = static_cast<std::uint32_t>(number >> 32);
    }
  }
  store_16bit(to, encode_bf16_stochastic(v, random_bits(rounding, low, high)));
}

// ---- sums in double ----------------------------------------------------------------------------------------------

// The lanes of one vector as doubles: two vectors for float, one for double.
struct Wide2 {
  Double v[2];
};
struct Wide1 {
  Double v[1];
};

// Intrinsics, not __builtin_convertvector: gcc 12 splits that into halves of halves.
NLCG_INLINE Wide2 widen(Float x) {
#if defined(__AVX512F__)
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))}};
#elif defined(__AVX2__)
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
#else
  return {{_mm_cvtps_pd(x), _mm_cvtps_pd(_mm_movehl_ps(x, x))}};
#endif
}
NLCG_INLINE Wide1 widen(Double x) { return {{x}}; }
// The same from memory: a conversion with a memory operand needs no shuffle.
NLCG_INLINE Wide2 load_wide(const float* from) {
#if defined(__AVX512F__)
  return {{_mm512_cvtps_pd(_mm256_loadu_ps(from)), _mm512_cvtps_pd(_mm256_loadu_ps(from + 8))}};
#elif defined(__AVX2__)
  return {{_mm256_cvtps_pd(_mm_loadu_ps(from)), _mm256_cvtps_pd(_mm_loadu_ps(from + 4))}};
#else
  return widen(load(from));
#endif
}
NLCG_INLINE Wide1 load_wide(const double* from) { return {{load(from)}}; }

// acc + a * b where a * b is exact (both came from float): an fma then has the bits of multiply and add.
NLCG_INLINE Double add_exact_product(Double acc, Double a, Double b) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, acc);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, acc);
#else
  return acc + a * b;
#endif
}

// The sixteen lanes of one sum.
struct Accumulator {
  Double lane[kDoubleVectors] = {};

  // lanes of vector k of the block += a * b
  NLCG_INLINE void add_product(int k, const Wide2& a, const Wide2& b) {
    lane[2 * k] = add_exact_product(lane[2 * k], a.v[0], b.v[0]);
    lane[2 * k + 1] = add_exact_product(lane[2 * k + 1], a.v[1], b.v[1]);
  }
  NLCG_INLINE void add_product(int k, const Wide1& a, const Wide1& b) { lane[k] += a.v[0] * b.v[0]; }

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
