// What op.cpp files share to cross from LibTorch's stable ABI to Params. No kernel includes this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "common/dtypes.h"
#include "common/formats.h"
#include "common/impl.h"

namespace taut {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// WHY not STD_TORCH_CHECK: its message opens with a C++ function, file and line; ours is for the user.
template <class... Args>
void check(bool condition, const Args&... args) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

inline std::string shape_string(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); d++) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline DType float_dtype(const char* op, const char* what, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: check(false, op, ": ", what, " must be float32, bfloat16 or float16");
  }
  return DType::kFloat32;
}

inline ScalarType codes_type(Format format) {
  switch (format) {
    case Format::kInt4: return ScalarType::Byte;
    case Format::kInt8: return ScalarType::Char;
    case Format::kFp8E4M3: return ScalarType::Float8_e4m3fn;
  }
  return ScalarType::Byte;
}

inline WeightSpec weight_spec(const char* op, int64_t N, int64_t K, int64_t format, int64_t group_size, bool zeros) {
  check(format == 4 || format == 8 || format == 9, op, ": format must be 4 (int4), 8 (int8) or 9 (fp8_e4m3), got ", format);
  check(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, op, ": group_size must be 32, 64, 128 or 0 (per row), got ", group_size);
  check(!zeros || format == 4, op, ": zeros are for int4 only");
  check(N >= 0 && K >= 1 && N < (int64_t{1} << 31) && K < (int64_t{1} << 31), op, ": weight must be [N >= 0, K >= 1] with both under 2^31, got [", N, ", ", K,
        "]");
  return {static_cast<Format>(format), N, K, group_size, zeros};
}

inline void check_cpu(const char* op, const char* what, const Tensor& t) { check(t.is_cpu(), op, ": ", what, " must be on the CPU"); }

}  // namespace taut
