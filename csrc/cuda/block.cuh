// A top-k block, and the two ways in which a thread block holds it.
#pragma once

#include "kernel.h"
#include "memory.cuh"
#include "packed.cuh"

namespace microadam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Thread blocks that share a multiprocessor, which bounds the registers of a thread: to 64 for 4.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMinBlocksPerSm = 2;  // more would not fit in shared memory
#else
constexpr int kMinBlocksPerSm = 4;
#endif
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int kRegisterBlock = 4096;  // elements of a RegisterBlock

constexpr int kMaxBlockSize = 32768;
constexpr int kMaxWords = kMaxBlockSize / 32;  // of a bitmap with one bit per element
constexpr int kMaxCandidates = kThreads;
constexpr int kMomentChunk = 4096;    // coordinates whose moments are summed at a time
constexpr int kEntriesPerThread = 4;  // of the window of a RegisterBlock
constexpr int kMaxEntries = kEntriesPerThread * kThreads;

// An entry of the window in shared memory.
struct Entry {
  uint32_t bits;  // the bfloat16 value in the high half, the index in the low half

  __device__ static Entry of(int16_t index, BFloat16 value) {
    return {static_cast<uint16_t>(index) | uint32_t{value.bits} << 16};
  }
  __device__ int index() const { return static_cast<int>(bits & 0xffffu); }
  __device__ float value() const { return high_half(bits); }
};

// An element whose magnitude, in bits, reaches the threshold.
struct alignas(8) Candidate {
  uint32_t magnitude;
  int index;
};

struct alignas(16) Selection {
  float accumulators[kRegisterBlock];  // of a RegisterBlock; 0 where an element has been taken
  uint32_t taken[kMaxWords];  // of a MemoryBlock: a bit for each element that has been taken
  // If the list has no room for the candidates: which magnitudes exceed the k-th, and equal it.
  // Else which elements are taken, and how many come before each word.
  uint32_t above[kMaxWords];
  uint32_t equal[kMaxWords];
  Candidate candidates[kMaxCandidates];
};

struct Moments {
  float first[kMomentChunk];  // finally the update of the coordinate
  float second[kMomentChunk];
};

// Aligned for moments, which are cleared four at a time.
struct alignas(16) Shared {
  union {  // one after the other
    Selection selection;
    Moments moments;
  };
  Entry window[kMaxEntries];  // of a RegisterBlock
  uint32_t partial_sums[2][kWarps];
  int parameter;           // of those of the launch: the one that the block belongs to
  uint32_t index;          // of the block in that parameter
  bool is_register_block;  // else a MemoryBlock
  uint32_t num_candidates;
  bool is_finite;
  uint32_t step;  // including this one
  int num_slots;  // of the window that are filled, including this step's
  int newest_slot;
  UpdateFactors factors;
  float decay;          // 1 - lr * weight_decay
  float feedback_rate;  // lr * alpha / (1 - alpha)
};

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

// The thread's number, counted from a different warp in each block: work for only the first few
// threads is thus spread over the four schedulers of a multiprocessor.
__device__ int rotated_thread() { return (threadIdx.x + 32 * blockIdx.x) % kThreads; }

// A top-k block. Its addresses are computed wherever they are used: registers are scarcer than
// arithmetic.
struct Block {
  const Settings& s;
  const Parameter& p;
  uint32_t index;
  int length;
  int k;

  __device__ static Block of(const Settings& s, const Parameter& p, uint32_t index) {
    Block block = {s, p, index, s.block_size, p.k};
    const int64_t rest = p.numel - block.first();
    if (rest <= s.block_size) block.length = static_cast<int>(rest), block.k = p.last_k;
    return block;
  }

  // Index of its first element in the parameter.
  __device__ int64_t first() const { return times(s.block_size); }
  __device__ int64_t first_bucket() const { return times(s.buckets_per_block); }
  __device__ uint8_t* error() const { return p.error + times(s.block_size / 2); }
  __device__ BFloat16* error_min() const { return p.error_min + first_bucket(); }
  __device__ BFloat16* error_max() const { return p.error_max + first_bucket(); }
  __device__ float* threshold() const { return p.thresholds + index; }

  // The window. Each slot has room for the entries of the longest block, p.k.
  __device__ int64_t first_entry() const { return times(s.window_size * p.k); }
  __device__ int16_t* window_indices() const { return p.window_indices + first_entry(); }
  __device__ BFloat16* window_values() const { return p.window_values + first_entry(); }

  // The error feedback of an element.
  __device__ float feedback(int i) const {
    const int size = s.bucket_size, half = size / 2;
    const int bucket = i / size, within = i % size;
    const uint32_t pair = error()[bucket * half + within % half];
    const float low = to_float(error_min()[bucket]);
    const float unit = quantization_unit(low, to_float(error_max()[bucket]));
    return dequantize(within < half ? pair & 15u : pair >> 4, low, unit);
  }

  __device__ int64_t times(int stride) const {
    return static_cast<int64_t>(uint64_t{index} * static_cast<uint32_t>(stride));
  }
};

// A full block of 4096 elements in buckets of 64. Four threads share a bucket; each holds a run of
// its first half and the run of its second half whose codes lie in the same bytes. During selection
// the elements are in shared memory, and so is the window.
template <class Param, class Grad>
class RegisterBlock {
 public:
  // Any other block, such as one of a parameter that is a view at an odd offset, takes the slower
  // MemoryBlock.
  __device__ static bool can_hold(const Block& block) {
    const Settings& s = block.s;
    return s.block_size == kBlock && block.length == kBlock && s.bucket_size == kBucket &&
           s.window_size * block.k <= kMaxEntries && is_aligned(block.p.values, 16) &&
           is_aligned(block.p.error, 8);
  }

  __device__ static constexpr int length() { return kBlock; }

  // Loads gradient, error feedback and window: all of its slots, so as not to wait for the step
  // number, which determines the newest one. That one is overwritten later.
  __device__ RegisterBlock(const Block& block, Shared& shared)
      : block_(block),
        accumulators_(shared.selection.accumulators),
        window_(shared.window),
        first_index_(threadIdx.x / 4 * kBucket + threadIdx.x % 4 * kRun),
        swap_(threadIdx.x / 4 % 2 * 4) {
    codes_ = *own_codes();
    error_min_ = *error_min();
    error_max_ = *error_max();
    const int16_t* indices = block.window_indices() + threadIdx.x;
    const BFloat16* values = block.window_values() + threadIdx.x;
    const int num_entries = block.s.window_size * block.k;
#pragma unroll
    for (int i = 0; i < kEntriesPerThread; ++i) {
      if (static_cast<int>(threadIdx.x) + i * kThreads >= num_entries) break;
      indices_[i] = indices[i * kThreads];
      entry_values_[i] = values[i * kThreads];
    }
    // Last, since a run that is not aligned is waited for when it is packed.
    const Grad* grad = static_cast<const Grad*>(block.p.grad) + int64_t{block.index} * kBlock;
    if (is_aligned(grad, 16)) {
#pragma unroll
      for (int half = 0; half < 2; ++half) grad_[half] = fetch_run(grad + index_of(half));
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) grad_[half] = fetch_unaligned_run(grad + index_of(half));
    }
  }

  // Puts the window into shared memory and computes the accumulator.
  __device__ void accumulate(float inv_scale) {
    const int num_entries = block_.s.window_size * block_.k;
#pragma unroll
    for (int i = 0; i < kEntriesPerThread; ++i) {
      if (static_cast<int>(threadIdx.x) + i * kThreads >= num_entries) break;
      window_[threadIdx.x + i * kThreads] = Entry::of(indices_[i], entry_values_[i]);
    }
    const float low = to_float(error_min_);
    const float unit = quantization_unit(low, to_float(error_max_));
#pragma unroll
    for (int half = 0; half < 2; ++half) convert_run(grad_[half], values_[half]);
    if (inv_scale != 1.0f) {
      __syncwarp();  // keeps this a branch: predicated multiplications cost as much when skipped
#pragma unroll
      for (int i = 0; i < 2 * kRun; ++i) values_[i / kRun][i % kRun] *= inv_scale;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        float products[4];
        multiply_codes(((i < 4 ? codes_.x : codes_.y) >> (4 * half)) & 0x0f0f0f0fu, unit, products);
#pragma unroll
        for (int j = 0; j < 4; ++j) values_[half][i + j] += products[j] + low;
        own_four(half, i) = {values_[half][i], values_[half][i + 1], values_[half][i + 2],
                             values_[half][i + 3]};
      }
    }
  }

  __device__ int count_reaching(uint32_t probe) const { return __popc(reaching(probe)); }

  // Calls function(index, magnitude) for each of this thread's elements that reach `probe`.
  template <class Function>
  __device__ void for_each_reaching(uint32_t probe, Function function) const {
    for (uint32_t rest = reaching(probe); rest != 0; rest &= rest - 1) {
      const uint32_t i = __ffs(rest) - 1;
      const int index = first_index_ + i + i / kRun * (kBucket / 2 - kRun);
      function(index, magnitude_bits(accumulators_[index ^ swap_]));
    }
  }

  // Of any element of the block, not only this thread's.
  __device__ uint32_t magnitude(int index) const {
    return magnitude_bits(accumulators_[place_of(index)]);
  }

  // Returns the accumulator of any element, and sets it to 0.
  __device__ float take(int index) {
    float& accumulator = accumulators_[place_of(index)];
    const float value = accumulator;
    accumulator = 0.0f;
    return value;
  }

  // What was not taken is the residual.
  __device__ void store_error() {
    uint32_t low_pair = 0, high_pair = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const float4 four = own_four(half, i);
        values_[half][i] = four.x, values_[half][i + 1] = four.y;
        values_[half][i + 2] = four.z, values_[half][i + 3] = four.w;
      }
      // Rounding is monotonic, so it may come before the search for the smallest and largest.
#pragma unroll
      for (int i = 0; i < kRun; i += 2) {
        const uint32_t pair = pack(values_[half][i], values_[half][i + 1]);
        low_pair = half + i == 0 ? pair : minima(low_pair, pair);
        high_pair = half + i == 0 ? pair : maxima(high_pair, pair);
      }
    }
    // The largest in the high half; in the low half the largest of the negated values, which gives
    // the smallest.
    low_pair ^= 0x80008000u;
    uint32_t range =
        maxima(__byte_perm(low_pair, high_pair, 0x5410), __byte_perm(low_pair, high_pair, 0x7632));
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      range = maxima(range, __shfl_xor_sync(kAllLanes, range, distance));
    }
    const float low = -low_half(range), high = high_half(range);
    const float inverse = inverse_unit(quantization_unit(low, high));
    uint2 codes = {0, 0};
#pragma unroll
    for (int i = kRun - 1; i >= 0; --i) {
      uint32_t& word = i < 4 ? codes.x : codes.y;
      word = shift_in_codes(quantization_level(values_[0][i], low, inverse),
                            quantization_level(values_[1][i], low, inverse), word);
    }
    *own_codes() = codes;
    if (threadIdx.x % 4 == 0) {
      *error_min() = round_to<BFloat16>(low * block_.s.kept_share);
      *error_max() = round_to<BFloat16>(high * block_.s.kept_share);
    }
  }

  // Entry `e` of the window, counted over those that the block uses.
  __device__ Entry entry(int e) const { return window_[e]; }
  __device__ void set_entry(int e, int16_t index, BFloat16 value) {
    window_[e] = Entry::of(index, value);
    block_.window_indices()[e] = index;
    block_.window_values()[e] = value;
  }

  // Subtracts the updates of all its elements from the parameter.
  __device__ void apply(const float* updates, int, int, float decay, Rounding rounding) const {
    Param* const params = static_cast<Param*>(block_.p.values) + int64_t{block_.index} * kBlock;
    Run<Param> runs[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) runs[half] = fetch_run(params + index_of(half));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float values[kRun];
      convert_run(runs[half], values);
#pragma unroll
      for (int i = 0; i < kRun; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(updates + index_of(half) + i);
        values[i] = values[i] * decay - four.x;
        values[i + 1] = values[i + 1] * decay - four.y;
        values[i + 2] = values[i + 2] * decay - four.z;
        values[i + 3] = values[i + 3] * decay - four.w;
      }
      store_run<Param>(block_.p.values, block_.first() + index_of(half), values, rounding);
    }
  }

 private:
  static constexpr int kBlock = kRegisterBlock;
  static constexpr int kBucket = 64;

  // Bit i is set where element i of this thread reaches `probe`.
  __device__ uint32_t reaching(uint32_t probe) const {
    uint32_t is_below = 0;
#pragma unroll
    for (int i = 2 * kRun - 1; i >= 0; --i) {  // shifts in a sign; that of a NaN is cleared
      const float difference = fabsf(values_[i / kRun][i % kRun]) - float_of(probe);
      is_below = __funnelshift_l(bits_of(difference), is_below, 1);
    }
    return ~is_below & 0xffffu;
  }

  // Index in the block of the first element of a run.
  __device__ int index_of(int half) const { return first_index_ + half * (kBucket / 2); }

  // Where an element lies in `accumulators_`. In every other bucket, groups of four are swapped in
  // pairs, so that eight threads which access such groups together use different banks.
  __device__ static uint32_t place_of(uint32_t index) { return index ^ (index / kBucket % 2 * 4); }
  __device__ float4& own_four(int half, int i) const {
    return *reinterpret_cast<float4*>(accumulators_ + ((index_of(half) + i) ^ swap_));
  }

  // What this thread holds of the error feedback.
  __device__ uint2* own_codes() const {
    uint8_t* const error = block_.p.error + int64_t{block_.index} * (kBlock / 2);
    return reinterpret_cast<uint2*>(error) + threadIdx.x;
  }
  __device__ BFloat16* error_min() const { return of_bucket(block_.p.error_min); }
  __device__ BFloat16* error_max() const { return of_bucket(block_.p.error_max); }
  __device__ BFloat16* of_bucket(BFloat16* limits) const {
    return limits + int64_t{block_.index} * (kBlock / kBucket) + threadIdx.x / 4;
  }

  const Block& block_;
  float* accumulators_;
  Entry* window_;
  int first_index_;  // of the run in the first half
  int swap_;         // the bit in which places and indices of this thread's elements differ
  // As they were loaded: to convert them here would be to wait for memory.
  Run<Grad> grad_[2];
  uint2 codes_;  // of the error feedback, with their bucket's range
  BFloat16 error_min_;
  BFloat16 error_max_;
  int16_t indices_[kEntriesPerThread];  // of the window
  BFloat16 entry_values_[kEntriesPerThread];

  float values_[2][kRun];  // the accumulator, then the residual
};

// A block of any length with buckets of any size. Every pass reads it from memory again.
template <class Param, class Grad>
class MemoryBlock {
 public:
  __device__ MemoryBlock(const Block& block, Shared& shared)
      : block_(block), taken_(shared.selection.taken) {
    for (int w = threadIdx.x; w < (block.length + 31) / 32; w += kThreads) taken_[w] = 0;
  }

  __device__ int length() const { return block_.length; }

  __device__ void accumulate(float inv_scale) { inv_scale_ = inv_scale; }

  __device__ int count_reaching(uint32_t probe) const {
    int count = 0;
    for_each_reaching(probe, [&](int, uint32_t) { ++count; });
    return count;
  }

  template <class Function>
  __device__ void for_each_reaching(uint32_t probe, Function function) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < block_.length; i += kThreads) {
      const uint32_t own = magnitude(i);
      if (own >= probe) function(i, own);
    }
  }

  __device__ uint32_t magnitude(int i) const { return magnitude_bits(accumulator(i)); }

  __device__ float take(int i) {
    atomicOr(&taken_[i / 32], 1u << (i % 32));
    return accumulator(i);
  }

  // A warp takes a bucket.
  __device__ void store_error() const {
    const int size = block_.s.bucket_size, half = size / 2;
    const int num_buckets = (block_.length + size - 1) / size;
    for (int bucket = warp(); bucket < num_buckets; bucket += kWarps) {
      const int first = bucket * size;
      const int last = min(first + size, block_.length) - 1;
      // A short bucket repeats its last value.
      const float last_residual = residual(last);
      float low = last_residual, high = low;
#pragma unroll 1
      for (int i = first + lane(); i < last; i += 32) {
        const float value = residual(i);
        low = fminf(low, value), high = fmaxf(high, value);
      }
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        low = fminf(low, __shfl_xor_sync(kAllLanes, low, distance));
        high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, distance));
      }
      low = to_float(round_to<BFloat16>(low));
      high = to_float(round_to<BFloat16>(high));
      const float inverse = inverse_unit(quantization_unit(low, high));
      __syncwarp();  // every lane read the last element's code, which one lane now replaces
      // This lane's codes replace those of the same elements, which no other lane reads again.
#pragma unroll 1
      for (int j = lane(); j < half; j += 32) {
        const int i = first + j;
        const float value = i < last ? residual(i) : last_residual;
        const float second_value = i + half < last ? residual(i + half) : last_residual;
        block_.error()[bucket * half + j] = static_cast<uint8_t>(
            quantize(value, low, inverse) | (quantize(second_value, low, inverse) << 4));
      }
      __syncwarp();  // the range was read with the codes
      if (lane() == 0) {
        block_.error_min()[bucket] = round_to<BFloat16>(low * block_.s.kept_share);
        block_.error_max()[bucket] = round_to<BFloat16>(high * block_.s.kept_share);
      }
    }
  }

  __device__ Entry entry(int e) const {
    const int position = position_of(e);
    return Entry::of(block_.window_indices()[position], block_.window_values()[position]);
  }
  __device__ void set_entry(int e, int16_t index, BFloat16 value) {
    const int position = position_of(e);
    block_.window_indices()[position] = index;
    block_.window_values()[position] = value;
  }

  // Subtracts the updates, those of the elements [begin, end), from the parameter.
  __device__ void apply(const float* updates, int begin, int end, float decay,
                        Rounding rounding) const {
    const int64_t first = block_.first();
    Param* const params = static_cast<Param*>(block_.p.values) + first;
    for (int i = begin + threadIdx.x; i < end; i += kThreads) {
      const float value = to_float(params[i]) * decay - updates[i - begin];
      params[i] = rounded<Param>(value, first + i, rounding);
    }
  }

 private:
  __device__ float accumulator(int i) const {
    const Grad* const grad = static_cast<const Grad*>(block_.p.grad) + block_.first();
    return to_float(grad[i]) * inv_scale_ + block_.feedback(i);
  }

  // In memory a slot has room for the entries of the longest block.
  __device__ int position_of(int e) const { return e + e / block_.k * (block_.p.k - block_.k); }

  __device__ float residual(int i) const {
    return (taken_[i / 32] >> (i % 32)) & 1u ? 0.0f : accumulator(i);
  }

  const Block& block_;
  uint32_t* taken_;
  float inv_scale_ = 1.0f;
};

}  // namespace
}  // namespace microadam::cuda
