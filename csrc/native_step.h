// What the two native steps share: the options, the device, how kernels run on it, and the plain Step that they fill
// in. tensor_table.h follows torch's tensors; flat_step.h works on flat buffers.
//
// Python checks arguments and words the errors (_native.py, tensors/groups.py, tensors/checks.py); whatever could make a
// kernel write outside a buffer is checked here again. Nothing is written before every check has passed. One thread steps
// at a time, and the GIL is released while kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "step_args.h"
#include "step_cpu.h"
#include "step_cuda.h"

namespace fastnlcg {

namespace py = pybind11;
using BufferPtr = std::shared_ptr<Buffer>;

inline std::invalid_argument invalid_argument(const std::string& message) { return std::invalid_argument(message); }

// The value of an enum with this name; std::invalid_argument if there is none. `what`: what it is, in words.
template <class E, std::size_t N>
E named(const char* what, const char* const (&names)[N], const std::string& name) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  if (found == std::end(names)) throw invalid_argument(std::string("unknown ") + what + " '" + name + "'");
  return static_cast<E>(found - std::begin(names));
}

// The dtype of this name; py::type_error if there is none.
DType dtype_named(const std::string& name);

class NativeStep {
 public:
  virtual ~NativeStep();
  NativeStep(const NativeStep&) = delete;
  NativeStep& operator=(const NativeStep&) = delete;

  // Every option, by its name in NLCG_OPTIONS.
  void set_options(const py::dict& options);

  // How a step runs on a GPU. The bits do not depend on it.
  void set_launch(const std::string& form, int blocks, int resident_tiles);
  int launches() const { return cuda_.launches; }
  std::uintptr_t stream() const { return reinterpret_cast<std::uintptr_t>(cuda_.stream); }
  void set_stream(std::uintptr_t stream) { cuda_.stream = reinterpret_cast<void*>(stream); }

 protected:
  // `device`: "cpu" or "cuda:0", "cuda:1", ...
  NativeStep(const std::string& state_dtype, const std::string& device, std::uintptr_t stream);

  // A second thread gets an error, not a torn state.
  struct StepGuard {
    explicit StepGuard(NativeStep& owner) : flag(owner.busy_) {
      if (flag.exchange(true)) throw std::runtime_error("this optimizer is stepping in another thread");
    }
    ~StepGuard() { flag.store(false); }
    std::atomic<bool>& flag;
  };

  bool on_device() const { return device_ >= 0; }
  // Throws if the buffer is on another device, of another dtype, not contiguous, or without memory.
  void check_buffer(const char* name, const Buffer&, const std::string& dtype) const;
  // Throws if float64 is mixed with another dtype. `what`: the parameters, in words.
  void check_state_dtype(const std::string& what, DType) const;
  // Throws if the state is bfloat16. `what`: what cannot take it.
  void refuse_bfloat16_state(const std::string& what) const;
  DType arithmetic_dtype() const { return step_.state_dtype == DType::f64 ? DType::f64 : DType::f32; }
  // Throws if a segment lacks a state array that the passes of the options need. All segments have the same ones,
  // except that those of matrices have no diagonal.
  void check_state() const;
  // Replaces the tables of segments and groups; `n` is the length of the flat index.
  void use(std::vector<Segment> segments, std::vector<Group> groups, std::int64_t n);
  // Runs one of two calls, without the GIL: the first on a GPU, the second, with the kernels, on the CPU.
  template <class OnDevice, class OnCpu>
  void run(OnDevice&& on_gpu, OnCpu&& on_cpu) {
    if (on_device()) {
      const py::gil_scoped_release released;
      on_gpu();
    } else {
      const CpuKernels& kernels = cpu_kernels();
      const py::gil_scoped_release released;
      on_cpu(kernels);
    }
  }
  // One pass of full-batch descent: its sums, followed by the maximum. Waits for a GPU.
  std::vector<double> run_descent_pass(const Descent&, int threads);

  int device_;  // the ordinal of a GPU; -1: the CPU
  std::string device_name_;
  Step step_ = {};
  CudaStep cuda_;
  std::vector<Segment> segments_;
  std::vector<Group> groups_;
  int rows_ = 0;  // how many rows of curvature pairs the segments have

 private:
  std::vector<Bias> bias_;
  std::vector<double> partials_;
  std::atomic<bool> busy_{false};
};

}  // namespace fastnlcg
