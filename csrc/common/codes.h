// The canonical form element by element (common/formats.h): codes of a row, a byte each, and what codes and scales stand for.
#pragma once

#include <bit>
#include <cstring>

#include "common/dtypes.h"
#include "common/formats.h"

namespace taut {
namespace {  // WHY: as in dtypes.h

constexpr uint8_t kPowersOf3[5] = {1, 3, 9, 27, 81};

// `count` codes of a canonical row, a byte each, from k on, a multiple of 8.
inline void expand_codes(const WeightSpec& w, const uint8_t* row, int64_t k, int64_t count, uint8_t* codes) {
  switch (w.format) {
    case Format::kInt4:
    case Format::kNf4:
    case Format::kMxfp4:
    case Format::kNvfp4: {
      const uint8_t* pairs = row + k / 2;
      for (int64_t i = 0; i < count / 2; i++) codes[2 * i] = pairs[i] & 15, codes[2 * i + 1] = pairs[i] >> 4;
      if (count % 2) codes[count - 1] = pairs[count / 2] & 15;
      break;
    }
    case Format::kInt3: {
      const uint8_t* triples = row + k / 8 * 3;
      for (int64_t i = 0; i < count; i++) {
        const int64_t bit = i * 3;
        int two = triples[bit / 8];
        if (bit % 8 > 5) two |= triples[bit / 8 + 1] << 8;
        codes[i] = static_cast<uint8_t>(two >> bit % 8 & 7);
      }
      break;
    }
    case Format::kInt2:
      for (int64_t i = 0; i < count; i++) codes[i] = row[(k + i) / 4] >> (i % 4 * 2) & 3;
      break;
    case Format::kTernary:
      for (int64_t i = 0; i < count; i++) codes[i] = row[(k + i) / 5] / kPowersOf3[(k + i) % 5] % 3;
      break;
    default: std::memcpy(codes, row + k, count);
  }
}

// The inverse, for k rising from 0 to the end of the row.
inline void collect_codes(const WeightSpec& w, const uint8_t* codes, int64_t k, int64_t count, uint8_t* row) {
  switch (w.format) {
    case Format::kInt4:
    case Format::kNf4:
    case Format::kMxfp4:
    case Format::kNvfp4:
      for (int64_t i = 0; i < count; i += 2) row[(k + i) / 2] = static_cast<uint8_t>(codes[i] | (i + 1 < count ? codes[i + 1] << 4 : 0));
      break;
    case Format::kInt3: {
      uint8_t* triples = row + k / 8 * 3;
      std::memset(triples, 0, (count * 3 + 7) / 8);
      for (int64_t i = 0; i < count; i++) {
        const int64_t bit = i * 3;
        const int two = codes[i] << bit % 8;
        triples[bit / 8] |= static_cast<uint8_t>(two);
        if (bit % 8 > 5) triples[bit / 8 + 1] |= static_cast<uint8_t>(two >> 8);
      }
      break;
    }
    case Format::kInt2:
      std::memset(row + k / 4, 0, (count + 3) / 4);
      for (int64_t i = 0; i < count; i++) row[(k + i) / 4] |= static_cast<uint8_t>(codes[i] << (i % 4 * 2));
      break;
    case Format::kTernary:
      for (int64_t i = k; i < k + count; i++) row[i / 5] = static_cast<uint8_t>((i % 5 ? row[i / 5] : 0) + codes[i - k] * kPowersOf3[i % 5]);
      for (int64_t i = w.K; k + count == w.K && i % 5; i++) row[i / 5] = static_cast<uint8_t>(row[i / 5] + kPowersOf3[i % 5]);
      break;
    default: std::memcpy(row + k, codes, count);
  }
}

// The number a code stands for, before its scale.
inline float code_number(Format format, uint8_t code, int zero) {
  switch (format) {
    case Format::kNf4: return kNf4[code];
    case Format::kMxfp4:
    case Format::kNvfp4: return static_cast<float>(kTwiceE2M1[code]) * 0.5f;
    case Format::kInt8: return static_cast<float>(static_cast<int8_t>(code));
    case Format::kFp8E4M3:
    case Format::kFp8Block: return e4m3_to_float(code);
    default: return static_cast<float>(code - zero);
  }
}

inline float e8m0_to_float(uint8_t value) {  // 2^(value - 127); 255 is NaN
  if (value == 0) return 0x1p-127f;
  return std::bit_cast<float>(value == 255 ? 0x7fc00000u : uint32_t{value} << 23);
}

inline float load_scale(ScaleType type, const void* at) {
  switch (type) {
    case ScaleType::kFp32: {
      float value;
      std::memcpy(&value, at, 4);
      return value;
    }
    case ScaleType::kE8M0: return e8m0_to_float(*static_cast<const uint8_t*>(at));
    case ScaleType::kE4M3: return e4m3_to_float(*static_cast<const uint8_t*>(at));
    default: {
      uint16_t value;
      std::memcpy(&value, at, 2);
      return fp16_to_float(value);
    }
  }
}

// `count` codes as numbers. A product of a code's number and any scale is exact in double, and rounded once here.
inline void dequantize_codes(Format format, const uint8_t* codes, int64_t count, double scale, int zero, float* out) {
  if (scale_type(format) == ScaleType::kFp16) {  // exact in fp32
    const float fp16_scale = static_cast<float>(scale);
    for (int64_t i = 0; i < count; i++) out[i] = code_number(format, codes[i], zero) * fp16_scale;
  } else {
    for (int64_t i = 0; i < count; i++) out[i] = static_cast<float>(code_number(format, codes[i], zero) * scale);
  }
}

// The 32 codes of a row in a k-block of Rows8, as they are in the canonical form.
inline void load_rows8_codes(const Rows8& layout, const uint8_t* block, int64_t row, uint8_t* codes /* [32] */) {
  const uint8_t* in = block + row % Rows8::kRows * 4;
  switch (code_bits(layout.spec.format)) {
    case 4:
      for (int64_t v = 0; v < 4; v++)
        for (int64_t i = 0; i < 4; i++) codes[v * 4 + i] = in[v * 32 + i] & 15, codes[16 + v * 4 + i] = in[v * 32 + i] >> 4;
      break;
    case 2:
    case 3:
      for (int64_t c = 0; c < 8; c++)
        for (int64_t i = 0; i < 4; i++) codes[c * 4 + i] = in[c % 2 * 32 + i] >> (c / 2 * 2) & 3;
      if (layout.spec.format == Format::kInt3)
        for (int64_t c = 0; c < 8; c++)
          for (int64_t i = 0; i < 4; i++) codes[c * 4 + i] |= static_cast<uint8_t>((in[64 + i] >> c & 1) << 2);
      break;
    default:
      for (int64_t v = 0; v < 8; v++)
        for (int64_t i = 0; i < 4; i++) codes[v * 4 + i] = in[v * 32 + i] ^ (layout.spec.format == Format::kInt8 ? 0x80 : 0);
  }
}
inline void store_rows8_codes(const Rows8& layout, uint8_t* block, int64_t row, const uint8_t* codes /* [32] */) {
  uint8_t* out = block + row % Rows8::kRows * 4;
  switch (code_bits(layout.spec.format)) {
    case 4:
      for (int64_t v = 0; v < 4; v++)
        for (int64_t i = 0; i < 4; i++) out[v * 32 + i] = static_cast<uint8_t>(codes[v * 4 + i] | codes[16 + v * 4 + i] << 4);
      break;
    case 2:
    case 3:
      for (int64_t v = 0; v < 2; v++)
        for (int64_t i = 0; i < 4; i++) {
          int byte = 0;
          for (int64_t c = v; c < 8; c += 2) byte |= (codes[c * 4 + i] & 3) << (c / 2 * 2);
          out[v * 32 + i] = static_cast<uint8_t>(byte);
        }
      if (layout.spec.format == Format::kInt3)
        for (int64_t i = 0; i < 4; i++) {
          int byte = 0;
          for (int64_t c = 0; c < 8; c++) byte |= (codes[c * 4 + i] >> 2 & 1) << c;
          out[64 + i] = static_cast<uint8_t>(byte);
        }
      break;
    default:
      for (int64_t v = 0; v < 8; v++)
        for (int64_t i = 0; i < 4; i++) out[v * 32 + i] = codes[v * 4 + i] ^ (layout.spec.format == Format::kInt8 ? 0x80 : 0);
  }
}

}  // namespace
}  // namespace taut
