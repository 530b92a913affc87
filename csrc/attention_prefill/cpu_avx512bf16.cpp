// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h, of bf16: exact products, sums in fp32, weights rounded to bf16
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows contiguous; k is read as it lies, v a tile at a time as [Dv/8][key/2][8][2]
// WORK      a task takes blocks of up to 384 rows (queries of the heads of one key head) until there are no more; tiles.h walks them
// BOUND     operations: 2 (D + Dv) flops a visible pair of query and key, at the rate of vdpbf16ps, which is twice that of fp32 FMA.
//           8 columns x 3 vectors of 16 rows: 24 sums; a step is 3 loads, 8 broadcasts (in the instruction) and 24 vdpbf16ps.
// LIMITS    AVX-512 BF16, which takes subnormal numbers for 0
#include "attention_prefill/tiles.h"

namespace taut::attention_prefill::cpu_avx512bf16 {

void run(const Params& p) { attend_all<Avx512Bf16Lanes>(p); }

}  // namespace taut::attention_prefill::cpu_avx512bf16
