// COMPUTES  out[M,N] = prologue(x)[M,K] @ dequant(w)[N,K]^T + bias + residual;  x, bias, out fp32, bf16 or fp16; sums in double
// LAYOUT    w: Sparse8 (common/sparse.h), read number by number through its offsets
// WORK      a task is a range of output columns; for each, all rows of x
// BOUND     none: this is the truth in C++, written to be read
// LIMITS    none: any N, K, M, format, pattern, group, dtype, and any processor
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quant_linear/rows_prologue.h"
#include "sparse_linear/op.h"

namespace taut::sparse_linear::cpu_scalar {
namespace {

// 8-bit activations, as quant_linear/op.h defines them: x[k] becomes code * m. Returns the row's unit.
float quantize_row(float* x, int64_t K, quant_linear::Activations activations) {
  float row_max = 0, poison = 0;
  for (int64_t k = 0; k < K; k++) {
    row_max = std::max(row_max, std::fabs(x[k]));
    poison += x[k] * 0.0f;
  }
  const bool counts = row_max >= quant_linear::kSmallestRowMax;
  if (activations == quant_linear::Activations::kFp8Row) {
    const float inverse = counts && std::isfinite(row_max) ? 448.0f / row_max : 0.0f;
    for (int64_t k = 0; k < K; k++) x[k] = e4m3_to_float(float_to_e4m3(std::clamp(x[k] * inverse, -448.0f, 448.0f)));
    return row_max / 448.0f + poison;
  }
  const float steps = counts ? 32767.0f / row_max : 0.0f;
  for (int64_t block = 0; block < K; block += 32) {
    const int64_t end = std::min(K, block + 32);
    float largest = 0;
    for (int64_t k = block; k < end; k++) largest = std::max(largest, std::fabs(x[k]));
    const float m = activations == quant_linear::Activations::kInt8Row ? 32767.0f : std::clamp(std::ceil(largest * steps), 1.0f, 32767.0f);
    const float inverse = steps * 127.0f / m;
    for (int64_t k = block; k < end; k++) x[k] = m * std::clamp(std::nearbyint(x[k] * inverse), -127.0f, 127.0f);
  }
  return row_max / (127.0f * 32767.0f) + poison;
}

double dequantize(const uint8_t* packed, const Sparse8& w, int64_t n, int64_t j, int64_t k) {
  if (is_16bit(w.spec.format)) {
    uint16_t bits;
    std::memcpy(&bits, packed + w.code_offset(n, j), sizeof bits);
    return w.spec.format == Format::kBf16 ? bf16_to_float(bits) : fp16_to_float(bits);
  }
  const int code = packed[w.code_offset(n, j)] >> w.code_shift(j) & ((1 << code_bits(w.spec.format)) - 1);
  const double scale = fp16_to_float(*reinterpret_cast<const uint16_t*>(packed + w.scale_offset(n, k)));
  switch (w.spec.format) {
    case Format::kInt8: return (code - 128) * scale;
    case Format::kFp8E4M3: return e4m3_to_float(static_cast<uint8_t>(code)) * scale;
    default: return (code - 8) * scale;
  }
}

}  // namespace

void run(const Params& p) {
  const Sparse8 w = p.sparse();
  const int64_t M = p.M, N = p.weight.N, K = p.weight.K, kept = w.kept();
  std::vector<float> x(M * K), unit(M, 1.0f);
  for (int64_t m = 0; m < M; m++) {
    const float* row = quant_linear::load_row(p, m, K, &x[m * K]);
    if (row != &x[m * K]) std::copy(row, row + K, &x[m * K]);
    if (p.activations != quant_linear::Activations::kFloat) unit[m] = quantize_row(&x[m * K], K, p.activations);
  }
  const int64_t num_tasks = std::clamp<int64_t>(N, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    std::vector<double> values(kept);
    std::vector<int64_t> places(kept);
    for (int64_t n = N * task / num_tasks; n < N * (task + 1) / num_tasks; n++) {
      for (int64_t j = 0; j < kept; j++) {
        places[j] = w.dense_k(p.packed, n, j);
        values[j] = dequantize(p.packed, w, n, j, places[j]);
      }
      const double bias = p.bias ? load_float(p.bias, n, p.dtype) : 0.0;
      for (int64_t m = 0; m < M; m++) {
        double sum = 0;
        for (int64_t j = 0; j < kept; j++) sum += x[m * K + places[j]] * values[j];
        const double residual = p.residual ? load_float(p.residual, m * N + n, p.dtype) : 0.0;
        store_float(p.out, m * N + n, p.dtype, static_cast<float>(sum * unit[m] + bias + residual));
      }
    }
  });
}

}  // namespace taut::sparse_linear::cpu_scalar
