// Conversions between stored numbers and fp32 in kernels: the same bits on every SM, in the emulator and on the CPU.
#pragma once

#include <cstring>
#include <type_traits>

#include "common/cuda.cuh"
#include "common/dtypes.h"
#include "common/formats.h"

namespace taut {

TAUT_DEVICE float to_float(float value) { return value; }
TAUT_DEVICE float to_float(__half value) { return __half2float(value); }
TAUT_DEVICE float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// The fp16 in the low and in the high half of a word.
TAUT_DEVICE float lower_half(uint32_t word) { return __half2float(__ushort_as_half(static_cast<unsigned short>(word & 0xffffu))); }
TAUT_DEVICE float upper_half(uint32_t word) { return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16))); }

// An fp16 or bf16 by its bits.
template <Format kFormat>
TAUT_DEVICE float from_16bit(uint32_t bits) {
  static_assert(is_16bit(kFormat));
  return kFormat == Format::kBf16 ? __uint_as_float(bits << 16) : lower_half(bits);
}

// To nearest, ties to even.
template <class T>
TAUT_DEVICE T from_float(float value) {
  if constexpr (sizeof(T) == 4) return value;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  else return __float2bfloat16_rn(value);
}

// Two numbers rounded to T, in a register.
template <class T>
TAUT_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    memcpy(&word, &pair, 4);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    memcpy(&word, &pair, 4);
  }
  return word;
}

// Element i of an array whose type is known only when the kernel runs: for what is touched once per output, not per product.
TAUT_DEVICE float load_number(const void* base, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[i];
  if (dtype == DType::kBFloat16) return to_float(static_cast<const __nv_bfloat16*>(base)[i]);
  return to_float(static_cast<const __half*>(base)[i]);
}
TAUT_DEVICE void store_number(void* base, int64_t i, DType dtype, float value) {
  if (dtype == DType::kFloat32) static_cast<float*>(base)[i] = value;
  else if (dtype == DType::kBFloat16) static_cast<__nv_bfloat16*>(base)[i] = from_float<__nv_bfloat16>(value);
  else static_cast<__half*>(base)[i] = from_float<__half>(value);
}

// f(T{}) with the C++ type of a DType.
template <class F>
decltype(auto) with_dtype(DType dtype, F&& f) {
  if (dtype == DType::kFloat32) return f(float{});
  if (dtype == DType::kBFloat16) return f(__nv_bfloat16{});
  return f(__half{});
}

// A float8 E4M3 (S.EEEE.MMM, bias 7). Its bits, 20 places up, are those of an fp32 that is 2^-120 as large, subnormals included.
TAUT_DEVICE float from_e4m3(uint32_t byte) {
  const uint32_t magnitude = byte & 0x7fu;
  const float value = magnitude == 0x7fu ? __uint_as_float(0x7fc00000u) : __uint_as_float(magnitude << 20) * 0x1p120f;
  return byte & 0x80u ? -value : value;
}

// To nearest, ties to even; above 448 saturates. NaN and infinities come out as 448: callers deal with them before.
// WHY not cvt.rn.satfinite.e4m3x2: it needs SM 89, and what calls this is bound by memory.
TAUT_DEVICE uint32_t to_e4m3(float value) {
  const uint32_t bits = __float_as_uint(value), sign = bits >> 24 & 0x80u;
  const uint32_t magnitude = min(bits & 0x7fffffffu, 0x43e00000u);  // 448
  if (magnitude < 0x3c800000u)                                      // under 2^-6 the step is 2^-9, as that of fp32 at 2^14
    return sign | (__float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0x1p14f)) - 0x46800000u);
  return sign | (((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - (120u << 3));
}

}  // namespace taut
