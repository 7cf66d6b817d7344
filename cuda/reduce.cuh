// Sums of doubles in a fixed order, over a block and over the grid; and the grid-wide barrier.
//
//   a thread   adds its own elements, in the order of the flat state
//   a block    adds its threads: lanes of a warp 16, 8, 4, 2, 1 apart, then warps 8, 4, 2, 1 apart
//   the grid   the last block to arrive adds the sums of chunks, thread t those of chunks t, t + 512, ...; as above
//
// Which block summed a chunk, and when, does not matter. There are no floating-point atomics.
#pragma once

#include <cuda_runtime.h>

#ifdef __CUDACC__
#include <cuda/atomic>
#endif

namespace fastnlcg {
namespace {

#ifdef __CUDACC__  // the emulation has its own
using Atomic = cuda::atomic_ref<unsigned, cuda::thread_scope_device>;
constexpr auto kRelaxed = cuda::memory_order_relaxed, kAcquire = cuda::memory_order_acquire,
               kAcquireRelease = cuda::memory_order_acq_rel;
#endif

constexpr int kThreads = 512;  // of every block that sums; the bits depend on it
constexpr int kWarp = 32;
constexpr int kWarps = kThreads / kWarp;

struct Add {
  static __device__ __forceinline__ double of(double a, double b) { return a + b; }
};
struct Larger {
  template <class T>
  static __device__ __forceinline__ T of(T a, T b) {
    return b > a ? b : a;
  }
};

template <class Combine, class T>
__device__ __forceinline__ T across_lanes(T x, int width) {
  for (int apart = width / 2; apart > 0; apart /= 2) x = Combine::of(x, __shfl_down_sync(0xffffffffu, x, apart));
  return x;
}

// Shared memory for block_totals. Two sets, which calls without a barrier between them use alternately: a block may
// begin to write one while its first warp still reads the other, so one barrier per call is enough.
struct Totals {
  struct {
    double sum[kMaxSums][kWarps];
    double largest[kWarps];
  } of_warp[2];
};

// Sums x[0..K) over the block, as far as they are `wanted` (bits; the others are 0), and, if kMax, takes the maximum of
// `largest`. Thread 0 has the result.
template <int K, bool kMax, class S>
__device__ __forceinline__ void block_totals(double (&x)[K], S& largest, unsigned wanted, Totals& shared, int parity) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  auto& of_warp = shared.of_warp[parity & 1];
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (!(wanted >> j & 1u)) continue;
    x[j] = across_lanes<Add>(x[j], kWarp);
    if (lane == 0) of_warp.sum[j][warp] = x[j];
  }
  if (kMax) {
    largest = across_lanes<Larger>(largest, kWarp);
    if (lane == 0) of_warp.largest[warp] = static_cast<double>(largest);
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int j = 0; j < K; ++j) {
    if (wanted >> j & 1u) x[j] = across_lanes<Add>(lane < kWarps ? of_warp.sum[j][lane] : 0.0, kWarps);
  }
  if (kMax) largest = across_lanes<Larger>(lane < kWarps ? static_cast<S>(of_warp.largest[lane]) : S{}, kWarps);
}

// A grid-wide barrier. Zero before the first launch.
//
// Arriving is one atomic of acquire and release order at the device's scope, releasing one of release order, waiting
// one of acquire order; the block's own barrier before or after extends it to the block's other threads. The reset of
// `arrived` is ordered by what follows it in the same thread: the release of this barrier, or the end of the launch.
struct GridBarrier {
  unsigned arrived;
  unsigned generation;  // how often all blocks have arrived
};

// True in all threads of the block that arrives last: it then sees what every other block wrote before.
__device__ __forceinline__ bool is_last_block(GridBarrier& barrier) {
  __shared__ bool last;
  __syncthreads();  // the block has written
  if (threadIdx.x == 0) {
    last = Atomic(barrier.arrived).fetch_add(1, kAcquireRelease) == gridDim.x - 1;
    if (last) Atomic(barrier.arrived).store(0, kRelaxed);
  }
  __syncthreads();
  return last;
}

// Thread 0 only, before the block first arrives.
__device__ __forceinline__ unsigned barrier_generation(GridBarrier& barrier) {
  return Atomic(barrier.generation).load(kAcquire);
}

// The last block calls it when it has decided: the others continue, and see what it wrote.
__device__ __forceinline__ void release(GridBarrier& barrier) {
  __syncthreads();
  if (threadIdx.x == 0) Atomic(barrier.generation).fetch_add(1, kAcquireRelease);
}

// The other blocks call it, at barrier number `nth` (0, 1, ...) of the launch; `generation` is what thread 0 saw before
// the first of them. Only in a cooperative launch: all blocks must be on the device at once.
__device__ __forceinline__ void wait(GridBarrier& barrier, const unsigned& generation, unsigned nth) {
  if (threadIdx.x == 0) {
    while (barrier_generation(barrier) == generation + nth) __nanosleep(32);
  }
  __syncthreads();
}

}  // namespace
}  // namespace fastnlcg
