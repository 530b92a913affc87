// Outliers of x (Activations::kInt8Outliers, defined in op.h): found and clipped before a row is rounded to int8, and what was clipped
// multiplied by the weights in fp32 afterwards. WHY: a single large number sets the scale of its 32 k, and the others round to a few
// steps. On SmolLM2 135M this leaves a quarter of the KL divergence that int8 activations cost, for one number in 230.
//
// clip_outliers    per row, before prepare_row; divide_outliers makes what it found multiples of the row's unit
// WeightColumn     where the codes, scales and zeros of one k lie in every strip of Rows8
// column_of_strip  the 8 weights of a k in one strip
// The ISA's rows (x86_rows.h, neon_rows.h) come first: load_halves.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "common/codes.h"
#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

struct Outlier {
  int32_t k;  // in the first of a row's list: how many follow
  float rest;
};
constexpr int64_t outlier_list(int64_t padded_k) { return 1 + padded_k / 32; }  // the longest a row can have

// `row` less its outliers, in `buffer` (which may be `row`), or `row` itself where it has none; the outliers to `list`.
__attribute__((noinline)) inline const float* clip_outliers(const float* row, int64_t padded_k, float* buffer /* [padded_k] */,
                                                            Outlier* list /* [outlier_list()] */) {
  const int64_t blocks = padded_k / 32;
  Outlier* found = list + 1;  // until they are: the bits of the largest and of the second largest magnitude of each block, which order as integers do
  list->k = 0;
  int32_t row_bits = 0;
  for (int64_t b = 0; b < blocks; b++) {
    // WHY no copy of them: gcc makes it 16 bytes at a time, and loads of 32 bytes would wait for two stores.
    const auto bits = [&](int i) { return std::bit_cast<int32_t>(row[b * 32 + i]) & 0x7fffffff; };
    int32_t most = 0, second = 0, times = 0;
    for (int i = 0; i < 32; i++) most = std::max(most, bits(i));
    for (int i = 0; i < 32; i++) times += bits(i) == most;
    for (int i = 0; i < 32; i++) second = std::max(second, bits(i) == most ? 0 : bits(i));
    found[b] = {most, std::bit_cast<float>(times > 1 ? most : second)};
    row_bits = std::max(row_bits, most);
  }
  const float row_max = std::bit_cast<float>(row_bits);
  if (row_bits >= 0x7f800000 || !(row_max >= kSmallestOutlierRowMax)) return row;
  const float steps = 32767.0f / row_max;
  const auto multiple = [&](float largest) { return static_cast<double>(std::min(std::max(std::ceil(largest * steps), 1.0f), 32767.0f)); };
  double squares = 0;  // exact: integers under 2^30
  for (int64_t b = 0; b < blocks; b++) {
    const double m = multiple(std::bit_cast<float>(found[b].k));
    squares += m * m;
  }
  int32_t count = 0;
  for (int64_t b = 0; b < blocks; b++) {
    const int32_t bits = found[b].k;
    const float largest = std::bit_cast<float>(bits), second = found[b].rest;
    const double m = multiple(largest), rest = multiple(second);
    if (!((m * m - rest * rest) * static_cast<double>(blocks) > squares)) continue;
    if (count == 0 && buffer != row) std::memcpy(buffer, row, padded_k * sizeof(float));
    int64_t k = b * 32;
    while ((std::bit_cast<int32_t>(row[k]) & 0x7fffffff) != bits) k++;
    const float clipped = std::copysign(std::max(second, largest * kLeastOutlierShare), row[k]);
    found[count++] = {static_cast<int32_t>(k), row[k] - clipped};
    buffer[k] = clipped;
  }
  list->k = count;
  return count ? buffer : row;
}

inline void divide_outliers(Outlier* list, float unit) {
  for (int32_t i = 1; i <= list->k; i++) list[i].rest /= unit;
}

struct WeightColumn {
  int64_t codes, third, scales, zeros;  // bytes from the beginning of a strip
  int shift, third_shift;               // of the code in the 4 bytes of a row
  WeightColumn() = default;
  [[gnu::always_inline]] WeightColumn(const Rows8& w, int64_t k)
      : codes(w.code_offset(0, k) - k % 4), third(w.third_bit_offset(0, k) - k % 4), scales(w.scale_offset(0, k)), zeros(w.zero_offset(0, k)),
        shift(w.code_shift(k) + static_cast<int>(k % 4 * 8)), third_shift(static_cast<int>(k % 32 / 4 + k % 4 * 8)) {}
};

// The weights of one k: of the 8 rows of a strip. As the kernels beside int8 activations have them: nf4 in 127ths.
template <bool kZeros, Format kFormat>
inline void column_of_strip(const WeightColumn& column, const uint8_t* strip, float global_scale, float* out /* [8] */) {
  constexpr ScaleType kScale = scale_type(kFormat);
  constexpr uint32_t kMask = code_bits(kFormat) == 3 ? 3 : (1u << code_bits(kFormat)) - 1;
  uint32_t words[8], third[8];
  int32_t code[8];
  float scale[8];
  std::memcpy(words, strip + column.codes, sizeof words);
  for (int r = 0; r < 8; r++) code[r] = static_cast<int32_t>(words[r] >> column.shift & kMask);
  if constexpr (kFormat == Format::kInt3) {
    std::memcpy(third, strip + column.third, sizeof third);
    for (int r = 0; r < 8; r++) code[r] |= static_cast<int32_t>((third[r] >> column.third_shift & 1) << 2);
  }
  if constexpr (kScale == ScaleType::kFp16) load_halves(reinterpret_cast<const uint16_t*>(strip + column.scales), scale);
  else
    for (int r = 0; r < 8; r++) scale[r] = load_scale(kScale, strip + column.scales + r * scale_bytes(kScale));
  if constexpr (kFormat == Format::kNvfp4)
    for (int r = 0; r < 8; r++) scale[r] *= global_scale;
  if constexpr (kFormat == Format::kNf4) {
    for (int r = 0; r < 8; r++) out[r] = std::nearbyint(kNf4[code[r]] * 127.0f) / 127.0f * scale[r];
  } else if constexpr (kFormat == Format::kMxfp4 || kFormat == Format::kNvfp4) {
    for (int r = 0; r < 8; r++) out[r] = 0.5f * kTwiceE2M1[code[r]] * scale[r];
  } else {
    constexpr int kZero = kFormat == Format::kInt8 ? 128 : zero_code(kFormat);
    const uint8_t* zeros = strip + column.zeros;
    for (int r = 0; r < 8; r++) out[r] = static_cast<float>(code[r] - (kZeros ? zeros[r] : kZero)) * scale[r];
  }
}

inline float global_scale_of(const Rows8& layout, const uint8_t* packed) {
  if (layout.spec.format != Format::kNvfp4) return 1.0f;
  float scale;
  std::memcpy(&scale, packed + layout.global_scale_offset(), sizeof scale);
  return scale;
}

}  // namespace
}  // namespace taut::quant_linear
