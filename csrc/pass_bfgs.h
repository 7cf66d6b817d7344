// The passes of the paper's preconditioner: diagonal BFGS.
//
// ys = sum(y s) = sum(g s) - sum(g_prev s): the last pass forms the second sum while it has both factors in registers,
// so the next step's first pass reads only g and d. Both are sums of stored numbers in the same order: an unchanged
// gradient gives ys = 0 exactly.
#pragma once

#include "elementwise.h"
#include "pass.h"

namespace fastnlcg {

template <class T>
struct BfgsConstants {
  T eps, beta, rsqrt_ys, rsqrt_shs, bound;
};

// From the scalars; a pass that does not use one passes 0.
template <class Broadcast>
NLCG_HD auto bfgs_constants(double eps, double beta, double ys, double shs, Broadcast broadcast) {
  const double bound = 0.25 * kLargest<typename Broadcast::Scalar>;
  return BfgsConstants<decltype(broadcast(0.0))>{broadcast(eps), broadcast(beta), broadcast(inverse_root(ys, bound)),
                                                 broadcast(inverse_root(shs, bound)), broadcast(bound)};
}

template <class T>
struct CurvatureDot : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kFormsLargest = true, kFirstPass = true, kBuiltFromOptionsAlone = true;
  static constexpr unsigned kKeptInSharedMemory = kD;
  NLCG_HD unsigned reads() const { return kD; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    at.add(0, at.wide(g), at.wide(scaled_direction(at.alpha_prev(), at.d())));
    at.largest(absolute(g));
  }

  template <class Broadcast>
  NLCG_HD static CurvatureDot from_plan(const StepPlan&, const Options&, Broadcast) {
    return {};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double largest, double n,
                                  double limit) {
    decide_curvature(plan, o, sums[0], largest, n, limit);
  }
};

// The sums over the last move from the state alone, sum(g_prev s) and sum(s h s). The last pass of the step before
// formed them too, so a checkpoint need not hold them, and may be resumed on other ranks. Together with sum(g s) they
// are all of ys and shs, for a caller who did not take the step before.
template <class T, bool kWithGradient>
struct SumsOverLastMove : PassDefaults {
  static constexpr int kSums = kWithGradient ? 3 : 2;
  static constexpr bool kReadsGradient = kWithGradient, kAppliesL2Decay = kWithGradient;  // without g there may be no p
  NLCG_HD unsigned reads() const { return kGradPrev | kD | kDiagonal; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T s = scaled_direction(at.alpha_prev(), at.d());
    const auto wide_s = at.wide(s);
    at.add(0, at.wide_grad_prev(), wide_s);
    at.add(1, at.wide(hessian_times(at.diagonal(), s)), wide_s);
    if constexpr (kWithGradient) at.add(2, at.wide(at.g()), wide_s);
  }
};
template <class T>
using LastMove = SumsOverLastMove<T, false>;
template <class T>
using CurvatureSums = SumsOverLastMove<T, true>;

template <class T>
struct CurvatureAndDots : PassDefaults {
  static constexpr int kSums = 2;
  static constexpr bool kFormsLargest = true, kBackward = true;
  static constexpr unsigned kKeptInSharedMemory = kD;
  static constexpr int kMostQuadsAtOnceInOneLaunch =
      1;  // ptxas would wait for some of two quads' loads before the others
  BfgsConstants<T> c;
  bool curvature, store_h, mid;
  NLCG_HD unsigned reads() const { return (mid || curvature ? kGradPrev : 0u) | (curvature ? kD : 0u) | kDiagonal; }
  NLCG_HD unsigned sums() const { return dots_wanted(mid); }
  NLCG_HD unsigned writes() const { return curvature && store_h ? kDiagonal : 0u; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const auto wide_g = at.wide(g);
    T h = at.diagonal();
    if (mid) at.add(1, wide_g, at.wide(preconditioned_gradient(at.grad_prev(), h, c.eps)));
    if (curvature) {
      const T s = scaled_direction(at.alpha_prev(), at.d());
      h = bfgs_diagonal(h, gradient_change(g, at.grad_prev()), s, c.rsqrt_ys, c.rsqrt_shs, c.bound);
      if (store_h) at.set_diagonal(h);
    }
    const T w = preconditioned_gradient(g, h, c.eps);
    at.add(0, wide_g, at.wide(w));
    at.largest(absolute(w));
  }

  template <class Broadcast>
  NLCG_HD static CurvatureAndDots from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {{},
            bfgs_constants(plan.eps, 0, plan.next.ys, plan.next.shs_used, broadcast),
            plan.curvature,
            !plan.deferred,
            plan.history_valid && needs_rz_mid(o)};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast broadcast) {
    c.bound = broadcast(0.25 * kLargest<typename Broadcast::Scalar>);
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double z_max, double,
                                  double limit) {
    decide_direction(plan, o, sums[0], sums[1], z_max, limit);
  }
};

template <class T>
struct CurvatureAndMove : PassDefaults {
  static constexpr int kSums = 2;
  static constexpr unsigned kKeptInSharedMemory = kD;
  BfgsConstants<T> c;
  bool keep_grad, move;
  bool deferred;  // h is updated here, because the pass before was not allowed to
  NLCG_HD unsigned reads() const { return (move ? kP : 0u) | (deferred ? kGradPrev : 0u) | kD | kDiagonal; }
  NLCG_HD unsigned writes() const {
    return (move ? kP : 0u) | (keep_grad ? kGradPrev : 0u) | kD | (deferred ? kDiagonal : 0u);
  }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const T d_old = at.d();
    T h = at.diagonal();
    if (deferred) {
      const T s = scaled_direction(at.alpha_prev(), d_old);
      h = bfgs_diagonal(h, gradient_change(g, at.grad_prev()), s, c.rsqrt_ys, c.rsqrt_shs, c.bound);
      at.set_diagonal(h);
    }
    const T w = preconditioned_gradient(g, h, c.eps);
    const T d = conjugate_direction(w, c.beta, d_old);
    const T s = scaled_direction(at.alpha(), d);
    at.set_d(d);
    if (keep_grad) at.set_grad_prev(g);
    if (move && at.moves()) at.set_p(moved(at.p(), s));
    const auto wide_s = at.wide(s);
    at.add(0, at.wide(g), wide_s);
    at.add(1, at.wide(hessian_times(h, s)), wide_s);
  }

  template <class Broadcast>
  NLCG_HD static CurvatureAndMove from_plan(const StepPlan& plan, const Options&, Broadcast broadcast) {
    return {{},
            bfgs_constants(plan.eps, plan.next.beta, plan.next.ys, plan.next.shs_used, broadcast),
            true,
            true,
            plan.deferred};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast broadcast) {
    c.bound = broadcast(0.25 * kLargest<typename Broadcast::Scalar>);
    keep_grad = move = true;
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options&, const double* sums, double, double, double) {
    finish_step(plan);
    plan.next.gs = sums[0];
    plan.next.shs = sums[1];
  }
};

struct Bfgs {
  using Passes = PassList<CurvatureDot, CurvatureAndDots, CurvatureAndMove>;
  NLCG_HD static unsigned state_arrays(const Options&) { return kGradPrev | kD | kDiagonal; }
  template <class Broadcast>
  static auto dots(const Options& o, bool mid, Broadcast broadcast) {
    return CurvatureAndDots<decltype(broadcast(0.0))>{{}, bfgs_constants(o.eps, 0, 0, 0, broadcast), false, false, mid};
  }
  template <class Broadcast>
  static auto move(const Options& o, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return CurvatureAndMove<decltype(broadcast(0.0))>{
        {}, bfgs_constants(o.eps, beta, 0, 0, broadcast), keep_grad, move, false};
  }
  // The update of h alone.
  template <class Broadcast>
  static auto update(double ys, double shs, Broadcast broadcast) {
    return CurvatureAndDots<decltype(broadcast(0.0))>{{}, bfgs_constants(1, 0, ys, shs, broadcast), true, true, false};
  }
};

}  // namespace fastnlcg
