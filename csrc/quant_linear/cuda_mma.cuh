// The skeleton of cuda_sm75_mma and cuda_sm80_mma: 16-bit x times low-bit w on mma.sync.
//
// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp16 or bf16; w as exact integers (or e4m3 floats) in 16
//           bit, sums in fp32, scales multiplied into the sums in fp32: nothing is rounded but the sums and the result.
// LAYOUT    w: MmaTiles (common/formats.h). w is the A operand (its rows are the 16 rows of a fragment), x the B operand: M
//           has steps of 8, which is what decides at M = 1..16. x in shared memory: panels of 64 k, 128 B a row, 16-byte
//           chunk c of row r at c ^ (r % 8), so that ldmatrix and cp.async meet no bank conflict.
// WORK      A unit is a tile of kTileM tokens x kTileN outputs, 64 * kWarpsK k deep. The units of the whole call stand in
//           one row, k innermost, then m; every block takes an equal stretch of it (stream-K), through kStages buffers
//           filled by cp.async (sm_75: two, filled through registers). A warp has kWarpN x kWarpM of it: 4 or 2 strips of
//           16 n, dequantized 16 k at a time in registers. Warps that share outputs (kWarpsK > 1) add up through shared
//           memory, in order. A tile that lies in one block's stretch is stored from there; the parts of a tile cut by a
//           seam go to the workspace in fp32, and `combine` adds them in the order of k. No atomics: same bits every time.
// BOUND     M <= 16: bytes of w. H200, 4.3 TB/s: 18 B a cycle an SM, a tile of int4 (2 KB) every 114 cycles, 456 issue slots on
//           4 schedulers; the inner loop of a tile takes about 250 (dequantization 150, mma 16, scales 25, copies 40).
//           Large M: tensor cores; a fragment of w costs about 10 instructions and feeds kWarpM / 8 mma.
// LIMITS    x fp16 or bf16 (sm_75: fp16); activations float. Any M, N, K, stride; x whose rows are not 16-byte aligned is
//           copied once (align_rows). Sums of up to 64 products are scaled after they are added: bf16 x above 2^110 may
//           overflow to infinity where the scaled sum would not.
#pragma once

#include <algorithm>

#include "common/cuda.cuh"
#include "common/dequant.cuh"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

template <int kWarpM_, int kWarpStrips_, int kWarpsN_, int kWarpsM_, int kWarpsK_, int kStages_, int kBlocksPerSm_>
struct MmaTile {
  static constexpr int kWarpM = kWarpM_;                                       // tokens of a warp
  static constexpr int kWarpStrips = kWarpStrips_, kWarpN = 16 * kWarpStrips;  // rows of w of a warp
  static constexpr int kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr int kPositions = kWarpsN * kWarpsM;  // warps with outputs of their own
  static constexpr int kThreads = 32 * kPositions * kWarpsK;
  static constexpr int kTileM = kWarpM * kWarpsM, kTileN = kWarpN * kWarpsN, kTilesN64 = kTileN / 64;
  static_assert(kTileN % 64 == 0 && 64 % kWarpN == 0);
  static constexpr int kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
};

struct MmaArgs {
  const void* x;  // rows begin at multiples of 16 bytes, and K is a multiple of 8 (or they are padded to one with zeros)
  const void* bias;
  void* out;
  float* partials;  // one slot per block and end of its stretch: kTileM x kTileN floats in fragment order
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* zeros;  // or nullptr
  int64_t x_row_stride;  // elements
  int M, N, K;
  int tiles_n64, tiles_k, groups;  // of MmaTiles
  int group_tiles_log2;            // groups of at least 64: tile of k >> this is the group
  int tiles_m, steps;              // of the call: tiles along m, units per tile
  int64_t units;
  bool out_aligned;  // rows of out begin at multiples of 16 bytes
};

// Where a block's stretch begins, and which block a unit is in.
TAUT_HOST_DEVICE inline int64_t stretch_begin(int64_t block, int64_t units, int64_t blocks) { return block * units / blocks; }
TAUT_HOST_DEVICE inline int64_t block_of_unit(int64_t unit, int64_t units, int64_t blocks) { return ((unit + 1) * blocks - 1) / units; }

// The bytes of one stage, and where its parts are.
template <Format kFormat, bool kGroup32, class Tile>
struct StageLayout {
  static constexpr int kTileBytes = kFormat == Format::kInt4 ? 2048 : 4096;
  static constexpr int kGroupRows = kGroup32 ? 2 : 1;  // rows of 64 scales that a tile of 64 k meets
  static constexpr int kXChunks = Tile::kTileM * Tile::kWarpsK * 8;
  static constexpr int kTiles = Tile::kTilesN64 * Tile::kWarpsK;  // of 64 n x 64 k
  static constexpr int kCodeChunks = kTiles * (kTileBytes / 16);
  static constexpr int kScaleChunks = kTiles * kGroupRows * 8;
  static constexpr int kZeroChunks = kTiles * kGroupRows * 4;
  static constexpr int kCodes = kXChunks * 16, kScales = kCodes + kCodeChunks * 16, kZeros = kScales + kScaleChunks * 16;
  static constexpr int kBytes = kZeros + kZeroChunks * 16;
  static_assert(kCodes % 128 == 0 && kBytes % 64 == 0);
};

// Shared memory after the stages: sums of the warps that share outputs, and a warp's 8 tokens x kWarpN on their way out.
template <class Tile>
struct EpilogueLayout {
  static constexpr int kSlotFloats = Tile::kWarpN * Tile::kWarpM;
  static constexpr int kSumBytes = (Tile::kWarpsK - 1) * Tile::kPositions * kSlotFloats * 4;
  static constexpr int kRowElems = Tile::kWarpN + 8;  // padded: rows start 4 banks apart
  static constexpr int kStoreBytes = 8 * kRowElems * 2;
  static constexpr int kBytes = kSumBytes + Tile::kPositions * kStoreBytes;
};

template <Format kFormat, bool kGroup32, class Tile>
constexpr int smem_bytes() {
  return Tile::kStages * ((StageLayout<kFormat, kGroup32, Tile>::kBytes + 127) / 128 * 128) + EpilogueLayout<Tile>::kBytes;
}

// ---- One warp's accumulators -------------------------------------------------------------------------------------------

// sum[s][j][i]: strip s, tokens 8j..8j+7; i as in the D fragment of mma.m16n8k16: row g + 8 * (i / 2), token 2t + i % 2.
template <class Tile>
struct Accumulators {
  static constexpr int kStrips = Tile::kWarpStrips, kTokens8 = Tile::kWarpM / 8;
  float sum[kStrips][kTokens8][4];

  TAUT_DEVICE void clear() {
#pragma unroll
    for (int s = 0; s < kStrips; s++)
#pragma unroll
      for (int j = 0; j < kTokens8; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) sum[s][j][i] = 0;
  }
  // `slot` of lane-contiguous float4: what one warp writes, the same warp position reads.
  TAUT_DEVICE void store(float* slot, int lane) const {
#pragma unroll
    for (int s = 0; s < kStrips; s++)
#pragma unroll
      for (int j = 0; j < kTokens8; j++)
        reinterpret_cast<float4*>(slot)[(s * kTokens8 + j) * 32 + lane] = make_float4(sum[s][j][0], sum[s][j][1], sum[s][j][2], sum[s][j][3]);
  }
  TAUT_DEVICE void add(const float* slot, int lane) {
#pragma unroll
    for (int s = 0; s < kStrips; s++)
#pragma unroll
      for (int j = 0; j < kTokens8; j++) {
        const float4 v = reinterpret_cast<const float4*>(slot)[(s * kTokens8 + j) * 32 + lane];
        sum[s][j][0] += v.x, sum[s][j][1] += v.y, sum[s][j][2] += v.z, sum[s][j][3] += v.w;
      }
  }
};

// Adds the bias, rounds, turns 8 tokens x kWarpN at a time through shared memory, and stores 16 bytes a lane.
template <class T, class Tile>
TAUT_DEVICE void store_out(const MmaArgs& args, const Accumulators<Tile>& acc, int m0, int n0, T* s_rows, int lane) {
  constexpr int kRow = EpilogueLayout<Tile>::kRowElems, kChunks = Tile::kWarpN / 8;
  const int g = lane / 4, t = lane % 4;
  float bias[2 * Tile::kWarpStrips];
#pragma unroll
  for (int i = 0; i < 2 * Tile::kWarpStrips; i++) {
    const int n = n0 + i * 8 + g;  // strip i / 2, its upper half for odd i
    bias[i] = args.bias && n < args.N ? to_float(static_cast<const T*>(args.bias)[n]) : 0.0f;
  }
#pragma unroll
  for (int j = 0; j < Tile::kWarpM / 8; j++) {
    if (m0 + j * 8 >= args.M) break;
    __syncwarp();
#pragma unroll
    for (int s = 0; s < Tile::kWarpStrips; s++)
#pragma unroll
      for (int i = 0; i < 4; i++) s_rows[(2 * t + i % 2) * kRow + s * 16 + g + 8 * (i / 2)] = from_float<T>(acc.sum[s][j][i] + bias[2 * s + i / 2]);
    __syncwarp();
#pragma unroll
    for (int c = lane; c < 8 * kChunks; c += 32) {
      const int n = n0 + c % kChunks * 8, m = m0 + j * 8 + c / kChunks;
      if (m >= args.M || n >= args.N) continue;
      T* g_out = static_cast<T*>(args.out) + static_cast<int64_t>(m) * args.N + n;
      const T* s_out = s_rows + c / kChunks * kRow + c % kChunks * 8;
      if (args.out_aligned && n + 8 <= args.N) {
        *reinterpret_cast<uint4*>(g_out) = *reinterpret_cast<const uint4*>(s_out);
      } else {
#pragma unroll 1
        for (int e = 0; e < 8 && n + e < args.N; e++) g_out[e] = s_out[e];
      }
    }
  }
}

// ---- Loading a unit ----------------------------------------------------------------------------------------------------

// A thread's part in filling the stages: it walks along k in a tile, and sources move by constants. Only at the ragged ends
// of N and K (`whole` is false) is every chunk looked at by itself.
template <bool kDeferred, Format kFormat, bool kGroup32, bool kZeros, class Tile>
struct Loader {
  using Stage = StageLayout<kFormat, kGroup32, Tile>;
  static constexpr int per_thread(int chunks) { return (chunks + Tile::kThreads - 1) / Tile::kThreads; }
  static constexpr int kX = per_thread(Stage::kXChunks), kCodes = per_thread(Stage::kCodeChunks), kScales = per_thread(Stage::kScaleChunks),
                       kZeroPoints = per_thread(Stage::kZeroChunks);
  // Chunks of a tile of codes, and of the tiles of one n that lie in a stage, which are one piece of memory.
  static constexpr int kTileChunks = Stage::kTileBytes / 16, kPieceChunks = Tile::kWarpsK * kTileChunks;
  static_assert(Stage::kXChunks % Tile::kThreads == 0 && Stage::kCodeChunks % Tile::kThreads == 0 && Tile::kThreads % 64 == 0);
  Chunk<kDeferred> x[kX], codes[kCodes], scales[kScales], zeros[kZeroPoints];

  const unsigned char* x_source[kX];  // of the next step; rows past the end of M: any address in x
  uint32_t x_rows;                    // bit i: x_source[i] is a row of x
  const unsigned char* code_source;   // of the next step, first n, this thread's first chunk
  int64_t code_n_stride;              // bytes from one n64 to the next
  int first_n64, k64;                 // tile of n; tile of k of the next step

  // Chunk c of x in a stage: c / 8 counts rows of 128 bytes (panel by panel), c % 8 is moved by the swizzle.
  TAUT_DEVICE static int x_offset(int c) { return c / 8 * 128 + ((c ^ c / 8) & 7) * 16; }

  // Calls f(chunk number of this thread, index of the chunk in its part) for this thread's chunks of a part.
  template <int kCount, int kChunks, class F>
  TAUT_DEVICE static void for_chunks(const F& f) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int c = threadIdx.x + i * Tile::kThreads;
      if (kChunks % Tile::kThreads == 0 || c < kChunks) f(i, c);
    }
  }

  TAUT_DEVICE void set_tile(const MmaArgs& args, int tile, int step) {
    const int m0 = tile % args.tiles_m * Tile::kTileM;
    first_n64 = tile / args.tiles_m * Tile::kTilesN64, k64 = step * Tile::kWarpsK;
    x_rows = 0;
    for_chunks<kX, Stage::kXChunks>([&](int i, int c) {
      const int m = m0 + c / 8 % Tile::kTileM, panel = c / 8 / Tile::kTileM;
      x_rows |= static_cast<uint32_t>(m < args.M) << i;
      x_source[i] = static_cast<const unsigned char*>(args.x) + ((m < args.M ? m * args.x_row_stride : 0) + (k64 + panel) * 64 + c % 8 * 8) * 2;
    });
    code_n_stride = static_cast<int64_t>(args.tiles_k) * Stage::kTileBytes;
    const int n = threadIdx.x / kPieceChunks, rest = threadIdx.x % kPieceChunks;
    code_source = args.codes + (first_n64 + n) * code_n_stride + static_cast<int64_t>(k64) * Stage::kTileBytes + rest * 16;
  }

  // Fills `stage` with the next step, and moves on.
  TAUT_DEVICE void fetch(const MmaArgs& args, unsigned char* stage) {
    const bool whole = first_n64 + Tile::kTilesN64 <= args.tiles_n64 && (k64 + Tile::kWarpsK) * 64 <= args.K;
    if (whole) fetch_chunks<true>(args, stage);
    else fetch_chunks<false>(args, stage);
    k64 += Tile::kWarpsK;
    code_source += Tile::kWarpsK * Stage::kTileBytes;
#pragma unroll
    for (int i = 0; i < kX; i++) x_source[i] += Tile::kWarpsK * 128;
  }

  template <bool kWhole>
  TAUT_DEVICE void fetch_chunks(const MmaArgs& args, unsigned char* stage) {
    // Tile `index` of the stage: n outermost. Tiles past the end of N or K are zeros: scale 0, and nobody stores what comes out.
    const auto n_of = [](int index) { return index / Tile::kWarpsK; };
    const auto k_of = [](int index) { return index % Tile::kWarpsK; };
    const auto inside = [&](int index) { return kWhole || (first_n64 + n_of(index) < args.tiles_n64 && k64 + k_of(index) < args.tiles_k); };
    for_chunks<kX, Stage::kXChunks>([&](int i, int c) {
      const bool there = kWhole || (k64 + c / 8 / Tile::kTileM) * 64 + c % 8 * 8 < args.K;
      x[i].fetch(stage + x_offset(threadIdx.x) + i * Tile::kThreads * 16, there ? x_source[i] : static_cast<const unsigned char*>(args.x),
                 there && (x_rows >> i & 1) ? 16 : 0);
    });
    for_chunks<kCodes, Stage::kCodeChunks>([&](int i, int c) {
      // Chunk i of this thread lies i * kThreads further on: so many pieces of n, and the rest within its piece.
      constexpr int kThreads = Tile::kThreads;
      const unsigned char* source = code_source + i * kThreads / kPieceChunks * code_n_stride + i * kThreads % kPieceChunks * 16;
      const bool there = inside(c / kTileChunks);
      codes[i].fetch(stage + Stage::kCodes + c * 16, there ? source : args.codes, there ? 16 : 0);
    });
    // Row of 64 scales or zero points: of tile `index`, its group `half` (two in 64 k if groups are of 32).
    const auto group_row = [&](int index, int half) {
      const int k = k64 + k_of(index);
      return static_cast<int64_t>(first_n64 + n_of(index)) * args.groups + (kGroup32 ? k * 2 + half : k >> args.group_tiles_log2);
    };
    for_chunks<kScales, Stage::kScaleChunks>([&](int i, int c) {
      const int index = c / 8 / Stage::kGroupRows;
      const bool there = inside(index);
      scales[i].fetch(stage + Stage::kScales + c * 16, args.scales + (there ? group_row(index, c / 8 % Stage::kGroupRows) * 128 + c % 8 * 16 : 0),
                      there ? 16 : 0);
    });
    if constexpr (kZeros)
      for_chunks<kZeroPoints, Stage::kZeroChunks>([&](int i, int c) {
        const int index = c / 4 / Stage::kGroupRows;
        const bool there = inside(index);
        zeros[i].fetch(stage + Stage::kZeros + c * 16, args.zeros + (there ? group_row(index, c / 4 % Stage::kGroupRows) * 64 + c % 4 * 16 : 0),
                       there ? 16 : 0);
      });
  }

  TAUT_DEVICE void land(unsigned char* stage) {
    if constexpr (kDeferred) {
      for_chunks<kX, Stage::kXChunks>([&](int i, int c) { x[i].land(stage + x_offset(c)); });
      for_chunks<kCodes, Stage::kCodeChunks>([&](int i, int c) { codes[i].land(stage + Stage::kCodes + c * 16); });
      for_chunks<kScales, Stage::kScaleChunks>([&](int i, int c) { scales[i].land(stage + Stage::kScales + c * 16); });
      if constexpr (kZeros) for_chunks<kZeroPoints, Stage::kZeroChunks>([&](int i, int c) { zeros[i].land(stage + Stage::kZeros + c * 16); });
    }
  }
};

// ---- Computing a unit --------------------------------------------------------------------------------------------------

// The words of one strip of a tile that belong to group h of kGroups: their first kWords / kGroups are filled.
template <Format kFormat, int kGroups>
TAUT_DEVICE void load_strip(StripCodes<kFormat>& codes, const unsigned char* s_tile, int strip, int h, int lane) {
  constexpr int kFragments = StripCodes<kFormat>::kWords / 4;
  if constexpr (kFormat == Format::kInt4 && kGroups == 2) {
    const uint2 v = reinterpret_cast<const uint2*>(s_tile)[(strip * 32 + lane) * 2 + h];
    codes.word[0] = v.x, codes.word[1] = v.y;
  } else {
#pragma unroll
    for (int f = 0; f < kFragments / kGroups; f++) {
      const uint4 v = reinterpret_cast<const uint4*>(s_tile)[(strip * kFragments + h + f) * 32 + lane];
      codes.word[4 * f] = v.x, codes.word[4 * f + 1] = v.y, codes.word[4 * f + 2] = v.z, codes.word[4 * f + 3] = v.w;
    }
  }
}

// Registers b0, b1 of steps 2 * half and 2 * half + 1 (of the 4 of 16 k in a panel), tokens `token`..`token` + 7 of it.
TAUT_DEVICE void load_x(uint32_t (&b)[4], const unsigned char* s_panel, int token, int half, int lane) {
  const int row = token + lane % 8;
  ptx::ldmatrix_x4(b, s_panel + row * 128 + (((half * 4 + lane / 8) ^ row) & 7) * 16);
}

// fp16 scales, two to a word, and zero points, two to 16 bits: of rows g and g + 8 of each strip of a warp.
template <int kStrips>
struct ScaleWords {
  uint32_t word[kStrips];
  TAUT_DEVICE void load(const unsigned char* s) {
    if constexpr (kStrips == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(s);
      word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(s);
      word[0] = v.x, word[1] = v.y;
    }
  }
  TAUT_DEVICE uint32_t pair(int strip) const { return word[strip]; }
};

template <bool kZeros, int kStrips>
struct ZeroWords {
  uint32_t word[kStrips / 2];
  TAUT_DEVICE void load(const unsigned char* s) {
    if constexpr (kZeros) {
#pragma unroll
      for (int i = 0; i < kStrips / 2; i++) word[i] = reinterpret_cast<const uint32_t*>(s)[i];
    }
  }
  TAUT_DEVICE uint32_t lower(int strip) const { return kZeros ? word[strip / 2] >> (strip % 2 * 16) & 0xff : 8; }
  TAUT_DEVICE uint32_t upper(int strip) const { return kZeros ? word[strip / 2] >> (strip % 2 * 16 + 8) & 0xff : 8; }
};

template <int kSm, class T, Format kFormat, bool kGroup32, bool kZeros, class Tile>
TAUT_DEVICE void compute_unit(const unsigned char* stage, Accumulators<Tile>& acc, int warp_n, int warp_m, int warp_k, int lane) {
  using Stage = StageLayout<kFormat, kGroup32, Tile>;
  constexpr int kTokens8 = Tile::kWarpM / 8, kGroups = Stage::kGroupRows, kSteps = 4 / kGroups;
  // WHY: x fragments of few tokens stay in registers for all strips; of many they are read again for each pair of strips.
  constexpr bool kKeepX = kTokens8 <= 2;
  constexpr int kStrips = kKeepX ? 1 : 2;
  const int index = warp_n * Tile::kWarpN / 64 * Tile::kWarpsK + warp_k, g = lane / 4;
  const int first_strip = warp_n * Tile::kWarpStrips % 4;  // of the tile
  const unsigned char* s_tile = stage + Stage::kCodes + index * Stage::kTileBytes;
  const unsigned char* s_panel = stage + warp_k * Tile::kTileM * 128;
  const int token0 = warp_m * Tile::kWarpM;

  uint32_t kept[kKeepX ? kTokens8 : 1][2][4];
  if constexpr (kKeepX) {
#pragma unroll
    for (int j = 0; j < kTokens8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++) load_x(kept[j][half], s_panel, token0 + j * 8, half, lane);
  }

  // WHY not unrolled for many tokens: both groups at once would not fit in the registers.
#pragma unroll(kKeepX ? kGroups : 1)
  for (int h = 0; h < kGroups; h++) {
    // The scales and zero points of this lane's rows: [strip][upper half].
    ScaleWords<Tile::kWarpStrips> scales;
    ZeroWords<kZeros, Tile::kWarpStrips> zero_points;
    scales.load(stage + Stage::kScales + (index * kGroups + h) * 128 + g * 16 + first_strip * 4);
    zero_points.load(stage + Stage::kZeros + (index * kGroups + h) * 64 + g * 8 + first_strip * 2);
#pragma unroll
    for (int s0 = 0; s0 < Tile::kWarpStrips; s0 += kStrips) {
      uint32_t a[kStrips][kSteps][4];
      float scale[kStrips][2];
#pragma unroll
      for (int s = 0; s < kStrips; s++) {
        StripCodes<kFormat> codes;
        load_strip<kFormat, kGroups>(codes, s_tile, (Tile::kWarpStrips == 4 ? 0 : first_strip) + s0 + s, h, lane);
        const uint32_t pair = scales.pair(s0 + s);
        scale[s][0] = lower_half(pair) * Dequant<kFormat, T>::kScale;
        scale[s][1] = upper_half(pair) * Dequant<kFormat, T>::kScale;
        const FragmentZeros zeros = Dequant<kFormat, T>::zeros(zero_points.lower(s0 + s), zero_points.upper(s0 + s));
#pragma unroll
        for (int step = 0; step < kSteps; step++) Dequant<kFormat, T>::fragment(codes, step, zeros, a[s][step]);
      }
#pragma unroll
      for (int j = 0; j < kTokens8; j++) {
        uint32_t b[kSteps / 2][4];
#pragma unroll
        for (int half = 0; half < kSteps / 2; half++) {
          if constexpr (kKeepX) {
#pragma unroll
            for (int i = 0; i < 4; i++) b[half][i] = kept[j][h * kSteps / 2 + half][i];
          } else {
            load_x(b[half], s_panel, token0 + j * 8, h * kSteps / 2 + half, lane);
          }
        }
#pragma unroll
        for (int s = 0; s < kStrips; s++) {
          float part[4] = {0, 0, 0, 0};
#pragma unroll
          for (int step = 0; step < kSteps; step++) mma<kSm, T>(part, a[s][step], b[step / 2][step % 2 * 2], b[step / 2][step % 2 * 2 + 1]);
#pragma unroll
          for (int i = 0; i < 4; i++) acc.sum[s0 + s][j][i] = fmaf(scale[s][i / 2], part[i], acc.sum[s0 + s][j][i]);
        }
      }
    }
  }
}

// ---- The kernels -------------------------------------------------------------------------------------------------------

// A block's stretch of units. A Loader walks along k in a tile and fills stages (set_tile, fetch, land, as the one above); `compute`
// adds a unit to a warp's sums.
template <bool kAsync, class T, class Tile, int kStages, int kStageBytes, class Loader, class Args, class Compute>
TAUT_DEVICE void stream_units(const Args& args, const Compute& compute) {
  TAUT_DYNAMIC_SMEM(smem);
  unsigned char* s_epilogue = smem + kStages * kStageBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_n = warp % Tile::kWarpsN, warp_m = warp / Tile::kWarpsN % Tile::kWarpsM, warp_k = warp / (Tile::kWarpsN * Tile::kWarpsM);
  const int64_t begin = stretch_begin(blockIdx.x, args.units, gridDim.x), end = stretch_begin(blockIdx.x + 1, args.units, gridDim.x);
  const int first_tile = static_cast<int>(begin / args.steps);

  Loader loader;
  Accumulators<Tile> acc;
  acc.clear();

  // One tile's sums are complete, or cut by a seam: add up the warps that share outputs, and store.
  const auto finish = [&](int tile, int first_step, int last_step) {
    const int position = warp_m * Tile::kWarpsN + warp_n;
    float* s_sums = reinterpret_cast<float*>(s_epilogue);
    constexpr int kSlot = EpilogueLayout<Tile>::kSlotFloats;
    if constexpr (Tile::kWarpsK > 1) {
      if (warp_k > 0) acc.store(s_sums + ((warp_k - 1) * Tile::kPositions + position) * kSlot, lane);
      __syncthreads();
      if (warp_k == 0)
        for (int k = 1; k < Tile::kWarpsK; k++) acc.add(s_sums + ((k - 1) * Tile::kPositions + position) * kSlot, lane);
    }
    if (warp_k == 0) {
      if (first_step == 0 && last_step == args.steps) {
        T* s_rows = reinterpret_cast<T*>(s_epilogue + EpilogueLayout<Tile>::kSumBytes + position * EpilogueLayout<Tile>::kStoreBytes);
        const int m0 = tile % args.tiles_m * Tile::kTileM + warp_m * Tile::kWarpM, n0 = tile / args.tiles_m * Tile::kTileN + warp_n * Tile::kWarpN;
        store_out<T, Tile>(args, acc, m0, n0, s_rows, lane);
      } else {
        const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + (tile == first_tile ? 0 : 1);
        acc.store(args.partials + (slot * Tile::kPositions + position) * kSlot, lane);
      }
    }
    if constexpr (Tile::kWarpsK > 1) __syncthreads();  // the sums' buffer is free again
    acc.clear();
  };

  // The unit that is loaded next runs ahead of the one that is computed.
  int load_tile = first_tile, load_step = static_cast<int>(begin % args.steps);
  int to_load = static_cast<int>(end - begin), to_compute = to_load;
  const auto fetch = [&](int slot) {
    loader.fetch(args, smem + slot * kStageBytes);
    if (++load_step == args.steps) loader.set_tile(args, ++load_tile, load_step = 0);
    to_load--;
  };
  loader.set_tile(args, load_tile, load_step);

  int tile = load_tile, step = load_step, first_step = load_step, slot = 0;
  if constexpr (kAsync) {
#pragma unroll 1
    for (int s = 0; s < kStages - 1; s++) {
      if (to_load > 0) fetch(s);
      ptx::cp_async_commit();
    }
  } else if (to_load > 0) {
    fetch(0);
    loader.land(smem);
    __syncthreads();
  }
  while (to_compute > 0) {
    const int last_step = min(args.steps, step + to_compute);
    to_compute -= last_step - step;
    for (; step < last_step; step++) {
      if constexpr (kAsync) {
        ptx::cp_async_wait<kStages - 2>();
        __syncthreads();  // this stage is there for all; and all are done with the one that is refilled now
        if (to_load > 0) fetch(slot == 0 ? kStages - 1 : slot - 1);
        ptx::cp_async_commit();
      }
      const bool more = !kAsync && to_load > 0;
      if constexpr (!kAsync) {
        if (more) fetch(slot ^ 1);
      }
      compute(smem + slot * kStageBytes, acc, warp_n, warp_m, warp_k, lane);
      if constexpr (!kAsync) {
        if (more) loader.land(smem + (slot ^ 1) * kStageBytes);
        __syncthreads();
      }
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }
    finish(tile++, first_step, last_step);
    first_step = step = 0;
  }
  if constexpr (kAsync) ptx::cp_async_wait<0>();
}

template <int kSm, class T, Format kFormat, bool kGroup32, bool kZeros, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) mma_kernel(const MmaArgs args) {
  if constexpr (kCompiledFor<kSm>) {
#if TAUT_ARCH_AT_LEAST(90)
    ptx::griddep_launch();  // `combine` may take its place, and wait
#endif
    constexpr int kStageBytes = (StageLayout<kFormat, kGroup32, Tile>::kBytes + 127) / 128 * 128;
    stream_units<(kSm >= 80), T, Tile, Tile::kStages, kStageBytes, Loader<(kSm < 80), kFormat, kGroup32, kZeros, Tile>>(
        args, [&](const unsigned char* stage, Accumulators<Tile>& acc, int warp_n, int warp_m, int warp_k, int lane) {
          compute_unit<kSm, T, kFormat, kGroup32, kZeros, Tile>(stage, acc, warp_n, warp_m, warp_k, lane);
        });
  }
}

// Rows of x that cp.async cannot copy (not 16-byte aligned, or K not a multiple of 8), moved to where it can; padding is 0.
__global__ void __launch_bounds__(256) align_rows(const uint16_t* x, int64_t x_row_stride, int64_t M, int K, uint16_t* aligned, int aligned_k) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < M * aligned_k; i += gridDim.x * 256ll) {
    const int64_t m = i / aligned_k;
    const int k = static_cast<int>(i - m * aligned_k);
    aligned[i] = k < K ? x[m * x_row_stride + k] : uint16_t{0};
  }
}

// One warp per warp position of a tile: adds the parts of a tile that several blocks computed, in the order of k.
template <class T, class Tile>
__global__ void __launch_bounds__(32) combine(const MmaArgs args, int blocks) {
  __shared__ __align__(16) unsigned char s_bytes[EpilogueLayout<Tile>::kStoreBytes];
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_wait();
#endif
  const int tile = blockIdx.x, position = blockIdx.y, lane = threadIdx.x;
  const int64_t first = static_cast<int64_t>(tile) * args.steps;
  const int64_t block_begin = block_of_unit(first, args.units, blocks), block_end = block_of_unit(first + args.steps - 1, args.units, blocks);
  if (block_begin == block_end) return;
  Accumulators<Tile> acc;
  acc.clear();
  for (int64_t b = block_begin; b <= block_end; b++) {
    const int64_t slot = 2 * b + (stretch_begin(b, args.units, blocks) / args.steps == tile ? 0 : 1);
    acc.add(args.partials + (slot * Tile::kPositions + position) * EpilogueLayout<Tile>::kSlotFloats, lane);
  }
  const int m0 = tile % args.tiles_m * Tile::kTileM + position / Tile::kWarpsN * Tile::kWarpM;
  const int n0 = tile / args.tiles_m * Tile::kTileN + position % Tile::kWarpsN * Tile::kWarpN;
  store_out<T, Tile>(args, acc, m0, n0, reinterpret_cast<T*>(s_bytes), lane);
}

// ---- Host --------------------------------------------------------------------------------------------------------------

struct Plan {
  int64_t tiles, units, blocks;
  int tiles_m, steps;
  bool cut;                                // some tile is computed by more than one block
  bool align;                              // x goes through align_rows
  int64_t partial_bytes, workspace_bytes;  // the partials, then the aligned rows
};

inline int aligned_k(const CudaParams& p) { return static_cast<int>((p.weight.K + 7) / 8 * 8); }

// smem: the bytes of shared memory a block takes.
template <class Tile>
Plan make_plan(const CudaParams& p, const MmaTiles& layout, int smem) {
  Plan plan{};
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  plan.tiles_m = static_cast<int>(ceil_div(p.M, Tile::kTileM));
  plan.steps = static_cast<int>(ceil_div(layout.num_tiles_k(), Tile::kWarpsK));
  plan.tiles = plan.tiles_m * ceil_div(layout.num_tiles_n(), Tile::kTilesN64);
  plan.units = plan.tiles * plan.steps;
  if (p.batch_invariant) {
    // Every tile is cut at the same k, however many there are: the cuts depend on N, K and the device only.
    const int64_t wanted = ceil_div(p.device->sm_count, ceil_div(layout.num_tiles_n(), 4));
    plan.blocks = plan.tiles * std::clamp<int64_t>(plan.steps / 8, 1, std::max<int64_t>(wanted, 1));
  } else {
    const int fit = p.device->smem_bytes / smem;
    const int64_t resident = static_cast<int64_t>(p.device->sm_count) * std::clamp(fit, 1, Tile::kBlocksPerSm);
    // A tile is cut only as far as every block keeps a few units, to hide its start and its share of the combining.
    plan.blocks = std::min(resident, std::max(plan.tiles, ceil_div(plan.units, 4)));
  }
  // Whole tiles for every block, or one step to a tile; else some block's stretch begins inside a tile.
  plan.cut = plan.steps > 1 && plan.tiles % plan.blocks != 0;
  plan.align = p.weight.K % 8 != 0 || reinterpret_cast<uintptr_t>(p.x) % 16 != 0 || (p.x_row_stride % 8 != 0 && p.M > 1);
  plan.partial_bytes = plan.cut ? plan.blocks * 2 * Tile::kTileM * Tile::kTileN * 4 : 0;
  plan.workspace_bytes = plan.partial_bytes + (plan.align ? p.M * aligned_k(p) * 2 : 0);
  return plan;
}

// What a kernel is told; x goes through align_rows first where the plan says so.
inline MmaArgs make_args(const CudaParams& p, const MmaTiles& layout, const Plan& plan) {
  MmaArgs args{};
  args.x = p.x, args.bias = p.bias, args.out = p.out, args.partials = static_cast<float*>(p.workspace);
  args.codes = p.packed, args.scales = p.packed + layout.scales_begin(), args.zeros = p.weight.zeros ? p.packed + layout.zeros_begin() : nullptr;
  args.x_row_stride = p.x_row_stride;
  args.M = static_cast<int>(p.M), args.N = static_cast<int>(p.weight.N), args.K = aligned_k(p);
  args.tiles_n64 = static_cast<int>(layout.num_tiles_n()), args.tiles_k = static_cast<int>(layout.num_tiles_k());
  args.groups = static_cast<int>(layout.num_groups());
  args.group_tiles_log2 = p.weight.group_size == 0 ? 31 : p.weight.group_size == 128 ? 1 : 0;
  args.tiles_m = plan.tiles_m, args.steps = plan.steps, args.units = plan.units;
  args.out_aligned = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.weight.N % 8 == 0;
  if (plan.align) {
    auto* rows = reinterpret_cast<uint16_t*>(static_cast<unsigned char*>(p.workspace) + plan.partial_bytes);
    const int64_t blocks = std::min<int64_t>((p.M * aligned_k(p) + 255) / 256, 8 * p.device->sm_count);
    launch("quant_linear align_rows", align_rows, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, p.stream, static_cast<const uint16_t*>(p.x),
           p.x_row_stride, p.M, static_cast<int>(p.weight.K), rows, aligned_k(p));
    args.x = rows, args.x_row_stride = aligned_k(p);
  }
  return args;
}

template <class T, class Tile>
void launch_combine(const CudaParams& p, const Plan& plan, const MmaArgs& args) {
  if (plan.cut)
    launch_dependent(*p.device, "quant_linear combine", combine<T, Tile>, dim3(static_cast<unsigned>(plan.tiles), Tile::kPositions), dim3(32), 0, p.stream,
                     args, static_cast<int>(plan.blocks));
}

template <int kSm, class T, Format kFormat, bool kGroup32, class Tile>
void run_tile(const CudaParams& p) {
  constexpr int kSmem = smem_bytes<kFormat, kGroup32, Tile>();
  // What every device of the generation gives a block: sm_86, 89 and 120 have 99 KB.
  static_assert(kSmem <= (kSm >= 80 ? 99 : 64) * 1024);
  const Plan plan = make_plan<Tile>(p, MmaTiles{p.weight}, kSmem);
  const MmaArgs args = make_args(p, MmaTiles{p.weight}, plan);
  const auto launch_mma = [&](void (*kernel)(MmaArgs)) {
    launch("quant_linear mma", kernel, dim3(static_cast<unsigned>(plan.blocks)), dim3(Tile::kThreads), kSmem, p.stream, args);
  };
  if constexpr (kFormat == Format::kInt4)
    launch_mma(args.zeros ? mma_kernel<kSm, T, kFormat, kGroup32, true, Tile> : mma_kernel<kSm, T, kFormat, kGroup32, false, Tile>);
  else launch_mma(mma_kernel<kSm, T, kFormat, kGroup32, false, Tile>);
  launch_combine<T, Tile>(p, plan, args);
}

// Tiles by M. The first two split K between warps: few outputs, so a block's sums are cheap to add up, and x is read by few.
// WHY batch-invariant mode begins at the third: the order in which an output's k are added must be the same for every M.
template <int kSm>
struct Tiles {
  using M8 = MmaTile<8, 4, 1, 1, 4, 4, 3>;
  using M16 = MmaTile<16, 4, 2, 1, 2, 4, 2>;
  using M32 = MmaTile<32, 2, 4, 1, 1, 4, 3>;
  using M64 = MmaTile<32, 2, 4, 2, 1, 3, 1>;
  using M128 = MmaTile<64, 2, 4, 2, 1, 3, 1>;
};
// Two stages, and registers that hold the next one meanwhile: smaller tiles, or fewer blocks on an SM.
template <>
struct Tiles<75> {
  using M8 = MmaTile<8, 4, 1, 1, 4, 2, 3>;
  using M16 = MmaTile<16, 4, 2, 1, 2, 2, 2>;
  using M32 = MmaTile<32, 2, 4, 1, 1, 2, 2>;
  using M64 = MmaTile<32, 2, 4, 2, 1, 2, 1>;
  using M128 = M64;
};

// Calls f.template operator()<Tile>() for the tile of this call.
template <int kSm, class F>
auto with_tile(const CudaParams& p, const F& f) {
  if (p.M <= 8 && !p.batch_invariant) return f.template operator()<typename Tiles<kSm>::M8>();
  if (p.M <= 16 && !p.batch_invariant) return f.template operator()<typename Tiles<kSm>::M16>();
  if (p.M <= 32) return f.template operator()<typename Tiles<kSm>::M32>();
  if (p.M <= 64) return f.template operator()<typename Tiles<kSm>::M64>();
  return f.template operator()<typename Tiles<kSm>::M128>();
}

template <int kSm, Format kFormat>
int64_t workspace_bytes_for(const CudaParams& p) {
  return with_tile<kSm>(p, [&]<class Tile>() {
    const int smem = p.weight.group_size == 32 ? smem_bytes<kFormat, true, Tile>() : smem_bytes<kFormat, false, Tile>();
    return make_plan<Tile>(p, MmaTiles{p.weight}, smem).workspace_bytes;
  });
}

template <int kSm, class T, Format kFormat>
void run_for(const CudaParams& p) {
  with_tile<kSm>(p, [&]<class Tile>() {
    if (p.weight.group_size == 32) run_tile<kSm, T, kFormat, true, Tile>(p);
    else run_tile<kSm, T, kFormat, false, Tile>(p);
  });
}

}  // namespace
}  // namespace taut::quant_linear
