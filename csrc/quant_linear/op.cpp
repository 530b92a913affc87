#include "quant_linear/op.h"

#include <algorithm>
#include <sstream>

#include "common/impl.h"
#include "common/sparse_bridge.h"
#include "sparse_linear/op.h"

namespace taut::quant_linear {
namespace {

constexpr const char* kOp = "quant_linear";

const char* needs_int8(const Params& p) {  // every format that may be multiplied with int8 activations
  const bool int8 = p.activations == Activations::kInt8 || p.activations == Activations::kInt8Row || p.activations == Activations::kInt8Outliers;
  return int8 ? nullptr : "it computes with int8 activations";
}

const char* needs_float(const Params& p) { return p.activations == Activations::kFloat ? nullptr : "it computes with float activations"; }

const char* first_reason(const char* a, const char* b) { return a ? a : b; }

// Which of these kernels exist at all is a matter of the architecture this is compiled for.
#if defined(__x86_64__)
const char* needs_int8_avx2(const Params& p) { return first_reason(needs_avx2(p), needs_int8(p)); }

const char* needs_int8_avxvnni(const Params& p) { return first_reason(needs_avxvnni(p), needs_int8(p)); }

const char* needs_int8_avx512bw(const Params& p) { return first_reason(needs_avx512bw(p), needs_int8(p)); }

const char* needs_int8_avx512vnni(const Params& p) { return first_reason(needs_avx512vnni(p), needs_int8(p)); }

const char* needs_float_amx(const Params& p) {
  if (!cpu_features().amx) return "this processor has no AMX, or the system grants none";
  if (p.dtype != DType::kBFloat16) return "it computes with x in bfloat16";
  return needs_float(p);
}

const char* needs_int8_amx(const Params& p) {
  if (!cpu_features().amx) return "this processor has no AMX, or the system grants none";
  return p.activations == Activations::kInt8Outliers ? "it computes with int8 activations whose outliers are rounded too" : needs_int8(p);
}

const char* needs_float_avx2(const Params& p) { return first_reason(needs_avx2(p), needs_float(p)); }

const char* needs_float_avx512bf16(const Params& p) {
  if (const char* why = needs_avx512bf16(p)) return why;
  if (p.dtype != DType::kBFloat16) return "it computes with x in bfloat16";
  return needs_float(p);
}

const char* needs_float_avx512bw(const Params& p) { return first_reason(needs_avx512bw(p), needs_float(p)); }
#elif defined(__aarch64__)
const char* needs_int8_i8mm(const Params& p) { return cpu_features().i8mm ? needs_int8(p) : "this processor has no I8MM (smmla)"; }

const char* needs_int8_neondot(const Params& p) { return cpu_features().neondot ? needs_int8(p) : "this processor has no dot products (sdot)"; }

const char* needs_int8_neon(const Params& p) { return cpu_features().neon ? needs_int8(p) : "this processor has no NEON"; }

const char* needs_float_neon(const Params& p) { return cpu_features().neon ? needs_float(p) : "this processor has no NEON"; }
#endif

// The small loops stream the packed weights and unpack them in registers, for a few rows at a time; the tiles unpack
// 16 or 32 rows of w once to L1 and reuse them for every row of x.
// How many rows of x it takes to change that depends on the work of unpacking a code.
struct SmallRows {
  int64_t plain, int3, mxfp4, nvfp4, nf4, int8;  // plain: ternary, int2, int4
};
template <SmallRows kRows>
const char* int8_small_m(const Params& p) {
  const auto most = [&] {
    switch (p.weight.format) {
      case Format::kInt3: return kRows.int3;
      case Format::kMxfp4: return kRows.mxfp4;
      case Format::kNvfp4: return kRows.nvfp4;
      case Format::kNf4: return kRows.nf4;
      case Format::kInt8: return kRows.int8;
      default: return kRows.plain;
    }
  };
  return p.M <= most() ? nullptr : "for this many rows the tile is faster";
}
#if defined(__x86_64__)
const char* amx_int8_m(const Params& p) {
  const bool whole_rows = p.activations == Activations::kInt8Row && p.weight.group_size == 0;  // no scales within a row
  return p.M > (whole_rows ? 16 : 48) ? nullptr : "for this few rows AVX-512 VNNI is faster";
}
const char* avx512bf16_float_m(const Params& p) { return p.M > 4 ? nullptr : "up to M=4 streaming the weights is faster"; }
const char* amx_float_m(const Params& p) { return p.M > 8 ? nullptr : "up to M=8 a C tile is mostly empty"; }
constexpr auto int8_small_avx512vnni = int8_small_m<SmallRows{32, 24, 16, 12, 24, 32}>;
constexpr auto int8_small_avxvnni = int8_small_m<SmallRows{24, 16, 16, 4, 20, 24}>;
constexpr auto int8_small_avx512bw = int8_small_m<SmallRows{20, 8, 8, 8, 20, 24}>;
constexpr auto int8_small_avx2 = int8_small_m<SmallRows{12, 4, 8, 4, 4, 16}>;
#elif defined(__aarch64__)
constexpr auto int8_small_arm = int8_small_m<SmallRows{16, 16, 16, 16, 16, 16}>;  // not measured
#endif
const char* float_small_m(const Params& p) { return p.M <= 4 ? nullptr : "above M=4 the tile is faster"; }

// In priority order. Every crossover is in this table, and nowhere else.
constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_amx.int8_tile", needs_int8_amx, amx_int8_m, cpu_int8_amx::run},
    {"cpu_avx512vnni.int8_small", needs_int8_avx512vnni, int8_small_avx512vnni, cpu_int8_avx512vnni::run_small},
    {"cpu_avx512vnni.int8_tile", needs_int8_avx512vnni, always, cpu_int8_avx512vnni::run_tile},
    {"cpu_avxvnni.int8_small", needs_int8_avxvnni, int8_small_avxvnni, cpu_int8_avxvnni::run_small},
    {"cpu_avxvnni.int8_tile", needs_int8_avxvnni, always, cpu_int8_avxvnni::run_tile},
    {"cpu_avx512bw.int8_small", needs_int8_avx512bw, int8_small_avx512bw, cpu_int8_avx512bw::run_small},
    {"cpu_avx512bw.int8_tile", needs_int8_avx512bw, always, cpu_int8_avx512bw::run_tile},
    {"cpu_avx2.int8_small", needs_int8_avx2, int8_small_avx2, cpu_int8_avx2::run_small},
    {"cpu_avx2.int8_tile", needs_int8_avx2, always, cpu_int8_avx2::run_tile},
    {"cpu_amx.float_tile", needs_float_amx, amx_float_m, cpu_float_amx::run},
    {"cpu_avx512bf16.float_tile", needs_float_avx512bf16, avx512bf16_float_m, cpu_float_avx512bf16::run_tile},
    {"cpu_avx512bw.float_small", needs_float_avx512bw, float_small_m, cpu_float_avx512bw::run_small},
    {"cpu_avx512bw.float_tile", needs_float_avx512bw, always, cpu_float_avx512bw::run_tile},
    {"cpu_avx2.float_small", needs_float_avx2, float_small_m, cpu_float_avx2::run_small},
    {"cpu_avx2.float_tile", needs_float_avx2, always, cpu_float_avx2::run_tile},
#elif defined(__aarch64__)
    {"cpu_neondot.int8_small", needs_int8_neondot, int8_small_arm, cpu_int8_neondot::run_small},
    {"cpu_i8mm.int8_tile", needs_int8_i8mm, always, cpu_int8_i8mm::run_tile},
    {"cpu_neondot.int8_tile", needs_int8_neondot, always, cpu_int8_neondot::run_tile},
    {"cpu_neon.int8_small", needs_int8_neon, int8_small_arm, cpu_int8_neon::run_small},
    {"cpu_neon.int8_tile", needs_int8_neon, always, cpu_int8_neon::run_tile},
    {"cpu_neon.float_small", needs_float_neon, float_small_m, cpu_float_neon::run_small},
    {"cpu_neon.float_tile", needs_float_neon, always, cpu_float_neon::run_tile},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// A second thread costs about 4 us to start and join; one thread does this many multiply-adds in that time.
constexpr int64_t kMinWorkPerThread = 1 << 18;

Activations activations_for(const char* op, Format format, int64_t activations, bool sparse = false) {
  if (const char* why = refused_activations(format, activations, !sparse)) check(false, op, ": ", why, ", got ", activations);
  return static_cast<Activations>(activations);
}

// What both ops take; fused_linear gives the rest as well.
struct Call {
  const char* op;
  const Tensor& x;
  const Tensor& packed;
  const std::optional<Tensor>& bias;
  int64_t out_features, in_features, format, group_size;
  bool zeros;
  int64_t activations;
  Prologue prologue = Prologue::kNone;
  const Tensor* norm_weight = nullptr;
  double norm_eps = 0, norm_offset = 0;
  const Tensor* residual = nullptr;
};

Tensor linear(const Call& c) {
  const Tensor& x = c.x;
  const int64_t N = c.out_features, K = c.in_features, width = is_glu(c.prologue) ? 2 * K : K;
  check_cpu(c.op, "x", x);
  check_cpu(c.op, "packed", c.packed);
  const AnyWeight any = any_weight(c.op, N, K, c.format, c.group_size, c.zeros);
  const WeightSpec& weight = any.spec;
  const DType dtype = float_dtype(c.op, "x", x);
  check(c.packed.scalar_type() == ScalarType::Byte && c.packed.dim() == 1 && c.packed.is_contiguous(), c.op,
        ": packed must be a contiguous 1-D uint8 tensor from pack_weight");
  check(c.packed.numel() == any.packed_bytes(), c.op, ": packed holds ", c.packed.numel(), " bytes, but [", N, ", ", K, "] in this format takes ",
        any.packed_bytes(), "; is x's last dimension (", x.size(x.dim() - 1), ") the weight's in_features?");
  check(x.size(x.dim() - 1) == width, c.op, ": x must be [..., ", width, "] for this prologue, got ", shape_string(x));
  const Activations mode = activations_for(c.op, weight.format, c.activations, any.pattern.m != 0);
  Tensor bias_row;
  if (c.bias) {
    check_cpu(c.op, "bias", *c.bias);
    check(c.bias->dim() == 1 && c.bias->size(0) == N, c.op, ": bias must be [", N, "], got ", shape_string(*c.bias));
    check(c.bias->scalar_type() == x.scalar_type(), c.op, ": bias must have the dtype of x");
    bias_row = torch::stable::contiguous(*c.bias);
  }
  Tensor norm_row;
  if (c.prologue == Prologue::kRmsNorm) {
    check(c.norm_weight != nullptr, c.op, ": prologue 1 (rms_norm) needs norm_weight");
    check_cpu(c.op, "norm_weight", *c.norm_weight);
    check(c.norm_weight->dim() == 1 && c.norm_weight->size(0) == K, c.op, ": norm_weight must be [", K, "], got ", shape_string(*c.norm_weight));
    check(c.norm_weight->scalar_type() == x.scalar_type() || c.norm_weight->scalar_type() == ScalarType::Float, c.op,
          ": norm_weight must have the dtype of x or be float32");
    norm_row = torch::stable::contiguous(*c.norm_weight);
  } else {
    check(c.norm_weight == nullptr, c.op, ": norm_weight goes with prologue 1 (rms_norm) only");
  }

  // Rows may be far apart, but all leading dimensions must fold into one stride; else x is copied.
  Tensor rows = x;
  int64_t M = 1, stride = width;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim() - 1; d++) {
    M *= x.size(d);
    shape.push_back(x.size(d));
  }
  if (x.dim() == 2 && x.stride(1) == 1) stride = x.stride(0);
  else if (!x.is_contiguous()) rows = torch::stable::contiguous(x);
  shape.push_back(N);
  Tensor residual_rows;
  if (c.residual) {
    check_cpu(c.op, "residual", *c.residual);
    check(c.residual->scalar_type() == x.scalar_type(), c.op, ": residual must have the dtype of x");
    bool same = c.residual->dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); d++) same = c.residual->size(d) == shape[d];
    check(same, c.op, ": residual must have the shape of the output, got ", shape_string(*c.residual));
    residual_rows = torch::stable::contiguous(*c.residual);
  }
  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  if (M == 0 || N == 0) return out;

  Params params{rows.const_data_ptr(),
                stride,
                static_cast<const uint8_t*>(c.packed.const_data_ptr()),
                c.bias ? bias_row.const_data_ptr() : nullptr,
                out.mutable_data_ptr(),
                dtype,
                M,
                weight,
                mode,
                useful_threads(M, weight)};
  params.pattern = any.pattern;
  params.prologue = c.prologue;
  if (c.prologue == Prologue::kRmsNorm) {
    params.norm_weight = norm_row.const_data_ptr();
    params.norm_dtype = float_dtype(c.op, "norm_weight", norm_row);
    params.norm_eps = static_cast<float>(c.norm_eps);
    params.norm_offset = static_cast<float>(c.norm_offset);
  }
  if (c.residual) params.residual = residual_rows.const_data_ptr();
  choose(params)(params);
  return out;
}

Tensor quant_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features, int64_t format, int64_t group_size,
                    bool zeros, int64_t activations) {
  check(x.dim() >= 1, "quant_linear: x must be [..., K], got a scalar");
  return linear({kOp, x, packed, bias, out_features, x.size(x.dim() - 1), format, group_size, zeros, activations});
}

Tensor fused_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features, int64_t in_features, int64_t format,
                    int64_t group_size, bool zeros, int64_t activations, int64_t prologue, const std::optional<Tensor>& norm_weight, double norm_eps,
                    double norm_offset, const std::optional<Tensor>& residual) {
  constexpr const char* kFused = "fused_linear";
  check(x.dim() >= 1, kFused, ": x must be [..., K], got a scalar");
  check(0 <= prologue && prologue <= 4, kFused, ": prologue must be 0 (none), 1 (rms_norm), 2 (silu_glu), 3 (gelu_tanh_glu) or 4 (gelu_glu), got ", prologue);
  return linear({kFused, x, packed, bias, out_features, in_features, format, group_size, zeros, activations, static_cast<Prologue>(prologue),
                 norm_weight ? &*norm_weight : nullptr, norm_eps, norm_offset, residual ? &*residual : nullptr});
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto get = [&](const char* key, int64_t fallback) {
    const auto found = sizes.find(key);
    return found == sizes.end() ? fallback : found->second;
  };
  Params params{};
  params.M = get("M", 1);
  params.dtype = static_cast<DType>(get("dtype", 0));
  params.weight = weight_spec(kOp, get("N", 1), get("K", 1), get("format", 4), get("group_size", 32), get("zeros", 0));
  params.activations = activations_for(kOp, params.weight.format, get("activations", refused_activations(params.weight.format, 1) ? 0 : 1));
  return explain_table(kOp, kImpls, params);
}

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace

void (*choose(const Params& p))(const Params&) { return p.pattern.m ? sparse_linear::choose(p) : select(kOp, kImpls, p).run; }

int64_t useful_threads(int64_t M, const WeightSpec& weight) {
  const int64_t work = std::max<int64_t>(M, 1) * weight.N * weight.K;
  return std::clamp<int64_t>(work / kMinWorkPerThread, 1, torch::stable::get_num_threads());
}

}  // namespace taut::quant_linear

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def(taut::quant_linear::kSchema);
  m.def(taut::quant_linear::kFusedSchema);
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) {
  m.impl("quant_linear", TORCH_BOX(&taut::quant_linear::quant_linear));
  m.impl("fused_linear", TORCH_BOX(&taut::quant_linear::fused_linear));
}
