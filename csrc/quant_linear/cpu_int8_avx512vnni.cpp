// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k, then fp32;  w int4 (zero point 8 or one a group) or int8
// LAYOUT    w: Rows8 (common/formats.h); two strips make one zmm.
//           A: per block of R rows, per 32 k: int8 [8 chunks][R][4], int32 -sum(a) (times 8 or 128 without zeros) [R],
//           fp32 m [R].   B: panel u8 [k/32][8 chunks][2 strips][32], the unpacked codes
// WORK      One step: vpdpbusd of 16 outputs x 4 k of unsigned codes with 4 k of one row, broadcast from memory by the
//           instruction. After 32 k: convert, fma by (scale * m).  int8 codes are stored + 128; the sum starts at -128*sum(a).
//           small (cpu_loops.h): R <= 4 rows, 4 strips in two zmm.  tile: 12 rows x 16 outputs, 12 integer and 12 fp32 sums
//           in registers.
// BOUND     M=1: DRAM read of the weights.  Large M: vpdpbusd, one zmm a cycle on Zen 4 (128 operations), and per 32 k and
//           row a multiply and an fma on the same pipes: 8 / (8 + 2) = 80% of that peak.
// LIMITS    AVX-512 F, BW, DQ, VL, VNNI; int8 activations
#include <utility>

#include "quant_linear/x86_int8.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear::cpu_int8_avx512vnni {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))
#define TAUT_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

// sum += codes . (4 bytes at a, for all 16 outputs). WHY asm: gcc 12 loads the broadcast separately.
TAUT_INLINE void dot(__m512i& sum, __m512i codes, const uint8_t* a) {
  asm("vpdpbusd %2%{1to16%},%1,%0" : "+v"(sum) : "v"(codes), "m"(*reinterpret_cast<const int32_t*>(a)));
}
TAUT_INLINE __m512i pair32(const uint8_t* low, const uint8_t* high) {  // 32 bytes of each of two strips
  return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
}
TAUT_INLINE __m512 pair_scales(const uint8_t* low, const uint8_t* high) {
  return _mm512_cvtph_ps(_mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
                                                 _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1));
}
TAUT_INLINE __m512i pair_zeros(const uint8_t* low, const uint8_t* high) {
  return _mm512_cvtepu8_epi32(
      _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(low)), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(high))));
}
// Where a sum starts. With zeros: -sum(a) * z; both fit int16, so vpmaddwd of the low halves is the product.
template <bool kZeros>
TAUT_INLINE __m512i start(const uint8_t* minus_sum, __m512i zeros) {
  int32_t value;
  std::memcpy(&value, minus_sum, 4);
  const __m512i sum = _mm512_set1_epi32(value);
  return kZeros ? _mm512_madd_epi16(sum, zeros) : sum;
}
TAUT_INLINE float load_multiple(const uint8_t* p) {
  float m;
  std::memcpy(&m, p, 4);
  return m;
}
// total += sum * scale * m
TAUT_INLINE __m512 scaled(__m512i sum, __m512 scale, const uint8_t* multiple, __m512 total) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(load_multiple(multiple))), total);
}

struct Int8Avx512Vnni {
  static constexpr int kRowBlockBytes = 40;
  template <Format>
  static constexpr int row_block_bytes = kRowBlockBytes;
  static constexpr int kTileRows = 12;
  static constexpr int64_t kChunkRows = 516;
  template <Format kFormat>
  static constexpr int code_bytes = 1;
  template <Format kFormat>
  static constexpr int64_t panel_k = 512;  // 8 KB of codes beside 8 KB of A
  template <Format kFormat, int kRows>
  static constexpr int streams = 4;

  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params& p, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    constexpr int kZeroPoint = kFormat == Format::kInt8 ? 128 : kZeros ? 1 : 8;
    return quantize_row(x, padded_k, p.activations, [&](int64_t k, __m256i q, float multiple) {
      const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), q);
      __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
      sum = _mm_add_epi32(sum, _mm_unpackhi_epi64(sum, sum));
      const int32_t minus_sum = -kZeroPoint * (_mm_cvtsi128_si32(sum) + _mm_extract_epi32(sum, 1));
      uint8_t* block = a + k / panel_k * panel_stride + k % panel_k / 32 * kRowBlockBytes * rows;
      store_chunks(block, r, rows, q);
      std::memcpy(block + (8 * rows + r) * 4, &minus_sum, 4);
      std::memcpy(block + (9 * rows + r) * 4, &multiple, 4);
    });
  }

  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    constexpr int kPairs = (kStreams + 1) / 2;  // one strip alone is paired with itself (stride 0)
    constexpr int64_t kPrefetch = kFormat == Format::kInt4 ? 1152 : 2304;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512 total[kPairs][kRows];
    TAUT_FOR (int i = 0; i < kPairs; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = _mm512_setzero_ps();
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * s.block_bytes;
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += kRowBlockBytes * kRows, codes += s.block_bytes) {
          if (kRows > 1)
            TAUT_FOR (int i = 0; i < kStreams; i++)
              for (int64_t line = 0; line < (kFormat == Format::kInt4 ? 128 : 256); line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(codes + i * stride + kPrefetch + line), _MM_HINT_T0);
          __m512i sum[kPairs][kRows];
          TAUT_FOR (int i = 0; i < kPairs; i++) {
            const uint8_t* zeros = w + 2 * i * stride + 64 + g * 8;
            const __m512i z = kZeros ? pair_zeros(zeros, zeros + stride) : nibble;
            TAUT_FOR (int r = 0; r < kRows; r++) sum[i][r] = start<kZeros>(a + (8 * kRows + r) * 4, z);
          }
          TAUT_FOR (int v = 0; v < (kFormat == Format::kInt4 ? 4 : 8); v++)
            TAUT_FOR (int i = 0; i < kPairs; i++) {
              const uint8_t* at = codes + 2 * i * stride + v * 32;
              const __m512i x = pair32(at, at + stride);
              if constexpr (kFormat == Format::kInt4) {
                const __m512i low = _mm512_and_si512(x, nibble), high = _mm512_and_si512(_mm512_srli_epi16(x, 4), nibble);
                TAUT_FOR (int r = 0; r < kRows; r++) dot(sum[i][r], low, a + (v * kRows + r) * 4);
                TAUT_FOR (int r = 0; r < kRows; r++) dot(sum[i][r], high, a + ((v + 4) * kRows + r) * 4);
              } else {
                TAUT_FOR (int r = 0; r < kRows; r++) dot(sum[i][r], x, a + (v * kRows + r) * 4);
              }
            }
          TAUT_FOR (int i = 0; i < kPairs; i++) {
            const uint8_t* scales = w + 2 * i * stride + g * 16;
            const __m512 scale = pair_scales(scales, scales + stride);
            TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = scaled(sum[i][r], scale, a + (9 * kRows + r) * 4, total[i][r]);
          }
        }
    }
    TAUT_FOR (int i = 0; i < kPairs; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) {
        _mm256_store_ps(sums + (2 * i * kRows + r) * 8, _mm512_castps512_ps256(total[i][r]));
        if (kStreams > 1) _mm256_store_ps(sums + ((2 * i + 1) * kRows + r) * 8, _mm512_extractf32x8_ps(total[i][r], 1));
      }
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int half, PanelT& panel) {
    const __m256i nibble = _mm256_set1_epi8(15);
    constexpr int64_t kRow = kPanelStrips * 32;
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next()) {
      const uint8_t* codes = at.codes;
      _mm256_store_ps(panel.scales + (b * kPanelStrips + half) * 8, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at.scales()))));
      if (kZeros)
        _mm256_store_si256(reinterpret_cast<__m256i*>(panel.zeros + (b * kPanelStrips + half) * 8),
                           _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at.zeros()))));
      uint8_t* out = panel.codes + b * 8 * kRow + half * 32;
      for (int v = 0; v < (kFormat == Format::kInt4 ? 4 : 8); v++) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
        if (kFormat == Format::kInt8) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(out + v * kRow), x);
        } else {
          _mm256_store_si256(reinterpret_cast<__m256i*>(out + v * kRow), _mm256_and_si256(x, nibble));
          _mm256_store_si256(reinterpret_cast<__m256i*>(out + (v + 4) * kRow), _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble));
        }
      }
    }
  }

  template <bool kZeros, int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const uint8_t* codes, const float* scales, const int32_t* zeros, int64_t k_blocks, float* c) {
    __m512 total[kRows];
    TAUT_FOR (int r = 0; r < kRows; r++) total[r] = _mm512_load_ps(c + r * 16);
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows, codes += 8 * 64, scales += 16, zeros += 16) {
      const __m512i z = kZeros ? _mm512_load_si512(zeros) : _mm512_setzero_si512();
      __m512i sum[kRows];
      TAUT_FOR (int r = 0; r < kRows; r++) sum[r] = start<kZeros>(a + (8 * kRows + r) * 4, z);
      TAUT_FOR (int chunk = 0; chunk < 8; chunk++) {
        const __m512i code = _mm512_load_si512(codes + chunk * 64);
        TAUT_FOR (int r = 0; r < kRows; r++) dot(sum[r], code, a + (chunk * kRows + r) * 4);
      }
      const __m512 scale = _mm512_load_ps(scales);
      TAUT_FOR (int r = 0; r < kRows; r++) total[r] = scaled(sum[r], scale, a + (9 * kRows + r) * 4, total[r]);
    }
    TAUT_FOR (int r = 0; r < kRows; r++) _mm512_store_ps(c + r * 16, total[r]);
  }

  // c[rows][2][8] += A[rows, 32 * k_blocks] @ panel.
  template <bool kZeros, Format kFormat, class PanelT>
  static void micro_rows(int rows, const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    using Micro = void (*)(const uint8_t*, const uint8_t*, const float*, const int32_t*, int64_t, float*);
    static constexpr auto kTable = []<int... r>(std::integer_sequence<int, r...>) {
      struct {
        Micro run[sizeof...(r)];
      } table{{micro<kZeros, r + 1>...}};
      return table;
    }(std::make_integer_sequence<int, kTileRows>());
    kTable.run[rows - 1](a, panel.codes, panel.scales, panel.zeros, k_blocks, c);
  }
};

}  // namespace

void run_small(const Params& p) {
  for_format(p.weight, Formats<Format::kInt4, Format::kInt8>(), [&]<bool kZeros, Format kFormat>() { small_loop<Int8Avx512Vnni, kZeros, kFormat>(p); });
}
void run_tile(const Params& p) {
  for_format(p.weight, Formats<Format::kInt4, Format::kInt8>(), [&]<bool kZeros, Format kFormat>() { tile_loop<Int8Avx512Vnni, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_int8_avx512vnni
