// What op.cpp and op_cuda.cpp share: a call of tensors, checked, made Params with outputs. Knows torch; no kernel includes this.
#pragma once

#include <map>
#include <sstream>
#include <tuple>

#include "attention_decode/op.h"
#include "common/attention_bridge.h"
#include "common/impl.h"
#include "common/kv_bridge.h"

namespace taut::attention_decode {
namespace {

constexpr const char* kOp = "attention_decode";

// Params that point into the tensors of a call and into what was allocated for it.
struct Call {
  Params params;
  PerHead sinks, slopes;
  Tensor out, lse;

  bool empty() const { return params.B * params.Lq == 0; }
  std::tuple<Tensor, Tensor> results() const { return {out, lse}; }
};

// `lengths`, and what the block table holds, aside.
inline Call make_call(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                      const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format, int64_t value_dim, int64_t keys,
                      double softmax_scale, bool causal, int64_t window, double softcap, const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux,
                      const std::optional<Tensor>& alibi_slopes, bool tokens_first, CheckPlace check_place) {
  check(q.dim() == 4, kOp, ": q must be [B, Hq, Lq, head dim], got ", shape_string(q));
  check(k.dim() == 4, kOp, ": k must be 4-dimensional, got ", shape_string(k));
  Call call{};
  Params& p = call.params;
  p.dtype = float_dtype(kOp, "q", q);
  p.B = q.size(0), p.Hq = q.size(1), p.Lq = q.size(2), p.D = q.size(3), p.Hkv = k.size(1), p.Dv = value_dim;
  check_heads(kOp, p.Hq, p.Hkv, p.D, p.Dv);
  check_rules(kOp, softmax_scale, window, softcap);
  p.cache = kv_cache_of(kOp, {p.B, p.Hkv, p.D, p.Dv}, k, v, k_scales, v_scales, channels, block_table, kv_format, check_place);
  const int64_t capacity = p.cache.page_tokens * p.cache.table_columns;
  check(0 <= keys && keys <= capacity, kOp, ": keys must be 0 to ", capacity, ", what the cache holds, got ", keys);
  p.keys = keys;
  p.q = heads_of(kOp, "q", q, true, check_place);
  call.sinks = per_head(kOp, "s_aux", s_aux, q, p.Hq, check_place), call.slopes = per_head(kOp, "alibi_slopes", alibi_slopes, q, p.Hq, check_place);
  const int64_t scores_shape[] = {p.B, p.Hq, p.Lq, keys}, shape[] = {p.B, p.Hq, p.Lq, p.Dv}, by_token[] = {p.B, p.Lq, p.Hq, p.Dv};
  p.rules = {static_cast<float>(softmax_scale),
             static_cast<float>(softcap),
             causal,
             window,
             call.sinks.data,
             call.slopes.data,
             mask_of(kOp, mask, q, scores_shape, check_place)};
  Tensor& out = call.out;
  out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(tokens_first ? by_token : shape, 4));
  if (tokens_first) out = torch::stable::transpose(out, 1, 2);
  call.lse = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3), ScalarType::Float);
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  p.lse = static_cast<float*>(call.lse.mutable_data_ptr());
  return call;
}

// What explain takes.
inline KvFormat format_of_sizes(const std::map<std::string, int64_t>& sizes) {
  const auto found = sizes.find("kv_format");
  const int64_t format = found == sizes.end() ? 0 : found->second;
  check(0 <= format && format < kNumKvFormats, kOp, ": kv_format must be 0 (float32), 1 (bfloat16), 2 (float16), 3 (fp8), 4 (int8) or 5 (int4), got ", format);
  return static_cast<KvFormat>(format);
}

}  // namespace
}  // namespace taut::attention_decode
