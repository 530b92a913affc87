#include <limits>
#include <tuple>

#include "attention_decode/call.h"
#include "common/cuda_archs.h"
#include "common/torch_cuda.h"

namespace taut::attention_decode {
namespace {

// `supported` of an impl whose kernels are in a file for this SM: whether the build has them for the device, too.
constexpr char kSm75[] = "75", kSm80[] = "80";
template <const char* kFile, const char* (*kSupported)(const CudaParams&)>
const char* built(const CudaParams& p) {
  if (const char* why = kSupported(p)) return why;
  return has_code(kFile, p.device->sm) ? nullptr : "this build of taut has no machine code of it for this GPU";
}

constexpr Impl<CudaParams> kImpls[] = {
    {"cuda_sm80.mma", built<kSm80, cuda_sm80_mma::supported>, always, cuda_sm80_mma::run, cuda_sm80_mma::workspace_bytes},
    {"cuda_sm75.mma", built<kSm75, cuda_sm75_mma::supported>, always, cuda_sm75_mma::run, cuda_sm75_mma::workspace_bytes},
    {"cuda_sm75.simt", built<kSm75, always<CudaParams>>, always, cuda_sm75_simt::run, cuda_sm75_simt::workspace_bytes},
};

const Tensor* given(const std::optional<Tensor>& t) { return t ? &*t : nullptr; }

std::tuple<Tensor, Tensor> attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
                                            const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels,
                                            const std::optional<Tensor>& block_table, int64_t kv_format, int64_t value_dim, int64_t keys,
                                            const std::optional<Tensor>& lengths, double softmax_scale, bool causal, int64_t window, double softcap,
                                            const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                                            bool tokens_first) {
  check_one_device(kOp, "q", q,
                   {{"k", &k},
                    {"v", &v},
                    {"k_scales", given(k_scales)},
                    {"v_scales", given(v_scales)},
                    {"channels", given(channels)},
                    {"block_table", given(block_table)},
                    {"lengths", given(lengths)},
                    {"mask", given(mask)},
                    {"s_aux", given(s_aux)},
                    {"alibi_slopes", given(alibi_slopes)}});
  const CudaCall cuda(q);
  Call call = make_call(q, k, v, k_scales, v_scales, channels, block_table, kv_format, value_dim, keys, softmax_scale, causal, window, softcap, mask, s_aux,
                        alibi_slopes, tokens_first, check_cuda_tensor);
  if (lengths) call.params.lengths = kv_counts(kOp, "lengths", *lengths, call.params.B, check_cuda_tensor);
  check_words(kOp, call.params.cache);
  if (call.empty()) return call.results();
  CudaParams p{call.params, k.size(0), &cuda.device(), cuda.stream(), nullptr};
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(p.rows() <= kMost / 2 && keys <= kMost / 2 && p.pages <= kMost && p.cache.page_tokens <= kMost, kOp,
        ": queries times the heads that share a key head, and keys, must be under 2^30");
  cuda.expose("q", q), cuda.expose("k", k), cuda.expose("v", v);
  for (const auto& [name, t] : {std::pair{"k_scales", given(k_scales)},
                                {"v_scales", given(v_scales)},
                                {"channels", given(channels)},
                                {"block_table", given(block_table)},
                                {"lengths", given(lengths)},
                                {"mask", given(mask)}})
    if (t) cuda.expose(name, *t);
  if (call.sinks.data) cuda.expose("s_aux", call.sinks.values);
  if (call.slopes.data) cuda.expose("alibi_slopes", call.slopes.values);
  cuda.expose("out", call.out, true), cuda.expose("lse", call.lse, true);
  const Impl<CudaParams>& impl = select(kOp, kImpls, p);
  const int64_t bytes = impl.workspace_bytes(p);
  const Tensor scratch = scratch_bytes(q, bytes);
  p.workspace = aligned(scratch);
  cuda.expose("workspace", p.workspace, bytes, true);
  impl.run(p);
  return call.results();
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto index = sizes.find("device_index");
  const auto size = [&](const char* name, int64_t otherwise) { return sizes.count(name) ? sizes.at(name) : otherwise; };
  CudaParams p{};
  p.cache.format = format_of_sizes(sizes);
  p.D = size("D", 64), p.Dv = size("Dv", p.D);
  const int64_t dtype = size("dtype", 0);
  check(0 <= dtype && dtype <= 2, kOp, ": dtype must be 0 (float32), 1 (bfloat16) or 2 (float16), got ", dtype);
  p.dtype = static_cast<DType>(dtype);
  static constexpr float kSome[1] = {};
  if (size("channels", 0)) p.cache.channels = kSome;  // nobody looks at them here
  if (!size("aligned", 1)) p.cache.k_row_stride = 1;
  p.device = &device(index == sizes.end() ? 0 : static_cast<int>(index->second));
  return explain_table(kOp, kImpls, p);
}

const bool registered = register_table(kOp, TAUT_CUDA_DEVICE, kImpls, explain);

}  // namespace
}  // namespace taut::attention_decode

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) { m.def(taut::attention_decode::kSchema); }
#endif
TAUT_CUDA_LIBRARY(m) { m.impl("attention_decode", TORCH_BOX(&taut::attention_decode::attention_decode)); }
