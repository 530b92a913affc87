// Which rows a block has, and who sees whom, in the CUDA kernels of attention over many queries.
//
// A row is one query of one head. The heads that share a key head are rows of one block, token by token (row = token * group +
// head), so that k and v are read once for all of them. Args: what an op's kernels are given.
#pragma once

#include "common/attention.cuh"

namespace taut {
namespace {

// A block's part of the work.
struct Block {
  int b, kv_head, first_row, rows;  // rows: that its sequence and key head have
  int Lq, Lk;
  int64_t first_q, first_k;  // varlen: rows of memory before the sequence

  template <class Args>
  TAUT_DEVICE static Block of(const Args& args, int b, int kv_head, int first_row) {
    Block block{b, kv_head, first_row, 0, args.Lq, args.Lk, 0, 0};
    if (args.cu_seqlens_q) {
      block.first_q = args.cu_seqlens_q[b], block.first_k = args.cu_seqlens_k[b];
      block.Lq = static_cast<int>(args.cu_seqlens_q[b + 1] - block.first_q), block.Lk = static_cast<int>(args.cu_seqlens_k[b + 1] - block.first_k);
    }
    block.rows = block.Lq * args.group;
    return block;
  }
  // The longest (of causal attention) first: they end at different times.
  template <class Args>
  TAUT_DEVICE static Block mine(const Args& args, int rows_per_block) {
    const int heads = args.batch * args.kv_heads, turn = static_cast<int>(blockIdx.x);
    return of(args, turn % heads / args.kv_heads, turn % args.kv_heads, (args.blocks - 1 - turn / heads) * rows_per_block);
  }
  // The position of a row among the keys; that of the last row past the end.
  template <class Args>
  TAUT_DEVICE int position(const Args& args, int row) const {
    return min(row, rows - 1) / args.group + Lk - Lq;
  }

  // Where a row of q or out begins.
  template <class Args>
  TAUT_DEVICE int64_t query_at(const Args& args, const Heads& heads, int row) const {
    return b * heads.batch_stride + (kv_head * args.group + row % args.group) * heads.head_stride + (first_q + row / args.group) * heads.row_stride;
  }
  // Where the first key begins, in k or v.
  TAUT_DEVICE int64_t keys_at(const Heads& heads) const { return b * heads.batch_stride + kv_head * heads.head_stride + first_k * heads.row_stride; }
  // Where a row's number is in lse, and in what lies as lse does.
  template <class Args>
  TAUT_DEVICE int64_t lse_at(const Args& args, int row) const {
    return b * args.lse_batch_stride + (kv_head * args.group + row % args.group) * args.lse_head_stride + first_q + row / args.group;
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

template <class Args>
TAUT_DEVICE RowRules rules_of_row(const Args& args, const Block& block, int row) {
  row = min(row, block.rows - 1);
  const int head = block.kv_head * args.group + row % args.group, query = row / args.group;
  const AttentionMask& mask = args.rules.mask;
  return {block.b * mask.batch_stride + head * mask.head_stride + query * mask.query_stride, query + block.Lk - block.Lq,
          args.rules.alibi_slopes ? args.rules.alibi_slopes[head] * kLog2E : 0.0f};
}

}  // namespace
}  // namespace taut
