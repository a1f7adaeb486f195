// Registers the native implementations of microadam::step_, whose schema microadam/ops.py defines.
//
// Built against torch's stable ABI: the library depends on no Python version and on torch >= 2.11.
#include "library.h"

STABLE_TORCH_LIBRARY_IMPL(microadam, CPU, m) { m.impl("step_", TORCH_BOX(&microadam::step_cpu)); }
