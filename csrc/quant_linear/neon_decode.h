// What the bytes of a Rows8 block mean, on ARM: one Decode a format, shared by every ARM kernel. A strip's 32-byte vector is
// two registers, `half` 0 (rows 0-3) and 1 (rows 4-7); byte r*4+i of a register belongs to row r, and to the i-th of a
// chunk's 4 k.
#pragma once

#include "quant_linear/neon_rows.h"

namespace taut::quant_linear {
namespace {

// The codes of one half of a k-block: `packed` as loaded; chunk<c>() gives chunk c as 16 signed bytes, in which kZero (or the
// group's zero point) stands for 0. Byte formats and tables come out centred: kZero = 0.
template <Format kFormat>
struct Decode {
  static constexpr int kBits = static_cast<int>(code_bits(kFormat));
  static constexpr int kVectors = kFormat == Format::kInt3 ? 2 : kBits;  // of codes; int3 has one of third bits besides
  static constexpr bool kTable = kBits == 4 && kFormat != Format::kInt4;
  static constexpr int kZero = kFormat == Format::kInt8 ? 0 : is_integer(kFormat) ? zero_code(kFormat) : 0;
  // Scales of a block: nvfp4 has 8 for chunks 0-3 and 8 for chunks 4-7.
  static constexpr int kParts = kFormat == Format::kNvfp4 ? 2 : 1;

  uint8x16_t packed[kBits];

  explicit TAUT_INLINE Decode(const uint8_t* block /* of codes, + 16 for half 1 */) {
    TAUT_FOR (int v = 0; v < kBits; v++) packed[v] = vld1q_u8(block + v * 32);
  }

  // Chunk c as it is stored: unsigned codes.
  template <int c>
  TAUT_INLINE uint8x16_t code() const {
    constexpr int kShift = c / kVectors * kBits;
    const uint8x16_t x = packed[c % kVectors];
    if constexpr (kBits == 8) return x;
    else if constexpr (kFormat == Format::kInt3) {
      constexpr int kLow = c / 2 * 2;
      const uint8x16_t third = c == 0 ? packed[2] : vshrq_n_u8(packed[2], c == 0 ? 1 : c);
      return vandq_u8(vsliq_n_u8(kLow == 0 ? x : vshrq_n_u8(x, kLow == 0 ? 1 : kLow), third, 2), vdupq_n_u8(7));
    } else if constexpr (kShift == 0) return vandq_u8(x, vdupq_n_u8((1 << kBits) - 1));
    else if constexpr (kShift == 8 - kBits) return vshrq_n_u8(x, kShift);
    else return vandq_u8(vshrq_n_u8(x, kShift), vdupq_n_u8((1 << kBits) - 1));
  }

  // Chunk c as sdot takes it.
  template <int c>
  TAUT_INLINE int8x16_t chunk(int8x16_t table) const {
    const uint8x16_t q = code<c>();
    if constexpr (kTable) return vqtbl1q_s8(table, q);
    else if constexpr (kFormat == Format::kInt8) return vreinterpretq_s8_u8(veorq_u8(q, vdupq_n_u8(0x80)));
    else return vreinterpretq_s8_u8(q);
  }
};

constexpr int8_t nf4_in_127ths(int q) { return static_cast<int8_t>(kNf4[q] * 127.0f + (q < 7 ? -0.5f : 0.5f)); }

// The codebook in 8 bits, for int8 activations: twice e2m1; nf4 in steps of 1/127 (op.h).
template <Format kFormat>
TAUT_INLINE int8x16_t load_table() {
  static constexpr auto kTable = [] {
    struct {
      int8_t values[16];
    } table{};
    for (int q = 0; q < 16; q++) table.values[q] = kFormat == Format::kNf4 ? nf4_in_127ths(q) : kTwiceE2M1[q];
    return table;
  }();
  return vld1q_s8(kTable.values);
}

TAUT_INLINE float32x4_t exact_e4m3(uint8x8_t bytes, int half) {  // four numbers; NaN stays NaN
  // Its bits in the places of fp16 are the number / 256, subnormals too.
  const uint16x8_t wide = vmovl_u8(bytes);
  const uint16x4_t b = half ? vget_high_u16(wide) : vget_low_u16(wide);
  const uint16x4_t magnitude = vand_u16(vshl_n_u16(b, 7), vdup_n_u16(0x3f80));
  const uint16x4_t nan = vand_u16(vceq_u16(magnitude, vdup_n_u16(0x3f80)), vdup_n_u16(0x7e00));
  const uint16x4_t sign = vand_u16(vshl_n_u16(b, 8), vdup_n_u16(0x8000));
  return vmulq_n_f32(vcvt_f32_f16(vreinterpret_f16_u16(vorr_u16(vorr_u16(magnitude, nan), sign))), 256.0f);
}

// Scales of rows 4 * half .. 4 * half + 3, out of a header's 8; exact.
template <Format kFormat>
TAUT_INLINE float32x4_t load_scales(const uint8_t* scales, int half) {
  constexpr ScaleType kType = scale_type(kFormat);
  if constexpr (kType == ScaleType::kFp16) return load4_fp16(reinterpret_cast<const uint16_t*>(scales) + half * 4);
  else if constexpr (kType == ScaleType::kFp32) return vld1q_f32(reinterpret_cast<const float*>(scales) + half * 4);
  else if constexpr (kType == ScaleType::kE4M3) return exact_e4m3(vld1_u8(scales), half);
  else {
    const uint16x8_t wide = vmovl_u8(vld1_u8(scales));
    const uint32x4_t bits = vshlq_n_u32(vmovl_u16(half ? vget_high_u16(wide) : vget_low_u16(wide)), 23);
    const uint32x4_t quiet = vandq_u32(vceqq_u32(bits, vdupq_n_u32(0x7f800000)), vdupq_n_u32(0x00400000));  // 255 is NaN
    return vreinterpretq_f32_u32(vorrq_u32(vmaxq_u32(bits, vdupq_n_u32(0x00400000)), quiet));               // 0 is 2^-127
  }
}

template <Format kFormat>
inline float load_global_scale(const Params& p) {
  if constexpr (kFormat != Format::kNvfp4) return 1.0f;
  float scale;
  std::memcpy(&scale, p.packed + Rows8{p.weight}.global_scale_offset(), 4);
  return scale;
}

TAUT_INLINE int32x4_t load_zeros(const uint8_t* zeros, int half) {
  const uint16x8_t wide = vmovl_u8(vld1_u8(zeros));
  return vreinterpretq_s32_u32(vmovl_u16(half ? vget_high_u16(wide) : vget_low_u16(wide)));
}

}  // namespace
}  // namespace taut::quant_linear
