// quantize_weight: round-to-nearest quantization of w[N,K] to the canonical form, with a search for each group's scale.
#pragma once

#include "common/cpu_features.h"
#include "common/dtypes.h"
#include "common/formats.h"
#include "common/parallel.h"

namespace taut::quantize_weight {

struct Params {
  const void* w;         // [N,K], last dimension contiguous
  int64_t w_row_stride;  // elements
  DType dtype;
  WeightSpec weight;
  uint8_t* codes;
  void* scales;            // of scale_type(format)
  uint8_t* zeros;          // or nullptr
  uint8_t* row_is_finite;  // [N]; 0 where the row held a NaN, an infinity or a number whose scale fp16 cannot hold
  int64_t num_threads;
  float* global_scale = nullptr;  // nvfp4 only
};

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_avx2 {
void run(const Params&);
}

}  // namespace taut::quantize_weight
