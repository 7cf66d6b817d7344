#include "tensor_table.h"

#include <algorithm>
#include <stdexcept>

#include "rank_agreement.h"

namespace fastnlcg {
namespace {

constexpr std::array<void* Segment::*, 4> kStateArrays = {&Segment::grad_prev, &Segment::direction, &Segment::diagonal,
                                                          &Segment::origin};

// `list[i]`, borrowed. The caller has checked the length.
PyObject* item(const py::list& list, std::size_t i) { return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)); }

PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return value;
}

py::object interned(const std::optional<std::string>& key) {
  return key ? py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key->c_str())) : py::object();
}

// At the end of a call, however it ends.
struct DropLive {
  std::vector<py::object>& live;
  bool keep = false;
  ~DropLive() {
    if (!keep) live.clear();
  }
};

// The segment of a row of the table, which begins at or after `end`.
Segment segment_of(const SegmentSpec& spec, const std::string& name, std::int64_t n, int groups, std::int64_t end) {
  std::int64_t size = 1;
  for (const std::int64_t extent : spec.shape.shape) {
    if (extent < 0 || __builtin_mul_overflow(size, extent, &size)) {
      throw invalid_argument(name + ": a dimension is negative, or the number of elements exceeds 64 bits");
    }
  }
  if (spec.shape.strides.size() != spec.shape.shape.size()) {
    throw invalid_argument(name + " has " + std::to_string(spec.shape.shape.size()) + " dimensions and " +
                           std::to_string(spec.shape.strides.size()) + " strides");
  }
  if (size <= 0 || spec.offset < end || spec.offset > n || size > n - spec.offset) {
    throw invalid_argument(name + ": " + std::to_string(size) + " elements at " + std::to_string(spec.offset) +
                           " are none, overlap the segment before, or exceed the index of " + std::to_string(n));
  }
  if (spec.group < 0 || spec.group >= groups) {
    throw invalid_argument(name + " is in group " + std::to_string(spec.group) + " of " + std::to_string(groups));
  }
  if (spec.shard.run < 0)
    throw invalid_argument(name + " has run " + std::to_string(spec.shard.run) + ", expected >= 0");
  Segment segment = {};
  segment.offset = spec.offset;
  segment.n = size;
  segment.shard = spec.shard;
  segment.group = spec.group;
  segment.dtype = spec.dtype;
  return segment;
}

// Whether `state` holds exactly the expected entries, in this order. Keys that are strings belong to other code.
bool holds(const py::object& state, const py::list& expected) {
  if (state.is_none()) return true;
  if (!PyDict_Check(state.ptr())) return false;
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  std::size_t i = 0;
  while (PyDict_Next(state.ptr(), &position, &key, &value)) {
    if (2 * i + 1 < expected.size() && key == item(expected, 2 * i) && value == item(expected, 2 * i + 1)) {
      ++i;
    } else if (!PyUnicode_Check(key)) {
      return false;
    }
  }
  return 2 * i == expected.size();
}

}  // namespace

// ---- the table ---------------------------------------------------------------------------------------------------

void TensorTable::lay_out(std::int64_t n, const std::vector<SegmentSpec>& specs, int groups, const StateKeys& keys,
                          const py::capsule& dlpack_api, const py::object& tensor_type, const BufferPtr& workspace,
                          const std::vector<int>& matrix_groups) {
  const StepGuard busy(*this);
  if (n < 0 || n > std::int64_t{1} << (on_device() ? 40 : 60)) {
    throw invalid_argument("n is " + std::to_string(n) + ", expected 0 <= n <= 2^" + (on_device() ? "40" : "60"));
  }
  if (groups < 0) throw invalid_argument("groups is " + std::to_string(groups) + ", expected >= 0");
  if (specs.size() > (std::size_t{1} << 30)) {
    throw invalid_argument(std::to_string(specs.size()) + " segments, expected at most 2^30");
  }
  const TensorReader reader(dlpack_api.ptr(), tensor_type.ptr(), device_);
  std::vector<Segment> segments;
  std::vector<TensorShape> shapes;
  std::int64_t end = 0;
  for (const SegmentSpec& spec : specs) {
    const std::string name = "segment " + std::to_string(segments.size());
    segments.push_back(segment_of(spec, name, n, groups, end));
    check_state_dtype(name, spec.dtype);
    Segment& segment = segments.back();
    segment.matrices = std::find(matrix_groups.begin(), matrix_groups.end(), spec.group) != matrix_groups.end();
    const std::int64_t unit = segment.matrices ? kTile : kBlockElements;
    if (!matrix_groups.empty() && spec.offset % unit != 0) {
      throw invalid_argument(name + " begins at " + std::to_string(spec.offset) + ", expected a multiple of " +
                             std::to_string(unit));
    }
    shapes.push_back(spec.shape);
    end = segments.back().offset + segments.back().n;
  }
  if (workspace && !on_device()) throw invalid_argument("a workspace was given for the CPU, which needs none");
  if (on_device()) {
    if (!workspace) throw invalid_argument("a GPU needs a workspace");
    check_buffer("workspace", *workspace, "float64");
    const auto rows = static_cast<std::int64_t>(segments.size());
    const std::int64_t needed = workspace_doubles(n, rows, groups);
    if (workspace->size() < needed || workspace->readonly()) {
      throw invalid_argument("the workspace has " + std::to_string(workspace->size()) +
                             (workspace->readonly() ? " read-only" : "") + " doubles, expected " +
                             std::to_string(needed) + " that are writable");
    }
    cuda_.workspace = static_cast<double*>(workspace->data());
    cuda_.max_segments = rows;
    cuda_.written.clear();
    cuda_.tables_unknown = false;
  }
  std::vector<Group> table(static_cast<std::size_t>(groups), Group{0, 0, 0, 1, nullptr});
  for (const int group : matrix_groups) {
    if (group < 0 || group >= groups) throw invalid_argument("matrix_groups has " + std::to_string(group));
    table[static_cast<std::size_t>(group)].matrices = true;
  }
  use(std::move(segments), std::move(table), n);
  has_matrices_ = !matrix_groups.empty();
  live_.clear();  // of a step whose matrices have not moved
  matrix_moves_ = 0;
  origins_ = nullptr;
  shapes_ = std::move(shapes);
  workspace_ = workspace;
  tensor_type_ = tensor_type;
  array_keys_ = {interned(keys.grad_prev), interned(keys.direction), interned(keys.diagonal), interned(keys.origin)};
  steps_key_ = interned(keys.steps);
  overlaps_checked_ = false;
  reader_ = reader;
}

void TensorTable::set_exchange(const BufferPtr& mine, const BufferPtr& all, const BufferPtr& owned,
                               std::int64_t elements, bool every_decision, bool replicas, py::object gather) {
  const StepGuard busy(*this);
  const std::int64_t ranks = owned->size();
  check_buffer("mine", *mine, "float64");
  check_buffer("all", *all, "float64");
  check_buffer("owned", *owned, "float64");
  if (ranks < 1 || ranks > std::int64_t{1} << 24) {
    throw invalid_argument("owned has " + std::to_string(ranks) + " ranks, expected 1 to 2^24");
  }
  if (mine->size() != kColumns || all->size() != ranks * kColumns) {
    throw invalid_argument("mine has " + std::to_string(mine->size()) + " doubles and all " +
                           std::to_string(all->size()) + ", expected " + std::to_string(static_cast<int>(kColumns)) +
                           " and " + std::to_string(ranks * kColumns));
  }
  if (mine->readonly() || all->readonly()) throw invalid_argument("mine or all is read-only");
  if (elements != step_.n && (elements < 0 || elements > step_.n || elements % chunk_elements(step_.n) != 0)) {
    throw invalid_argument("elements is " + std::to_string(elements) + ", expected a multiple of " +
                           std::to_string(chunk_elements(step_.n)) + " up to " + std::to_string(step_.n));
  }
  mine_ = mine, all_ = all, owned_ = owned;
  gather_ = std::move(gather);
  step_.owned = elements;
  step_.exchange = RankGather{static_cast<int>(ranks),
                              every_decision,
                              replicas,
                              static_cast<RankRow*>(mine->data()),
                              static_cast<const RankRow*>(all->data()),
                              static_cast<const double*>(owned->data()),
                              [](void* self) {
                                const py::gil_scoped_acquire acquired;
                                static_cast<TensorTable*>(self)->gather_();
                              },
                              this};
}

// ---- following the tensors ---------------------------------------------------------------------------------------

bool TensorTable::follow_parameter(const Tensors& at, std::size_t i) {
  PyObject* const p = item(at.params, i);
  void* const address = reader_->address(p, segments_[i].dtype, shapes_[i]);
  if (address == nullptr) return false;
  if (address != segments_[i].p) {
    if (!is_as_it_looks(p)) return false;
    overlaps_checked_ = false;
  }
  segments_[i].p = address;
  return true;
}

bool TensorTable::follow_gradient(const Tensors& at, std::size_t i) {
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  static PyObject* const is_neg_name = PyUnicode_InternFromString("is_neg");
  auto g = at.gradients.is_none()
               ? py::reinterpret_steal<py::object>(attribute(item(at.params, i), grad_name))
               : py::reinterpret_borrow<py::object>(item(py::reinterpret_borrow<py::list>(at.gradients), i));
  if (!reader_->is_plain(g.ptr())) return false;
  segments_[i].g = reader_->address(g.ptr(), segments_[i].dtype, shapes_[i]);
  if (segments_[i].g == nullptr) return false;
  const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(g.ptr(), is_neg_name));
  if (!negated) throw py::error_already_set();
  if (negated.ptr() != Py_False) return false;
  live_.push_back(std::move(g));
  return true;
}

bool TensorTable::follow_state(PyObject* entry, std::size_t i) {
  if (!PyDict_Check(entry)) return false;
  Segment& segment = segments_[i];
  // The address of the tensor under a key, which was `before` at the last step; null if it does not fit.
  const auto follow_key = [&](const py::object& key, DType dtype, const TensorShape& shape, const void* before) {
    PyObject* const tensor = PyDict_GetItemWithError(entry, key.ptr());
    if (tensor == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if (tensor == nullptr || !reader_->is_plain(tensor)) return static_cast<void*>(nullptr);
    void* const address = reader_->address(tensor, dtype, shape);
    if (address != nullptr && address != before) {
      if (!is_as_it_looks(tensor)) return static_cast<void*>(nullptr);
      overlaps_checked_ = false;
    }
    live_.push_back(py::reinterpret_borrow<py::object>(tensor));
    return address;
  };
  for (std::size_t k = 0; k < kStateArrays.size(); ++k) {
    if (!array_keys_[k] || (segment.matrices && kStateArrays[k] == &Segment::diagonal)) continue;
    void*& to = segment.*kStateArrays[k];
    void* const address = follow_key(array_keys_[k], step_.state_dtype, shapes_[i], to);
    if (address == nullptr) return false;
    to = address;
  }
  if (steps_key_) {
    void* const address = follow_key(steps_key_, DType::f64, scalar_shape_, segment.steps);
    if (address == nullptr) return false;
    segment.steps = static_cast<double*>(address);
  }
  return true;
}

bool TensorTable::follow_scalars(const Tensors& at) {
  for (std::size_t k = 0; k < groups_.size(); ++k) {
    PyObject* const tensor = item(at.alpha_prev, k);
    groups_[k].alpha_prev = static_cast<double*>(reader_->address(tensor, DType::f64, scalar_shape_));
    if (groups_[k].alpha_prev == nullptr) return false;
    live_.push_back(py::reinterpret_borrow<py::object>(tensor));
  }
  step_.scalars = static_cast<Scalars*>(reader_->address(at.scalars.ptr(), DType::f64, scalars_shape_));
  if (step_.scalars == nullptr) return false;
  live_.push_back(at.scalars);
  return true;
}

bool TensorTable::follow(const Tensors& at, Reads reads) {
  const bool with_parameters = reads != Reads::state, with_gradients = reads == Reads::gradients;
  live_.clear();
  const std::size_t n = segments_.size();
  if (at.entries.size() != n || at.alpha_prev.size() != groups_.size()) return false;
  if (with_parameters && at.params.size() != n) return false;
  if (!at.gradients.is_none() && (!py::isinstance<py::list>(at.gradients) || py::len(at.gradients) != n)) return false;
  if (!holds(at.state, at.expected_state)) return false;
  if (with_gradients) {
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    for (const py::handle p : at.inactive_params) {
      const auto g = py::reinterpret_steal<py::object>(attribute(p.ptr(), grad_name));
      if (!g.is_none()) return false;
    }
  }
  live_.reserve(6 * n + 1 + groups_.size());
  for (std::size_t i = 0; i < n; ++i) {
    // These addresses may have been freed since the last step. A trial does not read g, so its address may stay, and a GPU's table
    // of segments need not be written before and after the trial.
    if (reads != Reads::parameters) segments_[i].g = nullptr;
    if (!with_parameters) segments_[i].p = nullptr;
    if (with_parameters && !follow_parameter(at, i)) return false;
    if (with_gradients && !follow_gradient(at, i)) return false;
    if (!follow_state(item(at.entries, i), i)) return false;
  }
  if (!follow_scalars(at)) return false;
  if (with_parameters && !overlaps_checked_) check_overlaps();
  return true;
}

// If two parameters shared memory, it would be moved twice, or by half, depending on how the threads run; so would
// their state. Checked only when an address has changed.
void TensorTable::check_overlaps() {
  struct Span {
    const char* begin;
    std::int64_t bytes;
    bool is_parameter;
    std::uint32_t index;
  };
  std::vector<Span> spans;
  for (const Segment& segment : segments_) {
    const auto add = [&](const void* at, DType dtype, bool is_parameter) {
      if (at == nullptr) return;
      spans.push_back(
          {static_cast<const char*>(at), segment.n * size_of(dtype), is_parameter, segment.shard.parameter});
    };
    add(segment.p, segment.dtype, true);
    for (void* Segment::* const array : kStateArrays) {
      if (segment.matrices && array == &Segment::origin) continue;  // one workspace for one batch after another
      add(segment.*array, step_.state_dtype, false);
    }
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  const auto words = [](const Span& span) {
    return (span.is_parameter ? "parameter " : "state of parameter ") + std::to_string(span.index);
  };
  for (std::size_t k = 1; k < spans.size(); ++k) {
    const Span *a = &spans[k - 1], *b = &spans[k];
    if (a->begin + a->bytes <= b->begin) continue;
    if (a->index > b->index) std::swap(a, b);
    const bool advise = a->is_parameter && b->is_parameter;
    throw invalid_argument(words(*a) + " and " + words(*b) + " share memory" +
                           (advise ? "; register one Parameter for both" : ""));
  }
  overlaps_checked_ = true;
}

// ---- calls -------------------------------------------------------------------------------------------------------

void TensorTable::check_laid_out(const char* call) const {
  if (!reader_) throw invalid_argument(std::string(call) + " needs lay_out() first");
}

void TensorTable::set_groups(const StepInputs& in) {
  const std::size_t groups = groups_.size();
  if (in.lr.size() != groups || in.weight_decay.size() != groups || in.maximize.size() != groups) {
    throw invalid_argument("expected one lr, weight_decay and maximize for each of " + std::to_string(groups) +
                           " groups");
  }
  if (!in.lr_on_device.empty() && in.lr_on_device.size() != groups) {
    throw invalid_argument("lr_on_device has " + std::to_string(in.lr_on_device.size()) + " entries for " +
                           std::to_string(groups) + " groups");
  }
  for (std::size_t k = 0; k < groups; ++k) {
    groups_[k].lr = in.lr[k];
    groups_[k].weight_decay = in.weight_decay[k];
    groups_[k].sign = in.maximize[k] ? -1.0 : 1.0;
  }
}

double TensorTable::digest() const { return digest_of(step_.options, step_.groups, step_.n_groups, agreed); }

std::optional<bool> TensorTable::step(const Tensors& at, const StepInputs& in) {
  const StepGuard busy(*this);
  check_laid_out("step()");
  set_groups(in);
  if (!on_device() && (!in.lr_on_device.empty() || in.loss_on_device || in.grad_scale || in.found_inf)) {
    throw invalid_argument("lr, loss, grad_scale and found_inf must be host values if parameters are on the CPU");
  }
  DropLive drop{live_};
  if (!follow(at, Reads::gradients)) return std::nullopt;
  check_state();
  matrix_moves_ = 0;
  if (!segments_.empty() && segments_[0].steps == nullptr) {
    throw invalid_argument("a step needs the key of a parameter's step count");
  }
  step_.active_set = in.active_set;
  step_.loss = in.loss;
  step_.threads = std::max(in.threads, 1);
  if (step_.exchange.ranks > 0) step_.digest = digest();
  if (on_device()) {
    if (step_.n_segments == 0 && step_.exchange.ranks == 0) return true;
    cuda_.lr = in.lr_on_device;
    cuda_.loss = in.loss_on_device;
    cuda_.grad_scale = in.grad_scale;
    cuda_.found_inf = in.found_inf;
    {
      const py::gil_scoped_release released;
      cuda_step(step_, cuda_);
    }
    drop.keep = has_matrices_;
    return true;
  }
  const CpuKernels& cpu = cpu_kernels();
  const double skipped = step_.scalars->skipped_steps;
  {
    const py::gil_scoped_release released;
    cpu.step(step_);
  }
  drop.keep = has_matrices_ && step_.scalars->skipped_steps == skipped;
  return step_.scalars->skipped_steps == skipped;
}

void TensorTable::set_origins(const BufferPtr& workspace,
                              const std::vector<std::pair<std::size_t, std::int64_t>>& parts) {
  const StepGuard busy(*this);
  check_laid_out("set_origins()");
  check_buffer("workspace", *workspace, kDTypeNames[static_cast<int>(arithmetic_dtype())]);
  if (workspace->readonly()) throw invalid_argument("workspace is read-only");
  for (const auto& [i, begin] : parts) {
    if (i >= segments_.size() || !segments_[i].matrices || begin < 0 ||
        segments_[i].n > workspace->size() - std::min(begin, workspace->size())) {
      throw invalid_argument("segment " + std::to_string(i) + " has no matrices, or its part from " +
                             std::to_string(begin) + " does not fit the workspace of " +
                             std::to_string(workspace->size()));
    }
  }
  for (const auto& [i, begin] : parts) {
    segments_[i].origin = static_cast<char*>(workspace->data()) + begin * size_of(arithmetic_dtype());
  }
  origins_ = workspace;
}

void TensorTable::matrix_pass(MatrixPass kind, std::int64_t first_tile, std::int64_t last_tile, int threads) {
  const StepGuard busy(*this);
  check_laid_out("matrix_pass()");
  if (live_.empty()) throw invalid_argument("matrix_pass() needs a step that was not skipped before it");
  if (first_tile < 0 || last_tile < first_tile || last_tile > tiles_of(step_.n)) {
    throw invalid_argument("the tiles from " + std::to_string(first_tile) + " to " + std::to_string(last_tile) +
                           " are not in the index of " + std::to_string(tiles_of(step_.n)));
  }
  for (const Segment& segment : segments_) {
    const bool inside = segment.offset < last_tile * kTile && segment.offset + segment.n > first_tile * kTile;
    if (inside && (!segment.matrices || segment.origin == nullptr)) {
      throw invalid_argument("the tiles from " + std::to_string(first_tile) + " to " + std::to_string(last_tile) +
                             " have a segment that is not matrices, or without an origin");
    }
  }
  step_.threads = std::max(threads, 1);
  run([&] { cuda_matrix_pass(step_, cuda_, kind, first_tile, last_tile); },
      [&](const CpuKernels& cpu) { cpu.matrix_pass(step_, kind, first_tile, last_tile); });
  if (kind == MatrixPass::move) ++matrix_moves_;
}

void TensorTable::end_matrices() {
  const StepGuard busy(*this);
  live_.clear();
}

std::optional<std::tuple<double, double, double>> TensorTable::state_norms(const Tensors& at, int threads) {
  const StepGuard busy(*this);
  check_laid_out("state_norms()");
  const DropLive drop{live_};
  if (!follow(at, Reads::state)) return std::nullopt;
  if (!segments_.empty() && segments_[0].direction == nullptr) throw invalid_argument("state_norms() needs direction");
  double gg = 0, dd = 0, gd = 0;
  step_.threads = std::max(threads, 1);
  if (step_.n_segments > 0) {
    run([&] { cuda_state_norms(step_, cuda_, &gg, &dd, &gd); },
        [&](const CpuKernels& cpu) { cpu.state_norms(step_, &gg, &dd, &gd); });
  }
  return std::make_tuple(gg, dd, gd);
}

bool TensorTable::last_move(const Tensors& at, int threads) {
  const StepGuard busy(*this);
  check_laid_out("last_move()");
  refuse_bfloat16_state("last_move()");
  const DropLive drop{live_};
  if (!follow(at, Reads::state)) return false;
  for (const Segment& segment : segments_) {
    if (!segment.grad_prev || !segment.direction || !segment.diagonal) {
      throw invalid_argument("last_move() needs grad_prev, direction and the preconditioner's diagonal");
    }
  }
  step_.threads = std::max(threads, 1);
  run([&] { cuda_last_move(step_, cuda_); }, [&](const CpuKernels& cpu) { cpu.last_move(step_); });
  return true;
}

std::optional<std::vector<double>> TensorTable::descend(const Tensors& at, const Descent& pass, int threads) {
  const StepGuard busy(*this);
  check_laid_out("descend()");
  const DropLive drop{live_};
  if (!follow(at, pass.kind == Descent::Kind::trial ? Reads::parameters : Reads::gradients)) return std::nullopt;
  return run_descent_pass(pass, threads);
}

void complete_step(const py::function& complete) {
  constexpr int kAttempts = 4;
  std::optional<py::error_already_set> raised;
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    try {
      complete();
      break;
    } catch (const py::error_already_set& error) {
      if (!raised) raised = error;
    }
  }
  if (raised) throw py::error_already_set(*raised);
}

void TensorTable::join_stream() {
  const StepGuard busy(*this);
  if (on_device()) cuda_join_stream(cuda_);
}

}  // namespace fastnlcg
