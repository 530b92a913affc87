// kv_append: new keys and values, quantized to the format of a cache (common/kv_cache.h) and stored. kv_read: what is stored, as floats.
#pragma once

#include "common/attention.h"
#include "common/cpu_features.h"
#include "common/device.h"
#include "common/kv_cache.h"
#include "common/parallel.h"

namespace taut::kv_append {

constexpr const char* kAppendSchema =
    "kv_append(Tensor k_new, Tensor v_new, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scales, Tensor(d!)? v_scales, Tensor? channels, Tensor? block_table, "
    "int kv_format, int start, Tensor? starts) -> ()";
constexpr const char* kReadSchema =
    "kv_read(Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor? channels, Tensor? block_table, int kv_format, int batch, int head_dim, "
    "int value_dim, int start, int length, int dtype) -> (Tensor, Tensor)";

struct Params {
  KvCache cache;
  Heads k, v;   // [B,Hkv,L,D], [B,Hkv,L,Dv]; kv_read writes them
  DType dtype;  // of k and v
  int64_t B, Hkv, L, D, Dv;
  int64_t start;          // where the first of them is stored
  const int32_t* starts;  // [B], added to `start`, or nullptr
  bool reads;             // kv_read
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

// ---- CUDA -------------------------------------------------------------------------------------------------------------

struct CudaParams : Params {
  int64_t pages;  // of the cache. What `starts` and the block table say is known on the device alone
  const Device* device;
  void* stream;  // cudaStream_t
};

namespace cuda_sm75_simt {
void run(const CudaParams&);
}

}  // namespace taut::kv_append
