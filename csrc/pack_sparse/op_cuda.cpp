#include <tuple>

#include "common/sparse_bridge.h"
#include "common/torch_cuda.h"
#include "pack_sparse/op.h"

namespace taut::pack_sparse {
namespace {

Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

void check_layout(const char* op, int64_t layout) { check(layout == 1, op, ": on CUDA layout must be 1 (SparseTiles), got ", layout); }

void check_part(const char* what, const Tensor& t, const Tensor& codes, int64_t rows, int64_t columns, ScalarType dtype) {
  check_same_device("pack_sparse", what, t, "codes", codes);
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype, "pack_sparse: ", what, " must be ", name_of(dtype), " [", rows,
        ", ", columns, "], got ", shape_string(t));
}

template <class T>
T* data(const Tensor& t) {  // WHY const_cast: one Params serves both directions, and pack reads what unpack writes
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

Tensor pack_sparse(const Tensor& codes, const Tensor& scales, const Tensor& meta, int64_t in_features, int64_t format, int64_t group_size, int64_t n, int64_t m,
                   int64_t v, int64_t layout) {
  constexpr const char* kOp = "pack_sparse";
  check_layout(kOp, layout);
  check(codes.dim() == 2, kOp, ": codes must be 2-D, got ", shape_string(codes));
  const Sparse8 canonical = sparse_weight(kOp, codes.size(0), in_features, format, group_size, n, m, v);
  const SparseTiles w{canonical.spec, canonical.pattern};
  check_part("codes", codes, codes, w.spec.N, code_columns(canonical), codes_type(w.spec.format));
  check_part("scales", scales, codes, w.spec.N, w.spec.num_groups(), ScalarType::Half);
  check_part("meta", meta, codes, w.meta_rows(), w.meta_row_bytes(), ScalarType::Byte);
  const CudaCall call(codes);
  const Tensor c = torch::stable::contiguous(codes), s = torch::stable::contiguous(scales), places = torch::stable::contiguous(meta);
  Tensor packed = make_empty(codes, {w.total_bytes()}, ScalarType::Byte);
  const Params params{canonical, data<uint8_t>(c), data<uint16_t>(s), data<uint8_t>(places), data<uint8_t>(packed), 0};
  call.expose("codes", c);
  call.expose("scales", s);
  call.expose("meta", places);
  call.expose("packed", packed, true);
  if (w.spec.N > 0) {  // of equal places mma.sp computes anything
    const int64_t one[] = {1};
    Tensor descents = torch::stable::new_zeros(codes, torch::headeronly::IntHeaderOnlyArrayRef(one, 1), ScalarType::Int);
    call.expose_update("descents", descents);
    cuda_sm75::check_places(params, data<int32_t>(descents), call.stream());
    const Tensor found = torch::stable::to(descents, torch::stable::Device(torch::headeronly::DeviceType::CPU));
    if (const int32_t row = *data<int32_t>(found); row > 0) check(false, kOp, ": meta: places within ", m, " must ascend; those of row ", row - 1, " do not");
  }
  cuda_sm75::pack(params, call.stream());
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_sparse(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format, int64_t group_size, int64_t n,
                                                 int64_t m, int64_t v, int64_t layout) {
  constexpr const char* kOp = "unpack_sparse";
  check_layout(kOp, layout);
  const Sparse8 canonical = sparse_weight(kOp, out_features, in_features, format, group_size, n, m, v);
  const SparseTiles w{canonical.spec, canonical.pattern};
  check_sparse(kOp, packed, w.total_bytes(), check_cuda_tensor);
  check(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0, kOp, ": packed must begin at a multiple of 16 bytes");
  const CudaCall call(packed);
  Tensor codes = make_empty(packed, {w.spec.N, code_columns(canonical)}, codes_type(w.spec.format));
  Tensor scales = make_empty(packed, {w.spec.N, w.spec.num_groups()}, ScalarType::Half);
  Tensor meta = make_empty(packed, {w.meta_rows(), w.meta_row_bytes()}, ScalarType::Byte);
  call.expose("packed", packed);
  call.expose("codes", codes, true);
  call.expose("scales", scales, true);
  call.expose("meta", meta, true);
  cuda_sm75::unpack({canonical, data<uint8_t>(codes), data<uint16_t>(scales), data<uint8_t>(meta), data<uint8_t>(packed), 0}, call.stream());
  return {codes, scales, meta};
}

}  // namespace
}  // namespace taut::pack_sparse

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) {
  m.def(taut::pack_sparse::kPackSchema);
  m.def(taut::pack_sparse::kUnpackSchema);
}
#endif
TAUT_CUDA_LIBRARY(m) {
  m.impl("pack_sparse", TORCH_BOX(&taut::pack_sparse::pack_sparse));
  m.impl("unpack_sparse", TORCH_BOX(&taut::pack_sparse::unpack_sparse));
}
