// The test program where there is an operating system: this processor, or qemu's user-mode emulation of another.
#include <unistd.h>

#include <cstring>

#include "program.h"

namespace taut::other_isas {

void print(const char* text) {
  for (size_t left = std::strlen(text); left > 0;) {
    const ssize_t written = write(1, text, left);
    if (written <= 0) _exit(3);
    text += written, left -= static_cast<size_t>(written);
  }
}

}  // namespace taut::other_isas

int main(int argc, char** argv) { return taut::other_isas::run_all(true, argc > 1 ? argv[1] : "") ? 1 : 0; }
