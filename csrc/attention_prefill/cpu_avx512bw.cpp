// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; products and sums in fp32
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows contiguous; k in fp32 is read as it lies, v a tile at a time as [Dv/8][key][8]
// WORK      a task takes blocks of up to 384 rows (queries of the heads of one key head) until there are no more; tiles.h walks them
// BOUND     operations: 2 (D + Dv) flops a visible pair of query and key, at the rate of fp32 FMA. 8 columns x 3 vectors of 16 rows: 24 sums;
//           a step of a product is 3 loads, 8 broadcasts (in the instruction) and 24 fma. Measured on two Zen 5 cores (1024 queries,
//           causal, D=128): 420 GFLOP/s, 80% of fp32 FMA, and on two Zen 4 cores 188, 82%; 4096 queries: 89%. Of the rest a fifth is the softmax, a fifth the diagonal,
//           whose keys are taken 8 at a time for 12 tokens; the most is waiting for q, v and the result, which come from and go to memory.
// LIMITS    AVX-512 F, BW, DQ and VL
#include "attention_prefill/tiles.h"

namespace taut::attention_prefill::cpu_avx512bw {

void run(const Params& p) { attend_all<Avx512Lanes>(p); }

}  // namespace taut::attention_prefill::cpu_avx512bw
