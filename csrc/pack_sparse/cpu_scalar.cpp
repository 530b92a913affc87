// COMPUTES  packed = Sparse8(codes, scales, meta) or SparseTiles, and the inverses
// LAYOUT    canonical, Sparse8 and SparseTiles (common/sparse.h)
// WORK      a task is a range of strips of 8 rows, which share no byte with others; of SparseTiles, of words of places
// BOUND     DRAM: every byte is read once and written once
// LIMITS    int8, int4 without zeros, fp8_e4m3, fp16, bf16
#include <algorithm>
#include <cstring>

#include "pack_sparse/op.h"
#include "pack_weight/op.h"

namespace taut::pack_sparse::cpu_scalar {
namespace {

template <class F>
void for_strips(const Params& p, const F& f) {
  const int64_t count = p.weight.dense().num_strips(), num_tasks = std::clamp<int64_t>(count, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t strip = count * task / num_tasks; strip < count * (task + 1) / num_tasks; strip++) f(strip);
  });
}

// Bits [at, at + count) of a little-endian string; count is at most 4.
int bits_at(const uint8_t* bytes, int64_t at, int64_t count) {
  int value = bytes[at / 8] >> at % 8;
  if (at % 8 + count > 8) value |= bytes[at / 8 + 1] << (8 - at % 8);
  return value & ((1 << count) - 1);
}
void set_bits(uint8_t* bytes, int64_t at, int64_t count, int value) {
  bytes[at / 8] |= static_cast<uint8_t>(value << at % 8);
  if (at % 8 + count > 8) bytes[at / 8 + 1] |= static_cast<uint8_t>(value >> (8 - at % 8));
}

// The byte of a code in Sparse8: int8 is kept unsigned.
int stored(Format format, int code) { return format == Format::kInt8 ? code ^ 0x80 : code; }

}  // namespace

void pack(const Params& p) {
  const Sparse8& w = p.weight;
  const WeightSpec& spec = w.spec;
  const int bits = static_cast<int>(code_bits(spec.format)), zero = sparse_zero(spec.format);
  const int64_t padded = w.dense().num_blocks() * w.kept_per_block(), step = spec.group_size ? spec.group_size : w.dense().layout_group();
  for_strips(p, [&](int64_t strip) {
    std::memset(p.packed + strip * w.strip_bytes(), 0, w.strip_bytes());
    for (int64_t n = strip * 8; n < strip * 8 + 8; n++) {
      const int64_t row = std::min(n, spec.N - 1);
      const uint8_t *codes = p.codes + row * w.kept_row_bytes(), *meta = p.meta + row / w.pattern.v * w.meta_row_bytes();
      for (int64_t j = 0; j < padded; j++) {
        const bool counts = n < spec.N && j < w.kept();
        if (bits == 16) {
          if (counts) std::memcpy(p.packed + w.code_offset(n, j), codes + j * 2, 2);
        } else {
          const int code = counts ? stored(spec.format, bits == 8 ? codes[j] : codes[j / 2] >> j % 2 * 4 & 15) : zero;
          p.packed[w.code_offset(n, j)] |= static_cast<uint8_t>(code << w.code_shift(j));
        }
        if (counts && (w.pattern.v == 1 || n % 8 == 0)) {
          const int place = bits_at(meta, j * w.pattern.place_bits(), w.pattern.place_bits());
          p.packed[w.place_offset(n, j)] |= static_cast<uint8_t>(w.field_of(j, place) << w.place_shift(j));
        }
      }
      if (n >= spec.N || bits == 16) continue;
      for (int64_t k = 0; k < spec.K; k += step) std::memcpy(p.packed + w.scale_offset(n, k), p.scales + spec.scale_index(n, k), 2);
    }
  });
}

void unpack(const Params& p) {
  const Sparse8& w = p.weight;
  const WeightSpec& spec = w.spec;
  const bool whole = code_bits(spec.format) == 8, numbers = is_16bit(spec.format);
  const int64_t step = spec.group_size ? spec.group_size : w.dense().layout_group();
  // Rows that share places are of one task: 16 rows are two strips.
  const int64_t bands = (spec.N + 15) / 16, num_tasks = std::clamp<int64_t>(bands, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t n = bands * task / num_tasks * 16; n < std::min(spec.N, bands * (task + 1) / num_tasks * 16); n++) {
      uint8_t *codes = p.codes + n * w.kept_row_bytes(), *meta = p.meta + n / w.pattern.v * w.meta_row_bytes();
      std::memset(codes, 0, w.kept_row_bytes());
      if (n % w.pattern.v == 0) std::memset(meta, 0, w.meta_row_bytes());
      for (int64_t j = 0; j < w.kept(); j++) {
        const int code = stored(spec.format, p.packed[w.code_offset(n, j)] >> w.code_shift(j) & (whole ? 255 : 15));
        if (numbers) std::memcpy(codes + j * 2, p.packed + w.code_offset(n, j), 2);
        else if (whole) codes[j] = static_cast<uint8_t>(code);
        else codes[j / 2] |= static_cast<uint8_t>(code << j % 2 * 4);
        if (n % w.pattern.v == 0) set_bits(meta, j * w.pattern.place_bits(), w.pattern.place_bits(), static_cast<int>(w.dense_k(p.packed, n, j) % w.pattern.m));
      }
      for (int64_t k = spec.K - 1; k >= 0 && !numbers; k -= step)  // of a scale that is repeated, any will do
        std::memcpy(p.scales + spec.scale_index(n, k), p.packed + w.scale_offset(n, k), 2);
    }
  });
}

namespace {

// The kept numbers of a 2:4 weight, as pack_weight packs them.
pack_weight::Params kept_params(const Params& p, const SparseTiles& w) {
  return {w.kept_spec(), Layout::kMmaTiles, p.codes, p.scales, nullptr, p.packed, p.num_threads};
}

// Kept numbers of 16 bits in the order of MmaTiles, or back: f(canonical, packed) for each that exists.
template <class F>
void for_tile_numbers(const Params& p, const SparseTiles& w, const F& f) {
  const int64_t rows = w.spec.N, kept = w.kept(), num_tasks = std::clamp<int64_t>(rows, 1, p.num_threads);
  const MmaTiles tiles = w.kept_tiles();
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t n = rows * task / num_tasks; n < rows * (task + 1) / num_tasks; n++)
      for (int64_t j = 0; j < kept; j++) f(p.codes + n * w.kept_row_bytes() + j * 2, p.packed + tiles.code_offset(n, j));
  });
}

// The parts of another pattern, which stand one after the other: copies them there, or back.
void copy_parts(const Params& p, const SparseTiles& w, bool pack) {
  struct Part {
    void* canonical;
    int64_t begin, bytes, end;
  };
  const Part parts[] = {{p.codes, 0, w.spec.N * w.kept_row_bytes(), w.scales_begin()},
                        {p.scales, w.scales_begin(), w.spec.N * w.spec.num_groups() * 2, w.places_begin()},
                        {p.meta, w.places_begin(), w.meta_rows() * w.meta_row_bytes(), w.total_bytes()}};
  for (const Part& part : parts) {
    if (part.bytes == 0) continue;  // of 16-bit numbers there are no scales
    if (pack) {
      std::memcpy(p.packed + part.begin, part.canonical, part.bytes);
      std::memset(p.packed + part.begin + part.bytes, 0, part.end - part.begin - part.bytes);
    } else {
      std::memcpy(part.canonical, p.packed + part.begin, part.bytes);
    }
  }
}

}  // namespace

void pack_tiles(const Params& p) {
  const SparseTiles w{p.weight.spec, p.weight.pattern};
  if (p.weight.spec.N == 0) return;
  if (!w.is_tiled()) return copy_parts(p, w, true);
  if (is_16bit(w.spec.format)) {
    std::memset(p.packed, 0, w.places_begin());
    for_tile_numbers(p, w, [](const uint8_t* canonical, uint8_t* packed) { std::memcpy(packed, canonical, 2); });
  } else {
    pack_weight::cpu_scalar::pack(kept_params(p, w));
  }
  auto* words = reinterpret_cast<uint32_t*>(p.packed + w.places_begin());
  const int64_t count = w.num_place_words(), num_tasks = std::clamp<int64_t>(count / 4096, 1, p.num_threads), blocks = w.spec.K / 4;
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t i = count * task / num_tasks; i < count * (task + 1) / num_tasks; i++) {
      uint32_t word = 0;
      for (int64_t at = 0; at < 8; at++) {
        const int64_t n = w.row_of_word(i) + at / 4 * 8, block = w.k16_of_word(i) * 4 + at % 4;  // of 4 k
        uint32_t places = SparseTiles::kPaddingPlaces;
        if (n < w.spec.N && block < blocks) places = p.meta[n / w.pattern.v * w.meta_row_bytes() + block / 2] >> block % 2 * 4 & 15;
        word |= places << (4 * at);
      }
      words[i] = word;
    }
  });
}

void unpack_tiles(const Params& p) {
  const SparseTiles w{p.weight.spec, p.weight.pattern};
  if (p.weight.spec.N == 0) return;
  if (!w.is_tiled()) return copy_parts(p, w, false);
  if (is_16bit(w.spec.format)) for_tile_numbers(p, w, [](uint8_t* canonical, const uint8_t* packed) { std::memcpy(canonical, packed, 2); });
  else pack_weight::cpu_scalar::unpack(kept_params(p, w));
  const auto* words = reinterpret_cast<const uint32_t*>(p.packed + w.places_begin());
  const int64_t rows = w.meta_rows(), num_tasks = std::clamp<int64_t>(rows, 1, p.num_threads), blocks = w.spec.K / 4;
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t row = rows * task / num_tasks; row < rows * (task + 1) / num_tasks; row++) {
      uint8_t* meta = p.meta + row * w.meta_row_bytes();
      const int64_t n = row * w.pattern.v;
      std::memset(meta, 0, w.meta_row_bytes());
      for (int64_t block = 0; block < blocks; block++)
        meta[block / 2] |= static_cast<uint8_t>((words[w.place_word(n, block / 4)] >> (SparseTiles::place_shift(n) + block % 4 * 4) & 15) << block % 2 * 4);
    }
  });
}

}  // namespace taut::pack_sparse::cpu_scalar
