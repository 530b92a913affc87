// First include of every CUDA source: real CUDA under nvcc, or the emulator of tests/emulator when TAUT_EMULATE is defined
// and the same file is compiled as plain C++.
#pragma once

#include <cstdint>

#if defined(TAUT_EMULATE)
#include "cuda_emulator.h"
#define TAUT_DEVICE __attribute__((always_inline)) inline
// Dynamic shared memory, 1024-byte aligned (what a 128-byte swizzle needs).
#define TAUT_DYNAMIC_SMEM(name) unsigned char* name = emu_dynamic_smem()
#define TAUT_ARCH_AT_LEAST(sm) 1  // which kernel may run is decided on the host, by the emulated device
#define TAUT_EMULATED 1
#define TAUT_ARCH 120
#define TAUT_ARCH_90A 1
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define TAUT_EMULATED 0
#define TAUT_DEVICE __device__ __forceinline__
#define TAUT_DYNAMIC_SMEM(name)                                        \
  extern __shared__ __align__(1024) unsigned char taut_dynamic_smem[]; \
  unsigned char* name = taut_dynamic_smem
// WHY: one .cu is compiled for every SM of the build; a kernel's body is there only where its instructions exist.
#if defined(__CUDA_ARCH__)
#define TAUT_ARCH (__CUDA_ARCH__ / 10)
#else
#define TAUT_ARCH 0  // host pass: no body
#endif
#define TAUT_ARCH_AT_LEAST(sm) (TAUT_ARCH >= (sm))
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TAUT_ARCH_90A 1
#else
#define TAUT_ARCH_90A 0
#endif
#endif
