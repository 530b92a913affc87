// attention_prefill: softmax(q k^T) v for many queries, the scores never in memory; common/attention.h says what is done to a score.
#pragma once

#include "common/attention.h"
#include "common/cpu_features.h"
#include "common/device.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace taut::attention_prefill {

constexpr const char* kSchema =
    "attention_prefill(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal, int window, float softcap, Tensor? mask, Tensor? s_aux, "
    "Tensor? alibi_slopes, bool tokens_first) -> (Tensor, Tensor)";
constexpr const char* kVarlenSchema =
    "attention_prefill_varlen(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool causal, int window, "
    "float softcap, Tensor? s_aux, Tensor? alibi_slopes) -> (Tensor, Tensor)";

struct Params {
  Heads q;     // [B,Hq,Lq,D]
  Heads k;     // [B,Hkv,Lk,D]
  Heads v;     // [B,Hkv,Lk,Dv]
  Heads out;   // [B,Hq,Lq,Dv]: written to
  float* lse;  // [B,Hq,Lq]
  int64_t lse_head_stride, lse_batch_stride;
  DType dtype;                                 // of q, k, v and out
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv;           // varlen: the most Lq and Lk of a sequence
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // varlen: [B+1], all batch strides are 0; else nullptr
  AttentionRules rules;
  int64_t num_threads;
};

namespace {

inline float* lse_of(const Params& p, int64_t b, int64_t h, int64_t row) { return p.lse + b * p.lse_batch_stride + h * p.lse_head_stride + row; }

}  // namespace

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_avx2 {
void run(const Params&);
}
namespace cpu_avx512bw {
void run(const Params&);
}
// bf16 q, k and v
namespace cpu_avx512bf16 {
void run(const Params&);
}
namespace cpu_neon {
void run(const Params&);
}

// ---- CUDA -------------------------------------------------------------------------------------------------------------

struct CudaParams : Params {
  int64_t q_rows, k_rows;  // in memory, of a head: Lq and Lk; varlen: of all sequences together
  const Device* device;
  void* stream;     // cudaStream_t
  void* workspace;  // 256-byte aligned, as many bytes as the row's workspace_bytes asked for, uninitialised
};

// Any dtype, fp32 arithmetic: the correct slower path.
namespace cuda_sm75_simt {
void run(const CudaParams&);
// Computes anew the rows of which a flag is not 0. flags[B,Hkv,flags_per_head]: one for each `rows_per_flag` rows, which are the
// queries of the heads that share a key head, token by token.
void repair(const CudaParams&, const int* flags, int flags_per_head, int rows_per_flag);
}  // namespace cuda_sm75_simt
// 16-bit q, k and v on tensor cores.
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
// The same on Hopper's own tensor-core instructions.
namespace cuda_sm90a_wgmma {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm90a_wgmma

}  // namespace taut::attention_prefill
