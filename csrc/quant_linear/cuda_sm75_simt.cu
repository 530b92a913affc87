// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, bias, out fp32, bf16 or fp16, or x as 8-bit codes; products and sums in fp32
// LAYOUT    w: MmaTiles (common/formats.h), a strip of 16 n: lane (g, t) owns rows g and g + 8, and of each 16 k the 2t, 2t+1, 2t+8, 2t+9
// WORK      a block makes 16 n x kTokens m; its 8 warps take k-tiles (64 k) in turn. A lane turns its 16 or 32 bytes of w into fp32 once and
//           multiplies them into kTokens sums a row; x comes as fp32 through shared memory. Then the quad's four sums are added by shuffles,
//           and the warps' in order through shared memory. The order of an output's sum knows neither M nor kTokens: batch invariant.
// BOUND     M = 1: DRAM, w read once in 16-byte loads. M large: shared memory, one 8-byte read for four multiply-adds, about half of fp32's peak
// LIMITS    none: any N, K, M, format, group, dtype and activations, from SM 75 on. It uses no tensor cores: the slower path
#include <algorithm>
#include <type_traits>

#include "common/launch.h"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "quant_linear/op.h"

namespace taut::quant_linear::cuda_sm75_simt {
namespace {

constexpr int kWarps = 8, kTileK = 64;

struct Args {
  const void* x;  // [M, K] of dtype, for float activations
  int64_t x_row_stride;
  QuantizedRows x8;      // for the others
  const uint8_t* codes;  // MmaTiles' sections
  const __half* scales;
  const uint8_t* zeros;  // or nullptr
  const void* bias;      // or nullptr
  void* out;
  int64_t M, N;
  int K, tiles_k, groups;
  int group_shift;  // of a half k-tile's index, to its group
  DType dtype;
  Activations activations;
};

// x[m][k] as the sums want it: for 8-bit activations without the row's unit, which comes in at the end.
TAUT_DEVICE float load_x(const Args& p, int64_t m, int k) {
  if (m >= p.M || k >= p.K) return 0;
  if (p.activations == Activations::kFloat) return load_number(p.x, m * p.x_row_stride + k, p.dtype);
  const int64_t K8 = int64_t{p.tiles_k} * kTileK;
  const uint32_t code = p.x8.codes[m * K8 + x8_slot(k)];
  if (p.activations == Activations::kFp8Row) return from_e4m3(code);
  const float multiple = p.activations == Activations::kInt8 ? p.x8.multiple[m * (K8 / 32) + k / 32] : 32767.0f;
  return static_cast<float>(static_cast<int8_t>(code)) * multiple;
}

// w[g + 8h] at k16-step `step` of a k-tile, k = 2t, 2t+1, 2t+8, 2t+9.
template <Format kFormat>
TAUT_DEVICE void dequantize(float (&w)[2][4], const uint4 (&fragments)[2], int step, const float (&scale)[2], const float (&zero)[2]) {
  const auto word_of = [](const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; };
#pragma unroll
  for (int h = 0; h < 2; h++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      if constexpr (kFormat == Format::kInt4) {  // nibble h + 2 * (i >= 2), + 4 for odd k
        const uint32_t code = word_of(fragments[0], step) >> (4 * (h + i / 2 * 2 + i % 2 * 4)) & 15u;
        w[h][i] = (static_cast<float>(code) - zero[h]) * scale[h];
      } else {
        const uint32_t code = word_of(fragments[step / 2], step % 2 * 2 + h) >> (8 * (i / 2 + i % 2 * 2)) & 255u;
        w[h][i] = (kFormat == Format::kInt8 ? static_cast<float>(static_cast<int8_t>(code)) : from_e4m3(code)) * scale[h];
      }
    }
}

template <Format kFormat, int kTokens>
__global__ void __launch_bounds__(kWarps * 32, kTokens == 16 ? 2 : 3) simt(Args p) {
  __shared__ __align__(16) float s_x[kWarps][kTokens][kTileK];
  float* const s_sums = &s_x[0][0][0];                             // [kWarps][kTokens][16], once s_x has been read
  constexpr int kStripWords = kFormat == Format::kInt4 ? 32 : 64;  // 16-byte words of a strip's k-tile
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t n0 = int64_t{blockIdx.x} * MmaTiles::kStripN, tile_n = n0 / MmaTiles::kTileN;
  const int strip = static_cast<int>(n0 % MmaTiles::kTileN) / MmaTiles::kStripN;
  const uint4* const g_strip = reinterpret_cast<const uint4*>(p.codes) + (tile_n * p.tiles_k * 4 + strip) * kStripWords + lane;
  const int64_t scale_row = tile_n * p.groups, scale_column = g * 8 + strip * 2;

  for (int64_t m0 = int64_t{blockIdx.y} * kTokens; m0 < p.M; m0 += int64_t{gridDim.y} * kTokens) {
    float sums[2][kTokens] = {};
    for (int tile = warp; tile < p.tiles_k; tile += kWarps) {
      uint4 fragments[2];
      fragments[0] = ptx::ld_global_nc_16(g_strip + int64_t{tile} * (4 * kStripWords));
      if constexpr (kFormat != Format::kInt4) fragments[1] = ptx::ld_global_nc_16(g_strip + int64_t{tile} * (4 * kStripWords) + 32);
#pragma unroll kTokens < 4 ? kTokens : 4
      for (int m = 0; m < kTokens; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) s_x[warp][m][half * 32 + lane] = load_x(p, m0 + m, tile * kTileK + half * 32 + lane);
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; half++) {  // 32 k have one scale
        const int64_t i = (scale_row + ((2 * tile + half) >> p.group_shift)) * MmaTiles::kTileN + scale_column;
        const float scale[2] = {__half2float(p.scales[i]), __half2float(p.scales[i + 1])};
        const float zero[2] = {p.zeros ? static_cast<float>(p.zeros[i]) : 8.0f, p.zeros ? static_cast<float>(p.zeros[i + 1]) : 8.0f};
#pragma unroll
        for (int step = 2 * half; step < 2 * half + 2; step++) {
          float w[2][4];
          dequantize<kFormat>(w, fragments, step, scale, zero);
#pragma unroll
          for (int m = 0; m < kTokens; m++) {
            const float2 low = *reinterpret_cast<const float2*>(&s_x[warp][m][step * 16 + 2 * t]);
            const float2 high = *reinterpret_cast<const float2*>(&s_x[warp][m][step * 16 + 2 * t + 8]);
#pragma unroll
            for (int h = 0; h < 2; h++)
              sums[h][m] = __fmaf_rn(w[h][3], high.y, __fmaf_rn(w[h][2], high.x, __fmaf_rn(w[h][1], low.y, __fmaf_rn(w[h][0], low.x, sums[h][m]))));
          }
        }
      }
      __syncwarp();  // before s_x is written again
    }

    __syncthreads();  // s_x becomes s_sums
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int m = 0; m < kTokens; m++) {
        float sum = sums[h][m];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (t == 0) s_sums[(warp * kTokens + m) * 16 + g + 8 * h] = sum;
      }
    __syncthreads();
    if (threadIdx.x < kTokens * 16) {
      const int64_t m = m0 + threadIdx.x / 16, n = n0 + threadIdx.x % 16;
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; w++) sum += s_sums[w * kTokens * 16 + threadIdx.x];
      if (m < p.M && n < p.N) {
        if (p.activations != Activations::kFloat) sum *= p.x8.row_unit[m];
        if (p.bias) sum += load_number(p.bias, n, p.dtype);
        store_number(p.out, m * p.N + n, p.dtype, sum);
      }
    }
    __syncthreads();
  }
}

}  // namespace

void run(const CudaParams& p) {
  const WeightSpec& w = p.weight;
  const MmaTiles layout{w};
  const Args args{p.x,
                  p.x_row_stride,
                  p.x8,
                  p.packed,
                  reinterpret_cast<const __half*>(p.packed + layout.scales_begin()),
                  w.zeros ? p.packed + layout.zeros_begin() : nullptr,
                  p.bias,
                  p.out,
                  p.M,
                  w.N,
                  static_cast<int>(w.K),
                  static_cast<int>(layout.num_tiles_k()),
                  static_cast<int>(layout.num_groups()),
                  w.group_size == 32    ? 0
                  : w.group_size == 64  ? 1
                  : w.group_size == 128 ? 2
                                        : 31,
                  p.dtype,
                  p.activations};
  const auto with_tokens = [&]<int kTokens>(std::integral_constant<int, kTokens>) {
    const auto kernel = w.format == Format::kInt4   ? simt<Format::kInt4, kTokens>
                        : w.format == Format::kInt8 ? simt<Format::kInt8, kTokens>
                                                    : simt<Format::kFp8E4M3, kTokens>;
    const dim3 grid(static_cast<unsigned>((w.N + MmaTiles::kStripN - 1) / MmaTiles::kStripN),
                    static_cast<unsigned>(std::min<int64_t>((p.M + kTokens - 1) / kTokens, 65535)));
    launch("quant_linear simt", kernel, grid, dim3(kWarps * 32), 0, p.stream, args);
  };
  if (p.M == 1) with_tokens(std::integral_constant<int, 1>{});
  else if (p.M <= 4) with_tokens(std::integral_constant<int, 4>{});
  else with_tokens(std::integral_constant<int, 16>{});
}

}  // namespace taut::quant_linear::cuda_sm75_simt
