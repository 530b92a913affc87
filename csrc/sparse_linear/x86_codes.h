// Sparse weights of 4 and 8 bits made dense in registers, and for many rows of x the tile of quant_linear over panels unpacked so. A row with
// places of its own keeps other k than its neighbours: a tile cannot leave out what is zero, but it need not read it.
//   dense_block  a k-block of Sparse8 as 8 chunks of codes as Rows8 has them (int8), of one strip or (Simd512) of two
//   run_codes    Int8Kernel of quant_linear/x86_int8_kernel.h, the same bits as that of the dense weight
// COUNTED   put: 3 instructions with masks (AVX-512, for two strips at once), 4 without; a vector of dense 2:4 codes takes two of them
#pragma once

#include "quant_linear/x86_int8_isas.h"
#include "sparse_linear/op.h"
#include "sparse_linear/x86_pattern.h"

namespace taut::sparse_linear {
namespace {

using quant_linear::BlockCursor;
using quant_linear::Table;

constexpr Table byte_of_four(int i) {
  Table table{};
  for (int b = 0; b < 16; b++) table.bytes[b] = static_cast<uint8_t>(b / 4 * 4 + i);
  return table;
}
constexpr Table places_from(int place) {
  Table table{};
  for (int b = 0; b < 16; b++) table.bytes[b] = static_cast<uint8_t>(place + b % 4);
  return table;
}
template <int i>
constexpr Table kByteOfFour = byte_of_four(i);  // byte i of each row's four, four times
template <int place>
constexpr Table kPlacesFrom = places_from(place);  // what four k of each row are in their m

// `to`, but where the place that `each` picks is the one here, the code that it picks.
TAUT_INLINE __m256i put(__m256i to, __m256i places, __m256i codes, __m256i each, __m256i here) {
  return _mm256_blendv_epi8(to, _mm256_shuffle_epi8(codes, each), _mm256_cmpeq_epi8(_mm256_shuffle_epi8(places, each), here));
}
// A nibble each, of the four kept numbers of a chunk, for the 8 rows of each strip.
TAUT_INLINE __m256i shared_places(const uint8_t* p, int64_t, quant_linear::Simd256) {
  const uint32_t nibbles = quant_linear::load_as<uint16_t>(p);
  return _mm256_set1_epi32(static_cast<int>((nibbles & 0xf) | (nibbles & 0xf0) << 4 | (nibbles & 0xf00) << 8 | (nibbles & 0xf000) << 12));
}
#if defined(__AVX512BW__)
TAUT_INLINE __m512i put(__m512i to, __m512i places, __m512i codes, __m512i each, __m512i here) {
  return _mm512_mask_shuffle_epi8(to, _mm512_cmpeq_epi8_mask(_mm512_shuffle_epi8(places, each), here), codes, each);
}
TAUT_INLINE __m512i shared_places(const uint8_t* p, int64_t far, quant_linear::Simd512) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(shared_places(p, 0, quant_linear::Simd256())), shared_places(p + far, 0, quant_linear::Simd256()), 1);
}
#endif

template <class Simd, int n, int m, bool kShared, bool kWhole>
TAUT_INLINE void dense_block(const uint8_t* at, int64_t far, typename Simd::Bytes zero, typename Simd::Bytes (&chunks)[8]) {
  using Bytes = typename Simd::Bytes;
  using Words __attribute__((vector_size(sizeof(Bytes)))) = uint16_t;
  constexpr int kKept = 32 / m * n / 4, kSpan = 4 / n * m / 4, kFieldBits = m == 4 ? 2 : 4, kVectors = kWhole ? kKept : kKept / 2;
  const uint8_t* fields = at + kVectors * 32;
  const auto chunk = [&]<int c>() __attribute__((always_inline)) {  // of kept codes: kSpan dense ones
    Bytes code = Simd::load(at + c % kVectors * 32, far), places;
    if (!kWhole) code = (c < kVectors ? code : Simd::right(code, 4)) & Simd::splat(15);
    if constexpr (kShared) places = shared_places(fields + c * 2, far, Simd());
    else places = reinterpret_cast<Bytes>(reinterpret_cast<Words>(Simd::load(fields + c * kFieldBits / 8 * 32, far)) >> c * kFieldBits % 8);
    places = places & Simd::splat(kShared ? m - 1 : (1 << kFieldBits) - 1);
    const auto dense = [&]<int d>() __attribute__((always_inline)) {
      Bytes found = zero;
      const auto kept = [&]<int i>() __attribute__((always_inline)) {
        constexpr int kPlace = d * 4 - i / n * m;  // of the chunk's first k, within the kept number's m
        if constexpr (kPlace >= 0 && kPlace < m) found = put(found, places, code, Simd::table(kByteOfFour<i>), Simd::table(kPlacesFrom<kPlace>));
      };
      kept.template operator()<0>(), kept.template operator()<1>(), kept.template operator()<2>(), kept.template operator()<3>();
      chunks[c * kSpan + d] = found;
    };
    [&]<int... d>(std::integer_sequence<int, d...>)
        __attribute__((always_inline)) { (dense.template operator()<d>(), ...); }(std::make_integer_sequence<int, kSpan>());
  };
  [&]<int... c>(std::integer_sequence<int, c...>)
      __attribute__((always_inline)) { (chunk.template operator()<c>(), ...); }(std::make_integer_sequence<int, kKept>());
}

template <class Isa>
struct CodesKernel : quant_linear::Int8Kernel<Isa> {
  using Dense = quant_linear::Int8Kernel<Isa>;
  using Bytes = typename Isa::Bytes;

  template <bool, Format kFormat, class PanelT>
  static void unpack(const quant_linear::Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int place, PanelT& panel) {
    if (place % Isa::kStrips != 0) return;
    constexpr int kPasses = Dense::template passes<kFormat>;
    constexpr int64_t kRow = Dense::kPanelStrips * 32;
    const Sparse8 w{s.layout.spec, s.pattern};
    const int64_t far = strip + 1 < s.layout.num_strips() ? s.strip_bytes : 0;
    const Bytes zero = Isa::splat(sparse_zero(kFormat)), low = Isa::splat(15);
    with_pattern(s.pattern, [&]<int n, int m, bool kShared>() {
      BlockCursor cursor(w, s.layout, s.data, strip, block0);
      for (int64_t b = 0; b < k_blocks; b++, cursor.next()) {
        Isa::store_floats(panel.scales + (b * Dense::kPanelStrips + place) * 8, Isa::from_fp16(cursor.scales(), far));
        Bytes chunks[8];
        dense_block<Isa, n, m, kShared, kFormat == Format::kInt8>(cursor.codes, far, zero, chunks);
        uint8_t* out = panel.codes + b * kPasses * 8 * kRow + place * 32;
        TAUT_FOR (int c = 0; c < 8; c++)
          TAUT_FOR (int pass = 0; pass < kPasses; pass++)
            *reinterpret_cast<Bytes*>(out + (pass * 8 + c) * kRow) = kPasses == 1 ? chunks[c] : (pass == 0 ? Isa::right(chunks[c], 4) : chunks[c]) & low;
      }
    });
  }
};

template <class Isa>
void run_codes(const Params& p) {
  using Formats = quant_linear::Formats<Format::kInt4, Format::kInt8>;
  quant_linear::for_format(p.weight, Formats(), [&]<bool kZeros, Format kFormat>() {
    if constexpr (!kZeros) quant_linear::tile_loop<CodesKernel<Isa>, false, kFormat>(p);  // sparse weights have no zero points
  });
}

}  // namespace
}  // namespace taut::sparse_linear
