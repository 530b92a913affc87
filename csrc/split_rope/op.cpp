#include "split_rope/op.h"

#include <algorithm>
#include <sstream>
#include <tuple>

#include "common/impl.h"
#include "common/torch_bridge.h"

namespace taut::split_rope {
namespace {

constexpr const char* kOp = "split_rope";

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

struct Norm {
  Tensor row;
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
};
Norm norm_weight(const char* what, const std::optional<Tensor>& weight, const Tensor& qkv, int64_t head_dim) {
  if (!weight) return {};
  check_cpu(kOp, what, *weight);
  check(weight->dim() == 1 && weight->size(0) == head_dim, kOp, ": ", what, " must be [", head_dim, "], got ", shape_string(*weight));
  check(weight->scalar_type() == qkv.scalar_type() || weight->scalar_type() == ScalarType::Float, kOp, ": ", what, " must have the dtype of qkv or be float32");
  const Tensor row = torch::stable::contiguous(*weight);
  return {row, row.const_data_ptr(), float_dtype(kOp, what, row)};
}

std::tuple<Tensor, Tensor, Tensor> split_rope(const Tensor& qkv, const Tensor& cos, const Tensor& sin, int64_t q_heads, int64_t kv_heads, int64_t head_dim,
                                              const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double norm_eps, double norm_offset) {
  check_cpu(kOp, "qkv", qkv);
  check_cpu(kOp, "cos", cos);
  check_cpu(kOp, "sin", sin);
  const DType dtype = float_dtype(kOp, "qkv", qkv);
  constexpr int64_t kMost = 1 << 20;
  check(1 <= q_heads && q_heads <= kMost && 1 <= kv_heads && kv_heads <= kMost && 1 <= head_dim && head_dim <= kMost, kOp,
        ": q_heads, kv_heads and head_dim must be 1 to 2^20, got ", q_heads, ", ", kv_heads, " and ", head_dim);
  const int64_t width = (q_heads + 2 * kv_heads) * head_dim;
  check(qkv.dim() == 3 && qkv.size(2) == width, kOp, ": qkv must be [B, T, ", width, "], got ", shape_string(qkv));
  const int64_t B = qkv.size(0), T = qkv.size(1);
  check(cos.dim() == 3 && (cos.size(0) == B || cos.size(0) == 1) && cos.size(1) == T && cos.size(2) % 2 == 0 && cos.size(2) <= head_dim, kOp, ": cos must be [",
        B, " or 1, ", T, ", R] with R even and at most ", head_dim, ", got ", shape_string(cos));
  check(sin.dim() == 3 && sin.size(0) == cos.size(0) && sin.size(1) == T && sin.size(2) == cos.size(2), kOp, ": sin must have the shape of cos, ",
        shape_string(cos), ", got ", shape_string(sin));
  check(cos.scalar_type() == sin.scalar_type() && (cos.scalar_type() == qkv.scalar_type() || cos.scalar_type() == ScalarType::Float), kOp,
        ": cos and sin must have the dtype of qkv or be float32, both the same");
  const Norm q_weight = norm_weight("q_norm", q_norm, qkv, head_dim), k_weight = norm_weight("k_norm", k_norm, qkv, head_dim);
  const auto make = [&](int64_t heads) {
    const int64_t shape[] = {B, heads, T, head_dim};
    return torch::stable::new_empty(qkv, torch::headeronly::IntHeaderOnlyArrayRef(shape, 4));
  };
  Tensor q = make(q_heads), k = make(kv_heads), v = make(kv_heads);
  if (B * T == 0) return {q, k, v};
  const Tensor rows = torch::stable::contiguous(qkv), cosines = torch::stable::contiguous(cos), sines = torch::stable::contiguous(sin);
  const Params params{rows.const_data_ptr(),
                      cosines.const_data_ptr(),
                      sines.const_data_ptr(),
                      q_weight.data,
                      k_weight.data,
                      q.mutable_data_ptr(),
                      k.mutable_data_ptr(),
                      v.mutable_data_ptr(),
                      dtype,
                      float_dtype(kOp, "cos", cos),
                      q_weight.dtype,
                      k_weight.dtype,
                      B,
                      T,
                      q_heads,
                      kv_heads,
                      head_dim,
                      cos.size(2),
                      cos.size(0) == 1,
                      static_cast<float>(norm_eps),
                      static_cast<float>(norm_offset),
                      std::clamp<int64_t>(B * T * width / kMinElementsPerThread, 1, torch::stable::get_num_threads())};
  select(kOp, kImpls, params).run(params);
  return {q, k, v};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table(kOp, kImpls, Params{}); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::split_rope

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "split_rope(Tensor qkv, Tensor cos, Tensor sin, int q_heads, int kv_heads, int head_dim, Tensor? q_norm, Tensor? k_norm, float norm_eps, "
      "float norm_offset) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("split_rope", TORCH_BOX(&taut::split_rope::split_rope)); }
