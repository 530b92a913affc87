// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in integers
//           over 32 k, then fp32;  w int4 (zero point 8 or one a group) or int8
// LAYOUT    w: Rows8 (common/formats.h).
//           A: per block of R rows, per 32 k: int8 [8 chunks][R][4], int16x2 -sum(a) or -8*sum(a) [R], int16x2 m [R]
//           B: panel u8 [k/32][pass][8 chunks][2 strips][32], the unpacked codes
// WORK      One step: broadcast 4 k of one row, vpmaddubsw with a vector of 8 outputs x 4 k of codes, vpaddw. After 32 k:
//           vpmaddwd by m (the integer part of x's scale does the widening), convert, fma by the weight's scale.
//           int4 sums cannot overflow: 16 lanes-in-one of 15*127 = 30480 in int16, started at -z*sum(a); wrap-around on
//           the way is harmless, the end is in range. int8 is two passes of the same kind: w = 16*(hi - 8) + lo.
//           |int32| <= 2*30480*32767 < 2^31.
//           small (cpu_loops.h): R <= 4 rows, weights unpacked in registers.  tile: 6 rows x 16 outputs.
// BOUND     M=1: DRAM read of the weights.  Large M: issue width; 3.35 instructions per vpmaddubsw (64 operations).
// LIMITS    AVX2, FMA, F16C; int8 activations
// TRIED     a zero correction per group after the sum: +6%.  12 rows x 1 vector: broadcasts bind, 0.8x.  int8 by the sign
//           trick (vpsignb): the same instruction count as two nibble passes, and a second kernel.
#include "quant_linear/x86_int8.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear::cpu_int8_avx2 {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))
#define TAUT_FOR(...) _Pragma("GCC unroll 8") for (__VA_ARGS__)

// WHY asm: gcc 12 reassociates the int16 sum into a tree and spills it (2x slower); this keeps one running sum.
TAUT_INLINE void dot(__m256i& sum, __m256i w, __m256i a) {
  __m256i product;
  asm volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0" : "+x"(sum), "=&x"(product) : "x"(w), "x"(a));
}
// The first step of a sum: sum = start + w.a, without a register copy.
TAUT_INLINE void dot_first(__m256i& sum, __m256i start, __m256i w, __m256i a) {
  __m256i product;
  asm volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%4,%0" : "=x"(sum), "=&x"(product) : "x"(w), "x"(a), "x"(start));
}
TAUT_INLINE __m256i broadcast4(const void* p) {
  __m256i v;
  asm volatile("vpbroadcastd %1,%0" : "=x"(v) : "m"(*static_cast<const int32_t*>(p)));
  return v;
}
TAUT_INLINE __m256i load32(const void* p) {
  __m256i v;
  asm volatile("vmovdqu %1,%0" : "=x"(v) : "m"(*static_cast<const __m256i*>(p)));
  return v;
}
TAUT_INLINE __m256i load_zeros(const uint8_t* p) {  // 8 zero points, each as an int16 pair
  const __m256i z = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_or_si256(z, _mm256_slli_epi32(z, 16));
}
TAUT_INLINE __m256 load_scales(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
// sums += c * scale, in memory: gcc otherwise keeps a second, spilled copy of the tile.
TAUT_INLINE void accumulate(float* sums, __m256 c, __m256 scale) {
  asm volatile("vfmadd213ps %1,%2,%0\n\tvmovaps %0,%1" : "+x"(c), "+m"(*reinterpret_cast<__m256*>(sums)) : "x"(scale));
}

struct Int8Avx2 {
  static constexpr int kRowBlockBytes = 40;  // of A, per row and 32 k
  template <Format>
  static constexpr int row_block_bytes = kRowBlockBytes;
  static constexpr int kTileRows = 6;         // 6 x 2 sums + 2 codes + 1 broadcast + 1 product = 16 registers
  static constexpr int64_t kChunkRows = 516;  // 2.6 MB of A at K=4096
  template <Format kFormat>
  static constexpr int code_bytes = kFormat == Format::kInt8 ? 2 : 1;  // of B: a pass each
  template <Format kFormat>
  static constexpr int64_t panel_k = kFormat == Format::kInt4 ? 1024 : 512;  // 16 KB of codes
  template <Format kFormat, int kRows>
  static constexpr int streams = kRows == 1                               ? 4
                                 : kFormat == Format::kInt4 || kRows == 2 ? 2
                                                                          : 1;

  // Row r of a block of `rows`: codes, corrections and multiples for all of K. Returns the row's unit.
  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params& p, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    return quantize_row(x, padded_k, p.activations, [&](int64_t k, __m256i q, float multiple) {
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);  // sums over k%4 in {0,1} and {2,3}: the two int16 lanes
      __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      sum = _mm_add_epi16(sum, _mm_unpackhi_epi64(sum, sum));
      sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 1));
      uint8_t* block = a + k / panel_k * panel_stride + k % panel_k / 32 * kRowBlockBytes * rows;
      store_chunks(block, r, rows, q);
      const int32_t minus_sum = _mm_cvtsi128_si32(_mm_mullo_epi16(sum, _mm_set1_epi16(kZeros ? -1 : -8)));
      const int32_t m = static_cast<int32_t>(multiple), twice = m | m << 16;
      std::memcpy(block + (8 * rows + r) * 4, &minus_sum, 4);
      std::memcpy(block + (9 * rows + r) * 4, &twice, 4);
    });
  }

  // Where the sum of a (row, strip) starts: -z * sum(a); where there are no zeros, prepare_row has put in z = 8.
  template <bool kZeros>
  static TAUT_INLINE __m256i start(__m256i minus_sum, const uint8_t* zeros) {
    return kZeros ? _mm256_mullo_epi16(minus_sum, load_zeros(zeros)) : minus_sum;
  }

  // sums[kStreams][kRows][8] = A[kRows, K] @ w[8 rows, K]^T for kStreams strips `stride` bytes apart.
  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    constexpr int64_t kPrefetch = kFormat == Format::kInt4 ? 1152 : 2304;  // two superblocks ahead: 10-25% at M = 4, 8
    constexpr bool kInRegisters = kFormat == Format::kInt4 && kRows * kStreams <= 4;
    const __m256i nibble = _mm256_set1_epi8(15);
    __m256 f[kStreams][kRows];
    TAUT_FOR (int i = 0; i < kStreams; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) f[i][r] = _mm256_setzero_ps();
    if (!kInRegisters) std::memset(sums, 0, kStreams * kRows * 32);
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * s.block_bytes;
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += kRowBlockBytes * kRows, codes += s.block_bytes) {
          const uint8_t* zeros = w + 64 + g * 8;
          if (kRows > 1)
            TAUT_FOR (int i = 0; i < kStreams; i++)
              for (int64_t line = 0; line < (kFormat == Format::kInt4 ? 128 : 256); line += 64)
                _mm_prefetch(reinterpret_cast<const char*>(codes + i * stride + kPrefetch + line), _MM_HINT_T0);
          __m256i sum[kStreams][kRows], sum_low[kStreams][kRows];
          if constexpr (kFormat == Format::kInt8) {
            TAUT_FOR (int v = 0; v < 8; v++) {
              TAUT_FOR (int i = 0; i < kStreams; i++) {
                const __m256i x = load32(codes + i * stride + v * 32);
                const __m256i high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble), low = _mm256_and_si256(x, nibble);
                TAUT_FOR (int r = 0; r < kRows; r++) {
                  const __m256i chunk = broadcast4(a + (v * kRows + r) * 4);
                  if (v == 0) {
                    dot_first(sum[i][r], start<false>(broadcast4(a + (8 * kRows + r) * 4), zeros), high, chunk);
                    sum_low[i][r] = _mm256_maddubs_epi16(low, chunk);
                  } else {
                    dot(sum[i][r], high, chunk);
                    dot(sum_low[i][r], low, chunk);
                  }
                }
              }
            }
          } else if constexpr (kRows == 1) {
            TAUT_FOR (int v = 0; v < 4; v++) {
              const __m256i chunk_low = broadcast4(a + v * 4), chunk_high = broadcast4(a + (v + 4) * 4);
              TAUT_FOR (int i = 0; i < kStreams; i++) {
                const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * stride + v * 32));
                const __m256i low = _mm256_and_si256(x, nibble), high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
                if (v == 0) dot_first(sum[i][0], start<kZeros>(broadcast4(a + 32), zeros + i * stride), low, chunk_low);
                else dot(sum[i][0], low, chunk_low);
                dot(sum[i][0], high, chunk_high);
              }
            }
          } else {
            TAUT_FOR (int v = 0; v < 4; v++)
              TAUT_FOR (int half = 0; half < 2; half++) {
                __m256i code[kStreams];
                TAUT_FOR (int i = 0; i < kStreams; i++) {
                  const __m256i x = load32(codes + i * stride + v * 32);
                  code[i] = _mm256_and_si256(half ? _mm256_srli_epi16(x, 4) : x, nibble);
                }
                TAUT_FOR (int r = 0; r < kRows; r++) {
                  const __m256i chunk = broadcast4(a + ((v + 4 * half) * kRows + r) * 4);
                  if (v == 0 && half == 0) {
                    const __m256i minus_sum = broadcast4(a + (8 * kRows + r) * 4);
                    TAUT_FOR (int i = 0; i < kStreams; i++) dot_first(sum[i][r], start<kZeros>(minus_sum, zeros + i * stride), code[i], chunk);
                  } else {
                    TAUT_FOR (int i = 0; i < kStreams; i++) dot(sum[i][r], code[i], chunk);
                  }
                }
              }
          }
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const __m256i m = broadcast4(a + (9 * kRows + r) * 4);
            TAUT_FOR (int i = 0; i < kStreams; i++) {
              const __m256 scale = load_scales(w + i * stride + g * 16);
              __m256 c = _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[i][r], m));
              if constexpr (kFormat == Format::kInt8) c = _mm256_fmadd_ps(c, _mm256_set1_ps(16.0f), _mm256_cvtepi32_ps(_mm256_madd_epi16(sum_low[i][r], m)));
              if (kInRegisters) f[i][r] = _mm256_fmadd_ps(c, scale, f[i][r]);
              else accumulate(sums + (i * kRows + r) * 8, c, scale);
            }
          }
        }
    }
    if (kInRegisters)
      TAUT_FOR (int i = 0; i < kStreams; i++)
        TAUT_FOR (int r = 0; r < kRows; r++) _mm256_store_ps(sums + (i * kRows + r) * 8, f[i][r]);
  }

  // k-blocks [block0, block0 + k_blocks) of one strip, to its half of the panel.
  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int half, PanelT& panel) {
    const __m256i nibble = _mm256_set1_epi8(15);
    constexpr int64_t kRow = kPanelStrips * 32;
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next()) {
      const uint8_t* codes = at.codes;
      _mm256_store_ps(panel.scales + (b * kPanelStrips + half) * 8, load_scales(at.scales()));
      if (kZeros) _mm256_store_si256(reinterpret_cast<__m256i*>(panel.zeros + (b * kPanelStrips + half) * 8), load_zeros(at.zeros()));
      uint8_t* out = panel.codes + b * code_bytes<kFormat> * 8 * kRow + half * 32;
      constexpr int kVectors = kFormat == Format::kInt4 ? 4 : 8;
      for (int v = 0; v < kVectors; v++) {
        const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + v * 32));
        const __m256i low = _mm256_and_si256(x, nibble), high = _mm256_and_si256(_mm256_srli_epi16(x, 4), nibble);
        // int4: the low nibbles are chunks 0-3, the high ones 4-7.  int8: pass 0 the high nibbles, pass 1 the low ones.
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + v * kRow), kFormat == Format::kInt4 ? low : high);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + (v + kVectors) * kRow), kFormat == Format::kInt4 ? high : low);
      }
    }
  }

  // c[kRows][2][8] += A[kRows, 32 * k_blocks] @ panel.  Pointers are biased by 128, so that nearly every displacement
  // is one byte: shorter code, better op-cache packing.
  template <bool kZeros, Format kFormat, int kRows, class PanelT>
  static __attribute__((noinline)) void micro(const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    constexpr int kChunkBytes = kPanelStrips * 32;
    const uint8_t* codes = panel.codes + 128;
    const float* scales = panel.scales;
    const int32_t* zeros = panel.zeros;
    char* tile = reinterpret_cast<char*>(c) + 128;
    a += 128;
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows, scales += kPanelStrips * 8, zeros += kPanelStrips * 8) {
      for (int pass = 0; pass < code_bytes<kFormat>; pass++, codes += 8 * kChunkBytes) {
        const bool low_nibbles = kFormat == Format::kInt8 && pass == 1;
        __m256i sum[kRows][kPanelStrips];
        const uint8_t *codes0 = codes, *codes1 = codes + 4 * kChunkBytes;
        asm("" : "+r"(a), "+r"(codes0), "+r"(codes1), "+r"(tile));
        if (low_nibbles) {
          TAUT_FOR (int r = 0; r < kRows; r++)
            TAUT_FOR (int i = 0; i < kPanelStrips; i++) sum[r][i] = _mm256_setzero_si256();
        } else {
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const __m256i minus_sum = broadcast4(a + (8 * kRows + r) * 4 - 128);
            TAUT_FOR (int i = 0; i < kPanelStrips; i++)
              sum[r][i] = kZeros ? _mm256_mullo_epi16(minus_sum, *reinterpret_cast<const __m256i*>(zeros + i * 8)) : minus_sum;
          }
        }
        TAUT_FOR (int chunk = 0; chunk < 8; chunk++) {
          __m256i code[kPanelStrips];
          TAUT_FOR (int i = 0; i < kPanelStrips; i++) code[i] = load32((chunk < 4 ? codes0 : codes1) + ((chunk & 3) * kPanelStrips + i) * 32 - 128);
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const __m256i x = broadcast4(a + (chunk * kRows + r) * 4 - 128);
            TAUT_FOR (int i = 0; i < kPanelStrips; i++) dot(sum[r][i], code[i], x);
          }
        }
        __m256 scale[kPanelStrips];
        TAUT_FOR (int i = 0; i < kPanelStrips; i++) {
          scale[i] = _mm256_load_ps(scales + i * 8);
          if (kFormat == Format::kInt8 && !low_nibbles) scale[i] = _mm256_mul_ps(scale[i], _mm256_set1_ps(16.0f));
        }
        TAUT_FOR (int r = 0; r < kRows; r++) {
          const __m256i m = broadcast4(a + (9 * kRows + r) * 4 - 128);
          TAUT_FOR (int i = 0; i < kPanelStrips; i++)
            accumulate(reinterpret_cast<float*>(tile + (r * kPanelStrips + i) * 32 - 128), _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[r][i], m)), scale[i]);
        }
      }
    }
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void micro_rows(int rows, const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    switch (rows) {
      case 1: return micro<kZeros, kFormat, 1>(a, panel, k_blocks, c);
      case 2: return micro<kZeros, kFormat, 2>(a, panel, k_blocks, c);
      case 3: return micro<kZeros, kFormat, 3>(a, panel, k_blocks, c);
      case 4: return micro<kZeros, kFormat, 4>(a, panel, k_blocks, c);
      case 5: return micro<kZeros, kFormat, 5>(a, panel, k_blocks, c);
      default: return micro<kZeros, kFormat, 6>(a, panel, k_blocks, c);
    }
  }
};

}  // namespace

void run_small(const Params& p) {
  for_format(p.weight, Formats<Format::kInt4, Format::kInt8>(), [&]<bool kZeros, Format kFormat>() { small_loop<Int8Avx2, kZeros, kFormat>(p); });
}
void run_tile(const Params& p) {
  for_format(p.weight, Formats<Format::kInt4, Format::kInt8>(), [&]<bool kZeros, Format kFormat>() { tile_loop<Int8Avx2, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_int8_avx2
