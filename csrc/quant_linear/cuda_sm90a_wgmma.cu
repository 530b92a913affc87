// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias[N]; x, bias and out in fp16 or bf16; sums in fp32. A weight is rounded
//           to x's dtype once, as a dense layer of dequantized weights would have it; a scale per row multiplies the fp32 sums.
// LAYOUT    packed: MmaTiles (formats.h): a strip's words are the A operand of wgmma in registers, so w enters as out^T = w @ x^T.
//           x by TMA to shared memory [kTokens][64], K-major with the 128-byte swizzle: the B operand.
// WORK      grid: as many blocks as SMs; each takes tiles of 128 n x kTokens m, one after the other. Within 1024 tokens of x tiles
//           go along n, so that the tiles in flight share both x and w in the L2 cache.
//           block: a producer warpgroup, of which one thread works, and two consumer warpgroups, each with 64 n.
//           k-step of 64: the producer fills one of kStages buffers with x (TMA) and the codes, scales and zeros of both n-tiles
//           (bulk copies); `full` counts the bytes, `empty` the consumer warps that have finished. WHY codes through shared memory
//           and not straight to registers: as deep a prefetch as x has, at the price of no register.
//           consumer: a lane reads the 16 or 32 bytes of codes it needs, makes A registers for 16 k, and hands them to an
//           asynchronous wgmma m64 n<kTokens> k16. Four sets of A registers: the next ones are made while earlier wgmmas run.
//           end of a tile: row scale, bias, to 16 bits, transposed through shared memory, 16-byte stores.
//           Where tiles would leave SMs idle, each is cut along k into `splits` parts, whose fp32 sums go to the workspace in
//           fragment order; a second kernel adds them up. All sums in a fixed order: bitwise repeatable.
// BOUND     tensor cores: 64 * kTokens * 16 multiply-adds a wgmma, at 2048 a cycle and SM: kTokens / 2 cycles, 4 kTokens cycles a
//           k-step. Beside it, at kTokens = 256 and int4: 36.5 KB a k-step into shared memory (36 bytes a cycle; L2 has some 33 to
//           give when all SMs ask: at most 0.9 of the peak), 64 bytes a cycle of B out of it (of 128), and 83 to 197 instructions a
//           k-step and warp (counted in the SASS), 2 warps a scheduler: 16 to 38% of its slots. kTokens = 128: 40 bytes a cycle,
//           32 to 77% of the slots. kTokens = 64: 51 bytes, 65 to 154%: some 390 cycles for 256.
// LIMITS    sm_90 alone (the "a" instructions exist nowhere else); fp16 and bf16; rows of x 16-byte aligned (TMA). Tiles and
//           splits depend on M: batch-invariant calls are refused. Weighed on paper, not built: two blocks of a cluster that share
//           x by multicast (20 instead of 36 bytes a cycle); tiles of 256 n x 128 m (24, but twice the dequantization).

#include "common/dequant.cuh"
#include "common/launch.h"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "common/tensor_map.h"
#include "quant_linear/op.h"

namespace taut::quant_linear::cuda_sm90a_wgmma {
namespace {

constexpr int kConsumers = 2;                     // warpgroups, each with an n-tile of 64
constexpr int kThreads = 128 * (1 + kConsumers);  // the producer's warpgroup comes last
constexpr int kStepK = 64;
constexpr int kMaxScaleBytes = 256, kMaxZeroBytes = 128;  // of an n-tile in a k-step: two groups of 32 k
constexpr int kChunkTokens = 64;                          // of out that are transposed at a time
constexpr int kTokensPerSweep = 1024;

// Shared memory of a block, in this order.
template <Format kFormat, int kTokens>
struct Shared {
  static constexpr int kStages = kTokens == 256 ? 5 : 8;
  static constexpr int kXBytes = kTokens * kStepK * 2;
  static constexpr int kCodeBytes = static_cast<int>(MmaTiles::kTileN * MmaTiles::kTileK) / (kFormat == Format::kInt4 ? 2 : 1);
  static constexpr int kOutBytes = kChunkTokens * 64 * 2;
  static constexpr int kX = 0;
  static constexpr int kOut = kX + kStages * kXBytes;
  static constexpr int kCodes = kOut + kConsumers * kOutBytes;
  static constexpr int kScales = kCodes + kStages * kConsumers * kCodeBytes;
  static constexpr int kZeros = kScales + kStages * kConsumers * kMaxScaleBytes;
  static constexpr int kBarriers = kZeros + kStages * kConsumers * kMaxZeroBytes;
  static constexpr int kBytes = kBarriers + 2 * kStages * 8;
};

struct Problem {
  const uint8_t* codes;
  const uint16_t* scales;
  const uint8_t* zeros;  // or nullptr
  const void* bias;      // or nullptr
  void* out;
  float* partials;  // if splits > 1: [split][tile][consumer] slots of 64 n x kTokens m, in fragment order
  int64_t M, N;
  int tiles_n64, tiles_k, groups;
  int blocks_n, blocks_m, splits;
  int group_size;
  bool whole_pieces;  // rows of out lie so that 8 n are one 16-byte store
};

TAUT_DEVICE int part_step(const Problem& p, int split) { return static_cast<int>(int64_t{p.tiles_k} * split / p.splits); }

// A part of a tile: where the tile lies, and the k-steps. Tiles go kTokensPerSweep tokens at a time, along n, tokens fastest.
struct Part {
  int n64;  // the first of its kConsumers n-tiles
  int64_t m;
  int step_begin, step_end;
  int slot;  // of its first consumer in `partials`
};
template <int kTokens>
TAUT_DEVICE Part part_at(const Problem& p, int index) {
  constexpr int kSweep = kTokensPerSweep / kTokens;
  const int tile = index / p.splits, split = index - tile * p.splits;
  const int sweep = tile / (kSweep * p.blocks_n), within = tile - sweep * kSweep * p.blocks_n;
  const int left = p.blocks_m - sweep * kSweep, height = left < kSweep ? left : kSweep;
  return {within / height * kConsumers, int64_t{sweep * kSweep + within % height} * kTokens, part_step(p, split), part_step(p, split + 1),
          (split * p.blocks_n * p.blocks_m + tile) * kConsumers};
}

// A block's last n-tile may not exist: it then computes the one before a second time, and keeps it to itself.
TAUT_DEVICE int64_t n_tile(const Problem& p, int n64) { return n64 < p.tiles_n64 ? n64 : p.tiles_n64 - 1; }

// A place in the ring of stages, and the parity of the barriers' phases there.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  TAUT_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

TAUT_DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {}
}

// 8 n of a row of out.
TAUT_DEVICE void store_piece(const Problem& p, const unsigned char* from, int64_t m, int64_t n) {
  uint16_t* const to = static_cast<uint16_t*>(p.out) + m * p.N + n;
  if (p.whole_pieces) {
    if (n < p.N) ptx::st_global_16(to, *reinterpret_cast<const uint4*>(from));
  } else {
    const int count = n + 8 <= p.N ? 8 : static_cast<int>(p.N - n);
#pragma unroll 1
    for (int i = 0; i < count; i++) to[i] = reinterpret_cast<const uint16_t*>(from)[i];
  }
}

// The scales of a lane's rows g and g + 8, ready to multiply A registers with one rounding.
template <class Type>
struct Scales;

template <>
struct Scales<half> {
  uint32_t s[2];
  TAUT_DEVICE explicit Scales(uint32_t both) : s{ptx::prmt(both, both, 0x1010), ptx::prmt(both, both, 0x3232)} {}
  TAUT_DEVICE uint32_t times(uint32_t a, int h) const { return ptx::hmul2<half>(a, s[h]); }
};

// WHY two parts: the 11 bits of an fp16 scale do not fit the 8 of a bf16, so it is the sum of two. A code has at most 4
// significant bits (int4, E4M3) and the low part 3: their product is exact, and the FMA rounds once. The 7 bits of an int8
// make that product inexact by at most 2^-17 of the weight, 2^-8 of a bf16's own rounding.
template <>
struct Scales<__nv_bfloat16> {
  uint32_t high[2], low[2];
  TAUT_DEVICE explicit Scales(uint32_t both) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float s = h == 0 ? lower_half(both) : upper_half(both);
      high[h] = pack<__nv_bfloat16>(s, s);
      const float rounded = __uint_as_float(high[h] & 0xffff0000u), rest = s == rounded ? 0.0f : s - rounded;  // infinity: no rest
      low[h] = pack<__nv_bfloat16>(rest, rest);
    }
  }
  TAUT_DEVICE uint32_t times(uint32_t a, int h) const { return ptx::hfma2<__nv_bfloat16>(a, high[h], ptx::hmul2<__nv_bfloat16>(a, low[h])); }
};

// Where a group of MmaTiles has row g of a warp's strip; row g + 8 follows.
TAUT_DEVICE int in_group(int warp, int lane) { return lane / 4 * 8 + 2 * warp; }

// The A registers of 16 k, before their scales, exactly.
template <Format kFormat, class Type>
TAUT_DEVICE void fragment(const StripCodes<kFormat>& codes, int step, const FragmentZeros& zeros, uint32_t (&a)[4]) {
  if constexpr (kFormat == Format::kFp8E4M3) {
    // WHY not Dequant: from sm_89 on an instruction converts two E4M3 to fp16, NaN and all.
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const uint32_t w = ptx::prmt(codes.word[2 * step + h], 0, 0x3120);
      a[h] = ptx::cvt_f16x2_e4m3x2(static_cast<uint16_t>(w)), a[h + 2] = ptx::cvt_f16x2_e4m3x2(static_cast<uint16_t>(w >> 16));
    }
    if constexpr (std::is_same_v<Type, __nv_bfloat16>) {
#pragma unroll
      for (uint32_t& r : a) r = pack<Type>(lower_half(r), upper_half(r));
    }
  } else {
    Dequant<kFormat, Type>::fragment(codes, step, zeros, a);
  }
}

// ---- the producer: one thread -------------------------------------------------------------------------------------------

template <Format kFormat, bool kRowScale, int kTokens>
TAUT_DEVICE void produce(const CUtensorMap& x_map, const Problem& p, unsigned char* smem) {
  using S = Shared<kFormat, kTokens>;
  uint64_t* const full = reinterpret_cast<uint64_t*>(smem + S::kBarriers);
  uint64_t* const empty = full + S::kStages;
  const int groups_in_step = p.group_size == 32 ? 2 : 1;
  const int scale_bytes = kRowScale ? 0 : groups_in_step * 128, zero_bytes = kRowScale || p.zeros == nullptr ? 0 : groups_in_step * 64;
  ptx::prefetch_tensor_map(&x_map);
  Ring<S::kStages> ring;
  for (int index = blockIdx.x; index < p.blocks_n * p.blocks_m * p.splits; index += gridDim.x) {
    const Part part = part_at<kTokens>(p, index);
    for (int step = part.step_begin; step < part.step_end; step++, ring.advance()) {
      wait(empty + ring.stage, ring.parity ^ 1);
      uint64_t* const barrier = full + ring.stage;
      ptx::mbarrier_arrive_expect_tx(barrier, S::kXBytes + kConsumers * (S::kCodeBytes + scale_bytes + zero_bytes));
      ptx::tma_load_2d(smem + S::kX + ring.stage * S::kXBytes, &x_map, step * kStepK, static_cast<int>(part.m), barrier);
#pragma unroll
      for (int c = 0; c < kConsumers; c++) {
        const int64_t n64 = n_tile(p, part.n64 + c);
        const int slot = ring.stage * kConsumers + c;
        ptx::bulk_load(smem + S::kCodes + slot * S::kCodeBytes, p.codes + (n64 * p.tiles_k + step) * S::kCodeBytes, S::kCodeBytes, barrier);
        if constexpr (!kRowScale) {
          const int64_t group = n64 * p.groups + step * kStepK / p.group_size;
          ptx::bulk_load(smem + S::kScales + slot * kMaxScaleBytes, p.scales + group * 64, scale_bytes, barrier);
          if (zero_bytes != 0) ptx::bulk_load(smem + S::kZeros + slot * kMaxZeroBytes, p.zeros + group * 64, zero_bytes, barrier);
        }
      }
    }
  }
}

// ---- out ----------------------------------------------------------------------------------------------------------------

// What a lane needs of its rows g and g + 8 for a whole tile.
struct Rows {
  float scale[2], bias[2];
};
template <class Type, bool kRowScale>
TAUT_DEVICE Rows rows_of(const Problem& p, int64_t n64, int warp, int lane) {
  Rows rows{{1.0f, 1.0f}, {}};
  if constexpr (kRowScale) {
    const uint32_t both = *reinterpret_cast<const uint32_t*>(p.scales + n64 * 64 + in_group(warp, lane));
    rows.scale[0] = lower_half(both), rows.scale[1] = upper_half(both);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int64_t n = n64 * 64 + warp * 16 + lane / 4 + 8 * h;
    if (p.bias != nullptr && n < p.N) rows.bias[h] = to_float(static_cast<const Type*>(p.bias)[n]);
  }
  return rows;
}

// 64 n x kChunkTokens m of sums, by a warpgroup: [token][64 n] in shared memory, 16-byte pieces swizzled by the token so that
// neither side has bank conflicts, and from there to out.
template <class Type>
TAUT_DEVICE void store_chunk(const Problem& p, const Rows& rows, const float (&sums)[kChunkTokens / 2], unsigned char* s_out, int64_t n64, int64_t m, int warp,
                             int lane, int barrier) {
  ptx::bar_sync(barrier, 128);  // the chunk before has been read
#pragma unroll
  for (int j = 0; j < kChunkTokens / 8; j += 2) {
    uint32_t r[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // row g + 8 * (i % 2), tokens 2t and 2t + 1 of 8
      const int from = (j + i / 2) * 4 + i % 2 * 2, h = i % 2;
      r[i] = pack<Type>(sums[from] * rows.scale[h] + rows.bias[h], sums[from + 1] * rows.scale[h] + rows.bias[h]);
    }
    const int token = j * 8 + lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
    ptx::stmatrix_x4_trans(s_out + token * 128 + (piece ^ token % 8) * 16, r);
  }
  ptx::bar_sync(barrier, 128);
#pragma unroll
  for (int i = 0; i < kChunkTokens * 8 / 128; i++) {
    const int token = i * 16 + warp * 4 + lane / 8, piece = lane % 8;
    if (m + token < p.M) store_piece(p, s_out + token * 128 + (piece ^ token % 8) * 16, m + token, n64 * 64 + piece * 8);
  }
}

// Where thread t of a warpgroup has its 4 sums of 8 tokens in a slot.
template <int kTokens>
TAUT_DEVICE float4* partial_at(const Problem& p, int slot, int tokens8, int thread) {
  return reinterpret_cast<float4*>(p.partials) + (int64_t{slot} * (kTokens / 8) + tokens8) * 128 + thread;
}

// ---- a consumer: 128 threads and 64 n -----------------------------------------------------------------------------------

template <class Type, Format kFormat, bool kRowScale, int kTokens>
TAUT_DEVICE void consume(const Problem& p, unsigned char* smem, int consumer, int warp) {
  using S = Shared<kFormat, kTokens>;
  uint64_t* const full = reinterpret_cast<uint64_t*>(smem + S::kBarriers);
  uint64_t* const empty = full + S::kStages;
  const int lane = threadIdx.x % 32, first = in_group(warp, lane);
  const int second_group = p.group_size == 32 ? 1 : 0;
  Ring<S::kStages> ring;
  for (int index = blockIdx.x; index < p.blocks_n * p.blocks_m * p.splits; index += gridDim.x) {
    const Part part = part_at<kTokens>(p, index);
    const int64_t n64 = n_tile(p, part.n64 + consumer);
    const Rows rows = rows_of<Type, kRowScale>(p, n64, warp, lane);  // asked for long before its use
    FragmentZeros zeros = Dequant<kFormat, Type>::zeros(8, 8);
    if (kRowScale && p.zeros != nullptr) zeros = Dequant<kFormat, Type>::zeros(p.zeros[n64 * 64 + first], p.zeros[n64 * 64 + first + 1]);

    // Its k-steps
    float d[kTokens / 2];
    uint32_t a[4][4];
#pragma unroll
    for (float& sum : d) sum = 0;
    int used = 0;  // the stage of the step before
    for (int step = part.step_begin; step < part.step_end; step++, ring.advance()) {
      wait(full + ring.stage, ring.parity);
      const int slot = ring.stage * kConsumers + consumer;
      StripCodes<kFormat> codes;
#pragma unroll
      for (int f = 0; f < StripCodes<kFormat>::kWords / 4; f++) {
        const uint4 words = *reinterpret_cast<const uint4*>(smem + S::kCodes + slot * S::kCodeBytes + warp * (S::kCodeBytes / 4) + f * 512 + lane * 16);
        codes.word[4 * f] = words.x, codes.word[4 * f + 1] = words.y, codes.word[4 * f + 2] = words.z, codes.word[4 * f + 3] = words.w;
      }
      const unsigned char* const s_scales = smem + S::kScales + slot * kMaxScaleBytes + first * 2;
      const unsigned char* const s_zeros = smem + S::kZeros + slot * kMaxZeroBytes + first;
      const uint64_t b = ptx::swizzled_128b_descriptor(smem + S::kX + ring.stage * S::kXBytes);
      Scales<Type> scales(0);
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (!kRowScale) {
          if (j % 2 == 0) {  // the second time the same ones, but for groups of 32
            const int group = j == 0 ? 0 : second_group;
            scales = Scales<Type>(*reinterpret_cast<const uint32_t*>(s_scales + group * 128));
            if constexpr (kFormat == Format::kInt4) {
              const uint32_t both = *reinterpret_cast<const uint16_t*>(s_zeros + group * 64);
              zeros = Dequant<kFormat, Type>::zeros(both & 0xff, both >> 8);
            }
          }
        }
        ptx::wgmma_wait<3>();  // a[j] is free, and at j = 3 nothing of the step before is in flight
        if (j == 3) {
          __syncwarp();
          ptx::mbarrier_arrive(empty + used, lane == 0 && step > part.step_begin);
        }
        fragment<kFormat, Type>(codes, j, zeros, a[j]);
        if constexpr (!kRowScale) {
#pragma unroll
          for (int i = 0; i < 4; i++) a[j][i] = scales.times(a[j][i], i % 2);
        }
        ptx::wgmma_pin(a[j]);
        ptx::wgmma_fence();
        ptx::wgmma_m64k16<Type, kTokens>(d, a[j], b + 2 * j);  // 16 k are 32 bytes
        ptx::wgmma_commit();
      }
      used = ring.stage;
    }
    ptx::wgmma_wait<0>();
    __syncwarp();
    ptx::mbarrier_arrive(empty + used, lane == 0);

    // To out, or to the workspace
    if (part.n64 + consumer >= p.tiles_n64) continue;
#pragma unroll
    for (int chunk = 0; chunk < kTokens / kChunkTokens; chunk++) {
      const int64_t m = part.m + chunk * kChunkTokens;
      if (m >= p.M) break;
      float sums[kChunkTokens / 2];
#pragma unroll
      for (int i = 0; i < kChunkTokens / 2; i++) sums[i] = d[chunk * (kChunkTokens / 2) + i];
      if (p.splits == 1) {
        store_chunk<Type>(p, rows, sums, smem + S::kOut + consumer * S::kOutBytes, n64, m, warp, lane, 1 + consumer);
      } else {
#pragma unroll
        for (int j = 0; j < kChunkTokens / 8; j++)
          *partial_at<kTokens>(p, part.slot + consumer, chunk * (kChunkTokens / 8) + j, warp * 32 + lane) =
              make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
      }
    }
  }
}

template <class Type, Format kFormat, bool kRowScale, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) quant_linear_wgmma(const __grid_constant__ CUtensorMap x_map, const Problem p) {
#if TAUT_ARCH_90A
  using S = Shared<kFormat, kTokens>;
  TAUT_DYNAMIC_SMEM(smem);
  ptx::griddep_launch();                                                             // the second kernel, if there is one, may take its place and wait
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);  // WHY: the compiler then knows it to be uniform
  if (threadIdx.x == 0) {
    uint64_t* const full = reinterpret_cast<uint64_t*>(smem + S::kBarriers);
    for (int i = 0; i < S::kStages; i++) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(full + S::kStages + i, kConsumers * 4);  // a lane of each consumer warp
    }
    ptx::fence_proxy_async();
  }
  // WHY: int4 without zeros finds its 8s where zeros would be. A branch instead would serialize the wgmmas (see mbarrier_arrive).
  if (kFormat == Format::kInt4 && !kRowScale && p.zeros == nullptr)
    for (int i = threadIdx.x; i < S::kStages * kConsumers * kMaxZeroBytes / 4; i += kThreads) reinterpret_cast<uint32_t*>(smem + S::kZeros)[i] = 0x08080808u;
  __syncthreads();
  if (warp / 4 == kConsumers) {
    if constexpr (kTokens == 256) ptx::setmaxnreg_dec<40>();
    if (threadIdx.x == kConsumers * 128) produce<kFormat, kRowScale, kTokens>(x_map, p, smem);
  } else {
    if constexpr (kTokens == 256) ptx::setmaxnreg_inc<232>();
    consume<Type, kFormat, kRowScale, kTokens>(p, smem, warp / 4, warp % 4);
  }
#endif
}

// The sums of the parts of a tile, in the order of k. A block for 64 n x kChunkTokens m.
template <class Type, bool kRowScale, int kTokens>
__global__ void __launch_bounds__(128) quant_linear_wgmma_combine(const Problem p) {
#if TAUT_ARCH_90A
  ptx::griddep_wait();
  __shared__ __align__(16) unsigned char s_out[kChunkTokens * 128];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, consumer = blockIdx.y % kConsumers, chunk = blockIdx.y / kConsumers;
  const int tiles = p.blocks_n * p.blocks_m, index = blockIdx.x;
  const Part part = part_at<kTokens>(p, index * p.splits);
  const int64_t m = part.m + chunk * kChunkTokens;
  const int n64 = part.n64 + consumer;
  if (n64 >= p.tiles_n64 || m >= p.M) return;
  float sums[kChunkTokens / 2] = {};
  for (int split = 0; split < p.splits; split++)
#pragma unroll
    for (int j = 0; j < kChunkTokens / 8; j++) {
      const float4 four = *partial_at<kTokens>(p, part.slot + split * tiles * kConsumers + consumer, chunk * (kChunkTokens / 8) + j, threadIdx.x);
      sums[4 * j] += four.x, sums[4 * j + 1] += four.y, sums[4 * j + 2] += four.z, sums[4 * j + 3] += four.w;
    }
  store_chunk<Type>(p, rows_of<Type, kRowScale>(p, n64, warp, lane), sums, s_out, n64, m, warp, lane, 1);
#endif
}

// ---- host ---------------------------------------------------------------------------------------------------------------

constexpr int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// How a call is cut up.
struct Plan {
  int tokens, splits;
};

int64_t partial_bytes(const CudaParams& p, const Plan& plan) {
  if (plan.splits == 1) return 0;
  return plan.splits * blocks(p.weight.N, kConsumers * 64) * blocks(p.M, plan.tokens) * kConsumers * 64 * plan.tokens * 4;
}

// The plan that should take the fewest cycles, by counts that no GPU has confirmed yet: a k-step's are those of BOUND.
Plan plan(const CudaParams& p) {
  struct Height {
    int tokens, step_cycles;
  };
  constexpr Height kHeights[] = {{256, 1140}, {128, 620}, {64, 390}};
  constexpr int kTileCycles = 2500;     // filling the pipeline, and the stores
  constexpr int kCombineCycles = 3000;  // a second kernel, most of whose launch is hidden
  constexpr int kCombineBytes = 16;     // a cycle and SM, through the L2 cache
  constexpr int kFewestSteps = 4, kMostSplits = 8;
  constexpr int64_t kMostPartialBytes = int64_t{64} << 20;
  const int64_t steps = blocks(p.weight.K, kStepK), sms = p.device->sm_count;
  Plan best{};
  int64_t best_cycles = INT64_MAX;
  for (const Height& height : kHeights) {
    const int64_t tiles = blocks(p.weight.N, kConsumers * 64) * blocks(p.M, height.tokens);
    for (int splits = 1; splits <= kMostSplits; splits++) {
      const int64_t partials = partial_bytes(p, {height.tokens, splits});
      if (splits > 1 && (steps < splits * kFewestSteps || partials > kMostPartialBytes)) break;
      int64_t cycles = blocks(tiles * splits, sms) * (blocks(steps, splits) * height.step_cycles + kTileCycles);
      if (splits > 1) cycles += kCombineCycles + 2 * partials / (sms * kCombineBytes);
      if (cycles < best_cycles) best = {height.tokens, splits}, best_cycles = cycles;
    }
  }
  return best;
}

template <class Type, Format kFormat, bool kRowScale, int kTokens>
void run_kernel(const CudaParams& p, int splits) {
  const WeightSpec& w = p.weight;
  const MmaTiles layout{w};
  // A single row's stride means nothing, and need not be one that TMA takes.
  const int64_t row_elems = p.M > 1 ? p.x_row_stride : blocks(w.K, 8) * 8;
  const CUtensorMap x_map = tensor_map_16bit(p.x, std::is_same_v<Type, __nv_bfloat16>, w.K, p.M, row_elems * 2, kTokens);
  const int blocks_n = static_cast<int>(blocks(w.N, kConsumers * 64)), blocks_m = static_cast<int>(blocks(p.M, kTokens));
  const Problem problem{.codes = p.packed,
                        .scales = reinterpret_cast<const uint16_t*>(p.packed + layout.scales_begin()),
                        .zeros = w.zeros ? p.packed + layout.zeros_begin() : nullptr,
                        .bias = p.bias,
                        .out = p.out,
                        .partials = static_cast<float*>(p.workspace),
                        .M = p.M,
                        .N = w.N,
                        .tiles_n64 = static_cast<int>(layout.num_tiles_n()),
                        .tiles_k = static_cast<int>(layout.num_tiles_k()),
                        .groups = static_cast<int>(layout.num_groups()),
                        .blocks_n = blocks_n,
                        .blocks_m = blocks_m,
                        .splits = splits,
                        .group_size = static_cast<int>(w.group_size),
                        .whole_pieces = w.N % 8 == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0};
  const int tiles = blocks_n * blocks_m, parts = tiles * splits, grid = parts < p.device->sm_count ? parts : p.device->sm_count;
  launch("cuda_sm90a.wgmma", quant_linear_wgmma<Type, kFormat, kRowScale, kTokens>, dim3(grid), dim3(kThreads), Shared<kFormat, kTokens>::kBytes, p.stream,
         x_map, problem);
  if (splits > 1)
    launch_dependent(*p.device, "cuda_sm90a.wgmma combine", quant_linear_wgmma_combine<Type, kRowScale, kTokens>,
                     dim3(tiles, kConsumers * (kTokens / kChunkTokens)), dim3(128), 0, p.stream, problem);
}

template <class Type, Format kFormat, bool kRowScale>
void run_scaled(const CudaParams& p) {
  const auto [tokens, splits] = plan(p);
  switch (tokens) {
    case 64: return run_kernel<Type, kFormat, kRowScale, 64>(p, splits);
    case 128: return run_kernel<Type, kFormat, kRowScale, 128>(p, splits);
    default: return run_kernel<Type, kFormat, kRowScale, 256>(p, splits);
  }
}

template <class Type, Format kFormat>
void run_format(const CudaParams& p) {
  if (p.weight.group_size == 0) run_scaled<Type, kFormat, true>(p);
  else run_scaled<Type, kFormat, false>(p);
}

template <class Type>
void run_type(const CudaParams& p) {
  switch (p.weight.format) {
    case Format::kInt4: return run_format<Type, Format::kInt4>(p);
    case Format::kInt8: return run_format<Type, Format::kInt8>(p);
    case Format::kFp8E4M3: return run_format<Type, Format::kFp8E4M3>(p);
    default: break;  // op_cuda.cpp refuses what no CUDA kernel takes
  }
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm != 90) return "needs sm_90a";
  if (p.activations != Activations::kFloat) return "activations are not float";
  if (p.dtype == DType::kFloat32) return "x is float32";
  if (p.batch_invariant) return "its tiles and splits of K depend on M";
  if (p.weight.K == 0) return "K is 0";
  if (reinterpret_cast<uintptr_t>(p.x) % 16 != 0) return "x is not 16-byte aligned";
  if (p.M > 1 && (p.x_row_stride % 8 != 0 || p.x_row_stride < p.weight.K)) return "rows of x are not 16-byte aligned, or overlap";
  if (p.M > INT32_MAX / 2 || p.weight.K > INT32_MAX / 2 || p.weight.N > INT32_MAX / 2) return "a size is over 2^30";
  if (blocks(p.M, 64) * blocks(p.weight.N, kConsumers * 64) > INT32_MAX / 2) return "more than 2^30 tiles";
  return nullptr;
}

int64_t workspace_bytes(const CudaParams& p) { return p.M == 0 || p.weight.N == 0 ? 0 : partial_bytes(p, plan(p)); }

void run(const CudaParams& p) {
  if (p.M == 0 || p.weight.N == 0) return;
  if (p.dtype == DType::kFloat16) run_type<half>(p);
  else run_type<__nv_bfloat16>(p);
}

}  // namespace taut::quant_linear::cuda_sm90a_wgmma
