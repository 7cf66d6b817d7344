// The passes of a step: which formulas and which sums, written once for SIMD vectors (step_cpu.cpp) and for CUDA
// threads (step_kernel.cu). Each preconditioner has its section here, and one line in with_preconditioner() at the end;
// no caller knows how many passes it takes or which streams it has.
//
//     none   PlainDots         reads g                    rz                                            4 bytes
//            PlainMove         reads p, g, d              writes p, d, g_prev                          24
//     bfgs   CurvatureDot      reads g, d                 sum(g s), max |g|                             8
//            CurvatureAndDots  reads g, g_prev, d, h      writes h; rz, rz_mid, max |z|                20
//            CurvatureAndMove  reads p, g, d, h           writes p, d, g_prev; sum(g s), sum(s h s)    28
//     adam   AdamDots          reads g, v                 rz, rz_mid                                    8
//            AdamMove          reads p, g, d, v           writes p, d, v; sum(g g), sum(g d)           28
//
// per float32 element; PlainDots and AdamDots read g_prev where Polak-Ribiere asks for rz_mid. Where the gradient's norm is
// wanted, the first pass forms it too (WithNorm), and is repeated where it has to be clipped (Repeated).
//
// A pass is a functor over one place `at` in the flat state: a SIMD vector of elements, or one element in a thread's
// registers. `at.g()` is the gradient the method sees; the others are what is stored there and the group's numbers;
// `at.wide_...()` are the same in double; `at.add(j, a, b)` adds a b to sum j. A pass asks for what it uses, once.
//
// Around it, a pass of the step has
//
//     from_plan(plan, options, broadcast)    builds the pass from the plan so far; broadcast(x) is x as a T
//     assume_constants(broadcast)            resets fields that are constant, so that the compiler can fold them where it
//                                            got the pass from memory
//     update_plan(plan, options, sums, largest, n, limit)    what follows from its sums; `limit` is the largest S
//     sums()                                 which of its sums are not 0, as bits: as few as the options ask for
//
// and these constants: kSums; kFormsLargest (it also forms the largest of the numbers >= 0 given to at.largest());
// kBackward (it walks from the end, to find in the cache what the pass before read last); kFirstPass (of its step);
// kOpens (the first, or its repetition: `from_plan` may use the options alone); kOptional (it runs where the plan says
// `again`); kResident (the stream beside g that a pass which opens may leave on chip for the others); kL2 (weight decay is part of the gradient); kBiasCorrected (it asks for at.inv_sqrt_bias()); kOwnAlpha (it writes p
// whatever the group's alpha is); kUsesOrigin (it reads or writes the origin of a line search).
#pragma once

#include "nlcg_math.h"

namespace fastnlcg {

// The streams of a step, as bits.
enum Streams : unsigned { kP = 1, kGradPrev = 2, kD = 4, kDiagonal = 8, kOrigin = 16 };

// What most passes are.
struct Pass {
  static constexpr bool kReadsGradient = true, kFormsLargest = false, kBackward = false;
  static constexpr bool kFirstPass = false, kOpens = false, kOptional = false;
  static constexpr bool kL2 = true, kBiasCorrected = false, kOwnAlpha = false, kUsesOrigin = false;
  static constexpr unsigned kResident = 0;
  NLCG_HD unsigned sums() const { return ~0u; }
};

// sums() of a pass that forms rz, and where it is wanted rz_mid.
NLCG_HD unsigned dots_wanted(bool mid) { return mid ? 3u : 1u; }

// The passes of a step, in order.
template <template <class> class... P>
struct PassList {};

// ---- no preconditioner: z = -g -----------------------------------------------------------------------------------

template <class T>
struct PlainDots : Pass {
  static constexpr int kSums = 2;
  static constexpr bool kFirstPass = true, kOpens = true;
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
  NLCG_HD static void update_plan(StepPlan& c, const Options& o, const double* sums, double, double, double limit) {
    decide_direction(c, o, sums[0], sums[1], __builtin_sqrt(sums[0]), limit);  // |z| <= |g| summed up in squares
  }
};

template <class T>
struct PlainMove : Pass {
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
  NLCG_HD static PlainMove from_plan(const StepPlan& c, const Options&, Broadcast broadcast) {
    return {{}, broadcast(c.next.beta), true, true};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast) {
    keep_grad = move = true;
  }
  NLCG_HD static void update_plan(StepPlan& c, const Options&, const double*, double, double, double) {
    finish_step(c);
  }
};

struct Plain {
  using Passes = PassList<PlainDots, PlainMove>;
  NLCG_HD static unsigned state_tensors(const Options&) { return kGradPrev | kD; }  // of state, that a step needs
  // For the parts, which know their numbers.
  template <class Broadcast>
  static auto dots(const Options&, bool mid, Broadcast broadcast) {
    return PlainDots<decltype(broadcast(0.0))>{{}, mid};
  }
  template <class Broadcast>
  static auto move(const Options&, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return PlainMove<decltype(broadcast(0.0))>{{}, broadcast(beta), keep_grad, move};
  }
};

// ---- the paper's: diagonal BFGS ----------------------------------------------------------------------------------
//
// ys = sum(y s) = sum(g s) - sum(g_prev s): the last pass forms the second sum while it has both factors in registers,
// so the next step's first pass needs to stream only g and d. Both are sums of the stored numbers in the same order: an
// unchanged gradient gives ys = 0 exactly.

template <class T>
struct BfgsConstants {
  T eps, beta, rsqrt_ys, rsqrt_shs, bound;
};

// From the scalars; 0 where a pass does not use them.
template <class Broadcast>
NLCG_HD auto bfgs_constants(double eps, double beta, double ys, double shs, Broadcast broadcast) {
  const double bound = 0.25 * kLargest<typename Broadcast::Scalar>;
  return BfgsConstants<decltype(broadcast(0.0))>{broadcast(eps), broadcast(beta), broadcast(inverse_root(ys, bound)),
                                                 broadcast(inverse_root(shs, bound)), broadcast(bound)};
}

template <class T>
struct CurvatureDot : Pass {
  static constexpr int kSums = 1;
  static constexpr bool kFormsLargest = true, kFirstPass = true, kOpens = true;
  static constexpr unsigned kResident = kD;
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
  NLCG_HD static void update_plan(StepPlan& c, const Options& o, const double* sums, double largest, double n,
                                  double limit) {
    decide_curvature(c, o, sums[0], largest, n, limit);
  }
};

// The sums over the last move from the state alone, sum(g_prev s) and sum(s h s): what the last pass of the step before
// has formed, so a checkpoint need not hold them, and the ranks it is resumed on may be others. With sum(g s) too they are
// all of ys and shs at once, for a caller without the step before.
template <class T, bool kWithGradient>
struct SumsOverLastMove : Pass {
  static constexpr int kSums = kWithGradient ? 3 : 2;
  static constexpr bool kReadsGradient = kWithGradient, kL2 = kWithGradient;  // without g, p may be gone
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
struct CurvatureAndDots : Pass {
  static constexpr int kSums = 2;
  static constexpr bool kFormsLargest = true, kBackward = true;
  static constexpr unsigned kResident = kD;
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
  NLCG_HD static CurvatureAndDots from_plan(const StepPlan& c, const Options& o, Broadcast broadcast) {
    return {{},
            bfgs_constants(c.eps, 0, c.next.ys, c.next.shs_used, broadcast),
            c.curvature,
            !c.deferred,
            c.history_valid && needs_rz_mid(o)};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast broadcast) {
    c.bound = broadcast(0.25 * kLargest<typename Broadcast::Scalar>);
  }
  NLCG_HD static void update_plan(StepPlan& c, const Options& o, const double* sums, double z_max, double,
                                  double limit) {
    decide_direction(c, o, sums[0], sums[1], z_max, limit);
  }
};

template <class T>
struct CurvatureAndMove : Pass {
  static constexpr int kSums = 2;
  static constexpr unsigned kResident = kD;
  BfgsConstants<T> c;
  bool keep_grad, move;
  bool deferred;  // h is updated here: the pass before might not have been allowed to
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
  NLCG_HD static CurvatureAndMove from_plan(const StepPlan& c, const Options&, Broadcast broadcast) {
    return {{}, bfgs_constants(c.eps, c.next.beta, c.next.ys, c.next.shs_used, broadcast), true, true, c.deferred};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast broadcast) {
    c.bound = broadcast(0.25 * kLargest<typename Broadcast::Scalar>);
    keep_grad = move = true;
  }
  NLCG_HD static void update_plan(StepPlan& c, const Options&, const double* sums, double, double, double) {
    finish_step(c);
    c.next.gs = sums[0];
    c.next.shs = sums[1];
  }
};

struct Bfgs {
  using Passes = PassList<CurvatureDot, CurvatureAndDots, CurvatureAndMove>;
  NLCG_HD static unsigned state_tensors(const Options&) { return kGradPrev | kD | kDiagonal; }
  template <class Broadcast>
  static auto dots(const Options& o, bool mid, Broadcast broadcast) {
    return CurvatureAndDots<decltype(broadcast(0.0))>{{}, bfgs_constants(o.eps, 0, 0, 0, broadcast), false, false, mid};
  }
  template <class Broadcast>
  static auto move(const Options& o, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return CurvatureAndMove<decltype(broadcast(0.0))>{
        {}, bfgs_constants(o.eps, beta, 0, 0, broadcast), keep_grad, move, false};
  }
  // The update of h by itself.
  template <class Broadcast>
  static auto update(double ys, double shs, Broadcast broadcast) {
    return CurvatureAndDots<decltype(broadcast(0.0))>{{}, bfgs_constants(1, 0, ys, shs, broadcast), true, true, false};
  }
};

// ---- Adam's diagonal ---------------------------------------------------------------------------------------------
//
// v needs no curvature pair, so two passes are enough. It is formed in both and stored by the second, when the step is
// decided: a step that skips leaves it alone.

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
struct AdamDots : Pass {
  static constexpr int kSums = 2;
  static constexpr bool kFirstPass = true, kOpens = true, kL2 = false, kBiasCorrected = true;
  static constexpr unsigned kResident = kDiagonal;
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
    const auto wide_g = at.wide(g);
    at.add(0, wide_g, at.wide(preconditioned_gradient(unless_overflown(g, v), h, c.eps)));
    if (mid) {
      const T h_old = adam_diagonal(v_old, at.inv_sqrt_bias_prev());
      at.add(1, wide_g, at.wide(preconditioned_gradient(at.grad_prev(), h_old, c.eps)));
    }
  }

  template <class Broadcast>
  NLCG_HD static AdamDots from_plan(const StepPlan&, const Options& o, Broadcast broadcast) {
    return {{}, adam_constants(o, 0, broadcast), needs_rz_mid(o)};
  }
  NLCG_HD static void update_plan(StepPlan& c, const Options& o, const double* sums, double, double, double limit) {
    decide_direction(c, o, sums[0], sums[1], 0.0, limit);  // |z| <= 1 / sqrt(1 - beta2), far from any overflow
  }
};

template <class T>
struct AdamMove : Pass {
  static constexpr int kSums = 2;
  static constexpr bool kBackward = true, kL2 = false, kBiasCorrected = true;
  static constexpr unsigned kResident = kDiagonal;
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
    const auto wide_g = at.wide(g);
    at.add(0, wide_g, wide_g);
    at.add(1, wide_g, at.wide(d));
  }

  template <class Broadcast>
  NLCG_HD static AdamMove from_plan(const StepPlan& c, const Options& o, Broadcast broadcast) {
    return {{}, adam_constants(o, c.next.beta, broadcast), needs_rz_mid(o), true};
  }
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast) {
    move = true;
  }
  NLCG_HD static void update_plan(StepPlan& c, const Options&, const double* sums, double, double, double) {
    finish_step(c);
    c.next.updated = 1.0;
    c.next.gg = sums[0];
    c.next.gd = sums[1];
  }
};

struct Adam {
  using Passes = PassList<AdamDots, AdamMove>;
  NLCG_HD static unsigned state_tensors(const Options& o) {
    return (needs_rz_mid(o) ? kGradPrev : 0u) | kD | kDiagonal;
  }
  template <class Broadcast>
  static auto dots(const Options& o, bool mid, Broadcast broadcast) {
    return AdamDots<decltype(broadcast(0.0))>{{}, adam_constants(o, 0, broadcast), mid};
  }
  template <class Broadcast>
  static auto move(const Options& o, double beta, bool keep_grad, bool move, Broadcast broadcast) {
    return AdamMove<decltype(broadcast(0.0))>{{}, adam_constants(o, beta, broadcast), keep_grad, move};
  }
};

// ---- every preconditioner ----------------------------------------------------------------------------------------

// The only place that knows them all.
template <class F>
decltype(auto) with_preconditioner(Preconditioner kind, F&& f) {
  switch (kind) {
    case Preconditioner::bfgs:
      return f(Bfgs{});
    case Preconditioner::adam:
      return f(Adam{});
    default:
      return f(Plain{});
  }
}

// ---- the gradient's norm, and clipping ---------------------------------------------------------------------------

// A first pass that forms sum(g g) too, before weight decay, behind its own sums.
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
  NLCG_HD static WithNorm from_plan(const StepPlan& c, const Options& o, Broadcast broadcast) {
    return {First::from_plan(c, o, broadcast)};
  }
  NLCG_HD static void update_plan(StepPlan& c, const Options& o, const double* sums, double largest, double n,
                                  double limit) {
    decide_clipping(c, o, sums[First::kSums]);
    if (!c.skip && !c.again) First::update_plan(c, o, sums, largest, n, limit);
  }
};

// The norm alone, before every other pass: 4 bytes, and nothing is formed twice. For a step that expects to clip.
template <class T>
struct GradientNorm : Pass {
  static constexpr int kSums = 1;
  static constexpr bool kFirstPass = true, kOpens = true, kL2 = false;
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
  NLCG_HD static void update_plan(StepPlan& c, const Options& o, const double* sums, double, double, double) {
    decide_clipping(c, o, sums[0]);
    c.again = !c.skip;
  }
};

// The same pass over the clipped gradient.
template <class First>
struct Repeated : First {
  static constexpr bool kFirstPass = false, kOptional = true;
  template <class Broadcast>
  NLCG_HD static Repeated from_plan(const StepPlan& c, const Options& o, Broadcast broadcast) {
    return {First::from_plan(c, o, broadcast)};
  }
};

template <class Passes>
struct ClippingOf;
template <template <class> class First, template <class> class... Rest>
struct ClippingOf<PassList<First, Rest...>> {
  template <class T>
  using Norm = WithNorm<First<T>>;
  template <class T>
  using Repetition = Repeated<First<T>>;
  using Passes = PassList<Norm, Repetition, Rest...>;
  using NormFirst = PassList<GradientNorm, Repetition, Rest...>;
};
template <class Preconditioner>
struct WithClipping : Preconditioner {
  using Passes = typename ClippingOf<typename Preconditioner::Passes>::Passes;
};

// The passes of a step with these options.
template <class F>
decltype(auto) with_passes(const Options& o, F&& f) {
  return with_preconditioner(o.preconditioner, [&](auto preconditioner) {
    return o.measure_norm ? f(WithClipping<decltype(preconditioner)>{}) : f(preconditioner);
  });
}

// For diagnostics: |d|^2, and where the state keeps g, |g|^2 and g . d.
template <class T>
struct StateNorms : Pass {
  static constexpr int kSums = 3;
  static constexpr bool kReadsGradient = false, kL2 = false;
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
