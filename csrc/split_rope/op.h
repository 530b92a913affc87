// split_rope: a fused q, k, v projection to heads; q and k normed by head (optional) and given their rotary position.
#pragma once

#include "common/cpu_features.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace taut::split_rope {

struct Params {
  const void* qkv;              // [B,T,(Hq + 2 Hkv) D] contiguous
  const void *cos, *sin;        // [B or 1,T,R] contiguous, R even, R <= D
  const void *q_norm, *k_norm;  // [D] or nullptr
  void *q, *k, *v;              // [B,Hq,T,D], [B,Hkv,T,D], [B,Hkv,T,D] contiguous
  DType dtype;                  // of qkv, q, k and v
  DType rope_dtype;             // of cos and sin
  DType q_norm_dtype, k_norm_dtype;
  int64_t B, T, q_heads, kv_heads, head_dim, rotated;
  bool shared_rope;  // cos and sin have one batch entry for all
  float norm_eps, norm_offset;
  int64_t num_threads;
};

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_avx2 {
void run(const Params&);
}
namespace cpu_neon {
void run(const Params&);
}

}  // namespace taut::split_rope
