// What every attention op means by its arguments, for every impl: where heads lie, who sees whom, what is done to a score.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/dtypes.h"

namespace taut {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
// Stands for the lowest score where -infinity would not do: it is subtracted.
constexpr float kLowest = -3.0e38f;

// [B,H,L,D] with rows of D contiguous; strides in elements.
struct Heads {
  const void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// One entry of the batch: its lengths, and the rows of q (and out, lse) and of k (and v) before it.
struct Sequence {
  int64_t Lq, Lk, first_q, first_k;
};

enum class MaskKind : int32_t { kNone, kBool, kAdditive };

// Broadcast to [B,Hq,Lq,Lk] by strides of 0.
struct AttentionMask {
  MaskKind kind = MaskKind::kNone;
  const void* data = nullptr;                                                   // bool: 1 is visible
  DType dtype = DType::kFloat32;                                                // of an additive one
  int64_t batch_stride = 0, head_stride = 0, query_stride = 0, key_stride = 0;  // elements
};

// score = q . k * softmax_scale; softcap; - alibi_slopes * distance; + additive mask. Then softmax over the visible keys and the sink.
// A query has a position among the keys: its index + Lk - Lq.
struct AttentionRules {
  float softmax_scale;
  float softcap = 0;                    // c > 0: c * tanh(score / c)
  bool causal = false;                  // keys up to the query's position
  int64_t window = 0;                   // w > 0: keys less than w away
  const float* s_aux = nullptr;         // [Hq] sinks, or nullptr
  const float* alibi_slopes = nullptr;  // [Hq], or nullptr
  AttentionMask mask;
};

namespace {  // WHY: every translation unit gets its own copy, so that no AVX-512 copy can be linked for everyone

// Params: of an attention op.
template <class Params>
inline Sequence sequence_of(const Params& p, int64_t b) {
  if (!p.cu_seqlens_q) return {p.Lq, p.Lk, 0, 0};
  return {p.cu_seqlens_q[b + 1] - p.cu_seqlens_q[b], p.cu_seqlens_k[b + 1] - p.cu_seqlens_k[b], p.cu_seqlens_q[b], p.cu_seqlens_k[b]};
}

// Where row `row` of a head begins, in elements.
inline int64_t row_of(const Heads& heads, int64_t b, int64_t h, int64_t row) { return b * heads.batch_stride + h * heads.head_stride + row * heads.row_stride; }

// The keys [first, end) that causality and the window leave to a query at `position`, of `keys` there are; none where first >= end.
constexpr int64_t first_key(const AttentionRules& rules, int64_t position) { return rules.window ? std::max<int64_t>(0, position - rules.window + 1) : 0; }
constexpr int64_t end_key(const AttentionRules& rules, int64_t position, int64_t keys) {
  if (rules.causal) return std::min(keys, position + 1);
  return rules.window ? std::min(keys, position + rules.window) : keys;
}

// The mask at [b,h,i,j] as what is added to a score: 0 or -infinity of a bool one. -infinity hides the key.
inline float mask_value(const AttentionMask& mask, int64_t b, int64_t h, int64_t i, int64_t j) {
  if (mask.kind == MaskKind::kNone) return 0.0f;
  const int64_t at = b * mask.batch_stride + h * mask.head_stride + i * mask.query_stride + j * mask.key_stride;
  if (mask.kind == MaskKind::kAdditive) return load_float(mask.data, at, mask.dtype);
  return static_cast<const uint8_t*>(mask.data)[at] ? 0.0f : -INFINITY;
}

}  // namespace
}  // namespace taut
