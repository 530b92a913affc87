// COMPUTES  codes, scales, zeros = quantize(w[N,K]), round to nearest with a scale search a group (search.h)
// LAYOUT    canonical, row-major (common/formats.h)
// WORK      a task is a range of rows (of bands of 128 for fp8_block); a group at a time, in a buffer of fp32
// BOUND     arithmetic: about 7 operations a weight and candidate; 8 candidates for int4, 16 for int8 and fp8, 52 to 78 for
//           int2 and int3, 19 for ternary, two for mxfp4; the others have none to try
// LIMITS    AVX2
#include "quantize_weight/search.h"

namespace taut::quantize_weight::cpu_avx2 {

void run(const Params& p) { quantize(p); }

}  // namespace taut::quantize_weight::cpu_avx2
