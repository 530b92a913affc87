// The quantizer, written once and compiled by every impl with its own flags. Sums run in eight fixed lanes and nothing
// is contracted, so each ISA chooses the same codes bit for bit: a checkpoint does not depend on who made it.
//
// Per group: candidate scales around the one that maps the largest magnitude onto the end of the range; the one with the
// least squared error, each scale taken as fp16 before codes are chosen, wins. As llama.cpp's Q4_0, int4 without zeros
// maps the largest magnitude to -8 by a scale of either sign, so that all 16 codes are used.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <iterator>

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

inline bool quantize_row(const Params& p, int64_t n, float* x, uint8_t* expanded) {
  const WeightSpec& w = p.weight;
  float poison = 0;
  for (int64_t k = 0; k < w.K; k++) x[k] = load_float(p.w, n * p.w_row_stride + k, p.dtype), poison += x[k] * 0.0f;
  bool finite = poison == 0;
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
    uint16_t* scale = p.scales + n * groups + g;
    if (w.format == Format::kFp8E4M3) quantize_fp8_group(values, length, padded, expanded + k, scale);
    else quantize_group(values, length, padded, w, expanded + k, scale, w.zeros ? p.zeros + n * groups + g : nullptr);
    finite = (*scale & 0x7c00) != 0x7c00;
  }
  uint8_t* codes = p.codes + n * w.code_row_bytes();
  if (w.format != Format::kInt4) std::memcpy(codes, expanded, w.K);
  else
    for (int64_t b = 0; b < w.code_row_bytes(); b++) codes[b] = static_cast<uint8_t>(expanded[2 * b] | (2 * b + 1 < w.K ? expanded[2 * b + 1] << 4 : 0));
  return finite;
}

inline void quantize(const Params& p) {
  const int64_t N = p.weight.N, padded = (p.weight.K + kLanes - 1) / kLanes * kLanes;
  const int64_t num_tasks = std::clamp<int64_t>(N, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    float* x = reinterpret_cast<float*>(scratch(1, 2 * padded * sizeof(float) + padded));
    uint8_t* expanded = reinterpret_cast<uint8_t*>(x + 2 * padded);
    for (int64_t n = N * task / num_tasks; n < N * (task + 1) / num_tasks; n++) p.row_is_finite[n] = quantize_row(p, n, x, expanded);
  });
}

}  // namespace
}  // namespace taut::quantize_weight
