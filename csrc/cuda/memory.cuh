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

template <class T>
__device__ void load_run(const void* values, int64_t first, float (&out)[kRun]) {
  uint32_t words[kWordsOfRun<T>];
  const uint4* source = reinterpret_cast<const uint4*>(static_cast<const T*>(values) + first);
#pragma unroll
  for (int i = 0; i < kWordsOfRun<T>; i += 4) {
    const uint4 four = source[i / 4];
    words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = float_of(words[i]);
    } else {
      out[i] = to_float(T{static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))});
    }
  }
}

__device__ void load_run(Dtype dtype, const void* values, int64_t first, float (&out)[kRun]) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return load_run<BFloat16>(values, first, out);
    case Dtype::kFloat16:
      return load_run<Float16>(values, first, out);
    default:
      return load_run<float>(values, first, out);
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
