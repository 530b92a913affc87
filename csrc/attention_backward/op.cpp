#include "attention_backward/op.h"

#include <algorithm>
#include <tuple>

#include "common/attention_bridge.h"
#include "common/impl.h"

namespace taut::attention_backward {
namespace {

using torch::headeronly::IntHeaderOnlyArrayRef;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of q, k, v and s_aux

constexpr const char* kOp = "attention_backward";
constexpr const char* kVarlen = "attention_backward_varlen";

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

// Zeros where nothing is written: varlen's rows of no sequence.
enum class Fill { kNothing, kZeros };

Tensor like(const Tensor& t, bool tokens_first, Fill fill) {
  int64_t shape[4];
  for (int64_t d = 0; d < t.dim(); d++) shape[d] = t.size(d);
  if (tokens_first) std::swap(shape[1], shape[2]);
  const IntHeaderOnlyArrayRef sizes(shape, t.dim());
  const Tensor made = fill == Fill::kZeros ? torch::stable::new_zeros(t, sizes) : torch::stable::new_empty(t, sizes);
  return tokens_first ? torch::stable::transpose(made, 1, 2) : made;
}

// As it is, or a copy whose rows are contiguous. WHY: the gradient of a sum is one number, expanded.
Tensor with_rows(const Tensor& t) { return t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); }

void check_same(const char* op, const char* what, const Tensor& t, const int64_t* shape, int64_t dim, ScalarType type) {
  check_cpu(op, what, t);
  bool same = t.dim() == dim && t.scalar_type() == type;
  for (int64_t d = 0; same && d < dim; d++) same = t.size(d) == shape[d];
  std::string expected;
  for (int64_t d = 0; d < dim; d++) expected += (d ? ", " : "") + std::to_string(shape[d]);
  check(same, op, ": ", what, " must be ", type == ScalarType::Float ? "float32" : "of the dtype of q", ", [", expected, "], got ", shape_string(t));
}

// The tensors that are as q, out or lse are; `batch`: whether there is a dimension for it. Runs, once all else in p is set.
Gradients differentiate(const char* op, Params& p, const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse, bool batch, bool tokens_first) {
  const int64_t tokens = q.size(0), batched[] = {p.B, p.Hq, p.Lq, p.Dv}, packed[] = {tokens, p.Hq, p.Dv}, packed_lse[] = {p.Hq, tokens};
  const int64_t *shape = batch ? batched : packed, *lse_shape = batch ? batched : packed_lse, dims = batch ? 4 : 3;
  check_same(op, "grad_out", grad_out, shape, dims, q.scalar_type());
  check_same(op, "out", out, shape, dims, q.scalar_type());
  check_same(op, "lse", lse, lse_shape, dims - 1, ScalarType::Float);
  if (grad_lse) check_same(op, "grad_lse", *grad_lse, lse_shape, dims - 1, ScalarType::Float);
  const Fill fill = batch ? Fill::kNothing : Fill::kZeros;
  const Tensor own_grad_out = with_rows(grad_out), own_out = with_rows(out), own_lse = torch::stable::contiguous(lse);
  std::optional<Tensor> own_grad_lse;
  if (grad_lse) own_grad_lse = torch::stable::contiguous(*grad_lse);
  Tensor dq = like(q, tokens_first, fill), dk = like(k, tokens_first, fill), dv = like(v, tokens_first, fill);
  const bool is_fp32 = p.dtype == DType::kFloat32;
  const int64_t rows = own_lse.numel(), sum_shape[] = {is_fp32 ? 0 : q.numel()}, space_shape[] = {3, rows}, turns_shape[] = {p.B * p.Hkv * row_blocks(p)};
  const int64_t sinks_shape[] = {p.rules.s_aux ? p.Hq : 0};
  Tensor dq_sum = torch::stable::new_empty(q, IntHeaderOnlyArrayRef(sum_shape, 1), ScalarType::Float);
  Tensor space = torch::stable::new_empty(q, IntHeaderOnlyArrayRef(space_shape, 2), ScalarType::Float);
  Tensor turns = torch::stable::new_zeros(q, IntHeaderOnlyArrayRef(turns_shape, 1), ScalarType::Int);
  Tensor ds_aux = torch::stable::new_empty(q, IntHeaderOnlyArrayRef(sinks_shape, 1), ScalarType::Float);
  p.grad_out = heads_of(op, "grad_out", own_grad_out, batch), p.out = heads_of(op, "out", own_out, batch);
  p.dq = heads_of(op, "dq", dq, batch), p.dk = heads_of(op, "dk", dk, batch), p.dv = heads_of(op, "dv", dv, batch);
  p.dq_sum = p.dq;
  if (!is_fp32) p.dq_sum.data = dq_sum.mutable_data_ptr();
  p.lse = static_cast<const float*>(own_lse.const_data_ptr());
  p.grad_lse = own_grad_lse ? static_cast<const float*>(own_grad_lse->const_data_ptr()) : nullptr;
  p.most = static_cast<float*>(space.mutable_data_ptr()), p.log_total = p.most + rows, p.shift = p.log_total + rows;
  p.lse_head_stride = batch ? p.Lq : tokens, p.lse_batch_stride = batch ? p.Hq * p.Lq : 0;
  p.turns = static_cast<int32_t*>(turns.mutable_data_ptr());
  const double products = static_cast<double>(p.B) * p.Hq * p.Lq * p.Lk * (3 * p.D + 2 * p.Dv);
  p.num_threads = std::clamp<int64_t>(static_cast<int64_t>(products / kMinProductsPerThread), 1, torch::stable::get_num_threads());
  select(kOp, kImpls, p).run(p);
  if (p.rules.s_aux) sum_sinks(p, static_cast<float*>(ds_aux.mutable_data_ptr()));
  return {dq, dk, dv, ds_aux};
}

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, double softmax_scale, bool causal, int64_t window, double softcap,
                             const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                             bool tokens_first) {
  Params p{};
  p.dtype = float_dtype(kOp, "q", q);
  check_batch(kOp, q, k, v);
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kOp, ": k and v must have the dtype of q");
  check_heads(kOp, q.size(1), k.size(1), q.size(3), v.size(3));
  check_rules(kOp, softmax_scale, window, softcap);
  p.B = q.size(0), p.Hq = q.size(1), p.Hkv = k.size(1), p.Lq = q.size(2), p.Lk = k.size(2), p.D = q.size(3), p.Dv = v.size(3);
  p.q = heads_of(kOp, "q", q, true), p.k = heads_of(kOp, "k", k, true), p.v = heads_of(kOp, "v", v, true);
  const PerHead sinks = per_head(kOp, "s_aux", s_aux, q, p.Hq), slopes = per_head(kOp, "alibi_slopes", alibi_slopes, q, p.Hq);
  const int64_t scores_shape[] = {p.B, p.Hq, p.Lq, p.Lk};
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, sinks.data, slopes.data, mask_of(kOp, mask, q, scores_shape)};
  return differentiate(kOp, p, grad_out, grad_lse, q, k, v, out, lse, true, tokens_first);
}

Gradients attention_backward_varlen(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale,
                                    bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux,
                                    const std::optional<Tensor>& alibi_slopes) {
  Params p{};
  p.dtype = float_dtype(kVarlen, "q", q);
  check_varlen(kVarlen, q, k, v, cu_seqlens_q, cu_seqlens_k);
  check(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(), kVarlen, ": k and v must have the dtype of q");
  check_heads(kVarlen, q.size(1), k.size(1), q.size(2), v.size(2));
  check_rules(kVarlen, softmax_scale, window, softcap);
  p.Hq = q.size(1), p.Hkv = k.size(1), p.D = q.size(2), p.Dv = v.size(2);
  p.q = heads_of(kVarlen, "q", q, false), p.k = heads_of(kVarlen, "k", k, false), p.v = heads_of(kVarlen, "v", v, false);
  const PerHead sinks = per_head(kVarlen, "s_aux", s_aux, q, p.Hq), slopes = per_head(kVarlen, "alibi_slopes", alibi_slopes, q, p.Hq);
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, sinks.data, slopes.data, {}};
  p.Lq = check_ends(kVarlen, "cu_seqlens_q", cu_seqlens_q, q.size(0)), p.Lk = check_ends(kVarlen, "cu_seqlens_k", cu_seqlens_k, k.size(0));
  p.cu_seqlens_q = static_cast<const int32_t*>(cu_seqlens_q.const_data_ptr()), p.cu_seqlens_k = static_cast<const int32_t*>(cu_seqlens_k.const_data_ptr());
  p.B = cu_seqlens_q.size(0) - 1;
  return differentiate(kVarlen, p, grad_out, grad_lse, q, k, v, out, lse, false, false);
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) { return explain_table(kOp, kImpls, params_of_sizes<Params>(kOp, sizes)); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::attention_backward

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float softmax_scale, bool causal, "
      "int window, float softcap, Tensor? mask, Tensor? s_aux, Tensor? alibi_slopes, bool tokens_first) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "attention_backward_varlen(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
      "Tensor cu_seqlens_k, float softmax_scale, bool causal, int window, float softcap, Tensor? s_aux, Tensor? alibi_slopes) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("attention_backward", TORCH_BOX(&taut::attention_backward::attention_backward));
  m.impl("attention_backward_varlen", TORCH_BOX(&taut::attention_backward::attention_backward_varlen));
}
