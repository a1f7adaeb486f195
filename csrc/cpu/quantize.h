// error feedback = quantized residual
#pragma once

#include "block.h"
#include "simd.h"

namespace microadam::cpu {
namespace {

// Quantizes a bucket of any size.
inline void quantize_bucket(const float* residual, int length, int half, float kept_share,
                            BFloat16* minimum, BFloat16* maximum, uint8_t* codes) {
  float low = residual[0], high = residual[0];
  for (int i = 1; i < length; ++i) {
    low = std::min(low, residual[i]);
    high = std::max(high, residual[i]);
  }
  low = to_float(round_to<BFloat16>(low));
  high = to_float(round_to<BFloat16>(high));
  const float inverse = inverse_unit(quantization_unit(low, high));
  *minimum = round_to<BFloat16>(low * kept_share);
  *maximum = round_to<BFloat16>(high * kept_share);
  for (int j = 0; j < half; ++j) {
    // A last bucket that is short repeats its last value (as the reference does).
    const uint32_t first = quantize(residual[std::min(j, length - 1)], low, inverse);
    const uint32_t second = quantize(residual[std::min(j + half, length - 1)], low, inverse);
    codes[j] = static_cast<uint8_t>(first | (second << 4));
  }
}

#if defined(__AVX512VBMI2__)
constexpr int kRangesAtOnce = 16;

// From sixteen vectors, the smallest (or largest) element of each.
template <class Reduce>
__m512 reduce_each(const __m512 (&v)[16], Reduce reduce) {
  const auto pairs = [&](__m512 a, __m512 b) {
    return reduce(_mm512_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                  _mm512_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  };
  const auto quarters = [&](__m512 a, __m512 b) {
    return reduce(_mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                  _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  };
  const auto four = [&](int i) { return pairs(pairs(v[i], v[i + 1]), pairs(v[i + 2], v[i + 3])); };
  return quarters(quarters(four(0), four(4)), quarters(four(8), four(12)));
}

// The ranges of kRangesAtOnce buckets of 64: stored as the next error feedback's, and as what
// encodes this one.
inline void find_ranges(const float* residual, float kept_share, BFloat16* minimum,
                        BFloat16* maximum, float* lows, float* inverses) {
  const auto min = [](__m512 a, __m512 b) { return _mm512_min_ps(a, b); };
  const auto max = [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); };
  __m512 lowest[16], highest[16];
#pragma GCC unroll 16
  for (int b = 0; b < 16; ++b) {
    const float* bucket = residual + b * kVectorBucket;
    const __m512 v0 = load_16(bucket), v1 = load_16(bucket + 16);
    const __m512 v2 = load_16(bucket + 32), v3 = load_16(bucket + 48);
    lowest[b] = min(min(v0, v1), min(v2, v3));
    highest[b] = max(max(v0, v1), max(v2, v3));
  }
  const auto rounded = [](__m512 v) { return _mm512_castsi512_ps(bfloat16_bits(v)); };
  const auto store_kept = [&](BFloat16* target, __m512 limit) {
    const __m512 kept = _mm512_mul_ps(limit, _mm512_set1_ps(kept_share));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), high_halves(bfloat16_bits(kept)));
  };
  const __m512 low = rounded(reduce_each(lowest, min)), high = rounded(reduce_each(highest, max));
  store_kept(minimum, low);
  store_kept(maximum, high);
  const __m512 unit = _mm512_div_ps(_mm512_sub_ps(high, low), _mm512_set1_ps(kNumLevels));
  const __mmask16 is_used = _mm512_cmp_ps_mask(unit, _mm512_set1_ps(kMinUnit), _CMP_GE_OQ);
  _mm512_store_ps(lows, low);
  _mm512_store_ps(inverses, _mm512_maskz_div_ps(is_used, _mm512_set1_ps(1.0f), unit));
}

MICROADAM_INLINE void encode_bucket(const float* residual, float low, float inverse,
                                    uint8_t* codes) {
  const __m512 lows = _mm512_set1_ps(low), inverses = _mm512_set1_ps(inverse);
  const auto level = [&](int i) {
    const __m512 quotient = _mm512_mul_ps(_mm512_sub_ps(load_16(residual + i), lows), inverses);
    // Truncation is the floor, but for what is below 0: the packing saturates that to 0.
    return _mm512_cvttps_epi32(_mm512_add_ps(quotient, _mm512_set1_ps(0.5f)));
  };
  // Each quarter of the vector has the codes of 4 elements in a row from 0, 16, 32 and 48 on.
  const __m512i levels = _mm512_packus_epi16(_mm512_packus_epi32(level(0), level(16)),
                                             _mm512_packus_epi32(level(32), level(48)));
  const __m512i clamped = _mm512_min_epu8(levels, _mm512_set1_epi8(15));
  const __m512i second_halves = _mm512_bsrli_epi128(clamped, 8);
  const __m512i pairs = _mm512_or_si512(clamped, _mm512_slli_epi16(second_halves, 4));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes),
                      _mm512_castsi512_si256(_mm512_permutexvar_epi32(order, pairs)));
}
#elif defined(__AVX2__)
constexpr int kRangesAtOnce = 8;

// From eight vectors, the smallest (or largest) element of each.
template <class Reduce>
__m256 reduce_each(const __m256 (&v)[8], Reduce reduce) {
  const auto pairs = [&](__m256 a, __m256 b) {
    return reduce(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                  _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  };
  const __m256 first = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
  const __m256 second = pairs(pairs(v[4], v[5]), pairs(v[6], v[7]));
  return reduce(_mm256_permute2f128_ps(first, second, 0x20),
                _mm256_permute2f128_ps(first, second, 0x31));
}

// The codes of 32 residuals, before the clamp to 15, as bytes in the order
// 0-3, 8-11, 16-19, 24-27, 4-7, 12-15, 20-23, 28-31.
MICROADAM_INLINE __m256i encode_32(const float* residual, __m256 low, __m256 inverse) {
  const __m256 half = _mm256_set1_ps(0.5f);
  const auto level = [&](int i) {
    const __m256 quotient = _mm256_mul_ps(_mm256_sub_ps(load(residual + i), low), inverse);
    // Truncation is the floor, but for what is below 0: the packing saturates that to 0.
    return _mm256_cvttps_epi32(_mm256_add_ps(quotient, half));
  };
  return _mm256_packus_epi16(_mm256_packus_epi32(level(0), level(8)),
                             _mm256_packus_epi32(level(16), level(24)));
}

// The ranges of kRangesAtOnce buckets of 64: stored as the next error feedback's, and as what
// encodes this one.
inline void find_ranges(const float* residual, float kept_share, BFloat16* minimum,
                        BFloat16* maximum, float* lows, float* inverses) {
  const auto min = [](__m256 a, __m256 b) { return _mm256_min_ps(a, b); };
  const auto max = [](__m256 a, __m256 b) { return _mm256_max_ps(a, b); };
  __m256 lowest[8], highest[8];
  for (int b = 0; b < 8; ++b) {
    const float* bucket = residual + b * kVectorBucket;
    lowest[b] = highest[b] = load(bucket);
#pragma GCC unroll 7
    for (int i = 8; i < kVectorBucket; i += 8) {
      lowest[b] = min(lowest[b], load(bucket + i));
      highest[b] = max(highest[b], load(bucket + i));
    }
  }
  const auto rounded = [](__m256 v) { return _mm256_castsi256_ps(bfloat16_bits(v)); };
  const auto store_kept = [&](BFloat16* target, __m256 limit) {
    const __m256 kept = _mm256_mul_ps(limit, _mm256_set1_ps(kept_share));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), high_halves(bfloat16_bits(kept)));
  };
  const __m256 low = rounded(reduce_each(lowest, min)), high = rounded(reduce_each(highest, max));
  store_kept(minimum, low);
  store_kept(maximum, high);
  const __m256 unit = _mm256_div_ps(_mm256_sub_ps(high, low), _mm256_set1_ps(kNumLevels));
  const __m256 is_used = _mm256_cmp_ps(unit, _mm256_set1_ps(kMinUnit), _CMP_GE_OQ);
  _mm256_store_ps(lows, low);
  _mm256_store_ps(inverses, _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(1.0f), unit), is_used));
}

MICROADAM_INLINE void encode_bucket(const float* residual, float low, float inverse,
                                    uint8_t* codes) {
  const __m256 lows = _mm256_set1_ps(low), inverses = _mm256_set1_ps(inverse);
  const __m256i last = _mm256_set1_epi8(15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i first = _mm256_min_epu8(encode_32(residual, lows, inverses), last);
  const __m256i second =
      _mm256_min_epu8(encode_32(residual + kVectorBucket / 2, lows, inverses), last);
  const __m256i pairs = _mm256_or_si256(first, _mm256_slli_epi16(second, 4));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(pairs, order));
}
#endif

template <class Prefetcher>
void quantize_residual(const Settings& s, const Block& block, Scratch& scratch,
                       Prefetcher& prefetcher) {
  float* residual = scratch.accumulator;
  const int size = s.bucket_size, half = size / 2;
  const int num_buckets = (block.length + size - 1) / size;
#if defined(__AVX2__)
  if (size == kVectorBucket) {
    std::fill(residual + block.length, residual + num_buckets * size, residual[block.length - 1]);
    // All ranges first: the divisions of a few buckets would be waited for.
    for (int first = 0; first < num_buckets; first += kRangesAtOnce) {
      BFloat16 minima[kRangesAtOnce], maxima[kRangesAtOnce];
      find_ranges(residual + first * size, s.kept_share, minima, maxima, scratch.bucket_min + first,
                  scratch.bucket_unit + first);
      const int count = std::min(kRangesAtOnce, num_buckets - first);
      std::copy_n(minima, count, block.error_min + first);
      std::copy_n(maxima, count, block.error_max + first);
      for (int i = 0; i < count / 2; ++i) prefetcher.advance();
    }
    for (int b = 0; b < num_buckets; ++b) {
      encode_bucket(residual + b * size, scratch.bucket_min[b], scratch.bucket_unit[b],
                    block.error + b * half);
      prefetcher.advance();
    }
    return;
  }
#endif
  for (int b = 0; b < num_buckets; ++b) {
    const int first = b * size;
    quantize_bucket(residual + first, std::min(size, block.length - first), half, s.kept_share,
                    block.error_min + b, block.error_max + b, block.error + b * half);
    prefetcher.advance();
  }
}

}  // namespace
}  // namespace microadam::cpu
