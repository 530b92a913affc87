// COMPUTES  packed = layout(codes, scales, zeros); its inverse; and rows of dequant(w) as fp32, bf16 or fp16
// LAYOUT    canonical, Rows8 and MmaTiles (common/formats.h)
// WORK      a task is a range of bands: the rows of w that share bytes (8 in Rows8, 64 in MmaTiles), so that two tasks never
//           write one byte. A band goes block by block (32 or 64 k), through a copy of the block with a byte a code.
// BOUND     DRAM: every byte of w is read once and written once
// LIMITS    none
#include <algorithm>
#include <cstring>

#include "common/codes.h"
#include "pack_weight/op.h"

namespace taut::pack_weight::cpu_scalar {
namespace {

// Rows8 and MmaTiles as the loops below see them: where a block's codes go, a byte each in the canonical order [rows][k], and
// what else a band holds.
struct Rows8Bands : Rows8 {
  static constexpr int64_t kBandRows = 8, kBandK = 32;
  using Codes = uint8_t[kBandRows][kBandK];

  constexpr int64_t scale_step() const { return spec.group_size ? spec.group_size : layout_group(); }  // k from one stored scale of a row to the next

  void store(const Codes& codes, int64_t n, int64_t k, uint8_t* packed) const {
    for (int64_t r = 0; r < kBandRows; r++) store_rows8_codes(*this, packed + block_offset(n, k), r, codes[r]);
  }
  void load(const uint8_t* packed, int64_t n, int64_t k, Codes& codes) const {
    for (int64_t r = 0; r < kBandRows; r++) load_rows8_codes(*this, packed + block_offset(n, k), r, codes[r]);
  }
  void clear_scales(int64_t band, uint8_t* packed) const {
    for (int64_t s = 0; s < num_superblocks(); s++) std::memset(packed + band * strip_bytes() + s * superblock_bytes(), 0, header_bytes());
  }
};

struct MmaTilesBands : MmaTiles {
  static constexpr int64_t kBandRows = kTileN, kBandK = kTileK;
  using Codes = uint8_t[kBandRows][kBandK];

  constexpr int64_t scale_step() const { return spec.group_size ? spec.group_size : spec.K; }

  void store(const Codes& codes, int64_t n, int64_t k, uint8_t* packed) const {
    uint8_t* out = packed + code_offset(n, k);
    if (spec.format == Format::kInt4) {
      for_nibbles([&](int64_t row, int64_t at) { *out++ = static_cast<uint8_t>(codes[row][at] | codes[row + 8][at] << 4); });
    } else {
      for_bytes([&](int64_t row, int64_t at) { *out++ = codes[row][at]; });
    }
  }
  void load(const uint8_t* packed, int64_t n, int64_t k, Codes& codes) const {
    const uint8_t* in = packed + code_offset(n, k);
    if (spec.format == Format::kInt4) {
      for_nibbles([&](int64_t row, int64_t at) { codes[row][at] = *in & 15, codes[row + 8][at] = *in++ >> 4; });
    } else {
      for_bytes([&](int64_t row, int64_t at) { codes[row][at] = *in++; });
    }
  }
  void clear_scales(int64_t band, uint8_t* packed) const {
    const int64_t count = num_groups() * kTileN;
    std::memset(packed + scales_begin() + band * count * 2, 0, count * 2);
    if (spec.zeros) std::memset(packed + zeros_begin() + band * count, 0, count);
  }

 private:
  // Calls f(row, k) for each byte of a tile, in the order of its bytes. int4: the high nibble is 8 rows further down.
  template <class F>
  static void for_nibbles(const F& f) {
    for (int64_t strip = 0; strip < kTileN; strip += kStripN)
      for (int64_t lane = 0; lane < 32; lane++)
        for (int64_t step = 0; step < kTileK; step += 16) four_k(f, strip + lane / 4, step + lane % 4 * 2);
  }
  template <class F>
  static void for_bytes(const F& f) {
    for (int64_t strip = 0; strip < kTileN; strip += kStripN)
      for (int64_t fragment = 0; fragment < kTileK; fragment += 32)
        for (int64_t lane = 0; lane < 32; lane++)
          for (int64_t step = 0; step < 32; step += 16)
            for (int64_t upper = 0; upper < kStripN; upper += 8) four_k(f, strip + lane / 4 + upper, fragment + step + lane % 4 * 2);
  }
  template <class F>
  static void four_k(const F& f, int64_t row, int64_t k) {
    f(row, k), f(row, k + 8), f(row, k + 1), f(row, k + 9);
  }
};

template <class F>
void with_bands(const WeightSpec& w, Layout layout, const F& f) {
  if (layout == Layout::kRows8) f(Rows8Bands{{w}});
  else f(MmaTilesBands{{w}});
}

template <class F>
void for_bands(int64_t first, int64_t last, int64_t num_threads, const F& f) {
  const int64_t count = last - first, num_tasks = std::clamp<int64_t>(count, 1, num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t band = first + count * task / num_tasks; band < first + count * (task + 1) / num_tasks; band++) f(band);
  });
}

template <class Bands>
void pack_bands(const Bands& layout, const Params& p) {
  const WeightSpec& w = p.weight;
  constexpr int64_t kRows = Bands::kBandRows, kBlockK = Bands::kBandK;
  const int64_t bytes = scale_bytes(scale_type(w.format));
  const int64_t padded_k = (w.K + kBlockK - 1) / kBlockK * kBlockK;
  for_bands(0, (w.N + kRows - 1) / kRows, p.num_threads, [&](int64_t band) {
    const int64_t n0 = band * kRows, rows = std::min(kRows, w.N - n0);
    alignas(64) typename Bands::Codes codes;
    for (int64_t k0 = 0; k0 < padded_k; k0 += kBlockK) {
      const int64_t count = std::min(kBlockK, w.K - k0);
      if (rows < kRows || count < kBlockK) std::memset(codes, 0, sizeof(codes));
      for (int64_t r = 0; r < rows; r++) expand_codes(w, p.codes + (n0 + r) * w.code_row_bytes(), k0, count, codes[r]);
      layout.store(codes, n0, k0, p.packed);
    }
    layout.clear_scales(band, p.packed);
    for (int64_t n = n0; n < n0 + rows; n++)
      for (int64_t k = 0; k < w.K; k += layout.scale_step()) {
        const int64_t group = w.scale_index(n, k);
        std::memcpy(p.packed + layout.scale_offset(n, k), static_cast<const uint8_t*>(p.scales) + group * bytes, bytes);
        if (w.zeros) p.packed[layout.zero_offset(n, k)] = p.zeros[group];
      }
  });
}

template <class Bands>
void unpack_bands(const Bands& layout, const Params& p) {
  const WeightSpec& w = p.weight;
  constexpr int64_t kRows = Bands::kBandRows, kBlockK = Bands::kBandK;
  const int64_t bytes = scale_bytes(scale_type(w.format));
  for_bands(0, (w.N + kRows - 1) / kRows, p.num_threads, [&](int64_t band) {
    const int64_t n0 = band * kRows, rows = std::min(kRows, w.N - n0);
    alignas(64) typename Bands::Codes codes;
    for (int64_t k0 = 0; k0 < w.K; k0 += kBlockK) {
      layout.load(p.packed, n0, k0, codes);
      for (int64_t r = 0; r < rows; r++) collect_codes(w, codes[r], k0, std::min(kBlockK, w.K - k0), p.codes + (n0 + r) * w.code_row_bytes());
    }
    for (int64_t n = n0; n < n0 + rows; n++)
      for (int64_t g = 0; g < w.num_groups(); g++) {
        const int64_t k = g * w.group_size;
        if (w.format == Format::kFp8Block && n % 128) break;  // one scale for 128 rows
        std::memcpy(static_cast<uint8_t*>(p.scales) + w.scale_index(n, k) * bytes, p.packed + layout.scale_offset(n, k), bytes);
        if (w.zeros) p.zeros[w.scale_index(n, k)] = p.packed[layout.zero_offset(n, k)];
      }
  });
}

template <class Bands>
void dequantize_bands(const Bands& layout, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t num_threads) {
  const WeightSpec& w = layout.spec;
  constexpr int64_t kRows = Bands::kBandRows, kBlockK = Bands::kBandK;
  const int64_t step = w.group_size == 16 ? 16 : 32;
  const double global_scale = w.format == Format::kNvfp4 ? load_scale(ScaleType::kFp32, packed + Rows8{w}.global_scale_offset()) : 1.0f;
  for_bands(row_begin / kRows, (row_end + kRows - 1) / kRows, num_threads, [&](int64_t band) {
    const int64_t n0 = band * kRows, first = std::max(row_begin, n0), last = std::min(row_end, n0 + kRows);
    alignas(64) typename Bands::Codes codes;
    for (int64_t k0 = 0; k0 < w.K; k0 += kBlockK) {
      layout.load(packed, n0, k0, codes);
      for (int64_t n = first; n < last; n++)
        for (int64_t k = k0; k < std::min(w.K, k0 + kBlockK); k += step) {
          float values[32];
          const double scale = load_scale(scale_type(w.format), packed + layout.scale_offset(n, k)) * global_scale;
          const int64_t count = std::min<int64_t>(step, w.K - k);
          dequantize_codes(w.format, &codes[n - n0][k - k0], count, scale, w.zeros ? packed[layout.zero_offset(n, k)] : zero_code(w.format), values);
          for (int64_t i = 0; i < count; i++) store_float(out, (n - row_begin) * w.K + k + i, dtype, values[i]);
        }
    }
  });
}

}  // namespace

void pack(const Params& p) {
  with_bands(p.weight, p.layout, [&](const auto& bands) { pack_bands(bands, p); });
  if (p.weight.format != Format::kNvfp4) return;
  uint8_t* end = p.packed + Rows8{p.weight}.global_scale_offset();
  std::memset(end, 0, p.packed + Rows8{p.weight}.total_bytes() - end);
  std::memcpy(end, p.global_scale, sizeof(float));
}

void unpack(const Params& p) {
  with_bands(p.weight, p.layout, [&](const auto& bands) { unpack_bands(bands, p); });
  if (p.weight.format == Format::kNvfp4) std::memcpy(p.global_scale, p.packed + Rows8{p.weight}.global_scale_offset(), sizeof(float));
}

void dequantize(const WeightSpec& w, Layout layout, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t num_threads) {
  if (row_begin == row_end) return;
  with_bands(w, layout, [&](const auto& bands) { dequantize_bands(bands, packed, row_begin, row_end, out, dtype, num_threads); });
}

}  // namespace taut::pack_weight::cpu_scalar
