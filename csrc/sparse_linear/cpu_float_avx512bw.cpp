// COMPUTES  out[M,N] = x[M,K] @ w[N,K]^T + bias, w n:m sparse and in 16 bits;  x, out fp32, bf16 or fp16; x enters as it is; products and sums in fp32
// LAYOUT    w: Sparse8 (common/sparse.h), fp16 or bf16; two strips make one zmm.   A: x86_float.h
// WORK      As cpu_float_avx2.cpp, with 16 rows of w in a vector. Their places are in the fields of both strips, or, where 16 rows share them, in those
//           of the first.   tile: quant_linear's, 24 rows x 16 outputs of plain fma
// BOUND     M=1: DRAM, as there; a zmm of numbers is two loads, one to insert and one to widen, so that issue width is no nearer than with AVX2.
//           Measured, Zen 4: both read what plain reads read, this one 2% faster.   Large M: fp32 fma
// LIMITS    AVX-512 F, BW, DQ, VL; fp16 and bf16 weights; few rows of x: not where 8 rows share places; float activations
#include "sparse_linear/x86_float.h"

namespace taut::sparse_linear::cpu_float_avx512bw {
namespace {

struct NumbersAvx512 : quant_linear::Simd512 {
  static constexpr int kTileRows = 24;
  template <bool kBf16>
  static TAUT_INLINE Floats number(const uint8_t* p, int64_t far) {
    if constexpr (kBf16) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(pair16(p, far)), 16));
    else return from_fp16(p, far);
  }
  static TAUT_INLINE Floats pick4(const float* x, Bytes lanes) { return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), lanes); }
  // Four bits of a lane count: of a field of 4 the uppermost is 0.
  static TAUT_INLINE Floats pick8(const float* x, Bytes lanes) { return _mm512_permutexvar_ps(lanes, _mm512_castps256_ps512(_mm256_loadu_ps(x))); }
};

}  // namespace

void run_small(const Params& p) { run_small_numbers<NumbersAvx512>(p); }
void run_tile(const Params& p) { run_tile_numbers<NumbersAvx512>(p); }

}  // namespace taut::sparse_linear::cpu_float_avx512bw
