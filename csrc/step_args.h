// What a step is given: plain structs, shared by the CPU, CUDA and the bindings. No logic.
//
// Parameters and gradients lie scattered in memory, one Segment each; the state is flat, and a segment names its place
// there. One flat buffer is the case of a single segment. Segments are sorted by `offset`, do not overlap, are never
// empty, and need not cover the state: what no segment covers takes no part in the step.
#pragma once

#include <cstdint>

// What every instruction set and every CUDA thread compiles for itself.
#ifdef __CUDACC__
#define NLCG_HD __host__ __device__ __forceinline__
#else
#define NLCG_HD inline __attribute__((always_inline))
#endif

namespace fastnlcg {

constexpr double kLargestDouble = 1.7976931348623157e308;
constexpr double kSmallestDouble = 2.2250738585072014e-308;
constexpr double kLargestFloat = 3.4028234663852886e38;
template <class S>
constexpr double kLargest = sizeof(S) == sizeof(float) ? kLargestFloat : kLargestDouble;

enum class DType : std::int32_t { f64, f32, bf16, f16 };
enum class Preconditioner : std::int32_t { none, bfgs, adam };
enum class UpdateRule : std::int32_t { fletcher_reeves, polak_ribiere, heavy_ball };
enum class Restart : std::int32_t { never, descent, powell, every };

struct Segment {
  void* p;              // parameters; may be null where no pass reads or writes them
  const void* g;        // gradient, same dtype and memory order as p
  std::int64_t offset;  // of its first element in the flat state
  std::int64_t n;
  std::int32_t group;  // index into Step::groups
  std::int32_t param;  // index into Step::param_steps and Step::beta2_powers
  DType dtype;

  bool operator==(const Segment&) const = default;
};

struct Group {
  double lr;            // from the caller
  double alpha;         // lr * ls_scale, formed by the step
  double alpha_prev;    // of the previous step
  double weight_decay;  // L2 or decoupled, as the preconditioner's passes say
  double sign;          // of the gradient: -1 where the group maximizes
};

struct Options {
  Preconditioner preconditioner = Preconditioner::none;
  UpdateRule update = UpdateRule::fletcher_reeves;
  Restart restart = Restart::never;
  double restart_every = 0;
  double eps = 1e-8;
  double curvature_eps = 1e-8;
  double beta_max = 1.0;
  double beta2 = 0.999;
  bool skip_nonfinite = true;
  bool maximize = false;             // the loss that the line search sees; the gradient's sign is its group's
  bool stochastic_rounding = false;  // of bfloat16 parameters
  bool line_search = false;
  double increase_threshold = 0.02;
  double flat_threshold = 0.01;
  double decrease = 0.025;
  double increase = 0.025;
};

// Every scalar that survives a step, as doubles so that the struct is also a flat float64 buffer.
struct Scalars {
  double step;           // completed steps
  double skipped_steps;  // steps that changed nothing because a sum was not finite
  double rz;             // sum(-g z) of the last step
  double gs;             // sum(g s) over the last gradient and the last move: sum(g_prev s) of the next step
  double shs;            // sum(s h s) of the last move: what the next step gates on
  double grad_max;       // largest |g| of the last step
  double ls_scale;       // line-search scale, in (0, 1]
  double loss_prev;      // NaN: none yet
  double set;            // which parameters moved in the last step: Step::set of it
  // What the last step did; read by diagnostics only.
  double beta;
  double ys;
  double shs_used;
  double updated;  // 1 where the preconditioner's diagonal was updated
  double gg;       // sum(g g) and sum(g d), where the state does not keep g
  double gd;
};
constexpr int kScalars = sizeof(Scalars) / sizeof(double);

// The streams of state, float32 or (for float64 parameters) float64. Null where the options have no use for one.
struct State {
  void* grad_prev;
  void* direction;
  void* diagonal;  // the preconditioner's own: h of bfgs, v of adam
  std::int64_t n;
  DType dtype;
};

// What one rank contributes to a decision, where the parameters are spread over ranks.
enum Column { kSum0, kSum1, kSum2, kLargestGradient, kGs, kShs, kChanged, kMoving, kFoundInf, kLoss, kColumns };
struct Row {
  double column[kColumns];
};
static_assert(sizeof(Row) == kColumns * sizeof(double));

// How the ranks' rows come together: `gather` fills `all` from everybody's `mine`, or throws. The rows are then added
// up in the order of ranks, so every rank decides alike, to the bit, whatever algorithm gathered them.
struct Exchange {
  int ranks = 0;                    // 0: this process is alone
  bool every_decision = false;      // false: only the first pass, for the loss (the sums are this rank's alone)
  Row* mine = nullptr;              // on the step's device, like `all` and `counted`
  const Row* all = nullptr;         // by rank
  const double* counted = nullptr;  // by rank: whether its sums are added. The loss is averaged over all rows
  void (*gather)(void*) = nullptr;
  void* context = nullptr;
};

struct Step {
  const Segment* segments;
  std::int64_t n_segments;
  Group* groups;
  std::int64_t n_groups;
  State state;
  Options options;
  Scalars* scalars;
  double* param_steps;   // per parameter: the step that moved it last
  double* beta2_powers;  // per parameter: beta2^k after k updates of v; null without one
  double* partials;      // workspace: kMaxSums per tile, see partials_needed
  double set;   // names the set of parameters with gradients; another than the last step's: the past is forgotten
  double loss;  // NaN: none given
  int threads;
  std::int64_t counted;  // of the state, from its begin: what this rank adds to sums. Behind it lie copies of what
                         // other ranks add. A multiple of chunk_elements(state.n), or state.n
  Exchange exchange;
};

// Tiles fix the order of every sum: the bits depend on the flat index alone. 4096 elements are few enough to balance
// over threads and many enough that combining the partial sums costs nothing.
constexpr std::int64_t kTile = 4096;
constexpr int kMaxSums = 3;

NLCG_HD constexpr std::int64_t tiles_of(std::int64_t n) { return n / kTile + (n % kTile != 0); }
constexpr std::int64_t partials_needed(std::int64_t n) { return kMaxSums * tiles_of(n); }

// A GPU sums 2^k tiles at a time, so that there are at most 32,768 partial sums: enough that the last round of blocks,
// which not all take part in, is a small part of a pass, and few enough that one block adds them up in microseconds.
constexpr std::int64_t tiles_per_chunk(std::int64_t tiles) {
  std::int64_t in_one = 1;
  while (in_one * 32768 < tiles) in_one *= 2;
  return in_one;
}
constexpr std::int64_t chunk_elements(std::int64_t n) { return kTile * tiles_per_chunk(tiles_of(n)); }

}  // namespace fastnlcg
