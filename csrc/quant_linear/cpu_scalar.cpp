// COMPUTES  out[M,N] = prologue(x)[M,K] @ dequant(w)[N,K]^T + bias + residual;  x, bias, residual, out fp32, bf16 or fp16;
//           prologue in fp32, sums in double
// LAYOUT    w: Rows8 (common/formats.h), read element by element through its offsets
// WORK      a task is a range of output columns; for each, all rows of x
// BOUND     none: this is the truth in C++, written to be read. About 0.2 GFLOP/s a core.
// LIMITS    none: any N, K, M, format, group, dtype, and any processor
#include <algorithm>
#include <cmath>
#include <vector>

#include "quant_linear/rows_prologue.h"

namespace taut::quant_linear::cpu_scalar {
namespace {

// The definition of 8-bit activations (see op.h). Every operation is one fp32 operation, so that each ISA can repeat it
// bit for bit. Leaves q * m, exact, in x[K]; returns the row's unit, which is NaN if x holds a NaN or an infinity.
float quantize_row(float* x /* [K] */, int64_t K, Activations activations) {
  float row_max = 0, poison = 0;
  for (int64_t k = 0; k < K; k++) row_max = std::max(row_max, std::fabs(x[k])), poison += x[k] * 0.0f;
  if (activations == Activations::kFp8Row) {
    const float inverse = row_max >= kSmallestRowMax ? kLargestE4M3 / row_max : 0.0f;
    for (int64_t k = 0; k < K; k++) x[k] = e4m3_to_float(float_to_e4m3(x[k] * inverse));
    return row_max / kLargestE4M3 + poison;
  }
  const float steps = row_max >= kSmallestRowMax ? 32767.0f / row_max : 0.0f;
  for (int64_t k0 = 0; k0 < K; k0 += 32) {
    const int64_t k1 = std::min(K, k0 + 32);
    float group_max = 0;
    for (int64_t k = k0; k < k1; k++) group_max = std::max(group_max, std::fabs(x[k]));
    float m = std::ceil(group_max * steps);
    if (!(m >= 1.0f)) m = 1.0f;  // a NaN too
    if (m > 32767.0f || activations == Activations::kInt8Row) m = 32767.0f;
    const float inverse = steps * 127.0f / m;
    for (int64_t k = k0; k < k1; k++) x[k] = m * std::clamp(std::nearbyint(x[k] * inverse), -127.0f, 127.0f);
  }
  return row_max / (127.0f * 32767.0f) + poison;
}

// What kInt8Outliers (op.h) takes away from x[K] before it is quantized; x keeps the rest. All zeros where there is none.
std::vector<float> clip_outliers(float* x, int64_t K) {
  const auto magnitude_less = [](float a, float b) { return std::fabs(a) < std::fabs(b); };
  std::vector<float> clipped_off(K);
  float row_max = 0;
  for (int64_t k = 0; k < K; k++) {
    if (!std::isfinite(x[k])) return clipped_off;
    row_max = std::max(row_max, std::fabs(x[k]));
  }
  if (!(row_max >= kSmallestOutlierRowMax)) return clipped_off;
  const float steps = 32767.0f / row_max;
  const auto multiple = [&](float largest) -> double { return std::clamp(std::ceil(largest * steps), 1.0f, 32767.0f); };
  struct Block {
    int64_t k;
    float second;
  };
  std::vector<Block> blocks;  // where the largest is; the second largest
  double squares = 0;
  for (int64_t k0 = 0; k0 < K; k0 += 32) {
    float *begin = x + k0, *end = x + std::min(K, k0 + 32), *largest = std::max_element(begin, end, magnitude_less);
    float second = 0;
    for (float* at = begin; at < end; at++)
      if (at != largest) second = std::max(second, std::fabs(*at));
    blocks.push_back({largest - x, second});
    squares += multiple(std::fabs(*largest)) * multiple(std::fabs(*largest));
  }
  for (const Block& block : blocks) {
    const float largest = std::fabs(x[block.k]);
    const double m = multiple(largest), rest = multiple(block.second);
    if (!((m * m - rest * rest) * static_cast<double>(blocks.size()) > squares)) continue;
    const float clipped = std::copysign(std::max(block.second, largest * kLeastOutlierShare), x[block.k]);
    clipped_off[block.k] = x[block.k] - clipped, x[block.k] = clipped;
  }
  return clipped_off;
}

double scale_of(const uint8_t* packed, const Rows8& layout, int64_t n, int64_t k) {
  const uint8_t* at = packed + layout.scale_offset(n, k);
  switch (scale_type(layout.spec.format)) {
    case ScaleType::kFp32: return *reinterpret_cast<const float*>(at);
    case ScaleType::kE8M0: return *at == 255 ? std::nan("") : std::ldexp(1.0, *at - 127);
    case ScaleType::kE4M3: return static_cast<double>(e4m3_to_float(*at)) * *reinterpret_cast<const float*>(packed + layout.global_scale_offset());
    default: return fp16_to_float(*reinterpret_cast<const uint16_t*>(at));
  }
}

// WHY it depends on the activations: beside 8-bit x, nf4's numbers are taken in 127ths (see op.h).
double dequantize(const uint8_t* packed, const Rows8& layout, int64_t n, int64_t k, Activations activations) {
  const Format format = layout.spec.format;
  const double scale = scale_of(packed, layout, n, k);
  int code = packed[layout.code_offset(n, k)] >> layout.code_shift(k) & ((1 << code_bits(format)) - 1);
  switch (format) {
    case Format::kInt8: return (code - 128) * scale;
    case Format::kFp8E4M3:
    case Format::kFp8Block: return e4m3_to_float(static_cast<uint8_t>(code)) * scale;
    case Format::kMxfp4:
    case Format::kNvfp4: return 0.5 * kTwiceE2M1[code] * scale;
    case Format::kNf4: return (activations == Activations::kFloat ? kNf4[code] : std::nearbyint(kNf4[code] * 127.0f) / 127.0) * scale;
    case Format::kInt3: code = (code & 3) | (packed[layout.third_bit_offset(n, k)] >> (k % 32 / 4) & 1) << 2; break;
    default: break;
  }
  return (code - (layout.spec.zeros ? packed[layout.zero_offset(n, k)] : zero_code(format))) * scale;
}

}  // namespace

void run(const Params& p) {
  const Rows8 layout{p.weight};
  const int64_t M = p.M, N = p.weight.N, K = p.weight.K;
  std::vector<float> x(M * K), unit(M, 1.0f);
  std::vector<std::vector<float>> clipped_off(M);  // kInt8Outliers alone
  for (int64_t m = 0; m < M; m++) {
    const float* row = load_row(p, m, K, &x[m * K]);
    if (row != &x[m * K]) std::copy(row, row + K, &x[m * K]);
    if (p.activations == Activations::kInt8Outliers) clipped_off[m] = clip_outliers(&x[m * K], K);
    if (p.activations != Activations::kFloat) unit[m] = quantize_row(&x[m * K], K, p.activations);
  }
  const int64_t num_tasks = std::clamp<int64_t>(N, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    std::vector<double> w(K);
    for (int64_t n = N * task / num_tasks; n < N * (task + 1) / num_tasks; n++) {
      for (int64_t k = 0; k < K; k++) w[k] = dequantize(p.packed, layout, n, k, p.activations);
      const double bias = p.bias ? load_float(p.bias, n, p.dtype) : 0.0;
      for (int64_t m = 0; m < M; m++) {
        double sum = 0, outliers = 0;
        for (int64_t k = 0; k < K; k++) sum += x[m * K + k] * w[k];
        for (size_t k = 0; k < clipped_off[m].size(); k++)
          if (clipped_off[m][k] != 0) outliers += clipped_off[m][k] * w[k];
        const double residual = p.residual ? load_float(p.residual, m * N + n, p.dtype) : 0.0;
        store_float(p.out, m * N + n, p.dtype, static_cast<float>(sum * unit[m] + outliers + bias + residual));
      }
    }
  });
}

}  // namespace taut::quant_linear::cpu_scalar
