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
// LIMITS    x fp16 or bf16 (sm_75: fp16); activations float. Any M, N, K, stride; x rows that are not 16-byte aligned are
//           copied element by element.
#pragma once

#include <algorithm>

#include "common/cuda.cuh"
#include "common/dequant.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"
#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

// Each kernel's body is compiled for the devices that run it.
template <int kSm>
constexpr bool kCompiledFor = TAUT_EMULATED || (kSm >= 80 ? TAUT_ARCH >= kSm : TAUT_ARCH >= kSm && TAUT_ARCH < 80);

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
  const void* x;
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
  bool x_aligned, out_aligned;  // 16-byte chunks can be copied whole
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

template <class T>
TAUT_DEVICE T from_float(float v);
template <>
TAUT_DEVICE __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
TAUT_DEVICE __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
TAUT_DEVICE float to_float(__half v) { return __half2float(v); }
TAUT_DEVICE float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

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
        for (int e = 0; e < 8 && n + e < args.N; e++) g_out[e] = s_out[e];
      }
    }
  }
}

// ---- Loading a unit ----------------------------------------------------------------------------------------------------

// 16 bytes from global to shared memory; what lies beyond `valid` bytes is zero. kDeferred: the bytes wait in a register
// (sm_75, where there is no cp.async) until `land`.
template <bool kDeferred>
struct Chunk;

template <>
struct Chunk<false> {
  TAUT_DEVICE void fetch(void* dst, const void* src, int valid) { ptx::cp_async_16(dst, src, valid); }
  TAUT_DEVICE void fetch_elements(void* dst, const uint16_t* src, int count) {
    uint16_t* d = static_cast<uint16_t*>(dst);
#pragma unroll
    for (int e = 0; e < 8; e++) d[e] = e < count ? src[e] : uint16_t{0};
  }
  TAUT_DEVICE void land(void*) {}
};

template <>
struct Chunk<true> {
  uint4 bytes;

  // `valid` is 0 or 16 here: on sm_75 a chunk that ends inside a row of x goes element by element.
  TAUT_DEVICE void fetch(void*, const void* src, int valid) { bytes = valid ? *static_cast<const uint4*>(src) : make_uint4(0, 0, 0, 0); }
  TAUT_DEVICE void fetch_elements(void*, const uint16_t* src, int count) {
    uint32_t e[8];
#pragma unroll
    for (int i = 0; i < 8; i++) e[i] = i < count ? src[i] : uint16_t{0};
    bytes = make_uint4(e[0] | e[1] << 16, e[2] | e[3] << 16, e[4] | e[5] << 16, e[6] | e[7] << 16);
  }
  TAUT_DEVICE void land(void* dst) { *static_cast<uint4*>(dst) = bytes; }
};

template <bool kDeferred, Format kFormat, bool kGroup32, class Tile>
struct Loader {
  using Stage = StageLayout<kFormat, kGroup32, Tile>;
  static constexpr int per_thread(int chunks) { return (chunks + Tile::kThreads - 1) / Tile::kThreads; }
  static constexpr int kX = per_thread(Stage::kXChunks), kCodes = per_thread(Stage::kCodeChunks), kScales = per_thread(Stage::kScaleChunks),
                       kZeros = per_thread(Stage::kZeroChunks);
  Chunk<kDeferred> x[kX], codes[kCodes], scales[kScales], zeros[kZeros];

  // Calls f(chunk, destination, index of the chunk in its part) for this thread's chunks of a part.
  template <int kCount, int kChunks, class F>
  TAUT_DEVICE static void for_chunks(Chunk<kDeferred> (&chunks)[kCount], const F& f) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int c = threadIdx.x + i * Tile::kThreads;
      if (kChunks % Tile::kThreads == 0 || c < kChunks) f(chunks[i], c);
    }
  }
  TAUT_DEVICE static int x_offset(int c) {  // swizzled
    const int row = c / 8 % Tile::kTileM, panel = c / 8 / Tile::kTileM;
    return panel * Tile::kTileM * 128 + row * 128 + ((c ^ row) & 7) * 16;
  }

  TAUT_DEVICE void fetch(const MmaArgs& args, unsigned char* stage, int tile, int step) {
    const int m0 = tile % args.tiles_m * Tile::kTileM, first_n64 = tile / args.tiles_m * Tile::kTilesN64, first_k64 = step * Tile::kWarpsK;
    for_chunks<kX, Stage::kXChunks>(x, [&](Chunk<kDeferred>& chunk, int c) {
      const int m = m0 + c / 8 % Tile::kTileM, k = (first_k64 + c / 8 / Tile::kTileM) * 64 + c % 8 * 8;
      const int count = m < args.M ? min(max(args.K - k, 0), 8) : 0;  // elements
      const uint16_t* src = static_cast<const uint16_t*>(args.x) + (count ? m * args.x_row_stride + k : 0);
      if (args.x_aligned && (!kDeferred || count % 8 == 0)) chunk.fetch(stage + x_offset(c), src, count * 2);
      else chunk.fetch_elements(stage + x_offset(c), src, count);
    });
    // Tiles past the end of N or K (a block may reach there) are zeros: scale 0, and nobody stores what comes out.
    const auto tile_of = [&](int index, int& n64, int& k64) {
      n64 = first_n64 + index % Tile::kTilesN64, k64 = first_k64 + index / Tile::kTilesN64;
      return n64 < args.tiles_n64 && k64 < args.tiles_k;
    };
    for_chunks<kCodes, Stage::kCodeChunks>(codes, [&](Chunk<kDeferred>& chunk, int c) {
      constexpr int kPerTile = Stage::kTileBytes / 16;
      int n64, k64;
      const bool inside = tile_of(c / kPerTile, n64, k64);
      const int64_t offset = (static_cast<int64_t>(n64) * args.tiles_k + k64) * Stage::kTileBytes + c % kPerTile * 16;
      chunk.fetch(stage + Stage::kCodes + c * 16, args.codes + (inside ? offset : 0), inside ? 16 : 0);
    });
    const auto group_of = [&](int n64, int k64, int half) {
      return static_cast<int64_t>(n64) * args.groups + (kGroup32 ? k64 * 2 + half : k64 >> args.group_tiles_log2);
    };
    for_chunks<kScales, Stage::kScaleChunks>(scales, [&](Chunk<kDeferred>& chunk, int c) {
      int n64, k64;
      const bool inside = tile_of(c / 8 / Stage::kGroupRows, n64, k64);
      const int64_t offset = group_of(n64, k64, c / 8 % Stage::kGroupRows) * 128 + c % 8 * 16;
      chunk.fetch(stage + Stage::kScales + c * 16, args.scales + (inside ? offset : 0), inside ? 16 : 0);
    });
    if (kFormat == Format::kInt4 && args.zeros)
      for_chunks<kZeros, Stage::kZeroChunks>(zeros, [&](Chunk<kDeferred>& chunk, int c) {
        int n64, k64;
        const bool inside = tile_of(c / 4 / Stage::kGroupRows, n64, k64);
        const int64_t offset = group_of(n64, k64, c / 4 % Stage::kGroupRows) * 64 + c % 4 * 16;
        chunk.fetch(stage + Stage::kZeros + c * 16, args.zeros + (inside ? offset : 0), inside ? 16 : 0);
      });
  }

  TAUT_DEVICE void land(const MmaArgs& args, unsigned char* stage) {
    if constexpr (kDeferred) {
      for_chunks<kX, Stage::kXChunks>(x, [&](Chunk<kDeferred>& chunk, int c) { chunk.land(stage + x_offset(c)); });
      for_chunks<kCodes, Stage::kCodeChunks>(codes, [&](Chunk<kDeferred>& chunk, int c) { chunk.land(stage + Stage::kCodes + c * 16); });
      for_chunks<kScales, Stage::kScaleChunks>(scales, [&](Chunk<kDeferred>& chunk, int c) { chunk.land(stage + Stage::kScales + c * 16); });
      if (kFormat == Format::kInt4 && args.zeros)
        for_chunks<kZeros, Stage::kZeroChunks>(zeros, [&](Chunk<kDeferred>& chunk, int c) { chunk.land(stage + Stage::kZeros + c * 16); });
    }
  }
};

// ---- Computing a unit --------------------------------------------------------------------------------------------------

template <int kSm, class T>
TAUT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kSm >= 80) {
    ptx::mma_m16n8k16<T>(d, a, b0, b1);
  } else {  // registers 0 and 1 of A are its k 0..7, 2 and 3 its k 8..15
    ptx::mma_m16n8k8(d, a[0], a[1], b0);
    ptx::mma_m16n8k8(d, a[2], a[3], b1);
  }
}

template <Format kFormat>
TAUT_DEVICE void load_strip(StripCodes<kFormat>& codes, const unsigned char* s_tile, int strip, int lane) {
  constexpr int kFragments = StripCodes<kFormat>::kWords / 4;
#pragma unroll
  for (int f = 0; f < kFragments; f++) {
    const uint4 v = reinterpret_cast<const uint4*>(s_tile)[(strip * kFragments + f) * 32 + lane];
    codes.word[4 * f] = v.x, codes.word[4 * f + 1] = v.y, codes.word[4 * f + 2] = v.z, codes.word[4 * f + 3] = v.w;
  }
}

// b[2 * step + half] for the 4 steps of 16 k in a panel, tokens 8j..8j+7 of it.
TAUT_DEVICE void load_x(uint32_t (&b)[8], const unsigned char* s_panel, int token, int lane) {
  const int row = token + lane % 8;
  uint32_t r[4];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    ptx::ldmatrix_x4(r, s_panel + row * 128 + (((half * 4 + lane / 8) ^ row) & 7) * 16);
#pragma unroll
    for (int i = 0; i < 4; i++) b[half * 4 + i] = r[i];
  }
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

template <int kStrips>
struct ZeroWords {
  uint32_t word[kStrips / 2];
  TAUT_DEVICE ZeroWords() {
#pragma unroll
    for (int i = 0; i < kStrips / 2; i++) word[i] = 0x08080808u;
  }
  TAUT_DEVICE void load(const unsigned char* s) {
#pragma unroll
    for (int i = 0; i < kStrips / 2; i++) word[i] = reinterpret_cast<const uint32_t*>(s)[i];
  }
  TAUT_DEVICE uint32_t pair(int strip) const { return word[strip / 2] >> (strip % 2 * 16); }
};

template <int kSm, class T, Format kFormat, bool kGroup32, class Tile>
TAUT_DEVICE void compute_unit(const MmaArgs& args, const unsigned char* stage, Accumulators<Tile>& acc, int warp_n, int warp_m, int warp_k, int lane) {
  using Stage = StageLayout<kFormat, kGroup32, Tile>;
  constexpr int kTokens8 = Tile::kWarpM / 8, kGroups = Stage::kGroupRows, kSteps = 4 / kGroups;
  // WHY: x fragments of few tokens stay in registers for all strips; of many they are read again for each pair of strips.
  constexpr bool kKeepX = kTokens8 <= 2;
  constexpr int kStrips = kKeepX ? 1 : 2;
  const int index = warp_k * Tile::kTilesN64 + warp_n * Tile::kWarpN / 64, g = lane / 4;
  const int first_strip = warp_n * Tile::kWarpStrips % 4;  // of the tile
  const unsigned char* s_tile = stage + Stage::kCodes + index * Stage::kTileBytes;
  const unsigned char* s_panel = stage + warp_k * Tile::kTileM * 128;
  const int token0 = warp_m * Tile::kWarpM;

  // The scales and zero points of this lane's rows, for each group: [strip][upper half].
  ScaleWords<Tile::kWarpStrips> scales[kGroups];
  ZeroWords<Tile::kWarpStrips> zero_points[kGroups];
#pragma unroll
  for (int h = 0; h < kGroups; h++) {
    scales[h].load(stage + Stage::kScales + (index * kGroups + h) * 128 + g * 16 + first_strip * 4);
    if (kFormat == Format::kInt4 && args.zeros) zero_points[h].load(stage + Stage::kZeros + (index * kGroups + h) * 64 + g * 8 + first_strip * 2);
  }

  uint32_t kept[kKeepX ? kTokens8 : 1][8];
  if constexpr (kKeepX) {
#pragma unroll
    for (int j = 0; j < kTokens8; j++) load_x(kept[j], s_panel, token0 + j * 8, lane);
  }

#pragma unroll
  for (int s0 = 0; s0 < Tile::kWarpStrips; s0 += kStrips) {
    uint32_t a[kStrips][4][4];
    float scale[kStrips][kGroups][2];
#pragma unroll
    for (int s = 0; s < kStrips; s++) {
      StripCodes<kFormat> codes;
      const int strip = Tile::kWarpStrips == 4 ? s0 + s : first_strip + s0 + s;
      load_strip<kFormat>(codes, s_tile, strip, lane);
#pragma unroll
      for (int h = 0; h < kGroups; h++) {
        const uint32_t pair = scales[h].pair(s0 + s);
        const uint32_t z = zero_points[h].pair(s0 + s);
        const FragmentZeros zeros = Dequant<kFormat, T>::zeros(z & 0xff, z >> 8 & 0xff);
        scale[s][h][0] = __half2float(__ushort_as_half(static_cast<unsigned short>(pair & 0xffff))) * Dequant<kFormat, T>::kScale;
        scale[s][h][1] = __half2float(__ushort_as_half(static_cast<unsigned short>(pair >> 16))) * Dequant<kFormat, T>::kScale;
#pragma unroll
        for (int step = 0; step < kSteps; step++) Dequant<kFormat, T>::fragment(codes, h * kSteps + step, zeros, a[s][h * kSteps + step]);
      }
    }
#pragma unroll
    for (int j = 0; j < kTokens8; j++) {
      uint32_t b[8];
      if constexpr (kKeepX) {
#pragma unroll
        for (int i = 0; i < 8; i++) b[i] = kept[j][i];
      } else {
        load_x(b, s_panel, token0 + j * 8, lane);
      }
#pragma unroll
      for (int h = 0; h < kGroups; h++)
#pragma unroll
        for (int s = 0; s < kStrips; s++) {
          float part[4] = {0, 0, 0, 0};
#pragma unroll
          for (int step = h * kSteps; step < (h + 1) * kSteps; step++) mma<kSm, T>(part, a[s][step], b[2 * step], b[2 * step + 1]);
#pragma unroll
          for (int i = 0; i < 4; i++) acc.sum[s0 + s][j][i] = fmaf(scale[s][h][i / 2], part[i], acc.sum[s0 + s][j][i]);
        }
    }
  }
}

// ---- The kernels -------------------------------------------------------------------------------------------------------

template <int kSm, class T, Format kFormat, bool kGroup32, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) mma_kernel(const MmaArgs args) {
  if constexpr (kCompiledFor<kSm>) {
    constexpr bool kAsync = kSm >= 80;
    constexpr int kStages = Tile::kStages, kStageBytes = (StageLayout<kFormat, kGroup32, Tile>::kBytes + 127) / 128 * 128;
    TAUT_DYNAMIC_SMEM(smem);
    unsigned char* s_epilogue = smem + kStages * kStageBytes;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_n = warp % Tile::kWarpsN, warp_m = warp / Tile::kWarpsN % Tile::kWarpsM, warp_k = warp / (Tile::kWarpsN * Tile::kWarpsM);
    const int64_t begin = stretch_begin(blockIdx.x, args.units, gridDim.x), end = stretch_begin(blockIdx.x + 1, args.units, gridDim.x);

    Loader<!kAsync, kFormat, kGroup32, Tile> loader;
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
          const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + (tile == begin / args.steps ? 0 : 1);
          acc.store(args.partials + (slot * Tile::kPositions + position) * kSlot, lane);
        }
      }
      if constexpr (Tile::kWarpsK > 1) __syncthreads();  // the sums' buffer is free again
      acc.clear();
    };

    // The unit that is loaded next runs ahead of the one that is computed.
    int load_tile = static_cast<int>(begin / args.steps), load_step = static_cast<int>(begin % args.steps);
    int64_t to_load = end - begin;
    const auto fetch = [&](int slot) {
      loader.fetch(args, smem + slot * kStageBytes, load_tile, load_step);
      if (++load_step == args.steps) load_step = 0, load_tile++;
      to_load--;
    };

    int tile = load_tile, step = load_step, first_step = load_step, slot = 0;
    if constexpr (kAsync) {
#pragma unroll
      for (int s = 0; s < kStages - 1; s++) {
        if (to_load > 0) fetch(s);
        ptx::cp_async_commit();
      }
    } else if (to_load > 0) {
      fetch(0);
      loader.land(args, smem);
      __syncthreads();
    }
    for (int64_t unit = begin; unit < end; unit++) {
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
      compute_unit<kSm, T, kFormat, kGroup32, Tile>(args, smem + slot * kStageBytes, acc, warp_n, warp_m, warp_k, lane);
      if constexpr (!kAsync) {
        if (more) loader.land(args, smem + (slot ^ 1) * kStageBytes);
        __syncthreads();
      }
      slot = slot + 1 == kStages ? 0 : slot + 1;
      if (++step == args.steps || unit + 1 == end) {
        finish(tile, first_step, step);
        if (step == args.steps) step = 0, tile++;
        first_step = 0;
      }
    }
    if constexpr (kAsync) ptx::cp_async_wait<0>();
  }
}

// One warp per warp position of a tile: adds the parts of a tile that several blocks computed, in the order of k.
template <class T, class Tile>
__global__ void __launch_bounds__(32) combine(const MmaArgs args, int blocks) {
  __shared__ __align__(16) unsigned char s_bytes[EpilogueLayout<Tile>::kStoreBytes];
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
  int64_t workspace_bytes;
  bool cut;  // some tile is computed by more than one block
};

template <Format kFormat, bool kGroup32, class Tile>
Plan make_plan(const CudaParams& p) {
  const MmaTiles layout{p.weight};
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
    const int fit = p.device->smem_bytes / smem_bytes<kFormat, kGroup32, Tile>();
    const int64_t resident = static_cast<int64_t>(p.device->sm_count) * std::clamp(fit, 1, Tile::kBlocksPerSm);
    // A tile is cut only as far as every block keeps a few units, to hide its start and its share of the combining.
    plan.blocks = std::min(resident, std::max(plan.tiles, ceil_div(plan.units, 4)));
  }
  for (int64_t b = 1; b < plan.blocks && !plan.cut; b++) plan.cut = stretch_begin(b, plan.units, plan.blocks) % plan.steps != 0;
  plan.workspace_bytes = plan.cut ? plan.blocks * 2 * Tile::kTileM * Tile::kTileN * 4 : 0;
  return plan;
}

template <int kSm, class T, Format kFormat, bool kGroup32, class Tile>
void run_tile(const CudaParams& p) {
  const MmaTiles layout{p.weight};
  const Plan plan = make_plan<kFormat, kGroup32, Tile>(p);
  MmaArgs args{};
  args.x = p.x, args.bias = p.bias, args.out = p.out, args.partials = static_cast<float*>(p.workspace);
  args.codes = p.packed, args.scales = p.packed + layout.scales_begin(), args.zeros = p.weight.zeros ? p.packed + layout.zeros_begin() : nullptr;
  args.x_row_stride = p.x_row_stride;
  args.M = static_cast<int>(p.M), args.N = static_cast<int>(p.weight.N), args.K = static_cast<int>(p.weight.K);
  args.tiles_n64 = static_cast<int>(layout.num_tiles_n()), args.tiles_k = static_cast<int>(layout.num_tiles_k());
  args.groups = static_cast<int>(layout.num_groups());
  args.group_tiles_log2 = p.weight.group_size == 0 ? 31 : p.weight.group_size == 128 ? 1 : 0;
  args.tiles_m = plan.tiles_m, args.steps = plan.steps, args.units = plan.units;
  args.x_aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && (p.x_row_stride % 8 == 0 || p.M == 1);
  args.out_aligned = reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && p.weight.N % 8 == 0;
  launch("quant_linear mma", mma_kernel<kSm, T, kFormat, kGroup32, Tile>, dim3(static_cast<unsigned>(plan.blocks)), dim3(Tile::kThreads),
         smem_bytes<kFormat, kGroup32, Tile>(), p.stream, args);
  if (plan.cut)
    launch("quant_linear combine", combine<T, Tile>, dim3(static_cast<unsigned>(plan.tiles), Tile::kPositions), dim3(32), 0, p.stream, args,
           static_cast<int>(plan.blocks));
}

// Tiles by M. The first two split K between warps: few outputs, so a block's sums are cheap to add up, and x is read by few.
// WHY batch-invariant mode begins at the third: the order in which an output's k are added must be the same for every M.
template <int kSm>
struct Tiles {
  static constexpr int kSmall = kSm >= 80 ? 4 : 2, kLarge = kSm >= 80 ? 3 : 2;
  using M8 = MmaTile<8, 4, 1, 1, 4, kSmall, 4>;
  using M16 = MmaTile<16, 4, 2, 1, 2, kSmall, 3>;
  using M32 = MmaTile<32, 2, 4, 1, 1, kSmall, 3>;
  using M64 = MmaTile<64, 2, 4, 1, 1, kLarge, 2>;
  using M128 = MmaTile<64, 2, 4, 2, 1, kLarge, 1>;
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
    return p.weight.group_size == 32 ? make_plan<kFormat, true, Tile>(p).workspace_bytes : make_plan<kFormat, false, Tile>(p).workspace_bytes;
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
