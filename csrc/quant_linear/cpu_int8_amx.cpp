// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k, then fp32;  w in any format that takes int8 activations
// LAYOUT    w: Rows8 (common/formats.h); two strips make the 16 outputs of a B tile, one chunk of 4 k a row of it.
//           A: per 32 rows: int8 tiles [k tile][2][16 rows][kTileK], fp32 m [k/32][32 rows].
//           B: panel of 32 outputs: int8 tiles [k tile][2][k/4][16 outputs][4], zero points taken off; fp32 scales [units][32]
// WORK      amx_loops.h: C tiles of one unit (32 k, one m and one scale) are stored to L1, scaled and summed there.
// BOUND     per 16 x 16 outputs and 32 k: the epilogue's multiply and fma of 16 vectors. Beside tile instructions they go to one
//           port only: 32 cycles, 256 multiply-adds a cycle. The product takes 16, the store of a C tile 16.
//           Measured: 60-65, since A is streamed from L2. TRIED: C tiles that begin at zero, and vcvtdq2ps: 53 where this took 47.
// LIMITS    AMX tile and int8, AVX-512 F, BW, DQ, VL, VNNI; int8 activations
#include "quant_linear/x86_decode.h"
#include "quant_linear/x86_int8.h"

#include "quant_linear/amx_loops.h"

namespace taut::quant_linear::cpu_int8_amx {
namespace {

// 1.5 * 2^23: an integer under 2^22 in size, added to its bits, makes the float that is as much larger.
// WHY not vcvtdq2ps on a C tile that begins at zero: beside tile instructions it shares one port with the multiplications.
alignas(64) constexpr int32_t kMagicBits[16] = {0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000,
                                                0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000, 0x4b400000};
constexpr float kMagic = 0x1.8p23f;

// kMultiples: x has an m for each 32 k (kInt8); else (kInt8Row) they are all 32767, which goes into the row's unit.
template <int kK, int kPerTile, bool kMultiples>
struct Int8Product {
  static constexpr int kUnitK = kK, kTileK = kPerTile, kElementBytes = 1;
  static_assert(kUnitK * 127 * 128 < 1 << 22);

  template <int kC>
  static TAUT_INLINE void begin() {
    tile_load<kC>(kMagicBits, 0);
  }
  template <int kC, int kA, int kB>
  static TAUT_INLINE void multiply() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  static TAUT_INLINE void finish(__m512 (&total)[kTile], const float* sums, const float* scales, const float* multiples) {
    const __m512 scale = _mm512_load_ps(scales), magic = _mm512_set1_ps(kMagic);
#pragma GCC unroll 16
    for (int r = 0; r < kTile; r++) {
      const __m512 factor = kMultiples ? _mm512_mul_ps(scale, _mm512_set1_ps(multiples[r])) : scale;
      total[r] = _mm512_fmadd_ps(_mm512_sub_ps(_mm512_load_ps(sums + r * kTile), magic), factor, total[r]);
    }
  }
};

template <bool kZeros, Format kFormat, bool kRowScale>
struct Int8Amx {
  using Weight = Decode<Simd512, kFormat>;
  static constexpr bool kMultiples = !kRowScale;
  using Product = std::conditional_t<kRowScale, Int8Product<256, 64, false>, Int8Product<32 / Weight::kScales, 32 / Weight::kScales, true>>;
  using S = Shape<Product>;

  static float factor(const Strips& s) { return Weight::factor(s.layout, s.data); }

  static float prepare_row(const Params& p, int64_t m, int64_t k_tiles, uint8_t* block, int64_t r, float* multiples) {
    const int64_t padded_k = (p.weight.K + 31) / 32 * 32;
    float* row = reinterpret_cast<float*>(scratch(1, padded_k * sizeof(float)));
    uint8_t* at = block + r / kTile * S::kATileBytes + r % kTile * S::kARowBytes;
    if (k_tiles * S::kTileK > padded_k) std::memset(at + (k_tiles - 1) * 2 * S::kATileBytes, 0, S::kARowBytes);
    const float unit = quantize_row(load_row(p, m, padded_k, row), padded_k, p.activations, [&](int64_t k, __m256i q, float multiple) {
      if constexpr (S::kTileK == 16) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + k * 2 * kTile), _mm256_castsi256_si128(q));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(at + (k + 16) * 2 * kTile), _mm256_extracti128_si256(q, 1));
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + k / S::kTileK * 2 * S::kATileBytes + k % S::kTileK), q);
      }
      if (kMultiples)
        for (int64_t unit = k / S::kUnitK; unit < (k + 32) / S::kUnitK; unit++) multiples[unit * kPairRows] = multiple;
    });
    return kMultiples ? unit : unit * 32767.0f;
  }

  static void unpack(const Strips& s, int64_t strip, int64_t far, int64_t block0, int64_t blocks, int half, uint8_t* b, float* scales) {
    const __m512i four_times = _mm512_broadcast_i32x4(_mm_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0));
    BlockCursor at(s, strip, block0);
    for (int64_t block = 0; block < blocks; block++, at.next()) {
      __m512 scale[Weight::kScales];
      Weight::load_int8_scales(at.scales(), far, scale);
      if (block * 32 % S::kUnitK == 0)
        TAUT_FOR (int h = 0; h < Weight::kScales; h++) _mm512_store_ps(scales + (block * 32 / S::kUnitK + h) * kPairColumns + half * kTile, scale[h]);
      const __m512i zero = kZeros ? _mm512_shuffle_epi8(Simd512::widen(at.zeros(), far), four_times) : Simd512::splat(Weight::kZero);
      TAUT_FOR (int c = 0; c < Weight::kSteps; c++) {
        const __m512i packed = Weight::load(at.codes, far, c);
        TAUT_FOR (int h = 0; h < Weight::kHalves; h++) {
          const int64_t chunk = block * 8 + c + 4 * h;
          _mm512_store_si512(b + (chunk / S::kBRows * 2 + half) * S::kBTileBytes + chunk % S::kBRows * 64, _mm512_sub_epi8(Weight::code(packed, h), zero));
        }
      }
    }
  }
};

using Int8Formats = Formats<Format::kTernary, Format::kInt2, Format::kInt3, Format::kInt4, Format::kNf4, Format::kMxfp4, Format::kNvfp4, Format::kInt8>;

}  // namespace

void run(const Params& p) {
  if (p.activations == Activations::kInt8Row && p.weight.group_size == 0) return amx_loop<Int8Amx<false, Format::kInt8, true>>(p);
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { amx_loop<Int8Amx<kZeros, kFormat, false>>(p); });
}

}  // namespace taut::quant_linear::cpu_int8_amx
