#include "attention_decode/op.h"

#include <algorithm>
#include <sstream>
#include <tuple>

#include "common/attention_bridge.h"
#include "common/impl.h"
#include "common/kv_bridge.h"

namespace taut::attention_decode {
namespace {

constexpr const char* kOp = "attention_decode";

#if defined(__x86_64__)
const char* needs_codes(const Params& p) { return has_codes(p.cache.format) ? needs_avx512vnni(p) : "only int8 and int4 caches have codes to multiply"; }
#elif defined(__aarch64__)
const char* needs_codes(const Params& p) { return has_codes(p.cache.format) ? needs_neondot(p) : "only int8 and int4 caches have codes to multiply"; }
#endif

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx512vnni", needs_codes, always, cpu_avx512vnni::run},
    {"cpu_avx512bw", needs_avx512bw, always, cpu_avx512bw::run},
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#elif defined(__aarch64__)
    {"cpu_neondot", needs_codes, always, cpu_neondot::run},
    {"cpu_neon", needs_neon, always, cpu_neon::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// One thread does this many multiply-adds in the time that a second one costs to start and join.
constexpr double kMinProductsPerThread = 1 << 16;

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
                                            const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels,
                                            const std::optional<Tensor>& block_table, int64_t kv_format, int64_t value_dim, int64_t keys,
                                            const std::optional<Tensor>& lengths, double softmax_scale, bool causal, int64_t window, double softcap,
                                            const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                                            bool tokens_first) {
  check(q.dim() == 4, kOp, ": q must be [B, Hq, Lq, head dim], got ", shape_string(q));
  check(k.dim() == 4, kOp, ": k must be 4-dimensional, got ", shape_string(k));
  Params p{};
  p.dtype = float_dtype(kOp, "q", q);
  p.B = q.size(0), p.Hq = q.size(1), p.Lq = q.size(2), p.D = q.size(3), p.Hkv = k.size(1), p.Dv = value_dim;
  check_heads(kOp, p.Hq, p.Hkv, p.D, p.Dv);
  check_rules(kOp, softmax_scale, window, softcap);
  p.cache = kv_cache_of(kOp, {p.B, p.Hkv, p.D, p.Dv}, k, v, k_scales, v_scales, channels, block_table, kv_format);
  const int64_t capacity = p.cache.page_tokens * p.cache.table_columns;
  check(0 <= keys && keys <= capacity, kOp, ": keys must be 0 to ", capacity, ", what the cache holds, got ", keys);
  p.keys = keys;
  if (lengths) p.lengths = kv_counts(kOp, "lengths", *lengths, p.B, 0, keys);
  for (int64_t b = 0; b < p.B; b++) check_pages(kOp, p.cache, k.size(0), b, 0, p.length(b));
  p.q = heads_of(kOp, "q", q, true);
  const PerHead sinks = per_head(kOp, "s_aux", s_aux, q, p.Hq), slopes = per_head(kOp, "alibi_slopes", alibi_slopes, q, p.Hq);
  const int64_t scores_shape[] = {p.B, p.Hq, p.Lq, keys}, shape[] = {p.B, p.Hq, p.Lq, p.Dv}, by_token[] = {p.B, p.Lq, p.Hq, p.Dv};
  p.rules = {static_cast<float>(softmax_scale), static_cast<float>(softcap), causal, window, sinks.data, slopes.data, mask_of(kOp, mask, q, scores_shape)};
  Tensor out = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(tokens_first ? by_token : shape, 4));
  if (tokens_first) out = torch::stable::transpose(out, 1, 2);
  Tensor lse = torch::stable::new_empty(q, torch::headeronly::IntHeaderOnlyArrayRef(shape, 3), ScalarType::Float);
  if (p.B * p.Lq == 0) return {out, lse};
  p.out = {out.mutable_data_ptr(), out.stride(0), out.stride(1), out.stride(2)};
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  const double products = static_cast<double>(p.B) * p.Hq * p.Lq * keys * (p.D + p.Dv);
  p.num_threads = std::clamp<int64_t>(static_cast<int64_t>(products / kMinProductsPerThread), 1, torch::stable::get_num_threads());
  const int64_t blocks = p.B * p.Hkv * p.row_blocks();
  p.finished = reinterpret_cast<int32_t*>(scratch(0, blocks * (p.chunks() * p.partial_floats() + 1) * sizeof(float)));
  p.partials = reinterpret_cast<float*>(p.finished + blocks);
  std::fill_n(p.finished, blocks, 0);
  select(kOp, kImpls, p).run(p);
  return {out, lse};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto found = sizes.find("kv_format");
  const int64_t format = found == sizes.end() ? 0 : found->second;
  check(0 <= format && format < kNumKvFormats, kOp, ": kv_format must be 0 (float32), 1 (bfloat16), 2 (float16), 3 (fp8), 4 (int8) or 5 (int4), got ", format);
  Params p{};
  p.cache.format = static_cast<KvFormat>(format);
  return explain_table(kOp, kImpls, p);
}

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::attention_decode

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor? channels, Tensor? block_table, int kv_format, "
      "int value_dim, int keys, Tensor? lengths, float softmax_scale, bool causal, int window, float softcap, Tensor? mask, Tensor? s_aux, "
      "Tensor? alibi_slopes, bool tokens_first) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("attention_decode", TORCH_BOX(&taut::attention_decode::attention_decode)); }
