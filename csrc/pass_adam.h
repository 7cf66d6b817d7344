// The passes of Adam's diagonal.
//
// v needs no curvature pair, so two passes are enough. Both form v, and the second stores it, once the step is decided:
// a skipped step leaves v alone. Terms of sums cannot overflow float32: |g| > 1.8e19 makes v infinite, which skips the
// step, and |w| <= 1 / sqrt(1 - beta2).
#pragma once

#include "elementwise.h"
#include "pass.h"

namespace fastnlcg {

template <class T>
struct AdamConstants {
  T eps, beta, beta2, one_minus_beta2;
};

template <class Broadcast>
NLCG_HD auto adam_constants(const Options& o, double beta, Broadcast broadcast) {
  return AdamConstants<decltype(broadcast(0.0))>{broadcast(o.eps), broadcast(beta), broadcast(o.beta2),
                                                 broadcast(1.0 - o.beta2)};
}

template <class T>
struct AdamDots : PassDefaults {
  static constexpr int kSums = 2;
  static constexpr bool kFirstPass = true, kBuiltFromOptionsAlone = true, kAppliesL2Decay = false,
                        kUsesStepCounts = true, kAddsInRuns = true, kTakesBFloat16State = true;
  static constexpr unsigned kKeptInSharedMemory = kDiagonal;
  static constexpr int kMostQuadsAtOnce = 1;  // two would spill
  AdamConstants<T> c;
  bool mid;
  NLCG_HD unsigned reads() const { return kDiagonal | (mid ? kGradPrev : 0u); }
  NLCG_HD unsigned sums() const { return dots_wanted(mid); }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const T v_old = at.diagonal();
    const T v = second_moment(v_old, g, c.beta2, c.one_minus_beta2);
    const T h = adam_diagonal(v, at.inv_sqrt_bias());
    at.add_in_run(0, g, preconditioned_gradient(nan_if_not_finite(g, v), h, c.eps));
    if (mid) {
      const T h_old = adam_diagonal(v_old, at.inv_sqrt_bias_prev());
      at.add_in_run(1, g, preconditioned_gradient(at.grad_prev(), h_old, c.eps));
    }
  }

  template <class Broadcast>
  NLCG_HD static AdamDots from_plan(const StepPlan&, const Options& o, Broadcast broadcast) {
    return {{}, adam_constants(o, 0, broadcast), needs_rz_mid(o)};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double, double, double limit) {
    decide_direction(plan, o, sums[0], sums[1], 0.0, limit);  // |z| <= 1 / sqrt(1 - beta2), far from any overflow
  }
};

template <class T>
struct AdamMove : PassDefaults {
  static constexpr int kSums = 2;
  static constexpr bool kBackward = true, kAppliesL2Decay = false, kUsesStepCounts = true, kAddsInRuns = true,
                        kTakesBFloat16State = true;
  static constexpr unsigned kKeptInSharedMemory = kDiagonal;
  AdamConstants<T> c;
  bool keep_grad, move;
  NLCG_HD unsigned reads() const { return (move ? kP : 0u) | kD | kDiagonal; }
  NLCG_HD unsigned writes() const { return (move ? kP : 0u) | (keep_grad ? kGradPrev : 0u) | kD | kDiagonal; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const T v = second_moment(at.diagonal(), g, c.beta2, c.one_minus_beta2);
    const T w = preconditioned_gradient(g, adam_diagonal(v, at.inv_sqrt_bias()), c.eps);
    const T d = conjugate_direction(w, c.beta, at.d());
    at.set_diagonal(v);
    at.set_d(d);
    if (keep_grad) at.set_grad_prev(g);
    if (move && at.moves()) {
      at.set_p(moved(decayed_parameter(at.p(), at.decay_factor()), scaled_direction(at.alpha(), d)));
    }
    at.add_in_run(0, g, g);
    at.add_in_run(1, g, d);
  }

  template <class Broadcast>
  NLCG_HD static AdamMove from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {{}, adam_constants(o, plan.next.beta, broadcast), needs_rz_mid(o), true};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast) {
    move = true;
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options&, const double* sums, double, double, double) {
    finish_step(plan);
    plan.next.updated = 1.0;
    plan.next.gg = sums[0];
    plan.next.gd = sums[1];
  }
};

struct Adam {
  using Passes = PassList<AdamDots, AdamMove>;
  NLCG_HD static unsigned state_arrays(const Options& o) { return (needs_rz_mid(o) ? kGradPrev : 0u) | kD | kDiagonal; }
  template <class Broadcast>
  static auto dots(const Options& o, bool mid, Broadcast broadcast) {
    return AdamDots<decltype(broadcast(0.0))>{{}, adam_constants(o, 0, broadcast), mid};
  }
  template <class Broadcast>
  static auto move(const Options& o, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return AdamMove<decltype(broadcast(0.0))>{{}, adam_constants(o, beta, broadcast), keep_grad, move};
  }
};

}  // namespace fastnlcg
