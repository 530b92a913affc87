// int8 activations on x86: op.h's definition, 32 k at a time, bit for bit what cpu_scalar.cpp computes.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "quant_linear/op.h"
#include "quant_linear/x86_rows.h"
#include "quant_linear/x86_simd.h"

namespace taut::quant_linear {
namespace {

// Calls store(k, codes, m) for every 32 k: codes are 32 int8 in order, m the integer part of their scale, as float.
// Returns the row's unit: NaN if x holds a NaN or an infinity.
template <class Store>
inline float quantize_row(const float* x /* [padded_k] */, int64_t padded_k, Activations activations, const Store& store) {
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  // The largest magnitude, as the bits of a float: they order as integers do, NaN and infinity last.
  __m256i largest = _mm256_setzero_si256();
  for (int64_t k = 0; k < padded_k; k += 32)
    TAUT_FOR (int i = 0; i < 32; i += 8) largest = _mm256_max_epi32(largest, _mm256_castps_si256(_mm256_and_ps(magnitude, _mm256_loadu_ps(x + k + i))));
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  half = _mm_max_epi32(half, _mm_unpackhi_epi64(half, half));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 1));
  const bool finite = _mm_cvtsi128_si32(half) < 0x7f800000;
  const float row_max = _mm_cvtss_f32(_mm_castsi128_ps(half)), steps = row_max >= kSmallestRowMax ? 32767.0f / row_max : 0.0f;
  // Four times 32 k at once, so that their maxima, roundings and divisions are one vector's.
  const auto largest_of_32 = [&](const float* from) __attribute__((always_inline)) {
    const auto at = [&](int i) __attribute__((always_inline)) { return _mm256_and_ps(magnitude, _mm256_loadu_ps(from + i)); };
    return _mm256_max_ps(_mm256_max_ps(at(0), at(8)), _mm256_max_ps(at(16), at(24)));
  };
  for (int64_t k0 = 0; k0 < padded_k; k0 += 128) {
    const int blocks = padded_k - k0 < 128 ? static_cast<int>(padded_k - k0) / 32 : 4;
    __m256 m[4];
    TAUT_FOR (int i = 0; i < 4; i++) m[i] = i < blocks ? largest_of_32(x + k0 + i * 32) : _mm256_setzero_ps();
    const __m256 m01 = _mm256_max_ps(_mm256_unpacklo_ps(m[0], m[1]), _mm256_unpackhi_ps(m[0], m[1]));
    const __m256 m23 = _mm256_max_ps(_mm256_unpacklo_ps(m[2], m[3]), _mm256_unpackhi_ps(m[2], m[3]));
    const __m256 halves = _mm256_max_ps(_mm256_shuffle_ps(m01, m23, 0x44), _mm256_shuffle_ps(m01, m23, 0xee));
    const __m128 raw = _mm_mul_ps(_mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)), _mm_set1_ps(steps));
    __m128 multiples = _mm_min_ps(_mm_max_ps(_mm_ceil_ps(raw), _mm_set1_ps(1.0f)), _mm_set1_ps(32767.0f));  // 1 for a NaN too
    if (activations == Activations::kInt8Row) multiples = _mm_set1_ps(32767.0f);
    alignas(16) float multiple[4], inverse[4];
    _mm_store_ps(multiple, multiples);
    _mm_store_ps(inverse, _mm_div_ps(_mm_set1_ps(steps * 127.0f), multiples));
    for (int i = 0; i < blocks; i++) {
      // WHY no clamp to +-127: m is rounded up, so that |x| * inverse exceeds 127 by a few roundings at most.
      const auto code = [&](int at) __attribute__((always_inline)) {
        return _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k0 + i * 32 + at), _mm256_broadcast_ss(inverse + i)));
      };
      const __m256i low = _mm256_packs_epi32(code(0), code(8)), high = _mm256_packs_epi32(code(16), code(24));
      store(k0 + i * 32, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order), multiple[i]);
    }
  }
  return finite ? row_max / (127.0f * 32767.0f) : __builtin_nanf("");
}

}  // namespace
}  // namespace taut::quant_linear
