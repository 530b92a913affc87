// Rows of x as the kernels take them: fp32, zero-padded, after the prologue. The same bits on every ISA (common/row_math.h), so
// that fused and unfused calls agree, and so do the integers that int8 activations round to.
#pragma once

#include "common/row_math.h"
#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

// out[K] = unit(gate) * up, with gate = row[0, K) and up = row[K, 2K)
template <DType kDType>
inline void glu_row(Prologue prologue, const void* base, int64_t index, int64_t K, float* out) {
  const auto each = [&](const auto& unit) __attribute__((always_inline)) {
    for (int64_t k = 0; k < K; k += 8) {
      const int64_t count = std::min<int64_t>(8, K - k);
      FloatLanes gate, up;
      load_lanes<kDType>(gate, base, index + k, count);
      load_lanes<kDType>(up, base, index + K + k, count);
      unit(gate);
      store_lanes<DType::kFloat32>(gate * up, out, k, count);
    }
  };
  if (prologue == Prologue::kSiluGlu) each([](FloatLanes& v) __attribute__((always_inline)) { silu_lanes(v); });
  else if (prologue == Prologue::kGeluTanhGlu) each([](FloatLanes& v) __attribute__((always_inline)) { gelu_tanh_lanes(v); });
  else each([](FloatLanes& v) __attribute__((always_inline)) { gelu_erf_lanes(v); });
}

// Row m of prologue(x) as fp32, zero-padded to padded_k: x itself where that is what it already is, else a copy in `buffer`.
inline const float* load_row(const Params& p, int64_t m, int64_t padded_k, float* buffer /* [padded_k] */) {
  const int64_t K = p.weight.K, index = m * p.x_row_stride;
  if (p.prologue == Prologue::kNone && p.dtype == DType::kFloat32 && K == padded_k) return static_cast<const float*>(p.x) + index;
  if (p.prologue == Prologue::kRmsNorm) {
    rms_norm_row(p.x, index, p.dtype, K, p.norm_weight, p.norm_dtype, p.norm_eps, p.norm_offset, buffer);
  } else {
    for_dtype(p.dtype, [&]<DType kDType>() {
      if (p.prologue != Prologue::kNone) return glu_row<kDType>(p.prologue, p.x, index, K, buffer);
      for (int64_t k = 0; k < K; k += 8) {
        const int64_t count = std::min<int64_t>(8, K - k);
        FloatLanes v;
        load_lanes<kDType>(v, p.x, index + k, count);
        store_lanes<DType::kFloat32>(v, buffer, k, count);
      }
    });
  }
  std::memset(buffer + K, 0, (padded_k - K) * sizeof(float));
  return buffer;
}

}  // namespace
}  // namespace taut::quant_linear
