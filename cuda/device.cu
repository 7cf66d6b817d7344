// What this machine's CUDA is. Linked with the static runtime, so the module imports where there is no driver.
#include <cuda_runtime_api.h>

#include "step_cuda.h"

namespace fastnlcg {

CudaStatus cuda_status() {
  CudaStatus status = {true, FASTNLCG_CUDA_ARCHITECTURES, CUDART_VERSION, 0, {}, ""};
  cudaDriverGetVersion(&status.driver_version);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    status.why_off = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
    return status;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    status.devices.push_back(std::string(properties.name) + " (sm_" +
                             std::to_string(properties.major * 10 + properties.minor) + ")");
  }
  status.why_off = count == 0 ? "no CUDA device" : "this version steps CPU parameters only";
  return status;
}

}  // namespace fastnlcg
