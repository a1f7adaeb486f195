// A top-k block, and the two ways in which a thread block holds it.
#pragma once

#include "kernel.h"
#include "memory.cuh"

namespace microadam::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
// Thread blocks that share a multiprocessor, which bounds the registers of a thread: to 64 for 4.
#if defined(__CUDA_ARCH__) && \
    (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kMinBlocksPerSm = 2;  // more do not find the shared memory that they need
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kMinBlocksPerSm = 3;  // with 4, a few registers are spilled
#else
constexpr int kMinBlocksPerSm = 4;
#endif
constexpr unsigned kAllLanes = 0xffffffffu;

constexpr int kRegisterBlock = 4096;  // elements of a RegisterBlock
constexpr int kRegisterBucket = 64;

constexpr int kMaxBlockSize = 32768;
constexpr int kMaxWords = kMaxBlockSize / 32;  // of a bitmap with one bit an element
constexpr int kMaxCandidates = kThreads;
constexpr int kMomentChunk = 4096;   // coordinates whose moments are summed at a time
constexpr int kStagedPerThread = 2;  // window entries kept in shared memory
constexpr int kMaxStaged = kStagedPerThread * kThreads;

struct Entry {
  int16_t index;
  BFloat16 value;
};

struct Selection {
  // Before the scan: magnitude above and equal to the k-th. After it: the selected elements, and
  // how many of them precede the word.
  uint32_t above[kMaxWords];
  uint32_t equal[kMaxWords];
  uint32_t candidates[kMaxCandidates];
};

struct Moments {
  float first[kMomentChunk];  // at last the update of the coordinate
  float second[kMomentChunk];
};

// Aligned for moments, which are cleared four at a time.
struct alignas(16) Shared {
  union {  // one after the other
    Selection selection;
    Moments moments;
  };
  Entry staged[kMaxStaged];
  uint32_t partial_sums[2][kWarps];
  uint32_t num_candidates;
  uint32_t kth;
  uint32_t wanted;
  UpdateFactors factors;
  float decay;          // 1 - lr * weight_decay
  float feedback_rate;  // lr * alpha / (1 - alpha)
};

__device__ int lane() { return threadIdx.x % 32; }
__device__ int warp() { return threadIdx.x / 32; }

// What it is made of is computed anew wherever it is needed: registers are scarcer than arithmetic.
struct Block {
  const Settings& s;
  const Parameter& p;
  int index;
  int length;
  int k;
  uint32_t step;    // this one included
  int newest_slot;  // of the window

  __device__ Block(const Settings& settings, const Parameter& parameter, int block_index)
      : s(settings), p(parameter), index(block_index) {
    const int64_t rest = p.numel - first();
    const bool is_last = rest <= s.block_size;
    length = is_last ? static_cast<int>(rest) : s.block_size;
    k = is_last ? p.last_k : p.k;
  }

  // Waits for memory: what can be fetched without knowing the step is asked for before.
  __device__ void read_step() {
    step = static_cast<uint32_t>(*p.step);
    newest_slot = static_cast<int>((step - 1) % static_cast<uint32_t>(s.window_size));
  }

  // Index of its first element in the parameter.
  __device__ int64_t first() const { return int64_t{index} * s.block_size; }
  __device__ int64_t first_bucket() const { return int64_t{index} * s.buckets_per_block; }
  __device__ uint8_t* error() const { return p.error + int64_t{index} * (s.block_size / 2); }
  __device__ BFloat16* error_min() const { return p.error_min + first_bucket(); }
  __device__ BFloat16* error_max() const { return p.error_max + first_bucket(); }
  __device__ float* threshold() const { return p.thresholds + index; }

  // The error feedback of an element.
  __device__ float feedback(int i) const {
    const int size = s.bucket_size, half = size / 2;
    const int bucket = i / size, within = i % size;
    const uint32_t pair = error()[bucket * half + within % half];
    const float low = to_float(error_min()[bucket]);
    const float unit = quantization_unit(low, to_float(error_max()[bucket]));
    return dequantize(within < half ? pair & 15u : pair >> 4, low, unit);
  }

  __device__ int num_slots() const {  // filled, this step's included
    return static_cast<int>(min(step, static_cast<uint32_t>(s.window_size)));
  }
  // A slot of the window has room for the entries of the longest block, p.k.
  __device__ int64_t entry(int slot, int j) const {
    return int64_t{index} * (s.window_size * p.k) + (slot * p.k + j);
  }
};

// A full block of 4096 elements in buckets of 64. Four threads share a bucket; each holds a run of
// its first half and the run of its second half whose codes lie in the same bytes.
class RegisterBlock {
 public:
  // Asks for gradient and error feedback.
  __device__ explicit RegisterBlock(const Block& block)
      : block_(block), bucket_(threadIdx.x / 4), quarter_(threadIdx.x % 4) {
    const bool is_grad_aligned = is_aligned(block.p.grad, 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t first = block.first() + index_of(half);
      grad_[half] = is_grad_aligned ? fetch_run(block.s.grad_dtype, block.p.grad, first)
                                    : fetch_unaligned_run(block.s.grad_dtype, block.p.grad, first);
    }
    codes_ = reinterpret_cast<const uint2*>(block.error())[threadIdx.x];
    error_min_ = block.error_min()[bucket_];
    error_max_ = block.error_max()[bucket_];
  }

  // Makes the accumulator of them.
  __device__ void accumulate(float inv_scale) {
    const float low = to_float(error_min_);
    const float unit = quantization_unit(low, to_float(error_max_));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      convert_run(block_.s.grad_dtype, grad_[half], values_[half]);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint32_t code = ((i < 4 ? codes_.x : codes_.y) >> (8 * (i % 4) + 4 * half)) & 15u;
        values_[half][i] = values_[half][i] * inv_scale + dequantize(code, low, unit);
      }
    }
  }

  __device__ bool is_finite() const {
    bool is_finite = true;
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) is_finite &= fabsf(value(i)) < kMaxMagnitude;
    return is_finite;
  }

  // How many of this thread's magnitudes reach `probe`.
  __device__ int count_reaching(uint32_t probe) const {
    int count = 0;
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) count += magnitude_bits(value(i)) >= probe;
    return count;
  }

  template <class Function>
  __device__ void for_each_magnitude(Function function) const {
#pragma unroll
    for (int i = 0; i < 2 * kRun; ++i) function(magnitude_bits(value(i)));
  }

  __device__ void mark(uint32_t kth, Selection& selection) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t above = 0, equal = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const uint32_t magnitude = magnitude_bits(values_[half][i]);
        above |= uint32_t{magnitude > kth} << i;
        equal |= uint32_t{magnitude == kth} << i;
      }
      const int byte = index_of(half) / 8;
      reinterpret_cast<uint8_t*>(selection.above)[byte] = static_cast<uint8_t>(above);
      reinterpret_cast<uint8_t*>(selection.equal)[byte] = static_cast<uint8_t>(equal);
    }
  }

  // Calls emit(position, index, value) for each selected element. What is left is the residual.
  template <class Emit>
  __device__ void take_selected(const Selection& selection, Emit emit) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = selection.above[2 * bucket_ + half];
      const uint32_t own = (word >> (kRun * quarter_)) & 0xffu;
      for (uint32_t rest = own; rest != 0; rest &= rest - 1) {
        const int i = __ffs(rest) - 1;
        float value = values_[half][0];  // values_[half][i], without an address
#pragma unroll
        for (int j = 1; j < kRun; ++j) value = i == j ? values_[half][j] : value;
        const uint32_t before = word & ((1u << (kRun * quarter_ + i)) - 1);
        emit(selection.equal[2 * bucket_ + half] + __popc(before), index_of(half) + i, value);
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if ((own >> i) & 1u) values_[half][i] = 0.0f;
      }
    }
  }

  __device__ void store_error() const {
    float low = value(0), high = low;
#pragma unroll
    for (int i = 1; i < 2 * kRun; ++i) low = fminf(low, value(i)), high = fmaxf(high, value(i));
#pragma unroll
    for (int distance = 1; distance < 4; distance *= 2) {
      low = fminf(low, __shfl_xor_sync(kAllLanes, low, distance));
      high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, distance));
    }
    low = to_float(round_to<BFloat16>(low));
    high = to_float(round_to<BFloat16>(high));
    const float inverse = inverse_unit(quantization_unit(low, high));
    uint2 codes = {0, 0};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        (i < 4 ? codes.x : codes.y) |= quantize(values_[half][i], low, inverse)
                                       << (8 * (i % 4) + 4 * half);
      }
    }
    reinterpret_cast<uint2*>(block_.error())[threadIdx.x] = codes;
    if (quarter_ == 0) {
      block_.error_min()[bucket_] = round_to<BFloat16>(low * block_.s.kept_share);
      block_.error_max()[bucket_] = round_to<BFloat16>(high * block_.s.kept_share);
    }
  }

  // Subtracts the updates, those of the elements [begin, end), from the parameter.
  __device__ void apply(const float* updates, int, int, float decay, Rounding rounding) const {
    const Settings& s = block_.s;
    const int64_t first = block_.first();
    Run runs[2];
    bool changes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float update[kRun];
      load_updates(updates, half, update);
      changes[half] = decay != 1.0f;
#pragma unroll
      for (float u : update) changes[half] |= u != 0.0f;
      if (changes[half]) {
        runs[half] = fetch_run(s.param_dtype, block_.p.values, first + index_of(half));
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (!changes[half]) continue;
      float update[kRun], values[kRun];
      load_updates(updates, half, update);  // again, rather than keep it in registers
      convert_run(s.param_dtype, runs[half], values);
#pragma unroll
      for (int i = 0; i < kRun; ++i) values[i] = values[i] * decay - update[i];
      store_run(s.param_dtype, block_.p.values, first + index_of(half), values, rounding);
    }
  }

 private:
  __device__ void load_updates(const float* updates, int half, float (&out)[kRun]) const {
#pragma unroll
    for (int i = 0; i < kRun; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(updates + index_of(half) + i);
      out[i] = four.x, out[i + 1] = four.y, out[i + 2] = four.z, out[i + 3] = four.w;
    }
  }

  __device__ float value(int i) const { return values_[i / kRun][i % kRun]; }

  __device__ int index_of(int half) const {
    return bucket_ * kRegisterBucket + half * (kRegisterBucket / 2) + quarter_ * kRun;
  }

  const Block& block_;
  int bucket_;
  int quarter_;
  Run grad_[2];
  uint2 codes_;  // of the error feedback, with their bucket's range
  BFloat16 error_min_;
  BFloat16 error_max_;
  float values_[2][kRun];  // the accumulator, then the residual
};

// A block of any length with buckets of any size. Nothing is kept: every pass reads it again.
class MemoryBlock {
 public:
  __device__ explicit MemoryBlock(const Block& block) : block_(block) {}

  __device__ void accumulate(float inv_scale) { inv_scale_ = inv_scale; }

  __device__ bool is_finite() const {
    uint32_t largest = 0;
    for_each_magnitude([&](uint32_t magnitude) { largest = max(largest, magnitude); });
    return largest < bits_of(kMaxMagnitude);
  }

  __device__ int count_reaching(uint32_t probe) const {
    int count = 0;
    for_each_magnitude([&](uint32_t magnitude) { count += magnitude >= probe; });
    return count;
  }

  template <class Function>
  __device__ void for_each_magnitude(Function function) const {
#pragma unroll 1
    for (int i = threadIdx.x; i < block_.length; i += kThreads) {
      function(magnitude_bits(accumulator(i)));
    }
  }

  __device__ void mark(uint32_t kth, Selection& selection) const {
    for (int first = 32 * warp(); first < block_.length; first += kThreads) {
      const int i = first + lane();
      const bool is_inside = i < block_.length;
      const uint32_t magnitude = is_inside ? magnitude_bits(accumulator(i)) : 0;
      const uint32_t above = __ballot_sync(kAllLanes, is_inside && magnitude > kth);
      const uint32_t equal = __ballot_sync(kAllLanes, is_inside && magnitude == kth);
      if (lane() == 0) {
        selection.above[first / 32] = above;
        selection.equal[first / 32] = equal;
      }
    }
  }

  template <class Emit>
  __device__ void take_selected(const Selection& selection, Emit emit) {
    selected_ = selection.above;
    for (int i = threadIdx.x; i < block_.length; i += kThreads) {
      if (!is_selected(i)) continue;
      const uint32_t before = selected_[i / 32] & ((1u << (i % 32)) - 1);
      emit(selection.equal[i / 32] + __popc(before), i, accumulator(i));
    }
    __syncthreads();  // store_error writes over what accumulator() reads
  }

  // A thread takes a bucket.
  __device__ void store_error() const {
    const int size = block_.s.bucket_size, half = size / 2;
    const int num_buckets = (block_.length + size - 1) / size;
    for (int bucket = threadIdx.x; bucket < num_buckets; bucket += kThreads) {
      const int first = bucket * size;
      const int last = min(first + size, block_.length) - 1;
      float low = residual(first), high = low;
#pragma unroll 1
      for (int i = first + 1; i <= last; ++i) {
        const float value = residual(i);
        low = fminf(low, value), high = fmaxf(high, value);
      }
      low = to_float(round_to<BFloat16>(low));
      high = to_float(round_to<BFloat16>(high));
      const float inverse = inverse_unit(quantization_unit(low, high));
      // A bucket that is short repeats its last value, which is read before it is written over.
      const float last_residual = residual(last);
#pragma unroll 1
      for (int i = first; i < first + half; ++i) {
        const float value = i < last ? residual(i) : last_residual;
        const float second_value = i + half < last ? residual(i + half) : last_residual;
        block_.error()[i - first + bucket * half] = static_cast<uint8_t>(
            quantize(value, low, inverse) | (quantize(second_value, low, inverse) << 4));
      }
      block_.error_min()[bucket] = round_to<BFloat16>(low * block_.s.kept_share);
      block_.error_max()[bucket] = round_to<BFloat16>(high * block_.s.kept_share);
    }
  }

  // Subtracts the updates, those of the elements [begin, end), from the parameter.
  __device__ void apply(const float* updates, int begin, int end, float decay,
                        Rounding rounding) const {
    const Settings& s = block_.s;
    for (int i = begin + threadIdx.x; i < end; i += kThreads) {
      const float update = updates[i - begin];
      if (update == 0.0f && decay == 1.0f) continue;
      const int64_t element = block_.first() + i;
      const float value = load(s.param_dtype, block_.p.values, element);
      store(s.param_dtype, block_.p.values, element, value * decay - update, rounding);
    }
  }

 private:
  __device__ float accumulator(int i) const {
    return load(block_.s.grad_dtype, block_.p.grad, block_.first() + i) * inv_scale_ +
           block_.feedback(i);
  }

  __device__ bool is_selected(int i) const { return (selected_[i / 32] >> (i % 32)) & 1u; }
  __device__ float residual(int i) const { return is_selected(i) ? 0.0f : accumulator(i); }

  const Block& block_;
  float inv_scale_ = 1.0f;
  const uint32_t* selected_ = nullptr;
};

}  // namespace
}  // namespace microadam::cuda
