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
constexpr int kInlineGroups = 16;  // if there are more, all are in a table

constexpr int kInlineTiles = 512;
constexpr int kPassBytes = 64;  // of a pass with its scalars

// What the blocks share, in device memory.
struct Control {
  GridBarrier barrier;
  StepPlan plan;
  double sums[kMaxSums];  // the result of part()
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
  RankGather exchange;                               // its pointers are the device's
  Bias* bias;                                        // one per segment, as the step before left it
  alignas(16) unsigned char first_pass[kPassBytes];  // kBuiltFromOptionsAlone
  int resident_tiles;                                // per block
  // For each tile, and for the end, the first segment that ends after it begins. Null: in `first_segment`, which needs
  // no launch to be filled.
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
