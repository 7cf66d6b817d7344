// One optimizer's native side: the table of segments, the state's buffers, the scalars, the workspace. Pointers in, kernels
// out, the GIL released while they run.
//
// Python checks arguments and words the errors (_native.py, groups.py, parameters.py); everything that could write outside a
// buffer is checked here again. Nothing is written before every check has passed. Included by bindings.cpp alone.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "dlpack.h"
#include "passes.h"
#include "step_cpu.h"
#include "step_cuda.h"

namespace py = pybind11;

namespace fastnlcg {
namespace {

using BufferPtr = std::shared_ptr<Buffer>;

std::invalid_argument bad(const std::string& message) { return std::invalid_argument(message); }

DType dtype_from(const std::string& name) {
  if (name == "float64") return DType::f64;
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::type_error("dtype " + name + " is not supported; expected float64, float32, bfloat16 or float16");
}

UpdateRule update_from(const std::string& name) {
  if (name == "fletcher_reeves") return UpdateRule::fletcher_reeves;
  if (name == "polak_ribiere") return UpdateRule::polak_ribiere;
  if (name == "heavy_ball") return UpdateRule::heavy_ball;
  throw bad("unknown update '" + name + "'");
}

Preconditioner preconditioner_from(const std::string& name) {
  if (name == "none") return Preconditioner::none;
  if (name == "bfgs") return Preconditioner::bfgs;
  if (name == "adam") return Preconditioner::adam;
  throw bad("unknown preconditioner '" + name + "'");
}

// One optimizer's native side: the table of segments, the state's buffers, the scalars, the workspace.
class NativeStep {
 public:
  NativeStep(const std::string& state_dtype, std::int64_t n, BufferPtr grad_prev, BufferPtr direction,
             BufferPtr diagonal, BufferPtr param_steps, BufferPtr beta2_powers, int groups, const std::string& device,
             BufferPtr workspace, std::uintptr_t stream)
      : owners_{grad_prev, direction, diagonal, param_steps, beta2_powers, workspace},
        groups_(groups < 0 ? 0 : groups),
        device_(device) {
    if (on_device() && (device_.rfind("cuda:", 0) != 0 || device_.size() == 5)) throw bad("no kernels for " + device_);
    step_.state.dtype = dtype_from(state_dtype);
    if (step_.state.dtype != DType::f64 && step_.state.dtype != DType::f32)
      throw bad("state must be float64 or float32");
    if (n < 0 || n > std::int64_t{1} << 60) throw bad("n is " + std::to_string(n) + ", expected 0 <= n <= 2^60");
    step_.state.n = n;
    step_.state.grad_prev = state_pointer("grad_prev", grad_prev, state_dtype);
    step_.state.direction = state_pointer("direction", direction, state_dtype);
    step_.state.diagonal = state_pointer("diagonal", diagonal, state_dtype);
    if (param_steps) {
      check("param_steps", *param_steps, "float64");
      step_.param_steps = static_cast<double*>(param_steps->data());
      params_ = param_steps->size();
      if (beta2_powers) {
        check("beta2_powers", *beta2_powers, "float64");
        if (beta2_powers->size() != params_) throw bad("one beta2_power per parameter");
        step_.beta2_powers = static_cast<double*>(beta2_powers->data());
        if (params_ == 0) step_.beta2_powers = &own_beta2_power_;  // no memory, and not absent; nobody reads it
      }
    } else {
      step_.param_steps = &own_param_step_;
      step_.beta2_powers = &own_beta2_power_;
      params_ = 1;
    }
    for (Group& group : groups_) group = {0, 0, 0, 0, 1};
    scalars_ = {};
    scalars_.ls_scale = 1.0;
    scalars_.loss_prev = std::numeric_limits<double>::quiet_NaN();
    step_.scalars = &scalars_;
    step_.groups = groups_.data();
    step_.n_groups = static_cast<std::int64_t>(groups_.size());
    step_.counted = n;
    if (!on_device()) {
      if (workspace) throw bad("a workspace is for CUDA");
      partials_.resize(static_cast<std::size_t>(partials_needed(n)));
      step_.partials = partials_.data();
      return;
    }
    if (n > std::int64_t{1} << 40) throw bad("n is " + std::to_string(n) + ", expected at most 2^40 on a GPU");
    cuda_.device = std::stoi(device_.substr(device_.find(':') + 1));
    cuda_.stream = reinterpret_cast<void*>(stream);
    if (!workspace) return;
    check("workspace", *workspace, "float64");
    cuda_.max_segments = params_;
    const std::int64_t needed = workspace_doubles(n, params_, step_.n_groups);
    if (workspace->size() < needed) {
      throw bad("a workspace of " + std::to_string(workspace->size()) + " doubles, expected " + std::to_string(needed));
    }
    cuda_.workspace = static_cast<double*>(workspace->data());
    sync_to_device();
  }
  ~NativeStep() { cuda_forget(cuda_); }
  NativeStep(const NativeStep&) = delete;
  NativeStep& operator=(const NativeStep&) = delete;

  void set_options(const std::string& preconditioner, const std::string& update, const std::string& restart,
                   std::int64_t restart_every, double eps, double curvature_eps, double beta2, double beta_max,
                   bool skip_nonfinite, bool maximize, bool stochastic_rounding,
                   std::optional<std::array<double, 4>> line_search) {
    Options o;
    o.preconditioner = preconditioner_from(preconditioner);
    o.update = update_from(update);
    if (restart == "never") {
      o.restart = Restart::never;
    } else if (restart == "descent") {
      o.restart = Restart::descent;
    } else if (restart == "powell") {
      o.restart = Restart::powell;
    } else if (restart == "every" && restart_every > 0) {
      o.restart = Restart::every;
    } else {
      throw bad("unknown restart '" + restart + "' with period " + std::to_string(restart_every));
    }
    o.restart_every = static_cast<double>(restart_every);
    o.eps = eps;
    o.curvature_eps = curvature_eps;
    o.beta2 = beta2;
    o.beta_max = beta_max;
    o.skip_nonfinite = skip_nonfinite;
    o.maximize = maximize;
    o.stochastic_rounding = stochastic_rounding;
    o.line_search = line_search.has_value();
    if (line_search) {
      o.increase_threshold = (*line_search)[0];
      o.flat_threshold = (*line_search)[1];
      o.decrease = (*line_search)[2];
      o.increase = (*line_search)[3];
    }
    step_.options = o;
  }

  // The sums of this rank become sums over ranks. `mine` is a row of doubles, `all` one for each rank, which `gather()`
  // fills from everybody's `mine`; `counted` says whose sums are added, and `elements` how many of this rank's state.
  void set_exchange(const BufferPtr& mine, const BufferPtr& all, const BufferPtr& counted, std::int64_t elements,
                    bool every_decision, py::object gather) {
    const StepGuard busy(*this);
    const std::int64_t ranks = counted->size();
    check("mine", *mine, "float64");
    check("all", *all, "float64");
    check("counted", *counted, "float64");
    if (ranks < 1 || ranks > std::int64_t{1} << 24) throw bad(std::to_string(ranks) + " ranks");
    if (mine->size() != kColumns || all->size() != ranks * kColumns) throw bad("rows of another length");
    if (mine->readonly() || all->readonly()) throw bad("rows that are read-only");
    if (elements != step_.state.n &&
        (elements < 0 || elements > step_.state.n || elements % chunk_elements(step_.state.n) != 0)) {
      throw bad(std::to_string(elements) + " counted elements of " + std::to_string(step_.state.n));
    }
    rows_ = {mine, all, counted};
    gather_ = std::move(gather);
    step_.counted = elements;
    step_.exchange = Exchange{static_cast<int>(ranks),
                              every_decision,
                              static_cast<Row*>(mine->data()),
                              static_cast<const Row*>(all->data()),
                              static_cast<const double*>(counted->data()),
                              [](void* self) {
                                const py::gil_scoped_acquire held;
                                static_cast<NativeStep*>(self)->gather_();
                              },
                              this};
  }

  // (offset, group, param, dtype, shape, strides) per segment, in the order in which point() and refresh() see them.
  using Place = std::tuple<std::int64_t, int, int, std::string, std::vector<std::int64_t>, std::vector<std::int64_t>>;
  void set_segments(const std::vector<Place>& table) {
    const StepGuard busy(*this);
    std::vector<Segment> segments;
    std::int64_t end = 0;
    std::vector<Layout> layouts;
    for (const auto& [offset, group, param, dtype_text, shape, strides] : table) {
      std::int64_t n = 1;
      for (const std::int64_t extent : shape) {
        if (extent < 0 || __builtin_mul_overflow(n, extent, &n)) throw bad("negative extent or overflow in a shape");
      }
      if (strides.size() != shape.size()) throw bad("one stride per dimension");
      const std::string where = "segment " + std::to_string(segments.size());
      if (n <= 0 || offset < end || offset > step_.state.n || n > step_.state.n - offset) {
        throw bad(where + ": [" + std::to_string(offset) + ", +" + std::to_string(n) +
                  ") is empty, overlaps the one before, or leaves the state of " + std::to_string(step_.state.n));
      }
      if (group < 0 || group >= static_cast<int>(groups_.size()))
        throw bad(where + ": no group " + std::to_string(group));
      if (param < 0 || param >= params_) throw bad(where + ": no parameter " + std::to_string(param));
      const DType dtype = dtype_from(dtype_text);
      if ((dtype == DType::f64) != (step_.state.dtype == DType::f64)) {
        throw py::type_error(where + ": float64 parameters need float64 state, and no others may have it");
      }
      segments.push_back({nullptr, nullptr, offset, n, group, param, dtype});
      layouts.push_back({shape, strides});
      end = offset + n;
    }
    if (segments.size() > (std::size_t{1} << 30)) throw bad(std::to_string(segments.size()) + " segments");
    if (cuda_.workspace != nullptr && static_cast<std::int64_t>(segments.size()) > cuda_.max_segments) {
      throw bad(std::to_string(segments.size()) + " segments in a workspace for " + std::to_string(cuda_.max_segments));
    }
    segments_ = std::move(segments);
    apart_.clear();
    layouts_ = std::move(layouts);
    pointers_valid_ = false;
    step_.segments = segments_.data();
    step_.n_segments = static_cast<std::int64_t>(segments_.size());
  }

  void set_threads(int threads) { step_.threads = threads < 1 ? 1 : threads; }

  // Where the segments' parameters and gradients lie, as integers. The caller keeps them alive until step() returns.
  void point(const py::list& p, const py::list& g) {
    const StepGuard busy(*this);
    point(p, true);
    point(g, false);
    pointers_valid_ = true;
  }

  // The same from the tensors themselves, through torch's DLPack exchange API, in tens of nanoseconds each. False, and
  // nothing pointed, where anything but an address differs from the table: another dtype, device, shape or stride of a
  // parameter or gradient, a gradient that is missing or of another type, or one that a `resting` parameter now has.
  // Holds the gradients until step() returns.
  bool refresh(const py::capsule& exchange, const py::list& moving, const py::list& resting,
               const py::handle& tensor_type) {
    const StepGuard busy(*this);
    pointers_valid_ = false;
    const auto* api =
        static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
    if (api == nullptr) throw py::error_already_set();
    if (api->major != 1 || api->dltensor_from_py_object_no_sync == nullptr) return false;
    if (moving.size() != segments_.size()) return false;
    static PyObject* const grad_name = PyUnicode_InternFromString("grad");
    static PyObject* const is_neg_name = PyUnicode_InternFromString("is_neg");
    for (const py::handle p : resting) {
      const auto g = py::reinterpret_steal<py::object>(PyObject_GetAttr(p.ptr(), grad_name));
      if (!g) throw py::error_already_set();
      if (!g.is_none()) return false;
    }
    held_.clear();
    std::vector<py::object> held;  // dropped where the table does not fit
    held.reserve(segments_.size());
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      PyObject* p = PyList_GET_ITEM(moving.ptr(), static_cast<Py_ssize_t>(i));
      auto g = py::reinterpret_steal<py::object>(PyObject_GetAttr(p, grad_name));
      if (!g) throw py::error_already_set();
      if (reinterpret_cast<PyObject*>(Py_TYPE(g.ptr())) != tensor_type.ptr()) return false;
      DLTensor p_view, g_view;
      if (api->dltensor_from_py_object_no_sync(p, &p_view) != 0 ||
          api->dltensor_from_py_object_no_sync(g.ptr(), &g_view) != 0) {
        PyErr_Clear();  // sparse, say: the caller looks closer and words the error
        return false;
      }
      const auto negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(g.ptr(), is_neg_name));
      if (!negated) throw py::error_already_set();
      if (negated.ptr() != Py_False || !matches(p_view, i) || !matches(g_view, i)) return false;
      segments_[i].p = static_cast<char*>(p_view.data) + p_view.byte_offset;
      segments_[i].g = static_cast<char*>(g_view.data) + g_view.byte_offset;
      held.push_back(std::move(g));
    }
    held_ = std::move(held);
    pointers_valid_ = true;
    return true;
  }

  // True where the parameters changed, false where the step was skipped. On a device the answer is always true: nobody
  // has waited for the decision. Numbers on the device, (address, dtype), stand in for lr and loss where given.
  using Number = std::optional<std::pair<std::uintptr_t, std::string>>;
  bool step(const std::vector<double>& lr, const std::vector<double>& weight_decay, const std::vector<bool>& maximize,
            double set, double loss, int threads, const std::vector<Number>& lr_on_device, const Number& loss_on_device,
            const Number& grad_scale, const Number& found_inf) {
    const StepGuard busy(*this);
    if (!pointers_valid_) throw bad("a step needs point() or refresh() first");
    pointers_valid_ = false;
    const std::vector<py::object> held = std::move(held_);
    held_.clear();
    if (lr.size() != groups_.size() || weight_decay.size() != groups_.size() || maximize.size() != groups_.size())
      throw bad("one lr, weight_decay and maximize per group");
    if (const std::string missing = missing_streams(); !missing.empty()) throw bad("a step needs " + missing);
    check_overlaps();
    for (std::size_t i = 0; i < groups_.size(); ++i) {
      groups_[i].lr = lr[i];
      groups_[i].weight_decay = weight_decay[i];
      groups_[i].sign = maximize[i] ? -1.0 : 1.0;
    }
    step_.set = set;
    step_.loss = loss;
    set_threads(threads);
    if (cuda_.workspace != nullptr) {
      if (step_.n_segments == 0 && step_.exchange.ranks == 0) return true;
      if (!lr_on_device.empty() && lr_on_device.size() != groups_.size()) throw bad("one lr per group");
      cuda_.lr.clear();
      for (const Number& number : lr_on_device) cuda_.lr.push_back(device_number(number));
      cuda_.loss = device_number(loss_on_device);
      cuda_.grad_scale = device_number(grad_scale);
      cuda_.found_inf = device_number(found_inf);
      py::gil_scoped_release released;
      cuda_step(step_, cuda_);
      return true;
    }
    if (!lr_on_device.empty() || loss_on_device || grad_scale || found_inf)
      throw bad("numbers on a device, for the CPU");
    const double skipped = scalars_.skipped_steps;
    if (on_device()) {
      py::gil_scoped_release released;
      cuda_flat_step(step_, cuda_);
    } else {
      const CpuKernels& cpu = cpu_kernels();
      py::gil_scoped_release released;
      cpu.step(step_);
    }
    return scalars_.skipped_steps == skipped;
  }

  std::tuple<double, double, double> state_norms(int threads) {
    const StepGuard busy(*this);
    if (!step_.state.direction) throw bad("norms need direction");
    std::vector<Segment> segments;
    Step step = over_state(segments, threads);
    double gg = 0, dd = 0, gd = 0;
    if (cuda_.workspace != nullptr) {
      if (step.n_segments == 0) return {0, 0, 0};
      py::gil_scoped_release released;
      cuda_state_norms(step, cuda_, &gg, &dd, &gd);
    } else {
      const CpuKernels& cpu = cpu_kernels();
      py::gil_scoped_release released;
      cpu.state_norms(step, &gg, &dd, &gd);
    }
    return {gg, dd, gd};
  }

  // The sums over the last move, formed again from the state: after a checkpoint was loaded.
  void last_move(int threads) {
    const StepGuard busy(*this);
    if (!step_.state.grad_prev || !step_.state.direction || !step_.state.diagonal) throw bad("missing state");
    std::vector<Segment> segments;
    Step step = over_state(segments, threads);
    if (step.n_segments == 0) {
      scalars_.gs = scalars_.shs = 0;
    } else if (cuda_.workspace != nullptr) {
      py::gil_scoped_release released;
      cuda_last_move(step, cuda_, &scalars_.gs, &scalars_.shs);
    } else {
      const CpuKernels& cpu = cpu_kernels();
      py::gil_scoped_release released;
      cpu.last_move(step);
    }
    sync_to_device();
  }

  py::dict scalars() {
    sync_from_device();
    py::dict out;
    each_scalar(scalars_, [&](const char* name, const double& value) { out[name] = value; });
    return out;
  }
  void set_scalars(const py::dict& values) {
    const StepGuard busy(*this);
    sync_from_device();
    Scalars next = scalars_;
    each_scalar(next, [&](const char* name, double& value) {
      if (values.contains(name)) value = py::cast<double>(values[name]);
    });
    scalars_ = next;
    sync_to_device();
  }
  std::vector<double> alpha_prev() {
    sync_from_device();
    std::vector<double> out;
    for (const Group& group : groups_) out.push_back(group.alpha_prev);
    return out;
  }
  void set_alpha_prev(const std::vector<double>& values) {
    const StepGuard busy(*this);
    if (values.size() != groups_.size()) throw bad("one alpha_prev per group");
    sync_from_device();
    for (std::size_t i = 0; i < groups_.size(); ++i) groups_[i].alpha_prev = values[i];
    sync_to_device();
  }

  // beta2^k of a flat buffer.
  double beta2_power() const { return own_beta2_power_; }
  void set_beta2_power(double value) { own_beta2_power_ = value; }

  // How a step runs on a device; the bits do not depend on it. Only tests and benchmarks have a reason to.
  void set_launch(const std::string& form, int blocks, int resident_tiles) {
    if (form != "automatic" && form != "one" && form != "separate") throw bad("unknown form '" + form + "'");
    cuda_.form = form == "automatic" ? CudaStep::Form::automatic
                 : form == "one"     ? CudaStep::Form::one_launch
                                     : CudaStep::Form::separate_launches;
    cuda_.blocks = blocks;
    cuda_.resident_tiles = resident_tiles;
  }
  int launches() const { return cuda_.launches; }
  std::uintptr_t stream() const { return reinterpret_cast<std::uintptr_t>(cuda_.stream); }
  void set_stream(std::uintptr_t stream) { cuda_.stream = reinterpret_cast<void*>(stream); }

  // The parts, for one segment over buffers that this call holds.
  std::tuple<double, double, bool> update_curvature(const Buffer& g, double alpha_prev, int threads) {
    prepare(nullptr, g, 0, alpha_prev, threads);
    if (!step_.state.grad_prev || !step_.state.direction || !step_.state.diagonal) throw bad("missing state");
    double ys = 0, shs = 0;
    bool updated = false;
    run([&] { updated = cuda_update_curvature(step_, cuda_, &ys, &shs); },
        [&](const CpuKernels& cpu) { updated = cpu.update_curvature(step_, &ys, &shs); });
    return {ys, shs, updated};
  }
  std::pair<double, double> preconditioned_dots(const Buffer& g, int threads) {
    prepare(nullptr, g, 0, 0, threads);
    check_diagonal();
    double rz = 0, rz_mid = 0;
    run([&] { cuda_preconditioned_dots(step_, cuda_, &rz, &rz_mid); },
        [&](const CpuKernels& cpu) { cpu.preconditioned_dots(step_, &rz, &rz_mid); });
    return {rz, rz_mid};
  }
  void update_direction(const Buffer* p, const Buffer& g, double alpha, double weight_decay, double beta, int threads) {
    prepare(p, g, alpha, 0, threads);
    groups_[0].weight_decay = weight_decay;
    if (!step_.state.direction) throw bad("missing state");
    check_diagonal();
    run([&] { cuda_update_direction(step_, cuda_, beta); },
        [&](const CpuKernels& cpu) { cpu.update_direction(step_, beta); });
  }

 private:
  // One step at a time: a second thread gets an error, not a torn state.
  struct StepGuard {
    explicit StepGuard(NativeStep& owner) : flag(owner.busy_) {
      if (flag.exchange(true)) throw std::runtime_error("this optimizer is stepping in another thread");
    }
    ~StepGuard() { flag.store(false); }
    std::atomic<bool>& flag;
  };

  // The step over the state alone, with a table of its own: what refresh() has pointed at belongs to the step that
  // follows it, and may be gone.
  Step over_state(std::vector<Segment>& segments, int threads) {
    segments = segments_;
    for (Segment& segment : segments) segment.p = nullptr, segment.g = nullptr;
    set_threads(threads);
    Step step = step_;
    step.segments = segments.data();
    return step;
  }

  struct Layout {
    std::vector<std::int64_t> shape, strides;
  };
  // Whether a tensor is what segment i was laid out for. Dimensions of size 1 may have any stride.
  bool matches(const DLTensor& tensor, std::size_t i) const {
    static constexpr struct {
      std::uint8_t code, bits;
    } kTypes[] = {{kDLFloat, 64}, {kDLFloat, 32}, {kDLBfloat, 16}, {kDLFloat, 16}};  // in the order of DType
    const auto& type = kTypes[static_cast<int>(segments_[i].dtype)];
    const Layout& layout = layouts_[i];
    const auto ndim = static_cast<std::int32_t>(layout.shape.size());
    if (tensor.dtype.code != type.code || tensor.dtype.bits != type.bits || tensor.dtype.lanes != 1) return false;
    const bool here = on_device() ? tensor.device.device_type == kCuda && tensor.device.device_id == cuda_.device
                                  : tensor.device.device_type == kCpu;
    if (!here || tensor.ndim != ndim || tensor.data == nullptr) return false;
    if (tensor.strides == nullptr && ndim > 0) return false;
    for (std::size_t k = 0; k < layout.shape.size(); ++k) {
      if (tensor.shape[k] != layout.shape[k]) return false;
      if (tensor.shape[k] != 1 && tensor.strides[k] != layout.strides[k]) return false;
    }
    return true;
  }

  // The state that the passes of these options need and that is not there.
  std::string missing_streams() const {
    const State& state = step_.state;
    const unsigned needed = with_preconditioner(
        step_.options.preconditioner, [&](auto preconditioner) { return preconditioner.streams(step_.options); });
    if ((needed & kGradPrev) && state.grad_prev == nullptr) return "grad_prev";
    if ((needed & kD) && state.direction == nullptr) return "direction";
    if ((needed & kDiagonal) && state.diagonal == nullptr) return "the preconditioner's diagonal";
    if (step_.options.preconditioner == Preconditioner::adam && step_.beta2_powers == nullptr) return "beta2_powers";
    return "";
  }
  // Two parameters in one place would be moved twice, or by half, as the threads happen to run. Looked at only where an
  // address has changed.
  void check_overlaps() {
    const auto same = [](const Segment& segment, const void* before) { return segment.p == before; };
    if (std::equal(segments_.begin(), segments_.end(), apart_.begin(), apart_.end(), same)) return;
    std::vector<const Segment*> order;
    for (const Segment& segment : segments_) order.push_back(&segment);
    std::sort(order.begin(), order.end(), [](const Segment* a, const Segment* b) { return a->p < b->p; });
    for (std::size_t k = 1; k < order.size(); ++k) {
      const Segment &a = *order[k - 1], &b = *order[k];
      const std::int64_t size = a.dtype == DType::f64 ? 8 : a.dtype == DType::f32 ? 4 : 2;
      if (static_cast<const char*>(a.p) + a.n * size > static_cast<const char*>(b.p)) {
        const auto [first, second] = std::minmax(a.param, b.param);
        throw bad("parameters " + std::to_string(first) + " and " + std::to_string(second) +
                  " share memory; register one Parameter for both");
      }
    }
    apart_.clear();
    for (const Segment& segment : segments_) apart_.push_back(segment.p);
  }
  void check_diagonal() const {
    if (step_.options.preconditioner != Preconditioner::none && step_.state.diagonal == nullptr)
      throw bad("missing state");
  }

  bool on_device() const { return device_ != "cpu"; }
  static DeviceNumber device_number(const Number& number) {
    if (!number) return {};
    if (number->first == 0) throw bad("a number on the device without an address");
    return {reinterpret_cast<const void*>(number->first), dtype_from(number->second)};
  }
  // Copies the device's scalars to the host.
  void sync_from_device() {
    if (cuda_.workspace == nullptr) return;
    py::gil_scoped_release released;  // it waits for the stream
    cuda_read_scalars(cuda_, &scalars_, groups_.data(), step_.n_groups);
  }

  void sync_to_device() {
    if (cuda_.workspace == nullptr) return;
    py::gil_scoped_release released;
    cuda_write_scalars(cuda_, scalars_, groups_.data(), step_.n_groups);
  }

  void check(const char* name, const Buffer& buffer, const std::string& dtype) const {
    if (buffer.device() != device_) {
      throw bad(std::string(name) + " is on " + buffer.device() + ", expected " + device_);
    }

    if (buffer.dtype() != dtype) {
      throw py::type_error(std::string(name) + " has dtype " + buffer.dtype() + ", expected " + dtype);
    }
    if (!buffer.contiguous()) throw bad(std::string(name) + " is not contiguous");
    if (buffer.size() > 0 && buffer.data() == nullptr) throw bad(std::string(name) + " has no memory");
  }
  void* state_pointer(const char* name, const BufferPtr& buffer, const std::string& dtype) const {
    if (!buffer) return nullptr;
    check(name, *buffer, dtype);
    if (buffer->readonly()) throw bad(std::string(name) + " is read-only");
    if (buffer->size() != step_.state.n) {
      throw bad(std::string(name) + " has " + std::to_string(buffer->size()) + " elements, expected " +
                std::to_string(step_.state.n));
    }
    static char nothing;  // an empty buffer may have no memory, and is not an absent one
    return buffer->data() == nullptr ? &nothing : buffer->data();
  }
  void point(const py::list& pointers, bool parameters) {
    if (pointers.size() != segments_.size()) {
      throw bad(std::to_string(pointers.size()) + " pointers for " + std::to_string(segments_.size()) + " segments");
    }
    for (std::size_t i = 0; i < segments_.size(); ++i) {
      void* pointer = PyLong_AsVoidPtr(PyList_GET_ITEM(pointers.ptr(), static_cast<Py_ssize_t>(i)));
      if (pointer == nullptr) {
        if (PyErr_Occurred()) throw py::error_already_set();
        throw bad(std::string(parameters ? "parameter" : "gradient") + " of segment " + std::to_string(i) +
                  " has no memory (a meta or wrapper tensor?)");
      }
      (parameters ? segments_[i].p : const_cast<void*&>(segments_[i].g)) = pointer;
    }
  }
  void prepare(const Buffer* p, const Buffer& g, double alpha, double alpha_prev, int threads) {
    if (groups_.size() != 1) throw bad("one group");
    if (cuda_.workspace != nullptr) throw bad("the parts have a workspace of their own");
    segments_.clear();
    layouts_.clear();
    pointers_valid_ = false;  // of a step; this call's are its own
    const std::int64_t n = step_.state.n;
    for (const Buffer* buffer : {p, &g}) {
      if (buffer == nullptr) continue;
      check(buffer == p ? "p" : "g", *buffer, g.dtype());
      if (buffer->size() != n)
        throw bad("a buffer of " + std::to_string(buffer->size()) + " beside state of " + std::to_string(n));
    }
    if (p != nullptr && p->readonly()) throw bad("p is read-only");
    if (n > 0) {
      segments_.push_back({p ? p->data() : nullptr, g.data(), 0, n, 0, 0, dtype_from(g.dtype())});
      layouts_.push_back({{n}, {1}});
      if ((segments_[0].dtype == DType::f64) != (step_.state.dtype == DType::f64))
        throw py::type_error("dtype of g and state");
    }
    step_.segments = segments_.data();
    step_.n_segments = static_cast<std::int64_t>(segments_.size());
    groups_[0] = {0, alpha, alpha_prev, 0, 1};
    set_threads(threads);
  }
  template <class OnDevice, class OnCpu>
  void run(OnDevice&& device_kernel, OnCpu&& cpu_kernel) {
    if (on_device()) {
      py::gil_scoped_release released;
      if (step_.n_segments > 0) device_kernel();
    } else {
      const CpuKernels& cpu = cpu_kernels();
      py::gil_scoped_release released;
      cpu_kernel(cpu);
    }
  }

  template <class ScalarsT, class F>
  static void each_scalar(ScalarsT& s, F&& f) {
    f("step", s.step), f("skipped_steps", s.skipped_steps), f("rz", s.rz), f("gs", s.gs), f("shs", s.shs);
    f("grad_max", s.grad_max), f("ls_scale", s.ls_scale), f("loss_prev", s.loss_prev), f("set", s.set);
    f("beta", s.beta), f("ys", s.ys), f("shs_used", s.shs_used), f("updated", s.updated);
    f("gg", s.gg), f("gd", s.gd);
  }

  std::vector<BufferPtr> owners_;
  std::vector<Group> groups_;
  std::vector<Segment> segments_;
  std::vector<Layout> layouts_;
  std::vector<py::object> held_;
  std::array<BufferPtr, 3> rows_;
  py::object gather_;
  bool pointers_valid_ = false;
  std::vector<const void*> apart_;  // where the parameters lay when they were last seen not to overlap
  std::vector<double> partials_;
  Scalars scalars_;
  double own_param_step_ = 0, own_beta2_power_ = 1;
  std::int64_t params_ = 0;
  Step step_ = {};
  std::string device_;
  CudaStep cuda_;
  std::atomic<bool> busy_{false};
};

}  // namespace
}  // namespace fastnlcg
