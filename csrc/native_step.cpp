#include "native_step.h"

#include "pass_full_batch.h"
#include "pass_pairs.h"
#include "preconditioners.h"

namespace fastnlcg {
namespace {

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
  if (device.rfind("cuda:", 0) != 0 || device.size() == 5) {
    throw invalid_argument("device is '" + device + "', expected 'cpu' or 'cuda:0', 'cuda:1', ...");
  }
  return std::stoi(device.substr(5));
}

// The first of the `needed` state arrays that a segment lacks; "" if it has them all.
std::string missing_array(unsigned needed, const Segment& segment) {
  if ((needed & kGradPrev) && segment.grad_prev == nullptr) return "grad_prev";
  if ((needed & kD) && segment.direction == nullptr) return "direction";
  if ((needed & kDiagonal) && segment.diagonal == nullptr) return "the preconditioner's diagonal";
  if ((needed & kOrigin) && segment.origin == nullptr) return "origin";
  return "";
}

}  // namespace

DType dtype_named(const std::string& name) {
  try {
    return named<DType>("dtype", kDTypeNames, name);
  } catch (const std::invalid_argument&) {
    throw py::type_error("dtype " + name + " is not supported; expected float64, float32, bfloat16 or float16");
  }
}

NativeStep::NativeStep(const std::string& state_dtype, const std::string& device, std::uintptr_t stream)
    : device_(ordinal_of(device)), device_name_(device) {
  step_.state_dtype = dtype_named(state_dtype);
  if (step_.state_dtype == DType::f16) {
    throw invalid_argument("state_dtype is float16, expected float64, float32 or bfloat16");
  }
  cuda_.device = std::max(device_, 0);
  cuda_.stream = reinterpret_cast<void*>(stream);
}

NativeStep::~NativeStep() { cuda_forget(cuda_); }

void NativeStep::set_options(const py::dict& options) {
  const StepGuard busy(*this);
  Options next;
  std::size_t known = 0;
  each_option(next, [&](const char* name, auto& value) {
    if (!options.contains(name)) throw invalid_argument(std::string("option '") + name + "' is missing");
    read_option(value, options[name]);
    ++known;
  });
  if (options.size() != known) {
    for (const auto& [key, value] : options) {
      bool is_known = false;
      each_option(next, [&](const char* name, auto&) { is_known |= key.equal(py::str(name)); });
      if (!is_known) throw invalid_argument("unknown option " + std::string(py::repr(key)));
    }
  }
  step_.options = next;
}

void NativeStep::set_launch(const std::string& form, int blocks, int resident_tiles) {
  if (form != "automatic" && form != "one" && form != "separate") {
    throw invalid_argument("form is '" + form + "', expected 'automatic', 'one' or 'separate'");
  }
  cuda_.form = form == "automatic" ? CudaStep::Form::automatic
               : form == "one"     ? CudaStep::Form::one_launch
                                   : CudaStep::Form::separate_launches;
  cuda_.blocks = blocks;
  cuda_.resident_tiles = resident_tiles;
}

void NativeStep::check_buffer(const char* name, const Buffer& buffer, const std::string& dtype) const {
  if (buffer.device() != device_name_) {
    throw invalid_argument(std::string(name) + " is on " + buffer.device() + ", expected " + device_name_);
  }
  if (buffer.dtype() != dtype) {
    throw py::type_error(std::string(name) + " has dtype " + buffer.dtype() + ", expected " + dtype);
  }
  if (!buffer.contiguous()) throw invalid_argument(std::string(name) + " is not contiguous");
  if (buffer.size() > 0 && buffer.data() == nullptr) {
    throw invalid_argument(std::string(name) + " has " + std::to_string(buffer.size()) + " elements but no memory");
  }
}

void NativeStep::check_state_dtype(const std::string& what, DType dtype) const {
  if ((dtype == DType::f64) == (step_.state_dtype == DType::f64)) return;
  throw py::type_error(what + " is " + kDTypeNames[static_cast<int>(dtype)] + " but the state is " +
                       kDTypeNames[static_cast<int>(step_.state_dtype)] +
                       "; float64 parameters need float64 state, and other parameters float32 or bfloat16 state");
}

void NativeStep::refuse_bfloat16_state(const std::string& what) const {
  if (step_.state_dtype == DType::bf16) throw invalid_argument(what + " does not take state in bfloat16");
}

void NativeStep::check_state() const {
  if (segments_.empty()) return;
  const unsigned needed = with_preconditioner(
      step_.options.preconditioner, [&](auto preconditioner) { return preconditioner.state_arrays(step_.options); });
  const bool takes_matrices = with_preconditioner(
      step_.options.preconditioner, [](auto preconditioner) { return kTakesMatrices<decltype(preconditioner)>; });
  const bool takes_bfloat16 = with_preconditioner(step_.options.preconditioner, [](auto preconditioner) {
    return takes_bfloat16_state(typename decltype(preconditioner)::Passes{});
  });
  if (!takes_bfloat16) {
    refuse_bfloat16_state(std::string("the preconditioner '") +
                          kPreconditionerNames[static_cast<int>(step_.options.preconditioner)] + "'");
  }
  for (const Segment& segment : segments_) {
    if (segment.matrices && !takes_matrices) throw invalid_argument("matrices need the preconditioner 'muon'");
    const std::string missing = missing_array(segment.matrices ? needed & ~kDiagonal : needed, segment);
    if (!missing.empty()) throw invalid_argument("a step needs " + missing);
    if (!takes_matrices) return;  // all segments have the same arrays
  }
}

void NativeStep::use(std::vector<Segment> segments, std::vector<Group> groups, std::int64_t n) {
  bias_.resize(segments.size());  // memory first: if there is none, the tables are the old ones
  if (!on_device()) partials_.resize(static_cast<std::size_t>(partials_needed(n)));
  segments_ = std::move(segments);
  groups_ = std::move(groups);
  step_.segments = segments_.data();
  step_.n_segments = static_cast<std::int64_t>(segments_.size());
  step_.n = step_.owned = n;
  step_.groups = groups_.data();
  step_.n_groups = static_cast<std::int64_t>(groups_.size());
  step_.bias = bias_.data();
  step_.partials = partials_.data();
  step_.exchange = {};
}

std::vector<double> NativeStep::run_descent_pass(const Descent& pass, int threads) {
  refuse_bfloat16_state("full-batch descent");
  std::vector<double> sums(kMaxSums + 1);
  if (segments_.empty()) return sums;
  const bool trial = pass.kind == Descent::Kind::trial;
  std::string missing = missing_array(state_of(pass), segments_[0]);
  const bool needs_p = trial || pass.kind == Descent::Kind::direction || pass.kind == Descent::Kind::mark;
  if (missing.empty() && needs_p && segments_[0].p == nullptr) missing = "p";
  if (missing.empty() && !trial && segments_[0].g == nullptr) missing = "g";
  if (!missing.empty()) {
    throw invalid_argument(std::string("the pass '") + kDescentNames[static_cast<int>(pass.kind)] + "' needs " +
                           missing);
  }
  for (const Segment& segment : segments_) {
    if (segment.dtype != step_.state_dtype) {
      throw invalid_argument("full-batch descent takes parameters of the dtype of the state, " +
                             std::string(kDTypeNames[static_cast<int>(step_.state_dtype)]) + ", got " +
                             kDTypeNames[static_cast<int>(segment.dtype)]);
    }
  }
  const std::string name = std::string("the pass '") + kDescentNames[static_cast<int>(pass.kind)] + "'";
  if (pass.row < 0 || pass.y_row < 0 || pass.count < 0 || rows_of(pass) > rows_) {
    throw invalid_argument(name + " needs rows up to " + std::to_string(rows_of(pass)) + ", and there are " +
                           std::to_string(rows_));
  }
  if (pass.count > most_rows_of(pass)) {
    throw invalid_argument(name + " takes at most " + std::to_string(most_rows_of(pass)) + " rows, got " +
                           std::to_string(pass.count));
  }
  for (Group& group : groups_) {
    group.weight_decay = 0.0, group.sign = pass.maximize ? -1.0 : 1.0, group.factor = group.sign;
  }
  step_.threads = std::max(threads, 1);
  run([&] { cuda_descend(step_, cuda_, pass, sums.data()); },
      [&](const CpuKernels& kernels) { kernels.descend(step_, pass, sums.data()); });
  return sums;
}

}  // namespace fastnlcg
