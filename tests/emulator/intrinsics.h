// CUDA's arithmetic intrinsics in plain C++, and the bodies of the arithmetic wrappers of common/ptx.cuh. Included by
// cuda_emulator.h. Everything that rounds does so as the GPU does: to nearest even, once.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace emulator {

// ---- 16-bit floats ----------------------------------------------------------------------------------------------------

inline float half_to_float(uint16_t bits) { return static_cast<float>(std::bit_cast<_Float16>(bits)); }
inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t float_to_half(float x) { return std::bit_cast<uint16_t>(static_cast<_Float16>(x)); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// sum + error is a number that a double cannot hold, or just did: to a float rounded to odd, whose further rounding to fewer
// bits is then the single rounding of the exact value. Exact unless the result is a subnormal float.
inline float round_to_odd(double sum, double error) {
  uint64_t bits = std::bit_cast<uint64_t>(sum);
  if (error != 0.0) {
    if ((error > 0.0) != (sum > 0.0)) bits--;  // toward zero
    bits |= 1;
  }
  constexpr uint64_t kDropped = (uint64_t{1} << 29) - 1;
  if (bits & kDropped) bits = (bits & ~kDropped) | (uint64_t{1} << 29);
  return static_cast<float>(std::bit_cast<double>(bits));
}

// a * b + c with one rounding, on the bits of two 16-bit floats.
template <bool kBf16>
inline uint16_t fma_16(uint16_t a, uint16_t b, uint16_t c) {
  const auto wide = [](uint16_t bits) { return static_cast<double>(kBf16 ? bf16_to_float(bits) : half_to_float(bits)); };
  const double product = wide(a) * wide(b), addend = wide(c), sum = product + addend;  // the product is exact
  if (!std::isfinite(sum)) return kBf16 ? float_to_bf16(static_cast<float>(sum)) : float_to_half(static_cast<float>(sum));
  const double part = sum - product, error = (product - (sum - part)) + (addend - part);
  if (kBf16 && std::fabs(sum) < 0x1p-125) {  // bfloat16 has float's range: its subnormals are steps of 2^-133
    return float_to_bf16(static_cast<float>(std::nearbyint(sum * 0x1p133) * 0x1p-133));
  }
  const float odd = round_to_odd(sum, error);
  return kBf16 ? float_to_bf16(odd) : float_to_half(odd);
}

template <bool kBf16>
inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c) {
  const uint32_t low = fma_16<kBf16>(static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c));
  const uint32_t high = fma_16<kBf16>(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16), static_cast<uint16_t>(c >> 16));
  return low | high << 16;
}

// ---- float8 E4M3: S EEEE MMM, bias 7, no infinities, S.1111.111 is NaN, largest 448 -----------------------------------

inline float e4m3_to_float(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  float value;
  if (exponent == 15 && mantissa == 7) value = std::bit_cast<float>(0x7fc00000u);
  else if (exponent == 0) value = static_cast<float>(mantissa) * 0x1p-9f;
  else value = std::bit_cast<float>(static_cast<uint32_t>(exponent + 120) << 23 | static_cast<uint32_t>(mantissa) << 20);
  return bits & 0x80 ? -value : value;
}

// To nearest even, saturating.
inline uint8_t float_to_e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7f;
  if (size >= 448.0f) return sign | 0x7e;
  if (size < 0x1p-6f) return sign | static_cast<uint8_t>(std::nearbyint(size * 0x1p9f));  // 8 steps carry into the exponent, rightly
  const uint32_t bits = std::bit_cast<uint32_t>(size);
  const uint32_t rounded = (bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20;  // 3 bits of mantissa left
  return sign | static_cast<uint8_t>(rounded - (120u << 3));
}

inline uint16_t cvt_e4m3x2(float lo, float hi) { return static_cast<uint16_t>(float_to_e4m3(lo) | float_to_e4m3(hi) << 8); }

// ---- 2^x, subnormal numbers flushed -----------------------------------------------------------------------------------

inline float ex2(float x) {
  const float r = std::exp2(std::fabs(x) < 0x1p-126f ? 0.0f : x);
  return std::fabs(r) < 0x1p-126f ? 0.0f : r;
}

// ---- bits -------------------------------------------------------------------------------------------------------------

template <int kTable>
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (kTable >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    const uint32_t nibble = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

}  // namespace emulator

// ---- loads and stores with a cache hint, which means nothing here -----------------------------------------------------

#define EMULATOR_LOAD(name)            \
  template <class T>                   \
  EMULATOR_INLINE T name(const T* p) { \
    return *p;                         \
  }
EMULATOR_LOAD(__ldg)
EMULATOR_LOAD(__ldca)
EMULATOR_LOAD(__ldcg)
EMULATOR_LOAD(__ldcs)
EMULATOR_LOAD(__ldlu)
EMULATOR_LOAD(__ldcv)
#undef EMULATOR_LOAD
#define EMULATOR_STORE(name)                 \
  template <class T>                         \
  EMULATOR_INLINE void name(T* p, T value) { \
    *p = value;                              \
  }
EMULATOR_STORE(__stwb)
EMULATOR_STORE(__stcg)
EMULATOR_STORE(__stcs)
EMULATOR_STORE(__stwt)
#undef EMULATOR_STORE

// ---- integers ---------------------------------------------------------------------------------------------------------

EMULATOR_INLINE float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
EMULATOR_INLINE uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
EMULATOR_INLINE int __float_as_int(float x) { return std::bit_cast<int>(x); }
EMULATOR_INLINE float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
EMULATOR_INLINE int __popc(uint32_t x) { return std::popcount(x); }
EMULATOR_INLINE int __clz(int x) { return std::countl_zero(static_cast<uint32_t>(x)); }
EMULATOR_INLINE int __ffs(int x) { return __builtin_ffs(x); }
EMULATOR_INLINE uint32_t __brev(uint32_t x) {
  uint32_t result = 0;
  for (int i = 0; i < 32; i++) result |= (x >> i & 1u) << (31 - i);
  return result;
}
EMULATOR_INLINE uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) { return emulator::prmt(a, b, selector & 0x7777u); }
EMULATOR_INLINE uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
EMULATOR_INLINE uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
EMULATOR_INLINE int __mul24(int a, int b) { return (a << 8 >> 8) * (b << 8 >> 8); }
EMULATOR_INLINE int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
EMULATOR_INLINE uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

// Four products of bytes, added up: signed, or unsigned.
inline int __dp4a(int a, int b, int sum) {
  for (int i = 0; i < 32; i += 8) sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
  return sum;
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xffu) * (b >> i & 0xffu);
  return sum;
}

template <class A, class B>
EMULATOR_INLINE constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
EMULATOR_INLINE constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}

// ---- floats. Sources are compiled without contraction, so that these round as they say. --------------------------------

EMULATOR_INLINE float __fadd_rn(float a, float b) { return a + b; }
EMULATOR_INLINE float __fsub_rn(float a, float b) { return a - b; }
EMULATOR_INLINE float __fmul_rn(float a, float b) { return a * b; }
EMULATOR_INLINE float __fdiv_rn(float a, float b) { return a / b; }
EMULATOR_INLINE float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
EMULATOR_INLINE float __frcp_rn(float a) { return 1.0f / a; }
EMULATOR_INLINE float __fsqrt_rn(float a) { return std::sqrt(a); }
EMULATOR_INLINE float __fdividef(float a, float b) { return a / b; }
EMULATOR_INLINE float __expf(float x) { return std::exp(x); }
EMULATOR_INLINE float __exp2f(float x) { return std::exp2(x); }
EMULATOR_INLINE float __logf(float x) { return std::log(x); }
EMULATOR_INLINE float __saturatef(float x) { return x >= 0.0f ? (x <= 1.0f ? x : 1.0f) : 0.0f; }
EMULATOR_INLINE float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

// A float to an integer saturates, and NaN gives 0; C++ leaves both undefined.
inline int __float2int_rn(float x) {
  if (std::isnan(x)) return 0;
  const float rounded = std::nearbyint(x);
  return rounded >= 0x1p31f ? INT32_MAX : rounded < -0x1p31f ? INT32_MIN : static_cast<int>(rounded);
}
inline int __float2int_rz(float x) {
  if (std::isnan(x)) return 0;
  return x >= 0x1p31f ? INT32_MAX : x < -0x1p31f ? INT32_MIN : static_cast<int>(x);
}
EMULATOR_INLINE int __float2int_rd(float x) { return __float2int_rz(std::floor(x)); }
EMULATOR_INLINE int __float2int_ru(float x) { return __float2int_rz(std::ceil(x)); }
inline uint32_t __float2uint_rn(float x) {
  const float rounded = std::nearbyint(x);
  return !(rounded > 0.0f) ? 0u : rounded >= 0x1p32f ? UINT32_MAX : static_cast<uint32_t>(rounded);
}
EMULATOR_INLINE float __int2float_rn(int x) { return static_cast<float>(x); }
EMULATOR_INLINE float __uint2float_rn(uint32_t x) { return static_cast<float>(x); }

// ---- half and bfloat16: what NVIDIA's headers declare for the device only ---------------------------------------------

inline __half __hfma(__half a, __half b, __half c) {
  return std::bit_cast<__half>(emulator::fma_16<false>(std::bit_cast<uint16_t>(a), std::bit_cast<uint16_t>(b), std::bit_cast<uint16_t>(c)));
}
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return std::bit_cast<__nv_bfloat16>(emulator::fma_16<true>(std::bit_cast<uint16_t>(a), std::bit_cast<uint16_t>(b), std::bit_cast<uint16_t>(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return __halves2half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return __halves2bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)); }
inline int __half2int_rn(__half x) { return __float2int_rn(emulator::half_to_float(std::bit_cast<uint16_t>(x))); }
inline int __bfloat162int_rn(__nv_bfloat16 x) { return __float2int_rn(emulator::bf16_to_float(std::bit_cast<uint16_t>(x))); }
