// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; floats in fp32, codes as integers
// LAYOUT    q, out [B,H,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h
// WORK      a task takes chunks of 512 keys of one key head until there are no more; chunks.h walks them
// BOUND     bytes: the cache once; codes without sdot: operations, 4 instructions (smull, smull2, addp, sadalp) for 16 products. Not measured on ARM.
// LIMITS    base ARMv8
#include "attention_decode/chunks.h"

namespace taut::attention_decode::cpu_neon {

void run(const Params& p) { attend_all<Neon>(p); }

}  // namespace taut::attention_decode::cpu_neon
