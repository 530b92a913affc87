// The test program where there is an operating system: this processor, or qemu's user-mode emulation of another.
#include <unistd.h>

#include <cstring>

#include "program.h"

namespace taut::other_isas {

void print(const char* text) {
  for (size_t left = std::strlen(text); left > 0;) {
    const ssize_t written = write(1, text, left);
    if (written <= 0) end(3);
    text += written, left -= static_cast<size_t>(written);
  }
}
void end(int status) { _exit(status); }

}  // namespace taut::other_isas

// program [all|few] [impls that must run, with commas]
int main(int argc, char** argv) {
  const bool all = argc < 2 || std::strcmp(argv[1], "all") == 0;
  return taut::other_isas::run_all(all, argc > 2 ? argv[2] : "") ? 1 : 0;
}
