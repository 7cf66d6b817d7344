// The passes of full-batch descent: conjugate gradients with a line search, both decided by
// python/fastnlcg/full_batch/iteration.py. They run on the same machinery as the passes of a step (pass.h).
//
//     Trial         reads origin, d           writes p                                  12 bytes
//                   the first of a search: reads p, d; writes p, origin; the mark       16
//     Slope         reads g, d                sum(g d), max |g|                          8
//     Curvature     reads g, g_prev, d, h     writes h; sum(g w), sum(y w), sum(y y/h)  20
//     NewDirection  reads p, g, d, h          writes d, g_prev; sum(g d), sum(d h d),   24
//                                             the mark
//
// per float32 element; 4 or 8 less without a preconditioner. A trial needs no gradient.
//
// The mark of a point is sum(p d), sum(p p). It is formed at the end of an iteration and again at the start of the next,
// in the same order. If the two differ, something has written p in between.
#pragma once

#include "elementwise.h"
#include "pass.h"

namespace fastnlcg {

struct FullBatchDefaults : PassDefaults {
  static constexpr bool kAppliesL2Decay = false, kTakes16Bit = false;
};

template <class At, class T>
NLCG_HD void add_mark(At& at, int sum, T p, T d) {
  const auto wide_p = at.wide(p);
  at.add(sum, wide_p, at.wide(d));
  at.add(sum + 1, wide_p, wide_p);
}

template <class T>
struct Trial : FullBatchDefaults {
  static constexpr int kSums = 2;
  static constexpr bool kReadsGradient = false, kStoresEvenAtZeroAlpha = true, kUsesOrigin = true;
  T alpha;
  bool first, moves;  // false: alpha is 0, and p becomes the origin, whatever d holds
  NLCG_HD unsigned reads() const { return (first ? kP : kOrigin) | kD; }
  NLCG_HD unsigned writes() const { return kP | (first ? kOrigin : 0u); }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T origin = first ? at.p() : at.origin(), d = at.d();
    if (first) {
      at.set_origin(origin);
      add_mark(at, 0, origin, d);
    }
    at.set_p(moves ? moved(origin, scaled_direction(alpha, d)) : origin);
  }
};

template <class T>
struct Slope : FullBatchDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kFormsLargest = true;
  NLCG_HD unsigned reads() const { return kD; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    at.add(0, at.wide(g), at.wide_d());
    at.largest(absolute(g));
  }
};

// h after an update with a pair (s, y): of the scaled h, and at least a rounding of it.
template <class T>
struct DiagonalUpdate {
  T scale, rsqrt_ys, rsqrt_shs, bound, epsilon;
  NLCG_HD T operator()(T scaled, T y, T s) const {
    return at_least(bfgs_diagonal(scaled, y, s, rsqrt_ys, rsqrt_shs, bound), T(epsilon * scaled));
  }
};
template <class Broadcast>
auto diagonal_update(const Descent& x, Broadcast broadcast) {
  using S = typename Broadcast::Scalar;
  const double bound = 0.25 * kLargest<S>, epsilon = sizeof(S) == sizeof(float) ? 0x1p-23 : 0x1p-52;
  return DiagonalUpdate<decltype(broadcast(0.0))>{broadcast(x.scale), broadcast(inverse_root(x.ys, bound)),
                                                  broadcast(inverse_root(x.shs, bound)), broadcast(bound),
                                                  broadcast(epsilon)};
}

template <class T>
struct Curvature : FullBatchDefaults {
  static constexpr int kSums = 3;
  DiagonalUpdate<T> updated;
  T alpha;
  bool update, preconditioned;
  NLCG_HD unsigned reads() const { return kGradPrev | (update ? kD : 0u) | (preconditioned ? kDiagonal : 0u); }
  NLCG_HD unsigned writes() const { return update ? kDiagonal : 0u; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g(), y = gradient_change(g, at.grad_prev());
    T w = g, py = y;
    if (preconditioned) {
      T h = at.diagonal();
      if (update) {
        h = updated(scaled_diagonal(updated.scale, h), y, scaled_direction(alpha, at.d()));
        at.set_diagonal(h);
      }
      w = preconditioned_gradient(g, h, T{});
      py = preconditioned_gradient(y, h, T{});
    }
    const auto wide_y = at.wide(y), wide_w = at.wide(w);
    at.add(0, at.wide(g), wide_w);
    at.add(1, wide_y, wide_w);
    at.add(2, wide_y, at.wide(py));
  }
};

template <class T>
struct NewDirection : FullBatchDefaults {
  static constexpr int kSums = 4;
  static constexpr bool kBackward = true;
  T beta;
  bool keeps, preconditioned;  // keeps = false: d = -w, whatever d held
  NLCG_HD unsigned reads() const { return kP | (keeps ? kD : 0u) | (preconditioned ? kDiagonal : 0u); }
  NLCG_HD unsigned writes() const { return kD | kGradPrev; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    const T w = preconditioned ? preconditioned_gradient(g, at.diagonal(), T{}) : g;
    const T d = keeps ? conjugate_direction(w, beta, at.d()) : T(-w);
    at.set_d(d);
    at.set_grad_prev(g);
    const auto wide_d = at.wide(d);
    at.add(0, at.wide(g), wide_d);
    at.add(1, at.wide(preconditioned ? hessian_times(at.diagonal(), d) : d), wide_d);
    add_mark(at, 2, at.p(), d);
  }
};

// Calls f with the pass, its scalars in the state's type.
template <class Broadcast, class F>
void with_descent_pass(const Descent& x, Broadcast broadcast, F&& f) {
  using T = decltype(broadcast(0.0));
  switch (x.kind) {
    case Descent::Kind::trial:
      return f(Trial<T>{{}, broadcast(x.alpha), x.first, x.alpha != 0.0});
    case Descent::Kind::slope:
      return f(Slope<T>{});
    case Descent::Kind::curvature:
      return f(Curvature<T>{
          {}, diagonal_update(x, broadcast), broadcast(x.alpha), x.update && x.preconditioned, x.preconditioned});
    default:
      return f(NewDirection<T>{{}, broadcast(x.beta), x.beta != 0.0, x.preconditioned});
  }
}

// The state arrays that a pass needs.
inline unsigned state_of(const Descent& x) {
  const unsigned diagonal = x.preconditioned ? kDiagonal : 0u;
  switch (x.kind) {
    case Descent::Kind::trial:
      return kOrigin | kD;
    case Descent::Kind::slope:
    case Descent::Kind::direction_dots:
    case Descent::Kind::mark:
      return kD;
    case Descent::Kind::gradient_dots:
      return 0;
    case Descent::Kind::pair_direction:
      return kD | diagonal;
    default:
      return kGradPrev | kD | diagonal;
  }
}

}  // namespace fastnlcg
