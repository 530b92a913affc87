// What op.cpp and op_cuda.cpp share: a call of tensors, checked, made Params with outputs. Knows torch; no kernel includes this.
#pragma once

#include <algorithm>
#include <map>
#include <tuple>

#include "attention_backward/op.h"
#include "common/attention_bridge.h"
#include "common/impl.h"

namespace taut::attention_backward {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of q, k, v and s_aux

constexpr const char* kOp = "attention_backward";
constexpr const char* kVarlen = "attention_backward_varlen";

// Params that point into the tensors of a call and into what was allocated for it.
struct Call {
  Params params;
  PerHead sinks, slopes;
  Tensor grad_out, out, lse;  // contiguous where they must be
  std::optional<Tensor> grad_lse;
  Tensor dq, dk, dv, ds_aux;
  Tensor space;  // most, log_total and shift

  Gradients results() const { return {dq, dk, dv, ds_aux}; }
};

// Zeros where nothing is written: varlen's rows of no sequence.
enum class Fill { kNothing, kZeros };

inline Tensor like(const Tensor& t, bool tokens_first, Fill fill) {
  int64_t shape[4];
  for (int64_t d = 0; d < t.dim(); d++) shape[d] = t.size(d);
  if (tokens_first) std::swap(shape[1], shape[2]);
  const IntHeaderOnlyArrayRef sizes(shape, t.dim());
  const Tensor made = fill == Fill::kZeros ? torch::stable::new_zeros(t, sizes) : torch::stable::new_empty(t, sizes);
  return tokens_first ? torch::stable::transpose(made, 1, 2) : made;
}

// As it is, or a copy whose rows are contiguous. WHY: the gradient of a sum is one number, expanded.
inline Tensor with_rows(const Tensor& t) { return t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

inline void check_same(const char* op, const char* what, const Tensor& t, const int64_t* shape, int64_t dim, ScalarType type, CheckPlace check_place) {
  check_place(op, what, t);
  bool same = t.dim() == dim && t.scalar_type() == type;
  for (int64_t d = 0; same && d < dim; d++) same = t.size(d) == shape[d];
  std::string expected;
  for (int64_t d = 0; d < dim; d++) expected += (d ? ", " : "") + std::to_string(shape[d]);
  check(same, op, ": ", what, " must be ", type == ScalarType::Float ? "float32" : "of the dtype of q", ", [", expected, "], got ", shape_string(t));
}

// What both forms of the op check first.
inline Call begin_call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal, int64_t window, double softcap,
                       const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes, CheckPlace check_place) {
  const int64_t last = q.dim() - 1;
  const bool batch = q.dim() == 4;
  Call call{};
  Params& p = call.params;
  p.dtype = float_dtype(op, "q", q);
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), op, ": k and v must have the dtype of q");
  check_heads(op, q.size(1), k.size(1), q.size(last), v.size(last));
  check_rules(op, softmax_scale, window, softcap);
  p.Hq = q.size(1), p.Hkv = k.size(1), p.D = q.size(last), p.Dv = v.size(last);
  p.q = heads_of(op, "q", q, batch, check_place), p.k = heads_of(op, "k", k, batch, check_place), p.v = heads_of(op, "v", v, batch, check_place);
  call.sinks = per_head(op, "s_aux", s_aux, q, p.Hq, check_place), call.slopes = per_head(op, "alibi_slopes", alibi_slopes, q, p.Hq, check_place);
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, call.sinks.data, call.slopes.data, {}};
  return call;
}

// The tensors that are as q, out or lse are, once the sizes are known; `batch`: whether there is a dimension for it.
inline void end_call(const char* op, Call& call, const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
                     const Tensor& v, const Tensor& out, const Tensor& lse, bool batch, bool tokens_first, CheckPlace check_place) {
  Params& p = call.params;
  const int64_t tokens = q.size(0), batched[] = {p.B, p.Hq, p.Lq, p.Dv}, packed[] = {tokens, p.Hq, p.Dv}, packed_lse[] = {p.Hq, tokens};
  const int64_t *shape = batch ? batched : packed, *lse_shape = batch ? batched : packed_lse, dims = batch ? 4 : 3;
  check_same(op, "grad_out", grad_out, shape, dims, q.scalar_type(), check_place);
  check_same(op, "out", out, shape, dims, q.scalar_type(), check_place);
  check_same(op, "lse", lse, lse_shape, dims - 1, ScalarType::Float, check_place);
  if (grad_lse) check_same(op, "grad_lse", *grad_lse, lse_shape, dims - 1, ScalarType::Float, check_place);
  const Fill fill = batch ? Fill::kNothing : Fill::kZeros;
  call.grad_out = with_rows(grad_out), call.out = with_rows(out), call.lse = torch::stable::contiguous(lse);
  if (grad_lse) call.grad_lse = torch::stable::contiguous(*grad_lse);
  call.dq = like(q, tokens_first, fill), call.dk = like(k, tokens_first, fill), call.dv = like(v, tokens_first, fill);
  const int64_t rows = call.lse.numel(), space_shape[] = {3, rows}, sinks_shape[] = {p.rules.s_aux ? p.Hq : 0};
  call.space = torch::stable::new_empty(q, IntHeaderOnlyArrayRef(space_shape, 2), ScalarType::Float);
  call.ds_aux = torch::stable::new_empty(q, IntHeaderOnlyArrayRef(sinks_shape, 1), ScalarType::Float);
  p.grad_out = heads_of(op, "grad_out", call.grad_out, batch, check_place), p.out = heads_of(op, "out", call.out, batch, check_place);
  p.dq = heads_of(op, "dq", call.dq, batch, check_place), p.dk = heads_of(op, "dk", call.dk, batch, check_place);
  p.dv = heads_of(op, "dv", call.dv, batch, check_place);
  p.lse = static_cast<const float*>(call.lse.const_data_ptr());
  p.grad_lse = call.grad_lse ? static_cast<const float*>(call.grad_lse->const_data_ptr()) : nullptr;
  p.most = static_cast<float*>(call.space.mutable_data_ptr()), p.log_total = p.most + rows, p.shift = p.log_total + rows;
  p.lse_head_stride = batch ? p.Lq : tokens, p.lse_batch_stride = batch ? p.Hq * p.Lq : 0;
}

inline Call make_call(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                      const Tensor& lse, double softmax_scale, bool causal, int64_t window, double softcap, const std::optional<Tensor>& mask,
                      const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes, bool tokens_first, CheckPlace check_place) {
  check_batch(kOp, q, k, v);
  Call call = begin_call(kOp, q, k, v, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_place);
  Params& p = call.params;
  p.B = q.size(0), p.Lq = q.size(2), p.Lk = k.size(2);
  const int64_t scores_shape[] = {p.B, p.Hq, p.Lq, p.Lk};
  p.rules.mask = mask_of(kOp, mask, q, scores_shape, check_place);
  end_call(kOp, call, grad_out, grad_lse, q, k, v, out, lse, true, tokens_first, check_place);
  return call;
}

// cu_seqlens_q and cu_seqlens_k are on the CPU, and so are the pointers to them.
inline Call make_varlen_call(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale, bool causal,
                             int64_t window, double softcap, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                             CheckPlace check_place) {
  check_varlen(kVarlen, q, k, v, cu_seqlens_q, cu_seqlens_k);
  Call call = begin_call(kVarlen, q, k, v, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_place);
  Params& p = call.params;
  p.Lq = check_ends(kVarlen, "cu_seqlens_q", cu_seqlens_q, q.size(0)), p.Lk = check_ends(kVarlen, "cu_seqlens_k", cu_seqlens_k, k.size(0));
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()), p.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  p.B = cu_seqlens_q.size(0) - 1;
  end_call(kVarlen, call, grad_out, grad_lse, q, k, v, out, lse, false, false, check_place);
  return call;
}

}  // namespace
}  // namespace taut::attention_backward
