// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp16; w int4, int8, fp8_e4m3; sums fp32
// LAYOUT    MmaTiles (common/formats.h)
// WORK      cuda_mma.cuh, with two mma.m16n8k8 for each m16n8k16, and two stages filled through registers
// BOUND     cuda_mma.cuh; 64 KB of shared memory a block
// LIMITS    sm_75 (newer devices run cuda_sm80_mma); float activations in fp16 (Turing's tensor cores know no bf16)
#include "quant_linear/cuda_mma.cuh"

namespace taut::quant_linear::cuda_sm75_mma {

const char* supported(const CudaParams& p) {
  if (p.device->sm >= 80) return "it is for sm_75; this device has cp.async and mma.m16n8k16";
  if (p.activations != Activations::kFloat) return "it computes with float activations";
  if (p.dtype != DType::kFloat16) return "tensor cores of sm_75 take float16 only";
  return nullptr;
}

int64_t workspace_bytes(const CudaParams& p) {
  switch (p.weight.format) {
    case Format::kInt4: return workspace_bytes_for<75, Format::kInt4>(p);
    case Format::kInt8: return workspace_bytes_for<75, Format::kInt8>(p);
    case Format::kFp8E4M3: return workspace_bytes_for<75, Format::kFp8E4M3>(p);
    default: break;  // op_cuda.cpp refuses what no CUDA kernel takes
  }
  return 0;
}

void run(const CudaParams& p) {
  switch (p.weight.format) {
    case Format::kInt4: return run_for<75, __half, Format::kInt4>(p);
    case Format::kInt8: return run_for<75, __half, Format::kInt8>(p);
    case Format::kFp8E4M3: return run_for<75, __half, Format::kFp8E4M3>(p);
    default: break;  // op_cuda.cpp refuses what no CUDA kernel takes
  }
}

}  // namespace taut::quant_linear::cuda_sm75_mma
