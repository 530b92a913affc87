#include <algorithm>
#include <tuple>

#include "kv_append/call.h"

namespace taut::kv_append {
namespace {

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#elif defined(__aarch64__)
    {"cpu_neon", needs_neon, always, cpu_neon::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// One thread does this many elements in the time that a second one costs to start and join.
constexpr int64_t kMinElementsPerThread = 1 << 13;

void run(const char* op, Params& p, int64_t pages, const std::optional<Tensor>& starts) {
  const int64_t capacity = check_span(op, p);
  if (starts) p.starts = kv_counts(op, "starts", *starts, p.B, 0, capacity - p.L - p.start);
  for (int64_t b = 0; b < p.B; b++) {
    const int64_t start = p.start + (p.starts ? p.starts[b] : 0);
    check_pages(op, p.cache, pages, b, start, start + p.L);
  }
  if (p.B * p.L * p.Hkv == 0) return;
  const int64_t blocks = p.Hkv * (p.L + kKvBlock - 1) / kKvBlock;
  p.num_threads = std::clamp<int64_t>(std::min(p.B * p.Hkv * p.L * (p.D + p.Dv) / kMinElementsPerThread, blocks), 1, torch::stable::get_num_threads());
  select(kOp, kImpls, p).run(p);
}

void kv_append(const Tensor& k_new, const Tensor& v_new, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
               const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format,
               int64_t start, const std::optional<Tensor>& starts) {
  Params p = append_params(k_new, v_new, k, v, k_scales, v_scales, channels, block_table, kv_format, start, check_cpu);
  run(kOp, p, k.size(0), starts);
}

std::tuple<Tensor, Tensor> kv_read(const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                                   const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format, int64_t batch,
                                   int64_t head_dim, int64_t value_dim, int64_t start, int64_t length, int64_t dtype) {
  Tensor keys, values;
  Params p = read_params(k, v, k_scales, v_scales, channels, block_table, kv_format, batch, head_dim, value_dim, start, length, dtype, keys, values, check_cpu);
  run(kRead, p, k.size(0), std::nullopt);
  return {keys, values};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table(kOp, kImpls, Params{}); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::kv_append

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(taut::kv_append::kAppendSchema);
  m.def(taut::kv_append::kReadSchema);
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&taut::kv_append::kv_append));
  m.impl("kv_read", TORCH_BOX(&taut::kv_append::kv_read));
}
