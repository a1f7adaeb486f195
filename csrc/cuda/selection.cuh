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

// To be called before each list.
__device__ void clear_candidates(Shared& shared) {
  shared.selection.candidates[threadIdx.x] = 0;
  shared.selection.indices[threadIdx.x] = kMaxBlockSize;
  if (threadIdx.x == 0) shared.num_candidates = 0, shared.is_finite = true;
}

// Counts the elements that reach `probe` and lists as many as there is room for, in any order.
// Candidates are ordered as they are to be selected: the greater one first.
template <class Elements>
__device__ void list_candidates(const Elements& elements, uint32_t probe, Shared& shared) {
  const int own_count = elements.count_reaching(probe);
  if (own_count == 0) return;
  uint32_t position = atomicAdd(&shared.num_candidates, static_cast<uint32_t>(own_count));
  elements.for_each_reaching(probe, [&](int index, uint32_t magnitude) {
    if (position < kMaxCandidates) {
      shared.selection.candidates[position] =
          uint64_t{magnitude} << 32 | static_cast<uint32_t>(kMaxBlockSize - index);
    }
    ++position;
  });
}

// From a list of k candidates or more: takes the k largest, calls emit(position, index, value) for
// each, and leaves a guess for the next step. Returns false if one is not finite; the parameter and
// its state are then untouched.
template <class Elements, class Emit>
__device__ bool take_candidates(Elements& elements, const Block& block, int count, Shared& shared,
                                Emit emit) {
  const int k = block.k;
  Selection& selection = shared.selection;
  const int own = rotated_thread();
  int rank = count, index = 0, num_wanted = 0;
  float value = 0.0f;
  if (own < count) {
    const uint64_t candidate = selection.candidates[own];
    rank = 0;
#pragma unroll 1
    for (int i = 0; i < count; i += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) count_if_greater(rank, selection.candidates[i + j], candidate);
    }
    const float magnitude = float_of(static_cast<uint32_t>(candidate >> 32));
    if (!(magnitude < kMaxMagnitude)) shared.is_finite = false;
    num_wanted = min(block.length, k + 3 * static_cast<int>(sqrtf(float(k))) + 1);
    if (rank == k - 1) shared.kth = magnitude;
    if (rank == min(count, num_wanted) - 1) shared.wanted = magnitude;
    if (rank < k) {
      index = kMaxBlockSize - static_cast<int>(candidate & 0xffffu);
      value = elements.take(index);
      selection.indices[rank] = index;
    }
  }
  __syncthreads();
  if (!shared.is_finite) return false;
  if (rank < k) {
    int position = 0;
#pragma unroll 1
    for (int i = 0; i < k; i += 4) {
#pragma unroll
      for (int j = 0; j < 4; ++j) count_if_greater(position, index, selection.indices[i + j]);
    }
    emit(position, index, value);
  }
  if (own == 0) {
    float threshold = shared.wanted;
    if (count < num_wanted) {
      // Continue the line from the k-th magnitude to the smallest candidate.
      const float slope = (shared.kth - threshold) / static_cast<float>(count - k + 1);
      threshold =
          fmaxf(0.5f * threshold, threshold - slope * static_cast<float>(num_wanted - count));
    }
    *block.threshold() = threshold;
  }
  return true;
}

// The same for when the list has no room: too many elements equal the k-th, or k is too large.
template <class Elements, class Emit>
__device__ void take_by_bitmaps(Elements& elements, const Block& block, uint32_t kth,
                                Shared& shared, Emit emit) {
  Selection& selection = shared.selection;
  for (int first = 32 * warp(); first < block.length; first += kThreads) {
    const int i = first + lane();
    const bool is_inside = i < block.length;
    const uint32_t magnitude = is_inside ? elements.magnitude(i) : 0;
    const uint32_t above = __ballot_sync(kAllLanes, is_inside && magnitude > kth);
    const uint32_t equal = __ballot_sync(kAllLanes, is_inside && magnitude == kth);
    if (lane() == 0) {
      selection.above[first / 32] = above;
      selection.equal[first / 32] = equal;
    }
  }
  __syncthreads();

  const int num_words = (block.length + 31) / 32;
  const int words_per_thread = (num_words + kThreads - 1) / kThreads;
  const int begin = min(num_words, static_cast<int>(threadIdx.x) * words_per_thread);
  const int end = min(num_words, begin + words_per_thread);
  uint32_t own = 0;  // above in the low half, equal in the high half
#pragma unroll 1     // one word per thread, unless blocks are longer than 8192
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

  // Among equals, the first ones are taken.
  const uint32_t num_ties_to_take = block.k - (total & 0xffffu);
  uint32_t equal_before = before >> 16;
  uint32_t position = (before & 0xffffu) + min(num_ties_to_take, equal_before);
#pragma unroll 1
  for (int w = begin; w < end; ++w) {
    const uint32_t equal = selection.equal[w];
    for (uint32_t rest = selection.above[w] | equal; rest != 0; rest &= rest - 1) {
      const uint32_t bit = rest & (~rest + 1);
      if ((equal & bit) != 0 && equal_before++ >= num_ties_to_take) continue;
      const int index = 32 * w + __popc(bit - 1);
      emit(position++, index, elements.take(index));
    }
  }
  __syncthreads();
}

// The magnitude that the first list goes down to: the last step's guess, if it made one.
__device__ uint32_t first_probe(float guess) {
  return min(max(magnitude_bits(guess), 1u), bits_of(kMaxMagnitude) - 1);
}

// From the list of those that reach `probe`: selects, takes, and calls emit(position, index, value)
// for each element, positions in the order of indices. Returns false if the block holds a NaN or an
// Inf; the parameter and its state are then untouched.
//
// The guess of the last step usually leaves a few more than k candidates. Otherwise bisection over
// the bits finds a magnitude that does or, if too many are equal, the k-th itself.
template <class Elements, class Emit>
__device__ bool select(Elements& elements, const Block& block, uint32_t probe, Shared& shared,
                       Emit emit) {
  const int k = block.k;
  uint32_t low = 0, high = bits_of(kMaxMagnitude);  // reached by k or more, and by fewer
  int count = static_cast<int>(shared.num_candidates);
  if (count < k || count > kMaxCandidates) {
    if (sum_over_block(elements.count_reaching(high), shared.partial_sums[0]) != 0) return false;
    for (int round = 1; count < k || count > kMaxCandidates; ++round) {
      (count < k ? high : low) = probe;
      if (high - low == 1) {
        if (threadIdx.x == 0) *block.threshold() = float_of(low);
        take_by_bitmaps(elements, block, low, shared, emit);
        return true;
      }
      probe = low + (high - low) / 2;
      count = sum_over_block(elements.count_reaching(probe), shared.partial_sums[round % 2]);
    }
    clear_candidates(shared);
    __syncthreads();
    list_candidates(elements, probe, shared);
    __syncthreads();
  }
  return take_candidates(elements, block, count, shared, emit);
}

}  // namespace
}  // namespace microadam::cuda
