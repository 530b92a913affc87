// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in integers
//           over 32 k (nvfp4: 16), then fp32
// LAYOUT    w: Rows8 (common/formats.h); two strips make one zmm.   A, B: x86_int8_kernel.h
// WORK      The step of cpu_int8_avx2.cpp on 16 outputs, with the same bounds on its 16-bit sums.
//           small (cpu_loops.h): R <= 4 rows, 4 strips in two zmm, weights unpacked in registers.  tile: 12 rows x 16 outputs,
//           12 integer and 12 fp32 sums in registers.
// BOUND     M=1: DRAM read of the weights.  Large M: two vector operations a step (128 operations of the product), on the two
//           ports that take 512 bits, and five more per 32 k and row: 16 / (16 + 5) of 64 operations a cycle.
// LIMITS    AVX-512 F, BW, DQ, VL: processors with AVX-512 before it had VNNI; int8 activations
#include "quant_linear/x86_int8_isas.h"

namespace taut::quant_linear::cpu_int8_avx512bw {

void run_small(const Params& p) { run_int8_small<Avx512Bw>(p); }
void run_tile(const Params& p) { run_int8_tile<Avx512Bw>(p); }

}  // namespace taut::quant_linear::cpu_int8_avx512bw
