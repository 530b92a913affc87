// The emulated device: its properties, and the few functions of the CUDA runtime that host code of kernels calls.
#include "common/device.h"

#include <stdexcept>

#include "runtime.h"

namespace {

int smem_of(int sm) {
  switch (sm) {
    case 75: return 64 * 1024;
    case 80: return 163 * 1024;
    case 86:
    case 89:
    case 120: return 99 * 1024;
    case 90:
    case 100: return 227 * 1024;
    default: return 0;
  }
}

taut::Device the_device{0, 80, 4, smem_of(80), int64_t{40} << 20};

}  // namespace

namespace taut {

const Device& device(int index) {
  if (index != 0 && index != -1) throw std::runtime_error("the emulator has one device, not number " + std::to_string(index));
  return the_device;
}

}  // namespace taut

namespace emulator {

int device_smem_bytes() { return the_device.smem_bytes; }

void require_sm(int sm, const char* instruction, Site site) {
  if (the_device.sm < sm) fail("%s at %s:%u needs sm_%d; this device is sm_%d", instruction, site.file_name(), site.line(), sm, the_device.sm);
}

}  // namespace emulator

// Returns 0, or 1 for a compute capability that the emulator does not know.
extern "C" __attribute__((visibility("default"))) int taut_emulator_set_device(int sm, int sm_count) {
  if (smem_of(sm) == 0 || sm_count < 1) return 1;
  the_device = {0, sm, sm_count, smem_of(sm), int64_t{40} << 20};
  return 0;
}

extern "C" cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  memset(p, value, bytes);
  emulator::host_write(p, bytes);
  return cudaSuccess;
}
