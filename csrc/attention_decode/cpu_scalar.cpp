// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; fp32, scores of one query at a time
// LAYOUT    q, out [B,H,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h
// WORK      a task is a range of (sequence, head, query); a query: its scores, their maximum, the weights, the sum of v
// BOUND     none: it is the truth in C++, one element at a time
// LIMITS    none: any processor
#include "attention_decode/op.h"

namespace taut::attention_decode::cpu_scalar {
namespace {

// Offsets and factors of the D + Dv channels of a head.
struct Channels {
  const float* offsets = nullptr;
  const float* factors = nullptr;
  float of(float stored, int64_t channel) const { return offsets ? stored * factors[channel] + offsets[channel] : stored; }
};

void attend(const Params& p, int64_t b, int64_t h, int64_t i) {
  const int64_t kv_head = h / (p.Hq / p.Hkv), length = p.length(b), position = i + length - p.Lq;
  const int64_t first = first_key(p.rules, position), end = end_key(p.rules, position, length);
  const int64_t q_row = b * p.q.batch_stride + h * p.q.head_stride + i * p.q.row_stride;
  Channels channels;
  if (p.cache.channels) channels.offsets = p.cache.channels + (b * p.Hkv + kv_head) * 2 * (p.D + p.Dv), channels.factors = channels.offsets + p.D + p.Dv;
  float* sums = reinterpret_cast<float*>(scratch(1, (p.Dv + std::max<int64_t>(end - first, 0)) * sizeof(float)));
  float* scores = sums + p.Dv;
  const float sink = p.rules.s_aux ? p.rules.s_aux[h] : -INFINITY;
  float most = sink;
  bool any = sink != -INFINITY;
  for (int64_t j = first; j < end; j++) {
    float& score = scores[j - first];
    score = mask_value(p.rules.mask, b, h, i, j);
    if (score == -INFINITY) continue;  // WHY first: a hidden key may hold NaN
    float product = 0;
    for (int64_t d = 0; d < p.D; d++) product += load_float(p.q.data, q_row + d, p.dtype) * channels.of(key_at(p.cache, b, kv_head, j, d), d);
    product *= p.rules.softmax_scale;
    if (p.rules.softcap > 0) product = p.rules.softcap * std::tanh(product / p.rules.softcap);
    if (p.rules.alibi_slopes) product -= p.rules.alibi_slopes[h] * static_cast<float>(std::abs(position - j));
    score += product;
    any |= score != -INFINITY;
    if (!(score <= most)) most = score;  // a NaN stays
  }
  for (int64_t d = 0; d < p.Dv; d++) sums[d] = 0;
  float total = p.rules.s_aux ? std::exp(sink - most) : 0.0f;
  for (int64_t j = first; j < end; j++) {
    if (scores[j - first] == -INFINITY) continue;
    const float weight = std::exp(scores[j - first] - most);
    total += weight;
    for (int64_t d = 0; d < p.Dv; d++) sums[d] += weight * channels.of(value_at(p.cache, p.Dv, b, kv_head, j, d), p.D + d);
  }
  const int64_t out_row = b * p.out.batch_stride + h * p.out.head_stride + i * p.out.row_stride;
  for (int64_t d = 0; d < p.Dv; d++) store_float(const_cast<void*>(p.out.data), out_row + d, p.dtype, any ? sums[d] / total : 0.0f);
  p.lse[(b * p.Hq + h) * p.Lq + i] = any ? most + std::log(total) : -INFINITY;
}

}  // namespace

void run(const Params& p) {
  const int64_t rows = p.B * p.Hq * p.Lq;
  parallel_tasks(p.num_threads, [&](int64_t task) {
    for (int64_t row = rows * task / p.num_threads; row < rows * (task + 1) / p.num_threads; row++) attend(p, row / p.Lq / p.Hq, row / p.Lq % p.Hq, row % p.Lq);
  });
}

}  // namespace taut::attention_decode::cpu_scalar
