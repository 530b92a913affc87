// What the processor and the operating system let us run. Read once, with cpuid and XCR0 (x86) or HWCAP (ARM).
#pragma once

namespace taut {

struct CpuFeatures {
  bool avx2 = false;          // AVX2, FMA and F16C, and the OS saves ymm
  bool avx512vnni = false;    // AVX-512 F, DQ, BW, VL and VNNI, and the OS saves zmm
  bool avx512bf16 = false;    // AVX-512 BF16 besides
  bool amx = false;           // AMX tiles with int8 and bf16, AVX-512 VNNI and BF16 besides, and the OS grants them
  bool neon_dotprod = false;  // ARM sdot
  bool neon_i8mm = false;     // ARM smmla
};

__attribute__((visibility("default"))) const CpuFeatures& cpu_features();

}  // namespace taut
