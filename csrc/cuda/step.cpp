// microadam::step_ on a CUDA device: distributes the parameters over launches of the kernel.
#include "../arguments.h"
#include "../library.h"
#include "device.h"
#include "kernel.h"

namespace microadam {
namespace {

using namespace cuda;

Beta powers_of(double beta) {
  Beta result;
  result.complement = 1 - beta;
  for (int i = 0; i < kNumPowers; ++i) result.powers[i] = std::pow(beta, std::ldexp(1.0, i));
  for (int age = 0; age < kNumAges; ++age)
    result.ages[age] = static_cast<float>(std::pow(beta, age));
  return result;
}

DeviceScalar scalar_of(const std::optional<Tensor>& t, const DeviceNumber& device,
                       const char* name) {
  if (!t) return {nullptr, false};
  const ScalarType type = t->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name,
                  " must be float32 or float64");
  return {memory<void>(*t, device, dtype_number(*t), 1, name), type == ScalarType::Double};
}

}  // namespace

void step_cuda(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
               const std::vector<Tensor>& steps, const std::vector<Tensor>& window_indices,
               const std::vector<Tensor>& window_values, const std::vector<Tensor>& error,
               const std::vector<Tensor>& error_min, const std::vector<Tensor>& error_max,
               const std::vector<Tensor>& thresholds, const Tensor& num_skipped_blocks,
               const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_scale,
               const std::optional<Tensor>& found_inf, double lr, double beta1, double beta2,
               double eps, double weight_decay, double alpha, double density, int64_t block_size,
               int64_t bucket_size, bool stochastic_rounding, int64_t seed,
               const std::vector<int64_t>& ordinals, const std::optional<Tensor>& held_state) {
  if (params.empty()) return;
  const DeviceNumber device(num_skipped_blocks);
  const auto [parameters, window_size] = gather_parameters(
      params, grads, steps, window_indices, window_values, error, error_min, error_max, thresholds,
      device, density, block_size, bucket_size, ordinals, held_state);

  Launch launch = {};
  Settings& s = launch.settings;
  s.beta1 = powers_of(beta1);
  s.beta2 = powers_of(beta2);
  s.lr = lr;
  s.weight_decay = weight_decay;
  s.alpha = alpha;
  s.lr_tensor = scalar_of(lr_tensor, device, "lr_tensor");
  s.grad_scale = scalar_of(grad_scale, device, "grad_scale");
  s.found_inf = scalar_of(found_inf, device, "found_inf");
  s.num_skipped_blocks = memory<unsigned long long>(
      num_skipped_blocks, device, aoti_torch_dtype_int64(), 1, "num_skipped_blocks");
  s.seed = static_cast<uint64_t>(seed);
  s.eps = static_cast<float>(eps);
  s.kept_share = static_cast<float>(1 - alpha);
  s.param_dtype = dtype_of(params[0], "params");
  s.grad_dtype = dtype_of(grads[0], "grads");
  s.block_size = static_cast<int>(block_size);
  s.bucket_size = static_cast<int>(bucket_size);
  s.buckets_per_block = static_cast<int>(block_size / bucket_size);
  s.window_size = window_size;
  s.stochastic_rounding = stochastic_rounding && s.param_dtype != Dtype::kFloat32;

  const auto num_blocks_of = [&](const Parameter& p) {
    return (p.numel + block_size - 1) / block_size;
  };
  for (const Parameter& p : parameters) {
    STD_TORCH_CHECK(num_blocks_of(p) <= INT32_MAX, "a parameter of ", p.numel,
                    " elements has more than ", INT32_MAX, " blocks of block_size ", block_size);
  }

  const DeviceOf current(num_skipped_blocks);
  Counters counters = {};
  counters.found_inf = s.found_inf;
  for (const Parameter& p : parameters) {
    counters.steps[counters.num_steps++] = p.step;
    if (counters.num_steps == kMaxCounters || &p == &parameters.back()) {
      MICROADAM_CUDA_CHECK(cuda::count(counters, current.stream()));
      counters.num_steps = 0;
    }
  }

  int64_t num_blocks = 0;
  const auto flush = [&] {
    if (num_blocks > 0) {
      MICROADAM_CUDA_CHECK(cuda::step(launch, static_cast<int>(num_blocks), current.stream()));
    }
    launch.num_parameters = 0;
    num_blocks = 0;
  };
  for (const Parameter& p : parameters) {
    const int64_t count = num_blocks_of(p);
    if (launch.num_parameters == kMaxParameters || num_blocks + count > INT32_MAX) flush();
    launch.first_blocks[launch.num_parameters] = static_cast<int>(num_blocks);
    launch.parameters[launch.num_parameters++] = p;
    num_blocks += count;
  }
  flush();
}

}  // namespace microadam
