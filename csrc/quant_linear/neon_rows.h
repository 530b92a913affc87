// Strips of out back, in any of the three dtypes (rows of x in: rows_prologue.h): shared by the ARM kernels. Base ARMv8
// instructions only.
#pragma once

#include <arm_neon.h>

#include <cstring>
#include <utility>

#include "quant_linear/op.h"
#include "quant_linear/rows_prologue.h"

namespace taut::quant_linear {
namespace {

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

inline void prefetch_write(const char* p) { __builtin_prefetch(p, 1); }

inline float32x4_t load4_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline float32x4_t load4_fp16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

inline void load_halves(const uint16_t* p, float* out /* [8] */) {
  vst1q_f32(out, load4_fp16(p));
  vst1q_f32(out + 4, load4_fp16(p + 4));
}

inline uint16x4_t to_bf16(float32x4_t v) {  // round to nearest even; NaN stays NaN
  const uint32x4_t bits = vreinterpretq_u32_f32(v), top = vshrq_n_u32(bits, 16);
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(vandq_u32(top, vdupq_n_u32(1)), vdupq_n_u32(0x7fff))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vorrq_u32(top, vdupq_n_u32(0x40))));
}

inline float32x4_t load4_any(const void* base, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return vld1q_f32(static_cast<const float*>(base) + index);
  const uint16_t* p = static_cast<const uint16_t*>(base) + index;
  return dtype == DType::kBFloat16 ? load4_bf16(p) : load4_fp16(p);
}

// Eight results of row m, columns [8*strip, 8*strip+8): sums * unit plus bias plus residual, into out; columns past N are dropped.
template <DType kDType>
inline void store_strip(const Params& p, int64_t m, int64_t strip, const float* tile /* [8] */, float unit) {
  const int64_t N = p.weight.N;
  for (int64_t n = strip * 8, end = std::min(N, n + 8); n < end; n += 4, tile += 4) {
    const int64_t at = m * N + n;
    float32x4_t sums = vmulq_n_f32(vld1q_f32(tile), unit);
    if (n + 4 <= end) {
      if (p.bias) sums = vaddq_f32(sums, load4_any(p.bias, n, kDType));
      if (p.residual) sums = vaddq_f32(sums, load4_any(p.residual, at, kDType));
      if (kDType == DType::kFloat32) vst1q_f32(static_cast<float*>(p.out) + at, sums);
      else vst1_u16(static_cast<uint16_t*>(p.out) + at, kDType == DType::kBFloat16 ? to_bf16(sums) : vreinterpret_u16_f16(vcvt_f16_f32(sums)));
      continue;
    }
    float values[4];
    vst1q_f32(values, sums);
    for (int64_t i = 0; n + i < end; i++) {
      if (p.bias) values[i] += load_float(p.bias, n + i, kDType);
      if (p.residual) values[i] += load_float(p.residual, at + i, kDType);
      store_float(p.out, at + i, kDType, values[i]);
    }
  }
}

}  // namespace
}  // namespace taut::quant_linear
