// What the CUDA kernels share: their arguments, and how many blocks they are.
#pragma once

#include <algorithm>

#include "attention_prefill/op.h"
#include "common/attention_rows.cuh"

namespace taut::attention_prefill {
namespace {

struct Args {
  Heads q, k, v, out;
  float* lse;
  int64_t lse_head_stride, lse_batch_stride;
  AttentionRules rules;
  const int32_t *cu_seqlens_q, *cu_seqlens_k;  // varlen, on the device; else nullptr
  DType dtype;
  int batch, kv_heads, group, Lq, Lk, D, Dv;
  int blocks;  // of a key head
  // Rows whose sums are not finite, see cuda_sm75_simt::repair: written by the mma kernels, read by the SIMT kernel; or nullptr.
  int* flags;
  int flags_per_head, rows_per_flag;
};

inline Args args_of(const CudaParams& p) {
  Args args{};
  args.q = p.q, args.k = p.k, args.v = p.v, args.out = p.out;
  args.lse = p.lse, args.lse_head_stride = p.lse_head_stride, args.lse_batch_stride = p.lse_batch_stride;
  args.rules = p.rules;
  args.rules.window = std::min(p.rules.window, p.Lq + p.Lk);  // WHY: sums with it must not overflow
  args.cu_seqlens_q = p.cu_seqlens_q, args.cu_seqlens_k = p.cu_seqlens_k;
  args.dtype = p.dtype;
  args.batch = static_cast<int>(p.B), args.kv_heads = static_cast<int>(p.Hkv), args.group = static_cast<int>(p.Hq / p.Hkv);
  args.Lq = static_cast<int>(p.Lq), args.Lk = static_cast<int>(p.Lk), args.D = static_cast<int>(p.D), args.Dv = static_cast<int>(p.Dv);
  return args;
}

// One launch: as many blocks as it takes at `rows` each.
inline dim3 grid_of(Args& args, int rows) {
  args.blocks = (args.Lq * args.group + rows - 1) / rows;
  return dim3(static_cast<unsigned>(int64_t{args.batch} * args.kv_heads * args.blocks));
}

// A row's maximum before any key, as an exponent of 2: its sink's, if it has one.
TAUT_DEVICE float sink_of(const Args& args, const Block& block, int row) {
  if (!args.rules.s_aux) return kLowest;
  const float sink = args.rules.s_aux[block.kv_head * args.group + min(row, block.rows - 1) % args.group] * kLog2E;
  return sink > kLowest ? sink : kLowest;
}

}  // namespace
}  // namespace taut::attention_prefill
