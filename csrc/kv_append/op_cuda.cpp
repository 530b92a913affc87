#include <limits>
#include <tuple>

#include "common/cuda_archs.h"
#include "common/torch_cuda.h"
#include "kv_append/call.h"

namespace taut::kv_append {
namespace {

const char* built(const CudaParams& p) { return has_code("75", p.device->sm) ? nullptr : "this build of taut has no machine code of it for this GPU"; }

constexpr Impl<CudaParams> kImpls[] = {
    {"cuda_sm75.simt", built, always, cuda_sm75_simt::run},
};

void run(const CudaCall& cuda, const char* op, const Params& params, const Tensor& k) {
  const CudaParams p{params, k.size(0), &cuda.device(), cuda.stream()};
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  const int64_t capacity = check_span(op, p), blocks = (p.L + 2 * kKvBlock - 2) / kKvBlock;
  check(capacity <= kMost / 2 && k.size(0) <= kMost && 2 * p.B * p.Hkv * blocks <= kMost, op, ": too many tokens for one call");
  check_words(op, p.cache);
  if (p.B * p.L * p.Hkv == 0) return;
  select(kOp, kImpls, p).run(p);
}

void expose(const CudaCall& cuda, const Params& p, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
            const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table) {
  const auto show = [&](const char* name, const Tensor& t) { p.reads ? cuda.expose(name, t) : cuda.expose_update(name, t); };
  show("k", k), show("v", v);
  if (k_scales) show("k_scales", *k_scales), show("v_scales", *v_scales);
  if (channels) cuda.expose("channels", *channels);
  if (block_table) cuda.expose("block_table", *block_table);
}

const Tensor* given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

void kv_append(const Tensor& k_new, const Tensor& v_new, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
               const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format,
               int64_t start, const std::optional<Tensor>& starts) {
  check_one_device(kOp, "k_new", k_new,
                   {{"v_new", &v_new},
                    {"k", &k},
                    {"v", &v},
                    {"k_scales", given(k_scales)},
                    {"v_scales", given(v_scales)},
                    {"channels", given(channels)},
                    {"block_table", given(block_table)},
                    {"starts", given(starts)}});
  const CudaCall cuda(k_new);
  Params p = append_params(k_new, v_new, k, v, k_scales, v_scales, channels, block_table, kv_format, start, check_cuda_tensor);
  if (starts) p.starts = kv_counts(kOp, "starts", *starts, p.B, check_cuda_tensor), cuda.expose("starts", *starts);
  cuda.expose("k_new", k_new), cuda.expose("v_new", v_new);
  expose(cuda, p, k, v, k_scales, v_scales, channels, block_table);
  run(cuda, kOp, p, k);
}

std::tuple<Tensor, Tensor> kv_read(const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales, const std::optional<Tensor>& v_scales,
                                   const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table, int64_t kv_format, int64_t batch,
                                   int64_t head_dim, int64_t value_dim, int64_t start, int64_t length, int64_t dtype) {
  check_one_device(
      kRead, "k", k,
      {{"v", &v}, {"k_scales", given(k_scales)}, {"v_scales", given(v_scales)}, {"channels", given(channels)}, {"block_table", given(block_table)}});
  const CudaCall cuda(k);
  Tensor keys, values;
  const Params p = read_params(k, v, k_scales, v_scales, channels, block_table, kv_format, batch, head_dim, value_dim, start, length, dtype, keys, values,
                               check_cuda_tensor);
  expose(cuda, p, k, v, k_scales, v_scales, channels, block_table);
  cuda.expose("keys", keys, true), cuda.expose("values", values, true);
  run(cuda, kRead, p, k);
  return {keys, values};
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto index = sizes.find("device_index");
  CudaParams p{};
  p.device = &device(index == sizes.end() ? 0 : static_cast<int>(index->second));
  return explain_table(kOp, kImpls, p);
}

const bool registered = register_table(kOp, TAUT_CUDA_DEVICE, kImpls, explain);

}  // namespace
}  // namespace taut::kv_append

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) {
  m.def(taut::kv_append::kAppendSchema);
  m.def(taut::kv_append::kReadSchema);
}
#endif
TAUT_CUDA_LIBRARY(m) {
  m.impl("kv_append", TORCH_BOX(&taut::kv_append::kv_append));
  m.impl("kv_read", TORCH_BOX(&taut::kv_append::kv_read));
}
