// rms_norm: out = residual + x * rsqrt(mean(x^2) + eps) * (offset + weight), over the last dimension.
#pragma once

#include "common/cpu_features.h"
#include "common/dtypes.h"
#include "common/parallel.h"

namespace taut::rms_norm {

struct Params {
  const void* x;         // [M,K], last dimension contiguous
  int64_t x_row_stride;  // elements
  const void* weight;    // [K] in `weight_dtype`
  const void* residual;  // [M,K] contiguous, or nullptr; may be `out` itself
  void* out;             // [M,K] contiguous
  DType dtype;           // of x, residual and out
  DType weight_dtype;
  int64_t M, K;
  float eps, offset;
  int64_t num_threads;
};

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_avx2 {
void run(const Params&);
}
namespace cpu_neon {
void run(const Params&);
}

}  // namespace taut::rms_norm
