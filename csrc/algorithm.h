// The scalar arithmetic of Algorithm 1, shared by the CPU and the CUDA implementation.
//
// It must give what microadam/reference.py gives, bit for bit: every operation is one float32
// operation in the same order. Build without contraction (-ffp-contract=off, nvcc -fmad=false) and
// without -ffast-math.
//
// The functions are in an unnamed namespace: the CPU kernel is compiled once for each instruction
// set, and the linker must not merge a copy that uses AVX2 with one that must not.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MICROADAM_FN __host__ __device__ __forceinline__
#else
#define MICROADAM_FN inline
#endif

namespace microadam {

// An accumulator at or beyond this magnitude counts as infinite (reference.MAX_MAGNITUDE).
constexpr float kMaxMagnitude = 0x1p120f - 0x1p111f;
constexpr float kMaxCode = 15.0f;      // codes are 4 bits
constexpr float kMinUnit = 0x1p-126f;  // the smallest normal number

// 16-bit floats as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// What `parameter_update` takes beside the window's sums.
struct UpdateFactors {
  float first;   // (1 - beta1) / (1 - beta1^step)
  float second;  // (1 - beta2) / (1 - beta2^step)
  float lr;
  float eps;
};

// What determines the random bits of an element, besides its index.
struct RoundingKey {
  uint64_t seed;
  uint32_t ordinal;  // of the parameter, or of this shard of it
  uint32_t step;
};

namespace {

MICROADAM_FN uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

MICROADAM_FN float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// The magnitude as an integer: ordered as |value| is, with NaN above infinity.
MICROADAM_FN uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// ---------------------------------------------------------------------------------------------
// Conversions: to float32 exactly, from float32 rounding to nearest even.

MICROADAM_FN float to_float(float value) { return value; }

MICROADAM_FN float to_float(BFloat16 value) { return float_of(uint32_t{value.bits} << 16); }

MICROADAM_FN float to_float(Float16 value) {
  // Shifting a half's exponent and fraction into a float's place leaves the exponent too small by
  // 112; the multiplication corrects it, and normalizes what was subnormal.
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  if (magnitude >= 0x7c00u) return float_of(sign | (magnitude << 13) | 0x7f800000u);
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

template <class T>
MICROADAM_FN T round_to(float value);

template <>
MICROADAM_FN float round_to<float>(float value) {
  return value;
}

template <>
MICROADAM_FN BFloat16 round_to<BFloat16>(float value) {
#if defined(__CUDA_ARCH__)  // one instruction that does the same, except for the bits of a NaN
  uint16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  return {result};
#else
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded)};
#endif
}

template <>
MICROADAM_FN Float16 round_to<Float16>(float value) {
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  const uint32_t magnitude = magnitude_bits(value);
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and more round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition rounds to multiples of 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

// ---------------------------------------------------------------------------------------------
// Error feedback: 4-bit codes, the range of a bucket in bfloat16.

MICROADAM_FN float quantization_unit(float minimum, float maximum) {
  return (maximum - minimum) / kMaxCode;
}

MICROADAM_FN float dequantize(uint32_t code, float minimum, float unit) {
  return static_cast<float>(code) * unit + minimum;
}

// What `quantize` multiplies by: 1 / unit; or 0, which makes all codes 0, if the unit is 0 or
// subnormal and the reciprocal might overflow.
MICROADAM_FN float inverse_unit(float unit) { return unit >= kMinUnit ? 1.0f / unit : 0.0f; }

// The code, before rounding down and clamping.
MICROADAM_FN float quantization_level(float residual, float minimum, float inverse) {
  return (residual - minimum) * inverse + 0.5f;
}

MICROADAM_FN uint32_t quantize(float residual, float minimum, float inverse) {
  const float level = quantization_level(residual, minimum, inverse);
  const float positive = level > 0.0f ? level : 0.0f;                       // fmaxf would be a call
  return static_cast<uint32_t>(positive < kMaxCode ? positive : kMaxCode);  // rounds down
}

// ---------------------------------------------------------------------------------------------
// What is subtracted from a parameter: lr * m_hat / (sqrt(v_hat) + eps), from the window's sums.

MICROADAM_FN float parameter_update(float first_sum, float second_sum, const UpdateFactors& f) {
  return f.lr * ((first_sum * f.first) / (sqrtf(second_sum * f.second) + f.eps));
}

// ---------------------------------------------------------------------------------------------
// Stochastic rounding with the bits of Philox4x32-10 (microadam/rounding.py describes how they are
// dealt out: 16 bits per element, 8 elements per call).

// The four words of call number `call`: the random bits of the elements [8 call, 8 call + 8).
MICROADAM_FN void philox(const RoundingKey& key, uint64_t call, uint32_t (&words)[4]) {
  uint32_t c0 = static_cast<uint32_t>(call), c1 = key.ordinal, c2 = key.step;
  uint32_t c3 = static_cast<uint32_t>(call >> 32);
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
#if defined(__CUDA_ARCH__)
#pragma unroll 1  // else the keys of all rounds are computed even if nothing is rounded at random
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

MICROADAM_FN uint32_t random_bits(const RoundingKey& key, uint64_t element) {
  uint32_t words[4];
  philox(key, element / 8, words);
  const uint32_t low = (element & 2) ? words[1] : words[0];
  const uint32_t high = (element & 2) ? words[3] : words[2];
  const uint32_t word = (element & 4) ? high : low;
  return (element & 1) ? word >> 16 : word & 0xffffu;
}

template <class T>
MICROADAM_FN T round_stochastically(float value, uint32_t bits);

template <>
MICROADAM_FN float round_stochastically<float>(float value, uint32_t) {
  return value;
}

template <>
MICROADAM_FN BFloat16 round_stochastically<BFloat16>(float value, uint32_t bits) {
  // A GPU's NaN has all bits set but the sign: an addition would turn it into -0.
  if (magnitude_bits(value) > 0x7f800000u) return round_to<BFloat16>(value);
  return round_to<BFloat16>(float_of((bits_of(value) + bits) & 0xffff0000u));
}

template <>
MICROADAM_FN Float16 round_stochastically<Float16>(float value, uint32_t bits) {
  const float magnitude = fabsf(value);
  if (!(magnitude < 65504.0f)) return round_to<Float16>(value);
  // A half keeps 10 bits below the leading one; its unit stops shrinking at 2^-24.
  const int exponent = static_cast<int>(bits_of(magnitude) >> 23) - 127;
  const float unit =
      float_of(static_cast<uint32_t>((exponent < -14 ? -14 : exponent) - 10 + 127) << 23);
  const float fraction = static_cast<float>(bits & 0x1fffu) * 0x1p-13f;
  return round_to<Float16>(copysignf(floorf(magnitude / unit + fraction) * unit, value));
}

}  // namespace
}  // namespace microadam
