#include "quant_linear/op.h"

#include <algorithm>
#include <sstream>

#include "common/impl.h"
#include "common/torch_bridge.h"

namespace taut::quant_linear {
namespace {

const char* needs_int8(const Params& p) {
  return p.activations == Activations::kInt8 || p.activations == Activations::kInt8Row ? nullptr : "it computes with int8 activations";
}

const char* needs_int8_avx2(const Params& p) { return cpu_features().avx2 ? needs_int8(p) : "this processor has no AVX2, FMA and F16C"; }

const char* needs_int8_avx512vnni(const Params& p) { return cpu_features().avx512vnni ? needs_int8(p) : "this processor has no AVX-512 VNNI"; }

const char* needs_int8_amx(const Params& p) { return cpu_features().amx ? needs_int8(p) : "this processor has no AMX, or the system grants none"; }

const char* needs_float_avx2(const Params& p) {
  if (!cpu_features().avx2) return "this processor has no AVX2, FMA and F16C";
  return p.activations == Activations::kFloat ? nullptr : "it computes with float activations";
}

// The small loops stream the packed weights and unpack them in registers, for up to 4 rows at a time; the tiles unpack
// 16 rows of w once to L1 and reuse them for every row of x.
const char* int8_small_m(const Params& p) { return p.M <= 16 ? nullptr : "above M=16 the tile is faster"; }
const char* amx_m(const Params& p) { return p.M > 16 ? nullptr : "up to M=16 a C tile is mostly empty"; }
const char* float_small_m(const Params& p) { return p.M <= 4 ? nullptr : "above M=4 the tile is faster"; }

// In priority order. Every crossover is in this table, and nowhere else.
constexpr Impl<Params> kImpls[] = {
    {"cpu_amx.int8_tile", needs_int8_amx, amx_m, cpu_int8_amx::run},
    {"cpu_avx512vnni.int8_small", needs_int8_avx512vnni, int8_small_m, cpu_int8_avx512vnni::run_small},
    {"cpu_avx512vnni.int8_tile", needs_int8_avx512vnni, always, cpu_int8_avx512vnni::run_tile},
    {"cpu_avx2.int8_small", needs_int8_avx2, int8_small_m, cpu_int8_avx2::run_small},
    {"cpu_avx2.int8_tile", needs_int8_avx2, always, cpu_int8_avx2::run_tile},
    {"cpu_avx2.float_small", needs_float_avx2, float_small_m, cpu_float_avx2::run_small},
    {"cpu_avx2.float_tile", needs_float_avx2, always, cpu_float_avx2::run_tile},
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// A second thread costs about 4 us to start and join; one thread does this many multiply-adds in that time.
constexpr int64_t kMinWorkPerThread = 1 << 18;

int64_t useful_threads(int64_t M, const WeightSpec& weight) {
  const int64_t work = std::max<int64_t>(M, 1) * weight.N * weight.K;
  return std::clamp<int64_t>(work / kMinWorkPerThread, 1, torch::stable::get_num_threads());
}

Activations activations_for(const char* op, Format format, int64_t activations) {
  if (const char* why = refused_activations(format, activations)) check(false, op, ": ", why, ", got ", activations);
  return static_cast<Activations>(activations);
}

Tensor quant_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features, int64_t format, int64_t group_size,
                    bool zeros, int64_t activations) {
  constexpr const char* kOp = "quant_linear";
  check(x.dim() >= 1, kOp, ": x must be [..., K], got a scalar");
  check_cpu(kOp, "x", x);
  check_cpu(kOp, "packed", packed);
  const int64_t N = out_features, K = x.size(x.dim() - 1);
  const WeightSpec weight = weight_spec(kOp, N, K, format, group_size, zeros);
  const DType dtype = float_dtype(kOp, "x", x);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), kOp,
        ": packed must be a contiguous 1-D uint8 tensor from pack_weight");
  check(packed.numel() == Rows8{weight}.total_bytes(), kOp, ": packed holds ", packed.numel(), " bytes, but [", N, ", ", K, "] in this format takes ",
        Rows8{weight}.total_bytes(), "; is x's last dimension (", K, ") the weight's in_features?");
  const Activations mode = activations_for(kOp, weight.format, activations);
  Tensor bias_row;
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check(bias->dim() == 1 && bias->size(0) == N, kOp, ": bias must be [", N, "], got ", shape_string(*bias));
    check(bias->scalar_type() == x.scalar_type(), kOp, ": bias must have the dtype of x");
    bias_row = torch::stable::contiguous(*bias);
  }

  // Rows may be far apart, but all leading dimensions must fold into one stride; else x is copied.
  Tensor rows = x;
  int64_t M = 1, stride = K;
  for (int64_t d = 0; d < x.dim() - 1; d++) M *= x.size(d);
  if (x.dim() == 2 && x.stride(1) == 1) stride = x.stride(0);
  else if (!x.is_contiguous()) rows = torch::stable::contiguous(x);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim() - 1; d++) shape.push_back(x.size(d));
  shape.push_back(N);
  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  if (M == 0 || N == 0) return out;

  const Params params{rows.const_data_ptr(),
                      stride,
                      static_cast<const uint8_t*>(packed.const_data_ptr()),
                      bias ? bias_row.const_data_ptr() : nullptr,
                      out.mutable_data_ptr(),
                      dtype,
                      M,
                      weight,
                      mode,
                      useful_threads(M, weight)};
  select(kOp, kImpls, params).run(params);
  return out;
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto get = [&](const char* key, int64_t fallback) {
    const auto found = sizes.find(key);
    return found == sizes.end() ? fallback : found->second;
  };
  Params params{};
  params.M = get("M", 1);
  params.dtype = static_cast<DType>(get("dtype", 0));
  params.weight = weight_spec("quant_linear", get("N", 1), get("K", 1), get("format", 4), get("group_size", 32), get("zeros", 0));
  params.activations = activations_for("quant_linear", params.weight.format, get("activations", params.weight.format == Format::kFp8E4M3 ? 0 : 1));
  return explain_table("quant_linear", kImpls, params);
}

const bool registered = register_table("quant_linear", "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::quant_linear

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def(taut::quant_linear::kSchema); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("quant_linear", TORCH_BOX(&taut::quant_linear::quant_linear)); }
