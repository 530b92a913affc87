// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; products and sums in fp32
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows contiguous; k in fp32 is read as it lies, v a tile at a time as [Dv/8][key][8]
// WORK      a task takes blocks of up to 384 rows (queries of the heads of one key head) until there are no more; tiles.h walks them
// BOUND     operations: 2 (D + Dv) flops a visible pair of query and key, at the rate of fp32 FMA. 8 columns x 2 vectors of 4 rows: 16 sums;
//           four steps of scores are 81 instructions, 64 of them fma by lane, a step of values 22 and 16; no spills. Not measured on ARM.
// LIMITS    base ARMv8
#include "attention_prefill/tiles.h"

namespace taut::attention_prefill::cpu_neon {

void run(const Params& p) { attend_all<NeonLanes>(p); }

}  // namespace taut::attention_prefill::cpu_neon
