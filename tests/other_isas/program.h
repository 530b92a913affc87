// The test program of the CPU kernels for processors other than the one at hand. One case list and one main, run natively,
// by an emulator of ARM, and without an operating system on an emulated x86 processor; so: no stdio, no threads, no files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taut::other_isas {

// What the platform gives: main_hosted.cpp, main_bare.cpp.
void print(const char* text);
[[noreturn]] void end(int status);

// Every case (`thorough`), or those few that an interpreter of instructions has time for. Prints a table of what was checked.
// Returns the number of failures, of planted faults that no one noticed, and of impls in `required` that did not run.
int run_all(bool thorough, const char* required);

}  // namespace taut::other_isas
