// What TMA must know of a matrix in global memory, made on the host and passed to a kernel as __grid_constant__.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda.cuh"

#if !defined(TAUT_EMULATE)
#include <cuda.h>
#endif

namespace taut {

// A row-major matrix of 16-bit floats, `columns` by `rows`, read in boxes of 64 columns (the 128 bytes of the swizzle) by
// box_rows (at most 256) rows. data and row_bytes must be multiples of 16.
inline CUtensorMap tensor_map_16bit(const void* data, bool bf16, int64_t columns, int64_t rows, int64_t row_bytes, int box_rows) {
  CUtensorMap map;
#if defined(TAUT_EMULATE)
  (void)bf16;
  emulator::tensor_map_16bit(&map, data, columns, rows, row_bytes, 64, box_rows);
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
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)}, strides[1] = {static_cast<cuuint64_t>(row_bytes)};
  const cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, steps[2] = {1, 1};
  const CUresult status =
      encode(&map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(static_cast<int>(status)));
#endif
  return map;
}

}  // namespace taut
