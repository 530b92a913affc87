// Which GPUs this build has machine code for. nvcc compiles a file for the SM in its name and later ones of TAUT_CUDA_ARCHS, an
// "a" file for that SM alone (cmake/cuda.cmake). Where a kernel was not compiled its body is empty: it must not be chosen.
#pragma once

#include <string_view>

namespace taut {

// archs: as "75 80 90a 120+ptx". file: the SM in the kernel's file name, as "80" or "90a". device_sm: 75, 80, 86, ...
constexpr bool has_code(std::string_view archs, std::string_view file, int device_sm) {
  const auto number = [](std::string_view text) {
    int value = 0;
    for (const char c : text)
      if (c >= '0' && c <= '9') value = 10 * value + (c - '0');
    return value;
  };
  while (!archs.empty()) {
    std::string_view arch = archs.substr(0, archs.find(' '));
    archs.remove_prefix(arch.size() < archs.size() ? arch.size() + 1 : arch.size());
    const bool ptx = arch.ends_with("+ptx");
    if (ptx) arch.remove_suffix(4);
    const int sm = number(arch);
    if (file.ends_with('a') ? arch != file : sm < number(file)) continue;
    // Machine code runs on its own SM and later ones of its generation (80 on 86), of an "a" only there; PTX on all later ones.
    if (arch.ends_with('a') ? sm == device_sm : sm <= device_sm && (ptx || sm / 10 == device_sm / 10)) return true;
  }
  return false;
}

#if defined(TAUT_EMULATE)
constexpr bool has_code(std::string_view, int) { return true; }
#else
constexpr bool has_code(std::string_view file, int device_sm) { return has_code(TAUT_CUDA_ARCHS_STRING, file, device_sm); }
#endif

}  // namespace taut
