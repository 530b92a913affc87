// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp16 or bf16; w int4, int8, fp8_e4m3; sums fp32
// LAYOUT    MmaTiles (common/formats.h)
// WORK      cuda_mma.cuh, with cp.async and mma.m16n8k16
// BOUND     cuda_mma.cuh
// LIMITS    sm_80 or newer; float activations in fp16 or bf16
#include "quant_linear/cuda_mma.cuh"

namespace taut::quant_linear::cuda_sm80_mma {

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs sm_80: cp.async and mma.m16n8k16";
  if (p.activations != Activations::kFloat) return "it computes with float activations";
  if (p.dtype == DType::kFloat32) return "x is float32; tensor cores take float16 and bfloat16";
  return nullptr;
}

int64_t workspace_bytes(const CudaParams& p) {
  switch (p.weight.format) {
    case Format::kInt4: return workspace_bytes_for<80, Format::kInt4>(p);
    case Format::kInt8: return workspace_bytes_for<80, Format::kInt8>(p);
    case Format::kFp8E4M3: return workspace_bytes_for<80, Format::kFp8E4M3>(p);
    default: break;  // op_cuda.cpp refuses what no CUDA kernel takes
  }
  return 0;
}

namespace {
template <class T>
void run_dtype(const CudaParams& p) {
  switch (p.weight.format) {
    case Format::kInt4: return run_for<80, T, Format::kInt4>(p);
    case Format::kInt8: return run_for<80, T, Format::kInt8>(p);
    case Format::kFp8E4M3: return run_for<80, T, Format::kFp8E4M3>(p);
    default: break;  // op_cuda.cpp refuses what no CUDA kernel takes
  }
}
}  // namespace

void run(const CudaParams& p) {
  if (p.dtype == DType::kFloat16) run_dtype<__half>(p);
  else run_dtype<__nv_bfloat16>(p);
}

}  // namespace taut::quant_linear::cuda_sm80_mma
