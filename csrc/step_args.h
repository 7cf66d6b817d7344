// What a step is given: plain structs, shared by the CPU, CUDA and the bindings. No logic.
//
// Parameters, gradients and state are scattered in memory: a Segment has the addresses of one parameter's, and its
// range of the flat index. Tiles and sums run over the flat index; nothing need be stored in its order. Segments are
// sorted by `offset`, do not overlap, are never empty, and need not cover the index: what no segment covers takes no
// part in the step. A flat buffer is a single segment.
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
enum class Preconditioner : std::int32_t;  // its values are in preconditioners.h
enum class UpdateRule : std::int32_t { fletcher_reeves, polak_ribiere, heavy_ball };

// Their names in Python, in the same order.
constexpr const char* kDTypeNames[] = {"float64", "float32", "bfloat16", "float16"};
constexpr const char* kUpdateRuleNames[] = {"fletcher_reeves", "polak_ribiere", "heavy_ball"};

NLCG_HD constexpr std::int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// The part of a parameter that a segment is: element l of the segment is element begin + l + l / run * skip of the
// whole parameter; run = 0: element begin + l. Random bits use it, so that they do not depend on how parameters are
// sharded.
struct Shard {
  std::int64_t begin, run, skip;
  std::uint32_t parameter;  // its index

  bool operator==(const Shard&) const = default;
};

struct Segment {
  void* p;              // parameters; may be null if no pass reads or writes them
  const void* g;        // gradient, in the dtype and memory order of p; may be null if no pass reads it
  void* grad_prev;      // state, in Step::state_dtype and the memory order of p; null if the options do not use it
  void* direction;      // the same
  void* diagonal;       // the same; the preconditioner's own: h of bfgs, v of adam
  void* origin;         // in the arithmetic's type; full batch: the point that a line search starts from
  void* rows;           // full batch: the first row of the matrix of curvature pairs, in the state's type
  std::int64_t pitch;   // elements from a row to the next
  double* steps;        // how often this parameter has moved
  std::int64_t offset;  // of its first element in the flat index
  std::int64_t n;
  Shard shard;
  std::int32_t group;  // index into Step::groups
  DType dtype;
  bool matrices = false;  // muon: matrices, or a shard of them; they have no diagonal

  bool operator==(const Segment&) const = default;
};

struct Group {
  double lr;              // from the caller
  double alpha;           // lr * ls_scale, formed by the step
  double weight_decay;    // L2 or decoupled, depending on the preconditioner's passes
  double sign;            // of the gradient: -1 if the group maximizes
  double* alpha_prev;     // of the previous step; written by the step
  double factor = 1.0;    // of the gradient: the sign times the factor of clipping; formed by the CPU's step
  bool matrices = false;  // muon: the segments of this group are matrices
};

// Every option of a step, once: type, name, default.
#define NLCG_OPTIONS(X)                                                                                   \
  X(Preconditioner, preconditioner, Preconditioner{})                                                     \
  X(UpdateRule, update, UpdateRule::fletcher_reeves)                                                      \
  X(double, eps, 1e-8)                                                                                    \
  X(double, curvature_eps, 1e-8)                                                                          \
  X(double, beta2, 0.999)                                                                                 \
  X(double, beta_max, 1.0)                                                                                \
  X(double, beta_max_matrices, 1.0) /* muon: of the matrices */                                           \
  X(bool, skip_nonfinite, true)                                                                           \
  X(bool, maximize, false)            /* the loss of the line search; a gradient's sign is its group's */ \
  X(bool, stochastic_rounding, false) /* of bfloat16 parameters */                                        \
  X(bool, measure_norm, false)        /* |g| over everything, before weight decay */                      \
  X(double, max_grad_norm, __builtin_inf())                                                               \
  X(double, skip_grad_norm, __builtin_inf())                                                              \
  X(bool, line_search, false)                                                                             \
  X(double, increase_threshold, 0.02)                                                                     \
  X(double, flat_threshold, 0.01)                                                                         \
  X(double, decrease, 0.025)                                                                              \
  X(double, increase, 0.025)

struct Options {
#define NLCG_FIELD(type, name, start) type name = start;
  NLCG_OPTIONS(NLCG_FIELD)
#undef NLCG_FIELD
};
template <class O, class F>
void each_option(O& o, F&& f) {
#define NLCG_VISIT(type, name, start) f(#name, o.name);
  NLCG_OPTIONS(NLCG_VISIT)
#undef NLCG_VISIT
}

// Every scalar that survives a step, once: name, value before the first step. All are doubles, so the struct is a flat
// float64 buffer, which Python allocates and can read.
#define NLCG_SCALARS(X)                                                                                         \
  X(step, 0.0)          /* completed steps */                                                                   \
  X(skipped_steps, 0.0) /* steps that changed nothing because a number was not finite */                        \
  X(rz, 0.0)            /* sum(-g z) of the last step */                                                        \
  X(gs, 0.0)            /* sum(g s) over the last gradient and the last move: sum(g_prev s) of the next step */ \
  X(shs, 0.0)           /* sum(s h s) of the last move: what the next step gates on */                          \
  X(grad_max, 0.0)      /* bfgs: largest |g| of the last step */                                                \
  X(direction_max, 0.0) /* a bound of |d| */                                                                    \
  X(ls_scale, 1.0)      /* line-search scale, in (0, 1] */                                                      \
  X(loss_prev, __builtin_inf()) /* infinite: none yet */                                                        \
  X(active_set, 0.0)            /* Step::active_set of the last step */                                         \
  X(beta, 0.0)                  /* from here on: what the last step did, read by diagnostics only */            \
  X(ys, 0.0)                                                                                                    \
  X(shs_used, 0.0)                                                                                              \
  X(updated, 0.0) /* 1 if the preconditioner's diagonal was updated */                                          \
  X(gg, 0.0)      /* sum(g g) and sum(g d), if the state does not keep g */                                     \
  X(gd, 0.0)                                                                                                    \
  X(disagreements, 0.0) /* steps that changed nothing because the ranks disagreed on which step to take */      \
  X(grad_norm, 0.0)     /* |g| before clipping and weight decay, if it is measured; of skipped steps too */     \
  X(clip, 1.0)          /* the factor that clipping multiplied g by */                                          \
  X(rz_matrices, 0.0)   /* muon: sum(g g) over the matrices, and their beta */                                  \
  X(beta_matrices, 0.0)

struct Scalars {
#define NLCG_FIELD(name, start) double name;
  NLCG_SCALARS(NLCG_FIELD)
#undef NLCG_FIELD
};
template <class F>
void each_scalar(F&& f) {  // name and start
#define NLCG_VISIT(name, start) f(#name, static_cast<double>(start));
  NLCG_SCALARS(NLCG_VISIT)
#undef NLCG_VISIT
}
constexpr int kScalars = sizeof(Scalars) / sizeof(double);

struct RankRow;  // rank_agreement.h

// How the ranks exchange their rows: `gather` fills `all` from every rank's `mine`, or throws. The rows are then added
// up in the order of ranks, so every rank decides alike, to the bit, whatever algorithm gathered them.
struct RankGather {
  int ranks = 0;                  // 0: this process is alone
  bool every_decision = false;    // false: rows are exchanged after the first pass only, for the loss
  bool replicas = false;          // all ranks have the same parameters and gradients
  RankRow* mine = nullptr;        // on the step's device, like `all` and `owned`
  const RankRow* all = nullptr;   // by rank
  const double* owned = nullptr;  // by rank: whether its sums are added. The loss is averaged over all rows
  void (*gather)(void*) = nullptr;
  void* context = nullptr;
};

// The most curvature pairs: their coefficients are part of a pass, which a GPU's kernel takes as an argument.
constexpr int kMostPairs = 32;

// One pass of full-batch descent (pass_full_batch.h, pass_pairs.h), with its scalars.
struct Descent {
  enum class Kind : std::int32_t {
    trial,
    slope,
    curvature,
    direction,
    pair,  // from here on: pass_pairs.h
    gradient_dots,
    direction_dots,
    residual,
    pair_direction,
    mark
  };
  Kind kind;
  double alpha = 0;            // trial: of p = origin + alpha d
  bool first = false;          // trial: of a line search; p becomes the origin
  bool preconditioned = true;  // curvature, direction: there is an h
  bool update = false;         // curvature: h is updated, with these three
  double scale = 1, ys = 0, shs = 0;
  double beta = 0;                      // direction: of d = beta d - w
  bool maximize = false;                // all: the gradient is that of what is maximized
  int row = 0, count = 0;               // passes over pairs: the first row, and how many
  int y_row = 0;                        // pair: that of y; `row` is that of s
  double gamma = 1;                     // residual: of d = gamma P q
  double coefficient[kMostPairs] = {};  // residual, pair_direction: one a row
};
constexpr const char* kDescentNames[] = {"trial",         "slope",          "curvature", "direction",      "pair",
                                         "gradient_dots", "direction_dots", "residual",  "pair_direction", "mark"};

// A pass over a batch of matrices (pass_muon.h).
enum class MatrixPass : std::int32_t { input, move };
constexpr const char* kMatrixPassNames[] = {"input", "move"};

// 1 - beta2^k and 1 - beta2^(k + 1) for k = *Segment::steps.
struct Bias {
  double beta2, steps, now, next;
};

struct Step {
  const Segment* segments;
  std::int64_t n_segments;
  std::int64_t n;     // length of the flat index
  DType state_dtype;  // f64, f32, or bf16, with float32 arithmetic: passes with kTakesBFloat16State alone
  Group* groups;
  std::int64_t n_groups;
  Options options;
  Scalars* scalars;
  Bias* bias;        // workspace: one per segment; checked against `steps` when it is used
  double* partials;  // workspace: kMaxSums per tile, see partials_needed
  // A name of the set of parameters with gradients. If it differs from the last step's, beta is 0 and h stays.
  double active_set;
  double loss;    // NaN: none given
  double digest;  // kDigest in this rank's rows
  int threads;
  // The number of elements, from the start of the flat index, that this rank adds to sums: n, or a multiple of
  // chunk_elements(n). The others are replicas of another rank's.
  std::int64_t owned;
  RankGather exchange;
};
inline bool has_grad_prev(const Step& step) { return step.n_segments > 0 && step.segments[0].grad_prev != nullptr; }

// Tiles fix the order of every sum: the bits depend on the flat index alone. 4096 elements are few enough to balance
// over threads and many enough that combining the partial sums costs nothing.
constexpr std::int64_t kTile = 4096;
constexpr int kMaxSums = 4;

// Sixteen consecutive elements are one block of the CPU's sums, and the most that a SIMD vector holds. If every
// parameter begins at a block, vectors are aligned, because torch aligns memory to 64 bytes.
constexpr std::int64_t kBlockElements = 16;

// A sum of float32 products that cannot overflow is formed in float32 over a run of 256 elements at a time, sixteen to a
// lane, and over runs in double: a run is off by at most 17 roundings of its terms. On a GPU a run is a thread's four.
constexpr std::int64_t kRun = 256;
static_assert(kTile % kRun == 0 && kRun % kBlockElements == 0);

NLCG_HD constexpr std::int64_t tiles_of(std::int64_t n) { return n / kTile + (n % kTile != 0); }
constexpr std::int64_t partials_needed(std::int64_t n) { return kMaxSums * tiles_of(n); }

// A GPU sums 2^k tiles at a time, so that there are at most 32,768 partial sums: enough that the last round of blocks,
// which is incomplete, is a small part of a pass, and few enough that one block adds them up in microseconds.
constexpr std::int64_t tiles_per_chunk(std::int64_t tiles) {
  std::int64_t in_one = 1;
  while (in_one * 32768 < tiles) in_one *= 2;
  return in_one;
}
constexpr std::int64_t chunk_elements(std::int64_t n) { return kTile * tiles_per_chunk(tiles_of(n)); }

}  // namespace fastnlcg
