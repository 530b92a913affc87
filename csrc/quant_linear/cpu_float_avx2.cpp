// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias;  x, out fp32, bf16 or fp16; x enters as it is; products and
//           sums in fp32;  w in any format
// LAYOUT    w: Rows8 (common/formats.h).   A, B: x86_float_kernel.h
// WORK      A 32-bit lane of a packed vector holds codes of one output. Integers of 4 and 8 bits: a shift left and an arithmetic shift
//           right leave one code, signed, in 8 outputs' lanes; convert. Shorter codes: vpermps looks up the number. E2M1: so its
//           magnitude. nf4: both halves of its codebook, and a choice. Then scale, and one fma a row with a broadcast x.
//           small (cpu_loops.h): R <= 4 rows, w converted in registers; zero point and scale go in per weight, as in the
//           tile: scaled after the sum, an outlier in x would not cancel where q = z, and large x would overflow.
//           tile: an fp32 panel in L1, 6 rows x 16 outputs of plain fma.
// BOUND     M=1: issue width, 5 to 8 instructions per 8 weights, about 20 GB/s of int4 on two 3 GHz cores.
//           Large M: fp32 fma, 2 per cycle and core (204 GFLOP/s on two 3.1 GHz Zen 3 cores).
// LIMITS    AVX2, FMA, F16C; float activations
#include "quant_linear/x86_float_kernel.h"

namespace taut::quant_linear::cpu_float_avx2 {
namespace {

struct FloatAvx2 : Simd256 {
  static constexpr int kTileRows = 6;  // 6 x 2 sums + 2 weights + 1 broadcast
};

}  // namespace

void run_small(const Params& p) { run_float_small<FloatAvx2>(p); }
void run_tile(const Params& p) { run_float_tile<FloatAvx2>(p); }

}  // namespace taut::quant_linear::cpu_float_avx2
