// COMPUTES  out[i,:] = dequant(table)[ids[i],:] in fp32, bf16 or fp16; a number is exact in double and rounded once to fp32
// LAYOUT    table: Rows8 (common/formats.h); a row is 4 bytes of every 32
// WORK      a task is a range of ids; a row goes block by block (32 k)
// BOUND     DRAM latency: a row's bytes lie in a strip of 8 rows, all of whose lines are touched. Decode asks for one row.
// LIMITS    none; any processor
#include <algorithm>

#include "common/codes.h"
#include "quant_embedding/op.h"

namespace taut::quant_embedding::cpu_scalar {

void run(const Params& p) {
  const Rows8 layout{p.table};
  const WeightSpec& w = p.table;
  const double global_scale = w.format == Format::kNvfp4 ? load_scale(ScaleType::kFp32, p.packed + layout.global_scale_offset()) : 1.0f;
  const int64_t step = w.group_size == 16 ? 16 : 32, num_tasks = std::clamp<int64_t>(p.count, 1, p.num_threads);
  parallel_tasks(num_tasks, [&](int64_t task) {
    for (int64_t i = p.count * task / num_tasks; i < p.count * (task + 1) / num_tasks; i++) {
      const int64_t n = p.ids[i];
      for (int64_t k = 0; k < w.K; k += step) {
        uint8_t codes[32];
        float values[32];
        load_rows8_codes(layout, p.packed + layout.block_offset(n, k), n, codes);
        const int64_t count = std::min(step, w.K - k);
        const double scale = load_scale(scale_type(w.format), p.packed + layout.scale_offset(n, k)) * global_scale;
        dequantize_codes(w.format, codes + k % 32, count, scale, w.zeros ? p.packed[layout.zero_offset(n, k)] : zero_code(w.format), values);
        for (int64_t j = 0; j < count; j++) store_float(p.out, i * w.K + k + j, p.dtype, values[j]);
      }
    }
  });
}

}  // namespace taut::quant_embedding::cpu_scalar
