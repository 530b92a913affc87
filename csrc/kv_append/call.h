// What op.cpp and op_cuda.cpp share: a call of tensors, checked, made Params. Knows torch; no kernel includes this.
#pragma once

#include <sstream>

#include "common/attention_bridge.h"
#include "common/impl.h"
#include "common/kv_bridge.h"
#include "kv_append/op.h"

namespace taut::kv_append {
namespace {

constexpr const char *kOp = "kv_append", *kRead = "kv_read";

// `starts` aside.
inline Params append_params(const Tensor& k_new, const Tensor& v_new, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
                            const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table,
                            int64_t kv_format, int64_t start, CheckPlace check_place) {
  check(k_new.dim() == 4 && v_new.dim() == 4, kOp, ": k_new and v_new must be [B, Hkv, L, head dim], got ", shape_string(k_new), " and ", shape_string(v_new));
  Params p{};
  p.dtype = float_dtype(kOp, "k_new", k_new);
  check(v_new.scalar_type() == k_new.scalar_type(), kOp, ": v_new must have the dtype of k_new");
  p.B = k_new.size(0), p.Hkv = k_new.size(1), p.L = k_new.size(2), p.D = k_new.size(3), p.Dv = v_new.size(3);
  check(v_new.size(0) == p.B && v_new.size(1) == p.Hkv && v_new.size(2) == p.L, kOp, ": v_new must be [", p.B, ", ", p.Hkv, ", ", p.L, ", Dv], got ",
        shape_string(v_new));
  p.cache = kv_cache_of(kOp, {p.B, p.Hkv, p.D, p.Dv}, k, v, k_scales, v_scales, channels, block_table, kv_format, check_place);
  p.k = heads_of(kOp, "k_new", k_new, true, check_place), p.v = heads_of(kOp, "v_new", v_new, true, check_place);
  p.start = start;
  return p;
}

// `keys` and `values` become what is read into.
inline Params read_params(const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                          const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format, int64_t batch, int64_t head_dim,
                          int64_t value_dim, int64_t start, int64_t length, int64_t dtype, Tensor& keys, Tensor& values, CheckPlace check_place) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  check(0 <= dtype && dtype <= 2, kRead, ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", dtype);
  check(batch >= 0 && length >= 0, kRead, ": batch and length must be 0 or positive, got ", batch, " and ", length);
  check(k.dim() == 4, kRead, ": k must be 4-dimensional, got ", shape_string(k));
  Params p{};
  p.dtype = static_cast<DType>(dtype);
  p.B = batch, p.Hkv = k.size(1), p.L = length, p.D = head_dim, p.Dv = value_dim;
  p.cache = kv_cache_of(kRead, {p.B, p.Hkv, p.D, p.Dv}, k, v, k_scales, v_scales, channels, block_table, kv_format, check_place);
  p.start = start;
  p.reads = true;
  const int64_t shape[] = {p.B, p.Hkv, p.L, p.D}, value_shape[] = {p.B, p.Hkv, p.L, p.Dv};
  keys = torch::stable::new_empty(k, torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), kTypes[dtype]);
  values = torch::stable::new_empty(k, torch::headeronly::IntHeaderOnlyArrayRef(value_shape, 4), kTypes[dtype]);
  p.k = {keys.mutable_data_ptr(), keys.stride(0), keys.stride(1), keys.stride(2)};
  p.v = {values.mutable_data_ptr(), values.stride(0), values.stride(1), values.stride(2)};
  return p;
}

// That the tokens fit; the capacity.
inline int64_t check_span(const char* op, const Params& p) {
  check_heads(op, 1, 1, p.D, p.Dv);
  const int64_t capacity = p.cache.page_tokens * p.cache.table_columns;
  check(p.start >= 0 && p.start <= capacity - p.L, op, ": ", p.L, " tokens from ", p.start, " on do not fit the cache, which holds ", capacity);
  return capacity;
}

}  // namespace
}  // namespace taut::kv_append
