// The arguments of one launch of the CUDA step, and the launch itself. Free of torch, so that nvcc
// compiles nothing but the kernels.
#pragma once

#include <cuda_runtime.h>

#include "../parameter.h"

namespace microadam::cuda {

constexpr int kNumPowers = 32;
constexpr int kNumAges = 32;

// beta1 or beta2. Powers come from the host: a device takes long to compute them in double.
struct Beta {
  double complement;          // 1 - beta
  double powers[kNumPowers];  // beta^(2^i); their products give the power of any step
  float ages[kNumAges];       // beta^age, for slots of age 0, 1, ...
};

// A scalar on the device, float32 or float64.
struct DeviceScalar {
  const void* value;  // null if there is none
  bool is_double;
};

struct Settings {
  Beta beta1;
  Beta beta2;
  double lr;  // if lr_tensor is null
  double weight_decay;
  double alpha;
  DeviceScalar lr_tensor;
  DeviceScalar grad_scale;
  DeviceScalar found_inf;
  unsigned long long* num_skipped_blocks;
  uint64_t seed;
  float eps;
  float kept_share;  // 1 - alpha, of the error feedback
  Dtype param_dtype;
  Dtype grad_dtype;
  int block_size;
  int bucket_size;
  int buckets_per_block;
  int window_size;
  bool stochastic_rounding;
};

// Tables are passed as a kernel argument, so that a step needs neither memory nor a copy and can be
// captured in a graph. Every launch sends its whole table, filled or not, and under gradient
// release there is one parameter in it: the budget stays below the 32 KB that CUDA allows.
// Arguments of more than 4 KB need driver R530 or newer, which CUDA 13 guarantees and CUDA 12 does
// not.
#if CUDART_VERSION >= 13000
constexpr int kMaxParameters = 128;
constexpr int kMaxArgumentBytes = 16384;
#else
constexpr int kMaxParameters = 31;
constexpr int kMaxArgumentBytes = 4096;
#endif

struct Launch {
  Settings settings;
  int num_parameters;
  // Index of each parameter's first block in the launch. A table of its own, since every thread
  // block searches it before anything else: it stays in the cache of constants.
  int first_blocks[kMaxParameters];
  Parameter parameters[kMaxParameters];
};
static_assert(sizeof(Launch) <= kMaxArgumentBytes, "arguments have no room for as many parameters");

constexpr int kMaxCounters = 500;

struct Counters {
  DeviceScalar found_inf;
  int num_steps;
  int64_t* steps[kMaxCounters];
};
static_assert(sizeof(Counters) <= 4096, "arguments have no room for as many counters");

// Counts a step, unless an Inf was found. `step` must come after it in the stream: its blocks must
// not race with the counting.
cudaError_t count(const Counters& counters, cudaStream_t stream);

// Steps the parameters of `launch`, which have `num_blocks` top-k blocks in all.
cudaError_t step(const Launch& launch, int num_blocks, cudaStream_t stream);

}  // namespace microadam::cuda
