// Passes on the CPU: reduce() runs one over all tiles, on several threads; take_step() runs a list of them, with a
// decision after each.
//
// In an unnamed namespace, like simd.h: step_cpu.cpp includes it once per instruction set.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif
#include <sys/types.h>
#include <unistd.h>

#include "cpu_tile.h"
#include "step_cpu.h"

namespace fastnlcg {
namespace {

// ---- threads -----------------------------------------------------------------------------------------------------

#ifdef _OPENMP
// libgomp's threads do not survive fork(): a child that enters a parallel region hangs. A child therefore uses one
// thread, with the same bits.
const pid_t loaded_by = getpid();  // when the module is loaded: its first use may be in the child
bool forked() { return getpid() != loaded_by; }
#endif

// Sets the processor's default floating-point mode, and restores the caller's. torch.set_flush_denormal() affects the
// thread that called it, but not OpenMP's threads, so the bits would depend on the number of threads.
class DefaultFloatMode {
 public:
  DefaultFloatMode() : before_(float_mode()) { set_float_mode(kDefaultFloatMode); }
  ~DefaultFloatMode() { set_float_mode(before_); }
  DefaultFloatMode(const DefaultFloatMode&) = delete;
  DefaultFloatMode& operator=(const DefaultFloatMode&) = delete;

 private:
  FloatMode before_;
};

// Runs the pass over the tiles from `first_tile` to `last_tile`, exclusive. Every tile has its partial sums.
template <class S, class T, class Pass>
void run_tiles(const Step& step, const Pass& pass, std::int64_t first_tile, std::int64_t last_tile) {
  const auto range = [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t tile = begin; tile < end; ++tile)
      run_tile<S, T>(step, pass, tile, step.partials + tile * kMaxSums);
  };
#ifdef _OPENMP
  // With fewer than four tiles a thread, waking a thread costs more than it saves.
  const std::int64_t tiles = last_tile - first_tile;
  const std::int64_t useful = tiles / 4 < step.threads ? tiles / 4 : step.threads;
  const bool shared = useful > 1 && !forked();
  if (shared) {
#pragma omp parallel num_threads(static_cast<int>(useful))
    {
      const DefaultFloatMode mode;
      const std::int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
      range(first_tile + tiles * thread / threads, first_tile + tiles * (thread + 1) / threads);
      finish_nontemporal_stores();
    }
  }
#else
  const bool shared = false;
#endif
  if (!shared) {
    range(first_tile, last_tile);
    finish_nontemporal_stores();
  }
}

// Runs the pass over all tiles and adds up the partial sums in the order of the tiles. If the pass forms a maximum, it
// follows the sums.
template <class S, class T, class Pass>
void reduce(const Step& step, const Pass& pass, double (&sums)[kMaxSums + 1]) {
  const std::int64_t tiles = tiles_of(step.n);
  run_tiles<S, T>(step, pass, 0, tiles);
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

// A scalar in all lanes of a vector.
template <class S>
struct LaneBroadcast {
  using Scalar = S;
  Vector<S> operator()(double x) const { return broadcast<Vector<S>>(static_cast<S>(x)); }
};

// ---- the step ----------------------------------------------------------------------------------------------------

// Gathers the rows of all ranks, and adds them up in `row`.
void gather(const RankGather& exchange, RankRow& row) {
  *exchange.mine = row;
  exchange.gather(exchange.context);
  if (!ranks_agree(exchange.all, exchange.ranks, exchange.replicas)) throw RanksDisagree{};
  for (int j = 0; j < kColumns; ++j) row.column[j] = over_ranks(exchange.all, exchange.owned, exchange.ranks, j);
}

void form_factors(const Step& step, double clip) {
  for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].factor = step.groups[i].sign * clip;
}

// One pass, and its decision. False if the step ends here.
template <class S, class T, class Pass, bool kLast>
bool pass_and_decide(const Step& step, StepPlan& plan) {
  if (Pass::kFirstPass) form_factors(step, 1.0);
  const Pass pass = Pass::from_plan(plan, step.options, LaneBroadcast<S>{});
  double sums[kMaxSums + 1];
  reduce<S, T>(step, kernel_of(pass), sums);
  RankRow row = {};
  for (int j = 0; j < Pass::kSums; ++j) row.column[j] = sums[j];
  row.column[kLargestElement] = sums[Pass::kSums];
  if (Pass::kFirstPass) {
    contribute(row, *step.scalars, step.active_set, step.loss, static_cast<double>(step.n_segments), 0.0);
  }
  // The sums of the last pass are for the next step, and are exchanged with its first pass.
  const RankGather& exchange = step.exchange;
  if (exchange.ranks > 0 && (Pass::kFirstPass || (exchange.every_decision && !kLast))) {
    sign_row(row, step.scalars->step, exchange_after<Pass>(), step.digest);
    gather(exchange, row);
  }
  if (Pass::kFirstPass) {
    plan = begin_step(step.options, *step.scalars, step.active_set, row, exchange.ranks > 0);
    for (std::int64_t i = 0; i < step.n_groups; ++i) step.groups[i].alpha = step.groups[i].lr * plan.next.ls_scale;
  }
  if (plan.nothing_to_do) return false;
  Pass::update_plan(plan, step.options, row.column, row.column[kLargestElement], static_cast<double>(step.n),
                    kLargest<S>);
  if (Pass::kFirstPass && plan.again) form_factors(step, plan.clip);
  return !plan.skip;
}

template <class S, class T, class First, class... Rest>
bool every_pass(const Step& step, StepPlan& plan) {
  if (!First::kOnlyIfClipped || plan.again) {
    if (!pass_and_decide<S, T, First, sizeof...(Rest) == 0>(step, plan)) return false;
  }
  if constexpr (sizeof...(Rest) > 0) return every_pass<S, T, Rest...>(step, plan);
  return true;
}
// 1 - beta2^k and the next, for every segment's k.
void form_bias(const Step& step) {
  Bias last = bias_of(step.options.beta2, 0.0);
  for (std::int64_t i = 0; i < step.n_segments; ++i) {
    const double steps = *step.segments[i].steps;
    if (last.steps != steps) last = bias_of(step.options.beta2, steps);
    step.bias[i] = last;
  }
}

// A step: every pass of the list, and its decision. If the step is skipped, nothing but a counter has changed.
template <class S, class T, template <class> class... P>
void take_step(const Step& step, PassList<P...>) {
  constexpr bool kAnyUsesStepCounts = (P<Vector<S>>::kUsesStepCounts || ...);
  if constexpr (kAnyUsesStepCounts) form_bias(step);
  StepPlan plan = {};
  if (!every_pass<S, T, P<Vector<S>>...>(step, plan)) {
    if (!plan.nothing_to_do) count_skip(plan, *step.scalars);
    return;
  }
  *step.scalars = plan.next;
  for (std::int64_t i = 0; i < step.n_groups; ++i) *step.groups[i].alpha_prev = step.groups[i].alpha;
  for (std::int64_t i = 0; i < step.n_segments; ++i) *step.segments[i].steps += 1.0;
}

}  // namespace
}  // namespace fastnlcg
