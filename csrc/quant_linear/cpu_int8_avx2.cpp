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
#include "quant_linear/x86_int8_kernel.h"

namespace taut::quant_linear::cpu_int8_avx2 {
namespace {

struct Avx2 : Simd256 {
  static constexpr bool kInt32 = false;
  static constexpr int kSmallRows = 4, kTileRows = 6, kTileVectors = 2;  // 6 x 2 sums + 2 codes + 1 broadcast + 1 product = 16 registers
  static constexpr int64_t kPanelBytes = 16384;

  using X = Bytes;
  static TAUT_INLINE X at(const uint8_t* p) { return broadcast4(p); }
  // WHY asm: gcc 12 reassociates the int16 sum into a tree and spills it (2x slower); this keeps one running sum.
  static TAUT_INLINE void dot(Bytes& sum, Bytes codes, X x) {
    Bytes product;
    asm volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0" : "+x"(sum), "=&x"(product) : "x"(codes), "x"(x));
  }
  static TAUT_INLINE void dot_from(Bytes& sum, Bytes start, Bytes codes, X x) {  // without a copy, and without a product
    asm volatile("vpmaddubsw %2,%1,%0\n\tvpaddw %0,%3,%0" : "=&x"(sum) : "x"(codes), "x"(x), "x"(start));
  }
  static TAUT_INLINE void dot_first(Bytes& sum, Bytes codes, X x) { asm volatile("vpmaddubsw %2,%1,%0" : "=x"(sum) : "x"(codes), "x"(x)); }
};

}  // namespace

void run_small(const Params& p) { run_int8_small<Avx2>(p); }
void run_tile(const Params& p) { run_int8_tile<Avx2>(p); }

}  // namespace taut::quant_linear::cpu_int8_avx2
