#include "attention_prefill/op.h"

#include <algorithm>
#include <sstream>
#include <tuple>

#include "common/impl.h"
#include "common/torch_attention.h"

namespace taut::attention_prefill {
namespace {

constexpr const char* kOp = "attention_prefill";
constexpr const char* kVarlen = "attention_prefill_varlen";

#if defined(__x86_64__)
const char* needs_avx512bw(const Params&) { return cpu_features().avx512bw ? nullptr : "this processor has no AVX-512 F, BW, DQ and VL"; }
const char* needs_avx2(const Params&) { return cpu_features().avx2 ? nullptr : "this processor has no AVX2, FMA and F16C"; }
#endif

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
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
  const DType dtype = float_dtype(kOp, "q", q);
  check_batch(kOp, q, k, v);
  check_common(kOp, q, k, v, softmax_scale, window, softcap);
  const int64_t B = q.size(0), Hq = q.size(1), Lq = q.size(2), D = q.size(3), Hkv = k.size(1), Lk = k.size(2), Dv = v.size(3);
  const PerHead sinks = per_head(kOp, "s_aux", s_aux, q, Hq), slopes = per_head(kOp, "alibi_slopes", alibi_slopes, q, Hq);
  const int64_t scores_shape[] = {B, Hq, Lq, Lk}, shape[] = {B, Hq, Lq, Dv}, by_token[] = {B, Lq, Hq, Dv};
  Params p{heads_of(kOp, "q", q, true), heads_of(kOp, "k", k, true), heads_of(kOp, "v", v, true)};
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, sinks.data, slopes.data, mask_of(kOp, mask, q, scores_shape)};
  Tensor out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(tokens_first ? by_token : shape, 4));
  if (tokens_first) out = torch::stable::transpose(out, 1, 2);
  Tensor lse = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3), ScalarType::Float);
  if (B * Lq == 0) return {out, lse};
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  p.lse_head_stride = Lq, p.lse_batch_stride = Hq * Lq;
  p.dtype = dtype;
  p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
  run(p);
  return {out, lse};
}

std::tuple<Tensor, Tensor> attention_prefill_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    double softmax_scale, bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux,
                                                    const std::optional<Tensor>& alibi_slopes) {
  const DType dtype = float_dtype(kVarlen, "q", q);
  check_varlen(kVarlen, q, k, v, cu_seqlens_q, cu_seqlens_k);
  check_common(kVarlen, q, k, v, softmax_scale, window, softcap);
  const int64_t tokens = q.size(0), Hq = q.size(1), D = q.size(2), Hkv = k.size(1), Dv = v.size(2);
  const PerHead sinks = per_head(kVarlen, "s_aux", s_aux, q, Hq), slopes = per_head(kVarlen, "alibi_slopes", alibi_slopes, q, Hq);
  Params p{heads_of(kVarlen, "q", q, false), heads_of(kVarlen, "k", k, false), heads_of(kVarlen, "v", v, false)};
  p.Lq = check_ends(kVarlen, "cu_seqlens_q", cu_seqlens_q, tokens), p.Lk = check_ends(kVarlen, "cu_seqlens_k", cu_seqlens_k, k.size(0));
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, sinks.data, slopes.data, {}};
  const int64_t shape[] = {tokens, Hq, Dv}, lse_shape[] = {Hq, tokens};
  Tensor out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3));
  Tensor lse = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(lse_shape, 2), ScalarType::Float);
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()), p.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  p.B = cu_seqlens_q.size(0) - 1;
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  for (int64_t t = p.cu_seqlens_q[p.B]; t < tokens; t++) {  // rows of no sequence
    std::fill_n(static_cast<char*>(out.mutable_data_ptr()) + t * Hq * Dv * dtype_bytes(dtype), Hq * Dv * dtype_bytes(dtype), 0);
    for (int64_t h = 0; h < Hq; h++) p.lse[h * tokens + t] = -INFINITY;
  }
  if (p.B * p.Lq == 0) return {out, lse};
  p.out = {out.mutable_data_ptr(), 0, Dv, Hq * Dv};
  p.lse_head_stride = tokens, p.lse_batch_stride = 0;
  p.dtype = dtype;
  p.Hq = Hq, p.Hkv = Hkv, p.D = D, p.Dv = Dv;
  run(p);
  return {out, lse};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) { return explain_table(kOp, kImpls, params_of_sizes<Params>(kOp, sizes)); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::attention_prefill

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "attention_prefill(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int window, float softcap, Tensor? mask, Tensor? s_aux, "
      "Tensor? alibi_slopes, bool tokens_first) -> (Tensor, Tensor)");
  m.def(
      "attention_prefill_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool causal, int window, "
      "float softcap, Tensor? s_aux, Tensor? alibi_slopes) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("attention_prefill", TORCH_BOX(&taut::attention_prefill::attention_prefill));
  m.impl("attention_prefill_varlen", TORCH_BOX(&taut::attention_prefill::attention_prefill_varlen));
}
