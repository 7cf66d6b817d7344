// What the rest of the library may ask of CUDA. Includes no CUDA header: step_stub.cpp answers in a build without it.
//
// Contract: as step_cpu.h, with these differences. All pointers of a step but its tables of segments and groups are device
// pointers, on `CudaStep::device`; what a step needs beside lies in `workspace`, device memory too. Work is
// enqueued on `stream` and nothing waits for it, except where a function returns numbers. Nothing is allocated. A step
// may be captured into a CUDA graph. Errors of CUDA throw std::runtime_error with the kernel's name and CUDA's text.
#pragma once

#include <string>
#include <vector>

#include "step_args.h"

namespace fastnlcg {

struct CudaStatus {
  bool built;                        // compiled with a CUDA toolkit
  std::string architectures;         // that the module holds code for
  int runtime_version;               // 13000 for 13.0; 0: not built
  int driver_version;                // of the CUDA the driver supports; 0: no driver
  std::vector<std::string> devices;  // names with compute capability
  std::string unavailable_reason;    // empty where CUDA parameters can be stepped
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

// What a step on a device needs beside its Step.
struct CudaStep {
  int device = 0;
  void* stream = nullptr;       // a cudaStream_t
  double* workspace = nullptr;  // workspace_doubles(...) of them, zeroed, 16-byte aligned
  std::int64_t max_segments = 0;

  std::vector<DeviceScalar> lr;  // per group: instead of Group::lr, where given
  DeviceScalar loss;             // instead of Step::loss
  DeviceScalar grad_scale;       // float32: gradients are divided by it
  DeviceScalar found_inf;        // float32: where it is not 0 the step changes nothing at all

  // How it runs. The bits do not depend on any of this.
  enum class Form : std::int32_t { automatic, one_launch, separate_launches };
  Form form = Form::automatic;
  int blocks = 0;           // at most; 0: as many as fit the device
  int resident_tiles = -1;  // per block, kept in shared memory between the passes; -1: as many as fit

  // What the device's tables hold, so that they are rewritten only where something changed.
  bool tables_unknown = false;  // a captured graph writes the pointers when it is replayed
  std::vector<Segment> written;
  int launches = 0;                  // of the last step's passes: 1, or one each
  bool cooperative_refused = false;  // a cooperative launch was too large once: separate ones for good

  // What the next work has to wait for, where it goes to another stream.
  void* last_work = nullptr;           // a cudaEvent_t
  unsigned long long last_stream = 0;  // its id
};

// Doubles of workspace for a state of n elements, at most so many segments, and so many groups.
std::int64_t workspace_doubles(std::int64_t n, std::int64_t max_segments, std::int64_t groups);

// The whole step: one cooperative launch, or one for each pass. Over ranks always the latter, with RankGather::gather
// called between them, which enqueues its work on the same stream.
void cuda_step(const Step&, CudaStep&);

// Gives back what a step keeps on the host side.
void cuda_forget(CudaStep&);

// What the step's stream does next follows the last work.
void cuda_join_stream(const CudaStep&);
// The sums over the last move (pass_bfgs.h, LastMove) over the step's segments, into its scalars. Waits.
void cuda_last_move(const Step&, CudaStep&);
// One pass of the full-batch descent (pass_full_batch.h) over the step's segments, in a workspace of its own where it has
// none: its sums, and behind them the largest. Waits.
void cuda_descend(const Step&, CudaStep&, const Descent&, double* sums);
// |g_prev|^2, |d|^2, g_prev . d over the step's segments. Waits.
void cuda_state_norms(const Step&, CudaStep&, double* gg, double* dd, double* gd);

// The parts over flat buffers (one segment, one group), in a workspace of their own. All but the last wait.
bool cuda_update_curvature(const Step&, CudaStep&, double* ys, double* shs);
void cuda_preconditioned_dots(const Step&, CudaStep&, double* rz, double* rz_mid);
void cuda_update_direction(const Step&, CudaStep&, double beta);
// A step over flat buffers, in a workspace of its own, with scalars, alpha_prev and steps from the host and back. Waits.
void cuda_flat_step(const Step&, CudaStep&);

}  // namespace fastnlcg
