#include "common/cuda_archs.h"
#include "common/impl.h"
#include "common/sparse_bridge.h"
#include "common/torch_cuda.h"
#include "common/x8_bridge.h"
#include "pack_sparse/op.h"
#include "sparse_linear/op.h"

namespace taut::sparse_linear {
namespace {

using quant_linear::Activations;
using quant_linear::QuantizedX;

constexpr const char* kOp = "sparse_linear";

// From how many rows on cuBLAS, with w written as dense 16-bit numbers, is faster. mma.sp has twice cuBLAS's peak where mma.sync is what the tensor
// cores are for, and more than half of it is within reach. Predicted, as the crossovers of quant_linear are; no GPU has confirmed it.
int64_t dense_from(const CudaParams& p) { return p.device->sm == 100 ? 192 : INT64_MAX; }

const char* prefer_mma(const CudaParams& p) {
  return p.batch_invariant || p.M < dense_from(p) ? nullptr : "for so many rows making w dense once and cuBLAS are faster";
}

const char* dense_supported(const CudaParams& p) {
  if (p.activations != Activations::kFloat) return "it computes with float activations";
  return p.batch_invariant ? "cuBLAS chooses its kernels by M: not batch-invariant" : nullptr;
}

// Writing w as numbers and reading it again takes 4 bytes a weight, some nine times what it takes sparse.
const char* prefer_dense(const CudaParams& p) { return p.M >= 16 ? nullptr : "for a few rows, writing w as floats costs more than it saves"; }

void run_dense(const CudaParams&) { throw std::logic_error("sparse_linear calls product_in_parts itself: it needs tensors"); }

// `supported` of an impl whose kernels are in a file for this SM: whether the build has them for the device, too.
constexpr char kSm75[] = "75", kSm80[] = "80", kSm89[] = "89";
template <const char* kFile, const char* (*kSupported)(const CudaParams&)>
const char* built(const CudaParams& p) {
  if (const char* why = kSupported(p)) return why;
  return has_code(kFile, p.device->sm) ? nullptr : "this build of taut has no machine code of it for this GPU";
}

// In priority order. Every crossover is in this table, and nowhere else.
constexpr Impl<CudaParams> kImpls[] = {
    {"cuda_sm89.fp8", built<kSm89, cuda_sm89_fp8::supported>, always, cuda_sm89_fp8::run, cuda_sm89_fp8::workspace_bytes},
    {"cuda_sm80.int8", built<kSm80, cuda_sm80_int8::supported>, always, cuda_sm80_int8::run, cuda_sm80_int8::workspace_bytes},
    {"cuda_sm80.mma", built<kSm80, cuda_sm80_mma::supported>, prefer_mma, cuda_sm80_mma::run, cuda_sm80_mma::workspace_bytes},
    {"cuda_sm75.dense", built<kSm75, dense_supported>, prefer_dense, run_dense},
    {"cuda_sm75.simt", built<kSm75, always<CudaParams>>, always, cuda_sm75_simt::run},
};

Activations activations_for(Format format, int64_t activations) {
  if (const char* why = quant_linear::refused_activations(format, activations)) check(false, kOp, ": ", why, ", got ", activations);
  return static_cast<Activations>(activations);
}

Tensor sparse_linear(const Tensor& x, const Tensor& packed, const std::optional<Tensor>& bias, int64_t out_features, int64_t format, int64_t group_size,
                     int64_t n, int64_t m, int64_t v, int64_t activations) {
  check(x.dim() >= 1, kOp, ": x must be [..., K], got a scalar");
  check_cuda_tensor(kOp, "x", x);
  check_same_device(kOp, "packed", packed, "x", x);
  const int64_t N = out_features, K = x.size(x.dim() - 1);
  const Sparse8 canonical = sparse_weight(kOp, N, K, format, group_size, n, m, v);
  const SparseTiles w{canonical.spec, canonical.pattern};
  check_sparse(kOp, packed, w.total_bytes(), check_cuda_tensor);
  check(reinterpret_cast<uintptr_t>(packed.const_data_ptr()) % 16 == 0, kOp, ": packed must begin at a multiple of 16 bytes");
  CudaParams params{};
  params.dtype = float_dtype(kOp, "x", x);
  params.activations = activations_for(w.spec.format, activations);
  if (bias) {
    check_same_device(kOp, "bias", *bias, "x", x);
    check(bias->dim() == 1 && bias->size(0) == N && bias->scalar_type() == x.scalar_type(), kOp, ": bias must be [", N, "] in the dtype of x, got ",
          shape_string(*bias));
  }
  const CudaCall call(x);
  std::optional<Tensor> bias_row;
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

  params.x = rows.const_data_ptr(), params.x_row_stride = stride, params.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  params.bias = bias_row ? bias_row->const_data_ptr() : nullptr;
  params.M = M, params.weight = w.spec, params.pattern = w.pattern;
  params.device = &call.device(), params.batch_invariant = batch_invariant(), params.stream = call.stream();
  const bool empty = M == 0 || N == 0;
  const Impl<CudaParams>* impl = empty ? nullptr : &select(kOp, kImpls, params);
  call.expose("x", rows);
  call.expose("packed", packed);
  if (bias_row) call.expose("bias", *bias_row);
  if (impl && impl->run == run_dense)
    return product_in_parts(call, rows, bias_row, N, K, [&](void* to, int64_t begin, int64_t end) {
      pack_sparse::cuda_sm75::dequantize(w, params.packed, begin, end, to, params.dtype, params.stream);
    });

  Tensor out = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()));
  if (empty) return out;
  params.out = out.mutable_data_ptr();
  call.expose("out", out, true);
  std::optional<QuantizedX> x8;
  if (params.activations != Activations::kFloat) {
    x8.emplace(call, x, params, true);
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
  const int64_t format = get("format", 4);
  const Sparse8 w =
      sparse_weight(kOp, get("N", 16), get("K", 32), format, get("group_size", is_16bit_code(format) ? 0 : 32), get("n", 2), get("m", 4), get("v", 1));
  params.weight = w.spec, params.pattern = w.pattern, params.x_row_stride = w.spec.K;
  params.activations = activations_for(w.spec.format, get("activations", 0));
  params.device = &device(static_cast<int>(get("device_index", 0)));
  params.batch_invariant = batch_invariant();
  return explain_table(kOp, kImpls, params);
}

const bool registered = register_table(kOp, TAUT_CUDA_DEVICE, kImpls, explain);

}  // namespace
}  // namespace taut::sparse_linear

#if defined(TAUT_EMULATE)
TAUT_CUDA_SCHEMAS(m) { m.def(taut::sparse_linear::kSchema); }
#endif
TAUT_CUDA_LIBRARY(m) { m.impl("sparse_linear", TORCH_BOX(&taut::sparse_linear::sparse_linear)); }
