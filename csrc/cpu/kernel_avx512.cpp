// The kernel for x86 with AVX-512 as of Ice Lake and Zen 4 (including VBMI2).
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about vectors that its own header leaves uninitialized on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "kernel.h"

namespace microadam::cpu {

int64_t step_blocks_avx512(const Settings& s, const std::vector<ParameterStep>& parameters,
                           int64_t begin, int64_t end) {
  return step_blocks(s, parameters, begin, end);
}

}  // namespace microadam::cpu
