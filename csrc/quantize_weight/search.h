// The quantizer, written once and compiled by every impl with its own flags. Sums run in eight fixed lanes and nothing
// is contracted, so each ISA chooses the same codes bit for bit: a checkpoint does not depend on who made it.
//
// Per group: candidate scales around the one that maps the largest magnitude onto the end of the range; the one with the
// least squared error, each scale taken as fp16 before codes are chosen, wins. As llama.cpp's Q4_0, int4 without zeros
// maps the largest magnitude to -8 by a scale of either sign, so that all 16 codes are used. int2 and int3 try more: with few
// levels much clipping pays. ternary starts from the mean magnitude, as BitNet b1.58 does (arXiv 2402.17764), and takes the
// scale of least squares for the weights that each candidate keeps. nf4, nvfp4 and fp8_block are what their definitions say.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>

#include "common/codes.h"
#include "quantize_weight/op.h"

namespace taut::quantize_weight {
namespace {

constexpr int64_t kLanes = 8;
// Times the plain scale. int4: some clip, two leave room. int8: the largest magnitude maps to 127, 126, ... 112; of use
// where weights already lie on a grid, as those of a checkpoint that was 4-bit once: a third of the error there.
constexpr float kInt4Candidates[] = {1.0f, 0.96f, 0.92f, 0.88f, 0.84f, 0.80f, 1.04f, 1.08f};
constexpr int kInt8Candidates = 16;
// fp8: the largest magnitude maps to one of the 16 largest codes, 448 down to 120, for the same reason.
constexpr int kFp8Candidates = 16;
// int2 and int3: from the largest magnitude at the end of the range to a twentieth of it there, where a row has outliers.
// Ahead of these comes 1, and what maps it to the shorter end: weights that are ternary, say, are exact then.
constexpr float kFewBitsCandidates[] = {1.1f,  1.05f, 0.95f, 0.9f, 0.85f, 0.8f, 0.75f, 0.7f,  0.65f, 0.6f,  0.55f,  0.5f,
                                        0.45f, 0.4f,  0.35f, 0.3f, 0.25f, 0.2f, 0.16f, 0.13f, 0.1f,  0.08f, 0.065f, 0.05f};
// ternary: the scale whose half is the threshold under which weights become 0, times the mean magnitude. The last ones keep
// nothing but outliers.
constexpr float kTernaryCandidates[] = {1.0f, 0.7f, 0.85f, 1.15f, 1.3f, 1.45f, 1.6f, 1.8f, 2.0f, 2.3f, 2.7f, 3.2f, 4.0f, 5.0f, 6.5f, 8.5f, 12.0f, 18.0f, 30.0f};

// WHY: adding 1.5*2^23 rounds to nearest even in every instruction set, SSE2 too. |value| < 2^22.
inline float round_even(float value) { return (value + 12582912.0f) - 12582912.0f; }

// The nearest E4M3 number, ties to even, for |value| <= 448: what float_to_e4m3 rounds to, in a form that vectorizes. Adding
// 1.5*2^23 times the step between E4M3 numbers at `value` (2^-9 or more) rounds to that step.
inline float round_e4m3(float value) {
  const uint32_t exponent = std::max(std::bit_cast<uint32_t>(value) & 0x7f800000u, uint32_t{121} << 23);
  const float magic = std::bit_cast<float>((exponent + (uint32_t{20} << 23)) | 0x400000u);
  return (value + magic) - magic;
}

struct Range {
  float low, high;  // codes relative to the zero point
};

template <bool kFp8>
inline float squared_error(const float* x, int64_t padded, float scale, Range range) {
  const float inverse = scale != 0 ? 1.0f / scale : 0.0f;
  float sums[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const float value = x[i + lane] * inverse;
      const float code = kFp8 ? round_e4m3(std::min(std::max(value, range.low), range.high)) : std::min(std::max(round_even(value), range.low), range.high);
      const float error = code * scale - x[i + lane];
      sums[lane] += error * error;
    }
  float total = 0;
  for (const float sum : sums) total += sum;
  return total;
}

inline void quantize_fp8_group(const float* x, int64_t length, int64_t padded, uint8_t* codes, uint16_t* scale_out) {
  float largest = 0, best_error = 0, best_scale = 0;
  for (int64_t i = 0; i < length; i++) largest = std::max(largest, std::fabs(x[i]));
  for (int c = 0; c < kFp8Candidates; c++) {
    const uint16_t bits = float_to_fp16(largest / e4m3_to_float(static_cast<uint8_t>(0x7e - c)));
    const float scale = fp16_to_float(bits);
    const float error = squared_error<true>(x, padded, scale, Range{-kLargestE4M3, kLargestE4M3});
    if (c == 0 || error < best_error) best_error = error, best_scale = scale, *scale_out = bits;
  }
  const float inverse = best_scale != 0 ? 1.0f / best_scale : 0.0f;
  for (int64_t i = 0; i < length; i++) codes[i] = float_to_e4m3(x[i] * inverse);
}

// Quantizes one group, x[length] zero-padded to a multiple of 8. Writes codes (one byte each), fp16 scale, zero point.
inline void quantize_group(const float* x, int64_t length, int64_t padded, const WeightSpec& w, uint8_t* codes, uint16_t* scale_out, uint8_t* zero_out) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < length; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
  const float extreme = -low > high ? low : high;

  float plain;
  if (w.format == Format::kInt8) plain = std::fabs(extreme) / 127.0f;
  else if (w.zeros) plain = (high - low) / 15.0f;
  else plain = extreme / -8.0f;

  float best_error = 0, best_scale = 0, best_zero = w.format == Format::kInt8 ? 0.0f : 8.0f;
  uint16_t best_bits = 0;
  const int num_candidates = w.format == Format::kInt8 ? kInt8Candidates : static_cast<int>(std::size(kInt4Candidates));
  for (int c = 0; c < num_candidates; c++) {
    const float factor = w.format == Format::kInt8 ? 127.0f / static_cast<float>(127 - c) : kInt4Candidates[c];
    const uint16_t bits = float_to_fp16(plain * factor);
    const float scale = fp16_to_float(bits);
    float zero = best_zero;
    if (w.zeros) zero = scale > 0 ? std::min(15.0f, round_even(-low * factor / scale)) : 0.0f;
    const Range range = w.format == Format::kInt8 ? Range{-127, 127} : Range{-zero, 15 - zero};
    const float error = squared_error<false>(x, padded, scale, range);
    if (c == 0 || error < best_error) best_error = error, best_scale = scale, best_zero = zero, best_bits = bits;
  }

  const Range range = w.format == Format::kInt8 ? Range{-127, 127} : Range{-best_zero, 15 - best_zero};
  const float inverse = best_scale != 0 ? 1.0f / best_scale : 0.0f, offset = w.format == Format::kInt8 ? 0.0f : best_zero;
  for (int64_t i = 0; i < length; i++)
    codes[i] = static_cast<uint8_t>(static_cast<int>(std::min(std::max(round_even(x[i] * inverse), range.low), range.high) + offset));
  *scale_out = best_bits;
  if (w.zeros) *zero_out = static_cast<uint8_t>(best_zero);
}

inline float largest_magnitude(const float* x, int64_t length) {
  float largest = 0;
  for (int64_t i = 0; i < length; i++) largest = std::max(largest, std::fabs(x[i]));
  return largest;
}

// int2 and int3. Without zero points a candidate comes with either sign, since the range has one code more below 0 than
// above; with them it comes with the zero point that the group's minimum gives, and its neighbours.
inline void quantize_few_bits_group(const float* x, int64_t length, int64_t padded, const WeightSpec& w, uint8_t* codes, uint16_t* scale_out,
                                    uint8_t* zero_out) {
  float low = 0, high = 0;
  for (int64_t i = 0; i < length; i++) low = std::min(low, x[i]), high = std::max(high, x[i]);
  const float middle = static_cast<float>(zero_code(w.format)), top = 2 * middle - 1;
  const float plain = w.zeros ? (high - low) / top : (-low > high ? low : high) / -middle;
  const float plain_zero = plain > 0 ? round_even(-low / plain) : 0.0f;

  float best_error = 0, best_scale = 0, best_zero = middle;
  uint16_t best_bits = 0;
  const int num_candidates = static_cast<int>(std::size(kFewBitsCandidates)) + 2, num_variants = w.zeros ? 3 : 2;
  for (int c = 0; c < num_candidates; c++)
    for (int variant = 0; variant < num_variants; variant++) {
      const float factor = c == 0 ? 1.0f : c == 1 ? middle / (middle - 1) : kFewBitsCandidates[c - 2];
      const uint16_t bits = float_to_fp16(w.zeros || variant == 0 ? plain * factor : -plain * factor);
      const float scale = fp16_to_float(bits);
      const float zero = w.zeros ? std::min(std::max(plain_zero + static_cast<float>(variant == 2 ? -1 : variant), 0.0f), top) : middle;
      const float error = squared_error<false>(x, padded, scale, Range{-zero, top - zero});
      if ((c == 0 && variant == 0) || error < best_error) best_error = error, best_scale = scale, best_zero = zero, best_bits = bits;
    }
  const float inverse = best_scale != 0 ? 1.0f / best_scale : 0.0f;
  for (int64_t i = 0; i < length; i++)
    codes[i] = static_cast<uint8_t>(static_cast<int>(std::min(std::max(round_even(x[i] * inverse), -best_zero), top - best_zero) + best_zero));
  *scale_out = best_bits;
  if (w.zeros) *zero_out = static_cast<uint8_t>(best_zero);
}

// Sum and number of the magnitudes above `threshold`.
inline void sum_above(const float* x, int64_t padded, float threshold, float& sum, float& count) {
  float sums[kLanes] = {}, counts[kLanes] = {};
  for (int64_t i = 0; i < padded; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const float size = std::fabs(x[i + lane]);
      sums[lane] += size > threshold ? size : 0.0f;
      counts[lane] += size > threshold ? 1.0f : 0.0f;
    }
  sum = count = 0;
  for (int64_t lane = 0; lane < kLanes; lane++) sum += sums[lane], count += counts[lane];
}

inline void quantize_ternary_group(const float* x, int64_t length, int64_t padded, uint8_t* codes, uint16_t* scale_out) {
  float total, count, best_error = 0, best_scale = 0;
  sum_above(x, padded, 0.0f, total, count);
  const float mean = total / static_cast<float>(length);
  for (int c = 0; c < static_cast<int>(std::size(kTernaryCandidates)); c++) {
    float sum;
    sum_above(x, padded, mean * kTernaryCandidates[c] * 0.5f, sum, count);
    const uint16_t bits = float_to_fp16(count > 0 ? sum / count : 0.0f);
    const float scale = fp16_to_float(bits), error = squared_error<false>(x, padded, scale, Range{-1, 1});
    if (c == 0 || error < best_error) best_error = error, best_scale = scale, *scale_out = bits;
  }
  const float inverse = best_scale != 0 ? 1.0f / best_scale : 0.0f;
  for (int64_t i = 0; i < length; i++) codes[i] = static_cast<uint8_t>(1 + static_cast<int>(std::min(std::max(round_even(x[i] * inverse), -1.0f), 1.0f)));
}

// bitsandbytes' codes: the number of midpoints between NF4 numbers that lie under x / largest.
inline void quantize_nf4_group(const float* x, int64_t length, uint8_t* codes, float* scale_out) {
  const float largest = largest_magnitude(x, length), inverse = 1.0f / std::max(largest, 1e-38f);
  *scale_out = largest;
  for (int64_t i = 0; i < length; i++) {
    const float value = std::min(std::max(x[i] * inverse, -1.0f), 1.0f);
    int code = 0;
    for (int j = 0; j < 15; j++) code += value > (kNf4[j] + kNf4[j + 1]) / 2;
    codes[i] = static_cast<uint8_t>(code);
  }
}

// The nearest E2M1 number, ties to the even code, past 6 saturating: its code, and its size.
inline uint8_t e2m1_code(float value) {
  const float size = std::fabs(value);
  const int code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
  return static_cast<uint8_t>(code | std::signbit(value) << 3);
}
inline float e2m1_size(float size) {
  const int halves = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f);
  const int ones = (size > 2.5f) + (size >= 3.5f) + 2 * (size > 5.0f);
  return static_cast<float>(halves) * 0.5f + static_cast<float>(ones);
}

// The shared scale of OCP Microscaling 1.0, or the next where it is closer: the first clips what lies between 6 and 8 times it.
inline void quantize_mxfp4_group(const float* x, int64_t length, int64_t padded, uint8_t* codes, uint8_t* scale_out) {
  const float largest = largest_magnitude(x, length);
  const int plain = std::max(static_cast<int>(std::bit_cast<uint32_t>(largest) >> 23) - 2, 0);  // floor(log2(largest)) - 2 + 127
  int best = plain;
  float best_error = 0;
  for (int s = plain; s <= plain + 1; s++) {
    const float inverse = std::bit_cast<float>(static_cast<uint32_t>(254 - s) << 23);
    float sums[kLanes] = {}, error = 0;
    for (int64_t i = 0; i < padded; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; lane++) {
        const float size = std::fabs(x[i + lane]) * inverse, off = e2m1_size(size) - size;
        sums[lane] += off * off;
      }
    for (const float sum : sums) error += sum;
    if (s != plain) error *= 4;  // in units of its own scale: squares of any size fit
    if (s == plain || error < best_error) best = s, best_error = error;
  }
  *scale_out = static_cast<uint8_t>(best);
  const float inverse = std::bit_cast<float>(static_cast<uint32_t>(254 - best) << 23);
  for (int64_t i = 0; i < length; i++) codes[i] = e2m1_code(x[i] * inverse);
}

inline void quantize_nvfp4_group(const float* x, int64_t length, float global_scale, uint8_t* codes, uint8_t* scale_out) {
  *scale_out = float_to_e4m3(largest_magnitude(x, length) / 6.0f / global_scale);
  const float scale = e4m3_to_float(*scale_out) * global_scale;
  for (int64_t i = 0; i < length; i++) codes[i] = scale != 0 ? e2m1_code(x[i] / scale) : 0;
}

// Row n as fp32 in x[K]; false if it holds a NaN or an infinity.
inline bool load_row(const Params& p, int64_t n, float* x) {
  float poison = 0;
  for (int64_t k = 0; k < p.weight.K; k++) x[k] = load_float(p.w, n * p.w_row_stride + k, p.dtype), poison += x[k] * 0.0f;
  return poison == 0;
}

inline bool quantize_row(const Params& p, int64_t n, float* x, uint8_t* expanded) {
  const WeightSpec& w = p.weight;
  bool finite = load_row(p, n, x);
  const int64_t group = w.group_size ? w.group_size : w.K, groups = w.num_groups();
  float* padded_group = x + (w.K + kLanes - 1) / kLanes * kLanes;
  for (int64_t g = 0; g < groups && finite; g++) {
    const int64_t k = g * group, length = std::min(group, w.K - k), padded = (length + kLanes - 1) / kLanes * kLanes;
    const float* values = x + k;
    if (padded != length) {
      std::memset(padded_group, 0, padded * sizeof(float));
      std::memcpy(padded_group, values, length * sizeof(float));
      values = padded_group;
    }
    const int64_t at = n * groups + g;
    uint16_t* fp16 = static_cast<uint16_t*>(p.scales) + at;
    switch (w.format) {
      case Format::kTernary: quantize_ternary_group(values, length, padded, expanded + k, fp16); break;
      case Format::kInt2:
      case Format::kInt3: quantize_few_bits_group(values, length, padded, w, expanded + k, fp16, w.zeros ? p.zeros + at : nullptr); break;
      case Format::kNf4: quantize_nf4_group(values, length, expanded + k, static_cast<float*>(p.scales) + at); break;
      case Format::kMxfp4: quantize_mxfp4_group(values, length, padded, expanded + k, static_cast<uint8_t*>(p.scales) + at); break;
      case Format::kNvfp4: quantize_nvfp4_group(values, length, *p.global_scale, expanded + k, static_cast<uint8_t*>(p.scales) + at); break;
      case Format::kFp8E4M3: quantize_fp8_group(values, length, padded, expanded + k, fp16); break;
      default: quantize_group(values, length, padded, w, expanded + k, fp16, w.zeros ? p.zeros + at : nullptr);
    }
    if (scale_type(w.format) == ScaleType::kFp16) finite = (*fp16 & 0x7c00) != 0x7c00;
  }
  collect_codes(w, expanded, 0, w.K, p.codes + n * w.code_row_bytes());
  return finite;
}

// fp8_block: 128 rows, whose blocks of 128 k have one scale each; once through w for the scales, and once more for the codes.
inline void quantize_band(const Params& p, int64_t band, float* x) {
  const WeightSpec& w = p.weight;
  const int64_t n0 = band * 128, n1 = std::min(w.N, n0 + 128), groups = w.num_groups();
  float* scales = static_cast<float*>(p.scales) + band * groups;
  for (int64_t g = 0; g < groups; g++) scales[g] = 0;
  for (int64_t n = n0; n < n1; n++) {
    p.row_is_finite[n] = load_row(p, n, x);
    for (int64_t g = 0; g < groups; g++) scales[g] = std::max(scales[g], largest_magnitude(x + g * 128, std::min<int64_t>(128, w.K - g * 128)));
  }
  for (int64_t g = 0; g < groups; g++) scales[g] /= kLargestE4M3;
  for (int64_t n = n0; n < n1; n++) {
    load_row(p, n, x);
    for (int64_t k = 0; k < w.K; k++) p.codes[n * w.K + k] = scales[k / 128] != 0 ? float_to_e4m3(x[k] / scales[k / 128]) : 0;
  }
}

// Runs body(n, x) for all n under `count`, with room for two padded rows of floats and one of bytes.
template <class F>
void for_rows(const Params& p, int64_t count, const F& body) {
  const int64_t padded = (p.weight.K + kLanes - 1) / kLanes * kLanes, num_tasks = std::clamp<int64_t>(count, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    float* x = reinterpret_cast<float*>(scratch(1, 2 * padded * sizeof(float) + padded));
    for (int64_t n = count * task / num_tasks; n < count * (task + 1) / num_tasks; n++) body(n, x, reinterpret_cast<uint8_t*>(x + 2 * padded));
  });
}

// The largest number of w becomes the largest E4M3 scale times the largest E2M1 code.
inline void find_global_scale(const Params& p) {
  const int64_t N = p.weight.N;
  float* row_largest = reinterpret_cast<float*>(scratch(0, N * sizeof(float)));
  for_rows(p, N, [&](int64_t n, float* x, uint8_t*) {
    load_row(p, n, x);
    row_largest[n] = largest_magnitude(x, p.weight.K);
  });
  const float scale = largest_magnitude(row_largest, N) / (kLargestE4M3 * 6.0f);
  *p.global_scale = scale > 0 && scale * 0.0f == 0 ? scale : 1.0f;  // 1 for zeros, and where a row will be refused
}

inline void quantize(const Params& p) {
  if (p.weight.format == Format::kNvfp4) find_global_scale(p);
  if (p.weight.format == Format::kFp8Block) {
    for_rows(p, p.weight.scale_rows(), [&](int64_t band, float* x, uint8_t*) { quantize_band(p, band, x); });
  } else {
    for_rows(p, p.weight.N, [&](int64_t n, float* x, uint8_t* expanded) { p.row_is_finite[n] = quantize_row(p, n, x, expanded); });
  }
}

}  // namespace
}  // namespace taut::quantize_weight
