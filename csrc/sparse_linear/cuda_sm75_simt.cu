// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, bias, out fp32, bf16 or fp16, or x as 8-bit codes; sums fp32, scales multiplied into the sums of
//           32 k
// LAYOUT    w: SparseTiles (common/sparse.h), 2:4 and the others. x in shared memory as fp32, a word of padding every 32 k: lanes that stand 32 k
//           apart meet no bank conflict
// WORK      A block takes 16 rows of w and up to 8 of x, a warp 2 of w; a lane what is kept of 32 k of both, then of the 32 k that are 1024 further
//           on. A kept number meets the x that its place points to. The lanes' sums are added by shuffles, in a fixed order
// BOUND     One row of x: about 9 instructions a kept number, 20 of which an SM of H200 is sent in a cycle (4:8 int4 at 4.3 TB/s): 180 / 32 = 6
//           for 4 schedulers, so 1.5 times what the bytes take. Smaller GPUs are sent less: bytes. Each row of x more: 2 instructions
// LIMITS    none: any activations, M, N, K, pattern, format, dtype, stride; a row's result does not depend on M
#include <algorithm>

#include "common/launch.h"
#include "common/numbers.cuh"
#include "sparse_linear/op.h"

namespace taut::sparse_linear::cuda_sm75_simt {
namespace {

constexpr int kThreads = 256, kWarpRows = 2, kBlockRows = kThreads / 32 * kWarpRows;  // rows of w
constexpr int kStaged = 8192;                                                         // floats of x in shared memory, padding aside

// The patterns, as the kernels are made for them. Kept numbers of 32 k, and the bits of a place.
enum class Kind { kTiled, k1of4, k2of8, k4of8 };
constexpr int kept_of(Kind kind) { return kind == Kind::kTiled || kind == Kind::k4of8 ? 16 : 8; }
constexpr int place_bits_of(Kind kind) { return kind == Kind::k2of8 || kind == Kind::k4of8 ? 3 : 2; }
// Where in its 32 k the block of a kept number begins.
constexpr int block_of(Kind kind, int j) {
  return kind == Kind::kTiled ? j / 2 * 4 : kind == Kind::k1of4 ? j * 4 : kind == Kind::k2of8 ? j / 2 * 8 : j / 4 * 8;
}

using quant_linear::Activations;

struct SimtArgs {
  const void *x, *bias;
  quant_linear::QuantizedRows x8;  // where activations are not kFloat
  Activations activations;
  void* out;
  const uint8_t* packed;
  int64_t x_row_stride;
  DType dtype;
  int M, N, K;
  int kept, row_bytes, meta_row_bytes;  // of a row of w
  int tiles_k, groups, group_shift, shared_shift;
  int64_t scales_begin, places_begin;
};

// x[m][k] as the sums want it: for 8-bit activations without the row's unit, which comes in at the end.
TAUT_DEVICE float load_x(const SimtArgs& args, int m, int k) {
  if (args.activations == Activations::kFloat) return load_number(args.x, m * args.x_row_stride + k, args.dtype);
  const int64_t K8 = (int64_t{args.K} + 63) / 64 * 64;
  const uint32_t code = args.x8.codes[m * K8 + sparse_x8_slot(k)];
  if (args.activations == Activations::kFp8Row) return from_e4m3(code);
  const float multiple = args.activations == Activations::kInt8 ? args.x8.multiple[m * (K8 / 32) + k / 32] : 32767.0f;
  return static_cast<float>(static_cast<int8_t>(code)) * multiple;
}

// kBytes bytes of which `valid` are there.
template <int kBytes>
TAUT_DEVICE void load_bytes(uint32_t (&words)[(kBytes + 3) / 4], const uint8_t* source, int valid) {
  using Vector = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes % 8 == 0, uint2, uint32_t>>;
#pragma unroll
  for (int i = 0; i < (kBytes + 3) / 4; i++) words[i] = 0;
  if (kBytes % 4 == 0 && valid >= kBytes && reinterpret_cast<uintptr_t>(source) % sizeof(Vector) == 0) {
    const Vector v = *reinterpret_cast<const Vector*>(source);
    if constexpr (kBytes == 4) words[0] = v;
    if constexpr (kBytes >= 8) words[0] = v.x, words[1] = v.y;
    if constexpr (kBytes >= 16) words[2] = v.z, words[3] = v.w;
    if constexpr (kBytes == 32) {
      const Vector next = reinterpret_cast<const Vector*>(source)[1];
      words[4] = next.x, words[5] = next.y, words[6] = next.z, words[7] = next.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; i++)
      if (i < valid) words[i / 4] |= uint32_t{source[i]} << (i % 4 * 8);
  }
}

// What is kept of 32 k of a row: the codes in the order of k, 4 or 8 bits each, and their places, a string of bits.
template <Format kFormat, Kind kKind>
struct Kept {
  static constexpr int kBits = static_cast<int>(code_bits(kFormat)), kCount = kept_of(kKind), kPlaceBits = place_bits_of(kKind);
  static constexpr int kCodeBytes = kCount * kBits / 8, kPlaceBytes = kCount * kPlaceBits / 8;
  uint32_t codes[kCodeBytes / 4], places[(kPlaceBytes + 3) / 4];
  float scale;

  // Block `block` of 32 k of row n; both exist.
  TAUT_DEVICE void load(const SimtArgs& args, int n, int block) {
    const int group = block * 32 >> args.group_shift;
    const uint8_t* places_at = args.packed + args.places_begin;
    if constexpr (is_16bit(kFormat)) scale = 1.0f;
    if constexpr (kKind == Kind::kTiled) {
      // 16 kept numbers are a k16-step of the tile's fragments, 4 of them in a word of each lane of the row's quad: 2t, 2t+8, 2t+1, 2t+9.
      const int step = block % 4, strip = n % 64 / 16, upper = n % 16 / 8, g = n % 8;
      const int64_t tile = int64_t{n / 64} * args.tiles_k + block / 4;
      const auto* tile_codes = reinterpret_cast<const uint32_t*>(args.packed + tile * (kBits * 512));
      if constexpr (kBits == 16) {  // the registers of row g + 8 * upper, of each lane of the quad: 2t and 2t + 8, and their neighbours
#pragma unroll
        for (int t = 0; t < 4; t++) {
          const uint32_t* at = tile_codes + ((strip * 4 + step) * 32 + g * 4 + t) * 4 + upper;
          codes[t] = at[0], codes[t + 4] = at[2];
        }
      } else {
#pragma unroll
        for (int i = 0; i < kCodeBytes / 4; i++) codes[i] = 0;
      }
#pragma unroll
      for (int t = 0; t < (kBits == 16 ? 0 : 4); t++) {
        const int at = kBits == 4 ? (strip * 32 + g * 4 + t) * 4 + step : ((strip * 2 + step / 2) * 32 + g * 4 + t) * 4 + step % 2 * 2 + upper;
        const uint32_t word = kBits == 4 ? tile_codes[at] >> (4 * upper) : tile_codes[at];
        constexpr int kOffset[4] = {0, 8, 1, 9};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int j = 2 * t + kOffset[i];
          codes[j * kBits / 32] |= (word >> (8 * i) & ((1u << kBits) - 1)) << (j * kBits % 32);
        }
      }
      const auto* words =
          reinterpret_cast<const uint32_t*>(places_at) + tile * SparseTiles::kTilePlaces + n % 64 / 32 * 128 + (g * 4 + n % 32 / 16 * 2) * 4 + step;
      places[0] = (words[0] >> (16 * upper) & 0xffffu) | words[4] >> (16 * upper) << 16;
      if constexpr (!is_16bit(kFormat))
        scale =
            __half2float(reinterpret_cast<const __half*>(args.packed + args.scales_begin)[(int64_t{n / 64} * args.groups + group) * 64 + g * 8 + n % 64 / 8]);
    } else {
      const int code_at = block * kCodeBytes, place_at = block * kPlaceBytes;
      load_bytes<kCodeBytes>(codes, args.packed + int64_t{n} * args.row_bytes + code_at, args.row_bytes - code_at);
      load_bytes<kPlaceBytes>(places, places_at + int64_t{n >> args.shared_shift} * args.meta_row_bytes + place_at, args.meta_row_bytes - place_at);
      if constexpr (!is_16bit(kFormat))
        scale = __half2float(reinterpret_cast<const __half*>(args.packed + args.scales_begin)[int64_t{n} * args.groups + group]);
    }
  }
  TAUT_DEVICE float number(int j) const {
    const uint32_t code = codes[j * kBits / 32] >> (j * kBits % 32) & ((1u << kBits) - 1);
    if constexpr (kFormat == Format::kInt4) return static_cast<float>(static_cast<int>(code) - 8);
    else if constexpr (kFormat == Format::kInt8) return static_cast<float>(static_cast<int8_t>(code));
    else if constexpr (is_16bit(kFormat)) return from_16bit<kFormat>(code);
    else return from_e4m3(code);
  }
  TAUT_DEVICE int place(int j) const {
    const int bit = j * kPlaceBits;
    uint32_t value = places[bit / 32] >> (bit % 32);
    if (bit % 32 + kPlaceBits > 32) value |= places[bit / 32 + 1] << (32 - bit % 32);
    return static_cast<int>(value & ((1u << kPlaceBits) - 1));
  }
};

// WHY 2 blocks: without a number nvcc spills a register of some instances to fit one block more than it was asked for.
template <Format kFormat, Kind kKind, int kRows>
__global__ void __launch_bounds__(kThreads, 2) sparse_simt(const SimtArgs args) {
  constexpr int kChunk = kStaged / kRows, kPadded = kChunk + kChunk / 32;  // k of a row of x at once: a multiple of 1024
  __shared__ float s_x[kRows * kPadded];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int tiles_m = (args.M + kRows - 1) / kRows;
  const int n0 = static_cast<int>(blockIdx.x / tiles_m) * kBlockRows + warp * kWarpRows, m0 = static_cast<int>(blockIdx.x % tiles_m) * kRows;
  float sum[kWarpRows][kRows] = {};
  for (int k0 = 0; k0 < args.K; k0 += kChunk) {
    const int count = min(kChunk, args.K - k0), padded = (count + 31) / 32 * 32;
    __syncthreads();  // all are done with the last chunk
    for (int m = 0; m < kRows; m++)
      for (int k = threadIdx.x; k < padded; k += kThreads) s_x[m * kPadded + k + k / 32] = m0 + m < args.M && k < count ? load_x(args, m0 + m, k0 + k) : 0.0f;
    __syncthreads();
    for (int block = lane; block * 32 < count; block += 32) {
      Kept<kFormat, kKind> kept[kWarpRows];
#pragma unroll
      for (int r = 0; r < kWarpRows; r++)
        if (n0 + r < args.N) kept[r].load(args, n0 + r, k0 / 32 + block);
      const float* s_block = s_x + block * 33;
      const int valid = args.kept - (k0 / 32 + block) * kept_of(kKind);
#pragma unroll
      for (int r = 0; r < kWarpRows; r++) {
        if (n0 + r >= args.N) break;
        float part[kRows] = {};
#pragma unroll
        for (int j = 0; j < kept_of(kKind); j++) {
          if (j >= valid) break;
          const float number = kept[r].number(j);
          const float* at = s_block + block_of(kKind, j) + kept[r].place(j);
#pragma unroll
          for (int m = 0; m < kRows; m++) part[m] = fmaf(number, at[m * kPadded], part[m]);
        }
#pragma unroll
        for (int m = 0; m < kRows; m++) sum[r][m] = fmaf(kept[r].scale, part[m], sum[r][m]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kWarpRows; r++) {
#pragma unroll
    for (int m = 0; m < kRows; m++) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum[r][m] += __shfl_xor_sync(0xffffffffu, sum[r][m], step);
      const int n = n0 + r;
      if (lane == 0 && n < args.N && m0 + m < args.M) {
        if (args.activations != Activations::kFloat) sum[r][m] *= args.x8.row_unit[m0 + m];
        const float bias = args.bias ? load_number(args.bias, n, args.dtype) : 0.0f;
        store_number(args.out, static_cast<int64_t>(m0 + m) * args.N + n, args.dtype, sum[r][m] + bias);
      }
    }
  }
}

}  // namespace

void run(const CudaParams& p) {
  const SparseTiles w = p.sparse();
  const bool tiled = w.is_tiled();
  SimtArgs args{};
  args.x = p.x, args.bias = p.bias, args.out = p.out, args.packed = p.packed, args.x_row_stride = p.x_row_stride, args.dtype = p.dtype;
  args.x8 = p.x8, args.activations = p.activations;
  args.M = static_cast<int>(p.M), args.N = static_cast<int>(w.spec.N), args.K = static_cast<int>(w.spec.K);
  args.kept = static_cast<int>(w.kept()), args.row_bytes = static_cast<int>(w.kept_row_bytes()), args.meta_row_bytes = static_cast<int>(w.meta_row_bytes());
  args.tiles_k = static_cast<int>(w.kept_tiles().num_tiles_k());
  args.groups = static_cast<int>(tiled ? w.kept_tiles().num_groups() : w.spec.num_groups());
  args.group_shift = w.spec.group_size == 0 ? 31 : w.spec.group_size == 32 ? 5 : w.spec.group_size == 64 ? 6 : 7;
  args.shared_shift = w.pattern.v == 16 ? 4 : w.pattern.v == 8 ? 3 : 0;
  args.scales_begin = tiled ? w.kept_tiles().scales_begin() : w.scales_begin(), args.places_begin = w.places_begin();
  const auto with_rows = [&]<Format kFormat, Kind kKind, int kRows>() {
    const int64_t tiles = (p.M + kRows - 1) / kRows * ((w.spec.N + kBlockRows - 1) / kBlockRows);
    launch("sparse_linear simt", sparse_simt<kFormat, kKind, kRows>, dim3(static_cast<unsigned>(tiles)), dim3(kThreads), 0, p.stream, args);
  };
  const auto with_kind = [&]<Format kFormat, Kind kKind>() {
    if (args.M == 1) with_rows.template operator()<kFormat, kKind, 1>();
    else if (args.M == 2) with_rows.template operator()<kFormat, kKind, 2>();
    else if (args.M <= 4) with_rows.template operator()<kFormat, kKind, 4>();
    else with_rows.template operator()<kFormat, kKind, 8>();
  };
  const auto with_format = [&]<Format kFormat>() {
    if (tiled) with_kind.template operator()<kFormat, Kind::kTiled>();
    else if (w.pattern.m == 4) with_kind.template operator()<kFormat, Kind::k1of4>();
    else if (w.pattern.n == 2) with_kind.template operator()<kFormat, Kind::k2of8>();
    else with_kind.template operator()<kFormat, Kind::k4of8>();
  };
  if (w.spec.format == Format::kInt4) with_format.template operator()<Format::kInt4>();
  else if (w.spec.format == Format::kInt8) with_format.template operator()<Format::kInt8>();
  else if (w.spec.format == Format::kFp16) with_format.template operator()<Format::kFp16>();
  else if (w.spec.format == Format::kBf16) with_format.template operator()<Format::kBf16>();
  else with_format.template operator()<Format::kFp8E4M3>();
}

}  // namespace taut::sparse_linear::cuda_sm75_simt
