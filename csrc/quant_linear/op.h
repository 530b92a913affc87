// quant_linear: out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias[N], w in a low-bit format (common/formats.h).
#pragma once

#include "common/cpu_features.h"
#include "common/dtypes.h"
#include "common/formats.h"
#include "common/parallel.h"

namespace taut::quant_linear {

// kFloat: x enters as it is; products and sums in fp32.
// kInt8:  x is quantized inside, one scale per row per 32 k (quantize_row in cpu_scalar.cpp is the definition):
//         row_max = max|x|, group_max = max|x| over 32 k, m = clamp(ceil(group_max * 32767 / row_max), 1, 32767),
//         scale = m * row_max / (127 * 32767), q = round(x / scale) clamped to +-127.
//         A row whose max|x| is under 2^-100 counts as zeros. A row that holds a NaN or an infinity gives a row of NaN.
//         The integer part m is what kernels multiply in; row_max / (127 * 32767) is applied once at the end.
constexpr float kSmallestRowMax = 0x1p-100f;
enum class Activations : int64_t { kFloat = 0, kInt8 = 1 };

struct Params {
  const void* x;          // [M,K], last dimension contiguous
  int64_t x_row_stride;   // elements
  const uint8_t* packed;  // Rows8
  const void* bias;       // [N] in `dtype`, or nullptr
  void* out;              // [M,N] contiguous, in `dtype`
  DType dtype;            // of x, bias and out
  int64_t M;
  WeightSpec weight;
  Activations activations;
  int64_t num_threads;
};

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_int8_avx2 {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_avx2
namespace cpu_int8_avx512vnni {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_int8_avx512vnni
namespace cpu_float_avx2 {
void run_small(const Params&);
void run_tile(const Params&);
}  // namespace cpu_float_avx2

}  // namespace taut::quant_linear
