// The k largest magnitudes of a block: exactly k, the lower index first among equals.
#pragma once

#include "accumulate.h"
#include "block.h"

namespace microadam::cpu {
namespace {

typedef int32_t EightInts __attribute__((vector_size(32)));

// A threshold that about `rank` magnitudes reach, and never fewer, from a histogram of the floats'
// exponents and first three bits.
inline float histogram_threshold(const float* accumulator, int length, int rank) {
  constexpr int kShift = 20, kNumBins = 0x80000000u >> kShift;
  int32_t bins[kNumBins] = {};
  for (int i = 0; i < length; ++i) ++bins[magnitude_bits(accumulator[i]) >> kShift];
  int bin = kNumBins - 1;
  for (int count = bins[bin]; count < rank; count += bins[bin]) --bin;
  return float_of(static_cast<uint32_t>(bin) << kShift);
}

// The magnitudes of rank k and of rank num_wanted (or the last one, if there are fewer): each is
// the smallest of those that fewer than so many others exceed. The array has room for a multiple
// of 32.
inline void find_ranks(int32_t* magnitudes, int count, int k, int num_wanted, int32_t* kth,
                       int32_t* wanted) {
  const EightInts largest = EightInts{} + INT32_MAX;
  for (int i = count; i % 32 != 0; ++i) magnitudes[i] = INT32_MAX;
  EightInts kth_lanes = largest, wanted_lanes = largest;
  for (int i = 0; i < count; i += 32) {
    EightInts own[4], num_greater[4] = {};
    memcpy(own, magnitudes + i, sizeof(own));
    for (int j = 0; j < count; ++j) {
      for (int v = 0; v < 4; ++v) num_greater[v] -= magnitudes[j] > own[v];  // true is -1
    }
    for (int v = 0; v < 4; ++v) {
      const EightInts in_kth = (num_greater[v] < k) & (own[v] < kth_lanes);
      const EightInts in_wanted = (num_greater[v] < num_wanted) & (own[v] < wanted_lanes);
      kth_lanes = in_kth ? own[v] : kth_lanes;
      wanted_lanes = in_wanted ? own[v] : wanted_lanes;
    }
  }
  *kth = *wanted = INT32_MAX;
  for (int lane = 0; lane < 8; ++lane) {
    *kth = std::min<int32_t>(*kth, kth_lanes[lane]);
    *wanted = std::min<int32_t>(*wanted, wanted_lanes[lane]);
  }
}

// Writes the indices of the k largest magnitudes, ascending, and guesses the next step's threshold.
// `count` elements reached this one's. Returns false, and writes nothing, where a magnitude is too
// large or NaN.
inline bool select_top_k(const Block& block, int count, Scratch& scratch, int16_t* selected) {
  const int k = block.k;
  // More candidates than needed make the next step's guess safe, too many make it slow.
  const int num_wanted = std::min(block.length, k + 3 * static_cast<int>(sqrtf(float(k))) + 1);
  const float* accumulator = scratch.accumulator;
  if (count < k || count > 4 * num_wanted) {
    uint32_t largest = 0;
    for (int i = 0; i < block.length; ++i) {
      largest = std::max(largest, magnitude_bits(accumulator[i]));
    }
    if (largest == 0) {  // as for the rows of an embedding that no token used
      for (int i = 0; i < k; ++i) selected[i] = static_cast<int16_t>(i);
      return true;
    }
    const float edge = histogram_threshold(accumulator, block.length, num_wanted);
    count = append_candidates(0, block.length, edge, scratch, 0);
  }
  for (int i = 0; i < count; ++i) {
    scratch.magnitudes[i] =
        static_cast<int32_t>(magnitude_bits(accumulator[scratch.candidates[i]]));
  }
  int32_t largest = 0;
  for (int i = 0; i < count; ++i) largest = std::max(largest, scratch.magnitudes[i]);
  if (largest >= static_cast<int32_t>(bits_of(kMaxMagnitude))) return false;

  const int32_t* magnitudes = scratch.magnitudes;
  int32_t kth, wanted;
  find_ranks(scratch.magnitudes, count, k, num_wanted, &kth, &wanted);
  float threshold = float_of(wanted);
  if (count < num_wanted) {
    // Continue the line from the k-th magnitude to the smallest candidate.
    const float slope = (float_of(kth) - threshold) / static_cast<float>(count - k + 1);
    threshold =
        std::max(0.5f * threshold, threshold - slope * static_cast<float>(num_wanted - count));
  }
  *block.threshold = threshold;

  // Of those equal to the k-th, the first ones are taken: nearly always all of them.
  int num_equal = k, num_reaching = 0;
  for (int i = 0; i < count; ++i) {
    num_equal -= magnitudes[i] > kth;
    num_reaching += magnitudes[i] >= kth;
  }
  if (num_reaching == k) {
    for (int i = 0, num_selected = 0; num_selected < k; ++i) {
      selected[num_selected] = static_cast<int16_t>(scratch.candidates[i]);
      num_selected += magnitudes[i] >= kth;
    }
    return true;
  }
  for (int i = 0, num_selected = 0; num_selected < k; ++i) {
    const int is_equal = magnitudes[i] == kth;
    selected[num_selected] = static_cast<int16_t>(scratch.candidates[i]);
    num_selected += (magnitudes[i] > kth) | (is_equal & (num_equal > 0));
    num_equal -= is_equal;
  }
  return true;
}

}  // namespace
}  // namespace microadam::cpu
