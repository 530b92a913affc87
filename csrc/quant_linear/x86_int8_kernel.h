// The int8 kernels of x86, written once: Int8Kernel<Isa> is the policy that the loops in cpu_loops.h run. An ISA is a Simd
// (x86_simd.h) and
//   kInt32       a sum is 32 bits (vpdpbusd), else 16 (vpmaddubsw, vpaddw)
//   kSmallRows   rows of x that share weights unpacked in registers
//   kTileRows, kTileVectors   rows of x and vectors of codes in a register tile;  kPanelBytes: of codes
//   X, at        what multiplies a vector of codes: 4 k of one row, broadcast
//   dot          sum += codes . x;   dot_from: sum = start + codes . x;   dot_first (16 bits): sum = codes . x
//
// A: per block of R rows, per 32 k: int8 [R][8 chunks][4], the starts of the sums [1 or 2][R], the multiples m [R].
//    16-bit sums: a start is int16x2, -zero * sum(a) over k % 4 in {0, 1} and {2, 3};  m is int16x2.
//    32-bit sums: a start is int32, -zero * sum(a);  m is fp32.        (zero = 1 where the weight has its own zero points.)
// B: panel u8 [k/32][pass][8 chunks][strips][32]; scales fp32 [k/32][scale][strips][8]; zeros int32 [k/32][strips][8].
#pragma once

#include <utility>

#include "quant_linear/x86_decode.h"
#include "quant_linear/x86_int8.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear {
namespace {

using Int8Formats = Formats<Format::kTernary, Format::kInt2, Format::kInt3, Format::kInt4, Format::kNf4, Format::kMxfp4, Format::kNvfp4, Format::kInt8>;

// The multiple m of a row and block: with 16-bit sums it does their widening, in integers; with 32-bit sums, which it could
// overflow, it goes to the weights' scales.
template <class Isa, bool kInt32 = Isa::kInt32>
struct Multiple {
  typename Isa::Bytes m;
  explicit TAUT_INLINE Multiple(const uint8_t* p) : m(Isa::broadcast4(p)) {}
  TAUT_INLINE typename Isa::Floats of_sum(typename Isa::Bytes sum) const { return Isa::from_int32(Isa::madd(sum, m)); }
  TAUT_INLINE typename Isa::Floats of_scale(typename Isa::Floats scale) const { return scale; }
};
template <class Isa>
struct Multiple<Isa, true> {
  typename Isa::Floats m;
  explicit TAUT_INLINE Multiple(const uint8_t* p) : m(Isa::splat_float(load_as<float>(p))) {}
  TAUT_INLINE typename Isa::Floats of_sum(typename Isa::Bytes sum) const { return Isa::from_int32(sum); }
  TAUT_INLINE typename Isa::Floats of_scale(typename Isa::Floats scale) const { return scale * m; }
};

template <class Isa>
struct Int8Kernel {
  using Bytes = typename Isa::Bytes;
  using Floats = typename Isa::Floats;
  template <Format kFormat>
  using Weight = Decode<Isa, kFormat>;

  // A byte that 16-bit sums would overflow with is taken in two passes of nibbles, 16 * high + low.
  template <Format kFormat>
  static constexpr int passes = Weight<kFormat>::kBytes && !Isa::kInt32 ? 2 : 1;
  template <Format kFormat>
  static constexpr int parts = passes<kFormat> * Weight<kFormat>::kScales;  // sums a block has: one a pass, or one a scale

  static constexpr int kSmallRows = Isa::kSmallRows, kTileRows = Isa::kTileRows, kPanelStrips = Isa::kTileVectors * Isa::kStrips;
  static constexpr int64_t kChunkRows = 516;  // 2.6 MB of A at K=4096
  static constexpr bool kOutliers = true;
  template <Format kFormat>
  static constexpr int row_block_bytes = 36 + 4 * Weight<kFormat>::kScales;
  template <Format kFormat>
  static constexpr int code_bytes = passes<kFormat>;  // of B
  template <Format kFormat>
  static constexpr int64_t panel_k = Isa::kPanelBytes / (kPanelStrips * 8) / passes<kFormat>;
  template <Format kFormat, int kRows>
  static constexpr int streams = Isa::kStrips > 1 || kRows == 1      ? 4
                                 : parts<kFormat> == 1 || kRows == 2 ? 2
                                                                     : 1;

  template <Format kFormat>
  static float factor(const Params& p) {
    return Weight<kFormat>::factor(Rows8{p.weight}, p.packed);
  }

  // Row r of a block of `rows`: codes, starts and multiples for all of K. Returns the row's unit.
  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params& p, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    constexpr int kScales = Weight<kFormat>::kScales;
    // Two nibble passes: 128 is 16 * 8 + 0, so the start of the high pass is -8 * sum(a), and of the low pass 0.
    constexpr int kZero = kZeros ? 1 : passes<kFormat> == 2 ? 8 : Weight<kFormat>::kZero;
    const int64_t block_stride = row_block_bytes<kFormat> * rows, to_next_panel = panel_stride - panel_k / 32 * block_stride;
    uint8_t* block = a - block_stride;
    int64_t left = panel_k;  // of the panel
    return quantize_row(x, padded_k, p.activations, [&](int64_t k, __m256i q, float multiple) {
      if (left == 0) block += to_next_panel, left = panel_k;
      block += block_stride, left -= 32;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(block + r * 32), q);
      const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), q);  // int16x2 a chunk: sums over k % 4 in {0, 1} and {2, 3}
      __m128i halves[2] = {_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)};
      if (kScales == 1) halves[0] = _mm_add_epi16(halves[0], halves[1]);
      TAUT_FOR (int i = 0; i < kScales; i++) {
        __m128i sum = _mm_add_epi16(halves[i], _mm_unpackhi_epi64(halves[i], halves[i]));
        sum = _mm_add_epi16(sum, _mm_shuffle_epi32(sum, 1));
        const __m128i minus_zero = _mm_set1_epi16(-kZero);
        const int32_t start = _mm_cvtsi128_si32(Isa::kInt32 ? _mm_madd_epi16(sum, minus_zero) : _mm_mullo_epi16(sum, minus_zero));
        std::memcpy(block + ((8 + i) * rows + r) * 4, &start, 4);
      }
      const int32_t m = static_cast<int32_t>(multiple), twice = m | m << 16;
      std::memcpy(block + ((8 + kScales) * rows + r) * 4, Isa::kInt32 ? static_cast<const void*>(&multiple) : &twice, 4);
    });
  }

  // A row's start for outputs with zero points of their own (as `zeros` loads them): -sum(a) * z. Both fit int16, so that with
  // 32-bit sums vpmaddwd of the low halves is the product.
  static TAUT_INLINE Bytes zeros(const uint8_t* p, int64_t far) {
    const Bytes z = Isa::widen(p, far);
    if constexpr (Isa::kInt32) return z;
    else return Isa::twice16(z);
  }
  static TAUT_INLINE Bytes times_zeros(Bytes start, Bytes zeros) { return Isa::kInt32 ? Isa::madd(start, zeros) : Isa::multiply16(start, zeros); }

  // sums[kStreams][kRows][8] = A[kRows, K] @ w[8 rows, K]^T for kStreams strips `stride` bytes apart.
  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    using W = Weight<kFormat>;
    constexpr int kVectors = (kStreams + Isa::kStrips - 1) / Isa::kStrips;  // two strips a vector: one alone is paired with itself (stride 0)
    constexpr int kPasses = passes<kFormat>, kParts = parts<kFormat>, kBlockBytes = W::kBlockBytes;
    constexpr bool kInRegisters = Isa::kStrips > 1 || (kParts == 1 && kRows * kVectors <= 4);
    // Ahead in each stream, to L2: a line on its way to L1 takes one of that cache's two dozen misses until it is there. Against the hardware's
    // prefetchers alone: int4 17.5 -> 26 GB/s a core, int2 13 -> 18. Against 2304 bytes ahead to L1 (Zen 4, weights from DRAM): M=1 4% to 12%
    // faster, at what plain reads reach; M=4 8% to 35%, AVX2's 1% to 8%. Half as far is 3% to 30% slower, twice as far 5% to 10%.
    constexpr int64_t kPrefetch = 4608 / kStreams;
    const int64_t apart = Isa::kStrips * stride;  // from a vector to the next
    Floats total[kVectors][kRows];
    TAUT_FOR (int i = 0; i < kVectors; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = Isa::zero();
    if (!kInRegisters) std::memset(sums, 0, kStreams * kRows * 32);
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * kBlockBytes;
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      // Where the distance is a whole number of superblocks, no block's prefetch meets a header.
      TAUT_FOR (int i = 0; i < kStreams; i++) _mm_prefetch(reinterpret_cast<const char*>(w + i * stride + kPrefetch), _MM_HINT_T1);
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += row_block_bytes<kFormat> * kRows, codes += kBlockBytes) {
          const uint8_t *scales = w + g * W::kScaleBytes, *zero_points = w + 4 * W::kScaleBytes + g * 8;
          TAUT_FOR (int i = 0; i < kStreams; i++)
            TAUT_FOR (int line = 0; line < kBlockBytes; line += 64)
              _mm_prefetch(reinterpret_cast<const char*>(codes + i * stride + kPrefetch + line), _MM_HINT_T1);
          Bytes sum[kParts][kVectors][kRows], start[kParts];
          // codes of chunk `chunk`, vector i, into the sum of row r; i = 0 comes first
          const auto multiply = [&](int chunk, int part, int i, int r, Bytes code, typename Isa::X x) __attribute__((always_inline)) {
            Bytes& to = sum[part][i][r];
            if constexpr (kPasses == 2) {
              if (chunk == 0 && part == 1) return Isa::dot_first(to, code, x);  // low nibbles start at 0
            }
            if (chunk % (8 / W::kScales) != 0) return Isa::dot(to, code, x);
            if (i == 0) start[part] = Isa::broadcast4(a + ((8 + part) * kRows + r) * 4);
            Isa::dot_from(to, kZeros ? times_zeros(start[part], zeros(zero_points + i * apart, stride)) : start[part], code, x);
          };
          const auto part_of = [&](int chunk, int pass) { return W::kScales == 2 ? chunk / 4 : pass; };
          TAUT_FOR (int c = 0; c < W::kSteps; c++) {
            if constexpr (kRows == 1) {  // vector by vector: one step's broadcasts and one vector's codes are alive
              typename Isa::X x[W::kHalves];
              TAUT_FOR (int half = 0; half < W::kHalves; half++) x[half] = Isa::at(a + (c + 4 * half) * 4);
              TAUT_FOR (int i = 0; i < kVectors; i++) {
                const Bytes packed = W::load(codes + i * apart, stride, c);
                TAUT_FOR (int half = 0; half < W::kHalves; half++)
                  TAUT_FOR (int pass = 0; pass < kPasses; pass++)
                    multiply(c + 4 * half, part_of(c + 4 * half, pass), i, 0, kPasses == 2 ? W::code_pass(packed, half, pass) : W::code(packed, half), x[half]);
              }
            } else {
              Bytes packed[kVectors];
              TAUT_FOR (int i = 0; i < kVectors; i++) packed[i] = W::load(codes + i * apart, stride, c);
              TAUT_FOR (int half = 0; half < W::kHalves; half++) {
                const int chunk = c + 4 * half;
                Bytes code[kPasses][kVectors];
                TAUT_FOR (int i = 0; i < kVectors; i++)
                  TAUT_FOR (int pass = 0; pass < kPasses; pass++) code[pass][i] = kPasses == 2 ? W::code_pass(packed[i], half, pass) : W::code(packed[i], half);
                TAUT_FOR (int r = 0; r < kRows; r++) {
                  const typename Isa::X x = Isa::at(a + (r * 8 + chunk) * 4);
                  TAUT_FOR (int i = 0; i < kVectors; i++)
                    TAUT_FOR (int pass = 0; pass < kPasses; pass++) multiply(chunk, part_of(chunk, pass), i, r, code[pass][i], x);
                }
              }
            }
          }
          Floats scale[kVectors][W::kScales];
          if (kRows > 1)
            TAUT_FOR (int i = 0; i < kVectors; i++) W::load_int8_scales(scales + i * apart, stride, scale[i]);
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const Multiple<Isa> m(a + ((8 + W::kScales) * kRows + r) * 4);
            TAUT_FOR (int i = 0; i < kVectors; i++) {
              if (kRows == 1) W::load_int8_scales(scales + i * apart, stride, scale[i]);
              TAUT_FOR (int h = 0; h < W::kScales; h++) {
                Floats value = m.of_sum(sum[h][i][r]);
                if constexpr (kPasses == 2) value = Isa::fma(value, Isa::splat_float(16.0f), m.of_sum(sum[1][i][r]));
                if constexpr (kInRegisters) total[i][r] = Isa::fma(value, m.of_scale(scale[i][h]), total[i][r]);
                else Isa::accumulate(sums + (i * kRows + r) * 8, value, m.of_scale(scale[i][h]));
              }
            }
          }
        }
    }
    if (kInRegisters)
      TAUT_FOR (int i = 0; i < kVectors; i++)
        TAUT_FOR (int r = 0; r < kRows; r++) Isa::store_strips(sums + (i * Isa::kStrips * kRows + r) * 8, kStreams > 1 ? kRows * 8 : 0, total[i][r]);
  }

  // k-blocks [block0, block0 + k_blocks) of one strip, to its place in the panel; where a vector holds two strips, of both, when
  // asked for the first (the last strip of an odd number is paired with itself).
  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int place, PanelT& panel) {
    using W = Weight<kFormat>;
    if (place % Isa::kStrips != 0) return;
    constexpr int kPasses = passes<kFormat>;
    constexpr int64_t kRow = kPanelStrips * 32;
    const int64_t far = strip + 1 < s.layout.num_strips() ? s.strip_bytes : 0;
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next()) {
      Floats scale[W::kScales];
      W::load_int8_scales(at.scales(), far, scale);
      TAUT_FOR (int h = 0; h < W::kScales; h++) Isa::store_floats(panel.scales + ((b * W::kScales + h) * kPanelStrips + place) * 8, scale[h]);
      if (kZeros) *reinterpret_cast<Bytes*>(panel.zeros + (b * kPanelStrips + place) * 8) = zeros(at.zeros(), far);
      uint8_t* out = panel.codes + b * kPasses * 8 * kRow + place * 32;
      TAUT_FOR (int c = 0; c < W::kSteps; c++) {
        const Bytes packed = W::load(at.codes, far, c);
        TAUT_FOR (int half = 0; half < W::kHalves; half++)
          TAUT_FOR (int pass = 0; pass < kPasses; pass++)
            *reinterpret_cast<Bytes*>(out + (pass * 8 + c + 4 * half) * kRow) = kPasses == 2 ? W::code_pass(packed, half, pass) : W::code(packed, half);
      }
    }
  }

  // c[kRows][kPanelStrips][8] += A[kRows, 32 * k_blocks] @ panel.  Pointers are biased by 128, so that nearly every displacement is one
  // byte: shorter code, better op-cache packing.
  template <bool kZeros, int kPasses, int kScales, int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const uint8_t* codes, const float* scales, const int32_t* zeros, int64_t k_blocks, float* c) {
    constexpr int kVectors = kPanelStrips / Isa::kStrips, kRow = kPanelStrips * 32, kWidth = Isa::kStrips * 8;  // outputs of a vector
    constexpr bool kInRegisters = Isa::kStrips > 1;
    constexpr int kParts = kPasses * kScales, kChunks = 8 / kScales;  // of a part
    constexpr int kRowBlockBytes = 36 + 4 * kScales;
    a += 128, codes += 128;
    char* tile = reinterpret_cast<char*>(c) + 128;
    Floats total[kRows][kVectors], high[kRows][kVectors];
    if (kInRegisters)
      TAUT_FOR (int r = 0; r < kRows; r++)
        TAUT_FOR (int i = 0; i < kVectors; i++) total[r][i] = Isa::load_floats(c + (r * kVectors + i) * kWidth);
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows, zeros += kPanelStrips * 8)
      TAUT_FOR (int part = 0; part < kParts; part++) {
        const bool low_nibbles = kPasses == 2 && part == 1;
        Bytes sum[kRows][kVectors];
        const uint8_t *codes0 = codes, *codes1 = codes + 4 * kRow;
        if (!kInRegisters) asm("" : "+r"(a), "+r"(codes0), "+r"(codes1), "+r"(tile));
        TAUT_FOR (int chunk = 0; chunk < kChunks; chunk++) {
          Bytes code[kVectors];
          TAUT_FOR (int i = 0; i < kVectors; i++) code[i] = Isa::load_bytes((chunk < 4 ? codes0 : codes1) + (chunk & 3) * kRow + i * kWidth * 4 - 128);
          TAUT_FOR (int r = 0; r < kRows; r++) {
            const Bytes start = chunk == 0 && !low_nibbles ? Isa::broadcast4(a + ((8 + part) * kRows + r) * 4 - 128) : Bytes();
            if (chunk == 0 && kZeros)
              TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = times_zeros(start, *reinterpret_cast<const Bytes*>(zeros + i * kWidth));
            const typename Isa::X x = Isa::at(a + (r * 8 + (kScales == 2 ? part * 4 + chunk : chunk)) * 4 - 128);
            TAUT_FOR (int i = 0; i < kVectors; i++) {
              if (chunk != 0 || kZeros) Isa::dot(sum[r][i], code[i], x);
              else if (!low_nibbles) Isa::dot_from(sum[r][i], start, code[i], x);
              else if constexpr (kPasses == 2) Isa::dot_first(sum[r][i], code[i], x);
            }
          }
        }
        codes += kChunks * kRow;
        // The high nibbles wait in memory, to be added to the low ones before the total: one rounding less, and the same work.
        const bool high_nibbles = kPasses == 2 && part == 0;
        Floats scale[kVectors];
        TAUT_FOR (int i = 0; i < kVectors; i++) scale[i] = Isa::load_floats(scales + i * kWidth);
        if (!high_nibbles) scales += kPanelStrips * 8;
        TAUT_FOR (int r = 0; r < kRows; r++) {
          const Multiple<Isa> m(a + ((8 + kScales) * kRows + r) * 4 - 128);
          TAUT_FOR (int i = 0; i < kVectors; i++) {
            Floats value = m.of_sum(sum[r][i]);
            if (high_nibbles) {
              asm volatile("vmovaps %1,%0" : "=m"(high[r][i]) : "v"(value));
              continue;
            }
            if (low_nibbles) value = Isa::fma(high[r][i], Isa::splat_float(16.0f), value);
            const Floats times = m.of_scale(scale[i]);
            if constexpr (kInRegisters) total[r][i] = Isa::fma(value, times, total[r][i]);
            else Isa::accumulate(reinterpret_cast<float*>(tile + (r * kVectors + i) * kWidth * 4 - 128), value, times);
          }
        }
      }
    if (kInRegisters)
      TAUT_FOR (int r = 0; r < kRows; r++)
        TAUT_FOR (int i = 0; i < kVectors; i++) Isa::store_floats(c + (r * kVectors + i) * kWidth, total[r][i]);
  }

  // c[rows][kPanelStrips][8] += A[rows, 32 * k_blocks] @ panel.
  template <bool kZeros, Format kFormat, class PanelT>
  static void micro_rows(int rows, const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    using Micro = void (*)(const uint8_t*, const uint8_t*, const float*, const int32_t*, int64_t, float*);
    static constexpr auto kTable = []<int... r>(std::integer_sequence<int, r...>) {
      struct {
        Micro run[sizeof...(r)];
      } table{{micro<kZeros, passes<kFormat>, Weight<kFormat>::kScales, r + 1>...}};
      return table;
    }(std::make_integer_sequence<int, kTileRows>());
    kTable.run[rows - 1](a, panel.codes, panel.scales, panel.zeros, k_blocks, c);
  }
};

template <class Isa>
void run_int8_small(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { small_loop<Int8Kernel<Isa>, kZeros, kFormat>(p); });
}
template <class Isa>
void run_int8_tile(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { tile_loop<Int8Kernel<Isa>, kZeros, kFormat>(p); });
}

}  // namespace
}  // namespace taut::quant_linear
