// COMPUTES  dq, dk and dv of softmax(q k^T) v, with the rules of common/attention.h; products and sums in fp32
// LAYOUT    all [B,H,L,D] by strides, rows contiguous; lse [B,Hq,Lq]; k and v of a tile also transposed, [D][128 keys]
// WORK      a task takes tiles of 128 keys of a key head until there are no more, and goes over the rows that see them; tiles.h walks them
// BOUND     operations: products as in attention_prefill's cpu_neon. Not measured on ARM.
// LIMITS    base ARMv8
#include "attention_backward/tiles.h"

namespace taut::attention_backward::cpu_neon {

void run(const Params& p) { differentiate_all<NeonLanes>(p); }

}  // namespace taut::attention_backward::cpu_neon
