// The loops around the AMX kernels, for int8 and for bf16 products. Kernel is a policy: see Int8Amx in cpu_int8_amx.cpp.
// All of it in an anonymous namespace; a kernel file includes x86_rows.h first.
//
//   A tile holds 16 rows of x by kTileK of k, a B tile kTileK by 16 outputs, a C tile 16 x 16 sums. A unit is what may be
//   summed in a C tile before scales go in: kUnitK of k, kUnitK / kTileK products. AMX has no way from a tile to a vector but
//   memory: a finished C tile is stored to L1, and the epilogue, in AVX-512, adds it, scaled, to fp32 totals.
//   A step is one unit of 2 x 2 C tiles. WHY 2 x 2: each A and B tile that is loaded is used twice. A chunk is 4 steps; while
//   step u of a chunk fills its four C tiles, the epilogue works through the 4 units that C tile u had in the chunk before: totals
//   are 16 registers, and are loaded and stored once for 4 units. A C tile is stored one step after its last product: a store
//   that waits for the product fills the scheduler, and the vector work behind it waits too.
//   Totals of one chunk are added to those of the chunks before in the order of k, so that no blocking shows in a result.
#pragma once

#include <algorithm>
#include <cstring>

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear {
namespace {

// ---- Tiles. 0..3 are C (2 * row half + column half), 4 and 5 A, 6 and 7 B ----

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// WHY at each task: oneDNN, in the same threads, leaves another configuration or none. WHY no destructor to release: it would need
// the language's unwinding, a weak symbol; nothing between the two throws.
inline void configure_tiles(int a_row_bytes, int b_rows) {
  TileConfig config;
  for (int t = 0; t < 8; t++) config.rows[t] = t < 6 ? 16 : b_rows, config.row_bytes[t] = t == 4 || t == 5 ? a_row_bytes : 64;
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void release_tiles() { asm volatile("tilerelease" ::: "memory"); }

// WHY asm: gcc's intrinsics are macros that take no template argument for a tile, and let stores move across a load.
template <int kTile>
inline void tile_load(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* p) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(int64_t{64}), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

constexpr int kTile = 16, kPairRows = 2 * kTile, kPairColumns = 2 * kTile, kUnits = 4;

// ---- One panel of B against all row blocks ----

// A Product says what a unit is and what is done with it:
//   kUnitK, kTileK, kElementBytes; begin<C>(), what a C tile starts as; multiply<C, A, B>();
//   finish(total[16], sums [16][16], scales [16], multiples [16]): total += sums, scaled
template <class Product>
struct Shape {
  static constexpr int kTileK = Product::kTileK, kUnitK = Product::kUnitK, kTilesPerUnit = kUnitK / kTileK;
  static constexpr int kARowBytes = kTileK * Product::kElementBytes, kATileBytes = kTile * kARowBytes;
  static constexpr int kBRows = kARowBytes / 4, kBTileBytes = kBRows * 64;
};

// What the epilogue needs of a chunk whose products are done.
struct Chunk {
  const float* sums;       // C tile t of unit u is at t * tile_stride + u * unit_stride
  const float* scales;     // [units][32], of columns
  const float* multiples;  // [units][32], of rows
  float* totals;           // [4][16][16]
  int64_t tile_stride, unit_stride;
  int tiles, units;
  bool fresh;  // totals begin here
};

// Unit `unit` of a new chunk, where there is one.
struct Unit {
  const uint8_t *a, *b;
  int k_tiles, tiles;
  float* sums;  // where C tile 0 goes; the others follow, tile_stride apart
  int64_t tile_stride;
};
struct Unstored {  // what the last step left in the C tiles
  float* sums;
  int64_t tile_stride;
};

// One step: the products of `unit` (none where its a is null), and the epilogue of C tile u of `done`.
template <class Product, int u>
__attribute__((always_inline)) inline void step(Unit unit, const Chunk& done, Unstored& unstored) {
  using S = Shape<Product>;
  const bool finishing = u < done.tiles;
  const float* sums = done.sums + u * done.tile_stride;
  const float *scales = done.scales + u % 2 * kTile, *multiples = done.multiples + u / 2 * kTile;
  float* totals = done.totals + u * kTile * kTile;
  __m512 total[kTile];
  if (finishing && !done.fresh) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; r++) total[r] = _mm512_load_ps(totals + r * kTile);
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; r++) total[r] = _mm512_setzero_ps();
  }
  const auto quarter = [&]<int t>() __attribute__((always_inline)) {
    if (unstored.sums) tile_store<t>(unstored.sums + t * unstored.tile_stride);
    if (unit.a && t < unit.tiles) {
      if (t == 0) tile_load<4>(unit.a, S::kARowBytes);
      if (t == 0) tile_load<6>(unit.b, 64);
      if (t == 1) tile_load<7>(unit.b + S::kBTileBytes, 64);
      if (t == 2) tile_load<5>(unit.a + S::kATileBytes, S::kARowBytes);
      Product::template begin<t>();
      Product::template multiply<t, 4 + t / 2, 6 + t % 2>();
    }
    if (finishing && t < done.units) Product::finish(total, sums + t * done.unit_stride, scales + t * kPairColumns, multiples + t * kPairRows);
  };
  quarter.template operator()<0>();
  quarter.template operator()<1>();
  quarter.template operator()<2>();
  quarter.template operator()<3>();
  unstored.sums = nullptr;
  if (unit.a) {
    for (int j = 1; j < unit.k_tiles; j++) {
      unit.a += 2 * S::kATileBytes, unit.b += 2 * S::kBTileBytes;
      tile_load<4>(unit.a, S::kARowBytes);
      tile_load<6>(unit.b, 64);
      Product::template multiply<0, 4, 6>();
      tile_load<7>(unit.b + S::kBTileBytes, 64);
      Product::template multiply<1, 4, 7>();
      if (unit.tiles < 4) continue;
      tile_load<5>(unit.a + S::kATileBytes, S::kARowBytes);
      Product::template multiply<2, 5, 6>();
      Product::template multiply<3, 5, 7>();
    }
    unstored = {unit.sums, unit.tile_stride};
  }
  if (finishing) {
#pragma GCC unroll 16
    for (int r = 0; r < kTile; r++) _mm512_store_ps(totals + r * kTile, total[r]);
  }
}

template <class Product>
__attribute__((noinline)) void four_steps(const Unit (&units)[kUnits], const Chunk& done, Unstored& unstored) {
  step<Product, 0>(units[0], done, unstored);
  step<Product, 1>(units[1], done, unstored);
  step<Product, 2>(units[2], done, unstored);
  step<Product, 3>(units[3], done, unstored);
}

struct PanelShape {
  int64_t k_tiles, units;                         // of the panel
  int64_t rows, a_block_bytes, multiples_offset;  // A: blocks of 32 rows; where in a block the panel's multiples are
  bool fresh;
};

// WHY 2 KB more than four C tiles: else every store would lie a multiple of 4 KB from the loads behind it, and they would wait for it.
constexpr int64_t kNear = kTile * kTile, kFar = kUnits * kNear + 512, kSumsBytes = kUnits * kFar * 4;

// totals [row blocks][4][16][16] += A @ panel.
// WHY sums are transposed from chunk to chunk: step u of a chunk has freed the places of one C tile's four units, and just as many
// are needed for the four C tiles of its own unit. 16 KB in place of 32: with A, B and totals the rest of L1 is full.
template <class Product>
void panel_product(const PanelShape& shape, const uint8_t* a, const uint8_t* b, const float* scales, float* totals, float* sums /* kSumsBytes */) {
  using S = Shape<Product>;
  Chunk done{sums, scales, scales, totals, kNear, kFar, 0, 0, true};
  Unstored unstored{nullptr, 0};
  for (int64_t row = 0; row < shape.rows; row += kPairRows, a += shape.a_block_bytes, totals += 4 * kTile * kTile) {
    const int tiles = shape.rows - row > kTile ? 4 : 2;
    const float* multiples = reinterpret_cast<const float*>(a + shape.multiples_offset);
    for (int64_t unit0 = 0; unit0 < shape.units; unit0 += kUnits) {
      const int64_t tile_stride = done.unit_stride, unit_stride = done.tile_stride;
      Unit units[kUnits];
      for (int u = 0; u < kUnits; u++) {
        const int64_t k_tile = (unit0 + u) * S::kTilesPerUnit, left = shape.k_tiles - k_tile;
        units[u] = {left > 0 ? a + k_tile * 2 * S::kATileBytes : nullptr,
                    b + k_tile * 2 * S::kBTileBytes,
                    static_cast<int>(std::min<int64_t>(S::kTilesPerUnit, left)),
                    tiles,
                    sums + u * unit_stride,
                    tile_stride};
      }
      four_steps<Product>(units, done, unstored);
      done = {sums,
              scales + unit0 * kPairColumns,
              multiples + unit0 * kPairRows,
              totals,
              tile_stride,
              unit_stride,
              tiles,
              static_cast<int>(std::min<int64_t>(kUnits, shape.units - unit0)),
              shape.fresh && unit0 == 0};
    }
  }
  const Unit none[kUnits] = {};
  four_steps<Product>(none, done, unstored);
}

// ---- All of x and w ----

// A Kernel is a Product and, for one format: prepare_row, unpack, factor. Rows of x are prepared once, in blocks of 32; w is
// unpacked in groups of panels of 32 columns, and a group is used for all rows of a chunk while it is in L2.
template <class Kernel>
void amx_loop(const Params& p) {
  using Product = typename Kernel::Product;
  using S = Shape<Product>;
  constexpr int64_t kChunkRows = 512, kGroupPanels = 4;
  const Strips s(p);
  const int64_t num_strips = s.layout.num_strips(), num_panels = (num_strips + 3) / 4;
  const int64_t k_tiles = (s.num_blocks * 32 + S::kTileK - 1) / S::kTileK, num_units = (k_tiles + S::kTilesPerUnit - 1) / S::kTilesPerUnit;
  const int64_t chunk_rows = std::min(p.M, kChunkRows), chunk_blocks = (chunk_rows + kPairRows - 1) / kPairRows;
  // For few rows a panel is longer in k, so that packed bytes are read in longer streams.
  const int64_t panel_k = chunk_blocks > 2 ? 512 : 2048, panel_units = std::max<int64_t>(panel_k / S::kUnitK, kUnits),
                panel_tiles = panel_units * S::kTilesPerUnit;
  const int64_t codes_bytes = k_tiles * 2 * S::kATileBytes, a_block_bytes = codes_bytes + (Kernel::kMultiples ? num_units * kPairRows * 4 : 0);
  uint8_t* a = scratch(0, chunk_blocks * (a_block_bytes + kPairRows * sizeof(float)));
  float* unit = reinterpret_cast<float*>(a + chunk_blocks * a_block_bytes);
  const float factor = Kernel::factor(s);

  for (int64_t m0 = 0; m0 < p.M; m0 += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, p.M - m0), row_blocks = (rows + kPairRows - 1) / kPairRows;
    const int64_t prepare_tasks = std::min(p.num_threads, row_blocks);
    parallel_tasks(prepare_tasks, [&](int64_t task) {
      for (int64_t b = row_blocks * task / prepare_tasks; b < row_blocks * (task + 1) / prepare_tasks; b++) {
        uint8_t* block = a + b * a_block_bytes;
        const int64_t in_block = std::min<int64_t>(kPairRows, rows - b * kPairRows);
        if (in_block < kPairRows) std::memset(block, 0, a_block_bytes);
        for (int64_t r = 0; r < in_block; r++)
          unit[b * kPairRows + r] = Kernel::prepare_row(p, m0 + b * kPairRows + r, k_tiles, block, r, reinterpret_cast<float*>(block + codes_bytes) + r);
      }
    });

    // Threads split the panels; if there are fewer of those than threads, the row blocks as well.
    const int64_t across = std::min(p.num_threads, num_panels), down = std::clamp<int64_t>(p.num_threads / across, 1, row_blocks);
    parallel_tasks(across * down, [&](int64_t task) {
      const int64_t panel0 = num_panels * (task % across) / across, panel1 = num_panels * (task % across + 1) / across;
      const int64_t block0 = row_blocks * (task / across) / down, block1 = row_blocks * (task / across + 1) / down;
      const int64_t first_row = block0 * kPairRows, task_rows = std::min(rows, block1 * kPairRows) - first_row;
      const int64_t b_bytes = panel_tiles * 2 * S::kBTileBytes, scales_bytes = panel_units * kPairColumns * 4;
      constexpr int64_t kTotalsBytes = 4 * kTile * kTile * 4;
      uint8_t* memory = scratch(1, kSumsBytes + kGroupPanels * (b_bytes + scales_bytes + (block1 - block0) * kTotalsBytes));
      float* sums = reinterpret_cast<float*>(memory);
      uint8_t* b = memory + kSumsBytes;
      float* scales = reinterpret_cast<float*>(b + kGroupPanels * b_bytes);
      float* totals = scales + kGroupPanels * panel_units * kPairColumns;
      const int64_t totals_floats = (block1 - block0) * kTotalsBytes / 4;
      configure_tiles(S::kARowBytes, S::kBRows);
      for (int64_t group = panel0; group < panel1; group += kGroupPanels) {
        const int64_t panels = std::min(kGroupPanels, panel1 - group);
        for (int64_t unit0 = 0; unit0 < num_units; unit0 += panel_units) {
          const int64_t tile0 = unit0 * S::kTilesPerUnit, block_k0 = tile0 * S::kTileK / 32;
          const int64_t units = std::min(panel_units, num_units - unit0), tiles = std::min(panel_tiles, k_tiles - tile0);
          const int64_t blocks = std::min(s.num_blocks - block_k0, panel_tiles * S::kTileK / 32);
          const PanelShape shape{tiles, units, task_rows, a_block_bytes, codes_bytes - tile0 * 2 * S::kATileBytes + unit0 * kPairRows * 4, unit0 == 0};
          for (int64_t i = 0; i < panels; i++) {
            uint8_t* b_panel = b + i * b_bytes;
            float* panel_scales = scales + i * panel_units * kPairColumns;
            for (int half = 0; half < 2; half++) {
              // WHY min: a strip past the last one is one nobody stores, but it must be readable.
              const int64_t strip = std::min((group + i) * 4 + half * 2, num_strips - 1);
              Kernel::unpack(s, strip, strip + 1 < num_strips ? s.strip_bytes : 0, block_k0, blocks, half, b_panel, panel_scales);
            }
            panel_product<Product>(shape, a + block0 * a_block_bytes + tile0 * 2 * S::kATileBytes, b_panel, panel_scales, totals + i * totals_floats, sums);
          }
        }
        for (int64_t i = 0; i < panels; i++)
          for (int64_t m = 0; m < task_rows; m++)
            for (int64_t strip = (group + i) * 4; strip < std::min(num_strips, (group + i + 1) * 4); strip++) {
              const int64_t tile = m % kPairRows / kTile * 2 + strip % 4 / 2;
              float* eight = totals + i * totals_floats + ((m / kPairRows * 4 + tile) * kTile + m % kTile) * kTile + strip % 2 * 8;
              scale_sums(eight, factor);
              store_strip(p, m0 + first_row + m, strip, eight, unit[first_row + m]);
            }
      }
      release_tiles();
    });
  }
}

}  // namespace
}  // namespace taut::quant_linear
