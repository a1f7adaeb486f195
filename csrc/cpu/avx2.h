// The loops of kernel.h in which AVX2 intrinsics pay: one bucket of 4-bit codes, whose size is a
// multiple of 16, at a time.
#pragma once

#include <immintrin.h>

namespace microadam::cpu {
namespace {

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 load(const BFloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m256 load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

// The functions below work on whole buckets of this size, the default.
constexpr int kVectorBucket = 64;

// Accumulators of whole buckets; a bit in `above` for each that reaches the threshold or is NaN.
template <class Grad, class Prefetcher>
inline void accumulate_avx2(const Grad* grad, const uint8_t* codes, const float* bucket_min,
                            const float* bucket_unit, int num_buckets, float inv_scale,
                            float threshold, float* accumulator, uint8_t* above,
                            Prefetcher& prefetcher) {
  constexpr int kHalf = kVectorBucket / 2;
  const __m256 scale = _mm256_set1_ps(inv_scale), limit = _mm256_set1_ps(threshold);
  const __m256 magnitude_mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  for (int b = 0; b < num_buckets; ++b) {
    const __m256 low = _mm256_set1_ps(bucket_min[b]), unit = _mm256_set1_ps(bucket_unit[b]);
    const auto accumulate = [&](int i, __m256i code) {
      const __m256 feedback = _mm256_add_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(code), unit), low);
      const __m256 value = _mm256_add_ps(_mm256_mul_ps(load(grad + i), scale), feedback);
      _mm256_store_ps(accumulator + i, value);
      const __m256 magnitude = _mm256_and_ps(value, magnitude_mask);
      above[i / 8] = static_cast<uint8_t>(  // not less, so that NaN is marked
          _mm256_movemask_ps(_mm256_cmp_ps(magnitude, limit, _CMP_NLT_UQ)));
    };
#pragma GCC unroll 4
    for (int i = 0; i < kHalf; i += 8) {
      const __m256i pairs =
          _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + i)));
      accumulate(i, _mm256_and_si256(pairs, _mm256_set1_epi32(15)));
      accumulate(i + kHalf, _mm256_srli_epi32(pairs, 4));
    }
    prefetcher.advance();
    grad += kVectorBucket, accumulator += kVectorBucket;
    codes += kHalf, above += kVectorBucket / 8;
  }
}

template <class Prefetcher>
inline void bucket_ranges_avx2(const float* residual, int num_buckets, float* bucket_min,
                               float* bucket_max, Prefetcher& prefetcher) {
  for (int b = 0; b < num_buckets; ++b, residual += kVectorBucket) {
    __m256 low = load(residual), high = low;
#pragma GCC unroll 7
    for (int i = 8; i < kVectorBucket; i += 8) {
      const __m256 value = load(residual + i);
      low = _mm256_min_ps(low, value);
      high = _mm256_max_ps(high, value);
    }
    __m128 low4 = _mm_min_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1));
    __m128 high4 = _mm_max_ps(_mm256_castps256_ps128(high), _mm256_extractf128_ps(high, 1));
    low4 = _mm_min_ps(low4, _mm_movehl_ps(low4, low4));
    high4 = _mm_max_ps(high4, _mm_movehl_ps(high4, high4));
    bucket_min[b] = _mm_cvtss_f32(_mm_min_ss(low4, _mm_movehdup_ps(low4)));
    bucket_max[b] = _mm_cvtss_f32(_mm_max_ss(high4, _mm_movehdup_ps(high4)));
    if (b % 2 == 0) prefetcher.advance();
  }
}

// The codes of 32 residuals, before the clamp to 15, as bytes in the order
// 0-3, 8-11, 16-19, 24-27, 4-7, 12-15, 20-23, 28-31.
inline __m256i encode_32(const float* residual, __m256 low, __m256 unit) {
  const __m256 half = _mm256_set1_ps(0.5f);
  const auto level = [&](int i) {
    const __m256 quotient = _mm256_div_ps(_mm256_sub_ps(load(residual + i), low), unit);
    // Truncation is the floor, but for what is below 0: the packing saturates that to 0.
    return _mm256_cvttps_epi32(_mm256_add_ps(quotient, half));
  };
  return _mm256_packus_epi16(_mm256_packus_epi32(level(0), level(8)),
                             _mm256_packus_epi32(level(16), level(24)));
}

// The codes of whole buckets.
template <class Prefetcher>
inline void encode_avx2(const float* residual, const float* bucket_min, const float* bucket_unit,
                        int num_buckets, uint8_t* codes, Prefetcher& prefetcher) {
  constexpr int kHalf = kVectorBucket / 2;
  const __m256i last = _mm256_set1_epi8(15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int b = 0; b < num_buckets; ++b) {
    const __m256 low = _mm256_set1_ps(bucket_min[b]), unit = _mm256_set1_ps(bucket_unit[b]);
    const __m256i first = _mm256_min_epu8(encode_32(residual, low, unit), last);
    const __m256i second = _mm256_min_epu8(encode_32(residual + kHalf, low, unit), last);
    const __m256i pairs =
        _mm256_permutevar8x32_epi32(_mm256_or_si256(first, _mm256_slli_epi16(second, 4)), order);
    // Where the unit is 0 the quotients mean nothing, and the codes are 0.
    const __m256i is_used =
        _mm256_castps_si256(_mm256_cmp_ps(unit, _mm256_setzero_ps(), _CMP_NEQ_OQ));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_and_si256(pairs, is_used));
    prefetcher.advance();
    residual += kVectorBucket, codes += kHalf;
  }
}

}  // namespace
}  // namespace microadam::cpu
