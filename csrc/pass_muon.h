// The passes of Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), whose preconditioner is the polar
// factor of a matrix, with a conjugate beta for its momentum. For matrices
//
//     beta  = min(sum(g g) / sum(g_prev g_prev), beta_max)     sums over all matrices
//     d_new = beta d - g                                       u = beta d_new - g
//     p_new = (1 - alpha weight_decay) p + alpha O             O = size * polar(u), size = 0.2 sqrt(max(rows, columns))
//
// All other parameters take the step of Adam's diagonal (pass_adam.h), in the same two passes: MuonDots and MuonMove. For
// matrices they form the sum and d. Then, for one batch of matrices after another, MatrixInput writes u to a workspace,
// the segment's origin, normalize() divides it by its norm, torch's products replace it by O
// (python/fastnlcg/tensors/matrices.py), and MatrixMove moves p.
//
//     MuonDots       matrices: reads g                sum(g g)               4 bytes
//     MuonMove       matrices: reads g, d             writes d              12
//     MatrixInput    reads g, d                       writes u              12
//     normalize()    reads u; reads and writes u      a norm a matrix       12
//     MatrixMove     reads p, O                       writes p              12
//
// per float32 element; the last three while the batch is in the cache, if it fits there.
#pragma once

#include "pass_adam.h"

namespace fastnlcg {

template <class T>
struct MuonDots : AdamDots<T> {  // never with rz_mid: sum number 1 is that of the matrices
  static constexpr bool kMixesMatrices = true;
  static constexpr unsigned kKeptInSharedMemory = 0;
  NLCG_HD unsigned sums() const { return 3u; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    if (at.is_matrix()) {
      const auto wide_g = at.wide(at.g());
      at.add(1, wide_g, wide_g);
    } else {
      AdamDots<T>::operator()(at);
    }
  }

  template <class Broadcast>
  NLCG_HD static MuonDots from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {AdamDots<T>::from_plan(plan, o, broadcast)};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double, double, double limit) {
    const double direction_max = plan.next.direction_max;
    decide_direction(plan, o, sums[0], 0.0, 0.0, limit);
    decide_matrices(plan, o, sums[1], direction_max, limit);
  }
};

template <class T>
struct MuonMove : AdamMove<T> {
  static constexpr bool kMixesMatrices = true;
  static constexpr unsigned kKeptInSharedMemory = 0;
  T beta_matrices;

  template <class At>
  NLCG_HD void operator()(At& at) const {
    if (at.is_matrix()) {
      const T g = at.g();
      const T d = conjugate_direction(g, beta_matrices, at.d());
      at.set_d(d);
      const auto wide_g = at.wide(g);
      at.add(0, wide_g, wide_g);
      at.add(1, wide_g, at.wide(d));
    } else {
      AdamMove<T>::operator()(at);
    }
  }

  template <class Broadcast>
  NLCG_HD static MuonMove from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {AdamMove<T>::from_plan(plan, o, broadcast), broadcast(plan.next.beta_matrices)};
  }
};

struct Muon {
  static constexpr bool kMatrices = true;
  using Passes = PassList<MuonDots, MuonMove>;
  NLCG_HD static unsigned state_arrays(const Options&) { return kD | kDiagonal; }
  template <class Broadcast>
  static auto dots(const Options& o, bool mid, Broadcast broadcast) {
    return Adam::dots(o, mid, broadcast);
  }
  template <class Broadcast>
  static auto move(const Options& o, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return Adam::move(o, beta, keep_grad, move, broadcast);
  }
};

// ---- a batch of matrices -----------------------------------------------------------------------------------------

template <class T>
struct MatrixInput : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kAppliesL2Decay = false, kUsesOrigin = true;
  T beta;
  NLCG_HD unsigned reads() const { return kD; }
  NLCG_HD unsigned writes() const { return kOrigin; }
  NLCG_HD unsigned sums() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    at.set_origin(conjugate_direction(at.g(), beta, at.d()));
  }

  template <class Broadcast>
  NLCG_HD static MatrixInput of(const Scalars& now, Broadcast broadcast) {
    return {{}, broadcast(now.beta_matrices)};
  }
};

template <class T>
struct MatrixMove : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false, kAppliesL2Decay = false, kUsesOrigin = true;
  NLCG_HD unsigned reads() const { return kP | kOrigin; }
  NLCG_HD unsigned writes() const { return kP; }
  NLCG_HD unsigned sums() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    if (at.moves()) {
      at.set_p(moved(decayed_parameter(at.p(), at.decay_factor()), scaled_direction(at.alpha(), at.origin())));
    }
  }

  template <class Broadcast>
  NLCG_HD static MatrixMove of(const Scalars&, Broadcast) {
    return {};
  }
};

// normalize(): x / |x|, of every matrix x of a batch.
template <class T>
struct MatrixSquares : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false, kAppliesL2Decay = false, kUsesOrigin = true, kTakes16Bit = false;
  NLCG_HD unsigned reads() const { return kOrigin; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const auto x = at.wide(at.origin());
    at.add(0, x, x);
  }
};
template <class T>
struct MatrixScale : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kReadsGradient = false, kAppliesL2Decay = false, kUsesOrigin = true, kTakes16Bit = false;
  NLCG_HD unsigned reads() const { return kOrigin; }
  NLCG_HD unsigned writes() const { return kOrigin; }
  NLCG_HD unsigned sums() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    at.set_origin(scaled_direction(at.alpha(), at.origin()));
  }
};

}  // namespace fastnlcg
