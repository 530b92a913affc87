// Sparse weights on x86: the loops for few rows of x that the ISAs share. For 2:4 weights with places of their own in each row an ISA
// is a Simd (quant_linear/x86_simd.h) and
//   places<c>      of chunk c, what a byte shuffle of 8 k of x wants, from a vector of fields
//   Sum, multiply  a sum in int32 of (code - zero) * x over 4 kept numbers of each row;  to_float
//   kVectors<R>    vectors of codes at once, for R rows of x
//
// A: x quantized to int8, [rows][padded_k], and the multiples m [rows][blocks] (op.h of quant_linear).
#pragma once

#include <utility>

#include "quant_linear/x86_int8.h"
#include "sparse_linear/op.h"

namespace taut::sparse_linear {
namespace {

using quant_linear::load_as;
using quant_linear::load_row;
using quant_linear::store_strip;

constexpr int kMostRows = 4;  // of x that share unpacked codes and places

inline void store_any(const Params& p, int64_t m, int64_t strip, const float* sums, float unit) {
  for_dtype(p.dtype, [&]<DType kDType>() { store_strip<kDType>(p, m, strip, sums, unit); });
}

// sums[strips][kRows][8] for kVectors vectors `apart` bytes from one to the next, each of strips `far` bytes apart.
template <class Isa, bool kInt4, int kRows, int kVectors>
__attribute__((noinline)) void multiply_strips(const Sparse8& w, const uint8_t* at, int64_t far, int64_t apart, const uint8_t* x, int64_t x_stride,
                                               const float* m, int64_t m_stride, float* sums) {
  using Bytes = typename Isa::Bytes;
  using Floats = typename Isa::Floats;
  constexpr int kCodeBytes = kInt4 ? 64 : 128, kBlockBytes = kCodeBytes + 32;
  constexpr int64_t kPrefetch = 4608 / (kVectors * Isa::kStrips);  // ahead in each stream, to L2, as in quant_linear/x86_int8_kernel.h
  const Rows8 dense = w.dense();
  const int64_t blocks_per_group = dense.blocks_per_group(), header_bytes = dense.header_bytes(), superblock_bytes = w.superblock_bytes();
  const Bytes zero = Isa::splat(kInt4 ? 8 : 128);
  Floats total[kVectors][kRows];
  TAUT_FOR (int i = 0; i < kVectors; i++)
    TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = Isa::zero();
  for (int64_t left = dense.num_blocks(), block = 0; left > 0; at += superblock_bytes) {
    TAUT_FOR (int i = 0; i < kVectors * Isa::kStrips; i++)
      _mm_prefetch(reinterpret_cast<const char*>(at + i / Isa::kStrips * apart + i % Isa::kStrips * far + kPrefetch), _MM_HINT_T1);
    const uint8_t* codes = at + header_bytes;
    for (int g = 0; g < 4 && left > 0; g++)
      for (int64_t b = 0; b < blocks_per_group && left > 0; b++, left--, block++, codes += kBlockBytes) {
        TAUT_FOR (int i = 0; i < kVectors * Isa::kStrips; i++)
          TAUT_FOR (int line = 0; line < kBlockBytes; line += 64)
            _mm_prefetch(reinterpret_cast<const char*>(codes + i / Isa::kStrips * apart + i % Isa::kStrips * far + kPrefetch + line), _MM_HINT_T1);
        TAUT_FOR (int i = 0; i < kVectors; i++) {
          const uint8_t* p = codes + i * apart;
          typename Isa::Sum sum[kRows] = {};
          const Bytes fields = Isa::load(p + kCodeBytes, far);
          Bytes packed[kInt4 ? 2 : 1];
          if constexpr (kInt4) packed[0] = Isa::load(p, far), packed[1] = Isa::load(p + 32, far);
          const auto chunk = [&]<int c>() __attribute__((always_inline)) {
            const Bytes places = Isa::template places<c>(fields);
            Bytes code;
            if constexpr (kInt4) code = (c < 2 ? packed[c % 2] : Isa::right(packed[c % 2], 4)) & Isa::splat(15);
            else code = Isa::load(p + 32 * c, far);
            TAUT_FOR (int r = 0; r < kRows; r++)
              Isa::multiply(sum[r], code, Isa::look_up(Isa::broadcast8(x + r * x_stride + block * 32 + 8 * c), places), zero);
          };
          chunk.template operator()<0>(), chunk.template operator()<1>(), chunk.template operator()<2>(), chunk.template operator()<3>();
          const Floats scale = Isa::from_fp16(at + g * 16 + i * apart, far);
          TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = Isa::fma(Isa::to_float(sum[r]), scale * Isa::splat_float(m[r * m_stride + block]), total[i][r]);
        }
      }
  }
  TAUT_FOR (int i = 0; i < kVectors; i++)
    TAUT_FOR (int r = 0; r < kRows; r++) Isa::store_strips(sums + (i * Isa::kStrips * kRows + r) * 8, far ? kRows * 8 : 0, total[i][r]);
}

template <class Isa, bool kInt4, int kRows>
void multiply_rows(const Params& p, const Sparse8& w, int64_t first, int64_t end, int64_t row, const uint8_t* x, int64_t padded_k, const float* m,
                   int64_t blocks, const float* unit) {
  constexpr int kVectors = Isa::template kVectors<kRows>, kAtOnce = kVectors * Isa::kStrips;
  alignas(64) float sums[kAtOnce * kRows * 8];
  const int64_t bytes = w.strip_bytes();
  const auto store = [&](int64_t strip, const float* of_strip) {
    for (int r = 0; r < kRows; r++) store_any(p, row + r, strip, of_strip + r * 8, unit[r]);
  };
  // Streams over strips that follow one another. WHY: what is asked for ahead, past the end of a strip, is then the beginning of the stream's next. With
  // the strips of a step side by side instead, which ask for each other's beginnings: M=1 about 0.8 of the speed (Zen 4).
  const int64_t per_stream = (end - first) / kAtOnce, apart = per_stream * bytes;
  for (int64_t strip = first; strip < first + per_stream; strip++) {
    multiply_strips<Isa, kInt4, kRows, kVectors>(w, p.packed + strip * bytes, Isa::kStrips > 1 ? apart : 0, Isa::kStrips * apart, x, padded_k, m, blocks, sums);
    for (int i = 0; i < kAtOnce; i++) store(strip + i * per_stream, sums + i * kRows * 8);
  }
  for (int64_t strip = first + per_stream * kAtOnce; strip < end; strip++) {
    multiply_strips<Isa, kInt4, kRows, 1>(w, p.packed + strip * bytes, 0, 0, x, padded_k, m, blocks, sums);
    store(strip, sums);
  }
}

// x, quantized: codes [M][padded_k], multiples [M][blocks], units [M], for the task itself. Gives where the codes begin.
struct Quantized {
  uint8_t* x;
  float *m, *unit;
  Quantized(const Params& p, int64_t padded_k, int slot) {
    const int64_t blocks = padded_k / 32;
    uint8_t* memory = scratch(slot, p.M * (padded_k + blocks * 4 + 4) + padded_k * 4 + 256);
    x = memory, m = reinterpret_cast<float*>(memory + p.M * padded_k), unit = m + p.M * blocks;
  }
  void row(const Params& p, int64_t r, int64_t padded_k, float* buffer, uint8_t flip) const {
    const int64_t blocks = padded_k / 32;
    const __m256i bits = _mm256_set1_epi8(static_cast<char>(flip));
    unit[r] = quant_linear::quantize_row(load_row(p, r, padded_k, buffer), padded_k, p.activations, [&](int64_t k, __m256i q, float multiple) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(x + r * padded_k + k), _mm256_xor_si256(q, bits));
      m[r * blocks + k / 32] = multiple;
    });
  }
};

template <class Isa, bool kInt4>
void run_rows_of(const Params& p) {
  const Sparse8 w = p.sparse();
  const int64_t strips = w.dense().num_strips(), blocks = w.dense().num_blocks(), padded_k = blocks * 32, num_tasks = std::min(p.num_threads, strips);
  parallel_tasks(num_tasks, [&](int64_t task) {
    // WHY every thread quantizes x for itself: for few rows that is cheaper than a barrier.
    const Quantized a(p, padded_k, 1);
    float* buffer = a.unit + p.M;
    for (int64_t r = 0; r < p.M; r++) a.row(p, r, padded_k, buffer, 0);
    const int64_t first = strips * task / num_tasks, end = strips * (task + 1) / num_tasks;
    for (int64_t r = 0; r < p.M;) {
      const auto rows = [&]<int kRows>() {
        multiply_rows<Isa, kInt4, kRows>(p, w, first, end, r, a.x + r * padded_k, padded_k, a.m + r * blocks, blocks, a.unit + r), r += kRows;
      };
      if (p.M - r >= 4) rows.template operator()<4>();
      else if (p.M - r >= 2) rows.template operator()<2>();
      else rows.template operator()<1>();
    }
  });
}
template <class Isa>
void run_places(const Params& p) {
  if (p.weight.format == Format::kInt4) run_rows_of<Isa, true>(p);
  else run_rows_of<Isa, false>(p);
}

// Vectors of 16 rows, for few rows of x. Kernel::multiply<kInt4, kRows>: sums[kRows][2 strips][8] of two strips `far` apart; x as int8 with the bits
// kFlip turned.
template <class Kernel, bool kInt4>
void run_pairs(const Params& p) {
  const Sparse8 w = p.sparse();
  const int64_t strips = w.dense().num_strips(), pairs = (strips + 1) / 2, blocks = w.dense().num_blocks(), padded_k = blocks * 32;
  const int64_t num_tasks = std::min(p.num_threads, pairs);
  parallel_tasks(num_tasks, [&](int64_t task) {
    const Quantized a(p, padded_k, 1);
    float* buffer = a.unit + p.M;
    for (int64_t r = 0; r < p.M; r++) a.row(p, r, padded_k, buffer, Kernel::kFlip);
    for (int64_t pair = pairs * task / num_tasks; pair < pairs * (task + 1) / num_tasks; pair++) {
      const int64_t strip = 2 * pair, far = strip + 1 < strips ? w.strip_bytes() : 0;
      for (int64_t r = 0; r < p.M;) {
        const auto rows = [&]<int kRows>() {
          alignas(64) float sums[kRows * 16];
          Kernel::template multiply<kInt4, kRows>(w, p.packed + strip * w.strip_bytes(), far, a.x + r * padded_k, padded_k, a.m + r * blocks, blocks, sums);
          for (int i = 0; i < kRows; i++)
            for (int s = 0; s < (far ? 2 : 1); s++) store_any(p, r + i, strip + s, sums + (i * 2 + s) * 8, a.unit[r + i]);
          r += kRows;
        };
        if (p.M - r >= 4) rows.template operator()<4>();
        else if (p.M - r >= 2) rows.template operator()<2>();
        else rows.template operator()<1>();
      }
    }
  });
}

}  // namespace
}  // namespace taut::sparse_linear
