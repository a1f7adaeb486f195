// The k largest magnitudes of a block: exactly k, the lower index first among equals.
#pragma once

#include "accumulate.h"
#include "block.h"

namespace microadam::cpu {
namespace {

typedef int32_t EightInts __attribute__((vector_size(32)));

// The magnitudes, as bits, of the largest of every eight elements: of each 64 elements, every
// column of eight gives one value. Those left over are values themselves. Returns the number of
// values.
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

// A bound that `rank` of the values reach, or at most `slack` more; if equal values allow none, the
// value of that rank. All values reach `lowest`, at least `rank` of them, and none exceeds
// `largest`.
inline int32_t find_bound(const int32_t* values, int count, int rank, int slack, int32_t lowest,
                          int32_t largest) {
  int32_t low = lowest, high = largest + 1;  // enough values reach `low`, too few reach `high`
  // Magnitudes crowd at the low end.
  for (int32_t middle = low + (high - low) / 8; high - low > 1; middle = low + (high - low) / 2) {
    const int num_reaching = count_reaching(values, count, middle);
    (num_reaching >= rank ? low : high) = middle;
    if (num_reaching >= rank && num_reaching <= rank + slack) break;
  }
  return low;
}

// Writes the indices of the k largest magnitudes, ascending, and guesses the next step's threshold.
// `count` elements reached this one's. Returns false, and writes nothing, if a magnitude is too
// large or NaN.
inline bool select_top_k(const Block& block, int count, bool has_zero_rows, Scratch& scratch,
                         int16_t* selected) {
  const int32_t too_large = static_cast<int32_t>(bits_of(kMaxMagnitude));
  const int k = block.k;
  // More candidates than needed make the next step's guess safe, too many make it slow. Where the
  // gradient is 0, the next step selects from what this one leaves over.
  const int num_spare = 3 * static_cast<int>(sqrtf(float(k))) + 1;
  const int num_wanted = std::min(block.length, (has_zero_rows ? 2 * k : k) + num_spare);
  const float* accumulator = scratch.accumulator;
  float edge = *block.threshold;  // all candidates reach it
  int32_t largest = 0;
  if (count < k || count > 2 * num_wanted) {
    // Bisect over the largest of every eight: few groups hold two of the k largest, so a bound that
    // about k of these maxima reach is close to the k-th magnitude.
    int32_t* maxima = scratch.magnitudes;
    int num_maxima = find_group_maxima(accumulator, block.length, maxima);
    if (num_maxima < 2 * k) {
      for (num_maxima = 0; num_maxima < block.length; ++num_maxima) {
        maxima[num_maxima] = static_cast<int32_t>(magnitude_bits(accumulator[num_maxima]));
      }
    }
    for (int i = 0; i < num_maxima; ++i) largest = std::max(largest, maxima[i]);
    if (largest >= too_large) return false;
    edge = float_of(std::max(find_bound(maxima, num_maxima, k, k / 4, 0, largest), 1));
    count = largest == 0 ? 0 : append_candidates(0, block.length, edge, scratch, 0);
    if (count < k) {
      // Fewer than k elements are not 0, as in the rows of an embedding that no token used: the
      // first zeros complete the selection.
      int num_zeros_to_take = k - count;
      for (int i = 0, num_selected = 0; num_selected < k; ++i) {
        const bool is_zero = accumulator[i] == 0.0f;
        selected[num_selected] = static_cast<int16_t>(i);
        num_selected += !is_zero || num_zeros_to_take > 0;
        num_zeros_to_take -= is_zero;
      }
      *block.threshold = 0.0f;
      return true;
    }
  }
  int32_t* magnitudes = scratch.magnitudes;
  for (int i = 0; i < count; ++i) {
    magnitudes[i] = static_cast<int32_t>(magnitude_bits(accumulator[scratch.candidates[i]]));
  }
  for (int i = 0; i < count; ++i) largest = std::max(largest, magnitudes[i]);
  if (largest >= too_large) return false;

  // A bound that exactly k magnitudes reach; if ties allow none, the k-th magnitude itself.
  const int32_t kth =
      find_bound(magnitudes, count, k, 0, static_cast<int32_t>(bits_of(edge)), largest);
  // A threshold that the wanted number would reach, on the line through the two known ones.
  const float slope = (float_of(kth) - edge) / static_cast<float>(count - k + 1);
  *block.threshold = std::max(0.5f * edge, edge + slope * static_cast<float>(count - num_wanted));

  // Of those that equal the k-th, the first ones are taken: nearly always all of them.
  int num_ties_to_take = k, num_reaching = 0;
  for (int i = 0; i < count; ++i) {
    num_ties_to_take -= magnitudes[i] > kth;
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
    num_selected += (magnitudes[i] > kth) | (is_equal & (num_ties_to_take > 0));
    num_ties_to_take -= is_equal;
  }
  return true;
}

}  // namespace
}  // namespace microadam::cpu
