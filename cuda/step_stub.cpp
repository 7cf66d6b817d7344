// CUDA's answers in a build without it.
#include "step_cuda.h"

namespace fastnlcg {

CudaStatus cuda_status() { return {false, "", 0, 0, {}, "built without CUDA"}; }

}  // namespace fastnlcg
