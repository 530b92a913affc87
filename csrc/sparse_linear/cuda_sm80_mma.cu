// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp16 or bf16; w 2:4, its kept numbers as exact integers (or e4m3 floats) in 16
//           bit, sums fp32, scales multiplied into the sums in fp32: nothing is rounded but the sums and the result; or w in 16 bits as x is
// LAYOUT    w: SparseTiles (common/sparse.h). w is the sparse operand A of mma.sp.m16n8k32: 16 rows, 32 k of which 16 are there; x the dense
//           operand B, in shared memory as cuda_mma.cuh has it (panels of 64 k, swizzled)
// WORK      cuda_mma.cuh: units of kTileM tokens x kTileN outputs x 128 * kWarpsK k, dealt to the blocks in equal stretches (stream-K), the parts of
//           a tile that a seam cuts added up by `combine` in the order of k. Codes, places and scales come through the same stages of cp.async. A
//           warp takes two strips of 16 n at a time, which share their registers of metadata: selector 0 and 1. 16-bit w is what the registers
//           want, 16 B a lane and step of 32 k, and goes into the sums without a detour: no parts, no scales.
// BOUND     M <= 16: bytes of w. A tile of 64 n x 128 k is 2 KB of int4, 1 KB of places, 128 B of scales (groups of 128): 3.125 bits a weight where
//           dense int4 takes 4.125, so at best 1.32 times faster; int8 5.125 for 8.125, 1.59 times. H200, 4.3 TB/s: 18 B a cycle an SM, a tile of int4
//           every 178 cycles, 711 issue slots; nvcc makes about 400 instructions of it (150 dequantize, 16 are mma.sp, 32 sums, the rest copies).
//           Large M: tensor cores at twice the dense rate. A unit of 128 tokens x 128 n x 128 k is 512 mma.sp of 8 cycles on 4 tensor cores of sm_80,
//           1024 cycles; shared memory moves 64 KB of x and 24 KB of w, 700 cycles; a scheduler issues 820 instructions to compute and some 300 to
//           copy. So 2 * 312 TFLOP/s of the dense product are out of reach on A100 by 10% at least. No GPU has run it yet.
//           16-bit w: 9 bits a weight for 16, at best 1.78 times faster than cuBLAS at few rows. A tile is 9 KB and 16 mma.sp: bytes by far. Large M: a
//           unit of 96 tokens x 128 n x 128 k is 768 cycles of sm_80's tensor cores and 42 KB from the L2 cache, 55 B a cycle an SM, of which A100
//           has about 47: L2 binds, at some 85% of twice the dense peak. A larger tile would not fit twice into 99 KB, which is what sm_86, 89 and
//           120 have. Computed, not measured.
// LIMITS    sm_80 or newer; 2:4, with or without places that rows share; float activations in fp16 or bf16; 16-bit w of x's own type. Overflow as
//           cuda_mma.cuh says
#include "quant_linear/cuda_mma.cuh"
#include "sparse_linear/op.h"

namespace taut::sparse_linear::cuda_sm80_mma {
namespace {

using namespace quant_linear;

struct SparseArgs : MmaArgs {
  const uint8_t* places;
};

// Stands for w in 16 bits of either type: x has the same, and T says which.
constexpr Format kNumbers = Format::kFp16;

// The bytes of one stage, and where its parts are.
template <Format kFormat, bool kGroup32, class Tile>
struct SparseStage {
  static constexpr int kTileBytes = static_cast<int>(512 * code_bits(kFormat)), kPlaceBytes = SparseTiles::kTilePlaces * 4;
  // Rows of 64 scales for a tile of 128 k. WHY not 1 for larger groups: half the kernels
  static constexpr int kGroups = kFormat == kNumbers ? 0 : 2 << kGroup32;
  static constexpr int kTiles = Tile::kTilesN64 * Tile::kWarpsK;
  static constexpr int kXChunks = Tile::kTileM * Tile::kWarpsK * 16;
  static constexpr int kCodeChunks = kTiles * (kTileBytes / 16), kPlaceChunks = kTiles * (kPlaceBytes / 16), kScaleChunks = kTiles * kGroups * 8;
  static constexpr int kCodes = kXChunks * 16, kPlaces = kCodes + kCodeChunks * 16, kScales = kPlaces + kPlaceChunks * 16;
  static constexpr int kBytes = kScales + kScaleChunks * 16;
  static_assert(kCodes % 128 == 0 && kBytes % 128 == 0);
  // As many stages as the tile asks for, where a block may have them: sm_86, 89 and 120 give it 99 KB.
  static constexpr int kStages = std::min(Tile::kStages, (99 * 1024 - EpilogueLayout<Tile>::kBytes) / kBytes);
  static_assert(kStages >= 2);
  static constexpr int kSmem = kStages * kBytes + EpilogueLayout<Tile>::kBytes;
};

// A thread's part in filling the stages, as Loader of cuda_mma.cuh.
template <Format kFormat, bool kGroup32, class Tile>
struct SparseLoader {
  using Stage = SparseStage<kFormat, kGroup32, Tile>;
  static constexpr int kThreads = Tile::kThreads;
  static constexpr int kX = Stage::kXChunks / kThreads, kCodes = Stage::kCodeChunks / kThreads;
  static constexpr int kPlaces = (Stage::kPlaceChunks + kThreads - 1) / kThreads, kScales = (Stage::kScaleChunks + kThreads - 1) / kThreads;
  // Chunks of a tile, and of the tiles of one n that lie in a stage, which are one piece of memory.
  static constexpr int kTileCodes = Stage::kTileBytes / 16, kTilePlaces = Stage::kPlaceBytes / 16;
  static constexpr int kPieceCodes = Tile::kWarpsK * kTileCodes, kPiecePlaces = Tile::kWarpsK * kTilePlaces;
  static_assert(Stage::kXChunks % kThreads == 0 && Stage::kCodeChunks % kThreads == 0 && kThreads % 64 == 0);

  const unsigned char* x_source[kX];                // of the next step; rows past the end of M: any address in x
  uint32_t x_rows;                                  // bit i: x_source[i] is a row of x
  const unsigned char *code_source, *place_source;  // of the next step, first n, this thread's first chunk
  int64_t code_n_stride, place_n_stride;            // bytes from one n64 to the next
  int first_n64, k128;                              // tile of n; tile of k of the next step

  TAUT_DEVICE static int x_offset(int c) { return c / 8 * 128 + ((c ^ c / 8) & 7) * 16; }

  TAUT_DEVICE void set_tile(const SparseArgs& args, int tile, int step) {
    const int m0 = tile % args.tiles_m * Tile::kTileM, t = threadIdx.x;
    first_n64 = tile / args.tiles_m * Tile::kTilesN64, k128 = step * Tile::kWarpsK;
    x_rows = 0;
#pragma unroll
    for (int i = 0; i < kX; i++) {
      const int c = t + i * kThreads, m = m0 + c / 8 % Tile::kTileM, panel = c / 8 / Tile::kTileM;
      x_rows |= static_cast<uint32_t>(m < args.M) << i;
      x_source[i] = static_cast<const unsigned char*>(args.x) + ((m < args.M ? m * args.x_row_stride : 0) + k128 * 128 + panel * 64 + c % 8 * 8) * 2;
    }
    code_n_stride = static_cast<int64_t>(args.tiles_k) * Stage::kTileBytes, place_n_stride = static_cast<int64_t>(args.tiles_k) * Stage::kPlaceBytes;
    code_source = args.codes + (first_n64 + t / kPieceCodes) * code_n_stride + static_cast<int64_t>(k128) * Stage::kTileBytes + t % kPieceCodes * 16;
    place_source = args.places + (first_n64 + t / kPiecePlaces) * place_n_stride + static_cast<int64_t>(k128) * Stage::kPlaceBytes + t % kPiecePlaces * 16;
  }

  // Fills `stage` with the next step, and moves on.
  TAUT_DEVICE void fetch(const SparseArgs& args, unsigned char* stage) {
    const bool whole = first_n64 + Tile::kTilesN64 <= args.tiles_n64 && (k128 + Tile::kWarpsK) * 128 <= args.K;
    if (whole) fetch_chunks<true>(args, stage);
    else fetch_chunks<false>(args, stage);
    k128 += Tile::kWarpsK;
    code_source += Tile::kWarpsK * Stage::kTileBytes, place_source += Tile::kWarpsK * Stage::kPlaceBytes;
#pragma unroll
    for (int i = 0; i < kX; i++) x_source[i] += Tile::kWarpsK * 256;
  }
  TAUT_DEVICE void land(unsigned char*) {}

  template <bool kWhole>
  TAUT_DEVICE void fetch_chunks(const SparseArgs& args, unsigned char* stage) {
    const int t = threadIdx.x;
    // Tile `index` of the stage: n outermost. Past the end of N or K codes and scales are zeros, and nobody stores what comes out.
    const auto inside = [&](int index) {
      return kWhole || (first_n64 + index / Tile::kWarpsK < args.tiles_n64 && k128 + index % Tile::kWarpsK < args.tiles_k);
    };
#pragma unroll
    for (int i = 0; i < kX; i++) {
      const int c = t + i * kThreads;
      const bool there = (kWhole || k128 * 128 + c / 8 / Tile::kTileM * 64 + c % 8 * 8 < args.K) && (x_rows >> i & 1);
      // In whole steps the source is an address in x, be it of a row that is not there.
      const void* source = kWhole || there ? x_source[i] : args.x;
      ptx::cp_async_16(stage + x_offset(t) + i * kThreads * 16, source, there ? 16 : 0);
    }
    // Chunk i of this thread lies i * kThreads further on: so many pieces of n, and the rest within its piece.
#pragma unroll
    for (int i = 0; i < kCodes; i++) {
      const int c = t + i * kThreads;
      const bool there = inside(c / kTileCodes);
      const unsigned char* source = code_source + i * kThreads / kPieceCodes * code_n_stride + i * kThreads % kPieceCodes * 16;
      ptx::cp_async_16(stage + Stage::kCodes + c * 16, there ? source : args.codes, there ? 16 : 0);
    }
#pragma unroll
    for (int i = 0; i < kPlaces; i++) {
      const int c = t + i * kThreads;
      if (Stage::kPlaceChunks % kThreads != 0 && c >= Stage::kPlaceChunks) break;
      const unsigned char* source = place_source + i * kThreads / kPiecePlaces * place_n_stride + i * kThreads % kPiecePlaces * 16;
      // WHY no zeros: two equal places are no metadata. Any of another tile are.
      ptx::cp_async_16(stage + Stage::kPlaces + c * 16, inside(c / kTilePlaces) ? source : args.places);
    }
    constexpr int kGroups = std::max(Stage::kGroups, 1);  // without scales there is nothing to loop over
#pragma unroll
    for (int i = 0; i < kScales; i++) {
      const int c = t + i * kThreads, index = c / 8 / kGroups, h = c / 8 % kGroups, k = k128 + index % Tile::kWarpsK;
      if (Stage::kScaleChunks % kThreads != 0 && c >= Stage::kScaleChunks) break;
      const bool there = inside(index);
      const int64_t row = static_cast<int64_t>(first_n64 + index / Tile::kWarpsK) * args.groups + (kGroup32 ? k * 4 + h : (k * 2 + h) >> args.group_tiles_log2);
      ptx::cp_async_16(stage + Stage::kScales + c * 16, args.scales + (there ? row * 128 + c % 8 * 16 : 0), there ? 16 : 0);
    }
  }
};

// The words of one strip of a tile that belong to group h of kGroups (all of them for kGroups = 1): the first words are filled.
template <Format kFormat, int kGroups>
TAUT_DEVICE void load_codes(StripCodes<kFormat>& codes, const unsigned char* s_tile, int strip, int h, int lane) {
  if constexpr (kGroups <= 2) {
    load_strip<kFormat, kGroups>(codes, s_tile, strip, h, lane);
  } else if constexpr (kFormat == Format::kInt4) {
    codes.word[0] = reinterpret_cast<const uint32_t*>(s_tile)[(strip * 32 + lane) * 4 + h];
  } else {
    const uint2 v = reinterpret_cast<const uint2*>(s_tile)[((strip * 2 + h / 2) * 32 + lane) * 2 + h % 2];
    codes.word[0] = v.x, codes.word[1] = v.y;
  }
}

// A lane's words of places for kCount steps, from step h * kCount on.
template <int kCount>
TAUT_DEVICE void load_places(uint32_t (&places)[kCount], const unsigned char* s_places, int h) {
  if constexpr (kCount == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(s_places);
    places[0] = v.x, places[1] = v.y, places[2] = v.z, places[3] = v.w;
  } else if constexpr (kCount == 2) {
    const uint2 v = reinterpret_cast<const uint2*>(s_places)[h];
    places[0] = v.x, places[1] = v.y;
  } else {
    places[0] = reinterpret_cast<const uint32_t*>(s_places)[h];
  }
}

template <class T, Format kFormat, bool kGroup32, class Tile>
TAUT_DEVICE void compute_sparse_unit(const unsigned char* stage, Accumulators<Tile>& acc, int warp_n, int warp_m, int warp_k, int lane) {
  using Stage = SparseStage<kFormat, kGroup32, Tile>;
  using Numbers = Dequant<kFormat, T>;
  constexpr int kTokens8 = Tile::kWarpM / 8, kGroups = Stage::kGroups, kSteps = 4 / kGroups;
  // Few tokens: a pair of strips after the other, its groups unrolled, with loads of 16 bytes for all of them. Many: all strips together, so that x
  // is read once. WHY not unrolled: the codes of several groups would not fit in the registers.
  constexpr bool kFew = kTokens8 <= 2;
  constexpr int kStrips = kFew ? 2 : Tile::kWarpStrips;
  constexpr int kLoads = kFew ? 1 : kGroups, kLoaded = 4 / kLoads;  // of codes and places: how many, and steps that each brings
  const int index = warp_n * Tile::kWarpN / 64 * Tile::kWarpsK + warp_k;
  const int first_strip = Tile::kWarpStrips == 4 ? 0 : warp_n * Tile::kWarpStrips % 4;  // of the tile
  const unsigned char* s_tile = stage + Stage::kCodes + index * Stage::kTileBytes;
  const unsigned char* s_places = stage + Stage::kPlaces + index * Stage::kPlaceBytes + first_strip / 2 * 512 + lane * 16;
  const unsigned char* s_scales = stage + Stage::kScales + index * kGroups * 128 + lane / 4 * 16 + first_strip * 4;
  const unsigned char* s_panels = stage + warp_k * 2 * Tile::kTileM * 128;
  const FragmentZeros zeros = Numbers::zeros(8, 8);
#pragma unroll
  for (int s0 = 0; s0 < Tile::kWarpStrips; s0 += kStrips) {
#pragma unroll 1
    for (int load = 0; load < kLoads; load++) {
      StripCodes<kFormat> codes[kStrips];
      uint32_t places[kStrips / 2][kLoaded];
#pragma unroll
      for (int s = 0; s < kStrips; s++) load_codes<kFormat, kLoads>(codes[s], s_tile, first_strip + s0 + s, load, lane);
#pragma unroll
      for (int pair = 0; pair < kStrips / 2; pair++) load_places<kLoaded>(places[pair], s_places + (s0 / 2 + pair) * 512, load);
#pragma unroll
      for (int g = 0; g < kGroups / kLoads; g++) {
        const int h = load * (kGroups / kLoads) + g;  // of the tile's groups
        ScaleWords<kStrips> scales;
        scales.load(s_scales + h * 128 + s0 * 4);
        uint32_t a[kStrips][kSteps][4];
        float scale[kStrips][2];
#pragma unroll
        for (int s = 0; s < kStrips; s++) {
          scale[s][0] = lower_half(scales.pair(s)) * Numbers::kScale;
          scale[s][1] = upper_half(scales.pair(s)) * Numbers::kScale;
#pragma unroll
          for (int step = 0; step < kSteps; step++) Numbers::fragment(codes[s], g * kSteps + step, zeros, a[s][step]);
        }
#pragma unroll
        for (int j = 0; j < kTokens8; j++) {
          float part[kStrips][4] = {};
#pragma unroll
          for (int step = 0; step < kSteps; step++) {
            const int half = h * kSteps + step;  // of a panel: 32 k
            uint32_t b[4];
            load_x(b, s_panels + half / 2 * Tile::kTileM * 128, warp_m * Tile::kWarpM + j * 8, half % 2, lane);
#pragma unroll
            for (int s = 0; s < kStrips; s += 2) {
              ptx::mma_sp_m16n8k32<T, 0>(part[s], a[s][step], b, places[s / 2][g * kSteps + step]);
              ptx::mma_sp_m16n8k32<T, 1>(part[s + 1], a[s + 1][step], b, places[s / 2][g * kSteps + step]);
            }
          }
#pragma unroll
          for (int s = 0; s < kStrips; s++)
#pragma unroll
            for (int i = 0; i < 4; i++) acc.sum[s0 + s][j][i] = fmaf(scale[s][i / 2], part[s][i], acc.sum[s0 + s][j][i]);
        }
      }
    }
  }
}

// The same where w is in 16 bits: fragments as they lie in shared memory.
template <class T, class Tile>
TAUT_DEVICE void compute_number_unit(const unsigned char* stage, Accumulators<Tile>& acc, int warp_n, int warp_m, int lane) {
  using Stage = SparseStage<kNumbers, false, Tile>;
  static_assert(Tile::kWarpsK == 1);
  constexpr int kTokens8 = Tile::kWarpM / 8, kStrips = Tile::kWarpStrips;
  const int index = warp_n * Tile::kWarpN / 64, first_strip = kStrips == 4 ? 0 : warp_n * kStrips % 4;
  const unsigned char* s_tile = stage + Stage::kCodes + index * Stage::kTileBytes + first_strip * 2048 + lane * 16;
  const unsigned char* s_places = stage + Stage::kPlaces + index * Stage::kPlaceBytes + first_strip / 2 * 512 + lane * 16;
  uint32_t places[kStrips / 2][4];
#pragma unroll
  for (int pair = 0; pair < kStrips / 2; pair++) load_places<4>(places[pair], s_places + pair * 512, 0);
#pragma unroll
  for (int step = 0; step < 4; step++) {
    uint32_t a[kStrips][4];
#pragma unroll
    for (int s = 0; s < kStrips; s++) {
      const uint4 v = *reinterpret_cast<const uint4*>(s_tile + s * 2048 + step * 512);
      a[s][0] = v.x, a[s][1] = v.y, a[s][2] = v.z, a[s][3] = v.w;
    }
#pragma unroll
    for (int j = 0; j < kTokens8; j++) {
      uint32_t b[4];
      load_x(b, stage + step / 2 * Tile::kTileM * 128, warp_m * Tile::kWarpM + j * 8, step % 2, lane);
#pragma unroll
      for (int s = 0; s < kStrips; s += 2) {
        ptx::mma_sp_m16n8k32<T, 0>(acc.sum[s][j], a[s], b, places[s / 2][step]);
        ptx::mma_sp_m16n8k32<T, 1>(acc.sum[s + 1][j], a[s + 1], b, places[s / 2][step]);
      }
    }
  }
}

template <class T, Format kFormat, bool kGroup32, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocksPerSm) sparse_mma_kernel(const SparseArgs args) {
  if constexpr (kCompiledFor<80>) {
#if TAUT_ARCH_AT_LEAST(90)
    ptx::griddep_launch();  // `combine` may take its place, and wait
#endif
    using Stage = SparseStage<kFormat, kGroup32, Tile>;
    stream_units<true, T, Tile, Stage::kStages, Stage::kBytes, SparseLoader<kFormat, kGroup32, Tile>>(
        args, [&](const unsigned char* stage, Accumulators<Tile>& acc, int warp_n, int warp_m, int warp_k, int lane) {
          if constexpr (kFormat == kNumbers) compute_number_unit<T, Tile>(stage, acc, warp_n, warp_m, lane);
          else compute_sparse_unit<T, kFormat, kGroup32, Tile>(stage, acc, warp_n, warp_m, warp_k, lane);
        });
  }
}

// ---- Host --------------------------------------------------------------------------------------------------------------

// Tiles by M, as in cuda_mma.cuh. WHY 4 strips a warp for many tokens, where dense kernels have 2: x is read from shared memory half as often, which
// mma.sp, twice as fast, would wait for.
using TileM8 = MmaTile<8, 4, 2, 1, 2, 4, 3>;
using TileM16 = MmaTile<16, 4, 2, 1, 2, 3, 2>;
using TileM32 = MmaTile<32, 2, 4, 1, 1, 4, 3>;
using TileM64 = MmaTile<32, 4, 2, 2, 1, 3, 2>;
using TileM128 = MmaTile<32, 4, 2, 4, 1, 2, 1>;

// Of 16-bit w, whose stages are twice as large: one step of 128 k in each, so that at few rows there are 4 of them. No warps share outputs, and so
// the order of the sums is the same for all.
using NumbersM8 = MmaTile<8, 2, 4, 1, 1, 4, 2>;
using NumbersM16 = MmaTile<16, 2, 4, 1, 1, 4, 2>;
using NumbersM32 = MmaTile<32, 2, 4, 1, 1, 3, 2>;
using NumbersM64 = MmaTile<32, 4, 2, 2, 1, 2, 2>;
using NumbersM96 = MmaTile<24, 4, 2, 4, 1, 2, 1>;

// Calls f.template operator()<kFormat, kGroup32, Tile>() for this call.
template <class F>
auto with_sparse_tile(const CudaParams& p, const F& f) {
  const auto with_group = [&]<Format kFormat, bool kGroup32>() {
    if (p.M <= 8 && !p.batch_invariant) return f.template operator()<kFormat, kGroup32, TileM8>();
    if (p.M <= 16 && !p.batch_invariant) return f.template operator()<kFormat, kGroup32, TileM16>();
    if (p.M <= 32) return f.template operator()<kFormat, kGroup32, TileM32>();
    if (p.M <= 64) return f.template operator()<kFormat, kGroup32, TileM64>();
    return f.template operator()<kFormat, kGroup32, TileM128>();
  };
  const auto with_format = [&]<Format kFormat>() {
    if (p.weight.group_size == 32) return with_group.template operator()<kFormat, true>();
    return with_group.template operator()<kFormat, false>();
  };
  if (is_16bit(p.weight.format)) {
    if (p.M <= 8) return f.template operator()<kNumbers, false, NumbersM8>();
    if (p.M <= 16) return f.template operator()<kNumbers, false, NumbersM16>();
    if (p.M <= 32) return f.template operator()<kNumbers, false, NumbersM32>();
    if (p.M <= 64) return f.template operator()<kNumbers, false, NumbersM64>();
    return f.template operator()<kNumbers, false, NumbersM96>();
  }
  if (p.weight.format == Format::kInt4) return with_format.template operator()<Format::kInt4>();
  if (p.weight.format == Format::kInt8) return with_format.template operator()<Format::kInt8>();
  return with_format.template operator()<Format::kFp8E4M3>();
}

template <class T>
void run_dtype(const CudaParams& p) {
  with_sparse_tile(p, [&]<Format kFormat, bool kGroup32, class Tile>() {
    constexpr int kSmem = SparseStage<kFormat, kGroup32, Tile>::kSmem;
    const SparseTiles layout = p.sparse();
    const Plan plan = make_plan<Tile>(p, layout.kept_tiles(), kSmem);
    const SparseArgs args{make_args(p, layout.kept_tiles(), plan), p.packed + layout.places_begin()};
    launch("sparse_linear mma", sparse_mma_kernel<T, kFormat, kGroup32, Tile>, dim3(static_cast<unsigned>(plan.blocks)), dim3(Tile::kThreads), kSmem, p.stream,
           args);
    launch_combine<T, Tile>(p, plan, args);
  });
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs sm_80: sparse tensor cores";
  if (!p.sparse().is_tiled()) return "it computes with 2:4 alone, with or without rows that share places";
  if (p.activations != Activations::kFloat) return "it computes with float activations";
  if (p.dtype == DType::kFloat32) return "x is float32; tensor cores take float16 and bfloat16";
  return is_16bit(p.weight.format) && (p.weight.format == Format::kFp16) != (p.dtype == DType::kFloat16)
             ? "x and w are in 16 bits of two kinds, of which tensor cores take one"
             : nullptr;
}

int64_t workspace_bytes(const CudaParams& p) {
  return with_sparse_tile(p, [&]<Format kFormat, bool kGroup32, class Tile>() {
    return make_plan<Tile>(p, p.sparse().kept_tiles(), SparseStage<kFormat, kGroup32, Tile>::kSmem).workspace_bytes;
  });
}

void run(const CudaParams& p) {
  if (p.dtype == DType::kFloat16) run_dtype<__half>(p);
  else run_dtype<__nv_bfloat16>(p);
}

}  // namespace taut::sparse_linear::cuda_sm80_mma
