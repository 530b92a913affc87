#include <algorithm>

#include "attention_prefill/call.h"

namespace taut::attention_prefill {
namespace {

#if defined(__x86_64__)
const char* needs_pairs(const Params& p) {
  if (!cpu_features().avx512bf16) return "this processor has no AVX-512 BF16";
  return p.dtype == DType::kBFloat16 ? nullptr : "only bfloat16 q, k and v";
}
#endif

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx512bf16", needs_pairs, always, cpu_avx512bf16::run},
    {"cpu_avx512bw", needs_avx512bw, always, cpu_avx512bw::run},
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// One thread does this many multiply-adds in the time that a second one costs to start and join.
constexpr double kMinProductsPerThread = 1 << 18;

void run(Params& p) {
  const double products = static_cast<double>(p.B) * p.Hq * p.Lq * p.Lk * (p.D + p.Dv);
  p.num_threads = std::clamp<int64_t>(static_cast<int64_t>(products / kMinProductsPerThread), 1, torch::stable::get_num_threads());
  select(kOp, kImpls, p).run(p);
}

std::tuple<Tensor, Tensor> attention_prefill(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal, int64_t window,
                                             double softcap, const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux,
                                             const std::optional<Tensor>& alibi_slopes, bool tokens_first) {
  Call call = make_call(q, k, v, softmax_scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first, check_cpu);
  if (!call.empty()) run(call.params);
  return call.results();
}

std::tuple<Tensor, Tensor> attention_prefill_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    double softmax_scale, bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux,
                                                    const std::optional<Tensor>& alibi_slopes) {
  Call call = make_varlen_call(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_cpu);
  const Params& p = call.params;
  const int64_t tokens = q.size(0), row_bytes = p.Hq * p.Dv * dtype_bytes(p.dtype);
  for (int64_t t = p.cu_seqlens_q[p.B]; t < tokens; t++) {  // rows of no sequence
    std::fill_n(static_cast<char*>(call.out.mutable_data_ptr()) + t * row_bytes, row_bytes, 0);
    for (int64_t h = 0; h < p.Hq; h++) p.lse[h * tokens + t] = -INFINITY;
  }
  if (!call.empty()) run(call.params);
  return call.results();
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) { return explain_table(kOp, kImpls, params_of_sizes<Params>(kOp, sizes)); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::attention_prefill

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(taut::attention_prefill::kSchema);
  m.def(taut::attention_prefill::kVarlenSchema);
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("attention_prefill", TORCH_BOX(&taut::attention_prefill::attention_prefill));
  m.impl("attention_prefill_varlen", TORCH_BOX(&taut::attention_prefill::attention_prefill_varlen));
}
