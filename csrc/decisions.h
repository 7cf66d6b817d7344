// The decisions of a step: what follows from the sums of its passes, on scalars, in double. One thread of the CPU or of
// the GPU takes them, by the same functions. Equations and symbols as in elementwise.h.
#pragma once

#include "elementwise.h"
#include "rank_agreement.h"

namespace fastnlcg {

// ---- the formulas ------------------------------------------------------------------------------------------------

NLCG_HD bool is_finite(double x) { return x - x == 0.0; }

// 1 / sqrt(x) for a sum of squares, and 0 for an empty one; `bound` keeps it inside the state's type.
NLCG_HD double inverse_root(double x, double bound) { return x > 0.0 ? at_most(1.0 / __builtin_sqrt(x), bound) : 0.0; }

// 1 - base^k for a whole number k >= 0, by squaring: without cancellation, and the same bits everywhere, which pow()
// does not promise.
NLCG_HD double one_minus_power(double base, double k) {
  double power = 1.0, missing = 0.0, base_missing = 1.0 - base;
  for (auto bits = static_cast<unsigned long long>(k); bits != 0; bits >>= 1) {
    if (bits & 1) {
      missing = missing + power * base_missing;
      power *= base;
    }
    base_missing = base_missing + base * base_missing;
    base *= base;
  }
  return missing;
}
NLCG_HD Bias bias_of(double beta2, double steps) {
  return {beta2, steps, one_minus_power(beta2, steps), one_minus_power(beta2, steps + 1.0)};
}

// Adam's bias correction, 1 / sqrt(1 - beta2^k), from 1 - beta2^k; 0 before the first update, when v is 0.
template <class S>
NLCG_HD S inv_sqrt_bias_correction(double bias) {
  const S missing = static_cast<S>(bias);
  return missing > S{0} ? S{1} / square_root(missing) : S{0};
}

// The curvature condition; false for NaN and Inf.
NLCG_HD bool curvature_accepted(double ys, double shs, double curvature_eps) {
  return ys > curvature_eps && shs > curvature_eps && is_finite(ys) && is_finite(shs);
}

// Can pass 2 meet a number that is not finite although every gradient is finite? It divides by h + eps >= eps and sums
// up to n squares, so it cannot if the largest |g| of this and the previous step, over eps, is this far from overflow:
// sum <= n * g_max * (g_max / eps). A needless `true` only costs time: pass 3 then writes h instead of pass 2.
NLCG_HD bool may_overflow(double grad_max, double grad_prev_max, double eps, double n, double largest) {
  const double g = grad_max > grad_prev_max ? grad_max : grad_prev_max;
  const double z = g / eps;
  return !(z < 0.25 * largest && n * g * z < 0.25 * kLargestDouble);
}

// beta of Algorithm 1, clamped to [0, beta_max]; 0 if rz is 0 or the quotient is not finite. Heavy ball: beta_max.
NLCG_HD double conjugacy(const Options& o, double beta_max, double rz, double rz_new, double rz_mid) {
  if (o.update == UpdateRule::heavy_ball) return beta_max;
  const double beta = (o.update == UpdateRule::polak_ribiere ? rz_new - rz_mid : rz_new) / rz;
  if (rz == 0.0 || !is_finite(beta)) return 0.0;
  return beta < 0.0 ? 0.0 : (beta > beta_max ? beta_max : beta);
}

// Online stochastic line search (section 3.2.2): the new scale. The thresholds are taken relative to |loss_prev|, so
// that "increased by 2 %" keeps its meaning for a negative loss.
NLCG_HD double line_search_scale(const Options& o, double scale, double loss, double loss_prev) {
  const double absolute = loss_prev < 0.0 ? -loss_prev : loss_prev;
  if (loss > loss_prev + o.increase_threshold * absolute) {
    const double lower = scale * (1.0 - o.decrease);
    return lower > kSmallestDouble ? lower : kSmallestDouble;
  }
  if (loss < loss_prev + o.flat_threshold * absolute) {
    const double higher = scale * (1.0 + o.increase);
    return higher < 1.0 ? higher : 1.0;
  }
  return scale;
}

// ---- the decisions of a step -------------------------------------------------------------------------------------

// What one step has decided so far. `next` becomes the scalars if, and only if, the step completes.
struct StepPlan {
  Scalars next;
  bool skip;           // a number is not finite: nothing changes but the counter of skipped steps
  bool nothing_to_do;  // no rank has a gradient, or AMP found an overflow: nothing changes at all
  bool history_valid;  // g_prev and d belong to the parameters that move now
  bool curvature;      // bfgs: h is updated
  bool deferred;       // bfgs: pass 3 updates h, because the sums of pass 2 may not be finite, or may not arrive
  bool distributed;    // the step runs over ranks
  double eps;          // bfgs: 0 in the first step, z = -g / h
  double clip = 1.0;   // factor of the gradient
  bool again = false;  // the first pass has to be repeated, with the factor
};

// After pass 1, before its decision: the line search, and whether the last step's vectors still apply.
NLCG_HD StepPlan begin_step(const Options& o, const Scalars& now, double active_set, const RankRow& row,
                            bool distributed) {
  StepPlan plan{now, false, false, false, false, false, distributed, now.step == 0.0 ? 0.0 : o.eps};
  plan.history_valid = now.step != 0.0 && row.column[kChanged] == 0.0;
  plan.nothing_to_do = row.column[kSegments] == 0.0 || row.column[kFoundInf] != 0.0;
  plan.next.gs = row.column[kGs];
  plan.next.shs = row.column[kShs];
  const double loss = row.column[kLoss];
  if (o.line_search && is_finite(loss)) {
    const double signed_loss = o.maximize ? -loss : loss;
    if (is_finite(now.loss_prev)) plan.next.ls_scale = line_search_scale(o, now.ls_scale, signed_loss, now.loss_prev);
    plan.next.loss_prev = signed_loss;
  }
  plan.next.active_set = active_set;
  return plan;
}

// After a first pass that forms gg = sum(g g): the factor of torch.nn.utils.clip_grad_norm_, and whether |g| is above
// skip_grad_norm.
NLCG_HD void decide_clipping(StepPlan& plan, const Options& o, double gg) {
  const double norm = __builtin_sqrt(gg);
  const double factor = o.max_grad_norm / (norm + 1e-6);
  plan.clip = factor >= 1.0 || o.max_grad_norm > kLargestDouble ? 1.0 : factor;  // NaN is passed on
  plan.next.grad_norm = norm;
  plan.next.clip = plan.clip;
  plan.skip = norm > o.skip_grad_norm || (o.skip_nonfinite && !is_finite(norm));
  plan.again = !plan.skip && plan.clip != 1.0;
}

// The scalars that a skipped step writes.
NLCG_HD void count_skip(const StepPlan& plan, Scalars& now) {
  now.skipped_steps += 1.0;
  now.grad_norm = plan.next.grad_norm;
}

// bfgs, after pass 1: decides whether h is updated. `gs` = sum(g s) over this gradient and the last move.
NLCG_HD void decide_curvature(StepPlan& plan, const Options& o, double gs, double grad_max, double n, double limit) {
  plan.skip = o.skip_nonfinite && !(is_finite(gs) && is_finite(grad_max));
  plan.next.ys = plan.history_valid ? gs - plan.next.gs : 0.0;
  plan.next.shs_used = plan.history_valid ? plan.next.shs : 0.0;
  plan.curvature = plan.history_valid && curvature_accepted(plan.next.ys, plan.next.shs, o.curvature_eps);
  // If y or y^2 / ys may leave the state's type, h would not be what it is in exact arithmetic: such a gradient is
  // treated as one that is not finite.
  const double y_max = grad_max + plan.next.grad_max;
  if (plan.curvature && o.skip_nonfinite && !(y_max < limit && y_max / plan.next.ys * y_max < 1e-3 * limit))
    plan.skip = true;
  // Pass 2 divides by eps in the state's type, in which a tiny eps is 0.
  const double eps = limit < 2.0 * kLargestFloat ? static_cast<double>(static_cast<float>(plan.eps)) : plan.eps;
  plan.deferred = plan.curvature &&
                  (plan.distributed || (o.skip_nonfinite && may_overflow(grad_max, plan.next.grad_max, eps, n, limit)));
  plan.next.updated = plan.curvature ? 1.0 : 0.0;
  plan.next.grad_max = grad_max;
}

// Whether the options use sum(g g_prev / (h + eps)), which needs g_prev in the state.
NLCG_HD bool needs_rz_mid(const Options& o) { return o.update == UpdateRule::polak_ribiere; }

// After the pass that forms rz: beta. `z_max` is a bound of |z|; if d might leave the state's type, the step is
// skipped.
NLCG_HD void decide_direction(StepPlan& plan, const Options& o, double rz_new, double rz_mid, double z_max,
                              double limit) {
  plan.skip = plan.skip || (o.skip_nonfinite && !(is_finite(rz_new) && is_finite(rz_mid)));
  plan.next.beta = plan.history_valid ? conjugacy(o, o.beta_max, plan.next.rz, rz_new, rz_mid) : 0.0;
  plan.next.rz = rz_new;
  plan.next.direction_max = z_max + (plan.next.beta != 0.0 ? plan.next.beta * plan.next.direction_max : 0.0);
  if (o.skip_nonfinite && !(plan.next.direction_max < limit)) plan.skip = true;
}

// muon, after decide_direction(): the beta of the matrices, from sum(g g) over them. Of matrices z = -g, so |z_i| <=
// sqrt(sum(g g)); `direction_max` is the bound of |d| after the last step. The polar factor is formed from
// u = z + beta d, which must not leave the state's type either.
NLCG_HD void decide_matrices(StepPlan& plan, const Options& o, double gg, double direction_max, double limit) {
  if (o.skip_nonfinite && !is_finite(gg)) plan.skip = true;
  const double beta = plan.history_valid ? conjugacy(o, o.beta_max_matrices, plan.next.rz_matrices, gg, 0.0) : 0.0;
  const double z_max = __builtin_sqrt(gg);
  plan.next.beta_matrices = beta;
  plan.next.rz_matrices = gg;
  plan.next.direction_max = z_max + (beta != 0.0 ? beta * direction_max : 0.0);
  if (o.skip_nonfinite && !(z_max + plan.next.direction_max < limit)) plan.skip = true;
}

// After the last pass.
NLCG_HD void finish_step(StepPlan& plan) { plan.next.step += 1.0; }

}  // namespace fastnlcg
