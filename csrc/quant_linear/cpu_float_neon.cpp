// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp32, bf16 or fp16; x enters as it is; products and
//           sums in fp32;  w in any format
// LAYOUT    w: Rows8 (common/formats.h).   A: per block of R rows, per 32 k: fp32 [R][32]
//           B: panel fp32 [k][2 strips][8 outputs], dequantized exactly as torch would: float(q - z) * scale
// WORK      Codes become bytes as for the integer kernels (neon_decode.h); byte i of each 32-bit lane is a code of one output:
//           masked and converted with i*8 fraction bits it is the number, less zero point, times scale. Tables: the byte
//           becomes the four byte indices of its fp32 in a table of 64 bytes. Then one fma a row with a lane of x.
//           small (cpu_loops.h): R <= 4 rows, w converted in registers.  tile: an fp32 panel in L1, 6 rows x 16 outputs.
// BOUND     M=1: issue width, 420 instructions per 32 k x 8 outputs of int4.  Large M: fp32 fma, 96 of 124 instructions (gcc 12).
// LIMITS    any 64-bit ARM; float activations. It has run in an emulator only, never on ARM hardware: its sizes are reasoned
//           from instruction counts, not measured.
#include "quant_linear/neon_decode.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear::cpu_float_neon {
namespace {

// A format of 16 numbers, as the bytes of its fp32 table.
template <Format kFormat>
TAUT_INLINE uint8x16x4_t load_numbers() {
  static constexpr auto kNumbers = [] {
    struct {
      float values[16];
    } table{};
    for (int q = 0; q < 16; q++) table.values[q] = kFormat == Format::kNf4 ? kNf4[q] : kTwiceE2M1[q] * 0.5f;
    return table;
  }();
  return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(kNumbers.values));
}

// Byte i of every 32-bit lane, four times.
template <int i>
TAUT_INLINE uint8x16_t spread_byte(uint8x16_t v) {
  static constexpr uint8_t kFrom[16] = {i, i, i, i, i + 4, i + 4, i + 4, i + 4, i + 8, i + 8, i + 8, i + 8, i + 12, i + 12, i + 12, i + 12};
  return vqtbl1q_u8(v, vld1q_u8(kFrom));
}

// What turns codes into numbers, for one half of a strip in one block.
template <bool kZeros, Format kFormat>
struct Numbers {
  static constexpr bool kFp8 = kFormat == Format::kFp8E4M3 || kFormat == Format::kFp8Block;
  float32x4_t scale[Decode<kFormat>::kParts], zero;

  TAUT_INLINE Numbers(const uint8_t* scales, const uint8_t* zeros, int half) {
    TAUT_FOR (int part = 0; part < Decode<kFormat>::kParts; part++) {
      scale[part] = load_scales<kFormat>(scales + part * 8, half);
      if (kFp8) scale[part] = vmulq_n_f32(scale[part], 0.5f);  // number() gives twice the number
    }
    if constexpr (kZeros) zero = vcvtq_f32_s32(load_zeros(zeros, half));
    else zero = vdupq_n_f32(kFormat == Format::kInt8 ? 128.0f : static_cast<float>(Decode<kFormat>::kZero));
  }

  // Code i (0..3) of four rows, out of chunk c.
  template <int c, int i>
  TAUT_INLINE float32x4_t number(uint8x16_t codes, const uint8x16x4_t& table) const {
    const float32x4_t s = scale[c * Decode<kFormat>::kParts / 8];
    const uint32x4_t lanes = vreinterpretq_u32_u8(codes);
    if constexpr (Decode<kFormat>::kTable) {
      const uint8x16_t index = vaddq_u8(spread_byte<i>(vshlq_n_u8(codes, 2)), vreinterpretq_u8_u32(vdupq_n_u32(0x03020100)));
      return vmulq_f32(vreinterpretq_f32_u8(vqtbl4q_u8(table, index)), s);
    } else if constexpr (kFp8) {  // as in cpu_float_avx2.cpp
      const uint32x4_t top = vshlq_n_u32(lanes, 24 - 8 * i);
      const uint32x4_t magnitude = vandq_u32(vshrq_n_u32(top, 4), vdupq_n_u32(0x07f00000));
      const float32x4_t g = vreinterpretq_f32_u32(vaddq_u32(magnitude, vdupq_n_u32(121u << 23)));
      const float32x4_t twice = vminq_f32(g, vfmaq_n_f32(vdupq_n_f32(-0x1p-5f), g, 2.0f));
      return vmulq_f32(vbslq_f32(vdupq_n_u32(0x80000000u), vreinterpretq_f32_u32(top), twice), s);
    } else {
      const uint32x4_t q = vandq_u32(lanes, vdupq_n_u32(0xffu << 8 * i));
      const float32x4_t number = i == 0 ? vcvtq_f32_u32(q) : vcvtq_n_f32_u32(q, i == 0 ? 1 : 8 * i);
      return vmulq_f32(vsubq_f32(number, zero), s);
    }
  }
};

using FloatFormats = Formats<Format::kTernary, Format::kInt2, Format::kInt3, Format::kInt4, Format::kNf4, Format::kMxfp4, Format::kNvfp4, Format::kInt8,
                             Format::kFp8E4M3, Format::kFp8Block>;

struct FloatNeon {
  template <Format kFormat>
  static constexpr int row_block_bytes = 32 * 4;
  static constexpr int kTileRows = 6;  // 24 sums + 6 of A + 1 of B = 31 of 32 registers
  static constexpr int64_t kChunkRows = 252;
  template <Format kFormat>
  static constexpr int code_bytes = 4;
  template <Format kFormat>
  static constexpr int64_t panel_k = 256;  // 16 KB of B
  template <Format kFormat, int kRows>
  static constexpr int streams = kRows <= 2 ? 2 : 1;

  template <Format kFormat>
  static float factor(const Params& p) {
    return load_global_scale<kFormat>(p);
  }

  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params&, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    for (int64_t k = 0; k < padded_k; k += 32)
      std::memcpy(a + k / panel_k * panel_stride + (k % panel_k / 32 * rows + r) * row_block_bytes<kFormat>, x + k, row_block_bytes<kFormat>);
    return 1.0f;
  }

  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    constexpr int kChains = kRows == 1 ? 2 : 1;  // WHY: the sum of a block is a chain of 32 fma, each waiting for the last
    const uint8x16x4_t table = load_numbers<kFormat>();
    float32x4_t total[kStreams][kRows][2];
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r][0] = total[i][r][1] = vdupq_n_f32(0);
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * s.block_bytes;
    const int64_t scale_bytes = s.layout.group_scale_bytes(), zeros_begin = s.layout.zeros_begin();
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += row_block_bytes<kFormat> * kRows, codes += s.block_bytes) {
          const float* x = reinterpret_cast<const float*>(a);
          TAUT_FOR (int i = 0; i < kStreams; i++) {
            const uint8_t *scales = w + i * stride + g * scale_bytes, *zeros = w + i * stride + zeros_begin + g * 8;
            const Numbers<kZeros, kFormat> top(scales, zeros, 0), bottom(scales, zeros, 1);
            const Decode<kFormat> top_codes(codes + i * stride), bottom_codes(codes + i * stride + 16);
            float32x4_t sum[kChains][kRows][2];
            TAUT_FOR (int chain = 0; chain < kChains; chain++)
              TAUT_FOR (int r = 0; r < kRows; r++) sum[chain][r][0] = sum[chain][r][1] = vdupq_n_f32(0);
            for_each<8>([&]<int c>() TAUT_LAMBDA {
              float32x4_t xk[kRows];
              TAUT_FOR (int r = 0; r < kRows; r++) xk[r] = vld1q_f32(x + r * 32 + c * 4);
              const uint8x16_t code0 = top_codes.template code<c>(), code1 = bottom_codes.template code<c>();
              for_each<4>([&]<int k>() TAUT_LAMBDA {
                const float32x4_t w0 = top.template number<c, k>(code0, table), w1 = bottom.template number<c, k>(code1, table);
                TAUT_FOR (int r = 0; r < kRows; r++) {
                  float32x4_t* to = sum[k % kChains][r];
                  to[0] = vfmaq_laneq_f32(to[0], w0, xk[r], k);
                  to[1] = vfmaq_laneq_f32(to[1], w1, xk[r], k);
                }
              });
            });
            TAUT_FOR (int r = 0; r < kRows; r++)
              TAUT_FOR (int half = 0; half < 2; half++)
                total[i][r][half] = vaddq_f32(total[i][r][half], kChains == 2 ? vaddq_f32(sum[0][r][half], sum[kChains - 1][r][half]) : sum[0][r][half]);
          }
        }
    }
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++)
        TAUT_FOR (int half = 0; half < 2; half++) vst1q_f32(sums + (i * kRows + r) * 8 + half * 4, total[i][r][half]);
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int strip_of_panel, PanelT& panel) {
    const uint8x16x4_t table = load_numbers<kFormat>();
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next())
      TAUT_FOR (int half = 0; half < 2; half++) {
        float* out = reinterpret_cast<float*>(panel.codes) + b * 32 * kPanelStrips * 8 + strip_of_panel * 8 + half * 4;
        const Numbers<kZeros, kFormat> numbers(at.scales(), at.zeros(), half);
        const Decode<kFormat> codes(at.codes + half * 16);
        for_each<8>([&]<int c>() TAUT_LAMBDA {
          const uint8x16_t code = codes.template code<c>();
          for_each<4>([&]<int k>() TAUT_LAMBDA { vst1q_f32(out + (c * 4 + k) * kPanelStrips * 8, numbers.template number<c, k>(code, table)); });
        });
      }
  }

  // c[kRows][2][8] += A[kRows, 32 * k_blocks] @ panel.
  template <int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const float* panel, int64_t k_blocks, float* c) {
    float32x4_t sum[kRows][4];
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < 4; i++) sum[r][i] = vdupq_n_f32(0);
    for (int64_t b = 0; b < k_blocks; b++, a += 128 * kRows)
      for (int chunk = 0; chunk < 8; chunk++) {
        float32x4_t xk[kRows];
        TAUT_FOR (int r = 0; r < kRows; r++) xk[r] = vld1q_f32(reinterpret_cast<const float*>(a) + r * 32 + chunk * 4);
        for_each<4>([&]<int k>() TAUT_LAMBDA {
          TAUT_FOR (int i = 0; i < 4; i++) {
            const float32x4_t w = vld1q_f32(panel + i * 4);
            TAUT_FOR (int r = 0; r < kRows; r++) sum[r][i] = vfmaq_laneq_f32(sum[r][i], w, xk[r], k);
          }
          panel += kPanelStrips * 8;
        });
      }
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < 4; i++) {
        float* at = c + r * 16 + i * 4;
        vst1q_f32(at, vaddq_f32(vld1q_f32(at), sum[r][i]));
      }
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void micro_rows(int rows, const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    const float* b = reinterpret_cast<const float*>(panel.codes);
    switch (rows) {
      case 1: return micro<1>(a, b, k_blocks, c);
      case 2: return micro<2>(a, b, k_blocks, c);
      case 3: return micro<3>(a, b, k_blocks, c);
      case 4: return micro<4>(a, b, k_blocks, c);
      case 5: return micro<5>(a, b, k_blocks, c);
      default: return micro<6>(a, b, k_blocks, c);
    }
  }
};

}  // namespace

void run_small(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() { small_loop<FloatNeon, kZeros, kFormat>(p); });
}
void run_tile(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() { tile_loop<FloatNeon, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_float_neon
