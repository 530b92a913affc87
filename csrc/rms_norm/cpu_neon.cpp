// COMPUTES  out = residual + x * rsqrt(mean(x^2) + eps) * (offset + weight), in fp32, one rounding at the end (rows.h)
// LAYOUT    rows of x may be far apart, those of residual and out are contiguous
// WORK      a task is a range of rows; a row goes through fp32 scratch, which stays in L1
// BOUND     bytes: x, residual and out once each
// LIMITS    base ARMv8, of which the compiler makes what cpu_scalar is as well; the row says what runs
#include "rms_norm/rows.h"

namespace taut::rms_norm::cpu_neon {

void run(const Params& p) { normalize(p); }

}  // namespace taut::rms_norm::cpu_neon
