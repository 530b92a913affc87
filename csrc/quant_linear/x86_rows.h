// Rows of x in, strips of out back, in any of the three dtypes: shared by the x86 kernels (AVX2 and newer).
#pragma once

#include <immintrin.h>

#include "quant_linear/op.h"
#include "quant_linear/rows_prologue.h"
#include "quant_linear/x86_simd.h"

namespace taut::quant_linear {
namespace {

// WHY asm: without a flag of its own gcc makes it a prefetch for reading. Processors that lack it take it as a nop.
inline void prefetch_write(const char* p) { asm volatile("prefetchw %0" ::"m"(*p)); }

inline __m256 load8_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline __m256 load8_fp16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

inline void load_halves(const uint16_t* p, float* out /* [8] */) { _mm256_storeu_ps(out, load8_fp16(p)); }

inline float horizontal_max(__m256 v) {
  __m128 h = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  h = _mm_max_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_max_ss(h, _mm_shuffle_ps(h, h, 1)));
}

inline __m128i to_bf16(__m256 v) {  // round to nearest even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x88);
  return _mm256_castsi256_si128(packed);
}

TAUT_INLINE __m256 load8_any(const void* base, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return _mm256_loadu_ps(static_cast<const float*>(base) + index);
  const uint16_t* p = static_cast<const uint16_t*>(base) + index;
  return dtype == DType::kBFloat16 ? load8_bf16(p) : load8_fp16(p);
}

// Eight results of row m, columns [8*strip, 8*strip+8): sums * unit plus bias plus residual, into out; columns past N are dropped.
template <DType kDType>
TAUT_INLINE void store_strip(const Params& p, int64_t m, int64_t strip, const float* tile /* [8], 32-byte aligned */, float unit) {
  __m256 sums = _mm256_mul_ps(_mm256_load_ps(tile), _mm256_set1_ps(unit));
  const int64_t N = p.weight.N, n = strip * 8, at = m * N + n;
  if (n + 8 <= N) [[likely]] {
    if (p.bias) sums = _mm256_add_ps(sums, load8_any(p.bias, n, kDType));
    if (p.residual) sums = _mm256_add_ps(sums, load8_any(p.residual, at, kDType));
    if (kDType == DType::kFloat32) _mm256_storeu_ps(static_cast<float*>(p.out) + at, sums);
    else
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p.out) + at),
                       kDType == DType::kBFloat16 ? to_bf16(sums) : _mm256_cvtps_ph(sums, _MM_FROUND_TO_NEAREST_INT));
    return;
  }
  alignas(32) float values[8];
  _mm256_store_ps(values, sums);
  for (int64_t i = 0; n + i < N; i++) {
    if (p.bias) values[i] += load_float(p.bias, n + i, kDType);
    if (p.residual) values[i] += load_float(p.residual, at + i, kDType);
    store_float(p.out, at + i, kDType, values[i]);
  }
}

}  // namespace
}  // namespace taut::quant_linear
