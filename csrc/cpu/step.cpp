// microadam::step_ on a CPU: gathers the pointers of all parameters, and gives the threads equal
// shares of all their blocks.
#include "step.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "../arguments.h"
#include "../library.h"

namespace microadam {
namespace {

using namespace cpu;

// Below this, waking another thread takes longer than the work.
constexpr int64_t kMinElementsPerThread = 32768;

double scalar_value(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.numel() == 1 && t.is_cpu(), name, " must be one number on the CPU");
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return *static_cast<const float*>(t.data_ptr());
    case ScalarType::Double:
      return *static_cast<const double*>(t.data_ptr());
    default:
      STD_TORCH_CHECK(false, name, " must be float32 or float64");
  }
}

struct Kernel {
  const char* name;
  StepBlocks step_blocks;
};

// The fastest kernel that this machine can run and that torch's own variable allows.
Kernel choose_kernel() {
#if defined(__x86_64__)
  const char* variable = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view most = variable == nullptr ? "" : variable;
  // What setup.py compiles them with.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");
  const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vbmi2");
  if (has_avx512 && most != "avx2" && most != "default") return {"AVX-512", step_blocks_avx512};
  if (has_avx2 && most != "default") return {"AVX2", step_blocks_avx2};
#endif
  return {"plain C++", step_blocks_generic};
}

}  // namespace

const char* cpu_kernel() { return choose_kernel().name; }

void step_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
              const std::vector<Tensor>& steps, const std::vector<Tensor>& window_indices,
              const std::vector<Tensor>& window_values, const std::vector<Tensor>& error,
              const std::vector<Tensor>& error_min, const std::vector<Tensor>& error_max,
              const std::vector<Tensor>& thresholds, const Tensor& num_skipped_blocks,
              const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
              const std::optional<Tensor>& found_inf, double lr, double beta1, double beta2,
              double eps, double weight_decay, double alpha, double density, int64_t block_size,
              int64_t bucket_size, bool stochastic_rounding, int64_t seed,
              const std::vector<int64_t>& ordinals, const std::optional<Tensor>& held_state) {
  if (found_inf && scalar_value(*found_inf, "found_inf") != 0) return;
  if (params.empty()) return;
  STD_TORCH_CHECK(num_skipped_blocks.is_cpu(), "num_skipped_blocks must be on the CPU");
  const DeviceNumber device(num_skipped_blocks);
  const auto [gathered, window_size] = gather_parameters(
      params, grads, steps, window_indices, window_values, error, error_min, error_max, thresholds,
      device, density, block_size, bucket_size, ordinals, held_state);

  if (lr_tensor) lr = scalar_value(*lr_tensor, "lr_tensor");
  const double scale = grad_scale ? scalar_value(*grad_scale, "grad_scale") : 1.0;

  Settings settings;
  settings.param_dtype = dtype_of(params[0], "params");
  settings.grad_dtype = dtype_of(grads[0], "grads");
  settings.block_size = static_cast<int>(block_size);
  settings.bucket_size = static_cast<int>(bucket_size);
  settings.window_size = window_size;
  settings.inv_scale = static_cast<float>(1.0 / scale);
  settings.decay = weight_decay != 0 ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  settings.kept_share = static_cast<float>(1 - alpha);
  settings.feedback_rate = static_cast<float>(lr * alpha / (1 - alpha));
  settings.stochastic_rounding = stochastic_rounding;
  for (int age = 0; age < settings.window_size; ++age) {
    settings.powers1.push_back(static_cast<float>(std::pow(beta1, age)));
    settings.powers2.push_back(static_cast<float>(std::pow(beta2, age)));
  }

  int64_t* total_skipped = memory<int64_t>(num_skipped_blocks, device, aoti_torch_dtype_int64(), 1,
                                           "num_skipped_blocks");

  std::vector<ParameterStep> parameters;
  parameters.reserve(gathered.size());
  int64_t num_blocks = 0, numel = 0;
  for (const Parameter& parameter : gathered) {
    ParameterStep p(parameter);
    p.step_number = ++*p.step;  // only now that all arguments are known to fit
    if (p.numel == 0) continue;
    p.num_blocks = (p.numel + block_size - 1) / block_size;
    p.first_block = num_blocks;
    const double step = static_cast<double>(p.step_number);
    p.factors.first = static_cast<float>((1 - beta1) / (1 - std::pow(beta1, step)));
    p.factors.second = static_cast<float>((1 - beta2) / (1 - std::pow(beta2, step)));
    p.factors.lr = static_cast<float>(lr);
    p.factors.eps = static_cast<float>(eps);
    p.rounding = {static_cast<uint64_t>(seed), p.ordinal, static_cast<uint32_t>(p.step_number)};
    parameters.push_back(p);
    num_blocks += p.num_blocks;
    numel += p.numel;
  }
  if (num_blocks == 0) return;

  const StepBlocks step_blocks = choose_kernel().step_blocks;
  std::atomic<int64_t> num_skipped{0};
  const int64_t grain = std::max<int64_t>(1, num_blocks * kMinElementsPerThread / numel);
  torch::stable::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
    num_skipped += step_blocks(settings, parameters, begin, end);
  });
  *total_skipped += num_skipped;
}

}  // namespace microadam
