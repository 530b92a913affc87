// What a register is on each ISA for the loops of chunks.h, beside what attention_prefill's loops need of it: numbers of every cache
// format as floats, and dot products of four bytes. ARM's are signed bytes by signed bytes: int8 keys lose the 128 they are stored with.
#pragma once

#include "common/attention_lanes.h"
#include "common/kv_cache.h"

namespace taut::attention_decode {
namespace {

// What of a unit is missing in its numbers, a power of two. e4m3 read as fp16 is 2^-8 of what it stands for: q, and the sums of values, make up for it.
template <KvFormat kFormat>
constexpr float kUnitFactor = kFormat == KvFormat::kFp8 ? 256.0f : 1.0f;
constexpr int16_t kE4M3Bits = static_cast<int16_t>(0xbf80), kE4M3NaN = 0x3f80;  // of an e4m3 in an fp16

// Formats are read in units of two registers, of kUnit numbers. Number i of a unit is in lane position_in_unit(i) of the two: bf16 splits
// into even and odd ones, since a word's upper half is an fp32 as it stands.
template <KvFormat kFormat>
constexpr int64_t position_in_unit(int64_t i, int64_t width) {
  return kFormat == KvFormat::kBFloat16 ? i / 2 + i % 2 * width : i;
}

#if defined(__AVX2__)
struct Avx2 : Avx2Lanes {
  using I = __m256i;
  static constexpr int kUnit = 16;
  static constexpr int kSums = 8;                                                                   // of floats: sums of keys and rows at a time
  static constexpr int keys_together(int64_t element_bytes) { return element_bytes == 4 ? 1 : 2; }  // how many keys are read together
  static constexpr int kValueVectors = 2;                                                           // registers of codes that share a broadcast
  static constexpr int key_vectors(bool /* int4 */, int /* sums a register */) { return 2; }
  static constexpr int kKeyCodeZero = 128;  // what an int8 key of 0 is to dot
  // Whether bytes beside numbers of two bytes are made words and multiplied once. WHY: two products of bytes are 6 instructions, one of words 4.
  static constexpr bool kWords = true;

  template <KvFormat kFormat>
  static TAUT_INLINE void load_unit(const uint8_t* p, V& a, V& b) {
    if constexpr (kFormat == KvFormat::kFloat32) {
      a = load(reinterpret_cast<const float*>(p)), b = load(reinterpret_cast<const float*>(p) + 8);
    } else if constexpr (kFormat == KvFormat::kBFloat16) {
      const I words = load_codes(p);
      a = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16)), b = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(-65536)));
    } else if constexpr (kFormat == KvFormat::kFloat16) {
      a = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      b = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p) + 1));
    } else {  // e4m3 is a part of fp16 but for its NaN: a shift by one to the right copies the sign and leaves exponent and mantissa where fp16 has them
      const I upper = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
      I halves = _mm256_and_si256(_mm256_srai_epi16(upper, 1), _mm256_set1_epi16(kE4M3Bits));
      halves = _mm256_or_si256(halves, _mm256_cmpeq_epi16(_mm256_and_si256(halves, _mm256_set1_epi16(kE4M3NaN)), _mm256_set1_epi16(kE4M3NaN)));
      a = _mm256_cvtph_ps(_mm256_castsi256_si128(halves)), b = _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1));
    }
  }
  // WHY: gcc loads anew for each of several products rather than keep a register
  static TAUT_INLINE void keep(V& a) { asm("" : "+x"(a)); }
  // fp16 of kWidth scales
  static TAUT_INLINE V load_scales(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  // Sums of kWidth registers, in one.
  static TAUT_INLINE V sums_of(const V (&a)[8]) {
    V pairs[4], quads[2];
    TAUT_FOR (int i = 0; i < 4; i++) pairs[i] = add(_mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    TAUT_FOR (int i = 0; i < 2; i++) {
      const __m256d x = _mm256_castps_pd(pairs[2 * i]), y = _mm256_castps_pd(pairs[2 * i + 1]);
      quads[i] = add(_mm256_castpd_ps(_mm256_unpacklo_pd(x, y)), _mm256_castpd_ps(_mm256_unpackhi_pd(x, y)));
    }
    return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }
  static TAUT_INLINE void store_sums(float* out, const V (&a)[8]) { store(out, sums_of(a)); }

  static TAUT_INLINE float sum(V a) {
    const __m128 x = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), y = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }
  static TAUT_INLINE float highest(V a) {
    const __m128 x = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), y = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }

  static TAUT_INLINE I no_codes() { return _mm256_setzero_si256(); }
  static TAUT_INLINE I load_codes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static TAUT_INLINE I load_key_codes(const uint8_t* p) { return load_codes(p); }
  static constexpr bool kLanes = false;  // whether four bytes come from a lane of a register, or fill one
  static TAUT_INLINE I four_bytes(const void* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm256_set1_epi32(bytes);
  }
  static TAUT_INLINE I low_halves(I codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
  static TAUT_INLINE I high_halves(I codes) { return _mm256_and_si256(_mm256_srli_epi16(codes, 4), _mm256_set1_epi8(15)); }
  // sum += unsigned bytes * signed bytes, by fours, twice, where four products fit 16 bits.
  static TAUT_INLINE I dot_twice(I sum, I u0, I s0, I u1, I s1) {
    I words, more;
    asm("vpmaddubsw %[s0], %[u0], %[words]\n\tvpmaddubsw %[s1], %[u1], %[more]\n\tvpaddw %[more], %[words], %[words]\n\t"
        "vpmaddwd %[ones], %[words], %[words]\n\tvpaddd %[words], %[sum], %[sum]"
        : [sum] "+x"(sum), [words] "=&x"(words), [more] "=&x"(more)
        : [s0] "x"(s0), [u0] "x"(u0), [s1] "x"(s1), [u1] "x"(u1), [ones] "x"(_mm256_set1_epi16(1)));
    return sum;
  }
  // Bytes 0 and 2 of each four, and bytes 1 and 3, as words; of signed bytes; and the i-th four bits of each word.
  static TAUT_INLINE I even_words(I codes) { return _mm256_and_si256(codes, _mm256_set1_epi16(255)); }
  static TAUT_INLINE I odd_words(I codes) { return _mm256_srli_epi16(codes, 8); }
  static TAUT_INLINE I even_signed_words(I codes) { return _mm256_srai_epi16(_mm256_slli_epi16(codes, 8), 8); }
  static TAUT_INLINE I odd_signed_words(I codes) { return _mm256_srai_epi16(codes, 8); }
  static TAUT_INLINE I half_words(I codes, int i) { return _mm256_and_si256(_mm256_srli_epi16(codes, 4 * i), _mm256_set1_epi16(15)); }
  // WHY asm: gcc 12 multiplies first and adds later, and keeps a third of the sums in memory meanwhile
  static TAUT_INLINE I dot_words(I sum, I a, I b) {
    I product;
    asm("vpmaddwd %[b], %[a], %[product]\n\tvpaddd %[product], %[sum], %[sum]" : [sum] "+x"(sum), [product] "=&x"(product) : [a] "x"(a), [b] "x"(b));
    return sum;
  }
  static TAUT_INLINE I minus(I a, int32_t b) { return _mm256_sub_epi32(a, _mm256_set1_epi32(b)); }
  static TAUT_INLINE V to_float(I a) { return _mm256_cvtepi32_ps(a); }
  static TAUT_INLINE int32_t sum_of_lanes(I a) {
    const __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)), y = _mm_add_epi32(x, _mm_srli_si128(x, 8));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_srli_si128(y, 4)));
  }
  // x, rounded, as words, of each four 0, 2, 1, 3: as even_words and odd_words want them; and added to sum
  static TAUT_INLINE void split_words(V x, uint8_t* to, I& sum) {
    const I whole = _mm256_cvtps_epi32(x);
    sum = _mm256_add_epi32(sum, whole);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    const __m128i order = _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(words, order));
  }
};

#endif

#if defined(__AVX512F__)
struct Avx512 : Avx512Lanes {
  using I = __m512i;
  static constexpr int kUnit = 32, kSums = 16, kValueVectors = 2;
  static constexpr int keys_together(int64_t /* element_bytes */) { return 2; }
  static constexpr bool kWords = false;
  static constexpr int key_vectors(bool int4, int /* sums a register */) { return int4 ? 2 : 1; }  // WHY: one block of int8 keys after the other is one stream
  static constexpr int kKeyCodeZero = 128;

  template <KvFormat kFormat>
  static TAUT_INLINE void load_unit(const uint8_t* p, V& a, V& b) {
    if constexpr (kFormat == KvFormat::kFloat32) {
      a = load(reinterpret_cast<const float*>(p)), b = load(reinterpret_cast<const float*>(p) + 16);
    } else if constexpr (kFormat == KvFormat::kBFloat16) {
      const I words = load_codes(p);
      a = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)), b = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(-65536)));
    } else if constexpr (kFormat == KvFormat::kFloat16) {
      a = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
      b = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1));
    } else {  // as in Avx2
      const I upper = _mm512_slli_epi16(_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 8);
      const I some = _mm512_and_si512(_mm512_srai_epi16(upper, 1), _mm512_set1_epi16(kE4M3Bits)), nan = _mm512_set1_epi16(kE4M3NaN);
      const I halves = _mm512_mask_mov_epi16(some, _mm512_cmpeq_epi16_mask(_mm512_and_si512(some, nan), nan), _mm512_set1_epi16(-1));
      a = _mm512_cvtph_ps(_mm512_castsi512_si256(halves)), b = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    }
  }
  static TAUT_INLINE void keep(V&) {}
  static TAUT_INLINE V load_scales(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

  static TAUT_INLINE V sums_of(const V (&a)[16]) {
    V pairs[8], quads[4], halves[2];
    TAUT_FOR (int i = 0; i < 8; i++) pairs[i] = add(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
    TAUT_FOR (int i = 0; i < 4; i++) {
      const __m512d x = _mm512_castps_pd(pairs[2 * i]), y = _mm512_castps_pd(pairs[2 * i + 1]);
      quads[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    }
    TAUT_FOR (int i = 0; i < 2; i++)
      halves[i] = add(_mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88), _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd));
    return add(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88), _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
  }
  static TAUT_INLINE void store_sums(float* out, const V (&a)[16]) { store(out, sums_of(a)); }

  static TAUT_INLINE float sum(V a) { return Avx2::sum(_mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }
  static TAUT_INLINE float highest(V a) { return Avx2::highest(_mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1))); }

  static TAUT_INLINE I no_codes() { return _mm512_setzero_si512(); }
  static TAUT_INLINE I load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static TAUT_INLINE I load_key_codes(const uint8_t* p) { return load_codes(p); }
  static constexpr bool kLanes = false;
  static TAUT_INLINE I four_bytes(const void* p) {
    int32_t bytes;
    std::memcpy(&bytes, p, 4);
    return _mm512_set1_epi32(bytes);
  }
  static TAUT_INLINE I low_halves(I codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  static TAUT_INLINE I high_halves(I codes) { return _mm512_and_si512(_mm512_srli_epi16(codes, 4), _mm512_set1_epi8(15)); }
  // sum += unsigned bytes * signed bytes, by fours. Two products must fit 16 bits: one side is at most 127, or the other within 64.
#if defined(__AVX512VNNI__)
  static TAUT_INLINE I dot(I sum, I u, I s) { return _mm512_dpbusd_epi32(sum, u, s); }
  static TAUT_INLINE I dot_twice(I sum, I u0, I s0, I u1, I s1) { return dot(dot(sum, u0, s0), u1, s1); }
#else
  static TAUT_INLINE I dot(I sum, I u, I s) { return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(u, s), _mm512_set1_epi16(1))); }
  static TAUT_INLINE I dot_twice(I sum, I u0, I s0, I u1, I s1) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_add_epi16(_mm512_maddubs_epi16(u0, s0), _mm512_maddubs_epi16(u1, s1)), _mm512_set1_epi16(1)));
  }
#endif
  static TAUT_INLINE I times_128_plus(I high, I low) { return _mm512_add_epi32(_mm512_slli_epi32(high, 7), low); }
  static TAUT_INLINE I minus(I a, int32_t b) { return _mm512_sub_epi32(a, _mm512_set1_epi32(b)); }
  static TAUT_INLINE V to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static TAUT_INLINE int32_t sum_of_lanes(I a) { return _mm512_reduce_add_epi32(a); }
  // x, rounded, as high * 128 + low; and added to sum
  static TAUT_INLINE void split(V x, uint8_t* high, uint8_t* low, I& sum) {
    const I whole = _mm512_cvtps_epi32(x);
    sum = _mm512_add_epi32(sum, whole);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 7)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm512_cvtepi32_epi8(_mm512_and_si512(whole, _mm512_set1_epi32(127))));
  }
};
#endif

#if defined(__aarch64__)
struct Neon : NeonLanes {
  using I = int32x4_t;
  static constexpr int kUnit = 8, kSums = 16, kValueVectors = 2;
  static constexpr int keys_together(int64_t /* element_bytes */) { return 4; }
  static constexpr bool kWords = false;
  static constexpr int key_vectors(bool /* int4 */, int sums) { return sums <= 4 ? 4 : 2; }  // 16 sums at most
  static constexpr int kKeyCodeZero = 0;

  template <KvFormat kFormat>
  static TAUT_INLINE void load_unit(const uint8_t* p, V& a, V& b) {
    if constexpr (kFormat == KvFormat::kFloat32) {
      a = load(reinterpret_cast<const float*>(p)), b = load(reinterpret_cast<const float*>(p) + 4);
    } else if constexpr (kFormat == KvFormat::kBFloat16) {
      const uint32x4_t words = vreinterpretq_u32_u8(vld1q_u8(p));
      a = vreinterpretq_f32_u32(vshlq_n_u32(words, 16)), b = vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000u)));
    } else if constexpr (kFormat == KvFormat::kFloat16) {
      const float16x8_t halves = vreinterpretq_f16_u8(vld1q_u8(p));
      a = vcvt_f32_f16(vget_low_f16(halves)), b = vcvt_high_f32_f16(halves);
    } else {  // as in Avx2
      const uint16x8_t wide = vmovl_u8(vld1_u8(p)), magnitude = vandq_u16(wide, vdupq_n_u16(0x7f));
      const uint16x8_t sign = vshlq_n_u16(vandq_u16(wide, vdupq_n_u16(0x80)), 8);
      const uint16x8_t nan = vandq_u16(vceqq_u16(magnitude, vdupq_n_u16(0x7f)), vdupq_n_u16(0x7e00));
      const float16x8_t halves = vreinterpretq_f16_u16(vorrq_u16(vorrq_u16(vshlq_n_u16(magnitude, 7), sign), nan));
      a = vcvt_f32_f16(vget_low_f16(halves)), b = vcvt_high_f32_f16(halves);
    }
  }
  static TAUT_INLINE void keep(V&) {}
  static TAUT_INLINE V load_scales(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }

  static TAUT_INLINE void store_sums(float* out, const V (&a)[16]) {
    TAUT_FOR (int i = 0; i < 16; i += 4) store(out + i, vpaddq_f32(vpaddq_f32(a[i], a[i + 1]), vpaddq_f32(a[i + 2], a[i + 3])));
  }
  static TAUT_INLINE float sum(V a) { return vaddvq_f32(a); }
  static TAUT_INLINE float highest(V a) { return vmaxnmvq_f32(a); }

  static TAUT_INLINE I no_codes() { return vdupq_n_s32(0); }
  static TAUT_INLINE I load_codes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
  static TAUT_INLINE I load_key_codes(const uint8_t* p) { return vreinterpretq_s32_u8(veorq_u8(vld1q_u8(p), vdupq_n_u8(0x80))); }
  static TAUT_INLINE I low_halves(I codes) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(codes), vdupq_n_u8(15))); }
  static TAUT_INLINE I high_halves(I codes) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(codes), 4)); }

  static constexpr bool kLanes = true;
  // sum += a * the four bytes of b's lane, by fours. WHY a switch: the lane is an immediate, and a constant in every loop that is unrolled
#if defined(__ARM_FEATURE_DOTPROD)
  static TAUT_INLINE I dot_lane(I sum, I a, I b, int lane) {
    const int8x16_t x = vreinterpretq_s8_s32(a), y = vreinterpretq_s8_s32(b);
    switch (lane) {
      case 0: return vdotq_laneq_s32(sum, x, y, 0);
      case 1: return vdotq_laneq_s32(sum, x, y, 1);
      case 2: return vdotq_laneq_s32(sum, x, y, 2);
      default: return vdotq_laneq_s32(sum, x, y, 3);
    }
  }
#else
  static TAUT_INLINE int8x16_t everywhere(I b, int lane) {
    switch (lane) {
      case 0: return vreinterpretq_s8_s32(vdupq_laneq_s32(b, 0));
      case 1: return vreinterpretq_s8_s32(vdupq_laneq_s32(b, 1));
      case 2: return vreinterpretq_s8_s32(vdupq_laneq_s32(b, 2));
      default: return vreinterpretq_s8_s32(vdupq_laneq_s32(b, 3));
    }
  }
  static TAUT_INLINE I dot_lane(I sum, I a, I b, int lane) {  // two products fit 16 bits, as in Avx2
    const int8x16_t x = vreinterpretq_s8_s32(a), y = everywhere(b, lane);
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y)));
  }
#endif
  // sum[row][byte][i] += a[i] * the four bytes from `b` on of each row and byte.
  template <int kRows, int kBytes, int kVectors>
  static TAUT_INLINE void dot_lanes(I (&sum)[kRows][kBytes][kVectors], const I (&a)[kVectors], const uint8_t* b) {
    constexpr int kFours = kRows * kBytes;
    I fours[(kFours + 3) / 4];
    if constexpr (kFours <= 2) fours[0] = vcombine_s32(vreinterpret_s32_u8(vld1_u8(b)), vdup_n_s32(0));
    else
      TAUT_FOR (int n = 0; n < kFours; n += 4) fours[n / 4] = load_codes(b + n * 4);
    TAUT_FOR (int n = 0; n < kFours; n++)
      TAUT_FOR (int i = 0; i < kVectors; i++) sum[n / kBytes][n % kBytes][i] = dot_lane(sum[n / kBytes][n % kBytes][i], a[i], fours[n / 4], n % 4);
  }
  static TAUT_INLINE I times_128_plus(I high, I low) { return vaddq_s32(vshlq_n_s32(high, 7), low); }
  static TAUT_INLINE I minus(I a, int32_t b) { return vsubq_s32(a, vdupq_n_s32(b)); }
  static TAUT_INLINE V to_float(I a) { return vcvtq_f32_s32(a); }
  static TAUT_INLINE int32_t sum_of_lanes(I a) { return vaddvq_s32(a); }
  static TAUT_INLINE void split(V x, uint8_t* high, uint8_t* low, I& sum) {
    const I whole = vcvtnq_s32_f32(x);
    sum = vaddq_s32(sum, whole);
    const auto store4 = [](uint8_t* p, I lanes) __attribute__((always_inline)) {
      const int16x4_t words = vmovn_s32(lanes);
      const uint32_t bytes = vget_lane_u32(vreinterpret_u32_s8(vmovn_s16(vcombine_s16(words, words))), 0);
      std::memcpy(p, &bytes, 4);
    };
    store4(high, vshrq_n_s32(whole, 7));
    store4(low, vandq_s32(whole, vdupq_n_s32(127)));
  }
};
#endif

}  // namespace
}  // namespace taut::attention_decode
