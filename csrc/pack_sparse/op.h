// pack_sparse, unpack_sparse: between the canonical form of a sparse weight and Sparse8 (common/sparse.h).
#pragma once

#include "common/parallel.h"
#include "common/sparse.h"

namespace taut::pack_sparse {

constexpr const char* kPackSchema =
    "pack_sparse(Tensor codes, Tensor scales, Tensor meta, int in_features, int format, int group_size, int n, int m, int v) -> Tensor";
constexpr const char* kUnpackSchema =
    "unpack_sparse(Tensor packed, int out_features, int in_features, int format, int group_size, int n, int m, int v) -> (Tensor, Tensor, Tensor)";

struct Params {
  Sparse8 weight;
  uint8_t* codes;    // [N, kept_row_bytes]
  uint16_t* scales;  // [N, num_groups]
  uint8_t* meta;     // [meta_rows, meta_row_bytes]
  uint8_t* packed;
  int64_t num_threads;
};

namespace cpu_scalar {
void pack(const Params&);    // codes, scales, meta -> packed
void unpack(const Params&);  // packed -> codes, scales, meta
}  // namespace cpu_scalar

}  // namespace taut::pack_sparse
