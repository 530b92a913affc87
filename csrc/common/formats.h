// What stored weights mean (Format), and the byte orders kernels want them in: Rows8 on CPUs, MmaTiles on CUDA. Written
// once; read by kernels, host code and tests.
//
// CANONICAL FORM, the only one on disk, row-major, for w[N,K] in groups of G along k (the last group may be short):
//   codes   int4: u8 [N, ceil(K/2)], low nibble = even k;   int8: s8 [N, K];   fp8_e4m3: float8_e4m3fn [N, K]
//   scales  fp16 [N, ceil(K/G)]
//   zeros   u8   [N, ceil(K/G)], int4 with zeros only
//   value   int4: (q - z) * s with q in 0..15 and z = 8 where there are no zeros;   int8: q * s with q in -128..127;
//           fp8_e4m3: q * s with q an OCP 8-bit float E4M3 (no infinities, S.1111.111 is NaN, largest 448)
//           (a scale may be negative; quantize_weight uses that)
//
// ROWS8 LAYOUT, for every CPU kernel. N is padded to 8, K to 32.  A strip is 8 rows; it is one sequential stream:
//   superblock  4 groups:  header  fp16 scales [4][8]  (64 B)
//                                  u8   zeros  [4][8]  (32 B, only with zeros)
//                          data    the k-blocks of those groups, 32 k each
//   k-block     int4: 4 x 32 B. Byte r*4+i of vector v = q[r][4v+i] | q[r][16+4v+i] << 4
//               int8: 8 x 32 B. Byte r*4+i of vector v = q[r][4v+i] + 128;   fp8_e4m3: the same order, the byte itself
// so that a 32-byte vector holds 4 consecutive k of 8 rows: no horizontal sums, and one masked load serves two steps.
// Groups are 32, 64 or 128 k; a per-row scale is repeated every 128 k (3% of the bytes, and no second kernel).
// The last superblock of a strip has its full header and only the k-blocks that exist. Padding is zero scale and code 0.
//
// MMATILES LAYOUT, for every CUDA kernel. N is padded to 64, K to 64.  Three sections, one after the other:
//   codes   tiles [N/64][K/64] of 64 n x 64 k. A tile is 4 strips of 16 n; a strip is fragments of 512 B, 16 B a lane, in
//           the register order of the A operand of mma.m16n8k16 (g = lane / 4, t = lane % 4; kernels take w as A, so that
//           M has steps of 8 and a row of w is a row of the fragment):
//             int4: 1 fragment of 64 k. 32-bit word j holds k16-step j; its nibble i is the low half of register a_i, nibble
//                   i + 4 the high half:  a_0 = (g; 2t, 2t+1)  a_1 = (g+8; 2t, 2t+1)  a_2 = (g; 2t+8, 2t+9)  a_3 = (g+8; 2t+8, 2t+9)
//                   so that one lop3 with mask 0x000f000f makes one register.
//             int8, fp8_e4m3: 2 fragments of 32 k. Word 2j + h holds k16-step j of row g + 8h; its bytes are
//                   k = 2t, 2t+8, 2t+1, 2t+9: bytes 0 and 2 are register a_h, bytes 1 and 3 are a_{h+2}. The same word is
//                   register a_{2j+h} of mma.m16n8k32, if the 8-bit x stands in that order too (x8_slot).
//   scales  fp16 [N/64][groups][64], row n at (n%8)*8 + n%64/8: a lane finds the 8 rows it meets in its 4 strips in 16 B.
//   zeros   u8, the same order; only with zeros.
// Codes are stored as they are (int8 two's complement). Padding is zero scale and code 0.
#pragma once

#include <cstdint>

namespace taut {

#if defined(__CUDACC__)
#define TAUT_HOST_DEVICE __host__ __device__
#else
#define TAUT_HOST_DEVICE
#endif

enum class Format : int64_t { kInt4 = 4, kInt8 = 8, kFp8E4M3 = 9 };
constexpr int64_t code_bits(Format format) { return format == Format::kInt4 ? 4 : 8; }

enum class Layout : int64_t { kRows8 = 0, kMmaTiles = 1 };

struct WeightSpec {
  Format format;
  int64_t N, K;
  int64_t group_size;  // 32, 64, 128, or 0: one scale a row
  bool zeros;          // int4: a zero point a group; otherwise the zero point is 8

  TAUT_HOST_DEVICE constexpr int64_t num_groups() const { return group_size == 0 ? 1 : (K + group_size - 1) / group_size; }
  TAUT_HOST_DEVICE constexpr int64_t code_row_bytes() const { return format == Format::kInt4 ? (K + 1) / 2 : K; }
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

// Where element k of x stands within its 32 when x is 8 bits wide on CUDA, so that the order of w's bytes in MmaTiles is
// the order of mma.m16n8k32's registers: slot 16j + 4t + i holds k = 16j + {2t, 2t+8, 2t+1, 2t+9}[i].
TAUT_HOST_DEVICE constexpr int64_t x8_slot(int64_t k) { return k / 16 * 16 + k % 8 / 2 * 4 + k % 2 * 2 + k % 16 / 8; }

struct MmaTiles {
  WeightSpec spec;

  static constexpr int64_t kTileN = 64, kTileK = 64, kStripN = 16;

  TAUT_HOST_DEVICE constexpr int64_t num_tiles_n() const { return (spec.N + kTileN - 1) / kTileN; }
  TAUT_HOST_DEVICE constexpr int64_t num_tiles_k() const { return (spec.K + kTileK - 1) / kTileK; }
  // Groups as stored: those of the padded K, so that a tile of 64 k finds both of its groups of 32.
  TAUT_HOST_DEVICE constexpr int64_t num_groups() const { return spec.group_size == 0 ? 1 : (num_tiles_k() * kTileK + spec.group_size - 1) / spec.group_size; }
  TAUT_HOST_DEVICE constexpr int64_t tile_bytes() const { return spec.format == Format::kInt4 ? 2048 : 4096; }
  TAUT_HOST_DEVICE constexpr int64_t codes_bytes() const { return num_tiles_n() * num_tiles_k() * tile_bytes(); }
  TAUT_HOST_DEVICE constexpr int64_t scales_begin() const { return codes_bytes(); }
  TAUT_HOST_DEVICE constexpr int64_t zeros_begin() const { return scales_begin() + num_tiles_n() * num_groups() * kTileN * 2; }
  TAUT_HOST_DEVICE constexpr int64_t total_bytes() const { return zeros_begin() + (spec.zeros ? num_tiles_n() * num_groups() * kTileN : 0); }

  TAUT_HOST_DEVICE constexpr int64_t scale_index(int64_t n, int64_t k) const {
    const int64_t group = spec.group_size == 0 ? 0 : k / spec.group_size;
    return (n / kTileN * num_groups() + group) * kTileN + n % 8 * 8 + n % kTileN / 8;
  }
  TAUT_HOST_DEVICE constexpr int64_t scale_offset(int64_t n, int64_t k) const { return scales_begin() + scale_index(n, k) * 2; }
  TAUT_HOST_DEVICE constexpr int64_t zero_offset(int64_t n, int64_t k) const { return zeros_begin() + scale_index(n, k); }
  TAUT_HOST_DEVICE constexpr int64_t code_offset(int64_t n, int64_t k) const {
    const int64_t strip = n % kTileN / kStripN, lane = n % 8 * 4 + k % 8 / 2, upper = n % kStripN / 8;
    int64_t offset = (n / kTileN * num_tiles_k() + k / kTileK) * tile_bytes() + strip * (tile_bytes() / 4);
    if (spec.format == Format::kInt4) {  // nibble upper + 2 * (k % 16 >= 8), + 4 for odd k
      offset += lane * 16 + k % kTileK / 16 * 4 + k % 2 * 2 + k % 16 / 8;
    } else {
      offset += k % kTileK / 32 * 512 + lane * 16 + k % 32 / 16 * 8 + upper * 4 + k % 2 * 2 + k % 16 / 8;
    }
    return offset;
  }
  TAUT_HOST_DEVICE constexpr int code_shift(int64_t n, int64_t) const { return spec.format == Format::kInt4 ? static_cast<int>(n % kStripN / 8 * 4) : 0; }
};

}  // namespace taut
