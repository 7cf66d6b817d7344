// The three passes of a step over tiles, written once, compiled once per instruction set.
//
//     pass 1   reads g, d              sum(g s), max|g|                          8 bytes per float32 parameter
//     pass 2   reads g, g_prev, d, h   writes h; rz_new, rz_mid, sum(g d)       20
//     pass 3   reads p, g, d, h        writes p, d, g_prev; sum(g s), sum(s h s) 28
//
// ys = sum(y s) = sum(g s) - sum(g_prev s): pass 3 forms the second sum while it has both factors in registers, so the
// next step's pass 1 needs to stream only g and d. Both are sums of the stored numbers in the same order: an unchanged
// gradient gives ys = 0 exactly.
//
// A tile is a fixed range of the flat state. Inside it, runs of whole blocks that lie in one segment are streamed; a
// block that straddles segments (or the end) is gathered into a block on the stack, goes through the same code, and is
// scattered back. Lanes that no segment covers add zeros. So a sum's bits depend on the flat index alone.
#include "step_cpu.h"

#include <omp.h>
#include <sys/types.h>
#include <unistd.h>

#include <utility>

#include "lanes.h"
#include "nlcg_math.h"

namespace fastnlcg {
namespace {

// ---- what a pass sees of one block -------------------------------------------------------------------------------

template <class S, class P>
struct Stream {
  P* p;
  const P* g;
  S* grad_prev;
  S* d;
  S* h;
};

// A group's scalars, lane by lane: a straddling block may touch several groups.
template <class S>
struct GroupLanes {
  Vector<S> alpha[kVectors<S>];
  Vector<S> alpha_prev[kVectors<S>];
  Vector<S> weight_decay[kVectors<S>];
  bool decays;
  bool moves;  // false where alpha is 0: then p keeps every bit, the sign of a zero included
};

template <class S>
struct Sums {
  Accumulator sum[kMaxSums];
  Vector<S> grad_max[kVectors<S>] = {};
};

template <class S>
struct Constants {
  Vector<S> eps, beta, rsqrt_ys, rsqrt_shs, bound;
  bool maximize;
};

template <class S, class P>
NLCG_INLINE Vector<S> gradient(const Stream<S, P>& at, std::int64_t i, int k, const GroupLanes<S>& group,
                               bool maximize) {
  Vector<S> g = load(at.g + i);
  if (maximize) g = -g;
  return group.decays ? decayed_gradient(g, group.weight_decay[k], load(at.p + i)) : g;
}

// Each pass is a functor over one vector: `i` is its element in the stream, `k` its place in the block.

template <class S>
struct CurvatureDot {  // pass 1
  static constexpr bool kWritesMove = false, kWritesCurvature = false, kMaxGradient = true, kBackward = false;
  Constants<S> c;
  template <class P>
  NLCG_INLINE void operator()(const Stream<S, P>& at, std::int64_t i, int k, const GroupLanes<S>& group,
                              Sums<S>& sums) const {
    const Vector<S> g = gradient(at, i, k, group, c.maximize);
    const Vector<S> s = scaled_direction(group.alpha_prev[k], load(at.d + i));
    sums.sum[0].add_product(k, widen(g), widen(s));
    const Vector<S> size = magnitude(g);
    sums.grad_max[k] = size > sums.grad_max[k] ? size : sums.grad_max[k];
  }
};

template <class S>
struct CurvatureSums {  // all of ys and shs at once, for a caller without the sums of the step before
  static constexpr bool kWritesMove = false, kWritesCurvature = false, kMaxGradient = false, kBackward = false;
  Constants<S> c;
  template <class P>
  NLCG_INLINE void operator()(const Stream<S, P>& at, std::int64_t i, int k, const GroupLanes<S>& group,
                              Sums<S>& sums) const {
    const Vector<S> s = scaled_direction(group.alpha_prev[k], load(at.d + i));
    const auto wide_s = widen(s);
    sums.sum[0].add_product(k, widen(gradient(at, i, k, group, c.maximize)), wide_s);
    sums.sum[1].add_product(k, load_wide(at.grad_prev + i), wide_s);
    sums.sum[2].add_product(k, widen(curvature_along(load(at.h + i), s)), wide_s);
  }
};

template <class S>
struct CurvatureAndDots {  // pass 2
  static constexpr bool kWritesMove = false, kWritesCurvature = true, kMaxGradient = false, kBackward = true;
  Constants<S> c;
  bool preconditioned, curvature, store_h, mid, descent;
  template <class P>
  NLCG_INLINE void operator()(const Stream<S, P>& at, std::int64_t i, int k, const GroupLanes<S>& group,
                              Sums<S>& sums) const {
    const Vector<S> g = gradient(at, i, k, group, c.maximize);
    const auto wide_g = widen(g);
    if (!preconditioned) {
      sums.sum[0].add_product(k, wide_g, wide_g);
      if (mid) sums.sum[1].add_product(k, wide_g, load_wide(at.grad_prev + i));
    } else {
      Vector<S> h = load(at.h + i);
      if (mid) {
        const Vector<S> w_prev = preconditioned_gradient(load(at.grad_prev + i), h, c.eps);
        sums.sum[1].add_product(k, wide_g, widen(w_prev));
      }
      if (curvature) {
        const Vector<S> y = gradient_change(g, load(at.grad_prev + i));
        const Vector<S> s = scaled_direction(group.alpha_prev[k], load(at.d + i));
        h = bfgs_diagonal(h, y, s, c.rsqrt_ys, c.rsqrt_shs, c.bound);
        if (store_h) store(at.h + i, h);
      }
      sums.sum[0].add_product(k, wide_g, widen(preconditioned_gradient(g, h, c.eps)));
    }
    if (descent) sums.sum[2].add_product(k, wide_g, load_wide(at.d + i));
  }
};

template <class S>
struct DirectionAndMove {  // pass 3
  static constexpr bool kWritesMove = true, kWritesCurvature = false, kMaxGradient = false, kBackward = false;
  Constants<S> c;
  bool preconditioned, keep_grad, move;
  bool streaming;  // g_prev is written but not read here: where it cannot stay in the cache, go around it
  template <class P>
  NLCG_INLINE void operator()(const Stream<S, P>& at, std::int64_t i, int k, const GroupLanes<S>& group,
                              Sums<S>& sums) const {
    const Vector<S> g = gradient(at, i, k, group, c.maximize);
    const Vector<S> h = preconditioned ? load(at.h + i) : Vector<S>{};
    const Vector<S> w = preconditioned ? preconditioned_gradient(g, h, c.eps) : g;
    const Vector<S> d = conjugate_direction(w, c.beta, load(at.d + i));
    const Vector<S> s = scaled_direction(group.alpha[k], d);
    store(at.d + i, d);
    if (keep_grad) {
      if (streaming) {
        store_streaming(at.grad_prev + i, g);
      } else {
        store(at.grad_prev + i, g);
      }
    }
    if (move && group.moves) store(at.p + i, moved(load(at.p + i), s));
    if (preconditioned) {
      const auto wide_s = widen(s);
      sums.sum[0].add_product(k, widen(g), wide_s);
      sums.sum[1].add_product(k, widen(curvature_along(h, s)), wide_s);
    }
  }
};

template <class S>
struct StateNorms {  // for diagnostics: |g_prev|^2, |d|^2, g_prev . d
  static constexpr bool kWritesMove = false, kWritesCurvature = false, kMaxGradient = false, kBackward = false;
  Constants<S> c;
  template <class P>
  NLCG_INLINE void operator()(const Stream<S, P>& at, std::int64_t i, int k, const GroupLanes<S>&,
                              Sums<S>& sums) const {
    const auto g = load_wide(at.grad_prev + i), d = load_wide(at.d + i);
    sums.sum[0].add_product(k, g, g);
    sums.sum[1].add_product(k, d, d);
    sums.sum[2].add_product(k, g, d);
  }
};

// ---- from segments to blocks -------------------------------------------------------------------------------------

template <class S>
GroupLanes<S> lanes_of(const Group& group) {
  GroupLanes<S> lanes;
  for (int k = 0; k < kVectors<S>; ++k) {
    lanes.alpha[k] = broadcast<Vector<S>>(static_cast<S>(group.alpha));
    lanes.alpha_prev[k] = broadcast<Vector<S>>(static_cast<S>(group.alpha_prev));
    lanes.weight_decay[k] = broadcast<Vector<S>>(static_cast<S>(group.weight_decay));
  }
  lanes.decays = group.weight_decay != 0.0;
  lanes.moves = group.alpha != 0.0;
  return lanes;
}

template <class Pass, class S, class P, int... K>
NLCG_INLINE void one_block(const Pass& pass, const Stream<S, P>& at, std::int64_t i, const GroupLanes<S>& group,
                           Sums<S>& sums, std::integer_sequence<int, K...>) {
  (pass(at, i + K * kLanes<S>, K, group, sums), ...);
}

template <class Pass, class S, class P>
void run_blocks(const Pass& shared_pass, Stream<S, P> at, std::int64_t n, const GroupLanes<S>& shared_group,
                Sums<S>& shared_sums) {
  const Pass pass = shared_pass;  // copies: the compiler may then keep all of them in registers
  const GroupLanes<S> group = shared_group;
  Sums<S> sums = shared_sums;
  for (std::int64_t i = 0; i < n; i += kBlock) {
    one_block(pass, at, i, group, sums, std::make_integer_sequence<int, kVectors<S>>{});
  }
  shared_sums = sums;
}

template <class P, class S>
Stream<S, P> stream_at(const Step& step, const Segment& segment, std::int64_t position) {
  const std::int64_t local = position - segment.offset;
  const auto state = [&](void* base) { return base ? static_cast<S*>(base) + position : nullptr; };
  return {segment.p ? static_cast<P*>(segment.p) + local : nullptr,
          segment.g ? static_cast<const P*>(segment.g) + local : nullptr, state(step.state.grad_prev),
          state(step.state.direction), state(step.state.hessian_diag)};
}

// Calls f(P{}) with the element type of the segment's p and g.
template <class S, class F>
NLCG_INLINE void with_element_type(DType dtype, F&& f) {
  if constexpr (sizeof(S) == sizeof(double)) {
    f(double{});
  } else if (dtype == DType::f32) {
    f(float{});
  } else if (dtype == DType::bf16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

// One block on the stack. Lanes without a segment hold g = d = 0, h = 1: they add zeros and are not scattered.
template <class S>
struct alignas(kVectorBytes) Staged {
  S p[kBlock], g[kBlock], grad_prev[kBlock], d[kBlock], h[kBlock];
  S alpha[kBlock], alpha_prev[kBlock], weight_decay[kBlock];
};

// Calls f(segment, lane) for every covered lane of the block at `position`; `first` is the first segment ending after
// it.
template <class F>
NLCG_INLINE void for_covered_lanes(const Step& step, std::int64_t first, std::int64_t position, F&& f) {
  for (std::int64_t s = first; s < step.n_segments && step.segments[s].offset < position + kBlock; ++s) {
    const Segment& segment = step.segments[s];
    const std::int64_t begin = segment.offset > position ? segment.offset - position : 0;
    const std::int64_t end = segment.offset + segment.n - position;
    for (std::int64_t lane = begin; lane < end && lane < kBlock; ++lane) f(segment, lane);
  }
}

template <class S, class Pass>
void run_staged(const Step& step, const Pass& pass, std::int64_t first, std::int64_t position, Sums<S>& sums) {
  Staged<S> block = {};
  for (S& h : block.h) h = S{1};
  bool decays = false, moves = false;
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S>(segment.dtype, [&](auto element) {
      const auto from = stream_at<decltype(element), S>(step, segment, position + lane);
      if (from.p) block.p[lane] = value_of(*from.p);
      if (from.g) block.g[lane] = value_of(*from.g);
      if (from.grad_prev) block.grad_prev[lane] = *from.grad_prev;
      if (from.d) block.d[lane] = *from.d;
      if (from.h) block.h[lane] = *from.h;
    });
    const Group& group = step.groups[segment.group];
    block.alpha[lane] = static_cast<S>(group.alpha);
    block.alpha_prev[lane] = static_cast<S>(group.alpha_prev);
    block.weight_decay[lane] = static_cast<S>(group.weight_decay);
    decays |= group.weight_decay != 0.0;
    moves |= group.alpha != 0.0;
  });
  GroupLanes<S> lanes;
  __builtin_memcpy(lanes.alpha, block.alpha, sizeof(block.alpha));
  __builtin_memcpy(lanes.alpha_prev, block.alpha_prev, sizeof(block.alpha_prev));
  __builtin_memcpy(lanes.weight_decay, block.weight_decay, sizeof(block.weight_decay));
  lanes.decays = decays;
  lanes.moves = moves;
  run_blocks(pass, Stream<S, S>{block.p, block.g, block.grad_prev, block.d, block.h}, kBlock, lanes, sums);
  // A pass leaves alone what it does not write, so copying the block back restores those elements to themselves; p is
  // the exception, because its type may have rounded it, and belongs to the caller where the pass does not move it.
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S>(segment.dtype, [&](auto element) {
      const auto to = stream_at<decltype(element), S>(step, segment, position + lane);
      if (to.grad_prev && Pass::kWritesMove) *to.grad_prev = block.grad_prev[lane];
      if (to.d && Pass::kWritesMove) *to.d = block.d[lane];
      if (to.p && Pass::kWritesMove && block.alpha[lane] != S{0}) assign(*to.p, block.p[lane]);
      if (to.h && Pass::kWritesCurvature) *to.h = block.h[lane];
    });
  });
}

template <class S, class Pass>
void run_tile(const Step& step, const Pass& pass, std::int64_t tile, double* out) {
  Sums<S> sums;
  std::int64_t position = tile * kTile;
  const std::int64_t tile_end = position + kTile < step.state.n ? position + kTile : step.state.n;
  // First segment that ends after `position`.
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
    if (segment.offset >= position + kBlock) {  // a hole: on to the block where the segment begins
      position = segment.offset / kBlock * kBlock;
      continue;
    }
    const std::int64_t segment_end = segment.offset + segment.n;
    const std::int64_t end = segment_end < tile_end ? segment_end : tile_end;
    const std::int64_t whole = (end - position) / kBlock * kBlock;
    if (segment.offset <= position && whole > 0) {
      with_element_type<S>(segment.dtype, [&](auto element) {
        run_blocks(pass, stream_at<decltype(element), S>(step, segment, position), whole,
                   lanes_of<S>(step.groups[segment.group]), sums);
      });
      position += whole;
    } else {
      run_staged(step, pass, s, position, sums);
      position += kBlock;
    }
  }
  for (int j = 0; j < kMaxSums; ++j) out[j] = sums.sum[j].total();
  if constexpr (Pass::kMaxGradient) {
    S largest{};
    for (const Vector<S>& v : sums.grad_max) {
      for (int lane = 0; lane < kLanes<S>; ++lane) largest = v[lane] > largest ? v[lane] : largest;
    }
    out[1] = static_cast<double>(largest);
  }
}

// ---- threads -----------------------------------------------------------------------------------------------------

// libgomp's pool does not survive fork(): a child that enters a parallel region hangs. It computes alone instead, with
// the same bits.
bool forked() {
  static const pid_t owner = getpid();
  return getpid() != owner;
}

// Pass 2 walks backwards, in strips of half a megabyte per stream: it finds in the cache what pass 1 read last, and
// pass 3, forwards again, what pass 2 left. A strip is long enough for the hardware's prefetchers, which like to walk
// forwards.
constexpr std::int64_t kStrip = 32;

// Runs the pass over all tiles and adds up the partial sums in the order of the tiles.
template <class S, class Pass>
void reduce(const Step& step, const Pass& pass, double (&sums)[kMaxSums]) {
  const std::int64_t tiles = tiles_of(step.state.n);
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t done = begin; done < end; done += kStrip) {
      const std::int64_t strip = end - done < kStrip ? end - done : kStrip;
      const std::int64_t first = Pass::kBackward ? end - (done - begin) - strip : done;
      for (std::int64_t tile = first; tile < first + strip; ++tile) {
        run_tile<S>(step, pass, tile, step.partials + tile * kMaxSums);
      }
    }
  };
  // Below four tiles a thread, waking a thread costs more than it brings.
  const std::int64_t useful = tiles / 4 < step.threads ? tiles / 4 : step.threads;
  if (useful <= 1 || forked()) {
    range(0, tiles);
    _mm_sfence();
  } else {
#pragma omp parallel num_threads(static_cast<int>(useful))
    {
      const std::int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
      range(tiles * thread / threads, tiles * (thread + 1) / threads);
      _mm_sfence();  // for streaming stores
    }
  }
  for (double& sum : sums) sum = 0.0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const double* partial = step.partials + tile * kMaxSums;
    sums[0] += partial[0];
    if constexpr (Pass::kMaxGradient) {
      sums[1] = partial[1] > sums[1] ? partial[1] : sums[1];
    } else {
      sums[1] += partial[1];
    }
    sums[2] += partial[2];
  }
}

template <class S>
constexpr double kLargest = sizeof(S) == sizeof(float) ? kLargestFloat : kLargestDouble;

template <class S>
Constants<S> constants(const Step& step, double eps, double beta, double ys, double shs) {
  const double bound = 0.25 * kLargest<S>;
  const auto all = [](double x) { return broadcast<Vector<S>>(static_cast<S>(x)); };
  const auto rsqrt = [&](double x) { return x > 0.0 ? at_most(1.0 / __builtin_sqrt(x), bound) : 0.0; };
  return {all(eps), all(beta), all(rsqrt(ys)), all(rsqrt(shs)), all(bound), step.options.maximize};
}

// 2 million elements are 40 MB of parameters, gradients and state: more than a core's share of any cache.
constexpr std::int64_t kStreamingElements = std::int64_t{1} << 21;

template <class S>
DirectionAndMove<S> direction_pass(const Step& step, double eps, double beta, bool move) {
  const void* grad_prev = step.state.grad_prev;
  const bool aligned = reinterpret_cast<std::uintptr_t>(grad_prev) % kVectorBytes == 0;
  return {constants<S>(step, eps, beta, 0, 0), step.state.hessian_diag != nullptr, grad_prev != nullptr, move,
          aligned && step.state.n >= kStreamingElements};
}

// ---- the step ----------------------------------------------------------------------------------------------------

template <class S>
void step_in(const Step& step) {
  const Options& o = step.options;
  Scalars next = *step.scalars;
  const bool first = next.step == 0.0;
  const bool preconditioned = step.state.hessian_diag != nullptr;
  const bool same_course = !first && !step.set_changed;  // g_prev and d speak of the parameters that move now
  const double eps = first ? 0.0 : o.eps;                // z = -g / h in the first step
  const double n = static_cast<double>(step.state.n);
  double sums[kMaxSums];

  if (o.line_search && is_finite(step.loss)) {
    const double loss = o.maximize ? -step.loss : step.loss;
    next.ls_scale = line_search_scale(o, next.ls_scale, loss, next.loss_prev);
    next.loss_prev = loss;
  }
  for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].alpha = step.groups[i].lr * next.ls_scale;

  const auto skip = [&] { step.scalars->skipped_steps += 1.0; };

  double ys = 0.0, grad_max = 0.0;
  bool curvature = false;
  if (preconditioned) {
    reduce<S>(step, CurvatureDot<S>{constants<S>(step, eps, 0, 0, 0)}, sums);
    grad_max = sums[1];
    if (o.skip_nonfinite && !(is_finite(sums[0]) && is_finite(grad_max))) return skip();
    ys = same_course ? sums[0] - next.gs : 0.0;
    curvature = same_course && curvature_accepted(ys, next.shs, o.curvature_eps);
  }

  CurvatureAndDots<S> dots{constants<S>(step, eps, 0, ys, next.shs),
                           preconditioned,
                           curvature,
                           true,
                           same_course && (o.update == UpdateRule::polak_ribiere || o.restart == Restart::powell),
                           same_course && o.restart == Restart::descent};
  const auto finite = [&] { return is_finite(sums[0]) && is_finite(sums[1]) && is_finite(sums[2]); };
  if (curvature && o.skip_nonfinite && may_overflow(grad_max, next.grad_max, eps, n, kLargest<S>)) {
    dots.store_h = false;  // a rehearsal
    reduce<S>(step, dots, sums);
    if (!finite()) return skip();
    dots.store_h = true;
  }
  reduce<S>(step, dots, sums);
  if (o.skip_nonfinite && !finite()) return skip();  // no h has been written: see may_overflow
  const double rz_new = sums[0], rz_mid = sums[1], gd = sums[2];

  double beta = same_course ? conjugacy(o.update, next.rz, rz_new, rz_mid) : 0.0;
  if (restart_due(o, next.step, beta, rz_new, rz_mid, gd)) beta = 0.0;

  reduce<S>(step, direction_pass<S>(step, eps, beta, true), sums);

  next.step += 1.0;
  next.rz = rz_new;
  next.beta = beta;
  next.ys = ys;
  next.shs_used = same_course ? next.shs : 0.0;
  next.updated = curvature ? 1.0 : 0.0;
  next.gs = sums[0];
  next.shs = sums[1];
  next.grad_max = grad_max;
  *step.scalars = next;
  for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].alpha_prev = step.groups[i].alpha;
  for (std::int64_t i = 0; i < step.n_segments; ++i) step.param_steps[step.segments[i].param] = next.step;
}

// ---- the parts ---------------------------------------------------------------------------------------------------

template <class S>
bool update_curvature_in(const Step& step, double* ys, double* shs) {
  double sums[kMaxSums];
  reduce<S>(step, CurvatureSums<S>{constants<S>(step, 0, 0, 0, 0)}, sums);
  *ys = sums[0] - sums[1];
  *shs = sums[2];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  reduce<S>(step, CurvatureAndDots<S>{constants<S>(step, 1, 0, *ys, *shs), true, true, true, false, false}, sums);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, double* rz, double* rz_mid) {
  double sums[kMaxSums];
  const bool preconditioned = step.state.hessian_diag != nullptr;
  reduce<S>(step,
            CurvatureAndDots<S>{constants<S>(step, step.options.eps, 0, 0, 0), preconditioned, false, false,
                                step.state.grad_prev != nullptr, false},
            sums);
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, double beta) {
  double sums[kMaxSums];
  const bool move = step.n_segments > 0 && step.segments[0].p != nullptr;
  reduce<S>(step, direction_pass<S>(step, step.options.eps, beta, move), sums);
}

template <class S>
void state_norms_in(const Step& step, double* gg, double* dd, double* gd) {
  double sums[kMaxSums];
  reduce<S>(step, StateNorms<S>{constants<S>(step, 0, 0, 0, 0)}, sums);
  *gg = sums[0];
  *dd = sums[1];
  *gd = sums[2];
}

#define NLCG_VERB(verb)                                                                               \
  [](const Step& step, auto... args) {                                                                \
    return step.state.dtype == DType::f64 ? verb<double>(step, args...) : verb<float>(step, args...); \
  }

}  // namespace

extern const CpuVerbs FASTNLCG_ISA_SYMBOL;
const CpuVerbs FASTNLCG_ISA_SYMBOL = {
    FASTNLCG_ISA_NAME,
    NLCG_VERB(step_in),
    NLCG_VERB(update_curvature_in),
    NLCG_VERB(preconditioned_dots_in),
    NLCG_VERB(update_direction_in),
    NLCG_VERB(state_norms_in),
};

}  // namespace fastnlcg
