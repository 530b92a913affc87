// COMPUTES  out[M,N] = q(x)[M,K] @ dequant(w)[N,K]^T + bias, w n:m sparse;  x quantized inside to int8: the bits of quant_linear's cpu_int8_avxvnni.cpp
// LAYOUT    w: Sparse8 (common/sparse.h).   A, B: quant_linear/x86_int8_kernel.h
// WORK      that kernel's tile over panels made dense in registers (x86_codes.h)
// BOUND     the dense tile's, and the unpacking: once for 516 rows of x
// LIMITS    AVX-VNNI, AVX2, FMA, F16C; int8 activations; int8 and int4 weights, any pattern
#include "sparse_linear/x86_codes.h"

namespace taut::sparse_linear::cpu_avxvnni {

void run_tile(const Params& p) { run_codes<quant_linear::AvxVnni>(p); }

}  // namespace taut::sparse_linear::cpu_avxvnni
