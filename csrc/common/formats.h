// What stored weights mean (Format), and the byte order a CPU kernel wants them in (Rows8). Written once; read by
// kernels, host code and tests.
//
// CANONICAL FORM, the only one on disk, row-major, for w[N,K] in groups of G along k (the last group may be short):
//   codes   int4: u8 [N, ceil(K/2)], low nibble = even k;   int8: s8 [N, K]
//   scales  fp16 [N, ceil(K/G)]
//   zeros   u8   [N, ceil(K/G)], int4 with zeros only
//   value   int4: (q - z) * s with q in 0..15 and z = 8 where there are no zeros;   int8: q * s with q in -128..127
//           (a scale may be negative; quantize_weight uses that)
//
// ROWS8 LAYOUT, for every CPU kernel. N is padded to 8, K to 32.  A strip is 8 rows; it is one sequential stream:
//   superblock  4 groups:  header  fp16 scales [4][8]  (64 B)
//                                  u8   zeros  [4][8]  (32 B, only with zeros)
//                          data    the k-blocks of those groups, 32 k each
//   k-block     int4: 4 x 32 B. Byte r*4+i of vector v = q[r][4v+i] | q[r][16+4v+i] << 4
//               int8: 8 x 32 B. Byte r*4+i of vector v = q[r][4v+i] + 128
// so that a 32-byte vector holds 4 consecutive k of 8 rows: no horizontal sums, and one masked load serves two steps.
// Groups are 32, 64 or 128 k; a per-row scale is repeated every 128 k (3% of the bytes, and no second kernel).
// The last superblock of a strip has its full header and only the k-blocks that exist. Padding is zero scale and code 0.
#pragma once

#include <cstdint>

namespace taut {

enum class Format : int64_t { kInt4 = 4, kInt8 = 8 };  // the value is the bits a code takes

struct WeightSpec {
  Format format;
  int64_t N, K;
  int64_t group_size;  // 32, 64, 128, or 0: one scale a row
  bool zeros;          // int4: a zero point a group; otherwise the zero point is 8

  constexpr int64_t num_groups() const { return group_size == 0 ? 1 : (K + group_size - 1) / group_size; }
  constexpr int64_t code_row_bytes() const { return format == Format::kInt4 ? (K + 1) / 2 : K; }
};

struct Rows8 {
  WeightSpec spec;

  static constexpr int64_t kRows = 8, kBlockK = 32, kGroupsPerSuperblock = 4;

  constexpr int64_t layout_group() const { return spec.group_size == 0 ? 128 : spec.group_size; }
  constexpr int64_t blocks_per_group() const { return layout_group() / kBlockK; }
  constexpr int64_t num_strips() const { return (spec.N + kRows - 1) / kRows; }
  constexpr int64_t num_blocks() const { return (spec.K + kBlockK - 1) / kBlockK; }
  constexpr int64_t header_bytes() const { return spec.zeros ? 96 : 64; }
  constexpr int64_t block_bytes() const { return spec.format == Format::kInt4 ? 128 : 256; }
  constexpr int64_t blocks_per_superblock() const { return kGroupsPerSuperblock * blocks_per_group(); }
  constexpr int64_t superblock_bytes() const { return header_bytes() + blocks_per_superblock() * block_bytes(); }
  constexpr int64_t num_superblocks() const { return (num_blocks() + blocks_per_superblock() - 1) / blocks_per_superblock(); }
  constexpr int64_t strip_bytes() const { return num_superblocks() * header_bytes() + num_blocks() * block_bytes(); }
  constexpr int64_t total_bytes() const { return num_strips() * strip_bytes(); }

  // Byte offsets of what belongs to row n and element k.
  constexpr int64_t header_offset(int64_t n, int64_t k) const {
    return n / kRows * strip_bytes() + k / (kGroupsPerSuperblock * layout_group()) * superblock_bytes();
  }
  constexpr int64_t scale_offset(int64_t n, int64_t k) const {
    return header_offset(n, k) + (k / layout_group() % kGroupsPerSuperblock * kRows + n % kRows) * 2;
  }
  constexpr int64_t zero_offset(int64_t n, int64_t k) const { return header_offset(n, k) + 64 + k / layout_group() % kGroupsPerSuperblock * kRows + n % kRows; }
  constexpr int64_t block_offset(int64_t n, int64_t k) const {
    return header_offset(n, k) + header_bytes() + k / kBlockK % blocks_per_superblock() * block_bytes();
  }
  constexpr int64_t code_offset(int64_t n, int64_t k) const {
    const int64_t in_block = k % kBlockK, vector = spec.format == Format::kInt4 ? in_block % 16 / 4 : in_block / 4;
    return block_offset(n, k) + vector * 32 + n % kRows * 4 + k % 4;
  }
  constexpr int code_shift(int64_t k) const { return spec.format == Format::kInt4 && k % kBlockK >= 16 ? 4 : 0; }
};

}  // namespace taut
