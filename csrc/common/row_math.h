// Arithmetic on rows that several ops share: conversion to and from fp32, RMS norm, gated units. Written with the compiler's
// vectors, which become what the file's flags allow: one ymm, two xmm or two NEON registers. Single IEEE operations in a fixed
// order: every ISA gives the same bits.
#pragma once

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common/dtypes.h"

namespace taut {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))

// WHY never passed or returned by value: without AVX such a vector has no register to travel in, and the ABI varies.
typedef float FloatLanes __attribute__((vector_size(32)));
typedef int32_t IntLanes __attribute__((vector_size(32)));
typedef uint32_t UintLanes __attribute__((vector_size(32)));
typedef uint16_t HalfLanes __attribute__((vector_size(16)));

// Lane by lane, `yes` where `left` compares so with `right`, else `no`. WHY not ?: on ARM: gcc compares 32 bytes a lane at a time.
#if defined(__aarch64__) && __has_builtin(__builtin_shufflevector)
#define TAUT_LOW(x) __builtin_shufflevector(x, x, 0, 1, 2, 3)
#define TAUT_HIGH(x) __builtin_shufflevector(x, x, 4, 5, 6, 7)
#define TAUT_SELECT(left, compares, right, yes, no)                                                      \
  __extension__({                                                                                        \
    const FloatLanes left_ = (left), right_ = (right) - FloatLanes{};                                    \
    const auto yes_ = (yes), no_ = (no);                                                                 \
    const auto low_ = (TAUT_LOW(left_) compares TAUT_LOW(right_)) ? TAUT_LOW(yes_) : TAUT_LOW(no_);      \
    const auto high_ = (TAUT_HIGH(left_) compares TAUT_HIGH(right_)) ? TAUT_HIGH(yes_) : TAUT_HIGH(no_); \
    __builtin_shufflevector(low_, high_, 0, 1, 2, 3, 4, 5, 6, 7);                                        \
  })
#else
#define TAUT_SELECT(left, compares, right, yes, no) (((left)compares(right)) ? (yes) : (no))
#endif

template <class F>
TAUT_INLINE void for_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<DType::kFloat32>();
    case DType::kBFloat16: return f.template operator()<DType::kBFloat16>();
    case DType::kFloat16: return f.template operator()<DType::kFloat16>();
  }
}

// Elements [index, index + count) as fp32; what is past count is zero.
template <DType kDType>
TAUT_INLINE void load_lanes(FloatLanes& v, const void* base, int64_t index, int64_t count = 8) {
  if (count < 8) {
    alignas(32) float values[8] = {};
    for (int64_t i = 0; i < count; i++) values[i] = load_float(base, index + i, kDType);
    std::memcpy(&v, values, 32);
  } else if constexpr (kDType == DType::kFloat32) {
    std::memcpy(&v, static_cast<const float*>(base) + index, 32);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(base) + index;
    if constexpr (kDType == DType::kBFloat16) {
      HalfLanes bits;
      std::memcpy(&bits, p, 16);
      v = reinterpret_cast<FloatLanes>(__builtin_convertvector(bits, UintLanes) << 16);
    } else {
#if defined(__F16C__)
      v = reinterpret_cast<FloatLanes>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__ARM_NEON)
      const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(p));
      alignas(32) float values[8];
      vst1q_f32(values, vcvt_f32_f16(vget_low_f16(halves)));
      vst1q_f32(values + 4, vcvt_f32_f16(vget_high_f16(halves)));
      std::memcpy(&v, values, 32);
#else
      for (int i = 0; i < 8; i++) v[i] = fp16_to_float(p[i]);
#endif
    }
  }
}

template <DType kDType>
TAUT_INLINE void store_lanes(const FloatLanes& v, void* base, int64_t index, int64_t count = 8) {
  if (count < 8) {
    for (int64_t i = 0; i < count; i++) store_float(base, index + i, kDType, v[i]);
  } else if constexpr (kDType == DType::kFloat32) {
    std::memcpy(static_cast<float*>(base) + index, &v, 32);
  } else {
    uint16_t* p = static_cast<uint16_t*>(base) + index;
    if constexpr (kDType == DType::kBFloat16) {  // round to nearest even; NaN stays NaN
      const UintLanes bits = reinterpret_cast<UintLanes>(v);
      const UintLanes rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, quiet = bits >> 16 | 0x40u;
      const HalfLanes out = __builtin_convertvector(TAUT_SELECT(v, ==, v, rounded, quiet), HalfLanes);
      std::memcpy(p, &out, 16);
    } else {
#if defined(__F16C__)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
      float32x4_t halves[2];
      std::memcpy(halves, &v, 32);
      vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(halves[0]), halves[1])));
#else
      for (int i = 0; i < 8; i++) p[i] = float_to_fp16(v[i]);
#endif
    }
  }
}

TAUT_INLINE float sum_lanes(const FloatLanes& v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// x to e^x, within 2 units in the last place; 0 below -87 (where fp32 is about to be subnormal), infinity above 88.72.
TAUT_INLINE void exp_lanes(FloatLanes& x) {
  const FloatLanes input = x, magic = FloatLanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  x = TAUT_SELECT(x, >, -87.0f, x, FloatLanes{} - 87.0f);          // a NaN too
  const FloatLanes shifted = x * 1.44269504f + magic, n = shifted - magic;
  const FloatLanes r = x - n * 0.693359375f - n * -2.12194440e-4f;
  FloatLanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const FloatLanes power = reinterpret_cast<FloatLanes>(reinterpret_cast<IntLanes>(p) + (reinterpret_cast<IntLanes>(shifted) << 23));
  const FloatLanes not_small = TAUT_SELECT(input, <, -87.0f, FloatLanes{}, power);
  const FloatLanes bounded = TAUT_SELECT(input, >, 88.72f, FloatLanes{} + __builtin_inff(), not_small);
  x = TAUT_SELECT(input, ==, input, bounded, input);
}

// x to x * sigmoid(x)
TAUT_INLINE void silu_lanes(FloatLanes& x) {
  FloatLanes e = -x;
  exp_lanes(e);
  x = x / (e + 1.0f);
}

// x to x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))), by 1 + tanh(u) = 2 * sigmoid(2u)
TAUT_INLINE void gelu_tanh_lanes(FloatLanes& x) {
  FloatLanes e = (x * x * x * 0.044715f + x) * -1.5957691216057308f;
  exp_lanes(e);
  x = x / (e + 1.0f);
}

// x to x/2 * (1 + erf(x / sqrt(2)))
TAUT_INLINE void gelu_erf_lanes(FloatLanes& x) {
  const FloatLanes a = x * 0.70710678118654752f, s = a * a, t = reinterpret_cast<FloatLanes>(reinterpret_cast<UintLanes>(a) & 0x7fffffffu);
  FloatLanes small = s * -5.96761703e-4f + 4.99119423e-3f;
  small = small * s - 2.67681349e-2f;
  small = small * s + 1.12819925e-1f;
  small = small * s - 3.76125336e-1f;
  small = small * s + 1.28379166e-1f;
  small = small * a + a;
  FloatLanes large = (t * -1.72853470e-5f + 3.83197126e-4f) * s + (t * -3.88396438e-3f + 2.42546219e-2f);
  large = large * t - 1.06777877e-1f;
  large = large * t - 6.34846687e-1f;
  large = large * t - 1.28717512e-1f;
  large = large * t - t;
  exp_lanes(large);
  large = 1.0f - large;
  large = TAUT_SELECT(a, <, 0.0f, -large, large);
  x = x * 0.5f * (1.0f + TAUT_SELECT(t, >, 0.927734375f, large, small));
}

// x to tanh(x); a polynomial near zero, where 1 - 2 / (1 + e^2x) would lose digits
TAUT_INLINE void tanh_lanes(FloatLanes& x) {
  const FloatLanes s = x * x, t = reinterpret_cast<FloatLanes>(reinterpret_cast<UintLanes>(x) & 0x7fffffffu);
  FloatLanes small = s * -5.70498872745e-3f + 2.06390887954e-2f;
  small = small * s - 5.37397155531e-2f;
  small = small * s + 1.33314422036e-1f;
  small = small * s - 3.33332819422e-1f;
  small = small * s * x + x;
  FloatLanes e = x + x;
  exp_lanes(e);
  x = TAUT_SELECT(t, >, 0.625f, 1.0f - 2.0f / (e + 1.0f), small);
}

// out[K] = row as fp32; returns the sum of its squares, kept in 32 lanes.
template <DType kDType>
TAUT_INLINE float load_and_square(const void* base, int64_t index, int64_t K, float* out) {
  FloatLanes sum[4] = {};
  int64_t k = 0;
  for (; k + 32 <= K; k += 32)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      FloatLanes v;
      load_lanes<kDType>(v, base, index + k + i * 8);
      store_lanes<DType::kFloat32>(v, out, k + i * 8);
      sum[i] += v * v;
    }
  for (int i = 0; k < K; k += 8, i++) {
    FloatLanes v;
    const int64_t count = std::min<int64_t>(8, K - k);
    load_lanes<kDType>(v, base, index + k, count);
    store_lanes<DType::kFloat32>(v, out, k, count);
    sum[i] += v * v;
  }
  const FloatLanes total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  return sum_lanes(total);
}

// What RMS norm multiplies a row by.
TAUT_INLINE float inverse_rms(float sum_of_squares, int64_t K, float eps) { return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(K) + eps); }

// out[K] = row * rsqrt(mean(row^2) + eps) * (offset + weight)
inline void rms_norm_row(const void* base, int64_t index, DType dtype, int64_t K, const void* weight, DType weight_dtype, float eps, float offset, float* out) {
  float sum = 0;
  for_dtype(dtype, [&]<DType kDType>() { sum = load_and_square<kDType>(base, index, K, out); });
  const float inverse = inverse_rms(sum, K, eps);
  for_dtype(weight_dtype, [&]<DType kDType>() {
    for (int64_t k = 0; k < K; k += 8) {
      const int64_t count = std::min<int64_t>(8, K - k);
      FloatLanes v, w;
      load_lanes<DType::kFloat32>(v, out, k, count);
      load_lanes<kDType>(w, weight, k, count);
      store_lanes<DType::kFloat32>(v * inverse * (w + offset), out, k, count);
    }
  });
}

}  // namespace
}  // namespace taut
