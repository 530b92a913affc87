// decoder_layers: a whole stack of decoder layers for a few new tokens, in one call; keys and values go straight to the caches.
#pragma once

#include "quant_linear/op.h"

namespace taut::decoder_layers {

constexpr int64_t kMostTokens = 16;  // new ones a sequence; more of them are a prompt, for which there are better ways
// Keys are attended to in chunks of so many rows of the buffer. Fixed, so that no result depends on the number of threads.
constexpr int64_t kChunk = 256;

struct Norm {
  const void* weight = nullptr;  // nullptr: there is none
  DType dtype = DType::kFloat32;
};

struct Linear {
  const uint8_t* packed = nullptr;  // Rows8, or Sparse8
  const void* bias = nullptr;       // in `dtype`, or nullptr
  WeightSpec weight{};
  SparsePattern pattern{0, 0, 0};  // m = 0: dense
  quant_linear::Activations activations{};
  void (*run)(const quant_linear::Params&) = nullptr;
  int64_t num_threads = 1;
};

struct Layer {
  Norm attn_norm, q_norm, k_norm, attn_post_norm, mlp_norm, mlp_post_norm;
  Linear qkv, o, gate_up, down;
  const void *cos, *sin;  // [B or 1,T,R]
  DType rope_dtype;
  int64_t rotated;                                                                   // R
  bool shared_rope;                                                                  // one batch entry for all
  void *keys, *values;                                                               // [B,Hkv,capacity,D]
  int64_t key_batch_stride, key_head_stride, value_batch_stride, value_head_stride;  // elements; rows are D apart
  DType cache_dtype;
  int64_t begin, length;  // rows [begin, length) hold the past; the new ones are written from `length` on
  int64_t window;         // 0: none; else a token sees itself and window - 1 before it
};

struct Params {
  const Layer* layers;
  int64_t num_layers;
  DType dtype;
  int64_t B, T, q_heads, kv_heads, head_dim, hidden, intermediate;
  quant_linear::Prologue glu;
  const uint8_t* mask;  // [B,mask_columns], 0: a key that no query sees; or nullptr. The last column is the last new token's.
  int64_t mask_columns;
  float norm_eps, norm_offset, attn_scale, attn_softcap, qk_norm_eps, residual_multiplier;
  void* x;  // [B,T,hidden], in and out
  // Temporaries, in `dtype`:
  void* qkv;        // [B,T,(Hq + 2 Hkv) D]
  void* attended;   // [B,T,Hq D]
  void* gate_up;    // [B,T,2 intermediate]
  void* sublayer;   // [B,T,hidden]
  float* partials;  // most_chunks * B * Hkv pieces of partial_elems() floats
  int64_t most_chunks;
  int32_t* finished;  // [B,Hkv], zeros
  int64_t num_threads;

  int64_t queries() const { return T * (q_heads / kv_heads); }  // rows of q that share keys: [T][Hq / Hkv]
  int64_t partial_elems() const { return queries() * (head_dim + 2); }
};

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

}  // namespace taut::decoder_layers
