// The int8 kernel of ARM for rows side by side, whatever multiplies 4 outputs by 4 k: Dot::dot<lane>(sum, codes, x) adds to
// each of 4 sums the products of its 4 codes with the 4 bytes of x in `lane`. Dot::kTileRows: of the tile.
//   small (cpu_loops.h)  R <= 4 rows, weights decoded in registers; a sum starts at -z*sum(a)
//   tile                 kTileRows rows x 16 outputs, from a panel of codes less their zero points
// After 32 k: convert, fma by scale * m.
#pragma once

#include "quant_linear/neon_int8.h"

namespace taut::quant_linear {
namespace {

template <class Dot>
struct Int8Neon : NeonInt8<false> {
  static constexpr int kTileRows = Dot::kTileRows;
  static constexpr int64_t kChunkRows = 516;
  template <Format kFormat, int kRows>
  static constexpr int streams = kRows == 1   ? 4
                                 : kRows == 2 ? 2
                                              : 1;

  // sums[kStreams][kRows][8] = A[kRows, K] @ w[8 rows, K]^T for kStreams strips `stride` bytes apart.
  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    using Codes = Decode<kFormat>;
    const int8x16_t table = load_table<kFormat>();
    float32x4_t total[kStreams][kRows][2];
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r][0] = total[i][r][1] = vdupq_n_f32(0);
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * s.block_bytes;
    const int64_t scale_bytes = s.layout.group_scale_bytes(), zeros_begin = s.layout.zeros_begin();
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += kRowBlockBytes * kRows, codes += s.block_bytes) {
          int8x16_t x[kRows][2];
          TAUT_FOR (int r = 0; r < kRows; r++)
            TAUT_FOR (int i = 0; i < 2; i++) x[r][i] = vld1q_s8(reinterpret_cast<const int8_t*>(a) + r * 32 + i * 16);
          const float* multiple = reinterpret_cast<const float*>(a + 32 * kRows);
          const int32_t* minus_sum = reinterpret_cast<const int32_t*>(a + 36 * kRows);
          TAUT_FOR (int i = 0; i < kStreams; i++)
            TAUT_FOR (int half = 0; half < 2; half++) {
              const Codes block(codes + i * stride + half * 16);
              for_each<Codes::kParts>([&]<int part>() TAUT_LAMBDA {
                constexpr int kChunks = 8 / Codes::kParts;
                int32x4_t sum[kRows];
                TAUT_FOR (int r = 0; r < kRows; r++) {
                  if constexpr (kZeros) sum[r] = vmulq_n_s32(load_zeros(w + i * stride + zeros_begin + g * 8, half), minus_sum[r]);
                  else sum[r] = vdupq_n_s32(Codes::kZero ? minus_sum[r] : 0);
                }
                for_each<kChunks>([&]<int c>() TAUT_LAMBDA {
                  constexpr int kChunk = part * kChunks + c;
                  const int8x16_t chunk = block.template chunk<kChunk>(table);
                  TAUT_FOR (int r = 0; r < kRows; r++) sum[r] = Dot::template dot<kChunk % 4>(sum[r], chunk, x[r][kChunk / 4]);
                });
                const float32x4_t scale = load_scales<kFormat>(w + i * stride + g * scale_bytes + part * 8, half);
                TAUT_FOR (int r = 0; r < kRows; r++) total[i][r][half] = vfmaq_f32(total[i][r][half], vcvtq_f32_s32(sum[r]), vmulq_n_f32(scale, multiple[r]));
              });
            }
        }
    }
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++)
        TAUT_FOR (int half = 0; half < 2; half++) vst1q_f32(sums + (i * kRows + r) * 8 + half * 4, total[i][r][half]);
  }

  // c[kRows][2][8] += A[kRows, 32 * k_blocks] @ panel.
  template <int kParts, int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const uint8_t* panel_codes, const float* scales, int64_t k_blocks, float* c) {
    const int8_t* codes = reinterpret_cast<const int8_t*>(panel_codes);
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows) {
      const float* multiple = reinterpret_cast<const float*>(a + 32 * kRows);
      int32x4_t sum[kRows][4];
      TAUT_FOR (int quarter = 0; quarter < 2; quarter++) {
        if (quarter % (2 / kParts) == 0)
          TAUT_FOR (int r = 0; r < kRows; r++)
            TAUT_FOR (int i = 0; i < 4; i++) sum[r][i] = vdupq_n_s32(0);
        int8x16_t x[kRows];
        TAUT_FOR (int r = 0; r < kRows; r++) x[r] = vld1q_s8(reinterpret_cast<const int8_t*>(a) + r * 32 + quarter * 16);
        for_each<4>([&]<int lane>() TAUT_LAMBDA {
          TAUT_FOR (int i = 0; i < 4; i++) {
            const int8x16_t code = vld1q_s8(codes + i * 16);
            TAUT_FOR (int r = 0; r < kRows; r++) sum[r][i] = Dot::template dot<lane>(sum[r][i], code, x[r]);
          }
          codes += kPanelStrips * 32;
        });
        if ((quarter + 1) % (2 / kParts)) continue;
        asm("" : "+r"(c));  // WHY: gcc 12 keeps c in registers from one time to the next, and spills
        TAUT_FOR (int i = 0; i < 4; i++) {
          const float32x4_t scale = vld1q_f32(scales + i * 4);
          TAUT_FOR (int r = 0; r < kRows; r++) {
            float* at = c + r * 16 + i * 4;
            vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(sum[r][i]), vmulq_n_f32(scale, multiple[r])));
          }
        }
        scales += kPanelStrips * 8;
      }
    }
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void micro_rows(int rows, const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    constexpr int kParts = Decode<kFormat>::kParts;
    switch (rows) {
      case 1: return micro<kParts, 1>(a, panel.codes, panel.scales, k_blocks, c);
      case 2: return micro<kParts, 2>(a, panel.codes, panel.scales, k_blocks, c);
      case 3: return micro<kParts, 3>(a, panel.codes, panel.scales, k_blocks, c);
      case 4: return micro<kParts, 4>(a, panel.codes, panel.scales, k_blocks, c);
      case 5: return micro<kParts, std::min(5, kTileRows)>(a, panel.codes, panel.scales, k_blocks, c);
      default: return micro<kParts, kTileRows>(a, panel.codes, panel.scales, k_blocks, c);
    }
  }
};

}  // namespace
}  // namespace taut::quant_linear
