// One tile of the flat index: from segments to elements in registers, through a pass (../csrc/pass.h), and back to
// memory. kernels.cuh chooses the tiles.
//
// Thread t of 512 takes four consecutive elements at 4 t and four at 2048 + 4 t. The load width is chosen before the
// first load is issued: one 16-byte load per array (8 bytes for 16-bit types), or four loads of a parameter or gradient
// that is not aligned to 16 bytes. If a segment ends inside the four elements, or the state is not aligned to 16 bytes
// (buffers of ops need not be), elements are taken one by one.
//
// A pass is bound by memory, and a load is in flight for more than a thousand cycles. So all loads of a quad are issued
// before any of them is waited for: addresses and the segment's scalars come first, an array that is not read is a load
// with a false predicate, not a branch, and 16-bit values are decoded after the last load. tests/test_sass.py checks
// the machine code for it.
#pragma once

#include "../csrc/pass.h"
#include "arguments.cuh"
#include "loads.cuh"

namespace fastnlcg {
namespace {

// ---- what a pass sees of one element -----------------------------------------------------------------------------

template <class S, int K>
struct ThreadSums {
  double sum[K];
  S largest;
};

// The scalars of a group, in the state's type. Formed once for every block and pass: the conversions are work in double
// precision, at which some GPUs are slow.
template <class S>
struct GroupScalars {
  S alpha, alpha_prev, weight_decay, decay_factor;
  S factor;  // of the gradient: the sign, over AMP's scale, times the factor of clipping
};
template <class S>
__device__ __forceinline__ GroupScalars<S> group_scalars(const Arguments& a, int group, double clip) {
  const GroupInput& input = group_inputs(a)[group];
  const double alpha = a.alpha[group], weight_decay = input.weight_decay;
  const double scale = a.grad_scale.address != nullptr ? *static_cast<const float*>(a.grad_scale.address) : 1.0;
  const S factor = static_cast<S>(clip * (1.0 / scale));
  return {static_cast<S>(alpha), static_cast<S>(*input.alpha_prev), static_cast<S>(weight_decay),
          static_cast<S>(1.0 - alpha * weight_decay), input.sign < 0.0 ? -factor : factor};
}

// The scalars of a segment.
template <class S>
struct SegmentScalars : GroupScalars<S> {
  S inv_sqrt_bias, inv_sqrt_bias_prev;
  // False if alpha is 0: p then keeps every bit, the sign of a zero included.
  __device__ __forceinline__ bool moves() const { return this->alpha != S{0}; }
  bool matrix;
};

// Of the elements of a quad, a thread's run: added to the sums in double once.
template <bool kRuns, class S, int K>
__device__ __forceinline__ void end_run(ThreadSums<S, K>& sums, const S (&run)[K]) {
#pragma unroll
  for (int j = 0; kRuns && j < K; ++j) sums.sum[j] += static_cast<double>(run[j]);
}

template <class S, int K>
struct At {
  S p_, g_, undecayed_, grad_prev_, d_, diagonal_, origin_;
  const SegmentScalars<S>& segment;
  ThreadSums<S, K>& sums;
  S (&run)[K];
  S* rows_;  // of curvature pairs, at this element; read and written in place
  std::int64_t pitch_;

  __device__ __forceinline__ S g() const { return g_; }
  __device__ __forceinline__ S undecayed() const { return undecayed_; }
  __device__ __forceinline__ S p() const { return p_; }
  __device__ __forceinline__ S grad_prev() const { return grad_prev_; }
  __device__ __forceinline__ S d() const { return d_; }
  __device__ __forceinline__ S diagonal() const { return diagonal_; }
  __device__ __forceinline__ S origin() const { return origin_; }
  __device__ __forceinline__ S row(int k) const { return rows_[k * pitch_]; }
  __device__ __forceinline__ void set_row(int k, S x) { rows_[k * pitch_] = x; }
  __device__ __forceinline__ S alpha() const { return segment.alpha; }
  __device__ __forceinline__ S alpha_prev() const { return segment.alpha_prev; }
  __device__ __forceinline__ S decay_factor() const { return segment.decay_factor; }
  __device__ __forceinline__ S inv_sqrt_bias() const { return segment.inv_sqrt_bias; }
  __device__ __forceinline__ S inv_sqrt_bias_prev() const { return segment.inv_sqrt_bias_prev; }
  __device__ __forceinline__ bool moves() const { return segment.moves(); }
  __device__ __forceinline__ bool is_matrix() const { return segment.matrix; }
  __device__ __forceinline__ void set_p(S p) { p_ = p; }
  __device__ __forceinline__ void set_grad_prev(S g) { grad_prev_ = g; }
  __device__ __forceinline__ void set_d(S d) { d_ = d; }
  __device__ __forceinline__ void set_diagonal(S x) { diagonal_ = x; }
  __device__ __forceinline__ void set_origin(S x) { origin_ = x; }

  __device__ __forceinline__ double wide(S x) const { return static_cast<double>(x); }
  __device__ __forceinline__ double wide_grad_prev() const { return wide(grad_prev_); }
  __device__ __forceinline__ double wide_d() const { return wide(d_); }
  __device__ __forceinline__ void add(int j, double a, double b) {
    // A product of two floats is exact in double, so fma has the bits of multiply and add.
    sums.sum[j] = sizeof(S) == sizeof(float) ? __builtin_fma(a, b, sums.sum[j]) : sums.sum[j] + a * b;
  }
  __device__ __forceinline__ void add_in_run(int j, S a, S b) { run[j] += a * b; }
  __device__ __forceinline__ void largest(S size) { sums.largest = size > sums.largest ? size : sums.largest; }
};

// What a block needs during a pass, with state of type S in arithmetic and T in memory. All of its threads construct it
// together.
template <class S, class T>
struct BlockContext {
  using InShared = GroupScalars<S>[kInlineGroups];
  const Arguments& a;
  const InShared& of_group;  // of the first groups; those of others are formed when they are used
  const bool clips;          // a constant once everything is inlined

  __device__ BlockContext(const Arguments& arguments, InShared& shared, bool after_the_first_pass)
      : a(arguments), of_group(shared), clips(after_the_first_pass) {
    const int group = static_cast<int>(threadIdx.x);
    if (group < kInlineGroups && group < a.n_groups) shared[group] = group_scalars<S>(a, group, clip());
    __syncthreads();
  }
  // Not stored: a double takes two registers.
  __device__ double clip() const { return clips ? a.control->plan.clip : 1.0; }
  // Read when it is used: few steps use it, and registers are scarce.
  __device__ __forceinline__ Rounding rounding(const Segment& segment) const {
    return a.options.stochastic_rounding ? rounding_of(a.options, a.scalars->step, segment.shard) : Rounding{};
  }
  __device__ __forceinline__ Rounding rounding_of_array(unsigned array, const Segment& segment) const {
    if (sizeof(T) == sizeof(S)) return Rounding{};
    const auto kind = array == kGradPrev ? StateArray::grad_prev
                      : array == kD      ? StateArray::direction
                                         : StateArray::diagonal;
    return rounding_of_state(kind, a.scalars->step, segment.shard);
  }
  template <class Pass>
  __device__ __forceinline__ SegmentScalars<S> scalars(const Segment& segment) const {
    SegmentScalars<S> x;
    static_cast<GroupScalars<S>&>(x) =
        segment.group < kInlineGroups ? of_group[segment.group] : group_scalars<S>(a, segment.group, clip());
    x.inv_sqrt_bias = x.inv_sqrt_bias_prev = S{};
    x.matrix = Pass::kMixesMatrices && segment.matrices;
    if (Pass::kUsesStepCounts) {
      Bias bias = a.bias[&segment - a.segments];
      const double steps = *segment.steps;
      // False in a new workspace, after a load, or if the tensor of steps was written.
      const bool known = bias.next > 0.0 && bias.steps == steps && bias.beta2 == a.options.beta2;
      if (!known) bias = bias_of(a.options.beta2, steps);
      x.inv_sqrt_bias = inv_sqrt_bias_correction<S>(bias.next);
      x.inv_sqrt_bias_prev = inv_sqrt_bias_correction<S>(bias.now);
    }
    return x;
  }
};

// The gradient the method sees, from the scaled one.
template <class Pass, class S>
__device__ __forceinline__ S gradient(S g, S p, const SegmentScalars<S>& scalars) {
  return Pass::kAppliesL2Decay ? decayed_gradient(g, scalars.weight_decay, p) : g;
}

template <class S>
__device__ __forceinline__ S* array_ptr(void* base, std::int64_t local) {
  return static_cast<S*>(base) + local;
}

// The first of segments [low, high) that ends after `position`; high if none does.
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

// Q times four elements, half a tile apart, all in segment `here`. The state is aligned to 16 bytes; if kWide, p and g
// are too. `smem_offset`: of a resident tile's g in shared memory, followed by the array kKeptInSharedMemory; -1 if the
// tile is not resident. kLoaded: the first pass has left both there.
template <bool kMayReside, bool kLoaded, bool kWide, int Q, class S, class T, class E, class Pass, int K>
__device__ __forceinline__ void run_quads(const BlockContext<S, T>& context, const Pass& pass, const Segment& here,
                                          E* p_at, const E* g_at, std::int64_t position, int smem_offset,
                                          const SegmentScalars<S>& scalars, ThreadSums<S, K>& sums) {
  constexpr int kApart = kQuad * kThreads;
  constexpr bool kReadsGradient = Pass::kReadsGradient && !kLoaded;
  constexpr unsigned kInMemory = kLoaded ? ~Pass::kKeptInSharedMemory : ~0u;
  const unsigned reads = arrays_of<Pass>(here, pass.reads()) & kInMemory, writes = arrays_of<Pass>(here, pass.writes());
  const std::int64_t in_segment = position - here.offset;
  T* const d_at = array_ptr<T>(here.direction, in_segment);
  T* const diagonal_at = array_ptr<T>(here.diagonal, in_segment);
  T* const grad_prev_at = array_ptr<T>(here.grad_prev, in_segment);
  S* const origin_at = array_ptr<S>(here.origin, in_segment);
  S* const rows_at = Pass::kUsesRows ? array_ptr<S>(here.rows, in_segment) : nullptr;
  const std::int64_t pitch = Pass::kUsesRows ? here.pitch : 0;
  const bool reads_p = (reads & kP) || (kReadsGradient && Pass::kAppliesL2Decay && scalars.weight_decay != S{0});
  const int local = static_cast<int>(position % kTile);

  Raw<T> d_raw[Q] = {}, diagonal_raw[Q] = {}, grad_prev_raw[Q] = {};
  Raw<S> origin_raw[Q] = {}, g_loaded[Q] = {}, kept_loaded[Q] = {};
  Raw<E, kWide> g_raw[Q] = {}, p_raw[Q] = {};
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    load_quad(p_raw[q], p_at + q * kApart, reads_p);  // first: its predicate may wait for the segment's scalars
    load_quad(d_raw[q], d_at + q * kApart, reads & kD);
    load_quad(diagonal_raw[q], diagonal_at + q * kApart, reads & kDiagonal);
    load_quad(grad_prev_raw[q], grad_prev_at + q * kApart, reads & kGradPrev);
    if constexpr (Pass::kUsesOrigin) load_quad(origin_raw[q], origin_at + q * kApart, reads & kOrigin);
    load_quad(g_raw[q], g_at + q * kApart, kReadsGradient);
  }
  if constexpr (kLoaded) {
#pragma unroll
    for (int q = 0; q < Q; ++q) {
      const S* const from = resident<S>(smem_offset) + local + q * kApart;
      load_resident(from, g_loaded[q]);
      load_resident(from + kTile, kept_loaded[q]);
    }
  }
#pragma unroll
  for (int q = 0; q < Q; ++q) {
    S p[kQuad], g[kQuad], undecayed[kQuad] = {}, grad_prev[kQuad], d[kQuad], diagonal[kQuad], origin[kQuad];
    p_raw[q].decode(p), grad_prev_raw[q].decode(grad_prev), d_raw[q].decode(d), diagonal_raw[q].decode(diagonal);
    origin_raw[q].decode(origin);
    if constexpr (kLoaded) {
      g_loaded[q].decode(g);
      kept_loaded[q].decode(Pass::kKeptInSharedMemory == kD ? d : diagonal);
    } else {
      g_raw[q].decode(g);
#pragma unroll
      for (int l = 0; l < kQuad; ++l) {
        undecayed[l] = scaled_gradient(g[l], scalars.factor);
        g[l] = gradient<Pass>(undecayed[l], p[l], scalars);
      }
    }
    if (kMayReside && Pass::kBuiltFromOptionsAlone && Pass::kKeptInSharedMemory != 0 && smem_offset >= 0) {
      S* const to = resident<S>(smem_offset) + local + q * kApart;
      store_resident(to, g);
      store_resident(to + kTile, Pass::kKeptInSharedMemory == kD ? d : diagonal);
    }
    S run[K] = {};
#pragma unroll
    for (int l = 0; l < kQuad; ++l) {
      S* const rows = rows_at == nullptr ? nullptr : rows_at + q * kApart + l;
      At<S, K> at{p[l],      g[l],    undecayed[l], grad_prev[l], d[l], diagonal[l],
                  origin[l], scalars, sums,         run,          rows, pitch};
      pass(at);
      p[l] = at.p_, grad_prev[l] = at.grad_prev_, d[l] = at.d_, diagonal[l] = at.diagonal_, origin[l] = at.origin_;
    }
    end_run<Pass::kAddsInRuns>(sums, run);
    const auto store_state = [&](unsigned array, T* to, const S(&from)[kQuad]) {
      if (!(writes & array)) return;
      store_rounded_quad<true>(to + q * kApart, from, context.rounding_of_array(array, here), in_segment + q * kApart);
    };
    store_state(kDiagonal, diagonal_at, diagonal);
    store_state(kGradPrev, grad_prev_at, grad_prev);
    store_state(kD, d_at, d);
    if (writes & kOrigin) store_rounded_quad<true>(origin_at + q * kApart, origin, Rounding{}, 0);
    if ((writes & kP) && (Pass::kStoresEvenAtZeroAlpha || scalars.moves())) {
      store_rounded_quad<kWide>(p_at + q * kApart, p, context.rounding(here), in_segment + q * kApart);
    }
  }
}

// One element of a segment, of any type.
template <bool kMayReside, class S, class T, class Pass, int K>
__device__ __forceinline__ void run_one(const BlockContext<S, T>& context, const Pass& pass, const Segment& segment,
                                        std::int64_t position, int smem_offset, ThreadSums<S, K>& sums) {
  const SegmentScalars<S> scalars = context.template scalars<Pass>(segment);
  const unsigned reads = arrays_of<Pass>(segment, pass.reads()), writes = arrays_of<Pass>(segment, pass.writes());
  const std::int64_t in_segment = position - segment.offset;
  const bool resides = kMayReside && smem_offset >= 0;
  const bool loaded = resides && !Pass::kBuiltFromOptionsAlone;
  const int local = static_cast<int>(position % kTile);
  const bool reads_g = pass.kReadsGradient && !loaded;
  const bool reads_p = (reads & kP) || (reads_g && Pass::kAppliesL2Decay && scalars.weight_decay != S{0});

  S p = {}, g = {};
  with_element_type<S, Pass::kTakes16Bit>(segment.dtype, [&](auto element) {
    using E = decltype(element);
    if (reads_p) p = value_of(static_cast<const E*>(segment.p)[in_segment]);
    if (reads_g) g = value_of(static_cast<const E*>(segment.g)[in_segment]);
  });
  const S undecayed = scaled_gradient(g, scalars.factor);
  g = loaded ? resident<S>(smem_offset)[local] : gradient<Pass>(undecayed, p, scalars);
  S run[K] = {};
  At<S, K> at{p,
              g,
              undecayed,
              reads & kGradPrev ? value_of(*array_ptr<T>(segment.grad_prev, in_segment)) : S{},
              reads & kD ? value_of(*array_ptr<T>(segment.direction, in_segment)) : S{},
              reads & kDiagonal ? value_of(*array_ptr<T>(segment.diagonal, in_segment)) : S{},
              reads & kOrigin ? *array_ptr<S>(segment.origin, in_segment) : S{},
              scalars,
              sums,
              run,
              Pass::kUsesRows ? array_ptr<S>(segment.rows, in_segment) : nullptr,
              Pass::kUsesRows ? segment.pitch : 0};
  if (Pass::kBuiltFromOptionsAlone && Pass::kKeptInSharedMemory != 0 && resides) {
    resident<S>(smem_offset)[local] = at.g_;
    resident<S>(smem_offset)[kTile + local] = Pass::kKeptInSharedMemory == kD ? at.d_ : at.diagonal_;
  }
  pass(at);
  end_run<Pass::kAddsInRuns>(sums, run);
  const auto store_state = [&](unsigned array, void* to, S x) {
    if (!(writes & array)) return;
    assign_rounded(*array_ptr<T>(to, in_segment), x, context.rounding_of_array(array, segment), in_segment);
  };
  store_state(kDiagonal, segment.diagonal, at.diagonal_);
  store_state(kGradPrev, segment.grad_prev, at.grad_prev_);
  store_state(kD, segment.direction, at.d_);
  if (writes & kOrigin) *array_ptr<S>(segment.origin, in_segment) = at.origin_;
  if ((writes & kP) && (Pass::kStoresEvenAtZeroAlpha || scalars.moves())) {
    with_element_type<S, Pass::kTakes16Bit>(segment.dtype, [&](auto element) {
      assign_rounded(static_cast<decltype(element)*>(segment.p)[in_segment], at.p_, context.rounding(segment),
                     in_segment);
    });
  }
}

// Both quads of a tile at once, if there are registers for them: if the pass reads little, or the kernel has a whole
// multiprocessor, as that of one launch and those over state in bfloat16 have.
template <class S, class T, class Pass, bool kMayReside>
constexpr int kQuadsAtOnce = sizeof(S) != sizeof(float)             ? 1
                             : kMayReside || sizeof(T) != sizeof(S) ? Pass::kMostQuadsAtOnceInOneLaunch
                             : Pass::kBuiltFromOptionsAlone         ? Pass::kMostQuadsAtOnce
                                                                    : 1;

template <bool kMayReside, class S, class T, class Pass, int K>
__device__ __forceinline__ void run_tile(const BlockContext<S, T>& context, const Pass& pass, int tile, int smem_offset,
                                         ThreadSums<S, K>& sums) {
  const Arguments& a = context.a;
  const std::int64_t begin = std::int64_t{tile} * kTile, end = begin + kTile;
  const int first = first_segment(a, tile);
  if (first == a.n_segments || a.segments[first].offset >= end) return;
  const std::int64_t position = begin + kQuad * static_cast<int>(threadIdx.x);
  // The whole tile is in one segment: the usual case.
  const bool whole = a.segments[first].offset <= begin && a.segments[first].offset + a.segments[first].n >= end;
  const int beyond = whole ? first : first_segment(a, tile + 1);
  int s = first;
  constexpr int Q = kQuadsAtOnce<S, T, Pass, kMayReside>;
#pragma unroll 1
  for (int q = 0; q < 2; ++q) {
    const std::int64_t at = position + q * kQuad * kThreads;
    s = find_segment(a.segments, s, beyond, at);
    if (s == a.n_segments) return;
    const Segment& here = a.segments[s];
    if (here.offset <= at && here.offset + here.n >= at + kQuad && state_takes_quads<T>(here)) {
      const SegmentScalars<S> scalars = context.template scalars<Pass>(here);
      const bool wide = takes_quads(here, at - here.offset), both = Q == 2 && whole && wide;
      with_element_type<S, Pass::kTakes16Bit>(here.dtype, [&](auto element) {
        using E = decltype(element);
        E* const p_at = static_cast<E*>(here.p) + (at - here.offset);
        const E* const g_at = static_cast<const E*>(here.g) + (at - here.offset);
        const auto run = [&](auto loaded, auto wide, auto quads) {
          run_quads<kMayReside, loaded, wide, quads>(context, pass, here, p_at, g_at, at, smem_offset, scalars, sums);
        };
        const auto run_as = [&](auto loaded) {
          if (both) {
            run(loaded, std::true_type{}, std::integral_constant<int, Q>{});
          } else if (wide) {
            run(loaded, std::true_type{}, std::integral_constant<int, 1>{});
          } else {
            run(loaded, std::false_type{}, std::integral_constant<int, 1>{});
          }
        };
        if constexpr (kMayReside && !Pass::kBuiltFromOptionsAlone && Pass::kKeptInSharedMemory != 0) {
          if (smem_offset >= 0) return run_as(std::true_type{});
        }
        run_as(std::false_type{});
      });
      if (both) return;
      continue;
    }
#pragma unroll 1
    for (int l = 0; l < kQuad; ++l) {
      s = find_segment(a.segments, s, beyond, at + l);
      if (s == a.n_segments) return;
      const Segment& one = a.segments[s];
      if (one.offset > at + l) continue;
      run_one<kMayReside>(context, pass, one, at + l, smem_offset, sums);
    }
  }
}

}  // namespace
}  // namespace fastnlcg
