// The CUDA step as an operator on CPU tensors; the test defines its schema.
#include "../../csrc/library.h"

STABLE_TORCH_LIBRARY_IMPL(microadam_emulation, CPU, m) {
  m.impl("step_", TORCH_BOX(&microadam::step_cuda));
}

extern "C" void emulation_set_launcher(emulation::Launcher launcher) {
  emulation::launcher = launcher;
}
