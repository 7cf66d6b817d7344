// What a kernel is given: the tables of segments and groups, the options, the workspace, all in its arguments or behind
// pointers in them.
#pragma once

#include <cstdint>

#include "../csrc/decisions.h"
#include "../csrc/step_cuda.h"
#include "reduce.cuh"

namespace fastnlcg {
namespace {

struct GroupInput {
  double lr, weight_decay, sign;
  double* alpha_prev;
  DeviceScalar lr_on_device;
};
constexpr int kInlineGroups = 16;  // more of them lie in a table

constexpr int kInlineTiles = 512;
constexpr int kPassBytes = 64;  // of a pass with its numbers

// What the blocks share, in device memory.
struct Control {
  GridBarrier barrier;
  StepPlan plan;
  double sums[kMaxSums];  // of a part
  alignas(16) unsigned char next_pass[kPassBytes];
};

struct Arguments {
  const Segment* segments;
  int n_segments;
  std::int64_t n;
  int tiles, chunks, tiles_per_chunk;
  Options options;
  double active_set, loss, digest;
  DeviceScalar loss_on_device, grad_scale, found_inf;
  const GroupInput* group_table;  // null: they are in `groups`
  GroupInput groups[kInlineGroups];
  std::int64_t n_groups;
  Scalars* scalars;
  double* alpha;
  Control* control;
  double* partials;                                  // [sum][chunk]
  int owned_chunks;                                  // whose sums this rank adds
  RankGather exchange;                               // its memory is the device's
  Bias* bias;                                        // one a segment: as the step before has left it
  alignas(16) unsigned char first_pass[kPassBytes];  // of the step, which the options alone decide
  int resident_tiles;                                // per block
  // The first segment that ends behind each tile's begin, and one past the last tile. Null: they are in
  // `first_segment`, which takes no launch to fill.
  const int* tile_index;
  int first_segment[kInlineTiles + 1];
};

__device__ __forceinline__ int first_segment(const Arguments& a, int tile) {
  return a.tile_index ? a.tile_index[tile] : a.first_segment[tile];
}

__device__ __forceinline__ const GroupInput* group_inputs(const Arguments& a) {
  return a.group_table ? a.group_table : a.groups;
}

}  // namespace
}  // namespace fastnlcg
