// The kernel in plain C++, for every machine.
#include "kernel.h"

namespace microadam::cpu {

int64_t step_blocks_generic(const Settings& s, const std::vector<Stepped>& parameters,
                            int64_t begin, int64_t end) {
  return step_blocks(s, parameters, begin, end);
}

// Here and not in kernel.h, so that the standard library's templates are compiled for every
// machine.
float kth_largest(float* magnitudes, int count, int k) {
  std::nth_element(magnitudes, magnitudes + k - 1, magnitudes + count, std::greater<float>());
  return magnitudes[k - 1];
}

}  // namespace microadam::cpu
