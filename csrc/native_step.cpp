#include "native_step.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "passes_descent.h"
#include "step_cpu.h"

namespace fastnlcg {
namespace {

std::invalid_argument invalid_argument(const std::string& message) { return std::invalid_argument(message); }

// The value of an enum with this name.
template <class E, std::size_t N>
E named(const char* what, const char* const (&names)[N], const std::string& name) {
  for (std::size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<E>(i);
  }
  throw invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}
DType dtype_from(const std::string& name) {
  for (std::size_t i = 0; i < std::size(kDTypeNames); ++i) {
    if (name == kDTypeNames[i]) return static_cast<DType>(i);
  }
  throw py::type_error("dtype " + name + " is not supported; expected float64, float32, bfloat16 or float16");
}

void read_option(bool& to, const py::handle& from) { to = py::cast<bool>(from); }
void read_option(double& to, const py::handle& from) { to = py::cast<double>(from); }
void read_option(Preconditioner& to, const py::handle& from) {
  to = named<Preconditioner>("preconditioner", kPreconditionerNames, py::cast<std::string>(from));
}
void read_option(UpdateRule& to, const py::handle& from) {
  to = named<UpdateRule>("update", kUpdateRuleNames, py::cast<std::string>(from));
}

int ordinal_of(const std::string& device) {
  if (device == "cpu") return -1;
  if (device.rfind("cuda:", 0) != 0 || device.size() == 5) throw invalid_argument("no kernels for " + device);
  return std::stoi(device.substr(5));
}

// Everything in a Python list, which may be shorter or longer than it should.
PyObject* item(const py::list& list, std::size_t i) { return PyList_GET_ITEM(list.ptr(), static_cast<Py_ssize_t>(i)); }

PyObject* attribute(PyObject* object, PyObject* name) {
  PyObject* const value = PyObject_GetAttr(object, name);
  if (value == nullptr) throw py::error_already_set();
  return value;
}

DeviceNumber device_number(const NativeStep::Number& number) {
  if (!number) return {};
  if (number->first == 0) throw invalid_argument("a number on the device without an address");
  return {reinterpret_cast<const void*>(number->first), dtype_from(number->second)};
}

// The streams of `needed` that a segment lacks.
std::string missing_in(unsigned needed, const Segment& segment) {
  if ((needed & kGradPrev) && segment.grad_prev == nullptr) return "grad_prev";
  if ((needed & kD) && segment.direction == nullptr) return "direction";
  if ((needed & kDiagonal) && segment.diagonal == nullptr) return "the preconditioner's diagonal";
  if ((needed & kOrigin) && segment.origin == nullptr) return "origin";
  return "";
}

// The state that the passes of these options need and that a segment lacks.
std::string missing_state(const Options& options, const Segment& segment) {
  return missing_in(with_preconditioner(options.preconditioner,
                                        [&](auto preconditioner) { return preconditioner.state_tensors(options); }),
                    segment);
}

// At the end of a call, however it ends.
struct DropLive {
  std::vector<py::object>& live;
  ~DropLive() { live.clear(); }
};

}  // namespace

NativeStep::NativeStep(const std::string& state_dtype, const std::string& device, std::uintptr_t stream)
    : device_(ordinal_of(device)), device_name_(device), scalars_layout_{{kScalars}, {1}} {
  step_.state_dtype = dtype_from(state_dtype);
  if (step_.state_dtype != DType::f64 && step_.state_dtype != DType::f32) {
    throw invalid_argument("state must be float64 or float32");
  }
  cuda_.device = std::max(device_, 0);
  cuda_.stream = reinterpret_cast<void*>(stream);
}
NativeStep::~NativeStep() { cuda_forget(cuda_); }

void NativeStep::set_options(const py::dict& options) {
  const StepGuard busy(*this);
  Options next;
  std::size_t found = 0;
  each_option(next, [&](const char* name, auto& value) {
    if (!options.contains(name)) throw invalid_argument(std::string("no option ") + name);
    read_option(value, options[name]);
    ++found;
  });
  if (options.size() != found) throw invalid_argument("an option that is none");
  step_.options = next;
}

// ---- a table over torch's tensors --------------------------------------------------------------------------------

void NativeStep::lay_out(std::int64_t n, const std::vector<TableRow>& table, int groups,
                         const std::vector<std::string>& keys, const py::capsule& exchange,
                         const py::object& tensor_type, const BufferPtr& workspace) {
  const StepGuard busy(*this);
  if (n < 0 || n > std::int64_t{1} << (on_device() ? 40 : 60)) {
    throw invalid_argument("n is " + std::to_string(n) + ", expected 0 <= n <= 2^" + (on_device() ? "40" : "60"));
  }
  if (groups < 0) throw invalid_argument(std::to_string(groups) + " groups");
  if (keys.size() != 5) throw invalid_argument("five keys, of grad_prev, direction, diagonal, origin and steps");
  const TensorReader reader(exchange.ptr(), tensor_type.ptr(), device_);
  std::vector<Segment> segments;
  std::vector<Layout> layouts;
  std::int64_t end = 0;
  for (const auto& [offset, group, index, dtype_name, shape, strides, place] : table) {
    const std::string where = "segment " + std::to_string(segments.size());
    std::int64_t size = 1;
    for (const std::int64_t extent : shape) {
      if (extent < 0 || __builtin_mul_overflow(size, extent, &size)) {
        throw invalid_argument(where + ": negative extent or overflow in a shape");
      }
    }
    if (strides.size() != shape.size()) throw invalid_argument(where + ": expected one stride a dimension");
    if (size <= 0 || offset < end || offset > n || size > n - offset) {
      throw invalid_argument(where + ": [" + std::to_string(offset) + ", +" + std::to_string(size) +
                             ") is empty, overlaps the one before, or leaves the index of " + std::to_string(n));
    }
    if (group < 0 || group >= groups) throw invalid_argument(where + ": no group " + std::to_string(group));
    const DType dtype = dtype_from(dtype_name);
    if ((dtype == DType::f64) != (step_.state_dtype == DType::f64)) {
      throw py::type_error(where + ": float64 parameters need float64 state, and no others may have it");
    }
    const auto& [begin, run, skip] = place;
    if (run < 0) throw invalid_argument(where + ": a run of " + std::to_string(run));
    Segment segment = {};
    segment.offset = offset, segment.n = size, segment.group = group, segment.dtype = dtype;
    segment.place = {begin, run, skip, index};
    segments.push_back(segment);
    layouts.push_back({shape, strides});
    end = offset + size;
  }
  if (segments.size() > (std::size_t{1} << 30)) throw invalid_argument(std::to_string(segments.size()) + " segments");
  if (on_device()) {
    if (!workspace) throw invalid_argument("a workspace is needed on a GPU");
    check_buffer("workspace", *workspace, "float64");
    const auto rows = static_cast<std::int64_t>(segments.size());
    const std::int64_t needed = workspace_doubles(n, rows, groups);
    if (workspace->size() < needed || workspace->readonly()) {
      throw invalid_argument("a workspace of " + std::to_string(workspace->size()) + " doubles, expected " +
                             std::to_string(needed) + " that can be written");
    }
    cuda_.workspace = static_cast<double*>(workspace->data());
    cuda_.max_segments = rows;
    cuda_.written.clear();
    cuda_.tables_unknown = false;
  } else if (workspace) {
    throw invalid_argument("a workspace is for a GPU");
  } else {
    partials_.resize(static_cast<std::size_t>(partials_needed(n)));
  }
  segments_ = std::move(segments);
  layouts_ = std::move(layouts);
  groups_.assign(static_cast<std::size_t>(groups), Group{0, 0, 0, 1, nullptr});
  bias_.resize(segments_.size());
  workspace_ = workspace;
  tensor_type_ = tensor_type;
  reader_ = reader;
  keys_.clear();
  for (const std::string& key : keys) {
    keys_.push_back(key.empty() ? py::object()
                                : py::reinterpret_steal<py::object>(PyUnicode_InternFromString(key.c_str())));
  }
  overlaps_checked_ = false;
  step_.segments = segments_.data();
  step_.n_segments = static_cast<std::int64_t>(segments_.size());
  step_.n = step_.owned = n;
  step_.groups = groups_.data();
  step_.n_groups = groups;
  step_.bias = bias_.data();
  step_.partials = partials_.data();
  step_.exchange = {};
  laid_out_ = true;
  bound_ = false;
}

void NativeStep::set_exchange(const BufferPtr& mine, const BufferPtr& all, const BufferPtr& owned,
                              std::int64_t elements, bool every_decision, py::object gather) {
  const StepGuard busy(*this);
  const std::int64_t ranks = owned->size();
  check_buffer("mine", *mine, "float64");
  check_buffer("all", *all, "float64");
  check_buffer("owned", *owned, "float64");
  if (ranks < 1 || ranks > std::int64_t{1} << 24) throw invalid_argument(std::to_string(ranks) + " ranks");
  if (mine->size() != kColumns || all->size() != ranks * kColumns) throw invalid_argument("rows of another length");
  if (mine->readonly() || all->readonly()) throw invalid_argument("rows that are read-only");
  if (elements != step_.n && (elements < 0 || elements > step_.n || elements % chunk_elements(step_.n) != 0)) {
    throw invalid_argument(std::to_string(elements) + " owned elements of " + std::to_string(step_.n));
  }
  mine_ = mine, all_ = all, owned_ = owned;
  gather_ = std::move(gather);
  step_.owned = elements;
  step_.exchange = RankGather{static_cast<int>(ranks),
                              every_decision,
                              static_cast<RankRecord*>(mine->data()),
                              static_cast<const RankRecord*>(all->data()),
                              static_cast<const double*>(owned->data()),
                              [](void* self) {
                                const py::gil_scoped_acquire held;
                                static_cast<NativeStep*>(self)->gather_();
                              },
                              this};
}

// Whether optimizer.state holds the entries that were laid out, in this order. Keys that are no tensors are others'.
bool NativeStep::holds(const Tensors& at) const {
  if (at.state.is_none()) return true;
  if (!PyDict_Check(at.state.ptr())) return false;
  const auto held = py::reinterpret_borrow<py::list>(at.held);
  PyObject *key = nullptr, *value = nullptr;
  Py_ssize_t position = 0;
  std::size_t i = 0;
  while (PyDict_Next(at.state.ptr(), &position, &key, &value)) {
    if (2 * i + 1 < held.size() && key == item(held, 2 * i) && value == item(held, 2 * i + 1)) {
      ++i;
    } else if (!PyUnicode_Check(key)) {
      return false;
    }
  }
  return 2 * i == held.size();
}

// The addresses of segment i's state.
bool NativeStep::follow_state(const Tensors& at, std::size_t i) {
  PyObject* const entry = item(at.entries, i);
  if (!PyDict_Check(entry)) return false;
  Segment& segment = segments_[i];
  void** const addresses[] = {&segment.grad_prev, &segment.direction, &segment.diagonal, &segment.origin};
  constexpr std::size_t kSteps = std::size(addresses);
  for (std::size_t k = 0; k <= kSteps; ++k) {
    if (!keys_[k]) continue;
    PyObject* const tensor = PyDict_GetItemWithError(entry, keys_[k].ptr());
    if (tensor == nullptr) {
      if (PyErr_Occurred()) throw py::error_already_set();
      return false;
    }
    if (!reader_->is_plain(tensor)) return false;
    void* const found = k == kSteps ? reader_->address(tensor, DType::f64, number_)
                                    : reader_->address(tensor, step_.state_dtype, layouts_[i]);
    if (found == nullptr) return false;
    if (found != (k == kSteps ? segment.steps : *addresses[k])) {
      if (!is_as_it_looks(tensor)) return false;
      overlaps_checked_ = false;
    }
    if (k == kSteps) {
      segment.steps = static_cast<double*>(found);
    } else {
      *addresses[k] = found;
    }
    live_.push_back(py::reinterpret_borrow<py::object>(tensor));
  }
  return true;
}

bool NativeStep::follow(const Tensors& at, Reads reads) {
  const bool with_parameters = reads != Reads::state, with_gradients = reads == Reads::gradients;
  live_.clear();
  const std::size_t n = segments_.size();
  if (at.entries.size() != n || at.alpha_prev.size() != groups_.size()) return false;
  if (with_parameters && at.params.size() != n) return false;
  const bool given = !at.gradients.is_none();
  if (given && (!py::isinstance<py::list>(at.gradients) || py::len(at.gradients) != n)) return false;
  if (!holds(at)) return false;
  static PyObject* const grad_name = PyUnicode_InternFromString("grad");
  static PyObject* const is_neg_name = PyUnicode_InternFromString("is_neg");
  if (with_gradients) {
    for (const py::handle p : at.resting) {
      const auto g = py::reinterpret_steal<py::object>(attribute(p.ptr(), grad_name));
      if (!g.is_none()) return false;
    }
  }
  live_.reserve(6 * n + 1 + groups_.size());
  for (std::size_t i = 0; i < n; ++i) {
    Segment& segment = segments_[i];
    // They may have been freed since the last step. A trial does not read g, and leaves the address as it was, so that a
    // GPU's table of segments need not be written before and after it.
    if (reads != Reads::parameters) segment.g = nullptr;
    if (!with_parameters) segment.p = nullptr;
    if (with_parameters) {
      PyObject* const p = item(at.params, i);
      void* const p_found = reader_->address(p, segment.dtype, layouts_[i]);
      if (p_found == nullptr) return false;
      if (segment.p != p_found) {
        if (!is_as_it_looks(p)) return false;
        overlaps_checked_ = false;
      }
      segment.p = p_found;
    }
    if (with_gradients) {
      auto g = given ? py::reinterpret_borrow<py::object>(item(py::reinterpret_borrow<py::list>(at.gradients), i))
                     : py::reinterpret_steal<py::object>(attribute(item(at.params, i), grad_name));
      if (!reader_->is_plain(g.ptr())) return false;
      segment.g = reader_->address(g.ptr(), segment.dtype, layouts_[i]);
      if (segment.g == nullptr) return false;
      const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(g.ptr(), is_neg_name));
      if (!negated) throw py::error_already_set();
      if (negated.ptr() != Py_False) return false;
      live_.push_back(std::move(g));
    }
    if (!follow_state(at, i)) return false;
  }
  for (std::size_t k = 0; k < groups_.size(); ++k) {
    PyObject* const tensor = item(at.alpha_prev, k);
    groups_[k].alpha_prev = static_cast<double*>(reader_->address(tensor, DType::f64, number_));
    if (groups_[k].alpha_prev == nullptr) return false;
    live_.push_back(py::reinterpret_borrow<py::object>(tensor));
  }
  step_.scalars = static_cast<Scalars*>(reader_->address(at.scalars.ptr(), DType::f64, scalars_layout_));
  if (step_.scalars == nullptr) return false;
  live_.push_back(at.scalars);
  if (with_parameters && !overlaps_checked_) check_overlaps();
  return true;
}

// Two parameters in one place would be moved twice, or by half, as the threads happen to run; so would their state. Looked
// at only where an address has changed.
void NativeStep::check_overlaps() {
  struct Span {
    const char* begin;
    std::int64_t bytes;
    const char* what;
    std::uint32_t index;
  };
  std::vector<Span> spans;
  const std::int64_t state_size = size_of(step_.state_dtype);
  for (const Segment& segment : segments_) {
    const auto add = [&](const void* at, std::int64_t size, const char* what) {
      if (at != nullptr) spans.push_back({static_cast<const char*>(at), segment.n * size, what, segment.place.index});
    };
    add(segment.p, size_of(segment.dtype), "parameter");
    add(segment.grad_prev, state_size, "state of parameter");
    add(segment.direction, state_size, "state of parameter");
    add(segment.diagonal, state_size, "state of parameter");
    add(segment.origin, state_size, "state of parameter");
  }
  std::sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (std::size_t k = 1; k < spans.size(); ++k) {
    const Span *a = &spans[k - 1], *b = &spans[k];
    if (a->begin + a->bytes <= b->begin) continue;
    if (a->index > b->index) std::swap(a, b);
    const std::string advice = a->what == b->what && a->what[0] == 'p' ? "; register one Parameter for both" : "";
    throw invalid_argument(std::string(a->what) + " " + std::to_string(a->index) + " and " + b->what + " " +
                           std::to_string(b->index) + " share memory" + advice);
  }
  overlaps_checked_ = true;
}

void NativeStep::set_groups(const Arguments& a) {
  const std::size_t groups = groups_.size();
  if (a.lr.size() != groups || a.weight_decay.size() != groups || a.maximize.size() != groups) {
    throw invalid_argument("one lr, weight_decay and maximize per group");
  }
  for (std::size_t k = 0; k < groups; ++k) {
    groups_[k].lr = a.lr[k];
    groups_[k].weight_decay = a.weight_decay[k];
    groups_[k].sign = a.maximize[k] ? -1.0 : 1.0;
  }
}

double NativeStep::digest() const {
  std::uint64_t hash = 1469598103934665603u;  // FNV-1a, over the bits of doubles
  const auto add = [&](double x) {
    std::uint64_t bits;
    if (x != x) x = 0.0;  // a number on the device, which the host does not know
    std::memcpy(&bits, &x, sizeof(bits));
    for (int k = 0; k < 64; k += 8) hash = (hash ^ (bits >> k & 0xff)) * 1099511628211u;
  };
  each_option(step_.options, [&](const char*, const auto& value) { add(static_cast<double>(value)); });
  for (const Group& group : groups_) add(group.lr), add(group.weight_decay), add(group.sign);
  return static_cast<double>(hash >> 11);
}

std::optional<bool> NativeStep::step(const Tensors& at, const Arguments& a) {
  const StepGuard busy(*this);
  if (!laid_out_) throw invalid_argument("a step needs lay_out() first");
  set_groups(a);
  const DropLive drop{live_};
  if (!follow(at, Reads::gradients)) return std::nullopt;
  if (!segments_.empty()) {  // all have the same keys
    if (const std::string missing = missing_state(step_.options, segments_[0]); !missing.empty()) {
      throw invalid_argument("a step needs " + missing);
    }
    if (segments_[0].steps == nullptr) throw invalid_argument("a step needs the key of a parameter's steps");
  }
  step_.active_set = a.active_set;
  step_.loss = a.loss;
  step_.threads = std::max(a.threads, 1);
  if (step_.exchange.ranks > 0) step_.digest = digest();
  if (on_device()) {
    if (step_.n_segments == 0 && step_.exchange.ranks == 0) return true;
    if (!a.lr_on_device.empty() && a.lr_on_device.size() != groups_.size()) throw invalid_argument("one lr per group");
    cuda_.lr.clear();
    for (const Number& number : a.lr_on_device) cuda_.lr.push_back(device_number(number));
    cuda_.loss = device_number(a.loss_on_device);
    cuda_.grad_scale = device_number(a.grad_scale);
    cuda_.found_inf = device_number(a.found_inf);
    const py::gil_scoped_release released;
    cuda_step(step_, cuda_);
    return true;
  }
  if (!a.lr_on_device.empty() || a.loss_on_device || a.grad_scale || a.found_inf) {
    throw invalid_argument("numbers on a device, for the CPU");
  }
  const CpuKernels& cpu = cpu_kernels();
  const double skipped = step_.scalars->skipped_steps;
  {
    const py::gil_scoped_release released;
    cpu.step(step_);
  }
  return step_.scalars->skipped_steps == skipped;
}

std::optional<std::tuple<double, double, double>> NativeStep::state_norms(const Tensors& at, int threads) {
  const StepGuard busy(*this);
  if (!laid_out_) throw invalid_argument("norms need lay_out() first");
  const DropLive drop{live_};
  if (!follow(at, Reads::state)) return std::nullopt;
  if (!segments_.empty() && segments_[0].direction == nullptr) throw invalid_argument("norms need direction");
  double gg = 0, dd = 0, gd = 0;
  step_.threads = std::max(threads, 1);
  if (step_.n_segments > 0) {
    run([&] { cuda_state_norms(step_, cuda_, &gg, &dd, &gd); },
        [&](const CpuKernels& cpu) { cpu.state_norms(step_, &gg, &dd, &gd); });
  }
  return std::make_tuple(gg, dd, gd);
}

bool NativeStep::last_move(const Tensors& at, int threads) {
  const StepGuard busy(*this);
  if (!laid_out_) throw invalid_argument("the last move needs lay_out() first");
  const DropLive drop{live_};
  if (!follow(at, Reads::state)) return false;
  for (const Segment& segment : segments_) {
    if (!segment.grad_prev || !segment.direction || !segment.diagonal) throw invalid_argument("missing state");
  }
  step_.threads = std::max(threads, 1);
  run([&] { cuda_last_move(step_, cuda_); }, [&](const CpuKernels& cpu) { cpu.last_move(step_); });
  return true;
}

std::optional<std::vector<double>> NativeStep::descend(const std::optional<Tensors>& at, const Descent& pass,
                                                       int threads) {
  const StepGuard busy(*this);
  if (at ? !laid_out_ : !bound_)
    throw invalid_argument(at ? "a pass needs lay_out() first" : "a pass needs bind() first");
  const DropLive drop{live_};
  const bool trial = pass.kind == Descent::Kind::trial;
  if (at && !follow(*at, trial ? Reads::parameters : Reads::gradients)) return std::nullopt;
  std::vector<double> sums(kMaxSums + 1);
  if (segments_.empty()) return sums;
  if (const std::string missing = missing_in(state_of(pass), segments_[0]); !missing.empty()) {
    throw invalid_argument("the pass needs " + missing);
  }
  if (trial && segments_[0].p == nullptr) throw invalid_argument("the pass needs p");
  if (!trial && segments_[0].g == nullptr) throw invalid_argument("the pass needs g");
  if (!at) {
    for (const BufferPtr& buffer : {p_, grad_prev_, direction_, diagonal_, origin_}) {
      if (buffer && buffer->readonly()) throw invalid_argument("a buffer of the pass is read-only");
    }
  }
  for (Group& group : groups_) group.weight_decay = 0.0, group.sign = group.factor = 1.0;
  step_.threads = std::max(threads, 1);
  run([&] { cuda_descend(step_, cuda_, pass, sums.data()); },
      [&](const CpuKernels& cpu) { cpu.descend(step_, pass, sums.data()); });
  return sums;
}

// ---- flat buffers ------------------------------------------------------------------------------------------------

void NativeStep::check_buffer(const char* name, const Buffer& buffer, const std::string& dtype) const {
  if (buffer.device() != device_name_) {
    throw invalid_argument(std::string(name) + " is on " + buffer.device() + ", expected " + device_name_);
  }
  if (buffer.dtype() != dtype) {
    throw py::type_error(std::string(name) + " has dtype " + buffer.dtype() + ", expected " + dtype);
  }
  if (!buffer.contiguous()) throw invalid_argument(std::string(name) + " is not contiguous");
  if (buffer.size() > 0 && buffer.data() == nullptr) throw invalid_argument(std::string(name) + " has no memory");
}

void NativeStep::bind(const BufferPtr& p, const BufferPtr& g, const BufferPtr& grad_prev, const BufferPtr& direction,
                      const BufferPtr& diagonal, const BufferPtr& origin, double steps) {
  const StepGuard busy(*this);
  const BufferPtr& given = g ? g : p;
  if (!given) throw invalid_argument("p or g is needed");
  if (!(steps >= 0.0 && steps <= 9007199254740992.0)) throw invalid_argument("steps out of range");
  const std::int64_t n = given->size();
  if (n > std::int64_t{1} << 60) throw invalid_argument("n is " + std::to_string(n) + ", expected 0 <= n <= 2^60");
  const DType dtype = dtype_from(given->dtype());
  if ((dtype == DType::f64) != (step_.state_dtype == DType::f64)) {
    throw py::type_error("p and g are " + given->dtype() + ", the state is " +
                         kDTypeNames[static_cast<int>(step_.state_dtype)] +
                         "; float64 needs float64 state, and no other");
  }
  const auto address = [&](const char* name, const BufferPtr& buffer, const std::string& expected, bool written) {
    if (!buffer) return static_cast<void*>(nullptr);
    check_buffer(name, *buffer, expected);
    if (written && buffer->readonly()) throw invalid_argument(std::string(name) + " is read-only");
    if (buffer->size() != n) {
      throw invalid_argument(std::string(name) + " has " + std::to_string(buffer->size()) + " elements beside " +
                             std::to_string(n));
    }
    return buffer->data();
  };
  const std::string state = kDTypeNames[static_cast<int>(step_.state_dtype)];
  Segment segment = {};
  segment.p = address("p", p, given->dtype(), true);
  segment.g = address("g", g, given->dtype(), false);
  segment.grad_prev = address("grad_prev", grad_prev, state, false);
  segment.direction = address("direction", direction, state, false);
  segment.diagonal = address("diagonal", diagonal, state, false);
  segment.origin = address("origin", origin, state, false);
  segment.steps = &own_steps_;
  segment.n = n;
  segment.dtype = dtype;
  own_steps_ = steps;
  p_ = p, g_ = g, grad_prev_ = grad_prev, direction_ = direction, diagonal_ = diagonal;
  origin_ = origin;
  segments_.clear();
  if (n > 0) segments_.push_back(segment);
  layouts_.clear();
  groups_.assign(1, Group{0, 0, 0, 1, &own_alpha_prev_});
  bias_.resize(1);
  if (!on_device()) partials_.resize(static_cast<std::size_t>(partials_needed(n)));
  cuda_.workspace = nullptr;
  step_.segments = segments_.data();
  step_.n_segments = static_cast<std::int64_t>(segments_.size());
  step_.n = step_.owned = n;
  step_.groups = groups_.data();
  step_.n_groups = 1;
  step_.bias = bias_.data();
  step_.partials = partials_.data();
  step_.exchange = {};
  laid_out_ = false;
  bound_ = true;
}

template <class OnDevice, class OnCpu>
void NativeStep::run(OnDevice&& device_kernel, OnCpu&& cpu_kernel) {
  if (on_device()) {
    const py::gil_scoped_release released;
    device_kernel();
  } else {
    const CpuKernels& cpu = cpu_kernels();
    const py::gil_scoped_release released;
    cpu_kernel(cpu);
  }
}

void NativeStep::prepare_part(double alpha, double alpha_prev, double weight_decay, int threads) {
  if (!bound_) throw invalid_argument("a part needs bind() first");
  own_alpha_prev_ = alpha_prev;
  groups_[0] = {0, alpha, weight_decay, 1, &own_alpha_prev_};
  step_.threads = std::max(threads, 1);
}

namespace {
void need(const BufferPtr& buffer, const char* name, bool written) {
  if (!buffer) throw invalid_argument(std::string(name) + " is needed");
  if (written && buffer->readonly()) throw invalid_argument(std::string(name) + " is read-only");
}
}  // namespace

bool NativeStep::flat_step(const BufferPtr& scalars, double lr, double weight_decay, bool maximize, double loss,
                           int threads) {
  const StepGuard busy(*this);
  prepare_part(0, 0, weight_decay, threads);
  need(p_, "p", true);
  need(g_, "g", false);
  for (const auto& [buffer, name] :
       {std::pair{&grad_prev_, "grad_prev"}, {&direction_, "direction"}, {&diagonal_, "diagonal"}}) {
    if (*buffer) need(*buffer, name, true);
  }
  need(scalars, "scalars", true);
  if (scalars->device() != kHostDevice || scalars->dtype() != "float64" || scalars->size() != kScalars + 2 ||
      !scalars->contiguous()) {
    throw invalid_argument("scalars are not " + std::to_string(kScalars + 2) + " doubles of the CPU");
  }
  if (!segments_.empty()) {
    if (const std::string missing = missing_state(step_.options, segments_[0]); !missing.empty()) {
      throw invalid_argument("a step needs " + missing);
    }
  }
  double* const numbers = static_cast<double*>(scalars->data());
  if (!(numbers[kScalars + 1] >= 0.0 && numbers[kScalars + 1] <= 9007199254740992.0)) {
    throw invalid_argument("updates out of range");
  }
  step_.scalars = reinterpret_cast<Scalars*>(numbers);
  groups_[0] = {lr, 0, weight_decay, maximize ? -1.0 : 1.0, numbers + kScalars};
  step_.active_set = 0.0;
  step_.loss = loss;
  if (segments_.empty()) return true;
  segments_[0].steps = numbers + kScalars + 1;
  const double skipped = step_.scalars->skipped_steps;
  run([&] { cuda_flat_step(step_, cuda_); }, [&](const CpuKernels& cpu) { cpu.step(step_); });
  return step_.scalars->skipped_steps == skipped;
}

std::tuple<double, double, bool> NativeStep::update_curvature(double alpha_prev, int threads) {
  const StepGuard busy(*this);
  prepare_part(0, alpha_prev, 0, threads);
  need(g_, "g", false);
  need(grad_prev_, "grad_prev", false);
  need(direction_, "direction", false);
  need(diagonal_, "diagonal", true);
  double ys = 0, shs = 0;
  bool updated = false;
  if (!segments_.empty()) {
    run([&] { updated = cuda_update_curvature(step_, cuda_, &ys, &shs); },
        [&](const CpuKernels& cpu) { updated = cpu.update_curvature(step_, &ys, &shs); });
  }
  return {ys, shs, updated};
}

std::pair<double, double> NativeStep::preconditioned_dots(int threads) {
  const StepGuard busy(*this);
  prepare_part(0, 0, 0, threads);
  need(g_, "g", false);
  if (step_.options.preconditioner != Preconditioner::none) need(diagonal_, "diagonal", false);
  double rz = 0, rz_mid = 0;
  if (!segments_.empty()) {
    run([&] { cuda_preconditioned_dots(step_, cuda_, &rz, &rz_mid); },
        [&](const CpuKernels& cpu) { cpu.preconditioned_dots(step_, &rz, &rz_mid); });
  }
  return {rz, rz_mid};
}

void NativeStep::update_direction(double alpha, double weight_decay, double beta, int threads) {
  const StepGuard busy(*this);
  prepare_part(alpha, 0, weight_decay, threads);
  need(g_, "g", false);
  need(direction_, "direction", true);
  if (grad_prev_) need(grad_prev_, "grad_prev", true);
  const bool adam = step_.options.preconditioner == Preconditioner::adam;
  if (step_.options.preconditioner != Preconditioner::none) need(diagonal_, "diagonal", adam);
  if (segments_.empty()) return;
  run([&] { cuda_update_direction(step_, cuda_, beta); },
      [&](const CpuKernels& cpu) { cpu.update_direction(step_, beta); });
}

// ---- how a step runs on a GPU ------------------------------------------------------------------------------------

void NativeStep::set_launch(const std::string& form, int blocks, int resident_tiles) {
  if (form != "automatic" && form != "one" && form != "separate") throw invalid_argument("unknown form '" + form + "'");
  cuda_.form = form == "automatic" ? CudaStep::Form::automatic
               : form == "one"     ? CudaStep::Form::one_launch
                                   : CudaStep::Form::separate_launches;
  cuda_.blocks = blocks;
  cuda_.resident_tiles = resident_tiles;
}

void NativeStep::join_stream() {
  const StepGuard busy(*this);
  if (on_device()) cuda_join_stream(cuda_);
}

}  // namespace fastnlcg
