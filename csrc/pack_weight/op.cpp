#include "pack_weight/op.h"

#include <sstream>
#include <tuple>

#include "common/torch_bridge.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace taut::pack_weight {
namespace {

// 2 MB pages read up to 1.4x faster than 4 KB ones when weights stream from memory. Asked for before the first touch,
// for the whole pages inside the block; a kernel that does not have them ignores us.
void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHuge - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

void check_shape(const char* op, const char* what, const Tensor& t, int64_t rows, int64_t columns) {
  check_cpu(op, what, t);
  check(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, op, ": ", what, " must be [", rows, ", ", columns, "], got ", shape_string(t));
}

Layout layout_of(const char* op, Format format, int64_t layout) {
  check(layout == 0 || layout == 1, op, ": layout must be 0 (Rows8) or 1 (MmaTiles), got ", layout);
  if (layout == 1) check_mma_tiles(op, format);
  return static_cast<Layout>(layout);
}

int64_t packed_bytes(const WeightSpec& w, Layout layout) { return layout == Layout::kRows8 ? Rows8{w}.total_bytes() : MmaTiles{w}.total_bytes(); }

template <class T>
T* data(const Tensor& t) {  // WHY const_cast: one Params serves both directions, and pack reads what unpack writes
  return static_cast<T*>(const_cast<void*>(t.const_data_ptr()));
}

Tensor pack_weight(const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros, int64_t in_features, int64_t format, int64_t group_size,
                   int64_t layout_code, const std::optional<Tensor>& global_scale) {
  constexpr const char* kOp = "pack_weight";
  check(codes.dim() == 2, kOp, ": codes must be 2-D, got ", shape_string(codes));
  const WeightSpec w = weight_spec(kOp, codes.size(0), in_features, format, group_size, zeros.has_value());
  const Layout layout = layout_of(kOp, w.format, layout_code);
  check_shape(kOp, "codes", codes, w.N, w.code_row_bytes());
  check(codes.scalar_type() == codes_type(w.format), kOp, ": codes must be ", name_of(codes_type(w.format)), " for this format");
  check_shape(kOp, "scales", scales, w.scale_rows(), w.num_groups());
  check(scales.scalar_type() == scales_type(w.format), kOp, ": scales must be ", name_of(scales_type(w.format)), " for this format");
  const Tensor c = torch::stable::contiguous(codes), s = torch::stable::contiguous(scales);
  Tensor zero_points, global;
  if (zeros) {
    check_shape(kOp, "zeros", *zeros, w.N, w.num_groups());
    check(zeros->scalar_type() == ScalarType::Byte, kOp, ": zeros must be uint8");
    zero_points = torch::stable::contiguous(*zeros);
    const int largest = (1 << code_bits(w.format)) - 1;
    for (int64_t i = 0; i < zero_points.numel(); i++)
      check(data<uint8_t>(zero_points)[i] <= largest, kOp, ": zeros must be 0..", largest, ", got ", int{data<uint8_t>(zero_points)[i]});
  }
  if (w.format == Format::kTernary)
    for (int64_t i = 0; i < c.numel(); i++)
      check(data<uint8_t>(c)[i] < 243, kOp, ": a byte of five ternary codes is at most 242, got ", int{data<uint8_t>(c)[i]});
  check(global_scale.has_value() == (w.format == Format::kNvfp4), kOp, ": nvfp4 weights have a global_scale, others have none");
  if (global_scale) {
    check_cpu(kOp, "global_scale", *global_scale);
    check(global_scale->numel() == 1 && global_scale->scalar_type() == ScalarType::Float, kOp, ": global_scale must be float32 [1]");
    global = torch::stable::contiguous(*global_scale);
  }
  Tensor packed = make_empty(codes, {packed_bytes(w, layout)}, ScalarType::Byte);
  advise_huge_pages(packed.mutable_data_ptr(), packed_bytes(w, layout));
  cpu_scalar::pack({w, layout, data<uint8_t>(c), data<void>(s), zeros ? data<uint8_t>(zero_points) : nullptr, data<uint8_t>(packed),
                    torch::stable::get_num_threads(), global_scale ? data<float>(global) : nullptr});
  return packed;
}

void check_packed(const char* op, const Tensor& packed, const WeightSpec& w, Layout layout) {
  check_cpu(op, "packed", packed);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() && packed.numel() == packed_bytes(w, layout), op,
        ": packed must be a contiguous uint8 tensor of ", packed_bytes(w, layout), " bytes, got ", shape_string(packed));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unpack_weight(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format, int64_t group_size,
                                                         bool zeros, int64_t layout_code) {
  constexpr const char* kOp = "unpack_weight";
  const WeightSpec w = weight_spec(kOp, out_features, in_features, format, group_size, zeros);
  const Layout layout = layout_of(kOp, w.format, layout_code);
  check_packed(kOp, packed, w, layout);
  Tensor codes = make_empty(packed, {w.N, w.code_row_bytes()}, codes_type(w.format));
  Tensor scales = make_empty(packed, {w.scale_rows(), w.num_groups()}, scales_type(w.format));
  Tensor zero_points = make_empty(packed, {zeros ? w.N : 0, w.num_groups()}, ScalarType::Byte);
  Tensor global = make_empty(packed, {w.format == Format::kNvfp4 ? 1 : 0}, ScalarType::Float);
  cpu_scalar::unpack({w, layout, data<uint8_t>(codes), data<void>(scales), data<uint8_t>(zero_points), data<uint8_t>(packed), torch::stable::get_num_threads(),
                      data<float>(global)});
  return {codes, scales, zero_points, global};
}

Tensor dequantize_weight(const Tensor& packed, int64_t out_features, int64_t in_features, int64_t format, int64_t group_size, bool zeros, int64_t layout_code,
                         int64_t row_begin, int64_t row_end, ScalarType dtype) {
  constexpr const char* kOp = "dequantize_weight";
  const WeightSpec w = weight_spec(kOp, out_features, in_features, format, group_size, zeros);
  const Layout layout = layout_of(kOp, w.format, layout_code);
  check_packed(kOp, packed, w, layout);
  check(0 <= row_begin && row_begin <= row_end && row_end <= w.N, kOp, ": rows must satisfy 0 <= row_begin <= row_end <= ", w.N, ", got ", row_begin, " and ",
        row_end);
  Tensor out = make_empty(packed, {row_end - row_begin, w.K}, dtype);
  cpu_scalar::dequantize(w, layout, static_cast<const uint8_t*>(packed.const_data_ptr()), row_begin, row_end, out.mutable_data_ptr(),
                         float_dtype(kOp, "dtype", out), torch::stable::get_num_threads());
  return out;
}

}  // namespace
}  // namespace taut::pack_weight

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(taut::pack_weight::kPackSchema);
  m.def(taut::pack_weight::kUnpackSchema);
  m.def(taut::pack_weight::kDequantizeSchema);
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&taut::pack_weight::pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&taut::pack_weight::unpack_weight));
  m.impl("dequantize_weight", TORCH_BOX(&taut::pack_weight::dequantize_weight));
}
