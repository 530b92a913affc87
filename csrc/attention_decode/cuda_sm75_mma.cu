// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; fp16, fp8, int8 and int4 caches
// LAYOUT    cuda_mma.cuh
// WORK      cuda_mma.cuh, with two mma.m16n8k8 in place of one m16n8k16
// BOUND     cuda_mma.cuh
// LIMITS    sm_75, whose tensor cores take fp16 alone: no float32 or bf16 cache
#include "attention_decode/cuda_mma.cuh"

namespace taut::attention_decode::cuda_sm75_mma {

const char* supported(const CudaParams& p) {
  if (p.device->sm < 75 || p.device->sm >= 80) return "it is for sm_75; later ones have mma.m16n8k16";
  if (p.cache.format == KvFormat::kBFloat16) return "a bfloat16 cache; the tensor cores of sm_75 take float16";
  return why_no_mma(p);
}

int64_t workspace_bytes(const CudaParams& p) { return workspace_bytes_of(p, 8); }

void run(const CudaParams& p) {
  switch (p.cache.format) {
    case KvFormat::kFloat16: return start_mma<75, KvFormat::kFloat16>(p);
    case KvFormat::kFp8: return start_mma<75, KvFormat::kFp8>(p);
    case KvFormat::kInt8: return start_mma<75, KvFormat::kInt8>(p);
    default: return start_mma<75, KvFormat::kInt4>(p);
  }
}

}  // namespace taut::attention_decode::cuda_sm75_mma
