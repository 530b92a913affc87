// pack_sparse, unpack_sparse: between the canonical form of a sparse weight and the layout of a device, Sparse8 or SparseTiles (common/sparse.h).
#pragma once

#include "common/dtypes.h"
#include "common/parallel.h"
#include "common/sparse.h"

namespace taut::pack_sparse {

constexpr const char* kPackSchema =
    "pack_sparse(Tensor codes, Tensor scales, Tensor meta, int in_features, int format, int group_size, int n, int m, int v, int layout=0) -> Tensor";
constexpr const char* kUnpackSchema =
    "unpack_sparse(Tensor packed, int out_features, int in_features, int format, int group_size, int n, int m, int v, int layout=0) -> (Tensor, Tensor, "
    "Tensor)";

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
// The same where packed is in SparseTiles.
void pack_tiles(const Params&);
void unpack_tiles(const Params&);
}  // namespace cpu_scalar

// Between the canonical form and SparseTiles, on a CUDA device.
namespace cuda_sm75 {
// `descents` is 0; it becomes 1 + a row of meta whose places do not ascend, if there is one.
void check_places(const Params&, int32_t* descents, void* stream);
void pack(const Params&, void* stream);
void unpack(const Params&, void* stream);
// Rows [row_begin, row_end) of w as numbers, zeros written out, to out[row_end - row_begin, K].
void dequantize(const SparseTiles&, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType, void* stream);
}  // namespace cuda_sm75

}  // namespace taut::pack_sparse
