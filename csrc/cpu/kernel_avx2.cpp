// The kernel for x86 with AVX2 (built with AVX2_FLAGS of setup.py).
#include "kernel.h"

namespace microadam::cpu {

int64_t step_blocks_avx2(const Settings& s, const std::vector<ParameterStep>& parameters,
                         int64_t begin, int64_t end) {
  return step_blocks(s, parameters, begin, end);
}

}  // namespace microadam::cpu
