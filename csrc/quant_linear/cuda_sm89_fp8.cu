// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  w fp8_e4m3, x as float8 E4M3 codes (kFp8Row); bias, out fp32, bf16 or fp16.
//           Sums: on the tensor cores over 64 k (32 with groups of 32), then fp32. WHY so often: SM 89 and 90 add with about 14 bits
// LAYOUT    w: MmaTiles (common/formats.h), whose words are the registers of mma.m16n8k32; x: QuantizedRows (op.h), in the same order
// WORK      cuda_mma8.cuh: a 4-stage cp.async pipeline, warps of 16-64 n x 8-64 m, K split among warps and blocks for few tokens
// BOUND     M <= 32: DRAM, N*K bytes of w. M large: the fp8 tensor cores; a scale every 64 k costs 4 fp32 instructions for two mma of 4096
//           multiply-adds. SM 90 has fp8 in wgmma only: there the compiler makes each mma two of fp16, at their rate
// LIMITS    SM 89 and newer, fp8_e4m3 weights, fp8_row activations; any N, K and group, M up to 2^23
#include "quant_linear/cuda_mma8.cuh"

namespace taut::quant_linear::cuda_sm89_fp8 {
namespace {

template <class Shape, Promote kPromote>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm) fp8_kernel(const Mma8Args p) {
#if TAUT_ARCH_AT_LEAST(89)
  mma8_block<Mma8<Fp8Mma, Shape, kPromote>>(p);
#endif
}

template <Promote kPromote>
void run_with(const CudaParams& p) {
  mma8_run<float, kPromote>("quant_linear fp8", p,
                            []<class Shape>(Shape) { return std::pair{&fp8_kernel<Shape, kPromote>, Mma8Stage<Fp8Mma, Shape, kPromote>::kSharedBytes}; });
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm < 89) return "it needs SM 89: fp8 tensor cores";
  if (p.M > kMma8MaxM) return "it takes at most 2^23 rows of x";
  if (p.weight.format != Format::kFp8E4M3) return "it computes with fp8_e4m3 weights";
  return p.activations == Activations::kFp8Row ? nullptr : "it computes with fp8_row activations";
}

int64_t workspace_bytes(const CudaParams& p) {
  return p.weight.group_size == 32 ? mma8_workspace_bytes<Promote::kEvery32>(p) : mma8_workspace_bytes<Promote::kEvery64>(p);
}

void run(const CudaParams& p) {
  if (p.weight.group_size == 32) run_with<Promote::kEvery32>(p);
  else run_with<Promote::kEvery64>(p);
}

}  // namespace taut::quant_linear::cuda_sm89_fp8
