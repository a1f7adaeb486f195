// Single GPU instructions that replace several, each next to the plain C++ that defines it.
#pragma once

#include "../algorithm.h"

namespace microadam::cuda {
namespace {

// Two bfloat16 in a word, rounded to nearest even.
__device__ uint32_t pack(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
#else
  return round_to<BFloat16>(low).bits | uint32_t{round_to<BFloat16>(high).bits} << 16;
#endif
}

__device__ float low_half(uint32_t pair) { return float_of(pair << 16); }
__device__ float high_half(uint32_t pair) { return float_of(pair & 0xffff0000u); }

// The smaller and the larger of two bfloat16 in either half.
__device__ uint32_t minima(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return pack(fminf(low_half(a), low_half(b)), fminf(high_half(a), high_half(b)));
#endif
}

__device__ uint32_t maxima(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return pack(fmaxf(low_half(a), low_half(b)), fmaxf(high_half(a), high_half(b)));
#endif
}

// Shifts a byte into `codes` from the low end: two levels, rounded down and clamped to 4 bits,
// `low` in the low half.
__device__ uint32_t shift_in_codes(float low, float high, uint32_t codes) {
  // Scaled by 2^-149, the smallest float, a level becomes a subnormal number whose bits are the
  // level rounded down to an integer. That needs subnormal numbers: never compile with -ftz=true.
  const uint32_t low_bits = bits_of(__fmul_rz(low, 0x1p-149f));
  const uint32_t high_bits = bits_of(__fmul_rz(high, 0x1p-149f));
#if defined(__CUDA_ARCH__)
  uint32_t result;
  asm("cvt.pack.sat.u4.s32.b32 %0, %1, %2, %3;"
      : "=r"(result)
      : "r"(high_bits), "r"(low_bits), "r"(codes));
  return result;
#else
  const auto clamped = [](uint32_t bits) {  // the bits of a negative number are a negative integer
    return static_cast<uint32_t>(min(max(static_cast<int32_t>(bits), 0), 15));
  };
  return codes << 8 | clamped(high_bits) << 4 | clamped(low_bits);
#endif
}

// Four codes, one in the low half of each byte, times the unit.
__device__ void multiply_codes(uint32_t codes, float unit, float (&out)[4]) {
  // The code goes into the low mantissa bits of the bfloat16 128.0, which gives 128 + code without
  // a conversion. The fused operation subtracts 128 * unit, which is exact, and rounds once: the
  // result is code * unit, rounded.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t shifted = __byte_perm(codes, 0x43000000u, 0x7044 | i << 8);
    out[i] = fmaf(float_of(shifted), unit, -128.0f * unit);
  }
}

}  // namespace
}  // namespace microadam::cuda
