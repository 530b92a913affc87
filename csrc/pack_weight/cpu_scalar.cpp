// COMPUTES  packed = layout(codes, scales, zeros); its inverse; and rows of dequant(w) as fp32, bf16 or fp16
// LAYOUT    canonical, Rows8 and MmaTiles (common/formats.h)
// WORK      a task is a range of bands: the rows of w that share bytes (8 in Rows8, 64 in MmaTiles), so that two tasks never
//           write one byte. A band goes block by block (32 or 64 k), through a copy of the block with a byte a code.
// BOUND     DRAM: every byte of w is read once and written once
// LIMITS    none
#include <algorithm>
#include <cstring>

#include "pack_weight/op.h"

namespace taut::pack_weight::cpu_scalar {
namespace {

// Rows8 and MmaTiles as the loops below see them: where a block's codes go, a byte each in the canonical order [rows][k], and
// what else a band holds.
struct Rows8Bands : Rows8 {
  static constexpr int64_t kBandRows = 8, kBandK = 32;
  using Codes = uint8_t[kBandRows][kBandK];

  constexpr int64_t scale_step() const { return layout_group(); }  // k from one stored scale of a row to the next
  uint32_t offset() const { return spec.format == Format::kInt8 ? 0x80808080u : 0; }

  void store(const Codes& codes, int64_t n, int64_t k, uint8_t* packed) const {
    uint8_t* out = packed + block_offset(n, k);
    if (spec.format == Format::kInt4) {
      for (int64_t v = 0; v < 4; v++)
        for (int64_t r = 0; r < 8; r++)
          for (int64_t i = 0; i < 4; i++) out[v * 32 + r * 4 + i] = static_cast<uint8_t>(codes[r][v * 4 + i] | codes[r][16 + v * 4 + i] << 4);
    } else {
      for (int64_t v = 0; v < 8; v++)
        for (int64_t r = 0; r < 8; r++) copy4(out + v * 32 + r * 4, &codes[r][v * 4]);
    }
  }
  void load(const uint8_t* packed, int64_t n, int64_t k, Codes& codes) const {
    const uint8_t* in = packed + block_offset(n, k);
    if (spec.format == Format::kInt4) {
      for (int64_t v = 0; v < 4; v++)
        for (int64_t r = 0; r < 8; r++)
          for (int64_t i = 0; i < 4; i++) codes[r][v * 4 + i] = in[v * 32 + r * 4 + i] & 15, codes[r][16 + v * 4 + i] = in[v * 32 + r * 4 + i] >> 4;
    } else {
      for (int64_t v = 0; v < 8; v++)
        for (int64_t r = 0; r < 8; r++) copy4(&codes[r][v * 4], in + v * 32 + r * 4);
    }
  }
  void clear_scales(int64_t band, uint8_t* packed) const {
    for (int64_t s = 0; s < num_superblocks(); s++) std::memset(packed + band * strip_bytes() + s * superblock_bytes(), 0, header_bytes());
  }

 private:
  void copy4(uint8_t* to, const uint8_t* from) const {
    uint32_t four;
    std::memcpy(&four, from, 4);
    four ^= offset();
    std::memcpy(to, &four, 4);
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

// `count` codes of a canonical row, one byte each, from an even k on.
void expand(const WeightSpec& w, const uint8_t* row, int64_t k, int64_t count, uint8_t* codes) {
  if (w.format != Format::kInt4) {
    std::memcpy(codes, row + k, count);
    return;
  }
  const uint8_t* pairs = row + k / 2;
  for (int64_t i = 0; i < count / 2; i++) codes[2 * i] = pairs[i] & 15, codes[2 * i + 1] = pairs[i] >> 4;
  if (count % 2) codes[count - 1] = pairs[count / 2] & 15;
}
void collect(const WeightSpec& w, const uint8_t* codes, int64_t k, int64_t count, uint8_t* row) {
  if (w.format != Format::kInt4) {
    std::memcpy(row + k, codes, count);
    return;
  }
  for (int64_t i = 0; i < count; i += 2) row[(k + i) / 2] = static_cast<uint8_t>(codes[i] | (i + 1 < count ? codes[i + 1] << 4 : 0));
}

// The numbers that up to 32 codes of one group stand for.
void numbers(const WeightSpec& w, const uint8_t* codes, int64_t count, float scale, int zero, float* out) {
  if (w.format == Format::kFp8E4M3) {
    for (int64_t i = 0; i < count; i++) out[i] = e4m3_to_float(codes[i]) * scale;
  } else if (w.format == Format::kInt8) {
    for (int64_t i = 0; i < count; i++) out[i] = static_cast<float>(static_cast<int8_t>(codes[i])) * scale;
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = static_cast<float>(codes[i] - zero) * scale;
  }
}

template <class Bands>
void pack_bands(const Bands& layout, const Params& p) {
  const WeightSpec& w = p.weight;
  constexpr int64_t kRows = Bands::kBandRows, kBlockK = Bands::kBandK;
  const int64_t padded_k = (w.K + kBlockK - 1) / kBlockK * kBlockK;
  for_bands(0, (w.N + kRows - 1) / kRows, p.num_threads, [&](int64_t band) {
    const int64_t n0 = band * kRows, rows = std::min(kRows, w.N - n0);
    alignas(64) typename Bands::Codes codes;
    for (int64_t k0 = 0; k0 < padded_k; k0 += kBlockK) {
      const int64_t count = std::min(kBlockK, w.K - k0);
      if (rows < kRows || count < kBlockK) std::memset(codes, 0, sizeof(codes));
      for (int64_t r = 0; r < rows; r++) expand(w, p.codes + (n0 + r) * w.code_row_bytes(), k0, count, codes[r]);
      layout.store(codes, n0, k0, p.packed);
    }
    layout.clear_scales(band, p.packed);
    for (int64_t n = n0; n < n0 + rows; n++)
      for (int64_t k = 0; k < w.K; k += layout.scale_step()) {
        const int64_t group = n * w.num_groups() + (w.group_size ? k / w.group_size : 0);
        std::memcpy(p.packed + layout.scale_offset(n, k), p.scales + group, 2);
        if (w.zeros) p.packed[layout.zero_offset(n, k)] = p.zeros[group];
      }
  });
}

template <class Bands>
void unpack_bands(const Bands& layout, const Params& p) {
  const WeightSpec& w = p.weight;
  constexpr int64_t kRows = Bands::kBandRows, kBlockK = Bands::kBandK;
  for_bands(0, (w.N + kRows - 1) / kRows, p.num_threads, [&](int64_t band) {
    const int64_t n0 = band * kRows, rows = std::min(kRows, w.N - n0);
    alignas(64) typename Bands::Codes codes;
    for (int64_t k0 = 0; k0 < w.K; k0 += kBlockK) {
      layout.load(p.packed, n0, k0, codes);
      for (int64_t r = 0; r < rows; r++) collect(w, codes[r], k0, std::min(kBlockK, w.K - k0), p.codes + (n0 + r) * w.code_row_bytes());
    }
    for (int64_t n = n0; n < n0 + rows; n++)
      for (int64_t g = 0; g < w.num_groups(); g++) {
        const int64_t k = g * w.group_size;
        std::memcpy(p.scales + n * w.num_groups() + g, p.packed + layout.scale_offset(n, k), 2);
        if (w.zeros) p.zeros[n * w.num_groups() + g] = p.packed[layout.zero_offset(n, k)];
      }
  });
}

template <class Bands>
void dequantize_bands(const Bands& layout, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t num_threads) {
  const WeightSpec& w = layout.spec;
  constexpr int64_t kRows = Bands::kBandRows, kBlockK = Bands::kBandK;
  for_bands(row_begin / kRows, (row_end + kRows - 1) / kRows, num_threads, [&](int64_t band) {
    const int64_t n0 = band * kRows, first = std::max(row_begin, n0), last = std::min(row_end, n0 + kRows);
    alignas(64) typename Bands::Codes codes;
    for (int64_t k0 = 0; k0 < w.K; k0 += kBlockK) {
      layout.load(packed, n0, k0, codes);
      for (int64_t n = first; n < last; n++)
        for (int64_t k = k0; k < std::min(w.K, k0 + kBlockK); k += 32) {
          float values[32];
          uint16_t scale;
          std::memcpy(&scale, packed + layout.scale_offset(n, k), 2);
          const int64_t count = std::min<int64_t>(32, w.K - k);
          numbers(w, &codes[n - n0][k - k0], count, fp16_to_float(scale), w.zeros ? packed[layout.zero_offset(n, k)] : 8, values);
          for (int64_t i = 0; i < count; i++) store_float(out, (n - row_begin) * w.K + k + i, dtype, values[i]);
        }
    }
  });
}

}  // namespace

void pack(const Params& p) {
  with_bands(p.weight, p.layout, [&](const auto& bands) { pack_bands(bands, p); });
}

void unpack(const Params& p) {
  with_bands(p.weight, p.layout, [&](const auto& bands) { unpack_bands(bands, p); });
}

void dequantize(const WeightSpec& w, Layout layout, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, int64_t num_threads) {
  if (row_begin == row_end) return;
  with_bands(w, layout, [&](const auto& bands) { dequantize_bands(bands, packed, row_begin, row_end, out, dtype, num_threads); });
}

}  // namespace taut::pack_weight::cpu_scalar
