// attention_backward: the gradients of attention_prefill. The scores are computed anew, a tile at a time, and made weights by lse.
//
// With p_ij the weights and dp_ij = grad_out_i . v_j, a score's gradient is p_ij (dp_ij - shift_i), shift_i = grad_out_i . out_i - grad_lse_i:
// what the softmax takes off is a number a row, and lse adds its gradient times the weights.
#pragma once

#include "common/attention.h"
#include "common/cpu_features.h"
#include "common/device.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace taut::attention_backward {

constexpr const char* kSchema =
    "attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float softmax_scale, bool causal, "
    "int window, float softcap, Tensor? mask, Tensor? s_aux, Tensor? alibi_slopes, bool tokens_first) -> (Tensor, Tensor, Tensor, Tensor)";
constexpr const char* kVarlenSchema =
    "attention_backward_varlen(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, float softmax_scale, bool causal, int window, float softcap, Tensor? s_aux, Tensor? alibi_slopes) -> "
    "(Tensor, Tensor, Tensor, Tensor)";

// Past this lse has too few digits left for 2^(score - lse): where a mask adds finfo.min to all keys of a row, not even their number is in it.
constexpr float kLargestLse = 4096;

// Rows (queries of the heads of one key head, token by token) that go together; a turn counts how many blocks of keys have added to them.
constexpr int64_t kBlockRows = 64;

struct Params {
  Heads grad_out, out;              // [B,Hq,Lq,Dv]
  Heads q, k, v;                    // [B,Hq,Lq,D], [B,Hkv,Lk,D], [B,Hkv,Lk,Dv]
  Heads dq, dk, dv;                 // as q, k and v: written to
  Heads dq_sum;                     // fp32 [B,Hq,Lq,D]: dq itself where that is fp32
  const float *lse, *grad_lse;      // [B,Hq,Lq]; grad_lse may be nullptr
  float *most, *log_total, *shift;  // as lse, work space: a row's weights are 2^(score - most - log_total)
  int64_t lse_head_stride, lse_batch_stride;
  int32_t* turns;                              // [B,Hkv,blocks of rows], zeros
  DType dtype;                                 // of all that is not fp32
  int64_t B, Hq, Hkv, Lq, Lk, D, Dv;           // varlen: the most Lq and Lk of a sequence
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // varlen: [B+1], all batch strides are 0; else nullptr
  AttentionRules rules;
  int64_t num_threads;
};

namespace {

inline int64_t lse_at(const Params& p, int64_t b, int64_t h, int64_t row) { return b * p.lse_batch_stride + h * p.lse_head_stride + row; }
inline int64_t row_blocks(const Params& p) { return (p.Lq * (p.Hq / p.Hkv) + kBlockRows - 1) / kBlockRows; }

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
namespace cpu_neon {
void run(const Params&);
}

// ---- CUDA -------------------------------------------------------------------------------------------------------------

struct CudaParams : Params {  // without dq_sum and turns
  float* ds_aux;              // [Hq], or nullptr
  int64_t q_rows, k_rows;     // of memory, of a head: Lq and Lk, or all tokens of varlen
  const Device* device;
  void* stream;  // cudaStream_t
  void* workspace;
};

// Where sums of the mma kernels are not finite: a number for each `rows_per_flag` rows (queries of the heads of a key head, token by token),
// and `parts` numbers for each `keys_per_flag` keys; not 0: compute them again.
struct Flags {
  int *rows, *keys;  // [B,Hkv,row_flags], [B,Hkv,key_flags,parts]
  int row_flags, rows_per_flag;
  int key_flags, keys_per_flag, parts;
};

// Any dtype, fp32 arithmetic.
namespace cuda_sm75_simt {
void run(const CudaParams&);
// Its steps that other kernels need as well. prepare: most, log_total and shift. finish: ds_aux.
void prepare(const CudaParams&);
void repair(const CudaParams&, const Flags&);
void finish(const CudaParams&);
}  // namespace cuda_sm75_simt

// fp16 and bf16 on mma.sync.
namespace cuda_sm80_mma {
const char* supported(const CudaParams&);
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm80_mma

}  // namespace taut::attention_backward
