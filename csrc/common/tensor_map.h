// What TMA must know of a matrix in global memory, made on the host and passed to a kernel as __grid_constant__.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda.cuh"

#if !defined(TAUT_EMULATE)
#include <cuda.h>
#endif

namespace taut {

// 16-bit floats [batches][heads][rows][columns], rows contiguous, read in boxes of 64 columns (the 128 bytes of the swizzle) by box_rows (at most
// 256) rows of one head. data and the strides, in bytes, must be multiples of 16.
struct TensorOfHeads {
  const void* data;
  int64_t columns, rows, heads, batches;
  int64_t row_bytes, head_bytes, batch_bytes;
};
inline CUtensorMap tensor_map_16bit(const TensorOfHeads& t, bool bf16, int box_rows, int dimensions = 4) {
  CUtensorMap map;
#if defined(TAUT_EMULATE)
  (void)bf16, (void)dimensions;
  emulator::tensor_map_16bit(&map, t.data, t.columns, t.rows, t.row_bytes, 64, box_rows, t.heads, t.head_bytes, t.batches, t.batch_bytes);
#else
  // WHY by the runtime: linking libcuda would tie the library to machines that have a driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
      cudaGetLastError();
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; it must be of CUDA 12.0 or newer");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(t.columns), static_cast<cuuint64_t>(t.rows), static_cast<cuuint64_t>(t.heads),
                               static_cast<cuuint64_t>(t.batches)};
  const cuuint64_t strides[3] = {static_cast<cuuint64_t>(t.row_bytes), static_cast<cuuint64_t>(t.head_bytes), static_cast<cuuint64_t>(t.batch_bytes)};
  const cuuint32_t box[4] = {64, static_cast<cuuint32_t>(box_rows), 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult status = encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, static_cast<cuuint32_t>(dimensions),
                                 const_cast<void*>(t.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(status)));
#endif
  return map;
}
// A row-major matrix: two dimensions.
inline CUtensorMap tensor_map_16bit(const void* data, bool bf16, int64_t columns, int64_t rows, int64_t row_bytes, int box_rows) {
  return tensor_map_16bit({data, columns, rows, 1, 1, row_bytes, 0, 0}, bf16, box_rows, 2);
}

}  // namespace taut
