// quant_linear: out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias[N], w in a low-bit format (common/formats.h).
#pragma once

#include "common/cpu_features.h"
#include "common/device.h"
#include "common/dtypes.h"
#include "common/formats.h"
#include "common/parallel.h"
#include "common/sparse.h"

namespace taut::quant_linear {

constexpr const char* kSchema =
    "quant_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int format, int group_size, bool zeros, int activations) -> Tensor";
// The same matmul with what stands before and after it in a decoder layer; CPU only.
constexpr const char* kFusedSchema =
    "fused_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, int in_features, int format, int group_size, bool zeros, int activations, "
    "int prologue, Tensor? norm_weight, float norm_eps, float norm_offset, Tensor? residual) -> Tensor";

// kFloat: x enters as it is; products and sums in fp32.
// kInt8:  x is quantized inside, one scale per row per 32 k (quantize_row in cpu_scalar.cpp is the definition):
//         row_max = max|x|, group_max = max|x| over 32 k, m = clamp(ceil(group_max * 32767 / row_max), 1, 32767),
//         scale = m * row_max / (127 * 32767), q = round(x / scale) clamped to +-127.
//         A row whose max|x| is under 2^-100 counts as zeros. A row that holds a NaN or an infinity gives a row of NaN.
//         w enters as the integers its codes stand for: e2m1 doubled, nf4 as round(127 * number) / 127.
//         The integer part m is what kernels multiply in; row_max / (127 * 32767) is applied once at the end.
// kInt8Row: as kInt8, but one scale for the whole row: every m is 32767.
// kFp8Row: x is rounded to float8 E4M3 inside, one scale per row: q = e4m3(x * (448 / row_max)), nearest even, saturating;
//         scale = row_max / 448. NaN, infinities and tiny rows as above.
// kInt8Outliers: as kInt8, but of each 32 k that gain by it the largest x is clipped to the second largest (or to 2^-10 of itself, if that
//         is more) before, and what was clipped, x - clipped, is multiplied by its weights in fp32. They gain where, with m as above of the
//         largest and m' of the second largest, m^2 - m'^2 exceeds the mean of m^2 over the row. On the CPU only.
//         Not where the row's max|x| is under 2^-80.
constexpr float kSmallestRowMax = 0x1p-100f, kSmallestOutlierRowMax = 0x1p-80f, kLeastOutlierShare = 0x1p-10f;
enum class Activations : int64_t { kFloat = 0, kInt8 = 1, kInt8Row = 2, kFp8Row = 3, kInt8Outliers = 4 };

// What is wrong with these activations for weights of this format, or nullptr. `outliers`: whether int8_outliers are known here, as for
// dense weights on the CPU.
constexpr const char* refused_activations(Format format, int64_t activations, bool outliers = false) {
  if (activations == 4 && !outliers) return "activations 4 (int8_outliers) are for dense weights on the CPU";
  if (activations == 4 && format <= Format::kInt8) return nullptr;
  switch (format) {
    case Format::kInt8: return 0 <= activations && activations <= 2 ? nullptr : "int8 weights take activations 0 (float), 1 (int8) or 2 (int8_row)";
    case Format::kFp8E4M3: return activations == 0 || activations == 3 ? nullptr : "fp8_e4m3 weights take activations 0 (float) or 3 (fp8_row)";
    case Format::kFp8Block: return activations == 0 ? nullptr : "fp8_block weights take activations 0 (float)";
    case Format::kFp16:
    case Format::kBf16: return activations == 0 ? nullptr : "fp16 and bf16 weights take activations 0 (float)";
    default: return activations == 0 || activations == 1 ? nullptr : "weights of up to 4 bits take activations 0 (float) or 1 (int8)";
  }
}

// What is done to a row of x before it is multiplied, in fp32 (rows_prologue.h):
// kRmsNorm: x * rsqrt(mean(x^2) + eps) * (offset + norm_weight).  k*Glu: x is [M,2K], a gate and what it gates: unit(x[:K]) * x[K:].
enum class Prologue : int64_t { kNone = 0, kRmsNorm = 1, kSiluGlu = 2, kGeluTanhGlu = 3, kGeluGlu = 4 };
constexpr bool is_glu(Prologue prologue) { return prologue >= Prologue::kSiluGlu; }

struct Params {
  const void* x;          // [M,K], or [M,2K] for a glu; last dimension contiguous
  int64_t x_row_stride;   // elements
  const uint8_t* packed;  // Rows8
  const void* bias;       // [N] in `dtype`, or nullptr
  void* out;              // [M,N] contiguous, in `dtype`
  DType dtype;            // of x, bias and out
  int64_t M;
  WeightSpec weight;
  Activations activations;
  int64_t num_threads;
  Prologue prologue = Prologue::kNone;
  const void* norm_weight = nullptr;  // [K], kRmsNorm
  DType norm_dtype = DType::kFloat32;
  float norm_eps = 0, norm_offset = 0;
  const void* residual = nullptr;  // [M,N] in `dtype`, or nullptr; added in fp32; may be `out` itself
  SparsePattern pattern{0, 0, 0};  // m = 0: a dense weight; else `packed` is in Sparse8, for sparse_linear's kernels
  Sparse8 sparse() const { return {weight, pattern}; }
};

// The impl that the table gives for this call, sparse_linear's where the weight is sparse; throws where one is forced that cannot run it.
void (*choose(const Params&))(const Params&);
// As many threads as this matmul has work for, of those torch may use.
int64_t useful_threads(int64_t M, const WeightSpec&);

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_int8_avx2 {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_avx2
namespace cpu_int8_avxvnni {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_avxvnni
namespace cpu_int8_avx512bw {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_avx512bw
namespace cpu_int8_avx512vnni {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_avx512vnni
namespace cpu_int8_amx {
void run(const Params&);
}
namespace cpu_float_amx {
void run(const Params&);
}
namespace cpu_float_avx2 {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_float_avx2
namespace cpu_float_avx512bw {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_float_avx512bw
namespace cpu_float_avx512bf16 {
void run_tile(const Params&);
}
namespace cpu_int8_i8mm {
void run_tile(const Params&);
}
namespace cpu_int8_neondot {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_neondot
namespace cpu_int8_neon {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_neon
namespace cpu_float_neon {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_float_neon

// ---- CUDA -------------------------------------------------------------------------------------------------------------

// x quantized by quantize_rows (cuda_sm75_quantize_rows.cu), for the 8-bit activations:
//   codes     [M, K8] bytes, K8 = K padded to 64 with zeros; element k at x8_slot(k) (common/formats.h), for a sparse w at sparse_x8_slot(k)
//   row_unit  fp32 [M]: kInt8 and kInt8Row: row_max / (127 * 32767); kFp8Row: row_max / 448; NaN for a row to become NaN
//   multiple  kInt8 only: fp32 [M, K8/32], the integers m of the definition above; kInt8Row: 32767 throughout, not stored
struct QuantizedRows {
  const uint8_t* codes;
  const float* row_unit;
  const float* multiple;
};
constexpr int64_t padded_k8(int64_t K) { return (K + 63) / 64 * 64; }

struct CudaParams {
  const void* x;          // [M,K], last dimension contiguous
  int64_t x_row_stride;   // elements
  const uint8_t* packed;  // MmaTiles
  const void* bias;       // [N] in `dtype`, or nullptr
  void* out;              // [M,N] contiguous, in `dtype`
  DType dtype;            // of x, bias and out
  int64_t M;
  WeightSpec weight;
  Activations activations;
  QuantizedRows x8;  // 8-bit activations: what op_cuda.cpp had made of x; else nulls
  const Device* device;
  bool batch_invariant;  // a row's result must not depend on M
  void* stream;          // cudaStream_t
  void* workspace;       // 256-byte aligned, as many bytes as the row's workspace_bytes asked for, uninitialised
};

// M rows of p.x to codes, row_unit and multiple, by p.activations; in the order that a sparse w wants, or a dense one.
namespace cuda_sm75_quantize_rows {
void run(const CudaParams& p, bool for_sparse, uint8_t* codes, float* row_unit, float* multiple);
}
// Any dtype, format and activations, fp32 arithmetic: the correct slower path.
namespace cuda_sm75_simt {
void run(const CudaParams&);
}
// 16-bit x, tensor cores, w dequantized in registers.
namespace cuda_sm75_mma {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm75_mma
namespace cuda_sm80_mma {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm80_mma
// 8-bit x and 8-bit w on tensor cores.
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
// 16-bit x, large M: TMA and wgmma, w dequantized in registers.
namespace cuda_sm90a_wgmma {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm90a_wgmma

}  // namespace taut::quant_linear
