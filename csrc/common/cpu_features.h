// What the processor and the operating system let us run. Read once, with cpuid and XCR0 (x86) or HWCAP (ARM).
#pragma once

namespace taut {

struct CpuFeatures {
  bool avx2 = false;        // AVX2, FMA and F16C, and the OS saves ymm
  bool avxvnni = false;     // AVX-VNNI besides: vpdpbusd of 256 bits without AVX-512
  bool avx512bw = false;    // AVX-512 F, DQ, BW and VL, and the OS saves zmm
  bool avx512vnni = false;  // AVX-512 VNNI besides
  bool avx512bf16 = false;  // AVX-512 BF16 besides
  bool amx = false;         // AMX tiles with int8 and bf16, AVX-512 VNNI and BF16 besides, and the OS grants them
  bool neon = false;        // 64-bit ARM
  bool neondot = false;     // ARM sdot (dotprod)
  bool i8mm = false;        // ARM smmla besides
};

__attribute__((visibility("default"))) const CpuFeatures& cpu_features();

// `supported` of an impl that needs an instruction set and nothing else.
template <class Params>
const char* needs_avx2(const Params&) {
  return cpu_features().avx2 ? nullptr : "this processor has no AVX2, FMA and F16C";
}
template <class Params>
const char* needs_avx512bw(const Params&) {
  return cpu_features().avx512bw ? nullptr : "this processor has no AVX-512 F, BW, DQ and VL";
}
template <class Params>
const char* needs_avx512vnni(const Params&) {
  return cpu_features().avx512vnni ? nullptr : "this processor has no AVX-512 VNNI";
}
template <class Params>
const char* needs_avxvnni(const Params&) {
  return cpu_features().avxvnni ? nullptr : "this processor has no AVX-VNNI";
}
template <class Params>
const char* needs_avx512bf16(const Params&) {
  return cpu_features().avx512bf16 ? nullptr : "this processor has no AVX-512 BF16";
}
template <class Params>
const char* needs_neon(const Params&) {
  return cpu_features().neon ? nullptr : "this processor has no NEON";
}
template <class Params>
const char* needs_neondot(const Params&) {
  return cpu_features().neondot ? nullptr : "this processor has no sdot (dotprod)";
}

}  // namespace taut
