// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k, then fp32;  w in any format that takes int8 activations
// LAYOUT    w: Rows8 (common/formats.h).   A and B: NeonInt8 in neon_int8.h, by pairs of rows and of outputs
// WORK      One step: smmla of 2 rows x 2 outputs x 8 k, twice the products of sdot. The panel holds signed codes less their
//           zero points. 6 rows x 16 outputs; after 32 k: convert, fma by scale * m into fp32 sums of the same 2 x 2 form,
//           which become rows again at the end of the panel.
// BOUND     The SIMD pipes; 318 instructions per 32 k x 16 outputs x 6 rows, 96 of them smmla, where sdot takes 413 (gcc 12).
// LIMITS    ARMv8.2 with smmla (i8mm); int8 activations; the tile only: one row would waste half of each smmla. It has run in
//           an emulator only, never on ARM hardware: its sizes are reasoned from instruction counts, not measured.
#include "quant_linear/neon_int8.h"

namespace taut::quant_linear::cpu_int8_i8mm {
namespace {

TAUT_INLINE float32x4_t twice(const float* p) {  // [p0, p1, p0, p1]
  return vreinterpretq_f32_f64(vld1q_dup_f64(reinterpret_cast<const double*>(p)));
}
TAUT_INLINE float32x4_t zip_pairs(float32x4_t a, float32x4_t b, bool second) {
  const float64x2_t x = vreinterpretq_f64_f32(a), y = vreinterpretq_f64_f32(b);
  return vreinterpretq_f32_f64(second ? vzip2q_f64(x, y) : vzip1q_f64(x, y));
}

struct Int8I8mm : NeonInt8<true> {
  static constexpr int kTileRows = 6;  // 24 sums of 2 rows x 2 outputs + 3 of A + 1 of B = 28 of 32 registers
  static constexpr int64_t kChunkRows = 516;

  // c[kRows][2][8] += A[kRows, 32 * k_blocks] @ panel.
  template <int kParts, int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const uint8_t* panel_codes, const float* scales, int64_t k_blocks, float* c) {
    constexpr int kRowPairs = (kRows + 1) / 2, kColumnPairs = kPanelStrips * 4;
    const int8_t* codes = reinterpret_cast<const int8_t*>(panel_codes);
    float memory[kRowPairs * kColumnPairs * 4], *totals = memory;  // each 4: row 0, outputs 0 and 1; row 1, outputs 0 and 1
    std::memset(memory, 0, sizeof(memory));
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows) {
      const float* multiple = reinterpret_cast<const float*>(a + 32 * kRows);
      TAUT_FOR (int part = 0; part < kParts; part++) {
        int32x4_t sum[kRowPairs][kColumnPairs];
        TAUT_FOR (int r = 0; r < kRowPairs; r++)
          TAUT_FOR (int j = 0; j < kColumnPairs; j++) sum[r][j] = vdupq_n_s32(0);
        TAUT_FOR (int i = part * 4 / kParts; i < (part + 1) * 4 / kParts; i++, codes += kColumnPairs * 16) {
          int8x16_t x[kRowPairs];
          TAUT_FOR (int r = 0; r < kRowPairs; r++) {
            const int8_t* at = reinterpret_cast<const int8_t*>(a) + r * 64;
            if (2 * r + 1 < kRows) x[r] = vld1q_s8(at + i * 16);
            else x[r] = vreinterpretq_s8_s64(vld1q_dup_s64(reinterpret_cast<const int64_t*>(at + i * 8)));  // an odd last row, twice
          }
          TAUT_FOR (int j = 0; j < kColumnPairs; j++) {
            const int8x16_t code = vld1q_s8(codes + j * 16);
            TAUT_FOR (int r = 0; r < kRowPairs; r++) sum[r][j] = vmmlaq_s32(sum[r][j], x[r], code);
          }
        }
        float32x4_t m[kRowPairs];
        TAUT_FOR (int r = 0; r < kRowPairs; r++) m[r] = vcombine_f32(vdup_n_f32(multiple[2 * r]), vdup_n_f32(multiple[2 * r + 1 < kRows ? 2 * r + 1 : 2 * r]));
        asm("" : "+r"(totals));  // WHY: gcc 12 keeps them in registers from one time to the next, and spills
        TAUT_FOR (int j = 0; j < kColumnPairs; j++) {
          const float32x4_t scale = twice(scales + j * 2);
          TAUT_FOR (int r = 0; r < kRowPairs; r++) {
            float* at = totals + (r * kColumnPairs + j) * 4;
            vst1q_f32(at, vfmaq_f32(vld1q_f32(at), vcvtq_f32_s32(sum[r][j]), vmulq_f32(scale, m[r])));
          }
        }
        scales += kPanelStrips * 8;
      }
    }
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int j = 0; j < kColumnPairs; j += 2) {
        const float* pair = totals + (r / 2 * kColumnPairs + j) * 4;
        float* at = c + r * 16 + j * 2;
        vst1q_f32(at, vaddq_f32(vld1q_f32(at), zip_pairs(vld1q_f32(pair), vld1q_f32(pair + 4), r % 2)));
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
      case 5: return micro<kParts, 5>(a, panel.codes, panel.scales, k_blocks, c);
      default: return micro<kParts, 6>(a, panel.codes, panel.scales, k_blocks, c);
    }
  }
};

}  // namespace

void run_tile(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { tile_loop<Int8I8mm, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_int8_i8mm
