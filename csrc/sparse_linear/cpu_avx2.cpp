// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias, w n:m sparse;  x quantized inside to int8 (quant_linear/op.h), sums exact in
//           integers over 32 k, then fp32
// LAYOUT    w: Sparse8 (common/sparse.h).   A: rows: x86_places.h; vectors: with 128 added, so that x is what vpmaddubsw wants unsigned
// WORK      rows: one step takes 8 k of x, broadcast; a byte shuffle picks of them what each of 8 rows keeps, 4 numbers; the sign of a code goes
//           to x, so that vpmaddubsw takes the code's size unsigned: |code| <= 128, |x| <= 127, two products are at most 32512. vpmaddwd by 1.
//           A task is a range of strips; up to 4 rows of x share codes and places.
//           vectors: 16 rows share places. What these keep of 6 rows of x is picked once for all of them, 64 k in two shuffles; then it is
//           quant_linear's tile with half the products: 6 rows x 16 outputs, int16 sums that begin at what 128 too much of x adds, bytes in
//           two passes of nibbles, 16 * high + low. Where two blocks of 32 k share w's scale, the low halves of a vector are the sums of one
//           and the high halves those of the other, which vpmaddwd by their two multiples adds. |sum| <= 16 * 127 * 15 at the end; that it
//           may wrap on the way is harmless.
//           vectors, few rows of x: two strips at once, unpacked in registers.
//           tile, any pattern: quant_linear's dense tile over panels made dense in registers (x86_codes.h).
// BOUND     M=1: DRAM. Rows: 160 bytes for 256 dense int8 weights (1.6 times fewer), 96 for int4 (1.33 times fewer). Vectors: 136 and 72.
//           Rows beyond: 9 instructions a row of x and step for 64 dense operations, more than a dense tile needs.
//           Vectors at large M: vector units, of which vpmaddubsw has two and vpaddw three. For 64 k of a tile int4 takes 282 of their
//           instructions, with groups of 64 and more 246, a dense tile 456: 1.6 and 1.85 times as many.
//           Measured (Sapphire Rapids, a core): int4 1.40 (group 32) and 1.54 times as fast as the dense tile, int8 1.63.
// TRIED     (vectors) What is kept of a tile's rows picked for all 2048 k first: 10% slower. A tile's rows prefetched: no faster.
// LIMITS    AVX2, FMA, F16C; int8 activations; int8 and int4 weights; rows 2:4 with v = 1, vectors 2:4 and 4:8 with v = 16.
//           dense: float activations and fp8_e4m3 too
#include <algorithm>

#include "sparse_linear/x86_codes.h"
#include "sparse_linear/x86_places.h"

namespace taut::sparse_linear::cpu_avx2 {
namespace {

struct Avx2 : quant_linear::Simd256 {
  template <int kRows>
  static constexpr int kVectors = kRows == 1   ? 4
                                  : kRows == 2 ? 2
                                               : 1;

  template <int c>
  static TAUT_INLINE Bytes places(Bytes fields) {
    return _mm256_or_si256(_mm256_and_si256(c == 0 ? fields : _mm256_srli_epi16(fields, 2 * c), splat(3)), _mm256_set1_epi32(0x04040000));
  }
  static TAUT_INLINE Bytes broadcast8(const uint8_t* p) { return _mm256_set1_epi64x(load_as<int64_t>(p)); }

  struct Sum {
    Bytes value;
  };
  static TAUT_INLINE Bytes look_up(Bytes x, Bytes places) { return _mm256_shuffle_epi8(x, places); }
  static TAUT_INLINE void multiply(Sum& sum, Bytes code, Bytes x, Bytes zero) {
    const Bytes signed_code = _mm256_sub_epi8(code, zero);
    const Bytes pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_code), _mm256_sign_epi8(x, signed_code));
    sum.value = _mm256_add_epi32(sum.value, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static TAUT_INLINE Floats to_float(const Sum& sum) { return _mm256_cvtepi32_ps(sum.value); }
};

// ---- Vectors of 16 rows

constexpr int64_t kXRows = 192;      // that share unpacked codes: 400 KB of x for 2048 k, in the L2 cache. TRIED: 96, 144: 1 to 6% slower
constexpr int64_t kPanelPairs = 32;  // 2048 k: 16 KB of codes of 4 bits
constexpr int kTile = 6;             // rows of x: 6 x 2 sums + 2 codes + 1 broadcast + 1 product = 16 registers

// Of 16 rows and some k, in pairs of 32: a step is one sum, of one or (kChunks = 8) two blocks; a pass has nibbles of their codes.
struct Panel {
  alignas(64) int8_t codes[kPanelPairs * 8 * 64 * 2];     // [steps][passes][kChunks][2 strips][32]
  alignas(64) int16_t starts[kPanelPairs * 2 * 2][32];    // [steps][passes][2 strips][16]
  alignas(64) float scales[kPanelPairs * 2 * 2][16];      // [steps][passes][2 strips][8], 16 times as much for high nibbles
  alignas(64) uint8_t shuffles[kPanelPairs * 2 + 2][32];  // [blocks], and two more
};

// Blocks [first, first + 2 * pairs); those past the end are zeros. A strip alone at the end is paired with itself.
template <int kPasses, int kChunks>
void unpack(const Params& p, const Sparse8& w, int64_t strip, int64_t first, int64_t pairs, Panel& panel) {
  const Rows8 dense = w.dense();
  const int64_t left = dense.num_blocks() - first, far = strip + 1 < dense.num_strips() ? w.strip_bytes() : 0;
  BlockCursor cursor(w, dense, p.packed, strip, first);
  int8_t* codes = panel.codes;
  int16_t* starts = panel.starts[0];
  float* scales = panel.scales[0];
  const auto store_scales = [&] {
    TAUT_FOR (int pass = 0; pass < kPasses; pass++, scales += 16)
      TAUT_FOR (int i = 0; i < 2; i++)
        _mm256_store_ps(scales + i * 8, _mm256_mul_ps(Avx2::from_fp16(cursor.scales() + i * far, 0), _mm256_set1_ps(kPasses == 2 && pass == 0 ? 16.0f : 1.0f)));
  };
  const auto store_codes = [&](__m256i code, int chunk, int i, __m256i& start) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + chunk * 64 + i * 32), code);
    start = _mm256_sub_epi16(start, _mm256_maddubs_epi16(Avx2::splat(128), code));
  };
  for (int64_t pair = 0; pair < pairs; pair++) {
    __m256i code[2][kPasses][4][2];
    for (int half = 0; half < 2; half++) {
      if (2 * pair + half >= left) {
        std::memset(code[half], 0, sizeof code[half]), std::memset(panel.shuffles[2 * pair + half], 0, 32);
        if (kChunks == 4) std::memset(scales, 0, kPasses * 64), scales += kPasses * 16;
        continue;
      }
      if (kChunks == 4 || half == 0) store_scales();
      const __m256i low = Avx2::splat(15), eight = Avx2::splat(8);
      TAUT_FOR (int i = 0; i < 2; i++)
        TAUT_FOR (int c = 0; c < 4; c++) {
          const __m256i packed = Avx2::load(cursor.codes + i * far + (kPasses == 2 ? c : c % 2) * 32, 0), right = _mm256_srli_epi16(packed, 4);
          code[half][0][c][i] = _mm256_sub_epi8(_mm256_and_si256(kPasses == 2 || c >= 2 ? right : packed, low), eight);
          if (kPasses == 2) code[half][kPasses - 1][c][i] = _mm256_and_si256(packed, low);
        }
      // Nibbles: of the first 8 kept numbers in the block's first 16 k, of the others in its second.
      const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(cursor.codes + w.code_block_bytes())), nibble = _mm_set1_epi8(15);
      const __m128i bytes = _mm_unpacklo_epi8(_mm_and_si128(packed, nibble), _mm_and_si128(_mm_srli_epi16(packed, 4), nibble));
      const __m256i halves = _mm256_permute4x64_epi64(_mm256_castsi128_si256(bytes), 0x50);  // each twice
      _mm256_store_si256(reinterpret_cast<__m256i*>(panel.shuffles[2 * pair + half]), halves);
      cursor.next();
    }
    TAUT_FOR (int step = 0; step < 8 / kChunks; step++)
      TAUT_FOR (int pass = 0; pass < kPasses; pass++, codes += kChunks * 64, starts += 32)
        TAUT_FOR (int i = 0; i < 2; i++) {
          __m256i start = _mm256_setzero_si256();
          TAUT_FOR (int c = 0; c < 4; c++) {
            if constexpr (kChunks == 4) store_codes(code[step][pass][c][i], c, i, start);
            else {  // of each block two kept numbers
              const __m256i a = code[0][pass][c][i], b = code[1][pass][c][i];
              store_codes(_mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xaa), 2 * c, i, start);
              store_codes(_mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xaa), 2 * c + 1, i, start);
            }
          }
          _mm256_store_si256(reinterpret_cast<__m256i*>(starts + i * 16), start);
        }
  }
}

// What 16 rows keep of a pair of blocks of x: chunk c of block b is at 16 * (c / 2) + 8 * b + 4 * (c % 2), or, where the blocks share a sum,
// alternate chunks of two of each are at 4 * c.
template <int kChunks, int kRows>
TAUT_INLINE void pick(const uint8_t* x, int64_t x_stride, const uint8_t* shuffles, uint8_t (*picked)[32]) {
  const __m256i first = Avx2::load(shuffles, 0), second = Avx2::load(shuffles + 32, 0);
  TAUT_FOR (int r = 0; r < kRows; r++) {
    const __m256i a = _mm256_shuffle_epi8(Avx2::load(x + r * x_stride, 0), first), b = _mm256_shuffle_epi8(Avx2::load(x + r * x_stride + 32, 0), second);
    _mm256_store_si256(reinterpret_cast<__m256i*>(picked[r]), kChunks == 8 ? _mm256_unpacklo_epi16(a, b) : _mm256_unpacklo_epi64(a, b));
  }
}

// sums[kRows][16] += x @ panel. m: int16x2 of a step, twice the same where it has one block.
// WHY the next pair is picked beforehand: what was just stored would be waited for. The one after the last is read and not used.
template <int kPasses, int kChunks, int kRows>
__attribute__((noinline)) void micro(const Panel& panel, int64_t pairs, const uint8_t* x, int64_t x_stride, const int32_t* m, int64_t m_stride, float* sums) {
  constexpr int kSteps = 8 / kChunks;
  const uint8_t *codes = reinterpret_cast<const uint8_t*>(panel.codes), *shuffles = panel.shuffles[0];
  const int16_t* starts = panel.starts[0];
  const float* scales = panel.scales[0];
  alignas(32) uint8_t buffers[2][kRows][32];
  pick<kChunks, kRows>(x, x_stride, shuffles, buffers[0]);
  for (int64_t pair = 0; pair < pairs; pair++, m += kSteps) {
    x += 64, shuffles += 64;
    pick<kChunks, kRows>(x, x_stride, shuffles, buffers[(pair + 1) % 2]);
    const uint8_t* picked = buffers[pair % 2][0];
    TAUT_FOR (int step = 0; step < kSteps; step++)
      TAUT_FOR (int pass = 0; pass < kPasses; pass++, codes += kChunks * 64, starts += 32, scales += 16) {
        __m256i sum[kRows][2];
        asm("" : "+r"(codes), "+r"(picked), "+r"(sums));
        TAUT_FOR (int chunk = 0; chunk < kChunks; chunk++) {
          const int at = kChunks == 8 ? chunk * 4 : chunk / 2 * 16 + step * 8 + chunk % 2 * 4;
          const __m256i code[2] = {Avx2::load_bytes(codes + chunk * 64), Avx2::load_bytes(codes + chunk * 64 + 32)};
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const __m256i four = Avx2::broadcast4(picked + r * 32 + at);
            TAUT_FOR (int i = 0; i < 2; i++) {
              // WHY asm: see quant_linear/cpu_int8_avx2.cpp.
              __m256i product;
              if (chunk == 0)
                asm volatile("vpmaddubsw %2,%1,%0\n\tvpaddw %3,%0,%0"
                             : "=&x"(sum[r][i])
                             : "x"(four), "x"(code[i]), "m"(*reinterpret_cast<const __m256i*>(starts + i * 16)));
              else asm volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0" : "+x"(sum[r][i]), "=&x"(product) : "x"(four), "x"(code[i]));
            }
          }
        }
        const __m256 scale[2] = {_mm256_load_ps(scales), _mm256_load_ps(scales + 8)};
        TAUT_FOR (int r = 0; r < kRows; r++) {
          const __m256i multiple = Avx2::broadcast4(reinterpret_cast<const uint8_t*>(m + r * m_stride + step));
          TAUT_FOR (int i = 0; i < 2; i++) Avx2::accumulate(sums + r * 16 + i * 8, _mm256_cvtepi32_ps(_mm256_madd_epi16(sum[r][i], multiple)), scale[i]);
        }
      }
  }
}

template <int kPasses, int kChunks, int... kRows>
void micro_rows(int rows, const Panel& panel, int64_t pairs, const uint8_t* x, int64_t x_stride, const int32_t* m, int64_t m_stride, float* sums,
                std::integer_sequence<int, kRows...>) {
  using Micro = void (*)(const Panel&, int64_t, const uint8_t*, int64_t, const int32_t*, int64_t, float*);
  static constexpr Micro kTable[] = {micro<kPasses, kChunks, kRows + 1>...};
  kTable[rows - 1](panel, pairs, x, x_stride, m, m_stride, sums);
}

template <int kPasses, int kChunks>
void run_panels(const Params& p) {
  const Sparse8 w = p.sparse();
  const int64_t pairs = (w.dense().num_blocks() + 1) / 2, padded_k = pairs * 64, m_stride = pairs * (8 / kChunks);
  const int64_t doubles = (w.dense().num_strips() + 1) / 2, num_tasks = std::min(p.num_threads, doubles), quantizers = std::min(p.num_threads, p.M);
  const bool whole_row = p.activations == quant_linear::Activations::kInt8Row;
  const int64_t x_stride = padded_k + 64;  // a pair more is read; and rows a multiple of 4096 apart would share a few sets of the L1 cache
  uint8_t* x = scratch(0, p.M * (x_stride + m_stride * 4 + 4));
  int32_t* m = reinterpret_cast<int32_t*>(x + p.M * x_stride);
  float* unit = reinterpret_cast<float*>(m + p.M * m_stride);
  parallel_tasks(quantizers, [&](int64_t task) {
    float* buffer = reinterpret_cast<float*>(scratch(1, padded_k * 4));
    for (int64_t r = p.M * task / quantizers; r < p.M * (task + 1) / quantizers; r++) {
      unit[r] = quant_linear::quantize_row(load_row(p, r, padded_k, buffer), padded_k, p.activations, [&](int64_t k, __m256i q, float multiple) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + r * x_stride + k), _mm256_xor_si256(q, Avx2::splat(0x80)));
        const int16_t multiple16 = whole_row ? 1 : static_cast<int16_t>(multiple);
        int16_t* to = reinterpret_cast<int16_t*>(m + r * m_stride) + k / 32 * (8 / kChunks);
        for (int i = 0; i < 8 / kChunks; i++) to[i] = multiple16;
      });
      if (whole_row) unit[r] *= 32767.0f;
    }
  });
  // Parts of k of equal length; tiles of rows differ by one.
  const int64_t most = kPanelPairs, k_parts = (pairs + most - 1) / most, row_parts = (p.M + kXRows - 1) / kXRows;
  parallel_tasks(num_tasks, [&](int64_t task) {
    uint8_t* memory = scratch(1, sizeof(Panel) + kXRows * 64);
    Panel& panel = *reinterpret_cast<Panel*>(memory);
    float* sums = reinterpret_cast<float*>(memory + sizeof(Panel));
    for (int64_t row_part = 0; row_part < row_parts; row_part++) {
      const int64_t m0 = p.M * row_part / row_parts, rows = p.M * (row_part + 1) / row_parts - m0, tiles = (rows + kTile - 1) / kTile;
      for (int64_t pair = doubles * task / num_tasks; pair < doubles * (task + 1) / num_tasks; pair++) {
        const int64_t strip = 2 * pair;
        std::memset(sums, 0, rows * 64);
        for (int64_t part = 0; part < k_parts; part++) {
          const int64_t begin = pairs * part / k_parts, count = pairs * (part + 1) / k_parts - begin;
          unpack<kPasses, kChunks>(p, w, strip, 2 * begin, count, panel);
          for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t r0 = rows * tile / tiles, r1 = rows * (tile + 1) / tiles;
            micro_rows<kPasses, kChunks>(static_cast<int>(r1 - r0), panel, count, x + (m0 + r0) * x_stride + begin * 64, x_stride,
                                         m + (m0 + r0) * m_stride + begin * (8 / kChunks), m_stride, sums + r0 * 16, std::make_integer_sequence<int, kTile>());
          }
        }
        for (int64_t r = 0; r < rows; r++)
          for (int i = 0; i < 2; i++)
            if (strip + i < w.dense().num_strips()) store_any(p, m0 + r, strip + i, sums + r * 16 + i * 8, unit[m0 + r]);
      }
    }
  });
}

// ---- The same, for few rows of x: weights are unpacked in registers

// sums[kRows][2 strips][8]. Of 4-bit codes an int16 sum is of (code - 8) * x: it begins at -8 times the sum of what is picked of x.
template <bool kInt4, int kRows>
__attribute__((noinline)) void multiply_pair(const Sparse8& w, const uint8_t* at, int64_t far, const uint8_t* x, int64_t x_stride, const float* m,
                                             int64_t m_stride, float* sums) {
  constexpr int kCodeBytes = kInt4 ? 64 : 128, kBlockBytes = kCodeBytes + 8;
  constexpr int64_t kPrefetch = 2304;  // TRIED: to L2 alone, 1152 to 4608 bytes ahead: 5% to 20% slower
  const Rows8 dense = w.dense();
  const int64_t blocks_per_group = dense.blocks_per_group(), header_bytes = dense.header_bytes(), superblock_bytes = w.superblock_bytes();
  __m256 total[kRows][2];
  TAUT_FOR (int r = 0; r < kRows; r++) total[r][0] = total[r][1] = Avx2::zero();
  const __m256i low = Avx2::splat(15);
  const uint8_t* last_ahead = at + w.strip_bytes() - kPrefetch;  // beyond, what lies ahead is the other strip of the two, read already
  for (int64_t left = dense.num_blocks(), block = 0; left > 0; at += superblock_bytes) {
    const uint8_t* codes = at + header_bytes;
    for (int g = 0; g < 4 && left > 0; g++)
      for (int64_t b = 0; b < blocks_per_group && left > 0; b++, left--, block++, codes += kBlockBytes) {
        const uint8_t* ahead = codes + kPrefetch + (codes < last_ahead ? 0 : far);
        TAUT_FOR (int i = 0; i < 2; i++)
          TAUT_FOR (int line = 0; line < kBlockBytes; line += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + i * far + line), _MM_HINT_T0);
        const __m128i nibbles = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + kCodeBytes)), nibble = _mm_set1_epi8(15);
        const __m128i bytes = _mm_unpacklo_epi8(_mm_and_si128(nibbles, nibble), _mm_and_si128(_mm_srli_epi16(nibbles, 4), nibble));
        const __m256i shuffle = _mm256_permute4x64_epi64(_mm256_castsi128_si256(bytes), 0x50);
        alignas(32) uint8_t picked[kRows][32];  // chunk c is at 16 * (c / 2) + 4 * (c % 2)
        __m256i sum[kRows][2];
        TAUT_FOR (int r = 0; r < kRows; r++) {
          const __m256i mine = _mm256_shuffle_epi8(Avx2::load(x + r * x_stride + block * 32, 0), shuffle);
          _mm256_store_si256(reinterpret_cast<__m256i*>(picked[r]), mine);
          if constexpr (kInt4) {
            const __m256i parts = _mm256_sad_epu8(mine ^ Avx2::splat(128), _mm256_setzero_si256());
            const __m128i all = _mm_add_epi32(_mm256_castsi256_si128(parts), _mm256_extracti128_si256(parts, 1));  // and 16 * 128
            const __m128i start = _mm_and_si128(_mm_sub_epi32(_mm_set1_epi32(8 * 2048), _mm_slli_epi32(all, 3)), _mm_set1_epi32(0xffff));
            sum[r][0] = sum[r][1] = _mm256_broadcastd_epi32(start);
          } else {
            sum[r][0] = sum[r][1] = _mm256_setzero_si256();
          }
        }
        TAUT_FOR (int i = 0; i < 2; i++)
          TAUT_FOR (int c = 0; c < 4; c++) {
            const __m256i packed = Avx2::load(codes + i * far + (kInt4 ? c % 2 : c) * 32, 0);
            const __m256i code = kInt4 ? _mm256_and_si256(c < 2 ? packed : _mm256_srli_epi16(packed, 4), low) : _mm256_sub_epi8(packed, Avx2::splat(128));
            const __m256i size = kInt4 ? code : _mm256_abs_epi8(code);
            TAUT_FOR (int r = 0; r < kRows; r++) {
              const __m256i four = Avx2::broadcast4(picked[r] + c / 2 * 16 + c % 2 * 4);
              if constexpr (kInt4) sum[r][i] = _mm256_add_epi16(sum[r][i], _mm256_maddubs_epi16(size, four));
              else sum[r][i] = _mm256_add_epi32(sum[r][i], _mm256_madd_epi16(_mm256_maddubs_epi16(size, _mm256_sign_epi8(four, code)), _mm256_set1_epi16(1)));
            }
          }
        TAUT_FOR (int i = 0; i < 2; i++) {
          const __m256 scale = Avx2::from_fp16(at + g * 16 + i * far, 0);
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const __m256i whole = kInt4 ? _mm256_madd_epi16(sum[r][i], _mm256_set1_epi16(1)) : sum[r][i];
            total[r][i] = Avx2::fma(_mm256_cvtepi32_ps(whole), _mm256_mul_ps(scale, Avx2::splat_float(m[r * m_stride + block])), total[r][i]);
          }
        }
      }
  }
  TAUT_FOR (int r = 0; r < kRows; r++)
    TAUT_FOR (int i = 0; i < 2; i++) _mm256_store_ps(sums + (r * 2 + i) * 8, total[r][i]);
}

struct Pair {
  static constexpr uint8_t kFlip = 0;
  template <bool kInt4, int kRows>
  static constexpr auto multiply = multiply_pair<kInt4, kRows>;
};

// ---- Dense: cpu_dense.cpp with strips made dense here

void expand_strip(const Sparse8& w, const uint8_t* in, uint8_t* out) {
  const Rows8 dense = w.dense();
  const int64_t per_superblock = dense.blocks_per_superblock();
  const __m256i zero = Avx2::splat(sparse_zero(w.spec.format));
  with_pattern(w.pattern, [&]<int n, int m, bool kShared>() {
    const auto expand = [&]<bool kWhole>() {
      for (int64_t block = 0; block < dense.num_blocks(); block++, in += w.block_bytes(), out += dense.block_bytes()) {
        if (block % per_superblock == 0) {
          std::memcpy(out, in, dense.header_bytes());
          in += dense.header_bytes(), out += dense.header_bytes();
        }
        __m256i chunks[8];
        dense_block<quant_linear::Simd256, n, m, kShared, kWhole>(in, 0, zero, chunks);
        TAUT_FOR (int c = 0; c < (kWhole ? 8 : 4); c++)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c * 32), kWhole ? chunks[c] : chunks[c] | _mm256_slli_epi16(chunks[c + 4], 4));
      }
    };
    code_bits(w.spec.format) == 8 ? expand.template operator()<true>() : expand.template operator()<false>();
  });
}

}  // namespace

void run_tile(const Params& p) { run_codes<quant_linear::Avx2>(p); }
void run_dense(const Params& p) { cpu_dense::run_with(p, expand_strip); }
void run_rows(const Params& p) { run_places<Avx2>(p); }

void run_vectors_small(const Params& p) { p.weight.format == Format::kInt4 ? run_pairs<Pair, true>(p) : run_pairs<Pair, false>(p); }
void run_vectors(const Params& p) {
  // Two blocks may share a sum where they share w's scale.
  const Rows8 dense = p.sparse().dense();
  const bool two = dense.blocks_per_group() % 2 == 0 || dense.blocks_per_group() >= dense.num_blocks();
  if (p.weight.format == Format::kInt4) two ? run_panels<1, 8>(p) : run_panels<1, 4>(p);
  else two ? run_panels<2, 8>(p) : run_panels<2, 4>(p);
}

}  // namespace taut::sparse_linear::cpu_avx2
