// Sparse weights as the ops take them: sizes checked, at the border to torch.
#pragma once

#include <sstream>

#include "common/sparse.h"
#include "common/torch_bridge.h"

namespace taut {

inline Sparse8 sparse_weight(const char* op, int64_t N, int64_t K, int64_t format, int64_t group_size, int64_t n, int64_t m, int64_t v) {
  const WeightSpec spec = weight_spec(op, N, K, format, group_size, false);
  check(spec.format == Format::kInt4 || spec.format == Format::kInt8 || spec.format == Format::kFp8E4M3, op,
        ": sparse weights are of format 4 (int4), 8 (int8) or 9 (fp8_e4m3), got ", format);
  const SparsePattern pattern{n, m, v};
  check(pattern.is_known(), op, ": n:m must be 1:4, 2:4, 2:8 or 4:8, and v 1, 8 or 16, got ", n, ":", m, " and ", v);
  check(K % m == 0, op, ": K must be a multiple of ", m, ", got ", K);
  return {spec, pattern};
}

inline void check_sparse(const char* op, const Tensor& packed, int64_t bytes, CheckPlace check_place = check_cpu) {
  check_place(op, "packed", packed);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() && packed.numel() == bytes, op,
        ": packed must be a contiguous uint8 tensor of ", bytes, " bytes, got ", shape_string(packed));
}

}  // namespace taut
