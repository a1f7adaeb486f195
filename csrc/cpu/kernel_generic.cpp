// The kernel in plain C++, for every machine.
#include "kernel.h"

namespace microadam::cpu {

int64_t step_blocks_generic(const Settings& s, const std::vector<ParameterStep>& parameters,
                            int64_t begin, int64_t end) {
  return step_blocks(s, parameters, begin, end);
}

}  // namespace microadam::cpu
