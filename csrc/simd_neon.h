// simd.h for aarch64: NEON, which every such processor has.
#pragma once

#include <arm_neon.h>

#include "simd.h"

namespace fastnlcg {
namespace {

NLCG_INLINE Float square_root(Float x) { return (Float)vsqrtq_f32((float32x4_t)x); }
NLCG_INLINE Double square_root(Double x) { return (Double)vsqrtq_f64((float64x2_t)x); }
// gcc has no intrinsic for STNP, the store with a nontemporal hint.
NLCG_INLINE void store_nontemporal(float* to, Float x) { __builtin_memcpy(to, &x, sizeof(x)); }
NLCG_INLINE void store_nontemporal(double* to, Double x) { __builtin_memcpy(to, &x, sizeof(x)); }
NLCG_INLINE void finish_nontemporal_stores() {}
NLCG_INLINE Bits32 zero_extend(Bits16 x) { return __builtin_convertvector(x, Bits32); }
NLCG_INLINE Bits16 truncate(Bits32 x) { return __builtin_convertvector(x, Bits16); }
NLCG_INLINE Wide2 widen(Float x) {
  return {{(Double)vcvt_f64_f32(vget_low_f32((float32x4_t)x)), (Double)vcvt_high_f64_f32((float32x4_t)x)}};
}
NLCG_INLINE Wide2 load_wide(const float* from) {
  return {{(Double)vcvt_f64_f32(vld1_f32(from)), (Double)vcvt_f64_f32(vld1_f32(from + 2))}};
}
NLCG_INLINE Double add_exact_product(Double acc, Double a, Double b) {
  return (Double)vfmaq_f64((float64x2_t)acc, (float64x2_t)a, (float64x2_t)b);
}

using FloatMode = std::uint64_t;
constexpr FloatMode kDefaultFloatMode = 0;
NLCG_INLINE FloatMode float_mode() {
  FloatMode mode;
  asm volatile("mrs %0, fpcr" : "=r"(mode));
  return mode;
}
NLCG_INLINE void set_float_mode(FloatMode mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }

}  // namespace
}  // namespace fastnlcg
