#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/device.h"

namespace taut {
namespace {

int attribute(cudaDeviceAttr what, int index) {
  int value = 0;
  const cudaError_t status = cudaDeviceGetAttribute(&value, what, index);
  if (status == cudaSuccess) return value;
  cudaGetLastError();
  throw std::runtime_error("CUDA device " + std::to_string(index) + " cannot be asked for its properties: " + cudaGetErrorString(status));
}

}  // namespace

const Device& device(int index) {
  constexpr int kMaxDevices = 64;
  static std::array<Device, kMaxDevices> devices;
  static std::array<std::once_flag, kMaxDevices> known;
  if (index < 0 || index >= kMaxDevices) throw std::runtime_error("CUDA device " + std::to_string(index) + " is out of range");
  std::call_once(known[index], [index] {
    devices[index] = {index, attribute(cudaDevAttrComputeCapabilityMajor, index) * 10 + attribute(cudaDevAttrComputeCapabilityMinor, index),
                      attribute(cudaDevAttrMultiProcessorCount, index), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index),
                      attribute(cudaDevAttrL2CacheSize, index)};
  });
  return devices[index];
}

}  // namespace taut
