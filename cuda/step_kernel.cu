// The CUDA step: what a device can hold, and the launches of kernels.cuh, one for each pass or one cooperative launch
// for all, with the same bits.
//
// Contract of step_cuda.h. Not here: checks of arguments (csrc/native_step.h).
#include <mutex>

#include "../csrc/pass_diagnostics.h"
#include "../csrc/pass_full_batch.h"
#include "../csrc/pass_pairs.h"
#include "../csrc/preconditioners.h"
#include "kernels.cuh"
#include "launch.cuh"
#include "workspace.cuh"

namespace fastnlcg {
namespace {

// ---- limits of a device ------------------------------------------------------------------------------------------

// What fits a device at once; queried once for each preconditioner and type.
constexpr int kMostPasses = 4;
struct Limits {
  bool cooperative;
  int blocks_of_pass[kMostPasses], blocks_in_one;
  int resident_tiles;  // per block, as many as do not reduce the number of blocks
};

int attribute_of(int device, cudaDeviceAttr attribute) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

template <class Kernel>
int blocks_per_multiprocessor(Kernel* kernel, std::size_t shared_bytes) {
  int blocks = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, shared_bytes), "occupancy query");
  return blocks;
}

struct KernelAttributes {
  int static_bytes;  // of shared memory
};
template <class Kernel>
KernelAttributes attributes_of(Kernel* kernel) {  // also loads the kernel, which may fail inside a capture
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return {static_cast<int>(attributes.sharedSizeBytes)};
}
void load_tables() {
  attributes_of(upload_entries<Segment, kSmallUpload>);
  attributes_of(upload_entries<Segment, kLargeUpload>);
  attributes_of(upload_entries<GroupInput, kSmallUpload>);
  attributes_of(upload_entries<GroupInput, kLargeUpload>);
  attributes_of(index_tiles);
}

// Calls f(kernel, number, decision) for the kernel of every pass; `decision` is the kernel that decides over ranks,
// null after the last pass.
using Decision = void (*)(Arguments);
template <class S, class T, class First, class... Rest, class F>
void for_each_pass(F&& f, int number = 0) {
  static_assert(sizeof...(Rest) < kMostPasses);
  Decision decision = nullptr;
  using Next = typename NextOf<Rest...>::type;
  if constexpr (sizeof...(Rest) > 0) decision = decide_over_ranks<S, First, Next>;
  f(step_pass<S, First, Next, T>, number, decision);
  if constexpr (sizeof...(Rest) > 0) for_each_pass<S, T, Rest...>(f, number + 1);
}
template <class S, class T, template <class> class... P, class F>
void for_each_pass(PassList<P...>, F&& f) {
  for_each_pass<S, T, P<S>...>(f);
}
template <template <class> class... P>
constexpr int number_of_passes(PassList<P...>) {
  return static_cast<int>(sizeof...(P));
}
template <class S, template <class> class First, template <class> class... Rest>
void put_first_pass(Arguments& a, PassList<First, Rest...>) {
  hand_over(a.first_pass, First<S>::from_plan(StepPlan{}, a.options, ElementBroadcast<S>{}));
}
template <class S, template <class> class First, template <class> class... Rest>
constexpr bool keeps_tiles(PassList<First, Rest...>) {
  return First<S>::kKeptInSharedMemory != 0;
}

// The kernel of one launch is the largest, so only the usual state, float32, has it.
template <class S, class T>
constexpr bool kHasOneLaunch = sizeof(S) == sizeof(float) && sizeof(T) == sizeof(float);

template <class S, class T, class Preconditioner>
const Limits& limits(int device) {
  using Passes = typename Preconditioner::Passes;
  constexpr int kMostDevices = 64;
  static std::mutex mutex;
  static bool known[kMostDevices] = {};
  static Limits all[kMostDevices];
  if (device < 0 || device >= kMostDevices) {
    throw std::runtime_error("fastnlcg: CUDA device " + std::to_string(device) + ", expected 0 to 63");
  }
  const std::lock_guard lock(mutex);
  Limits& l = all[device];
  if (known[device]) return l;
  load_tables();
  const int multiprocessors = attribute_of(device, cudaDevAttrMultiProcessorCount);
  l.cooperative = kHasOneLaunch<S, T> && attribute_of(device, cudaDevAttrCooperativeLaunch) != 0;
  for_each_pass<S, T>(Passes{}, [&](auto kernel, int number, auto) {
    l.blocks_of_pass[number] = multiprocessors * blocks_per_multiprocessor(kernel, 0);
  });
  if constexpr (kHasOneLaunch<S, T>) {
    const auto in_one = step_in_one<S, Preconditioner>;
    const int without = blocks_per_multiprocessor(in_one, 0);
    l.blocks_in_one = multiprocessors * without;
    const int most = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin) - attributes_of(in_one).static_bytes;
    l.resident_tiles = 0;
    for (int tiles = keeps_tiles<S>(Passes{}) ? most / kResidentBytes<S> : 0; tiles > 0 && l.resident_tiles == 0;
         --tiles) {
      const int bytes = tiles * kResidentBytes<S>;
      check(cudaFuncSetAttribute(in_one, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "shared memory of step_in_one");
      if (blocks_per_multiprocessor(in_one, static_cast<std::size_t>(bytes)) == without) l.resident_tiles = tiles;
    }
  }
  known[device] = true;
  return l;
}

// ---- the step ----------------------------------------------------------------------------------------------------

// Up to this size one launch is estimated to be faster on an H100, despite its lower occupancy. Not measured.
constexpr std::int64_t kOneLaunchElements = 16'000'000;

template <class S, class T, class Preconditioner>
void step_with(const Step& step, CudaStep& cuda) {
  const Workspace at(step.n, cuda.max_segments, step.n_groups);
  const Limits& fits = limits<S, T, Preconditioner>(cuda.device);
  write_segments(step, cuda, at);
  Arguments a = arguments_of(step, cuda, at);
  write_groups(step, cuda, at, a);
  put_first_pass<S>(a, typename Preconditioner::Passes{});
  const int chunks = a.chunks;
  // An empty shard has no chunk, and still takes part in every decision.
  const auto grid = [&](int most) {
    return std::max(1, std::min(chunks, cuda.blocks > 0 ? std::min(cuda.blocks, most) : most));
  };
  const bool automatic = cuda.form == CudaStep::Form::automatic;
  const bool wanted = automatic ? step.n <= kOneLaunchElements : cuda.form == CudaStep::Form::one_launch;
  if constexpr (kHasOneLaunch<S, T>) {
    if (wanted && fits.cooperative && !cuda.cooperative_refused && step.exchange.ranks == 0) {
      const int blocks = grid(fits.blocks_in_one);
      const std::int64_t needed = std::int64_t{(chunks + blocks - 1) / blocks} * a.tiles_per_chunk;
      a.resident_tiles = static_cast<int>(std::min<std::int64_t>(fits.resident_tiles, needed));
      if (cuda.resident_tiles >= 0) a.resident_tiles = std::min(a.resident_tiles, cuda.resident_tiles);
      const std::size_t bytes = static_cast<std::size_t>(a.resident_tiles) * kResidentBytes<S>;
      const Grid whole = {blocks, kThreads, bytes, true};
      const cudaError_t error = try_launch(step_in_one<S, Preconditioner>, whole, cuda, a);
      if (error != cudaErrorCooperativeLaunchTooLarge) {
        check_launch(error, "step_in_one", whole, cuda);
        cuda.launches = 1;
        return;
      }
      // A green context, or MPS, has fewer multiprocessors than the device reports: separate launches from now on.
      cudaGetLastError();
      cuda.cooperative_refused = true;
      a.resident_tiles = 0;
    }
  }
  cuda.launches = 0;
  const int passes = number_of_passes(typename Preconditioner::Passes{});
  for_each_pass<S, T>(typename Preconditioner::Passes{}, [&](auto kernel, int number, auto decision) {
    launch("step_pass", kernel, {grid(fits.blocks_of_pass[number])}, cuda, a);
    ++cuda.launches;
    if (!exchanges(a.exchange, number == 0, number == passes - 1)) return;
    a.exchange.gather(a.exchange.context);
    launch("decide_over_ranks", decision, {1, kWarp}, cuda, a);
    ++cuda.launches;
  });
}

template <class S, class T>
void step_in(const Step& step, CudaStep& cuda) {
  with_passes(step.options, [&](auto preconditioner) {
    using P = decltype(preconditioner);
    if constexpr (sizeof(T) == sizeof(S) || takes_bfloat16_state(typename P::Passes{})) {
      step_with<S, T, P>(step, cuda);
    } else {
      __builtin_unreachable();  // the options' checks
    }
  });
}

// ---- the parts ---------------------------------------------------------------------------------------------------

// One pass with scalars from the host. If `sums` is not null, waits for them.
template <class S, class T, class Pass>
void run_part(const char* name, const Step& step, CudaStep& cuda, const Pass& pass, double* sums) {
  const Workspace at(step.n, cuda.max_segments, step.n_groups);
  write_segments(step, cuda, at);
  Arguments a = arguments_of(step, cuda, at);
  write_groups(step, cuda, at, a);
  const int multiprocessors = attribute_of(cuda.device, cudaDevAttrMultiProcessorCount);
  const int most = multiprocessors * blocks_per_multiprocessor(part<S, Pass, T>, 0);
  const int blocks = std::min(a.chunks, cuda.blocks > 0 ? cuda.blocks : most);
  launch(name, part<S, Pass, T>, {blocks}, cuda, a, pass);
  if (sums == nullptr) return;
  copy_to_host(sums, a.control->sums, (Pass::kSums + Pass::kFormsLargest) * sizeof(double), cuda);
  wait_for(cuda);
}

template <class S>
bool update_curvature_in(const Step& step, CudaStep& cuda, double* ys, double* shs) {
  const Scratch scratch(step, cuda);
  double sums[kMaxSums];
  run_part<S, S>("bfgs_diag_update, sums", scratch.step, cuda, CurvatureSums<S>{}, sums);
  *ys = sums[2] - sums[0];
  *shs = sums[1];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  run_part<S, S>("bfgs_diag_update", scratch.step, cuda, Bfgs::update(*ys, *shs, ElementBroadcast<S>{}), nullptr);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, CudaStep& cuda, double* rz, double* rz_mid) {
  const Scratch scratch(step, cuda);
  double sums[kMaxSums];
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    const bool mid = has_grad_prev(step);
    run_part<S, S>("preconditioned_dots", scratch.step, cuda,
                   preconditioner.dots(step.options, mid, ElementBroadcast<S>{}), sums);
  });
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, CudaStep& cuda, double beta) {
  const Scratch scratch(step, cuda);
  const bool move = step.segments[0].p != nullptr, keep_grad = has_grad_prev(step);
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    const auto pass = preconditioner.move(step.options, beta, keep_grad, move, ElementBroadcast<S>{});
    run_part<S, S>("direction_update", scratch.step, cuda, pass, nullptr);
  });
}

template <class S>
void last_move_in(const Step& step, CudaStep& cuda) {
  double sums[kMaxSums] = {};
  if (step.n_segments > 0) run_part<S, S>("last_move", step, cuda, LastMove<S>{}, sums);
  copy_to_device(&step.scalars->gs, &sums[0], sizeof(double), cuda);
  copy_to_device(&step.scalars->shs, &sums[1], sizeof(double), cuda);
  wait_for(cuda);
}

template <class S, class T>
void state_norms_in(const Step& step, CudaStep& cuda, double* gg, double* dd, double* gd) {
  double sums[kMaxSums];
  run_part<S, T>("state_norms", step, cuda, StateNorms<S>{{}, has_grad_prev(step)}, sums);
  *gg = sums[0];
  *dd = sums[1];
  *gd = sums[2];
}

template <class S>
void descend_in(const Step& step, CudaStep& cuda, const Descent& numbers, double* sums) {
  const auto run = [&](const auto& pass) { run_part<S, S>("descent pass", step, cuda, pass, sums); };
  if (is_pair_pass(numbers)) return with_pair_pass(numbers, ElementBroadcast<S>{}, run);
  with_descent_pass(numbers, ElementBroadcast<S>{}, run);
}

template <class S, class T, class Pass>
void matrix_pass_with(const Step& step, CudaStep& cuda, std::int64_t first_tile, std::int64_t last_tile) {
  const Workspace at(step.n, cuda.max_segments, step.n_groups);
  write_segments(step, cuda, at);
  Arguments a = arguments_of(step, cuda, at);
  write_groups(step, cuda, at, a);
  const int multiprocessors = attribute_of(cuda.device, cudaDevAttrMultiProcessorCount);
  const int most = multiprocessors * blocks_per_multiprocessor(matrix_pass<S, Pass, T>, 0);
  const int tiles = static_cast<int>(last_tile - first_tile);
  const int blocks = std::min(tiles, cuda.blocks > 0 ? std::min(cuda.blocks, most) : most);
  if (tiles == 0) return;
  launch("matrix_pass", matrix_pass<S, Pass, T>, {blocks}, cuda, a, static_cast<int>(first_tile),
         static_cast<int>(last_tile));
}

template <class S, class T>
void matrix_pass_in(const Step& step, CudaStep& cuda, MatrixPass kind, std::int64_t first_tile,
                    std::int64_t last_tile) {
  if (kind == MatrixPass::input) {
    matrix_pass_with<S, T, MatrixInput<S>>(step, cuda, first_tile, last_tile);
  } else {
    matrix_pass_with<S, T, MatrixMove<S>>(step, cuda, first_tile, last_tile);
  }
}

template <class S>
void normalize_in(CudaStep& cuda, void* x, std::int64_t count, std::int64_t n, double* sums) {
  const int chunks = static_cast<int>(normalize_doubles(1, n)), blocks = static_cast<int>(count) * chunks;
  launch("matrix_squares", matrix_squares<S>, {blocks}, cuda, static_cast<S*>(x), n, chunks, sums);
  launch("matrix_scale", matrix_scale<S>, {blocks}, cuda, static_cast<S*>(x), n, chunks, sums);
}

}  // namespace

// ---- what step_cuda.h promises -----------------------------------------------------------------------------------

CudaStatus cuda_status() {
  CudaStatus status = {true, FASTNLCG_CUDA_ARCHITECTURES, CUDART_VERSION, 0, {}, ""};
  cudaDriverGetVersion(&status.driver_version);
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) {
    cudaGetLastError();
    status.unavailable_reason = std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
    return status;
  }
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    status.devices.push_back(std::string(properties.name) + " (sm_" +
                             std::to_string(properties.major * 10 + properties.minor) + ")");
  }
  if (count == 0) status.unavailable_reason = "no CUDA device";
  return status;
}

int cuda_device_of(const void* memory) {
  cudaPointerAttributes attributes = {};
  check(cudaPointerGetAttributes(&attributes, memory), "cudaPointerGetAttributes");
  return attributes.device;
}

std::int64_t workspace_doubles(std::int64_t n, std::int64_t max_segments, std::int64_t groups) {
  return Workspace(n, max_segments, groups).end;
}

#define NLCG_BY_TYPE(function, ...) \
  (step.state_dtype == DType::f64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__))
// Of those that take state in bfloat16
#define NLCG_BY_TYPES(function, ...) \
  with_state_types(step.state_dtype, [&](auto s, auto t) { function<decltype(s), decltype(t)>(__VA_ARGS__); })

void cuda_step(const Step& step, CudaStep& cuda) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  try {
    NLCG_BY_TYPES(step_in, step, cuda);
  } catch (...) {  // an exchange that failed: some passes are under way
    try {
      mark_last_work(cuda);
    } catch (...) {  // the first error is the one to report
    }
    throw;
  }
  mark_last_work(cuda);
}

void cuda_forget(CudaStep& cuda) {
  if (cuda.last_work == nullptr) return;
  try {  // a driver that shuts down, at the end of the process
    const DeviceGuard guard(cuda.device);
    cudaEventDestroy(static_cast<cudaEvent_t>(cuda.last_work));
  } catch (...) {
  }
  cuda.last_work = nullptr;
}

void cuda_join_stream(const CudaStep& cuda) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
}

void cuda_state_norms(const Step& step, CudaStep& cuda, double* gg, double* dd, double* gd) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  NLCG_BY_TYPES(state_norms_in, step, cuda, gg, dd, gd);
}

void cuda_matrix_pass(const Step& step, CudaStep& cuda, MatrixPass kind, std::int64_t first_tile,
                      std::int64_t last_tile) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  NLCG_BY_TYPES(matrix_pass_in, step, cuda, kind, first_tile, last_tile);
  mark_last_work(cuda);
}

void cuda_normalize(CudaStep& cuda, void* x, DType dtype, std::int64_t count, std::int64_t n, double* sums) {
  const DeviceGuard guard(cuda.device);
  if (dtype == DType::f64) {
    normalize_in<double>(cuda, x, count, n, sums);
  } else {
    normalize_in<float>(cuda, x, count, n, sums);
  }
}

void cuda_last_move(const Step& step, CudaStep& cuda) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  NLCG_BY_TYPE(last_move_in, step, cuda);
}

void cuda_descend(const Step& step, CudaStep& cuda, const Descent& pass, double* sums) {
  const DeviceGuard guard(cuda.device);
  if (cuda.workspace != nullptr) {
    follow_last_stream(cuda);
    NLCG_BY_TYPE(descend_in, step, cuda, pass, sums);
    mark_last_work(cuda);
  } else {
    const Scratch scratch(step, cuda);
    NLCG_BY_TYPE(descend_in, scratch.step, cuda, pass, sums);
  }
}

bool cuda_update_curvature(const Step& step, CudaStep& cuda, double* ys, double* shs) {
  const DeviceGuard guard(cuda.device);
  return NLCG_BY_TYPE(update_curvature_in, step, cuda, ys, shs);
}

void cuda_preconditioned_dots(const Step& step, CudaStep& cuda, double* rz, double* rz_mid) {
  const DeviceGuard guard(cuda.device);
  NLCG_BY_TYPE(preconditioned_dots_in, step, cuda, rz, rz_mid);
}

void cuda_update_direction(const Step& step, CudaStep& cuda, double beta) {
  const DeviceGuard guard(cuda.device);
  NLCG_BY_TYPE(update_direction_in, step, cuda, beta);
}

void cuda_flat_step(const Step& step, CudaStep& cuda) {
  const DeviceGuard guard(cuda.device);
  const Scratch scratch(step, cuda);
  cuda_step(scratch.step, cuda);
  scratch.copy_back();
}

}  // namespace fastnlcg
