// The CUDA step: what a device can hold, the workspace, and the launches of kernels.cuh, one for each pass or one cooperative
// launch for all, with the same bits.
//
// Contract of step_cuda.h. Not here: checks of arguments (native_step.cpp).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>

#include "../csrc/passes_descent.h"
#include "kernels.cuh"

namespace fastnlcg {
namespace {

// ---- launches ----------------------------------------------------------------------------------------------------

void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that a later call does not report it again
  throw std::runtime_error("fastnlcg: " + what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// Whether the process has used the device: setting it would create its context, half a gigabyte, and fail where another
// process has it for itself.
bool in_use(int device) {
  using Query = int (*)(int, unsigned*, int*);  // cuDevicePrimaryCtxGetState
  static const Query query = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found = {};
    constexpr const char* name = "cuDevicePrimaryCtxGetState";
#if 0 < CUDART_VERSION && CUDART_VERSION < 12050
    const cudaError_t error = cudaGetDriverEntryPoint(name, &entry, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &entry, 7000, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Query>(entry) : nullptr;
  }();
  unsigned flags = 0;
  int active = 1;
  return query == nullptr || query(device, &flags, &active) != 0 || active != 0;
}

// The caller's device again, whatever happens in between; but one that nobody has used stays unused.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice(" + std::to_string(device) + ")");
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_ && in_use(before_)) cudaSetDevice(before_);
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
// the event behind the last work on the earlier. A graph orders its own; its replays record no event, so who replays on one
// stream and steps on another has to order the two. Streams are told apart by their ids: a handle may be used again.
unsigned long long id_of(const CudaStep& cuda) {
  unsigned long long id = 0;
  check(cudaStreamGetId(stream_of(cuda), &id), "cudaStreamGetId");
  return id;
}
void follow_last_stream(const CudaStep& cuda) {
  if (cuda.last_work == nullptr || captures(cuda) || cuda.last_stream == id_of(cuda)) return;
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
  cuda.last_stream = id_of(cuda);
}

// What fits a device at once, found out once for each preconditioner and type.
constexpr int kMostPasses = 4;
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

struct KernelAttributes {
  int static_bytes;  // of shared memory
};
template <class Kernel>
KernelAttributes attributes_of(Kernel* kernel) {  // loads it, too: inside a capture that may fail
  cudaFuncAttributes attributes = {};
  check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)), "cudaFuncGetAttributes");
  return {static_cast<int>(attributes.sharedSizeBytes)};
}
void load_tables() {
  attributes_of(upload_rows<Segment, kSmallRows>);
  attributes_of(upload_rows<Segment, kLargeRows>);
  attributes_of(upload_rows<GroupInput, kSmallRows>);
  attributes_of(upload_rows<GroupInput, kLargeRows>);
  attributes_of(index_tiles);
}

// Calls f(kernel, number, decision) for the kernel of every pass; `decision` is the kernel that decides over ranks, null for
// the last pass, after which nothing is left to decide.
using Decision = void (*)(Arguments);
template <class S, class First, class... Rest, class F>
void for_each_pass(F&& f, int number = 0) {
  static_assert(sizeof...(Rest) < kMostPasses);
  Decision decision = nullptr;
  using Next = typename NextOf<Rest...>::type;
  if constexpr (sizeof...(Rest) > 0) decision = decide_over_ranks<S, First, Next>;
  f(step_pass<S, First, Next>, number, decision);
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
  hand_over(a.first_pass, First<S>::from_plan(StepPlan{}, a.options, Broadcast<S>{}));
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
  load_tables();
  const int multiprocessors = attribute_of(device, cudaDevAttrMultiProcessorCount);
  l.cooperative = attribute_of(device, cudaDevAttrCooperativeLaunch) != 0;
  for_each_pass<S>(Passes{}, [&](auto kernel, int number, auto) {
    l.blocks_of_pass[number] = multiprocessors * blocks_per_multiprocessor(kernel, 0);
  });
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
  known[device] = true;
  return l;
}

// Workspace layout, in doubles; each region starts on a cache line.
struct Workspace {
  std::int64_t control, alpha, group_table, segments, bias, of_flat, tile_index, partials, end;

  Workspace(std::int64_t n, std::int64_t max_segments, std::int64_t groups) {
    const std::int64_t chunks = (tiles_of(n) + tiles_per_chunk(tiles_of(n)) - 1) / tiles_per_chunk(tiles_of(n));
    std::int64_t next = 0;
    const auto take = [&](std::int64_t bytes) {
      const std::int64_t begin = next;
      next += (bytes + 127) / 128 * 16;
      return begin;
    };
    control = take(sizeof(Control));
    alpha = take(groups * 8);
    group_table = take(groups * static_cast<std::int64_t>(sizeof(GroupInput)));
    segments = take(max_segments * static_cast<std::int64_t>(sizeof(Segment)));
    bias = take(max_segments * static_cast<std::int64_t>(sizeof(Bias)));
    of_flat = take((kScalars + 2) * 8);  // scalars, alpha_prev and steps of a flat buffer
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
  static const bool large = [] {  // drivers before 530 take 4 KB of arguments, whatever toolkit built this
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver == 0 || driver >= 12010;
  }();
  if (!large || last - first <= Rows<Row, kSmallRows>::kMax) {
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
  const std::int64_t tiles = tiles_of(step.n);
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
  const std::int64_t tiles = tiles_of(step.n);
  a.segments = reinterpret_cast<const Segment*>(cuda.workspace + at.segments);
  a.n_segments = static_cast<int>(step.n_segments);
  a.n = step.n;
  a.tiles = static_cast<int>(tiles);
  a.tiles_per_chunk = static_cast<int>(tiles_per_chunk(tiles));
  a.chunks = static_cast<int>((tiles + a.tiles_per_chunk - 1) / a.tiles_per_chunk);
  a.options = step.options;
  a.active_set = step.active_set;
  a.loss = step.loss;
  a.digest = step.digest;
  a.loss_on_device = cuda.loss;
  a.grad_scale = cuda.grad_scale;
  a.found_inf = cuda.found_inf;
  a.n_groups = step.n_groups;
  a.scalars = step.scalars;
  a.alpha = cuda.workspace + at.alpha;
  a.control = reinterpret_cast<Control*>(cuda.workspace + at.control);
  a.partials = cuda.workspace + at.partials;
  a.owned_chunks = static_cast<int>((tiles_of(step.owned) + a.tiles_per_chunk - 1) / a.tiles_per_chunk);
  a.exchange = step.exchange;
  a.bias = reinterpret_cast<Bias*>(cuda.workspace + at.bias);
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
    inputs[i] = {step.groups[i].lr, step.groups[i].weight_decay, step.groups[i].sign, step.groups[i].alpha_prev,
                 i < cuda.lr.size() ? cuda.lr[i] : DeviceScalar{}};
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
  const Workspace at(step.n, cuda.max_segments, step.n_groups);
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
  const bool wanted = automatic ? step.n <= kOneLaunchElements : cuda.form == CudaStep::Form::one_launch;
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
  with_passes(step.options, [&](auto preconditioner) { step_with<S, decltype(preconditioner)>(step, cuda); });
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
  const Workspace at(step.n, cuda.max_segments, step.n_groups);
  write_segments(step, cuda, at);
  Arguments a = arguments_of(step, cuda, at);
  write_groups(step, cuda, at, a);
  const int multiprocessors = attribute_of(cuda.device, cudaDevAttrMultiProcessorCount);
  const int most = multiprocessors * blocks_per_multiprocessor(part<S, Pass>, 0);
  const int blocks = std::min(a.chunks, cuda.blocks > 0 ? cuda.blocks : most);
  launch(name, part<S, Pass>, {blocks}, cuda, a, pass);
  if (sums == nullptr) return;
  copy_to_host(sums, a.control->sums, (Pass::kSums + Pass::kFormsLargest) * sizeof(double), cuda);
  wait_for(cuda);
}

// A workspace for one call over flat buffers, and the step with everything in it on the device.
class Scratch {
 public:
  Scratch(const Step& host, CudaStep& cuda) : step(host), cuda_(cuda), host_(host), group_(host.groups[0]) {
    if (captures(cuda)) {
      throw std::runtime_error(
          "fastnlcg.ops cannot be captured into a CUDA graph: its scalars are the host's; NLCG(capturable=True) can");
    }
    cuda.max_segments = step.n_segments;
    const Workspace at(step.n, step.n_segments, step.n_groups);
    const std::size_t bytes = static_cast<std::size_t>(at.end) * sizeof(double);
    void* memory = nullptr;
    check(cudaMallocAsync(&memory, bytes, stream_of(cuda)), "workspace of " + std::to_string(bytes) + " bytes");
    cuda.workspace = static_cast<double*>(memory);
    double* const numbers = cuda.workspace + at.of_flat;
    step.scalars = reinterpret_cast<Scalars*>(numbers);
    segment_ = host.segments[0];
    segment_.steps = numbers + kScalars + 1;
    group_.alpha_prev = numbers + kScalars;
    step.segments = &segment_;
    step.groups = &group_;
    try {
      check(cudaMemsetAsync(memory, 0, bytes, stream_of(cuda)), "cudaMemsetAsync");
      copy_to_device(cuda.workspace + at.alpha, &group_.alpha, sizeof(double), cuda);
      if (host.scalars != nullptr) copy_to_device(step.scalars, host.scalars, sizeof(Scalars), cuda);
      copy_to_device(group_.alpha_prev, host.groups[0].alpha_prev, sizeof(double), cuda);
      copy_to_device(segment_.steps, host.segments[0].steps, sizeof(double), cuda);
    } catch (...) {
      release();
      throw;
    }
  }
  // The numbers, back to the host. Waits.
  void bring_back() const {
    copy_to_host(host_.scalars, step.scalars, sizeof(Scalars), cuda_);
    copy_to_host(host_.groups[0].alpha_prev, group_.alpha_prev, sizeof(double), cuda_);
    copy_to_host(host_.segments[0].steps, segment_.steps, sizeof(double), cuda_);
    wait_for(cuda_);
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
  const Step& host_;
  Segment segment_;
  Group group_;
};

bool has_grad_prev(const Step& step) { return step.n_segments > 0 && step.segments[0].grad_prev != nullptr; }

template <class S>
bool update_curvature_in(const Step& step, CudaStep& cuda, double* ys, double* shs) {
  const Scratch scratch(step, cuda);
  double sums[kMaxSums];
  run_part<S>("bfgs_diag_update, sums", scratch.step, cuda, CurvatureSums<S>{}, sums);
  *ys = sums[2] - sums[0];
  *shs = sums[1];
  if (!curvature_accepted(*ys, *shs, step.options.curvature_eps)) return false;
  run_part<S>("bfgs_diag_update", scratch.step, cuda, Bfgs::update(*ys, *shs, Broadcast<S>{}), nullptr);
  return true;
}

template <class S>
void preconditioned_dots_in(const Step& step, CudaStep& cuda, double* rz, double* rz_mid) {
  const Scratch scratch(step, cuda);
  double sums[kMaxSums];
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    const bool mid = has_grad_prev(step);
    run_part<S>("preconditioned_dots", scratch.step, cuda, preconditioner.dots(step.options, mid, Broadcast<S>{}),
                sums);
  });
  *rz = sums[0];
  *rz_mid = sums[1];
}

template <class S>
void update_direction_in(const Step& step, CudaStep& cuda, double beta) {
  const Scratch scratch(step, cuda);
  const bool move = step.segments[0].p != nullptr, keep_grad = has_grad_prev(step);
  with_preconditioner(step.options.preconditioner, [&](auto preconditioner) {
    const auto pass = preconditioner.move(step.options, beta, keep_grad, move, Broadcast<S>{});
    run_part<S>("direction_update", scratch.step, cuda, pass, nullptr);
  });
}

template <class S>
void last_move_in(const Step& step, CudaStep& cuda) {
  double sums[kMaxSums] = {};
  if (step.n_segments > 0) run_part<S>("last_move", step, cuda, LastMove<S>{}, sums);
  copy_to_device(&step.scalars->gs, &sums[0], sizeof(double), cuda);
  copy_to_device(&step.scalars->shs, &sums[1], sizeof(double), cuda);
  wait_for(cuda);
}

template <class S>
void state_norms_in(const Step& step, CudaStep& cuda, double* gg, double* dd, double* gd) {
  double sums[kMaxSums];
  run_part<S>("state_norms", step, cuda, StateNorms<S>{{}, has_grad_prev(step)}, sums);
  *gg = sums[0];
  *dd = sums[1];
  *gd = sums[2];
}

template <class S>
void descend_in(const Step& step, CudaStep& cuda, const Descent& numbers, double* sums) {
  with_descent_pass(numbers, Broadcast<S>{},
                    [&](const auto& pass) { run_part<S>("descent pass", step, cuda, pass, sums); });
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

void cuda_step(const Step& step, CudaStep& cuda) {
  const DeviceGuard guard(cuda.device);
  follow_last_stream(cuda);
  try {
    NLCG_BY_TYPE(step_in, step, cuda);
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
  NLCG_BY_TYPE(state_norms_in, step, cuda, gg, dd, gd);
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
  scratch.bring_back();
}

}  // namespace fastnlcg
