// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; bf16, fp16, fp8, int8 and int4 caches
// LAYOUT    cuda_mma.cuh
// WORK      cuda_mma.cuh, with mma.m16n8k16
// BOUND     cuda_mma.cuh
// LIMITS    sm_80 or newer; no float32 cache; beside a bf16 one q is not float32, and there are no channels
#include "attention_decode/cuda_mma.cuh"

namespace taut::attention_decode::cuda_sm80_mma {

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs sm_80: mma.m16n8k16";
  if (p.cache.format == KvFormat::kBFloat16 && (p.dtype == DType::kFloat32 || p.cache.channels))
    return "beside a bfloat16 cache q is multiplied as two bfloat16, too little for a float32 q or for channels";
  return why_no_mma(p);
}

int64_t workspace_bytes(const CudaParams& p) { return workspace_bytes_of(p, 8); }

void run(const CudaParams& p) {
  switch (p.cache.format) {
    case KvFormat::kBFloat16: return start_mma<80, KvFormat::kBFloat16>(p);
    case KvFormat::kFloat16: return start_mma<80, KvFormat::kFloat16>(p);
    case KvFormat::kFp8: return start_mma<80, KvFormat::kFp8>(p);
    case KvFormat::kInt8: return start_mma<80, KvFormat::kInt8>(p);
    default: return start_mma<80, KvFormat::kInt4>(p);
  }
}

}  // namespace taut::attention_decode::cuda_sm80_mma
