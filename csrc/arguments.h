// The arguments of microadam::step_ that every implementation checks in the same way.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "parameter.h"

namespace microadam {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// The tensor's memory, once it is known to hold `numel` elements of `type` in a row.
template <class T>
T* memory(const Tensor& t, const Tensor& like, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.device() == like.device() && t.is_contiguous() && t.scalar_type() == type &&
                      t.numel() == numel,
                  name, " must be a contiguous tensor of ", numel,
                  " elements, on the device of num_skipped_blocks and of the dtype that "
                  "BlockLayout.state_spec gives");
  return static_cast<T*>(t.data_ptr());
}

int kept_of(double density, int64_t length) {
  return static_cast<int>(std::max(1.0, std::ceil(density * static_cast<double>(length))));
}

// The parameters with all their memory, once every tensor is known to fit. `first_block` is left 0.
std::vector<Parameter> gather_parameters(
    const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
    const std::vector<Tensor>& steps, const std::vector<Tensor>& window_indices,
    const std::vector<Tensor>& window_values, const std::vector<Tensor>& error,
    const std::vector<Tensor>& error_min, const std::vector<Tensor>& error_max,
    const std::vector<Tensor>& thresholds, const Tensor& like, double density, int64_t block_size,
    int64_t bucket_size, const std::vector<int64_t>& ordinals) {
  const size_t count = params.size();
  for (const auto* list : {&grads, &steps, &window_indices, &window_values, &error, &error_min,
                           &error_max, &thresholds}) {
    STD_TORCH_CHECK(list->size() == count, "every list must hold one tensor for each of the ",
                    count, " parameters");
  }
  STD_TORCH_CHECK(ordinals.size() == count, "ordinals must hold one number a parameter");
  STD_TORCH_CHECK(bucket_size >= 2 && bucket_size % 2 == 0, "bucket_size must be even");
  STD_TORCH_CHECK(block_size > 0 && block_size <= 32768 && block_size % bucket_size == 0,
                  "block_size must be a multiple of bucket_size and at most 32768");
  STD_TORCH_CHECK(density > 0 && density <= 1, "density must be greater than 0 and at most 1");
  STD_TORCH_CHECK(window_indices[0].dim() == 3, "window_indices must have 3 dimensions");
  const int64_t window_size = window_indices[0].size(1);
  STD_TORCH_CHECK(window_size > 0, "window_indices must have at least one slot");

  std::vector<Parameter> parameters;
  parameters.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    Parameter p = {};
    p.numel = params[i].numel();
    const int64_t num_blocks = (p.numel + block_size - 1) / block_size;
    const int64_t num_buckets = (p.numel + bucket_size - 1) / bucket_size;
    p.k = kept_of(density, std::min(p.numel, block_size));
    p.last_k = p.numel == 0 ? 0 : kept_of(density, p.numel - (num_blocks - 1) * block_size);
    const int64_t num_entries = num_blocks * window_size * p.k;
    p.values = memory<void>(params[i], like, params[0].scalar_type(), p.numel, "params");
    p.grad = memory<void>(grads[i], like, grads[0].scalar_type(), p.numel, "grads");
    p.step = memory<int64_t>(steps[i], like, ScalarType::Long, 1, "steps");
    p.window_indices =
        memory<int16_t>(window_indices[i], like, ScalarType::Short, num_entries, "window_indices");
    p.window_values = memory<BFloat16>(window_values[i], like, ScalarType::BFloat16, num_entries,
                                       "window_values");
    p.error =
        memory<uint8_t>(error[i], like, ScalarType::Byte, num_buckets * bucket_size / 2, "error");
    p.error_min =
        memory<BFloat16>(error_min[i], like, ScalarType::BFloat16, num_buckets, "error_min");
    p.error_max =
        memory<BFloat16>(error_max[i], like, ScalarType::BFloat16, num_buckets, "error_max");
    p.thresholds = memory<float>(thresholds[i], like, ScalarType::Float, num_blocks, "thresholds");
    p.ordinal = static_cast<uint32_t>(ordinals[i]);
    parameters.push_back(p);
  }
  return parameters;
}

}  // namespace
}  // namespace microadam
