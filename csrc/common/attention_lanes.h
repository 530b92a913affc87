// What a register of floats is on each ISA, for the tiles of attention ops.
#pragma once

#include <immintrin.h>

#include "common/row_math.h"

namespace taut {
namespace {

#define TAUT_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

// 2^f for |f| <= 1/2, within 1.2e-7 of it
#define TAUT_EXP2_POLYNOMIAL(L, f)                                                                                                                     \
  L::fma(L::fma(L::fma(L::fma(L::fma(L::fma(L::set1(1.535336188319500e-4f), f, L::set1(1.339887440266574e-3f)), f, L::set1(9.618437357674640e-3f)), f, \
                              L::set1(5.550332471162809e-2f)),                                                                                         \
                       f, L::set1(2.402264791363012e-1f)),                                                                                             \
                f, L::set1(6.931472028550421e-1f)),                                                                                                    \
         f, L::set1(1.0f))

struct Avx2Lanes {
  using V = __m256;
  static constexpr int kWidth = 8, kVectors = 3, kColumns = 4;  // 12 sums, 3 of a, 1 of b: all 16 registers
  static constexpr int kPack = 1;                               // how many products a lane adds up at once
  static TAUT_INLINE V zero() { return _mm256_setzero_ps(); }
  static TAUT_INLINE V set1(float x) { return _mm256_set1_ps(x); }
  static TAUT_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static TAUT_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static TAUT_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static TAUT_INLINE V dot(V a, V b, V c) { return fma(a, b, c); }  // c plus the products of kPack numbers a lane
  static TAUT_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static TAUT_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static TAUT_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static TAUT_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }  // b where a is NaN
  static TAUT_INLINE V abs(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  // x, or `otherwise` where low <= at <= high fails
  static TAUT_INLINE V between(V at, V low, V high, V x, V otherwise) {
    return _mm256_blendv_ps(otherwise, x, _mm256_and_ps(_mm256_cmp_ps(at, low, _CMP_GE_OQ), _mm256_cmp_ps(at, high, _CMP_LE_OQ)));
  }
  // 2^x for x <= 0; 0 below -126, where fp32 is about to be subnormal; NaN stays
  static TAUT_INLINE V exp2(V x) {
    const V magic = set1(12582912.0f), counts = _mm256_cmp_ps(x, set1(-126.0f), _CMP_NLT_UQ);  // 1.5 * 2^23: adding it rounds to an integer
    const V shifted = add(x, magic), f = sub(x, sub(shifted, magic));
    const V p = TAUT_EXP2_POLYNOMIAL(Avx2Lanes, f);
    const __m256i power = _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    return _mm256_and_ps(counts, _mm256_castsi256_ps(power));
  }
};

#if defined(__AVX512F__)
struct Avx512Lanes {
  using V = __m512;
  static constexpr int kWidth = 16, kVectors = 3, kColumns = 8;  // 24 sums, 3 of a, 1 of b: 28 of 32 registers
  static constexpr int kPack = 1;
  static TAUT_INLINE V zero() { return _mm512_setzero_ps(); }
  static TAUT_INLINE V set1(float x) { return _mm512_set1_ps(x); }
  static TAUT_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static TAUT_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static TAUT_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static TAUT_INLINE V dot(V a, V b, V c) { return fma(a, b, c); }
  static TAUT_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static TAUT_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static TAUT_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static TAUT_INLINE V max(V a, V b) { return _mm512_max_ps(a, b); }  // b where a is NaN
  static TAUT_INLINE V abs(V a) { return _mm512_abs_ps(a); }
  static TAUT_INLINE V between(V at, V low, V high, V x, V otherwise) {
    return _mm512_mask_blend_ps(_mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(at, low, _CMP_GE_OQ), at, high, _CMP_LE_OQ), otherwise, x);
  }
  static TAUT_INLINE V exp2(V x) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ);
    const V n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = sub(x, n);
    return _mm512_maskz_scalef_ps(counts, TAUT_EXP2_POLYNOMIAL(Avx512Lanes, f), n);
  }
};
#endif

#if defined(__AVX512BF16__)
// Products of bf16: a lane of what is multiplied is two of them, the first in the low half.
struct Avx512Bf16Lanes : Avx512Lanes {
  static constexpr int kPack = 2;
  static TAUT_INLINE V dot(V a, V b, V c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  // lanes {bf16(first), bf16(second)}
  static TAUT_INLINE V pack(V first, V second) {
    alignas(64) static constexpr int16_t kInterleave[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                            8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)_mm512_cvtne2ps_pbh(second, first)));
  }
};
#endif

// rows[i][j] to rows[j][i]
TAUT_INLINE void transpose8(FloatLanes (&rows)[8]) {
  FloatLanes a[8], b[8];
  TAUT_FOR (int i = 0; i < 8; i += 2) {
    a[i] = __builtin_shuffle(rows[i], rows[i + 1], IntLanes{0, 8, 1, 9, 4, 12, 5, 13});
    a[i + 1] = __builtin_shuffle(rows[i], rows[i + 1], IntLanes{2, 10, 3, 11, 6, 14, 7, 15});
  }
  TAUT_FOR (int i = 0; i < 8; i += 4)
    TAUT_FOR (int j = 0; j < 2; j++) {
      b[i + 2 * j] = __builtin_shuffle(a[i + j], a[i + j + 2], IntLanes{0, 1, 8, 9, 4, 5, 12, 13});
      b[i + 2 * j + 1] = __builtin_shuffle(a[i + j], a[i + j + 2], IntLanes{2, 3, 10, 11, 6, 7, 14, 15});
    }
  TAUT_FOR (int i = 0; i < 4; i++) {
    rows[i] = __builtin_shuffle(b[i], b[i + 4], IntLanes{0, 1, 2, 3, 8, 9, 10, 11});
    rows[i + 4] = __builtin_shuffle(b[i], b[i + 4], IntLanes{4, 5, 6, 7, 12, 13, 14, 15});
  }
}

}  // namespace
}  // namespace taut
