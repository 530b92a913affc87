// The split itself, for every ISA: each kernel file compiles its own copy with its own flags.
#pragma once

#include "common/rope_math.h"
#include "split_rope/op.h"

namespace taut::split_rope {
namespace {

inline void split(const Params& p) {
  const int64_t D = p.head_dim, tokens = p.B * p.T, num_tasks = std::min(p.num_threads, tokens), all = p.q_heads + 2 * p.kv_heads;
  parallel_tasks(num_tasks, [&](int64_t task) {
    float* row = reinterpret_cast<float*>(scratch(1, D * sizeof(float)));
    for (int64_t token = tokens * task / num_tasks; token < tokens * (task + 1) / num_tasks; token++) {
      const int64_t b = token / p.T, t = token % p.T, rope = (p.shared_rope ? t : token) * p.rotated;
      for (int64_t head = 0; head < all; head++) {
        const int64_t from = (token * all + head) * D;
        if (head < p.q_heads) {
          load_head(p.qkv, from, p.dtype, D, p.q_norm, p.q_norm_dtype, p.norm_eps, p.norm_offset, row);
          rotate_row(row, p.cos, p.sin, rope, p.rope_dtype, p.rotated);
          store_floats(row, D, p.q, ((b * p.q_heads + head) * p.T + t) * D, p.dtype);
        } else {
          const bool is_key = head < p.q_heads + p.kv_heads;
          const int64_t kv_head = (head - p.q_heads) % p.kv_heads, to = ((b * p.kv_heads + kv_head) * p.T + t) * D;
          load_head(p.qkv, from, p.dtype, D, is_key ? p.k_norm : nullptr, p.k_norm_dtype, p.norm_eps, p.norm_offset, row);
          if (is_key) rotate_row(row, p.cos, p.sin, rope, p.rope_dtype, p.rotated);
          store_floats(row, D, is_key ? p.k : p.v, to, p.dtype);
        }
      }
    }
  });
}

}  // namespace
}  // namespace taut::split_rope
