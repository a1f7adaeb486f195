// Registers the native implementations of microadam::step_, whose schema microadam/ops.py defines.
//
// Built against torch's stable ABI: the library depends on no Python version and on torch >= 2.11.
#include "library.h"

#include <string>

namespace {

// The name of the kernel that runs on this kind of device; empty where none was built.
std::string native_kernel(const std::string& device_type) {
  if (device_type == "cpu") return microadam::cpu_kernel();
#if defined(MICROADAM_WITH_CUDA)
  if (device_type == "cuda") return "CUDA";
#endif
  return "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(microadam, m) { m.def("native_kernel(str device_type) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(microadam, CompositeExplicitAutograd, m) {
  m.impl("native_kernel", TORCH_BOX(&native_kernel));
}

STABLE_TORCH_LIBRARY_IMPL(microadam, CPU, m) { m.impl("step_", TORCH_BOX(&microadam::step_cpu)); }

#if defined(MICROADAM_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(microadam, CUDA, m) { m.impl("step_", TORCH_BOX(&microadam::step_cuda)); }
#endif
