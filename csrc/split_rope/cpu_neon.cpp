// COMPUTES  q, k, v of a fused projection, q and k RMS-normed by head where asked, and rotated; in fp32, one rounding (heads.h)
// LAYOUT    qkv [B,T,(Hq + 2 Hkv) D] to q [B,Hq,T,D], k and v [B,Hkv,T,D]
// WORK      a task is a range of tokens; a head goes through fp32 scratch, which stays in L1
// BOUND     bytes: qkv, q, k and v once each
// LIMITS    base ARMv8, of which the compiler makes what cpu_scalar is as well; the row says what runs
#include "split_rope/heads.h"

namespace taut::split_rope::cpu_neon {

void run(const Params& p) { split(p); }

}  // namespace taut::split_rope::cpu_neon
