#include <limits>

#include "attention_backward/call.h"
#include "common/cuda_archs.h"
#include "common/torch_cuda.h"

namespace taut::attention_backward {
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
    {"cuda_sm75.simt", built<kSm75, always<CudaParams>>, always, cuda_sm75_simt::run},
};

Gradients run(const CudaCall& cuda, const char* op, Call& call, const Tensor& q, const Tensor& k, const Tensor& v) {
  const bool varlen = call.params.cu_seqlens_q;
  CudaParams p{call.params, nullptr, varlen ? q.size(0) : q.size(2), varlen ? k.size(0) : k.size(2), &cuda.device(), cuda.stream(), nullptr};
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check(p.B * p.Hq * p.Lq <= kMost && p.B * p.Hkv * p.Lk <= kMost, op, ": queries and keys of all heads must be under 2^31");
  cuda.expose("q", q), cuda.expose("k", k), cuda.expose("v", v);
  cuda.expose("grad_out", call.grad_out), cuda.expose("out", call.out), cuda.expose("lse", call.lse);
  if (call.grad_lse) cuda.expose("grad_lse", *call.grad_lse);
  if (call.sinks.data) cuda.expose("s_aux", call.sinks.values);
  if (call.slopes.data) cuda.expose("alibi_slopes", call.slopes.values);
  cuda.expose("space", call.space, true);
  if (p.cu_seqlens_q) cuda.expose_update("dq", call.dq), cuda.expose_update("dk", call.dk), cuda.expose_update("dv", call.dv);  // rows of no sequence are zeros
  else cuda.expose("dq", call.dq, true), cuda.expose("dk", call.dk, true), cuda.expose("dv", call.dv, true);
  if (p.rules.s_aux) {
    p.ds_aux = static_cast<float*>(call.ds_aux.mutable_data_ptr());
    cuda.expose("ds_aux", call.ds_aux, true);
  }
  const Impl<CudaParams>& impl = select(kOp, kImpls, p);
  Tensor scratch;
  if (const int64_t bytes = impl.workspace_bytes ? impl.workspace_bytes(p) : 0; bytes > 0) {
    scratch = scratch_bytes(q, bytes);
    p.workspace = aligned(scratch);
    cuda.expose("workspace", p.workspace, bytes, true);
  }
  impl.run(p);
  return call.results();
}

Gradients attention_backward(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                             const Tensor& out, const Tensor& lse, double softmax_scale, bool causal, int64_t window, double softcap,
                             const std::optional<Tensor>& mask, const std::optional<Tensor>& s_aux, const std::optional<Tensor>& alibi_slopes,
                             bool tokens_first) {
  check_one_device(kOp, "q", q,
                   {{"grad_out", &grad_out},
                    {"grad_lse", grad_lse ? &*grad_lse : nullptr},
                    {"k", &k},
                    {"v", &v},
                    {"out", &out},
                    {"lse", &lse},
                    {"mask", mask ? &*mask : nullptr},
                    {"s_aux", s_aux ? &*s_aux : nullptr},
                    {"alibi_slopes", alibi_slopes ? &*alibi_slopes : nullptr}});
  const CudaCall cuda(q);
  Call call =
      make_call(grad_out, grad_lse, q, k, v, out, lse, softmax_scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first, check_cuda_tensor);
  if (mask) cuda.expose("mask", *mask);
  return run(cuda, kOp, call, q, k, v);
}

Gradients attention_backward_varlen(const Tensor& grad_out, const std::optional<Tensor>& grad_lse, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& out, const Tensor& lse, const Tensor& cu_seqlens_q, const Tensor& cu_seqlens_k, double softmax_scale,
                                    bool causal, int64_t window, double softcap, const std::optional<Tensor>& s_aux,
                                    const std::optional<Tensor>& alibi_slopes) {
  check_one_device(kVarlen, "q", q,
                   {{"grad_out", &grad_out},
                    {"grad_lse", grad_lse ? &*grad_lse : nullptr},
                    {"k", &k},
                    {"v", &v},
                    {"out", &out},
                    {"lse", &lse},
                    {"s_aux", s_aux ? &*s_aux : nullptr},
                    {"alibi_slopes", alibi_slopes ? &*alibi_slopes : nullptr}});
  const CudaCall cuda(q);
  // WHY both: the host checks the ends and sizes the grids by them, kernels look up where a sequence lies.
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor ends_q = torch::stable::to(cu_seqlens_q, cpu), ends_k = torch::stable::to(cu_seqlens_k, cpu);
  Call call =
      make_varlen_call(grad_out, grad_lse, q, k, v, out, lse, ends_q, ends_k, softmax_scale, causal, window, softcap, s_aux, alibi_slopes, check_cuda_tensor);
  const Tensor there_q = torch::stable::to(cu_seqlens_q, q.device()), there_k = torch::stable::to(cu_seqlens_k, q.device());
  call.params.cu_seqlens_q = static_cast<const int32_t*>(there_q.const_data_ptr());
  call.params.cu_seqlens_k = static_cast<const int32_t*>(there_k.const_data_ptr());
  cuda.expose("cu_seqlens_q", there_q), cuda.expose("cu_seqlens_k", there_k);
  return run(cuda, kVarlen, call, q, k, v);
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto index = sizes.find("device_index");
  const CudaParams p{params_of_sizes<Params>(kOp, sizes), nullptr, 0, 0, &device(index == sizes.end() ? 0 : static_cast<int>(index->second)), nullptr, nullptr};
  return explain_table(kOp, kImpls, p);
}

const bool registered = register_table(kOp, TAUT_CUDA_DEVICE, kImpls, explain);

}  // namespace
}  // namespace taut::attention_backward

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) {
  m.def(taut::attention_backward::kSchema);
  m.def(taut::attention_backward::kVarlenSchema);
}
#endif
TAUT_CUDA_LIBRARY(m) {
  m.impl("attention_backward", TORCH_BOX(&taut::attention_backward::attention_backward));
  m.impl("attention_backward_varlen", TORCH_BOX(&taut::attention_backward::attention_backward_varlen));
}
