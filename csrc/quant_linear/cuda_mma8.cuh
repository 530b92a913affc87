// The 8-bit GEMM on tensor cores that cuda_sm80_int8.cu and cuda_sm89_fp8.cu share: w is the A operand of mma.m16n8k32, so that
// M has steps of 8; x is the B operand, in the slot order of QuantizedRows.
//
// A block makes kBlockN n x kBlockM m; its warps stand side by side along n and m, and for few tokens along k. In a step each
// warp along k takes a k-tile of its own (64 k). Steps come through a pipeline of kStages stages in shared memory, filled by
// cp.async; one barrier a step. A stage holds
//   w          [kWarpsN][kWarpsK] strips of a tile as stored: a lane's 16 bytes are the registers a0..a3 of 32 k
//   x          [kBlockM] rows of kWarpsK * 64 slots, 16-byte chunks swizzled so that ldmatrix meets no bank twice
//   scales     [kWarpsN][kWarpsK][1 or 2] rows of 64 fp16, in the order of MmaTiles: a lane's rows in one load
//   multiples  [2 * kWarpsK][kBlockM] fp32 (int8, where the op has them)
// Sums: what tensor cores add over 64 or 32 k goes to fp32 sums with the group's scale (Promote), or, where a row of w and a
// row of x have one scale each, stays in int32 for all of K. Then the warps along k are added in order through shared memory,
// and splits of K in order by a second kernel (mma8_reduce): no atomics, the same bits every time.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/launch.h"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

template <int kStrips_ /* of 16 n a warp */, int kTokens_ /* m a warp */, int kWarpsN_, int kWarpsM_, int kWarpsK_, int kStages_, int kBlocksPerSm_,
          int kTilesK_ = kWarpsK_>
struct Mma8Shape {
  static constexpr int kStrips = kStrips_, kTokens = kTokens_, kWarpsN = kWarpsN_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_, kStages = kStages_;
  static constexpr int kBlocksPerSm = kBlocksPerSm_;  // for which registers are limited
  static constexpr int kTilesK = kTilesK_;            // k-tiles of 64 k in a stage: kWarpsK or more (sparse_linear)
  static constexpr int kBlockN = kWarpsN * kStrips * 16, kBlockM = kWarpsM * kTokens, kThreads = 32 * kWarpsN * kWarpsM * kWarpsK;
};

// How often sums leave the tensor cores: never, or after so many k.
enum class Promote { kNever, kEvery64, kEvery32 };

struct Mma8Args {
  const uint8_t* codes;   // of w: the sections of MmaTiles
  const uint8_t* scales;  // [tiles_n][groups] rows of 128 bytes
  QuantizedRows x;
  const void* bias;   // [N] or nullptr
  void* out;          // [M, N]
  uint8_t* partials;  // [splits][M][tiles_n * 64] 32-bit sums, where splits > 1
  int64_t M, N;
  int tiles_n, tiles_k, groups;
  int group_shift;  // of the index of 32 k, to its row of scales
  int blocks_m, band_shift, steps, splits;
  float unit_factor;  // of row_unit: 32767 where no multiples are stored
  DType dtype;
};

struct Int8Mma {
  using Sum = int;
  // WHY 1.5 * 2^23: with it as the start, the bits of a sum of 64 products (at most 64 * 127 * 128 = 2^20 < 2^22) are those of the float
  // that is as much larger than 1.5 * 2^23: one subtraction instead of a conversion, which runs at a quarter of the rate.
  static constexpr int kStart = 0x4b400000;
  TAUT_DEVICE static float promoted(int sum) { return __int_as_float(sum) - 12582912.0f; }
  TAUT_DEVICE static void mma(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx::mma_m16n8k32_s8(d, a, b0, b1); }
};

struct Fp8Mma {
  using Sum = float;
  static constexpr float kStart = 0;
  TAUT_DEVICE static float promoted(float sum) { return sum; }
  TAUT_DEVICE static void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { ptx::mma_m16n8k32_e4m3(d, a, b0, b1); }
};

template <class Mma, class Shape, Promote kPromote, int kWBytes = Shape::kWarpsN * Shape::kTilesK * Shape::kStrips * 1024>
struct Mma8Stage {
  static constexpr int kScaleRows = kPromote == Promote::kNever ? 0 : kPromote == Promote::kEvery64 ? 1 : 2;  // a k-tile
  static constexpr bool kMayHaveMultiples = kPromote == Promote::kEvery32 && std::is_same_v<typename Mma::Sum, int>;
  static constexpr int kRowBytes = Shape::kTilesK * 64;
  static constexpr int kXBegin = kWBytes;
  static constexpr int kScalesBegin = kXBegin + Shape::kBlockM * kRowBytes;
  static constexpr int kMultiplesBegin = kScalesBegin + Shape::kWarpsN * Shape::kTilesK * kScaleRows * 128;
  static constexpr int kBytes = kMultiplesBegin + (kMayHaveMultiples ? Shape::kTilesK * 2 * Shape::kBlockM * 4 : 0);
  // After the last step the same memory holds the sums, [kWarpsK][kBlockM][kSumStride]. WHY + 4: no two lanes of a store meet in a bank.
  static constexpr int kSumStride = Shape::kBlockN + 4;
  static constexpr int kSharedBytes = std::max(Shape::kStages * kBytes, Shape::kWarpsK* Shape::kBlockM * kSumStride * 4);

  // Byte of 16-byte chunk `chunk` of row `token` of x.
  TAUT_DEVICE static int x_offset(int token, int chunk) {
    if constexpr (kRowBytes >= 128) return token * kRowBytes + ((chunk ^ (token & 7)) * 16);
    else return token * kRowBytes + ((chunk ^ (token >> 1 & 3)) * 16);  // two rows share 128 bytes
  }
};

// Which tile of the output a block makes. A band of up to 8 rows of tiles is walked column by column, so that blocks that run at the same
// time share w and x in L2. WHY a power of two: what shifts can give is not kept in registers over the loop, what a division gives is.
struct Mma8Block {
  int m, n;
};
TAUT_DEVICE Mma8Block mma8_block_place(const Mma8Args& p) {
  const int x = static_cast<int>(blockIdx.x);
  return {(static_cast<int>(blockIdx.z) << p.band_shift) + (x & ((1 << p.band_shift) - 1)), x >> p.band_shift};
}

// 8 outputs of row m, from column n on.
template <class T>
TAUT_DEVICE void mma8_write(const Mma8Args& p, int64_t m, int64_t n, float (&values)[8]) {
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (n + i < p.N) values[i] += to_float(static_cast<const T*>(p.bias)[n + i]);
  }
  T numbers[8];
#pragma unroll
  for (int i = 0; i < 8; i++) numbers[i] = from_float<T>(values[i]);
  T* const out = static_cast<T*>(p.out) + m * p.N + n;
  if (p.N % 8 == 0) {
    uint4 bits[sizeof(T) / 2];
    memcpy(bits, numbers, sizeof bits);
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof(T) / 2); v++) reinterpret_cast<uint4*>(out)[v] = bits[v];
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (n + i < p.N) out[i] = numbers[i];
  }
}

// The last step of 8 outputs: the sums' factors, bias, rounding.
template <Promote kPromote, class Sum>
TAUT_DEVICE void mma8_finish(const Mma8Args& p, int64_t m, int64_t n, const Sum (&sums)[8]) {
  const float unit = p.x.row_unit[m] * p.unit_factor;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    values[i] = static_cast<float>(sums[i]);
    if constexpr (kPromote == Promote::kNever)  // a row of w has one scale; n % 8 = 0
      values[i] *= __half2float(reinterpret_cast<const __half*>(p.scales)[n / 64 * 64 + i * 8 + n % 64 / 8]);
    values[i] *= unit;
  }
  if (p.dtype == DType::kFloat32) mma8_write<float>(p, m, n, values);
  else if (p.dtype == DType::kBFloat16) mma8_write<__nv_bfloat16>(p, m, n, values);
  else mma8_write<__half>(p, m, n, values);
}

// 8 sums at a 16-byte aligned place.
template <class Sum>
TAUT_DEVICE void load_sums(Sum (&sums)[8], const void* source) {
#pragma unroll
  for (int v = 0; v < 2; v++) {
    const uint4 bits = static_cast<const uint4*>(source)[v];
    memcpy(&sums[4 * v], &bits, 16);
  }
}
template <class Sum>
TAUT_DEVICE void store_sums(void* target, const Sum (&sums)[8]) {
#pragma unroll
  for (int v = 0; v < 2; v++) {
    uint4 bits;
    memcpy(&bits, &sums[4 * v], 16);
    static_cast<uint4*>(target)[v] = bits;
  }
}

template <class Mma_, class Shape_, Promote kPromote_, class Stage_ = Mma8Stage<Mma_, Shape_, kPromote_>>
struct Mma8 {
  using Args = Mma8Args;
  using Mma = Mma_;
  using Shape = Shape_;
  using Stage = Stage_;
  static constexpr Promote kPromote = kPromote_;
  using Sum = std::conditional_t<kPromote == Promote::kNever, typename Mma::Sum, float>;
  static constexpr int kStrips = Shape::kStrips, kColumns = Shape::kTokens / 8, kThreads = Shape::kThreads;

  static constexpr int kStripChunks = kStrips * 64;                                            // 16-byte chunks of a warp's strips of a k-tile
  static constexpr int kRowChunks = Stage::kRowBytes / 16, kPassRows = kThreads / kRowChunks;  // of x; rows that all threads load at once
  static constexpr int kScaleChunks = Shape::kWarpsN * Shape::kTilesK * Stage::kScaleRows * 8;
  static constexpr int kRowMultiples = 2 * Shape::kTilesK;
  static_assert(kStripChunks % kThreads == 0 && Shape::kBlockM % kPassRows == 0 && kPassRows % 8 == 0);

  const Mma8Args& p;
  unsigned char* const smem;
  const Mma8Block block;
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int warp_k = thread / 32 % Shape::kWarpsK, warp_m = thread / 32 / Shape::kWarpsK % Shape::kWarpsM;
  const int warp_n = thread / 32 / Shape::kWarpsK / Shape::kWarpsM;
  // Of the warps with warp_n = 0; the rows of x that exist.
  const int tile_n = block.n * (Shape::kBlockN / 16) / 4, first_strip = block.n * (Shape::kBlockN / 16) % 4;
  const int rows = static_cast<int>(min(p.M - int64_t{block.m} * Shape::kBlockM, int64_t{Shape::kBlockM}));
  // Where this thread's chunks of w and x begin, for k = 0.
  const uint8_t* const g_w = p.codes + int64_t{tile_n} * p.tiles_k * 4096 + first_strip * 1024 + thread * 16;
  const uint8_t* const g_x = p.x.codes + (int64_t{block.m} * Shape::kBlockM + thread / kRowChunks) * p.tiles_k * 64 + thread % kRowChunks * 16;
  Sum sums[kStrips][kColumns][4] = {};

  TAUT_DEVICE Mma8(const Mma8Args& args, unsigned char* memory, Mma8Block place) : p(args), smem(memory), block(place) {}

  // What lies outside of w or x is filled with zeros; its address, where nothing is read, may be anything.
  // WHY addresses that are one base and uniform steps: one of its own for every chunk, kept over the loop, would take 40 registers.
  TAUT_DEVICE void load_w_stage(int step) const {
    unsigned char* const stage = smem + step % Shape::kStages * Stage::kBytes;
    const int tile_k0 = step * Shape::kWarpsK, last_k = p.tiles_k - 1;

#pragma unroll
    for (int warp = 0; warp < Shape::kWarpsN; warp++)
#pragma unroll
      for (int k = 0; k < Shape::kWarpsK; k++) {
        const bool exists = tile_k0 + k <= last_k && tile_n + warp < p.tiles_n;
        const uint8_t* const source = g_w + (int64_t{warp} * p.tiles_k + tile_k0 + k) * 4096;
#pragma unroll
        for (int pass = 0; pass < kStripChunks / kThreads; pass++)
          ptx::cp_async_16(stage + ((warp * Shape::kWarpsK + k) * kStripChunks + pass * kThreads + thread) * 16, source + pass * kThreads * 16,
                           exists ? 16 : 0);
      }
    load_scales_stage(step);
  }

  TAUT_DEVICE void load_scales_stage(int step) const {
    unsigned char* const stage = smem + step % Shape::kStages * Stage::kBytes;
    const int tile_k0 = step * Shape::kTilesK, last_k = p.tiles_k - 1;

    if constexpr (Stage::kScaleRows > 0) {
#pragma unroll
      for (int chunk0 = 0; chunk0 < kScaleChunks; chunk0 += kThreads) {
        const int chunk = chunk0 + thread, row = chunk / 8 % Stage::kScaleRows, tile = chunk / 8 / Stage::kScaleRows;
        const int k = tile_k0 + tile % Shape::kTilesK, n = tile_n + tile / Shape::kTilesK;
        const bool exists = k <= last_k && n < p.tiles_n;
        const int64_t source = (int64_t{n} * p.groups + ((2 * k + row) >> p.group_shift)) * 128 + chunk % 8 * 16;
        if (chunk < kScaleChunks) ptx::cp_async_16(stage + Stage::kScalesBegin + chunk * 16, p.scales + source, exists ? 16 : 0);
      }
    }
  }

  TAUT_DEVICE void load_x_stage(int step) const {
    unsigned char* const stage = smem + step % Shape::kStages * Stage::kBytes;
    const int tile_k0 = step * Shape::kTilesK, last_k = p.tiles_k - 1;

    unsigned char* const s_x = stage + Stage::kXBegin + Stage::x_offset(thread / kRowChunks, thread % kRowChunks);
    const int x_rows = tile_k0 + thread % kRowChunks / 4 <= last_k ? rows - thread / kRowChunks : 0;
#pragma unroll
    for (int pass = 0; pass < Shape::kBlockM / kPassRows; pass++) {
      const int64_t source = (int64_t{tile_k0} + int64_t{pass * kPassRows} * p.tiles_k) * 64;
      ptx::cp_async_16(s_x + pass * kPassRows * Stage::kRowBytes, g_x + source, pass * kPassRows < x_rows ? 16 : 0);
    }

    if constexpr (Stage::kMayHaveMultiples) {
      if (p.x.multiple) {
#pragma unroll
        for (int i0 = 0; i0 < Shape::kBlockM * kRowMultiples; i0 += kThreads) {
          const int k32 = (i0 + thread) % kRowMultiples, token = (i0 + thread) / kRowMultiples;
          const bool exists = token < rows && tile_k0 + k32 / 2 <= last_k;
          const int64_t source = (int64_t{block.m} * Shape::kBlockM + token) * (2 * p.tiles_k) + 2 * tile_k0 + k32;
          if (token < Shape::kBlockM)
            ptx::cp_async_4(stage + Stage::kMultiplesBegin + (k32 * Shape::kBlockM + token) * 4, p.x.multiple + source, exists ? 4 : 0);
        }
      }
    }
  }

  // The scales of a lane's rows for row `row` of the scales of the stage's k-tile `tile`: of strip i, those of g (low half) and g + 8.
  TAUT_DEVICE void load_scales(uint32_t (&scales)[kStrips], const unsigned char* stage, int tile, int row) const {
    const unsigned char* source = stage + Stage::kScalesBegin + ((warp_n * Shape::kTilesK + tile) * Stage::kScaleRows + row) * 128 + g * 16;
    static_assert(kStrips == 4 || (kStrips == 2 && Shape::kWarpsN == 1));
    if constexpr (kStrips == 4) {
      const uint4 v = *reinterpret_cast<const uint4*>(source);
      scales[0] = v.x, scales[1] = v.y, scales[2] = v.z, scales[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(source + first_strip * 4);
      scales[0] = v.x, scales[1] = v.y;
    }
  }

  // A lane's registers a0..a3 of 32 k: half `half` of the k-tile.
  TAUT_DEVICE void load_w(uint32_t (&a)[4], const unsigned char* stage, int strip, int half) const {
    const int chunk = (warp_n * Shape::kWarpsK + warp_k) * kStripChunks + strip * 64 + half * 32 + lane;
    const uint4 v = *reinterpret_cast<const uint4*>(stage + chunk * 16);
    a[0] = v.x, a[1] = v.y, a[2] = v.z, a[3] = v.w;
  }

  // This warp's k-tile of a stage.
  TAUT_DEVICE void multiply(const unsigned char* stage) {
    uint32_t b[kColumns][4];  // of 8 tokens: b0, b1 of the first 32 k, b0, b1 of the second
    const unsigned char* const s_x = stage + Stage::kXBegin + Stage::x_offset(warp_m * Shape::kTokens + lane % 8, warp_k * 4 + lane / 8);
#pragma unroll
    for (int j = 0; j < kColumns; j++) ptx::ldmatrix_x4(b[j], s_x + j * 8 * Stage::kRowBytes);

    if constexpr (kPromote == Promote::kNever) {
#pragma unroll
      for (int strip = 0; strip < kStrips; strip++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          uint32_t a[4];
          load_w(a, stage, strip, half);
#pragma unroll
          for (int j = 0; j < kColumns; j++) Mma::mma(sums[strip][j], a, b[j][2 * half], b[j][2 * half + 1]);
        }
    } else if constexpr (kPromote == Promote::kEvery64) {
      uint32_t scale_pairs[kStrips];
      load_scales(scale_pairs, stage, warp_k, 0);
#pragma unroll
      for (int strip = 0; strip < kStrips; strip++) {
        uint32_t a[2][4];
        load_w(a[0], stage, strip, 0), load_w(a[1], stage, strip, 1);
        const float2 scales = unpack_scales(scale_pairs[strip]);
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
          typename Mma::Sum part[4] = {Mma::kStart, Mma::kStart, Mma::kStart, Mma::kStart};
          Mma::mma(part, a[0], b[j][0], b[j][1]);
          Mma::mma(part, a[1], b[j][2], b[j][3]);
#pragma unroll
          for (int i = 0; i < 4; i++) sums[strip][j][i] = __fmaf_rn(Mma::promoted(part[i]), i < 2 ? scales.x : scales.y, sums[strip][j][i]);
        }
      }
    } else {
#pragma unroll
      for (int half = 0; half < 2; half++) {
        uint32_t scale_pairs[kStrips];
        load_scales(scale_pairs, stage, warp_k, half);
#pragma unroll
        for (int strip = 0; strip < kStrips; strip++) {
          uint32_t a[4];
          load_w(a, stage, strip, half);
          const float2 scales = unpack_scales(scale_pairs[strip]);
#pragma unroll
          for (int j = 0; j < kColumns; j++) {
            typename Mma::Sum part[4] = {Mma::kStart, Mma::kStart, Mma::kStart, Mma::kStart};
            Mma::mma(part, a, b[j][2 * half], b[j][2 * half + 1]);
            const float2 multiples = load_multiples(stage, warp_k, half, j);
            const float factors[4] = {scales.x * multiples.x, scales.x * multiples.y, scales.y * multiples.x, scales.y * multiples.y};
#pragma unroll
            for (int i = 0; i < 4; i++) sums[strip][j][i] = __fmaf_rn(Mma::promoted(part[i]), factors[i], sums[strip][j][i]);
          }
        }
      }
    }
  }

  TAUT_DEVICE static float2 unpack_scales(uint32_t pair) {
    __half2 scales;
    memcpy(static_cast<void*>(&scales), &pair, 4);
    return __half22float2(scales);
  }

  // The multiples of tokens 2t and 2t + 1 of 8, for half of the stage's k-tile `tile`.
  TAUT_DEVICE float2 load_multiples(const unsigned char* stage, int tile, int half, int column) const {
    if constexpr (Stage::kMayHaveMultiples) {
      const int at = (2 * tile + half) * Shape::kBlockM + warp_m * Shape::kTokens + column * 8 + 2 * t;
      if (p.x.multiple) return *reinterpret_cast<const float2*>(stage + Stage::kMultiplesBegin + at * 4);
    }
    return make_float2(1, 1);
  }
};

// Steps [begin, end) of K.
template <class Block>
TAUT_DEVICE void mma8_steps(Block& block, int begin, int end) {
  using Shape = typename Block::Shape;
  using Stage = typename Block::Stage;
#pragma unroll 1
  for (int step = begin; step < min(begin + Shape::kStages - 1, end); step++) block.load_w_stage(step);
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_launch();  // mma8_reduce may take its place, and wait
  ptx::griddep_wait();    // for quantize_rows, behind whose back the first of w was asked for
#endif
#pragma unroll 1
  for (int s = 0; s < Shape::kStages - 1; s++) {
    if (begin + s < end) block.load_x_stage(begin + s);
    ptx::cp_async_commit();  // the first group holds all of w so far
  }
  for (int step = begin; step < end; step++) {
    ptx::cp_async_wait<Shape::kStages - 2>();
    __syncthreads();  // this step's stage is there for all warps, and all have left the one before, which is filled next
    if (step + Shape::kStages - 1 < end) block.load_w_stage(step + Shape::kStages - 1), block.load_x_stage(step + Shape::kStages - 1);
    ptx::cp_async_commit();
    block.multiply(block.smem + step % Shape::kStages * Stage::kBytes);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// Adds the warps along k and writes the tile: to out, or as split `split` to the partial sums.
template <class Block>
TAUT_DEVICE void mma8_store(const Block& block, int split) {
  using Shape = typename Block::Shape;
  using Stage = typename Block::Stage;
  using Sum = typename Block::Sum;
  const Mma8Args& p = block.p;
  Sum* const s_sums = reinterpret_cast<Sum*>(block.smem);
#pragma unroll
  for (int strip = 0; strip < Block::kStrips; strip++)
#pragma unroll
    for (int j = 0; j < Block::kColumns; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int token = block.warp_m * Shape::kTokens + j * 8 + 2 * block.t + i % 2;
        const int n = (block.warp_n * Block::kStrips + strip) * 16 + block.g + i / 2 * 8;
        s_sums[(block.warp_k * Shape::kBlockM + token) * Stage::kSumStride + n] = block.sums[strip][j][i];
      }
  __syncthreads();
  constexpr int kPerRow = Shape::kBlockN / 8;
  for (int i = block.thread; i < Shape::kBlockM * kPerRow; i += Shape::kThreads) {
    const int token = i / kPerRow, column = i % kPerRow * 8;
    const int64_t m = int64_t{block.block.m} * Shape::kBlockM + token, n = int64_t{block.block.n} * Shape::kBlockN + column;
    if (m >= p.M || n >= p.N) continue;
    Sum total[8];
    load_sums(total, s_sums + token * Stage::kSumStride + column);
#pragma unroll
    for (int k = 1; k < Shape::kWarpsK; k++) {
      Sum more[8];
      load_sums(more, s_sums + (k * Shape::kBlockM + token) * Stage::kSumStride + column);
#pragma unroll
      for (int e = 0; e < 8; e++) total[e] += more[e];
    }
    if (p.splits > 1) store_sums(p.partials + ((split * p.M + m) * p.tiles_n * 64 + n) * 4, total);
    else mma8_finish<Block::kPromote>(p, m, n, total);
  }
}

// What a thread block does. Block: Mma8, or sparse_linear's.
template <class Block>
TAUT_DEVICE void mma8_block(const typename Block::Args& p) {
  TAUT_DYNAMIC_SMEM(smem);
  const Mma8Block place = mma8_block_place(p);
  if (place.m >= p.blocks_m) return;  // of the last band
  Block block(p, smem, place);
  const int split = blockIdx.y;
  mma8_steps(block, static_cast<int>(int64_t{p.steps} * split / p.splits), static_cast<int>(int64_t{p.steps} * (split + 1) / p.splits));
  mma8_store(block, split);
}

constexpr int kReduceThreads = 128;

// The sums of the splits, in order, finished as a block would have.
template <class Sum, Promote kPromote>
__global__ void __launch_bounds__(kReduceThreads) mma8_reduce(const Mma8Args p) {
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_wait();
#endif
  const int64_t columns = int64_t{p.tiles_n} * 64, i = (int64_t{blockIdx.x} * kReduceThreads + threadIdx.x) * 8, m = i / columns, n = i % columns;
  if (m >= p.M || n >= p.N) return;
  Sum total[8] = {};
#pragma unroll 4
  for (int split = 0; split < p.splits; split++) {
    Sum more[8];
    load_sums(more, p.partials + ((split * p.M + m) * columns + n) * 4);
#pragma unroll
    for (int e = 0; e < 8; e++) total[e] += more[e];
  }
  mma8_finish<kPromote>(p, m, n, total);
}

// ---- host -------------------------------------------------------------------------------------------------------------

// Blocks by their tokens. For few, memory is the bound: warps along k keep many bytes in flight, and 32 n a block make enough blocks
// for the whole device without a split. For many, the tensor cores are: 64 x 64 a warp reads shared memory half as fast as it multiplies.
// 8, 16 and 32 tokens add in the same order (k-tiles in turn to 4 warps): among them M decides nothing but speed.
using Mma8Shape8 = Mma8Shape<2, 8, 1, 1, 4, 4, 4>;
using Mma8Shape16 = Mma8Shape<2, 16, 1, 1, 4, 4, 4>;
using Mma8Shape32 = Mma8Shape<4, 32, 1, 1, 4, 3, 2>;
using Mma8Shape64 = Mma8Shape<4, 32, 1, 2, 2, 4, 2>;
template <Promote kPromote>
using Mma8Shape128 = std::conditional_t<kPromote == Promote::kNever, Mma8Shape<4, 64, 2, 2, 1, 4, 2>, Mma8Shape<4, 32, 2, 4, 1, 4, 1>>;

template <Promote kPromote, class F>
decltype(auto) with_mma8_shape(int tokens, F&& f) {
  switch (tokens) {
    case 8: return f(Mma8Shape8{});
    case 16: return f(Mma8Shape16{});
    case 32: return f(Mma8Shape32{});
    case 64: return f(Mma8Shape64{});
    default: return f(Mma8Shape128<kPromote>{});
  }
}

constexpr int64_t kMma8MaxM = 1 << 23;  // 65535 bands of 8 rows of the smallest tiles for many tokens

struct Mma8Plan {
  int tokens, blocks_m, blocks_n, steps, splits;
};

template <Promote kPromote>
Mma8Plan mma8_plan(const CudaParams& p) {
  const bool fixed_order = p.batch_invariant && kPromote != Promote::kNever;  // the order of integers does not matter
  const auto blocks = [](int64_t count, int64_t of) { return static_cast<int>((count + of - 1) / of); };
  const int64_t N = p.weight.N;
  Mma8Plan plan{};
  if (p.M <= 8) plan.tokens = 8;
  else if (p.M <= 16) plan.tokens = 16;
  else if (p.M <= 32 || fixed_order) plan.tokens = 32;
  else if (int64_t{blocks(p.M, 128)} * blocks(N, 128) < p.device->sm_count) plan.tokens = 64;
  else plan.tokens = 128;
  with_mma8_shape<kPromote>(plan.tokens, [&]<class Shape>(Shape) {
    plan.blocks_m = blocks(p.M, Shape::kBlockM), plan.blocks_n = blocks(N, Shape::kBlockN);
    plan.steps = blocks(MmaTiles{p.weight}.num_tiles_k(), Shape::kWarpsK);
    // K is split where there are fewer blocks than SMs, as long as every part fills the pipeline.
    constexpr int64_t kMaxSplits = 16;
    const int64_t wanted = p.device->sm_count / std::max<int64_t>(1, int64_t{plan.blocks_m} * plan.blocks_n);
    const int64_t most = std::min<int64_t>(plan.steps / Shape::kStages, kMaxSplits);
    plan.splits = fixed_order ? 1 : static_cast<int>(std::max<int64_t>(1, std::min(wanted, most)));
  });
  return plan;
}

template <Promote kPromote>
int64_t mma8_workspace_bytes(const CudaParams& p) {
  const Mma8Plan plan = mma8_plan<kPromote>(p);
  return plan.splits > 1 ? plan.splits * p.M * MmaTiles{p.weight}.num_tiles_n() * 64 * 4 : 0;
}

// `layout`: where the codes and scales lie in p.packed; of a sparse weight that of its kept numbers.
inline Mma8Args mma8_args(const CudaParams& p, const Mma8Plan& plan, const MmaTiles& layout) {
  const int band_shift = plan.blocks_m >= 8 ? 3 : plan.blocks_m >= 4 ? 2 : plan.blocks_m >= 2 ? 1 : 0;
  const int64_t group = p.weight.group_size;
  return {p.packed,
          p.packed + layout.scales_begin(),
          p.x8,
          p.bias,
          p.out,
          static_cast<uint8_t*>(p.workspace),
          p.M,
          p.weight.N,
          static_cast<int>(layout.num_tiles_n()),
          static_cast<int>(MmaTiles{p.weight}.num_tiles_k()),
          static_cast<int>(layout.num_groups()),
          group == 32    ? 0
          : group == 64  ? 1
          : group == 128 ? 2
                         : 31,
          plan.blocks_m,
          band_shift,
          plan.steps,
          plan.splits,
          p.activations == Activations::kInt8Row ? 32767.0f : 1.0f,
          p.dtype};
}

// The kernel, and the one that adds up what it left. Args: Mma8Args, or what begins with them.
template <class Sum, Promote kPromote, class Args>
void mma8_launch(const char* name, const CudaParams& p, const Mma8Plan& plan, const Args& args, void (*kernel)(Args), int threads, int shared_bytes) {
  const dim3 grid(plan.blocks_n << args.band_shift, plan.splits, (plan.blocks_m + (1 << args.band_shift) - 1) >> args.band_shift);
  launch_dependent(*p.device, name, kernel, grid, dim3(threads), shared_bytes, p.stream, args);
  if (plan.splits > 1) {
    const int64_t sums = p.M * args.tiles_n * 8;
    const dim3 reduce_grid(static_cast<unsigned>((sums + kReduceThreads - 1) / kReduceThreads));
    launch_dependent(*p.device, name, mma8_reduce<Sum, kPromote>, reduce_grid, dim3(kReduceThreads), 0, p.stream, static_cast<const Mma8Args&>(args));
  }
}

// kernel(Shape{}): the kernel for a shape, as a function pointer and its shared bytes.
template <class Sum, Promote kPromote, class KernelOf>
void mma8_run(const char* name, const CudaParams& p, const KernelOf& kernel_of) {
  if (p.M == 0 || p.weight.N == 0) return;
  const Mma8Plan plan = mma8_plan<kPromote>(p);
  const Mma8Args args = mma8_args(p, plan, MmaTiles{p.weight});
  with_mma8_shape<kPromote>(plan.tokens, [&]<class Shape>(Shape shape) {
    const auto [kernel, shared_bytes] = kernel_of(shape);
    mma8_launch<Sum, kPromote>(name, p, plan, args, kernel, Shape::kThreads, shared_bytes);
  });
}

}  // namespace
}  // namespace taut::quant_linear
