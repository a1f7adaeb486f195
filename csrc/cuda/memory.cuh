// Reads and writes of float32, bfloat16 and float16: one by one, and in runs of 8.
#pragma once

#include "../parameter.h"

namespace microadam::cuda {
namespace {

constexpr int kRun = 8;  // consecutive elements that a thread loads at once

__device__ bool is_aligned(const void* pointer, size_t size) {
  return reinterpret_cast<uintptr_t>(pointer) % size == 0;
}

// Starts fetching what will be read.
__device__ void prefetch(const void* pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" : : "l"(__cvta_generic_to_global(pointer)));
#else
  static_cast<void>(pointer);
#endif
}

// How a parameter is rounded to its dtype.
struct Rounding {
  bool is_stochastic;  // otherwise to nearest even
  RoundingKey key;
};

// Element `i` of a parameter.
template <class T>
__device__ T rounded(float value, int64_t i, Rounding rounding) {
  return rounding.is_stochastic ? round_stochastically<T>(value, random_bits(rounding.key, i))
                                : round_to<T>(value);
}

// Eight elements as they lie in memory. Fetching and converting are two calls, so that a thread can
// start all its loads before it waits for the first.
template <class T>
struct Run {
  static constexpr int kWords = kRun * sizeof(T) / sizeof(uint32_t);
  uint32_t words[kWords];
};

template <class T>
__device__ Run<T> fetch_run(const T* values) {
  Run<T> run;
  const uint4* source = reinterpret_cast<const uint4*>(values);
#pragma unroll
  for (int i = 0; i < Run<T>::kWords; i += 4) {
    const uint4 four = source[i / 4];
    run.words[i] = four.x, run.words[i + 1] = four.y;
    run.words[i + 2] = four.z, run.words[i + 3] = four.w;
  }
  return run;
}

// The same for a run that does not begin at a multiple of 16 bytes.
template <class T>
__device__ Run<T> fetch_unaligned_run(const T* values) {
  Run<T> run = {};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if constexpr (sizeof(T) == 4) {
      run.words[i] = bits_of(values[i]);
    } else {
      run.words[i / 2] |= uint32_t{values[i].bits} << (16 * (i % 2));
    }
  }
  return run;
}

template <class T>
__device__ void convert_run(const Run<T>& run, float (&out)[kRun]) {
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if constexpr (sizeof(T) == 4) {
      out[i] = float_of(run.words[i]);
    } else {
      out[i] = to_float(T{static_cast<uint16_t>(run.words[i / 2] >> (16 * (i % 2)))});
    }
  }
}

// `first` is a multiple of 8: one call of Philox gives the random bits of a run.
template <class T>
__device__ void store_run(void* values, int64_t first, const float (&in)[kRun], Rounding rounding) {
  uint32_t words[Run<T>::kWords] = {};
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
  for (int i = 0; i < Run<T>::kWords; i += 4) {
    target[i / 4] = {words[i], words[i + 1], words[i + 2], words[i + 3]};
  }
}

}  // namespace
}  // namespace microadam::cuda
