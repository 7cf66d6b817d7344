// One optimizer's native side: its options, the table of segments, the workspace. It owns nothing that survives a step:
// scalars and state are the caller's tensors or arrays, whose addresses are read at every step.
//
// Python checks arguments and words the errors (_native.py, groups.py, parameters.py); everything that could write outside a
// buffer is checked here again. Nothing is written before every check has passed. One thread steps at a time, with the GIL
// released while kernels run.
#pragma once

#include <pybind11/pybind11.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "buffer.h"
#include "step_args.h"
#include "step_cuda.h"
#include "tensors.h"

namespace fastnlcg {

namespace py = pybind11;
using BufferPtr = std::shared_ptr<Buffer>;

class NativeStep {
 public:
  // `device`: "cpu" or "cuda:0", ...
  NativeStep(const std::string& state_dtype, const std::string& device, std::uintptr_t stream);
  ~NativeStep();
  NativeStep(const NativeStep&) = delete;
  NativeStep& operator=(const NativeStep&) = delete;

  // Every option by its name in NLCG_OPTIONS.
  void set_options(const py::dict& options);

  // ---- a table over torch's tensors ----

  // (offset, group, index, dtype, shape, strides, (begin, run, skip)) of a segment; the last is its Place.
  using TableRow = std::tuple<std::int64_t, int, std::uint32_t, std::string, std::vector<std::int64_t>,
                              std::vector<std::int64_t>, std::tuple<std::int64_t, std::int64_t, std::int64_t>>;
  // The segments over a flat index of n elements, and the workspace of a GPU. `keys`: of a state entry, in the order
  // grad_prev, direction, diagonal, origin, steps; "" for none.
  void lay_out(std::int64_t n, const std::vector<TableRow>& table, int groups, const std::vector<std::string>& keys,
               const py::capsule& exchange, const py::object& tensor_type, const BufferPtr& workspace);

  // The sums of this rank become sums over ranks. `mine` is a row of doubles, `all` one for each rank, which `gather()`
  // fills from everybody's `mine`; `owned` says whose sums are added, and `elements` how many of this rank's index.
  void set_exchange(const BufferPtr& mine, const BufferPtr& all, const BufferPtr& owned, std::int64_t elements,
                    bool every_decision, py::object gather);

  // Where the numbers of a step are. Lists have one entry a segment, or a group. `gradients` None: the parameters' .grad.
  // `resting` must have no gradient. `state`: a dict that must hold `held`, pairs of a parameter and its entry, in this
  // order; None: not looked at.
  struct Tensors {
    py::list params;
    py::object gradients;
    py::list entries;
    py::list resting;
    py::object state, held;
    py::object scalars;
    py::list alpha_prev;
  };
  using Number = std::optional<std::pair<std::uintptr_t, std::string>>;  // on the device: address, dtype
  struct Arguments {
    std::vector<double> lr, weight_decay;
    std::vector<bool> maximize;
    double active_set, loss;
    int threads;
    std::vector<Number> lr_on_device;
    Number loss_on_device, grad_scale, found_inf;
  };
  // True where the parameters changed, false where the step was skipped; on a GPU always true, since nobody has waited for
  // the decision. None where anything but an address differs from the table, and nothing has been done.
  std::optional<bool> step(const Tensors&, const Arguments&);

  // |g_prev|^2, |d|^2, g_prev . d; None where the state no longer fits the table.
  std::optional<std::tuple<double, double, double>> state_norms(const Tensors&, int threads);
  // bfgs: the sums over the last move, formed again from the state, into the scalars. False: the state does not fit.
  bool last_move(const Tensors&, int threads);
  // One pass of the full-batch descent, over the table, or (no tensors given) the flat buffers: its sums, and behind
  // them the largest. None: the tensors do not fit the table, and nothing has been done. Waits for a GPU.
  std::optional<std::vector<double>> descend(const std::optional<Tensors>&, const Descent&, int threads);

  // ---- flat buffers ----

  // One segment over these buffers, which the object holds: what the parts and flat_step() work on. Null: absent; p or g
  // must be given.
  void bind(const BufferPtr& p, const BufferPtr& g, const BufferPtr& grad_prev, const BufferPtr& direction,
            const BufferPtr& diagonal, const BufferPtr& origin, double steps);
  // A step; `scalars` has NLCG_SCALARS, alpha_prev and the updates of the diagonal, in this order, and is written.
  bool flat_step(const BufferPtr& scalars, double lr, double weight_decay, bool maximize, double loss, int threads);
  std::tuple<double, double, bool> update_curvature(double alpha_prev, int threads);
  std::pair<double, double> preconditioned_dots(int threads);
  void update_direction(double alpha, double weight_decay, double beta, int threads);

  // ---- how a step runs on a GPU; the bits do not depend on it ----

  void set_launch(const std::string& form, int blocks, int resident_tiles);
  int launches() const { return cuda_.launches; }
  std::uintptr_t stream() const { return reinterpret_cast<std::uintptr_t>(cuda_.stream); }
  void set_stream(std::uintptr_t stream) { cuda_.stream = reinterpret_cast<void*>(stream); }
  // What `stream` does next follows the last step.
  void join_stream();

  // Of the options, and of every group's lr, weight_decay and sign, in 53 bits.
  double digest() const;

 private:
  // One step at a time: a second thread gets an error, not a torn state.
  struct StepGuard {
    explicit StepGuard(NativeStep& owner) : flag(owner.busy_) {
      if (flag.exchange(true)) throw std::runtime_error("this optimizer is stepping in another thread");
    }
    ~StepGuard() { flag.store(false); }
    std::atomic<bool>& flag;
  };

  bool on_device() const { return device_ >= 0; }
  enum class Reads { state, parameters, gradients };  // each with those before it
  bool follow(const Tensors&, Reads);
  bool follow_state(const Tensors&, std::size_t i);
  bool holds(const Tensors&) const;
  void check_overlaps();
  void check_buffer(const char* name, const Buffer&, const std::string& dtype) const;
  void set_groups(const Arguments&);
  template <class OnDevice, class OnCpu>
  void run(OnDevice&&, OnCpu&&);
  void prepare_part(double alpha, double alpha_prev, double weight_decay, int threads);

  int device_;  // -1: the CPU
  std::string device_name_;
  Step step_ = {};
  CudaStep cuda_;
  std::vector<Segment> segments_;
  std::vector<Layout> layouts_;
  std::vector<Group> groups_;
  std::vector<Bias> bias_;
  std::vector<double> partials_;
  std::vector<py::object> live_;   // what the step in progress reads and writes
  bool overlaps_checked_ = false;  // of parameters and state, where they lie now
  std::optional<TensorReader> reader_;
  py::object tensor_type_;
  std::vector<py::object> keys_;  // of an entry, interned; null where the options have no use for one
  Layout number_, scalars_layout_;
  BufferPtr workspace_, p_, g_, grad_prev_, direction_, diagonal_, origin_;
  BufferPtr mine_, all_, owned_;
  py::object gather_;
  bool laid_out_ = false, bound_ = false;
  double own_steps_ = 0, own_alpha_prev_ = 0;
  std::atomic<bool> busy_{false};
};

}  // namespace fastnlcg
