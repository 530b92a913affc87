// The 8-bit GEMM on sparse tensor cores that cuda_sm80_int8.cu and cuda_sm89_fp8.cu share: quant_linear/cuda_mma8.cuh with w, its A operand, 2:4.
//
// Blocks, warps, splits of K, and the k after which sums are promoted are those of the dense kernel. So an output's integers are added to
// its fp32 sum in the dense kernel's order, and the result is, bit for bit, what quant_linear's cuda_sm80.int8 makes of w with its zeros written out.
// A stage is of 128 k or more, the tile of SparseTiles:
//   w          [kWarpsN][kTilesK / 2] strips of a tile as stored: kept codes
//   places     [kWarpsN][kTilesK / 2][kStrips / 2] 512 bytes of a pair of strips, 16 bytes a lane, 4 a step of 32 k
//   x, scales, multiples: as in cuda_mma8.cuh, x in the slot order of sparse_x8_slot
//
// REGISTERS of 32 k (g = lane / 4, t = lane % 4). As stored, a lane's word has what is kept of the blocks of 4 k number t and t + 4 of its row, in
// bytes 0, 2 and 1, 3. mma.sp wants what is kept of two neighbouring blocks, 2t and 2t + 1: they are t and t + 4 where x stands in the order
// 0, 4, 1, 5, 2, 6, 3, 7. A lane's word of places has blocks 0 to 3 (t even) or 4 to 7 (t odd) of row g in its low half, of row g + 8 in its high
// half, as 16-bit mma.sp wants it. 8-bit mma.sp wants all 8 blocks of row g (t even) or g + 8 (t odd), in the same order as x: neighbours change
// halves by a shuffle, and nibbles are interleaved. That is 6 instructions a word of two strips, and a shuffle and two selects more where k64 takes
// the places of one strip from all four lanes.
#pragma once

#include "quant_linear/cuda_mma8.cuh"
#include "sparse_linear/op.h"

namespace taut::sparse_linear {
namespace {

using namespace quant_linear;

struct Sparse8Args : Mma8Args {  // scales and codes: of the kept numbers
  const uint8_t* places;
  int tiles_k128;
};

// A dense kernel's shape, with at least 128 k to a stage. One whose warps do not share K has 128 instead of 64, and 3 stages instead of 4, for which the
// 99 KB of a block on sm_86, 89 and 120 suffice. WHY only that one: the dense plan splits K by the stages of the others, and we split as it does.
template <class Dense>
using Sparse8Shape = Mma8Shape<Dense::kStrips, Dense::kTokens, Dense::kWarpsN, Dense::kWarpsM, Dense::kWarpsK, Dense::kWarpsK == 1 ? 3 : Dense::kStages,
                               Dense::kBlocksPerSm, std::max(Dense::kWarpsK, 2)>;

template <Format kFormat, class Shape>
struct Sparse8Bytes {
  static constexpr int kStrip = kFormat == Format::kInt4 ? 512 : 1024, kPair = 512;
  static constexpr int kTiles = Shape::kWarpsN * Shape::kTilesK / 2;  // of 128 k in a stage
  static constexpr int kTileCodes = Shape::kStrips * kStrip, kTilePlaces = Shape::kStrips / 2 * kPair;
  static constexpr int kPlacesBegin = kTiles * kTileCodes, kAll = kPlacesBegin + kTiles * kTilePlaces;
};

struct SparseInt8Mma : Int8Mma {
  static constexpr bool kHasK32 = true;
  template <int kSelector>
  TAUT_DEVICE static void mma32(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1, uint32_t places) {
    ptx::mma_sp_m16n8k32_s8<kSelector>(d, a0, a1, b0, b1, places);
  }
  TAUT_DEVICE static void mma64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) { ptx::mma_sp_m16n8k64_s8(d, a, b, places); }
};

struct SparseFp8Mma : Fp8Mma {
  static constexpr bool kHasK32 = false;
  TAUT_DEVICE static void mma64(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t places) { ptx::mma_sp_m16n8k64_e4m3(d, a, b, places); }
};

template <class Mma_, Format kFormat, class Shape_, Promote kPromote_>
struct Sparse8Block : Mma8<Mma_, Shape_, kPromote_, Mma8Stage<Mma_, Shape_, kPromote_, Sparse8Bytes<kFormat, Shape_>::kAll>> {
  using Base = Mma8<Mma_, Shape_, kPromote_, Mma8Stage<Mma_, Shape_, kPromote_, Sparse8Bytes<kFormat, Shape_>::kAll>>;
  using Args = Sparse8Args;
  using Mma = Mma_;
  using Shape = Shape_;
  using Stage = typename Base::Stage;
  using Bytes = Sparse8Bytes<kFormat, Shape>;
  static constexpr Promote kPromote = kPromote_;
  static constexpr int kStrips = Base::kStrips, kPairs = kStrips / 2, kColumns = Base::kColumns, kTilesK128 = Shape::kTilesK / 2;

  const Sparse8Args& q;

  TAUT_DEVICE Sparse8Block(const Sparse8Args& args, unsigned char* memory, Mma8Block place) : Base(args, memory, place), q(args) {}

  // kTileBytes of each tile of the stage, from byte `begin` of a tile of `bytes` in memory. What lies outside of w is zeros; but no zeros are places.
  template <int kTileBytes, bool kZeros>
  TAUT_DEVICE void load_tiles(unsigned char* target, const uint8_t* source, int begin, int bytes, int tile_k0) const {
    constexpr int kChunks = kTileBytes / 16, kAll = Bytes::kTiles * kChunks;
#pragma unroll
    for (int chunk0 = 0; chunk0 < kAll; chunk0 += Base::kThreads) {
      const int chunk = chunk0 + this->thread;
      if (kAll % Base::kThreads != 0 && chunk >= kAll) break;
      const int tile = kChunks % Base::kThreads == 0 ? chunk0 / kChunks : chunk / kChunks;  // WHY both: the first is known when this is compiled
      const int offset = kChunks % Base::kThreads == 0 ? chunk0 % kChunks + this->thread : chunk % kChunks;
      const int k = tile_k0 + tile % kTilesK128, n = this->tile_n + tile / kTilesK128;
      const bool exists = k < q.tiles_k128 && n < this->p.tiles_n;
      const int64_t from = exists ? (int64_t{n} * q.tiles_k128 + k) * bytes + begin : 0;
      ptx::cp_async_16(target + chunk * 16, source + from + offset * 16, exists || !kZeros ? 16 : 0);
    }
  }

  TAUT_DEVICE void load_w_stage(int step) const {
    unsigned char* const stage = this->smem + step % Shape::kStages * Stage::kBytes;
    load_tiles<Bytes::kTileCodes, true>(stage, this->p.codes, this->first_strip * Bytes::kStrip, 4 * Bytes::kStrip, step * kTilesK128);
    load_tiles<Bytes::kTilePlaces, false>(stage + Bytes::kPlacesBegin, q.places, this->first_strip / 2 * Bytes::kPair, 2 * Bytes::kPair, step * kTilesK128);
    Base::load_scales_stage(step);
  }

  // A lane's registers a0..a3 of the k-tile: those of rows g and g + 8 of its first 32 k, and of its second. int4: 16 times the number of the code.
  TAUT_DEVICE void load_w(uint32_t (&a)[4], const unsigned char* s_strips, int strip, int half) const {
    constexpr uint32_t kOrder = 0x3120;  // what is kept of a block, side by side
    if constexpr (kFormat == Format::kInt4) {
      const uint2 v = *reinterpret_cast<const uint2*>(s_strips + strip * Bytes::kStrip + this->lane * 16 + half * 8);
      const uint32_t words[2] = {ptx::prmt(v.x, 0, kOrder), ptx::prmt(v.y, 0, kOrder)};
#pragma unroll
      for (int step = 0; step < 2; step++) {  // a byte has a code of row g in its low bits, of row g + 8 in its high ones
        a[2 * step] = (words[step] << 4 & 0xf0f0f0f0u) ^ 0x80808080u;
        a[2 * step + 1] = (words[step] & 0xf0f0f0f0u) ^ 0x80808080u;
      }
    } else {
      const uint4 v = *reinterpret_cast<const uint4*>(s_strips + strip * Bytes::kStrip + half * 512 + this->lane * 16);
      a[0] = ptx::prmt(v.x, 0, kOrder), a[1] = ptx::prmt(v.y, 0, kOrder), a[2] = ptx::prmt(v.z, 0, kOrder), a[3] = ptx::prmt(v.w, 0, kOrder);
    }
  }

  // A word of places as mma.sp.m16n8k32 of 8 bits wants it, the first strip of the pair by selector 0, the second by 1.
  TAUT_DEVICE uint32_t places_k32(uint32_t word) const {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, word, 1);
    const uint32_t pairs = ptx::prmt(word, other, this->t % 2 ? 0x3726 : 0x5140);  // blocks 0 1 4 5 2 3 6 7
    return (pairs & 0xf00ff00fu) | (pairs << 4 & 0x0f000f00u) | (pairs >> 4 & 0x00f000f0u);
  }
  // Two such words of neighbouring steps as m16n8k64 wants them: of the first strip, of the second.
  TAUT_DEVICE void places_k64(uint32_t (&places)[2]) const {
    const bool second = this->t >= 2;
    const uint32_t other = __shfl_xor_sync(0xffffffffu, second ? places[0] : places[1], 2);
    (second ? places[0] : places[1]) = other;
  }

  // This warp's k-tiles of a stage.
  TAUT_DEVICE void multiply(const unsigned char* stage) {
    if constexpr (Shape::kWarpsK == 1) {
#pragma unroll 1
      for (int tile = 0; tile < Shape::kTilesK; tile++) multiply_tile(stage, tile);
    } else {
      multiply_tile(stage, this->warp_k);
    }
  }

  TAUT_DEVICE void multiply_tile(const unsigned char* stage, int tile) {
    uint32_t b[kColumns][4];  // of 8 tokens: b0, b1 of the first 32 k, b0, b1 of the second
    const unsigned char* const s_x = stage + Stage::kXBegin + Stage::x_offset(this->warp_m * Shape::kTokens + this->lane % 8, tile * 4 + this->lane / 8);
#pragma unroll
    for (int j = 0; j < kColumns; j++) ptx::ldmatrix_x4(b[j], s_x + j * 8 * Stage::kRowBytes);
    const int half = tile % 2, tile128 = this->warp_n * kTilesK128 + tile / 2;
    const unsigned char* const s_strips = stage + tile128 * Bytes::kTileCodes;
    const unsigned char* const s_places = stage + Bytes::kPlacesBegin + tile128 * Bytes::kTilePlaces + this->lane * 16 + half * 8;
    constexpr int kScaleRows = Stage::kScaleRows;
    uint32_t scale_pairs[std::max(kScaleRows, 1)][kStrips];
#pragma unroll
    for (int row = 0; row < kScaleRows; row++) Base::load_scales(scale_pairs[row], stage, tile, row);

#pragma unroll
    for (int pair = 0; pair < kPairs; pair++) {
      const uint2 words = *reinterpret_cast<const uint2*>(s_places + pair * Bytes::kPair);
      uint32_t places[2] = {places_k32(words.x), places_k32(words.y)};
      if constexpr (kPromote != Promote::kEvery32 || !Mma::kHasK32) places_k64(places);
      uint32_t a[2][4];
      load_w(a[0], s_strips, 2 * pair, half), load_w(a[1], s_strips, 2 * pair + 1, half);
      if constexpr (kPromote == Promote::kNever) {
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int j = 0; j < kColumns; j++) Mma::mma64(this->sums[2 * pair + s][j], a[s], b[j], places[s]);
      } else if constexpr (kPromote == Promote::kEvery64) {
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const float2 scales = Base::unpack_scales(scale_pairs[0][2 * pair + s]);
#pragma unroll
          for (int j = 0; j < kColumns; j++) {
            typename Mma::Sum part[4] = {Mma::kStart, Mma::kStart, Mma::kStart, Mma::kStart};
            Mma::mma64(part, a[s], b[j], places[s]);
            auto& sums = this->sums[2 * pair + s][j];
#pragma unroll
            for (int i = 0; i < 4; i++) sums[i] = __fmaf_rn(Mma::promoted(part[i]), i < 2 ? scales.x : scales.y, sums[i]);
          }
        }
      } else {
#pragma unroll
        for (int k32 = 0; k32 < 2; k32++)
#pragma unroll
          for (int s = 0; s < 2; s++) {
            const float2 scales = Base::unpack_scales(scale_pairs[k32][2 * pair + s]);
#pragma unroll
            for (int j = 0; j < kColumns; j++) {
              typename Mma::Sum part[4] = {Mma::kStart, Mma::kStart, Mma::kStart, Mma::kStart};
              multiply_k32(part, a[s], b[j], places, k32, s);
              const float2 multiples = Base::load_multiples(stage, tile, k32, j);
              const float factors[4] = {scales.x * multiples.x, scales.x * multiples.y, scales.y * multiples.x, scales.y * multiples.y};
              auto& sums = this->sums[2 * pair + s][j];
#pragma unroll
              for (int i = 0; i < 4; i++) sums[i] = __fmaf_rn(Mma::promoted(part[i]), factors[i], sums[i]);
            }
          }
      }
    }
  }

  // 32 of the tile's 64 k, of one strip of a pair. Where the instruction has 64, the others of w are zeros.
  TAUT_DEVICE static void multiply_k32(typename Mma::Sum (&part)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], const uint32_t (&places)[2], int k32,
                                       int strip) {
    if constexpr (Mma::kHasK32) {
      if (strip == 0) Mma::template mma32<0>(part, a[2 * k32], a[2 * k32 + 1], b[2 * k32], b[2 * k32 + 1], places[k32]);
      else Mma::template mma32<1>(part, a[2 * k32], a[2 * k32 + 1], b[2 * k32], b[2 * k32 + 1], places[k32]);
    } else {
      const uint32_t some[4] = {k32 == 0 ? a[0] : 0, k32 == 0 ? a[1] : 0, k32 == 1 ? a[2] : 0, k32 == 1 ? a[3] : 0};
      Mma::mma64(part, some, b, places[strip]);
    }
  }
};

// ---- host -------------------------------------------------------------------------------------------------------------

const char* unsupported_tiles(const CudaParams& p) {
  if (!p.sparse().is_tiled()) return "it computes with 2:4 alone, with or without rows that share places";
  return p.M > kMma8MaxM ? "it takes at most 2^23 rows of x" : nullptr;
}

// kernel(Shape{}): the kernel for a shape.
template <class Mma, Format kFormat, Promote kPromote, class KernelOf>
void run_sparse8(const char* name, const CudaParams& p, const KernelOf& kernel) {
  using Sum = std::conditional_t<kPromote == Promote::kNever, typename Mma::Sum, float>;
  Mma8Plan plan = mma8_plan<kPromote>(p);
  with_mma8_shape<kPromote>(plan.tokens, [&]<class Dense>(Dense) {
    using Shape = Sparse8Shape<Dense>;
    constexpr int kSharedBytes = Sparse8Block<Mma, kFormat, Shape, kPromote>::Stage::kSharedBytes;
    static_assert(kSharedBytes <= 99 * 1024);
    plan.steps = static_cast<int>((MmaTiles{p.weight}.num_tiles_k() + Shape::kTilesK - 1) / Shape::kTilesK);
    const SparseTiles w = p.sparse();
    Sparse8Args args{mma8_args(p, plan, w.kept_tiles()), p.packed + w.places_begin(), static_cast<int>(w.kept_tiles().num_tiles_k())};
    if constexpr (kFormat == Format::kInt4) args.unit_factor /= 16;
    mma8_launch<Sum, kPromote>(name, p, plan, args, kernel(Shape{}), Shape::kThreads, kSharedBytes);
  });
}

}  // namespace
}  // namespace taut::sparse_linear
