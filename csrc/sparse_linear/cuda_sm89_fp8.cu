// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  w fp8_e4m3 and 2:4, x as float8 E4M3 codes (kFp8Row); bias, out fp32, bf16 or fp16.
//           Sums: on the tensor cores over 64 k (32 with groups of 32), then fp32. WHY so often: SM 89 adds with about 14 bits
// LAYOUT    w: SparseTiles (common/sparse.h), whose words become the registers of 8-bit mma.sp by a byte permutation; x: QuantizedRows (op.h), in
//           the order of sparse_x8_slot
// WORK      cuda_sparse8.cuh: warps of 32-64 n x 8-64 m, a cp.async pipeline, K split among warps and blocks for few tokens. mma.sp.m16n8k64; groups
//           of 32 take two of them, each with half of w as zeros: there is no shorter one
// BOUND     M <= 32: DRAM, 5 bits a weight where dense fp8 has 8. M large: a scale every 64 k costs 4 fp32 instructions for one mma.sp of 8192
//           multiply-adds, 8 cycles of a tensor core at the rate of int8
// LIMITS    SM 89, and 120 and newer: for 90 and 100 the compiler makes fp16 of it, which spills and gains nothing over float activations; 2:4 with or
//           without places that rows share, fp8_e4m3 weights, fp8_row activations; any N, K and group, M up to 2^23
#include "sparse_linear/cuda_sparse8.cuh"

namespace taut::sparse_linear::cuda_sm89_fp8 {
namespace {

template <class Shape, Promote kPromote>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm) sparse_fp8_kernel(const Sparse8Args p) {
#if TAUT_ARCH_AT_LEAST(89) && (!TAUT_ARCH_AT_LEAST(90) || TAUT_ARCH_AT_LEAST(120))
  mma8_block<Sparse8Block<SparseFp8Mma, Format::kFp8E4M3, Shape, kPromote>>(p);
#endif
}

template <Promote kPromote>
void run_with(const CudaParams& p) {
  run_sparse8<SparseFp8Mma, Format::kFp8E4M3, kPromote>("sparse_linear fp8", p, []<class Shape>(Shape) { return &sparse_fp8_kernel<Shape, kPromote>; });
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm < 89) return "it needs SM 89: sparse fp8 tensor cores";
  if (p.device->sm >= 90 && p.device->sm < 120) return "SM 90 and 100 have no fp8 in mma.sp; float activations are fast there";
  if (const char* why = unsupported_tiles(p)) return why;
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

}  // namespace taut::sparse_linear::cuda_sm89_fp8
