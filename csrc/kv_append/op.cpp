#include "kv_append/op.h"

#include <algorithm>
#include <sstream>
#include <tuple>

#include "common/attention_bridge.h"
#include "common/impl.h"
#include "common/kv_bridge.h"

namespace taut::kv_append {
namespace {

constexpr const char *kOp = "kv_append", *kRead = "kv_read";

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
  check_heads(op, 1, 1, p.D, p.Dv);
  const int64_t capacity = p.cache.page_tokens * p.cache.table_columns;
  check(p.start >= 0 && p.start <= capacity - p.L, op, ": ", p.L, " tokens from ", p.start, " on do not fit the cache, which holds ", capacity);
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
  check(k_new.dim() == 4 && v_new.dim() == 4, kOp, ": k_new and v_new must be [B, Hkv, L, head dim], got ", shape_string(k_new), " and ", shape_string(v_new));
  Params p{};
  p.dtype = float_dtype(kOp, "k_new", k_new);
  check(v_new.scalar_type() == k_new.scalar_type(), kOp, ": v_new must have the dtype of k_new");
  p.B = k_new.size(0), p.Hkv = k_new.size(1), p.L = k_new.size(2), p.D = k_new.size(3), p.Dv = v_new.size(3);
  check(v_new.size(0) == p.B && v_new.size(1) == p.Hkv && v_new.size(2) == p.L, kOp, ": v_new must be [", p.B, ", ", p.Hkv, ", ", p.L, ", Dv], got ",
        shape_string(v_new));
  p.cache = kv_cache_of(kOp, {p.B, p.Hkv, p.D, p.Dv}, k, v, k_scales, v_scales, channels, block_table, kv_format);
  p.k = heads_of(kOp, "k_new", k_new, true), p.v = heads_of(kOp, "v_new", v_new, true);
  p.start = start;
  run(kOp, p, k.size(0), starts);
}

std::tuple<Tensor, Tensor> kv_read(const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                                   const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format, int64_t batch,
                                   int64_t head_dim, int64_t value_dim, int64_t start, int64_t length, int64_t dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  check(0 <= dtype && dtype <= 2, kRead, ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", dtype);
  check(batch >= 0 && length >= 0, kRead, ": batch and length must be 0 or positive, got ", batch, " and ", length);
  check(k.dim() == 4, kRead, ": k must be 4-dimensional, got ", shape_string(k));
  Params p{};
  p.dtype = static_cast<DType>(dtype);
  p.B = batch, p.Hkv = k.size(1), p.L = length, p.D = head_dim, p.Dv = value_dim;
  p.cache = kv_cache_of(kRead, {p.B, p.Hkv, p.D, p.Dv}, k, v, k_scales, v_scales, channels, block_table, kv_format);
  p.start = start;
  p.reads = true;
  const int64_t shape[] = {p.B, p.Hkv, p.L, p.D}, value_shape[] = {p.B, p.Hkv, p.L, p.Dv};
  Tensor keys = torch::stable::new_empty(k, torch::headeronly::IntHeaderOnlyArrayRef(shape, 4), kTypes[dtype]);
  Tensor values = torch::stable::new_empty(k, torch::headeronly::IntHeaderOnlyArrayRef(value_shape, 4), kTypes[dtype]);
  p.k = {keys.mutable_data_ptr(), keys.stride(0), keys.stride(1), keys.stride(2)};
  p.v = {values.mutable_data_ptr(), values.stride(0), values.stride(1), values.stride(2)};
  run(kRead, p, k.size(0), std::nullopt);
  return {keys, values};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table(kOp, kImpls, Params{}); }

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::kv_append

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(
      "kv_append(Tensor k_new, Tensor v_new, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor? channels, Tensor? block_table, "
      "int kv_format, int start, Tensor? starts) -> ()");
  m.def(
      "kv_read(Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor? channels, Tensor? block_table, int kv_format, int batch, int head_dim, "
      "int value_dim, int start, int length, int dtype) -> (Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("kv_append", TORCH_BOX(&taut::kv_append::kv_append));
  m.impl("kv_read", TORCH_BOX(&taut::kv_append::kv_read));
}
