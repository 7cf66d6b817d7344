// Clipping by the gradient's norm: lists of passes made of a preconditioner's own, First, Rest...
//
//     no norm wanted     First,                            Rest...
//     Clipped            WithNorm<First>, Repeated<First>, Rest...   forms the norm in passing; repeats First to clip
//     ClippedNormFirst   GradientNorm,    Repeated<First>, Rest...   for a step that expects to clip: First runs once
//
// The two lists with a norm have the same bits.
#pragma once

#include "pass.h"

namespace fastnlcg {

// The first pass, which also forms sum(g g) before weight decay, as its last sum.
template <class First>
struct WithNorm : First {
  static constexpr int kSums = First::kSums + 1;
  NLCG_HD unsigned sums() const { return First::sums() | 1u << First::kSums; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    First::operator()(at);
    const auto wide_g = at.wide(at.undecayed());
    at.add(First::kSums, wide_g, wide_g);
  }

  template <class Broadcast>
  NLCG_HD static WithNorm from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {First::from_plan(plan, o, broadcast)};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double largest, double n,
                                  double limit) {
    decide_clipping(plan, o, sums[First::kSums]);
    if (!plan.skip && !plan.again) First::update_plan(plan, o, sums, largest, n, limit);
  }
};

// The first pass over the clipped gradient.
template <class First>
struct Repeated : First {
  using Kernel = First;
  static constexpr bool kFirstPass = false, kOnlyIfClipped = true;
  template <class Broadcast>
  NLCG_HD static Repeated from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {First::from_plan(plan, o, broadcast)};
  }
};

// The norm alone: 4 bytes per element, and no sum is formed twice.
template <class T>
struct GradientNorm : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kFirstPass = true, kBuiltFromOptionsAlone = true, kAppliesL2Decay = false,
                        kTakesBFloat16State = true;
  NLCG_HD unsigned reads() const { return 0; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const auto wide_g = at.wide(at.g());
    at.add(0, wide_g, wide_g);
  }

  template <class Broadcast>
  NLCG_HD static GradientNorm from_plan(const StepPlan&, const Options&, Broadcast) {
    return {};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double, double, double) {
    decide_clipping(plan, o, sums[0]);
    plan.again = !plan.skip;
  }
};

template <class List>
struct ClippingLists;
template <template <class> class First, template <class> class... Rest>
struct ClippingLists<PassList<First, Rest...>> {
  template <class T>
  using FirstWithNorm = WithNorm<First<T>>;
  template <class T>
  using FirstRepeated = Repeated<First<T>>;
  using NormInPassing = PassList<FirstWithNorm, FirstRepeated, Rest...>;
  using NormFirst = PassList<GradientNorm, FirstRepeated, Rest...>;
};
template <class Preconditioner>
struct Clipped {
  using Passes = typename ClippingLists<typename Preconditioner::Passes>::NormInPassing;
};
template <class Preconditioner>
struct ClippedNormFirst {
  using Passes = typename ClippingLists<typename Preconditioner::Passes>::NormFirst;
};

}  // namespace fastnlcg
