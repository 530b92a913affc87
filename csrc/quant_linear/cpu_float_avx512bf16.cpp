// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, bias, out bf16 (a prologue's result is rounded to it);  w times its
//           scale rounded to bf16, as a dense bf16 layer has it (nvfp4 but for its global scale, which comes in at the end: exact);
//           products exact, sums in fp32. Subnormal x, weights and sums count as zeros: vdpbf16ps flushes them.
// LAYOUT    w: Rows8 (common/formats.h).   A, B: avx512bf16_tile.h
// WORK      A panel is unpacked to L1 as fp32 (x86_float_kernel.h), two vectors of it rounded to one of bf16; avx512bf16_tile.h multiplies.
// BOUND     vdpbf16ps: 2 zmm a cycle and core on Zen 5, 64 multiply-adds: twice fp32.
// LIMITS    AVX-512 F, BW, DQ, VL and BF16; float activations; x in bf16
#include "quant_linear/avx512bf16_tile.h"

namespace taut::quant_linear::cpu_float_avx512bf16 {
namespace {

using avx512bf16::kPairBytes;

template <bool kLow>
inline __m512i twice_each_lane() {  // indices 0, 0, 1, 1 .. 7, 7, or 8, 8 .. 15, 15
  const __m512i low = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return kLow ? low : _mm512_or_si512(low, _mm512_set1_epi32(8));
}

template <bool kZeros, Format kFormat>
void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t blocks, uint8_t* out) {
  using Weight = FloatDecode<Simd512, kFormat, kZeros>;
  const int64_t far = strip + 1 < s.layout.num_strips() ? s.strip_bytes : 0;
  BlockCursor at(s, strip, block0);
  for (int64_t b = 0; b < blocks; b++, at.next(), out += 16 * kPairBytes) {
    if constexpr (Weight::kFp8) {
      // WHY not FloatDecode: as fp16, of which E4M3 is a part (2^-8 of it), 10 instructions make 32 weights, not 21.
      __m512 scale[1];
      Weight::Packed::load_scales(at.scales(), far, scale);
      scale[0] = scale[0] * kE4M3Factor;
      const __m512 low_scale = _mm512_permutexvar_ps(twice_each_lane<true>(), scale[0]), high_scale = _mm512_permutexvar_ps(twice_each_lane<false>(), scale[0]);
      TAUT_FOR (int step = 0; step < 8; step++) {
        const __m512i bytes = Weight::load(at.codes, far, step);
        TAUT_FOR (int i = 0; i < 2; i++) {  // bytes 2i and 2i + 1 of each lane to the upper halves of its words
          const __m512i order = _mm512_add_epi8(_mm512_broadcast_i32x4(_mm_set_epi8(13, -1, 12, -1, 9, -1, 8, -1, 5, -1, 4, -1, 1, -1, 0, -1)),
                                                _mm512_set1_epi16(static_cast<int16_t>(i * 0x200)));
          const __m512i words = _mm512_shuffle_epi8(bytes, order);
          const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
          const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves)), high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
          _mm512_store_si512(out + (step * 2 + i) * kPairBytes, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high * high_scale, low * low_scale)));
        }
      }
    } else {
      // vcvtne2ps2bf16 puts 16 words of even k before 16 of odd k.
      const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m512i interleave = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_add_epi32(lanes, _mm512_set1_epi32(16)), 16));
      const auto scales = Weight::load_scales(at.scales(), at.zeros(), far);
      TAUT_FOR (int step = 0; step < Weight::kSteps; step++) {
        const __m512i packed = Weight::load(at.codes, far, step);
        for_each_code(
            [&]<int i>() __attribute__((always_inline)) {
              // Of the codes in a lane, those of k and k + 1: neighbours where they are bytes, else two apart.
              constexpr int kEven = Weight::kWide ? 2 * i : i / 2 * 4 + i % 2, kOdd = Weight::kWide ? kEven + 1 : kEven + 2;
              static_assert(Weight::k_of(0, kOdd) == Weight::k_of(0, kEven) + 1);
              const __m512bh both = _mm512_cvtne2ps_pbh(Weight::template weight<kOdd>(packed, scales), Weight::template weight<kEven>(packed, scales));
              _mm512_store_si512(out + Weight::k_of(step, kEven) / 2 * kPairBytes, _mm512_permutexvar_epi16(interleave, reinterpret_cast<__m512i>(both)));
            },
            std::make_integer_sequence<int, Weight::kCodes / 2>());
      }
    }
  }
}

}  // namespace

void run_tile(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() {
    avx512bf16::tile(p, unpack<kZeros, kFormat>, FloatDecode<Simd512, kFormat, false>::factor(Rows8{p.weight}, p.packed));
  });
}

}  // namespace taut::quant_linear::cpu_float_avx512bf16
