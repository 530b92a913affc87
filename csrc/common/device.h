// What kernels' host code wants to know of a CUDA device, read once per device.
#pragma once

#include <cstdint>

namespace taut {

struct Device {
  int index;
  int sm;          // compute capability: 75, 80, 86, 89, 90, 100, 120
  int sm_count;    // streaming multiprocessors
  int smem_bytes;  // shared memory a block may ask for (opt-in limit)
  int64_t l2_bytes;
};

// Throws std::runtime_error where the device cannot be asked. The emulator has its own definition.
const Device& device(int index);

}  // namespace taut
