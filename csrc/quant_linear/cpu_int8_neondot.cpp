// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k, then fp32;  w in any format that takes int8 activations
// LAYOUT    w: Rows8 (common/formats.h).   A and B: NeonInt8 in neon_int8.h, rows side by side
// WORK      One step: sdot of 4 outputs x 4 k of codes with 4 k of one row, a lane of the register that holds 16 k of it. Codes
//           are signed bytes as decoded (neon_decode.h). Loops, tile and scaling: neon_int8_kernel.h
// BOUND     M=1: DRAM read of the weights; 90 instructions per 32 k x 8 outputs of int4 (gcc 12).  Large M: the SIMD pipes; the
//           tile takes 413 instructions per 32 k x 16 outputs x 6 rows, 192 of them sdot, and none that spills.
// LIMITS    ARMv8.2 with sdot (dotprod); int8 activations. It has run in an emulator only, never on ARM hardware: rows,
//           streams and panel sizes are reasoned from instruction counts, not measured.
#include "quant_linear/neon_int8_kernel.h"

namespace taut::quant_linear::cpu_int8_neondot {
namespace {

struct Sdot {
  static constexpr int kTileRows = 6;  // 24 sums + 6 of A + 1 of B = 31 of 32 registers
  template <int lane>
  static TAUT_INLINE int32x4_t dot(int32x4_t sum, int8x16_t codes, int8x16_t x) {
    return vdotq_laneq_s32(sum, codes, x, lane);
  }
};

}  // namespace

void run_small(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { small_loop<Int8Neon<Sdot>, kZeros, kFormat>(p); });
}
void run_tile(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { tile_loop<Int8Neon<Sdot>, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_int8_neondot
