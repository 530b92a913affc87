// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k (nvfp4: 16), then fp32
// LAYOUT    w: Rows8 (common/formats.h); two strips make one zmm.   A, B: x86_int8_kernel.h
// WORK      One step: vpdpbusd of 16 outputs x 4 k of unsigned codes with 4 k of one row, broadcast. After 32 k: convert, fma by
//           (scale * m).
//           small (cpu_loops.h): R <= 6 rows, 4 strips in two zmm, weights unpacked in registers.  tile: 5 rows x 32 outputs,
//           10 integer and 10 fp32 sums in registers.
// BOUND     M=1: DRAM read of the weights.  Large M: vpdpbusd, one zmm a cycle on Zen 4 (128 operations), two on Zen 5; per 32 k,
//           a multiply and an fma on the same pipes: 8 / (8 + 2) = 80% of that peak; 78% measured for the loop alone in L1, two
//           thirds in a layer of 14336 x 4096 (unpacking, storing, x from L2 and L3 take the rest).
//           The instructions for 32 k of 4 strips at M=1: int2 74, int3 106, int4 83, nf4 and mxfp4 99, nvfp4 108, int8 84.
// LIMITS    AVX-512 F, BW, DQ, VL, VNNI; int8 activations
// TRIED     12 rows x 16 outputs, broadcasts from memory in the instruction: the two loads a cycle bind, 0.9x.  6 rows: 2% less.
#include "quant_linear/x86_int8_isas.h"

namespace taut::quant_linear::cpu_int8_avx512vnni {

void run_small(const Params& p) { run_int8_small<Avx512Vnni>(p); }
void run_tile(const Params& p) { run_int8_tile<Avx512Vnni>(p); }

}  // namespace taut::quant_linear::cpu_int8_avx512vnni
