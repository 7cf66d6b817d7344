// CUDA's answers in a build without it.
#include <stdexcept>

#include "../csrc/step_cuda.h"

namespace fastnlcg {

CudaStatus cuda_status() { return {false, "", 0, 0, {}, "built without CUDA"}; }

namespace {
[[noreturn]] void off() { throw std::runtime_error("fastnlcg was built without CUDA"); }
}  // namespace

int cuda_device_of(const void*) { off(); }
std::int64_t workspace_doubles(std::int64_t, std::int64_t, std::int64_t) { off(); }
void cuda_step(const Step&, CudaStep&) { off(); }
void cuda_forget(CudaStep&) {}
void cuda_join_stream(const CudaStep&) {}
void cuda_last_move(const Step&, CudaStep&) { off(); }
void cuda_descend(const Step&, CudaStep&, const Descent&, double*) { off(); }
void cuda_matrix_pass(const Step&, CudaStep&, MatrixPass, std::int64_t, std::int64_t) { off(); }
void cuda_normalize(CudaStep&, void*, DType, std::int64_t, std::int64_t, double*) { off(); }
void cuda_state_norms(const Step&, CudaStep&, double*, double*, double*) { off(); }
bool cuda_update_curvature(const Step&, CudaStep&, double*, double*) { off(); }
void cuda_preconditioned_dots(const Step&, CudaStep&, double*, double*) { off(); }
void cuda_update_direction(const Step&, CudaStep&, double) { off(); }
void cuda_flat_step(const Step&, CudaStep&) { off(); }

}  // namespace fastnlcg
