// A step over torch's tensors: a table of segments whose tensors are followed from step to step. It owns nothing that
// survives a step: scalars and state are the caller's tensors, and their addresses are read at every step. If anything
// but an address has changed, a call returns None and has done nothing; the caller then makes a new table.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "native_step.h"
#include "tensors.h"

namespace fastnlcg {

// One parameter in the table.
struct SegmentSpec {
  std::int64_t offset;  // of its first element in the flat index
  int group;
  DType dtype;
  TensorShape shape;  // of p, g and the state arrays
  Shard shard;
};

// The keys of an optimizer's state entry; none: the options have no use for the tensor.
struct StateKeys {
  std::optional<std::string> grad_prev, direction, diagonal, origin, steps;
};

// The objects whose memory a step reads and writes. Lists have one entry a segment, or, alpha_prev, a group.
struct Tensors {
  py::list params;
  py::object gradients;      // a list; None: the parameters' .grad
  py::list entries;          // dicts of state tensors
  py::list inactive_params;  // must have no gradient
  py::object state;          // a dict that must hold `expected_state` and no other parameter; None: unchecked
  py::list expected_state;   // parameter, entry, parameter, entry, ..., in the order of `state`
  py::object scalars;
  py::list alpha_prev;
};

// The numbers of a step. Vectors have one entry a group.
struct StepInputs {
  std::vector<double> lr, weight_decay;
  std::vector<bool> maximize;
  double active_set, loss;
  int threads;
  // GPU only: read on the device, in place of the numbers above. A null address: not given.
  std::vector<DeviceScalar> lr_on_device;
  DeviceScalar loss_on_device, grad_scale, found_inf;
};

class TensorTable : public NativeStep {
 public:
  TensorTable(const std::string& state_dtype, const std::string& device, std::uintptr_t stream)
      : NativeStep(state_dtype, device, stream), scalars_shape_{{kScalars}, {1}} {}

  // Replaces the table by these segments over a flat index of n elements. `dlpack_api`: the capsule
  // torch.Tensor.__dlpack_c_exchange_api__; `tensor_type`: torch.Tensor. `workspace`: of a GPU. `matrix_groups`: those
  // whose segments are matrices: each begins at a tile, and all others at a block.
  void lay_out(std::int64_t n, const std::vector<SegmentSpec>& segments, int groups, const StateKeys& keys,
               const py::capsule& dlpack_api, const py::object& tensor_type, const BufferPtr& workspace,
               const std::vector<int>& matrix_groups);

  // Makes the sums of this rank sums over ranks. `mine` is a row of doubles; `gather()` fills `all`, which has a row
  // for each rank, from every rank's `mine`. `owned` tells whose sums are added, and `elements` how much of this rank's
  // index. `every_decision`, `replicas`: see RankGather.
  void set_exchange(const BufferPtr& mine, const BufferPtr& all, const BufferPtr& owned, std::int64_t elements,
                    bool every_decision, bool replicas, py::object gather);

  // True if the parameters changed, false if the step was skipped. On a GPU always true: the decision is the device's,
  // and the host does not wait for it. None: the tensors do not fit the table.
  std::optional<bool> step(const Tensors&, const StepInputs&);
  // |g_prev|^2, |d|^2, g_prev . d. None: the state does not fit the table.
  std::optional<std::tuple<double, double, double>> state_norms(const Tensors&, int threads);
  // bfgs: forms the sums over the last move again, from the state, and writes them to the scalars. False: the state
  // does not fit the table.
  bool last_move(const Tensors&, int threads);
  // One pass of full-batch descent. None: the tensors do not fit the table.
  std::optional<std::vector<double>> descend(const Tensors&, const Descent&, int threads);

  // The origins of segments: their parts of a workspace in which matrices are kept between the passes over them.
  // `parts` has the segment and the first element of each.
  void set_origins(const BufferPtr& workspace, const std::vector<std::pair<std::size_t, std::int64_t>>& parts);
  // After step() has returned true, with the tensors of that step: one pass over the matrices in these tiles. Moves
  // are counted, and step() counts from 0 again.
  void matrix_pass(MatrixPass, std::int64_t first_tile, std::int64_t last_tile, int threads);
  bool matrices_pending() const { return has_matrices_ && !live_.empty(); }
  int matrix_moves() const { return matrix_moves_; }
  // After the last of them: lets go of the step's tensors.
  void end_matrices();
  // Makes the stream's next work follow the last step.
  void join_stream();

  double agreed = 0.0;  // names what else all ranks must have alike

 private:
  double digest() const;  // see digest_of()
  void check_laid_out(const char* call) const;
  enum class Reads { state, parameters, gradients };  // each reads those before it too
  bool follow(const Tensors&, Reads);
  bool follow_parameter(const Tensors&, std::size_t i);
  bool follow_gradient(const Tensors&, std::size_t i);
  bool follow_state(PyObject* entry, std::size_t i);
  bool follow_scalars(const Tensors&);
  void check_overlaps();
  void set_groups(const StepInputs&);

  std::vector<TensorShape> shapes_;     // of the segments
  std::optional<TensorReader> reader_;  // none before lay_out()
  py::object tensor_type_;
  std::array<py::object, 4> array_keys_;  // interned, in the order of kStateArrays; null: no such array
  py::object steps_key_;
  TensorShape scalar_shape_, scalars_shape_;
  std::vector<py::object> live_;   // what the call in progress reads and writes; with matrices, until end_matrices()
  bool overlaps_checked_ = false;  // of parameters and state, at their present addresses
  BufferPtr workspace_, mine_, all_, owned_, origins_;
  bool has_matrices_ = false;
  int matrix_moves_ = 0;
  py::object gather_;
};

// Calls `complete`, which ends a step in Python: moves of matrices, copies. An interrupt must not leave half of a step:
// if the call raises, it is called again, at most four times in all, and the first exception is then raised.
void complete_step(const py::function& complete);

}  // namespace fastnlcg
