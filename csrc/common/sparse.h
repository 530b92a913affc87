// Sparse weights: which numbers are kept (Pattern), and the byte orders in which kernels want them: Sparse8 on CPUs, SparseTiles on CUDA.
//
// PATTERN  n:m: of each m neighbours along k, n are kept. v:n:m: at places that v rows share (v 8 or 16; VENOM, arXiv 2310.02065).
//
// CANONICAL FORM, for w[N,K] in groups of G along the dense k; K is a multiple of m; Kk = K * n / m are kept:
//   codes   as the dense format has them (formats.h), of [N,Kk]: the kept numbers in order
//   scales  as the dense format has them, of [N,K]; fp16 and bf16 have none
//   meta    u8 [ceil(N/v), ceil(Kk * b / 8)]: places within their m, ascending, b = 2 (m = 4) or 3 (m = 8) bits each, a little-endian string
// A block of m that has fewer nonzeros keeps zeros.
//
// SPARSE8 LAYOUT. As Rows8: strips of 8 rows, superblocks of a header (scales) and k-blocks of 32 dense k. A k-block keeps 32 * n / m numbers of
// a row; four of them are a chunk, whose m are a span of 8 or 16 dense k.
//   codes   chunk c holds byte r*4+i for the kept 4c+i of row r. 8-bit: a vector of 32 B a chunk, int8 as q + 128. 4-bit: half as many
//           vectors, vector v = chunk v | chunk half+v << 4
//           16-bit: 16 B for each kept number, those of the 8 rows: byte j*16+r*2. No header: a strip is k-blocks alone
//   places  v = 1: 32 B for each 8 bits of places of a value number: b' = 2 (m = 4) or 4 (m = 8) bits each; byte r*4+i of vector c*b'/8 has, at
//           bit c*b' % 8, the place of the kept 4c+i of row r in its m
//           v > 1: a nibble each: of the kept j its dense k modulo 16, low nibble = even j (each strip has its own, so v = 16 twice)
// Padding is zero scale, code of zero, place 0.
//
// SPARSETILES LAYOUT. 2:4, whatever v: what sparse tensor cores (mma.sp.m16n8k32) take.
//   kept    the kept numbers [N,K/2] with their scales in groups of G/2 as MmaTiles (formats.h): K is padded to 128, so that a tile is 64 n x
//           128 dense k; word j of int4, words 2j and 2j + 1 of 8 bits, fragment j of 16 bits, are step j of 32 dense k
//           For 8-bit x the same words are registers a_h of mma.sp.m16n8k32 (their bytes 1 and 2 change places), if x stands in the order of
//           sparse_x8_slot: a lane's word has what is kept of blocks t and t + 4 of its 32 k, and the instruction takes them as blocks 2t and 2t + 1
//   places  u32 tiles [N/64][K/128] of [2][32 lanes][4]: for each pair of strips of 16 n, what a lane gives as metadata in each of the 4 steps.
//           Its low half holds the places of 4 blocks of 4 k, 2 bits each, of row g = lane / 4 of a strip, its high half those of row g + 8; t =
//           lane % 4: of the pair's first strip for t = 0 and 1, of its second for 2 and 3; of the first 16 k of a step for t = 0 and 2.
// Padding is zero scale, code 0, places 0 and 1 (of equal places the result is undefined).
// Other patterns are only made dense on CUDA: codes, scales and meta as they are in the canonical form, each from a multiple of 16 bytes on.
#pragma once

#include "common/formats.h"

namespace taut {

// The byte of zero in Sparse8.
constexpr int sparse_zero(Format format) { return format == Format::kInt8 ? 128 : format == Format::kInt4 ? 8 : 0; }

// Where element k of x stands within its 32 when x is 8 bits wide and w sparse, on CUDA: blocks of 4 in the order 0, 4, 1, 5, 2, 6, 3, 7.
TAUT_HOST_DEVICE constexpr int64_t sparse_x8_slot(int64_t k) { return k / 32 * 32 + k % 16 / 4 * 8 + k % 32 / 16 * 4 + k % 4; }

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
    if (is_16bit(spec.format)) return block_offset(n, j / kept_per_block()) + j % kept_per_block() * 16 + n % kRows * 2;
    const int64_t chunk = j % kept_per_block() / 4, vectors = chunks() * code_bits(spec.format) / 8;
    return block_offset(n, j / kept_per_block()) + chunk % vectors * 32 + n % kRows * 4 + j % 4;
  }
  [[gnu::always_inline]] constexpr int code_shift(int64_t j) const {
    return code_bits(spec.format) >= 8 ? 0 : static_cast<int>(j % kept_per_block() / 4 / (chunks() / 2) * 4);
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

struct SparseTiles {
  WeightSpec spec;  // of the dense weight
  SparsePattern pattern;

  static constexpr int64_t kTileK = 128, kTilePlaces = 256;  // dense k of a tile; its words of places
  static constexpr uint32_t kPaddingPlaces = 4;              // 0 and 1

  TAUT_HOST_DEVICE constexpr bool is_tiled() const { return pattern.n == 2 && pattern.m == 4; }
  TAUT_HOST_DEVICE constexpr int64_t kept() const { return spec.K / pattern.m * pattern.n; }
  TAUT_HOST_DEVICE constexpr int64_t kept_row_bytes() const { return (kept() * code_bits(spec.format) + 7) / 8; }
  TAUT_HOST_DEVICE constexpr int64_t place_bits() const { return pattern.m == 4 ? 2 : 3; }
  TAUT_HOST_DEVICE constexpr int64_t meta_rows() const { return (spec.N + pattern.v - 1) / pattern.v; }
  TAUT_HOST_DEVICE constexpr int64_t meta_row_bytes() const { return (kept() * place_bits() + 7) / 8; }

  // 2:4 alone.
  TAUT_HOST_DEVICE constexpr WeightSpec kept_spec() const { return {spec.format, spec.N, kept(), spec.group_size / 2, false}; }
  TAUT_HOST_DEVICE constexpr MmaTiles kept_tiles() const { return {kept_spec()}; }
  TAUT_HOST_DEVICE constexpr int64_t num_place_words() const { return kept_tiles().num_tiles_n() * kept_tiles().num_tiles_k() * kTilePlaces; }
  // Which word holds the places of row n and the 16 dense k from 16 * k16 on: its low half, or its high half for rows 8 to 15 of a strip.
  TAUT_HOST_DEVICE constexpr int64_t place_word(int64_t n, int64_t k16) const {
    const int64_t tile = n / MmaTiles::kTileN * kept_tiles().num_tiles_k() + k16 / 8, lane = n % 8 * 4 + n % 32 / 16 * 2 + k16 % 2;
    return tile * kTilePlaces + n % MmaTiles::kTileN / 32 * 128 + lane * 4 + k16 % 8 / 2;
  }
  TAUT_HOST_DEVICE static constexpr int place_shift(int64_t n) { return static_cast<int>(n % 16 / 8 * 16); }
  // The first row that a word tells of (the other is 8 further down), and which 16 k.
  TAUT_HOST_DEVICE constexpr int64_t row_of_word(int64_t word) const {
    const int64_t lane = word % 128 / 4;
    return word / kTilePlaces / kept_tiles().num_tiles_k() * MmaTiles::kTileN + word % kTilePlaces / 128 * 32 + lane % 4 / 2 * 16 + lane / 4;
  }
  TAUT_HOST_DEVICE constexpr int64_t k16_of_word(int64_t word) const {
    return word / kTilePlaces % kept_tiles().num_tiles_k() * 8 + word % 4 * 2 + word % 8 / 4;
  }

  // Where the parts begin. Codes and scales of 2:4 are where kept_tiles() says.
  TAUT_HOST_DEVICE static constexpr int64_t aligned(int64_t bytes) { return (bytes + 15) / 16 * 16; }
  TAUT_HOST_DEVICE constexpr int64_t scales_begin() const { return aligned(spec.N * kept_row_bytes()); }
  TAUT_HOST_DEVICE constexpr int64_t places_begin() const {
    return is_tiled() ? kept_tiles().total_bytes() : scales_begin() + aligned(spec.N * spec.num_groups() * 2);
  }
  TAUT_HOST_DEVICE constexpr int64_t total_bytes() const {
    return places_begin() + (is_tiled() ? num_place_words() * 4 : aligned(meta_rows() * meta_row_bytes()));
  }
};

}  // namespace taut
