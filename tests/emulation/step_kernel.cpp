// The CUDA step, compiled for the CPU: cuda_runtime.h beside this file takes the place of CUDA's.
#define FASTNLCG_CUDA_ARCHITECTURES "emulated"
#include "../../cuda/step_kernel.cu"
