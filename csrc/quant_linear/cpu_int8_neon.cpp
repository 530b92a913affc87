// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k, then fp32;  w in any format that takes int8 activations
// LAYOUT    w: Rows8 (common/formats.h).   A and B: NeonInt8 in neon_int8.h, rows side by side
// WORK      What sdot does, on processors that have none: two smull, an addp in int16 (two products of signed bytes, at most
//           2*128*127, fit) and an sadalp, for 4 outputs x 4 k. Loops, tile and scaling: neon_int8_kernel.h
// BOUND     The SIMD pipes: 4 or 5 instructions where sdot is one; a third of those that the float kernel takes at M=1.
// LIMITS    any 64-bit ARM (Cortex-A53, A72: Raspberry Pi 3 and 4); int8 activations. It has run in an emulator only, never on ARM
//           hardware: rows, streams and panel sizes are reasoned from instruction counts, not measured.
#include "quant_linear/neon_int8_kernel.h"

namespace taut::quant_linear::cpu_int8_neon {
namespace {

struct Smull {
  static constexpr int kTileRows = 4;  // 16 sums + 4 of A + 1 of B + 4 to multiply in
  template <int lane>
  static TAUT_INLINE int32x4_t dot(int32x4_t sum, int8x16_t codes, int8x16_t x) {
    const int8x16_t four = vreinterpretq_s8_s32(vdupq_laneq_s32(vreinterpretq_s32_s8(x), lane));
    return vpadalq_s16(sum, vpaddq_s16(vmull_s8(vget_low_s8(codes), vget_low_s8(four)), vmull_high_s8(codes, four)));
  }
};

}  // namespace

void run_small(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { small_loop<Int8Neon<Smull>, kZeros, kFormat>(p); });
}
void run_tile(const Params& p) {
  for_format(p.weight, Int8Formats(), [&]<bool kZeros, Format kFormat>() { tile_loop<Int8Neon<Smull>, kZeros, kFormat>(p); });
}

}  // namespace taut::quant_linear::cpu_int8_neon
