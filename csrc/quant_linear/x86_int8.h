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
  for (int64_t k = 0; k < padded_k; k += 32) {
    const __m256 v0 = _mm256_loadu_ps(x + k), v1 = _mm256_loadu_ps(x + k + 8), v2 = _mm256_loadu_ps(x + k + 16), v3 = _mm256_loadu_ps(x + k + 24);
    const __m256 m01 = _mm256_max_ps(_mm256_and_ps(magnitude, v0), _mm256_and_ps(magnitude, v1));
    const __m256 m23 = _mm256_max_ps(_mm256_and_ps(magnitude, v2), _mm256_and_ps(magnitude, v3));
    const __m128 raw = _mm_set_ss(horizontal_max(_mm256_max_ps(m01, m23)) * steps);
    float multiple = _mm_cvtss_f32(_mm_ceil_ss(raw, raw));
    if (!(multiple >= 1.0f)) multiple = 1.0f;  // a NaN too
    if (multiple > 32767.0f || activations == Activations::kInt8Row) multiple = 32767.0f;
    const __m256 inverse = _mm256_set1_ps(steps * 127.0f / multiple);
    // WHY no clamp to +-127: m is rounded up, so that |x| * inverse exceeds 127 by a few roundings at most.
    const auto code = [&](__m256 v) { return _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)); };
    store(k, _mm256_permutevar8x32_epi32(_mm256_packs_epi16(_mm256_packs_epi32(code(v0), code(v1)), _mm256_packs_epi32(code(v2), code(v3))), order), multiple);
  }
  return finite ? row_max / (127.0f * 32767.0f) : __builtin_nanf("");
}

// The eight 4-byte chunks of a row's codes to [8][rows][4].
inline void store_chunks(uint8_t* block, int r, int rows, __m256i q) {
  if (rows == 1) return _mm256_storeu_si256(reinterpret_cast<__m256i*>(block), q);
  alignas(32) uint32_t chunks[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(chunks), q);
  for (int c = 0; c < 8; c++) std::memcpy(block + (c * rows + r) * 4, &chunks[c], 4);
}

}  // namespace
}  // namespace taut::quant_linear
