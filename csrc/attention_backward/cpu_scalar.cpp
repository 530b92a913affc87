// COMPUTES  dq, dk and dv of softmax(q k^T) v, with the rules of common/attention.h; fp32, one pair of query and key at a time
// LAYOUT    all [B,H,L,D] by strides, rows contiguous; lse [B,Hq,Lq]
// WORK      a task is a key head of a batch entry: its queries one after another, each adding to its own dq and to all keys' dk and dv
// BOUND     none: it is the truth in C++, one element at a time
// LIMITS    none: any processor
#include "attention_backward/rows.h"

namespace taut::attention_backward::cpu_scalar {
namespace {

// dk[D] and dv[Dv]: sums of key j.
void add_pair(const Params& p, const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t j, float* dk, float* dv) {
  const Score score = score_of(p, s, b, h, i, j);
  if (!score.visible) return;
  const int64_t kv_head = h / (p.Hq / p.Hkv), at = lse_at(p, b, h, s.first_q + i);
  const int64_t q_row = row_of(p.q, b, h, s.first_q + i), grad_row = row_of(p.grad_out, b, h, s.first_q + i);
  const int64_t k_row = row_of(p.k, b, kv_head, s.first_k + j), v_row = row_of(p.v, b, kv_head, s.first_k + j);
  const float weight = std::exp2(score.exponent - p.most[at] - p.log_total[at]);
  const float grad_weight = dot(p.grad_out, grad_row, p.v, v_row, p.dtype, p.Dv);
  const float grad_score = weight * (grad_weight - p.shift[at]) * score.slope * p.rules.softmax_scale;
  float* dq = static_cast<float*>(const_cast<void*>(p.dq_sum.data)) + row_of(p.dq_sum, b, h, s.first_q + i);
  for (int64_t d = 0; d < p.Dv; d++) dv[d] += weight * load_float(p.grad_out.data, grad_row + d, p.dtype);
  for (int64_t d = 0; d < p.D; d++) {
    dk[d] += grad_score * load_float(p.q.data, q_row + d, p.dtype);
    dq[d] += grad_score * load_float(p.k.data, k_row + d, p.dtype);
  }
}

void differentiate(const Params& p, int64_t b, int64_t kv_head) {
  const Sequence s = sequence_of(p, b);
  const int64_t group = p.Hq / p.Hkv;
  float* dk = reinterpret_cast<float*>(scratch(1, s.Lk * (p.D + p.Dv) * sizeof(float)));
  float* dv = dk + s.Lk * p.D;
  std::fill_n(dk, s.Lk * (p.D + p.Dv), 0.0f);
  for (int64_t h = kv_head * group; h < (kv_head + 1) * group; h++)
    for (int64_t i = 0; i < s.Lq; i++) {
      if (p.lse[lse_at(p, b, h, s.first_q + i)] == -INFINITY) continue;
      const int64_t position = i + s.Lk - s.Lq, end = end_key(p.rules, position, s.Lk);
      for (int64_t j = first_key(p.rules, position); j < end; j++) add_pair(p, s, b, h, i, j, dk + j * p.D, dv + j * p.Dv);
    }
  for (int64_t j = 0; j < s.Lk; j++) {
    const int64_t dk_row = row_of(p.dk, b, kv_head, s.first_k + j), dv_row = row_of(p.dv, b, kv_head, s.first_k + j);
    for (int64_t d = 0; d < p.D; d++) store_float(const_cast<void*>(p.dk.data), dk_row + d, p.dtype, dk[j * p.D + d]);
    for (int64_t d = 0; d < p.Dv; d++) store_float(const_cast<void*>(p.dv.data), dv_row + d, p.dtype, dv[j * p.Dv + d]);
  }
}

}  // namespace

void run(const Params& p) {
  for_rows(p, [&](int64_t b, int64_t h, int64_t i, const Sequence& s) { prepare_row(p, s, b, h, i); });
  parallel_tasks(p.B * p.Hkv, [&](int64_t task) { differentiate(p, task / p.Hkv, task % p.Hkv); });
  if (p.dtype != DType::kFloat32) for_rows(p, [&](int64_t b, int64_t h, int64_t i, const Sequence& s) { round_dq(p, s, b, h, i); });
}

}  // namespace taut::attention_backward::cpu_scalar
