// What op.cpp and op_cuda.cpp share: a call of tensors, checked, made Params with outputs. Knows torch; no kernel includes this.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>

#include "attention_prefill/op.h"
#include "common/attention_bridge.h"
#include "common/impl.h"

namespace taut::attention_prefill {
namespace {

constexpr const char* kOp = "attention_prefill";
constexpr const char* kVarlen = "attention_prefill_varlen";

// Params that point into the tensors of a call and into what was allocated for it.
struct Call {
  Params params;
  PerHead sinks, slopes;
  Tensor out, lse;

  bool empty() const { return params.B * params.Lq == 0; }
  std::tuple<Tensor, Tensor> results() const { return {out, lse}; }
};

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> shape, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

// What both forms of the op check first.
inline Call begin_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal, int64_t window, double softcap,
                       const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes, CheckPlace check_place) {
  const int64_t last = q.dim() - 1;
  const bool batch = q.dim() == 4;
  const DType dtype = float_dtype(op, "q", q);
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op, ": k and v must have the dtype of q");
  check_heads(op, q.size(1), k.size(1), q.size(last), v.size(last));
  check_rules(op, softmax_scale, window, softcap);
  Call call{};
  Params& p = call.params;
  p.q = heads_of(op, "q", q, batch, check_place), p.k = heads_of(op, "k", k, batch, check_place), p.v = heads_of(op, "v", v, batch, check_place);
  p.dtype = dtype;
  p.Hq = q.size(1), p.Hkv = k.size(1), p.D = q.size(last), p.Dv = v.size(last);
  call.sinks = per_head(op, "s_aux", s_aux, q, p.Hq, check_place), call.slopes = per_head(op, "alibi_slopes", alibi_slopes, q, p.Hq, check_place);
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, call.sinks.data, call.slopes.data, {}};
  return call;
}

inline Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal, int64_t window, double softcap,
                      const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes, bool tokens_first,
                      CheckPlace check_place) {
  check_batch(kOp, q, k, v);
  Call call = begin_call(kOp, q, k, v, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_place);
  Params& p = call.params;
  p.B = q.size(0), p.Lq = q.size(2), p.Lk = k.size(2);
  const int64_t scores_shape[] = {p.B, p.Hq, p.Lq, p.Lk};
  p.rules.mask = mask_of(kOp, mask, q, scores_shape, check_place);
  Tensor out = tokens_first ? new_tensor(q, {p.B, p.Lq, p.Hq, p.Dv}) : new_tensor(q, {p.B, p.Hq, p.Lq, p.Dv});
  if (tokens_first) out = torch::stable::transpose(out, 1, 2);
  call.out = out, call.lse = new_tensor(q, {p.B, p.Hq, p.Lq}, ScalarType::Float);
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  p.lse = static_cast<float*>(call.lse.mutable_data_ptr());
  p.lse_head_stride = p.Lq, p.lse_batch_stride = p.Hq * p.Lq;
  return call;
}

// cu_seqlens_q and cu_seqlens_k are on the CPU, and so are the pointers to them.
inline Call make_varlen_call(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale,
                             bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                             CheckPlace check_place) {
  check_varlen(kVarlen, q, k, v, cu_seqlens_q, cu_seqlens_k);
  Call call = begin_call(kVarlen, q, k, v, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_place);
  Params& p = call.params;
  const int64_t tokens = q.size(0);
  p.Lq = check_ends(kVarlen, "cu_seqlens_q", cu_seqlens_q, tokens), p.Lk = check_ends(kVarlen, "cu_seqlens_k", cu_seqlens_k, k.size(0));
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()), p.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  p.B = cu_seqlens_q.size(0) - 1;
  call.out = new_tensor(q, {tokens, p.Hq, p.Dv}), call.lse = new_tensor(q, {p.Hq, tokens}, ScalarType::Float);
  p.out = {call.out.mutable_data_ptr(), 0, p.Dv, p.Hq * p.Dv};
  p.lse = static_cast<float*>(call.lse.mutable_data_ptr());
  p.lse_head_stride = tokens, p.lse_batch_stride = 0;
  return call;
}

}  // namespace
}  // namespace taut::attention_prefill
