// The kernel for x86 with AVX2 and F16C (built with -mavx2 -mf16c).
#include "kernel.h"

namespace microadam::cpu {

int64_t step_blocks_avx2(const Settings& s, const std::vector<Stepped>& parameters, int64_t begin,
                         int64_t end) {
  return step_blocks(s, parameters, begin, end);
}

}  // namespace microadam::cpu
