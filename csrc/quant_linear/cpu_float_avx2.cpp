// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp32, bf16 or fp16; x enters as it is; products and
//           sums in fp32
// LAYOUT    w: Rows8 (common/formats.h).   A: per block of R rows, per 32 k: fp32 [32][R]
//           B: panel fp32 [k][2 strips][8 outputs], dequantized exactly as torch would: float(q - z) * scale
// WORK      A 32-bit lane of a packed vector holds codes of one output: a shift left and an arithmetic shift right leave one
//           code, signed, in 8 outputs' lanes; convert, then one fma a row with a broadcast x.
//           small (cpu_loops.h): R <= 4 rows, w converted in registers; zero point and scale go in per weight, as in the
//           tile: scaled after the sum, an outlier in x would not cancel where q = z, and large x would overflow.   tile: an fp32 panel in L1, 6 rows x 16 outputs of plain fma.
// BOUND     M=1: issue width, 6 instructions per 8 weights (7 with zeros), about 20 GB/s of int4 on two 3 GHz cores.
//           Large M: fp32 fma, 2 per cycle and core (204 GFLOP/s on two 3.1 GHz Zen 3 cores).
// LIMITS    AVX2, FMA, F16C; float activations
#include <utility>

#include "quant_linear/x86_rows.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear::cpu_float_avx2 {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))
#define TAUT_FOR(...) _Pragma("GCC unroll 8") for (__VA_ARGS__)

// The scales of 8 outputs; for fp8 halved, since code() gives twice the number.
template <Format kFormat>
TAUT_INLINE __m256 load_scales(const uint8_t* p) {
  const __m256 scales = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return kFormat == Format::kFp8E4M3 ? _mm256_mul_ps(scales, _mm256_set1_ps(0.5f)) : scales;
}

TAUT_INLINE __m256 eight_minus(const uint8_t* zeros) {  // what a signed code (q - 8) lacks to be q - z
  const __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_set1_epi32(8), z));
}

// A vector of codes; integers, which are stored with an offset (0..15 or 0..255), to two's complement in place.
template <Format kFormat>
TAUT_INLINE __m256i load_codes(const uint8_t* p) {
  const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if (kFormat == Format::kFp8E4M3) return codes;
  return _mm256_xor_si256(codes, _mm256_set1_epi8(static_cast<char>(kFormat == Format::kInt4 ? 0x88 : 0x80)));
}
// Code `j` of every 32-bit lane, as fp32.  int4: j = 0..7 are nibbles;  int8, fp8: j = 0..3 are bytes.
template <Format kFormat, int j>
TAUT_INLINE __m256 code(__m256i x) {
  constexpr int kBits = kFormat == Format::kInt4 ? 4 : 8;
  if constexpr (kFormat == Format::kFp8E4M3) {
    // E and mantissa in place, 6 added to the bias: g = 2^(E-6) * (1 + m/8). The number is g/2, or g - 2^-6 where E = 0;
    // the smaller of the two is the right one. WHY not a multiply by 2^120: its subnormal input is slow, or flushed to 0.
    const __m256i top = _mm256_slli_epi32(x, 24 - 8 * j);
    const __m256i magnitude = _mm256_and_si256(_mm256_srli_epi32(top, 4), _mm256_set1_epi32(0x07f00000));
    const __m256 g = _mm256_castsi256_ps(_mm256_add_epi32(magnitude, _mm256_set1_epi32(121 << 23)));
    const __m256 twice = _mm256_min_ps(g, _mm256_fmsub_ps(g, _mm256_set1_ps(2.0f), _mm256_set1_ps(0x1p-5f)));
    return _mm256_or_ps(twice, _mm256_and_ps(_mm256_castsi256_ps(top), _mm256_set1_ps(-0.0f)));
  }
  return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 32 - kBits * (j + 1)), 32 - kBits));
}
// The k within a block of 32 that code j of vector v stands for.
template <Format kFormat>
constexpr int k_of(int v, int j) {
  return kFormat == Format::kInt4 ? v * 4 + j / 2 + j % 2 * 16 : v * 4 + j;
}

template <class F, int... j>
TAUT_INLINE void for_each_code(F f, std::integer_sequence<int, j...>) {
  (f.template operator()<j>(), ...);
}

struct FloatAvx2 {
  static constexpr int kRowBlockBytes = 32 * 4;
  template <Format>
  static constexpr int row_block_bytes = kRowBlockBytes;
  static constexpr int kTileRows = 6;  // 6 x 2 sums + 2 weights + 1 broadcast
  static constexpr int64_t kChunkRows = 252;
  template <Format kFormat>
  static constexpr int code_bytes = 4;
  template <Format kFormat>
  static constexpr int64_t panel_k = 256;  // 16 KB of B
  template <Format kFormat, int kRows>
  static constexpr int streams = kRows == 1   ? 4
                                 : kRows == 2 ? 2
                                              : 1;
  template <Format kFormat>
  using Codes = std::make_integer_sequence<int, kFormat == Format::kInt4 ? 8 : 4>;
  template <Format kFormat>
  static constexpr int kVectors = kFormat == Format::kInt4 ? 4 : 8;

  // Row r of a block of `rows`, interleaved; returns the factor the results are multiplied by.
  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params&, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    for (int64_t k = 0; k < padded_k; k += 32) {
      float* block = reinterpret_cast<float*>(a + k / panel_k * panel_stride + k % panel_k / 32 * kRowBlockBytes * rows);
      for (int i = 0; i < 32; i++) block[i * rows + r] = x[k + i];
    }
    return 1.0f;
  }

  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    __m256 total[kStreams][kRows];
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = _mm256_setzero_ps();
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * s.block_bytes;
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += kRowBlockBytes * kRows, codes += s.block_bytes) {
          const float* x = reinterpret_cast<const float*>(a);
          __m256 sum[kStreams][kRows], scale[kStreams], offset[kStreams];
          TAUT_FOR (int i = 0; i < kStreams; i++) {
            scale[i] = load_scales<kFormat>(w + i * stride + g * 16);
            if (kZeros) offset[i] = eight_minus(w + i * stride + 64 + g * 8);
            TAUT_FOR (int r = 0; r < kRows; r++) sum[i][r] = _mm256_setzero_ps();
          }
          TAUT_FOR (int v = 0; v < kVectors<kFormat>; v++) {
            __m256i packed[kStreams];
            TAUT_FOR (int i = 0; i < kStreams; i++) packed[i] = load_codes<kFormat>(codes + i * stride + v * 32);
            for_each_code(
                [&]<int j>() __attribute__((always_inline)) {
                  __m256 weight[kStreams];
                  TAUT_FOR (int i = 0; i < kStreams; i++) {
                    weight[i] = code<kFormat, j>(packed[i]);
                    if (kZeros) weight[i] = _mm256_add_ps(weight[i], offset[i]);
                    weight[i] = _mm256_mul_ps(weight[i], scale[i]);
                  }
                  TAUT_FOR (int r = 0; r < kRows; r++) {
                    const __m256 xk = _mm256_broadcast_ss(x + k_of<kFormat>(v, j) * kRows + r);
                    TAUT_FOR (int i = 0; i < kStreams; i++) sum[i][r] = _mm256_fmadd_ps(weight[i], xk, sum[i][r]);
                  }
                },
                Codes<kFormat>());
          }
          TAUT_FOR (int i = 0; i < kStreams; i++)
            TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = _mm256_add_ps(total[i][r], sum[i][r]);
        }
    }
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) _mm256_store_ps(sums + (i * kRows + r) * 8, total[i][r]);
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int half, PanelT& panel) {
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next()) {
      const uint8_t* codes = at.codes;
      const __m256 scale = load_scales<kFormat>(at.scales());
      const __m256 offset = kZeros ? eight_minus(at.zeros()) : _mm256_setzero_ps();
      float* out = reinterpret_cast<float*>(panel.codes) + b * 32 * kPanelStrips * 8 + half * 8;
      for (int v = 0; v < kVectors<kFormat>; v++) {
        const __m256i packed = load_codes<kFormat>(codes + v * 32);
        for_each_code(
            [&]<int j>() __attribute__((always_inline)) {
              __m256 weight = code<kFormat, j>(packed);
              if (kZeros) weight = _mm256_add_ps(weight, offset);
              _mm256_store_ps(out + k_of<kFormat>(v, j) * kPanelStrips * 8, _mm256_mul_ps(weight, scale));
            },
            Codes<kFormat>());
      }
    }
  }

  // c[kRows][2][8] += A[kRows, 32 * k_blocks] @ panel.
  template <int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const float* panel, int64_t k_blocks, float* c) {
    __m256 sum[kRows][kPanelStrips];
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kPanelStrips; i++) sum[r][i] = _mm256_setzero_ps();
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows) {
      const float* x = reinterpret_cast<const float*>(a);
      for (int k = 0; k < 32; k += 4, panel += 4 * kPanelStrips * 8, x += 4 * kRows)
        TAUT_FOR (int step = 0; step < 4; step++) {
          const __m256 w0 = _mm256_load_ps(panel + step * kPanelStrips * 8), w1 = _mm256_load_ps(panel + step * kPanelStrips * 8 + 8);
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const __m256 xk = _mm256_broadcast_ss(x + step * kRows + r);
            sum[r][0] = _mm256_fmadd_ps(w0, xk, sum[r][0]);
            sum[r][1] = _mm256_fmadd_ps(w1, xk, sum[r][1]);
          }
        }
    }
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kPanelStrips; i++) {
        float* at = c + (r * kPanelStrips + i) * 8;
        _mm256_store_ps(at, _mm256_add_ps(_mm256_load_ps(at), sum[r][i]));
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

using FloatFormats = Formats<Format::kInt4, Format::kInt8, Format::kFp8E4M3>;
void run_small(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() { small_loop<FloatAvx2, kZeros, kFormat>(p); });
}
void run_tile(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() { tile_loop<FloatAvx2, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_float_avx2
