// SIMD vectors of the width that this file is compiled for, in the vector extensions of gcc and clang, and functions
// for what has no operator there. Each architecture's header has the same functions:
//
//     square_root(x)                   rounded to nearest
//     store_nontemporal(to, x)         around the cache, if the processor can; `to` is aligned to the vector
//     finish_nontemporal_stores()      before other threads read what was stored so
//     zero_extend(Bits16) -> Bits32    sixteen bits to thirty-two
//     truncate(Bits32) -> Bits16       and back
//     widen(Float) -> Wide2            to double, exactly
//     load_wide(const float*)          the same from memory
//     add_exact_product(acc, a, b)     acc + a * b for an exact a * b: an fma then has the bits of multiply and add
//     float_mode(), set_float_mode(m), kDefaultFloatMode   rounding and flushing, of this thread
//
// Everything is in an unnamed namespace: a function compiled for AVX-512 must never be the copy that the linker keeps
// for the baseline.
#pragma once

#include <bit>
#include <cstdint>

namespace fastnlcg {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;  // SSE2, NEON
#endif

#define NLCG_INLINE inline __attribute__((always_inline))

using Double = double __attribute__((vector_size(kVectorBytes)));
using Float = float __attribute__((vector_size(kVectorBytes)));
using Bits64 = std::uint64_t __attribute__((vector_size(kVectorBytes)));
using Bits32 = std::uint32_t __attribute__((vector_size(kVectorBytes)));
using Bits16 = std::uint16_t __attribute__((vector_size(kVectorBytes / 2)));

// The lanes of one vector as doubles: two vectors for float, one for double.
struct Wide2 {
  Double v[2];
};
struct Wide1 {
  Double v[1];
};

static_assert(std::endian::native == std::endian::little);  // checkpoints, and half.h over vectors of bits

}  // namespace
}  // namespace fastnlcg

#if defined(__x86_64__)
#include "simd_x86.h"
#elif defined(__aarch64__)
#include "simd_neon.h"
#else
#error "fastnlcg has vectors for x86-64 and aarch64"
#endif
