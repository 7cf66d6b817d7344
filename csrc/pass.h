// What a pass is: a functor over the elements of the flat index, which the CPU (cpu_tile.h) calls with SIMD vectors of
// elements and CUDA (tile.cuh) with one element in a thread's registers. It is written once for both, as a template
// over the type T of an element or vector.
//
// `pass(at)` computes one element or vector:
//
//     at.g(), undecayed()      the gradient that the method sees, scaled and clipped, with L2 weight decay; without it
//     at.p(), grad_prev(), d(), diagonal(), origin()      what is stored there
//     at.set_p(x), ...         stores x
//     at.alpha(), alpha_prev(), decay_factor(), inv_sqrt_bias(), inv_sqrt_bias_prev()      scalars of the segment
//     at.moves()               false if alpha is 0: p then keeps every bit, the sign of a zero included
//     at.is_matrix()           whether the segment is matrices (kMixesMatrices)
//     at.wide(x), wide_grad_prev(), wide_d()      in double
//     at.row(k), at.set_row(k, x)    row k of the matrix of curvature pairs
//     at.add(j, a, b)          adds a * b, both in double, to sum number j
//     at.add_in_run(j, a, b)   the same in the state's type, over a short run of elements at a time (kAddsInRuns)
//     at.largest(x)            takes the maximum with x >= 0
//
// A pass asks for each value once: a load is not repeated. Preconditioners list their passes as a PassList; the
// machinery runs any list, so a new preconditioner is a new list (preconditioners.h).
#pragma once

#include <concepts>
#include <type_traits>

#include "decisions.h"

namespace fastnlcg {

// The arrays that a pass may read and write, as bits. The gradient is read only, see kReadsGradient.
enum StateArrays : unsigned { kP = 1, kGradPrev = 2, kD = 4, kDiagonal = 8, kOrigin = 16 };

// Of a pass that mixes matrices with other segments: those of these arrays that a segment has.
template <class Pass>
NLCG_HD unsigned arrays_of(const Segment& segment, unsigned arrays) {
  return Pass::kMixesMatrices && segment.matrices ? arrays & kD : arrays;
}

// The traits of a pass, with their defaults: every pass derives from this and states only what differs.
struct PassDefaults {
  // Calls at.g() or at.undecayed().
  static constexpr bool kReadsGradient = true;
  // L2 weight decay, if the group has any, is part of at.g().
  static constexpr bool kAppliesL2Decay = true;
  // Calls at.inv_sqrt_bias(): depends on how often a parameter has moved.
  static constexpr bool kUsesStepCounts = false;
  // Reads or writes the origin of a line search.
  static constexpr bool kUsesOrigin = false;
  // Reads or writes rows of curvature pairs. Its buffers are whole blocks, each a single segment.
  static constexpr bool kUsesRows = false;
  // Calls at.largest(), whose result follows the sums.
  static constexpr bool kFormsLargest = false;
  // Parameters and gradients may be bfloat16 or float16.
  static constexpr bool kTakes16Bit = true;
  // The state may be bfloat16, rounded stochastically.
  static constexpr bool kTakesBFloat16State = false;
  // Calls at.add_in_run(): only for terms that cannot overflow the state's type.
  static constexpr bool kAddsInRuns = false;
  // GPU: walks from the end of the flat index, to find in the cache what the pass before read last. (On a CPU this
  // gained nothing.)
  static constexpr bool kBackward = false;
  // Stores p even if alpha is 0, because it has a step length of its own.
  static constexpr bool kStoresEvenAtZeroAlpha = false;
  // The first pass of a step: its decision begins the step.
  static constexpr bool kFirstPass = false;
  // from_plan() uses the options alone, so the host can build the pass before the step's first decision.
  static constexpr bool kBuiltFromOptionsAlone = false;
  // Calls at.is_matrix(): of segments that are matrices it reads and writes g and d alone.
  static constexpr bool kMixesMatrices = false;
  // Runs only if the plan says `again`: the gradient has to be clipped.
  static constexpr bool kOnlyIfClipped = false;
  // GPU, one launch: the state array that the first pass leaves in shared memory, next to g, for the others. 0:
  // neither.
  static constexpr unsigned kKeptInSharedMemory = 0;
  // GPU, float32: how many groups of four elements a thread may load at once, in separate launches and in one launch.
  // Fewer than 2 if two would not fit the registers.
  static constexpr int kMostQuadsAtOnce = 2, kMostQuadsAtOnceInOneLaunch = 2;

  // Which sums are not 0, as bits: as few as the options need.
  NLCG_HD unsigned sums() const { return ~0u; }
  // Sets fields that are the same in every step, so that the compiler can fold them if it got the pass from memory.
  template <class Broadcast>
  NLCG_HD void assume_constants(Broadcast) {}
};

// broadcast(x): a double as an element of type S; cpu_passes.h has one for vectors. Passes get their scalars through
// it.
template <class S>
struct ElementBroadcast {
  using Scalar = S;
  NLCG_HD S operator()(double x) const { return static_cast<S>(x); }
};

// ---- what the compiler checks ------------------------------------------------------------------------------------

// What a pass may ask of `at`. Declarations only.
struct AnyElement {
  float g(), undecayed(), p(), grad_prev(), d(), diagonal(), origin();
  float alpha(), alpha_prev(), decay_factor(), inv_sqrt_bias(), inv_sqrt_bias_prev();
  bool moves(), is_matrix();
  void set_p(float), set_grad_prev(float), set_d(float), set_diagonal(float), set_origin(float);
  float row(int);
  void set_row(int, float);
  double wide(float), wide_grad_prev(), wide_d();
  void add(int, double, double);
  void add_in_run(int, float, float);
  void largest(float);
};

// A pass over one element: what it reads and writes, and its sums.
template <class P>
concept Pass = std::derived_from<P, PassDefaults> && std::is_trivially_copyable_v<P> &&
               (P::kSums >= 1 && P::kSums + P::kFormsLargest <= kMaxSums) && requires(const P& pass, AnyElement& at) {
                 { pass.reads() } -> std::same_as<unsigned>;   // StateArrays, as bits
                 { pass.writes() } -> std::same_as<unsigned>;  // the same
                 { pass.sums() } -> std::same_as<unsigned>;
                 pass(at);
               };

// A pass of a step: how it is built from what has been decided so far, and what follows from its sums.
// Its sums are columns of a rank's row.
template <class P>
concept StepPass = Pass<P> && (P::kSums <= kLargestElement) &&
                   requires(P& pass, StepPlan& plan, const Options& options, const double* sums) {
                     // The pass with its scalars, each broadcast(x).
                     { P::from_plan(plan, options, ElementBroadcast<float>{}) } -> std::same_as<P>;
                     pass.assume_constants(ElementBroadcast<float>{});
                     // update_plan(plan, options, sums, largest, n, limit): n elements; `limit` is the largest number of the state's type.
                     P::update_plan(plan, options, sums, 0.0, 0.0, 0.0);
                   };

// The passes of a step, in order.
template <template <class> class... P>
  requires(StepPass<P<float>> && ...)
struct PassList {};

template <template <class> class... P>
constexpr bool takes_bfloat16_state(PassList<P...>) {
  return (P<float>::kTakesBFloat16State && ...);
}

// The pass that is compiled for the CPU: passes that differ in their decisions alone share one.
template <class P>
const auto& kernel_of(const P& pass) {
  if constexpr (requires { typename P::Kernel; }) {
    return static_cast<const typename P::Kernel&>(pass);
  } else {
    return pass;
  }
}

// A pass that forms rz forms rz_mid too if it is wanted: its sums().
NLCG_HD unsigned dots_wanted(bool mid) { return mid ? 3u : 1u; }

}  // namespace fastnlcg
