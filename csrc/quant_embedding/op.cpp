#include "quant_embedding/op.h"

#include <algorithm>
#include <sstream>

#include "common/impl.h"
#include "common/torch_bridge.h"

namespace taut::quant_embedding {
namespace {

constexpr Impl<Params> kImpls[] = {
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// A row of 4096 numbers takes about as long as a second thread to start and join.
constexpr int64_t kMinNumbersPerThread = 4096;

Tensor quant_embedding(const Tensor& ids, const Tensor& packed, int64_t rows, int64_t columns, int64_t format, int64_t group_size, bool zeros,
                       ScalarType dtype) {
  constexpr const char* kOp = "quant_embedding";
  check_cpu(kOp, "ids", ids);
  check_cpu(kOp, "packed", packed);
  check(ids.scalar_type() == ScalarType::Long, kOp, ": ids must be int64");
  const WeightSpec table = weight_spec(kOp, rows, columns, format, group_size, zeros);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() && packed.numel() == Rows8{table}.total_bytes(), kOp,
        ": packed must be a contiguous uint8 tensor of ", Rows8{table}.total_bytes(), " bytes, got ", shape_string(packed));
  const Tensor flat = torch::stable::contiguous(ids);
  const auto* first = static_cast<const int64_t*>(flat.const_data_ptr());
  const int64_t count = flat.numel();
  for (int64_t i = 0; i < count; i++) check(0 <= first[i] && first[i] < rows, kOp, ": an id must be 0..", rows - 1, ", got ", first[i]);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d < ids.dim(); d++) shape.push_back(ids.size(d));
  shape.push_back(columns);
  Tensor out = torch::stable::new_empty(packed, torch::headeronly::IntHeaderOnlyArrayRef(shape.data(), shape.size()), dtype);
  const DType out_dtype = float_dtype(kOp, "dtype", out);
  if (count == 0) return out;
  const int64_t num_threads = std::clamp<int64_t>(count * columns / kMinNumbersPerThread, 1, torch::stable::get_num_threads());
  const Params params{first, count, static_cast<const uint8_t*>(packed.const_data_ptr()), table, out.mutable_data_ptr(), out_dtype, num_threads};
  select(kOp, kImpls, params).run(params);
  return out;
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table("quant_embedding", kImpls, Params{}); }

const bool registered = register_table("quant_embedding", "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::quant_embedding

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) {
  m.def("quant_embedding(Tensor ids, Tensor packed, int rows, int columns, int format, int group_size, bool zeros, ScalarType dtype) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("quant_embedding", TORCH_BOX(&taut::quant_embedding::quant_embedding)); }
