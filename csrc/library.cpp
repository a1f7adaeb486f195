// Registers the native implementations of microadam::step_, whose schema microadam/ops.py defines.
//
// Built against torch's stable ABI: the library depends on no Python version and on torch >= 2.11.
#include "library.h"

#include <torch/csrc/stable/ops.h>

#include <string>

#include "state.h"

namespace {

using torch::headeronly::DeviceType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// See HeldState; deleted with the last reference to what this returns.
Tensor hold_state(const std::vector<Tensor>& steps, const std::vector<Tensor>& window_indices,
                  const std::vector<Tensor>& window_values, const std::vector<Tensor>& error,
                  const std::vector<Tensor>& error_min, const std::vector<Tensor>& error_max,
                  const std::vector<Tensor>& thresholds) {
  using microadam::HeldState;
  auto* held = new HeldState{
      nullptr,
      {steps, window_indices, window_values, error, error_min, error_max, thresholds},
  };
  held->self = held;
  return torch::stable::from_blob(held, {sizeof(HeldState)}, {1},
                                  torch::stable::Device(DeviceType::CPU), ScalarType::Byte,
                                  [](void* data) { delete static_cast<HeldState*>(data); });
}

// The name of the kernel that runs on this type of device; empty if none was built.
std::string native_kernel(const std::string& device_type) {
  if (device_type == "cpu") return microadam::cpu_kernel();
#if defined(MICROADAM_WITH_CUDA)
  if (device_type == "cuda") return "CUDA";
#endif
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(microadam, m) {
  m.def("native_kernel(str device_type) -> str");
  m.def(
      "hold_state(Tensor[] steps, Tensor[] window_indices, Tensor[] window_values, "
      "Tensor[] error, Tensor[] error_min, Tensor[] error_max, Tensor[] thresholds) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(microadam, CompositeExplicitAutograd, m) {
  m.impl("native_kernel", TORCH_BOX(&native_kernel));
  m.impl("hold_state", TORCH_BOX(&hold_state));
}

STABLE_TORCH_LIBRARY_IMPL(microadam, CPU, m) { m.impl("step_", TORCH_BOX(&microadam::step_cpu)); }

#if defined(MICROADAM_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(microadam, CUDA, m) { m.impl("step_", TORCH_BOX(&microadam::step_cuda)); }
#endif
