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

// The sum over the lanes up to this one.
__device__ uint32_t sum_up_to_lane(uint32_t value) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane() >= distance) value += other;
  }
  return value;
}

// To be called by one thread before each list.
__device__ void clear_candidates(Shared& shared) {
  shared.num_candidates = 0;
  shared.is_finite = true;
}

// Counts the elements that reach `probe` and lists as many as there is room for, in any order.
template <class Elements>
__device__ void list_candidates(const Elements& elements, uint32_t probe, Shared& shared) {
  const int own_count = elements.count_reaching(probe);
  if (own_count == 0) return;
  uint32_t position = atomicAdd(&shared.num_candidates, static_cast<uint32_t>(own_count));
  elements.for_each_reaching(probe, [&](int index, uint32_t magnitude) {
    if (position < kMaxCandidates) {
      shared.selection.candidates[position] = {magnitude, index};
    }
    ++position;
  });
}

// The magnitudes of a list of candidates, in the registers of a warp: those of every 32nd candidate
// in each lane, then 0.
struct Magnitudes {
  static constexpr int kPerLane = kMaxCandidates / 32;
  uint32_t values[kPerLane];
  int count;

  __device__ Magnitudes(const Candidate* candidates, int count) : count(count) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int i = 32 * j + lane();
      values[j] = i < count ? candidates[i].magnitude : 0;
    }
  }

  __device__ uint32_t smallest() const {
    uint32_t result = ~0u;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (32 * j + lane() < count) result = min(result, values[j]);
    }
    return __reduce_min_sync(kAllLanes, result);
  }

  __device__ uint32_t largest() const {
    uint32_t result = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) result = max(result, values[j]);
    return __reduce_max_sync(kAllLanes, result);
  }

  // `probe` is greater than 0.
  __device__ int count_reaching(uint32_t probe) const {
    int result = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (32 * j >= count) break;
      result += __popc(__ballot_sync(kAllLanes, values[j] >= probe));
    }
    return result;
  }
};

// How many candidates equal a magnitude and have an index of at most `last`.
__device__ int count_equal(const Candidate* candidates, int count, uint32_t magnitude, int last) {
  int result = 0;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const Candidate c = first + lane() < count ? candidates[first + lane()] : Candidate{0, 0};
    result += __popc(__ballot_sync(kAllLanes, c.magnitude == magnitude && c.index <= last));
  }
  return result;
}

// The greatest value that `num_wanted` or more candidates reach, or one that exactly as many reach.
// At least as many must reach `low`, and fewer `high`.
template <class Count>
__device__ uint32_t bisect(int num_wanted, uint32_t low, uint32_t high, Count count_reaching) {
  if (count_reaching(low) == num_wanted) return low;
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const int count = count_reaching(middle);
    if (count == num_wanted) return middle;
    (count < num_wanted ? high : low) = middle;
  }
  return low;
}

// Which candidates are taken: those that exceed a magnitude and, of those that equal it, the ones
// up to an index.
struct Cut {
  uint32_t magnitude;
  int last_index;

  __device__ bool takes(Candidate c) const {
    return c.magnitude > magnitude || (c.magnitude == magnitude && c.index <= last_index);
  }
};

// The cut that takes k candidates.
__device__ Cut cut_to(int k, const Candidate* candidates, const Magnitudes& magnitudes,
                      uint32_t smallest, uint32_t largest) {
  const auto count_reaching = [&](uint32_t probe) { return magnitudes.count_reaching(probe); };
  Cut cut = {bisect(k, smallest, largest + 1, count_reaching), kMaxBlockSize};
  if (count_reaching(cut.magnitude) > k) {
    const int num_equal_to_take = k - count_reaching(cut.magnitude + 1);
    cut.last_index -= bisect(num_equal_to_take, 1, kMaxBlockSize + 1, [&](int probe) {
      return count_equal(candidates, magnitudes.count, cut.magnitude, kMaxBlockSize - probe);
    });
  }
  return cut;
}

// The number of bits in the words before each; both arrays have room for a multiple of 128 words.
__device__ void count_bits_before(const uint32_t* bitmap, int num_words, uint32_t* num_before) {
  uint32_t before = 0;
#pragma unroll 1
  for (int w = 4 * lane(); w - 4 * lane() < num_words; w += 128) {
    const uint4 words = *reinterpret_cast<const uint4*>(bitmap + w);
    const uint32_t x = __popc(words.x), y = x + __popc(words.y), z = y + __popc(words.z);
    const uint32_t own = z + __popc(words.w), up_to = sum_up_to_lane(own);
    const uint32_t begin = before + up_to - own;
    *reinterpret_cast<uint4*>(num_before + w) = {begin, begin + x, begin + y, begin + z};
    before += __shfl_sync(kAllLanes, up_to, 31);
  }
}

// A magnitude that a few more than k of the next step's elements should reach: on the line from the
// k-th of `count` magnitudes to the smallest of them, or beyond.
__device__ float next_guess(const Block& block, int count, float kth, float smallest) {
  const int k = block.k;
  const int most = min(block.length, (k + kMaxCandidates) / 2);  // that the list has room for
  const int num_wanted = min(most, k + 3 * static_cast<int>(sqrtf(float(k))) + 1);
  const float slope = (kth - smallest) / static_cast<float>(count - k + 1);
  float rise = slope * static_cast<float>(count - num_wanted);
  if (rise > 0.0f) rise *= 0.8f;  // magnitudes lie the closer together, the smaller they are
  return fmaxf(0.5f * smallest, smallest + rise);
}

// From a list of k candidates or more: one warp takes the k largest, calls emit(position, index,
// value) for each, and leaves a guess for the next step; unless one is not finite.
template <class Elements, class Emit>
__device__ void take_candidates(Elements& elements, const Block& block, int count, Shared& shared,
                                Emit emit) {
  const Candidate* const candidates = shared.selection.candidates;
  const Magnitudes magnitudes(candidates, count);
  const uint32_t smallest = magnitudes.smallest(), largest = magnitudes.largest();
  if (largest >= bits_of(kMaxMagnitude)) {
    if (lane() == 0) shared.is_finite = false;
    return;
  }
  const Cut cut = cut_to(block.k, candidates, magnitudes, smallest, largest);

  // Positions are in the order of indices: a bitmap of what is taken gives them.
  uint32_t* const bitmap = shared.selection.above;
  uint32_t* const num_before = shared.selection.equal;
  const int num_words = (elements.length() + 31) / 32;
#pragma unroll 1
  for (int w = 4 * lane(); w - 4 * lane() < num_words; w += 128) {
    *reinterpret_cast<uint4*>(bitmap + w) = {0, 0, 0, 0};
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane(); i < count; i += 32) {
    const Candidate c = candidates[i];
    if (cut.takes(c)) atomicOr(&bitmap[c.index / 32], 1u << (c.index % 32));
  }
  __syncwarp();
  count_bits_before(bitmap, num_words, num_before);
  __syncwarp();
#pragma unroll 1
  for (int i = lane(); i < count; i += 32) {
    const Candidate c = candidates[i];
    if (!cut.takes(c)) continue;
    const uint32_t bits_before = bitmap[c.index / 32] & ((1u << (c.index % 32)) - 1);
    const int position = static_cast<int>(num_before[c.index / 32]) + __popc(bits_before);
    emit(position, c.index, elements.take(c.index));
  }
  if (lane() == 0) {
    *block.threshold() = next_guess(block, count, float_of(cut.magnitude), float_of(smallest));
  }
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
  uint32_t before = sum_up_to_lane(own);
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
    if (threadIdx.x == 0) clear_candidates(shared);
    __syncthreads();
    list_candidates(elements, probe, shared);
    __syncthreads();
  }
  if (rotated_thread() < 32) take_candidates(elements, block, count, shared, emit);
  __syncthreads();
  return shared.is_finite;
}

}  // namespace
}  // namespace microadam::cuda
