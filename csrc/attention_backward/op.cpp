#include <algorithm>

#include "attention_backward/call.h"

namespace taut::attention_backward {
namespace {

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx512bw", needs_avx512bw, always, cpu_avx512bw::run},
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#elif defined(__aarch64__)
    {"cpu_neon", needs_neon, always, cpu_neon::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// One thread does this many multiply-adds in the time that a second one costs to start and join.
constexpr double kMinProductsPerThread = 1 << 18;

// ds_aux[h] = - sum of the sink's weight times the row's shift; the rows in order.
void sum_sinks(const Params& p, float* ds_aux) {
  parallel_tasks(std::min(p.num_threads, p.Hq), [&](int64_t task) {
    for (int64_t h = task; h < p.Hq; h += std::min(p.num_threads, p.Hq)) {
      float sum = 0;
      for (int64_t b = 0; b < p.B; b++) {
        const Sequence s = sequence_of(p, b);
        for (int64_t i = 0; i < s.Lq; i++) {
          const int64_t at = lse_at(p, b, h, s.first_q + i);
          if (p.lse[at] != -INFINITY) sum -= std::exp(p.rules.s_aux[h] - p.lse[at]) * p.shift[at];
        }
      }
      ds_aux[h] = sum;
    }
  });
}

// Runs a call whose tensors are all there.
Gradients differentiate(Call& call, const Tensor& q) {
  Params& p = call.params;
  const bool is_fp32 = p.dtype == DType::kFloat32;
  const int64_t sum_shape[] = {is_fp32 ? 0 : q.numel()}, turns_shape[] = {p.B * p.Hkv * row_blocks(p)};
  Tensor dq_sum = torch::stable::new_empty(q, IntHeaderOnlyArrayRef(sum_shape, 1), ScalarType::Float);
  Tensor turns = torch::stable::new_zeros(q, IntHeaderOnlyArrayRef(turns_shape, 1), ScalarType::Int);
  p.dq_sum = p.dq;
  if (!is_fp32) p.dq_sum.data = dq_sum.mutable_data_ptr();
  p.turns = static_cast<int32_t*>(turns.mutable_data_ptr());
  const double products = static_cast<double>(p.B) * p.Hq * p.Lq * p.Lk * (3 * p.D + 2 * p.Dv);
  p.num_threads = std::clamp<int64_t>(static_cast<int64_t>(products / kMinProductsPerThread), 1, torch::stable::get_num_threads());
  select(kOp, kImpls, p).run(p);
  if (p.rules.s_aux) sum_sinks(p, static_cast<float*>(call.ds_aux.mutable_data_ptr()));
  return call.results();
}

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, double softmax_scale, bool causal, int64_t window, double softcap,
                             const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                             bool tokens_first) {
  Call call = make_call(grad_out, grad_lse, q, k, v, out, lse, softmax_scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first, check_cpu);
  return differentiate(call, q);
}

Gradients attention_backward_varlen(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale,
                                    bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux,
                                    const std::optional<Tensor>& alibi_slopes) {
  Call call = make_varlen_call(grad_out, grad_lse, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window, softcap, s_aux, alibi_slopes,
                               check_cpu);
  return differentiate(call, q);
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) { return explain_table(kOp, kImpls, params_of_sizes<Params>(kOp, sizes)); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::attention_backward

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(taut::attention_backward::kSchema);
  m.def(taut::attention_backward::kVarlenSchema);
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&taut::attention_backward::attention_backward));
  m.impl("attention_backward_varlen", TORCH_BOX(&taut::attention_backward::attention_backward_varlen));
}
