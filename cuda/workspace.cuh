// The workspace in device memory: its layout, the tables of segments and groups that the host writes there, and a
// temporary one for calls over flat buffers.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels.cuh"
#include "launch.cuh"

namespace fastnlcg {
namespace {

// Where each region begins, in doubles; each begins at a cache line.
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

template <int kBytes, class Entry>
void upload_entries_of(const Entry* entries, std::int64_t first, std::int64_t last, Entry* to, const CudaStep& cuda) {
  Entries<Entry, kBytes> part;
  for (; first < last; first += part.count) {
    part.count = static_cast<int>(std::min<std::int64_t>(last - first, part.kMax));
    std::copy_n(entries + first, part.count, part.entry);
    launch("upload_entries", upload_entries<Entry, kBytes>, {1, 128}, cuda, part, to + first);
  }
}
template <class Entry>
void upload_table(const Entry* entries, std::int64_t first, std::int64_t last, double* to, const CudaStep& cuda) {
  Entry* const table = reinterpret_cast<Entry*>(to);
  static const bool large = [] {  // drivers before 530 take 4 KB of arguments, whichever toolkit built this
    int driver = 0;
    cudaDriverGetVersion(&driver);
    return driver == 0 || driver >= 12010;
  }();
  if (!large || last - first <= Entries<Entry, kSmallUpload>::kMax) {
    upload_entries_of<kSmallUpload>(entries, first, last, table, cuda);
  } else {
    upload_entries_of<kLargeUpload>(entries, first, last, table, cuda);
  }
}

// Brings the device's table of segments up to date. A captured step writes the whole table at every replay, so after a
// capture its content is unknown.
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

// A temporary workspace for one call over flat buffers, and the step with all of its pointers on the device.
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
    double* const values = cuda.workspace + at.of_flat;
    step.scalars = reinterpret_cast<Scalars*>(values);
    segment_ = host.segments[0];
    segment_.steps = values + kScalars + 1;
    group_.alpha_prev = values + kScalars;
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
  // Copies the scalars back to the host. Waits.
  void copy_back() const {
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

}  // namespace
}  // namespace fastnlcg
