// The passes without a preconditioner: z = -g.
#pragma once

#include "elementwise.h"
#include "pass.h"

namespace fastnlcg {

template <class T>
struct PlainDots : PassDefaults {
  static constexpr int kSums = 2;
  static constexpr bool kFirstPass = true, kBuiltFromOptionsAlone = true;
  bool mid;
  NLCG_HD unsigned reads() const { return mid ? kGradPrev : 0u; }
  NLCG_HD unsigned sums() const { return dots_wanted(mid); }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const auto wide_g = at.wide(at.g());
    at.add(0, wide_g, wide_g);
    if (mid) at.add(1, wide_g, at.wide_grad_prev());
  }

  template <class Broadcast>
  NLCG_HD static PlainDots from_plan(const StepPlan&, const Options& o, Broadcast) {
    return {{}, needs_rz_mid(o)};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double, double, double limit) {
    decide_direction(plan, o, sums[0], sums[1], __builtin_sqrt(sums[0]), limit);  // |z_i| <= sqrt(sum(g g))
  }
};

template <class T>
struct PlainMove : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kBackward = true;
  T beta;
  bool keep_grad, move;
  NLCG_HD unsigned reads() const { return (move ? kP : 0u) | kD; }
  NLCG_HD unsigned writes() const { return (move ? kP : 0u) | (keep_grad ? kGradPrev : 0u) | kD; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const T d = conjugate_direction(g, beta, at.d());
    at.set_d(d);
    if (keep_grad) at.set_grad_prev(g);
    if (move && at.moves()) at.set_p(moved(at.p(), scaled_direction(at.alpha(), d)));
  }

  template <class Broadcast>
  NLCG_HD static PlainMove from_plan(const StepPlan& plan, const Options&, Broadcast broadcast) {
    return {{}, broadcast(plan.next.beta), true, true};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast) {
    keep_grad = move = true;
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options&, const double*, double, double, double) {
    finish_step(plan);
  }
};

struct Plain {
  using Passes = PassList<PlainDots, PlainMove>;
  NLCG_HD static unsigned state_arrays(const Options&) { return kGradPrev | kD; }
  template <class Broadcast>
  static auto dots(const Options&, bool mid, Broadcast broadcast) {
    return PlainDots<decltype(broadcast(0.0))>{{}, mid};
  }
  template <class Broadcast>
  static auto move(const Options&, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return PlainMove<decltype(broadcast(0.0))>{{}, broadcast(beta), keep_grad, move};
  }
};

}  // namespace fastnlcg
