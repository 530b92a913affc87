#include "quantize_weight/op.h"

#include <sstream>
#include <tuple>

#include "common/impl.h"
#include "common/torch_bridge.h"

namespace taut::quantize_weight {
namespace {

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

Tensor make_empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> quantize_weight(const Tensor& w, int64_t format, int64_t group_size, bool zeros) {
  constexpr const char* kOp = "quantize_weight";
  check(w.dim() == 2, kOp, ": w must be 2-D, got ", shape_string(w));
  check_cpu(kOp, "w", w);
  const WeightSpec spec = weight_spec(kOp, w.size(0), w.size(1), format, group_size, zeros);
  const Tensor rows = w.stride(1) == 1 ? w : torch::stable::contiguous(w);
  Tensor codes = make_empty(w, {spec.N, spec.code_row_bytes()}, codes_type(spec.format));
  Tensor scales = make_empty(w, {spec.scale_rows(), spec.num_groups()}, scales_type(spec.format));
  Tensor zero_points = make_empty(w, {zeros ? spec.N : 0, spec.num_groups()}, ScalarType::Byte);
  Tensor global_scale = make_empty(w, {spec.format == Format::kNvfp4 ? 1 : 0}, ScalarType::Float);
  std::vector<uint8_t> row_is_finite(spec.N);
  const Params params{rows.const_data_ptr(),
                      rows.stride(0),
                      float_dtype(kOp, "w", w),
                      spec,
                      static_cast<uint8_t*>(codes.mutable_data_ptr()),
                      scales.mutable_data_ptr(),
                      zeros ? static_cast<uint8_t*>(zero_points.mutable_data_ptr()) : nullptr,
                      row_is_finite.data(),
                      torch::stable::get_num_threads(),
                      static_cast<float*>(global_scale.mutable_data_ptr())};
  if (spec.N > 0 || spec.format == Format::kNvfp4) select(kOp, kImpls, params).run(params);
  for (int64_t n = 0; n < spec.N; n++) check(row_is_finite[n], kOp, ": row ", n, " of w holds a NaN, an infinity, or a number too large for a float16 scale");
  return {codes, scales, zero_points, global_scale};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table("quantize_weight", kImpls, Params{}); }

const bool registered = register_table("quantize_weight", "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::quantize_weight

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def("quantize_weight(Tensor w, int format, int group_size, bool zeros) -> (Tensor, Tensor, Tensor, Tensor)"); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("quantize_weight", TORCH_BOX(&taut::quantize_weight::quantize_weight)); }
