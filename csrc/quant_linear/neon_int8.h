// int8 activations on ARM: op.h's definition, 32 k at a time, bit for bit what cpu_scalar.cpp computes; and what the kernels
// that take them share. Base ARMv8 instructions only.
#pragma once

#include "quant_linear/neon_decode.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear {
namespace {

// Calls store(k, low, high, m) for every 32 k: 32 int8 codes in order, m the integer part of their scale, as float.
// Returns the row's unit: NaN if x holds a NaN or an infinity.
template <class Store>
inline float quantize_row(const float* x /* [padded_k] */, int64_t padded_k, Activations activations, const Store& store) {
  const float32x4_t limit = vdupq_n_f32(127.0f), low = vdupq_n_f32(-127.0f);
  float32x4_t row_max4 = vdupq_n_f32(0), poison4 = vdupq_n_f32(0);
  for (int64_t k = 0; k < padded_k; k += 4) {
    const float32x4_t v = vld1q_f32(x + k);
    row_max4 = vmaxnmq_f32(row_max4, vabsq_f32(v));  // ignores a NaN
    poison4 = vaddq_f32(poison4, vmulq_n_f32(v, 0.0f));
  }
  const float row_max = vmaxnmvq_f32(row_max4), steps = row_max >= kSmallestRowMax ? 32767.0f / row_max : 0.0f;
  for (int64_t k = 0; k < padded_k; k += 32) {
    float32x4_t v[8];
    TAUT_FOR (int i = 0; i < 8; i++) v[i] = vld1q_f32(x + k + i * 4);
    float32x4_t group_max = vabsq_f32(v[0]);
    TAUT_FOR (int i = 1; i < 8; i++) group_max = vmaxnmq_f32(group_max, vabsq_f32(v[i]));
    float multiple = vget_lane_f32(vrndp_f32(vdup_n_f32(vmaxnmvq_f32(group_max) * steps)), 0);
    if (!(multiple >= 1.0f)) multiple = 1.0f;  // a NaN too
    if (multiple > 32767.0f || activations == Activations::kInt8Row) multiple = 32767.0f;
    const float inverse = steps * 127.0f / multiple;
    const auto codes4 = [&](float32x4_t part) { return vmovn_s32(vcvtnq_s32_f32(vmaxnmq_f32(low, vminnmq_f32(limit, vmulq_n_f32(part, inverse))))); };
    const auto codes16 = [&](int i) {
      return vcombine_s8(vmovn_s16(vcombine_s16(codes4(v[i]), codes4(v[i + 1]))), vmovn_s16(vcombine_s16(codes4(v[i + 2]), codes4(v[i + 3]))));
    };
    store(k, codes16(0), codes16(4), multiple);
  }
  return row_max / (127.0f * 32767.0f) + vaddvq_f32(poison4);
}

// What int8 kernels share: how x is prepared, and the panel of centred codes that the tiles read.
//   A, per block of R rows, per 32 k: int8 codes [R][32], or by pairs of rows [R/2][4][2][8] (an odd last row [4][8]);
//   fp32 m [R]; int32 -sum(a) (times the format's zero code where the group has no zero point) [R].
using Int8Formats = Formats<Format::kTernary, Format::kInt2, Format::kInt3, Format::kInt4, Format::kNf4, Format::kMxfp4, Format::kNvfp4, Format::kInt8>;
template <bool kPairs>
struct NeonInt8 {
  static constexpr int kRowBlockBytes = 40;
  static constexpr bool kOutliers = true;
  template <Format kFormat>
  static constexpr int row_block_bytes = kRowBlockBytes;  // of A, per row and 32 k
  template <Format kFormat>
  static constexpr int code_bytes = 1;  // of B
  template <Format kFormat>
  static constexpr int64_t panel_k = 512;  // 8 KB of codes beside 7 KB of A

  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params& p, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    return quantize_row(x, padded_k, p.activations, [&](int64_t k, int8x16_t low, int8x16_t high, float multiple) {
      uint8_t* block = a + k / panel_k * panel_stride + k % panel_k / 32 * kRowBlockBytes * rows;
      if (kPairs) {
        const int64_t step = (r ^ 1) < rows ? 16 : 8;
        int8_t* codes = reinterpret_cast<int8_t*>(block) + r / 2 * 64 + (step == 16 ? r % 2 * 8 : 0);
        vst1_s8(codes, vget_low_s8(low)), vst1_s8(codes + step, vget_high_s8(low));
        vst1_s8(codes + 2 * step, vget_low_s8(high)), vst1_s8(codes + 3 * step, vget_high_s8(high));
      } else {
        vst1q_s8(reinterpret_cast<int8_t*>(block) + r * 32, low), vst1q_s8(reinterpret_cast<int8_t*>(block) + r * 32 + 16, high);
      }
      const int32_t minus_sum = -(kZeros ? 1 : Decode<kFormat>::kZero) * (vaddlvq_s8(low) + vaddlvq_s8(high));
      std::memcpy(block + 32 * rows + r * 4, &multiple, 4);
      std::memcpy(block + 36 * rows + r * 4, &minus_sum, 4);
    });
  }

  // The tables hold the codebook in other steps.
  template <Format kFormat>
  static float factor(const Params& p) {
    if constexpr (kFormat == Format::kNf4) return 1.0f / 127.0f;
    else return load_global_scale<kFormat>(p) * (Decode<kFormat>::kTable ? 0.5f : 1.0f);
  }

  // k-blocks [block0, block0 + k_blocks) of one strip, to its half of the panel: codes less their zero points, so that the
  // tile need not know of them.  B: int8 [k/32][8 chunks][2 strips][8 rows][4], or [k/32][4][2 strips][8 rows][8].
  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int strip_of_panel, PanelT& panel) {
    const int8x16_t table = load_table<kFormat>();
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next()) {
      int8_t* out = reinterpret_cast<int8_t*>(panel.codes) + b * 8 * kPanelStrips * 32 + strip_of_panel * (kPairs ? 64 : 32);
      TAUT_FOR (int half = 0; half < 2; half++) {
        constexpr int kParts = Decode<kFormat>::kParts;
        TAUT_FOR (int part = 0; part < kParts; part++)
          vst1q_f32(panel.scales + ((b * kParts + part) * kPanelStrips + strip_of_panel) * 8 + half * 4, load_scales<kFormat>(at.scales() + part * 8, half));
        int8x16_t zero = vdupq_n_s8(Decode<kFormat>::kZero);
        if (kZeros) {
          const uint8x16_t spread = vreinterpretq_u8_u32(vmulq_n_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(0x03020100u)))), 0x01010101u));
          zero = vreinterpretq_s8_u8(vqtbl1q_u8(vcombine_u8(vld1_u8(at.zeros()), vdup_n_u8(0)), vaddq_u8(spread, vdupq_n_u8(half * 4))));
        }
        const Decode<kFormat> codes(at.codes + half * 16);
        const auto chunk = [&]<int c>() { return vsubq_s8(codes.template chunk<c>(table), zero); };
        for_each<4>([&]<int i>() {
          const int8x16_t first = chunk.template operator()<2 * i>(), second = chunk.template operator()<2 * i + 1>();
          if (kPairs) {
            int8_t* to = out + i * kPanelStrips * 64 + half * 32;
            vst1q_s8(to, vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second))));
            vst1q_s8(to + 16, vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(first), vreinterpretq_s32_s8(second))));
          } else {
            vst1q_s8(out + 2 * i * kPanelStrips * 32 + half * 16, first);
            vst1q_s8(out + (2 * i + 1) * kPanelStrips * 32 + half * 16, second);
          }
        });
      }
    }
  }
};

}  // namespace
}  // namespace taut::quant_linear
