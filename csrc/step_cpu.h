// The CPU step: what the bindings call. Compiled once per instruction set (step_cpu.cpp), chosen at run time
// (dispatch_cpu.cpp).
//
// Contract: the caller has checked every pointer, length and dtype (native_step.h); buffers do not overlap. A step
// reduces, decides, then writes: if it is skipped, only `scalars->skipped_steps` and `scalars->grad_norm` have changed.
// It does not allocate. It throws only what RankGather::gather throws, or RanksDisagree, and has then written nothing.
// No address needs to be aligned.
#pragma once

#include "step_args.h"

namespace fastnlcg {

// Thrown if the ranks are not about to take the same step; nothing has changed.
struct RanksDisagree {};

struct CpuKernels {
  const char* name;  // of the instruction set

  // The whole step: the passes of its preconditioner (preconditioners.h).
  void (*step)(const Step&);

  // Parts of a step, by the same passes. Only last_move writes `scalars`; matrix_pass, and passes that round
  // stochastically, read them.
  // bfgs: if the curvature condition holds, writes h and returns true.
  bool (*update_curvature)(const Step&, double* ys, double* shs);
  // Reads g, the diagonal, and g_prev unless it is null.
  void (*preconditioned_dots)(const Step&, double* rz, double* rz_mid);
  // Writes d, p and g_prev unless they are null, and the diagonal if the preconditioner's last pass does.
  void (*update_direction)(const Step&, double beta);
  // bfgs: writes scalars->gs and shs, formed from the state as the last step left it.
  void (*last_move)(const Step&);
  // One pass of full-batch descent: its sums, followed by the maximum.
  void (*descend)(const Step&, const Descent&, double* sums);
  // muon, after a step that was not skipped: one pass over the matrices in these tiles of the flat index.
  void (*matrix_pass)(const Step&, MatrixPass, std::int64_t first_tile, std::int64_t last_tile);
  // muon: divides each segment's origin by its norm. Each segment has a group of its own and begins at a tile.
  void (*normalize)(const Step&);
  // |g_prev|^2, |d|^2, g_prev . d; without g_prev only the second.
  void (*state_norms)(const Step&, double* gg, double* dd, double* gd);
};

#if defined(__x86_64__)
extern const CpuKernels kBaseline, kAvx2, kAvx512;
constexpr int kInstructionSets = 3;
#else
extern const CpuKernels kNeon;
constexpr int kInstructionSets = 1;
#endif

// The kernels of the widest instruction set that this processor has, or of the one that the environment variable
// FASTNLCG_ISA names. Throws std::invalid_argument if it names none, or one that the processor lacks.
const CpuKernels& cpu_kernels();
// The names of the sets that this processor has, widest last: at most kInstructionSets. Returns how many.
int cpu_instruction_sets(const char** names);

}  // namespace fastnlcg
