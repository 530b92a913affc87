// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp32, bf16 or fp16; x enters as it is; products and
//           sums in fp32;  w in any format
// LAYOUT    w: Rows8 (common/formats.h); two strips make one zmm.   A, B: x86_float_kernel.h
// WORK      A 32-bit lane of a packed vector holds codes of one output. Up to 4 bits: shift, and vpermps looks up the number in
//           16. 8 bits: shifts and a conversion. Then scale (and zero point: one fma), and one fma a row with x broadcast by the
//           instruction.   small (cpu_loops.h): R <= 4 rows, w converted in registers.
//           tile: an fp32 panel in L1, 24 rows x 16 outputs: as many loads as fma, and all 24 sums in registers.
// BOUND     M=1: issue width, 4 instructions per 16 weights.   Large M: fp32 fma, 2 zmm a cycle and core.
// LIMITS    AVX-512 F, BW, DQ, VL; float activations
#include "quant_linear/x86_float_kernel.h"

namespace taut::quant_linear::cpu_float_avx512bw {
namespace {

struct FloatAvx512 : Simd512 {
  static constexpr int kTileRows = 24;
};

}  // namespace

void run_small(const Params& p) { run_float_small<FloatAvx512>(p); }
void run_tile(const Params& p) { run_float_tile<FloatAvx512>(p); }

}  // namespace taut::quant_linear::cpu_float_avx512bw
