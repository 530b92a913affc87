// COMPUTES  out[M,N] = x[M,K] @ w[N,K]^T + bias, w n:m sparse and in bf16;  x, bias, out bf16 (a prologue's result is rounded to it); products exact,
//           sums in fp32. Subnormal x, weights and sums count as zeros: vdpbf16ps flushes them.
// LAYOUT    w: Sparse8 (common/sparse.h), bf16.   A, B: quant_linear/avx512bf16_tile.h
// WORK      A panel is made dense in L1, zeros written out: of each 4 or 8 k, pairs of two as vdpbf16ps wants them, a kept number goes into the pair and
//           the half of it that its place says. Then quant_linear's tile.
// BOUND     vdpbf16ps, twice fp32 FMA; zeros are multiplied too. Unpacking 32 k of 16 rows takes some 200 instructions (2:4), as much as 12 rows of x.
// LIMITS    AVX-512 F, BW, DQ, VL and BF16; bf16 weights in any pattern; float activations; x in bf16
#include "quant_linear/avx512bf16_tile.h"
#include "sparse_linear/x86_float.h"

namespace taut::sparse_linear::cpu_float_avx512bf16 {
namespace {

using quant_linear::Strips;
using quant_linear::avx512bf16::kPairBytes;

// A k-block of two strips, at[0] and at[1], dense.
template <class Shape>
TAUT_INLINE void expand(const uint8_t* const (&at)[2], uint8_t* out /* [16 pairs of k][kPairBytes], of which 64 are written */) {
  if constexpr (Shape::kShared) {
    TAUT_FOR (int pair = 0; pair < 16; pair++) _mm512_store_si512(out + pair * kPairBytes, _mm512_setzero_si512());
    TAUT_FOR (int half = 0; half < 2; half++) {
      const uint64_t nibbles = Shape::nibbles(at[half] + Shape::kCodeBytes);
      TAUT_FOR (int j = 0; j < Shape::kKept; j++) {
        const int64_t k = j / Shape::n * Shape::m + Shape::place(nibbles, j);
        const __m256i number = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at[half] + j * 16)));
        auto* to = reinterpret_cast<__m256i*>(out + k / 2 * kPairBytes + half * 32);
        _mm256_store_si256(to, _mm256_or_si256(_mm256_load_si256(to), _mm256_sll_epi32(number, _mm_cvtsi64_si128(k % 2 * 16))));
      }
    }
  } else {
    const int64_t far = at[1] - at[0];
    TAUT_FOR (int b = 0; b < 32 / Shape::m; b++) {
      __m512i pairs[Shape::m / 2];
      TAUT_FOR (int pair = 0; pair < Shape::m / 2; pair++) pairs[pair] = _mm512_setzero_si512();
      TAUT_FOR (int i = 0; i < Shape::n; i++) {
        const int j = b * Shape::n + i;
        const __m512i fields = _mm512_srli_epi32(quant_linear::Simd512::load(at[0] + Shape::kCodeBytes + Shape::vector_of(j) * 32, far), Shape::shift_of(j));
        const __m512i upper = _mm512_slli_epi32(_mm512_and_si512(fields, _mm512_set1_epi32(1)), 4);
        const __m512i number = _mm512_sllv_epi32(_mm512_cvtepu16_epi32(quant_linear::Simd512::pair16(at[0] + j * 16, far)), upper);
        const __m512i pair_of = _mm512_and_si512(fields, _mm512_set1_epi32(Shape::m - 2));
        TAUT_FOR (int pair = 0; pair < Shape::m / 2; pair++) {
          if (2 * pair + 1 < i || 2 * pair > Shape::m - Shape::n + i) continue;  // places ascend, so the i-th is none of these; and in padding all are 0
          const __mmask16 here = _mm512_cmpeq_epi32_mask(pair_of, _mm512_set1_epi32(2 * pair));
          pairs[pair] = _mm512_mask_or_epi32(pairs[pair], here, pairs[pair], number);
        }
      }
      TAUT_FOR (int pair = 0; pair < Shape::m / 2; pair++) _mm512_store_si512(out + (b * (Shape::m / 2) + pair) * kPairBytes, pairs[pair]);
    }
  }
}

template <class Shape>
void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t blocks, uint8_t* out) {
  const uint8_t* first = s.data + strip * s.strip_bytes + block0 * Shape::kBlockBytes;
  const int64_t far = strip + 1 < s.layout.num_strips() ? s.strip_bytes : 0;  // a strip alone is paired with itself
  for (int64_t b = 0; b < blocks; b++, first += Shape::kBlockBytes, out += 16 * kPairBytes) expand<Shape>({first, first + far}, out);
}

}  // namespace

void run_tile(const Params& p) {
  with_shape(p.pattern, [&]<class Shape>() { quant_linear::avx512bf16::tile(p, unpack<Shape>, 1.0f); });
}

}  // namespace taut::sparse_linear::cpu_float_avx512bf16
