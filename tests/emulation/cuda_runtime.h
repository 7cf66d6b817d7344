// Enough of CUDA on the CPU to run cuda/step_kernel.cu unchanged, for tests: device memory is host memory, a stream is
// none, and a launch has happened when it returns.
//
// Every CUDA thread is a fiber: an own stack, switched to by hand, run until it waits at a barrier or a shuffle. The
// threads of a block share one operating-system thread, so shared memory is thread-local; blocks run side by side, at
// most kBlocksAtOnce of them, or all of them in a cooperative launch. So indices, tails, tables, barriers and the order
// of sums are those of the kernels. What it cannot show: races within a warp, coalescing, alignment faults, time.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define CUDART_VERSION 0

namespace fastnlcg {

// ---- fibers ------------------------------------------------------------------------------------------------------

// Saves the registers that a call must preserve on this stack, puts `to` in place of it, and returns there.
extern "C" void fastnlcg_switch_stack(void** from, void* to);
asm(R"(
.text
.weak fastnlcg_switch_stack
.type fastnlcg_switch_stack, @function
fastnlcg_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fastnlcg_switch_stack, .-fastnlcg_switch_stack
)");

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned width) : x(width) {}
};

// For ThreadSanitizer (race.cpp) every CUDA thread is a fiber of its own, and the only order between them is what the
// kernels' barriers, shuffles and atomics make. So the machinery below must not be seen: it is plain code over raw
// memory in functions that are not instrumented, and says at barriers what a GPU would guarantee.
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#define NLCG_UNSEEN __attribute__((no_sanitize_thread))
inline void* tsan_create() { return __tsan_create_fiber(0); }
inline void* tsan_current() { return __tsan_get_current_fiber(); }
inline void tsan_switch(void* fiber, bool ordered) {
  __tsan_switch_to_fiber(fiber, ordered ? 0 : __tsan_switch_to_fiber_no_sync);
}
inline void tsan_destroy(void* fiber) { __tsan_destroy_fiber(fiber); }
inline void tsan_release(void* at) { __tsan_release(at); }
inline void tsan_acquire(void* at) { __tsan_acquire(at); }
#else
#define NLCG_UNSEEN
inline void* tsan_create() { return nullptr; }
inline void* tsan_current() { return nullptr; }
inline void tsan_switch(void*, bool) {}
inline void tsan_destroy(void*) {}
inline void tsan_release(void*) {}
inline void tsan_acquire(void*) {}
#endif

// One block: its threads take turns.
class Block {
 public:
  Block(unsigned threads, const std::function<void()>& body)
      : body_(body), fibers_(new Fiber[threads]), lanes_(new double[threads]()), threads_(threads) {}
  ~Block() {
    delete[] fibers_;
    delete[] lanes_;
  }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
  NLCG_UNSEEN void run();

  // Called by the running thread.
  NLCG_UNSEEN void wait_for_block() { wait(all_, threads_); }
  NLCG_UNSEEN void wait_for_warp() { wait(warps_[current_ / 32], threads_ < 32 ? threads_ : 32); }
  NLCG_UNSEEN void yield(bool last = false) {
    Fiber& own = fibers_[current_];
    tsan_switch(scheduler_tsan_, last);
    fastnlcg_switch_stack(&own.stack_pointer, scheduler_);
  }

  double* lanes() { return lanes_; }  // each is written by its thread, and read behind a barrier
  NLCG_UNSEEN std::size_t current() const { return current_; }
  NLCG_UNSEEN std::size_t size() const { return threads_; }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr std::size_t kStack = 256 * 1024;  // its frames are larger, and kernel arguments have up to 32 KB
#else
  static constexpr std::size_t kStack = 64 * 1024;
#endif
  struct Fiber {
    char* stack = nullptr;
    void* stack_pointer = nullptr;
    void* tsan = nullptr;
    bool done = false;
  };
  struct Barrier {
    std::size_t arrived = 0;
    std::uint64_t generation = 0;
    char ordered[2] = {};  // what those who wait at an even or odd generation have done before
  };

  NLCG_UNSEEN void wait(Barrier& barrier, std::size_t expected) {
    const std::uint64_t before = barrier.generation;
    tsan_release(&barrier.ordered[before & 1]);
    if (++barrier.arrived == expected) {
      barrier.arrived = 0;
      ++barrier.generation;
    }
    while (barrier.generation == before) yield();
    tsan_acquire(&barrier.ordered[before & 1]);
  }
  NLCG_UNSEEN static void enter();

  const std::function<void()>& body_;
  Fiber* fibers_;
  double* lanes_;
  std::size_t threads_, current_ = 0;
  Barrier all_, warps_[32];
  void* scheduler_ = nullptr;
  void* scheduler_tsan_ = nullptr;
};

inline thread_local Block* this_block = nullptr;
#ifdef __SANITIZE_THREAD__
struct ThreadIndex {
  NLCG_UNSEEN operator unsigned() const { return static_cast<unsigned>(this_block->current()); }
};
struct {
  ThreadIndex x;
} constexpr threadIdx;
#else
inline thread_local Index threadIdx;
#endif
inline thread_local Index blockIdx;
inline thread_local dim3 gridDim, blockDim;
alignas(128) inline thread_local unsigned char resident_memory[96 * 1024];

inline void Block::enter() {
  Block& block = *this_block;
  block.body_();
  block.fibers_[block.current_].done = true;
  block.yield(true);
  std::abort();  // nobody comes back to a finished thread
}

inline void Block::run() {
  this_block = this;
  scheduler_tsan_ = tsan_current();
  for (std::size_t i = 0; i < threads_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.stack = static_cast<char*>(std::malloc(kStack));
    fiber.tsan = tsan_create();
    auto top = reinterpret_cast<std::uintptr_t>(fiber.stack + kStack) / 16 * 16;
    auto* frame = reinterpret_cast<void**>(top) - 8;  // six registers, the return address, and 8 bytes of alignment
    for (int k = 0; k < 8; ++k) frame[k] = nullptr;
    frame[6] = reinterpret_cast<void*>(&Block::enter);
    fiber.stack_pointer = frame;
  }
  bool first = true;
  for (std::size_t left = threads_; left > 0; first = false) {
    for (std::size_t i = 0; i < threads_; ++i) {
      Fiber& fiber = fibers_[i];
      if (fiber.done) continue;
      current_ = i;
#ifndef __SANITIZE_THREAD__
      threadIdx.x = static_cast<unsigned>(i);
#endif
      tsan_switch(fiber.tsan, first);
      fastnlcg_switch_stack(&scheduler_, fiber.stack_pointer);
      if (fiber.done) --left;
    }
  }
  for (std::size_t i = 0; i < threads_; ++i) {
    tsan_destroy(fibers_[i].tsan);
    std::free(fibers_[i].stack);
  }
}

// ---- what device code calls --------------------------------------------------------------------------------------

inline void __syncthreads() { this_block->wait_for_block(); }
// MUTANT_RELAXED takes the order away from the kernels' atomics, and must be reported.
using Atomic = std::atomic_ref<unsigned>;
#ifdef MUTANT_RELAXED
constexpr std::memory_order kRelaxed = std::memory_order_relaxed, kAcquire = kRelaxed, kAcquireRelease = kRelaxed;
#else
constexpr std::memory_order kRelaxed = std::memory_order_relaxed, kAcquire = std::memory_order_acquire,
                            kAcquireRelease = std::memory_order_acq_rel;
#endif
inline void __nanosleep(unsigned) { std::this_thread::yield(); }
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
// Of global memory only, and aligned.
template <class T>
T* checked(T* at, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(at), shared = reinterpret_cast<std::uintptr_t>(resident_memory);
  if (address % bytes != 0 || address - shared < sizeof(resident_memory)) std::abort();
  return at;
}
template <class T>
void load_if(T& to, const void* from, bool on) {
  std::size_t bytes = sizeof(T);
  if constexpr (requires { T::kBytes; }) bytes = T::kBytes;
  if (on) std::memcpy(&to, checked(from, bytes), bytes);
}
template <class T>
void __stwb(T* to, T value) {
  *checked(to, sizeof(T)) = value;
}
template <class T>
T __shfl_down_sync(unsigned, T x, unsigned apart) {
  Block& block = *this_block;
  double* const lanes = block.lanes();
  const std::size_t own = block.current(), threads = block.size();
  lanes[own] = static_cast<double>(x);
  block.wait_for_warp();
  const std::size_t other = own + apart;
  const T y = other / 32 == own / 32 && other < threads ? static_cast<T>(lanes[other]) : x;
  block.wait_for_warp();
  return y;
}

// ---- what host code calls ----------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice = 101, cudaErrorCooperativeLaunchTooLarge = 720 };
using cudaStream_t = void*;
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum { cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
struct cudaDeviceProp {
  char name[32] = "emulated on the CPU";
  int major = 0, minor = 0;
};
struct cudaPointerAttributes {
  int device = 0;
};

constexpr int kMultiprocessors = 3;
constexpr unsigned kBlocksAtOnce = 2;  // of a launch that is not cooperative

inline const char* cudaGetErrorName(cudaError_t e) {
  return e == cudaErrorInvalidDevice ? "cudaErrorInvalidDevice" : "cudaErrorCooperativeLaunchTooLarge";
}
inline const char* cudaGetErrorString(cudaError_t) { return "said by the emulation"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaErrorInvalidDevice; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) { return *properties = {}, cudaSuccess; }
inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void*) { return *a = {}, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  // Its variable stands for a device that cannot launch cooperatively.
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors
           : attribute == cudaDevAttrCooperativeLaunch ? std::getenv("FASTNLCG_EMULATE_OLD_DEVICE") == nullptr
                                                       : static_cast<int>(sizeof(resident_memory));
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, std::size_t) {
  return *blocks = 2, cudaSuccess;
}
struct cudaFuncAttributes {
  std::size_t sharedSizeBytes = 0;
};
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) { return *a = {}, cudaSuccess; }
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline bool emulates(const char*);
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  if (emulates("SLOW")) std::this_thread::sleep_for(std::chrono::milliseconds(200));
  return cudaSuccess;
}
// The device that was current before is in use, unless a test says otherwise.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline int context_state(int, unsigned*, int* active) { return *active = !emulates("UNUSED_DEVICE"), 0; }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int,
                                                    cudaDriverEntryPointQueryResult* found) {
  *entry = reinterpret_cast<void*>(&context_state);
  return *found = cudaDriverEntryPointSuccess, cudaSuccess;
}
inline cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  const char* const generation = std::getenv("FASTNLCG_EMULATE_STREAM_GENERATION");  // a handle that is used again
  return *id = reinterpret_cast<std::uintptr_t>(stream) * 1000 + (generation ? std::atoi(generation) : 0), cudaSuccess;
}
// What a test asks for, in environment variables: a capture in progress, streams that are slow to finish, cooperative
// launches that are too large, and a log of events.
inline bool emulates(const char* what) { return std::getenv((std::string("FASTNLCG_EMULATE_") + what).c_str()); }
inline void log_event(const char* what, const void* stream) {
  if (const char* path = std::getenv("FASTNLCG_EMULATE_LOG")) {
    std::FILE* file = std::fopen(path, "a");
    std::fprintf(file, "%s %zu\n", what, reinterpret_cast<std::size_t>(stream));
    std::fclose(file);
  }
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) {
  return *s = emulates("CAPTURE") ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone, cudaSuccess;
}
using cudaEvent_t = void*;
enum { cudaEventDisableTiming = 2 };
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return *event = new int, cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t stream) {
  return log_event("record", stream), cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t, unsigned) {
  return log_event("wait", stream), cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete static_cast<int*>(event), cudaSuccess; }
inline cudaError_t cudaMallocAsync(void** memory, std::size_t bytes, cudaStream_t) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  std::memset(*memory, 0xff, bytes);  // nobody may count on zeros
  return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) { return std::free(memory), cudaSuccess; }

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const std::type_identity_t<Parameters>&... arguments) {
  const unsigned blocks = config->gridDim.x, threads = config->blockDim.x;
  const bool cooperative = config->numAttrs > 0 && config->attrs->val.cooperative;
  if (cooperative && (blocks > 2 * kMultiprocessors || emulates("TOO_LARGE")))
    return cudaErrorCooperativeLaunchTooLarge;
  if (config->dynamicSmemBytes > sizeof(resident_memory)) std::abort();
  const std::function<void()> body = [&] { kernel(arguments...); };
  std::atomic<unsigned> next{0};
  const auto work = [&] {
    for (unsigned b; (b = next.fetch_add(1)) < blocks;) {
      blockIdx = {cooperative ? b : blocks - 1 - b};  // no order is promised
      gridDim = config->gridDim;
      blockDim = config->blockDim;
      std::memset(resident_memory, 0xff, sizeof(resident_memory));
      Block(threads, body).run();
    }
  };
  std::vector<std::thread> workers;
  for (unsigned w = 1; w < (cooperative ? blocks : std::min(blocks, kBlocksAtOnce)); ++w) workers.emplace_back(work);
  work();
  for (std::thread& worker : workers) worker.join();
  return cudaSuccess;
}

}  // namespace fastnlcg
