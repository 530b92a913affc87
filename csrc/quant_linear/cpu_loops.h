// The two loops around the kernels, written once for every CPU and both kinds of activations. Kernel is a policy: see
// Int8Avx2 in cpu_int8_avx2.cpp, which explains A (the prepared rows of x) and B (the panel). A kernel file includes the rows of
// its ISA first (x86_rows.h: load_row, store_strip). All of it in an anonymous namespace: each ISA file compiles its own
// copy with its own flags.
//
//   small  weights are unpacked in registers, for a few rows of x at a time. A thread walks kMaxStreams strips that start far
//          apart, so that as many hardware prefetch streams run, and takes all rows of x before it goes on to the next few.
//   outliers (outliers.h) are added to the sums last: small decodes the weights of each for each strip; tile, where rows share them,
//          once a panel.
//   tile   per chunk of rows: x is prepared as A; a panel of kPanelStrips strips x kPanelK is unpacked to L1 once and
//          reused by every row block; fp32 sums live in a small tile C.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "quant_linear/op.h"
#include "quant_linear/outliers.h"

namespace taut::quant_linear {
namespace {

constexpr int kPanelStrips = 2;  // 16 output columns; a Kernel may have its own
template <class Kernel>
constexpr int panel_strips() {
  if constexpr (requires { Kernel::kPanelStrips; }) return Kernel::kPanelStrips;
  else return kPanelStrips;
}

struct Strips {  // where the strips of a packed weight lie
  Rows8 layout;
  const uint8_t* data;
  int64_t strip_bytes, header_bytes, block_bytes, blocks_per_group, num_blocks;
  SparsePattern pattern;  // m = 0: dense
  explicit Strips(const Params& p)
      : layout{p.weight}, data(p.packed), strip_bytes(p.pattern.m ? p.sparse().strip_bytes() : layout.strip_bytes()), header_bytes(layout.header_bytes()),
        block_bytes(p.pattern.m ? p.sparse().block_bytes() : layout.block_bytes()), blocks_per_group(layout.blocks_per_group()),
        num_blocks(layout.num_blocks()), pattern(p.pattern) {}
  // Where in a strip the k-block of k begins.
  int64_t block_offset(int64_t k) const { return pattern.m ? Sparse8{layout.spec, pattern}.block_offset(0, k / 32) : layout.block_offset(0, k); }
  // Where in a strip what belongs to k and further k begins, whole superblocks of a dense weight.
  int64_t offset_of(int64_t k) const { return pattern.m ? Sparse8{layout.spec, pattern}.block_offset(0, k / 32) : layout.header_offset(0, k); }
};

// Walks the k-blocks of one strip, of Rows8 or Sparse8. WHY not the layout's offset functions: their divisions cost more than the unpacking.
struct BlockCursor {
  const Rows8& layout;
  const uint8_t *header, *codes;
  int64_t header_bytes, block_bytes, blocks_per_group;
  int64_t group, block;  // group within the superblock, block within the group
  BlockCursor(const Strips& s, int64_t strip, int64_t first)
      : BlockCursor(s.layout, s.data + s.layout.header_offset(strip * 8, first * 32), s.data + s.layout.block_offset(strip * 8, first * 32), s.header_bytes,
                    s.block_bytes, s.blocks_per_group, first) {}
  // `dense` is w.dense(), and lives on.
  BlockCursor(const Sparse8& w, const Rows8& dense, const uint8_t* packed, int64_t strip, int64_t first)
      : BlockCursor(dense, packed + w.header_offset(strip * 8, first * 32), packed + w.block_offset(strip * 8, first), dense.header_bytes(), w.block_bytes(),
                    dense.blocks_per_group(), first) {}
  const uint8_t* scales() const { return header + group * layout.group_scale_bytes(); }
  const uint8_t* zeros() const { return header + layout.zeros_begin() + group * 8; }
  void next() {
    codes += block_bytes;
    if (++block < blocks_per_group) return;
    block = 0;
    if (++group < 4) return;
    group = 0;
    header = codes;
    codes += header_bytes;
  }

 private:
  BlockCursor(const Rows8& layout, const uint8_t* header, const uint8_t* codes, int64_t header_bytes, int64_t block_bytes, int64_t blocks_per_group,
              int64_t first)
      : layout(layout), header(header), codes(codes), header_bytes(header_bytes), block_bytes(block_bytes), blocks_per_group(blocks_per_group),
        group(first / blocks_per_group % 4), block(first % blocks_per_group) {}
};

// What a kernel's sums lack besides the row's unit: Kernel::factor<kFormat>(p), if it has one. WHY not put into the unit: that
// is close to the smallest normal number where x is small.
template <class Kernel, Format kFormat>
float factor_of(const Params& p) {
  if constexpr (requires { Kernel::template factor<kFormat>(p); }) return Kernel::template factor<kFormat>(p);
  else return 1.0f;
}
inline void scale_sums(float* sums /* [8] */, float factor) {
  if (factor == 1.0f) return;
  for (int i = 0; i < 8; i++) sums[i] *= factor;
}

inline void store_strip(const Params& p, int64_t m, int64_t strip, const float* sums, float unit) {
  for_dtype(p.dtype, [&]<DType kDType>() { store_strip<kDType>(p, m, strip, sums, unit); });
}

// sums[kCount] += rest * columns[k][kCount] for each of a row's outliers, whose k are places in `columns` here.
template <int kCount>
__attribute__((noinline)) void add_columns(const Outlier* list, const float* columns, float* sums) {
  float total[kCount];
  std::memcpy(total, sums, sizeof total);
  for (const Outlier *at = list + 1, *end = at + list->k; at < end; at++) {
    const float* column = columns + at->k * kCount;
    for (int i = 0; i < kCount; i++) total[i] += at->rest * column[i];
  }
  std::memcpy(sums, total, sizeof total);
}

// Rows m, m + 1 .. of `strips` strips into out.
template <int kPanelStrips, DType kDType>
void store_rows(const Params p, int64_t m, int64_t rows, int64_t strip, int strips, float* sums /* [rows][kPanelStrips][8] */, const float* unit, float factor,
                const Outlier* outliers /* or nullptr */, int64_t longest, const float* columns) {
  // WHY p by value: a store to out could change what a reference stands for, so that its fields would be loaded again each time.
  for (int64_t r = 0; r < rows; r++, sums += kPanelStrips * 8) {
    for (int s = 0; s < strips; s++) scale_sums(sums + s * 8, factor);
    if (outliers)
      if (const Outlier* list = outliers + r * longest; list->k) add_columns<kPanelStrips * 8>(list, columns, sums);
    for (int s = 0; s < strips; s++) store_strip<kDType>(p, m + r, strip + s, sums + s * 8, unit[r]);
  }
}

// Asks for the cache lines of out[m, n0 .. n0 + count) to be written. WHY: rows of out lie far apart, and a store that misses
// holds up those behind it: 100 cycles for each row of a panel, where the multiplication of 512 k takes 160.
inline void prefetch_out(const Params& p, int64_t m, int64_t n0, int64_t count) {
  const int64_t element_bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  const char* first = static_cast<const char*>(p.out) + (m * p.weight.N + n0) * element_bytes;
  for (int64_t offset = 0; offset < count * element_bytes; offset += 64) prefetch_write(first + offset);
}

constexpr int kMaxStreams = 4;
template <class Kernel>
constexpr int small_rows_at_once() {
  if constexpr (requires { Kernel::kSmallRows; }) return Kernel::kSmallRows;
  else return 4;
}

// Whether a kernel computes with int8 activations whose outliers are multiplied on their own.
template <class Kernel>
constexpr bool takes_outliers() {
  return requires { requires Kernel::kOutliers; };
}

// Of all rows, for the small loop: what to add, and where its weights lie.
struct SmallOutliers {
  Outlier* lists;  // nullptr: other activations
  WeightColumn* columns;
  int64_t longest;
  float global_scale;
  static int64_t bytes(int64_t M, int64_t padded_k) { return M * outlier_list(padded_k) * (sizeof(WeightColumn) + sizeof(Outlier)); }

  template <bool kZeros, Format kFormat>
  __attribute__((noinline)) void add(int64_t m, const uint8_t* strip, float* sums) const {
    const Outlier* list = lists + m * longest;
    float total[8], weights[8];
    std::memcpy(total, sums, sizeof total);
    for (int64_t i = 1; i <= list->k; i++) {
      column_of_strip<kZeros, kFormat>(columns[m * longest + i], strip, global_scale, weights);
      for (int r = 0; r < 8; r++) total[r] += list[i].rest * weights[r];
    }
    std::memcpy(sums, total, sizeof total);
  }
};

// Rows [m, m + kRows) of x times `strips` strips, `apart` strips from one to the next.
template <class Kernel, bool kZeros, Format kFormat, int kRows>
void small_rows(const Params& p, const Strips& s, int64_t strip0, int64_t apart, int64_t strips, const uint8_t* a, const float* unit, int64_t m, float factor,
                const SmallOutliers& outliers) {
  constexpr int kStreams = Kernel::template streams<kFormat, kRows>;
  static_assert(kMaxStreams % kStreams == 0);
  alignas(64) float sums[kStreams * kRows * 8];
  const auto store = [&](int64_t strip, float* tile) {
    for (int r = 0; r < kRows; r++) {
      scale_sums(tile + r * 8, factor);
      if constexpr (takes_outliers<Kernel>()) {
        if (outliers.lists) outliers.template add<kZeros, kFormat>(m + r, s.data + strip * s.strip_bytes, tile + r * 8);
      }
      store_strip(p, m + r, strip, tile + r * 8, unit[r]);
    }
  };
  int64_t i = 0;
  for (; i + kStreams <= strips; i += kStreams) {
    const int64_t strip = strip0 + i * apart;
    Kernel::template strip_product<kZeros, kFormat, kRows, kStreams>(s, s.data + strip * s.strip_bytes, apart * s.strip_bytes, a, sums);
    for (int stream = 0; stream < kStreams; stream++) store(strip + stream * apart, sums + stream * kRows * 8);
  }
  for (; i < strips; i++) {
    const int64_t strip = strip0 + i * apart;
    Kernel::template strip_product<kZeros, kFormat, kRows, 1>(s, s.data + strip * s.strip_bytes, 0, a, sums);
    store(strip, sums);
  }
}

template <class Kernel, bool kZeros, Format kFormat>
void small_loop(const Params& p) {
  const Strips s(p);
  const int64_t num_strips = s.layout.num_strips(), padded_k = s.num_blocks * 32, row_bytes = s.num_blocks * Kernel::template row_block_bytes<kFormat>;
  const int64_t num_tasks = std::min(p.num_threads, num_strips);
  parallel_tasks(num_tasks, [&](int64_t task) {
    // WHY every thread prepares x for itself: for few rows that is cheaper than a barrier.
    constexpr int kRows = small_rows_at_once<Kernel>();
    const int64_t row_blocks = (p.M + kRows - 1) / kRows;
    const auto first_row = [&](int64_t block) { return p.M * block / row_blocks; };  // blocks differ by a row at most
    const bool with_outliers = takes_outliers<Kernel>() && p.activations == Activations::kInt8Outliers;
    const int64_t outlier_bytes = with_outliers ? SmallOutliers::bytes(p.M, padded_k) : 0;
    uint8_t* const memory = scratch(1, outlier_bytes + p.M * (row_bytes + sizeof(float)) + padded_k * sizeof(float) + 64);
    SmallOutliers outliers{nullptr, reinterpret_cast<WeightColumn*>(memory), outlier_list(padded_k), 1.0f};
    if (with_outliers) {
      outliers.lists = reinterpret_cast<Outlier*>(outliers.columns + p.M * outliers.longest);
      outliers.global_scale = global_scale_of(s.layout, s.data);
    }
    uint8_t* a = memory + (outlier_bytes + 63) / 64 * 64;
    float* unit = reinterpret_cast<float*>(a + p.M * row_bytes);
    float* row = unit + p.M;
    for (int64_t b = 0; b < row_blocks; b++) {
      const int64_t m = first_row(b);
      const int rows = static_cast<int>(first_row(b + 1) - m);
      for (int r = 0; r < rows; r++) {
        Outlier* list = outliers.lists ? outliers.lists + (m + r) * outliers.longest : nullptr;
        const float* x = load_row(p, m + r, padded_k, row);
        if (list) x = clip_outliers(x, padded_k, row, list);
        unit[m + r] = Kernel::template prepare_row<kZeros, kFormat>(p, x, padded_k, r, rows, a + m * row_bytes, padded_k, 0);
        if (!list) continue;
        divide_outliers(list, unit[m + r]);
        for (int64_t i = 1; i <= list->k; i++) outliers.columns[(m + r) * outliers.longest + i] = WeightColumn(s.layout, list[i].k);
      }
    }
    const int64_t strip0 = num_strips * task / num_tasks, strip1 = num_strips * (task + 1) / num_tasks;
    const float factor = factor_of<Kernel, kFormat>(p);
    // A few strips times all rows of x: blocks of rows after the first find the weights in a cache.
    const auto all_rows = [&](int64_t strip, int64_t apart, int64_t strips) {
      for (int64_t b = 0; b < row_blocks; b++) {
        const int64_t m = first_row(b), rows = first_row(b + 1) - m;
        [&]<int... i>(std::integer_sequence<int, i...>) {
          ((rows == i + 1 ? small_rows<Kernel, kZeros, kFormat, i + 1>(p, s, strip, apart, strips, a + m * row_bytes, unit + m, m, factor, outliers) : void()),
           ...);
        }(std::make_integer_sequence<int, kRows>());
      }
    };
    const int64_t per_stream = (strip1 - strip0) / kMaxStreams, last = strip0 + per_stream * kMaxStreams;
    for (int64_t i = 0; i < per_stream; i++) all_rows(strip0 + i, per_stream, kMaxStreams);
    if (last < strip1) all_rows(last, 1, strip1 - last);
  });
}

// A panel of B: codes u8, then scales, then zero points; kPanelK long in k at most.
template <class Kernel, Format kFormat>
struct Panel {
  static constexpr int64_t kPanelK = Kernel::template panel_k<kFormat>;
  static constexpr int kPanelStrips = panel_strips<Kernel>();
  alignas(64) uint8_t codes[kPanelK * Kernel::template code_bytes<kFormat> * kPanelStrips * 8];
  alignas(64) float scales[kPanelK / 32 * kPanelStrips * 8 * (kFormat == Format::kNvfp4 ? 2 : 1)];
  alignas(64) int32_t zeros[kPanelK / 32 * kPanelStrips * 8];
};

template <class Kernel, bool kZeros, Format kFormat>
void tile_loop(const Params& p) {
  using PanelT = Panel<Kernel, kFormat>;
  constexpr int kRows = Kernel::kTileRows, kPanelStrips = PanelT::kPanelStrips;
  const Strips s(p);
  const int64_t padded_k = s.num_blocks * 32, num_strips = s.layout.num_strips();
  const int64_t panels = (num_strips + kPanelStrips - 1) / kPanelStrips;
  const int64_t chunk_rows = std::min<int64_t>(p.M, Kernel::kChunkRows);
  const float factor = factor_of<Kernel, kFormat>(p);
  // Panels of equal length: a short last one would cost as much to start and to end as a long one.
  const int64_t k_panels = (padded_k + PanelT::kPanelK - 1) / PanelT::kPanelK, panel_k = (s.num_blocks + k_panels - 1) / k_panels * 32;
  const int64_t row_panel_bytes = panel_k / 32 * Kernel::template row_block_bytes<kFormat>;  // one row of A within one panel's k
  const int64_t panel_stride = row_panel_bytes * chunk_rows;
  const bool with_outliers = takes_outliers<Kernel>() && p.activations == Activations::kInt8Outliers;
  const int64_t longest = with_outliers ? outlier_list(padded_k) : 0;
  // A, the rows' units and outliers, the columns of w that any of them needs, and where a k is among those.
  const int64_t columns_begin = (k_panels * panel_stride + chunk_rows * (sizeof(float) + longest * sizeof(Outlier)) + 63) / 64 * 64;
  uint8_t* a = scratch(0, columns_begin + (with_outliers ? padded_k * (sizeof(WeightColumn) + sizeof(int32_t)) : 0));
  float* unit = reinterpret_cast<float*>(a + k_panels * panel_stride);
  Outlier* lists = with_outliers ? reinterpret_cast<Outlier*>(unit + chunk_rows) : nullptr;
  WeightColumn* columns = reinterpret_cast<WeightColumn*>(a + columns_begin);
  int32_t* column_of_k = reinterpret_cast<int32_t*>(columns + padded_k);

  for (int64_t m0 = 0; m0 < p.M; m0 += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, p.M - m0), row_blocks = (rows + kRows - 1) / kRows;
    // Blocks differ by a row at most: a last block of one or two rows would have too few sums to hide their latency.
    const auto first_row = [&](int64_t block) { return rows * block / row_blocks; };
    const int64_t prepare_tasks = std::min(p.num_threads, row_blocks);
    parallel_tasks(prepare_tasks, [&](int64_t task) {
      float* row = reinterpret_cast<float*>(scratch(1, padded_k * sizeof(float)));
      for (int64_t b = row_blocks * task / prepare_tasks; b < row_blocks * (task + 1) / prepare_tasks; b++) {
        const int64_t first = first_row(b);
        const int in_block = static_cast<int>(first_row(b + 1) - first);
        for (int r = 0; r < in_block; r++) {
          Outlier* list = lists ? lists + (first + r) * longest : nullptr;
          const float* x = load_row(p, m0 + first + r, padded_k, row);
          if (list) x = clip_outliers(x, padded_k, row, list);
          unit[first + r] = Kernel::template prepare_row<kZeros, kFormat>(p, x, padded_k, r, in_block, a + first * row_panel_bytes, panel_k, panel_stride);
          if (list) divide_outliers(list, unit[first + r]);
        }
      }
    });
    int32_t num_columns = 0;
    if (lists) {
      std::memset(column_of_k, -1, padded_k * sizeof(int32_t));
      for (int64_t r = 0; r < rows; r++)
        for (Outlier *at = lists + r * longest + 1, *end = at + at[-1].k; at < end; at++) {
          int32_t& column = column_of_k[at->k];
          if (column < 0) columns[column = num_columns++] = WeightColumn(s.layout, at->k);
          at->k = column;
        }
    }

    // Threads split the panels; if there are fewer of those than threads, the row blocks as well.
    const int64_t across = std::min(p.num_threads, panels), down = std::clamp<int64_t>(p.num_threads / across, 1, row_blocks);
    parallel_tasks(across * down, [&](int64_t task) {
      const int64_t panel0 = panels * (task % across) / across, panel1 = panels * (task % across + 1) / across;
      const int64_t block0 = row_blocks * (task / across) / down, block1 = row_blocks * (task / across + 1) / down;
      const int64_t blocks = block1 - block0, row0 = first_row(block0), row1 = first_row(block1);
      uint8_t* memory = scratch(1, sizeof(PanelT) + (row1 - row0 + num_columns) * kPanelStrips * 32);
      PanelT& panel = *reinterpret_cast<PanelT*>(memory);
      float* c = reinterpret_cast<float*>(memory + sizeof(PanelT));
      float* panel_columns = c + (row1 - row0) * kPanelStrips * 8;  // [num_columns][kPanelStrips][8]
      for (int64_t n = panel0; n < panel1; n++) {
        const int strips = static_cast<int>(std::min<int64_t>(kPanelStrips, num_strips - n * kPanelStrips));
        std::memset(c, 0, (row1 - row0) * kPanelStrips * 32);
        for (int64_t k0 = 0; k0 < padded_k; k0 += panel_k) {
          const int64_t k_blocks = std::min(panel_k, padded_k - k0) / 32;
          for (int strip = 0; strip < strips; strip++) Kernel::template unpack<kZeros, kFormat>(s, n * kPanelStrips + strip, k0 / 32, k_blocks, strip, panel);
          // The packed bytes of the next panel are fetched to L2 in slices, one a row block.
          const bool last = k0 + panel_k >= padded_k;
          const int64_t next_n = last ? n + 1 : n, next_k = last ? 0 : k0 + panel_k;
          const uint8_t* next = s.data + next_n * kPanelStrips * s.strip_bytes + s.offset_of(next_k);
          const int64_t next_bytes = s.offset_of(std::min(panel_k, padded_k - next_k));
          const int64_t slice = next_n < panel1 && (next_n + 1) * kPanelStrips <= num_strips ? (next_bytes / blocks + 63) / 64 * 64 : 0;
          if constexpr (takes_outliers<Kernel>()) {
            const float global_scale = global_scale_of(s.layout, s.data);
            for (int32_t i = 0; last && i < num_columns; i++)
              for (int strip = 0; strip < strips; strip++)
                column_of_strip<kZeros, kFormat>(columns[i], s.data + (n * kPanelStrips + strip) * s.strip_bytes, global_scale,
                                                 panel_columns + (i * kPanelStrips + strip) * 8);
          }
          for (int64_t b = block0; b < block1; b++) {
            for (int64_t offset = (b - block0) * slice; offset < std::min(next_bytes, (b - block0 + 1) * slice); offset += 64)
              for (int strip = 0; strip < kPanelStrips; strip++) __builtin_prefetch(next + strip * s.strip_bytes + offset, 0, 2);
            const int64_t first = first_row(b), end = first_row(b + 1);
            float* block = c + (first - row0) * kPanelStrips * 8;
            if (last)
              for (int64_t m = first; m < end; m++) prefetch_out(p, m0 + m, n * kPanelStrips * 8, strips * 8);
            Kernel::template micro_rows<kZeros, kFormat>(static_cast<int>(end - first), a + k0 / panel_k * panel_stride + first * row_panel_bytes, panel,
                                                         k_blocks, block);
            if (!last) continue;
            for_dtype(p.dtype, [&]<DType kDType>() {
              store_rows<kPanelStrips, kDType>(p, m0 + first, end - first, n * kPanelStrips, strips, block, unit + first, factor,
                                               lists ? lists + first * longest : nullptr, longest, panel_columns);
            });
          }
        }
      }
    });
  }
}

// Calls run<kZeros, kFormat>() for the format of `weight`, which must be one of `kFormats`: one instantiation a kind of weight.
//   for_format(p.weight, Formats<Format::kInt4, Format::kInt8>(), [&]<bool kZeros, Format kFormat>() { small_loop<Kernel, kZeros, kFormat>(p); });
template <Format... kFormats>
struct Formats {};
template <Format... kFormats, class Run>
void for_format(const WeightSpec& weight, Formats<kFormats...>, const Run& run) {
  const auto call = [&]<Format kFormat>() {
    if constexpr (takes_zeros(kFormat)) {
      if (weight.zeros) return run.template operator()<true, kFormat>();
    }
    run.template operator()<false, kFormat>();
  };
  ((weight.format == kFormats ? call.template operator()<kFormats>() : void()), ...);
}

}  // namespace
}  // namespace taut::quant_linear
