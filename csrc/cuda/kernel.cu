// One step of all top-k blocks of up to kMaxParameters parameters: one thread block each.
//
// A full block of the default size stays in registers and shared memory from its gradient to its
// new error feedback (RegisterBlock, whose can_hold lists the conditions), so that every byte moves
// once. Other blocks, including the tails of parameters, are read again in every pass
// (MemoryBlock): simple, but slower.
//
// Everything is deterministic: the order of atomic operations affects only the places of candidates
// in a list, and these affect no result.
#include "kernel.h"
#include "selection.cuh"

namespace microadam::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// Scalars

__device__ double value_of(DeviceScalar scalar) {
  return scalar.is_double ? *static_cast<const double*>(scalar.value)
                          : *static_cast<const float*>(scalar.value);
}

__device__ bool is_set(DeviceScalar scalar) {
  if (scalar.value == nullptr) return false;
  return scalar.is_double ? *static_cast<const double*>(scalar.value) != 0.0
                          : *static_cast<const float*>(scalar.value) != 0.0f;
}

__device__ float inverse_scale(DeviceScalar scale) {
  if (scale.value == nullptr) return 1.0f;
  if (scale.is_double) return static_cast<float>(1.0 / *static_cast<const double*>(scale.value));
  return 1.0f / *static_cast<const float*>(scale.value);  // rounds as the quotient of doubles does
}

__device__ double power(const Beta& beta, uint32_t exponent) {
  double result = 1.0;
  for (uint32_t bits = exponent; bits != 0; bits &= bits - 1) {
    result *= beta.powers[__ffs(bits) - 1];
  }
  return result;
}

__device__ float age_weight(const Beta& beta, int age) {
  return age < kNumAges ? beta.ages[age] : static_cast<float>(power(beta, age));
}

__device__ int newest_slot(const Settings& s, uint32_t step) {
  return static_cast<int>((step - 1) % static_cast<uint32_t>(s.window_size));
}

// Computed by a warp that does not select.
__device__ void compute_scalars(const Settings& s, uint32_t step, Shared& shared) {
  const int thread = kThreads - 1 - rotated_thread();
  if (thread > 2) return;
  if (thread < 2) {
    const Beta& beta = thread == 0 ? s.beta1 : s.beta2;
    const float factor = static_cast<float>(beta.complement / (1.0 - power(beta, step)));
    (thread == 0 ? shared.factors.first : shared.factors.second) = factor;
  } else {
    shared.step = step;
    shared.num_slots = static_cast<int>(min(step, static_cast<uint32_t>(s.window_size)));
    shared.newest_slot = newest_slot(s, step);
    const double lr = s.lr_tensor.value == nullptr ? s.lr : value_of(s.lr_tensor);
    shared.factors.lr = static_cast<float>(lr);
    shared.factors.eps = s.eps;
    shared.decay = s.weight_decay != 0.0 ? static_cast<float>(1.0 - lr * s.weight_decay) : 1.0f;
    shared.feedback_rate = static_cast<float>(lr * s.alpha / (1.0 - s.alpha));
  }
}

// ---------------------------------------------------------------------------------------------
// The window

// Sums the moments of the elements [begin, end), slot by slot, so that every sum has one order. No
// coordinate repeats within a slot, except in one that was never written, where all values are 0.
template <int kNumThreads, class Elements>
__device__ void sum_moments(const Block& block, const Elements& elements, int begin, int end,
                            Shared& shared) {
  const Settings& s = block.s;
  Moments& moments = shared.moments;
  const int thread = rotated_thread();
  if (thread >= kNumThreads) return;
  const int num_slots = shared.num_slots;
  int age = shared.newest_slot;
#pragma unroll 1
  for (int slot = 0; slot < num_slots; ++slot) {
    const float first_weight = age_weight(s.beta1, age), second_weight = age_weight(s.beta2, age);
#pragma unroll 1
    for (int j = thread; j < block.k; j += 2 * kNumThreads) {
      // Two at once: both are read before one is written.
      int coordinates[2];
      float values[2], first[2], second[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        values[h] = 0.0f;
        if (j + h * kNumThreads >= block.k) continue;
        const Entry entry = elements.entry(slot * block.k + j + h * kNumThreads);
        coordinates[h] = entry.index() - begin;
        if (0 <= coordinates[h] && coordinates[h] < end - begin) values[h] = entry.value();
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (values[h] == 0.0f) continue;
        first[h] = moments.first[coordinates[h]] + values[h] * first_weight;
        // The weight is multiplied in before squaring: 0 times an infinite square would be NaN.
        second[h] = moments.second[coordinates[h]] + values[h] * second_weight * values[h];
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (values[h] == 0.0f) continue;
        moments.first[coordinates[h]] = first[h];
        moments.second[coordinates[h]] = second[h];
      }
    }
    age = age == 0 ? s.window_size - 1 : age - 1;
    if constexpr (kNumThreads == 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }
}

// Updates the parameter.
template <class Param, class Elements>
__device__ void apply_window(const Block& block, const Elements& elements, Shared& shared) {
  const Settings& s = block.s;
  const Rounding rounding = {s.stochastic_rounding, {s.seed, block.p.ordinal, shared.step}};
  const int num_entries = shared.num_slots * block.k;
  // Usually only the elements in the window change.
  const bool is_dense = shared.decay != 1.0f || shared.feedback_rate != 0.0f;
  Moments& moments = shared.moments;
#pragma unroll 1
  for (int begin = 0; begin < elements.length(); begin += kMomentChunk) {
    const int end = min(elements.length(), begin + kMomentChunk), size = end - begin;
    const int64_t first = block.first() + begin;
    Param* const params = static_cast<Param*>(block.p.values) + first;
    __syncthreads();  // what was in this memory is no longer needed
    if (is_dense) {
#pragma unroll 1
      for (int i = threadIdx.x; i < (size + 3) / 4; i += kThreads) {
        reinterpret_cast<float4*>(moments.first)[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        reinterpret_cast<float4*>(moments.second)[i] = {0.0f, 0.0f, 0.0f, 0.0f};
      }
    } else {
#pragma unroll 1
      for (int e = threadIdx.x; e < num_entries; e += kThreads) {
        const int i = elements.entry(e).index() - begin;
        if (i < 0 || i >= size) continue;
        moments.first[i] = 0.0f, moments.second[i] = 0.0f;
        prefetch(params + i);
      }
    }
    __syncthreads();
    // A slot usually has few entries: one warp sums them, without waiting for the others.
    if (block.k <= 64) {
      sum_moments<32>(block, elements, begin, end, shared);
    } else {
      sum_moments<kThreads>(block, elements, begin, end, shared);
    }
    __syncthreads();
#pragma unroll 1
    for (int e = threadIdx.x; e < num_entries; e += kThreads) {
      const int i = elements.entry(e).index() - begin;
      if (i < 0 || i >= size) continue;
      // The first thread to arrive takes the coordinate: no sum of squares is negative.
      const float second = atomicExch(&moments.second[i], -1.0f);
      if (second < 0.0f) continue;
      const float update = parameter_update(moments.first[i], second, shared.factors);
      if (is_dense) {
        moments.first[i] = update;
      } else if (update != 0.0f) {
        params[i] = rounded<Param>(to_float(params[i]) - update, first + i, rounding);
      }
    }
    if (!is_dense) continue;
    __syncthreads();
    if (shared.feedback_rate != 0.0f) {
#pragma unroll 1
      for (int i = threadIdx.x; i < size; i += kThreads) {
        moments.first[i] += shared.feedback_rate * block.feedback(begin + i);
      }
      __syncthreads();
    }
    elements.apply(moments.first, begin, end, shared.decay, rounding);
  }
}

// ---------------------------------------------------------------------------------------------
// Kernels

template <class Param, class Elements>
__device__ void step_block(const Block& block, Shared& shared) {
  const Settings& s = block.s;
  // All loads of the first phase start before any of their results is used.
  const float guess = *block.threshold();
  const uint32_t step = static_cast<uint32_t>(*block.p.step);
  Elements elements(block, shared);
  elements.accumulate(inverse_scale(s.grad_scale));
  const uint32_t probe = first_probe(guess);
  list_candidates(elements, probe, shared);
  __syncthreads();
  compute_scalars(s, step, shared);
  const bool is_finite =
      select(elements, block, probe, shared, [&](int position, int index, float value) {
        elements.set_entry(newest_slot(s, step) * block.k + position, static_cast<int16_t>(index),
                           round_to<BFloat16>(value));
      });
  if (!is_finite) {
    if (threadIdx.x == 0) atomicAdd(s.num_skipped_blocks, 1ull);
    return;
  }
  elements.store_error();
  apply_window<Param>(block, elements, shared);
}

// Not inlined, so that it costs the main path no registers.
template <class Param, class Grad>
__device__ __noinline__ void step_memory_block(const Settings& s, const Parameter& p,
                                               uint32_t index, Shared& shared) {
  step_block<Param, MemoryBlock<Param, Grad>>(Block::of(s, p, index), shared);
}

__global__ void count_kernel(const __grid_constant__ Counters counters) {
  if (is_set(counters.found_inf)) return;
  const int i = threadIdx.x;
  if (i < counters.num_steps) ++*counters.steps[i];
}

// The parameter that a block of the launch belongs to: the last one that begins at or before it.
__device__ int parameter_of(const Launch& launch, int block) {
  int parameter = 0;
  for (int end = launch.num_parameters; end - parameter > 1;) {
    const int middle = (parameter + end) / 2;
    (launch.first_blocks[middle] <= block ? parameter : end) = middle;
  }
  return parameter;
}

template <class Param, class Grad>
__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    step_kernel(const __grid_constant__ Launch launch) {
  __shared__ Shared shared;
  const Settings& s = launch.settings;
  if (is_set(s.found_inf)) return;
  if (rotated_thread() == 0) {
    clear_candidates(shared);
    shared.parameter = parameter_of(launch, blockIdx.x);
    shared.index = blockIdx.x - static_cast<uint32_t>(launch.first_blocks[shared.parameter]);
    const Block block = Block::of(s, launch.parameters[shared.parameter], shared.index);
    shared.is_register_block = RegisterBlock<Param, Grad>::can_hold(block);
  }
  __syncthreads();
  const Parameter& p = launch.parameters[shared.parameter];
  const uint32_t index = shared.index;
  if (shared.is_register_block) {
    step_block<Param, RegisterBlock<Param, Grad>>({s, p, index, kRegisterBlock, p.k}, shared);
  } else {
    step_memory_block<Param, Grad>(s, p, index, shared);
  }
}

// ---------------------------------------------------------------------------------------------
// Launches

using Kernel = void (*)(Launch);

template <class Param>
Kernel kernel_for(Dtype grad) {
  switch (grad) {
    case Dtype::kBFloat16:
      return step_kernel<Param, BFloat16>;
    case Dtype::kFloat16:
      return step_kernel<Param, Float16>;
    default:
      return step_kernel<Param, float>;
  }
}

Kernel kernel_for(Dtype param, Dtype grad) {
  switch (param) {
    case Dtype::kBFloat16:
      return kernel_for<BFloat16>(grad);
    case Dtype::kFloat16:
      return kernel_for<Float16>(grad);
    default:
      return kernel_for<float>(grad);
  }
}

}  // namespace

cudaError_t count(const Counters& counters, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  config.gridDim = dim3(1);
  config.blockDim = dim3(kMaxCounters);
  return cudaLaunchKernelEx(&config, count_kernel, counters);
}

cudaError_t step(const Launch& launch, int num_blocks, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  const Settings& s = launch.settings;
  return cudaLaunchKernelEx(&config, kernel_for(s.param_dtype, s.grad_dtype), launch);
}

}  // namespace microadam::cuda
