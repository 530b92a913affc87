#include <algorithm>
#include <tuple>

#include "attention_decode/call.h"

namespace taut::attention_decode {
namespace {

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
  Call call = make_call(q, k, v, k_scales, v_scales, channels, block_table, kv_format, value_dim, keys, softmax_scale, causal, window, softcap, mask, s_aux,
                        alibi_slopes, tokens_first, check_cpu);
  Params& p = call.params;
  if (lengths) p.lengths = kv_counts(kOp, "lengths", *lengths, p.B, 0, keys);
  for (int64_t b = 0; b < p.B; b++) check_pages(kOp, p.cache, k.size(0), b, 0, p.length(b));
  if (call.empty()) return call.results();
  const double products = static_cast<double>(p.B) * p.Hq * p.Lq * keys * (p.D + p.Dv);
  p.num_threads = std::clamp<int64_t>(static_cast<int64_t>(products / kMinProductsPerThread), 1, torch::stable::get_num_threads());
  const int64_t blocks = p.B * p.Hkv * p.row_blocks();
  p.finished = reinterpret_cast<int32_t*>(scratch(0, blocks * (p.chunks() * p.partial_floats() + 1) * sizeof(float)));
  p.partials = reinterpret_cast<float*>(p.finished + blocks);
  std::fill_n(p.finished, blocks, 0);
  select(kOp, kImpls, p).run(p);
  return call.results();
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  Params p{};
  p.cache.format = format_of_sizes(sizes);
  return explain_table(kOp, kImpls, p);
}

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::attention_decode

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def(taut::attention_decode::kSchema); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("attention_decode", TORCH_BOX(&taut::attention_decode::attention_decode)); }
