// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, bias, out bf16 (a prologue's result is rounded to it);  products
//           of bf16 codes, which are exact but for nf4 (its codebook is rounded to bf16 once), sums in fp32, scaled group by
//           group. Subnormal x and products count as zeros; x above 2^110 may overflow before it is scaled.
// LAYOUT    w: Rows8 (common/formats.h).   A: per 32 rows: bf16 tiles [k tile][2][16 rows][kTileK], each 4 k in the order 0, 2, 1, 3.
//           B: panel of 32 outputs: bf16 tiles [k tile][2][pairs of k][16 outputs][2], the same order; fp32 scales [groups][32]
// WORK      amx_loops.h, a unit being a group. A 32-bit lane holds codes of 4 k of one output; vpermw, with 32 bf16 as its table, looks
//           up those of k = 0 and 2 at once, then those of 1 and 3: no mask, no conversion, no multiplication a weight.
// BOUND     16 cycles a product of 16 x 16 x 32: 512 multiply-adds a cycle. Groups of 32 store a C tile (16 cycles) and scale
//           it (16) for each product; groups of 128 for every fourth. Measured: 60 cycles with groups of 32, 40 with 128: loads from
//           L2 (A is streamed, B and the stored C tiles share L1) and stores that wait for products are not hidden.
//           TRIED: prefetching A one to four k tiles ahead, 5-25% slower.
// LIMITS    AMX tile and bf16, AVX-512 F, BW, DQ, VL; float activations in bf16
#include "quant_linear/x86_decode.h"
#include "quant_linear/x86_rows.h"

#include "quant_linear/amx_loops.h"

namespace taut::quant_linear::cpu_float_amx {
namespace {

template <int kK, int kPerTile>
struct Bf16Product {
  static constexpr int kUnitK = kK, kTileK = kPerTile, kElementBytes = 2;
  template <int kC>
  static TAUT_INLINE void begin() {
    tile_zero<kC>();
  }
  template <int kC, int kA, int kB>
  static TAUT_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
  }
  static TAUT_INLINE void finish(__m512 (&total)[kTile], const float* sums, const float* scales, const float*) {
    const __m512 scale = _mm512_load_ps(scales);
    TAUT_FOR (int r = 0; r < kTile; r++) total[r] = _mm512_fmadd_ps(_mm512_load_ps(sums + r * kTile), scale, total[r]);
  }
};

struct WordTable {
  alignas(64) uint16_t words[32];
};
// What vpermw finds for the low 5 bits of a code and its neighbours: with zero points, bf16(index - 16); fp8: its subnormals.
template <Format kFormat, bool kZeros>
constexpr WordTable make_word_table() {
  WordTable table{};
  for (int i = 0; i < 32; i++) {
    float value = 0;
    if (kZeros) value = static_cast<float>(i - 16);
    else if (kFormat == Format::kNf4) value = kNf4[i & 15];
    else if (kFormat == Format::kMxfp4 || kFormat == Format::kNvfp4) value = kTwiceE2M1[i & 15];
    else if (code_bits(kFormat) == 8) value = static_cast<float>(i & 7) * 0x1p-9f;
    else value = static_cast<float>((i & ((1 << code_bits(kFormat)) - 1)) - zero_code(kFormat));
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    table.words[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  return table;
}
template <Format kFormat, bool kZeros>
constexpr WordTable kWordTable = make_word_table<kFormat, kZeros>();

template <bool kZeros, Format kFormat, int kUnit>
struct FloatAmx {
  using Weight = Decode<Simd512, kFormat>;
  using Product = Bf16Product<kUnit, kUnit == 16 ? 16 : 32>;
  using S = Shape<Product>;
  static constexpr bool kMultiples = false;

  static float factor(const Strips& s) { return kFormat == Format::kNf4 ? 1.0f : Weight::factor(s.layout, s.data); }

  // 32 words to the order that look-ups give: of each 4 k: 0, 2, 1, 3.
  static TAUT_INLINE __m512i reorder(__m512i words) { return _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(words, 0xd8), 0xd8); }

  static float prepare_row(const Params& p, int64_t m, int64_t, uint8_t* block, int64_t r, float*) {
    const int64_t padded_k = (p.weight.K + 31) / 32 * 32;
    uint8_t* at = block + r / kTile * S::kATileBytes + r % kTile * S::kARowBytes;
    const auto store = [&](int64_t k, __m512i words) __attribute__((always_inline)) {
      words = reorder(words);
      if constexpr (S::kTileK == 32) {
        _mm512_storeu_si512(at + k * 2 * kTile * 2, words);
      } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + k * 2 * kTile * 2), _mm512_castsi512_si256(words));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at + (k + 16) * 2 * kTile * 2), _mm512_extracti64x4_epi64(words, 1));
      }
    };
    if (p.prologue == Prologue::kNone) {
      const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.x_row_stride;
      for (int64_t k = 0; k < padded_k; k += 32) {
        const int64_t count = std::min<int64_t>(32, p.weight.K - k);
        store(k, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(0xffffffffu >> (32 - count)), x + k));
      }
    } else {
      const float* row = load_row(p, m, padded_k, reinterpret_cast<float*>(scratch(1, padded_k * sizeof(float))));
      for (int64_t k = 0; k < padded_k; k += 32) {
        __m128i part[4];
        TAUT_FOR (int i = 0; i < 4; i++) part[i] = to_bf16(_mm256_loadu_ps(row + k + i * 8));
        store(k, _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set_m128i(part[1], part[0])), _mm256_set_m128i(part[3], part[2]), 1));
      }
    }
    return 1.0f;
  }

  // E4M3 in the high byte of each word to bf16: the same fields, 120 added to the exponent; a subnormal is looked up.
  static TAUT_INLINE __m512i from_e4m3(__m512i high_bytes, __m512i table) {
    const __m512i fields = _mm512_and_si512(_mm512_srai_epi16(high_bytes, 4), _mm512_set1_epi16(static_cast<int16_t>(0x87f0)));
    const __m512i normal = _mm512_add_epi16(fields, _mm512_set1_epi16(0x3c00));
    const __mmask32 subnormal = _mm512_testn_epi16_mask(fields, _mm512_set1_epi16(0x0780));
    const __m512i value = _mm512_mask_permutexvar_epi16(normal, subnormal, _mm512_srli_epi16(fields, 4), table);
    return _mm512_or_si512(value, _mm512_and_si512(fields, _mm512_set1_epi16(static_cast<int16_t>(0x8000))));
  }
  // Signed byte i of each lane to fp32; integers are exact as bf16, so the low half of it is zero.
  template <int i>
  static TAUT_INLINE __m512i byte_to_float(__m512i x) {
    return _mm512_castps_si512(_mm512_cvtepi32_ps(_mm512_srai_epi32(i == 3 ? x : _mm512_slli_epi32(x, 24 - 8 * i), 24)));
  }
  static TAUT_INLINE __m512i join(__m512i low, __m512i high) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(static_cast<int32_t>(0xffff0000)), high, _mm512_srli_epi32(low, 16), 0xca);
  }

  static void unpack(const Strips& s, int64_t strip, int64_t far, int64_t block0, int64_t blocks, int half, uint8_t* b, float* scales) {
    const __m512i four_times = _mm512_broadcast_i32x4(_mm_set_epi8(12, 12, 12, 12, 8, 8, 8, 8, 4, 4, 4, 4, 0, 0, 0, 0));
    const __m512i table = _mm512_load_si512(kWordTable<kFormat, kZeros>.words);
    BlockCursor at(s, strip, block0);
    for (int64_t block = 0; block < blocks; block++, at.next()) {
      if (block * 32 % S::kUnitK == 0) {
        __m512 scale[Weight::kScales];
        Weight::load_scales(at.scales(), far, scale);
        TAUT_FOR (int h = 0; h < Weight::kScales; h++) _mm512_store_ps(scales + (block * 32 / S::kUnitK + h) * kPairColumns + half * kTile, scale[h]);
      }
      const auto put = [&](int chunk, __m512i even, __m512i odd) __attribute__((always_inline)) {
        const int64_t row = block * 16 + chunk * 2;
        uint8_t* out = b + (row / S::kBRows * 2 + half) * S::kBTileBytes + row % S::kBRows * 64;
        _mm512_store_si512(out, even);
        _mm512_store_si512(out + 64, odd);
      };
      if constexpr (kFormat == Format::kFp8E4M3 || kFormat == Format::kFp8Block) {
        TAUT_FOR (int c = 0; c < 8; c++) {
          const __m512i x = Simd512::load(at.codes + c * 32, far);
          put(c, from_e4m3(_mm512_slli_epi16(x, 8), table), from_e4m3(x, table));
        }
      } else if constexpr (kFormat == Format::kInt8) {
        TAUT_FOR (int c = 0; c < 8; c++) {
          const __m512i x = _mm512_xor_si512(Simd512::load(at.codes + c * 32, far), Simd512::splat(0x80));
          put(c, join(byte_to_float<0>(x), byte_to_float<2>(x)), join(byte_to_float<1>(x), byte_to_float<3>(x)));
        }
      } else {
        const __m512i offset =
            kZeros ? _mm512_sub_epi8(Simd512::splat(16), _mm512_shuffle_epi8(Simd512::widen(at.zeros(), far), four_times)) : _mm512_setzero_si512();
        TAUT_FOR (int c = 0; c < 4; c++) {
          const __m512i x = Weight::load(at.codes, far, c);
          TAUT_FOR (int h = 0; h < 2; h++) {
            const __m512i index = kZeros ? _mm512_add_epi8(Weight::code(x, h), offset) : h ? _mm512_srli_epi16(x, 4) : x;
            put(c + 4 * h, _mm512_permutexvar_epi16(index, table), _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 8), table));
          }
        }
      }
    }
  }
};

template <int kUnit>
void run_unit(const Params& p) {
  using Grouped = Formats<Format::kTernary, Format::kInt2, Format::kInt3, Format::kInt4, Format::kNf4, Format::kInt8, Format::kFp8E4M3>;
  for_format(p.weight, Grouped(), [&]<bool kZeros, Format kFormat>() { amx_loop<FloatAmx<kZeros, kFormat, kUnit>>(p); });
}

}  // namespace

void run(const Params& p) {
  switch (p.weight.format) {
    case Format::kMxfp4: return amx_loop<FloatAmx<false, Format::kMxfp4, 32>>(p);
    case Format::kNvfp4: return amx_loop<FloatAmx<false, Format::kNvfp4, 16>>(p);
    case Format::kFp8Block: return amx_loop<FloatAmx<false, Format::kFp8Block, 128>>(p);
    default: break;
  }
  switch (Rows8{p.weight}.layout_group()) {
    case 32: return run_unit<32>(p);
    case 64: return run_unit<64>(p);
    default: return run_unit<128>(p);
  }
}

}  // namespace taut::quant_linear::cpu_float_amx
