// From the words of MmaTiles (formats.h) to registers of the A operand of mma.m16n8k16, in fp16 or bf16.
//
// Numbers come out as the integers q - z (int4), q (int8) or the float q (fp8_e4m3), exactly; for fp16 x an fp8_e4m3 weight
// comes out as q * 2^-8, and kScale says by what a scale must be multiplied to make up for it. The trick throughout: an
// integer OR-ed into the mantissa of 1024.0 (fp16) or 128.0 (bf16) is that number plus the integer.
#pragma once

#include "common/cuda.cuh"
#include "common/formats.h"
#include "common/ptx.cuh"

namespace taut {

// The words a lane holds of one strip of a tile (16 n x 64 k), in memory order.
template <Format kFormat>
struct StripCodes {
  static constexpr int kWords = kFormat == Format::kInt4 ? 4 : 8;
  uint32_t word[kWords];
};

// int4: what is subtracted to take the magic number and the zero points of rows g and g + 8 away. 8-bit formats: unused.
struct FragmentZeros {
  uint32_t lower, upper;
};

template <Format kFormat, class T>
struct Dequant;

constexpr int kLutAndOr = 0xea;  // lop3: (a & b) | c

// (w & mask) | magic
template <uint32_t kMask, uint32_t kMagic>
TAUT_DEVICE uint32_t magic_bits(uint32_t w) {
  return ptx::lop3<kLutAndOr>(w, kMask, kMagic);
}

template <>
struct Dequant<Format::kInt4, __half> {
  static constexpr float kScale = 1;
  // 1024 + z, and -(64 + z), each twice
  TAUT_DEVICE static FragmentZeros zeros(uint32_t lower, uint32_t upper) { return {0x64006400u + lower * 0x00010001u, 0xd400d400u + upper * 0x00100010u}; }
  TAUT_DEVICE static void fragment(const StripCodes<Format::kInt4>& codes, int step, const FragmentZeros& z, uint32_t (&a)[4]) {
    const uint32_t w = codes.word[step], w8 = w >> 8;
    const uint32_t sixteenth = 0x2c002c00u;  // the upper nibbles come as 1024 + 16 q: no shift, the FMA divides
    a[0] = ptx::hsub2<__half>(magic_bits<0x000f000f, 0x64006400>(w), z.lower);
    a[1] = ptx::hfma2<__half>(magic_bits<0x00f000f0, 0x64006400>(w), sixteenth, z.upper);
    a[2] = ptx::hsub2<__half>(magic_bits<0x000f000f, 0x64006400>(w8), z.lower);
    a[3] = ptx::hfma2<__half>(magic_bits<0x00f000f0, 0x64006400>(w8), sixteenth, z.upper);
  }
};

template <>
struct Dequant<Format::kInt4, __nv_bfloat16> {
  static constexpr float kScale = 1;
  // 128 + z twice
  TAUT_DEVICE static FragmentZeros zeros(uint32_t lower, uint32_t upper) { return {0x43004300u + lower * 0x00010001u, 0x43004300u + upper * 0x00010001u}; }
  // WHY shifts: bf16 has 7 bits of mantissa, so only the lowest nibble of each half fits.
  TAUT_DEVICE static void fragment(const StripCodes<Format::kInt4>& codes, int step, const FragmentZeros& z, uint32_t (&a)[4]) {
    const uint32_t w = codes.word[step];
    a[0] = ptx::hsub2<__nv_bfloat16>(magic_bits<0x000f000f, 0x43004300>(w), z.lower);
    a[1] = ptx::hsub2<__nv_bfloat16>(magic_bits<0x000f000f, 0x43004300>(w >> 4), z.upper);
    a[2] = ptx::hsub2<__nv_bfloat16>(magic_bits<0x000f000f, 0x43004300>(w >> 8), z.lower);
    a[3] = ptx::hsub2<__nv_bfloat16>(magic_bits<0x000f000f, 0x43004300>(w >> 12), z.upper);
  }
};

template <>
struct Dequant<Format::kInt8, __half> {
  static constexpr float kScale = 1;
  TAUT_DEVICE static FragmentZeros zeros(uint32_t, uint32_t) { return {}; }
  TAUT_DEVICE static void fragment(const StripCodes<Format::kInt8>& codes, int step, const FragmentZeros&, uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t u = codes.word[2 * step + h] ^ 0x80808080u;  // q + 128
      a[h] = ptx::hsub2<__half>(ptx::prmt(u, 0x64646464u, 0x4240), 0x64806480u);
      a[h + 2] = ptx::hsub2<__half>(ptx::prmt(u, 0x64646464u, 0x4341), 0x64806480u);
    }
  }
};

template <>
struct Dequant<Format::kInt8, __nv_bfloat16> {
  static constexpr float kScale = 1;
  TAUT_DEVICE static FragmentZeros zeros(uint32_t, uint32_t) { return {}; }
  // Seven bits fit the mantissa: 128 + (q & 127). The eighth, worth -128, is the lowest bit of the exponent: OR-ed into
  // 128.0 it makes 256.0, which is just what must be subtracted for a negative q.
  TAUT_DEVICE static void fragment(const StripCodes<Format::kInt8>& codes, int step, const FragmentZeros&, uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t w = codes.word[2 * step + h], w8 = w >> 8;
      a[h] = ptx::hsub2<__nv_bfloat16>(magic_bits<0x007f007f, 0x43004300>(w), magic_bits<0x00800080, 0x43004300>(w));
      a[h + 2] = ptx::hsub2<__nv_bfloat16>(magic_bits<0x007f007f, 0x43004300>(w8), magic_bits<0x00800080, 0x43004300>(w8));
    }
  }
};

// E4M3 is s.eeee.mmm with bias 7. Shifted so that its exponent lies at the low end of a wider one, it is the same number
// times 2^(7 - bias), subnormals too; every one of them is exact in fp16 and bf16.
template <>
struct Dequant<Format::kFp8E4M3, __half> {
  static constexpr float kScale = 256;
  TAUT_DEVICE static FragmentZeros zeros(uint32_t, uint32_t) { return {}; }
  TAUT_DEVICE static void fragment(const StripCodes<Format::kFp8E4M3>& codes, int step, const FragmentZeros&, uint32_t (&a)[4]) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t w = codes.word[2 * step + h];
      a[h] = ptx::lop3<kLutAndOr>(w << 8, 0x80008000u, (w << 7) & 0x3f803f80u);
      a[h + 2] = ptx::lop3<kLutAndOr>(w, 0x80008000u, (w >> 1) & 0x3f803f80u);
    }
  }
};

template <>
struct Dequant<Format::kFp8E4M3, __nv_bfloat16> {
  static constexpr float kScale = 1;  // 2^-120 would push small products below fp32's range
  TAUT_DEVICE static FragmentZeros zeros(uint32_t, uint32_t) { return {}; }
  TAUT_DEVICE static void fragment(const StripCodes<Format::kFp8E4M3>& codes, int step, const FragmentZeros&, uint32_t (&a)[4]) {
    const uint32_t factor = 0x7b807b80u;  // 2^120
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t w = codes.word[2 * step + h];
      a[h] = ptx::hmul2<__nv_bfloat16>(ptx::lop3<kLutAndOr>(w << 8, 0x80008000u, (w << 4) & 0x07f007f0u), factor);
      a[h + 2] = ptx::hmul2<__nv_bfloat16>(ptx::lop3<kLutAndOr>(w, 0x80008000u, (w >> 4) & 0x07f007f0u), factor);
    }
  }
};

}  // namespace taut
