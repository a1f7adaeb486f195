// One parameter and its state as the kernels see them: plain pointers, no torch.
#pragma once

#include <cstdint>

#include "algorithm.h"

namespace microadam {

enum class Dtype : int32_t { kFloat32, kBFloat16, kFloat16 };

// Shapes as in microadam/layout.py.
struct Parameter {
  int64_t numel;
  void* values;
  const void* grad;
  int64_t* step;
  int16_t* window_indices;
  BFloat16* window_values;
  uint8_t* error;
  BFloat16* error_min;
  BFloat16* error_max;
  float* thresholds;  // per block: a magnitude that a few more than k accumulators should reach
                      // at the next step; 0 before the first
  int32_t k;          // entries of a window slot: as many as the longest block needs
  int32_t last_k;     // entries that the last block uses
  uint32_t ordinal;   // gives each parameter, or shard, random bits of its own
};

}  // namespace microadam
