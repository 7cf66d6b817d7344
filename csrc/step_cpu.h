// The CPU step: what the bindings call. Compiled once per instruction set (step_cpu.cpp), chosen at run time
// (dispatch_cpu.cpp).
//
// Contract: the caller has checked every pointer, length and dtype (native_step.cpp does); buffers do not overlap. A step
// reduces, decides, then writes: where it skips, nothing but `scalars->skipped_steps` has changed. It does not
// allocate, and throws only what RankGather::gather throws, or RanksDisagree, before it has written. Any address will do; nothing needs
// alignment.
#pragma once

#include "step_args.h"

namespace fastnlcg {

// Thrown by a step whose ranks are not about to take the same one; nothing has changed.
struct RanksDisagree {};

struct CpuKernels {
  const char* name;  // of the instruction set

  // The whole step: the passes of its preconditioner over tiles. preconditioners.h counts their bytes.
  void (*step)(const Step&);

  // The parts, over the same passes; they neither read nor write `scalars`.
  bool (*update_curvature)(const Step&, double* ys,
                           double* shs);  // bfgs: writes h where the curvature condition holds: true
  void (*preconditioned_dots)(const Step&, double* rz, double* rz_mid);  // reads g, diagonal, g_prev (unless null)
  void (*update_direction)(const Step&, double beta);  // writes p (unless null), d, g_prev (unless null); adam: v
  void (*last_move)(const Step&);  // bfgs: scalars->gs and shs from the state, as the last step left them
  void (*descend)(const Step&, const Descent&, double* sums);            // one pass; the largest behind the sums
  void (*state_norms)(const Step&, double* gg, double* dd, double* gd);  // over d, and g_prev (unless null)
};

#if defined(__x86_64__)
extern const CpuKernels kBaseline, kAvx2, kAvx512;
constexpr int kInstructionSets = 3;
#else
extern const CpuKernels kNeon;
constexpr int kInstructionSets = 1;
#endif

// The widest set this processor has, or the one the environment variable FASTNLCG_ISA names. Throws
// std::invalid_argument where it names none or one that the processor lacks.
const CpuKernels& cpu_kernels();
// The names this processor has, widest last; fills at most kInstructionSets, returns how many.
int cpu_instruction_sets(const char** names);

}  // namespace fastnlcg
