// One step of a range of blocks. Compiled once for every instruction set; kernel_*.cpp include it.
//
// All work on a block is done while its 4,096 elements are in cache; meanwhile the next block's
// gradient and parameters are fetched.
#pragma once

#include "accumulate.h"
#include "block.h"
#include "quantize.h"
#include "selection.h"
#include "window.h"

namespace microadam::cpu {
namespace {

// Whether the gradient is probably 0 in whole rows, as an embedding's is: sampled at three
// elements.
template <class Grad>
bool has_zero_rows(const Block& block) {
  const Grad* grad = static_cast<const Grad*>(block.grad);
  return to_float(grad[0]) == 0.0f || to_float(grad[block.length / 2]) == 0.0f ||
         to_float(grad[block.length - 1]) == 0.0f;
}

// Returns whether the block was stepped: not if its accumulator holds a NaN or an infinity.
template <class Param, class Grad>
bool step_block(const Settings& s, const ParameterStep& p, const Block& block, const Block& next,
                Scratch& scratch) {
  Prefetcher<Param, Grad> prefetcher(next);
  const int num_candidates = accumulate<Grad>(s, block, scratch, prefetcher);
  int16_t* selected = block.window_indices + block.newest_slot * block.slot_stride;
  BFloat16* selected_values = block.window_values + block.newest_slot * block.slot_stride;
  if (!select_top_k(block, num_candidates, has_zero_rows<Grad>(block), scratch, selected))
    return false;
  float* values = scratch.terms;
  for (int i = 0; i < block.k; ++i) {
    float& value = scratch.accumulator[selected[i]];
    values[i] = value;
    value = 0.0f;
  }
  for (int i = 0; i < block.k; ++i) selected_values[i] = round_to<BFloat16>(values[i]);
  quantize_residual(s, block, scratch, prefetcher);
  prefetch_state(s, next);
  sum_window(block, scratch, prefetcher);
  if (s.stochastic_rounding && sizeof(Param) == 2) {
    update_values<Param, true>(s, p, block, scratch, prefetcher);
  } else {
    update_values<Param, false>(s, p, block, scratch, prefetcher);
  }
  return true;
}

template <class Param, class Grad>
int64_t step_blocks(const Settings& s, const std::vector<ParameterStep>& parameters, int64_t begin,
                    int64_t end) {
  int max_k = 0;
  for (const ParameterStep& p : parameters) max_k = std::max(max_k, p.k);
  Scratch scratch(s, max_k);

  size_t i = 0;
  while (parameters[i].first_block + parameters[i].num_blocks <= begin) ++i;
  int64_t num_skipped = 0;
  Block block = block_of(s, parameters[i], begin - parameters[i].first_block);
  fill_weights(s, block, scratch);
  for (int64_t b = begin; b < end; ++b) {
    const ParameterStep& p = parameters[i];
    Block next = block;
    if (b + 1 < end) {
      while (parameters[i].first_block + parameters[i].num_blocks <= b + 1) ++i;
      next = block_of(s, parameters[i], b + 1 - parameters[i].first_block);
    }
    num_skipped += !step_block<Param, Grad>(s, p, block, next, scratch);
    block = next;
    if (&parameters[i] != &p) fill_weights(s, block, scratch);
  }
  return num_skipped;
}

template <class Param>
int64_t step_blocks(const Settings& s, const std::vector<ParameterStep>& parameters, int64_t begin,
                    int64_t end) {
  switch (s.grad_dtype) {
    case Dtype::kBFloat16:
      return step_blocks<Param, BFloat16>(s, parameters, begin, end);
    case Dtype::kFloat16:
      return step_blocks<Param, Float16>(s, parameters, begin, end);
    default:
      return step_blocks<Param, float>(s, parameters, begin, end);
  }
}

inline int64_t step_blocks(const Settings& s, const std::vector<ParameterStep>& parameters,
                           int64_t begin, int64_t end) {
  switch (s.param_dtype) {
    case Dtype::kBFloat16:
      return step_blocks<BFloat16>(s, parameters, begin, end);
    case Dtype::kFloat16:
      return step_blocks<Float16>(s, parameters, begin, end);
    default:
      return step_blocks<float>(s, parameters, begin, end);
  }
}

}  // namespace
}  // namespace microadam::cpu
