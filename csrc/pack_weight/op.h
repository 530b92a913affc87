// pack_weight, unpack_weight, dequantize_weight: between the canonical form, a layout and plain numbers.
#pragma once

#include "common/dtypes.h"
#include "common/formats.h"
#include "common/parallel.h"

namespace taut::pack_weight {

constexpr const char* kPackSchema =
    "pack_weight(Tensor codes, Tensor scales, Tensor? zeros, int in_features, int format, int group_size, int layout, Tensor? global_scale=None) -> "
    "Tensor";
constexpr const char* kUnpackSchema =
    "unpack_weight(Tensor packed, int out_features, int in_features, int format, int group_size, bool zeros, int layout) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kDequantizeSchema =
    "dequantize_weight(Tensor packed, int out_features, int in_features, int format, int group_size, bool zeros, int layout, int row_begin, int row_end, "
    "ScalarType dtype) -> Tensor";

struct Params {
  WeightSpec weight;
  Layout layout;
  uint8_t* codes;   // [N, code_row_bytes]
  void* scales;     // [scale_rows, num_groups] of scale_type(format)
  uint8_t* zeros;   // [N, num_groups], or nullptr
  uint8_t* packed;  // in `layout`
  int64_t num_threads;
  float* global_scale = nullptr;  // nvfp4 only
};

namespace cpu_scalar {
void pack(const Params&);    // codes, scales, zeros, global_scale -> packed
void unpack(const Params&);  // packed -> codes, scales, zeros, global_scale
// Rows [row_begin, row_end) of w as numbers, to out[row_end - row_begin, K].
void dequantize(const WeightSpec&, Layout, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType, int64_t num_threads);
}  // namespace cpu_scalar

// The same between the canonical form and MmaTiles, on a CUDA device.
namespace cuda_sm75 {
void pack(const Params&, void* stream);
void unpack(const Params&, void* stream);
void dequantize(const WeightSpec&, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType, void* stream);
}  // namespace cuda_sm75

}  // namespace taut::pack_weight
