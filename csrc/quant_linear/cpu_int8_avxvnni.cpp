// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k (nvfp4: 16), then fp32
// LAYOUT    w: Rows8 (common/formats.h).   A, B: x86_int8_kernel.h
// WORK      One step: broadcast 4 k of one row, vpdpbusd with a vector of 8 outputs x 4 k of unsigned codes. After 32 k:
//           convert, fma by (scale * m).
//           small (cpu_loops.h): R <= 4 rows, weights unpacked in registers.  tile: 6 rows x 16 outputs.
// BOUND     M=1: DRAM read of the weights.  Large M: the two ports that take vpdpbusd (64 operations), a convert, a
//           multiply and an fma: 8 / (8 + 3) of their peak; 2.5 instructions per vpdpbusd.
// LIMITS    AVX-VNNI, AVX2, FMA, F16C: processors of 2021 and later without AVX-512; int8 activations
#include "quant_linear/x86_int8_isas.h"

namespace taut::quant_linear::cpu_int8_avxvnni {

void run_small(const Params& p) { run_int8_small<AvxVnni>(p); }
void run_tile(const Params& p) { run_int8_tile<AvxVnni>(p); }

}  // namespace taut::quant_linear::cpu_int8_avxvnni
