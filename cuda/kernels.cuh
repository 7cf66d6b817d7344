// The CUDA kernels: lists of passes over tiles. Device code; launches are in step_kernel.cu.
//
//     step_pass<S, Pass>          one pass; the last block to finish adds the partial sums and decides on the next pass
//     decide_over_ranks<S, Pass>  if parameters are spread over ranks: adds the ranks' rows and decides, in one block,
//                                 after the ranks have exchanged them between two launches
//     step_in_one<S, P>           all passes of preconditioner P in one launch: the blocks wait for each decision. What
//                                 the first pass loaded, g and one more array, stays in shared memory as far as it fits
//     part<S, Pass>               one pass with scalars from the host: parts of a step, and full-batch descent
//     matrix_pass<S, Pass>        muon: one pass over a batch of matrices, with what the step before it has decided
//     matrix_squares, matrix_scale    muon: divide every matrix of a batch by its norm
//     index_tiles                 fills Arguments::tile_index, if there are many tiles
//     upload_entries<Entry>       the tables of segments and groups, from kernel arguments: no copy, no pinned memory,
//                                 and a graph can capture it
//
// A chunk, which has one partial sum, is one tile of 4096 elements (tile.cuh), or 2^k tiles of a huge state
// (tiles_per_chunk). A block takes every gridDim-th chunk; every other pass walks backwards, to find in the L2 cache
// what was read last.
//
// One thread decides, by the functions of decisions.h, as on the CPU. Scalars are read at the start of a step and
// written at its end: if a sum is not finite, nothing changes.
#pragma once

#include <tuple>

#include "tile.cuh"

namespace fastnlcg {
namespace {

// ---- a pass over the block's chunks, and what follows from its sums -----------------------------------------------

template <bool kMayReside, class S, class T, class Pass>
__device__ __forceinline__ void run_pass(const BlockContext<S, T>& context, const Pass& pass, Totals& totals) {
  const Arguments& a = context.a;
  const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
  const int last = block + (a.chunks - 1 - block) / blocks * blocks;
#pragma unroll 1
  for (int chunk = Pass::kBackward ? last : block; 0 <= chunk && chunk < a.chunks;
       chunk += Pass::kBackward ? -blocks : blocks) {
    const int local = chunk / blocks;
    ThreadSums<S, Pass::kSums> sums = {};
#pragma unroll 1
    for (int t = 0; t < a.tiles_per_chunk; ++t) {
      const int tile = chunk * a.tiles_per_chunk + t;
      if (tile >= a.tiles) break;
      const int slot = local * a.tiles_per_chunk + t;
      const int smem_offset = kMayReside && slot < a.resident_tiles ? 2 * static_cast<int>(kTile) * slot : -1;
      run_tile<kMayReside>(context, pass, tile, smem_offset, sums);
    }
    block_totals<Pass::kSums, Pass::kFormsLargest>(sums.sum, sums.largest, pass.sums(), totals, local);
    if (threadIdx.x == 0) {
#pragma unroll
      for (int j = 0; j < Pass::kSums; ++j) a.partials[j * a.chunks + chunk] = sums.sum[j];
      if (Pass::kFormsLargest) a.partials[Pass::kSums * a.chunks + chunk] = static_cast<double>(sums.largest);
    }
  }
}

// The sums over the grid, in thread 0 of the last block.
template <int K, bool kMax>
__device__ __forceinline__ void grid_totals(const Arguments& a, double (&x)[K], double& largest, unsigned wanted,
                                            Totals& totals) {
#pragma unroll
  for (int j = 0; j < K; ++j) x[j] = 0.0;
  largest = 0.0;
#pragma unroll 4
  for (int chunk = static_cast<int>(threadIdx.x); chunk < a.chunks; chunk += kThreads) {
    if (chunk < a.owned_chunks) {
#pragma unroll
      for (int j = 0; j < K; ++j) {
        if (wanted >> j & 1u) x[j] += a.partials[j * a.chunks + chunk];
      }
    }
    if (kMax) largest = Larger::of(largest, a.partials[K * a.chunks + chunk]);
  }
  block_totals<K, kMax>(x, largest, wanted, totals, 0);
}

__device__ double value_of_scalar(DeviceScalar x) {
  switch (x.dtype) {
    case DType::f64:
      return *static_cast<const double*>(x.address);
    case DType::f32:
      return static_cast<double>(*static_cast<const float*>(x.address));
    case DType::bf16:
      return static_cast<double>(value_of(*static_cast<const BFloat16*>(x.address)));
    default:
      return static_cast<double>(value_of(*static_cast<const Float16*>(x.address)));
  }
}

// Before the first decision, in the thread that decides: the line search and every group's step length.
__device__ __forceinline__ StepPlan begin_on_device(const Arguments& a, const RankRow& row) {
  StepPlan plan = begin_step(a.options, *a.scalars, a.active_set, row, a.exchange.ranks > 0);
  for (std::int64_t i = 0; i < a.n_groups; ++i) {
    const GroupInput& in = group_inputs(a)[i];
    const double lr = in.lr_on_device.address != nullptr ? value_of_scalar(in.lr_on_device) : in.lr;
    a.alpha[i] = lr * plan.next.ls_scale;
    // The host checks an lr that it can see; one on the device is checked here.
    if (!(is_finite(lr) && lr >= 0.0)) plan.skip = true;
  }
  return plan;
}

// This rank's row after a pass.
template <class Pass>
__device__ __forceinline__ RankRow row_of(const Arguments& a, const double (&sums)[Pass::kSums], double largest) {
  RankRow row = {};
#pragma unroll
  for (int j = 0; j < Pass::kSums; ++j) row.column[j] = sums[j];
  row.column[kLargestElement] = largest;
  if (Pass::kFirstPass) {
    const double loss = a.loss_on_device.address != nullptr ? value_of_scalar(a.loss_on_device) : a.loss;
    const double found_inf = a.found_inf.address != nullptr ? *static_cast<const float*>(a.found_inf.address) : 0.0f;
    contribute(row, *a.scalars, a.active_set, loss, static_cast<double>(a.n_segments), found_inf);
  }
  // The last pass exchanges nothing.
  sign_row(row, a.scalars->step, exchange_after<Pass>(), a.digest);
  return row;
}

// Stores a pass for the kernel that runs it. One thread builds each pass, because that takes square roots and divisions
// in double; the host builds the first, in the kernel's arguments.
template <class Pass>
__host__ __device__ __forceinline__ void hand_over(unsigned char (&to)[kPassBytes], const Pass& pass) {
  static_assert(sizeof(Pass) <= kPassBytes && std::is_trivially_copyable_v<Pass>);
  *reinterpret_cast<Pass*>(to) = pass;
}
template <class S, class Pass>
__device__ __forceinline__ Pass pass_of(const Arguments& a) {
  Pass pass = *reinterpret_cast<const Pass*>(Pass::kBuiltFromOptionsAlone ? a.first_pass : a.control->next_pass);
  if constexpr (!Pass::kBuiltFromOptionsAlone) pass.assume_constants(ElementBroadcast<S>{});
  return pass;
}

struct NoPass {};  // after the last
// The next pass that runs in every step: a repeated first pass is built like the first.
template <class... Passes>
struct NextOf {
  using type = NoPass;
};
template <class First, class... Rest>
struct NextOf<First, Rest...> : std::conditional_t<First::kOnlyIfClipped, NextOf<Rest...>, std::type_identity<First>> {
};

// The decision after a pass, in one thread.
template <class S, class Pass, class Next>
__device__ __forceinline__ void decide(const Arguments& a, const RankRow& row) {
  StepPlan& plan = a.control->plan;
  bool bad_lr = false;
  if (Pass::kFirstPass) {
    plan = begin_on_device(a, row);
    bad_lr = plan.skip;
  }
  Pass::update_plan(plan, a.options, row.column, row.column[kLargestElement], static_cast<double>(a.n), kLargest<S>);
  plan.skip = plan.skip || bad_lr || plan.nothing_to_do;
  if (plan.nothing_to_do) return;
  if constexpr (!std::is_same_v<Next, NoPass>) {
    hand_over(a.control->next_pass, Next::from_plan(plan, a.options, ElementBroadcast<S>{}));
    if (plan.skip) count_skip(plan, *a.scalars);
  } else {  // the step completes: whether it may write was decided before
    *a.scalars = plan.next;
    for (std::int64_t i = 0; i < a.n_groups; ++i) *group_inputs(a)[i].alpha_prev = a.alpha[i];
  }
}

// Whether the ranks exchange their rows after this pass. The sums of the last pass are for the next step.
__host__ __device__ __forceinline__ bool exchanges(const RankGather& exchange, bool first, bool last) {
  return exchange.ranks > 0 && (first || (exchange.every_decision && !last));
}

// One pass of the step, and its decision on the Next. kAlone: all passes are in one launch, so never over ranks, and
// tiles may stay in shared memory. True in the block that decided.
template <class S, class T, class Pass, class Next, bool kAlone>
__device__ __forceinline__ bool pass_and_decide(const Arguments& a, Totals& totals) {
  constexpr bool kLast = std::is_same_v<Next, NoPass>;
  __shared__ typename BlockContext<S, T>::InShared groups;
  const BlockContext<S, T> context(a, groups, !Pass::kFirstPass);
  const Pass pass = pass_of<S, Pass>(a);
  run_pass<kAlone>(context, pass, totals);
  if (!is_last_block(a.control->barrier)) return false;
  double x[Pass::kSums], largest;
  grid_totals<Pass::kSums, Pass::kFormsLargest>(a, x, largest, pass.sums(), totals);
  if (threadIdx.x == 0) {
    const RankRow row = row_of<Pass>(a, x, largest);
    if (!kAlone && exchanges(a.exchange, Pass::kFirstPass, kLast)) {
      *a.exchange.mine = row;
    } else {
      decide<S, Pass, Next>(a, row);
    }
  }
  if constexpr (kLast) {
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < a.n_segments; i += kThreads) {
      double& steps = *a.segments[i].steps;
      steps += 1.0;
      if (Pass::kUsesStepCounts) a.bias[i] = bias_of(a.options.beta2, steps);
    }
  }
  return true;
}

// Whether AMP found an overflow: the step then changes nothing, not even counters. Over ranks the first pass runs all
// the same, and its row tells the other ranks.
__device__ __forceinline__ bool found_inf_set(const Arguments& a) {
  return a.exchange.ranks == 0 && a.found_inf.address != nullptr &&
         *static_cast<const float*>(a.found_inf.address) != 0.0f;
}

// ---- kernels -----------------------------------------------------------------------------------------------------
// Two blocks of 512 threads fit a multiprocessor at 64 registers a thread; with doubles one, at 128, and with state in
// bfloat16, whose rounding takes registers: a thread then has two quads in flight.
template <class S, class T>
constexpr int kBlocksOf = sizeof(S) == sizeof(float) && sizeof(T) == sizeof(S) ? 2 : 1;

template <class S, class Pass, class Next, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOf<S, T>) step_pass(const __grid_constant__ Arguments a) {
  __shared__ Totals totals;
  if (found_inf_set(a) || (!Pass::kFirstPass && a.control->plan.skip)) return;
  if (Pass::kOnlyIfClipped && !a.control->plan.again) return;
  pass_and_decide<S, T, Pass, Next, false>(a, totals);
}

template <class S, class Pass, class Next>
__global__ void decide_over_ranks(const __grid_constant__ Arguments a) {
  if (!Pass::kFirstPass && (a.control->plan.skip || (Pass::kOnlyIfClipped && !a.control->plan.again))) return;
  __shared__ RankRow row;
  const int j = static_cast<int>(threadIdx.x);
  if (j < kColumns) row.column[j] = over_ranks(a.exchange.all, a.exchange.owned, a.exchange.ranks, j);
  __syncthreads();
  if (j != 0) return;
  if (ranks_agree(a.exchange.all, a.exchange.ranks, a.exchange.replicas)) {
    decide<S, Pass, Next>(a, row);
  } else {  // the host reads the counter later
    a.control->plan.skip = true;
    a.scalars->disagreements += 1.0;
  }
}

// The passes, one after another; after each but the last all blocks wait for each other.
template <class S, class T, class First, class... Rest>
__device__ __forceinline__ void passes_in_one(const Arguments& a, Totals& totals, const unsigned& generation,
                                              unsigned meetings) {
  if (!First::kOnlyIfClipped || a.control->plan.again) {
    const bool decided = pass_and_decide<S, T, First, typename NextOf<Rest...>::type, true>(a, totals);
    if constexpr (sizeof...(Rest) > 0) {
      GridBarrier& barrier = a.control->barrier;
      if (decided) {
        release(barrier);
      } else {
        wait(barrier, generation, meetings);
      }
      __syncthreads();
      ++meetings;
    }
  }
  if constexpr (sizeof...(Rest) > 0) {
    if (!a.control->plan.skip) passes_in_one<S, T, Rest...>(a, totals, generation, meetings);
  }
}
template <class S, class T, template <class> class... P>
__device__ __forceinline__ void passes_in_one(const Arguments& a, Totals& totals, const unsigned& generation,
                                              PassList<P...>) {
  passes_in_one<S, T, P<S>...>(a, totals, generation, 0);
}

template <class S, class Preconditioner>
__global__ void __launch_bounds__(kThreads, 1) step_in_one(const __grid_constant__ Arguments a) {
  __shared__ Totals totals;
  if (found_inf_set(a)) return;
  __shared__ unsigned generation;  // as thread 0 saw it before the first barrier
  if (threadIdx.x == 0) generation = barrier_generation(a.control->barrier);
  passes_in_one<S, S>(a, totals, generation, typename Preconditioner::Passes{});
}

template <class S, class Pass, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOf<S, T>)
    part(const __grid_constant__ Arguments a, const __grid_constant__ Pass pass) {
  __shared__ Totals totals;
  __shared__ typename BlockContext<S, T>::InShared groups;
  const BlockContext<S, T> context(a, groups, false);
  run_pass<false>(context, pass, totals);
  if (!is_last_block(a.control->barrier)) return;
  double x[Pass::kSums], largest;
  grid_totals<Pass::kSums, Pass::kFormsLargest>(a, x, largest, pass.sums(), totals);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int j = 0; j < Pass::kSums; ++j) a.control->sums[j] = x[j];
  if (Pass::kFormsLargest) a.control->sums[Pass::kSums] = largest;
}

// One pass over the matrices in the tiles from `first` to `last`, exclusive. Nothing if the step was skipped.
template <class S, class Pass, class T>
__global__ void __launch_bounds__(kThreads, kBlocksOf<S, T>)
    matrix_pass(const __grid_constant__ Arguments a, const int first, const int last) {
  __shared__ typename BlockContext<S, T>::InShared groups;
  if (found_inf_set(a) || a.control->plan.skip) return;
  const BlockContext<S, T> context(a, groups, true);
  const Pass pass = Pass::of(*a.scalars, ElementBroadcast<S>{});
  ThreadSums<S, Pass::kSums> sums = {};
#pragma unroll 1
  for (int tile = first + static_cast<int>(blockIdx.x); tile < last; tile += static_cast<int>(gridDim.x)) {
    run_tile<false>(context, pass, tile, -1, sums);
  }
}

// Matrices of n elements each in x, each in `chunks` parts; block b takes part b % chunks of matrix b / chunks.
template <class S>
struct MatrixPart {
  S *begin, *end;
  __device__ MatrixPart(S* x, std::int64_t n, int chunks) {
    const std::int64_t matrix = blockIdx.x / static_cast<unsigned>(chunks);
    const std::int64_t from = static_cast<std::int64_t>(blockIdx.x % static_cast<unsigned>(chunks)) * kMatrixChunk;
    begin = x + matrix * n + from;
    end = x + matrix * n + (n - from < kMatrixChunk ? n : from + kMatrixChunk);
  }
};

// A block's sum of squares, into sums[b].
template <class S>
__global__ void __launch_bounds__(kThreads, 1) matrix_squares(S* x, std::int64_t n, int chunks, double* sums) {
  __shared__ Totals totals;
  const MatrixPart<S> part(x, n, chunks);
  double sum[1] = {}, unused = 0.0;
  for (const S* at = part.begin + threadIdx.x; at < part.end; at += kThreads) {
    const double value = static_cast<double>(*at);
    sum[0] += value * value;
  }
  block_totals<1, false>(sum, unused, 1u, totals, 0);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum[0];
}

// Divides by the root of the matrix's sum.
template <class S>
__global__ void __launch_bounds__(kThreads, 1) matrix_scale(S* x, std::int64_t n, int chunks, const double* sums) {
  __shared__ S scale;
  if (threadIdx.x == 0) {
    const double* const own = sums + blockIdx.x / static_cast<unsigned>(chunks) * static_cast<unsigned>(chunks);
    double sum = 0.0;
    for (int k = 0; k < chunks; ++k) sum += own[k];
    scale = static_cast<S>(inverse_root(sum, kLargest<S>));
  }
  __syncthreads();
  const MatrixPart<S> part(x, n, chunks);
  for (S* at = part.begin + threadIdx.x; at < part.end; at += kThreads) *at = scaled_direction(scale, *at);
}

// As many entries of a table as fit the kernel arguments of every CUDA (4 KB), or of CUDA 12.1 and newer (32,764
// bytes).
template <class Entry, int kBytes>
struct Entries {
  static constexpr int kMax = (kBytes - 32) / static_cast<int>(sizeof(Entry));
  Entry entry[kMax];
  int count;
};

template <class Entry, int kBytes>
__global__ void upload_entries(const __grid_constant__ Entries<Entry, kBytes> entries, Entry* to) {
  for (int i = static_cast<int>(threadIdx.x); i < entries.count; i += static_cast<int>(blockDim.x))
    to[i] = entries.entry[i];
}
constexpr int kSmallUpload = 4096, kLargeUpload = 32764;

// Fills Arguments::tile_index.
__global__ void index_tiles(const Segment* segments, int n_segments, int tiles, int* to) {
  const int tile = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (tile <= tiles) to[tile] = find_segment(segments, 0, n_segments, tile * kTile);
}

}  // namespace
}  // namespace fastnlcg
