// The kernels under ThreadSanitizer: some steps of every preconditioner, in one launch and in separate ones, with the same
// bits. Prints what it ran; ThreadSanitizer prints what it found and decides on the exit status. tests/test_race.py
// builds and runs it, and its mutants.
#include <cmath>

#include "step_kernel.cpp"

using namespace fastnlcg;

namespace {

// Some steps over two tiles in three parameters, one of which begins inside a tile; the bits of the parameters.
std::uint64_t run(Preconditioner preconditioner, CudaStep::Form form, int resident_tiles, int blocks) {
  constexpr std::int64_t n = kTile + 101;
  constexpr int steps = 4;
  const std::int64_t cuts[] = {0, n / 3 + 1, n / 2, n};
  std::vector<float> p(n), g(n), grad_prev(n), d(n), diagonal(n, preconditioner == Preconditioner::bfgs ? 1.0f : 0.0f);
  for (std::int64_t i = 0; i < n; ++i) p[i] = std::sin(0.1f * static_cast<float>(i % 1000));
  double steps_of[3] = {}, alpha_prev[2] = {};
  std::vector<Segment> segments;
  for (int k = 0; k < 3; ++k) {
    const std::int64_t at = cuts[k];
    Segment segment = {};
    segment.p = &p[at];
    segment.g = &g[at];
    segment.grad_prev = &grad_prev[at];
    segment.direction = &d[at];
    segment.diagonal = &diagonal[at];
    segment.steps = &steps_of[k];
    segment.offset = at;
    segment.n = cuts[k + 1] - at;
    segment.shard = {0, 0, 0, static_cast<std::uint32_t>(k)};
    segment.group = k % 2;
    segment.dtype = DType::f32;
    segments.push_back(segment);
  }
  std::vector<Group> groups = {Group{0.01, 0, 0, 1, &alpha_prev[0]}, Group{0.02, 0, 0.1, 1, &alpha_prev[1]}};
  Scalars scalars = {};
  scalars.ls_scale = 1.0;
  Step step = {};
  step.n = n;
  step.state_dtype = DType::f32;
  step.options.preconditioner = preconditioner;
  step.options.update = UpdateRule::polak_ribiere;
  step.segments = segments.data();
  step.n_segments = 3;
  step.groups = groups.data();
  step.n_groups = 2;
  step.scalars = &scalars;
  step.loss = std::nan("");
  step.owned = n;
  CudaStep cuda;
  std::vector<double> workspace(static_cast<std::size_t>(workspace_doubles(n, 3, 2)) + 2);
  cuda.workspace = workspace.data();
  cuda.max_segments = 3;
  cuda.form = form;
  cuda.resident_tiles = resident_tiles;
  cuda.blocks = blocks;
  for (int t = 0; t < steps; ++t) {
    for (std::int64_t i = 0; i < n; ++i) g[i] = (1.0f + static_cast<float>(i % 7)) * p[i];
    if (t == 1) g[n / 2] = INFINITY;  // a skipped step leaves the barrier as it found it
    step.options.measure_norm = t != 0;
    step.options.max_grad_norm = t == 2 ? 10.0 : 1e6;  // the last repeats its first pass
    cuda_step(step, cuda);
  }
  cuda_forget(cuda);
  std::uint64_t hash = 1469598103934665603u;
  for (const float x : p) hash = (hash ^ bits_of<std::uint32_t>(x)) * 1099511628211u;
  return hash;
}

}  // namespace

// race KIND: "adam", "bfgs" or "none".
int main(int, char** arguments) {
  const std::string name = arguments[1];
  const Preconditioner kind = name == "adam"   ? Preconditioner::adam
                              : name == "bfgs" ? Preconditioner::bfgs
                                               : Preconditioner::none;
  const std::uint64_t resident = run(kind, CudaStep::Form::one_launch, -1, 1);  // the block then sums two chunks
  const std::uint64_t separate = run(kind, CudaStep::Form::separate_launches, 0, 2);
  const std::uint64_t in_one = run(kind, CudaStep::Form::one_launch, 0, 2);
  const bool same = in_one == separate && resident == separate;
  std::printf("%s: separate launches, one, one with resident tiles: %s\n", name.c_str(),
              same ? "the same bits" : "OTHER BITS");
  return same ? 0 : 1;
}
