// kv_append: new keys and values, quantized to the format of a cache (common/kv_cache.h) and stored. kv_read: what is stored, as floats.
#pragma once

#include "common/attention.h"
#include "common/cpu_features.h"
#include "common/kv_cache.h"
#include "common/parallel.h"

namespace taut::kv_append {

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

}  // namespace taut::kv_append
