// A preconditioner that the library does not have, made of the library's own parts: its passes, run by the CPU's
// machinery over several parameters, groups and threads, against a plain loop. Prints the largest relative difference
// of every vector; tests/test_pass.py compiles and runs it.
//
// Adagrad's diagonal: v = v + g^2, w = g / (sqrt(v) + eps), d = beta d - w, p = p + alpha d.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu_passes.h"
#include "preconditioners.h"

using namespace fastnlcg;

namespace {

template <class T>
NLCG_HD T adagrad_diagonal(T v, T g) {
  return square_root(T(v + g * g));
}

template <class T>
struct AdagradDots : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kFirstPass = true, kBuiltFromOptionsAlone = true;
  T eps;
  NLCG_HD unsigned reads() const { return kDiagonal; }
  NLCG_HD unsigned writes() const { return 0; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g();
    at.add(0, at.wide(g), at.wide(preconditioned_gradient(g, adagrad_diagonal(at.diagonal(), g), eps)));
  }

  template <class Broadcast>
  NLCG_HD static AdagradDots from_plan(const StepPlan&, const Options& o, Broadcast broadcast) {
    return {{}, broadcast(o.eps)};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options& o, const double* sums, double, double, double limit) {
    decide_direction(plan, o, sums[0], 0.0, 1.0, limit);  // |w| <= 1
  }
};

template <class T>
struct AdagradMove : PassDefaults {
  static constexpr int kSums = 1;
  static constexpr bool kBackward = true;
  T eps, beta;
  NLCG_HD unsigned reads() const { return kP | kD | kDiagonal; }
  NLCG_HD unsigned writes() const { return kP | kD | kDiagonal; }

  template <class At>
  NLCG_HD void operator()(At& at) const {
    const T g = at.g(), v = at.diagonal();
    const T d = conjugate_direction(preconditioned_gradient(g, adagrad_diagonal(v, g), eps), beta, at.d());
    at.set_diagonal(T(v + g * g));
    at.set_d(d);
    if (at.moves()) at.set_p(moved(at.p(), scaled_direction(at.alpha(), d)));
  }

  template <class Broadcast>
  NLCG_HD static AdagradMove from_plan(const StepPlan& plan, const Options& o, Broadcast broadcast) {
    return {{}, broadcast(o.eps), broadcast(plan.next.beta)};
  }
  NLCG_HD static void update_plan(StepPlan& plan, const Options&, const double*, double, double, double) {
    finish_step(plan);
  }
};

struct Adagrad {
  using Passes = PassList<AdagradDots, AdagradMove>;
};

// What the compiler refuses: a pass that does not tell what it writes, and one that no step can take.
template <class T>
struct WithoutWrites : PassDefaults {
  static constexpr int kSums = 1;
  unsigned reads() const { return 0; }
  template <class At>
  void operator()(At&) const {}
};
template <class T>
struct WithoutDecision : WithoutWrites<T> {
  unsigned writes() const { return 0; }
};
static_assert(!Pass<WithoutWrites<float>>);
static_assert(Pass<WithoutDecision<float>> && !StepPass<WithoutDecision<float>>);

// Numbers in (-1, 1).
double number(std::uint32_t i) { return static_cast<double>(static_cast<std::int32_t>(mixed(i))) * 0x1p-31; }

struct Plain {  // the loop, and its state
  std::vector<double> p, d, v;
  double rz = 0;
  int steps = 0;

  void step(const std::vector<double>& g, const std::vector<double>& alpha, const Options& o) {
    double squares = 0, rz_new = 0;
    for (const double x : g) squares += x * x;
    const double clip = o.measure_norm ? std::min(1.0, o.max_grad_norm / (std::sqrt(squares) + 1e-6)) : 1.0;
    for (std::size_t i = 0; i < g.size(); ++i) {
      const double x = clip * g[i];
      v[i] += x * x;
      rz_new += x * x / (std::sqrt(v[i]) + o.eps);
    }
    const double beta = steps == 0 ? 0.0 : std::min(o.beta_max, rz_new / rz);
    for (std::size_t i = 0; i < g.size(); ++i) {
      d[i] = beta * d[i] - clip * g[i] / (std::sqrt(v[i]) + o.eps);
      p[i] += alpha[i] * d[i];
    }
    rz = rz_new;
    ++steps;
  }
};

double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    largest = std::max(largest, std::abs(a[i] - b[i]));
    size = std::max(size, std::abs(b[i]));
  }
  return largest / size;
}

template <class Passes>
void run(const char* name, Passes passes, const Options& options) {
  const std::vector<std::int64_t> sizes = {17, 5000, 1, 30001};  // back to back, so that blocks straddle them
  std::int64_t n = 0;
  for (const std::int64_t size : sizes) n += size;
  const auto count = static_cast<std::size_t>(n);
  std::vector<double> p(count), g(count), d(count), v(count), alpha(count), steps_of(sizes.size());
  for (std::size_t i = 0; i < count; ++i) p[i] = number(static_cast<std::uint32_t>(i));
  double alpha_prev[2] = {};
  std::vector<Segment> segments;
  std::int64_t offset = 0;
  for (std::size_t k = 0; k < sizes.size(); ++k) {
    Segment segment = {};
    segment.p = &p[static_cast<std::size_t>(offset)];
    segment.g = &g[static_cast<std::size_t>(offset)];
    segment.direction = &d[static_cast<std::size_t>(offset)];
    segment.diagonal = &v[static_cast<std::size_t>(offset)];
    segment.steps = &steps_of[k];
    segment.offset = offset;
    segment.n = sizes[k];
    segment.group = static_cast<std::int32_t>(k % 2);
    segment.dtype = DType::f64;
    segments.push_back(segment);
    for (std::int64_t i = 0; i < sizes[k]; ++i) alpha[static_cast<std::size_t>(offset + i)] = k % 2 == 0 ? 0.01 : 0.02;
    offset += sizes[k];
  }
  std::vector<Group> groups = {{0.01, 0, 0, 1, &alpha_prev[0]}, {0.02, 0, 0, 1, &alpha_prev[1]}};
  Scalars scalars = {};
  scalars.ls_scale = scalars.clip = 1.0;
  std::vector<double> partials(static_cast<std::size_t>(partials_needed(n)));
  Step step = {};
  step.segments = segments.data();
  step.n_segments = static_cast<std::int64_t>(segments.size());
  step.n = step.owned = n;
  step.state_dtype = DType::f64;
  step.groups = groups.data();
  step.n_groups = 2;
  step.options = options;
  step.scalars = &scalars;
  step.partials = partials.data();
  step.loss = std::nan("");
  step.threads = 2;

  Plain loop{p, std::vector<double>(count), std::vector<double>(count)};
  double largest[3] = {};
  bool clipped = false;
  for (int t = 0; t < 6; ++t) {
    for (std::size_t i = 0; i < count; ++i) {
      g[i] =
          p[i] * (2.0 + number(static_cast<std::uint32_t>(i + 77))) + 0.1 * number(static_cast<std::uint32_t>(i) * 7u);
    }
    take_step<double, double>(step, passes);
    loop.step(g, alpha, options);
    clipped = clipped || scalars.clip < 1.0;
    largest[0] = std::max(largest[0], difference(p, loop.p));
    largest[1] = std::max(largest[1], difference(d, loop.d));
    largest[2] = std::max(largest[2], difference(v, loop.v));
  }
  std::printf("%s: %g steps, beta %g, clipped %d, p %.3g, d %.3g, v %.3g\n", name, scalars.step, scalars.beta, clipped,
              largest[0], largest[1], largest[2]);
}

}  // namespace

int main() {
  Options options;
  run("adagrad", Adagrad::Passes{}, options);
  options.measure_norm = true;
  options.max_grad_norm = 100.0;
  run("clipped", Clipped<Adagrad>::Passes{}, options);
  run("norm first", ClippedNormFirst<Adagrad>::Passes{}, options);
}
