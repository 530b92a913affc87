// What CUDA sources see in place of the GPU when they are compiled as C++ with TAUT_EMULATE: built-in variables, barriers,
// shuffles, atomics, intrinsics, and the functions behind the wrappers of common/ptx.cuh. The runtime behind it is built from
// the .cpp files of this folder and is never instrumented, so that the checks of the checked mode see kernels only.
//
// Vector types, qualifiers (as empty macros), half and bfloat16 come from NVIDIA's own headers.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

// NVIDIA's headers last: they define macros such as __noinline__.
#include <cuda_runtime.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Static shared memory is the thread-local segment of the library: one block runs at a time, and the loader knows its bounds.
#undef __shared__
#define __shared__ __attribute__((used)) thread_local
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#undef __forceinline__
#define __forceinline__ __attribute__((always_inline)) inline

namespace emulator {

using Site = std::source_location;
// As the last parameter: where the kernel called from.
#define EMULATOR_SITE std::source_location site = std::source_location::current()

extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// ---- launches, and what host code says about memory -------------------------------------------------------------------

// Kernels may touch exposed memory only; once anything is exposed, all else is out of bounds. What is writable counts as
// uninitialised until a kernel or cudaMemsetAsync writes it, unless told otherwise. Of what overlaps the latest counts.
void expose(const char* name, const void* p, size_t bytes, bool writable);
void expose(const char* name, const void* p, size_t bytes, bool writable, bool initialised);
void hide_all();

// Runs body(arguments) as every thread of the grid. Throws std::runtime_error, whatever the fault was.
void launch_threads(const char* name, void (*body)(void*), void* arguments, size_t arguments_bytes, dim3 grid, dim3 block, int smem_bytes);

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, int smem_bytes, A&&... args) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<std::decay_t<P>...> args;
  } call{kernel, {static_cast<P>(std::forward<A>(args))...}};
  launch_threads(
      name,
      [](void* p) {
        auto* c = static_cast<Call*>(p);
        std::apply(c->kernel, c->args);
      },
      &call, sizeof call, grid, block, smem_bytes);
}

unsigned char* dynamic_smem();

// ---- behind common/ptx.cuh --------------------------------------------------------------------------------------------

void barrier(int id, int threads, bool wait, Site site);  // threads = 0: __syncthreads
void cp_async(void* dst, const void* src, int bytes, int src_bytes, Site site);
void cp_async_commit();
void cp_async_wait(int pending);
void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site);
void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, Site site);
void mma_m16n8k8(float* d, uint32_t a0, uint32_t a1, uint32_t b0, Site site);
void mma_m16n8k32_s8(int* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void mma_m16n8k32_e4m3(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site);
void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t meta, int selector, bool bf16, Site site);
void mma_sp_m16n8k32_s8(int* d, const uint32_t* a, const uint32_t* b, uint32_t meta, int selector, Site site);
void mma_sp_m16n8k64_s8(int* d, const uint32_t* a, const uint32_t* b, uint32_t meta, Site site);
void mma_sp_m16n8k64_e4m3(float* d, const uint32_t* a, const uint32_t* b, uint32_t meta, Site site);
uint4 load_global_16(const void* p, Site site);
void prefetch(const void* p, Site site);

// ---- warps ------------------------------------------------------------------------------------------------------------

void sync_warp(uint32_t mask, Site site);
void fence_global();
void vote(uint32_t mask, bool predicate, uint32_t* ballot, Site site);
enum class Shuffle { kIndex, kUp, kDown, kXor };
void shuffle(uint32_t mask, void* value, size_t bytes, int argument, int width, Shuffle kind, Site site);

template <class T>
__attribute__((always_inline)) inline T shuffle(uint32_t mask, T value, int argument, int width, Shuffle kind, Site site) {
  static_assert(sizeof(T) <= 16);
  shuffle(mask, &value, sizeof value, argument, width, kind, site);
  return value;
}

// Called around every atomic: fibers never preempt each other, so a plain read-modify-write is atomic.
void atomic_access(const void* p, size_t bytes, Site site);

}  // namespace emulator

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size
constexpr int warpSize = 32;

inline unsigned char* emu_dynamic_smem() { return emulator::dynamic_smem(); }

#define EMULATOR_INLINE __attribute__((always_inline)) inline

EMULATOR_INLINE void __syncthreads(EMULATOR_SITE) { emulator::barrier(0, 0, true, site); }
EMULATOR_INLINE void __syncwarp(uint32_t mask = 0xffffffffu, EMULATOR_SITE) { emulator::sync_warp(mask, site); }
EMULATOR_INLINE void __threadfence() { emulator::fence_global(); }
EMULATOR_INLINE void __threadfence_block() {}
EMULATOR_INLINE void __nanosleep(unsigned) {}
EMULATOR_INLINE uint32_t __activemask() { return 0xffffffffu; }  // kernels here keep warps together where they ask

template <class T>
EMULATOR_INLINE T __shfl_sync(uint32_t mask, T value, int lane, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, lane, width, emulator::Shuffle::kIndex, site);
}
template <class T>
EMULATOR_INLINE T __shfl_up_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, static_cast<int>(delta), width, emulator::Shuffle::kUp, site);
}
template <class T>
EMULATOR_INLINE T __shfl_down_sync(uint32_t mask, T value, unsigned delta, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, static_cast<int>(delta), width, emulator::Shuffle::kDown, site);
}
template <class T>
EMULATOR_INLINE T __shfl_xor_sync(uint32_t mask, T value, int lanes, int width = 32, EMULATOR_SITE) {
  return emulator::shuffle(mask, value, lanes, width, emulator::Shuffle::kXor, site);
}
EMULATOR_INLINE uint32_t __ballot_sync(uint32_t mask, int predicate, EMULATOR_SITE) {
  uint32_t ballot;
  emulator::vote(mask, predicate != 0, &ballot, site);
  return ballot;
}
EMULATOR_INLINE int __any_sync(uint32_t mask, int predicate, EMULATOR_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
EMULATOR_INLINE int __all_sync(uint32_t mask, int predicate, EMULATOR_SITE) { return __ballot_sync(mask, predicate, site) == mask; }

// WHY noinline and not instrumented: to the race checks an atomic is one access of a kind of its own.
#define EMULATOR_ATOMIC(name, expression)                                                   \
  template <class T, class U>                                                               \
  __attribute__((noinline, no_sanitize("thread"))) T name(T* p, U operand, EMULATOR_SITE) { \
    emulator::atomic_access(p, sizeof(T), site);                                            \
    const T old = *p, value = static_cast<T>(operand);                                      \
    *p = (expression);                                                                      \
    return old;                                                                             \
  }
EMULATOR_ATOMIC(atomicAdd, static_cast<T>(old + value))
EMULATOR_ATOMIC(atomicSub, static_cast<T>(old - value))
EMULATOR_ATOMIC(atomicExch, value)
EMULATOR_ATOMIC(atomicMax, old > value ? old : value)
EMULATOR_ATOMIC(atomicMin, old < value ? old : value)
EMULATOR_ATOMIC(atomicAnd, static_cast<T>(old& value))
EMULATOR_ATOMIC(atomicOr, static_cast<T>(old | value))
EMULATOR_ATOMIC(atomicXor, static_cast<T>(old ^ value))
#undef EMULATOR_ATOMIC
template <class T, class U>
__attribute__((noinline, no_sanitize("thread"))) T atomicInc(T* p, U limit, EMULATOR_SITE) {
  emulator::atomic_access(p, sizeof(T), site);
  const T old = *p;
  *p = old >= static_cast<T>(limit) ? T{0} : static_cast<T>(old + 1);
  return old;
}
template <class T>
__attribute__((noinline, no_sanitize("thread"))) T atomicCAS(T* p, T expected, T value, EMULATOR_SITE) {
  emulator::atomic_access(p, sizeof(T), site);
  const T old = *p;
  if (old == expected) *p = value;
  return old;
}

#include "intrinsics.h"
