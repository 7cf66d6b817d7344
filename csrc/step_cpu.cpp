// The CPU step and its parts, compiled once per instruction set: cpu_tile.h takes a pass over a tile, cpu_passes.h over
// all of them, and this file chooses the passes.
#include "step_cpu.h"

#include "cpu_passes.h"
#include "pass_diagnostics.h"
#include "pass_full_batch.h"
#include "pass_pairs.h"
#include "preconditioners.h"

namespace fastnlcg {
namespace {

template <class S, class T, class Lists>
void step_with(const Step& step) {
  using Passes = typename Lists::Passes;
  if constexpr (sizeof(T) == sizeof(S) || takes_bfloat16_state(Passes{})) {
    take_step<S, T>(step, Passes{});
  } else {
    __builtin_unreachable();  // the options' checks
  }
}

template <class S, class T>
void step_in(const Step& step) {
  // A step is likely to clip if the last one did. The bits are the same either way.
  const bool norm_first = step.options.measure_norm && step.scalars->clip != 1.0;
  if (norm_first) {
    with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
      step_with<S, T, ClippedNormFirst<decltype(preconditioner)>>(step);
    });
  } else {
    with_passes(step.options, [&](auto passes) { step_with<S, T, decltype(passes)>(step); });
  }
}

// ---- the parts ---------------------------------------------------------------------------------------------------

// A pass with its scalars, outside a step.
template <class S, class Pass>
void run_part(const Step& step, const Pass& pass, double (&sums)[kMaxSums + 1]) {
  if constexpr (Pass::kUsesStepCounts) form_bias(step);
  reduce<S, S>(step, pass, sums);
}

template <class S>
bool update_curvature_in(const Step& step, double* ys, double* shs) {
  double sums[kMaxSums + 1];
  reduce<S, S>(step, CurvatureSums<Vector<S>>{}, sums);
  *ys = sums[2] - sums[0];
  *shs = sums[1];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  reduce<S, S>(step, Bfgs::update(*ys, *shs, LaneBroadcast<S>{}), sums);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, double* rz, double* rz_mid) {
  double sums[kMaxSums + 1];
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    run_part<S>(step, preconditioner.dots(step.options, has_grad_prev(step), LaneBroadcast<S>{}), sums);
  });
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, double beta) {
  double sums[kMaxSums + 1];
  const bool move = step.n_segments > 0 && step.segments[0].p != nullptr, keep_grad = has_grad_prev(step);
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    run_part<S>(step, preconditioner.move(step.options, beta, keep_grad, move, LaneBroadcast<S>{}), sums);
  });
}

template <class S>
void last_move_in(const Step& step) {
  double sums[kMaxSums + 1];
  reduce<S, S>(step, LastMove<Vector<S>>{}, sums);
  step.scalars->gs = sums[0];
  step.scalars->shs = sums[1];
}

template <class S, class T>
void state_norms_in(const Step& step, double* gg, double* dd, double* gd) {
  double sums[kMaxSums + 1];
  reduce<S, T>(step, StateNorms<Vector<S>>{{}, has_grad_prev(step)}, sums);
  *gg = sums[0];
  *dd = sums[1];
  *gd = sums[2];
}

template <class S>
void descend_in(const Step& step, const Descent& numbers, double* sums) {
  const auto run = [&](const auto& pass) {
    double found[kMaxSums + 1];
    reduce<S, S>(step, pass, found);
    for (int j = 0; j <= kMaxSums; ++j) sums[j] = found[j];
  };
  if (is_pair_pass(numbers)) return with_pair_pass(numbers, LaneBroadcast<S>{}, run);
  with_descent_pass(numbers, LaneBroadcast<S>{}, run);
}

template <class S, class T>
void matrix_pass_in(const Step& step, MatrixPass kind, std::int64_t first_tile, std::int64_t last_tile) {
  const LaneBroadcast<S> broadcast;
  if (kind == MatrixPass::input) {
    run_tiles<S, T>(step, MatrixInput<Vector<S>>::of(*step.scalars, broadcast), first_tile, last_tile);
  } else {
    run_tiles<S, T>(step, MatrixMove<Vector<S>>::of(*step.scalars, broadcast), first_tile, last_tile);
  }
}

template <class S>
void normalize_in(const Step& step) {
  const std::int64_t tiles = tiles_of(step.n);
  run_tiles<S, S>(step, MatrixSquares<Vector<S>>{}, 0, tiles);
  for (std::int64_t i = 0; i < step.n_segments; ++i) {
    const Segment& segment = step.segments[i];
    double sum = 0.0;
    for (std::int64_t tile = segment.offset / kTile; tile * kTile < segment.offset + segment.n; ++tile) {
      sum += step.partials[tile * kMaxSums];
    }
    step.groups[segment.group].alpha = inverse_root(sum, kLargest<S>);
  }
  run_tiles<S, S>(step, MatrixScale<Vector<S>>{}, 0, tiles);
}

#define NLCG_BY_STATE_TYPE(function)                                                                          \
  [](const Step& step, auto... args) {                                                                        \
    const DefaultFloatMode mode;                                                                              \
    return step.state_dtype == DType::f64 ? function<double>(step, args...) : function<float>(step, args...); \
  }
// Of those that take state in bfloat16
#define NLCG_BY_STATE_TYPES(function)                                                                               \
  [](const Step& step, auto... args) {                                                                              \
    const DefaultFloatMode mode;                                                                                    \
    with_state_types(step.state_dtype, [&](auto s, auto t) { function<decltype(s), decltype(t)>(step, args...); }); \
  }

}  // namespace

extern const CpuKernels FASTNLCG_ISA_SYMBOL;
const CpuKernels FASTNLCG_ISA_SYMBOL = {
    FASTNLCG_ISA_NAME,
    NLCG_BY_STATE_TYPES(step_in),
    NLCG_BY_STATE_TYPE(update_curvature_in),
    NLCG_BY_STATE_TYPE(preconditioned_dots_in),
    NLCG_BY_STATE_TYPE(update_direction_in),
    NLCG_BY_STATE_TYPE(last_move_in),
    NLCG_BY_STATE_TYPE(descend_in),
    NLCG_BY_STATE_TYPES(matrix_pass_in),
    NLCG_BY_STATE_TYPE(normalize_in),
    NLCG_BY_STATE_TYPES(state_norms_in),
};

}  // namespace fastnlcg
