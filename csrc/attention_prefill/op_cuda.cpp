#include <limits>

#include "attention_prefill/call.h"
#include "common/cuda_archs.h"
#include "common/torch_cuda.h"

namespace taut::attention_prefill {
namespace {

// `supported` of an impl whose kernels are in a file for this SM: whether the build has them for the device, too.
constexpr char kSm75[] = "75", kSm80[] = "80", kSm90a[] = "90a";
template <const char* kFile, const char* (*kSupported)(const CudaParams&)>
const char* built(const CudaParams& p) {
  if (const char* why = kSupported(p)) return why;
  return has_code(kFile, p.device->sm) ? nullptr : "this build of taut has no machine code of it for this GPU";
}

constexpr Impl<CudaParams> kImpls[] = {
    {"cuda_sm90a.wgmma", built<kSm90a, cuda_sm90a_wgmma::supported>, always, cuda_sm90a_wgmma::run, cuda_sm90a_wgmma::workspace_bytes},
    {"cuda_sm80.mma", built<kSm80, cuda_sm80_mma::supported>, always, cuda_sm80_mma::run, cuda_sm80_mma::workspace_bytes},
    {"cuda_sm75.mma", built<kSm75, cuda_sm75_mma::supported>, always, cuda_sm75_mma::run, cuda_sm75_mma::workspace_bytes},
    {"cuda_sm75.simt", built<kSm75, always<CudaParams>>, always, cuda_sm75_simt::run},
};

void expose(const CudaCall& cuda, const Tensor& q, const Tensor& k, const Tensor& v, const Call& call) {
  cuda.expose("q", q), cuda.expose("k", k), cuda.expose("v", v);
  if (call.sinks.data) cuda.expose("s_aux", call.sinks.values);
  if (call.slopes.data) cuda.expose("alibi_slopes", call.slopes.values);
  cuda.expose("out", call.out, true), cuda.expose("lse", call.lse, true);
}

void run(const CudaCall& cuda, const char* op, const Params& params, int64_t q_rows, int64_t k_rows, const Tensor& like) {
  CudaParams p{params, q_rows, k_rows, &cuda.device(), cuda.stream(), nullptr};
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(p.Lq * (p.Hq / p.Hkv) <= kMost / 2 && p.Lk <= kMost / 2, op, ": queries times the heads that share a key head, and keys, must be under 2^30");
  const Impl<CudaParams>& impl = select(kOp, kImpls, p);
  Tensor scratch;
  if (const int64_t bytes = impl.workspace_bytes ? impl.workspace_bytes(p) : 0; bytes > 0) {
    scratch = scratch_bytes(like, bytes);
    p.workspace = aligned(scratch);
    cuda.expose("workspace", p.workspace, bytes, true);
  }
  impl.run(p);
}

std::tuple<Tensor, Tensor> attention_prefill(const Tensor& q, const Tensor& k, const Tensor& v, double softmax_scale, bool causal, int64_t window,
                                             double softcap, const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux,
                                             const std::optional<Tensor>& alibi_slopes, bool tokens_first) {
  check_one_device(kOp, "q", q,
                   {{"k", &k},
                    {"v", &v},
                    {"mask", mask ? &*mask : nullptr},
                    {"s_aux", s_aux ? &*s_aux : nullptr},
                    {"alibi_slopes", alibi_slopes ? &*alibi_slopes : nullptr}});
  const CudaCall cuda(q);
  const Call call = make_call(q, k, v, softmax_scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first, check_cuda_tensor);
  if (call.empty()) return call.results();
  expose(cuda, q, k, v, call);
  if (mask) cuda.expose("mask", *mask);
  run(cuda, kOp, call.params, call.params.Lq, call.params.Lk, q);
  return call.results();
}

std::tuple<Tensor, Tensor> attention_prefill_varlen(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k,
                                                    double softmax_scale, bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux,
                                                    const std::optional<Tensor>& alibi_slopes) {
  check_one_device(kVarlen, "q", q, {{"k", &k}, {"v", &v}, {"s_aux", s_aux ? &*s_aux : nullptr}, {"alibi_slopes", alibi_slopes ? &*alibi_slopes : nullptr}});
  const CudaCall cuda(q);
  // WHY both: the host checks the ends and sizes the grid by them, kernels look up where a sequence lies.
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor ends_q = torch::stable::to(cu_seqlens_q, cpu), ends_k = torch::stable::to(cu_seqlens_k, cpu);
  Call call = make_varlen_call(q, k, v, ends_q, ends_k, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_cuda_tensor);
  const int64_t tokens = q.size(0), end = call.params.cu_seqlens_q[call.params.B];
  if (!call.empty()) {
    const Tensor there_q = torch::stable::to(cu_seqlens_q, q.device()), there_k = torch::stable::to(cu_seqlens_k, q.device());
    call.params.cu_seqlens_q = static_cast<const int32_t*>(there_q.const_data_ptr());
    call.params.cu_seqlens_k = static_cast<const int32_t*>(there_k.const_data_ptr());
    expose(cuda, q, k, v, call);
    cuda.expose("cu_seqlens_q", there_q), cuda.expose("cu_seqlens_k", there_k);
    run(cuda, kVarlen, call.params, tokens, k.size(0), q);
  }
  if (end < tokens) {  // rows of no sequence
    torch::stable::fill_(torch::stable::narrow(call.out, 0, end, tokens - end), 0.0);
    torch::stable::fill_(torch::stable::narrow(call.lse, 1, end, tokens - end), -std::numeric_limits<double>::infinity());
  }
  return call.results();
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto index = sizes.find("device_index");
  Params params = params_of_sizes<Params>(kOp, sizes);
  params.rules.softmax_scale = 1;  // nobody names it
  const auto said = [&](const char* name, int64_t otherwise) { return sizes.count(name) ? sizes.at(name) : otherwise; };
  if (said("rules", 0)) params.rules.mask.kind = MaskKind::kBool;  // softcap, slopes or a mask
  if (!said("aligned", 1)) params.q.row_stride = 1;
  return explain_table(kOp, kImpls,
                       CudaParams{params, params.Lq, params.Lk, &device(index == sizes.end() ? 0 : static_cast<int>(index->second)), nullptr, nullptr});
}

const bool registered = register_table(kOp, TAUT_CUDA_DEVICE, kImpls, explain);

}  // namespace
}  // namespace taut::attention_prefill

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) {
  m.def(taut::attention_prefill::kSchema);
  m.def(taut::attention_prefill::kVarlenSchema);
}
#endif
TAUT_CUDA_LIBRARY(m) {
  m.impl("attention_prefill", TORCH_BOX(&taut::attention_prefill::attention_prefill));
  m.impl("attention_prefill_varlen", TORCH_BOX(&taut::attention_prefill::attention_prefill_varlen));
}
