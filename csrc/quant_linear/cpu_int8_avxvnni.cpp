// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias;  x quantized inside to int8 (op.h), sums exact in int32
//           over 32 k (nvfp4: 16), then fp32
// LAYOUT    w: Rows8 (common/formats.h).   A, B: x86_int8_kernel.h
// WORK      One step: broadcast 4 k of one row, vpdpbusd with a vector of 8 outputs x 4 k of unsigned codes. After 32 k:
//           convert, fma by (scale * m).
//           small (cpu_loops.h): R <= 4 rows, weights unpacked in registers.  tile: 6 rows x 16 outputs.
// BOUND     M=1: DRAM read of the weights.  Large M: the two ports that take vpdpbusd (64 operations), a convert, a
//           multiply and an fma: 8 / (8 + 3) of their peak; 2.5 instructions per vpdpbusd.
// LIMITS    AVX-VNNI, AVX2, FMA, F16C: processors of 2021 and later without AVX-512; int8 activations
#include "quant_linear/x86_int8_kernel.h"

namespace taut::quant_linear::cpu_int8_avxvnni {
namespace {

struct AvxVnni : Simd256 {
  static constexpr bool kInt32 = true;
  static constexpr int kSmallRows = 4, kTileRows = 6, kTileVectors = 2;  // 6 x 2 sums + 2 codes + 1 broadcast
  static constexpr int64_t kPanelBytes = 16384;

  using X = Bytes;
  static TAUT_INLINE X at(const uint8_t* p) { return broadcast4(p); }
  // WHY asm: gcc would gather the loads in front and spill them.
  static TAUT_INLINE void dot(Bytes& sum, Bytes codes, X x) { asm volatile("%{vex%} vpdpbusd %2,%1,%0" : "+x"(sum) : "x"(codes), "x"(x)); }
  static TAUT_INLINE void dot_from(Bytes& sum, Bytes start, Bytes codes, X x) {
    sum = start;
    dot(sum, codes, x);
  }
};

}  // namespace

void run_small(const Params& p) { run_int8_small<AvxVnni>(p); }
void run_tile(const Params& p) { run_int8_tile<AvxVnni>(p); }

}  // namespace taut::quant_linear::cpu_int8_avxvnni
