// The state of parameters that are stepped together, and how a caller keeps it from step to step.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace microadam {

// Lists of one tensor per parameter; shapes as in microadam/layout.py.
struct State {
  std::vector<torch::stable::Tensor> steps, window_indices, window_values, error, error_min,
      error_max, thresholds;
};

// Converting Python's lists to these takes longer than the step of small parameters. So a caller
// may do it once, with microadam::hold_state, and pass what that returns: a tensor whose memory is
// this object and which deletes it. It holds tensors, not pointers into them: the next step sees
// whatever was done to one in place, even a new storage, and checks it like any other.
struct HeldState {
  const HeldState* self;  // distinguishes it from the memory of any other tensor
  State state;
};

inline const State& state_in(const torch::stable::Tensor& held) {
  const bool has_size = held.is_cpu() && held.is_contiguous() &&
                        held.scalar_type() == torch::headeronly::ScalarType::Byte &&
                        held.numel() == static_cast<int64_t>(sizeof(HeldState));
  const auto* address = has_size ? static_cast<const HeldState*>(held.data_ptr()) : nullptr;
  STD_TORCH_CHECK(address != nullptr && address->self == address,
                  "held_state must be what microadam::hold_state returned");
  return address->state;
}

}  // namespace microadam
