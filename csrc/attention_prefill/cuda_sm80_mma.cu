// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; fp16 or bf16, sums fp32
// LAYOUT    cuda_mma.cuh
// WORK      cuda_mma.cuh, with cp.async and mma.m16n8k16
// BOUND     cuda_mma.cuh
// LIMITS    sm_80 or newer; fp16 or bf16
#include "attention_prefill/cuda_mma.cuh"

namespace taut::attention_prefill::cuda_sm80_mma {

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs sm_80: cp.async and mma.m16n8k16";
  return p.dtype == DType::kFloat32 ? "q is float32; tensor cores take float16 and bfloat16" : nullptr;
}

int64_t workspace_bytes(const CudaParams& p) { return workspace_bytes_for<80>(p); }

void run(const CudaParams& p) {
  if (p.dtype == DType::kFloat16) run_for<80, __half>(p);
  else run_for<80, __nv_bfloat16>(p);
}

}  // namespace taut::attention_prefill::cuda_sm80_mma
