// COMPUTES  a stack of decoder layers (layers.h); attention in fp32 over keys and values in fp32, bf16 or fp16
// LAYOUT    caches [B,Hkv,capacity,D], rows of D contiguous; weights Rows8
// WORK      layers.h walks the layers; dots.h has attention's products
// BOUND     bytes: the weights and the keys and values seen, once each
// LIMITS    AVX-512 F, BW, DQ, VL; head_dim a multiple of 16
#include "decoder_layers/dots.h"

namespace taut::decoder_layers::cpu_avx512bw {

void run(const Params& p) { run_layers<LanesDot<Avx512Lanes>>(p); }

}  // namespace taut::decoder_layers::cpu_avx512bw
