// The k largest magnitudes of a block: exactly k, the lower index first among equals.
#pragma once

#include "accumulate.h"
#include "block.h"

namespace microadam::cpu {
namespace {

typedef int32_t EightInts __attribute__((vector_size(32)));

constexpr int kFewCandidates = 128;

// The magnitudes, as bits, of the largest of every eight elements: each of 64 elements' columns of
// eight is one value. Those left over stand for themselves. Returns how many values there are.
inline int find_group_maxima(const float* accumulator, int length, int32_t* maxima) {
  int count = 0, i = 0;
  for (; i + 64 <= length; i += 64, count += 8) {
    EightInts rows[8], largest = {};
    memcpy(rows, accumulator + i, sizeof(rows));
    for (const EightInts& row : rows) {
      const EightInts magnitudes = row & INT32_MAX;
      largest = magnitudes > largest ? magnitudes : largest;
    }
    memcpy(maxima + count, &largest, sizeof(largest));
  }
  for (; i < length; ++i) maxima[count++] = static_cast<int32_t>(magnitude_bits(accumulator[i]));
  return count;
}

inline int count_reaching(const int32_t* values, int count, int32_t bound) {
  int num_reaching = 0;
  for (int i = 0; i < count; ++i) num_reaching += values[i] >= bound;
  return num_reaching;
}

// The largest bound that at least `rank` of the values reach, which is the value of that rank, or
// one below it that at most `slack` more values reach. They are at least 0 and at most `largest`.
inline int32_t find_bound(const int32_t* values, int count, int rank, int slack, int32_t largest) {
  int32_t low = 0, high = largest + 1;  // enough values reach `low`, too few reach `high`
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int num_reaching = count_reaching(values, count, middle);
    (num_reaching >= rank ? low : high) = middle;
    if (num_reaching >= rank && num_reaching <= rank + slack) break;
  }
  return low;
}

// The magnitudes of rank k and of rank num_wanted (or the last one, if there are fewer), of few:
// each is the smallest of those that fewer than so many others exceed. The array has room for a
// multiple of 32.
inline void rank_few(int32_t* magnitudes, int count, int k, int num_wanted, int32_t* kth,
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
inline bool select_top_k(const Block& block, int count, bool is_sparse, Scratch& scratch,
                         int16_t* selected) {
  const int32_t too_large = static_cast<int32_t>(bits_of(kMaxMagnitude));
  const int k = block.k;
  // More candidates than needed make the next step's guess safe, too many make it slow. Where the
  // gradient is 0, the next step chooses among what this one leaves over.
  const int num_spare = 3 * static_cast<int>(sqrtf(float(k))) + 1;
  const int num_wanted = std::min(block.length, (is_sparse ? 2 * k : k) + num_spare);
  const float* accumulator = scratch.accumulator;
  int32_t largest = 0;
  if (count < k || count > 2 * num_wanted) {
    // So many groups have a candidate, and most of them have one only.
    int32_t* maxima = scratch.magnitudes;
    int num_maxima = find_group_maxima(accumulator, block.length, maxima);
    if (num_maxima < 2 * k) {
      for (num_maxima = 0; num_maxima < block.length; ++num_maxima) {
        maxima[num_maxima] = static_cast<int32_t>(magnitude_bits(accumulator[num_maxima]));
      }
    }
    for (int i = 0; i < num_maxima; ++i) largest = std::max(largest, maxima[i]);
    if (largest >= too_large) return false;
    const int32_t bound = find_bound(maxima, num_maxima, k, k / 4, largest);
    const float edge = float_of(std::max(bound, 1));
    count = largest == 0 ? 0 : append_candidates(0, block.length, edge, scratch, 0);
    if (count <
        k) {  // the first zeros join them, as in the rows of an embedding that no token used
      for (int i = 0, num_zeros = k - count, num_selected = 0; num_selected < k; ++i) {
        selected[num_selected] = static_cast<int16_t>(i);
        num_selected += accumulator[i] != 0.0f || num_zeros-- > 0;
      }
      *block.threshold = 0.0f;
      return true;
    }
  }
  for (int i = 0; i < count; ++i) {
    scratch.magnitudes[i] =
        static_cast<int32_t>(magnitude_bits(accumulator[scratch.candidates[i]]));
  }
  for (int i = 0; i < count; ++i) largest = std::max(largest, scratch.magnitudes[i]);
  if (largest >= too_large) return false;

  const int32_t* magnitudes = scratch.magnitudes;
  int32_t kth, wanted;
  if (count <= kFewCandidates) {
    rank_few(scratch.magnitudes, count, k, num_wanted, &kth, &wanted);
  } else {
    kth = find_bound(magnitudes, count, k, 0, largest);
    wanted = find_bound(magnitudes, count, std::min(count, num_wanted), 0, largest);
  }
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
