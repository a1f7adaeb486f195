// microadam::step_ on a CPU: gathers the pointers of all parameters, and gives the threads equal
// shares of all their blocks.
#include "step.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <string_view>

#include "../library.h"

namespace microadam {
namespace {

using namespace cpu;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this, waking another thread takes longer than the work.
constexpr int64_t kMinElementsPerThread = 32768;

Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

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

// The tensor's memory, once it is known to hold `numel` elements of `type` in a row.
template <class T>
T* memory(const Tensor& t, ScalarType type, int64_t numel, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.scalar_type() == type && t.numel() == numel,
                  name, " must be a contiguous CPU tensor of ", numel,
                  " elements and of the dtype that BlockLayout.state_spec gives");
  return static_cast<T*>(t.data_ptr());
}

int kept_of(double density, int64_t length) {
  return static_cast<int>(std::max(1.0, std::ceil(density * static_cast<double>(length))));
}

}  // namespace

const char* cpu_kernel() {
#if defined(__x86_64__)
  // torch's own variable for its own kernels: `default` is plain C++.
  const char* wanted = std::getenv("ATEN_CPU_CAPABILITY");
  const bool is_allowed = wanted == nullptr || std::string_view(wanted) != "default";
  if (is_allowed && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) return "AVX2";
#endif
  return "plain C++";
}

void step_cpu(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
              const std::vector<Tensor>& steps, const std::vector<Tensor>& window_indices,
              const std::vector<Tensor>& window_values, const std::vector<Tensor>& error,
              const std::vector<Tensor>& error_min, const std::vector<Tensor>& error_max,
              const std::vector<Tensor>& thresholds, const Tensor& num_skipped_blocks,
              const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
              const std::optional<Tensor>& found_inf, double lr, double beta1, double beta2,
              double eps, double weight_decay, double density, int64_t block_size,
              int64_t bucket_size, bool stochastic_rounding, int64_t seed,
              const std::vector<int64_t>& ordinals) {
  if (found_inf && scalar_value(*found_inf, "found_inf") != 0) return;
  if (params.empty()) return;
  const size_t count = params.size();
  for (const auto* list : {&grads, &steps, &window_indices, &window_values, &error, &error_min,
                           &error_max, &thresholds}) {
    STD_TORCH_CHECK(list->size() == count, "every list must hold one tensor for each of the ",
                    count, " parameters");
  }
  STD_TORCH_CHECK(ordinals.size() == count, "ordinals must hold one number a parameter");
  STD_TORCH_CHECK(bucket_size >= 2 && bucket_size % 2 == 0, "bucket_size must be even");
  STD_TORCH_CHECK(block_size > 0 && block_size <= 32768 && block_size % bucket_size == 0,
                  "block_size must be a multiple of bucket_size and at most 32768");
  STD_TORCH_CHECK(density > 0 && density <= 1, "density must be greater than 0 and at most 1");
  STD_TORCH_CHECK(window_indices[0].dim() == 3, "window_indices must have 3 dimensions");

  if (lr_tensor) lr = scalar_value(*lr_tensor, "lr_tensor");
  const double scale = grad_scale ? scalar_value(*grad_scale, "grad_scale") : 1.0;

  Settings settings;
  settings.param_dtype = dtype_of(params[0], "params");
  settings.grad_dtype = dtype_of(grads[0], "grads");
  settings.block_size = static_cast<int>(block_size);
  settings.bucket_size = static_cast<int>(bucket_size);
  settings.window_size = static_cast<int>(window_indices[0].size(1));
  settings.inv_scale = static_cast<float>(1.0 / scale);
  settings.decay = weight_decay != 0 ? static_cast<float>(1 - lr * weight_decay) : 1.0f;
  settings.stochastic_rounding = stochastic_rounding;
  for (int age = 0; age < settings.window_size; ++age) {
    settings.powers1.push_back(static_cast<float>(std::pow(beta1, age)));
    settings.powers2.push_back(static_cast<float>(std::pow(beta2, age)));
  }

  std::vector<int64_t*> counters;
  std::vector<Parameter> parameters;
  parameters.reserve(count);
  int64_t num_blocks = 0, numel = 0;
  for (size_t i = 0; i < count; ++i) {
    Parameter p;
    p.numel = params[i].numel();
    p.num_blocks = (p.numel + block_size - 1) / block_size;
    p.first_block = num_blocks;
    p.k = kept_of(density, std::min(p.numel, block_size));
    p.last_k = p.numel == 0 ? 0 : kept_of(density, p.numel - (p.num_blocks - 1) * block_size);
    p.values = memory<void>(params[i], params[0].scalar_type(), p.numel, "params");
    p.grad = memory<void>(grads[i], grads[0].scalar_type(), p.numel, "grads");
    const int64_t num_entries = p.num_blocks * settings.window_size * p.k;
    const int64_t num_buckets = (p.numel + bucket_size - 1) / bucket_size;
    p.window_indices =
        memory<int16_t>(window_indices[i], ScalarType::Short, num_entries, "window_indices");
    p.window_values =
        memory<BFloat16>(window_values[i], ScalarType::BFloat16, num_entries, "window_values");
    p.error = memory<uint8_t>(error[i], ScalarType::Byte, num_buckets * bucket_size / 2, "error");
    p.error_min = memory<BFloat16>(error_min[i], ScalarType::BFloat16, num_buckets, "error_min");
    p.error_max = memory<BFloat16>(error_max[i], ScalarType::BFloat16, num_buckets, "error_max");
    p.thresholds = memory<float>(thresholds[i], ScalarType::Float, p.num_blocks, "thresholds");
    counters.push_back(memory<int64_t>(steps[i], ScalarType::Long, 1, "steps"));
    p.step = *counters.back() + 1;
    const double step = static_cast<double>(p.step);
    p.factors.first = static_cast<float>((1 - beta1) / (1 - std::pow(beta1, step)));
    p.factors.second = static_cast<float>((1 - beta2) / (1 - std::pow(beta2, step)));
    p.factors.lr = static_cast<float>(lr);
    p.factors.eps = static_cast<float>(eps);
    p.rounding = {static_cast<uint64_t>(seed), static_cast<uint32_t>(ordinals[i]),
                  static_cast<uint32_t>(p.step)};
    if (p.num_blocks == 0) continue;
    parameters.push_back(p);
    num_blocks += p.num_blocks;
    numel += p.numel;
  }
  int64_t* total_skipped =
      memory<int64_t>(num_skipped_blocks, ScalarType::Long, 1, "num_skipped_blocks");
  for (int64_t* counter : counters) ++*counter;  // only now that all arguments are known to fit
  if (num_blocks == 0) return;

  StepBlocks step_blocks = step_blocks_generic;
#if defined(__x86_64__)
  if (std::string_view(cpu_kernel()) == "AVX2") step_blocks = step_blocks_avx2;
#endif
  std::atomic<int64_t> num_skipped{0};
  const int64_t grain = std::max<int64_t>(1, num_blocks * kMinElementsPerThread / numel);
  torch::stable::parallel_for(0, num_blocks, grain, [&](int64_t begin, int64_t end) {
    num_skipped += step_blocks(settings, parameters, begin, end);
  });
  *total_skipped += num_skipped;
}

}  // namespace microadam
