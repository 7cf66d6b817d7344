// The CUDA step: what a device can hold, the workspace, and the launches of kernels.cuh, one for each pass or one cooperative
// launch for all, with the same bits.
//
// Contract of step_cuda.h. Not here: checks of arguments (bindings.cpp).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "kernels.cuh"

namespace fastnlcg {
namespace {

// ---- launches ----------------------------------------------------------------------------------------------------

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that a later call does not report it again
  throw std::runtime_error("fastnlcg: " + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The caller's device again, whatever happens in between.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

cudaStream_t stream_of(const CudaStep& cuda) { return static_cast<cudaStream_t>(cuda.stream); }

struct Grid {
  int blocks;
  int threads = kThreads;
  std::size_t shared_bytes = 0;
  bool cooperative = false;
};

template <class... Parameters>
cudaError_t try_launch(void (*kernel)(Parameters...), const Grid& grid, const CudaStep& cuda,
                       const std::type_identity_t<Parameters>&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream_of(cuda);
  config.attrs = &attribute;
  config.numAttrs = grid.cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

void check_launch(cudaError_t error, const char* name, const Grid& grid, const CudaStep& cuda) {
  check(error, "kernel " + std::string(name) + ", " + std::to_string(grid.blocks) + " blocks of " +
                   std::to_string(grid.threads) + " threads on device " + std::to_string(cuda.device));
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), const Grid& grid, const CudaStep& cuda,
            const std::type_identity_t<Parameters>&... arguments) {
  check_launch(try_launch(kernel, grid, cuda, arguments...), name, grid, cuda);
}

bool captures(const CudaStep& cuda) {
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream_of(cuda), &capture), "cudaStreamIsCapturing");
  return capture != cudaStreamCaptureStatusNone;
}

// Work of one optimizer shares its barrier and scalars, so two streams must not run it at once: the later one waits for
// the event behind the last work on the earlier. A graph orders its own.
void follow_last_stream(const CudaStep& cuda) {
  if (cuda.last_work == nullptr || cuda.last_stream == cuda.stream || captures(cuda)) return;
  check(cudaStreamWaitEvent(stream_of(cuda), static_cast<cudaEvent_t>(cuda.last_work), 0), "cudaStreamWaitEvent");
}
void mark_last_work(CudaStep& cuda) {
  if (captures(cuda)) return;
  auto event = static_cast<cudaEvent_t>(cuda.last_work);
  if (event == nullptr) {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreateWithFlags");
    cuda.last_work = event;
  }
  check(cudaEventRecord(event, stream_of(cuda)), "cudaEventRecord");
  cuda.last_stream = cuda.stream;
}

// What fits a device at once, found out once for each preconditioner and type.
constexpr int kMostPasses = 3;
struct Limits {
  bool cooperative;
  int blocks_of_pass[kMostPasses], blocks_in_one;
  int resident_tiles;  // per block, without costing a block
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

// Calls f(kernel, number, decision) for the kernel of every pass; `decision` is the kernel that decides over ranks.
template <class S, class First, class... Rest, class F>
void for_each_pass(F&& f, int number = 0) {
  static_assert(sizeof...(Rest) < kMostPasses);
  f(step_pass<S, First, FirstOf<Rest...>>, number, decide_over_ranks<S, First, FirstOf<Rest...>>);
  if constexpr (sizeof...(Rest) > 0) for_each_pass<S, Rest...>(f, number + 1);
}
template <class S, template <class> class... P, class F>
void for_each_pass(PassList<P...>, F&& f) {
  for_each_pass<S, P<S>...>(f);
}
template <template <class> class... P>
constexpr int number_of_passes(PassList<P...>) {
  return static_cast<int>(sizeof...(P));
}
template <class S, template <class> class First, template <class> class... Rest>
void put_first_pass(Arguments& a, PassList<First, Rest...>) {
  hand_over(a.first_pass, First<S>::decided(StepPlan{}, a.options, Fill<S>{}));
}
template <class S, template <class> class First, template <class> class... Rest>
constexpr bool keeps_tiles(PassList<First, Rest...>) {
  return First<S>::kResident != 0;
}

template <class S, class Preconditioner>
const Limits& limits(int device) {
  using Passes = typename Preconditioner::Passes;
  const auto in_one = step_in_one<S, Preconditioner>;
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
  const int multiprocessors = attribute_of(device, cudaDevAttrMultiProcessorCount);
  l.cooperative = attribute_of(device, cudaDevAttrCooperativeLaunch) != 0;
  for_each_pass<S>(Passes{}, [&](auto kernel, int number, auto) {
    l.blocks_of_pass[number] = multiprocessors * blocks_per_multiprocessor(kernel, 0);
  });
  const int without = blocks_per_multiprocessor(in_one, 0);
  l.blocks_in_one = multiprocessors * without;
  constexpr int kStatic = sizeof(Totals) + kMostPasses * sizeof(typename Launch<S>::InShared) + 64;
  const int most = attribute_of(device, cudaDevAttrMaxSharedMemoryPerBlockOptin) - kStatic - 1024;  // the driver's own
  l.resident_tiles = 0;
  for (int tiles = keeps_tiles<S>(Passes{}) ? most / kResidentBytes<S> : 0; tiles > 0 && l.resident_tiles == 0;
       --tiles) {
    const int bytes = tiles * kResidentBytes<S>;
    check(cudaFuncSetAttribute(in_one, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "shared memory of step_in_one");
    if (blocks_per_multiprocessor(in_one, static_cast<std::size_t>(bytes)) == without) l.resident_tiles = tiles;
  }
  known[device] = true;
  return l;
}

// Workspace layout, in doubles; each region starts on a cache line.
struct Workspace {
  std::int64_t control, scalars, alpha, alpha_prev, of_param, group_table, segments, tile_index, partials, end;

  Workspace(std::int64_t n, std::int64_t max_segments, std::int64_t groups) {
    const std::int64_t chunks = (tiles_of(n) + tiles_per_chunk(tiles_of(n)) - 1) / tiles_per_chunk(tiles_of(n));
    std::int64_t next = 0;
    const auto take = [&](std::int64_t bytes) {
      const std::int64_t begin = next;
      next += (bytes + 127) / 128 * 16;
      return begin;
    };
    control = take(sizeof(Control));
    scalars = take(sizeof(Scalars));
    alpha = take(groups * 8);
    alpha_prev = take(groups * 8);
    of_param = take(2 * 8);  // param_steps and beta2_powers of a flat buffer
    group_table = take(groups * static_cast<std::int64_t>(sizeof(GroupInput)));
    segments = take(max_segments * static_cast<std::int64_t>(sizeof(Segment)));
    tile_index = take(tiles_of(n) <= kInlineTiles ? 0 : (tiles_of(n) + 1) * 4);
    partials = take(kMaxSums * chunks * 8);
    end = next;
  }
};

template <int kBytes, class Row>
void upload_rows_of(const Row* rows, std::int64_t first, std::int64_t last, Row* to, const CudaStep& cuda) {
  Rows<Row, kBytes> part;
  for (; first < last; first += part.count) {
    part.count = static_cast<int>(std::min<std::int64_t>(last - first, part.kMax));
    std::copy_n(rows + first, part.count, part.row);
    launch("upload_rows", upload_rows<Row, kBytes>, {1, 128}, cuda, part, to + first);
  }
}
template <class Row>
void upload_table(const Row* rows, std::int64_t first, std::int64_t last, double* to, const CudaStep& cuda) {
  Row* const table = reinterpret_cast<Row*>(to);
  if (last - first <= Rows<Row, kSmallRows>::kMax) {
    upload_rows_of<kSmallRows>(rows, first, last, table, cuda);
  } else {
    upload_rows_of<kLargeRows>(rows, first, last, table, cuda);
  }
}

// Brings the device's table of segments up to date, where it is not. A captured step writes all of it at every replay,
// so from then on nobody knows what it holds.
void write_segments(const Step& step, CudaStep& cuda, const Workspace& at) {
  if (captures(cuda)) cuda.tables_unknown = true;
  std::int64_t first = 0, last = step.n_segments;
  bool same_places = false;
  if (!cuda.tables_unknown && static_cast<std::int64_t>(cuda.written.size()) == step.n_segments) {
    same_places = std::equal(cuda.written.begin(), cuda.written.end(), step.segments,
                             [](const Segment& a, const Segment& b) { return a.offset == b.offset && a.n == b.n; });
    while (first < last && cuda.written[static_cast<std::size_t>(first)] == step.segments[first]) ++first;
    while (first < last && cuda.written[static_cast<std::size_t>(last - 1)] == step.segments[last - 1]) --last;
  }
  cuda.written.clear();  // a launch may fail
  upload_table(step.segments, first, last, cuda.workspace + at.segments, cuda);
  const std::int64_t tiles = tiles_of(step.state.n);
  if (!same_places && tiles > kInlineTiles) {
    const auto* segments = reinterpret_cast<const Segment*>(cuda.workspace + at.segments);
    launch("index_tiles", index_tiles, {static_cast<int>(tiles / kThreads + 1)}, cuda, segments,
           static_cast<int>(step.n_segments), static_cast<int>(tiles),
           reinterpret_cast<int*>(cuda.workspace + at.tile_index));
  }
  cuda.written.assign(step.segments, step.segments + step.n_segments);
}

Arguments arguments_of(const Step& step, const CudaStep& cuda, const Workspace& at) {
  Arguments a = {};
  const std::int64_t tiles = tiles_of(step.state.n);
  a.segments = reinterpret_cast<const Segment*>(cuda.workspace + at.segments);
  a.n_segments = static_cast<int>(step.n_segments);
  a.state = step.state;
  a.tiles = static_cast<int>(tiles);
  a.tiles_per_chunk = static_cast<int>(tiles_per_chunk(tiles));
  a.chunks = static_cast<int>((tiles + a.tiles_per_chunk - 1) / a.tiles_per_chunk);
  a.options = step.options;
  a.set = step.set;
  a.loss = step.loss;
  a.loss_on_device = cuda.loss;
  a.grad_scale = cuda.grad_scale;
  a.found_inf = cuda.found_inf;
  a.n_groups = step.n_groups;
  a.scalars = reinterpret_cast<Scalars*>(cuda.workspace + at.scalars);
  a.alpha = cuda.workspace + at.alpha;
  a.alpha_prev = cuda.workspace + at.alpha_prev;
  a.control = reinterpret_cast<Control*>(cuda.workspace + at.control);
  a.partials = cuda.workspace + at.partials;
  a.counted_chunks = static_cast<int>((tiles_of(step.counted) + a.tiles_per_chunk - 1) / a.tiles_per_chunk);
  a.exchange = step.exchange;
  a.param_steps = step.param_steps;
  a.beta2_powers = step.beta2_powers;
  a.aligned_state = true;
  for (const void* stream : {step.state.grad_prev, step.state.direction, step.state.diagonal}) {
    if (reinterpret_cast<std::uintptr_t>(stream) % 16 != 0) a.aligned_state = false;
  }
  const bool indexed = tiles > kInlineTiles;
  if (indexed) a.tile_index = reinterpret_cast<const int*>(cuda.workspace + at.tile_index);
  for (std::int64_t tile = 0, s = 0; !indexed && tile <= tiles; ++tile) {
    while (s < step.n_segments && step.segments[s].offset + step.segments[s].n <= tile * kTile) ++s;
    a.first_segment[tile] = static_cast<int>(s);
  }
  return a;
}

void write_groups(const Step& step, const CudaStep& cuda, const Workspace& at, Arguments& a) {
  std::vector<GroupInput> inputs(static_cast<std::size_t>(step.n_groups));
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    inputs[i] = {step.groups[i].lr, step.groups[i].weight_decay, step.groups[i].sign,
                 i < cuda.lr.size() ? cuda.lr[i] : DeviceNumber{}};
  }
  if (step.n_groups <= kInlineGroups) {
    std::copy(inputs.begin(), inputs.end(), a.groups);
  } else {
    upload_table(inputs.data(), 0, step.n_groups, cuda.workspace + at.group_table, cuda);
    a.group_table = reinterpret_cast<const GroupInput*>(cuda.workspace + at.group_table);
  }
}

// Up to here one launch is worth its lower occupancy on an H100, as bench/gpu_model.py predicts; not measured.
constexpr std::int64_t kOneLaunchElements = 16'000'000;

template <class S, class Preconditioner>
void step_with(const Step& step, CudaStep& cuda) {
  const Workspace at(step.state.n, cuda.max_segments, step.n_groups);
  const Limits& fits = limits<S, Preconditioner>(cuda.device);
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
  const bool wanted = automatic ? step.state.n <= kOneLaunchElements : cuda.form == CudaStep::Form::one_launch;
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
    // A green context, or MPS, has fewer multiprocessors than the device says: separate launches from now on.
    cudaGetLastError();
    cuda.cooperative_refused = true;
    a.resident_tiles = 0;
  }
  cuda.launches = 0;
  const int passes = number_of_passes(typename Preconditioner::Passes{});
  for_each_pass<S>(typename Preconditioner::Passes{}, [&](auto kernel, int number, auto decision) {
    launch("step_pass", kernel, {grid(fits.blocks_of_pass[number])}, cuda, a);
    ++cuda.launches;
    if (!exchanges(a.exchange, number == 0, number == passes - 1)) return;
    a.exchange.gather(a.exchange.context);
    launch("decide_over_ranks", decision, {1, kWarp}, cuda, a);
    ++cuda.launches;
  });
}

template <class S>
void step_in(const Step& step, CudaStep& cuda) {
  with_preconditioner(step.options.preconditioner,
                      [&](auto preconditioner) { step_with<S, decltype(preconditioner)>(step, cuda); });
}

// ---- the parts ---------------------------------------------------------------------------------------------------

void copy_to_host(void* to, const void* from, std::size_t bytes, const CudaStep& cuda) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_of(cuda)), "copy of scalars to the host");
}
void copy_to_device(void* to, const void* from, std::size_t bytes, const CudaStep& cuda) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_of(cuda)), "copy of scalars to the device");
}
void wait_for(const CudaStep& cuda) { check(cudaStreamSynchronize(stream_of(cuda)), "waiting for the stream"); }

// One pass with the host's numbers; its sums where wanted.
template <class S, class Pass>
void run_part(const char* name, const Step& step, CudaStep& cuda, const Pass& pass, double* sums) {
  const Workspace at(step.state.n, cuda.max_segments, step.n_groups);
  write_segments(step, cuda, at);
  Arguments a = arguments_of(step, cuda, at);
  write_groups(step, cuda, at, a);
  const int multiprocessors = attribute_of(cuda.device, cudaDevAttrMultiProcessorCount);
  const int most = multiprocessors * blocks_per_multiprocessor(part<S, Pass>, 0);
  const int blocks = std::min(a.chunks, cuda.blocks > 0 ? cuda.blocks : most);
  launch(name, part<S, Pass>, {blocks}, cuda, a, pass);
  if (sums == nullptr) return;
  copy_to_host(sums, a.control->sums, Pass::kSums * sizeof(double), cuda);
  wait_for(cuda);
}

// A workspace for one call over flat buffers, and the step with everything in it on the device.
class Scratch {
 public:
  Scratch(const Step& host, CudaStep& cuda) : step(host), cuda_(cuda) {
    if (captures(cuda)) {
      throw std::runtime_error(
          "fastnlcg.ops cannot be captured into a CUDA graph: its scalars are the host's; NLCG(capturable=True) can");
    }
    cuda.max_segments = step.n_segments;
    const Workspace at(step.state.n, step.n_segments, step.n_groups);
    const std::size_t bytes = static_cast<std::size_t>(at.end) * sizeof(double);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, bytes, stream_of(cuda)), "workspace of " + std::to_string(bytes) + " bytes");
    cuda.workspace = static_cast<double*>(memory);
    step.param_steps = cuda.workspace + at.of_param;
    step.beta2_powers = step.param_steps + 1;
    try {
      check(cudaMemsetAsync(memory, 0, bytes, stream_of(cuda)), "cudaMemsetAsync");
      for (std::int64_t i = 0; i < step.n_groups; ++i) {
        copy_to_device(cuda.workspace + at.alpha + i, &step.groups[i].alpha, sizeof(double), cuda);
        copy_to_device(cuda.workspace + at.alpha_prev + i, &step.groups[i].alpha_prev, sizeof(double), cuda);
      }
      copy_to_device(step.beta2_powers, host.beta2_powers, sizeof(double), cuda);
    } catch (...) {
      release();
      throw;
    }
  }
  ~Scratch() { release(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  Step step;

 private:
  void release() {
    cudaFreeAsync(cuda_.workspace, stream_of(cuda_));
    cuda_.workspace = nullptr;
    cuda_.written.clear();
  }
  CudaStep& cuda_;
};

template <class S>
bool update_curvature_in(const Step& step, CudaStep& cuda, double* ys, double* shs) {
  const Scratch scratch(step, cuda);
  double sums[kMaxSums];
  run_part<S>("bfgs_diag_update, sums", scratch.step, cuda, CurvatureSums<S>{}, sums);
  *ys = sums[2] - sums[0];
  *shs = sums[1];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  run_part<S>("bfgs_diag_update", scratch.step, cuda, Bfgs::update(*ys, *shs, Fill<S>{}), nullptr);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, CudaStep& cuda, double* rz, double* rz_mid) {
  const Scratch scratch(step, cuda);
  double sums[kMaxSums];
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    const bool mid = step.state.grad_prev != nullptr;
    run_part<S>("preconditioned_dots", scratch.step, cuda, preconditioner.dots(step.options, mid, Fill<S>{}), sums);
  });
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, CudaStep& cuda, double beta) {
  const Scratch scratch(step, cuda);
  const bool move = step.segments[0].p != nullptr, keep_grad = step.state.grad_prev != nullptr;
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    const auto pass = preconditioner.move(step.options, beta, keep_grad, move, Fill<S>{});
    run_part<S>("direction_update", scratch.step, cuda, pass, nullptr);
  });
}

template <class S>
void last_move_in(const Step& step, CudaStep& cuda, double* sums) {
  run_part<S>("last_move", step, cuda, LastMove<S>{}, sums);
}

template <class S>
void state_norms_in(const Step& step, CudaStep& cuda, double* gg, double* dd, double* gd) {
  double sums[kMaxSums];
  run_part<S>("state_norms", step, cuda, StateNorms<S>{{}, step.state.grad_prev != nullptr}, sums);
  *gg = sums[0];
  *dd = sums[1];
  *gd = sums[2];
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
  (step.state.dtype == DType::f64 ? function<double>(__VA_ARGS__) : function<float>(__VA_ARGS__))

void cuda_step(const Step& step, CudaStep& cuda) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  NLCG_BY_TYPE(step_in, step, cuda);
  mark_last_work(cuda);
}

void cuda_forget(CudaStep& cuda) {
  if (cuda.last_work != nullptr) cudaEventDestroy(static_cast<cudaEvent_t>(cuda.last_work));
  cuda.last_work = nullptr;
}

void cuda_read_scalars(const CudaStep& cuda, Scalars* scalars, Group* groups, std::int64_t n_groups) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  const Workspace at(0, cuda.max_segments, n_groups);
  copy_to_host(scalars, cuda.workspace + at.scalars, sizeof(Scalars), cuda);
  for (std::int64_t i = 0; i < n_groups; ++i) {
    copy_to_host(&groups[i].alpha_prev, cuda.workspace + at.alpha_prev + i, sizeof(double), cuda);
  }
  wait_for(cuda);
}

void cuda_write_scalars(const CudaStep& cuda, const Scalars& scalars, const Group* groups, std::int64_t n_groups) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  const Workspace at(0, cuda.max_segments, n_groups);
  copy_to_device(cuda.workspace + at.scalars, &scalars, sizeof(Scalars), cuda);
  for (std::int64_t i = 0; i < n_groups; ++i) {
    copy_to_device(cuda.workspace + at.alpha_prev + i, &groups[i].alpha_prev, sizeof(double), cuda);
  }
  wait_for(cuda);  // the numbers are the caller's, and may be gone
}

void cuda_state_norms(const Step& step, CudaStep& cuda, double* gg, double* dd, double* gd) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  NLCG_BY_TYPE(state_norms_in, step, cuda, gg, dd, gd);
}

void cuda_last_move(const Step& step, CudaStep& cuda, double* gs, double* shs) {
  const DeviceGuard guard(cuda.device);
  double sums[kMaxSums] = {};
  NLCG_BY_TYPE(last_move_in, step, cuda, sums);
  *gs = sums[0];
  *shs = sums[1];
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
  cuda_write_scalars(cuda, *step.scalars, step.groups, step.n_groups);
  cuda_step(scratch.step, cuda);
  copy_to_host(step.beta2_powers, scratch.step.beta2_powers, sizeof(double), cuda);
  cuda_read_scalars(cuda, step.scalars, step.groups, step.n_groups);
}

}  // namespace fastnlcg
