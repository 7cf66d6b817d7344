// Loads and stores of four consecutive elements, a quad: from global memory, and of what stays in shared memory.
#pragma once

#include <type_traits>

#include "../csrc/half.h"
#include "arguments.cuh"

namespace fastnlcg {
namespace {

constexpr int kQuad = 4;
static_assert(kTile == 2 * kQuad * kThreads);

// Shared memory of a resident tile: two arrays.
template <class S>
constexpr int kResidentBytes = 2 * static_cast<int>(kTile * sizeof(S));

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char resident_memory[];
#endif

template <class S>
__device__ __forceinline__ S* resident(int smem_offset) {
  return reinterpret_cast<S*>(resident_memory) + smem_offset;
}

// Four elements as they were loaded: in pieces of 16 bytes (8 bytes of a 16-bit type), or each in its own register.
template <int kSize>
struct Word {
  static constexpr int kBytes = kSize;  // that are loaded
  std::conditional_t<kSize == 8, std::uint64_t, std::uint32_t> bits;
};
template <class E, bool kWide>
using Piece = std::conditional_t<!kWide, Word<sizeof(E)>, std::conditional_t<sizeof(E) == 2, uint2, uint4>>;

template <class E, bool kWide = true>
struct Raw {
  static constexpr int kBytes = kWide ? sizeof(Piece<E, true>) : sizeof(E);  // of memory in a piece
  static constexpr int kPieces = kQuad * static_cast<int>(sizeof(E)) / kBytes;
  Piece<E, kWide> piece[kPieces];

  template <class S>
  __device__ __forceinline__ void decode(S (&to)[kQuad]) const {
    E element[kQuad];
#pragma unroll
    for (int k = 0; k < kPieces; ++k) {  // memcpy compiles to nothing here
      __builtin_memcpy(reinterpret_cast<char*>(element) + k * kBytes, &piece[k], kBytes);
    }
#pragma unroll
    for (int l = 0; l < kQuad; ++l) to[l] = value_of(element[l]);
  }
};

// load_if(to, from, on): loads `to` from global memory if `on`; else it keeps its value. In assembly, so that it is one
// instruction with a predicate. Wide loads do not allocate in the L1 cache, which is to keep the tables; a narrow load
// leaves its line there for the next. "Relaxed" keeps the loads in order, at no cost.
#ifdef __CUDACC__
#define NLCG_LOAD(LOAD, ON, ...)                                                            \
  asm volatile("{ .reg .pred on; setp.ne.b32 on, " ON ", 0; @on ld.relaxed.cta.global" LOAD \
               : __VA_ARGS__                                                                \
               : "l"(__cvta_generic_to_global(from)), "r"(static_cast<int>(on)))
__device__ __forceinline__ void load_if(uint4& to, const void* from, bool on) {
  NLCG_LOAD(".L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }", "%5", "+r"(to.x), "+r"(to.y), "+r"(to.z), "+r"(to.w));
}
__device__ __forceinline__ void load_if(uint2& to, const void* from, bool on) {
  NLCG_LOAD(".L1::no_allocate.v2.u32 {%0, %1}, [%2]; }", "%3", "+r"(to.x), "+r"(to.y));
}
__device__ __forceinline__ void load_if(Word<8>& to, const void* from, bool on) {
  NLCG_LOAD(".L1::evict_first.u64 %0, [%1]; }", "%2", "+l"(to.bits));
}
__device__ __forceinline__ void load_if(Word<4>& to, const void* from, bool on) {
  NLCG_LOAD(".L1::evict_first.u32 %0, [%1]; }", "%2", "+r"(to.bits));
}
__device__ __forceinline__ void load_if(Word<2>& to, const void* from, bool on) {
  NLCG_LOAD(".L1::evict_first.u16 %0, [%1]; }", "%2", "+r"(to.bits));
}
#undef NLCG_LOAD
#endif

template <class E, bool kWide>
__device__ __forceinline__ void load_quad(Raw<E, kWide>& to, const E* from, bool on) {
  using R = Raw<E, kWide>;
#pragma unroll
  for (int k = 0; k < R::kPieces; ++k) {
    load_if(to.piece[k], reinterpret_cast<const char*>(from) + k * R::kBytes, on);
  }
}

// Stores four elements of a parameter or of its state, from element `first` of its segment on, rounded.
template <bool kWide, class S, class E>
__device__ __forceinline__ void store_rounded_quad(E* to, const S (&from)[kQuad], const Rounding& rounding,
                                                   std::int64_t first) {
  E element[kQuad];
  bool rounded = false;
  if constexpr (std::is_same_v<E, BFloat16>) {
    if (rounding.stochastic) {
      Places places(rounding.shard, first);
#pragma unroll
      for (int l = 0; l < kQuad; ++l) assign_stochastically(element[l], from[l], rounding, places.next(rounding.shard));
      rounded = true;
    }
  }
  if (!rounded) {
#pragma unroll
    for (int l = 0; l < kQuad; ++l) assign(element[l], from[l]);
  }
  if constexpr (kWide) {
    Raw<E> raw;
    __builtin_memcpy(raw.piece, element, sizeof(element));
#pragma unroll
    for (int k = 0; k < raw.kPieces; ++k) __stwb(reinterpret_cast<Piece<E, true>*>(to) + k, raw.piece[k]);
  } else {
#pragma unroll
    for (int l = 0; l < kQuad; ++l) to[l] = element[l];
  }
}

// The same in shared memory.
template <class S>
__device__ __forceinline__ void load_resident(const S* from, Raw<S>& to) {
#pragma unroll
  for (int k = 0; k < to.kPieces; ++k) to.piece[k] = reinterpret_cast<const Piece<S, true>*>(from)[k];
}
template <class S>
__device__ __forceinline__ void store_resident(S* to, const S (&from)[kQuad]) {
  Raw<S> raw;
  __builtin_memcpy(raw.piece, from, sizeof(from));
#pragma unroll
  for (int k = 0; k < raw.kPieces; ++k) reinterpret_cast<Piece<S, true>*>(to)[k] = raw.piece[k];
}

// Whether p and g can be loaded wide at element `from` of their segment, and at every fourth element after it.
__device__ __forceinline__ bool takes_quads(const Segment& segment, std::int64_t from) {
  const unsigned size = segment.dtype == DType::f64 ? 8 : segment.dtype == DType::f32 ? 4 : 2;
  const auto p = reinterpret_cast<std::uintptr_t>(segment.p), g = reinterpret_cast<std::uintptr_t>(segment.g);
  const auto bytes = static_cast<std::uintptr_t>(from) * size;
  return (((p + bytes) | (g + bytes)) & ((size == 2 ? 8 : 16) - 1)) == 0;
}

// The same for the state arrays, of type T in memory; the origin is of 4 or 8 bytes.
template <class T>
__device__ __forceinline__ bool state_takes_quads(const Segment& segment) {
  const auto bits = [](const void* at) { return reinterpret_cast<std::uintptr_t>(at); };
  const auto state = bits(segment.grad_prev) | bits(segment.direction) | bits(segment.diagonal);
  return ((state & (sizeof(T) == 2 ? 7 : 15)) | (bits(segment.origin) & 15)) == 0 && segment.offset % kQuad == 0;
}

}  // namespace
}  // namespace fastnlcg
