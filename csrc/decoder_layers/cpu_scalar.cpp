// COMPUTES  a stack of decoder layers (layers.h); attention's dot products in double
// LAYOUT    caches [B,Hkv,capacity,D]; weights Rows8
// WORK      see layers.h
// BOUND     none: this is the truth in C++ for attention, written to be read; the matmuls are quant_linear's
// LIMITS    none
#include "decoder_layers/layers.h"

namespace taut::decoder_layers::cpu_scalar {
namespace {

struct Dot {
  static void scores(const float* q, int64_t rows, int64_t D, const void* keys, DType dtype, int64_t n, float* out) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t t = 0; t < n; t++) {
        double sum = 0;
        for (int64_t d = 0; d < D; d++) sum += static_cast<double>(q[r * D + d]) * load_float(keys, t * D + d, dtype);
        out[r * kChunk + t] = static_cast<float>(sum);
      }
  }
  static void weighted(const float* p, int64_t rows, int64_t D, const void* values, DType dtype, int64_t n, float* out) {
    for (int64_t r = 0; r < rows; r++)
      for (int64_t d = 0; d < D; d++) {
        double sum = 0;
        for (int64_t t = 0; t < n; t++) sum += static_cast<double>(p[r * kChunk + t]) * load_float(values, t * D + d, dtype);
        out[r * D + d] = static_cast<float>(sum);
      }
  }
};

}  // namespace

void run(const Params& p) { run_layers<Dot>(p); }

}  // namespace taut::decoder_layers::cpu_scalar
