// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; floats in fp32, codes as integers
// LAYOUT    q, out [B,H,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h
// WORK      a task takes chunks of 512 keys of one key head until there are no more; chunks.h walks them
// BOUND     bytes: the cache once; on processors that multiply 16-bit words in one pipe (Zen 1) codes are bound by that: a vpmaddwd for 16 products.
//           There int8 reaches 65% of it; it reads 7 GB/s of 24, int4 4.
// LIMITS    AVX2, FMA and F16C
#include "attention_decode/chunks.h"

namespace taut::attention_decode::cpu_avx2 {

void run(const Params& p) { attend_all<Avx2>(p); }

}  // namespace taut::attention_decode::cpu_avx2
