// Eight floats at a time with AVX2, or sixteen with AVX-512, for the loops in which intrinsics pay.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>

#include "../algorithm.h"

namespace microadam::cpu {
namespace {

inline __m256 load(const float* p) { return _mm256_loadu_ps(p); }

inline __m256 to_floats(__m128i bits, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

inline __m256 to_floats(__m128i bits, Float16) { return _mm256_cvtph_ps(bits); }

inline __m256 load(const Float16* p) {
  return to_floats(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Float16{});
}

// One shuffle instead of a conversion and a shift.
inline __m256 load(const BFloat16* p) {
  const __m256i twice =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i order =
      _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                       -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return _mm256_castsi256_ps(_mm256_shuffle_epi8(twice, order));
}

// A bit for each of 32 masks.
inline uint32_t bits_of_masks(const __m256i (&masks)[4]) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(masks[0], masks[1]),
                                           _mm256_packs_epi32(masks[2], masks[3]));
  return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_permutevar8x32_epi32(bytes, order)));
}

// A mask of the magnitudes that are not below the limit: NaN is marked.
inline __m256i reaches(__m256 value, __m256 limit) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), value);
  return _mm256_castps_si256(_mm256_cmp_ps(magnitude, limit, _CMP_NLT_UQ));
}

// As round_to<BFloat16>, but for NaN: the bits of the nearest bfloat16, and zeros below them.
template <class Words>
Words nearest_bfloat16(Words bits) {
  return (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
}

inline __m256i bfloat16_bits(__m256 value) {
  typedef uint32_t Words __attribute__((vector_size(32)));
  return (__m256i)nearest_bfloat16((Words)value);
}

// The high halves of eight words.
inline __m128i high_halves(__m256i words) {
  const __m256i low = _mm256_srli_epi32(words, 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
}

inline __m128i round_to_bits(__m256 value, BFloat16) {
  const __m256i nan = _mm256_set1_epi32(0x7fc00000);
  const __m256 is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
  return high_halves(_mm256_blendv_epi8(bfloat16_bits(value), nan, _mm256_castps_si256(is_nan)));
}

inline __m128i round_to_bits(__m256 value, Float16) {
  return _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
}

#if defined(__AVX512VBMI2__)
// The same for sixteen.
inline __m512 load_16(const float* p) { return _mm512_loadu_ps(p); }

inline __m512 load_16(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __m512 load_16(const BFloat16* p) {
  const __m512i order = _mm512_setr_epi32(0 << 16, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16,  //
                                          6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16, 11 << 16,
                                          12 << 16, 13 << 16, 14 << 16, 15 << 16);
  const __m512i words =
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, order, words));
}

inline __mmask16 reaches(__m512 value, __m512 limit) {
  return _mm512_cmp_ps_mask(_mm512_abs_ps(value), limit, _CMP_NLT_UQ);
}

// A bit for each of 64 masks.
inline uint64_t bits_of_masks(const __mmask16 (&masks)[4]) {
  return _mm512_kunpackd(_mm512_kunpackw(masks[3], masks[2]), _mm512_kunpackw(masks[1], masks[0]));
}

inline __m512i bfloat16_bits(__m512 value) {
  typedef uint32_t Words __attribute__((vector_size(64)));
  return (__m512i)nearest_bfloat16((Words)value);
}

inline __m256i high_halves(__m512i words) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16));
}
#endif

}  // namespace
}  // namespace microadam::cpu
#endif
