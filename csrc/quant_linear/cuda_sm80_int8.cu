// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  w int8, x as 8-bit codes (kInt8Row, kInt8); bias, out fp32, bf16 or fp16.
//           Sums: int32 over all of K where a row of w has one scale and a row of x too; else int32 over 32 or 64 k, then fp32
// LAYOUT    w: MmaTiles (common/formats.h), whose words are the registers of mma.m16n8k32; x: QuantizedRows (op.h), in the same order
// WORK      cuda_mma8.cuh: a 4-stage cp.async pipeline, warps of 16-64 n x 8-64 m, K split among warps and blocks for few tokens
// BOUND     M <= 32: DRAM, N*K bytes of w. M large: the int8 tensor cores; a scale every 64 k costs 8 fp32 instructions for two mma of 4096
//           multiply-adds, every 32 k with multiples 12 for one, which then is the bound
// LIMITS    SM 80 and newer, int8 weights, int8 activations; any N, K and group, M up to 2^23
#include "quant_linear/cuda_mma8.cuh"

namespace taut::quant_linear::cuda_sm80_int8 {
namespace {

template <class Shape, Promote kPromote>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm) int8_kernel(const Mma8Args p) {
#if TAUT_ARCH_AT_LEAST(80)
  mma8_block<Mma8<Int8Mma, Shape, kPromote>>(p);
#endif
}

// WHY the limit: 2^17 products of at most 127 * 128 just fit an int32.
Promote promote_of(const CudaParams& p) {
  if (p.activations == Activations::kInt8 || p.weight.group_size == 32) return Promote::kEvery32;
  return p.weight.group_size == 0 && p.weight.K <= 1 << 17 ? Promote::kNever : Promote::kEvery64;
}

template <class Sum, Promote kPromote>
void run_with(const CudaParams& p) {
  mma8_run<Sum, kPromote>("quant_linear int8", p,
                          []<class Shape>(Shape) { return std::pair{&int8_kernel<Shape, kPromote>, Mma8Stage<Int8Mma, Shape, kPromote>::kSharedBytes}; });
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs SM 80: int8 tensor cores of 16x8x32";
  if (p.M > kMma8MaxM) return "it takes at most 2^23 rows of x";
  if (p.weight.format != Format::kInt8) return "it computes with int8 weights";
  const bool int8 = p.activations == Activations::kInt8 || p.activations == Activations::kInt8Row;
  return int8 ? nullptr : "it computes with int8 activations";
}

int64_t workspace_bytes(const CudaParams& p) {
  switch (promote_of(p)) {
    case Promote::kNever: return mma8_workspace_bytes<Promote::kNever>(p);
    case Promote::kEvery64: return mma8_workspace_bytes<Promote::kEvery64>(p);
    default: return mma8_workspace_bytes<Promote::kEvery32>(p);
  }
}

void run(const CudaParams& p) {
  switch (promote_of(p)) {
    case Promote::kNever: return run_with<int, Promote::kNever>(p);
    case Promote::kEvery64: return run_with<float, Promote::kEvery64>(p);
    default: return run_with<float, Promote::kEvery32>(p);
  }
}

}  // namespace taut::quant_linear::cuda_sm80_int8
