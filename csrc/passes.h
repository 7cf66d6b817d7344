// The three passes of a step, and two more for the parts: which formulas and which sums, written once for SIMD vectors
// (step_cpu.cpp) and for CUDA threads (step_kernel.cu).
//
//     pass 1   CurvatureDot       reads g, d              sum(g s), max|g|                             8 bytes per
//     element pass 2   CurvatureAndDots   reads g, g_prev, d, h   writes h; rz_new, rz_mid, sum(g d)          20 pass 3
//     DirectionAndMove   reads p, g, d, h        writes p, d, g_prev; sum(g s), sum(s h s)   28
//
// ys = sum(y s) = sum(g s) - sum(g_prev s): pass 3 forms the second sum while it has both factors in registers, so the
// next step's pass 1 needs to stream only g and d. Both are sums of the stored numbers in the same order: an unchanged
// gradient gives ys = 0 exactly.
//
// A pass is a functor over one place `at` in the flat state: a SIMD vector of elements, or one element in a thread's
// registers. `at.g()` is the gradient the method sees; the others are what is stored there and the group's numbers;
// `at.wide_...()` are the same in double; `at.add(j, a, b)` adds a b to sum j. A pass asks for what it uses, once.
#pragma once

#include "nlcg_math.h"

namespace fastnlcg {

// The streams of a step, as bits.
enum Streams : unsigned { kP = 1, kGradPrev = 2, kD = 4, kH = 8 };

template <class T>
struct Constants {
  T eps, beta, rsqrt_ys, rsqrt_shs, bound;
};

// From the scalars, in the state's type; 0 where a pass does not use them.
template <class S>
NLCG_HD Constants<S> constants(double eps, double beta, double ys, double shs) {
  const double bound = 0.25 * kLargest<S>;
  return {static_cast<S>(eps), static_cast<S>(beta), static_cast<S>(inverse_root(ys, bound)),
          static_cast<S>(inverse_root(shs, bound)), static_cast<S>(bound)};
}

template <class T>
struct CurvatureDot {  // pass 1
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = true, kMaxGradient = true, kBackward = false;
  NLCG_HD unsigned reads() const { return kD; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    at.add(0, at.wide(g), at.wide(scaled_direction(at.alpha_prev(), at.d())));
    at.largest(magnitude(g));
  }
};

template <class T>
struct CurvatureSums {  // all of ys and shs at once, for a caller without the sums of the step before
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = true, kMaxGradient = false, kBackward = false;
  NLCG_HD unsigned reads() const { return kGradPrev | kD | kH; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T s = scaled_direction(at.alpha_prev(), at.d());
    const auto wide_s = at.wide(s);
    at.add(0, at.wide(at.g()), wide_s);
    at.add(1, at.wide_grad_prev(), wide_s);
    at.add(2, at.wide(curvature_along(at.h(), s)), wide_s);
  }
};

template <class T>
struct CurvatureAndDots {  // pass 2
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = true, kMaxGradient = false, kBackward = true;
  Constants<T> c;
  bool preconditioned, curvature, store_h, mid, descent;
  NLCG_HD unsigned reads() const {
    return (mid || curvature ? kGradPrev : 0u) | (descent || curvature ? kD : 0u) | (preconditioned ? kH : 0u);
  }
  NLCG_HD unsigned writes() const { return preconditioned && curvature && store_h ? kH : 0u; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const auto wide_g = at.wide(g);
    if (!preconditioned) {
      at.add(0, wide_g, wide_g);
      if (mid) at.add(1, wide_g, at.wide_grad_prev());
    } else {
      T h = at.h();
      if (mid) at.add(1, wide_g, at.wide(preconditioned_gradient(at.grad_prev(), h, c.eps)));
      if (curvature) {
        const T s = scaled_direction(at.alpha_prev(), at.d());
        h = bfgs_diagonal(h, gradient_change(g, at.grad_prev()), s, c.rsqrt_ys, c.rsqrt_shs, c.bound);
        if (store_h) at.set_h(h);
      }
      at.add(0, wide_g, at.wide(preconditioned_gradient(g, h, c.eps)));
    }
    if (descent) at.add(2, wide_g, at.wide_d());
  }
};

template <class T>
struct DirectionAndMove {  // pass 3
  static constexpr int kSums = 2;
  static constexpr bool kReadsGradient = true, kMaxGradient = false, kBackward = false;
  Constants<T> c;
  bool preconditioned, keep_grad, move;
  bool deferred;  // h is updated here: pass 2 might not have been allowed to
  NLCG_HD unsigned reads() const {
    return (move ? kP : 0u) | (deferred ? kGradPrev : 0u) | kD | (preconditioned ? kH : 0u);
  }
  NLCG_HD unsigned writes() const {
    return (move ? kP : 0u) | (keep_grad ? kGradPrev : 0u) | kD | (deferred ? kH : 0u);
  }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const T d_old = at.d();
    T h{}, w = g;
    if (preconditioned) {
      h = at.h();
      if (deferred) {
        const T s = scaled_direction(at.alpha_prev(), d_old);
        h = bfgs_diagonal(h, gradient_change(g, at.grad_prev()), s, c.rsqrt_ys, c.rsqrt_shs, c.bound);
        at.set_h(h);
      }
      w = preconditioned_gradient(g, h, c.eps);
    }
    const T d = conjugate_direction(w, c.beta, d_old);
    const T s = scaled_direction(at.alpha(), d);
    at.set_d(d);
    if (keep_grad) at.set_grad_prev(g);
    if (move && at.moves()) at.set_p(moved(at.p(), s));
    if (preconditioned) {
      const auto wide_s = at.wide(s);
      at.add(0, at.wide(g), wide_s);
      at.add(1, at.wide(curvature_along(h, s)), wide_s);
    }
  }
};

template <class T>
struct StateNorms {  // for diagnostics: |g_prev|^2, |d|^2, g_prev . d
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = false, kMaxGradient = false, kBackward = false;
  NLCG_HD unsigned reads() const { return kGradPrev | kD; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const auto g = at.wide_grad_prev(), d = at.wide_d();
    at.add(0, g, g);
    at.add(1, d, d);
    at.add(2, g, d);
  }
};

}  // namespace fastnlcg
