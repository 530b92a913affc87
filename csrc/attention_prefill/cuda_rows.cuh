// What the CUDA kernels share: which rows a block has, who sees whom, what is done to a score.
//
// A row is one query of one head. The heads that share a key head are rows of one block, token by token (row = token * group +
// head), so that k and v are read once for all of them.
#pragma once

#include <algorithm>

#include "attention_prefill/op.h"
#include "common/attention.cuh"

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

// A block's part of the work.
struct Block {
  int b, kv_head, first_row, rows;  // rows: that its sequence and key head have
  int Lq, Lk;
  int64_t first_q, first_k;  // varlen: rows of memory before the sequence

  // The longest (of causal attention) first: they end at different times.
  TAUT_DEVICE static Block mine(const Args& args, int rows_per_block) {
    const int heads = args.batch * args.kv_heads, turn = static_cast<int>(blockIdx.x);
    Block block{turn % heads / args.kv_heads, turn % args.kv_heads, (args.blocks - 1 - turn / heads) * rows_per_block, 0, args.Lq, args.Lk, 0, 0};
    if (args.cu_seqlens_q) {
      block.first_q = args.cu_seqlens_q[block.b], block.first_k = args.cu_seqlens_k[block.b];
      block.Lq = static_cast<int>(args.cu_seqlens_q[block.b + 1] - block.first_q), block.Lk = static_cast<int>(args.cu_seqlens_k[block.b + 1] - block.first_k);
    }
    block.rows = block.Lq * args.group;
    return block;
  }
  // The position of a row among the keys; that of the last row past the end.
  TAUT_DEVICE int position(const Args& args, int row) const { return min(row, rows - 1) / args.group + Lk - Lq; }

  // Where a row of q or out begins.
  TAUT_DEVICE int64_t query_at(const Args& args, const Heads& heads, int row) const {
    return b * heads.batch_stride + (kv_head * args.group + row % args.group) * heads.head_stride + (first_q + row / args.group) * heads.row_stride;
  }
  // Where the first key begins, in k or v.
  TAUT_DEVICE int64_t keys_at(const Heads& heads) const { return b * heads.batch_stride + kv_head * heads.head_stride + first_k * heads.row_stride; }
  TAUT_DEVICE float* lse_at(const Args& args, int row) const {
    return args.lse + b * args.lse_batch_stride + (kv_head * args.group + row % args.group) * args.lse_head_stride + first_q + row / args.group;
  }
};

// The keys [first, end) that causality and the window leave to rows, the first and the last of which have these positions.
struct KeyRange {
  int first, end;        // of any of them
  int all_from, all_to;  // of each of them
  TAUT_DEVICE KeyRange(const AttentionRules& rules, int early, int late, int Lk)
      : first(static_cast<int>(first_key(rules, early))), end(static_cast<int>(end_key(rules, late, Lk))), all_from(static_cast<int>(first_key(rules, late))),
        all_to(static_cast<int>(end_key(rules, early, Lk))) {}
};

TAUT_DEVICE RowRules rules_of_row(const Args& args, const Block& block, int row) {
  row = min(row, block.rows - 1);
  const int head = block.kv_head * args.group + row % args.group, query = row / args.group;
  const AttentionMask& mask = args.rules.mask;
  return {block.b * mask.batch_stride + head * mask.head_stride + query * mask.query_stride, query + block.Lk - block.Lq,
          args.rules.alibi_slopes ? args.rules.alibi_slopes[head] * kLog2E : 0.0f};
}

// A row's maximum before any key, as an exponent of 2: its sink's, if it has one.
TAUT_DEVICE float sink_of(const Args& args, const Block& block, int row) {
  if (!args.rules.s_aux) return kLowest;
  const float sink = args.rules.s_aux[block.kv_head * args.group + min(row, block.rows - 1) % args.group] * kLog2E;
  return sink > kLowest ? sink : kLowest;
}

}  // namespace
}  // namespace taut::attention_prefill
