#include <algorithm>

#include "common/cuda_archs.h"
#include "common/impl.h"
#include "common/torch_cuda.h"
#include "common/x8_bridge.h"
#include "pack_weight/op.h"
#include "quant_linear/op.h"

namespace taut::quant_linear {
namespace {

constexpr const char* kOp = "quant_linear";

// From how many rows on it pays to write w once as 16-bit numbers and leave the product to cuBLAS, which mma.sync does not
// reach at large M (on sm_100 the tensor cores want other instructions altogether). All crossovers of this file are
// predictions of bench/model.py, which no GPU has confirmed yet. For wgmma against cuBLAS they lie within what the model
// cannot know (0.8 to 1.1): wgmma runs, which needs no 16-bit copy of w.
int64_t dense_from(const CudaParams& p) {
  switch (p.device->sm) {
    case 89:
    case 120: return 3072;  // half the tensor rate for fp32 sums, so that mma.sync is close to cuBLAS
    case 100: return 96;
    default: return 1536;
  }
}
// The same for products that only the SIMT kernel could do.
constexpr int64_t kDenseOverSimtM = 16;
// From here on wgmma beats mma.sync; below it both wait for the weights, and mma.sync has smaller tiles.
constexpr int64_t kWgmmaM = 48;

const char* prefer_wgmma(const CudaParams& p) { return p.M >= kWgmmaM ? nullptr : "below M=48 mma.sync streams the weights as fast, and cuts K finer"; }

const char* prefer_mma(const CudaParams& p) {
  return p.batch_invariant || p.M < dense_from(p) ? nullptr : "for so many rows dequantizing once and cuBLAS are faster";
}

const char* dense_supported(const CudaParams& p) {
  if (p.activations != Activations::kFloat) return "it computes with float activations";
  return p.batch_invariant ? "cuBLAS chooses its kernels by M: not batch-invariant" : nullptr;
}

const char* simt_supported(const CudaParams& p) {
  return p.activations == Activations::kInt8Outliers ? "int8_outliers are for the CPU: here float activations cost no more" : nullptr;
}

const char* prefer_dense(const CudaParams& p) { return p.M >= kDenseOverSimtM ? nullptr : "for a few rows, writing w as floats costs more than it saves"; }

void run_dense(const CudaParams&) { throw std::logic_error("quant_linear calls product_in_parts itself: it needs tensors"); }

// `supported` of an impl whose kernels are in a file for this SM: whether the build has them for the device, too.
constexpr char kSm75[] = "75", kSm80[] = "80", kSm89[] = "89", kSm90a[] = "90a";
template <const char* kFile, const char* (*kSupported)(const CudaParams&)>
const char* built(const CudaParams& p) {
  if (const char* why = kSupported(p)) return why;
  return has_code(kFile, p.device->sm) ? nullptr : "this build of taut has no machine code of it for this GPU";
}

// In priority order. Every crossover is in this table, and nowhere else.
constexpr Impl<CudaParams> kImpls[] = {
    {"cuda_sm90a.wgmma", built<kSm90a, cuda_sm90a_wgmma::supported>, prefer_wgmma, cuda_sm90a_wgmma::run, cuda_sm90a_wgmma::workspace_bytes},
    {"cuda_sm89.fp8", built<kSm89, cuda_sm89_fp8::supported>, always, cuda_sm89_fp8::run, cuda_sm89_fp8::workspace_bytes},
    {"cuda_sm80.int8", built<kSm80, cuda_sm80_int8::supported>, always, cuda_sm80_int8::run, cuda_sm80_int8::workspace_bytes},
    {"cuda_sm80.mma", built<kSm80, cuda_sm80_mma::supported>, prefer_mma, cuda_sm80_mma::run, cuda_sm80_mma::workspace_bytes},
    {"cuda_sm75.mma", built<kSm75, cuda_sm75_mma::supported>, prefer_mma, cuda_sm75_mma::run, cuda_sm75_mma::workspace_bytes},
    {"cuda_sm75.dense", built<kSm75, dense_supported>, prefer_dense, run_dense},
    {"cuda_sm75.simt", built<kSm75, simt_supported>, always, cuda_sm75_simt::run},
};

Tensor quant_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features, int64_t format, int64_t group_size,
                    bool zeros, int64_t activations) {
  check(x.dim() >= 1, kOp, ": x must be [..., K], got a scalar");
  check_cuda_tensor(kOp, "x", x);
  check_same_device(kOp, "packed", packed, "x", x);
  const int64_t N = out_features, K = x.size(x.dim() - 1);
  const WeightSpec weight = weight_spec(kOp, N, K, format, group_size, zeros);
  check_mma_tiles(kOp, weight.format);
  const MmaTiles layout{weight};
  const DType dtype = float_dtype(kOp, "x", x);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), kOp,
        ": packed must be a contiguous 1-D uint8 tensor from pack_weight");
  check(packed.numel() == layout.total_bytes(), kOp, ": packed holds ", packed.numel(), " bytes, but [", N, ", ", K, "] in this format takes ",
        layout.total_bytes(), " on CUDA; is x's last dimension (", K, ") the weight's in_features?");
  check(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0, kOp, ": packed must begin at a multiple of 16 bytes");
  if (const char* why = refused_activations(weight.format, activations)) check(false, kOp, ": ", why, ", got ", activations);
  Tensor bias_row;
  if (bias) {
    check_same_device(kOp, "bias", *bias, "x", x);
    check(bias->dim() == 1 && bias->size(0) == N, kOp, ": bias must be [", N, "], got ", shape_string(*bias));
    check(bias->scalar_type() == x.scalar_type(), kOp, ": bias must have the dtype of x");
  }
  const CudaCall call(x);
  if (bias) bias_row = torch::stable::contiguous(*bias);

  // Rows may be far apart, but all leading dimensions must fold into one stride; else x is copied.
  Tensor rows = x;
  int64_t M = 1, stride = K;
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < x.dim() - 1; d++) M *= x.size(d), shape.push_back(x.size(d));
  shape.push_back(N);
  if (x.dim() == 2 && x.stride(1) == 1) stride = x.stride(0);
  else if (!x.is_contiguous()) rows = torch::stable::contiguous(x);
  check(M < int64_t{1} << 31, kOp, ": x may have at most 2^31 - 1 rows, got ", M);

  CudaParams params{};
  params.x = rows.const_data_ptr(), params.x_row_stride = stride, params.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  params.bias = bias ? bias_row.const_data_ptr() : nullptr;
  params.dtype = dtype, params.M = M, params.weight = weight, params.activations = static_cast<Activations>(activations);
  params.device = &call.device(), params.batch_invariant = batch_invariant(), params.stream = call.stream();
  const bool empty = M == 0 || N == 0;
  const Impl<CudaParams>* impl = empty ? nullptr : &select(kOp, kImpls, params);
  call.expose("x", rows);
  call.expose("packed", packed);
  if (bias) call.expose("bias", bias_row);
  if (impl && impl->run == run_dense)
    return product_in_parts(call, rows, bias, N, K, [&](void* w, int64_t begin, int64_t end) {
      pack_weight::cuda_sm75::dequantize(weight, params.packed, begin, end, w, dtype, params.stream);
    });

  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  if (empty) return out;
  params.out = out.mutable_data_ptr();
  call.expose("out", out, true);
  std::optional<QuantizedX> x8;
  if (params.activations != Activations::kFloat) {
    x8.emplace(call, x, params, false);
    params.x8 = x8->rows;
  }
  Tensor scratch;
  if (const int64_t bytes = impl->workspace_bytes ? impl->workspace_bytes(params) : 0; bytes > 0) {
    scratch = scratch_bytes(x, bytes);
    params.workspace = aligned(scratch);
    call.expose("workspace", params.workspace, bytes, true);
  }
  impl->run(params);
  return out;
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  const auto get = [&](const char* key, int64_t fallback) {
    const auto found = sizes.find(key);
    return found == sizes.end() ? fallback : found->second;
  };
  CudaParams params{};
  params.M = get("M", 1);
  params.dtype = static_cast<DType>(get("dtype", static_cast<int64_t>(DType::kFloat16)));
  params.weight = weight_spec(kOp, get("N", 1), get("K", 1), get("format", 4), get("group_size", 32), get("zeros", 0));
  check_mma_tiles(kOp, params.weight.format);
  params.x_row_stride = params.weight.K;
  const int64_t activations = get("activations", 0);
  if (const char* why = refused_activations(params.weight.format, activations, true)) check(false, kOp, ": ", why, ", got ", activations);
  params.activations = static_cast<Activations>(activations);
  params.device = &device(static_cast<int>(get("device_index", 0)));
  params.batch_invariant = batch_invariant();
  return explain_table(kOp, kImpls, params);
}

const bool registered = register_table(kOp, TAUT_CUDA_DEVICE, kImpls, explain);

}  // namespace
}  // namespace taut::quant_linear

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) { m.def(taut::quant_linear::kSchema); }
#endif
TAUT_CUDA_LIBRARY(m) { m.impl("quant_linear", TORCH_BOX(&taut::quant_linear::quant_linear)); }
