// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; products and sums in fp32
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows contiguous; k in fp32 is read as it lies, v a tile at a time as [Dv/8][key][8]
// WORK      a task takes blocks of up to 384 rows (queries of the heads of one key head) until there are no more; tiles.h walks them
// BOUND     operations: 2 (D + Dv) flops a visible pair of query and key, at the rate of fp32 FMA. 4 columns x 3 vectors of 8 rows: 12 sums;
//           a step of a product is 3 loads, 4 broadcasts and 12 fma. Measured on two Zen 5 cores (1024 queries, causal, D=128): 220
//           GFLOP/s, 84% of what they do in 256-bit fma; the rest is the softmax and blocks on the diagonal, which are computed whole.
// LIMITS    AVX2, FMA and F16C
#include "attention_prefill/tiles.h"

namespace taut::attention_prefill::cpu_avx2 {

void run(const Params& p) { attend_all<Avx2Lanes>(p); }

}  // namespace taut::attention_prefill::cpu_avx2
