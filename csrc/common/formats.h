// What stored weights mean (Format), and the byte orders kernels want them in: Rows8 on CPUs, MmaTiles on CUDA. Written
// once; read by kernels, host code and tests.
//
// CANONICAL FORM, the only one on disk, row-major, for w[N,K] in groups of G along k (the last group may be short):
//   codes    int4, nf4, mxfp4, nvfp4: u8 [N, ceil(K/2)], low nibble = even k
//            int3: u8 [N, ceil(3K/8)], a little-endian string of bits;  int2: u8 [N, ceil(K/4)], lowest bits = first k
//            ternary: u8 [N, ceil(K/5)], base 3, k = 5b is the lowest digit (code 1 in what the last byte has left over)
//            int8: s8 [N, K];   fp8_e4m3, fp8_block: float8_e4m3fn [N, K]
//            fp16, bf16: the numbers themselves; of sparse weights alone (sparse.h), without scales
//   scales   int2, int3, int4, int8, ternary, fp8_e4m3: fp16 [N, ceil(K/G)];   nf4: fp32 [N, ceil(K/G)]
//            mxfp4: u8 E8M0 [N, ceil(K/32)];   nvfp4: u8 E4M3 [N, ceil(K/16)], and one fp32 global scale for the weight
//            fp8_block: fp32 [ceil(N/128), ceil(K/128)]
//   zeros    u8   [N, ceil(K/G)], int2, int3 and int4 with zeros only
//   value    int4: (q - z) * s with q in 0..15 and z = 8 where there are no zeros; int3: 0..7, z = 4; int2: 0..3, z = 2
//            ternary: (q - 1) * s with q in 0..2;   int8: q * s with q in -128..127
//            fp8_e4m3, fp8_block: q * s with q an OCP 8-bit float E4M3 (no infinities, S.1111.111 is NaN, largest 448)
//            nf4: kNf4[q] * s;   mxfp4: e2m1(q) * 2^(s - 127);   nvfp4: e2m1(q) * (e4m3(s) * global)
//            (a scale may be negative; quantize_weight uses that)
//
// ROWS8 LAYOUT, for every CPU kernel. N is padded to 8, K to 32.  A strip is 8 rows; it is one sequential stream:
//   superblock  4 groups:  header  scales [4][8] as they are in the canonical form: fp16 64 B, fp32 128 B, E8M0 32 B;
//                                  nvfp4 [4][2][8], a group being two scales' worth: 64 B
//                                  u8   zeros  [4][8]  (32 B, only with zeros)
//                          data    the k-blocks of those groups, 32 k each
//   k-block     8 chunks of 4 k; chunk c holds byte r*4+i for q[r][4c+i], so that a 32-byte vector holds 4 consecutive k of
//               8 rows: no horizontal sums.
//               4-bit: 4 x 32 B. Byte of vector v = chunk v | chunk 4+v << 4
//               2-bit (int2, ternary): 2 x 32 B. Byte of vector v = chunk v | chunk 2+v << 2 | chunk 4+v << 4 | chunk 6+v << 6
//               int3: the low two bits as 2-bit, then 32 B of third bits: bit c of a byte is chunk c's
//               8-bit: 8 x 32 B, vector c = chunk c, int8 as q + 128; fp8 the byte itself
// Groups are 32, 64 or 128 k; a per-row scale is repeated every 128 k (3% of the bytes, and no second kernel); so is, in
// each of its rows, a scale of fp8_block. The last superblock of a strip has its full header and only the k-blocks that
// exist. Padding is zero scale and code 0. nvfp4's global scale is the first 4 of 64 bytes after the last strip.
// Where every N is a multiple of 8, the layouts of several weights one after the other are the layout of their rows stacked.
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
//             fp16, bf16: 4 fragments of 16 k. Word i is register a_i.
//   int4, int8 and fp8_e4m3 only, and fp16 and bf16 as what a sparse weight keeps.
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

enum class Format : int64_t {
  kTernary = 1,
  kInt2 = 2,
  kInt3 = 3,
  kInt4 = 4,
  kNf4 = 5,
  kMxfp4 = 6,
  kNvfp4 = 7,
  kInt8 = 8,
  kFp8E4M3 = 9,
  kFp8Block = 10,
  kFp16 = 11,  // sparse weights alone, as the next
  kBf16 = 12,
};
// Codes that are numbers already, 2 bytes each: no scales, no groups.
TAUT_HOST_DEVICE constexpr bool is_16bit(Format format) { return format == Format::kFp16 || format == Format::kBf16; }
// Bits of a code in Rows8 and MmaTiles; in the canonical form ternary takes 8/5.
TAUT_HOST_DEVICE constexpr int64_t code_bits(Format format) {
  switch (format) {
    case Format::kTernary:
    case Format::kInt2: return 2;
    case Format::kInt3: return 3;
    case Format::kInt4:
    case Format::kNf4:
    case Format::kMxfp4:
    case Format::kNvfp4: return 4;
    case Format::kFp16:
    case Format::kBf16: return 16;
    default: return 8;
  }
}
constexpr bool is_integer(Format format) { return format <= Format::kInt4 || format == Format::kInt8; }
constexpr bool takes_zeros(Format format) { return Format::kInt2 <= format && format <= Format::kInt4; }
// The code of zero in an integer format without zeros.
constexpr int zero_code(Format format) { return format == Format::kInt8 ? 0 : format == Format::kTernary ? 1 : 1 << (code_bits(format) - 1); }

enum class ScaleType { kFp16, kFp32, kE8M0, kE4M3, kNone };
TAUT_HOST_DEVICE constexpr ScaleType scale_type(Format format) {
  switch (format) {
    case Format::kNf4:
    case Format::kFp8Block: return ScaleType::kFp32;
    case Format::kMxfp4: return ScaleType::kE8M0;
    case Format::kNvfp4: return ScaleType::kE4M3;
    case Format::kFp16:
    case Format::kBf16: return ScaleType::kNone;
    default: return ScaleType::kFp16;
  }
}
constexpr int64_t scale_bytes(ScaleType type) { return type == ScaleType::kFp32 ? 4 : type == ScaleType::kFp16 ? 2 : type == ScaleType::kNone ? 0 : 1; }

// NF4, from QLoRA (arXiv 2305.14314, appendix E): 16 quantiles of a normal distribution, 0 and both ends among them.
constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};
// E2M1 (OCP Microscaling Formats 1.0): sign, two exponent bits, one of mantissa. Twice the number is an integer.
constexpr int8_t kTwiceE2M1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

enum class Layout : int64_t { kRows8 = 0, kMmaTiles = 1 };

struct WeightSpec {
  Format format;
  int64_t N, K;
  int64_t group_size;  // 32, 64, 128, or 0: one scale a row; mxfp4 32, nvfp4 16, fp8_block 128
  bool zeros;          // int2, int3, int4: a zero point a group

  TAUT_HOST_DEVICE constexpr int64_t num_groups() const { return group_size == 0 ? (is_16bit(format) ? 0 : 1) : (K + group_size - 1) / group_size; }
  TAUT_HOST_DEVICE constexpr int64_t code_row_bytes() const {
    if (format == Format::kTernary) return (K + 4) / 5;
    return (K * code_bits(format) + 7) / 8;
  }
  TAUT_HOST_DEVICE constexpr int64_t scale_rows() const { return format == Format::kFp8Block ? (N + 127) / 128 : N; }
  // Where the scale of w[n,k] is in the canonical form.
  constexpr int64_t scale_index(int64_t n, int64_t k) const {
    return (format == Format::kFp8Block ? n / 128 : n) * num_groups() + (group_size ? k / group_size : 0);
  }
};

struct Rows8 {
  WeightSpec spec;

  static constexpr int64_t kRows = 8, kBlockK = 32, kGroupsPerSuperblock = 4;

  // k that one row of the header covers.
  constexpr int64_t layout_group() const { return spec.group_size == 0 ? 128 : spec.group_size == 16 ? 32 : spec.group_size; }
  constexpr int64_t blocks_per_group() const { return layout_group() / kBlockK; }
  constexpr int64_t num_strips() const { return (spec.N + kRows - 1) / kRows; }
  constexpr int64_t num_blocks() const { return (spec.K + kBlockK - 1) / kBlockK; }
  constexpr int64_t scales_per_group() const { return spec.group_size == 16 ? 2 : 1; }
  constexpr int64_t group_scale_bytes() const { return scales_per_group() * kRows * scale_bytes(scale_type(spec.format)); }
  constexpr int64_t zeros_begin() const { return kGroupsPerSuperblock * group_scale_bytes(); }  // within a header
  constexpr int64_t header_bytes() const { return zeros_begin() + (spec.zeros ? kGroupsPerSuperblock * kRows : 0); }
  constexpr int64_t block_bytes() const { return kRows * kBlockK * code_bits(spec.format) / 8; }
  constexpr int64_t blocks_per_superblock() const { return kGroupsPerSuperblock * blocks_per_group(); }
  constexpr int64_t superblock_bytes() const { return header_bytes() + blocks_per_superblock() * block_bytes(); }
  constexpr int64_t num_superblocks() const { return (num_blocks() + blocks_per_superblock() - 1) / blocks_per_superblock(); }
  constexpr int64_t strip_bytes() const { return num_superblocks() * header_bytes() + num_blocks() * block_bytes(); }
  constexpr int64_t global_scale_offset() const { return num_strips() * strip_bytes(); }  // nvfp4 only
  constexpr int64_t total_bytes() const { return global_scale_offset() + (spec.format == Format::kNvfp4 ? 64 : 0); }

  // Byte offsets of what belongs to row n and element k. WHY always inlined: a copy that stands alone is a weak symbol, and
  // one compiled for AVX-512 might be linked for everyone.
  [[gnu::always_inline]] constexpr int64_t header_offset(int64_t n, int64_t k) const {
    return n / kRows * strip_bytes() + k / (kGroupsPerSuperblock * layout_group()) * superblock_bytes();
  }
  [[gnu::always_inline]] constexpr int64_t scale_offset(int64_t n, int64_t k) const {
    const int64_t group = k / layout_group() % kGroupsPerSuperblock, half = scales_per_group() == 2 ? k % 32 / 16 : 0;
    return header_offset(n, k) + group * group_scale_bytes() + (half * kRows + n % kRows) * scale_bytes(scale_type(spec.format));
  }
  [[gnu::always_inline]] constexpr int64_t zero_offset(int64_t n, int64_t k) const {
    return header_offset(n, k) + zeros_begin() + k / layout_group() % kGroupsPerSuperblock * kRows + n % kRows;
  }
  [[gnu::always_inline]] constexpr int64_t block_offset(int64_t n, int64_t k) const {
    return header_offset(n, k) + header_bytes() + k / kBlockK % blocks_per_superblock() * block_bytes();
  }
  // Of the code, or of its low two bits (int3); the third bit of int3 is bit k % 32 / 4 of the byte at third_bit_offset.
  [[gnu::always_inline]] constexpr int64_t code_offset(int64_t n, int64_t k) const {
    const int64_t chunk = k % kBlockK / 4, vectors = spec.format == Format::kInt3 ? 2 : code_bits(spec.format);
    return block_offset(n, k) + chunk % vectors * 32 + n % kRows * 4 + k % 4;
  }
  [[gnu::always_inline]] constexpr int64_t third_bit_offset(int64_t n, int64_t k) const { return block_offset(n, k) + 64 + n % kRows * 4 + k % 4; }
  [[gnu::always_inline]] constexpr int code_shift(int64_t k) const {
    switch (code_bits(spec.format)) {
      case 2:
      case 3: return static_cast<int>(k % kBlockK / 8 * 2);
      case 4: return static_cast<int>(k % kBlockK / 16 * 4);
      default: return 0;
    }
  }
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
  TAUT_HOST_DEVICE constexpr int64_t num_groups() const {
    return spec.group_size == 0 ? spec.num_groups() : (num_tiles_k() * kTileK + spec.group_size - 1) / spec.group_size;
  }
  TAUT_HOST_DEVICE constexpr int64_t tile_bytes() const { return 512 * code_bits(spec.format); }
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
    } else if (is_16bit(spec.format)) {
      offset += k % kTileK / 16 * 512 + lane * 16 + k % 16 / 8 * 8 + upper * 4 + k % 2 * 2;
    } else {
      offset += k % kTileK / 32 * 512 + lane * 16 + k % 32 / 16 * 8 + upper * 4 + k % 2 * 2 + k % 16 / 8;
    }
    return offset;
  }
  TAUT_HOST_DEVICE constexpr int code_shift(int64_t n, int64_t) const { return spec.format == Format::kInt4 ? static_cast<int>(n % kStripN / 8 * 4) : 0; }
};

}  // namespace taut
