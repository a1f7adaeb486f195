// The arguments of microadam::step_ that every implementation checks in the same way.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "parameter.h"
#include "state.h"

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

// Dtype and device as torch numbers them. Tensor::scalar_type() and device() compare the number
// with every possible one, with a call into torch for each, which takes longer than the step of a
// small parameter.
int32_t dtype_number(const Tensor& t) {
  int32_t number;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &number));
  return number;
}

struct DeviceNumber {
  int32_t type, index;

  explicit DeviceNumber(const Tensor& t) : index(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &type));
  }
  bool operator==(const DeviceNumber& other) const {
    return type == other.type && index == other.index;
  }
};

// The tensor's memory, after checking that it holds `numel` contiguous elements of a dtype.
template <class T>
T* memory(const Tensor& t, const DeviceNumber& device, int32_t dtype, int64_t numel,
          const char* name) {
  STD_TORCH_CHECK(DeviceNumber(t) == device, name, " must be on the device of num_skipped_blocks");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.numel() == numel, name, " must have ", numel, " elements, not ", t.numel());
  STD_TORCH_CHECK(dtype_number(t) == dtype, name,
                  " has the wrong dtype: parameters share one, so do "
                  "gradients, and BlockLayout.state_spec gives that of the state");
  return static_cast<T*>(t.data_ptr());
}

int kept_of(double density, int64_t length) {
  return static_cast<int>(std::max(1.0, std::ceil(density * static_cast<double>(length))));
}

struct Gathered {
  std::vector<Parameter> parameters;
  int window_size;
};

// The parameters with all their memory, after checking that every tensor fits.
Gathered gather_parameters(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                           const std::vector<Tensor>& steps,
                           const std::vector<Tensor>& window_indices,
                           const std::vector<Tensor>& window_values,
                           const std::vector<Tensor>& error, const std::vector<Tensor>& error_min,
                           const std::vector<Tensor>& error_max,
                           const std::vector<Tensor>& thresholds, const DeviceNumber& device,
                           double density, int64_t block_size, int64_t bucket_size,
                           const std::vector<int64_t>& ordinals,
                           const std::optional<Tensor>& held_state) {
  State given;
  if (!held_state)
    given = {steps, window_indices, window_values, error, error_min, error_max, thresholds};
  const State& state = held_state ? state_in(*held_state) : given;
  const size_t count = params.size();
  for (const auto* list : {&grads, &state.steps, &state.window_indices, &state.window_values,
                           &state.error, &state.error_min, &state.error_max, &state.thresholds}) {
    STD_TORCH_CHECK(list->size() == count, "every list must hold one tensor for each of the ",
                    count, " parameters");
  }
  STD_TORCH_CHECK(ordinals.size() == count, "ordinals must hold one number a parameter");
  STD_TORCH_CHECK(bucket_size >= 2 && bucket_size % 2 == 0, "bucket_size must be even");
  STD_TORCH_CHECK(block_size > 0 && block_size <= 32768 && block_size % bucket_size == 0,
                  "block_size must be a multiple of bucket_size and at most 32768");
  STD_TORCH_CHECK(density > 0 && density <= 1, "density must be greater than 0 and at most 1");
  STD_TORCH_CHECK(state.window_indices[0].dim() == 3, "window_indices must have 3 dimensions");
  const int64_t window_size = state.window_indices[0].size(1);
  STD_TORCH_CHECK(window_size > 0, "window_indices must have at least one slot");

  const int32_t param_dtype = dtype_number(params[0]), grad_dtype = dtype_number(grads[0]);
  const int32_t uint8 = aoti_torch_dtype_uint8(), int16 = aoti_torch_dtype_int16(),
                int64 = aoti_torch_dtype_int64(), bfloat16 = aoti_torch_dtype_bfloat16(),
                float32 = aoti_torch_dtype_float32();
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
    p.values = memory<void>(params[i], device, param_dtype, p.numel, "params");
    p.grad = memory<void>(grads[i], device, grad_dtype, p.numel, "grads");
    p.step = memory<int64_t>(state.steps[i], device, int64, 1, "steps");
    p.window_indices =
        memory<int16_t>(state.window_indices[i], device, int16, num_entries, "window_indices");
    p.window_values =
        memory<BFloat16>(state.window_values[i], device, bfloat16, num_entries, "window_values");
    p.error =
        memory<uint8_t>(state.error[i], device, uint8, num_buckets * bucket_size / 2, "error");
    p.error_min = memory<BFloat16>(state.error_min[i], device, bfloat16, num_buckets, "error_min");
    p.error_max = memory<BFloat16>(state.error_max[i], device, bfloat16, num_buckets, "error_max");
    p.thresholds = memory<float>(state.thresholds[i], device, float32, num_blocks, "thresholds");
    p.ordinal = static_cast<uint32_t>(ordinals[i]);
    parameters.push_back(p);
  }
  return {std::move(parameters), static_cast<int>(window_size)};
}

}  // namespace
}  // namespace microadam
