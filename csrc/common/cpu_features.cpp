#include "common/cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace taut {
namespace {

#if defined(__x86_64__)

__attribute__((target("xsave"))) uint64_t read_xcr0() { return _xgetbv(0); }

// WHY: Linux grants the 8 KB of tile state only to a process that asks for it (ARCH_REQ_XCOMP_PERM, feature 18).
bool request_amx_tiles() {
#if defined(__linux__)
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

CpuFeatures detect() {
  CpuFeatures features;
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return features;
  const bool os_saves = c & (1u << 27), fma = c & (1u << 12), f16c = c & (1u << 29);
  const uint64_t xcr0 = os_saves ? read_xcr0() : 0;
  const bool ymm = (xcr0 & 0x6) == 0x6, zmm = (xcr0 & 0xe6) == 0xe6, tiles = (xcr0 & 0x60000) == 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  const unsigned b7 = b, c7 = c, d7 = d;
  features.avx2 = ymm && fma && f16c && (b7 & (1u << 5));
  const bool f512 = b7 & (1u << 16), dq = b7 & (1u << 17), bw = b7 & (1u << 30), vl = b7 & (1u << 31);
  features.avx512bw = features.avx2 && zmm && f512 && dq && bw && vl;
  features.avx512vnni = features.avx512bw && (c7 & (1u << 11));
  unsigned a71 = 0, b71 = 0, c71 = 0, d71 = 0;
  if (__get_cpuid_count(7, 1, &a71, &b71, &c71, &d71)) {
    features.avxvnni = features.avx2 && (a71 & (1u << 4));
    features.avx512bf16 = features.avx512vnni && (a71 & (1u << 5));
  }
  features.amx = features.avx512bf16 && tiles && (d7 & (1u << 22)) && (d7 & (1u << 24)) && (d7 & (1u << 25)) && request_amx_tiles();
  return features;
}

#elif defined(__aarch64__) && defined(__linux__)

CpuFeatures detect() {
  CpuFeatures features;
  features.neon = getauxval(AT_HWCAP) & HWCAP_ASIMD;
  features.neondot = features.neon && (getauxval(AT_HWCAP) & HWCAP_ASIMDDP);
  features.i8mm = features.neondot && (getauxval(AT_HWCAP2) & HWCAP2_I8MM);
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

}  // namespace taut
