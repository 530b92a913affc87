// What the op.cpp files of attention ops share: from tensors to Heads and AttentionRules, checked. No kernel includes this.
#pragma once

#include "common/attention.h"
#include "common/torch_bridge.h"

namespace taut {

constexpr int64_t kMostHeadDim = 256;

// Throws where a tensor is not on the device of the impls: check_cpu, or check_cuda_tensor of common/torch_cuda.h.
using CheckPlace = void (*)(const char* op, const char* what, const Tensor& t);

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
  check(is_bool || mask->scalar_type() == ScalarType::Float || mask->scalar_type() == q.scalar_type(), op,
        ": mask must be bool, float32 or of the dtype of q");
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

}  // namespace taut
