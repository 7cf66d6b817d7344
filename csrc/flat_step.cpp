#include "flat_step.h"

#include <algorithm>
#include <stdexcept>

#include "preconditioners.h"

namespace fastnlcg {
namespace {

void need(const BufferPtr& buffer, const char* name, bool written) {
  if (!buffer) throw invalid_argument(std::string(name) + " is needed");
  if (written && buffer->readonly()) throw invalid_argument(std::string(name) + " is read-only");
}
void check_writable(const BufferPtr& buffer, const char* name) {
  if (buffer) need(buffer, name, true);
}

void check_count(const char* name, double count) {
  constexpr double kLargestCount = 9007199254740992.0;  // every whole number up to here is a double
  if (!(count >= 0.0 && count <= kLargestCount)) {
    throw invalid_argument(std::string(name) + " is " + std::to_string(count) + ", expected 0 to 2^53");
  }
}

}  // namespace

void FlatStep::bind(const Buffers& given, double steps, std::int64_t owned) {
  const StepGuard busy(*this);
  const BufferPtr& first = given.g ? given.g : given.p;
  if (!first) throw invalid_argument("p or g is needed");
  check_count("steps", steps);
  const std::int64_t n = first->size();
  if (n > std::int64_t{1} << 60) throw invalid_argument("n is " + std::to_string(n) + ", expected 0 <= n <= 2^60");
  const DType dtype = dtype_named(first->dtype());
  check_state_dtype(given.g ? "g" : "p", dtype);
  const auto address = [&](const char* name, const BufferPtr& buffer, const std::string& expected) {
    if (!buffer) return static_cast<void*>(nullptr);
    check_buffer(name, *buffer, expected);
    if (buffer->size() != n) {
      throw invalid_argument(std::string(name) + " has " + std::to_string(buffer->size()) + " elements, expected " +
                             std::to_string(n));
    }
    return buffer->data();
  };
  const std::string state = kDTypeNames[static_cast<int>(step_.state_dtype)];
  Segment segment = {};
  segment.p = address("p", given.p, first->dtype());
  check_writable(given.p, "p");
  segment.g = address("g", given.g, first->dtype());
  segment.grad_prev = address("grad_prev", given.grad_prev, state);
  segment.direction = address("direction", given.direction, state);
  segment.diagonal = address("diagonal", given.diagonal, state);
  segment.origin = address("origin", given.origin, state);
  if (given.rows) {
    check_buffer("rows", *given.rows, state);
    check_writable(given.rows, "rows");
    if (n == 0 || n % kBlockElements != 0 || given.rows->size() % n != 0 || given.rows->size() / n > 2 * kMostPairs) {
      throw invalid_argument("rows has " + std::to_string(given.rows->size()) + " elements, expected at most " +
                             std::to_string(2 * kMostPairs) + " rows of n = " + std::to_string(n) + ", a multiple of " +
                             std::to_string(kBlockElements));
    }
    segment.rows = given.rows->data();
    segment.pitch = n;
  }
  rows_ = given.rows ? static_cast<int>(given.rows->size() / n) : 0;
  segment.steps = &steps_;
  segment.n = n;
  segment.dtype = dtype;
  steps_ = steps;
  buffers_ = given;
  cuda_.workspace = nullptr;  // every call on a GPU has one of its own
  use(n > 0 ? std::vector{segment} : std::vector<Segment>{}, {Group{0, 0, 0, 1, &alpha_prev_}}, n);
  if (owned >= 0) {
    if (owned > n || (owned != n && owned % chunk_elements(n) != 0)) {
      throw invalid_argument("owned is " + std::to_string(owned) + ", expected a multiple of " +
                             std::to_string(chunk_elements(n)) + " up to " + std::to_string(n));
    }
    step_.owned = owned;
  }
  bound_ = true;
}

void FlatStep::check_part() const {
  if (!bound_) throw invalid_argument("a part needs bind() first");
  if (step_.options.stochastic_rounding) {
    throw invalid_argument("a part does not round stochastically: that needs the number of the step");
  }
}

void FlatStep::prepare_part(double alpha, double alpha_prev, double weight_decay, int threads) {
  check_part();
  prepare(alpha, alpha_prev, weight_decay, threads);
}

void FlatStep::prepare(double alpha, double alpha_prev, double weight_decay, int threads) {
  alpha_prev_ = alpha_prev;
  groups_[0] = {0, alpha, weight_decay, 1, &alpha_prev_};
  step_.threads = std::max(threads, 1);
}

bool FlatStep::step(const BufferPtr& scalars, double lr, double weight_decay, bool maximize, double loss, int threads) {
  const StepGuard busy(*this);
  if (!bound_) throw invalid_argument("a step needs bind() first");
  prepare(0, 0, weight_decay, threads);
  need(buffers_.p, "p", true);
  need(buffers_.g, "g", false);
  check_writable(buffers_.grad_prev, "grad_prev");
  check_writable(buffers_.direction, "direction");
  check_writable(buffers_.diagonal, "diagonal");
  need(scalars, "scalars", true);
  if (scalars->device() != kHostDevice || scalars->dtype() != "float64" || scalars->size() != kScalars + 2 ||
      !scalars->contiguous()) {
    throw invalid_argument("scalars is " + std::to_string(scalars->size()) + " elements of " + scalars->dtype() +
                           " on " + scalars->device() + ", expected " + std::to_string(kScalars + 2) +
                           " contiguous float64 on the CPU");
  }
  check_state();
  double* const values = static_cast<double*>(scalars->data());
  // `scalars` is the caller's, and may be freed before the next call.
  struct Release {
    ~Release() {
      self.step_.scalars = nullptr;
      self.groups_[0].alpha_prev = &self.alpha_prev_;
      if (!self.segments_.empty()) self.segments_[0].steps = &self.steps_;
    }
    FlatStep& self;
  } const release{*this};
  check_count("updates", values[kScalars + 1]);
  step_.scalars = reinterpret_cast<Scalars*>(values);
  groups_[0] = {lr, 0, weight_decay, maximize ? -1.0 : 1.0, values + kScalars};
  step_.active_set = 0.0;
  step_.loss = loss;
  if (segments_.empty()) return true;
  segments_[0].steps = values + kScalars + 1;
  const double skipped = step_.scalars->skipped_steps;
  run([&] { cuda_flat_step(step_, cuda_); }, [&](const CpuKernels& cpu) { cpu.step(step_); });
  return step_.scalars->skipped_steps == skipped;
}

std::tuple<double, double, bool> FlatStep::update_curvature(double alpha_prev, int threads) {
  const StepGuard busy(*this);
  prepare_part(0, alpha_prev, 0, threads);
  need(buffers_.g, "g", false);
  need(buffers_.grad_prev, "grad_prev", false);
  need(buffers_.direction, "direction", false);
  need(buffers_.diagonal, "diagonal", true);
  double ys = 0, shs = 0;
  bool updated = false;
  if (!segments_.empty()) {
    run([&] { updated = cuda_update_curvature(step_, cuda_, &ys, &shs); },
        [&](const CpuKernels& cpu) { updated = cpu.update_curvature(step_, &ys, &shs); });
  }
  return {ys, shs, updated};
}

std::pair<double, double> FlatStep::preconditioned_dots(int threads) {
  const StepGuard busy(*this);
  prepare_part(0, 0, 0, threads);
  need(buffers_.g, "g", false);
  const unsigned reads = with_preconditioner(step_.options.preconditioner, [&](auto preconditioner) {
    return preconditioner.dots(step_.options, false, ElementBroadcast<float>{}).reads();
  });
  if (reads & kDiagonal) need(buffers_.diagonal, "diagonal", false);
  double rz = 0, rz_mid = 0;
  if (!segments_.empty()) {
    run([&] { cuda_preconditioned_dots(step_, cuda_, &rz, &rz_mid); },
        [&](const CpuKernels& cpu) { cpu.preconditioned_dots(step_, &rz, &rz_mid); });
  }
  return {rz, rz_mid};
}

void FlatStep::update_direction(double alpha, double weight_decay, double beta, int threads) {
  const StepGuard busy(*this);
  prepare_part(alpha, 0, weight_decay, threads);
  need(buffers_.g, "g", false);
  need(buffers_.direction, "direction", true);
  check_writable(buffers_.grad_prev, "grad_prev");
  const auto pass = [&](auto preconditioner) {
    const auto move = preconditioner.move(step_.options, beta, false, false, ElementBroadcast<float>{});
    return std::pair{move.reads(), move.writes()};
  };
  const auto [reads, writes] = with_preconditioner(step_.options.preconditioner, pass);
  if ((reads | writes) & kDiagonal) need(buffers_.diagonal, "diagonal", (writes & kDiagonal) != 0);
  if (segments_.empty()) return;
  run([&] { cuda_update_direction(step_, cuda_, beta); },
      [&](const CpuKernels& cpu) { cpu.update_direction(step_, beta); });
}

std::vector<double> FlatStep::descend(const Descent& pass, int threads) {
  const StepGuard busy(*this);
  check_part();
  check_writable(buffers_.grad_prev, "grad_prev");
  check_writable(buffers_.direction, "direction");
  check_writable(buffers_.diagonal, "diagonal");
  check_writable(buffers_.origin, "origin");
  return run_descent_pass(pass, threads);
}

// A step over the matrices of one buffer: a segment and a group each, from a tile on.
class MatrixNorms : public NativeStep {
 public:
  MatrixNorms(const std::string& state_dtype, const std::string& device, std::uintptr_t stream)
      : NativeStep(state_dtype, device, stream) {
    refuse_bfloat16_state("normalize()");
  }
  void run_over(const BufferPtr& x, std::int64_t count, std::int64_t n, int threads, const BufferPtr& sums) {
    check_buffer("x", *x, kDTypeNames[static_cast<int>(step_.state_dtype)]);
    if (x->readonly()) throw invalid_argument("x is read-only");
    if (count < 0 || n < 0 || (n > 0 && count > x->size() / n)) {
      throw invalid_argument("x has " + std::to_string(x->size()) + " elements, expected at least " +
                             std::to_string(count) + " matrices of " + std::to_string(n));
    }
    if (count == 0 || n == 0) return;
    if (on_device()) {
      if (!sums) throw invalid_argument("a GPU needs a workspace for the sums");
      check_buffer("sums", *sums, "float64");
      if (sums->readonly() || sums->size() < normalize_doubles(count, n)) {
        throw invalid_argument("sums has " + std::to_string(sums->size()) + " doubles, expected " +
                               std::to_string(normalize_doubles(count, n)) + " that are writable");
      }
      const py::gil_scoped_release released;
      cuda_normalize(cuda_, x->data(), step_.state_dtype, count, n, static_cast<double*>(sums->data()));
      return;
    }
    const std::int64_t apart = tiles_of(n) * kTile;
    std::vector<Segment> segments(static_cast<std::size_t>(count));
    std::vector<Group> groups(segments.size(), Group{0, 0, 0, 1, &unused_});
    for (std::int64_t i = 0; i < count; ++i) {
      Segment& segment = segments[static_cast<std::size_t>(i)];
      segment.origin = static_cast<char*>(x->data()) + i * n * size_of(step_.state_dtype);
      segment.offset = i * apart;
      segment.n = n;
      segment.group = static_cast<std::int32_t>(i);
      segment.dtype = step_.state_dtype;
    }
    use(std::move(segments), std::move(groups), count * apart);
    step_.threads = std::max(threads, 1);
    run([] {}, [&](const CpuKernels& cpu) { cpu.normalize(step_); });
  }

 private:
  double unused_ = 0.0;
};

void normalize(const BufferPtr& x, std::int64_t count, std::int64_t n, int threads, std::uintptr_t stream,
               const BufferPtr& sums) {
  MatrixNorms(x->dtype(), x->device(), stream).run_over(x, count, n, threads, sums);
}

}  // namespace fastnlcg
