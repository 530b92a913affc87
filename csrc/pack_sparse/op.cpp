#include "pack_sparse/op.h"

#include <sstream>
#include <tuple>

#include "common/impl.h"
#include "common/sparse_bridge.h"

namespace taut::pack_sparse {
namespace {

Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

void check_part(const char* what, const Tensor& t, int64_t rows, int64_t columns, ScalarType dtype) {
  check_cpu("pack_sparse", what, t);
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.scalar_type() == dtype, "pack_sparse: ", what, " must be ", name_of(dtype), " [", rows,
        ", ", columns, "], got ", shape_string(t));
}

template <class T>
T* data(const Tensor& t) {  // WHY const_cast: one Params serves both directions, and pack reads what unpack writes
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

// Places of a block of m ascend: else two codes would be for one weight.
void check_places(const Sparse8& w, const uint8_t* meta) {
  const int64_t bits = w.pattern.place_bits();
  for (int64_t row = 0; row < w.meta_rows(); row++, meta += w.meta_row_bytes())
    for (int64_t j = 0, before = -1; j < w.kept(); j++) {
      const int64_t at = j * bits;
      int place = meta[at / 8] >> at % 8;
      if (at % 8 + bits > 8) place |= meta[at / 8 + 1] << (8 - at % 8);
      place &= (1 << bits) - 1;
      if (j % w.pattern.n == 0) before = -1;
      check(place > before, "pack_sparse: meta: places within ", w.pattern.m, " must ascend; row ", row, " has ", place, " after ", before);
      before = place;
    }
}

bool is_tiles(const char* op, int64_t layout) {
  check(layout == 0 || layout == 1, op, ": layout must be 0 (Sparse8) or 1 (SparseTiles), got ", layout);
  return layout == 1;
}

Tensor pack_sparse(const Tensor& codes, const Tensor& scales, const Tensor& meta, int64_t in_features, int64_t format, int64_t group_size, int64_t n, int64_t m,
                   int64_t v, int64_t layout) {
  constexpr const char* kOp = "pack_sparse";
  check(codes.dim() == 2, kOp, ": codes must be 2-D, got ", shape_string(codes));
  const Sparse8 w = sparse_weight(kOp, codes.size(0), in_features, format, group_size, n, m, v);
  check_part("codes", codes, w.spec.N, code_columns(w), codes_type(w.spec.format));
  check_part("scales", scales, w.spec.N, w.spec.num_groups(), ScalarType::Half);
  check_part("meta", meta, w.meta_rows(), w.meta_row_bytes(), ScalarType::Byte);
  const Tensor c = torch::stable::contiguous(codes), s = torch::stable::contiguous(scales), places = torch::stable::contiguous(meta);
  check_places(w, data<uint8_t>(places));
  const bool tiles = is_tiles(kOp, layout);
  Tensor packed = make_empty(codes, {tiles ? SparseTiles{w.spec, w.pattern}.total_bytes() : w.total_bytes()}, ScalarType::Byte);
  (tiles ? cpu_scalar::pack_tiles
         : cpu_scalar::pack)({w, data<uint8_t>(c), data<uint16_t>(s), data<uint8_t>(places), data<uint8_t>(packed), torch::stable::get_num_threads()});
  return packed;
}

std::tuple<Tensor, Tensor, Tensor> unpack_sparse(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format, int64_t group_size, int64_t n,
                                                 int64_t m, int64_t v, int64_t layout) {
  constexpr const char* kOp = "unpack_sparse";
  const Sparse8 w = sparse_weight(kOp, out_features, in_features, format, group_size, n, m, v);
  const bool tiles = is_tiles(kOp, layout);
  check_sparse(kOp, packed, tiles ? SparseTiles{w.spec, w.pattern}.total_bytes() : w.total_bytes());
  Tensor codes = make_empty(packed, {w.spec.N, code_columns(w)}, codes_type(w.spec.format));
  Tensor scales = make_empty(packed, {w.spec.N, w.spec.num_groups()}, ScalarType::Half);
  Tensor meta = make_empty(packed, {w.meta_rows(), w.meta_row_bytes()}, ScalarType::Byte);
  (tiles ? cpu_scalar::unpack_tiles
         : cpu_scalar::unpack)({w, data<uint8_t>(codes), data<uint16_t>(scales), data<uint8_t>(meta), data<uint8_t>(packed), torch::stable::get_num_threads()});
  return {codes, scales, meta};
}

}  // namespace
}  // namespace taut::pack_sparse

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(taut::pack_sparse::kPackSchema);
  m.def(taut::pack_sparse::kUnpackSchema);
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("pack_sparse", TORCH_BOX(&taut::pack_sparse::pack_sparse));
  m.impl("unpack_sparse", TORCH_BOX(&taut::pack_sparse::unpack_sparse));
}
