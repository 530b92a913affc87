// Sparse weights of 16 bits on x86: the loops that the ISAs share. An ISA is a Simd (quant_linear/x86_simd.h) and
//   kTileRows      of x in a register tile of 16 outputs
//   number<kBf16>  16-bit numbers of the rows of w in a vector, as fp32
//   pick4, pick8   from 4 or 8 floats in memory, for each lane the one that the low bits of its field say
//
//   small  A: blocks of R rows of x as fp32, [K / u][R][u]: u = m where each row of w has places of its own and takes its x out of m neighbours,
//          u = 1 where rows share them and x is broadcast.
//   tile   FloatKernel of quant_linear/x86_float_kernel.h, with a panel that is unpacked here: dense, zeros written out.
#pragma once

#include "quant_linear/x86_float_kernel.h"
#include "sparse_linear/op.h"
#include "sparse_linear/x86_pattern.h"

namespace taut::sparse_linear {
namespace {

using quant_linear::load_as;
using quant_linear::load_row;
using quant_linear::Simd256;

// A pattern at compile time, and its k-block in Sparse8.
template <int n_, int m_, bool kShared_>
struct Shape {
  static constexpr int n = n_, m = m_;
  static constexpr bool kShared = kShared_;
  static constexpr int kKept = 32 / m * n, kFieldBits = m == 4 ? 2 : 4, kCodeBytes = kKept * 16;
  static constexpr int kPlaceBytes = kShared ? kKept / 2 : (kKept / 4 * kFieldBits + 7) / 8 * 32, kBlockBytes = kCodeBytes + kPlaceBytes;
  // Of rows with places of their own: the vector that holds the field of kept number j, and the field's lowest bit in a lane of 32.
  static constexpr int vector_of(int j) { return j / 4 * kFieldBits / 8; }
  static constexpr int shift_of(int j) { return j % 4 * 8 + j / 4 * kFieldBits % 8; }
  // Of rows that share them: the places of all kept numbers, a nibble each; that of j within its m.
  static TAUT_INLINE uint64_t nibbles(const uint8_t* places) {
    if constexpr (kKept == 16) return load_as<uint64_t>(places);
    else return load_as<uint32_t>(places);
  }
  static TAUT_INLINE int64_t place(uint64_t nibbles, int j) { return static_cast<int64_t>(nibbles >> 4 * j & (m - 1)); }
};

template <class F>
void with_shape(const SparsePattern& pattern, const F& f) {
  with_pattern(pattern, [&]<int n, int m, bool kShared>() { f.template operator()<Shape<n, m, kShared>>(); });
}

template <bool kBf16>
TAUT_INLINE __m256 load8_numbers(const uint8_t* p) {
  const auto* numbers = reinterpret_cast<const uint16_t*>(p);
  return kBf16 ? quant_linear::load8_bf16(numbers) : quant_linear::load8_fp16(numbers);
}

// ---- Few rows of x

constexpr int kSumBlocks = 8;  // 256 k are summed in registers, then added to the totals: an error that grows with the k of a part, and with the parts

// totals[kVectors * Isa::kStrips strips][kRows][8] of vectors `apart` bytes from one to the next, each of strips `far` bytes apart.
template <class Isa, class Shape, bool kBf16, int kRows, int kVectors>
__attribute__((noinline)) void multiply_numbers(const uint8_t* at, int64_t far, int64_t apart, int64_t num_blocks, const float* x, float* totals) {
  using Bytes = typename Isa::Bytes;
  using Floats = typename Isa::Floats;
  constexpr int64_t kPrefetch = 4608 / (kVectors * Isa::kStrips);  // ahead in each stream, to L2, as in quant_linear/x86_int8_kernel.h
  constexpr int kFields = Shape::kShared ? 1 : Shape::kPlaceBytes / 32;
  Floats total[kVectors][kRows];
  TAUT_FOR (int i = 0; i < kVectors; i++)
    TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = Isa::zero();
  for (int64_t left = num_blocks; left > 0; left -= kSumBlocks) {
    Floats sum[kVectors][kRows];
    TAUT_FOR (int i = 0; i < kVectors; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) sum[i][r] = Isa::zero();
    for (int64_t block = std::min<int64_t>(left, kSumBlocks); block > 0; block--, at += Shape::kBlockBytes, x += 32 * kRows) {
      TAUT_FOR (int i = 0; i < kVectors * Isa::kStrips; i++)
        TAUT_FOR (int line = 0; line < Shape::kBlockBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(at + i / Isa::kStrips * apart + i % Isa::kStrips * far + kPrefetch + line), _MM_HINT_T1);
      const uint8_t* places = at + Shape::kCodeBytes;
      Bytes fields[kVectors][kFields];
      uint64_t nibbles[kVectors];
      TAUT_FOR (int i = 0; i < kVectors; i++) {
        if constexpr (Shape::kShared) nibbles[i] = Shape::nibbles(places + i * apart);
        else
          TAUT_FOR (int f = 0; f < kFields; f++) fields[i][f] = Isa::load(places + i * apart + f * 32, far);
      }
      TAUT_FOR (int j = 0; j < Shape::kKept; j++)
        TAUT_FOR (int i = 0; i < kVectors; i++) {
          const Floats number = Isa::template number<kBf16>(at + i * apart + j * 16, far);
          if constexpr (Shape::kShared) {
            const float* picked = x + (j / Shape::n * Shape::m + Shape::place(nibbles[i], j)) * kRows;
            TAUT_FOR (int r = 0; r < kRows; r++) sum[i][r] = Isa::fma(number, Isa::splat_float(picked[r]), sum[i][r]);
          } else {
            const auto lanes = reinterpret_cast<Bytes>(reinterpret_cast<quant_linear::Uint32s<Isa>>(fields[i][Shape::vector_of(j)]) >> Shape::shift_of(j));
            TAUT_FOR (int r = 0; r < kRows; r++) {
              const float* of = x + (j / Shape::n * kRows + r) * Shape::m;
              sum[i][r] = Isa::fma(number, Shape::m == 4 ? Isa::pick4(of, lanes) : Isa::pick8(of, lanes), sum[i][r]);
            }
          }
        }
    }
    TAUT_FOR (int i = 0; i < kVectors; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = total[i][r] + sum[i][r];
  }
  TAUT_FOR (int i = 0; i < kVectors; i++)
    TAUT_FOR (int r = 0; r < kRows; r++) Isa::store_strips(totals + (i * Isa::kStrips * kRows + r) * 8, far ? kRows * 8 : 0, total[i][r]);
}

// Calls f.template operator()<R>() for blocks of R rows that make up `rows`: as many as fit in the registers, then 4, 2 and 1.
template <class Shape, class F>
TAUT_INLINE void for_row_blocks(int64_t rows, const F& f) {
  for (; Shape::kShared && rows >= 8; rows -= 8) f.template operator()<8>();
  for (; rows >= 4; rows -= 4) f.template operator()<4>();
  if (rows >= 2) f.template operator()<2>(), rows -= 2;
  if (rows == 1) f.template operator()<1>();
}

template <class Isa, class Shape, bool kBf16>
void run_numbers_small(const Params& p) {
  constexpr int kUnit = Shape::kShared ? 1 : Shape::m;
  // That stay in the L2 cache for K = 4096, while w, of which a pair of strips is 64 KB, goes by. Beyond, w is read again.
  constexpr int64_t kChunkRows = 32;
  constexpr int64_t kStripsAtOnce = 4;
  constexpr int64_t kNeighbours = Shape::kShared ? Isa::kStrips : 1;  // strips that go together, since their rows share places
  const Sparse8 w = p.sparse();
  const int64_t strips = w.dense().num_strips(), blocks = w.dense().num_blocks(), padded_k = blocks * 32, strip_bytes = w.strip_bytes();
  const int64_t units = (strips + Isa::kStrips - 1) / Isa::kStrips, num_tasks = std::min(p.num_threads, units), most = std::min(p.M, kChunkRows);
  parallel_tasks(num_tasks, [&](int64_t task) {
    // WHY every thread prepares x for itself: for few rows that is cheaper than a barrier.
    float* x = reinterpret_cast<float*>(scratch(1, (most + 1) * padded_k * static_cast<int64_t>(sizeof(float))));
    float* buffer = x + most * padded_k;
    const int64_t first = units * task / num_tasks * Isa::kStrips, end = std::min(strips, units * (task + 1) / num_tasks * Isa::kStrips);
    for (int64_t m0 = 0; m0 < p.M; m0 += kChunkRows) {
      const int64_t rows = std::min(kChunkRows, p.M - m0);
      int64_t r = 0;
      for_row_blocks<Shape>(rows, [&]<int kRows>() {
        float* block = x + r * padded_k;
        for (int i = 0; i < kRows; i++, r++) {
          const float* row = load_row(p, m0 + r, padded_k, buffer);
          for (int64_t k = 0; k < padded_k; k += kUnit)
            for (int u = 0; u < kUnit; u++) block[k * kRows + i * kUnit + u] = row[k + u];
        }
      });
      // `count` streams, of neighbours by kNeighbours, from a strip on, and `every` strips from one to the next: all rows.
      const auto multiply = [&](int64_t strip, int64_t every, int64_t count) {
        const auto number_of = [&](int64_t stream) { return strip + stream / kNeighbours * every + stream % kNeighbours; };
        int64_t r = 0;
        for_row_blocks<Shape>(rows, [&]<int kRows>() {
          // Enough sums for the latency of an fma, and few enough for the registers.
          constexpr int kMost = kRows == 8 ? 1 : kRows == 1 ? 4 : 2;
          constexpr int kVectors = kMost > kStripsAtOnce / Isa::kStrips ? kStripsAtOnce / Isa::kStrips : kMost, kAtOnce = kVectors * Isa::kStrips;
          alignas(64) float totals[kAtOnce * kRows * 8];
          const auto store = [&](int64_t begin, int64_t made) {
            for (int64_t s = 0; s < made; s++)
              for (int i = 0; i < kRows; i++) quant_linear::store_strip(p, m0 + r + i, number_of(begin + s), totals + (s * kRows + i) * 8, 1.0f);
          };
          const int64_t far = Isa::kStrips == 1 ? 0 : number_of(1) - strip, apart = number_of(Isa::kStrips) - strip;
          int64_t done = 0;
          for (; done + kAtOnce <= count; done += kAtOnce) {
            multiply_numbers<Isa, Shape, kBf16, kRows, kVectors>(p.packed + number_of(done) * strip_bytes, far * strip_bytes, apart * strip_bytes, blocks,
                                                                 x + r * padded_k, totals);
            store(done, kAtOnce);
          }
          for (; done < count; done += Isa::kStrips) {  // a strip alone is paired with itself
            const int64_t made = std::min<int64_t>(Isa::kStrips, count - done);
            multiply_numbers<Isa, Shape, kBf16, kRows, 1>(p.packed + number_of(done) * strip_bytes, made > 1 ? far * strip_bytes : 0, 0, blocks,
                                                          x + r * padded_k, totals);
            store(done, made);
          }
          r += kRows;
        });
      };
      // Streams over strips that follow one another, as in x86_places.h
      const int64_t per_stream = (end - first) / kStripsAtOnce * kNeighbours, rest = first + per_stream / kNeighbours * kStripsAtOnce;
      for (int64_t i = 0; i < per_stream; i += kNeighbours) multiply(first + i, per_stream, kStripsAtOnce);
      for (int64_t strip = rest; strip < end; strip += kNeighbours) multiply(strip, kNeighbours, std::min(kNeighbours, end - strip));
    }
  });
}

template <class Isa>
void run_small_numbers(const Params& p) {
  with_shape(p.pattern, [&]<class Shape>() {
    if (p.weight.format == Format::kBf16) run_numbers_small<Isa, Shape, true>(p);
    else run_numbers_small<Isa, Shape, false>(p);
  });
}

// ---- Many

// A k-block of a strip as numbers, zeros written out: 8 outputs every kStride floats.
template <class Shape, bool kBf16, int kStride>
TAUT_INLINE void expand_numbers(const uint8_t* at, float* out /* [32][kStride] */) {
  const uint8_t* places = at + Shape::kCodeBytes;
  if constexpr (Shape::kShared) {
    TAUT_FOR (int k = 0; k < 32; k++) _mm256_store_ps(out + k * kStride, _mm256_setzero_ps());
    const uint64_t nibbles = Shape::nibbles(places);
    TAUT_FOR (int j = 0; j < Shape::kKept; j++)
      _mm256_store_ps(out + (j / Shape::n * Shape::m + Shape::place(nibbles, j)) * kStride, load8_numbers<kBf16>(at + j * 16));
  } else {
    TAUT_FOR (int b = 0; b < 32 / Shape::m; b++) {
      __m256 number[Shape::n];
      __m256i place[Shape::n];
      TAUT_FOR (int i = 0; i < Shape::n; i++) {
        const int j = b * Shape::n + i;
        number[i] = load8_numbers<kBf16>(at + j * 16);
        const __m256i fields = _mm256_srli_epi32(Simd256::load(places + Shape::vector_of(j) * 32, 0), Shape::shift_of(j));
        place[i] = _mm256_and_si256(fields, _mm256_set1_epi32(Shape::m - 1));
      }
      TAUT_FOR (int k = 0; k < Shape::m; k++) {
        __m256 found = _mm256_setzero_ps();
        TAUT_FOR (int i = 0; i < Shape::n; i++) {
          if (k < i || k > Shape::m - Shape::n + i) continue;  // places ascend, so the i-th is none of these; and in padding all are 0
          found = _mm256_or_ps(found, _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(place[i], _mm256_set1_epi32(k))), number[i]));
        }
        _mm256_store_ps(out + (b * Shape::m + k) * kStride, found);
      }
    }
  }
}

template <class Isa>
struct NumbersKernel : quant_linear::FloatKernel<Isa> {
  template <Format>
  static float factor(const Params&) {
    return 1.0f;
  }
  template <bool, Format kFormat, class PanelT>
  static void unpack(const quant_linear::Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int half, PanelT& panel) {
    constexpr int kStride = quant_linear::kPanelStrips * 8;
    with_shape(s.pattern, [&]<class Shape>() {
      const uint8_t* at = s.data + strip * s.strip_bytes + block0 * Shape::kBlockBytes;
      float* out = reinterpret_cast<float*>(panel.codes) + half * 8;
      for (int64_t b = 0; b < k_blocks; b++, at += Shape::kBlockBytes, out += 32 * kStride) expand_numbers<Shape, kFormat == Format::kBf16, kStride>(at, out);
    });
  }
};

template <class Isa>
void run_tile_numbers(const Params& p) {
  using Formats = quant_linear::Formats<Format::kFp16, Format::kBf16>;
  quant_linear::for_format(p.weight, Formats(), [&]<bool kZeros, Format kFormat>() { quant_linear::tile_loop<NumbersKernel<Isa>, kZeros, kFormat>(p); });
}

}  // namespace
}  // namespace taut::sparse_linear
