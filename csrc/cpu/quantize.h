// error feedback = the quantized residual
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
using Floats = __m512;

inline Floats load_floats(const float* p) { return load_16(p); }
constexpr auto kSmaller = [](Floats a, Floats b) { return _mm512_min_ps(a, b); };
constexpr auto kLarger = [](Floats a, Floats b) { return _mm512_max_ps(a, b); };
inline Floats bfloat16_floats(Floats v) { return _mm512_castsi512_ps(bfloat16_bits(v)); }

inline void store_bfloat16(BFloat16* target, Floats v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), high_halves(bfloat16_bits(v)));
}

// From sixteen vectors, the smallest (or largest) element of each.
template <class Reduce>
Floats reduce_each(const Floats (&v)[16], Reduce reduce) {
  const auto pairs = [&](Floats a, Floats b) {
    return reduce(_mm512_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                  _mm512_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  };
  const auto quarters = [&](Floats a, Floats b) {
    return reduce(_mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                  _mm512_shuffle_f32x4(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  };
  const auto four = [&](int i) { return pairs(pairs(v[i], v[i + 1]), pairs(v[i + 2], v[i + 3])); };
  return quarters(quarters(four(0), four(4)), quarters(four(8), four(12)));
}

MICROADAM_INLINE void encode_bucket(const float* residual, float low, float inverse,
                                    uint8_t* codes) {
  const auto level = [&](int i) {
    // Truncation is the floor, but for what is below 0: the packing saturates that to 0.
    return _mm512_cvttps_epi32((load_16(residual + i) - low) * inverse + 0.5f);
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
using Floats = __m256;

inline Floats load_floats(const float* p) { return load(p); }
constexpr auto kSmaller = [](Floats a, Floats b) { return _mm256_min_ps(a, b); };
constexpr auto kLarger = [](Floats a, Floats b) { return _mm256_max_ps(a, b); };
inline Floats bfloat16_floats(Floats v) { return _mm256_castsi256_ps(bfloat16_bits(v)); }

inline void store_bfloat16(BFloat16* target, Floats v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), high_halves(bfloat16_bits(v)));
}

// From eight vectors, the smallest (or largest) element of each.
template <class Reduce>
Floats reduce_each(const Floats (&v)[8], Reduce reduce) {
  const auto pairs = [&](Floats a, Floats b) {
    return reduce(_mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)),
                  _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
  };
  const Floats first = pairs(pairs(v[0], v[1]), pairs(v[2], v[3]));
  const Floats second = pairs(pairs(v[4], v[5]), pairs(v[6], v[7]));
  return reduce(_mm256_permute2f128_ps(first, second, 0x20),
                _mm256_permute2f128_ps(first, second, 0x31));
}

// The codes of 32 residuals, before the clamp to 15, as bytes in the order
// 0-3, 8-11, 16-19, 24-27, 4-7, 12-15, 20-23, 28-31.
MICROADAM_INLINE __m256i encode_32(const float* residual, float low, float inverse) {
  const auto level = [&](int i) {
    // Truncation is the floor, but for what is below 0: the packing saturates that to 0.
    return _mm256_cvttps_epi32((load(residual + i) - low) * inverse + 0.5f);
  };
  return _mm256_packus_epi16(_mm256_packus_epi32(level(0), level(8)),
                             _mm256_packus_epi32(level(16), level(24)));
}

MICROADAM_INLINE void encode_bucket(const float* residual, float low, float inverse,
                                    uint8_t* codes) {
  const __m256i last = _mm256_set1_epi8(15);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i first = _mm256_min_epu8(encode_32(residual, low, inverse), last);
  const __m256i second =
      _mm256_min_epu8(encode_32(residual + kVectorBucket / 2, low, inverse), last);
  const __m256i pairs = _mm256_or_si256(first, _mm256_slli_epi16(second, 4));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(pairs, order));
}
#endif

#if defined(__AVX2__)
constexpr int kLanes = sizeof(Floats) / sizeof(float);
static_assert(kLanes <= kSpareBuckets, "the scratch memory has no room");

// The ranges of as many buckets of 64 as a vector has lanes, stored twice: for the next step to
// dequantize with, and in the form that the encoding here needs.
inline void find_ranges(const float* residual, float kept_share, BFloat16* minimum,
                        BFloat16* maximum, float* lows, float* inverses) {
  Floats lowest[kLanes], highest[kLanes];
#pragma GCC unroll 16
  for (int b = 0; b < kLanes; ++b) {
    const float* bucket = residual + b * kVectorBucket;
    lowest[b] = highest[b] = load_floats(bucket);
#pragma GCC unroll 7
    for (int i = kLanes; i < kVectorBucket; i += kLanes) {
      lowest[b] = kSmaller(lowest[b], load_floats(bucket + i));
      highest[b] = kLarger(highest[b], load_floats(bucket + i));
    }
  }
  const Floats low = bfloat16_floats(reduce_each(lowest, kSmaller));
  const Floats high = bfloat16_floats(reduce_each(highest, kLarger));
  store_bfloat16(minimum, low * kept_share);
  store_bfloat16(maximum, high * kept_share);
  const Floats unit = (high - low) / kMaxCode;
  const Floats inverse = unit >= kMinUnit ? 1.0f / unit : Floats{};
  memcpy(lows, &low, sizeof(low));
  memcpy(inverses, &inverse, sizeof(inverse));
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
    // All ranges first: the divisions for a few buckets at a time would cause stalls.
    for (int first = 0; first < num_buckets; first += kLanes) {
      BFloat16 minima[kLanes], maxima[kLanes];
      find_ranges(residual + first * size, s.kept_share, minima, maxima, scratch.bucket_min + first,
                  scratch.bucket_unit + first);
      const int count = std::min(kLanes, num_buckets - first);
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
