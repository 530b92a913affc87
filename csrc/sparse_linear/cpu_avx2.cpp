// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias, w 2:4 with places of its own in each row;  x quantized inside to int8
//           (quant_linear/op.h), sums exact in int32 over 32 k, then fp32
// LAYOUT    w: Sparse8 (common/sparse.h).   A: x86_places.h
// WORK      One step: 8 k of x, broadcast; a byte shuffle picks of them what each of 8 rows keeps, 4 numbers; the sign of a code goes to x, so
//           that vpmaddubsw takes the code's size unsigned: |code| <= 128, |x| <= 127, two products are at most 32512. vpmaddwd by 1.
//           A task is a range of strips; up to 4 rows of x share codes and places.
// BOUND     M=1: DRAM, 160 bytes for 256 dense int8 weights (1.6 times fewer), 96 for int4 (1.33 times fewer).  Beyond: 9 instructions a row
//           of x and step for 64 dense operations, more than a dense tile needs.
// LIMITS    AVX2, FMA, F16C; int8 activations; int8 and int4 weights, 2:4 without shared places
#include "sparse_linear/x86_places.h"

namespace taut::sparse_linear::cpu_avx2 {
namespace {

struct Avx2 : quant_linear::Simd256 {
  template <int kRows>
  static constexpr int kVectors = kRows == 1   ? 4
                                  : kRows == 2 ? 2
                                               : 1;

  template <int c>
  static TAUT_INLINE Bytes places(Bytes fields) {
    return _mm256_or_si256(_mm256_and_si256(c == 0 ? fields : _mm256_srli_epi16(fields, 2 * c), splat(3)), _mm256_set1_epi32(0x04040000));
  }
  static TAUT_INLINE Bytes broadcast8(const uint8_t* p) { return _mm256_set1_epi64x(load_as<int64_t>(p)); }

  struct Sum {
    Bytes value;
  };
  static TAUT_INLINE Bytes look_up(Bytes x, Bytes places) { return _mm256_shuffle_epi8(x, places); }
  static TAUT_INLINE void multiply(Sum& sum, Bytes code, Bytes x, Bytes zero) {
    const Bytes signed_code = _mm256_sub_epi8(code, zero);
    const Bytes pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(signed_code), _mm256_sign_epi8(x, signed_code));
    sum.value = _mm256_add_epi32(sum.value, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static TAUT_INLINE Floats to_float(const Sum& sum) { return _mm256_cvtepi32_ps(sum.value); }
};

}  // namespace

void run_rows(const Params& p) { run_places<Avx2>(p); }

}  // namespace taut::sparse_linear::cpu_avx2
