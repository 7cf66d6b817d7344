// One tile on the CPU: a fixed range of the flat index, from segments to vectors, through a pass, and back.
//
// Runs of whole blocks inside one segment are read and written in place. A block that straddles segments, or the end of
// one, is gathered into a block on the stack, goes through the same code, and is scattered back. Lanes that no segment
// covers add zeros. So a sum's bits depend on the flat index alone.
//
// In an unnamed namespace, like simd.h: step_cpu.cpp includes it once per instruction set.
#pragma once

#include <utility>

#include "lanes.h"
#include "pass.h"

namespace fastnlcg {
namespace {

// ---- what a pass sees of one vector ------------------------------------------------------------------------------

// S: the state's type in arithmetic, T: in memory, P: that of parameters and gradients.
template <class S, class T, class P>
struct Arrays {
  std::int64_t local;  // of the first element in its segment
  P* p;
  const P* g;
  T* grad_prev;
  T* d;
  T* diagonal;
  S* origin;
  S* rows;
  std::int64_t pitch;
};

// The scalars of a segment: one value for all of its elements.
enum SegmentScalar {
  kAlpha,
  kAlphaPrev,
  kWeightDecay,
  kDecayFactor,
  kFactor,
  kInvSqrtBias,
  kInvSqrtBiasPrev,
  kSegmentScalars
};

template <class S, class Pass>
void scalars_of(const Step& step, const Segment& segment, double (&x)[kSegmentScalars]) {
  const Group& group = step.groups[segment.group];
  x[kAlpha] = group.alpha;
  x[kAlphaPrev] = *group.alpha_prev;
  x[kWeightDecay] = group.weight_decay;
  x[kDecayFactor] = 1.0 - group.alpha * group.weight_decay;
  x[kFactor] = group.factor;
  if constexpr (Pass::kUsesStepCounts) {
    const Bias& bias = step.bias[&segment - step.segments];
    x[kInvSqrtBias] = inv_sqrt_bias_correction<S>(bias.next);
    x[kInvSqrtBiasPrev] = inv_sqrt_bias_correction<S>(bias.now);
  }
}

// The same, lane by lane: a block that straddles segments has several values.
template <class S>
struct SegmentLanes {
  Vector<S> scalar[kSegmentScalars][kVectors<S>];
  bool decays;  // L2 weight decay is added to g
  bool scales;  // g is multiplied by a factor
  bool moves;   // false if alpha is 0: p then keeps every bit, the sign of a zero included
  bool matrix = false;
};

template <class S, class Pass>
struct Sums {
  static constexpr bool kRuns = Pass::kAddsInRuns && sizeof(S) == sizeof(float);
  Accumulator sum[Pass::kSums];
  Vector<S> largest[kVectors<S>] = {};
  Vector<S> run[kRuns ? Pass::kSums : 1][kVectors<S>] = {};

  NLCG_INLINE void end_run() {
    if constexpr (kRuns) {
      for (int j = 0; j < Pass::kSums; ++j) {
        for (int k = 0; k < kVectors<S>; ++k) sum[j].add(k, widen(run[j][k])), run[j][k] = Vector<S>{};
      }
    }
  }
};

// What does not change from vector to vector.
struct Flags {
  Rounding rounding;                         // of the segment
  Rounding of_grad_prev, of_d, of_diagonal;  // of its state in bfloat16
  bool nontemporal;                          // g_prev, or the origin, is stored around the cache
};

// The vector at element `i` of the arrays, which is vector `k` of its block.
template <class S, class T, class P, class Pass>
struct At {
  const Arrays<S, T, P>& arrays;
  std::int64_t i;
  int k;
  const SegmentLanes<S>& segment;
  Sums<S, Pass>& sums;
  Flags flags;
  Bits32 state_bits;  // random, for state in bfloat16

  NLCG_INLINE Vector<S> undecayed() const {
    const Vector<S> g = load(arrays.g + i);
    return segment.scales ? scaled_gradient(g, segment.scalar[kFactor][k]) : g;
  }
  NLCG_INLINE Vector<S> g() const {
    return segment.decays ? decayed_gradient(undecayed(), segment.scalar[kWeightDecay][k], p()) : undecayed();
  }
  NLCG_INLINE Vector<S> p() const { return load(arrays.p + i); }
  NLCG_INLINE Vector<S> grad_prev() const { return load(arrays.grad_prev + i); }
  NLCG_INLINE Vector<S> d() const { return load(arrays.d + i); }
  NLCG_INLINE Vector<S> diagonal() const { return load(arrays.diagonal + i); }
  NLCG_INLINE Vector<S> origin() const { return load(arrays.origin + i); }
  NLCG_INLINE Vector<S> row(int k) const { return load(arrays.rows + k * arrays.pitch + i); }
  NLCG_INLINE void set_row(int k, Vector<S> x) { store(arrays.rows + k * arrays.pitch + i, x); }
  NLCG_INLINE Vector<S> alpha() const { return segment.scalar[kAlpha][k]; }
  NLCG_INLINE Vector<S> alpha_prev() const { return segment.scalar[kAlphaPrev][k]; }
  NLCG_INLINE Vector<S> decay_factor() const { return segment.scalar[kDecayFactor][k]; }
  NLCG_INLINE Vector<S> inv_sqrt_bias() const { return segment.scalar[kInvSqrtBias][k]; }
  NLCG_INLINE Vector<S> inv_sqrt_bias_prev() const { return segment.scalar[kInvSqrtBiasPrev][k]; }
  NLCG_INLINE bool moves() const { return segment.moves; }
  NLCG_INLINE bool is_matrix() const { return segment.matrix; }
  NLCG_INLINE void set_p(Vector<S> p) { store_rounded(arrays.p + i, p, flags.rounding, arrays.local + i); }
  NLCG_INLINE void set_grad_prev(Vector<S> g) {
    store_perhaps_nontemporal(arrays.grad_prev + i, g, flags.of_grad_prev);
  }
  NLCG_INLINE void set_d(Vector<S> d) { store_state(arrays.d + i, d, 0); }
  NLCG_INLINE void set_diagonal(Vector<S> x) { store_state(arrays.diagonal + i, x, flags.of_diagonal.shift); }
  NLCG_INLINE void set_origin(Vector<S> x) { store_perhaps_nontemporal(arrays.origin + i, x, {}); }

  NLCG_INLINE auto wide(Vector<S> x) const { return widen(x); }
  NLCG_INLINE auto wide_grad_prev() const { return load_wide(arrays.grad_prev + i); }
  NLCG_INLINE auto wide_d() const { return load_wide(arrays.d + i); }
  template <class Wide>
  NLCG_INLINE void add(int j, const Wide& a, const Wide& b) {
    sums.sum[j].add_product(k, a, b);
  }
  NLCG_INLINE void add_in_run(int j, Vector<S> a, Vector<S> b) {
    if constexpr (Sums<S, Pass>::kRuns) {
      sums.run[j][k] += a * b;
    } else {
      add(j, wide(a), wide(b));
    }
  }
  NLCG_INLINE void largest(Vector<S> size) { sums.largest[k] = size > sums.largest[k] ? size : sums.largest[k]; }

 private:
  // The direction and the diagonal have the two halves of the same random bits.
  NLCG_INLINE void store_state(T* to, Vector<S> x, int shift) const {
    if constexpr (sizeof(T) == sizeof(S)) {
      store(to, x);
    } else {
      store_16bit(to, encode_bf16_stochastic(x, state_bits >> shift));
    }
  }
  template <class E>
  NLCG_INLINE void store_perhaps_nontemporal(E* to, Vector<S> x, const Rounding& rounding) const {
    if constexpr (sizeof(E) == sizeof(S)) {
      if (flags.nontemporal) return store_nontemporal(to, x);
    }
    store_rounded(to, x, rounding, arrays.local + i);
  }
};

// ---- from segments to blocks -------------------------------------------------------------------------------------

template <class S, class Pass>
SegmentLanes<S> lanes_of(const Step& step, const Segment& segment) {
  double x[kSegmentScalars] = {};
  scalars_of<S, Pass>(step, segment, x);
  SegmentLanes<S> lanes;
  for (int j = 0; j < kSegmentScalars; ++j) {
    for (int k = 0; k < kVectors<S>; ++k) lanes.scalar[j][k] = broadcast<Vector<S>>(static_cast<S>(x[j]));
  }
  lanes.decays = Pass::kAppliesL2Decay && x[kWeightDecay] != 0.0;
  lanes.scales = x[kFactor] != 1.0;
  lanes.moves = static_cast<S>(x[kAlpha]) != S{0};
  lanes.matrix = segment.matrices;
  return lanes;
}

template <class Pass, class S, class T, class P, int... Vectors>
NLCG_INLINE void one_block(const Pass& pass, const Arrays<S, T, P>& arrays, std::int64_t i,
                           const SegmentLanes<S>& segment, Sums<S, Pass>& sums, Flags flags,
                           std::integer_sequence<int, Vectors...>) {
  const auto one_vector = [&](int k) __attribute__((always_inline)) {
    const std::int64_t first = i + k * kLanes<S>;
    const Bits32 bits = sizeof(T) == sizeof(S) ? Bits32{} : random_lanes(flags.of_d, arrays.local + first);
    At<S, T, P, Pass> at{arrays, first, k, segment, sums, flags, bits};
    pass(at);
  };
  (one_vector(Vectors), ...);
}

// The `n` elements from `position` of the flat index on, all in whole blocks.
template <class Pass, class S, class T, class P>
void run_blocks(const Pass& shared_pass, Arrays<S, T, P> at, std::int64_t position, std::int64_t n,
                const SegmentLanes<S>& shared_segment, Sums<S, Pass>& shared_sums, Flags flags) {
  const Pass pass = shared_pass;  // copies, so that the compiler can keep all of them in registers
  const SegmentLanes<S> segment = shared_segment;
  Sums<S, Pass> sums = shared_sums;
  for (std::int64_t i = 0; i < n;) {
    const std::int64_t run_end = sums.kRuns ? (position + i) / kRun * kRun + kRun - position : n;
    for (const std::int64_t end = run_end < n ? run_end : n; i < end; i += kBlock) {
      one_block(pass, at, i, segment, sums, flags, std::make_integer_sequence<int, kVectors<S>>{});
    }
    if (i == run_end) sums.end_run();
  }
  shared_sums = sums;
}

template <class P, class S, class T>
Arrays<S, T, P> arrays_at(const Segment& segment, std::int64_t position) {
  const std::int64_t local = position - segment.offset;
  const auto state = [&](void* base) { return base ? static_cast<T*>(base) + local : nullptr; };
  const auto value = [&](void* base) { return base ? static_cast<S*>(base) + local : nullptr; };
  return {local,
          segment.p ? static_cast<P*>(segment.p) + local : nullptr,
          segment.g ? static_cast<const P*>(segment.g) + local : nullptr,
          state(segment.grad_prev),
          state(segment.direction),
          state(segment.diagonal),
          value(segment.origin),
          value(segment.rows),
          segment.pitch};
}

Rounding rounding_in(const Step& step, const Segment& segment) {
  if (!step.options.stochastic_rounding) return {};
  return rounding_of(step.options, step.scalars->step, segment.shard);
}

template <class S, class T>
Flags flags_in(const Step& step, const Segment& segment, bool nontemporal) {
  if constexpr (sizeof(T) == sizeof(S)) return {rounding_in(step, segment), {}, {}, {}, nontemporal};
  const auto of = [&](StateArray array) { return rounding_of_state(array, step.scalars->step, segment.shard); };
  return {rounding_in(step, segment), of(StateArray::grad_prev), of(StateArray::direction), of(StateArray::diagonal),
          nontemporal};
}

// A block on the stack. Lanes without a segment hold g = d = 0 and h or v = 1: they add zeros, and are not scattered.
template <class S>
struct alignas(kVectorBytes) Staged {
  S p[kBlock], g[kBlock], grad_prev[kBlock], d[kBlock], diagonal[kBlock], origin[kBlock];
  S scalar[kSegmentScalars][kBlock];
};

// Calls f(segment, lane) for every lane of the block at `position` that a segment covers; `first` is the first segment
// that ends after `position`.
template <class F>
NLCG_INLINE void for_covered_lanes(const Step& step, std::int64_t first, std::int64_t position, F&& f) {
  for (std::int64_t s = first; s < step.n_segments && step.segments[s].offset < position + kBlock; ++s) {
    const Segment& segment = step.segments[s];
    const std::int64_t begin = segment.offset > position ? segment.offset - position : 0;
    const std::int64_t end = segment.offset + segment.n - position;
    for (std::int64_t lane = begin; lane < end && lane < kBlock; ++lane) f(segment, lane);
  }
}

template <class S, class T, class Pass>
void run_staged(const Step& step, const Pass& pass, std::int64_t first, std::int64_t position, Sums<S, Pass>& sums) {
  Staged<S> block = {};
  for (S& x : block.diagonal) x = S{1};
  SegmentLanes<S> lanes;
  lanes.decays = lanes.scales = lanes.moves = false;
  double x[kSegmentScalars] = {};
  const Segment* known = nullptr;  // the segment whose scalars x holds
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S, Pass::kTakes16Bit>(segment.dtype, [&](auto element) {
      const auto from = arrays_at<decltype(element), S, T>(segment, position + lane);
      if (from.p) block.p[lane] = value_of(*from.p);
      if (Pass::kReadsGradient && from.g) block.g[lane] = value_of(*from.g);
      if (from.grad_prev) block.grad_prev[lane] = value_of(*from.grad_prev);
      if (from.d) block.d[lane] = value_of(*from.d);
      if (from.diagonal) block.diagonal[lane] = value_of(*from.diagonal);
      if (Pass::kUsesOrigin) block.origin[lane] = *from.origin;
    });
    if (known != &segment) scalars_of<S, Pass>(step, *(known = &segment), x);
    for (int j = 0; j < kSegmentScalars; ++j) block.scalar[j][lane] = static_cast<S>(x[j]);
    lanes.decays |= Pass::kAppliesL2Decay && x[kWeightDecay] != 0.0;
    lanes.scales |= x[kFactor] != 1.0;
    lanes.moves |= static_cast<S>(x[kAlpha]) != S{0};
  });
  static_assert(sizeof(lanes.scalar) == sizeof(block.scalar));
  __builtin_memcpy(lanes.scalar, block.scalar, sizeof(block.scalar));
  run_blocks(pass,
             Arrays<S, S, S>{0, block.p, block.g, block.grad_prev, block.d, block.diagonal, block.origin, nullptr, 0},
             position, kBlock, lanes, sums, Flags{});
  const unsigned writes = pass.writes();
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S, Pass::kTakes16Bit>(segment.dtype, [&](auto element) {
      const auto to = arrays_at<decltype(element), S, T>(segment, position + lane);
      const Flags flags = flags_in<S, T>(step, segment, false);
      if (writes & kGradPrev) assign_rounded(*to.grad_prev, block.grad_prev[lane], flags.of_grad_prev, to.local);
      if (writes & kD) assign_rounded(*to.d, block.d[lane], flags.of_d, to.local);
      if ((writes & kP) && (Pass::kStoresEvenAtZeroAlpha || block.scalar[kAlpha][lane] != S{0})) {
        assign_rounded(*to.p, block.p[lane], flags.rounding, to.local);
      }
      if (writes & kDiagonal) assign_rounded(*to.diagonal, block.diagonal[lane], flags.of_diagonal, to.local);
      if (writes & kOrigin) *to.origin = block.origin[lane];
    });
  });
}

// 2 million elements have 40 MB of parameters, gradients and state, which is more than a core's share of any cache.
constexpr std::int64_t kNontemporalElements = std::int64_t{1} << 21;

// Whether a pass stores g_prev, or the origin, around the cache: if it does not read the array, and the cache is too
// small.
template <class Pass, class S, class T, class P>
bool uses_nontemporal_stores(const Step& step, const Pass& pass, const Arrays<S, T, P>& at) {
  if (sizeof(T) != sizeof(S)) return false;
  const void* const once = Pass::kUsesOrigin ? static_cast<const void*>(at.origin) : at.grad_prev;
  const bool aligned = reinterpret_cast<std::uintptr_t>(once) % kVectorBytes == 0;
  const unsigned bit = Pass::kUsesOrigin ? kOrigin : kGradPrev;
  return aligned && (pass.writes() & ~pass.reads() & bit) && step.n >= kNontemporalElements;
}

// A block of which a single segment covers the first `count` lanes, and no other the rest: the end of a parameter.
template <class S, class T, class Pass>
void run_end(const Step& step, const Pass& pass, const Segment& segment, std::int64_t position, int count,
             Sums<S, Pass>& sums) {
  with_element_type<S, Pass::kTakes16Bit>(segment.dtype, [&](auto element) {
    const auto at = arrays_at<decltype(element), S, T>(segment, position);
    S p[kBlock] = {}, g[kBlock] = {}, grad_prev[kBlock] = {}, d[kBlock] = {}, diagonal[kBlock], origin[kBlock] = {};
    for (S& x : diagonal) x = S{1};
    const unsigned reads = arrays_of<Pass>(segment, pass.reads()), writes = arrays_of<Pass>(segment, pass.writes());
    const SegmentLanes<S> lanes = lanes_of<S, Pass>(step, segment);
    const auto gather = [&](S(&to)[kBlock], const auto* from) {
      for (int lane = 0; lane < count; ++lane) to[lane] = value_of(from[lane]);
    };
    const auto scatter = [&](auto* to, const S(&from)[kBlock], const Rounding& rounding) {
      for (int lane = 0; lane < count; ++lane) assign_rounded(to[lane], from[lane], rounding, at.local + lane);
    };
    if (Pass::kReadsGradient) gather(g, at.g);
    if ((reads & kP) || lanes.decays) gather(p, at.p);
    if (reads & kGradPrev) gather(grad_prev, at.grad_prev);
    if (reads & kD) gather(d, at.d);
    if (reads & kDiagonal) gather(diagonal, at.diagonal);
    if (reads & kOrigin) gather(origin, at.origin);
    run_blocks(pass, Arrays<S, S, S>{0, p, g, grad_prev, d, diagonal, origin, nullptr, 0}, position, kBlock, lanes,
               sums, Flags{});
    const Flags flags = flags_in<S, T>(step, segment, false);
    if (writes & kGradPrev) scatter(at.grad_prev, grad_prev, flags.of_grad_prev);
    if (writes & kD) scatter(at.d, d, flags.of_d);
    if (writes & kDiagonal) scatter(at.diagonal, diagonal, flags.of_diagonal);
    if (writes & kOrigin) scatter(at.origin, origin, {});
    if ((writes & kP) && (Pass::kStoresEvenAtZeroAlpha || lanes.moves)) scatter(at.p, p, flags.rounding);
  });
}

template <class S, class T, class Pass>
void run_tile(const Step& step, const Pass& pass, std::int64_t tile, double* out) {
  Sums<S, Pass> sums;
  std::int64_t position = tile * kTile;
  const std::int64_t tile_end = position + kTile < step.n ? position + kTile : step.n;
  // The first segment that ends after `position`.
  std::int64_t s = 0;
  for (std::int64_t high = step.n_segments; s < high;) {
    const std::int64_t middle = s + (high - s) / 2;
    if (step.segments[middle].offset + step.segments[middle].n > position) {
      high = middle;
    } else {
      s = middle + 1;
    }
  }
  while (position < tile_end) {
    while (s < step.n_segments && step.segments[s].offset + step.segments[s].n <= position) ++s;
    if (s == step.n_segments || step.segments[s].offset >= tile_end) break;
    const Segment& segment = step.segments[s];
    if (segment.offset >= position + kBlock) {  // a hole: continue with the block in which the segment begins
      const std::int64_t begin = segment.offset / kBlock * kBlock;
      if (begin / kRun != position / kRun) sums.end_run();
      position = begin;
      continue;
    }
    const std::int64_t segment_end = segment.offset + segment.n;
    const std::int64_t end = segment_end < tile_end ? segment_end : tile_end;
    const std::int64_t whole = (end - position) / kBlock * kBlock;
    if (segment.offset <= position && whole > 0) {
      with_element_type<S, Pass::kTakes16Bit>(segment.dtype, [&](auto element) {
        const auto at = arrays_at<decltype(element), S, T>(segment, position);
        const Flags flags = flags_in<S, T>(step, segment, uses_nontemporal_stores(step, pass, at));
        run_blocks(pass, at, position, whole, lanes_of<S, Pass>(step, segment), sums, flags);
      });
      position += whole;
    } else {
      if constexpr (!Pass::kUsesRows) {
        const bool alone = s + 1 == step.n_segments || step.segments[s + 1].offset >= position + kBlock;
        if (alone && segment.offset <= position) {
          run_end<S, T>(step, pass, segment, position, static_cast<int>(segment_end - position), sums);
        } else {
          run_staged<S, T>(step, pass, s, position, sums);
        }
      }
      position += kBlock;
    }
  }
  sums.end_run();
  for (int j = 0; j < Pass::kSums; ++j) out[j] = sums.sum[j].total();
  if constexpr (Pass::kFormsLargest) {
    static_assert(Pass::kSums < kMaxSums);
    S largest{};
    for (const Vector<S>& v : sums.largest) {
      for (int lane = 0; lane < kLanes<S>; ++lane) largest = v[lane] > largest ? v[lane] : largest;
    }
    out[Pass::kSums] = static_cast<double>(largest);
  }
}

}  // namespace
}  // namespace fastnlcg
