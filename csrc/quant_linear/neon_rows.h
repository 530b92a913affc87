// Rows of x in, strips of out back, in any of the three dtypes: shared by the ARM kernels. Base ARMv8 instructions only.
#pragma once

#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))
#define TAUT_LAMBDA __attribute__((always_inline))
#define TAUT_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

// f.operator()<i>() for i = 0 .. count-1. WHY not a loop: lanes and shifts are immediates.
template <class F, int... i>
TAUT_INLINE void for_each_index(std::integer_sequence<int, i...>, F f) {
  (f.template operator()<i>(), ...);
}
template <int count, class F>
TAUT_INLINE void for_each(F f) {
  for_each_index(std::make_integer_sequence<int, count>(), f);
}

inline float32x4_t load4_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline float32x4_t load4_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

// Row m of x as fp32, zero-padded to padded_k: x itself where that is what it already is, else a copy in `buffer`.
inline const float* load_row(const Params& p, int64_t m, int64_t padded_k, float* buffer /* [padded_k] */) {
  const int64_t K = p.weight.K, whole = K / 4 * 4;
  if (p.dtype == DType::kFloat32) {
    const float* x = static_cast<const float*>(p.x) + m * p.x_row_stride;
    if (K == padded_k) return x;
    std::memcpy(buffer, x, K * sizeof(float));
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.x_row_stride;
    if (p.dtype == DType::kBFloat16) {
      for (int64_t k = 0; k < whole; k += 4) vst1q_f32(buffer + k, load4_bf16(x + k));
    } else {
      for (int64_t k = 0; k < whole; k += 4) vst1q_f32(buffer + k, load4_fp16(x + k));
    }
    for (int64_t k = whole; k < K; k++) buffer[k] = load_float(x, k, p.dtype);
  }
  std::memset(buffer + K, 0, (padded_k - K) * sizeof(float));
  return buffer;
}

inline uint16x4_t to_bf16(float32x4_t v) {  // round to nearest even; NaN stays NaN
  const uint32x4_t bits = vreinterpretq_u32_f32(v), top = vshrq_n_u32(bits, 16);
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(vandq_u32(top, vdupq_n_u32(1)), vdupq_n_u32(0x7fff))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(top, vdupq_n_u32(0x40))));
}

// Eight results of row m, columns [8*strip, 8*strip+8): sums * unit plus bias, into out; columns past N are dropped.
inline void store_strip(const Params& p, int64_t m, int64_t strip, const float* tile /* [8] */, float unit) {
  const int64_t N = p.weight.N, n = strip * 8, at = m * N + n;
  for (int half = 0; half < 8; half += 4) {
    float32x4_t sums = vmulq_n_f32(vld1q_f32(tile + half), unit);
    if (n + half + 4 > N) {
      float values[4];
      vst1q_f32(values, sums);
      for (int64_t i = 0; n + half + i < N; i++)
        store_float(p.out, at + half + i, p.dtype, values[i] + (p.bias ? load_float(p.bias, n + half + i, p.dtype) : 0.0f));
      return;
    }
    if (p.dtype == DType::kFloat32) {
      if (p.bias) sums = vaddq_f32(sums, vld1q_f32(static_cast<const float*>(p.bias) + n + half));
      vst1q_f32(static_cast<float*>(p.out) + at + half, sums);
    } else if (p.dtype == DType::kBFloat16) {
      if (p.bias) sums = vaddq_f32(sums, load4_bf16(static_cast<const uint16_t*>(p.bias) + n + half));
      vst1_u16(static_cast<uint16_t*>(p.out) + at + half, to_bf16(sums));
    } else {
      if (p.bias) sums = vaddq_f32(sums, load4_fp16(static_cast<const uint16_t*>(p.bias) + n + half));
      vst1_u16(static_cast<uint16_t*>(p.out) + at + half, vreinterpret_u16_f16(vcvt_f16_f32(sums)));
    }
  }
}

}  // namespace
}  // namespace taut::quant_linear
