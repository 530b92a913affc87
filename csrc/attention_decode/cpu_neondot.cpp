// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; floats in fp32, codes as integers
// LAYOUT    q, out [B,H,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h
// WORK      a task takes chunks of 512 keys of one key head until there are no more; chunks.h walks them
// BOUND     bytes: the cache once. A step of int8 keys for 4 rows is 27 instructions, 16 of them sdot by lane. Not measured on ARM.
// LIMITS    ARMv8.2 with dot products (sdot); caches of codes
#include "attention_decode/chunks.h"

namespace taut::attention_decode::cpu_neondot {

void run(const Params& p) { attend_codes<Neon>(p); }

}  // namespace taut::attention_decode::cpu_neondot
