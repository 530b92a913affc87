// COMPUTES  packed = Sparse8(codes, scales, meta), and its inverse
// LAYOUT    canonical and Sparse8 (common/sparse.h)
// WORK      a task is a range of strips of 8 rows, which share no byte with others
// BOUND     DRAM: every byte is read once and written once
// LIMITS    int8, int4 without zeros, fp8_e4m3
#include <algorithm>
#include <cstring>

#include "pack_sparse/op.h"

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
        int code = zero;
        if (n < spec.N && j < w.kept()) code = stored(spec.format, bits == 8 ? codes[j] : codes[j / 2] >> j % 2 * 4 & 15);
        p.packed[w.code_offset(n, j)] |= static_cast<uint8_t>(code << w.code_shift(j));
        if (n < spec.N && j < w.kept() && (w.pattern.v == 1 || n % 8 == 0)) {
          const int place = bits_at(meta, j * w.pattern.place_bits(), w.pattern.place_bits());
          p.packed[w.place_offset(n, j)] |= static_cast<uint8_t>(w.field_of(j, place) << w.place_shift(j));
        }
      }
      if (n >= spec.N) continue;
      for (int64_t k = 0; k < spec.K; k += step) std::memcpy(p.packed + w.scale_offset(n, k), p.scales + spec.scale_index(n, k), 2);
    }
  });
}

void unpack(const Params& p) {
  const Sparse8& w = p.weight;
  const WeightSpec& spec = w.spec;
  const bool whole = code_bits(spec.format) == 8;
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
        if (whole) codes[j] = static_cast<uint8_t>(code);
        else codes[j / 2] |= static_cast<uint8_t>(code << j % 2 * 4);
        if (n % w.pattern.v == 0) set_bits(meta, j * w.pattern.place_bits(), w.pattern.place_bits(), static_cast<int>(w.dense_k(p.packed, n, j) % w.pattern.m));
      }
      for (int64_t k = spec.K - 1; k >= 0; k -= step)  // of a scale that is repeated, any will do
        std::memcpy(p.scales + spec.scale_index(n, k), p.packed + w.scale_offset(n, k), 2);
    }
  });
}

}  // namespace taut::pack_sparse::cpu_scalar
