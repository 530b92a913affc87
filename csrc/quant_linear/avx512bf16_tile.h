// The tile of bf16 x and AVX-512 BF16, over panels of weights that a file of an op unpacks: quant_linear's rounded to bf16, sparse_linear's as they are.
//   A: bf16 [k panel][row][kPanelK].   B: panel of 32 outputs, bf16 [pairs of k][2][16 outputs][2]
// x is copied to A once, as it is: two neighbours in k are the 32 bits that the instruction broadcasts. A panel is unpacked once and used for all rows of
// x: 12 rows x 32 outputs, all 24 sums in registers; 12 broadcasts and 2 loads for 24 products. Panels are taken in groups, so that A's panel, which is
// in L2, is used for as many columns.
#pragma once

#include "quant_linear/x86_float_kernel.h"

namespace taut::quant_linear::avx512bf16 {
namespace {

constexpr int kTileRows = 12, kVectors = 2, kPanelColumns = kVectors * 16, kStripsOfPanel = kVectors * 2, kPairBytes = kVectors * 64;
constexpr int64_t kPanelK = 256, kChunkRows = 512, kGroupPanels = 4;

// k-blocks of two strips, to one of the two vectors of each pair of the panel.
using Unpack = void (*)(const Strips& s, int64_t strip, int64_t block0, int64_t blocks, uint8_t* out);

// c[kRows][32] (+)= A[kRows, 2 * pairs] @ panel.
template <int kRows>
__attribute__((noinline)) void micro(const uint16_t* a, const uint8_t* panel, int64_t pairs, float* c, bool first) {
  __m512 sum[kRows][kVectors];
  TAUT_FOR_ROWS (int r = 0; r < kRows; r++)
    TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < pairs; pair += 4, a += 8, panel += 4 * kPairBytes) {
    TAUT_FOR (int step = 0; step < 4; step++) {
      __m512bh w[kVectors];
      TAUT_FOR (int i = 0; i < kVectors; i++) w[i] = reinterpret_cast<__m512bh>(_mm512_load_si512(panel + step * kPairBytes + i * 64));
      TAUT_FOR_ROWS (int r = 0; r < kRows; r++) {
        const __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(load_as<int32_t>(reinterpret_cast<const uint8_t*>(a + r * kPanelK + step * 2))));
        TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], w[i], x);
      }
    }
  }
  if (first) {
    TAUT_FOR_ROWS (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kVectors; i++) _mm512_store_ps(c + r * kPanelColumns + i * 16, sum[r][i]);
  } else {
    TAUT_FOR_ROWS (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kVectors; i++) {
        float* at = c + r * kPanelColumns + i * 16;
        _mm512_store_ps(at, _mm512_load_ps(at) + sum[r][i]);
      }
  }
}

using Micro = void (*)(const uint16_t* a, const uint8_t* panel, int64_t pairs, float* c, bool first);
struct MicroTable {
  Micro run[kTileRows];
};
template <int... r>
constexpr MicroTable make_micro_table(std::integer_sequence<int, r...>) {
  return {{micro<r + 1>...}};
}
constexpr MicroTable kMicro = make_micro_table(std::make_integer_sequence<int, kTileRows>());

// Row m of x to its place in each panel of A.
void prepare_row(const Params& p, int64_t m, int64_t padded_k, uint16_t* a, int64_t panel_stride) {
  const auto place = [&](int64_t k) { return a + k / kPanelK * panel_stride + k % kPanelK; };
  if (p.prologue == Prologue::kNone) {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.x_row_stride;
    for (int64_t k = 0; k < padded_k; k += 32) {
      const int64_t count = std::min<int64_t>(32, p.weight.K - k);
      _mm512_storeu_si512(place(k), _mm512_maskz_loadu_epi16(static_cast<__mmask32>(0xffffffffu >> (32 - count)), x + k));
    }
    return;
  }
  const float* row = load_row(p, m, padded_k, reinterpret_cast<float*>(scratch(1, padded_k * sizeof(float))));
  for (int64_t k = 0; k < padded_k; k += 8) _mm_storeu_si128(reinterpret_cast<__m128i*>(place(k)), to_bf16(_mm256_loadu_ps(row + k)));
}

// Row m of a panel's results, 32 of them.
inline void store_panel(const Params& p, int64_t m, int64_t n, const float* row, float factor) {
  if ((n + 1) * kPanelColumns <= p.weight.N && !p.bias && !p.residual) {
    uint16_t* out = static_cast<uint16_t*>(p.out) + m * p.weight.N + n * kPanelColumns;
    __m512 sums[kVectors];
    TAUT_FOR (int i = 0; i < kVectors; i++) sums[i] = _mm512_load_ps(row + i * 16) * factor;
    static_assert(kVectors == 2);
    _mm512_storeu_si512(out, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(sums[1], sums[0])));
    return;
  }
  const int64_t num_strips = (p.weight.N + 7) / 8;
  for (int64_t strip = n * kStripsOfPanel; strip < std::min(num_strips, (n + 1) * kStripsOfPanel); strip++, row += 8) store_strip(p, m, strip, row, factor);
}

void tile(const Params& p, Unpack unpack, float factor) {
  const Strips s(p);
  const int64_t padded_k = s.num_blocks * 32, num_strips = s.layout.num_strips();
  const int64_t panels = (num_strips + kStripsOfPanel - 1) / kStripsOfPanel;
  const int64_t chunks = (p.M + kChunkRows - 1) / kChunkRows, chunk_rows = (p.M + chunks - 1) / chunks;
  const int64_t k_panels = (padded_k + kPanelK - 1) / kPanelK, panel_stride = chunk_rows * kPanelK;
  uint16_t* a = reinterpret_cast<uint16_t*>(scratch(0, k_panels * panel_stride * sizeof(uint16_t)));

  for (int64_t m0 = 0; m0 < p.M; m0 += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, p.M - m0), row_blocks = (rows + kTileRows - 1) / kTileRows;
    const int64_t prepare_tasks = std::min(p.num_threads, row_blocks);
    parallel_tasks(prepare_tasks, [&](int64_t task) {
      for (int64_t m = rows * task / prepare_tasks; m < rows * (task + 1) / prepare_tasks; m++) prepare_row(p, m0 + m, padded_k, a + m * kPanelK, panel_stride);
    });

    // Threads split the panels; if there are fewer of those than threads, the row blocks as well.
    const int64_t across = std::min(p.num_threads, panels), down = std::clamp<int64_t>(p.num_threads / across, 1, row_blocks);
    parallel_tasks(across * down, [&](int64_t task) {
      const int64_t panel0 = panels * (task % across) / across, panel1 = panels * (task % across + 1) / across;
      const int64_t row0 = rows * (task / across) / down, task_rows = rows * (task / across + 1) / down - row0;
      const int64_t blocks = (task_rows + kTileRows - 1) / kTileRows;
      // WHY one panel at a time for few rows: the packed weights are then read in longer streams.
      const int64_t group_panels = task_rows <= 64 ? 1 : kGroupPanels;
      uint8_t* panel = scratch(1, kPanelK / 2 * kPairBytes + group_panels * task_rows * kPanelColumns * sizeof(float));
      float* c = reinterpret_cast<float*>(panel + kPanelK / 2 * kPairBytes);
      for (int64_t group = panel0; group < panel1; group += group_panels) {
        const int64_t group_end = std::min(panel1, group + group_panels);
        for (int64_t k0 = 0; k0 < padded_k; k0 += kPanelK) {
          const int64_t k_blocks = std::min(kPanelK, padded_k - k0) / 32;
          for (int64_t n = group; n < group_end; n++) {
            for (int i = 0; i < kVectors; i++) {
              const int64_t strip = n * kStripsOfPanel + i * 2;
              if (strip < num_strips) unpack(s, strip, k0 / 32, k_blocks, panel + i * 64);
            }
            // The packed bytes of the next panel are fetched to L2 in slices, one a row block.
            const bool last = n + 1 == group_end, last_k = k0 + kPanelK >= padded_k;
            const int64_t next_n = !last ? n + 1 : last_k ? group_end : group, next_k = !last ? k0 : last_k ? 0 : k0 + kPanelK;
            const int64_t next_begin = s.block_offset(next_k) - s.header_bytes;  // its header stands there, if it begins with one
            const int64_t next_bytes = s.block_offset(std::min(next_k + kPanelK, padded_k) - 32) + s.block_bytes - next_begin;
            const uint8_t* next = s.data + next_n * kStripsOfPanel * s.strip_bytes + next_begin;
            const int64_t slice = next_n < panel1 && (next_n + 1) * kStripsOfPanel <= num_strips ? (next_bytes / blocks + 63) / 64 * 64 : 0;
            float* panel_c = c + (n - group) * task_rows * kPanelColumns;
            for (int64_t b = 0; b < blocks; b++) {
              for (int64_t offset = b * slice; offset < std::min(next_bytes, (b + 1) * slice); offset += 64)
                for (int strip = 0; strip < kStripsOfPanel; strip++) __builtin_prefetch(next + strip * s.strip_bytes + offset, 0, 2);
              // WHY blocks of the same size: a block of a few rows has too few sums to hide the latency of a product.
              const int64_t first = task_rows * b / blocks, in_block = task_rows * (b + 1) / blocks - first;
              kMicro.run[in_block - 1](a + k0 / kPanelK * panel_stride + (row0 + first) * kPanelK, panel, k_blocks * 16, panel_c + first * kPanelColumns,
                                       k0 == 0);
              if (last_k)
                for (int64_t m = first; m < first + in_block; m++) store_panel(p, m0 + row0 + m, n, panel_c + m * kPanelColumns, factor);
            }
          }
        }
      }
    });
  }
}

}  // namespace
}  // namespace taut::quant_linear::avx512bf16
