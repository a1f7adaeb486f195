// Stands in for csrc/cuda/device.h; the emulated device is the CPU. Must be included first.
#define MICROADAM_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

namespace microadam::cuda {

#define MICROADAM_CUDA_CHECK(call) STD_TORCH_CHECK((call) == cudaSuccess, "the emulation failed")

struct DeviceOf {
  explicit DeviceOf(const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace microadam::cuda
