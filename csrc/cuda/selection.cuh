// The k largest magnitudes of a block: exactly k, the lower index first among equals.
#pragma once

#include "block.cuh"

namespace microadam::cuda {
namespace {

// The sum over all threads, in all threads. Calls must alternate between two arrays.
__device__ int sum_over_block(int value, uint32_t* partial_sums) {
  const uint32_t sum = __reduce_add_sync(kAllLanes, static_cast<uint32_t>(value));
  if (lane() == 0) partial_sums[warp()] = sum;
  __syncthreads();
  uint32_t total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += partial_sums[i];
  return static_cast<int>(total);
}

// The k-th largest magnitude, as bits. Leaves a guess at it for the next step in *threshold.
//
// The guess of the last step usually leaves a few more than k candidates. Else bisection over the
// bits finds a magnitude that does, or, where too many are equal, the k-th itself.
template <class Elements>
__device__ uint32_t kth_magnitude(const Elements& elements, const Block& block, float guess,
                                  Shared& shared) {
  const int k = block.k;
  uint32_t low = 0,
           high = bits_of(kMaxMagnitude);  // `low` is reached by k or more, `high` by fewer
  uint32_t probe = min(max(magnitude_bits(guess), 1u), high - 1);
  int own_count, count;
  for (int round = 0;; ++round) {
    own_count = elements.count_reaching(probe);
    count = sum_over_block(own_count, shared.partial_sums[round % 2]);
    if (count >= k && count <= kMaxCandidates) break;
    (count < k ? high : low) = probe;
    if (high - low == 1) {
      if (threadIdx.x == 0) *block.threshold() = float_of(low);
      return low;
    }
    probe = low + (high - low) / 2;
  }

  uint32_t* candidates = shared.selection.candidates;
  if (own_count != 0) {
    uint32_t position = atomicAdd(&shared.num_candidates, static_cast<uint32_t>(own_count));
    elements.for_each_magnitude([&](uint32_t magnitude) {
      if (magnitude >= probe) candidates[position++] = magnitude;
    });
  }
  __syncthreads();

  // A magnitude of rank r is the smallest of those that fewer than r others exceed.
  const int num_wanted = min(block.length, k + 3 * static_cast<int>(sqrtf(float(k))) + 1);
  const int own = threadIdx.x;
  uint32_t kth = ~0u, wanted = ~0u;
  if (own < count) {
    int num_greater = 0;
    for (int i = 0; i < count; ++i) num_greater += candidates[i] > candidates[own];
    if (num_greater < k) kth = candidates[own];
    if (num_greater < num_wanted) wanted = candidates[own];
  }
  kth = __reduce_min_sync(kAllLanes, kth);
  wanted = __reduce_min_sync(kAllLanes, wanted);
  if (lane() == 0) {
    atomicMin(&shared.kth, kth);
    atomicMin(&shared.wanted, wanted);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float threshold = float_of(shared.wanted);
    if (count < num_wanted) {
      // Continue the line from the k-th magnitude to the smallest candidate.
      const float slope = (float_of(shared.kth) - threshold) / static_cast<float>(count - k + 1);
      threshold =
          fmaxf(0.5f * threshold, threshold - slope * static_cast<float>(num_wanted - count));
    }
    *block.threshold() = threshold;
  }
  return shared.kth;
}

// From the bitmaps of magnitudes above and equal to the k-th: which k elements are selected, the
// first ones among equals, and how many of them precede each word.
__device__ void select(const Block& block, Shared& shared) {
  Selection& selection = shared.selection;
  const int num_words = (block.length + 31) / 32;
  const int words_per_thread = (num_words + kThreads - 1) / kThreads;
  const int begin = min(num_words, static_cast<int>(threadIdx.x) * words_per_thread);
  const int end = min(num_words, begin + words_per_thread);

  uint32_t own = 0;  // above in the low half, equal in the high half
#pragma unroll 1     // one word a thread, unless blocks are longer than 8192
  for (int w = begin; w < end; ++w) {
    own += __popc(selection.above[w]) + (static_cast<uint32_t>(__popc(selection.equal[w])) << 16);
  }
  uint32_t before = own;  // the sum over this thread and those before it in the warp
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, before, distance);
    if (lane() >= distance) before += other;
  }
  uint32_t* partial_sums = shared.partial_sums[0];
  if (lane() == 31) partial_sums[warp()] = before;
  before -= own;
  __syncthreads();
  uint32_t total = 0;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) {
    if (i < warp()) before += partial_sums[i];
    total += partial_sums[i];
  }

  const uint32_t num_equal = block.k - (total & 0xffffu);
#pragma unroll 1
  for (int w = begin; w < end; ++w) {
    const uint32_t above = selection.above[w], equal = selection.equal[w];
    const uint32_t num_taken = min(num_equal, before >> 16);
    uint32_t selected = above, rest = equal;
    for (uint32_t room = num_equal - num_taken; room != 0 && rest != 0; --room, rest &= rest - 1) {
      selected |= rest & (~rest + 1);
    }
    selection.above[w] = selected;
    selection.equal[w] = (before & 0xffffu) + num_taken;
    before += __popc(above) + (static_cast<uint32_t>(__popc(equal)) << 16);
  }
  __syncthreads();
}

}  // namespace
}  // namespace microadam::cuda
