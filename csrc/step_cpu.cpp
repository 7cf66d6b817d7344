// The CPU step: the passes of passes.h over tiles, written once, compiled once per instruction set.
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
#include "passes.h"

namespace fastnlcg {
namespace {

// ---- what a pass sees of one vector ------------------------------------------------------------------------------

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

// What does not change from vector to vector.
struct Flags {
  bool maximize;
  bool streaming;  // g_prev is written but not read here: where it cannot stay in the cache, go around it
};

// The vector at element `i` of the stream, vector `k` of its block.
template <class S, class P>
struct At {
  const Stream<S, P>& stream;
  std::int64_t i;
  int k;
  const GroupLanes<S>& group;
  Sums<S>& sums;
  Flags flags;

  NLCG_INLINE Vector<S> g() const {
    Vector<S> g = load(stream.g + i);
    if (flags.maximize) g = -g;
    return group.decays ? decayed_gradient(g, group.weight_decay[k], p()) : g;
  }
  NLCG_INLINE Vector<S> p() const { return load(stream.p + i); }
  NLCG_INLINE Vector<S> grad_prev() const { return load(stream.grad_prev + i); }
  NLCG_INLINE Vector<S> d() const { return load(stream.d + i); }
  NLCG_INLINE Vector<S> h() const { return load(stream.h + i); }
  NLCG_INLINE Vector<S> alpha() const { return group.alpha[k]; }
  NLCG_INLINE Vector<S> alpha_prev() const { return group.alpha_prev[k]; }
  NLCG_INLINE bool moves() const { return group.moves; }
  NLCG_INLINE void set_p(Vector<S> p) { store(stream.p + i, p); }
  NLCG_INLINE void set_grad_prev(Vector<S> g) {
    if (flags.streaming) {
      store_streaming(stream.grad_prev + i, g);
    } else {
      store(stream.grad_prev + i, g);
    }
  }
  NLCG_INLINE void set_d(Vector<S> d) { store(stream.d + i, d); }
  NLCG_INLINE void set_h(Vector<S> h) { store(stream.h + i, h); }

  NLCG_INLINE auto wide(Vector<S> x) const { return widen(x); }
  NLCG_INLINE auto wide_grad_prev() const { return load_wide(stream.grad_prev + i); }
  NLCG_INLINE auto wide_d() const { return load_wide(stream.d + i); }
  template <class Wide>
  NLCG_INLINE void add(int j, const Wide& a, const Wide& b) {
    sums.sum[j].add_product(k, a, b);
  }
  NLCG_INLINE void largest(Vector<S> size) { sums.grad_max[k] = size > sums.grad_max[k] ? size : sums.grad_max[k]; }
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
NLCG_INLINE void one_block(const Pass& pass, const Stream<S, P>& stream, std::int64_t i, const GroupLanes<S>& group,
                           Sums<S>& sums, Flags flags, std::integer_sequence<int, K...>) {
  const auto one_vector = [&](int k) __attribute__((always_inline)) {
    At<S, P> at{stream, i + k * kLanes<S>, k, group, sums, flags};
    pass(at);
  };
  (one_vector(K), ...);
}

template <class Pass, class S, class P>
void run_blocks(const Pass& shared_pass, Stream<S, P> at, std::int64_t n, const GroupLanes<S>& shared_group,
                Sums<S>& shared_sums, Flags flags) {
  const Pass pass = shared_pass;  // copies: the compiler may then keep all of them in registers
  const GroupLanes<S> group = shared_group;
  Sums<S> sums = shared_sums;
  for (std::int64_t i = 0; i < n; i += kBlock) {
    one_block(pass, at, i, group, sums, flags, std::make_integer_sequence<int, kVectors<S>>{});
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
void run_staged(const Step& step, const Pass& pass, std::int64_t first, std::int64_t position, Sums<S>& sums,
                Flags flags) {
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
  run_blocks(pass, Stream<S, S>{block.p, block.g, block.grad_prev, block.d, block.h}, kBlock, lanes, sums, flags);
  const unsigned writes = pass.writes();
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S>(segment.dtype, [&](auto element) {
      const auto to = stream_at<decltype(element), S>(step, segment, position + lane);
      if (writes & kGradPrev) *to.grad_prev = block.grad_prev[lane];
      if (writes & kD) *to.d = block.d[lane];
      if ((writes & kP) && block.alpha[lane] != S{0}) assign(*to.p, block.p[lane]);
      if (writes & kH) *to.h = block.h[lane];
    });
  });
}

template <class S, class Pass>
void run_tile(const Step& step, const Pass& pass, Flags flags, std::int64_t tile, double* out) {
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
                   lanes_of<S>(step.groups[segment.group]), sums, flags);
      });
      position += whole;
    } else {
      run_staged(step, pass, s, position, sums, flags);
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
void reduce(const Step& step, const Pass& pass, double (&sums)[kMaxSums], bool streaming = false) {
  const Flags flags{step.options.maximize, streaming};
  const std::int64_t tiles = tiles_of(step.state.n);
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t done = begin; done < end; done += kStrip) {
      const std::int64_t strip = end - done < kStrip ? end - done : kStrip;
      const std::int64_t first = Pass::kBackward ? end - (done - begin) - strip : done;
      for (std::int64_t tile = first; tile < first + strip; ++tile) {
        run_tile<S>(step, pass, flags, tile, step.partials + tile * kMaxSums);
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
Constants<Vector<S>> in_all_lanes(const Constants<S>& c) {
  const auto all = [](S x) { return broadcast<Vector<S>>(x); };
  return {all(c.eps), all(c.beta), all(c.rsqrt_ys), all(c.rsqrt_shs), all(c.bound)};
}

// 2 million elements are 40 MB of parameters, gradients and state: more than a core's share of any cache.
constexpr std::int64_t kStreamingElements = std::int64_t{1} << 21;

// Whether pass 3 stores g_prev around the cache.
bool streams(const Step& step, const bool deferred) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(step.state.grad_prev) % kVectorBytes == 0;
  return aligned && !deferred && step.state.n >= kStreamingElements;
}

// ---- the step ----------------------------------------------------------------------------------------------------

template <class S>
void step_in(const Step& step) {
  using V = Vector<S>;
  const Options& o = step.options;
  const bool preconditioned = step.state.hessian_diag != nullptr;
  Course c = open_step(o, *step.scalars, preconditioned, step.set, step.loss);
  for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].alpha = step.groups[i].lr * c.next.ls_scale;
  const auto skip = [&] { step.scalars->skipped_steps += 1.0; };
  double sums[kMaxSums];

  if (preconditioned) {
    reduce<S>(step, CurvatureDot<V>{}, sums);
    decide_curvature(c, o, sums[0], sums[1], static_cast<double>(step.state.n), kLargest<S>);
    if (c.skip) return skip();
  }

  const Constants<V> curvature = in_all_lanes(constants<S>(c.eps, 0, c.next.ys, c.next.shs_used));
  reduce<S>(
      step,
      CurvatureAndDots<V>{curvature, preconditioned, c.curvature, !c.deferred, needs_rz_mid(c, o), needs_gd(c, o)},
      sums);
  decide_direction(c, o, sums[0], sums[1], sums[2]);
  if (c.skip) return skip();

  const Constants<V> direction = in_all_lanes(constants<S>(c.eps, c.next.beta, c.next.ys, c.next.shs_used));
  reduce<S>(step, DirectionAndMove<V>{direction, preconditioned, true, true, c.deferred}, sums,
            streams(step, c.deferred));
  conclude_step(c, sums[0], sums[1]);
  *step.scalars = c.next;
  for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].alpha_prev = step.groups[i].alpha;
  for (std::int64_t i = 0; i < step.n_segments; ++i) step.param_steps[step.segments[i].param] = c.next.step;
}

// ---- the parts ---------------------------------------------------------------------------------------------------

template <class S>
bool update_curvature_in(const Step& step, double* ys, double* shs) {
  using V = Vector<S>;
  double sums[kMaxSums];
  reduce<S>(step, CurvatureSums<V>{}, sums);
  *ys = sums[0] - sums[1];
  *shs = sums[2];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  reduce<S>(step, CurvatureAndDots<V>{in_all_lanes(constants<S>(1, 0, *ys, *shs)), true, true, true, false, false},
            sums);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, double* rz, double* rz_mid) {
  using V = Vector<S>;
  double sums[kMaxSums];
  const bool preconditioned = step.state.hessian_diag != nullptr, mid = step.state.grad_prev != nullptr;
  const Constants<V> c = in_all_lanes(constants<S>(step.options.eps, 0, 0, 0));
  reduce<S>(step, CurvatureAndDots<V>{c, preconditioned, false, false, mid, false}, sums);
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, double beta) {
  using V = Vector<S>;
  double sums[kMaxSums];
  const bool move = step.n_segments > 0 && step.segments[0].p != nullptr, keep_grad = step.state.grad_prev != nullptr;
  const Constants<V> c = in_all_lanes(constants<S>(step.options.eps, beta, 0, 0));
  reduce<S>(step, DirectionAndMove<V>{c, step.state.hessian_diag != nullptr, keep_grad, move, false}, sums,
            streams(step, false));
}

template <class S>
void state_norms_in(const Step& step, double* gg, double* dd, double* gd) {
  double sums[kMaxSums];
  reduce<S>(step, StateNorms<Vector<S>>{}, sums);
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
