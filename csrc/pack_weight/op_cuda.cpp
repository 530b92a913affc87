#include <tuple>

#include "common/torch_cuda.h"
#include "pack_weight/op.h"

namespace taut::pack_weight {
namespace {

Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

void check_layout(const char* op, int64_t layout) {
  check(layout == static_cast<int64_t>(Layout::kMmaTiles), op, ": on CUDA layout must be 1 (MmaTiles), got ", layout);
}

void check_shape(const char* op, const char* what, const Tensor& t, const Tensor& codes, int64_t rows, int64_t columns) {
  check_same_device(op, what, t, "codes", codes);
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", what, " must be [", rows, ", ", columns, "], got ", shape_string(t));
}

// WHY const_cast: one Params serves both directions, and pack reads what unpack writes.
template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

Tensor pack_weight(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t in_features, int64_t format, int64_t group_size,
                   int64_t layout, const std::optional<Tensor>& global_scale) {
  constexpr const char* kOp = "pack_weight";
  check_layout(kOp, layout);
  check(codes.dim() == 2, kOp, ": codes must be 2-D, got ", shape_string(codes));
  const WeightSpec w = weight_spec(kOp, codes.size(0), in_features, format, group_size, zeros.has_value());
  check_mma_tiles(kOp, w.format);
  check(!global_scale.has_value(), kOp, ": no format of CUDA has a global_scale");
  check_shape(kOp, "codes", codes, codes, w.N, w.code_row_bytes());
  check(codes.scalar_type() == codes_type(w.format), kOp, ": codes must be ", name_of(codes_type(w.format)), " for this format");
  check_shape(kOp, "scales", scales, codes, w.N, w.num_groups());
  check(scales.scalar_type() == ScalarType::Half, kOp, ": scales must be float16");
  if (zeros) {
    check_shape(kOp, "zeros", *zeros, codes, w.N, w.num_groups());
    check(zeros->scalar_type() == ScalarType::Byte, kOp, ": zeros must be uint8");
  }
  const CudaCall call(codes);
  const Tensor c = torch::stable::contiguous(codes), s = torch::stable::contiguous(scales), z = zeros ? torch::stable::contiguous(*zeros) : Tensor();
  Tensor packed = make_empty(codes, {MmaTiles{w}.total_bytes()}, ScalarType::Byte);
  call.expose("codes", c);
  call.expose("scales", s);
  if (zeros) call.expose("zeros", z);
  call.expose("packed", packed, true);
  cuda_sm75::pack({w, Layout::kMmaTiles, data<uint8_t>(c), data<uint16_t>(s), zeros ? data<uint8_t>(z) : nullptr, data<uint8_t>(packed), 0}, call.stream());
  return packed;
}

void check_packed(const char* op, const Tensor& packed, const WeightSpec& w) {
  check_cuda_tensor(op, "packed", packed);
  const int64_t bytes = MmaTiles{w}.total_bytes();
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() && packed.numel() == bytes, op,
        ": packed must be a contiguous uint8 tensor of ", bytes, " bytes, got ", shape_string(packed));
  check(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0, op, ": packed must begin at a multiple of 16 bytes");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack_weight(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format, int64_t group_size,
                                                         bool zeros, int64_t layout) {
  constexpr const char* kOp = "unpack_weight";
  check_layout(kOp, layout);
  const WeightSpec w = weight_spec(kOp, out_features, in_features, format, group_size, zeros);
  check_mma_tiles(kOp, w.format);
  check_packed(kOp, packed, w);
  const CudaCall call(packed);
  Tensor codes = make_empty(packed, {w.N, w.code_row_bytes()}, codes_type(w.format));
  Tensor scales = make_empty(packed, {w.N, w.num_groups()}, ScalarType::Half);
  Tensor zero_points = make_empty(packed, {zeros ? w.N : 0, w.num_groups()}, ScalarType::Byte);
  call.expose("packed", packed);
  call.expose("codes", codes, true);
  call.expose("scales", scales, true);
  call.expose("zeros", zero_points, true);
  cuda_sm75::unpack({w, Layout::kMmaTiles, data<uint8_t>(codes), data<uint16_t>(scales), data<uint8_t>(zero_points), data<uint8_t>(packed), 0}, call.stream());
  return {codes, scales, zero_points, make_empty(packed, {0}, ScalarType::Float)};
}

Tensor dequantize_weight(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format, int64_t group_size, bool zeros, int64_t layout,
                         int64_t row_begin, int64_t row_end, ScalarType dtype) {
  constexpr const char* kOp = "dequantize_weight";
  check_layout(kOp, layout);
  const WeightSpec w = weight_spec(kOp, out_features, in_features, format, group_size, zeros);
  check_mma_tiles(kOp, w.format);
  check_packed(kOp, packed, w);
  check(0 <= row_begin && row_begin <= row_end && row_end <= w.N, kOp, ": rows must satisfy 0 <= row_begin <= row_end <= ", w.N, ", got ", row_begin, " and ",
        row_end);
  const CudaCall call(packed);
  Tensor out = make_empty(packed, {row_end - row_begin, w.K}, dtype);
  const DType out_dtype = float_dtype(kOp, "dtype", out);
  call.expose("packed", packed);
  call.expose("out", out, true);
  cuda_sm75::dequantize(w, data<uint8_t>(packed), row_begin, row_end, out.mutable_data_ptr(), out_dtype, call.stream());
  return out;
}

}  // namespace
}  // namespace taut::pack_weight

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) {
  m.def(taut::pack_weight::kPackSchema);
  m.def(taut::pack_weight::kUnpackSchema);
  m.def(taut::pack_weight::kDequantizeSchema);
}
#endif
TAUT_CUDA_LIBRARY(m) {
  m.impl("pack_weight", TORCH_BOX(&taut::pack_weight::pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&taut::pack_weight::unpack_weight));
  m.impl("dequantize_weight", TORCH_BOX(&taut::pack_weight::dequantize_weight));
}
