// Reads and writes of float32, bfloat16 and float16, whose dtype is known when a kernel runs: a
// branch that all threads take together costs less than nine kernels.
#pragma once

#include "../parameter.h"

namespace microadam::cuda {
namespace {

constexpr int kRun = 8;  // consecutive elements that a thread loads at once

__device__ float load(Dtype dtype, const void* values, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return to_float(static_cast<const BFloat16*>(values)[i]);
    case Dtype::kFloat16:
      return to_float(static_cast<const Float16*>(values)[i]);
    default:
      return static_cast<const float*>(values)[i];
  }
}

// How a parameter is rounded to its dtype.
struct Rounding {
  bool is_stochastic;  // else to nearest even
  RoundingKey key;
};

// Runs of 8 elements: 16 bytes, or 32 of float32.
template <class T>
constexpr int kWordsOfRun = kRun * sizeof(T) / sizeof(uint32_t);

// A run as it lies in memory. It is fetched and converted in two calls, so that a thread waits for
// all that it has asked for at once.
struct Run {
  uint32_t words[kRun];  // of 16-bit floats the first half
};

__device__ Run fetch_run(Dtype dtype, const void* values, int64_t first) {
  const bool is_float32 = dtype == Dtype::kFloat32;
  const char* begin = static_cast<const char*>(values) + first * (is_float32 ? 4 : 2);
  const uint4* source = reinterpret_cast<const uint4*>(begin);
  const uint4 low = source[0];
  uint4 high = {0, 0, 0, 0};
  if (is_float32) high = source[1];
  return {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
}

// The same where the run does not begin at a multiple of 16 bytes.
__device__ Run fetch_unaligned_run(Dtype dtype, const void* values, int64_t first) {
  Run run = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (dtype == Dtype::kFloat32) {
      run.words[i] = static_cast<const uint32_t*>(values)[first + i];
    } else {
      const uint32_t bits = static_cast<const uint16_t*>(values)[first + i];
      run.words[i / 2] |= bits << (16 * (i % 2));
    }
  }
  return run;
}

template <class T>
__device__ void convert_run(const Run& run, float (&out)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = float_of(run.words[i]);
    } else {
      out[i] = to_float(T{static_cast<uint16_t>(run.words[i / 2] >> (16 * (i % 2)))});
    }
  }
}

__device__ void convert_run(Dtype dtype, const Run& run, float (&out)[kRun]) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return convert_run<BFloat16>(run, out);
    case Dtype::kFloat16:
      return convert_run<Float16>(run, out);
    default:
      return convert_run<float>(run, out);
  }
}

// `first` is a multiple of 8: one call of Philox gives the random bits of a run.
template <class T>
__device__ void store_run(void* values, int64_t first, const float (&in)[kRun], Rounding rounding) {
  uint32_t words[kWordsOfRun<T>] = {};
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) words[i] = bits_of(in[i]);
  } else if (!rounding.is_stochastic) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      words[i / 2] |= uint32_t{round_to<T>(in[i]).bits} << (16 * (i % 2));
    }
  } else {
    uint32_t random[4];
    philox(rounding.key, first / kRun, random);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t bits = (random[i / 2] >> (16 * (i % 2))) & 0xffffu;
      words[i / 2] |= uint32_t{round_stochastically<T>(in[i], bits).bits} << (16 * (i % 2));
    }
  }
  uint4* target = reinterpret_cast<uint4*>(static_cast<T*>(values) + first);
#pragma unroll
  for (int i = 0; i < kWordsOfRun<T>; i += 4) {
    target[i / 4] = {words[i], words[i + 1], words[i + 2], words[i + 3]};
  }
}

__device__ void store_run(Dtype dtype, void* values, int64_t first, const float (&in)[kRun],
                          Rounding rounding) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return store_run<BFloat16>(values, first, in, rounding);
    case Dtype::kFloat16:
      return store_run<Float16>(values, first, in, rounding);
    default:
      return store_run<float>(values, first, in, rounding);
  }
}

template <class T>
__device__ T rounded(float value, int64_t i, Rounding rounding) {
  return rounding.is_stochastic ? round_stochastically<T>(value, random_bits(rounding.key, i))
                                : round_to<T>(value);
}

__device__ void store(Dtype dtype, void* values, int64_t i, float value, Rounding rounding) {
  switch (dtype) {
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(values)[i] = rounded<BFloat16>(value, i, rounding);
      break;
    case Dtype::kFloat16:
      static_cast<Float16*>(values)[i] = rounded<Float16>(value, i, rounding);
      break;
    default:
      static_cast<float*>(values)[i] = value;
  }
}

__device__ bool is_aligned(const void* pointer, size_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % size == 0;
}

}  // namespace
}  // namespace microadam::cuda
