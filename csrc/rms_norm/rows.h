// The norm itself, for every ISA: each kernel file compiles its own copy with its own flags.
#pragma once

#include "common/row_math.h"
#include "rms_norm/op.h"

namespace taut::rms_norm {
namespace {

inline void normalize(const Params& p) {
  const int64_t num_tasks = std::min(p.num_threads, p.M);
  parallel_tasks(num_tasks, [&](int64_t task) {
    float* row = reinterpret_cast<float*>(scratch(1, p.K * sizeof(float)));
    for (int64_t m = p.M * task / num_tasks; m < p.M * (task + 1) / num_tasks; m++) {
      rms_norm_row(p.x, m * p.x_row_stride, p.dtype, p.K, p.weight, p.weight_dtype, p.eps, p.offset, row);
      for_dtype(p.dtype, [&]<DType kDType>() {
        for (int64_t k = 0; k < p.K; k += 8) {
          const int64_t count = std::min<int64_t>(8, p.K - k);
          FloatLanes v, residual;
          load_lanes<DType::kFloat32>(v, row, k, count);
          if (p.residual) {
            load_lanes<kDType>(residual, p.residual, m * p.K + k, count);
            v += residual;
          }
          store_lanes<kDType>(v, p.out, m * p.K + k, count);
        }
      });
    }
  });
}

}  // namespace
}  // namespace taut::rms_norm
