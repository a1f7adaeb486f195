// What the phases of a step share: a block of a parameter, a thread's working memory, prefetching.
#pragma once

#include <algorithm>
#include <cstddef>
#include <new>

#include "step.h"

namespace microadam::cpu {
namespace {

constexpr int kLine = 64;  // bytes of a cache line

// For the bodies of hot loops: a real call would spill the vector registers.
#define MICROADAM_INLINE inline __attribute__((always_inline))

// A vector type of the compiler's own: its operations stay plain C++ on every machine.
typedef float Moments __attribute__((vector_size(8)));  // first, second

// Memory aligned to cache lines, all 0.
template <class T>
class Buffer {
 public:
  explicit Buffer(size_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t{kLine}))) {
    memset(static_cast<void*>(data_), 0, size * sizeof(T));
  }
  ~Buffer() { ::operator delete(data_, std::align_val_t{kLine}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  operator T*() { return data_; }
  operator const T*() const { return data_; }

 private:
  T* data_;
};

constexpr int kVectorBucket = 64;  // the default bucket size, which vector code is written for
// Vector loops take up to this many buckets at once and may run past the last one of a block: the
// working memory leaves room for that.
constexpr int kSpareBuckets = 16;

// A thread's working memory.
struct Scratch {
  Scratch(const Settings& s, int max_k)
      : accumulator(s.block_size + kSpareBuckets * kVectorBucket),
        bucket_min(s.block_size / s.bucket_size + kSpareBuckets),
        bucket_unit(s.block_size / s.bucket_size + kSpareBuckets),
        candidates(s.block_size + 16),  // append_marked stores 16 at a time
        magnitudes(s.block_size),
        weights1(static_cast<size_t>(max_k) * s.window_size),
        weights2(static_cast<size_t>(max_k) * s.window_size),
        terms(2 * static_cast<size_t>(max_k) * s.window_size),
        moments(s.block_size) {}

  Buffer<float> accumulator;   // (block_size,); the residual once the selected are taken out
  Buffer<float> bucket_min;    // (num_buckets,) of the old error feedback, then of the new
  Buffer<float> bucket_unit;   // (num_buckets,) of the old, then the reciprocal of the new
  Buffer<int32_t> candidates;  // the elements that reach the threshold, ascending
  Buffer<int32_t> magnitudes;  // of the candidates, as bits: ordered as the floats are
  Buffer<float> weights1;      // (window_size, k) beta1^age of every window entry
  Buffer<float> weights2;      // (window_size, k) beta2^age
  // (window_size, k, 2) what an entry adds to its coordinate's moments, then (window_size, k) what
  // it takes from the parameter
  Buffer<float> terms;
  Buffer<Moments> moments;  // (block_size,), all 0 between blocks
};

struct Block {
  int length;
  int k;
  int slot_stride;  // entries from one window slot to the next
  int num_slots;    // filled, including this step's
  int newest_slot;
  int64_t first_element;
  void* values;
  const void* grad;
  int16_t* window_indices;
  BFloat16* window_values;
  uint8_t* error;
  BFloat16* error_min;
  BFloat16* error_max;
  float* threshold;
};

inline size_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

inline Block block_of(const Settings& s, const ParameterStep& p, int64_t index) {
  const bool is_last = index == p.num_blocks - 1;
  const int64_t element = index * s.block_size;
  const int64_t bucket = element / s.bucket_size;
  const int64_t entry = index * s.window_size * p.k;
  return {
      is_last ? static_cast<int>(p.numel - element) : s.block_size,
      is_last ? p.last_k : p.k,
      p.k,
      static_cast<int>(std::min<int64_t>(p.step_number, s.window_size)),
      static_cast<int>((p.step_number - 1) % s.window_size),
      element,
      static_cast<char*>(p.values) + element * size_of(s.param_dtype),
      static_cast<const char*>(p.grad) + element * size_of(s.grad_dtype),
      p.window_indices + entry,
      p.window_values + entry,
      p.error + bucket * (s.bucket_size / 2),
      p.error_min + bucket,
      p.error_max + bucket,
      p.thresholds + index,
  };
}

// Requests the memory from `begin` on, which may lie past the end of a tensor.
inline void prefetch(const void* begin, size_t size) {
  const char* line = static_cast<const char*>(begin);
  for (size_t i = 0; i < size; i += kLine) __builtin_prefetch(line + i, 0, 2);
}

// Fetches the next block's state.
inline void prefetch_state(const Settings& s, const Block& next) {
  const int num_buckets = (next.length + s.bucket_size - 1) / s.bucket_size;
  prefetch(next.error, size_t(num_buckets) * s.bucket_size / 2);
  prefetch(next.error_min, num_buckets * sizeof(BFloat16));
  prefetch(next.error_max, num_buckets * sizeof(BFloat16));
  const size_t num_entries = size_t(next.num_slots) * next.slot_stride;
  prefetch(next.window_indices, num_entries * sizeof(int16_t));
  prefetch(next.window_values, num_entries * sizeof(BFloat16));
}

// Fetches the next block's gradient and parameters, 16 elements of each at a time. The work on this
// block calls `advance` a little more often than there are such pieces (256 in 4,096 elements),
// spaced as evenly in time as possible: fetched in bursts, the lines arrive late, and the step
// takes a sixth longer.
template <class Param, class Grad>
class Prefetcher {
 public:
  explicit Prefetcher(const Block& next)
      : values_(static_cast<const Param*>(next.values)),
        grad_(static_cast<const Grad*>(next.grad)) {}

  void advance() {
    __builtin_prefetch(grad_ + offset_, 0, 2);
    __builtin_prefetch(values_ + offset_, 0, 2);
    offset_ += 16;
  }

 private:
  const Param* values_;
  const Grad* grad_;
  int64_t offset_ = 0;
};

}  // namespace
}  // namespace microadam::cpu
