// Torch's idea of the current device and stream.
#ifndef MICROADAM_CUDA_DEVICE_H
#define MICROADAM_CUDA_DEVICE_H

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

namespace microadam::cuda {

#define MICROADAM_CUDA_CHECK(call)                                                             \
  do {                                                                                         \
    const cudaError_t status = (call);                                                         \
    STD_TORCH_CHECK(status == cudaSuccess,                                                     \
                    "MicroAdam's step on a CUDA device failed: ", cudaGetErrorString(status)); \
  } while (false)

// The current stream of a device. Looked up in torch's CUDA library, which is loaded whenever there
// is a CUDA tensor: if ours were linked against it, it would not load into a CPU-only torch.
inline cudaStream_t current_stream(int32_t device) {
  using Getter = AOTITorchError (*)(int32_t device, void** stream);
  static const Getter getter = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol =
        torch_cuda == nullptr ? nullptr : dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(symbol);
  }();
  STD_TORCH_CHECK(getter != nullptr, "MicroAdam finds no current CUDA stream in this torch");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Makes the device of a tensor the current one for as long as the object lives.
class DeviceOf {
 public:
  explicit DeviceOf(const torch::stable::Tensor& t)
      : guard_(t.get_device_index()), stream_(current_stream(t.get_device_index())) {
    // This library has its own copy of the CUDA runtime, which must be told too.
    MICROADAM_CUDA_CHECK(cudaSetDevice(t.get_device_index()));
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace microadam::cuda

#endif
