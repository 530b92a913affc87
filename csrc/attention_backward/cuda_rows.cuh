// What the CUDA kernels share: their arguments.
#pragma once

#include <algorithm>

#include "attention_backward/op.h"
#include "common/attention_rows.cuh"

namespace taut::attention_backward {
namespace {

struct Args {
  Heads grad_out, out, q, k, v, dq, dk, dv;
  const float *lse, *grad_lse;
  float *most, *log_total, *shift, *ds_aux;
  int64_t lse_head_stride, lse_batch_stride;
  AttentionRules rules;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // on the device, or nullptr
  DType dtype;
  int batch, kv_heads, group, Lq, Lk, D, Dv;
  uint32_t group_inverse;  // 2^31 / group, rounded up
  int blocks;              // mma: of a key head
  Flags flags;             // mma: written; repair: read
};

inline Args args_of(const CudaParams& p) {
  Args args{};
  args.grad_out = p.grad_out, args.out = p.out, args.q = p.q, args.k = p.k, args.v = p.v, args.dq = p.dq, args.dk = p.dk, args.dv = p.dv;
  args.lse = p.lse, args.grad_lse = p.grad_lse;
  args.most = p.most, args.log_total = p.log_total, args.shift = p.shift, args.ds_aux = p.ds_aux;
  args.lse_head_stride = p.lse_head_stride, args.lse_batch_stride = p.lse_batch_stride;
  args.rules = p.rules;
  args.rules.window = std::min(p.rules.window, p.Lq + p.Lk);  // WHY: sums with it must not overflow
  args.cu_seqlens_q = p.cu_seqlens_q, args.cu_seqlens_k = p.cu_seqlens_k;
  args.dtype = p.dtype;
  args.batch = static_cast<int>(p.B), args.kv_heads = static_cast<int>(p.Hkv), args.group = static_cast<int>(p.Hq / p.Hkv);
  args.group_inverse = static_cast<uint32_t>(((int64_t{1} << 31) + args.group - 1) / args.group);
  args.Lq = static_cast<int>(p.Lq), args.Lk = static_cast<int>(p.Lk), args.D = static_cast<int>(p.D), args.Dv = static_cast<int>(p.Dv);
  return args;
}

}  // namespace
}  // namespace taut::attention_backward
