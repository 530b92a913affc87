// attention_prefill: softmax(q k^T) v for many queries, the scores never in memory; common/attention.h says what is done to a score.
#pragma once

#include "common/attention.h"
#include "common/cpu_features.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace taut::attention_prefill {

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

}  // namespace taut::attention_prefill
