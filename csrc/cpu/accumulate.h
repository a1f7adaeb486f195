// accumulator = gradient + error feedback, with a list of candidates for the largest.
#pragma once

#include "block.h"
#include "simd.h"

namespace microadam::cpu {
namespace {

#if defined(__AVX512VBMI2__)
// The numbers 0 to 63, as bytes.
struct Places {
  constexpr Places() : values() {
    for (int i = 0; i < 64; ++i) values[i] = static_cast<uint8_t>(i);
  }
  alignas(64) uint8_t values[64];
};
constexpr Places kPlaces;
#endif

template <class Grad>
void accumulate_bucket(const Grad* grad, const uint8_t* codes, float minimum, float unit,
                       int length, int half, float inv_scale, float* accumulator) {
  for (int i = 0; i < length; ++i) {
    const uint32_t code = i < half ? codes[i] & 15u : uint32_t{codes[i - half]} >> 4;
    accumulator[i] = to_float(grad[i]) * inv_scale + dequantize(code, minimum, unit);
  }
}

// A bit for each of up to 64 values: whether its magnitude reaches the threshold, or is NaN. All 64
// are read, however few count.
inline uint64_t marks_of(const float* values, int length, float threshold) {
#if defined(__AVX512VBMI2__)
  const __m512 limit = _mm512_set1_ps(threshold);
  __mmask16 masks[4];
  for (int i = 0; i < 4; ++i) masks[i] = reaches(load_16(values + 16 * i), limit);
  return bits_of_masks(masks) & (~uint64_t{0} >> (64 - length));
#elif defined(__AVX2__)
  const __m256 limit = _mm256_set1_ps(threshold);
  uint64_t marks = 0;
  for (int half = 0; half < 2; ++half) {
    __m256i masks[4];
    for (int i = 0; i < 4; ++i) masks[i] = reaches(load(values + 32 * half + 8 * i), limit);
    marks |= uint64_t{bits_of_masks(masks)} << (32 * half);
  }
  return marks & (~uint64_t{0} >> (64 - length));
#else
  uint64_t marks = 0;
  for (int i = 0; i < length; ++i) marks |= uint64_t{!(fabsf(values[i]) < threshold)} << i;
  return marks;
#endif
}

// Appends the marked ones of 64 elements to the candidates; returns how many there are now.
MICROADAM_INLINE int append_marked(uint64_t marks, int first_element, int32_t* candidates,
                                   int count) {
  const int end = count + __builtin_popcountll(marks);
#if defined(__AVX512VBMI2__)
  // Few are marked: the first sixteen are always written, whether marked or not.
  __m512i places = _mm512_maskz_compress_epi8(marks, _mm512_load_si512(kPlaces.values));
  const __m512i first = _mm512_set1_epi32(first_element);
  while (true) {
    const __m512i found = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(places));
    _mm512_storeu_si512(candidates + count, _mm512_add_epi32(first, found));
    count += 16;
    if (count >= end) return end;
    places = _mm512_alignr_epi64(places, places, 2);
  }
#else
  // Most words have few marks. The first three are always written, marked or not, which avoids an
  // unpredictable branch.
  for (int i = 0; i < 3; ++i, marks &= marks - 1) {
    candidates[count + i] = first_element + __builtin_ctzll(marks | (uint64_t{1} << 63));
  }
  for (count += 3; marks != 0; marks &= marks - 1) {
    candidates[count++] = first_element + __builtin_ctzll(marks);
  }
  return end;
#endif
}

// Appends the elements from `first_element` on whose magnitudes reach the threshold, ascending, to
// the `count` already in scratch.candidates; returns how many there are now.
inline int append_candidates(int first_element, int length, float threshold, Scratch& scratch,
                             int count) {
  for (int i = first_element; i < length; i += 64) {
    const uint64_t marks = marks_of(scratch.accumulator + i, std::min(64, length - i), threshold);
    count = append_marked(marks, i, scratch.candidates, count);
  }
  return count;
}

#if defined(__AVX512VBMI2__)
// accumulate_bucket and append_candidates for whole buckets of 64.
template <bool kIsScaled, class Grad, class Prefetcher>
int accumulate_buckets(const Grad* grad, const uint8_t* codes, int num_buckets, float inv_scale,
                       float threshold, Scratch& scratch, Prefetcher& prefetcher) {
  constexpr int kHalf = kVectorBucket / 2;
  const __m512 scale = _mm512_set1_ps(inv_scale), limit = _mm512_set1_ps(threshold);
  const __m512 levels = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const float *bucket_min = scratch.bucket_min, *bucket_unit = scratch.bucket_unit;
  float* accumulator = scratch.accumulator;
  int count = 0;
  for (int b = 0; b < num_buckets; ++b) {
    // One vector holds what each of the 16 codes stands for: to dequantize is to look up.
    const __m512 low = _mm512_set1_ps(bucket_min[b]), unit = _mm512_set1_ps(bucket_unit[b]);
    const __m512 feedback = _mm512_add_ps(_mm512_mul_ps(levels, unit), low);
    // Stores sixteen accumulators; returns which of them are above. Only the low four bits of a
    // code are used.
    const auto accumulate = [&](int i, __m512i code) {
      __m512 value = load_16(grad + i);
      if constexpr (kIsScaled) value = _mm512_mul_ps(value, scale);
      value = _mm512_add_ps(value, _mm512_permutexvar_ps(code, feedback));
      _mm512_store_ps(accumulator + i, value);
      return reaches(value, limit);
    };
    __mmask16 masks[4];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m512i pairs =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * i)));
      masks[i] = accumulate(16 * i, pairs);
      masks[i + 2] = accumulate(16 * i + kHalf, _mm512_srli_epi32(pairs, 4));
    }
    count = append_marked(bits_of_masks(masks), b * kVectorBucket, scratch.candidates, count);
    prefetcher.advance();
    grad += kVectorBucket, accumulator += kVectorBucket, codes += kHalf;
  }
  return count;
}
#elif defined(__AVX2__)
// accumulate_bucket and append_candidates for whole buckets of 64. Listing the candidates runs
// beside the arithmetic, in units of its own.
template <bool kIsScaled, class Grad, class Prefetcher>
int accumulate_buckets(const Grad* grad, const uint8_t* codes, int num_buckets, float inv_scale,
                       float threshold, Scratch& scratch, Prefetcher& prefetcher) {
  constexpr int kHalf = kVectorBucket / 2;
  const __m256 scale = _mm256_set1_ps(inv_scale), limit = _mm256_set1_ps(threshold);
  const float *bucket_min = scratch.bucket_min, *bucket_unit = scratch.bucket_unit;
  float* accumulator = scratch.accumulator;
  int32_t* candidates = scratch.candidates;
  int count = 0;
  for (int b = 0; b < num_buckets; ++b) {
    const __m256 low = _mm256_set1_ps(bucket_min[b]), unit = _mm256_set1_ps(bucket_unit[b]);
    // Stores eight accumulators; returns which of them are above.
    const auto accumulate = [&](int i, __m256i code) {
      const __m256 feedback = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(code), unit), low);
      __m256 value = load(grad + i);
      if constexpr (kIsScaled) value = _mm256_mul_ps(value, scale);
      value = _mm256_add_ps(value, feedback);
      _mm256_store_ps(accumulator + i, value);
      return reaches(value, limit);
    };
    __m256i first_half[4], second_half[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i pairs =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * i)));
      first_half[i] = accumulate(8 * i, _mm256_and_si256(pairs, _mm256_set1_epi32(15)));
      second_half[i] = accumulate(8 * i + kHalf, _mm256_srli_epi32(pairs, 4));
    }
    const uint64_t marks = bits_of_masks(first_half) | uint64_t{bits_of_masks(second_half)}
                                                           << kHalf;
    count = append_marked(marks, b * kVectorBucket, candidates, count);
    prefetcher.advance();
    grad += kVectorBucket, accumulator += kVectorBucket, codes += kHalf;
  }
  return count;
}
#endif

// Fills scratch.accumulator, and scratch.candidates with the elements that reach the block's
// threshold, ascending; returns how many. A threshold of 0 means that there is none yet: infinity,
// which only Inf and NaN reach, then leaves it to the selection to search the whole block.
template <class Grad, class Prefetcher>
int accumulate(const Settings& s, const Block& block, Scratch& scratch, Prefetcher& prefetcher) {
  const Grad* grad = static_cast<const Grad*>(block.grad);
  const int size = s.bucket_size, half = size / 2;
  const int num_buckets = (block.length + size - 1) / size;
  for (int b = 0; b < num_buckets; ++b) {
    const float low = to_float(block.error_min[b]);
    scratch.bucket_min[b] = low;
    scratch.bucket_unit[b] = quantization_unit(low, to_float(block.error_max[b]));
  }

  const float threshold = *block.threshold > 0.0f ? *block.threshold : INFINITY;
  int b = 0, count = 0;
#if defined(__AVX2__)
  if (size == kVectorBucket) {
    b = block.length / size;
    const auto whole_buckets = s.inv_scale == 1.0f ? accumulate_buckets<false, Grad, Prefetcher>
                                                   : accumulate_buckets<true, Grad, Prefetcher>;
    count = whole_buckets(grad, block.error, b, s.inv_scale, threshold, scratch, prefetcher);
  }
#endif
  const int first_left = b * size;
  for (; b < num_buckets; ++b) {
    const int i = b * size;
    accumulate_bucket(grad + i, block.error + i / 2, scratch.bucket_min[b], scratch.bucket_unit[b],
                      std::min(size, block.length - i), half, s.inv_scale, scratch.accumulator + i);
    prefetcher.advance();
  }
  return append_candidates(first_left, block.length, threshold, scratch, count);
}

}  // namespace
}  // namespace microadam::cpu
