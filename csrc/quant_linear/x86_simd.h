// Vectors of packed weights, for the decoders and int8 kernels of x86: Simd256 holds 32 bytes of one strip (Rows8, formats.h),
// Simd512 those of two strips side by side, the second `far` bytes after the first.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace taut::quant_linear {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))
#define TAUT_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

struct Table {
  alignas(16) uint8_t bytes[16];
};
template <class T>
TAUT_INLINE T load_as(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// E4M3 to 2^-8 of it as fp16: the same fields at other places, a NaN (all ones below the sign) to a NaN.
TAUT_INLINE __m256i e4m3_to_fp16(__m128i bytes) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x3f80));
  const __m256i nan = _mm256_and_si256(_mm256_add_epi16(magnitude, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
  return _mm256_or_si256(nan, _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
}
constexpr float kE4M3Factor = 256.0f;

struct Simd256 {
  using Bytes = __m256i;
  using Floats = __m256;
  static constexpr int kStrips = 1;

  static TAUT_INLINE Bytes load(const uint8_t* p, int64_t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static TAUT_INLINE Bytes splat(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static TAUT_INLINE Bytes table(const Table& t) { return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.bytes))); }
  static TAUT_INLINE Bytes look_up(Bytes t, Bytes nibbles) { return _mm256_shuffle_epi8(t, nibbles); }
  static TAUT_INLINE Bytes right(Bytes x, int bits) { return _mm256_srli_epi16(x, bits); }
  static TAUT_INLINE Bytes left(Bytes x, int bits) { return _mm256_slli_epi16(x, bits); }
  // The bits 0, 1, 4, 5 of x and 2, 6 of third; the others are anything.
  static TAUT_INLINE Bytes join(Bytes x, Bytes third) { return (x & splat(0x33)) | (third & splat(0x44)); }
  static TAUT_INLINE __m256i widen(const uint8_t* p, int64_t) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }

  static TAUT_INLINE Floats from_fp16(const uint8_t* p, int64_t) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static TAUT_INLINE Floats from_fp32(const uint8_t* p, int64_t) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  // 2^(s - 127), where s = 0 is subnormal. The fma makes a NaN of the infinity that s = 255 has become, and changes nothing else.
  static TAUT_INLINE Floats from_e8m0(const uint8_t* p, int64_t far) {
    const __m256 v = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(widen(p, far), 23), _mm256_set1_epi32(0x400000)));
    return _mm256_fmadd_ps(v, _mm256_setzero_ps(), v);
  }
  // The scales of the first and of the second 16 k, both 2^-8 of what they are.
  static TAUT_INLINE void from_e4m3(const uint8_t* p, int64_t, Floats (&scales)[2]) {
    const __m256i halves = e4m3_to_fp16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    scales[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    scales[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }

  static TAUT_INLINE Floats zero() { return _mm256_setzero_ps(); }
  static TAUT_INLINE Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  // table[low 3 bits of each lane]
  static TAUT_INLINE Floats look_up_floats(const float* table, Bytes lanes) { return _mm256_permutevar8x32_ps(_mm256_load_ps(table), lanes); }
  static TAUT_INLINE Floats choose_by_sign(Floats positive, Floats negative, Floats sign) { return _mm256_blendv_ps(positive, negative, sign); }
  static TAUT_INLINE Floats splat_float(float v) { return _mm256_set1_ps(v); }
  static TAUT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static TAUT_INLINE Floats from_int32(Bytes v) { return _mm256_cvtepi32_ps(v); }
  static TAUT_INLINE Floats load_floats(const float* p) { return _mm256_load_ps(p); }
  static TAUT_INLINE void store_floats(float* p, Floats v) { _mm256_store_ps(p, v); }
  static TAUT_INLINE void store_strips(float* p, int64_t, Floats v) { _mm256_store_ps(p, v); }
  static TAUT_INLINE Bytes madd(Bytes a, Bytes b) { return _mm256_madd_epi16(a, b); }
  static TAUT_INLINE Bytes multiply16(Bytes a, Bytes b) { return _mm256_mullo_epi16(a, b); }
  static TAUT_INLINE Bytes twice16(Bytes v) { return v | _mm256_slli_epi32(v, 16); }  // int32 below 2^16, as a pair of int16
  // WHY asm: gcc would hoist a load and spill it; a broadcast from memory costs no more than a load.
  static TAUT_INLINE Bytes broadcast4(const uint8_t* p) {
    Bytes v;
    asm volatile("vpbroadcastd %1,%0" : "=x"(v) : "m"(*reinterpret_cast<const int32_t*>(p)));
    return v;
  }
  static TAUT_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes v;
    asm volatile("vmovdqa %1,%0" : "=x"(v) : "m"(*reinterpret_cast<const Bytes*>(p)));
    return v;
  }
  // In memory. WHY asm: gcc otherwise keeps a second, spilled copy of a tile.
  static TAUT_INLINE void accumulate(float* sums, Floats value, Floats scale) {
    asm volatile("vfmadd213ps %1,%2,%0\n\tvmovaps %0,%1" : "+x"(value), "+m"(*reinterpret_cast<Floats*>(sums)) : "x"(scale));
  }
};

#if defined(__AVX512BW__)
struct Simd512 {
  using Bytes = __m512i;
  using Floats = __m512;
  static constexpr int kStrips = 2;

  static TAUT_INLINE __m256i pair16(const uint8_t* p, int64_t far) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + far)), 1);
  }
  static TAUT_INLINE __m128i pair8(const uint8_t* p, int64_t far) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + far)));
  }
  static TAUT_INLINE Bytes load(const uint8_t* p, int64_t far) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + far)), 1);
  }
  static TAUT_INLINE Bytes splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static TAUT_INLINE Bytes table(const Table& t) { return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t.bytes))); }
  static TAUT_INLINE Bytes look_up(Bytes t, Bytes nibbles) { return _mm512_shuffle_epi8(t, nibbles); }
  // WHY a switch: the intrinsics want a literal count.
  static TAUT_INLINE Bytes right(Bytes x, int bits) {
    switch (bits) {
      case 1: return _mm512_srli_epi16(x, 1);
      case 2: return _mm512_srli_epi16(x, 2);
      default: return _mm512_srli_epi16(x, 4);
    }
  }
  static TAUT_INLINE Bytes left(Bytes x, int bits) { return bits == 1 ? _mm512_slli_epi16(x, 1) : _mm512_slli_epi16(x, 2); }
  static TAUT_INLINE Bytes join(Bytes x, Bytes third) { return _mm512_ternarylogic_epi32(splat(0x33), x, third, 0xca); }
  static TAUT_INLINE __m512i widen(const uint8_t* p, int64_t far) { return _mm512_cvtepu8_epi32(pair8(p, far)); }

  static TAUT_INLINE Floats from_fp16(const uint8_t* p, int64_t far) { return _mm512_cvtph_ps(pair16(p, far)); }
  static TAUT_INLINE Floats from_fp32(const uint8_t* p, int64_t far) { return _mm512_castsi512_ps(load(p, far)); }
  static TAUT_INLINE Floats from_e8m0(const uint8_t* p, int64_t far) {
    const __m512 v = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(widen(p, far), 23), _mm512_set1_epi32(0x400000)));
    return _mm512_fmadd_ps(v, _mm512_setzero_ps(), v);
  }
  static TAUT_INLINE void from_e4m3(const uint8_t* p, int64_t far, Floats (&scales)[2]) {
    TAUT_FOR (int half = 0; half < 2; half++) scales[half] = _mm512_cvtph_ps(e4m3_to_fp16(pair8(p + half * 8, far)));
  }

  static TAUT_INLINE Floats zero() { return _mm512_setzero_ps(); }
  static TAUT_INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  // table[low 4 bits of each lane]
  static TAUT_INLINE Floats look_up_floats(const float* table, Bytes lanes) { return _mm512_permutexvar_ps(lanes, _mm512_load_ps(table)); }
  static TAUT_INLINE Floats splat_float(float v) { return _mm512_set1_ps(v); }
  static TAUT_INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static TAUT_INLINE Floats from_int32(Bytes v) { return _mm512_cvtepi32_ps(v); }
  static TAUT_INLINE Floats load_floats(const float* p) { return _mm512_load_ps(p); }
  static TAUT_INLINE void store_floats(float* p, Floats v) { _mm512_store_ps(p, v); }
  // The second strip `apart` floats after the first; 0: there is none.
  static TAUT_INLINE void store_strips(float* p, int64_t apart, Floats v) {
    _mm256_store_ps(p, _mm512_castps512_ps256(v));
    if (apart) _mm256_store_ps(p + apart, _mm512_extractf32x8_ps(v, 1));
  }
  static TAUT_INLINE Bytes madd(Bytes a, Bytes b) { return _mm512_madd_epi16(a, b); }
  static TAUT_INLINE Bytes multiply16(Bytes a, Bytes b) { return _mm512_mullo_epi16(a, b); }
  static TAUT_INLINE Bytes twice16(Bytes v) { return v | _mm512_slli_epi32(v, 16); }
  static TAUT_INLINE Bytes broadcast4(const uint8_t* p) { return _mm512_set1_epi32(load_as<int32_t>(p)); }
  static TAUT_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes v;
    asm volatile("vmovdqa64 %1,%0" : "=v"(v) : "m"(*reinterpret_cast<const Bytes*>(p)));
    return v;
  }
  // Totals of a tile are in registers: no accumulate().
};
#endif

}  // namespace
}  // namespace taut::quant_linear
