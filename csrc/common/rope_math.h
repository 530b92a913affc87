// One head of q or k: its RMS norm and its rotary position. Bits as in row_math.h: the same on every ISA.
#pragma once

#include "common/row_math.h"

namespace taut {
namespace {

// The Llama convention: element i < R/2 turns together with element i + R/2; cos and sin hold R numbers a token, two equal halves
// for most models. Elements from R on stay as they are.
inline void rotate_row(float* row /* [>= R] */, const void* cos, const void* sin, int64_t index, DType dtype, int64_t R) {
  const int64_t half = R / 2;
  for_dtype(dtype, [&]<DType kDType>() {
    for (int64_t i = 0; i < half; i += 8) {
      const int64_t count = std::min<int64_t>(8, half - i);
      FloatLanes a, b, c, s;
      load_lanes<DType::kFloat32>(a, row, i, count);
      load_lanes<DType::kFloat32>(b, row, half + i, count);
      load_lanes<kDType>(c, cos, index + i, count);
      load_lanes<kDType>(s, sin, index + i, count);
      const FloatLanes first = a * c - b * s;
      load_lanes<kDType>(c, cos, index + half + i, count);
      load_lanes<kDType>(s, sin, index + half + i, count);
      store_lanes<DType::kFloat32>(first, row, i, count);
      store_lanes<DType::kFloat32>(b * c + a * s, row, half + i, count);
    }
  });
}

inline void load_floats(const void* base, int64_t index, DType dtype, int64_t n, float* out) {
  for_dtype(dtype, [&]<DType kDType>() {
    for (int64_t i = 0; i < n; i += 8) {
      const int64_t count = std::min<int64_t>(8, n - i);
      FloatLanes v;
      load_lanes<kDType>(v, base, index + i, count);
      store_lanes<DType::kFloat32>(v, out, i, count);
    }
  });
}

inline void store_floats(const float* row, int64_t n, void* base, int64_t index, DType dtype) {
  for_dtype(dtype, [&]<DType kDType>() {
    for (int64_t i = 0; i < n; i += 8) {
      const int64_t count = std::min<int64_t>(8, n - i);
      FloatLanes v;
      load_lanes<DType::kFloat32>(v, row, i, count);
      store_lanes<kDType>(v, base, index + i, count);
    }
  });
}

// row[D] = head at base[index], normed where there is a weight.
inline void load_head(const void* base, int64_t index, DType dtype, int64_t D, const void* norm, DType norm_dtype, float eps, float offset, float* row) {
  if (norm) rms_norm_row(base, index, dtype, D, norm, norm_dtype, eps, offset, row);
  else load_floats(base, index, dtype, D, row);
}

}  // namespace
}  // namespace taut
