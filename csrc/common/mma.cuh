// What kernels share that are written once for sm_75 and for sm_80: there is no cp.async on the first, and no m16n8k16.
#pragma once

#include "common/cuda.cuh"
#include "common/ptx.cuh"

namespace taut {

// Each kernel's body is compiled for the devices that run it.
template <int kSm>
constexpr bool kCompiledFor = TAUT_EMULATED || (kSm >= 80 ? TAUT_ARCH >= kSm : TAUT_ARCH >= kSm && TAUT_ARCH < 80);

// 16 bytes from global to shared memory, or zeros. kDeferred: the bytes wait in a register (sm_75, where there is no
// cp.async) until `land`.
template <bool kDeferred>
struct Chunk {
  TAUT_DEVICE void fetch(void* dst, const void* src, int bytes) { ptx::cp_async_16(dst, src, bytes); }
  TAUT_DEVICE void land(void*) {}
};

template <>
struct Chunk<true> {
  uint4 bytes;
  TAUT_DEVICE void fetch(void*, const void* src, int size) { bytes = size ? *static_cast<const uint4*>(src) : make_uint4(0, 0, 0, 0); }
  TAUT_DEVICE void land(void* dst) { *static_cast<uint4*>(dst) = bytes; }
};

// d[16,8] += a[16,16] @ b[16,8]. T: half (all that sm_75 has) or __nv_bfloat16.
template <int kSm, class T>
TAUT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kSm >= 80) {
    ptx::mma_m16n8k16<T>(d, a, b0, b1);
  } else {  // registers 0 and 1 of A are its k 0..7, 2 and 3 its k 8..15
    ptx::mma_m16n8k8(d, a[0], a[1], b0);
    ptx::mma_m16n8k8(d, a[2], a[3], b1);
  }
}

}  // namespace taut
