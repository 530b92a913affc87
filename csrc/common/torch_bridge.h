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
    case Format::kInt8: return ScalarType::Char;
    case Format::kFp8E4M3:
    case Format::kFp8Block: return ScalarType::Float8_e4m3fn;
    case Format::kFp16: return ScalarType::Half;
    case Format::kBf16: return ScalarType::BFloat16;
    default: return ScalarType::Byte;
  }
}
inline ScalarType scales_type(Format format) {
  switch (scale_type(format)) {
    case ScaleType::kFp16: return ScalarType::Half;
    case ScaleType::kFp32: return ScalarType::Float;
    default: return ScalarType::Byte;
  }
}
inline const char* name_of(ScalarType type) {
  switch (type) {
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Float: return "float32";
    default: return "float8_e4m3fn";
  }
}

inline WeightSpec weight_spec(const char* op, int64_t N, int64_t K, int64_t format, int64_t group_size, bool zeros) {
  check(1 <= format && format <= 10, op,
        ": format must be 1 (ternary), 2 (int2), 3 (int3), 4 (int4), 5 (nf4), 6 (mxfp4), 7 (nvfp4), 8 (int8), 9 (fp8_e4m3) or 10 (fp8_block), got ", format);
  const Format kind = static_cast<Format>(format);
  if (kind == Format::kMxfp4) check(group_size == 32, op, ": group_size must be 32 for mxfp4, got ", group_size);
  else if (kind == Format::kNvfp4) check(group_size == 16, op, ": group_size must be 16 for nvfp4, got ", group_size);
  else if (kind == Format::kFp8Block) check(group_size == 128, op, ": group_size must be 128 for fp8_block, got ", group_size);
  else
    check(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128, op, ": group_size must be 32, 64, 128 or 0 (per row), got ",
          group_size);
  check(!zeros || takes_zeros(kind), op, ": zeros are for int2, int3 and int4 only");
  check(N >= 0 && K >= 1 && N < (int64_t{1} << 31) && K < (int64_t{1} << 31), op, ": weight must be [N >= 0, K >= 1] with both under 2^31, got [", N, ", ", K,
        "]");
  return {kind, N, K, group_size, zeros};
}

// MmaTiles, and so every CUDA kernel, know these formats alone.
constexpr bool fits_mma_tiles(Format format) { return format == Format::kInt4 || format == Format::kInt8 || format == Format::kFp8E4M3; }
inline void check_mma_tiles(const char* op, Format format) {
  check(fits_mma_tiles(format), op, ": this weight format is for the CPU; MmaTiles, the layout of CUDA, takes 4 (int4), 8 (int8) and 9 (fp8_e4m3), got ",
        static_cast<int64_t>(format));
}

inline void check_cpu(const char* op, const char* what, const Tensor& t) { check(t.is_cpu(), op, ": ", what, " must be on the CPU"); }
// Throws where a tensor is not on the device of the impls: check_cpu, or check_cuda_tensor of common/torch_cuda.h.
using CheckPlace = void (*)(const char* op, const char* what, const Tensor& t);

}  // namespace taut
