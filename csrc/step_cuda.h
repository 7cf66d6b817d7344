// What the rest of the library may ask of CUDA. Includes no CUDA header: step_stub.cpp answers in a build without it.
//
// Contract: as step_cpu.h, with these differences. All pointers of a step, except its tables of segments and groups,
// are device pointers, on `CudaStep::device`; whatever else a step needs is in `workspace`, which is device memory too.
// Work is enqueued on `stream`, and only functions that return numbers wait for it. Nothing is allocated. A step may be
// captured into a CUDA graph. Errors of CUDA throw std::runtime_error with the kernel's name and CUDA's text.
#pragma once

#include <string>
#include <vector>

#include "step_args.h"

namespace fastnlcg {

struct CudaStatus {
  bool built;                        // compiled with a CUDA toolkit
  std::string architectures;         // for which the module has code
  int runtime_version;               // 13000 for 13.0; 0: not built
  int driver_version;                // the newest CUDA that the driver supports; 0: no driver
  std::vector<std::string> devices;  // names with compute capability
  std::string unavailable_reason;    // empty if CUDA parameters can be stepped
};

// Never throws, never needs a driver.
CudaStatus cuda_status();

// The device that holds this memory.
int cuda_device_of(const void* memory);

// A scalar in device memory; a null address: not given.
struct DeviceScalar {
  const void* address = nullptr;
  DType dtype = DType::f32;
  NLCG_HD explicit operator bool() const { return address != nullptr; }
};

// What a step on a device needs in addition to its Step.
struct CudaStep {
  int device = 0;
  void* stream = nullptr;       // a cudaStream_t
  double* workspace = nullptr;  // workspace_doubles(...) of them, zeroed, 16-byte aligned
  std::int64_t max_segments = 0;

  std::vector<DeviceScalar> lr;  // per group: instead of Group::lr, if given
  DeviceScalar loss;             // instead of Step::loss
  DeviceScalar grad_scale;       // float32: gradients are divided by it
  DeviceScalar found_inf;        // float32: if it is not 0, the step changes nothing at all

  // How it runs. The bits do not depend on any of this.
  enum class Form : std::int32_t { automatic, one_launch, separate_launches };
  Form form = Form::automatic;
  int blocks = 0;           // at most so many; 0: as many as fit the device
  int resident_tiles = -1;  // per block, kept in shared memory between the passes; -1: as many as fit

  // What the device's tables hold, so that only entries that changed are written again.
  bool tables_unknown = false;  // true after a capture: the graph writes the tables whenever it is replayed
  std::vector<Segment> written;
  int launches = 0;                  // of the last step
  bool cooperative_refused = false;  // a cooperative launch was once too large: from then on separate launches

  // What the next work has to wait for, if it goes to another stream.
  void* last_work = nullptr;           // a cudaEvent_t
  unsigned long long last_stream = 0;  // its id
};

// The doubles of workspace for n elements, at most `max_segments` segments, and `groups` groups.
std::int64_t workspace_doubles(std::int64_t n, std::int64_t max_segments, std::int64_t groups);

// The whole step: one cooperative launch, or one launch for each pass. Over ranks always the latter; between the
// launches it calls RankGather::gather, which enqueues its work on the same stream.
void cuda_step(const Step&, CudaStep&);

// Frees what a step keeps on the host.
void cuda_forget(CudaStep&);

// Makes the next work on the step's stream follow the last work.
void cuda_join_stream(const CudaStep&);
// Forms the sums over the last move (pass_bfgs.h, LastMove) and writes them to the scalars. Waits.
void cuda_last_move(const Step&, CudaStep&);
// One pass of full-batch descent (pass_full_batch.h): its sums, followed by the maximum. Allocates a workspace if
// the step has none. Waits.
void cuda_descend(const Step&, CudaStep&, const Descent&, double* sums);
// muon: one pass over the matrices in these tiles, if the step before it was not skipped.
void cuda_matrix_pass(const Step&, CudaStep&, MatrixPass, std::int64_t first_tile, std::int64_t last_tile);

// muon: divides each of `count` matrices of n elements by its norm. `sums`: normalize_doubles(...) of workspace.
void cuda_normalize(CudaStep&, void* x, DType, std::int64_t count, std::int64_t n, double* sums);
constexpr std::int64_t kMatrixChunk = 16 * kTile;  // a block's share of a matrix
constexpr std::int64_t normalize_doubles(std::int64_t count, std::int64_t n) {
  return count * ((n + kMatrixChunk - 1) / kMatrixChunk);
}

// |g_prev|^2, |d|^2, g_prev . d. Waits.
void cuda_state_norms(const Step&, CudaStep&, double* gg, double* dd, double* gd);

// Parts of a step over flat buffers (one segment, one group). They allocate a workspace. All but the last wait.
bool cuda_update_curvature(const Step&, CudaStep&, double* ys, double* shs);
void cuda_preconditioned_dots(const Step&, CudaStep&, double* rz, double* rz_mid);
void cuda_update_direction(const Step&, CudaStep&, double beta);
// A step over flat buffers. Allocates a workspace; copies scalars, alpha_prev and steps from the host and back. Waits.
void cuda_flat_step(const Step&, CudaStep&);

}  // namespace fastnlcg
