// What the kernels share that do attention on mma.sync: rows in shared memory, and rows that cannot be copied there 16 bytes at a time.
#pragma once

#include <type_traits>

#include "common/attention.h"
#include "common/launch.h"
#include "common/mma.cuh"
#include "common/numbers.cuh"
#include "common/ptx.cuh"

namespace taut {
namespace {

// Where chunk c (16 bytes) of a row of kChunks is in shared memory, so that neither 8 rows of ldmatrix nor a copied row meets a bank conflict.
// WHY the second: rows of an odd number of half lines (96 numbers) lie in turn in either half.
template <int kChunks>
TAUT_DEVICE int chunk_offset(int row, int chunk) {
  return row * kChunks * 16 + (chunk ^ (kChunks % 8 == 0 ? row & 7 : row >> 1 & 3)) * 16;
}

// Rows that cannot be copied 16 bytes at a time, moved to where they can: [all heads][rows][aligned_width]; padding is 0.
__global__ void __launch_bounds__(256)
    attention_align(const Heads from, int heads, int64_t rows, int64_t all_rows, int width, uint16_t* aligned, int aligned_width) {
  for (int64_t i = blockIdx.x * 256ll + threadIdx.x; i < all_rows * aligned_width; i += gridDim.x * 256ll) {
    const int64_t row = i / aligned_width, head = row / rows;
    const int d = static_cast<int>(i - row * aligned_width);
    const int64_t at = head / heads * from.batch_stride + head % heads * from.head_stride + row % rows * from.row_stride + d;
    aligned[i] = d < width ? static_cast<const uint16_t*>(from.data)[at] : uint16_t{0};
  }
}

// ---- Host --------------------------------------------------------------------------------------------------------------

inline int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }
inline int64_t whole_256(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// The bytes that align_heads wants for this tensor; 0 if it is aligned as it lies.
inline int64_t aligned_bytes(const Heads& t, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  const bool fits = reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (width | t.batch_stride | t.head_stride | t.row_stride) % 8 == 0;
  return fits ? 0 : whole_256(batch * heads * rows * padded(width) * 2);
}

// Copies to `at`, and makes t what lies there.
inline void align_heads(const char* name, Heads& t, void* at, int64_t batch, int64_t heads, int64_t rows, int64_t width, const Device& device, void* stream) {
  const int64_t all_rows = batch * heads * rows, wide = padded(width);
  const int64_t blocks = std::min<int64_t>((all_rows * wide + 255) / 256, 8 * device.sm_count);
  if (blocks > 0)
    launch(name, attention_align, dim3(static_cast<unsigned>(blocks)), dim3(256), 0, stream, t, static_cast<int>(heads), rows, all_rows,
           static_cast<int>(width), static_cast<uint16_t*>(at), static_cast<int>(wide));
  t = {at, batch == 1 ? 0 : heads * rows * wide, rows * wide, wide};
}

}  // namespace
}  // namespace taut
