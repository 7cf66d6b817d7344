// bfloat16 and float16 by integer arithmetic: the same code for one value, a SIMD vector and a CUDA thread. Written out
// rather than left to F16C, AVX512-BF16 or the GPU's conversions: one rounding on every machine.
#pragma once

#include <cstdint>

#include "random_bits.h"

namespace fastnlcg {

template <class To, class From>
NLCG_HD To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

template <class F, class U>
NLCG_HD F decode_bf16(U u) {
  return bits_of<F>(static_cast<U>(u << 16));
}

template <class U, class F>
NLCG_HD U encode_bf16(F x) {  // round to nearest even; a NaN stays one
  const U u = bits_of<U>(x);
  const U rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return (u & 0x7fffffffu) > 0x7f800000u ? ((u >> 16) | 0x40u) : rounded;
}

// Rounds up with the probability of the part that is cut off, so that small updates are not lost on average. `bits`: 16
// random bits. A number that rounding to nearest keeps finite does not become infinite.
template <class U, class F>
NLCG_HD U encode_bf16_stochastic(F x, U bits) {
  const U u = bits_of<U>(x);
  const U rounded = (u + (bits & 0xffffu)) >> 16;
  return (rounded & 0x7fffu) >= 0x7f80u ? encode_bf16<U>(x) : rounded;
}

template <class F, class U>
NLCG_HD F decode_f16(U u) {
  const U sign = (u & 0x8000u) << 16;
  const U shifted = (u & 0x7fffu) << 13;  // exponent and mantissa in float32's places
  const U exponent = shifted & 0x0f800000u;
  const U normal = shifted + (112u << 23);  // rebias 15 -> 127
  const U special = normal + (112u << 23);  // Inf and NaN: exponent 255
  // Subnormal: 1.m * 2^-14 - 2^-14, exact and in normal numbers, so that a flush-to-zero mode cannot touch it.
  const U subnormal = bits_of<U>(static_cast<F>(bits_of<F>(static_cast<U>(normal + (1u << 23))) - 6.103515625e-05f));
  const U small_or_normal = exponent == 0u ? subnormal : normal;
  return bits_of<F>(static_cast<U>(sign | (exponent == 0x0f800000u ? special : small_or_normal)));
}

template <class U, class F>
NLCG_HD U encode_f16(F x) {  // round to nearest even; a NaN stays one
  const U u = bits_of<U>(x);
  const U sign = (u >> 16) & 0x8000u;
  const U absolute = u & 0x7fffffffu;
  const U nan_or_inf = absolute > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;
  // Below 2^-14 the float adder rounds: 0.5 has its last bit where the half's subnormal has its own.
  const U subnormal = bits_of<U>(static_cast<F>(bits_of<F>(absolute) + 0.5f)) - 0x3f000000u;
  const U normal = (absolute - (112u << 23) + 0xfffu + ((absolute >> 13) & 1u)) >> 13;
  const U finite = absolute < 0x38800000u ? subnormal : normal;
  return sign | (absolute >= 0x47800000u ? nan_or_inf : finite);
}

// One element, in memory and as a value of the state's type.
NLCG_HD float value_of(float x) { return x; }
NLCG_HD double value_of(double x) { return x; }
NLCG_HD float value_of(BFloat16 x) { return decode_bf16<float>(std::uint32_t{x.bits}); }
NLCG_HD float value_of(Float16 x) {
#ifdef __CUDA_ARCH__  // exact, so the same number; one instruction instead of ten
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return decode_f16<float>(std::uint32_t{x.bits});
#endif
}
NLCG_HD void assign(float& to, float x) { to = x; }
NLCG_HD void assign(double& to, double x) { to = x; }
NLCG_HD void assign(BFloat16& to, float x) { to.bits = static_cast<std::uint16_t>(encode_bf16<std::uint32_t>(x)); }
NLCG_HD void assign(Float16& to, float x) { to.bits = static_cast<std::uint16_t>(encode_f16<std::uint32_t>(x)); }

// Calls f(S{}, T{}) with the types of the state, in arithmetic and in memory.
template <class F>
decltype(auto) with_state_types(DType state, F&& f) {
  if (state == DType::f64) return f(double{}, double{});
  if (state == DType::f32) return f(float{}, float{});
  return f(float{}, BFloat16{});
}

// `index`: of the element in the whole parameter.
NLCG_HD void assign_stochastically(BFloat16& to, float x, const Rounding& rounding, std::uint64_t index) {
  const std::uint32_t of_high = mixed_high(rounding, static_cast<std::uint32_t>(index >> 32));
  const std::uint32_t bits = random_bits(rounding, static_cast<std::uint32_t>(index), of_high);
  to.bits = static_cast<std::uint16_t>(encode_bf16_stochastic(x, bits));
}
// Element `l` of a segment's parameter, or of its state.
template <class E, class S>
NLCG_HD void assign_rounded(E& to, S x, const Rounding&, std::int64_t) {
  assign(to, x);
}
NLCG_HD void assign_rounded(BFloat16& to, float x, const Rounding& rounding, std::int64_t l) {
  if (!rounding.stochastic) return assign(to, x);
  assign_stochastically(to, x, rounding, global_index(rounding.shard, l));
}

// Calls f(E{}) with the element type E of p and g, given the state's type S and whether it may have 16 bits. Host or
// device, as f is.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class S, bool kTakes16Bit, class F>
NLCG_HD void with_element_type(DType dtype, F&& f) {
  if constexpr (sizeof(S) == sizeof(double) || !kTakes16Bit) {
    f(S{});
  } else if (dtype == DType::f32) {
    f(float{});
  } else if (dtype == DType::bf16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

}  // namespace fastnlcg
