// COMPUTES  the sum of the 64-bit words of a buffer; a count of fp32, bf16 or int8 multiply-adds (op.h)
// LAYOUT    plain words
// WORK      one task a thread, on zmm (zmm.h); bf16: 16 accumulators of fp32, vdpbf16ps (32 multiply-adds)
// BOUND     what it measures: memory; the FMA ports; the ports of bf16 products; the VNNI ports
// LIMITS    AVX-512 F, BW, DQ, VL, VNNI and BF16
#include "roofline/zmm.h"

namespace taut::roofline::cpu_avx512bf16 {
namespace {

uint64_t dot_bf16(int64_t steps) {
  __m512 sums[kAccumulators];
  const __m512i ones = _mm512_set1_epi16(0x3f80);  // 1.0 in bf16
#pragma GCC unroll 16
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 16
    for (auto& sum : sums) asm volatile("vdpbf16ps %1, %1, %0" : "+v"(sum) : "v"(ones));
  }
  uint64_t total = 0;
#pragma GCC unroll 16
  for (auto& sum : sums) {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, sum);
    for (float lane : lanes) total += static_cast<uint64_t>(lane);
  }
  return total;
}

}  // namespace

void run(const Params& p) {
  parallel_tasks(p.num_threads, [&](int64_t task) { p.results[task] = measure(p, task, dot_bf16); });
}

}  // namespace taut::roofline::cpu_avx512bf16
