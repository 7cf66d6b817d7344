// The CPU step: the passes of passes.h over tiles, written once, compiled once per instruction set.
//
// A tile is a fixed range of the flat index. Inside it, runs of whole blocks that lie in one segment are streamed; a
// block that straddles segments (or the end) is gathered into a block on the stack, goes through the same code, and is
// scattered back. Lanes that no segment covers add zeros. So a sum's bits depend on the flat index alone.
#include "step_cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#include <sys/types.h>
#include <unistd.h>

#include <utility>

#include "lanes.h"
#include "passes_descent.h"

namespace fastnlcg {
namespace {

// ---- what a pass sees of one vector ------------------------------------------------------------------------------

template <class S, class P>
struct Buffers {
  std::int64_t local;  // of the first element in its segment
  P* p;
  const P* g;
  S* grad_prev;
  S* d;
  S* diagonal;
  S* origin;
};

// What is one number in a segment, and its value there.
enum Number { kAlpha, kAlphaPrev, kWeightDecay, kDecayFactor, kFactor, kInvSqrtBias, kInvSqrtBiasPrev, kNumbers };

template <class S, class Pass>
void numbers_of(const Step& step, const Segment& segment, double (&x)[kNumbers]) {
  const Group& group = step.groups[segment.group];
  x[kAlpha] = group.alpha;
  x[kAlphaPrev] = *group.alpha_prev;
  x[kWeightDecay] = group.weight_decay;
  x[kDecayFactor] = 1.0 - group.alpha * group.weight_decay;
  x[kFactor] = group.factor;
  if constexpr (Pass::kBiasCorrected) {
    const Bias& bias = step.bias[&segment - step.segments];
    x[kInvSqrtBias] = inv_sqrt_bias_correction<S>(bias.next);
    x[kInvSqrtBiasPrev] = inv_sqrt_bias_correction<S>(bias.now);
  }
}

// These numbers lane by lane: a straddling block may touch several segments.
template <class S>
struct SegmentLanes {
  Vector<S> number[kNumbers][kVectors<S>];
  bool decays;  // g takes L2 weight decay
  bool scales;  // g takes a factor
  bool moves;   // false where alpha is 0: then p keeps every bit, the sign of a zero included
};

template <class S, int K>
struct Sums {
  Accumulator sum[K];
  Vector<S> largest[kVectors<S>] = {};
};

// What does not change from vector to vector.
struct Flags {
  Rounding rounding;  // of the segment
  bool streaming;     // g_prev, or the origin, is written but not read here: if the cache is too small, go around it
};

// The vector at element `i` of the stream, vector `k` of its block.
template <class S, class P, int K>
struct At {
  const Buffers<S, P>& stream;
  std::int64_t i;
  int k;
  const SegmentLanes<S>& segment;
  Sums<S, K>& sums;
  Flags flags;

  NLCG_INLINE Vector<S> undecayed() const {
    const Vector<S> g = load(stream.g + i);
    return segment.scales ? scaled_gradient(g, segment.number[kFactor][k]) : g;
  }
  NLCG_INLINE Vector<S> g() const {
    return segment.decays ? decayed_gradient(undecayed(), segment.number[kWeightDecay][k], p()) : undecayed();
  }
  NLCG_INLINE Vector<S> p() const { return load(stream.p + i); }
  NLCG_INLINE Vector<S> grad_prev() const { return load(stream.grad_prev + i); }
  NLCG_INLINE Vector<S> d() const { return load(stream.d + i); }
  NLCG_INLINE Vector<S> diagonal() const { return load(stream.diagonal + i); }
  NLCG_INLINE Vector<S> origin() const { return load(stream.origin + i); }
  NLCG_INLINE Vector<S> alpha() const { return segment.number[kAlpha][k]; }
  NLCG_INLINE Vector<S> alpha_prev() const { return segment.number[kAlphaPrev][k]; }
  NLCG_INLINE Vector<S> decay_factor() const { return segment.number[kDecayFactor][k]; }
  NLCG_INLINE Vector<S> inv_sqrt_bias() const { return segment.number[kInvSqrtBias][k]; }
  NLCG_INLINE Vector<S> inv_sqrt_bias_prev() const { return segment.number[kInvSqrtBiasPrev][k]; }
  NLCG_INLINE bool moves() const { return segment.moves; }
  NLCG_INLINE void set_p(Vector<S> p) { store_rounded(stream.p + i, p, flags.rounding, stream.local + i); }
  NLCG_INLINE void set_grad_prev(Vector<S> g) { store_once(stream.grad_prev + i, g); }
  NLCG_INLINE void set_d(Vector<S> d) { store(stream.d + i, d); }
  NLCG_INLINE void set_diagonal(Vector<S> x) { store(stream.diagonal + i, x); }
  NLCG_INLINE void set_origin(Vector<S> x) { store_once(stream.origin + i, x); }

  NLCG_INLINE auto wide(Vector<S> x) const { return widen(x); }
  NLCG_INLINE auto wide_grad_prev() const { return load_wide(stream.grad_prev + i); }
  NLCG_INLINE auto wide_d() const { return load_wide(stream.d + i); }
  template <class Wide>
  NLCG_INLINE void add(int j, const Wide& a, const Wide& b) {
    sums.sum[j].add_product(k, a, b);
  }
  NLCG_INLINE void largest(Vector<S> size) { sums.largest[k] = size > sums.largest[k] ? size : sums.largest[k]; }

 private:
  NLCG_INLINE void store_once(S* to, Vector<S> x) const {
    if (flags.streaming) {
      store_streaming(to, x);
    } else {
      store(to, x);
    }
  }
};

// ---- from segments to blocks -------------------------------------------------------------------------------------

template <class S, class Pass>
SegmentLanes<S> lanes_of(const Step& step, const Segment& segment) {
  double x[kNumbers] = {};
  numbers_of<S, Pass>(step, segment, x);
  SegmentLanes<S> lanes;
  for (int j = 0; j < kNumbers; ++j) {
    for (int k = 0; k < kVectors<S>; ++k) lanes.number[j][k] = broadcast<Vector<S>>(static_cast<S>(x[j]));
  }
  lanes.decays = Pass::kL2 && x[kWeightDecay] != 0.0;
  lanes.scales = x[kFactor] != 1.0;
  lanes.moves = static_cast<S>(x[kAlpha]) != S{0};
  return lanes;
}

template <class Pass, class S, class P, int K, int... Vectors>
NLCG_INLINE void one_block(const Pass& pass, const Buffers<S, P>& stream, std::int64_t i,
                           const SegmentLanes<S>& segment, Sums<S, K>& sums, Flags flags,
                           std::integer_sequence<int, Vectors...>) {
  const auto one_vector = [&](int k) __attribute__((always_inline)) {
    At<S, P, K> at{stream, i + k * kLanes<S>, k, segment, sums, flags};
    pass(at);
  };
  (one_vector(Vectors), ...);
}

template <class Pass, class S, class P, int K>
void run_blocks(const Pass& shared_pass, Buffers<S, P> at, std::int64_t n, const SegmentLanes<S>& shared_segment,
                Sums<S, K>& shared_sums, Flags flags) {
  const Pass pass = shared_pass;  // copies: the compiler may then keep all of them in registers
  const SegmentLanes<S> segment = shared_segment;
  Sums<S, K> sums = shared_sums;
  for (std::int64_t i = 0; i < n; i += kBlock) {
    one_block(pass, at, i, segment, sums, flags, std::make_integer_sequence<int, kVectors<S>>{});
  }
  shared_sums = sums;
}

template <class P, class S>
Buffers<S, P> stream_at(const Segment& segment, std::int64_t position) {
  const std::int64_t local = position - segment.offset;
  const auto state = [&](void* base) { return base ? static_cast<S*>(base) + local : nullptr; };
  return {local,
          segment.p ? static_cast<P*>(segment.p) + local : nullptr,
          segment.g ? static_cast<const P*>(segment.g) + local : nullptr,
          state(segment.grad_prev),
          state(segment.direction),
          state(segment.diagonal),
          state(segment.origin)};
}

Rounding rounding_in(const Step& step, const Segment& segment) {
  if (!step.options.stochastic_rounding) return {};
  return rounding_of(step.options, step.scalars->step, segment.place);
}

// One block on the stack. Lanes without a segment hold g = d = 0, h or v = 1: they add zeros and are not scattered.
template <class S>
struct alignas(kVectorBytes) Staged {
  S p[kBlock], g[kBlock], grad_prev[kBlock], d[kBlock], diagonal[kBlock], origin[kBlock];
  S number[kNumbers][kBlock];
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

template <class S, class Pass, int K>
void run_staged(const Step& step, const Pass& pass, std::int64_t first, std::int64_t position, Sums<S, K>& sums) {
  Staged<S> block = {};
  for (S& x : block.diagonal) x = S{1};
  SegmentLanes<S> lanes;
  lanes.decays = lanes.scales = lanes.moves = false;
  double x[kNumbers] = {};
  const Segment* known = nullptr;  // whose numbers x holds
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S>(segment.dtype, [&](auto element) {
      const auto from = stream_at<decltype(element), S>(segment, position + lane);
      if (from.p) block.p[lane] = value_of(*from.p);
      if (from.g) block.g[lane] = value_of(*from.g);
      if (from.grad_prev) block.grad_prev[lane] = *from.grad_prev;
      if (from.d) block.d[lane] = *from.d;
      if (from.diagonal) block.diagonal[lane] = *from.diagonal;
      if (Pass::kUsesOrigin) block.origin[lane] = *from.origin;
    });
    if (known != &segment) numbers_of<S, Pass>(step, *(known = &segment), x);
    for (int j = 0; j < kNumbers; ++j) block.number[j][lane] = static_cast<S>(x[j]);
    lanes.decays |= Pass::kL2 && x[kWeightDecay] != 0.0;
    lanes.scales |= x[kFactor] != 1.0;
    lanes.moves |= static_cast<S>(x[kAlpha]) != S{0};
  });
  static_assert(sizeof(lanes.number) == sizeof(block.number));
  __builtin_memcpy(lanes.number, block.number, sizeof(block.number));
  run_blocks(pass, Buffers<S, S>{0, block.p, block.g, block.grad_prev, block.d, block.diagonal, block.origin}, kBlock,
             lanes, sums, Flags{});
  const unsigned writes = pass.writes();
  for_covered_lanes(step, first, position, [&](const Segment& segment, std::int64_t lane) {
    with_element_type<S>(segment.dtype, [&](auto element) {
      const auto to = stream_at<decltype(element), S>(segment, position + lane);
      if (writes & kGradPrev) *to.grad_prev = block.grad_prev[lane];
      if (writes & kD) *to.d = block.d[lane];
      if ((writes & kP) && (Pass::kOwnAlpha || block.number[kAlpha][lane] != S{0})) {
        assign_rounded(*to.p, block.p[lane], rounding_in(step, segment), to.local);
      }
      if (writes & kDiagonal) *to.diagonal = block.diagonal[lane];
      if (writes & kOrigin) *to.origin = block.origin[lane];
    });
  });
}

// 2 million elements are 40 MB of parameters, gradients and state: more than a core's share of any cache.
constexpr std::int64_t kStreamingElements = std::int64_t{1} << 21;

// Whether a pass that writes g_prev, or the origin, and does not read it stores it around the cache.
template <class Pass, class S, class P>
bool uses_nontemporal_stores(const Step& step, const Pass& pass, const Buffers<S, P>& at) {
  const void* const once = Pass::kUsesOrigin ? at.origin : at.grad_prev;
  const bool aligned = reinterpret_cast<std::uintptr_t>(once) % kVectorBytes == 0;
  const unsigned bit = Pass::kUsesOrigin ? kOrigin : kGradPrev;
  return aligned && (pass.writes() & ~pass.reads() & bit) && step.n >= kStreamingElements;
}

// The same for a block of which one segment alone has the first `count` lanes: the end of a parameter.
template <class S, class Pass, int K>
void run_end(const Step& step, const Pass& pass, const Segment& segment, std::int64_t position, int count,
             Sums<S, K>& sums) {
  with_element_type<S>(segment.dtype, [&](auto element) {
    const auto at = stream_at<decltype(element), S>(segment, position);
    S p[kBlock] = {}, g[kBlock] = {}, grad_prev[kBlock] = {}, d[kBlock] = {}, diagonal[kBlock], origin[kBlock] = {};
    for (S& x : diagonal) x = S{1};
    const unsigned reads = pass.reads(), writes = pass.writes();
    const SegmentLanes<S> lanes = lanes_of<S, Pass>(step, segment);
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(S);
    for (int lane = 0; at.g && lane < count; ++lane) g[lane] = value_of(at.g[lane]);
    if ((reads & kP) || lanes.decays) {
      for (int lane = 0; lane < count; ++lane) p[lane] = value_of(at.p[lane]);
    }
    if (reads & kGradPrev) __builtin_memcpy(grad_prev, at.grad_prev, bytes);
    if (reads & kD) __builtin_memcpy(d, at.d, bytes);
    if (reads & kDiagonal) __builtin_memcpy(diagonal, at.diagonal, bytes);
    if (reads & kOrigin) __builtin_memcpy(origin, at.origin, bytes);
    run_blocks(pass, Buffers<S, S>{0, p, g, grad_prev, d, diagonal, origin}, kBlock, lanes, sums, Flags{});
    if (writes & kGradPrev) __builtin_memcpy(at.grad_prev, grad_prev, bytes);
    if (writes & kD) __builtin_memcpy(at.d, d, bytes);
    if (writes & kDiagonal) __builtin_memcpy(at.diagonal, diagonal, bytes);
    if (writes & kOrigin) __builtin_memcpy(at.origin, origin, bytes);
    if ((writes & kP) && (Pass::kOwnAlpha || lanes.moves)) {
      const Rounding rounding = rounding_in(step, segment);
      for (int lane = 0; lane < count; ++lane) assign_rounded(at.p[lane], p[lane], rounding, at.local + lane);
    }
  });
}

template <class S, class Pass>
void run_tile(const Step& step, const Pass& pass, std::int64_t tile, double* out) {
  Sums<S, Pass::kSums> sums;
  std::int64_t position = tile * kTile;
  const std::int64_t tile_end = position + kTile < step.n ? position + kTile : step.n;
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
        const auto at = stream_at<decltype(element), S>(segment, position);
        const Flags flags = {rounding_in(step, segment), uses_nontemporal_stores(step, pass, at)};
        run_blocks(pass, at, whole, lanes_of<S, Pass>(step, segment), sums, flags);
      });
      position += whole;
    } else {
      const bool alone = s + 1 == step.n_segments || step.segments[s + 1].offset >= position + kBlock;
      if (alone && segment.offset <= position) {
        run_end(step, pass, segment, position, static_cast<int>(segment_end - position), sums);
      } else {
        run_staged(step, pass, s, position, sums);
      }
      position += kBlock;
    }
  }
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

// ---- threads -----------------------------------------------------------------------------------------------------

#ifdef _OPENMP
// libgomp's pool does not survive fork(): a child that enters a parallel region hangs. It computes alone instead, with
// the same bits.
const pid_t loaded_by = getpid();  // at load, not at first use: that may be in the child
bool forked() { return getpid() != loaded_by; }
#endif

// Every other pass walks backwards, in strips of half a megabyte per stream: it finds in the cache what the pass before
// read last, and the next, forwards again, what it left. A strip is long enough for the hardware's prefetchers, which
// like to walk forwards.
constexpr std::int64_t kStrip = 32;

// The processor's default floating-point mode, and the caller's again: torch.set_flush_denormal() holds for the thread that
// called it, not for OpenMP's, so under it the bits would depend on the number of threads.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : before_(float_mode()) { set_float_mode(kDefaultFloatMode); }
  ~DefaultFloatMode() { set_float_mode(before_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  FloatMode before_;
};

// Runs the pass over all tiles and adds up the partial sums in the order of the tiles; behind the sums, the maximum
// where the pass forms one.
template <class S, class Pass>
void reduce(const Step& step, const Pass& pass, double (&sums)[kMaxSums + 1]) {
  const std::int64_t tiles = tiles_of(step.n);
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t done = begin; done < end; done += kStrip) {
      const std::int64_t strip = end - done < kStrip ? end - done : kStrip;
      const std::int64_t first = Pass::kBackward ? end - (done - begin) - strip : done;
      for (std::int64_t tile = first; tile < first + strip; ++tile) {
        run_tile<S>(step, pass, tile, step.partials + tile * kMaxSums);
      }
    }
  };
#ifdef _OPENMP
  // Below four tiles a thread, waking a thread costs more than it brings.
  const std::int64_t useful = tiles / 4 < step.threads ? tiles / 4 : step.threads;
  const bool shared = useful > 1 && !forked();
  if (shared) {
#pragma omp parallel num_threads(static_cast<int>(useful))
    {
      const DefaultFloatMode mode;
      const std::int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
      range(tiles * thread / threads, tiles * (thread + 1) / threads);
      finish_streaming();
    }
  }
#else
  const bool shared = false;
#endif
  if (!shared) {
    range(0, tiles);
    finish_streaming();
  }
  for (double& sum : sums) sum = 0.0;
  for (std::int64_t tile = 0; tile < tiles; ++tile) {
    const double* partial = step.partials + tile * kMaxSums;
    if (tile * kTile < step.owned) {
      for (int j = 0; j < Pass::kSums; ++j) sums[j] += partial[j];
    }
    if constexpr (Pass::kFormsLargest) {
      double& largest = sums[Pass::kSums];
      largest = partial[Pass::kSums] > largest ? partial[Pass::kSums] : largest;
    }
  }
}

// A number of the scalars, in all lanes of the state's type.
template <class S>
struct Broadcast {
  using Scalar = S;
  Vector<S> operator()(double x) const { return broadcast<Vector<S>>(static_cast<S>(x)); }
};

// ---- the step ----------------------------------------------------------------------------------------------------

// The rows of all ranks as one.
void gather(const RankGather& exchange, RankRecord& row) {
  *exchange.mine = row;
  exchange.gather(exchange.context);
  if (!ranks_agree(exchange.all, exchange.ranks)) throw RanksDisagree{};
  for (int j = 0; j < kColumns; ++j) row.column[j] = over_ranks(exchange.all, exchange.owned, exchange.ranks, j);
}

void form_factors(const Step& step, double clip) {
  for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].factor = step.groups[i].sign * clip;
}

// One pass and what follows from it; false where the step ends here.
template <class S, class Pass, bool kLast>
bool pass_and_decide(const Step& step, StepPlan& c, int number) {
  if (Pass::kFirstPass) form_factors(step, 1.0);
  const Pass pass = Pass::from_plan(c, step.options, Broadcast<S>{});
  double sums[kMaxSums + 1];
  reduce<S>(step, pass, sums);
  RankRecord row = {};
  for (int j = 0; j < Pass::kSums; ++j) row.column[j] = sums[j];
  row.column[kLargestElement] = sums[Pass::kSums];
  if (Pass::kFirstPass) {
    contribute(row, *step.scalars, step.active_set, step.loss, static_cast<double>(step.n_segments), 0.0);
  }
  // The sums of the last pass are for the next step, whose first pass passes them on.
  const RankGather& exchange = step.exchange;
  if (exchange.ranks > 0 && (Pass::kFirstPass || (exchange.every_decision && !kLast))) {
    sign_row(row, step.scalars->step, number, step.digest);
    gather(exchange, row);
  }
  if (Pass::kFirstPass) {
    c = begin_step(step.options, *step.scalars, step.active_set, row, exchange.ranks > 0);
    for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].alpha = step.groups[i].lr * c.next.ls_scale;
  }
  if (c.nothing_to_do) return false;
  Pass::update_plan(c, step.options, row.column, row.column[kLargestElement], static_cast<double>(step.n), kLargest<S>);
  if (Pass::kFirstPass && c.again) form_factors(step, c.clip);
  return !c.skip;
}

template <class S, class First, class... Rest>
bool every_pass(const Step& step, StepPlan& c, int number) {
  if (!First::kOptional || c.again) {
    if (!pass_and_decide<S, First, sizeof...(Rest) == 0>(step, c, number)) return false;
  }
  if constexpr (sizeof...(Rest) > 0) return every_pass<S, Rest...>(step, c, number + 1);
  return true;
}
template <class S, template <class> class... P>
bool every_pass(const Step& step, StepPlan& c, PassList<P...>) {
  return every_pass<S, P<Vector<S>>...>(step, c, 0);
}

// 1 - beta2^k and the next, for every segment's k.
void form_bias(const Step& step) {
  if (step.options.preconditioner != Preconditioner::adam) return;
  Bias last = bias_of(step.options.beta2, 0.0);
  for (std::int64_t i = 0; i < step.n_segments; ++i) {
    const double steps = *step.segments[i].steps;
    if (last.steps != steps) last = bias_of(step.options.beta2, steps);
    step.bias[i] = last;
  }
}

template <class S>
void step_in(const Step& step) {
  form_bias(step);
  StepPlan c = {};
  // A step is likely to clip if the last one did. The bits are the same: a sum's order is the flat index's.
  const bool norm_first = step.options.measure_norm && step.scalars->clip != 1.0;
  const bool moved =
      norm_first ? with_preconditioner(step.options.preconditioner,
                                       [&](auto preconditioner) {
                                         using Passes = typename decltype(preconditioner)::Passes;
                                         return every_pass<S>(step, c, typename ClippingOf<Passes>::NormFirst{});
                                       })
                 : with_passes(step.options, [&](auto preconditioner) {
                     return every_pass<S>(step, c, typename decltype(preconditioner)::Passes{});
                   });
  if (!moved) {
    if (!c.nothing_to_do) count_skip(c, *step.scalars);
    return;
  }
  *step.scalars = c.next;
  for (std::int64_t i = 0; i < step.n_groups; ++i) *step.groups[i].alpha_prev = step.groups[i].alpha;
  for (std::int64_t i = 0; i < step.n_segments; ++i) *step.segments[i].steps += 1.0;
}

// ---- the parts ---------------------------------------------------------------------------------------------------

bool has_grad_prev(const Step& step) { return step.n_segments > 0 && step.segments[0].grad_prev != nullptr; }

template <class S>
bool update_curvature_in(const Step& step, double* ys, double* shs) {
  double sums[kMaxSums + 1];
  reduce<S>(step, CurvatureSums<Vector<S>>{}, sums);
  *ys = sums[2] - sums[0];
  *shs = sums[1];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  reduce<S>(step, Bfgs::update(*ys, *shs, Broadcast<S>{}), sums);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, double* rz, double* rz_mid) {
  form_bias(step);
  double sums[kMaxSums + 1];
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    reduce<S>(step, preconditioner.dots(step.options, has_grad_prev(step), Broadcast<S>{}), sums);
  });
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, double beta) {
  form_bias(step);
  double sums[kMaxSums + 1];
  const bool move = step.n_segments > 0 && step.segments[0].p != nullptr, keep_grad = has_grad_prev(step);
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    reduce<S>(step, preconditioner.move(step.options, beta, keep_grad, move, Broadcast<S>{}), sums);
  });
}

template <class S>
void last_move_in(const Step& step) {
  double sums[kMaxSums + 1];
  reduce<S>(step, LastMove<Vector<S>>{}, sums);
  step.scalars->gs = sums[0];
  step.scalars->shs = sums[1];
}

template <class S>
void state_norms_in(const Step& step, double* gg, double* dd, double* gd) {
  double sums[kMaxSums + 1];
  reduce<S>(step, StateNorms<Vector<S>>{{}, has_grad_prev(step)}, sums);
  *gg = sums[0];
  *dd = sums[1];
  *gd = sums[2];
}

template <class S>
void descend_in(const Step& step, const Descent& numbers, double* sums) {
  with_descent_pass(numbers, Broadcast<S>{}, [&](const auto& pass) {
    double found[kMaxSums + 1];
    reduce<S>(step, pass, found);
    for (int j = 0; j <= kMaxSums; ++j) sums[j] = found[j];
  });
}

#define NLCG_BY_STATE_TYPE(function)                                                                          \
  [](const Step& step, auto... args) {                                                                        \
    const DefaultFloatMode mode;                                                                              \
    return step.state_dtype == DType::f64 ? function<double>(step, args...) : function<float>(step, args...); \
  }

}  // namespace

extern const CpuKernels FASTNLCG_ISA_SYMBOL;
const CpuKernels FASTNLCG_ISA_SYMBOL = {
    FASTNLCG_ISA_NAME,
    NLCG_BY_STATE_TYPE(step_in),
    NLCG_BY_STATE_TYPE(update_curvature_in),
    NLCG_BY_STATE_TYPE(preconditioned_dots_in),
    NLCG_BY_STATE_TYPE(update_direction_in),
    NLCG_BY_STATE_TYPE(last_move_in),
    NLCG_BY_STATE_TYPE(descend_in),
    NLCG_BY_STATE_TYPE(state_norms_in),
};

}  // namespace fastnlcg
