// What the rest of the library may ask of CUDA. Includes no CUDA header: step_stub.cpp answers in a build without it.
//
// The CUDA step itself does not exist yet; this is its seam, and what `python -m fastnlcg` reports.
#pragma once

#include <string>
#include <vector>

namespace fastnlcg {

struct CudaStatus {
  bool built;                        // compiled with a CUDA toolkit
  std::string architectures;         // that the module holds code for
  int runtime_version;               // 13000 for 13.0; 0: not built
  int driver_version;                // of the CUDA the driver supports; 0: no driver
  std::vector<std::string> devices;  // names with compute capability
  std::string why_off;               // empty where CUDA parameters can be stepped
};

// Never throws, never needs a driver.
CudaStatus cuda_status();

}  // namespace fastnlcg
