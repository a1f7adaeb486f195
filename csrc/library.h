// The implementations that library.cpp registers. Arguments as in microadam/ops.py.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace microadam {

using Step = void(const std::vector<torch::stable::Tensor>& params,
                  const std::vector<torch::stable::Tensor>& grads,
                  const std::vector<torch::stable::Tensor>& steps,
                  const std::vector<torch::stable::Tensor>& window_indices,
                  const std::vector<torch::stable::Tensor>& window_values,
                  const std::vector<torch::stable::Tensor>& error,
                  const std::vector<torch::stable::Tensor>& error_min,
                  const std::vector<torch::stable::Tensor>& error_max,
                  const std::vector<torch::stable::Tensor>& thresholds,
                  const torch::stable::Tensor& num_skipped_blocks,
                  const std::optional<torch::stable::Tensor>& lr_tensor,
                  const std::optional<torch::stable::Tensor>& grad_scale,
                  const std::optional<torch::stable::Tensor>& found_inf, double lr, double beta1,
                  double beta2, double eps, double weight_decay, double alpha, double density,
                  int64_t block_size, int64_t bucket_size, bool stochastic_rounding, int64_t seed,
                  const std::vector<int64_t>& ordinals,
                  const std::optional<torch::stable::Tensor>& held_state);
Step step_cpu;
Step step_cuda;  // only in builds with nvcc (MICROADAM_WITH_CUDA)

// Which of the CPU kernels this machine gets: "AVX-512", "AVX2" or "plain C++".
const char* cpu_kernel();

}  // namespace microadam
