// quant_embedding: out[i,:] = dequant(table)[ids[i],:], a table of embeddings in a low-bit format (common/formats.h).
#pragma once

#include "common/dtypes.h"
#include "common/formats.h"
#include "common/parallel.h"

namespace taut::quant_embedding {

struct Params {
  const int64_t* ids;     // [count], each in [0, table.N)
  int64_t count;          //
  const uint8_t* packed;  // Rows8
  WeightSpec table;       // [rows, columns]
  void* out;              // [count, columns], in `dtype`
  DType dtype;
  int64_t num_threads;
};

namespace cpu_scalar {
void run(const Params&);
}

}  // namespace taut::quant_embedding
