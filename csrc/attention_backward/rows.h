// What every impl does to a row before the tiles: its shift, and by what its scores become weights. Scores are exponents of 2.
#pragma once

#include "attention_backward/op.h"
#include "common/row_math.h"

namespace taut::attention_backward {
namespace {

inline float dot(const Heads& x, int64_t x_row, const Heads& y, int64_t y_row, DType dtype, int64_t n) {
  FloatLanes sum = {};
  for_dtype(dtype, [&]<DType kDType>() {
    for (int64_t d = 0; d < n; d += 8) {
      FloatLanes a, b;
      load_lanes<kDType>(a, x.data, x_row + d, std::min<int64_t>(8, n - d));
      load_lanes<kDType>(b, y.data, y_row + d, std::min<int64_t>(8, n - d));
      sum += a * b;
    }
  });
  return sum_lanes(sum);
}

struct Score {
  float exponent, slope;  // slope: of softcap, by which a score grows with q . k * softmax_scale
  bool visible;
};

inline Score score_of(const Params& p, const Sequence& s, int64_t b, int64_t h, int64_t i, int64_t j) {
  const AttentionRules& rules = p.rules;
  const float added = mask_value(rules.mask, b, h, i, j);
  if (added == -INFINITY) return {-INFINITY, 0, false};  // WHY first: a hidden key may hold NaN
  float score = dot(p.q, row_of(p.q, b, h, s.first_q + i), p.k, row_of(p.k, b, h / (p.Hq / p.Hkv), s.first_k + j), p.dtype, p.D) * rules.softmax_scale;
  float slope = 1;
  if (rules.softcap > 0) {
    const float capped = std::tanh(score / rules.softcap);
    score = rules.softcap * capped, slope = 1 - capped * capped;
  }
  if (rules.alibi_slopes) score -= rules.alibi_slopes[h] * static_cast<float>(std::abs(i + s.Lk - s.Lq - j));
  return {score * kLog2E + std::max(added * kLog2E, kLowest), slope, true};
}

inline void prepare_row(const Params& p, const Sequence& s, int64_t b, int64_t h, int64_t i) {
  const int64_t at = lse_at(p, b, h, s.first_q + i), dq_row = row_of(p.dq_sum, b, h, s.first_q + i);
  for (int64_t d = 0; d < p.D; d++) store_float(const_cast<void*>(p.dq_sum.data), dq_row + d, DType::kFloat32, 0);
  const float lse = p.lse[at];
  if (lse == -INFINITY) {  // it sees nothing: its weights are to be 0
    p.most[at] = INFINITY, p.log_total[at] = p.shift[at] = 0;
    return;
  }
  p.shift[at] = dot(p.grad_out, row_of(p.grad_out, b, h, s.first_q + i), p.out, row_of(p.out, b, h, s.first_q + i), p.dtype, p.Dv);
  if (p.grad_lse) p.shift[at] -= p.grad_lse[at];
  p.most[at] = lse * kLog2E, p.log_total[at] = 0;
  if (std::fabs(lse) <= kLargestLse) return;
  float most = p.rules.s_aux ? p.rules.s_aux[h] * kLog2E : kLowest, total = p.rules.s_aux ? 1 : 0;
  const int64_t position = i + s.Lk - s.Lq, end = end_key(p.rules, position, s.Lk);
  for (int64_t j = first_key(p.rules, position); j < end; j++) {
    const Score score = score_of(p, s, b, h, i, j);
    if (!score.visible) continue;
    if (!(score.exponent <= most)) total *= std::exp2(most - score.exponent), most = score.exponent;  // a NaN stays
    total += std::exp2(score.exponent - most);
  }
  p.most[at] = most, p.log_total[at] = std::log2(total);
}

// dq of a row, where it is not what it was summed in.
inline void round_dq(const Params& p, const Sequence& s, int64_t b, int64_t h, int64_t i) {
  const int64_t from = row_of(p.dq_sum, b, h, s.first_q + i), to = row_of(p.dq, b, h, s.first_q + i);
  for_dtype(p.dtype, [&]<DType kDType>() {
    for (int64_t d = 0; d < p.D; d += 8) {
      FloatLanes x;
      load_lanes<DType::kFloat32>(x, p.dq_sum.data, from + d, std::min<int64_t>(8, p.D - d));
      store_lanes<kDType>(x, const_cast<void*>(p.dq.data), to + d, std::min<int64_t>(8, p.D - d));
    }
  });
}

// f(b, h, i, sequence) for each row, shared out to the threads.
template <class F>
void for_rows(const Params& p, const F& f) {
  parallel_tasks(p.num_threads, [&](int64_t task) {
    for (int64_t b = 0; b < p.B; b++) {
      const Sequence s = sequence_of(p, b);
      const int64_t rows = p.Hq * s.Lq;
      for (int64_t row = rows * task / p.num_threads; row < rows * (task + 1) / p.num_threads; row++) f(b, row / s.Lq, row % s.Lq, s);
    }
  });
}

}  // namespace
}  // namespace taut::attention_backward
