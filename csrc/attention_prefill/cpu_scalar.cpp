// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; fp32, scores of one query at a time
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows contiguous; lse [B,Hq,Lq]
// WORK      a task is a range of (batch entry, head, query); a query: its scores, their maximum, the weights, the sum of v
// BOUND     none: it is the truth in C++, one element at a time
// LIMITS    none: any processor
#include "attention_prefill/op.h"

namespace taut::attention_prefill::cpu_scalar {
namespace {

float dot(const Params& p, int64_t q_row, int64_t k_row) {
  float sum = 0;
  for (int64_t d = 0; d < p.D; d++) sum += load_float(p.q.data, q_row + d, p.dtype) * load_float(p.k.data, k_row + d, p.dtype);
  return sum;
}

float score(const Params& p, int64_t b, int64_t h, int64_t i, int64_t j, int64_t position, const Sequence& s) {
  const AttentionRules& rules = p.rules;
  const float hides_or_adds = mask_value(rules.mask, b, h, i, j);
  if (hides_or_adds == -INFINITY) return -INFINITY;  // WHY first: a hidden key may hold NaN
  float found = dot(p, row_of(p.q, b, h, s.first_q + i), row_of(p.k, b, h / (p.Hq / p.Hkv), s.first_k + j)) * rules.softmax_scale;
  if (rules.softcap > 0) found = rules.softcap * std::tanh(found / rules.softcap);
  if (rules.alibi_slopes) found -= rules.alibi_slopes[h] * static_cast<float>(std::abs(position - j));
  return found + hides_or_adds;
}

void attend(const Params& p, int64_t b, int64_t h, int64_t i, const Sequence& s) {
  const int64_t position = i + s.Lk - s.Lq, first = first_key(p.rules, position), end = end_key(p.rules, position, s.Lk);
  float* sums = reinterpret_cast<float*>(scratch(1, (p.Dv + std::max<int64_t>(end - first, 0)) * sizeof(float)));
  float* scores = sums + p.Dv;
  const float sink = p.rules.s_aux ? p.rules.s_aux[h] : -INFINITY;
  float most = sink;
  bool any = sink != -INFINITY;
  for (int64_t j = first; j < end; j++) {
    scores[j - first] = score(p, b, h, i, j, position, s);
    any |= scores[j - first] != -INFINITY;
    if (!(scores[j - first] <= most)) most = scores[j - first];  // a NaN stays
  }
  for (int64_t d = 0; d < p.Dv; d++) sums[d] = 0;
  float total = p.rules.s_aux ? std::exp(sink - most) : 0.0f;
  for (int64_t j = first; j < end; j++) {
    if (scores[j - first] == -INFINITY) continue;
    const float weight = std::exp(scores[j - first] - most);
    const int64_t v_row = row_of(p.v, b, h / (p.Hq / p.Hkv), s.first_k + j);
    total += weight;
    for (int64_t d = 0; d < p.Dv; d++) sums[d] += weight * load_float(p.v.data, v_row + d, p.dtype);
  }
  const int64_t out_row = row_of(p.out, b, h, s.first_q + i);
  for (int64_t d = 0; d < p.Dv; d++) store_float(const_cast<void*>(p.out.data), out_row + d, p.dtype, any ? sums[d] / total : 0.0f);
  *lse_of(p, b, h, s.first_q + i) = any ? most + std::log(total) : -INFINITY;
}

}  // namespace

void run(const Params& p) {
  parallel_tasks(p.num_threads, [&](int64_t task) {
    for (int64_t b = 0; b < p.B; b++) {
      const Sequence s = sequence_of(p, b);
      const int64_t rows = p.Hq * s.Lq;
      for (int64_t row = rows * task / p.num_threads; row < rows * (task + 1) / p.num_threads; row++) attend(p, b, row / s.Lq, row % s.Lq, s);
    }
  });
}

}  // namespace taut::attention_prefill::cpu_scalar
