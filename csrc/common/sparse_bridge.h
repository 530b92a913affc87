// Sparse weights as the ops take them: sizes checked, at the border to torch.
#pragma once

#include <sstream>

#include "common/sparse.h"
#include "common/torch_bridge.h"

namespace taut {

// Whether `format`, which may be of no format at all, is fp16 or bf16.
inline bool is_16bit_code(int64_t format) { return format == static_cast<int64_t>(Format::kFp16) || format == static_cast<int64_t>(Format::kBf16); }

inline Sparse8 sparse_weight(const char* op, int64_t N, int64_t K, int64_t format, int64_t group_size, int64_t n, int64_t m, int64_t v) {
  const bool numbers = is_16bit_code(format);
  WeightSpec spec = weight_spec(op, N, K, numbers ? static_cast<int64_t>(Format::kInt8) : format, group_size, false);
  check(numbers || spec.format == Format::kInt4 || spec.format == Format::kInt8 || spec.format == Format::kFp8E4M3, op,
        ": sparse weights are of format 4 (int4), 8 (int8), 9 (fp8_e4m3), 11 (fp16) or 12 (bf16), got ", format);
  check(!numbers || group_size == 0, op, ": group_size must be 0 for fp16 and bf16, which have no scales, got ", group_size);
  if (numbers) spec.format = static_cast<Format>(format);
  const SparsePattern pattern{n, m, v};
  check(pattern.is_known(), op, ": n:m must be 1:4, 2:4, 2:8 or 4:8, and v 1, 8 or 16, got ", n, ":", m, " and ", v);
  check(K % m == 0, op, ": K must be a multiple of ", m, ", got ", K);
  return {spec, pattern};
}

// Of the canonical form, in elements of codes_type.
inline int64_t code_columns(const Sparse8& w) { return is_16bit(w.spec.format) ? w.kept() : w.kept_row_bytes(); }

// A weight of any kind by the numbers that fused ops take: format is the code of a format, and for a sparse weight besides
// n << 8 | m << 12 | v << 16.
struct AnyWeight {
  WeightSpec spec;
  SparsePattern pattern;  // m = 0: dense
  int64_t packed_bytes() const { return pattern.m ? Sparse8{spec, pattern}.total_bytes() : Rows8{spec}.total_bytes(); }
};
inline AnyWeight any_weight(const char* op, int64_t N, int64_t K, int64_t format, int64_t group_size, bool zeros) {
  if (format < 256) return {weight_spec(op, N, K, format, group_size, zeros), {0, 0, 0}};
  check(!zeros, op, ": sparse weights have no zeros");
  const Sparse8 w = sparse_weight(op, N, K, format & 255, group_size, format >> 8 & 15, format >> 12 & 15, format >> 16);
  return {w.spec, w.pattern};
}

inline void check_sparse(const char* op, const Tensor& packed, int64_t bytes, CheckPlace check_place = check_cpu) {
  check_place(op, "packed", packed);
  check(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous() && packed.numel() == bytes, op,
        ": packed must be a contiguous uint8 tensor of ", bytes, " bytes, got ", shape_string(packed));
}

}  // namespace taut
