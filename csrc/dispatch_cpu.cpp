// Picks the instruction set, once per call: the widest the processor has, or the one FASTNLCG_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "step_cpu.h"

namespace fastnlcg {
namespace {

// In the order of their width.
struct Candidate {
  const CpuKernels* kernels;
  bool present;
};

const Candidate* candidates() {
  static const Candidate all[kInstructionSets] = {
#if defined(__x86_64__)
      {&kBaseline, true},
      {&kAvx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {&kAvx512, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
#else
      {&kNeon, true},
#endif
  };
  return all;
}

}  // namespace

int cpu_instruction_sets(const char** names) {
  int count = 0;
  for (int i = 0; i < kInstructionSets; ++i) {
    if (candidates()[i].present) names[count++] = candidates()[i].kernels->name;
  }
  return count;
}

const CpuKernels& cpu_kernels() {
  const char* wanted = std::getenv("FASTNLCG_ISA");
  if (wanted != nullptr && *wanted != '\0') {
    for (int i = 0; i < kInstructionSets; ++i) {
      const Candidate& candidate = candidates()[i];
      if (candidate.present && std::strcmp(candidate.kernels->name, wanted) == 0) return *candidate.kernels;
    }
    std::string have;
    const char* names[kInstructionSets];
    for (int i = 0, n = cpu_instruction_sets(names); i < n; ++i) have += std::string(i ? ", " : "") + names[i];
    throw std::invalid_argument("FASTNLCG_ISA is '" + std::string(wanted) + "'; this processor has " + have);
  }
  int widest = kInstructionSets - 1;
  while (!candidates()[widest].present) --widest;  // the first always is
  return *candidates()[widest].kernels;
}

}  // namespace fastnlcg
