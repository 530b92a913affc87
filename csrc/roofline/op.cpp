#include "roofline/op.h"

#include <numeric>
#include <sstream>

#include "common/impl.h"
#include "common/torch_bridge.h"

namespace taut::roofline {
namespace {

constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx512bf16", needs_avx512bf16, always, cpu_avx512bf16::run},
    {"cpu_avx512vnni", needs_avx512vnni, always, cpu_avx512vnni::run},
    {"cpu_avx2", needs_avx2, always, cpu_avx2::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

Tensor roofline(const Tensor& buffer, int64_t ceiling, int64_t streams, int64_t steps) {
  constexpr const char* kOp = "roofline";
  check_cpu(kOp, "buffer", buffer);
  check(ceiling >= 0 && ceiling <= 3, kOp, ": ceiling must be 0 (read), 1 (fp32), 2 (int8) or 3 (bf16), got ", ceiling);
  check(buffer.scalar_type() == ScalarType::Long && buffer.dim() == 1 && buffer.is_contiguous(), kOp, ": buffer must be a contiguous 1-D int64 tensor");
  check(streams == 1 || streams == 2 || streams == 4 || streams == kMaxStreams, kOp, ": streams must be 1, 2, 4 or 8, got ", streams);
  check(steps >= 0 && steps <= kMaxSteps, kOp, ": steps must be 0..", kMaxSteps, ", got ", steps);
  const int64_t num_threads = torch::stable::get_num_threads();
  std::vector<uint64_t> results(num_threads);
  const Params params{
      static_cast<Ceiling>(ceiling), static_cast<const uint64_t*>(buffer.const_data_ptr()), buffer.numel(), streams, steps, results.data(), num_threads};
  select(kOp, kImpls, params).run(params);
  const int64_t shape[] = {1};
  Tensor out = torch::stable::new_empty(buffer, torch::headeronly::IntHeaderOnlyArrayRef(shape, 1));
  *static_cast<int64_t*>(out.mutable_data_ptr()) = static_cast<int64_t>(std::accumulate(results.begin(), results.end(), uint64_t{0}));
  return out;
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>&) { return explain_table("roofline", kImpls, Params{}); }

const bool registered = register_table("roofline", "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::roofline

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def("roofline(Tensor buffer, int ceiling, int streams, int steps) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("roofline", TORCH_BOX(&taut::roofline::roofline)); }
