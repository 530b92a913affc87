// Packed weights to what 8-bit dot products take, written once for every format and for both widths of x86 vectors.
//
// A Simd is a vector type and the few operations decoding needs. Simd256 holds 32 bytes of one strip (Rows8, formats.h);
// Simd512 those of two strips side by side, the second `far` bytes after the first.
//
// Decode<Simd, kFormat> gives the weights as unsigned bytes u = code + kZero (or codes whose zero points are stored). All
// formats of fewer than 8 bits have one shape: in steps c = 0..3, load() makes a vector whose low nibbles belong to chunk c and
// whose high nibbles to chunk c + 4. So int3 costs 5 operations more than int4 in each step, and the two 4-bit floats and nf4
// one table look-up more a chunk. The weight is (u - kZero) * scale * factor.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "common/formats.h"

namespace taut::quant_linear {
namespace {

#define TAUT_INLINE inline __attribute__((always_inline))
#define TAUT_FOR(...) _Pragma("GCC unroll 16") for (__VA_ARGS__)

struct Table {
  alignas(16) uint8_t bytes[16];
};
constexpr int kNf4Zero = 128, kE2M1Zero = 12;
// u of each code: nf4's codebook rounded to 8 bits; twice the E2M1 number, which is an integer.
constexpr Table make_table(Format format) {
  Table table{};
  for (int i = 0; i < 16; i++) {
    const float nf4 = kNf4[i] * 127.0f;
    table.bytes[i] = static_cast<uint8_t>(format == Format::kNf4 ? static_cast<int>(nf4 < 0 ? nf4 - 0.5f : nf4 + 0.5f) + kNf4Zero : kTwiceE2M1[i] + kE2M1Zero);
  }
  return table;
}
constexpr Table nibbles_of(Table table, int shift) {
  for (uint8_t& byte : table.bytes) byte = byte >> shift & 15;
  return table;
}
template <Format kFormat>
constexpr Table kTable = make_table(kFormat);
constexpr Table kNf4High = nibbles_of(make_table(Format::kNf4), 4), kNf4Low = nibbles_of(make_table(Format::kNf4), 0);

template <class T>
TAUT_INLINE T load_as(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

// E4M3 to 2^-8 of it as fp16: the same fields at other places, a NaN (all ones below the sign) to a NaN.
TAUT_INLINE __m256i e4m3_to_fp16(__m128i bytes) {
  const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
  const __m256i magnitude = _mm256_and_si256(wide, _mm256_set1_epi16(0x3f80));
  const __m256i nan = _mm256_and_si256(_mm256_add_epi16(magnitude, _mm256_set1_epi16(0x80)), _mm256_set1_epi16(0x4000));
  return _mm256_or_si256(nan, _mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0xbf80))));
}
constexpr float kE4M3Factor = 256.0f;

struct Simd256 {
  using Bytes = __m256i;
  using Floats = __m256;
  static constexpr int kStrips = 1;

  static TAUT_INLINE Bytes load(const uint8_t* p, int64_t) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static TAUT_INLINE Bytes splat(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static TAUT_INLINE Bytes table(const Table& t) { return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(t.bytes))); }
  static TAUT_INLINE Bytes look_up(Bytes t, Bytes nibbles) { return _mm256_shuffle_epi8(t, nibbles); }
  static TAUT_INLINE Bytes right(Bytes x, int bits) { return _mm256_srli_epi16(x, bits); }
  static TAUT_INLINE Bytes left(Bytes x, int bits) { return _mm256_slli_epi16(x, bits); }
  // The bits 0, 1, 4, 5 of x and 2, 6 of third; the others are anything.
  static TAUT_INLINE Bytes join(Bytes x, Bytes third) { return (x & splat(0x33)) | (third & splat(0x44)); }
  static TAUT_INLINE __m256i widen(const uint8_t* p, int64_t) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }

  static TAUT_INLINE Floats from_fp16(const uint8_t* p, int64_t) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static TAUT_INLINE Floats from_fp32(const uint8_t* p, int64_t) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  // 2^(s - 127), where s = 0 is subnormal. The fma makes a NaN of the infinity that s = 255 has become, and changes nothing else.
  static TAUT_INLINE Floats from_e8m0(const uint8_t* p, int64_t far) {
    const __m256 v = _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(widen(p, far), 23), _mm256_set1_epi32(0x400000)));
    return _mm256_fmadd_ps(v, _mm256_setzero_ps(), v);
  }
  // The scales of the first and of the second 16 k, both 2^-8 of what they are.
  static TAUT_INLINE void from_e4m3(const uint8_t* p, int64_t, Floats (&scales)[2]) {
    const __m256i halves = e4m3_to_fp16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    scales[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(halves));
    scales[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
  }
};

#if defined(__AVX512BW__)
struct Simd512 {
  using Bytes = __m512i;
  using Floats = __m512;
  static constexpr int kStrips = 2;

  static TAUT_INLINE __m256i pair16(const uint8_t* p, int64_t far) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
                                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + far)), 1);
  }
  static TAUT_INLINE __m128i pair8(const uint8_t* p, int64_t far) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + far)));
  }
  static TAUT_INLINE Bytes load(const uint8_t* p, int64_t far) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + far)), 1);
  }
  static TAUT_INLINE Bytes splat(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static TAUT_INLINE Bytes table(const Table& t) { return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(t.bytes))); }
  static TAUT_INLINE Bytes look_up(Bytes t, Bytes nibbles) { return _mm512_shuffle_epi8(t, nibbles); }
  // WHY a switch: the intrinsics want a literal count.
  static TAUT_INLINE Bytes right(Bytes x, int bits) {
    switch (bits) {
      case 1: return _mm512_srli_epi16(x, 1);
      case 2: return _mm512_srli_epi16(x, 2);
      default: return _mm512_srli_epi16(x, 4);
    }
  }
  static TAUT_INLINE Bytes left(Bytes x, int bits) { return bits == 1 ? _mm512_slli_epi16(x, 1) : _mm512_slli_epi16(x, 2); }
  static TAUT_INLINE Bytes join(Bytes x, Bytes third) { return _mm512_ternarylogic_epi32(splat(0x33), x, third, 0xca); }
  static TAUT_INLINE __m512i widen(const uint8_t* p, int64_t far) { return _mm512_cvtepu8_epi32(pair8(p, far)); }

  static TAUT_INLINE Floats from_fp16(const uint8_t* p, int64_t far) { return _mm512_cvtph_ps(pair16(p, far)); }
  static TAUT_INLINE Floats from_fp32(const uint8_t* p, int64_t far) { return _mm512_castsi512_ps(load(p, far)); }
  static TAUT_INLINE Floats from_e8m0(const uint8_t* p, int64_t far) {
    const __m512 v = _mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(widen(p, far), 23), _mm512_set1_epi32(0x400000)));
    return _mm512_fmadd_ps(v, _mm512_setzero_ps(), v);
  }
  static TAUT_INLINE void from_e4m3(const uint8_t* p, int64_t far, Floats (&scales)[2]) {
    TAUT_FOR (int half = 0; half < 2; half++) scales[half] = _mm512_cvtph_ps(e4m3_to_fp16(pair8(p + half * 8, far)));
  }
};
#endif

template <class Simd, Format kFormat>
struct Decode {
  using Bytes = typename Simd::Bytes;
  using Floats = typename Simd::Floats;
  static constexpr bool kBytes = kFormat == Format::kInt8 || kFormat == Format::kNf4;  // u takes all 8 bits; elsewhere u <= 24
  static constexpr bool kE2M1 = kFormat == Format::kMxfp4 || kFormat == Format::kNvfp4;
  static constexpr int kScales = kFormat == Format::kNvfp4 ? 2 : 1;  // scales a block: chunks 0-3 and 4-7 have one each
  static constexpr int kZero = kBytes ? 128 : kE2M1 ? kE2M1Zero : zero_code(kFormat);
  static constexpr int kSteps = kFormat == Format::kInt8 ? 8 : 4, kHalves = 8 / kSteps;
  static constexpr int kBlockBytes = 32 * code_bits(kFormat);

  // Step c of a block: chunk c, and in the high nibbles chunk c + 4.
  static TAUT_INLINE Bytes load(const uint8_t* block, int64_t far, int c) {
    if constexpr (code_bits(kFormat) >= 4) return Simd::load(block + c * 32, far);
    Bytes x = Simd::load(block + c % 2 * 32, far);
    if (c >= 2) x = Simd::right(x, 2);
    if constexpr (kFormat == Format::kInt3) {
      Bytes third = Simd::load(block + 64, far);
      if (c != 2) third = c < 2 ? Simd::left(third, 2 - c) : Simd::right(third, c - 2);
      x = Simd::join(x, third);
    }
    return x;
  }
  // u of chunk c + 4 * half.
  static TAUT_INLINE Bytes code(Bytes x, int half) {
    if constexpr (kFormat == Format::kInt8) return x;
    const Bytes index = nibble(x, half);
    if constexpr (kBytes || kE2M1) return Simd::look_up(Simd::table(kTable<kFormat>), index);
    return index;
  }
  // u = 16 * (pass 0) + (pass 1), for instructions that need u small.
  static TAUT_INLINE Bytes code_pass(Bytes x, int half, int pass) {
    if constexpr (kFormat == Format::kInt8) return nibble(x, 1 - pass);
    if constexpr (kFormat == Format::kNf4) return Simd::look_up(Simd::table(pass == 0 ? kNf4High : kNf4Low), nibble(x, half));
    return code(x, half);
  }

  // Of one group of the header, for the 8 outputs of each strip.
  static TAUT_INLINE void load_scales(const uint8_t* scales, int64_t far, Floats (&out)[kScales]) {
    constexpr ScaleType kType = scale_type(kFormat);
    if constexpr (kType == ScaleType::kE4M3) Simd::from_e4m3(scales, far, out);
    else if constexpr (kType == ScaleType::kE8M0) out[0] = Simd::from_e8m0(scales, far);
    else if constexpr (kType == ScaleType::kFp32) out[0] = Simd::from_fp32(scales, far);
    else out[0] = Simd::from_fp16(scales, far);
  }
  static constexpr int kScaleBytes = 8 * kScales * static_cast<int>(scale_bytes(scale_type(kFormat)));  // of a group

  static float factor(const Rows8& layout, const uint8_t* packed) {
    if constexpr (kFormat == Format::kNvfp4) return load_as<float>(packed + layout.global_scale_offset()) * (0.5f * kE4M3Factor);
    return kFormat == Format::kMxfp4 ? 0.5f : kFormat == Format::kNf4 ? 1.0f / 127.0f : 1.0f;
  }

 private:
  static TAUT_INLINE Bytes nibble(Bytes x, int half) {
    return (half ? Simd::right(x, 4) : x) & Simd::splat(code_bits(kFormat) == 2 ? 3 : code_bits(kFormat) == 3 ? 7 : 15);
  }
};

}  // namespace
}  // namespace taut::quant_linear
