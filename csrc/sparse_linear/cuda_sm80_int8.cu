// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  w int8 or int4 and 2:4, x as 8-bit codes (kInt8Row, kInt8); bias, out fp32, bf16 or fp16.
//           Sums: int32 over all of K where a row of w has one scale and a row of x too; else int32 over 32 or 64 k, then fp32. For int8 the bits
//           are those of quant_linear's cuda_sm80.int8
// LAYOUT    w: SparseTiles (common/sparse.h), whose words become the registers of 8-bit mma.sp by a byte permutation; x: QuantizedRows (op.h), in
//           the order of sparse_x8_slot
// WORK      cuda_sparse8.cuh: warps of 32-64 n x 8-64 m, a cp.async pipeline, K split among warps and blocks for few tokens. mma.sp.m16n8k64, or
//           m16n8k32 where every 32 k have a scale of their own
// BOUND     M <= 32: DRAM. A tile of 64 n x 128 k is 4 KB of int8 and 1 KB of places: 5 bits a weight where dense int8 has 8, at best 1.6 times faster;
//           int4 3, for which quant_linear has float kernels alone. H200, 18 B a cycle an SM: the 1280 B of 32 n x 64 k every 71 cycles, in which 4
//           schedulers issue 284 instructions; nvcc makes 110 of it at M = 8, and 244 where every 32 k have a scale.
//           M large, one scale a row: the tensor cores at twice the dense rate. A warp's 64 n x 64 m x 64 k are 32 mma.sp of 8 cycles on sm_80, 256
//           cycles: 117 instructions, and 6.5 KB of shared memory, with those of 3 warps beside it 104 of the 128 B that come in a cycle. A scale
//           every 64 k: 8 fp32 instructions for an mma.sp, as many cycles as it takes, half as fast; every 32 k with multiples: 12 for half of one,
//           which are the bound for dense weights as well. No GPU has run it yet
// LIMITS    SM 80 and newer, 2:4 with or without places that rows share, int8 and int4 weights, int8 activations; any N, K and group, M up to 2^23
#include "sparse_linear/cuda_sparse8.cuh"

namespace taut::sparse_linear::cuda_sm80_int8 {
namespace {

template <Format kFormat, class Shape, Promote kPromote>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocksPerSm) sparse_int8_kernel(const Sparse8Args p) {
#if TAUT_ARCH_AT_LEAST(80)
  mma8_block<Sparse8Block<SparseInt8Mma, kFormat, Shape, kPromote>>(p);
#endif
}

template <Format kFormat, Promote kPromote>
void run_with(const CudaParams& p) {
  run_sparse8<SparseInt8Mma, kFormat, kPromote>("sparse_linear int8", p, []<class Shape>(Shape) { return &sparse_int8_kernel<kFormat, Shape, kPromote>; });
}

// WHY the limit: 2^17 products of at most 127 * 128 just fit an int32. The dense kernel's limit, though half of them are zero: its plan is ours.
Promote promote_of(const CudaParams& p) {
  if (p.activations == Activations::kInt8 || p.weight.group_size == 32) return Promote::kEvery32;
  return p.weight.group_size == 0 && p.weight.K <= 1 << 17 ? Promote::kNever : Promote::kEvery64;
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs SM 80: sparse tensor cores";
  if (const char* why = unsupported_tiles(p)) return why;
  if (p.weight.format != Format::kInt8 && p.weight.format != Format::kInt4) return "it computes with int8 and int4 weights";
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
  if (p.weight.format == Format::kInt4) return run_with<Format::kInt4, Promote::kEvery32>(p);  // it takes one scale for 32 k of x alone
  switch (promote_of(p)) {
    case Promote::kNever: return run_with<Format::kInt8, Promote::kNever>(p);
    case Promote::kEvery64: return run_with<Format::kInt8, Promote::kEvery64>(p);
    default: return run_with<Format::kInt8, Promote::kEvery32>(p);
  }
}

}  // namespace taut::sparse_linear::cuda_sm80_int8
