// Kernel launches from host code: one function, on a GPU and in the emulator. An error throws std::runtime_error.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "common/cuda.cuh"
#include "common/device.h"

namespace taut {

#if defined(TAUT_EMULATE)

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, int smem_bytes, void* /*stream*/, A&&... args) {
  emulator::launch(name, kernel, grid, block, smem_bytes, std::forward<A>(args)...);
}

template <class... P, class... A>
void launch_dependent(const Device&, const char* name, void (*kernel)(P...), dim3 grid, dim3 block, int smem_bytes, void* stream, A&&... args) {
  launch(name, kernel, grid, block, smem_bytes, stream, std::forward<A>(args)...);
}

#else

inline void check_cuda(cudaError_t status, const char* name) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clear it: it is reported here, and must not surface in somebody else's call
  throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(status));
}

template <class... P, class... A>
void launch_with(const cudaLaunchAttribute* attribute, const char* name, void (*kernel)(P...), dim3 grid, dim3 block, int smem_bytes, void* stream,
                 A&&... args) {
  // Above 48 KB a kernel must ask, once per device; asking again costs about a microsecond and does no harm.
  if (smem_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes), name);
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = smem_bytes, config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attributes[1];
  if (attribute) attributes[0] = *attribute, config.attrs = attributes, config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, kernel, P(std::forward<A>(args))...), name);
}

template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, int smem_bytes, void* stream, A&&... args) {
  launch_with(nullptr, name, kernel, grid, block, smem_bytes, stream, std::forward<A>(args)...);
}

// A kernel that begins while the one before it in the stream still runs, from its griddep_launch on, where the device can do
// that (sm_90): its launch costs no time of its own. It must griddep_wait before it writes anything, or reads what that kernel writes.
template <class... P, class... A>
void launch_dependent(const Device& device, const char* name, void (*kernel)(P...), dim3 grid, dim3 block, int smem_bytes, void* stream, A&&... args) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  launch_with(device.sm >= 90 ? &early : nullptr, name, kernel, grid, block, smem_bytes, stream, std::forward<A>(args)...);
}

#endif

}  // namespace taut
