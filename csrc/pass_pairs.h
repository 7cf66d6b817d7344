// The passes over curvature pairs: L-BFGS with m pairs (s, y) and an initial matrix gamma P, P = 1/h. Decided by
// python/fastnlcg/full_batch/pairs.py, on scalars. A pair is two rows of one matrix: s in one, y in the other.
//
//     StorePair      y = g - g_prev, s = alpha d, into their rows; h as in Curvature
//                                      sum(y y/h) before and after, sum(y y), sum(s s)             4 + 4 arrays
//     RowDots        sums of four rows times g, or times d: S^T g, Y^T d                           5
//     PairResidual   q = g + sum_k c_k y_k,  d = gamma P q,  g_prev = g;  the first four of Y^T d  m + 4
//     PairDirection  d = -(d + sum_k c_k s_k);  sum(g d), sum(d h d)                               m + 4
//     Mark           sum(g d), and the mark of p                                                   3
//
// The two loops of L-BFGS become three passes, because apart from S^T g and Y^T P q, all they need of the pairs is the
// matrix S^T Y, whose elements are scalars. Source: Nocedal, Math. Comp. 35 (1980) 773; Byrd, Nocedal & Schnabel, Math.
// Programming 63 (1994) 129. The buffers are whole blocks, so no pass here meets the end of a segment.
#pragma once

#include "elementwise.h"
#include "pass.h"
#include "pass_full_batch.h"

namespace fastnlcg {

constexpr int kRowsAtOnce = kMaxSums;

// Before a loop over rows: a GPU has registers for two rows at once.
#ifdef __CUDA_ARCH__  // not for the host's compiler
#define NLCG_TWO_ROWS _Pragma("unroll 2")
#else
#define NLCG_TWO_ROWS
#endif

template <class T>
struct StorePair : FullBatchDefaults {
  static constexpr int kSums = 4;
  static constexpr bool kUsesRows = true;
  DiagonalUpdate<T> update;
  T alpha;
  int s_row, y_row;
  bool preconditioned;
  NLCG_HD unsigned reads() const { return kGradPrev | kD | (preconditioned ? kDiagonal : 0u); }
  NLCG_HD unsigned writes() const { return preconditioned ? kDiagonal : 0u; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T y = gradient_change(at.g(), at.grad_prev()), s = scaled_direction(alpha, at.d());
    at.set_row(s_row, s);
    at.set_row(y_row, y);
    T before = y, after = y;
    if (preconditioned) {
      const T scaled = scaled_diagonal(update.scale, at.diagonal());
      const T h = update(scaled, y, s);
      at.set_diagonal(h);
      before = preconditioned_gradient(y, scaled, T{});
      after = preconditioned_gradient(y, h, T{});
    }
    const auto wide_y = at.wide(y), wide_s = at.wide(s);
    at.add(0, wide_y, at.wide(before));
    at.add(1, wide_y, at.wide(after));
    at.add(2, wide_y, wide_y);
    at.add(3, wide_s, wide_s);
  }
};

// kOfDirection: times d, else times g.
template <class T, bool kOfDirection>
struct RowDots : FullBatchDefaults {
  static constexpr int kSums = kRowsAtOnce;
  static constexpr bool kUsesRows = true, kReadsGradient = !kOfDirection;
  int row, count;
  NLCG_HD unsigned reads() const { return kOfDirection ? kD : 0u; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const auto x = at.wide([&] {
      if constexpr (kOfDirection) {
        return at.d();
      } else {
        return at.g();
      }
    }());
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (k < count) at.add(k, at.wide(at.row(row + k)), x);
    }
  }
};

template <class T>
struct PairResidual : FullBatchDefaults {
  static constexpr int kSums = kRowsAtOnce;
  static constexpr bool kUsesRows = true;
  T gamma;
  int row, count;
  bool preconditioned;
  T coefficient[kMostPairs];
  NLCG_HD unsigned reads() const { return preconditioned ? kDiagonal : 0u; }
  NLCG_HD unsigned writes() const { return kD | kGradPrev; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    at.set_grad_prev(g);
    T q = g;
    NLCG_TWO_ROWS
    for (int k = 0; k < count; ++k) q = with_multiple(q, coefficient[k], at.row(row + k));
    const T w = preconditioned ? preconditioned_gradient(q, at.diagonal(), T{}) : q;
    const T d = scaled_direction(gamma, w);
    at.set_d(d);
    const auto wide_d = at.wide(d);
    for (int k = 0; k < kRowsAtOnce; ++k) {
      if (k < count) at.add(k, at.wide(at.row(row + k)), wide_d);
    }
  }
};

template <class T>
struct PairDirection : FullBatchDefaults {
  static constexpr int kSums = 2;
  static constexpr bool kBackward = true, kUsesRows = true;
  int row, count;
  bool preconditioned;
  T coefficient[kMostPairs];
  NLCG_HD unsigned reads() const { return kD | (preconditioned ? kDiagonal : 0u); }
  NLCG_HD unsigned writes() const { return kD; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    T w = at.d();
    NLCG_TWO_ROWS
    for (int k = 0; k < count; ++k) w = with_multiple(w, coefficient[k], at.row(row + k));
    const T d = -w;
    at.set_d(d);
    const auto wide_d = at.wide(d);
    at.add(0, at.wide(at.g()), wide_d);
    at.add(1, at.wide(preconditioned ? hessian_times(at.diagonal(), d) : d), wide_d);
  }
};

template <class T>
struct Mark : FullBatchDefaults {
  static constexpr int kSums = 3;
  NLCG_HD unsigned reads() const { return kP | kD; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T d = at.d();
    at.add(0, at.wide(at.g()), at.wide(d));
    add_mark(at, 1, at.p(), d);
  }
};

template <class Broadcast, class P>
void put_coefficients(P& pass, const Descent& x, Broadcast broadcast) {
  for (int k = 0; k < kMostPairs; ++k) pass.coefficient[k] = broadcast(x.coefficient[k]);
}

// Calls f with the pass, its scalars in the state's type.
template <class Broadcast, class F>
void with_pair_pass(const Descent& x, Broadcast broadcast, F&& f) {
  using T = decltype(broadcast(0.0));
  switch (x.kind) {
    case Descent::Kind::pair:
      return f(StorePair<T>{{}, diagonal_update(x, broadcast), broadcast(x.alpha), x.row, x.y_row, x.preconditioned});
    case Descent::Kind::gradient_dots:
      return f(RowDots<T, false>{{}, x.row, x.count});
    case Descent::Kind::direction_dots:
      return f(RowDots<T, true>{{}, x.row, x.count});
    case Descent::Kind::residual: {
      PairResidual<T> pass{{}, broadcast(x.gamma), x.row, x.count, x.preconditioned, {}};
      put_coefficients(pass, x, broadcast);
      return f(pass);
    }
    case Descent::Kind::pair_direction: {
      PairDirection<T> pass{{}, x.row, x.count, x.preconditioned, {}};
      put_coefficients(pass, x, broadcast);
      return f(pass);
    }
    default:
      return f(Mark<T>{});
  }
}

inline bool is_pair_pass(const Descent& x) { return x.kind >= Descent::Kind::pair; }

// One past the last row that a pass reads or writes.
inline std::int64_t rows_of(const Descent& x) {
  if (x.kind == Descent::Kind::mark) return 0;
  if (x.kind == Descent::Kind::pair) return std::int64_t{x.row > x.y_row ? x.row : x.y_row} + 1;
  return std::int64_t{x.row} + x.count;
}

// The largest count that a pass takes.
inline int most_rows_of(const Descent& x) {
  const bool dots = x.kind == Descent::Kind::gradient_dots || x.kind == Descent::Kind::direction_dots;
  return dots ? kRowsAtOnce : kMostPairs;
}

}  // namespace fastnlcg
