// The float kernels of x86, written once: FloatKernel<Isa> is the policy that the loops in cpu_loops.h run. An ISA is a Simd
// (x86_simd.h), and kTileRows, rows of x in a register tile of 16 outputs.
//
// A: per block of R rows, per 32 k: fp32 [32][R].   B: panel fp32 [k][2 strips][8 outputs], dequantized as torch would.
#pragma once

#include <utility>

#include "quant_linear/x86_decode.h"
#include "quant_linear/x86_rows.h"

#include "quant_linear/cpu_loops.h"

namespace taut::quant_linear {
namespace {

// ---- Packed weights to fp32. A 32-bit lane holds codes of one output: 8 nibbles (see Decode::load) or 4 bytes ----

template <class Simd>
using Int32s __attribute__((vector_size(sizeof(typename Simd::Bytes)))) = int32_t;
template <class Simd>
using Uint32s __attribute__((vector_size(sizeof(typename Simd::Bytes)))) = uint32_t;

struct FloatTable {
  alignas(64) float values[16];
};
// The weight of a code before its scale: without what it has in its zero point beyond zero_code. A nibble's upper bits are
// anything if a code is shorter.
constexpr FloatTable make_float_table(Format format) {
  FloatTable table{};
  for (int i = 0; i < 16; i++) {
    if (format == Format::kNf4) table.values[i] = kNf4[i];
    else if (is_integer(format)) table.values[i] = static_cast<float>((i & ((1 << code_bits(format)) - 1)) - zero_code(format));
    else table.values[i] = 0.5f * kTwiceE2M1[i];
  }
  return table;
}
template <Format kFormat>
constexpr FloatTable kFloatTable = make_float_table(kFormat);

template <class Simd, Format kFormat, bool kZeros>
struct FloatDecode {
  using Bytes = typename Simd::Bytes;
  using Floats = typename Simd::Floats;
  using Packed = Decode<Simd, kFormat>;
  static constexpr bool kFp8 = kFormat == Format::kFp8E4M3 || kFormat == Format::kFp8Block, kWide = code_bits(kFormat) == 8;
  static constexpr bool kE2M1 = Packed::kE2M1;
  static constexpr int kSteps = kWide ? 8 : 4, kCodes = kWide ? 4 : 8, kScales = Packed::kScales;
  // Four bits that are an integer: shifts and a conversion where the processor looks up 8 values only, not 16.
  static constexpr bool kSigned = kFormat == Format::kInt8 || (kFormat == Format::kInt4 && Simd::kStrips == 1);

  // What a block's codes are multiplied with, and what is added then: code * scale + offset is (q - z) * scale, exact.
  struct Scales {
    Floats scale[kScales], offset;
  };
  static TAUT_INLINE Scales load_scales(const uint8_t* scales, const uint8_t* zeros, int64_t far) {
    Scales result;
    Packed::load_scales(scales, far, result.scale);
    if (kFp8) result.scale[0] = result.scale[0] * 0.5f;  // code() gives twice the number
    if (kFormat == Format::kNvfp4)                       // WHY not at the end: a product with 2^-8 of the scale could be subnormal
      TAUT_FOR (auto& scale : result.scale) scale = scale * kE4M3Factor;
    if (kZeros) result.offset = (Simd::splat_float(zero_code(kFormat)) - Simd::from_int32(Simd::widen(zeros, far))) * result.scale[0];
    return result;
  }
  static float factor(const Rows8& layout, const uint8_t* packed) {
    return kFormat == Format::kNvfp4 ? load_as<float>(packed + layout.global_scale_offset()) : 1.0f;
  }

  static TAUT_INLINE Bytes load(const uint8_t* block, int64_t far, int step) {
    const Bytes x = Packed::load(block, far, step);
    return kSigned ? x ^ Simd::splat(kWide ? 0x80 : 0x88) : x;
  }
  // The k within a block of 32 that code j of step `step` stands for.
  static constexpr int k_of(int step, int j) { return kWide ? step * 4 + j : (step + j % 2 * 4) * 4 + j / 2; }

  template <int j>
  static TAUT_INLINE Floats weight(Bytes x, const Scales& s) {
    const Floats scale = s.scale[kScales == 2 ? j % 2 : 0];
    return kZeros ? Simd::fma(code<j>(x), scale, s.offset) : code<j>(x) * scale;
  }

 private:
  static TAUT_INLINE Floats floats(Uint32s<Simd> v) { return reinterpret_cast<Floats>(v); }

  template <int j>
  static TAUT_INLINE Floats code(Bytes x) {
    constexpr int kBits = kWide ? 8 : 4, kLow = kBits * j, kAbove = 32 - kBits - kLow;  // bits below and above the code
    const Uint32s<Simd> top = reinterpret_cast<Uint32s<Simd>>(x) << kAbove, bottom = reinterpret_cast<Uint32s<Simd>>(x) >> kLow;
    if constexpr (kSigned) {
      return Simd::from_int32(reinterpret_cast<Bytes>(reinterpret_cast<Int32s<Simd>>(top) >> (32 - kBits)));
    } else if constexpr (kFp8) {
      // E and mantissa in place, 6 added to the bias: g = 2^(E-6) * (1 + m/8). The number is g/2, or g - 2^-6 where E = 0;
      // the smaller of the two is the right one. WHY not a multiply by 2^120: its subnormal input is slow, or flushed to 0.
      const Floats g = floats((top >> 4 & 0x07f00000) + (121u << 23));
      const Floats twice = Simd::min(g, Simd::fma(g, Simd::splat_float(2.0f), Simd::splat_float(-0x1p-5f)));
      return floats(reinterpret_cast<Uint32s<Simd>>(twice) | (top & 0x80000000));
    } else if constexpr (Simd::kStrips == 2 || (!kE2M1 && kFormat != Format::kNf4)) {
      return Simd::look_up_floats(kFloatTable<kFormat>.values, reinterpret_cast<Bytes>(bottom));
    } else if constexpr (kE2M1) {  // the sign by itself
      const Floats magnitude = Simd::look_up_floats(kFloatTable<kFormat>.values, reinterpret_cast<Bytes>(bottom));
      return floats(reinterpret_cast<Uint32s<Simd>>(magnitude) | (top & 0x80000000));
    } else {
      const Floats low = Simd::look_up_floats(kFloatTable<kFormat>.values, reinterpret_cast<Bytes>(bottom));
      const Floats high = Simd::look_up_floats(kFloatTable<kFormat>.values + 8, reinterpret_cast<Bytes>(bottom));
      return Simd::choose_by_sign(low, high, floats(top));
    }
  }
};

template <class F, int... j>
TAUT_INLINE void for_each_code(F f, std::integer_sequence<int, j...>) {
  (f.template operator()<j>(), ...);
}

using FloatFormats = Formats<Format::kTernary, Format::kInt2, Format::kInt3, Format::kInt4, Format::kNf4, Format::kMxfp4, Format::kNvfp4, Format::kInt8,
                             Format::kFp8E4M3, Format::kFp8Block>;

// WHY beside TAUT_FOR: that unrolls 16 times, and sums of a loop that is not unrolled whole are in memory (a third of the speed).
#define TAUT_FOR_ROWS(...) _Pragma("GCC unroll 32") for (__VA_ARGS__)

template <class Isa>
struct FloatKernel {
  using Bytes = typename Isa::Bytes;
  using Floats = typename Isa::Floats;
  static constexpr int kRowBlockBytes = 32 * 4, kWidth = Isa::kStrips * 8, kVectors = kPanelStrips / Isa::kStrips;
  template <Format>
  static constexpr int row_block_bytes = kRowBlockBytes;
  static constexpr int kTileRows = Isa::kTileRows;
  static_assert(kTileRows <= 32);
  static constexpr int64_t kChunkRows = 252 / kTileRows * kTileRows;
  template <Format kFormat>
  static constexpr int code_bytes = 4;
  template <Format kFormat>
  static constexpr int64_t panel_k = 256;  // 16 KB of B
  template <Format kFormat, int kRows>
  static constexpr int streams = Isa::kStrips * (kRows == 1   ? 4 / Isa::kStrips
                                                 : kRows == 2 ? 2
                                                              : 1);

  template <Format kFormat>
  static float factor(const Params& p) {
    return FloatDecode<Isa, kFormat, false>::factor(Rows8{p.weight}, p.packed);
  }

  // Row r of a block of `rows`, interleaved; returns the factor the results are multiplied by.
  template <bool kZeros, Format kFormat>
  static float prepare_row(const Params&, const float* x, int64_t padded_k, int r, int rows, uint8_t* a, int64_t panel_k, int64_t panel_stride) {
    for (int64_t k = 0; k < padded_k; k += 32) {
      float* block = reinterpret_cast<float*>(a + k / panel_k * panel_stride + k % panel_k / 32 * kRowBlockBytes * rows);
      for (int i = 0; i < 32; i++) block[i * rows + r] = x[k + i];
    }
    return 1.0f;
  }

  template <bool kZeros, Format kFormat, int kRows, int kStreams>
  static __attribute__((noinline)) void strip_product(const Strips& s, const uint8_t* w, int64_t stride, const uint8_t* a, float* sums) {
    using Weight = FloatDecode<Isa, kFormat, kZeros>;
    constexpr int kCount = (kStreams + Isa::kStrips - 1) / Isa::kStrips;  // a strip alone is paired with itself (stride 0)
    Floats total[kCount][kRows];
    TAUT_FOR (int i = 0; i < kCount; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = Isa::zero();
    const int64_t superblock_bytes = s.header_bytes + 4 * s.blocks_per_group * s.block_bytes, apart = Isa::kStrips * stride;
    const int64_t scale_bytes = s.layout.group_scale_bytes();
    for (int64_t left = s.num_blocks; left > 0; w += superblock_bytes) {
      const uint8_t* codes = w + s.header_bytes;
      for (int g = 0; g < 4 && left > 0; g++)
        for (int64_t b = 0; b < s.blocks_per_group && left > 0; b++, left--, a += kRowBlockBytes * kRows, codes += s.block_bytes) {
          const float* x = reinterpret_cast<const float*>(a);
          Floats sum[kCount][kRows];
          typename Weight::Scales scales[kCount];
          TAUT_FOR (int i = 0; i < kCount; i++) {
            scales[i] = Weight::load_scales(w + i * apart + g * scale_bytes, w + i * apart + 4 * scale_bytes + g * 8, stride);
            TAUT_FOR (int r = 0; r < kRows; r++) sum[i][r] = Isa::zero();
          }
          TAUT_FOR (int step = 0; step < Weight::kSteps; step++) {
            Bytes packed[kCount];
            TAUT_FOR (int i = 0; i < kCount; i++) packed[i] = Weight::load(codes + i * apart, stride, step);
            for_each_code(
                [&]<int j>() __attribute__((always_inline)) {
                  Floats weight[kCount];
                  TAUT_FOR (int i = 0; i < kCount; i++) weight[i] = Weight::template weight<j>(packed[i], scales[i]);
                  TAUT_FOR (int r = 0; r < kRows; r++) {
                    const Floats xk = Isa::splat_float(x[Weight::k_of(step, j) * kRows + r]);
                    TAUT_FOR (int i = 0; i < kCount; i++) sum[i][r] = Isa::fma(weight[i], xk, sum[i][r]);
                  }
                },
                std::make_integer_sequence<int, Weight::kCodes>());
          }
          TAUT_FOR (int i = 0; i < kCount; i++)
            TAUT_FOR (int r = 0; r < kRows; r++) total[i][r] = total[i][r] + sum[i][r];
        }
    }
    TAUT_FOR (int i = 0; i < kCount; i++)
      TAUT_FOR (int r = 0; r < kRows; r++) Isa::store_strips(sums + (Isa::kStrips * i * kRows + r) * 8, kStreams > 1 ? kRows * 8 : 0, total[i][r]);
  }

  // A vector of two strips is unpacked at the first of them.
  template <bool kZeros, Format kFormat, class PanelT>
  static void unpack(const Strips& s, int64_t strip, int64_t block0, int64_t k_blocks, int half, PanelT& panel) {
    using Weight = FloatDecode<Isa, kFormat, kZeros>;
    if (half % Isa::kStrips) return;
    const int64_t far = strip + 1 < s.layout.num_strips() ? s.strip_bytes : 0;
    BlockCursor at(s, strip, block0);
    for (int64_t b = 0; b < k_blocks; b++, at.next()) {
      const auto scales = Weight::load_scales(at.scales(), at.zeros(), far);
      float* out = reinterpret_cast<float*>(panel.codes) + b * 32 * kPanelStrips * 8 + half * 8;
      TAUT_FOR (int step = 0; step < Weight::kSteps; step++) {
        const Bytes packed = Weight::load(at.codes, far, step);
        for_each_code([&]<int j>() __attribute__((
                          always_inline)) { Isa::store_floats(out + Weight::k_of(step, j) * kPanelStrips * 8, Weight::template weight<j>(packed, scales)); },
                      std::make_integer_sequence<int, Weight::kCodes>());
      }
    }
  }

  // c[kRows][2][8] += A[kRows, 32 * k_blocks] @ panel.
  template <int kRows>
  static __attribute__((noinline)) void micro(const uint8_t* a, const float* panel, int64_t k_blocks, float* c) {
    Floats sum[kRows][kVectors];
    TAUT_FOR_ROWS (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = Isa::zero();
    for (int64_t b = 0; b < k_blocks; b++, a += kRowBlockBytes * kRows) {
      const float* x = reinterpret_cast<const float*>(a);
      for (int k = 0; k < 32; k += 4, panel += 4 * kPanelStrips * 8, x += 4 * kRows)
        TAUT_FOR (int step = 0; step < 4; step++) {
          Floats w[kVectors];
          TAUT_FOR (int i = 0; i < kVectors; i++) w[i] = Isa::load_floats(panel + (step * kVectors + i) * kWidth);
          TAUT_FOR_ROWS (int r = 0; r < kRows; r++) {
            const Floats xk = Isa::splat_float(x[step * kRows + r]);
            TAUT_FOR (int i = 0; i < kVectors; i++) sum[r][i] = Isa::fma(w[i], xk, sum[r][i]);
          }
        }
    }
    TAUT_FOR_ROWS (int r = 0; r < kRows; r++)
      TAUT_FOR (int i = 0; i < kVectors; i++) {
        float* at = c + (r * kVectors + i) * kWidth;
        Isa::store_floats(at, Isa::load_floats(at) + sum[r][i]);
      }
  }

  template <bool kZeros, Format kFormat, class PanelT>
  static void micro_rows(int rows, const uint8_t* a, const PanelT& panel, int64_t k_blocks, float* c) {
    using Micro = void (*)(const uint8_t*, const float*, int64_t, float*);
    static constexpr auto kTable = []<int... r>(std::integer_sequence<int, r...>) {
      struct {
        Micro run[sizeof...(r)];
      } table{{micro<r + 1>...}};
      return table;
    }(std::make_integer_sequence<int, kTileRows>());
    kTable.run[rows - 1](a, reinterpret_cast<const float*>(panel.codes), k_blocks, c);
  }
};

template <class Isa>
void run_float_small(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() { small_loop<FloatKernel<Isa>, kZeros, kFormat>(p); });
}
template <class Isa>
void run_float_tile(const Params& p) {
  for_format(p.weight, FloatFormats(), [&]<bool kZeros, Format kFormat>() { tile_loop<FloatKernel<Isa>, kZeros, kFormat>(p); });
}

}  // namespace
}  // namespace taut::quant_linear
