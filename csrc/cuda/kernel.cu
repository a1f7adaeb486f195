// One step of all top-k blocks of up to kMaxParameters parameters: one thread block each.
//
// A full block of the default size lives in registers from its gradient to its new error feedback
// (RegisterBlock), so that every byte moves once. Blocks of any other length or bucket size, and
// the tails of parameters, are read again in every pass (MemoryBlock): simple, and slower.
//
// Everything is deterministic: where threads meet in an atomic operation, their order changes
// nothing but the place of a candidate in a list that is only counted.
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

// Computed by one warp, while the others wait for their gradients.
__device__ void compute_factors(const Settings& s, uint32_t step, Shared& shared) {
  if (threadIdx.x < 2) {
    const Beta& beta = threadIdx.x == 0 ? s.beta1 : s.beta2;
    const float factor = static_cast<float>(beta.complement / (1.0 - power(beta, step)));
    (threadIdx.x == 0 ? shared.factors.first : shared.factors.second) = factor;
  } else if (threadIdx.x == 2) {
    const double lr = s.lr_tensor.value == nullptr ? s.lr : value_of(s.lr_tensor);
    shared.factors.lr = static_cast<float>(lr);
    shared.factors.eps = s.eps;
    shared.decay = s.weight_decay != 0.0 ? static_cast<float>(1.0 - lr * s.weight_decay) : 1.0f;
    shared.feedback_rate = static_cast<float>(lr * s.alpha / (1.0 - s.alpha));
  }
}

// ---------------------------------------------------------------------------------------------
// The window

// Where entry `e` lies in the window's memory, counted over the entries that the block uses. Slots
// have room for the entries of the longest block.
__device__ int64_t window_position(const Block& block, int e) {
  const int gap = block.p.k - block.k;
  return block.entry(0, 0) + e + (gap == 0 ? 0 : e / block.k * gap);
}

// What goes to shared memory: the first entries of the window, as many as have room. All slots, so
// that nobody waits to hear which is the newest; that one is written over once it is known.
__device__ void fetch_window(const Block& block, Entry (&own)[kStagedPerThread]) {
#pragma unroll
  for (int i = 0; i < kStagedPerThread; ++i) {
    const int e = threadIdx.x + i * kThreads;
    if (e >= block.s.window_size * block.k) continue;
    const int64_t position = window_position(block, e);
    own[i] = {block.p.window_indices[position], block.p.window_values[position]};
  }
}

__device__ void stage_window(const Entry (&own)[kStagedPerThread], Shared& shared) {
#pragma unroll
  for (int i = 0; i < kStagedPerThread; ++i) shared.staged[threadIdx.x + i * kThreads] = own[i];
}

__device__ Entry window_entry(const Block& block, const Shared& shared, int e) {
  if (e < kMaxStaged) return shared.staged[e];
  const int64_t position = window_position(block, e);
  return {block.p.window_indices[position], block.p.window_values[position]};
}

// Writes the updates of the elements [begin, end), at most kMomentChunk, into moments.first.
__device__ void compute_updates(const Block& block, int begin, int end, Shared& shared) {
  const Settings& s = block.s;
  const int num_slots = block.num_slots(), newest_slot = block.newest_slot;
  Moments& moments = shared.moments;
  const int size = end - begin;
  __syncthreads();  // what lay here before is not needed any more
  for (int i = threadIdx.x; i < (size + 3) / 4; i += kThreads) {
    reinterpret_cast<float4*>(moments.first)[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    reinterpret_cast<float4*>(moments.second)[i] = {0.0f, 0.0f, 0.0f, 0.0f};
  }
  // No coordinate repeats within a slot, but for the zeros of one that was never written; one slot
  // after the other, sums have one order.
  for (int slot = 0; slot < num_slots; ++slot) {
    __syncthreads();
    for (int j = threadIdx.x; j < block.k; j += kThreads) {
      const Entry entry = window_entry(block, shared, slot * block.k + j);
      const int i = entry.index - begin;
      if (i < 0 || i >= size) continue;
      const int difference = newest_slot - slot;
      const int age = difference < 0 ? difference + s.window_size : difference;
      const float value = to_float(entry.value);
      if (value == 0.0f) continue;
      moments.first[i] += value * age_weight(s.beta1, age);
      // The weight first: it may be 0, and the square infinite.
      moments.second[i] += value * age_weight(s.beta2, age) * value;
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_slots * block.k; e += kThreads) {
    const int i = window_entry(block, shared, e).index - begin;
    if (i < 0 || i >= size) continue;
    // The first to come takes a coordinate; sums of squares are never negative.
    const float second = atomicExch(&moments.second[i], -1.0f);
    if (second < 0.0f) continue;
    moments.first[i] = parameter_update(moments.first[i], second, shared.factors);
  }
  __syncthreads();
  if (shared.feedback_rate == 0.0f) return;
#pragma unroll 1
  for (int i = threadIdx.x; i < size; i += kThreads) {
    moments.first[i] += shared.feedback_rate * block.feedback(begin + i);
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------
// Kernels

template <class Elements>
__device__ void step_block(Block block, Shared& shared) {
  const Settings& s = block.s;
  if (threadIdx.x == 0) shared.num_candidates = 0, shared.kth = ~0u, shared.wanted = ~0u;
  // All that the first phase needs is asked for before any of it is used.
  Entry own_entries[kStagedPerThread] = {};
  fetch_window(block, own_entries);
  const float guess = *block.threshold();
  Elements elements(block);
  block.read_step();
  compute_factors(s, block.step, shared);
  stage_window(own_entries, shared);
  elements.accumulate(inverse_scale(s.grad_scale));
  if (__syncthreads_or(!elements.is_finite())) {
    if (threadIdx.x == 0) atomicAdd(s.num_skipped_blocks, 1ull);
    return;
  }

  const uint32_t kth = kth_magnitude(elements, block, guess, shared);
  elements.mark(kth, shared.selection);
  __syncthreads();
  select(block, shared);
  const int newest_slot = block.newest_slot;
  elements.take_selected(shared.selection, [&](int position, int index, float value) {
    const Entry entry = {static_cast<int16_t>(index), round_to<BFloat16>(value)};
    const int64_t target = block.entry(newest_slot, position);
    block.p.window_indices[target] = entry.index;
    block.p.window_values[target] = entry.value;
    const int e = newest_slot * block.k + position;
    if (e < kMaxStaged) shared.staged[e] = entry;
  });
  elements.store_error();

  const Rounding rounding = {s.stochastic_rounding, {s.seed, block.p.ordinal, block.step}};
  for (int begin = 0; begin < block.length; begin += kMomentChunk) {
    const int end = min(block.length, begin + kMomentChunk);
    compute_updates(block, begin, end, shared);
    elements.apply(shared.moments.first, begin, end, shared.decay, rounding);
  }
}

// Not inlined, so that it takes no registers from the kernel's main path.
__device__ __noinline__ void step_memory_block(const Settings& s, const Parameter& p, int index,
                                               Shared& shared) {
  step_block<MemoryBlock>(Block(s, p, index), shared);
}

// Counts the step before step_kernel reads it: its blocks must not race with the one that counts.
__global__ void count_step_kernel(const __grid_constant__ Launch launch) {
  if (is_set(launch.settings.found_inf)) return;
  const int i = threadIdx.x;
  if (i < launch.num_parameters) ++*launch.parameters[i].step;
}

__global__ void __launch_bounds__(kThreads, kMinBlocksPerSm)
    step_kernel(const __grid_constant__ Launch launch) {
  __shared__ Shared shared;
  const Settings& s = launch.settings;
  if (is_set(s.found_inf)) return;
  int parameter = 0;  // the last one that begins at this block or before
  for (int end = launch.num_parameters; end - parameter > 1;) {
    const int middle = (parameter + end) / 2;
    const bool is_before = launch.parameters[middle].first_block <= static_cast<int>(blockIdx.x);
    (is_before ? parameter : end) = middle;
  }
  const Parameter& p = launch.parameters[parameter];
  const Block block(s, p, blockIdx.x - p.first_block);
  if (block.length == kRegisterBlock && s.bucket_size == kRegisterBucket &&
      is_aligned(p.values, 16) && is_aligned(p.error, 8)) {
    step_block<RegisterBlock>(block, shared);
  } else {
    step_memory_block(s, p, blockIdx.x - p.first_block, shared);
  }
}

}  // namespace

cudaError_t step(const Launch& launch, int num_blocks, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.stream = stream;
  config.gridDim = dim3(1);
  config.blockDim = dim3(kMaxParameters);
  const cudaError_t status = cudaLaunchKernelEx(&config, count_step_kernel, launch);
  if (status != cudaSuccess || num_blocks == 0) return status;
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kThreads);
  return cudaLaunchKernelEx(&config, step_kernel, launch);
}

}  // namespace microadam::cuda
