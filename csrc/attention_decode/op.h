// attention_decode: softmax(q k^T) v for a few queries against a key-value cache; common/attention.h says what is done to a score,
// common/kv_cache.h how the cache lies in memory.
#pragma once

#include "common/attention.h"
#include "common/cpu_features.h"
#include "common/device.h"
#include "common/kv_cache.h"
#include "common/parallel.h"

namespace taut::attention_decode {

constexpr const char* kSchema =
    "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor? channels, Tensor? block_table, int kv_format, "
    "int value_dim, int keys, Tensor? lengths, float softmax_scale, bool causal, int window, float softcap, Tensor? mask, Tensor? s_aux, "
    "Tensor? alibi_slopes, bool tokens_first) -> (Tensor, Tensor)";

// Keys are attended to in chunks of so many, counted from the first of the cache. Fixed, so that no result depends on the number of
// threads or on the rest of the batch.
constexpr int64_t kChunk = 512;

struct Params {
  Heads q;  // [B,Hq,Lq,D]
  KvCache cache;
  Heads out;    // [B,Hq,Lq,Dv]: written to
  float* lse;   // [B,Hq,Lq] contiguous
  DType dtype;  // of q and out
  int64_t B, Hq, Hkv, Lq, D, Dv;
  int64_t keys;            // how many of the cache count
  const int32_t* lengths;  // [B], each at most `keys`; nullptr: `keys` for all
  AttentionRules rules;
  float* partials;    // [B * Hkv * row_blocks() * chunks()][partial_floats()]
  int32_t* finished;  // [B * Hkv * row_blocks()], zeros: how many of its chunks are done
  int64_t num_threads;

  // Rows are the queries of the heads that share a key head, token by token, up to kMostRows of them in a block.
  static constexpr int64_t kMostRows = 16;
  int64_t rows() const { return Lq * (Hq / Hkv); }
  int64_t row_blocks() const { return (rows() + kMostRows - 1) / kMostRows; }
  int64_t chunks() const { return (keys + kChunk - 1) / kChunk; }
  // Of a chunk: sums [rows][Dv], then maximum and total of each row.
  int64_t partial_floats() const { return kMostRows * (Dv + 2); }
  int64_t length(int64_t b) const { return lengths ? lengths[b] : keys; }
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
namespace cpu_avx512vnni {
void run(const Params&);
}
namespace cpu_neon {
void run(const Params&);
}
namespace cpu_neondot {
void run(const Params&);
}

// ---- CUDA -------------------------------------------------------------------------------------------------------------

struct CudaParams : Params {
  int64_t pages;  // of the cache. What `lengths` and the block table say is known on the device alone
  const Device* device;
  void* stream;     // cudaStream_t
  void* workspace;  // 256-byte aligned, as many bytes as the row's workspace_bytes asked for, uninitialised
};

// Every format, fp32 arithmetic.
namespace cuda_sm75_simt {
int64_t workspace_bytes(const CudaParams&);
void run(const CudaParams&);
}  // namespace cuda_sm75_simt
// On tensor cores.
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

}  // namespace taut::attention_decode
