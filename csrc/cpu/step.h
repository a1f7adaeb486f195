// What the kernels need to know of one call of microadam::step_, and their entry points.
#pragma once

#include <cstdint>
#include <vector>

#include "../parameter.h"

namespace microadam::cpu {

// The same for every parameter of the call.
struct Settings {
  Dtype param_dtype;
  Dtype grad_dtype;
  int block_size;
  int bucket_size;
  int window_size;
  float inv_scale;             // the gradient is multiplied by it
  float decay;                 // 1 - lr * weight_decay
  float kept_share;            // 1 - alpha, of the error feedback
  float feedback_rate;         // lr * alpha / (1 - alpha)
  std::vector<float> powers1;  // (window_size,) beta1^age
  std::vector<float> powers2;  // (window_size,) beta2^age
  bool stochastic_rounding;
};

// One parameter, and the numbers of its step.
struct ParameterStep : Parameter {
  explicit ParameterStep(const Parameter& parameter) : Parameter(parameter) {}
  int64_t first_block;  // index among the blocks of all parameters that are stepped together
  int64_t num_blocks;
  int64_t step_number;  // including this one
  UpdateFactors factors;
  RoundingKey rounding;
};

// Steps the blocks [begin, end) of all parameters; returns how many were skipped because they
// held a NaN or an infinity.
using StepBlocks = int64_t (*)(const Settings&, const std::vector<ParameterStep>&, int64_t begin,
                               int64_t end);

int64_t step_blocks_generic(const Settings&, const std::vector<ParameterStep>&, int64_t, int64_t);
int64_t step_blocks_avx2(const Settings&, const std::vector<ParameterStep>&, int64_t, int64_t);
int64_t step_blocks_avx512(const Settings&, const std::vector<ParameterStep>&, int64_t, int64_t);

}  // namespace microadam::cpu
