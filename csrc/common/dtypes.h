// Element types of activations, and their conversion to and from fp32. bf16 and fp16 are stored as uint16_t, e4m3 (the OCP
// 8-bit float of weights and of fp8 activations: no infinities, S.1111.111 is NaN, largest 448) as uint8_t.
#pragma once

#include <bit>
#include <cstdint>

namespace taut {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

constexpr int dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

namespace {  // WHY: every translation unit gets its own copy, so that no AVX-512 copy can be linked for everyone

inline float bf16_to_float(uint16_t value) { return std::bit_cast<float>(uint32_t{value} << 16); }

inline uint16_t float_to_bf16(float value) {  // round to nearest even; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

inline float fp16_to_float(uint16_t value) {
  const uint32_t sign = uint32_t{value & 0x8000u} << 16, magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // A multiply by 2^112 moves the exponent and makes subnormals normal, exactly.
  return std::bit_cast<float>(std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
}

inline uint16_t float_to_fp16(float value) {  // round to nearest even, overflow to infinity
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;  // 65520 and above round to infinity
  if (magnitude < 0x38800000u) {                        // subnormal half: adding 0.5 aligns the ulp to 2^-24
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f));
  }
  return sign | static_cast<uint16_t>((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13);
}

constexpr float kLargestE4M3 = 448.0f;

inline float e4m3_to_float(uint8_t value) {
  const uint32_t sign = uint32_t{value & 0x80u} << 24, magnitude = value & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude < 8) return std::bit_cast<float>(std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-9f) | sign);
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
}

inline uint8_t float_to_e4m3(float value) {  // round to nearest even; past 448 it saturates, infinities too; NaN stays NaN
  const uint32_t bits = std::bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80u);
  if (magnitude > 0x7f800000u) return sign | 0x7fu;
  if (std::bit_cast<float>(magnitude) >= kLargestE4M3) return sign | 0x7eu;
  if (magnitude < 0x3c800000u) {  // under 2^-6: adding 2^14 aligns the ulp to 2^-9
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
    return sign | static_cast<uint8_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0x1p14f));
  }
  return sign | static_cast<uint8_t>((magnitude - (120u << 23) + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20);
}

inline float load_float(const void* base, int64_t index, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(base)[index];
  const uint16_t bits = static_cast<const uint16_t*>(base)[index];
  return dtype == DType::kBFloat16 ? bf16_to_float(bits) : fp16_to_float(bits);
}

inline void store_float(void* base, int64_t index, DType dtype, float value) {
  if (dtype == DType::kFloat32) static_cast<float*>(base)[index] = value;
  else static_cast<uint16_t*>(base)[index] = dtype == DType::kBFloat16 ? float_to_bf16(value) : float_to_fp16(value);
}

}  // namespace
}  // namespace taut
