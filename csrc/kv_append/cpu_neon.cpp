// COMPUTES  codes and scales of new keys and values, or their floats in the cache's dtype; and back (rows.h). Numbers in fp32
// LAYOUT    k, v [B,Hkv,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h
// WORK      a task takes blocks of 16 tokens of one head; a row: its channels, the number farthest from 0, the codes, then each to its byte
// BOUND     bytes, for a prompt; for a single token the start of the call
// LIMITS    base ARMv8, of which the compiler makes what cpu_scalar is as well; the row says what runs
#include "kv_append/rows.h"

namespace taut::kv_append::cpu_neon {

void run(const Params& p) { append_or_read(p); }

}  // namespace taut::kv_append::cpu_neon
