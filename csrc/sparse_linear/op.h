// sparse_linear: out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias[N], w with few nonzeros (common/sparse.h).
#pragma once

#include "common/sparse.h"
#include "quant_linear/op.h"

namespace taut::sparse_linear {

constexpr const char* kSchema =
    "sparse_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int format, int group_size, int n, int m, int v, int activations) -> Tensor";

using quant_linear::Params;  // `packed` in Sparse8; prologues and residuals too
// The impl that the table gives for this call; throws where one is forced that cannot run it.
void (*choose(const Params&))(const Params&);

namespace cpu_scalar {
void run(const Params&);
}
// Makes some rows of w dense, has quant_linear multiply with them, and goes on to the next.
namespace cpu_dense {
void run(const Params&);
using ExpandStrip = void (*)(const Sparse8& w, const uint8_t* strip, uint8_t* out);  // of Sparse8, to one of Rows8
void run_with(const Params&, ExpandStrip);
}  // namespace cpu_dense
namespace cpu_avx2 {
void run_rows(const Params&);           // v = 1
void run_vectors_small(const Params&);  // v = 16
void run_vectors(const Params&);        // v = 16
void run_tile(const Params&);
void run_dense(const Params&);
}  // namespace cpu_avx2
namespace cpu_avx512vnni {
void run_rows(const Params&);
void run_vectors_small(const Params&);
void run_vectors(const Params&);
void run_tile(const Params&);
}  // namespace cpu_avx512vnni
namespace cpu_avxvnni {
void run_tile(const Params&);
}
namespace cpu_avx512bw {
void run_tile(const Params&);
}

// Of 16-bit numbers.
namespace cpu_float_avx2 {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_float_avx2
namespace cpu_float_avx512bw {
void run_small(const Params&);  // not v = 8
void run_tile(const Params&);
}  // namespace cpu_float_avx512bw
// bf16 x and weights
namespace cpu_float_avx512bf16 {
void run_tile(const Params&);
}

// ---- CUDA -------------------------------------------------------------------------------------------------------------

// As quant_linear's; `packed` is in SparseTiles, `weight` the dense weight.
struct CudaParams : quant_linear::CudaParams {
  SparsePattern pattern;
  SparseTiles sparse() const { return {weight, pattern}; }
};

// Any pattern, dtype and activations, fp32 arithmetic: few rows of x, and what the others cannot do.
namespace cuda_sm75_simt {
void run(const CudaParams&);
}
// 16-bit x, 2:4, sparse tensor cores, w dequantized in registers.
namespace cuda_sm80_mma {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm80_mma
// 8-bit x, 2:4, sparse tensor cores.
namespace cuda_sm80_int8 {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm80_int8
namespace cuda_sm89_fp8 {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm89_fp8

}  // namespace taut::sparse_linear
