// What is behind the Hopper wrappers of common/ptx.cuh: mbarrier, TMA, wgmma. See hopper.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda_emulator.h"

// In place of the driver's: what tensor_map_16bit() writes.
struct CUtensorMap {
  uint64_t opaque[16];
};

namespace emulator {

// On the host. box_columns * 2 bytes are the width of the 128-byte swizzle.
void tensor_map_16bit(CUtensorMap* map, const void* data, int64_t columns, int64_t rows, int64_t row_bytes, int box_columns, int box_rows, int64_t heads = 1,
                      int64_t head_bytes = 0, int64_t batches = 1, int64_t batch_bytes = 0);

void mbarrier_init(uint64_t* barrier, int count, Site site);
void mbarrier_arrive(uint64_t* barrier, int expected_bytes, Site site);
void mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site);
void fence_proxy_async(Site site);

void tma_load_2d(void* dst, const CUtensorMap* map, int inner, int outer, uint64_t* barrier, Site site);
void tma_load_4d(void* dst, const CUtensorMap* map, int inner, int outer, int head, int batch, uint64_t* barrier, Site site);
void bulk_load(void* dst, const void* src, int bytes, uint64_t* barrier, Site site);

uint32_t shared_address(const void* p);  // as a wgmma descriptor has it
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int pending, Site site);
void wgmma_m64k16(float* d, int n, const uint32_t* a, uint64_t b, bool bf16, bool adds, bool columns, Site site);

void stmatrix_x4_trans(void* row, const uint32_t* r, Site site);

inline uint32_t cvt_f16x2_e4m3x2(uint16_t bytes) {
  return float_to_half(e4m3_to_float(static_cast<uint8_t>(bytes))) | static_cast<uint32_t>(float_to_half(e4m3_to_float(static_cast<uint8_t>(bytes >> 8))))
                                                                         << 16;
}

}  // namespace emulator
