// The dot products of attention, written once: 4 queries at a time share each load of a key or value. The lanes say what a register
// is: 8 floats on AVX2, 16 on AVX-512, 4 on NEON. head_dim is a multiple of that.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "decoder_layers/layers.h"

namespace taut::decoder_layers {
namespace {

#define TAUT_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

#if defined(__x86_64__)
// The sums of the lanes of four vectors.
TAUT_INLINE void four_sums(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

struct Avx2Lanes {
  using V = __m256;
  static constexpr int kWidth = 8, kKeys = 2;  // keys at a time: 8 sums, 2 keys, a query
  static TAUT_INLINE V zero() { return _mm256_setzero_ps(); }
  static TAUT_INLINE V set1(const float* p) { return _mm256_broadcast_ss(p); }
  static TAUT_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static TAUT_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static TAUT_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static TAUT_INLINE void sums(V a, V b, V c, V d, float* out) { four_sums(a, b, c, d, out); }
  template <DType kDType>
  static TAUT_INLINE V load(const char* p) {
    if constexpr (kDType == DType::kFloat32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (kDType == DType::kFloat16) return _mm256_cvtph_ps(bits);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
};
#endif

#if defined(__AVX512F__)
struct Avx512Lanes {
  using V = __m512;
  static constexpr int kWidth = 16, kKeys = 4;
  static TAUT_INLINE V zero() { return _mm512_setzero_ps(); }
  static TAUT_INLINE V set1(const float* p) { return _mm512_set1_ps(*p); }
  static TAUT_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static TAUT_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static TAUT_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static TAUT_INLINE __m256 half(V v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }
  static TAUT_INLINE void sums(V a, V b, V c, V d, float* out) { four_sums(half(a), half(b), half(c), half(d), out); }
  template <DType kDType>
  static TAUT_INLINE V load(const char* p) {
    if constexpr (kDType == DType::kFloat32) return _mm512_loadu_ps(p);
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (kDType == DType::kFloat16) return _mm512_cvtph_ps(bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
};
#endif

#if defined(__aarch64__)
struct NeonLanes {
  using V = float32x4_t;
  static constexpr int kWidth = 4, kKeys = 4;
  static TAUT_INLINE V zero() { return vdupq_n_f32(0); }
  static TAUT_INLINE V set1(const float* p) { return vld1q_dup_f32(p); }
  static TAUT_INLINE V load(const float* p) { return vld1q_f32(p); }
  static TAUT_INLINE void store(float* p, V v) { vst1q_f32(p, v); }
  static TAUT_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static TAUT_INLINE void sums(V a, V b, V c, V d, float* out) { vst1q_f32(out, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))); }
  template <DType kDType>
  static TAUT_INLINE V load(const char* p) {
    if constexpr (kDType == DType::kFloat32) return vld1q_f32(reinterpret_cast<const float*>(p));
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const uint16_t*>(p));
    if constexpr (kDType == DType::kFloat16) return vcvt_f32_f16(vreinterpret_f16_u16(bits));
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
};
#endif

template <class L>
struct LanesDot {
  using V = typename L::V;
  static constexpr int64_t kAhead = 4096;  // bytes that are fetched ahead

  // kRows queries, kKeys keys from `keys` on.
  template <DType kDType, int kRows, int kKeys>
  static TAUT_INLINE void some_scores(const float* q, int64_t D, const char* keys, float* out) {
    constexpr int kBytes = dtype_bytes(kDType);
    V sum[kRows][kKeys];
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int t = 0; t < kKeys; t++) sum[r][t] = L::zero();
    for (int64_t d = 0; d < D; d += L::kWidth) {
      V key[kKeys];
      TAUT_FOR (int t = 0; t < kKeys; t++) {
        const char* p = keys + (t * D + d) * kBytes;
        key[t] = L::template load<kDType>(p);
        __builtin_prefetch(p + kAhead);
      }
      TAUT_FOR (int r = 0; r < kRows; r++) {
        const V query = L::load(q + r * D + d);
        TAUT_FOR (int t = 0; t < kKeys; t++) sum[r][t] = L::fma(query, key[t], sum[r][t]);
      }
    }
    TAUT_FOR (int r = 0; r < kRows; r++) {
      float found[4];
      L::sums(sum[r][0], sum[r][kKeys > 1], sum[r][kKeys / 2], sum[r][kKeys - 1], kKeys == 4 ? out + r * kChunk : found);
      if (kKeys < 4) std::memcpy(out + r * kChunk, found, kKeys * sizeof(float));
    }
  }

  template <DType kDType, int kRows>
  static __attribute__((noinline)) void all_scores(const float* q, int64_t D, const char* keys, int64_t n, float* out) {
    const int64_t row_bytes = D * dtype_bytes(kDType);
    int64_t t = 0;
    for (; t + L::kKeys <= n; t += L::kKeys) some_scores<kDType, kRows, L::kKeys>(q, D, keys + t * row_bytes, out + t);
    for (; t < n; t++) some_scores<kDType, kRows, 1>(q, D, keys + t * row_bytes, out + t);
  }

  // out[kRows][kVectors registers from column d on] += p . values
  template <DType kDType, int kRows, int kVectors>
  static TAUT_INLINE void some_values(const float* p, int64_t D, const char* values, const char* ahead, int64_t n, float* out) {
    constexpr int kBytes = dtype_bytes(kDType), kStep = kVectors * L::kWidth * kBytes;
    V sum[kRows][kVectors];
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = L::load(out + r * D + i * L::kWidth);
    for (int64_t t = 0; t < n; t++, values += D * kBytes, ahead += kStep) {
      V value[kVectors];
      TAUT_FOR (int i = 0; i < kVectors; i++) value[i] = L::template load<kDType>(values + i * L::kWidth * kBytes);
      for (int line = 0; line < kStep; line += 64) __builtin_prefetch(ahead + line);
      TAUT_FOR (int r = 0; r < kRows; r++) {
        const V weight = L::set1(p + r * kChunk + t);
        TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = L::fma(weight, value[i], sum[r][i]);
      }
    }
    TAUT_FOR (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kVectors; i++) L::store(out + r * D + i * L::kWidth, sum[r][i]);
  }

  template <DType kDType, int kRows>
  static __attribute__((noinline)) void all_values(const float* p, int64_t D, const char* values, int64_t n, float* out) {
    constexpr int kBytes = dtype_bytes(kDType);
    const int64_t row_bytes = D * kBytes, block = std::max<int64_t>(4, 8192 / row_bytes);  // rows that stay in L1 for all columns
    std::memset(out, 0, kRows * D * sizeof(float));
    for (int64_t t = 0; t < n; t += block) {
      const int64_t rows = std::min(block, n - t);
      const char* from = values + t * row_bytes;
      const char* ahead = from + block * row_bytes;  // WHY: the next rows in the order of their addresses, not in the order of use
      int64_t d = 0;
      for (; d + 2 * L::kWidth <= D; d += 2 * L::kWidth, ahead += rows * 2 * L::kWidth * kBytes)
        some_values<kDType, kRows, 2>(p + t, D, from + d * kBytes, ahead, rows, out + d);
      if (d < D) some_values<kDType, kRows, 1>(p + t, D, from + d * kBytes, ahead, rows, out + d);
    }
  }

  template <DType kDType>
  static void scores_of(const float* q, int64_t rows, int64_t D, const char* keys, int64_t n, float* out) {
    switch (rows) {
      case 1: return all_scores<kDType, 1>(q, D, keys, n, out);
      case 2: return all_scores<kDType, 2>(q, D, keys, n, out);
      case 3: return all_scores<kDType, 3>(q, D, keys, n, out);
      default: return all_scores<kDType, 4>(q, D, keys, n, out);
    }
  }
  template <DType kDType>
  static void weighted_of(const float* p, int64_t rows, int64_t D, const char* values, int64_t n, float* out) {
    switch (rows) {
      case 1: return all_values<kDType, 1>(p, D, values, n, out);
      case 2: return all_values<kDType, 2>(p, D, values, n, out);
      case 3: return all_values<kDType, 3>(p, D, values, n, out);
      default: return all_values<kDType, 4>(p, D, values, n, out);
    }
  }

  static void scores(const float* q, int64_t rows, int64_t D, const void* keys, DType dtype, int64_t n, float* out) {
    for_dtype(dtype, [&]<DType kDType>() { scores_of<kDType>(q, rows, D, static_cast<const char*>(keys), n, out); });
  }
  static void weighted(const float* p, int64_t rows, int64_t D, const void* values, DType dtype, int64_t n, float* out) {
    for_dtype(dtype, [&]<DType kDType>() { weighted_of<kDType>(p, rows, D, static_cast<const char*>(values), n, out); });
  }
};

}  // namespace
}  // namespace taut::decoder_layers
