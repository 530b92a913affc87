// COMPUTES  QuantizedRows (op.h) of x fp32, bf16 or fp16: 8-bit codes, row_unit, and for kInt8 the multiples. Every step is one fp32
//           operation, rounded to nearest, in the order of quantize_row (cpu_scalar.cpp): the CPU's bits.
// LAYOUT    x row-major with a row stride; codes [M, K8] in x8_slot or sparse_x8_slot order, 16-byte stores; multiple [M, K8/32]
// WORK      kWarps warps take a row. A thread takes 16 consecutive k at a time: the quarter of a k16-step of w's tiles that it writes is
//           whole, and two neighbours hold a group of 32. Pass 1 finds the row's maximum; pass 2 reads x again, from L1 or L2, and rounds.
// BOUND     DRAM: x is read once, 2 or 4 bytes a number, and a byte a number is written
// LIMITS    none: any M, K and row stride; rows that are not 16-byte aligned are read number by number
#include <algorithm>
#include <cstring>

#include "common/launch.h"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "quant_linear/op.h"

namespace taut::quant_linear::cuda_sm75_quantize_rows {
namespace {

constexpr int kUnit = 16;  // k a thread takes at a time

template <class T>
TAUT_DEVICE void load_unit(float (&values)[kUnit], const T* row, int k0, int K, bool aligned) {
  if (aligned && k0 + kUnit <= K) {
    constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
    for (int v = 0; v < kUnit / kPerVector; v++) {
      const uint4 bits = reinterpret_cast<const uint4*>(row + k0)[v];
      T numbers[kPerVector];
      memcpy(static_cast<void*>(numbers), &bits, 16);
#pragma unroll
      for (int i = 0; i < kPerVector; i++) values[v * kPerVector + i] = to_float(numbers[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnit; i++) values[i] = k0 + i < K ? to_float(row[k0 + i]) : 0.0f;
  }
}

// WHY on the bits: as unsigned integers magnitudes order as they do as floats, and a NaN or an infinity lies above all numbers.
TAUT_DEVICE uint32_t max_magnitude(const float (&values)[kUnit]) {
  uint32_t result = 0;
#pragma unroll
  for (int i = 0; i < kUnit; i++) result = max(result, __float_as_uint(values[i]) & 0x7fffffffu);
  return result;
}

// To x8_slot order: slot 4t + i of 16 holds k = {2t, 2t+8, 2t+1, 2t+9}[i].
TAUT_DEVICE uint4 in_slots(const uint32_t (&codes)[kUnit]) {
  uint32_t words[4];
#pragma unroll
  for (int t = 0; t < 4; t++) words[t] = codes[2 * t] | codes[2 * t + 8] << 8 | codes[2 * t + 1] << 16 | codes[2 * t + 9] << 24;
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// To sparse_x8_slot order: of 32 k the blocks of 4 stand as 0, 4, 1, 5, 2, 6, 3, 7. Lanes of even number have the first 16 k and store the first four
// blocks; they give the third and fourth of theirs for the first and second of the next lane's.
TAUT_DEVICE uint4 in_sparse_slots(const uint32_t (&codes)[kUnit]) {
  uint32_t words[4];
#pragma unroll
  for (int b = 0; b < 4; b++) words[b] = codes[4 * b] | codes[4 * b + 1] << 8 | codes[4 * b + 2] << 16 | codes[4 * b + 3] << 24;
  const bool upper = threadIdx.x % 2;
  const uint32_t first = __shfl_xor_sync(0xffffffffu, upper ? words[0] : words[2], 1), second = __shfl_xor_sync(0xffffffffu, upper ? words[1] : words[3], 1);
  return upper ? make_uint4(first, words[2], second, words[3]) : make_uint4(words[0], first, words[1], second);
}

template <class T, Activations kActivations, int kWarps /* of a row */, int kRows /* of a block */>
__global__ void __launch_bounds__(32 * kWarps * kRows)
    quantize_rows(const T* __restrict__ x /* [M, K] */, int64_t x_row_stride, int64_t M, int K, bool for_sparse, uint8_t* __restrict__ codes /* [M, K8] */,
                  float* __restrict__ row_unit /* [M] */, float* __restrict__ multiple /* [M, K8/32], kInt8 */) {
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_launch();  // the product may begin with w, and wait
#endif
  __shared__ uint32_t s_max[kRows][kWarps];
  constexpr int kThreads = 32 * kWarps;
  const int row = threadIdx.x / kThreads, thread = threadIdx.x % kThreads, K8 = (K + 63) / 64 * 64, units = K8 / kUnit;
  for (int64_t m0 = int64_t{blockIdx.x} * kRows; m0 < M; m0 += int64_t{gridDim.x} * kRows) {  // the same for the whole block: it meets at barriers
    const int64_t m = m0 + row;
    const bool exists = m < M;
    const T* const x_row = x + (exists ? m : 0) * x_row_stride;
    const bool aligned = reinterpret_cast<uintptr_t>(x_row) % 16 == 0;

    // Pass 1: the row's maximum.
    uint32_t max_bits = 0;
    float values[kUnit];
    for (int unit = thread; exists && unit < units; unit += kThreads) {
      load_unit(values, x_row, unit * kUnit, K, aligned);
      max_bits = max(max_bits, max_magnitude(values));
    }
#pragma unroll
    for (int step = 16; step; step /= 2) max_bits = max(max_bits, __shfl_xor_sync(0xffffffffu, max_bits, step));
    if constexpr (kWarps > 1) {
      if (thread % 32 == 0) s_max[row][thread / 32] = max_bits;
      __syncthreads();
#pragma unroll
      for (int warp = 0; warp < kWarps; warp++) max_bits = max(max_bits, s_max[row][warp]);
      __syncthreads();  // before the next row's maxima
    }
    const bool is_number = max_bits < 0x7f800000u;
    const float row_max = __uint_as_float(max_bits);
    const bool rounds = is_number && row_max >= kSmallestRowMax;  // else the codes are zeros

    // Pass 2: the codes. WHY whole warps run the loop: two neighbours share a group's maximum by a shuffle.
    float steps = 0, inverse = 0;
    if constexpr (kActivations == Activations::kFp8Row) {
      if (rounds) inverse = __fdiv_rn(448.0f, row_max);
    } else {
      if (rounds) steps = __fdiv_rn(32767.0f, row_max);
      inverse = __fdiv_rn(__fmul_rn(steps, 127.0f), 32767.0f);  // of kInt8Row
    }
    for (int unit0 = thread / 32 * 32; unit0 < units; unit0 += kThreads) {
      const int unit = unit0 + thread % 32;
      const bool mine = exists && unit < units;
#pragma unroll
      for (int i = 0; i < kUnit; i++) values[i] = 0;
      if (mine && rounds) load_unit(values, x_row, unit * kUnit, K, aligned);
      if constexpr (kActivations == Activations::kInt8) {
        uint32_t group_bits = max_magnitude(values);
        group_bits = max(group_bits, __shfl_xor_sync(0xffffffffu, group_bits, 1));
        const float m_row = fminf(fmaxf(ceilf(__fmul_rn(__uint_as_float(group_bits), steps)), 1.0f), 32767.0f);
        inverse = __fdiv_rn(__fmul_rn(steps, 127.0f), m_row);
        if (mine && unit % 2 == 0) multiple[m * (K8 / 32) + unit / 2] = m_row;
      }
      uint32_t bytes[kUnit];
#pragma unroll
      for (int i = 0; i < kUnit; i++) {
        const float scaled = __fmul_rn(values[i], inverse);
        if constexpr (kActivations == Activations::kFp8Row) bytes[i] = to_e4m3(scaled);
        else bytes[i] = static_cast<uint32_t>(static_cast<int>(fminf(fmaxf(rintf(scaled), -127.0f), 127.0f))) & 255u;
      }
      const uint4 slots = for_sparse ? in_sparse_slots(bytes) : in_slots(bytes);
      if (mine) *reinterpret_cast<uint4*>(codes + m * K8 + unit * kUnit) = slots;
    }
    if (exists && thread == 0) {
      constexpr float kDivisor = kActivations == Activations::kFp8Row ? 448.0f : 127.0f * 32767.0f;
      row_unit[m] = is_number ? __fdiv_rn(row_max, kDivisor) : __uint_as_float(0x7fc00000u);
    }
  }
}

template <int kWarps, int kRows>
void launch_rows(const CudaParams& p, bool for_sparse, uint8_t* codes, float* row_unit, float* multiple) {
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>((p.M + kRows - 1) / kRows, 1 << 30)));
  with_dtype(p.dtype, [&]<class T>(T) {
    const auto kernel = p.activations == Activations::kInt8      ? quantize_rows<T, Activations::kInt8, kWarps, kRows>
                        : p.activations == Activations::kInt8Row ? quantize_rows<T, Activations::kInt8Row, kWarps, kRows>
                                                                 : quantize_rows<T, Activations::kFp8Row, kWarps, kRows>;
    launch("quantize_rows", kernel, grid, dim3(32 * kWarps * kRows), 0, p.stream, static_cast<const T*>(p.x), p.x_row_stride, p.M, static_cast<int>(p.weight.K),
           for_sparse, codes, row_unit, multiple);
  });
}

}  // namespace

// A warp for a short row, so that a block holds several; else as many warps as leave a thread no more than a few units.
void run(const CudaParams& p, bool for_sparse, uint8_t* codes, float* row_unit, float* multiple) {
  if (p.M == 0) return;
  if (p.weight.K <= 1024) launch_rows<1, 8>(p, for_sparse, codes, row_unit, multiple);
  else if (p.weight.K <= 8192) launch_rows<8, 1>(p, for_sparse, codes, row_unit, multiple);
  else launch_rows<32, 1>(p, for_sparse, codes, row_unit, multiple);
}

}  // namespace taut::quant_linear::cuda_sm75_quantize_rows
