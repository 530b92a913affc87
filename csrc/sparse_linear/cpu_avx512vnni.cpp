// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias, w n:m sparse;  x quantized inside to int8 (quant_linear/op.h), sums exact in
//           int32 over 32 k, or over a group where x has one scale a row; then fp32
// LAYOUT    w: Sparse8 (common/sparse.h).   A: x86_places.h; for vectors with 128 added, so that x is what vpdpbusd wants unsigned
// WORK      rows: a step picks of 8 k of x, by a byte shuffle, what each of 16 rows (two strips) keeps, and adds 4 products by vpdpbusd; so does
//           another with the codes' zero in place of codes, which is taken off.
//           vectors: 16 rows share places. Of kXRows rows of x at a time what these keep is picked once, 128 k in two shuffles and a permutation;
//           then it is a dense product of half the length: 12 rows of x, 16 outputs, sums in registers. Codes are unpacked once for all kXRows.
//           tile, any pattern: quant_linear's dense tile over panels made dense in registers (x86_codes.h)
// BOUND     M=1: DRAM, 160 bytes for 256 dense int8 weights (1.6 times fewer), 96 for int4 (1.33 times fewer).  vectors at large M: vpdpbusd;
//           of 64 kept k 16, with conversions by group 4 to 12, and 3 to pick x; a dense tile needs 32 and 12.
// LIMITS    AVX-512 F, BW, DQ, VL, VNNI; int8 activations; int8 and int4 weights; rows 2:4 with v = 1, vectors 2:4 and 4:8 with v = 16
// TRIED     weights made dense 512 rows at a time, then the dense kernel: x is quantized 28 times over, 0.74 to 0.88 of the tile.
//           (vectors, Zen 4, M=512: products run at the rate of vpdpbusd and are 54% of the time, picking x is 26%, bound by the L1 cache: per 64 kept
//           two lines read from L2, one written there and one fetched to be written) parts of 2048 k, so that codes and picked x stay in L1: 0 to 4%
//           slower; of 512 to 2048 k with all sums in memory: 9% to 25% slower; picking with one vpermi2b: the same time; no prefetches: the same
#include "sparse_linear/x86_codes.h"
#include "sparse_linear/x86_places.h"

namespace taut::sparse_linear::cpu_avx512vnni {
namespace {

struct Avx512Vnni : quant_linear::Simd512 {
  template <int>
  static constexpr int kVectors = 2;

  template <int c>
  static TAUT_INLINE Bytes places(Bytes fields) {
    constexpr int kAndOr = 0xea;
    return _mm512_ternarylogic_epi32(c == 0 ? fields : _mm512_srli_epi16(fields, 2 * c), splat(3), _mm512_set1_epi32(0x04040000), kAndOr);
  }
  static TAUT_INLINE Bytes broadcast8(const uint8_t* p) { return _mm512_set1_epi64(load_as<int64_t>(p)); }

  struct Sum {
    Bytes value, zeros;
  };
  static TAUT_INLINE Bytes look_up(Bytes x, Bytes places) { return _mm512_shuffle_epi8(x, places); }
  static TAUT_INLINE void multiply(Sum& sum, Bytes code, Bytes x, Bytes zero) {
    sum.value = _mm512_dpbusd_epi32(sum.value, code, x);
    sum.zeros = _mm512_dpbusd_epi32(sum.zeros, zero, x);
  }
  static TAUT_INLINE Floats to_float(const Sum& sum) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum.value, sum.zeros)); }
};

// ---- Vectors of 16 rows

constexpr int64_t kXRows = 192;  // 800 KB of x at K = 4096: in the L2 cache beside 32 KB of weights
constexpr int kTile = 12;        // rows of x whose sums are in registers

// Of 16 rows: codes less their zero [blocks][4 chunks][64], shuffles of x [blocks / 4][2][64], for each block what 128 too much of x adds [16],
// and the scales [groups][16].
struct Panel {
  int8_t* codes;
  uint8_t* shuffles;
  int32_t* starts;
  float* scales;
  static int64_t bytes(int64_t blocks) { return (blocks + 4) * (256 + 32 + 64 + 64) + 256; }
  Panel(uint8_t* memory, int64_t blocks) {
    const int64_t whole = (blocks + 3) / 4 * 4;
    codes = reinterpret_cast<int8_t*>(memory), shuffles = memory + whole * 256;
    starts = reinterpret_cast<int32_t*>(shuffles + whole * 32), scales = reinterpret_cast<float*>(starts + whole * 16);
  }
};

// A strip alone at the end is paired with itself: far is 0.
template <bool kInt4>
void unpack(const Sparse8& w, const uint8_t* at, int64_t far, const Panel& panel) {
  const Rows8 dense = w.dense();
  const int64_t blocks = dense.num_blocks(), per_superblock = dense.blocks_per_superblock();
  const __m512i zero = _mm512_set1_epi8(static_cast<char>(kInt4 ? 8 : 128)), half = _mm512_set1_epi8(static_cast<char>(128));
  const __m128i low = _mm_set1_epi8(15);
  for (int64_t block = 0; block < blocks; block++) {
    if (block % per_superblock == 0) {
      for (int64_t g = 0; g < 4 && block + g * dense.blocks_per_group() < blocks; g++)
        _mm512_store_ps(panel.scales + (block / dense.blocks_per_group() + g) * 16, Avx512Vnni::from_fp16(at + g * 16, far));
      at += dense.header_bytes();
    }
    __m512i start = _mm512_setzero_si512();
    TAUT_FOR (int c = 0; c < 4; c++) {
      __m512i code;
      if (kInt4)
        code =
            _mm512_and_si512(c < 2 ? Avx512Vnni::load(at + c * 32, far) : _mm512_srli_epi16(Avx512Vnni::load(at + (c - 2) * 32, far), 4), _mm512_set1_epi8(15));
      else code = Avx512Vnni::load(at + c * 32, far);
      code = _mm512_sub_epi8(code, zero);
      _mm512_store_si512(panel.codes + block * 256 + c * 64, code);
      start = _mm512_dpbusd_epi32(start, half, code);
    }
    _mm512_store_si512(panel.starts + block * 16, _mm512_sub_epi32(_mm512_setzero_si512(), start));
    // Nibbles: of the first 8 kept numbers in the block's first 16 k, of the others in its second.
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at + w.code_block_bytes()));
    const __m128i bytes = _mm_unpacklo_epi8(_mm_and_si128(packed, low), _mm_and_si128(_mm_srli_epi16(packed, 4), low));
    const __m256i halves = _mm256_permute4x64_epi64(_mm256_castsi128_si256(bytes), 0x50);  // each twice
    _mm256_store_si256(reinterpret_cast<__m256i*>(panel.shuffles + block * 32), halves);
    at += w.block_bytes();
  }
}

// Asks for the cache line of out that 16 outputs go to. WHY: rows of out lie far apart, and a store that misses holds up those behind it.
TAUT_INLINE void prefetch_out(const Params& p, int64_t m, int64_t strip) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  quant_linear::prefetch_write(static_cast<const char*>(p.out) + (m * p.weight.N + strip * 8) * element);
}

// What 16 rows keep of a row of x, one of kTile whose 4 blocks lie side by side: [blocks / 4][kTile][4][16]. WHY: then a row is a constant away.
TAUT_INLINE void pick(const uint8_t* x, int64_t to_next, const uint8_t* shuffles, int64_t blocks, uint8_t* picked) {
  const __m512i even = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
  for (int64_t block = 0; block < blocks; block += 4) {
    _mm_prefetch(reinterpret_cast<const char*>(x + to_next + block * 32), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(x + to_next + block * 32 + 64), _MM_HINT_T0);
    const __m512i a = _mm512_shuffle_epi8(_mm512_loadu_si512(x + block * 32), _mm512_load_si512(shuffles + block * 32));
    const __m512i b = _mm512_shuffle_epi8(_mm512_loadu_si512(x + block * 32 + 64), _mm512_load_si512(shuffles + block * 32 + 64));
    _mm512_store_si512(picked + block / 4 * (kTile * 64), _mm512_permutex2var_epi64(a, even, b));
  }
}

// sums[kRows][16]. kWholeRow: x has one scale a row, and sums in int32 go on for a group of the weight.
template <bool kWholeRow, int kRows>
__attribute__((noinline)) void micro(const Panel& panel, int64_t blocks, int64_t blocks_per_group, const uint8_t* picked, const float* m, int64_t m_stride,
                                     float* sums) {
  __m512 total[kRows];
  __m512i sum[kRows];
  TAUT_FOR (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
  const int8_t* codes = panel.codes;
  for (int64_t block = 0, group = 0; block < blocks; group++) {
    const __m512 scale = _mm512_load_ps(panel.scales + group * 16);
    const int64_t end = block + blocks_per_group < blocks ? block + blocks_per_group : blocks;
    if (kWholeRow)
      TAUT_FOR (int r = 0; r < kRows; r++) sum[r] = _mm512_setzero_si512();
    __m512i start = _mm512_setzero_si512();
    for (; block < end; block++, codes += 256) {
      const uint8_t* x = picked + block / 4 * (kTile * 64) + block % 4 * 16;
      if (kWholeRow) start = _mm512_add_epi32(start, _mm512_load_si512(panel.starts + block * 16));
      else
        TAUT_FOR (int r = 0; r < kRows; r++) sum[r] = _mm512_load_si512(panel.starts + block * 16);
      TAUT_FOR (int c = 0; c < 4; c++) {
        const __m512i code = _mm512_load_si512(codes + c * 64);
        TAUT_FOR (int r = 0; r < kRows; r++) {
          // WHY asm: gcc would load and broadcast into registers that it then spills.
          __m512i four;
          asm volatile("vpbroadcastd %1,%0" : "=v"(four) : "m"(*reinterpret_cast<const int32_t*>(x + r * 64 + c * 4)));
          asm volatile("vpdpbusd %2,%1,%0" : "+v"(sum[r]) : "v"(four), "v"(code));
        }
      }
      if (!kWholeRow)
        TAUT_FOR (int r = 0; r < kRows; r++)
          total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), _mm512_mul_ps(scale, _mm512_set1_ps(m[r * m_stride + block])), total[r]);
    }
    if (kWholeRow)
      TAUT_FOR (int r = 0; r < kRows; r++) total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sum[r], start)), scale, total[r]);
  }
  TAUT_FOR (int r = 0; r < kRows; r++) _mm512_store_ps(sums + r * 16, kWholeRow ? _mm512_mul_ps(total[r], _mm512_set1_ps(32767.0f)) : total[r]);
}

template <bool kWholeRow, int... kRows>
void micro_rows(int rows, const Panel& panel, int64_t blocks, int64_t blocks_per_group, const uint8_t* picked, const float* m, int64_t m_stride, float* sums,
                std::integer_sequence<int, kRows...>) {
  using Micro = void (*)(const Panel&, int64_t, int64_t, const uint8_t*, const float*, int64_t, float*);
  static constexpr Micro kTable[] = {micro<kWholeRow, kRows + 1>...};
  kTable[rows - 1](panel, blocks, blocks_per_group, picked, m, m_stride, sums);
}

template <bool kInt4, bool kWholeRow>
void run_panels(const Params& p) {
  const Sparse8 w = p.sparse();
  const int64_t blocks = w.dense().num_blocks(), padded_k = (blocks + 3) / 4 * 128, m_stride = padded_k / 32;
  const int64_t pairs = (w.dense().num_strips() + 1) / 2, num_tasks = std::min(p.num_threads, pairs);
  const Quantized a(p, padded_k, 0);
  const int64_t quantizers = std::min(p.num_threads, p.M);
  parallel_tasks(quantizers, [&](int64_t task) {
    float* buffer = reinterpret_cast<float*>(scratch(1, padded_k * 4));
    for (int64_t r = p.M * task / quantizers; r < p.M * (task + 1) / quantizers; r++) a.row(p, r, padded_k, buffer, 0x80);
  });
  parallel_tasks(num_tasks, [&](int64_t task) {
    uint8_t* memory = scratch(1, Panel::bytes(blocks) + kTile * padded_k / 2 + 128);
    const Panel panel(memory, blocks);
    uint8_t* picked = memory + (Panel::bytes(blocks) + 63) / 64 * 64;
    std::memset(panel.shuffles, 0, (blocks + 3) / 4 * 128);
    const int64_t parts = (p.M + kXRows - 1) / kXRows;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t begin = p.M * part / parts / kTile * kTile, end = part + 1 == parts ? p.M : p.M * (part + 1) / parts / kTile * kTile;
      for (int64_t pair = pairs * task / num_tasks; pair < pairs * (task + 1) / num_tasks; pair++) {
        const int64_t strip = 2 * pair, far = strip + 1 < w.dense().num_strips() ? w.strip_bytes() : 0;
        unpack<kInt4>(w, p.packed + strip * w.strip_bytes(), far, panel);
        for (int64_t r = begin; r < end; r += kTile) {
          const int rows = static_cast<int>(std::min<int64_t>(kTile, end - r));
          for (int i = 0; i < rows; i++) prefetch_out(p, r + i, strip);
          for (int i = 0; i < rows; i++) pick(a.x + (r + i) * padded_k, padded_k, panel.shuffles, blocks, picked + i * 64);
          alignas(64) float sums[kTile * 16];
          micro_rows<kWholeRow>(rows, panel, blocks, w.dense().blocks_per_group(), picked, a.m + r * m_stride, m_stride, sums,
                                std::make_integer_sequence<int, kTile>());
          for (int i = 0; i < rows; i++) {
            store_any(p, r + i, strip, sums + i * 16, a.unit[r + i]);
            if (far) store_any(p, r + i, strip + 1, sums + i * 16 + 8, a.unit[r + i]);
          }
        }
      }
    }
  });
}

// ---- The same, for few rows of x: weights are unpacked in registers

// x has 128 added, as in the panels; what that is too much is the same for all rows of x.
struct Pair {
  static constexpr uint8_t kFlip = 0x80;
  template <bool kInt4, int kRows>
  static __attribute__((noinline)) void multiply(const Sparse8& w, const uint8_t* at, int64_t far, const uint8_t* x, int64_t x_stride, const float* m,
                                                 int64_t m_stride, float* sums) {
    constexpr int kCodeBytes = kInt4 ? 64 : 128, kBlockBytes = kCodeBytes + 8;
    constexpr int64_t kPrefetch = 2304;  // TRIED: to L2 alone, 1152 to 4608 bytes ahead: 5% to 20% slower
    const Rows8 dense = w.dense();
    const int64_t blocks_per_group = dense.blocks_per_group(), header_bytes = dense.header_bytes(), superblock_bytes = w.superblock_bytes();
    __m512 total[kRows];
    TAUT_FOR (int r = 0; r < kRows; r++) total[r] = _mm512_setzero_ps();
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
          TAUT_FOR (int r = 0; r < kRows; r++)
            _mm256_store_si256(reinterpret_cast<__m256i*>(picked[r]),
                               _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + r * x_stride + block * 32)), shuffle));
          __m512i sum[kRows], excess = _mm512_setzero_si512();
          TAUT_FOR (int r = 0; r < kRows; r++) sum[r] = _mm512_setzero_si512();
          TAUT_FOR (int c = 0; c < 4; c++) {
            const __m512i packed = Avx512Vnni::load(codes + (kInt4 ? c % 2 : c) * 32, far);
            const __m512i nibble_code = _mm512_and_si512(c < 2 ? packed : _mm512_srli_epi16(packed, 4), _mm512_set1_epi8(15));
            const __m512i code = _mm512_sub_epi8(kInt4 ? nibble_code : packed, _mm512_set1_epi8(static_cast<char>(kInt4 ? 8 : 128)));
            excess = _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(static_cast<char>(128)), code);
            TAUT_FOR (int r = 0; r < kRows; r++)
              sum[r] = _mm512_dpbusd_epi32(sum[r], _mm512_set1_epi32(load_as<int32_t>(picked[r] + c / 2 * 16 + c % 2 * 4)), code);
          }
          TAUT_FOR (int r = 0; r < kRows; r++) sum[r] = _mm512_sub_epi32(sum[r], excess);
          const __m512 scale = Avx512Vnni::from_fp16(at + g * 16, far);
          TAUT_FOR (int r = 0; r < kRows; r++)
            total[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r]), _mm512_mul_ps(scale, _mm512_set1_ps(m[r * m_stride + block])), total[r]);
        }
    }
    TAUT_FOR (int r = 0; r < kRows; r++) _mm512_store_ps(sums + r * 16, total[r]);
  }
};

}  // namespace

void run_vectors_small(const Params& p) { p.weight.format == Format::kInt4 ? run_pairs<Pair, true>(p) : run_pairs<Pair, false>(p); }

void run_tile(const Params& p) { run_codes<quant_linear::Avx512Vnni>(p); }
void run_rows(const Params& p) { run_places<Avx512Vnni>(p); }

void run_vectors(const Params& p) {
  const bool whole = p.activations == quant_linear::Activations::kInt8Row;
  if (p.weight.format == Format::kInt4) whole ? run_panels<true, true>(p) : run_panels<true, false>(p);
  else whole ? run_panels<false, true>(p) : run_panels<false, false>(p);
}

}  // namespace taut::sparse_linear::cpu_avx512vnni
