#include "sparse_linear/op.h"

#include <algorithm>
#include <sstream>
#include <vector>

#include "common/impl.h"
#include "common/sparse_bridge.h"

namespace taut::sparse_linear {
namespace {

using quant_linear::Activations;

constexpr const char* kOp = "sparse_linear";

const char* codes(const Params& p) { return is_16bit(p.weight.format) ? "it computes with low-bit weights" : nullptr; }

#if defined(__x86_64__)
const char* integers(const Params& p) {
  if (p.activations != Activations::kInt8 && p.activations != Activations::kInt8Row) return "it computes with int8 activations";
  return p.weight.format == Format::kFp8E4M3 ? "it computes with integer weights" : nullptr;
}
const char* needs_rows(const Params& p) { return p.pattern.v == 1 && p.pattern.n == 2 && p.pattern.m == 4 ? integers(p) : "it computes with 2:4 alone"; }
const char* needs_vectors(const Params& p) {
  if (p.pattern.v != 16) return "it computes where 16 rows share their places";
  return p.pattern.n * 2 == p.pattern.m ? integers(p) : "it computes with 2:4 and 4:8";
}
const char* needs_numbers(const Params& p) { return is_16bit(p.weight.format) ? nullptr : "it computes with 16-bit weights"; }
const char* needs_number_pairs(const Params& p) {
  return p.pattern.v == 8 ? "it computes where each row has places of its own, or 16 share them" : needs_numbers(p);
}

const char* needs_bf16(const Params& p) {
  if (p.dtype != DType::kBFloat16) return "it computes with bf16 x";
  return p.weight.format == Format::kBf16 ? nullptr : "it computes with bf16 weights";
}

using Needs = const char*(const Params&);
template <Needs& first, Needs& second>
const char* both(const Params& p) {
  const char* why = first(p);
  return why ? why : second(p);
}

// Where rows share places, only what is kept is multiplied, for any number of rows of x.
const char* few_rows_of_numbers(const Params& p) { return p.M <= 8 || p.pattern.v > 1 ? nullptr : "for this many rows of x unpacked panels are faster"; }
const char* many_rows_of_numbers(const Params& p) { return few_rows_of_numbers(p) ? nullptr : "multiplying what is kept alone is faster here"; }

// Beyond some rows of x unpacking w once for all of them costs less than picking x for each row of w; for bytes without VNNI, which are multiplied in
// two passes then, later. One row: memory binds, and AVX2 and AVX-512 read it equally fast, within 2% (Zen 4).
const char* few_rows(const Params& p) { return p.M <= 8 ? nullptr : "for this many rows of x unpacked panels are faster"; }
const char* few_rows_avx2(const Params& p) {
  const bool two_passes = p.weight.format == Format::kInt8 && !cpu_features().avxvnni && !cpu_features().avx512vnni;
  return two_passes && p.M <= 32 ? nullptr : few_rows(p);
}
const char* few_rows_of_vectors(const Params& p) { return p.M <= 7 ? nullptr : "for this many rows of x unpacked panels are faster"; }
const char* without_amx(const Params& p) { return p.M <= 32 || !cpu_features().amx ? nullptr : "for this many rows of x AMX with a dense weight is faster"; }
#endif

// In priority order. Every crossover is in this table, and nowhere else.
constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx512vnni.int8_vectors_small", both<needs_avx512vnni, needs_vectors>, few_rows_of_vectors, cpu_avx512vnni::run_vectors_small},
    {"cpu_avx2.int8_vectors_small", both<needs_avx2, needs_vectors>, few_rows_of_vectors, cpu_avx2::run_vectors_small},
    {"cpu_avx512vnni.int8_vectors", both<needs_avx512vnni, needs_vectors>, without_amx, cpu_avx512vnni::run_vectors},
    {"cpu_avx512vnni.int8_rows", both<needs_avx512vnni, needs_rows>, few_rows, cpu_avx512vnni::run_rows},
    {"cpu_avx2.int8_vectors", both<needs_avx2, needs_vectors>, without_amx, cpu_avx2::run_vectors},
    {"cpu_avx2.int8_rows", both<needs_avx2, needs_rows>, few_rows_avx2, cpu_avx2::run_rows},
    {"cpu_avx512vnni.int8_tile", both<needs_avx512vnni, integers>, without_amx, cpu_avx512vnni::run_tile},
    {"cpu_avxvnni.int8_tile", both<needs_avxvnni, integers>, without_amx, cpu_avxvnni::run_tile},
    {"cpu_avx512bw.int8_tile", both<needs_avx512bw, integers>, without_amx, cpu_avx512bw::run_tile},
    {"cpu_avx2.int8_tile", both<needs_avx2, integers>, without_amx, cpu_avx2::run_tile},
    {"cpu_avx512bw.float_small", both<needs_avx512bw, needs_number_pairs>, few_rows_of_numbers, cpu_float_avx512bw::run_small},
    {"cpu_avx512bf16.float_tile", both<needs_avx512bf16, needs_bf16>, many_rows_of_numbers, cpu_float_avx512bf16::run_tile},
    {"cpu_avx512bw.float_tile", both<needs_avx512bw, needs_numbers>, many_rows_of_numbers, cpu_float_avx512bw::run_tile},
    {"cpu_avx2.float_small", both<needs_avx2, needs_numbers>, few_rows_of_numbers, cpu_float_avx2::run_small},
    {"cpu_avx2.float_tile", both<needs_avx2, needs_numbers>, always, cpu_float_avx2::run_tile},
    {"cpu_avx2.dense", both<needs_avx2, codes>, always, cpu_avx2::run_dense},
#endif
    {"cpu_dense", codes, always, cpu_dense::run},
    {"cpu_scalar", always, always, cpu_scalar::run},
};

Activations activations_for(Format format, int64_t activations) {
  if (const char* why = quant_linear::refused_activations(format, activations)) check(false, kOp, ": ", why, ", got ", activations);
  return static_cast<Activations>(activations);
}

Tensor sparse_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features, int64_t format, int64_t group_size,
                     int64_t n, int64_t m, int64_t v, int64_t activations) {
  check(x.dim() >= 1, kOp, ": x must be [..., K], got a scalar");
  const int64_t N = out_features, K = x.size(x.dim() - 1);
  check_cpu(kOp, "x", x);
  const Sparse8 w = sparse_weight(kOp, N, K, format, group_size, n, m, v);
  check_sparse(kOp, packed, w.total_bytes());
  const DType dtype = float_dtype(kOp, "x", x);
  const Activations mode = activations_for(w.spec.format, activations);
  Tensor bias_row;
  if (bias) {
    check_cpu(kOp, "bias", *bias);
    check(bias->dim() == 1 && bias->size(0) == N && bias->scalar_type() == x.scalar_type(), kOp, ": bias must be [", N, "] in the dtype of x, got ",
          shape_string(*bias));
    bias_row = torch::stable::contiguous(*bias);
  }
  // Rows may be far apart, but all leading dimensions must fold into one stride; else x is copied.
  Tensor rows = x;
  int64_t M = 1, stride = K;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim() - 1; d++) M *= x.size(d), shape.push_back(x.size(d));
  if (x.dim() == 2 && x.stride(1) == 1) stride = x.stride(0);
  else if (!x.is_contiguous()) rows = torch::stable::contiguous(x);
  shape.push_back(N);
  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  if (M == 0 || N == 0) return out;
  Params params{};
  params.x = rows.const_data_ptr(), params.x_row_stride = stride;
  params.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  params.bias = bias ? bias_row.const_data_ptr() : nullptr;
  params.out = out.mutable_data_ptr(), params.dtype = dtype, params.M = M;
  params.weight = w.spec, params.pattern = w.pattern, params.activations = mode;
  params.num_threads = quant_linear::useful_threads(M, w.spec);
  sparse_linear::choose(params)(params);
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
  const int64_t format = get("format", 8);
  const Sparse8 w =
      sparse_weight(kOp, get("N", 16), get("K", 32), format, get("group_size", is_16bit_code(format) ? 0 : 32), get("n", 2), get("m", 4), get("v", 1));
  params.weight = w.spec, params.pattern = w.pattern;
  params.activations = activations_for(w.spec.format, get("activations", w.spec.format == Format::kInt8 || w.spec.format == Format::kInt4 ? 1 : 0));
  return explain_table(kOp, kImpls, params);
}

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace

void (*choose(const Params& p))(const Params&) { return select(kOp, kImpls, p).run; }

}  // namespace taut::sparse_linear

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def(taut::sparse_linear::kSchema); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("sparse_linear", TORCH_BOX(&taut::sparse_linear::sparse_linear)); }
