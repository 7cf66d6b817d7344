// One tile of the flat state: from segments to elements in registers, through a pass, and back to memory. Loads, a pass
// of passes.h, stores; which tile, and what its sums are for, is step_kernel.cu's affair.
//
// Thread t of 512 takes four consecutive elements at 4 t and four at 2048 + 4 t: one 16-byte load a stream. Where a
// segment ends inside four elements, or there is none, they are taken one by one; where a parameter or gradient does
// not lie on 16 bytes there, its four are loaded one by one.
#pragma once

#include <type_traits>

#include "../csrc/half.h"
#include "../csrc/passes.h"
#include "../csrc/step_cuda.h"
#include "reduce.cuh"

namespace fastnlcg {
namespace {

// ---- what a kernel is given --------------------------------------------------------------------------------------

struct GroupInput {
  double lr, weight_decay, sign;
  DeviceNumber lr_on_device;
};
constexpr int kInlineGroups = 16;  // more of them lie in a table

constexpr int kMaxIndexedTiles = 512;

// What the blocks share, in device memory.
struct Control {
  GridBarrier barrier;
  StepPlan plan;
  double sums[kMaxSums];  // of a part
};

struct Arguments {
  const Segment* segments;
  int n_segments;
  State state;
  int chunks, tiles_per_chunk;
  Options options;
  double set, loss;
  DeviceNumber loss_on_device, grad_scale, found_inf;
  const GroupInput* group_table;  // null: they are in `groups`
  GroupInput groups[kInlineGroups];
  std::int64_t n_groups;
  Scalars* scalars;
  double* alpha;
  double* alpha_prev;
  Control* control;
  double* partials;    // [sum][chunk]
  int counted_chunks;  // whose sums this rank adds
  Exchange exchange;   // its memory is the device's
  double* param_steps;
  double* beta2_powers;
  int resident_tiles;  // per block
  bool aligned_state;  // the streams of the state, to 16 bytes
  // The first segment that ends behind each tile's begin, and one past the last tile: where there are few tiles, the
  // latency of a search would show. `has_tile_index` says whether these are filled in.
  bool has_tile_index;
  int first_segment[kMaxIndexedTiles + 1];
};

__device__ __forceinline__ const GroupInput* group_inputs(const Arguments& a) {
  return a.group_table ? a.group_table : a.groups;
}

constexpr int kQuad = 4;
static_assert(kTile == 2 * kQuad * kThreads);

// Shared memory of a resident tile: two streams.
template <class S>
constexpr int kResidentBytes = 2 * static_cast<int>(kTile * sizeof(S));

#ifdef __CUDACC__
extern __shared__ __align__(16) unsigned char resident_memory[];
#endif

template <class S>
__device__ __forceinline__ S* resident(int smem_offset) {
  return reinterpret_cast<S*>(resident_memory) + smem_offset;
}

// ---- loads and stores --------------------------------------------------------------------------------------------

// Four elements at once, where their address allows it: in pieces of 16 bytes, or 8 for 16-bit types.
template <class E>
using Piece = std::conditional_t<sizeof(E) == 2, uint2, uint4>;
template <class E>
constexpr int kPieces = kQuad * static_cast<int>(sizeof(E)) / static_cast<int>(sizeof(Piece<E>));

template <class E>
__device__ __forceinline__ void put_piece(E (&raw)[kQuad], int k, Piece<E> piece) {
  __builtin_memcpy(reinterpret_cast<char*>(raw) + k * sizeof(piece), &piece, sizeof(piece));
}

// __ldca and __stwb are ordinary loads and stores of global memory. Written as assignments they would be joined with
// the other branch, and split.
template <class S, class E>
__device__ __forceinline__ void load_quad(const E* from, bool whole, S (&to)[kQuad]) {
  E raw[kQuad];
  if (whole) {
#pragma unroll
    for (int k = 0; k < kPieces<E>; ++k) put_piece(raw, k, __ldca(reinterpret_cast<const Piece<E>*>(from) + k));
  } else {
#pragma unroll
    for (int l = 0; l < kQuad; ++l) raw[l] = from[l];
  }
#pragma unroll
  for (int l = 0; l < kQuad; ++l) to[l] = value_of(raw[l]);
}

template <class E>
__device__ __forceinline__ Piece<E> piece_of(const E (&raw)[kQuad], int k) {
  Piece<E> piece;
  __builtin_memcpy(&piece, reinterpret_cast<const char*>(raw) + k * sizeof(piece), sizeof(piece));
  return piece;
}

// The four at `place` of the flat state, rounded as parameters are.
template <class S, class E>
__device__ __forceinline__ void store_rounded_quad(E* to, bool whole, const S (&from)[kQuad], const Rounding& rounding,
                                                   std::int64_t place) {
  E raw[kQuad];
#pragma unroll
  for (int l = 0; l < kQuad; ++l) assign_rounded(raw[l], from[l], rounding, place + l);
  if (whole) {
#pragma unroll
    for (int k = 0; k < kPieces<E>; ++k) __stwb(reinterpret_cast<Piece<E>*>(to) + k, piece_of(raw, k));
  } else {
#pragma unroll
    for (int l = 0; l < kQuad; ++l) to[l] = raw[l];
  }
}

template <class S>
__device__ __forceinline__ void store_quad(S* to, bool whole, const S (&from)[kQuad]) {
  store_rounded_quad(to, whole, from, Rounding{}, 0);
}

// The same in shared memory.
template <class S>
__device__ __forceinline__ void load_resident(const S* from, S (&to)[kQuad]) {
#pragma unroll
  for (int k = 0; k < kPieces<S>; ++k) put_piece(to, k, reinterpret_cast<const Piece<S>*>(from)[k]);
}
template <class S>
__device__ __forceinline__ void store_resident(S* to, const S (&from)[kQuad]) {
#pragma unroll
  for (int k = 0; k < kPieces<S>; ++k) reinterpret_cast<Piece<S>*>(to)[k] = piece_of(from, k);
}

template <class E>
__device__ __forceinline__ bool takes_quads(const E* first) {
  return reinterpret_cast<std::uintptr_t>(first) % (kQuad * sizeof(E) < 16 ? kQuad * sizeof(E) : 16) == 0;
}

// ---- what a pass sees of one element -----------------------------------------------------------------------------

template <class S, int K>
struct ThreadSums {
  double sum[K];
  S largest;
};

// What is one number in a segment, in the state's type.
template <class S>
struct SegmentNumbers {
  S alpha, alpha_prev, weight_decay, kept, root, root_prev;
  bool maximizes;  // g takes a sign
  bool decays;     // g takes L2 weight decay
  bool moves;      // false where alpha is 0: then p keeps every bit, the sign of a zero included
};

template <class S, int K>
struct At {
  S p_, g_, grad_prev_, d_, diagonal_;
  const SegmentNumbers<S>& segment;
  ThreadSums<S, K>& sums;

  __device__ __forceinline__ S g() const { return g_; }
  __device__ __forceinline__ S p() const { return p_; }
  __device__ __forceinline__ S grad_prev() const { return grad_prev_; }
  __device__ __forceinline__ S d() const { return d_; }
  __device__ __forceinline__ S diagonal() const { return diagonal_; }
  __device__ __forceinline__ S alpha() const { return segment.alpha; }
  __device__ __forceinline__ S alpha_prev() const { return segment.alpha_prev; }
  __device__ __forceinline__ S kept() const { return segment.kept; }
  __device__ __forceinline__ S root() const { return segment.root; }
  __device__ __forceinline__ S root_prev() const { return segment.root_prev; }
  __device__ __forceinline__ bool moves() const { return segment.moves; }
  __device__ __forceinline__ void set_p(S p) { p_ = p; }
  __device__ __forceinline__ void set_grad_prev(S g) { grad_prev_ = g; }
  __device__ __forceinline__ void set_d(S d) { d_ = d; }
  __device__ __forceinline__ void set_diagonal(S x) { diagonal_ = x; }

  __device__ __forceinline__ double wide(S x) const { return static_cast<double>(x); }
  __device__ __forceinline__ double wide_grad_prev() const { return wide(grad_prev_); }
  __device__ __forceinline__ double wide_d() const { return wide(d_); }
  __device__ __forceinline__ void add(int j, double a, double b) {
    // A product of two floats is exact in double, so fma has the bits of multiply and add.
    sums.sum[j] = sizeof(S) == sizeof(float) ? __builtin_fma(a, b, sums.sum[j]) : sums.sum[j] + a * b;
  }
  __device__ __forceinline__ void largest(S size) { sums.largest = size > sums.largest ? size : sums.largest; }
};

// What holds for a whole launch.
template <class S>
struct Launch {
  const Arguments& a;
  S inverse_scale;

  __device__ explicit Launch(const Arguments& arguments) : a(arguments), inverse_scale(1) {
    if (a.grad_scale.address == nullptr) return;
    inverse_scale = static_cast<S>(1.0 / static_cast<double>(*static_cast<const float*>(a.grad_scale.address)));
  }
  // Read where it is used: few steps do, and registers are short.
  __device__ __forceinline__ Rounding rounding() const {
    return a.options.stochastic_rounding ? rounding_of(a.options, a.scalars->step) : Rounding{};
  }
  // The gradient the method sees.
  __device__ __forceinline__ S gradient(S g, S p, const SegmentNumbers<S>& segment) const {
    if (a.grad_scale.address != nullptr) g = scaled_gradient(g, inverse_scale);
    if (segment.maximizes) g = scaled_gradient(g, S{-1});
    return segment.decays ? decayed_gradient(g, segment.weight_decay, p) : g;
  }
  template <class Pass>
  __device__ __forceinline__ SegmentNumbers<S> numbers(const Segment& segment) const {
    const GroupInput& input = group_inputs(a)[segment.group];
    const double alpha = a.alpha[segment.group], weight_decay = input.weight_decay;
    SegmentNumbers<S> x = {};
    x.maximizes = input.sign < 0.0;
    x.alpha = static_cast<S>(alpha);
    x.alpha_prev = static_cast<S>(a.alpha_prev[segment.group]);
    x.weight_decay = static_cast<S>(weight_decay);
    x.kept = static_cast<S>(1.0 - alpha * weight_decay);
    x.decays = Pass::kL2 && weight_decay != 0.0;
    x.moves = x.alpha != S{0};
    if (Pass::kBiasCorrected) {
      const double power = a.beta2_powers[segment.param];
      x.root = root_correction<S>(power * a.options.beta2);
      x.root_prev = root_correction<S>(power);
    }
    return x;
  }
};

template <class S>
__device__ __forceinline__ S* stream(void* base, std::int64_t position) {
  return static_cast<S*>(base) + position;
}

// The first of segments [low, high) that ends after `position`; high where none does.
__device__ __forceinline__ int find_segment(const Segment* segments, int low, int high, std::int64_t position) {
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (segments[middle].offset + segments[middle].n > position) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Q times four elements, half a tile apart, all in one segment. `smem_offset` is where a resident tile's g, and behind
// it the stream of kResident, lie in shared memory, or -1.
template <class S, class E, int Q, class Pass, int K>
__device__ __forceinline__ void run_quads(const Launch<S>& launch, const Pass& pass, const Segment& segment,
                                          std::int64_t position, int smem_offset, ThreadSums<S, K>& sums) {
  constexpr int kApart = kQuad * kThreads;
  const State& state = launch.a.state;
  const bool whole = launch.a.aligned_state;
  const SegmentNumbers<S> numbers = launch.template numbers<Pass>(segment);
  const unsigned reads = pass.reads(), writes = pass.writes();
  E* const p_at = static_cast<E*>(segment.p) + (position - segment.offset);
  const E* const g_at = static_cast<const E*>(segment.g) + (position - segment.offset);
  const bool whole_p = takes_quads(p_at), whole_g = takes_quads(g_at);
  const bool loaded = smem_offset >= 0 && !Pass::kOpens;  // the first pass has left them in shared memory
  const int local = static_cast<int>(position % kTile);

  S p[Q][kQuad] = {}, g[Q][kQuad] = {}, grad_prev[Q][kQuad] = {}, d[Q][kQuad] = {}, diagonal[Q][kQuad] = {};
  auto& kept = Pass::kResident == kD ? d : diagonal;  // the resident stream beside g
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    const std::int64_t at = position + q * kApart;
    if (loaded) {
      load_resident(resident<S>(smem_offset) + local + q * kApart, g[q]);
      if (reads & Pass::kResident) load_resident(resident<S>(smem_offset) + kTile + local + q * kApart, kept[q]);
    } else {
      if (pass.kReadsGradient) load_quad(g_at + q * kApart, whole_g, g[q]);
    }
    if ((reads & kD) && !(loaded && Pass::kResident == kD)) {
      load_quad(stream<S>(state.direction, at), whole, d[q]);
    }
    if ((reads & kP) || (pass.kReadsGradient && numbers.decays && !loaded)) {
      load_quad(p_at + q * kApart, whole_p, p[q]);
    }
    if (reads & kGradPrev) load_quad(stream<S>(state.grad_prev, at), whole, grad_prev[q]);
    if ((reads & kDiagonal) && !(loaded && Pass::kResident == kDiagonal)) {
      load_quad(stream<S>(state.diagonal, at), whole, diagonal[q]);
    }
  }
#pragma unroll
  for (int q = 0; q < Q; ++q) {
#pragma unroll
    for (int l = 0; l < kQuad; ++l) {
      if (pass.kReadsGradient && !loaded) g[q][l] = launch.gradient(g[q][l], p[q][l], numbers);
    }
    if (Pass::kOpens && Pass::kResident != 0 && smem_offset >= 0) {
      store_resident(resident<S>(smem_offset) + local + q * kApart, g[q]);
      store_resident(resident<S>(smem_offset) + kTile + local + q * kApart, kept[q]);
    }
#pragma unroll
    for (int l = 0; l < kQuad; ++l) {
      At<S, K> at{p[q][l], g[q][l], grad_prev[q][l], d[q][l], diagonal[q][l], numbers, sums};
      pass(at);
      p[q][l] = at.p_, grad_prev[q][l] = at.grad_prev_, d[q][l] = at.d_, diagonal[q][l] = at.diagonal_;
    }
    const std::int64_t at = position + q * kApart;
    if (writes & kDiagonal) store_quad(stream<S>(state.diagonal, at), whole, diagonal[q]);
    if (writes & kGradPrev) store_quad(stream<S>(state.grad_prev, at), whole, grad_prev[q]);
    if (writes & kD) store_quad(stream<S>(state.direction, at), whole, d[q]);
    if ((writes & kP) && numbers.moves) store_rounded_quad(p_at + q * kApart, whole_p, p[q], launch.rounding(), at);
  }
}

// One element of a segment.
template <class S, class E, class Pass, int K>
__device__ __forceinline__ void run_one(const Launch<S>& launch, const Pass& pass, const Segment& segment,
                                        std::int64_t position, int smem_offset, ThreadSums<S, K>& sums) {
  const State& state = launch.a.state;
  const SegmentNumbers<S> numbers = launch.template numbers<Pass>(segment);
  const unsigned reads = pass.reads(), writes = pass.writes();
  E* const p_at = static_cast<E*>(segment.p) + (position - segment.offset);
  const E* const g_at = static_cast<const E*>(segment.g) + (position - segment.offset);
  const bool loaded = smem_offset >= 0 && !Pass::kOpens;
  const int local = static_cast<int>(position % kTile);

  const bool needs_p = (reads & kP) || (pass.kReadsGradient && numbers.decays && !loaded);
  const S p = needs_p ? value_of(*p_at) : S{};
  const S g = loaded                ? resident<S>(smem_offset)[local]
              : pass.kReadsGradient ? launch.gradient(value_of(*g_at), p, numbers)
                                    : S{};
  At<S, K> at{p,
              g,
              reads & kGradPrev ? *stream<S>(state.grad_prev, position) : S{},
              reads & kD ? *stream<S>(state.direction, position) : S{},
              reads & kDiagonal ? *stream<S>(state.diagonal, position) : S{},
              numbers,
              sums};
  if (Pass::kOpens && Pass::kResident != 0 && smem_offset >= 0) {
    resident<S>(smem_offset)[local] = at.g_;
    resident<S>(smem_offset)[kTile + local] = Pass::kResident == kD ? at.d_ : at.diagonal_;
  }
  pass(at);
  if (writes & kDiagonal) *stream<S>(state.diagonal, position) = at.diagonal_;
  if (writes & kGradPrev) *stream<S>(state.grad_prev, position) = at.grad_prev_;
  if (writes & kD) *stream<S>(state.direction, position) = at.d_;
  if ((writes & kP) && numbers.moves) assign_rounded(*p_at, at.p_, launch.rounding(), position);
}

template <class S, class Pass, int K>
__device__ __forceinline__ void run_tile(const Launch<S>& launch, const Pass& pass, int tile, int smem_offset,
                                         ThreadSums<S, K>& sums) {
  const Arguments& a = launch.a;
  const std::int64_t begin = std::int64_t{tile} * kTile, end = begin + kTile;
  const int first = a.has_tile_index ? a.first_segment[tile] : find_segment(a.segments, 0, a.n_segments, begin);
  if (first == a.n_segments || a.segments[first].offset >= end) return;
  const Segment& segment = a.segments[first];
  const std::int64_t position = begin + kQuad * static_cast<int>(threadIdx.x);
  if (segment.offset <= begin && segment.offset + segment.n >= end) {  // the tile lies in one segment: the usual case
    with_element_type<S>(segment.dtype, [&](auto element) {
      using E = decltype(element);
      if constexpr (sizeof(S) == sizeof(float) && std::is_same_v<Pass, CurvatureDot<S>>) {  // registers for two at once
        run_quads<S, E, 2>(launch, pass, segment, position, smem_offset, sums);
      } else {
#pragma unroll 1
        for (int q = 0; q < 2; ++q) {
          run_quads<S, E, 1>(launch, pass, segment, position + q * kQuad * kThreads, smem_offset, sums);
        }
      }
    });
    return;
  }
  int s = first;
  const int beyond = a.has_tile_index ? a.first_segment[tile + 1] : a.n_segments;
#pragma unroll 1
  for (int q = 0; q < 2; ++q) {
    const std::int64_t at = position + q * kQuad * kThreads;
    s = find_segment(a.segments, s, beyond, at);
    if (s == a.n_segments) return;
    const Segment& here = a.segments[s];
    if (here.offset <= at && here.offset + here.n >= at + kQuad) {
      with_element_type<S>(here.dtype, [&](auto element) {
        run_quads<S, decltype(element), 1>(launch, pass, here, at, smem_offset, sums);
      });
      continue;
    }
#pragma unroll 1
    for (int l = 0; l < kQuad; ++l) {
      s = find_segment(a.segments, s, beyond, at + l);
      if (s == a.n_segments) return;
      const Segment& one = a.segments[s];
      if (one.offset > at + l) continue;
      with_element_type<S>(one.dtype, [&](auto element) {
        run_one<S, decltype(element)>(launch, pass, one, at + l, smem_offset, sums);
      });
    }
  }
}

}  // namespace
}  // namespace fastnlcg
