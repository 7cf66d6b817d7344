// The host's side of a launch: errors, the device and stream it goes to, and the order of work on several streams.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../csrc/step_cuda.h"
#include "reduce.cuh"

namespace fastnlcg {
namespace {

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that a later call does not report it again
  throw std::runtime_error("fastnlcg: " + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Whether the process has used the device. Setting one that it has not used would create a context of half a gigabyte,
// and fail if another process has exclusive use of the device.
bool in_use(int device) {
  using Query = int (*)(int, unsigned*, int*);  // cuDevicePrimaryCtxGetState
  static const Query query = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = {};
    constexpr const char* name = "cuDevicePrimaryCtxGetState";
#if 0 < CUDART_VERSION && CUDART_VERSION < 12050
    const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 7000, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Query>(entry) : nullptr;
  }();
  unsigned flags = 0;
  int active = 1;
  return query == nullptr || query(device, &flags, &active) != 0 || active != 0;
}

// Sets a device, and restores the caller's at the end, unless the process has never used that one.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_ && in_use(before_)) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

cudaStream_t stream_of(const CudaStep& cuda) { return static_cast<cudaStream_t>(cuda.stream); }

struct Grid {
  int blocks;
  int threads = kThreads;
  std::size_t shared_bytes = 0;
  bool cooperative = false;
};

template <class... Parameters>
cudaError_t try_launch(void (*kernel)(Parameters...), const Grid& grid, const CudaStep& cuda,
                       const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream_of(cuda);
  config.attrs = &attribute;
  config.numAttrs = grid.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

void check_launch(cudaError_t error, const char* name, const Grid& grid, const CudaStep& cuda) {
  check(error, "kernel " + std::string(name) + ", " + std::to_string(grid.blocks) + " blocks of " +
                   std::to_string(grid.threads) + " threads on device " + std::to_string(cuda.device));
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const CudaStep& cuda,
            const std::type_identity_t<Parameters>&... arguments) {
  check_launch(try_launch(kernel, grid, cuda, arguments...), name, grid, cuda);
}

bool captures(const CudaStep& cuda) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(cuda), &capture), "cudaStreamIsCapturing");
  return capture != cudaStreamCaptureStatusNone;
}

// All work of one optimizer uses the same barrier and scalars, so two streams must not run it at once: the later stream
// waits for the event after the last work on the earlier one. A graph orders its own work, but its replays record no
// event: a caller who replays on one stream and steps on another has to order the two. Streams are compared by id,
// because a handle may be reused.
unsigned long long id_of(const CudaStep& cuda) {
  unsigned long long id = 0;
  check(cudaStreamGetId(stream_of(cuda), &id), "cudaStreamGetId");
  return id;
}
void follow_last_stream(const CudaStep& cuda) {
  if (cuda.last_work == nullptr || captures(cuda) || cuda.last_stream == id_of(cuda)) return;
  check(cudaStreamWaitEvent(stream_of(cuda), static_cast<cudaEvent_t>(cuda.last_work), 0), "cudaStreamWaitEvent");
}
void mark_last_work(CudaStep& cuda) {
  if (captures(cuda)) return;
  auto event = static_cast<cudaEvent_t>(cuda.last_work);
  if (event == nullptr) {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    cuda.last_work = event;
  }
  check(cudaEventRecord(event, stream_of(cuda)), "cudaEventRecord");
  cuda.last_stream = id_of(cuda);
}

void copy_to_host(void* to, const void* from, std::size_t bytes, const CudaStep& cuda) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(cuda)), "copy of scalars to the host");
}
void copy_to_device(void* to, const void* from, std::size_t bytes, const CudaStep& cuda) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(cuda)), "copy of scalars to the device");
}
void wait_for(const CudaStep& cuda) { check(cudaStreamSynchronize(stream_of(cuda)), "waiting for the stream"); }

}  // namespace
}  // namespace fastnlcg
