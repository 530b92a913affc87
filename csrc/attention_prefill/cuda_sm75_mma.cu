// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; fp16, sums fp32
// LAYOUT    cuda_mma.cuh
// WORK      cuda_mma.cuh, with two mma.m16n8k8 for each m16n8k16, and stages filled through registers
// BOUND     cuda_mma.cuh
// LIMITS    sm_75 (newer devices run cuda_sm80_mma); fp16 (Turing's tensor cores know no bf16)
#include "attention_prefill/cuda_mma.cuh"

namespace taut::attention_prefill::cuda_sm75_mma {

const char* supported(const CudaParams& p) {
  if (p.device->sm >= 80) return "it is for sm_75; this device has cp.async and mma.m16n8k16";
  return p.dtype == DType::kFloat16 ? nullptr : "tensor cores of sm_75 take float16 only";
}

int64_t workspace_bytes(const CudaParams& p) { return workspace_bytes_for<75>(p); }

void run(const CudaParams& p) { run_for<75, __half>(p); }

}  // namespace taut::attention_prefill::cuda_sm75_mma
