// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in integers
//           over 32 k (nvfp4: 16), then fp32
// LAYOUT    w: Rows8 (common/formats.h).   A, B: x86_int8_kernel.h
// WORK      One step: broadcast 4 k of one row, vpmaddubsw with a vector of 8 outputs x 4 k of codes, vpaddw. After 32 k:
//           vpmaddwd by m (the integer part of x's scale does the widening), convert, fma by the weight's scale.
//           Codes u of fewer than 8 bits are at most 24; the worst is 16 products of 15*127 = 30480 in an int16 lane,
//           started at -z*sum(a); wrap-around on the way is harmless, the end is in range. Bytes (int8, nf4) are two passes
//           of the same kind: u = 16*high + low.
//           |int32| <= 2*30480*32767 < 2^31.
//           small (cpu_loops.h): R <= 4 rows, weights unpacked in registers.  tile: 6 rows x 16 outputs.
// BOUND     M=1: DRAM read of the weights, 26-30 GB/s for a core alone where this was measured; for 2 bits instructions. The
//           loop's instructions for 32 k of 4 strips, the bytes they take, GB/s of weights that lie in L2 and in DRAM:
//           int2 173, 320 B, 22, 18;  int3 242, 448 B, 23, 21;  int4 168, 576 B, 38, 26;  mxfp4 204, 544 B, 30, 27;
//           nvfp4 269, 576 B, 25, 24;  nf4 325, 576 B, 22, 21;  int8 327, 1040 B, 38, 29.
//           Large M: issue width; 3.4 instructions per vpmaddubsw (64 operations).
// LIMITS    AVX2, FMA, F16C; int8 activations
// TRIED     (int4) a zero correction per group after the sum: +6%.  12 rows x 1 vector: broadcasts bind, 0.8x.  int8 by the sign
//           trick (vpsignb): the same instruction count as two nibble passes, and a second kernel.
#include "quant_linear/x86_int8_isas.h"

namespace taut::quant_linear::cpu_int8_avx2 {

void run_small(const Params& p) { run_int8_small<Avx2>(p); }
void run_tile(const Params& p) { run_int8_tile<Avx2>(p); }

}  // namespace taut::quant_linear::cpu_int8_avx2
