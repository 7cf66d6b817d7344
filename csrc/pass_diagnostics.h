// The pass that diagnostics() takes over the state.
#pragma once

#include "pass.h"

namespace fastnlcg {

// |d|^2, and, if the state has g_prev, |g_prev|^2 and g_prev . d.
template <class T>
struct StateNorms : PassDefaults {
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = false, kAppliesL2Decay = false;
  bool grad;
  NLCG_HD unsigned reads() const { return (grad ? kGradPrev : 0u) | kD; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const auto d = at.wide_d();
    at.add(1, d, d);
    if (grad) {
      const auto g = at.wide_grad_prev();
      at.add(0, g, g);
      at.add(2, g, d);
    }
  }
};

}  // namespace fastnlcg
