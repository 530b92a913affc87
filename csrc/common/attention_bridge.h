// What the op.cpp files of attention ops share: from tensors to Heads and AttentionRules, checked. No kernel includes this.
#pragma once

#include <algorithm>
#include <map>

#include "common/attention.h"
#include "common/torch_bridge.h"

namespace taut {

constexpr int64_t kMostHeadDim = 256;

// `batch`: whether there is a dimension for it.
inline Heads heads_of(const char* op, const char* what, const Tensor& t, bool batch, CheckPlace check_place = check_cpu) {
  check_place(op, what, t);
  check(t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1, op, ": ", what, "'s last dimension must be contiguous");
  if (!batch) return {t.const_data_ptr(), 0, t.stride(1), t.stride(0)};
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

inline AttentionMask mask_of(const char* op, const std::optional<Tensor>& mask, const Tensor& q, const int64_t (&shape)[4],
                             CheckPlace check_place = check_cpu) {
  if (!mask) return {};
  check_place(op, "mask", *mask);
  const bool is_bool = mask->scalar_type() == ScalarType::Bool;
  check(is_bool || mask->scalar_type() == ScalarType::Float || mask->scalar_type() == q.scalar_type(), op, ": mask must be bool, float32 or of the dtype of q");
  AttentionMask found{is_bool ? MaskKind::kBool : MaskKind::kAdditive, mask->const_data_ptr(), is_bool ? DType::kFloat32 : float_dtype(op, "mask", *mask)};
  int64_t strides[4] = {};
  bool fits = mask->dim() <= 4;
  for (int64_t d = 0; fits && d < mask->dim(); d++) {  // from the last dimension on
    const int64_t size = mask->size(mask->dim() - 1 - d);
    fits = size == 1 || size == shape[3 - d];
    if (size != 1) strides[3 - d] = mask->stride(mask->dim() - 1 - d);
  }
  check(fits, op, ": mask must be broadcastable to [B, Hq, Lq, Lk] = [", shape[0], ", ", shape[1], ", ", shape[2], ", ", shape[3], "], got ",
        shape_string(*mask));
  found.batch_stride = strides[0], found.head_stride = strides[1], found.query_stride = strides[2], found.key_stride = strides[3];
  return found;
}

// [Hq] in fp32, as the rules want it.
struct PerHead {
  Tensor values;
  const float* data = nullptr;
};
inline PerHead per_head(const char* op, const char* what, const std::optional<Tensor>& t, const Tensor& q, int64_t q_heads,
                        CheckPlace check_place = check_cpu) {
  if (!t) return {};
  check_place(op, what, *t);
  check(t->dim() == 1 && t->size(0) == q_heads && (t->scalar_type() == ScalarType::Float || t->scalar_type() == q.scalar_type()), op, ": ", what,
        " must be float32 or of the dtype of q, [", q_heads, "], got ", shape_string(*t));
  const Tensor values = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
  return {values, static_cast<const float*>(values.const_data_ptr())};
}

inline void check_heads(const char* op, int64_t q_heads, int64_t kv_heads, int64_t head_dim, int64_t value_dim) {
  check(q_heads >= 1 && kv_heads >= 1 && q_heads % kv_heads == 0, op, ": the heads of q must be a multiple of those of k and v, got ", q_heads, " and ",
        kv_heads);
  check(head_dim >= 1 && head_dim <= kMostHeadDim && value_dim >= 1 && value_dim <= kMostHeadDim, op, ": head dims must be 1 to ", kMostHeadDim, ", got ",
        head_dim, " of q and k, ", value_dim, " of v");
}

inline void check_rules(const char* op, double softmax_scale, int64_t window, double softcap) {
  check(std::isfinite(softmax_scale), op, ": softmax_scale must be finite");
  check(window >= 0, op, ": window must be 0 (none) or positive, got ", window);
  check(softcap >= 0 && std::isfinite(softcap), op, ": softcap must be 0 (none) or positive and finite, got ", softcap);
}

inline void check_batch(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k and v must be [B, heads, length, head dim], got ", shape_string(q), ", ", shape_string(k),
        " and ", shape_string(v));
  const int64_t B = q.size(0), D = q.size(3);
  check(k.size(0) == B && k.size(3) == D, op, ": k must be [", B, ", Hkv, Lk, ", D, "], got ", shape_string(k));
  check(v.size(0) == B && v.size(1) == k.size(1) && v.size(2) == k.size(2), op, ": v must be [", B, ", ", k.size(1), ", ", k.size(2), ", Dv], got ",
        shape_string(v));
}

inline void check_varlen(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k) {
  check(q.dim() == 3 && k.dim() == 3 && v.dim() == 3, op, ": q, k and v must be [tokens, heads, head dim], got ", shape_string(q), ", ", shape_string(k),
        " and ", shape_string(v));
  check(k.size(2) == q.size(2), op, ": k must be [Tk, Hkv, ", q.size(2), "], got ", shape_string(k));
  check(v.size(0) == k.size(0) && v.size(1) == k.size(1), op, ": v must be [", k.size(0), ", ", k.size(1), ", Dv], got ", shape_string(v));
  check(cu_seqlens_q.dim() == 1 && cu_seqlens_k.dim() == 1 && cu_seqlens_q.size(0) == cu_seqlens_k.size(0), op,
        ": cu_seqlens_q and cu_seqlens_k must be of one length");
}

// The length of the longest sequence.
inline int64_t check_ends(const char* op, const char* what, const Tensor& ends, int64_t tokens) {
  check_cpu(op, what, ends);
  check(ends.scalar_type() == ScalarType::Int && ends.dim() == 1 && ends.size(0) >= 1 && ends.is_contiguous(), op, ": ", what,
        " must be contiguous int32 [S + 1]");
  const int32_t* values = static_cast<const int32_t*>(ends.const_data_ptr());
  const int64_t count = ends.size(0) - 1;
  int64_t most = 0;
  check(values[0] == 0, op, ": ", what, " must begin with 0, got ", values[0]);
  for (int64_t s = 0; s < count; s++) {
    check(values[s] <= values[s + 1], op, ": ", what, " must not fall, got ", values[s], " then ", values[s + 1]);
    most = std::max<int64_t>(most, values[s + 1] - values[s]);
  }
  check(values[count] <= tokens, op, ": ", what, " must end within the ", tokens, " tokens there are, got ", values[count]);
  return most;
}

// What explain takes: Params of sizes by name.
template <class Params>
Params params_of_sizes(const char* op, const std::map<std::string, int64_t>& sizes) {
  const auto size = [&](const char* name, int64_t otherwise) { return sizes.count(name) ? sizes.at(name) : otherwise; };
  Params p{};
  p.B = size("B", 1), p.Hq = size("Hq", 32), p.Hkv = size("Hkv", p.Hq), p.Lq = size("Lq", 512), p.Lk = size("Lk", p.Lq);
  p.D = size("D", 64), p.Dv = size("Dv", p.D);
  const int64_t dtype = size("dtype", 0);
  check(0 <= dtype && dtype <= 2, op, ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", dtype);
  p.dtype = static_cast<DType>(dtype);
  return p;
}

}  // namespace taut
