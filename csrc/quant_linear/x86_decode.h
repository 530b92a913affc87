// Packed weights to what 8-bit dot products take, written once for every format and for both widths of x86 vectors (x86_simd.h).
//
// Decode<Simd, kFormat> gives the weights as unsigned bytes u = code + kZero (or codes whose zero points are stored). All
// formats of fewer than 8 bits have one shape: in steps c = 0..3, load() makes a vector whose low nibbles belong to chunk c and
// whose high nibbles to chunk c + 4. So int3 costs 5 operations more than int4 in each step, and the two 4-bit floats and nf4
// one table look-up more a chunk. The weight is (u - kZero) * int8_scale * factor.
//
// TRIED, by counting: third bits of int3 joined chunk by chunk, 40 operations a block where this takes 32 (AVX2). 2-bit codes left
// where they are in the byte (masks 0x03, 0x0c, 0x30; sums of 1, 4 and 16 times the codes, shifted at the end): 30 instead
// of 32, and 3 more registers.
#pragma once

#include "common/formats.h"
#include "quant_linear/x86_simd.h"

namespace taut::quant_linear {
namespace {

constexpr int kNf4Zero = 128, kE2M1Zero = 12;
// nf4's scales go in as scale / 127, which are the numbers of the definition; times 2^24, so that no subnormal one loses bits.
constexpr float kNf4Scale = 0x1p24f / 127.0f;
// u of each code: nf4's codebook rounded to 8 bits; twice the E2M1 number, which is an integer.
constexpr Table make_table(Format format) {
  Table table{};
  for (int i = 0; i < 16; i++) {
    const float nf4 = kNf4[i] * 127.0f;
    table.bytes[i] = static_cast<uint8_t>(format == Format::kNf4 ? static_cast<int>(nf4 < 0 ? nf4 - 0.5f : nf4 + 0.5f) + kNf4Zero : kTwiceE2M1[i] + kE2M1Zero);
  }
  return table;
}
constexpr Table nibbles_of(Table table, int shift) {
  for (uint8_t& byte : table.bytes) byte = byte >> shift & 15;
  return table;
}
template <Format kFormat>
constexpr Table kTable = make_table(kFormat);
constexpr Table kNf4High = nibbles_of(make_table(Format::kNf4), 4), kNf4Low = nibbles_of(make_table(Format::kNf4), 0);

template <class Simd, Format kFormat>
struct Decode {
  using Bytes = typename Simd::Bytes;
  using Floats = typename Simd::Floats;
  static constexpr bool kBytes = kFormat == Format::kInt8 || kFormat == Format::kNf4;  // u takes all 8 bits; elsewhere u <= 24
  static constexpr bool kE2M1 = kFormat == Format::kMxfp4 || kFormat == Format::kNvfp4;
  static constexpr int kScales = kFormat == Format::kNvfp4 ? 2 : 1;  // scales a block: chunks 0-3 and 4-7 have one each
  static constexpr int kZero = kBytes ? 128 : kE2M1 ? kE2M1Zero : zero_code(kFormat);
  static constexpr int kSteps = kFormat == Format::kInt8 ? 8 : 4, kHalves = 8 / kSteps;
  static constexpr int kBlockBytes = 32 * code_bits(kFormat);

  // Step c of a block: chunk c, and in the high nibbles chunk c + 4.
  static TAUT_INLINE Bytes load(const uint8_t* block, int64_t far, int c) {
    if constexpr (code_bits(kFormat) >= 4) return Simd::load(block + c * 32, far);
    Bytes x = Simd::load(block + c % 2 * 32, far);
    if (c >= 2) x = Simd::right(x, 2);
    if constexpr (kFormat == Format::kInt3) {
      Bytes third = Simd::load(block + 64, far);
      if (c != 2) third = c < 2 ? Simd::left(third, 2 - c) : Simd::right(third, c - 2);
      x = Simd::join(x, third);
    }
    return x;
  }
  // u of chunk c + 4 * half.
  static TAUT_INLINE Bytes code(Bytes x, int half) {
    if constexpr (kFormat == Format::kInt8) return x;
    const Bytes index = nibble(x, half);
    if constexpr (kBytes || kE2M1) return Simd::look_up(Simd::table(kTable<kFormat>), index);
    return index;
  }
  // u = 16 * (pass 0) + (pass 1), for instructions that need u small.
  static TAUT_INLINE Bytes code_pass(Bytes x, int half, int pass) {
    if constexpr (kFormat == Format::kInt8) return nibble(x, 1 - pass);
    if constexpr (kFormat == Format::kNf4) return Simd::look_up(Simd::table(pass == 0 ? kNf4High : kNf4Low), nibble(x, half));
    return code(x, half);
  }

  // Of one group of the header, for the 8 outputs of each strip.
  static TAUT_INLINE void load_scales(const uint8_t* scales, int64_t far, Floats (&out)[kScales]) {
    constexpr ScaleType kType = scale_type(kFormat);
    if constexpr (kType == ScaleType::kE4M3) Simd::from_e4m3(scales, far, out);
    else if constexpr (kType == ScaleType::kE8M0) out[0] = Simd::from_e8m0(scales, far);
    else if constexpr (kType == ScaleType::kFp32) out[0] = Simd::from_fp32(scales, far);
    else out[0] = Simd::from_fp16(scales, far);
  }
  // What u - kZero is multiplied with, but for factor().
  static TAUT_INLINE void load_int8_scales(const uint8_t* scales, int64_t far, Floats (&out)[kScales]) {
    load_scales(scales, far, out);
    if constexpr (kFormat == Format::kNf4) out[0] = out[0] * Simd::splat_float(kNf4Scale);
  }
  static constexpr int kScaleBytes = 8 * kScales * static_cast<int>(scale_bytes(scale_type(kFormat)));  // of a group

  static float factor(const Rows8& layout, const uint8_t* packed) {
    if constexpr (kFormat == Format::kNvfp4) return load_as<float>(packed + layout.global_scale_offset()) * (0.5f * kE4M3Factor);
    return kFormat == Format::kMxfp4 ? 0.5f : kFormat == Format::kNf4 ? 0x1p-24f : 1.0f;
  }

 private:
  static TAUT_INLINE Bytes nibble(Bytes x, int half) {
    return (half ? Simd::right(x, 4) : x) & Simd::splat(code_bits(kFormat) == 2 ? 3 : code_bits(kFormat) == 3 ? 7 : 15);
  }
};

}  // namespace
}  // namespace taut::quant_linear
