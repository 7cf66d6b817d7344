// Sums of doubles in a fixed order, over a block and over the grid; and the grid-wide barrier.
//
//   a thread   adds its own elements, in the order of the flat state
//   a block    adds its threads: lanes of a warp 16, 8, 4, 2, 1 apart, then warps 8, 4, 2, 1 apart
//   the grid   the last block to arrive adds one number per chunk, thread t those of chunks t, t + 512, ..., then as above
//
// Which block summed a chunk, and when, does not enter. No floating-point atomics.
#pragma once

#include <cuda_runtime.h>

namespace fastnlcg {
namespace {

constexpr int kThreads = 512;  // of every block that sums; the bits depend on it
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Add {
  static __device__ __forceinline__ double of(double a, double b) { return a + b; }
};
struct Larger {
  static __device__ __forceinline__ double of(double a, double b) { return b > a ? b : a; }
};

template <class Combine>
__device__ __forceinline__ double across_lanes(double x, int width) {
  for (int apart = width / 2; apart > 0; apart /= 2) x = Combine::of(x, __shfl_down_sync(0xffffffffu, x, apart));
  return x;
}

// Shared memory for block_totals. Two sets, which calls without a barrier between them use alternately: a block may begin
// to write one while its first warp still reads the other, so one barrier per call is enough.
struct Totals {
  double of_warp[2][kMaxSums + 1][kWarps];
};

// x[0..K) and, where kMax, the maximum `largest`, over the block. The result is thread 0's.
template <int K, bool kMax>
__device__ __forceinline__ void block_totals(double (&x)[K], double& largest, Totals& shared, int parity) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  auto& warp_sums = shared.of_warp[parity & 1];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    x[j] = across_lanes<Add>(x[j], kWarp);
    if (lane == 0) warp_sums[j][warp] = x[j];
  }
  if (kMax) {
    largest = across_lanes<Larger>(largest, kWarp);
    if (lane == 0) warp_sums[K][warp] = largest;
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int j = 0; j < K; ++j) x[j] = across_lanes<Add>(lane < kWarps ? warp_sums[j][lane] : 0.0, kWarps);
  if (kMax) largest = across_lanes<Larger>(lane < kWarps ? warp_sums[K][lane] : 0.0, kWarps);
}

// A grid-wide barrier. Zero before the first launch.
struct GridBarrier {
  unsigned arrived;
  unsigned generation;  // how often all blocks have arrived
};

// True in all threads of the block that arrives last: it then sees what every other block wrote before.
__device__ __forceinline__ bool is_last_block(GridBarrier& barrier) {
  __shared__ bool last;
  __syncthreads();  // the block has written
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(&barrier.arrived, 1u) == gridDim.x - 1;
    if (last) {
      barrier.arrived = 0;
      __threadfence();
    }
  }
  __syncthreads();
  return last;
}

// Thread 0 only, before the block first arrives.
__device__ __forceinline__ unsigned barrier_generation(const GridBarrier& barrier) {
#ifdef __CUDACC__
  return *static_cast<const volatile unsigned*>(&barrier.generation);
#else  // the emulation's, which a race detector understands
  return polled(barrier.generation);
#endif
}

// By the last block, when it has decided: lets the others go on. They see what it wrote.
__device__ __forceinline__ void arrive_and_release(GridBarrier& barrier) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(&barrier.generation, 1u);
  }
}

// By the others, at the launch's barrier number `nth` (0, 1, ...); `generation` is what thread 0 saw before all of
// them. Only in a cooperative launch: all blocks must be on the device at once.
__device__ __forceinline__ void wait(const GridBarrier& barrier, const unsigned& generation, unsigned nth) {
  if (threadIdx.x == 0) {
    while (barrier_generation(barrier) == generation + nth) __nanosleep(32);
    __threadfence();
  }
  __syncthreads();
}

}  // namespace
}  // namespace fastnlcg
