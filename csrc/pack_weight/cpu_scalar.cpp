// COMPUTES  packed = layout(codes, scales, zeros); its inverse; and rows of dequant(w) as fp32, bf16 or fp16
// LAYOUT    canonical and Rows8 (common/formats.h)
// WORK      a task is a range of strips (8 rows of w), so that two tasks never write one byte
// BOUND     DRAM: every byte of w is read once and written once
// LIMITS    none
#include <algorithm>
#include <cstring>

#include "pack_weight/op.h"

namespace taut::pack_weight::cpu_scalar {
namespace {

template <class F>
void for_strips(int64_t first, int64_t last, int64_t num_threads, const F& f) {
  const int64_t count = last - first, num_tasks = std::clamp<int64_t>(count, 1, num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t s = first + count * task / num_tasks; s < first + count * (task + 1) / num_tasks; s++) f(s);
  });
}

// One row of codes, one byte each, padded to whole k-blocks.
void expand_row(const Params& p, int64_t n, uint8_t* row) {
  const WeightSpec& w = p.weight;
  const uint8_t* codes = p.codes + n * w.code_row_bytes();
  if (w.format == Format::kInt4) {
    for (int64_t k = 0; k < w.K; k++) row[k] = codes[k / 2] >> (k % 2 * 4) & 15;
  } else {
    for (int64_t k = 0; k < w.K; k++) row[k] = static_cast<uint8_t>(codes[k] + 128);
  }
}

void pack_block(const Rows8& layout, const uint8_t* const rows[8], int64_t k0, uint8_t* out) {
  if (layout.spec.format == Format::kInt4) {
    for (int64_t v = 0; v < 4; v++)
      for (int64_t r = 0; r < 8; r++)
        for (int64_t i = 0; i < 4; i++) {
          const uint8_t* code = rows[r] + k0 + v * 4 + i;
          out[v * 32 + r * 4 + i] = static_cast<uint8_t>(code[0] | code[16] << 4);
        }
  } else {
    for (int64_t v = 0; v < 8; v++)
      for (int64_t r = 0; r < 8; r++) std::memcpy(out + v * 32 + r * 4, rows[r] + k0 + v * 4, 4);
  }
}

}  // namespace

void pack(const Params& p) {
  const Rows8 layout{p.weight};
  const WeightSpec& w = p.weight;
  const int64_t padded_k = layout.num_blocks() * Rows8::kBlockK;
  for_strips(0, layout.num_strips(), p.num_threads, [&](int64_t strip) {
    uint8_t* expanded = scratch(1, 8 * padded_k);
    std::memset(expanded, 0, 8 * padded_k);
    const uint8_t* rows[8];
    for (int64_t r = 0; r < 8; r++) {
      rows[r] = expanded + r * padded_k;
      if (strip * 8 + r < w.N) expand_row(p, strip * 8 + r, expanded + r * padded_k);
    }
    for (int64_t k0 = 0; k0 < padded_k; k0 += Rows8::kBlockK) pack_block(layout, rows, k0, p.packed + layout.block_offset(strip * 8, k0));
    for (int64_t s = 0; s < layout.num_superblocks(); s++)
      std::memset(p.packed + strip * layout.strip_bytes() + s * layout.superblock_bytes(), 0, layout.header_bytes());
    for (int64_t n = strip * 8; n < std::min(w.N, strip * 8 + 8); n++)
      for (int64_t k = 0; k < w.K; k += layout.layout_group()) {
        const int64_t group = n * w.num_groups() + (w.group_size ? k / w.group_size : 0);
        std::memcpy(p.packed + layout.scale_offset(n, k), p.scales + group, 2);
        if (w.zeros) p.packed[layout.zero_offset(n, k)] = p.zeros[group];
      }
  });
}

void unpack(const Params& p) {
  const Rows8 layout{p.weight};
  const WeightSpec& w = p.weight;
  for_strips(0, layout.num_strips(), p.num_threads, [&](int64_t strip) {
    for (int64_t n = strip * 8; n < std::min(w.N, strip * 8 + 8); n++) {
      uint8_t* codes = p.codes + n * w.code_row_bytes();
      std::memset(codes, 0, w.code_row_bytes());
      for (int64_t k0 = 0; k0 < w.K; k0 += Rows8::kBlockK) {
        const uint8_t* block = p.packed + layout.block_offset(n, k0) + n % 8 * 4;
        for (int64_t k = k0; k < std::min(w.K, k0 + Rows8::kBlockK); k++) {
          const int64_t i = k - k0;
          if (w.format == Format::kInt4) codes[k / 2] |= (block[i % 16 / 4 * 32 + i % 4] >> (i / 16 * 4) & 15) << (k % 2 * 4);
          else codes[k] = static_cast<uint8_t>(block[i / 4 * 32 + i % 4] - 128);
        }
      }
      for (int64_t g = 0; g < w.num_groups(); g++) {
        const int64_t k = g * w.group_size;
        std::memcpy(p.scales + n * w.num_groups() + g, p.packed + layout.scale_offset(n, k), 2);
        if (w.zeros) p.zeros[n * w.num_groups() + g] = p.packed[layout.zero_offset(n, k)];
      }
    }
  });
}

void dequantize(const WeightSpec& w, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t num_threads) {
  const Rows8 layout{w};
  if (row_begin == row_end) return;
  for_strips(row_begin / 8, (row_end + 7) / 8, num_threads, [&](int64_t strip) {
    for (int64_t n = std::max(row_begin, strip * 8); n < std::min(row_end, strip * 8 + 8); n++)
      for (int64_t k0 = 0; k0 < w.K; k0 += Rows8::kBlockK) {
        const uint8_t* block = packed + layout.block_offset(n, k0) + n % 8 * 4;
        const float scale = fp16_to_float(*reinterpret_cast<const uint16_t*>(packed + layout.scale_offset(n, k0)));
        const int zero = w.format == Format::kInt8 ? 128 : w.zeros ? packed[layout.zero_offset(n, k0)] : 8;
        for (int64_t k = k0; k < std::min(w.K, k0 + Rows8::kBlockK); k++) {
          const int64_t i = k - k0;
          const int code = w.format == Format::kInt8 ? block[i / 4 * 32 + i % 4] : block[i % 16 / 4 * 32 + i % 4] >> (i / 16 * 4) & 15;
          store_float(out, (n - row_begin) * w.K + k, dtype, static_cast<float>(code - zero) * scale);
        }
      }
  });
}

}  // namespace taut::pack_weight::cpu_scalar
