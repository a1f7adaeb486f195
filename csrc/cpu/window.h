// The window's moments, and what they subtract from the parameter.
#pragma once

#include "block.h"
#include "simd.h"

namespace microadam::cpu {
namespace {

// The weights of every window entry: beta1^age and beta2^age, by slot.
inline void fill_weights(const Settings& s, const Block& block, Scratch& scratch) {
  for (int slot = 0; slot < s.window_size; ++slot) {
    const int age = (block.newest_slot - slot + s.window_size) % s.window_size;
    const int first = slot * block.slot_stride;
    std::fill_n(scratch.weights1 + first, block.slot_stride, s.powers1[age]);
    std::fill_n(scratch.weights2 + first, block.slot_stride, s.powers2[age]);
  }
}

// Calls function(begin, end) for the entries in use: once, unless the block is a shorter one that
// leaves the end of every slot unused.
template <class Function>
void for_entries(const Block& block, Function function) {
  if (block.k == block.slot_stride) {
    function(0, block.num_slots * block.k);
  } else {
    for (int slot = 0; slot < block.num_slots; ++slot) {
      function(slot * block.slot_stride, slot * block.slot_stride + block.k);
    }
  }
}

// Sums the window into scratch.moments, in the order of its slots.
template <class Prefetcher>
void sum_window(const Block& block, Scratch& scratch, Prefetcher& prefetcher) {
  const int16_t* indices = block.window_indices;
  const BFloat16* values = block.window_values;
  const float *weights1 = scratch.weights1, *weights2 = scratch.weights2;
  float* terms = scratch.terms;
  Moments* moments = scratch.moments;
  for_entries(block, [&](int begin, int end) {
    for (int e = begin; e < end; ++e) {
      const float value = to_float(values[e]);
      terms[2 * e] = value * weights1[e];
      terms[2 * e + 1] = value * weights2[e] * value;  // the square alone could be infinite
    }
    const auto add = [&](int e) {
      Moments term;
      memcpy(&term, terms + 2 * e, sizeof(term));
      moments[indices[e]] += term;
    };
    int e = begin;
    for (; e + 8 <= end; e += 8) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) add(e + i);
      prefetcher.advance();
    }
    for (; e < end; ++e) add(e);
    prefetcher.advance();
  });
}

#if defined(__AVX2__)
MICROADAM_INLINE __m256 take_eight_updates(Moments* moments, const int16_t* indices,
                                           const UpdateFactors& f) {
  const auto take = [&](int i) {
    __m64* both =
        reinterpret_cast<__m64*>(moments + indices[i]);  // __m64 may alias, double must not
    const __m128 taken = _mm_loadl_pi(_mm_setzero_ps(), both);
    _mm_storel_pi(both, _mm_setzero_ps());
    return taken;
  };
  const auto take_pair = [&](int i) {
    const __m128 first = take(i);
    return _mm_movelh_ps(first, take(i + 1));
  };
  const __m128 pair0 = take_pair(0), pair2 = take_pair(2);
  const __m128 pair4 = take_pair(4), pair6 = take_pair(6);
  const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(pair0), pair4, 1);
  const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(pair2), pair6, 1);
  const __m256 first = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0));
  const __m256 second = _mm256_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1));
  // parameter_update
  const __m256 m_hat = _mm256_mul_ps(first, _mm256_set1_ps(f.first));
  const __m256 v_hat = _mm256_mul_ps(second, _mm256_set1_ps(f.second));
  const __m256 denominator = _mm256_add_ps(_mm256_sqrt_ps(v_hat), _mm256_set1_ps(f.eps));
  return _mm256_mul_ps(_mm256_set1_ps(f.lr), _mm256_div_ps(m_hat, denominator));
}
#endif

// Takes the window's moments and turns them into what is subtracted from each entry's coordinate.
// Leaves the moments 0: if a coordinate occurs again, its update is 0.
template <class Prefetcher>
void take_updates(const Block& block, const UpdateFactors& factors, Moments* moments,
                  float* updates, Prefetcher& prefetcher) {
  const int16_t* indices = block.window_indices;
  for_entries(block, [&](int begin, int end) {
    int e = begin;
#if defined(__AVX2__)
    for (; e + 8 <= end; e += 8) {
      _mm256_storeu_ps(updates + e, take_eight_updates(moments, indices + e, factors));
      prefetcher.advance();
    }
#endif
    for (; e < end; e += 8) {
      float first[8], second[8];
      const int count = std::min(8, end - e);
      for (int i = 0; i < count; ++i) {
        Moments& taken = moments[indices[e + i]];
        first[i] = taken[0], second[i] = taken[1];
        taken = Moments{};
      }
      for (int i = 0; i < count; ++i) {
        updates[e + i] = parameter_update(first[i], second[i], factors);
      }
      prefetcher.advance();
    }
  });
}

#if defined(__AVX2__)
// The 16-bit values at eight indices.
template <class Param>
__m128i load_eight(const Param* values, const int16_t* indices) {
  const auto bits = [&](int i) { return static_cast<int16_t>(values[indices[i]].bits); };
  return _mm_setr_epi16(bits(0), bits(1), bits(2), bits(3), bits(4), bits(5), bits(6), bits(7));
}

// Stores them, the first one last. Each comes straight out of the vector: stored as a whole first,
// its parts would take long to load again.
template <class Param>
void store_eight(__m128i bits, Param* values, const int16_t* indices) {
  values[indices[7]].bits = _mm_extract_epi16(bits, 7);
  values[indices[6]].bits = _mm_extract_epi16(bits, 6);
  values[indices[5]].bits = _mm_extract_epi16(bits, 5);
  values[indices[4]].bits = _mm_extract_epi16(bits, 4);
  values[indices[3]].bits = _mm_extract_epi16(bits, 3);
  values[indices[2]].bits = _mm_extract_epi16(bits, 2);
  values[indices[1]].bits = _mm_extract_epi16(bits, 1);
  values[indices[0]].bits = _mm_extract_epi16(bits, 0);
}
#endif

// values[indices] -= updates for eight of them. An index may repeat, and only its first entry has
// an update: that one is stored last.
template <class Param>
MICROADAM_INLINE void subtract_eight(Param* values, const int16_t* indices, const float* updates) {
#if defined(__AVX2__)
  if constexpr (sizeof(Param) == 2) {
    const __m256 old_values = to_floats(load_eight(values, indices), Param{});
    const __m256 new_values = _mm256_sub_ps(old_values, load(updates));
    return store_eight(round_to_bits(new_values, Param{}), values, indices);
  }
#endif
  Param results[8];
  for (int i = 0; i < 8; ++i) {
    results[i] = round_to<Param>(to_float(values[indices[i]]) - updates[i]);
  }
  for (int i = 7; i >= 0; --i) values[indices[i]] = results[i];
}

// `rate` times the error feedback, which by now is that of the next step.
inline void scale_feedback(const Settings& s, const Block& block, float rate, float* scaled) {
  const int size = s.bucket_size, half = size / 2;
  for (int first = 0, b = 0; first < block.length; first += size, ++b) {
    const float low = to_float(block.error_min[b]);
    const float unit = quantization_unit(low, to_float(block.error_max[b]));
    const uint8_t* codes = block.error + b * half;
    const int length = std::min(size, block.length - first);
    for (int i = 0; i < length; ++i) {
      const uint32_t code = i < half ? codes[i] & 15u : uint32_t{codes[i - half]} >> 4;
      scaled[first + i] = rate * dequantize(code, low, unit);
    }
  }
}

// Takes the window's moments out of scratch.moments and moves the parameter by them.
template <class Param, bool kStochastic, class Prefetcher>
void update_values(const Settings& s, const ParameterStep& p, const Block& block, Scratch& scratch,
                   Prefetcher& prefetcher) {
  Param* values = static_cast<Param*>(block.values);
  const auto round = [&](float value, int index) {
    if constexpr (!kStochastic) return round_to<Param>(value);
    const uint32_t bits = random_bits(p.rounding, block.first_element + index);
    return round_stochastically<Param>(value, bits);
  };
  const int16_t* indices = block.window_indices;
  float* updates = scratch.terms;
  take_updates(block, p.factors, scratch.moments, updates, prefetcher);
  if (s.decay == 1.0f && s.feedback_rate == 0.0f) {
    for_entries(block, [&](int begin, int end) {
      int e = begin;
      if constexpr (!kStochastic) {
        for (; e + 8 <= end; e += 8) subtract_eight(values, indices + e, updates + e);
      }
      for (; e < end; ++e) {
        const int i = indices[e];
        values[i] = round(to_float(values[i]) - updates[e], i);
      }
    });
    return;
  }
  // Every element changes, and is rounded once.
  float* changes = scratch.accumulator;
  if (s.feedback_rate != 0.0f) {
    scale_feedback(s, block, s.feedback_rate, changes);
  } else {
    std::fill_n(changes, block.length, 0.0f);
  }
  for_entries(block, [&](int begin, int end) {
    for (int e = begin; e < end; ++e) changes[indices[e]] += updates[e];
  });
  for (int i = 0; i < block.length; ++i) {
    values[i] = round(to_float(values[i]) * s.decay - changes[i], i);
  }
}

}  // namespace
}  // namespace microadam::cpu
