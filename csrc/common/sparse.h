// Sparse weights: which numbers are kept (Pattern), and the byte order in which CPU kernels want them (Sparse8).
//
// PATTERN  n:m: of each m neighbours along k, n are kept. v:n:m: at places that v rows share (v 8 or 16; VENOM, arXiv 2310.02065).
//
// CANONICAL FORM, for w[N,K] in groups of G along the dense k; K is a multiple of m; Kk = K * n / m are kept:
//   codes   as the dense format has them (formats.h), of [N,Kk]: the kept numbers in order
//   scales  as the dense format has them, of [N,K]
//   meta    u8 [ceil(N/v), ceil(Kk * b / 8)]: places within their m, ascending, b = 2 (m = 4) or 3 (m = 8) bits each, a little-endian string
// A block of m that has fewer nonzeros keeps zeros.
//
// SPARSE8 LAYOUT. As Rows8: strips of 8 rows, superblocks of a header (scales) and k-blocks of 32 dense k. A k-block keeps 32 * n / m numbers of
// a row; four of them are a chunk, whose m are a span of 8 or 16 dense k.
//   codes   chunk c holds byte r*4+i for the kept 4c+i of row r. 8-bit: a vector of 32 B a chunk, int8 as q + 128. 4-bit: half as many
//           vectors, vector v = chunk v | chunk half+v << 4
//   places  v = 1: 32 B for each 8 bits of places of a value number: b' = 2 (m = 4) or 4 (m = 8) bits each; byte r*4+i of vector c*b'/8 has, at
//           bit c*b' % 8, the place of the kept 4c+i of row r in its m
//           v > 1: a nibble each: of the kept j its dense k modulo 16, low nibble = even j (each strip has its own, so v = 16 twice)
// Padding is zero scale, code of zero, place 0.
#pragma once

#include "common/formats.h"

namespace taut {

// The byte of zero in Sparse8.
constexpr int sparse_zero(Format format) { return format == Format::kInt8 ? 128 : format == Format::kInt4 ? 8 : 0; }

struct SparsePattern {
  int64_t n, m, v;
  constexpr bool is_known() const { return ((m == 4 && (n == 1 || n == 2)) || (m == 8 && (n == 2 || n == 4))) && (v == 1 || v == 8 || v == 16); }
  [[gnu::always_inline]] constexpr int64_t kept(int64_t k) const { return k / m * n; }
  [[gnu::always_inline]] constexpr int64_t place_bits() const { return m == 4 ? 2 : 3; }  // of the canonical form
};

// WHY always inlined: a copy that stands alone is a weak symbol, and one compiled for AVX-512 might be linked for everyone.
struct Sparse8 {
  WeightSpec spec;  // of the dense weight
  SparsePattern pattern;

  static constexpr int64_t kRows = 8, kBlockK = 32;
  [[gnu::always_inline]] constexpr Rows8 dense() const { return {spec}; }

  [[gnu::always_inline]] constexpr int64_t kept_per_block() const { return kBlockK / pattern.m * pattern.n; }  // of a row: 16 or 8
  [[gnu::always_inline]] constexpr int64_t chunks() const { return kept_per_block() / 4; }
  [[gnu::always_inline]] constexpr int64_t span() const { return 4 / pattern.n * pattern.m; }  // dense k of a chunk
  [[gnu::always_inline]] constexpr int64_t field_bits() const { return pattern.m == 4 ? 2 : 4; }
  [[gnu::always_inline]] constexpr int64_t code_block_bytes() const { return chunks() * 32 * code_bits(spec.format) / 8; }
  [[gnu::always_inline]] constexpr int64_t place_block_bytes() const { return pattern.v == 1 ? (chunks() * field_bits() + 7) / 8 * 32 : kept_per_block() / 2; }
  [[gnu::always_inline]] constexpr int64_t block_bytes() const { return code_block_bytes() + place_block_bytes(); }
  [[gnu::always_inline]] constexpr int64_t superblock_bytes() const { return dense().header_bytes() + dense().blocks_per_superblock() * block_bytes(); }
  [[gnu::always_inline]] constexpr int64_t strip_bytes() const {
    return dense().num_superblocks() * dense().header_bytes() + dense().num_blocks() * block_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t total_bytes() const { return dense().num_strips() * strip_bytes(); }
  // Of the canonical form.
  [[gnu::always_inline]] constexpr int64_t kept() const { return pattern.kept(spec.K); }
  [[gnu::always_inline]] constexpr int64_t kept_row_bytes() const { return (kept() * code_bits(spec.format) + 7) / 8; }
  [[gnu::always_inline]] constexpr int64_t meta_rows() const { return (spec.N + pattern.v - 1) / pattern.v; }
  [[gnu::always_inline]] constexpr int64_t meta_row_bytes() const { return (kept() * pattern.place_bits() + 7) / 8; }

  // Offsets of what belongs to row n: by its dense k (scales), by its kept number j.
  [[gnu::always_inline]] constexpr int64_t header_offset(int64_t n, int64_t k) const {
    return n / kRows * strip_bytes() + k / (Rows8::kGroupsPerSuperblock * dense().layout_group()) * superblock_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t scale_offset(int64_t n, int64_t k) const {
    return header_offset(n, k) + k / dense().layout_group() % Rows8::kGroupsPerSuperblock * dense().group_scale_bytes() + n % kRows * 2;
  }
  [[gnu::always_inline]] constexpr int64_t block_offset(int64_t n, int64_t block) const {
    return header_offset(n, block * kBlockK) + dense().header_bytes() + block % dense().blocks_per_superblock() * block_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t code_offset(int64_t n, int64_t j) const {
    const int64_t chunk = j % kept_per_block() / 4, vectors = chunks() * code_bits(spec.format) / 8;
    return block_offset(n, j / kept_per_block()) + chunk % vectors * 32 + n % kRows * 4 + j % 4;
  }
  [[gnu::always_inline]] constexpr int code_shift(int64_t j) const {
    return code_bits(spec.format) == 8 ? 0 : static_cast<int>(j % kept_per_block() / 4 / (chunks() / 2) * 4);
  }
  [[gnu::always_inline]] constexpr int64_t place_offset(int64_t n, int64_t j) const {
    const int64_t in_block = j % kept_per_block(), at = block_offset(n, j / kept_per_block()) + code_block_bytes();
    return pattern.v == 1 ? at + in_block / 4 * field_bits() / 8 * 32 + n % kRows * 4 + j % 4 : at + in_block / 2;
  }
  [[gnu::always_inline]] constexpr int place_shift(int64_t j) const {
    const int64_t in_block = j % kept_per_block();
    return static_cast<int>(pattern.v == 1 ? in_block / 4 * field_bits() % 8 : in_block % 2 * 4);
  }
  // The field of a kept number from its place in its m, and back.
  [[gnu::always_inline]] constexpr int field_of(int64_t j, int place) const {
    return pattern.v == 1 ? place : static_cast<int>((j / pattern.n * pattern.m + place) % 16);
  }
  [[gnu::always_inline]] constexpr int place_of(int64_t, int field) const { return static_cast<int>(field % pattern.m); }
  [[gnu::always_inline]] constexpr int field_mask() const { return pattern.v == 1 ? (1 << field_bits()) - 1 : 15; }
  // The dense k of the kept number j of row n.
  [[gnu::always_inline]] int64_t dense_k(const uint8_t* packed, int64_t n, int64_t j) const {
    return j / pattern.n * pattern.m + place_of(j, packed[place_offset(n, j)] >> place_shift(j) & field_mask());
  }
};

}  // namespace taut
