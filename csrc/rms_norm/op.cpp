#include "rms_norm/op.h"

#include <algorithm>
#include <sstream>

#include "common/impl.h"
#include "common/torch_bridge.h"

namespace taut::rms_norm {
namespace {

constexpr const char* kOp = "rms_norm";

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#elif defined(__aarch64__)
    {"cpu_neon", needs_neon, always, cpu_neon::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// One thread does this many elements in the time that a second one costs to start and join.
constexpr int64_t kMinElementsPerThread = 1 << 15;

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset, const std::optional<Tensor>& residual) {
  check(x.dim() >= 1, kOp, ": x must be [..., K], got a scalar");
  check_cpu(kOp, "x", x);
  check_cpu(kOp, "weight", weight);
  const DType dtype = float_dtype(kOp, "x", x);
  const int64_t K = x.size(x.dim() - 1);
  check(weight.dim() == 1 && weight.size(0) == K, kOp, ": weight must be [", K, "], got ", shape_string(weight));
  check(weight.scalar_type() == x.scalar_type() || weight.scalar_type() == ScalarType::Float, kOp, ": weight must have the dtype of x or be float32");
  Tensor residual_rows;
  if (residual) {
    check_cpu(kOp, "residual", *residual);
    bool same = residual->dim() == x.dim() && residual->scalar_type() == x.scalar_type();
    for (int64_t d = 0; same && d < x.dim(); d++) same = residual->size(d) == x.size(d);
    check(same, kOp, ": residual must have the dtype and shape of x, got ", shape_string(*residual));
    residual_rows = torch::stable::contiguous(*residual);
  }
  Tensor rows = x;
  int64_t stride = K;
  if (x.dim() == 2 && x.stride(1) == 1) stride = x.stride(0);
  else if (!x.is_contiguous()) rows = torch::stable::contiguous(x);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim(); d++) shape.push_back(x.size(d));
  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  if (x.numel() == 0) return out;
  const Tensor weights = torch::stable::contiguous(weight);
  const Params params{rows.const_data_ptr(),
                      stride,
                      weights.const_data_ptr(),
                      residual ? residual_rows.const_data_ptr() : nullptr,
                      out.mutable_data_ptr(),
                      dtype,
                      float_dtype(kOp, "weight", weight),
                      x.numel() / K,
                      K,
                      static_cast<float>(eps),
                      static_cast<float>(offset),
                      std::clamp<int64_t>(x.numel() / kMinElementsPerThread, 1, torch::stable::get_num_threads())};
  select(kOp, kImpls, params).run(params);
  return out;
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table(kOp, kImpls, Params{}); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::rms_norm

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def("rms_norm(Tensor x, Tensor weight, float eps, float offset, Tensor? residual) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("rms_norm", TORCH_BOX(&taut::rms_norm::rms_norm)); }
