// COMPUTES  out[M,N] = x[M,K] @ w[N,K]^T + bias, w n:m sparse and in 16 bits;  x, out fp32, bf16 or fp16; x enters as it is; products and sums in fp32
// LAYOUT    w: Sparse8 (common/sparse.h), fp16 or bf16.   A: x86_float.h
// WORK      small: a vector holds a kept number of each of 8 rows, widened to fp32. Rows with places of their own: 4 or 8 neighbours of x are looked
//           up by the places of 8 rows at once (vpermilps, vpermps, which ignore the bits above, so that a shift is all it takes); x is what is
//           permuted, w streams. Rows that share places: x at the place, broadcast. Then one fma. Codes and places serve up to 4 or 8 rows of x.
//           tile: quant_linear's, an fp32 panel in L1 that 6 rows x 16 outputs of plain fma go over; zeros are multiplied too.
// BOUND     M=1: DRAM, 9 bits for each dense weight (2:4): 288 bytes for 256 of them, in 16 steps of 5.5 instructions, some 25 cycles where one core
//           of a Zen 3 takes 60 to read them.   Shared places, many rows: fma of what is kept alone, with a broadcast load for each: 8 rows
//           take 21 instructions for 128 dense weights and 8 fma, where a dense tile takes 16 fma.   Tile: fp32 fma; unpacking a weight costs as
//           much as 4.5 rows of x. Counted, not measured.
// LIMITS    AVX2, FMA, F16C; fp16 and bf16 weights in any pattern; float activations
#include "sparse_linear/x86_float.h"

namespace taut::sparse_linear::cpu_float_avx2 {
namespace {

struct NumbersAvx2 : quant_linear::Simd256 {
  static constexpr int kTileRows = 6;
  template <bool kBf16>
  static TAUT_INLINE Floats number(const uint8_t* p, int64_t) {
    return load8_numbers<kBf16>(p);
  }
  static TAUT_INLINE Floats pick4(const float* x, Bytes lanes) { return _mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(x)), lanes); }
  static TAUT_INLINE Floats pick8(const float* x, Bytes lanes) { return look_up_floats(x, lanes); }
};

}  // namespace

void run_small(const Params& p) { run_small_numbers<NumbersAvx2>(p); }
void run_tile(const Params& p) { run_tile_numbers<NumbersAvx2>(p); }

}  // namespace taut::sparse_linear::cpu_float_avx2
