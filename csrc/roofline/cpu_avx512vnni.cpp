// COMPUTES  the sum of the 64-bit words of a buffer; a count of fp32, bf16 or int8 multiply-adds (op.h)
// LAYOUT    plain words
// WORK      one task a thread, on zmm (zmm.h); bf16 as fp32, which is the fastest way without AVX-512 BF16
// BOUND     what it measures: memory; the FMA ports; the VNNI ports
// LIMITS    AVX-512 F, BW, DQ, VL and VNNI
#include "roofline/zmm.h"

namespace taut::roofline::cpu_avx512vnni {

void run(const Params& p) {
  parallel_tasks(p.num_threads, [&](int64_t task) { p.results[task] = measure(p, task, fma_f32); });
}

}  // namespace taut::roofline::cpu_avx512vnni
