// simd.h for x86-64: SSE2, AVX2 and AVX-512, by what the file is compiled for.
#pragma once

#include <immintrin.h>

#include "simd.h"

namespace fastnlcg {
namespace {

#if defined(__AVX512F__)

NLCG_INLINE Float square_root(Float x) { return _mm512_sqrt_ps(x); }
NLCG_INLINE Double square_root(Double x) { return _mm512_sqrt_pd(x); }
NLCG_INLINE void store_nontemporal(float* to, Float x) { _mm512_stream_ps(to, x); }
NLCG_INLINE void store_nontemporal(double* to, Double x) { _mm512_stream_pd(to, x); }
NLCG_INLINE Bits32 zero_extend(Bits16 x) {
  return reinterpret_cast<Bits32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(x)));
}
NLCG_INLINE Bits16 truncate(Bits32 x) {
  return reinterpret_cast<Bits16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(x)));
}
NLCG_INLINE Wide2 widen(Float x) {
  return {{_mm512_cvtps_pd(_mm512_castps512_ps256(x)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1))}};
}
NLCG_INLINE Wide2 load_wide(const float* from) {  // a conversion with a memory operand needs no shuffle
  return {{_mm512_cvtps_pd(_mm256_loadu_ps(from)), _mm512_cvtps_pd(_mm256_loadu_ps(from + 8))}};
}
NLCG_INLINE Double add_exact_product(Double acc, Double a, Double b) { return _mm512_fmadd_pd(a, b, acc); }

#elif defined(__AVX2__)

NLCG_INLINE Float square_root(Float x) { return _mm256_sqrt_ps(x); }
NLCG_INLINE Double square_root(Double x) { return _mm256_sqrt_pd(x); }
NLCG_INLINE void store_nontemporal(float* to, Float x) { _mm256_stream_ps(to, x); }
NLCG_INLINE void store_nontemporal(double* to, Double x) { _mm256_stream_pd(to, x); }
NLCG_INLINE Bits32 zero_extend(Bits16 x) {
  return reinterpret_cast<Bits32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(x)));
}
NLCG_INLINE Bits16 truncate(Bits32 x) { return __builtin_convertvector(x, Bits16); }
NLCG_INLINE Wide2 widen(Float x) {  // intrinsics: gcc 12 splits __builtin_convertvector into halves of halves
  return {{_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))}};
}
NLCG_INLINE Wide2 load_wide(const float* from) {
  return {{_mm256_cvtps_pd(_mm_loadu_ps(from)), _mm256_cvtps_pd(_mm_loadu_ps(from + 4))}};
}
NLCG_INLINE Double add_exact_product(Double acc, Double a, Double b) { return _mm256_fmadd_pd(a, b, acc); }

#else

NLCG_INLINE Float square_root(Float x) { return _mm_sqrt_ps(x); }
NLCG_INLINE Double square_root(Double x) { return _mm_sqrt_pd(x); }
NLCG_INLINE void store_nontemporal(float* to, Float x) { _mm_stream_ps(to, x); }
NLCG_INLINE void store_nontemporal(double* to, Double x) { _mm_stream_pd(to, x); }
NLCG_INLINE Bits32 zero_extend(Bits16 x) { return __builtin_convertvector(x, Bits32); }
NLCG_INLINE Bits16 truncate(Bits32 x) { return __builtin_convertvector(x, Bits16); }
NLCG_INLINE Wide2 widen(Float x) { return {{_mm_cvtps_pd(x), _mm_cvtps_pd(_mm_movehl_ps(x, x))}}; }
NLCG_INLINE Wide2 load_wide(const float* from) { return widen(Float(_mm_loadu_ps(from))); }
NLCG_INLINE Double add_exact_product(Double acc, Double a, Double b) { return acc + a * b; }

#endif

NLCG_INLINE void finish_nontemporal_stores() { _mm_sfence(); }

using FloatMode = unsigned;
constexpr FloatMode kDefaultFloatMode = 0x1f80;
NLCG_INLINE FloatMode float_mode() { return _mm_getcsr(); }
NLCG_INLINE void set_float_mode(FloatMode mode) { _mm_setcsr(mode); }

}  // namespace
}  // namespace fastnlcg
