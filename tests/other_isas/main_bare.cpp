// The test program on a processor without an operating system: what it needs of one, and of the C library. Text goes to port
// 0xe9, where Bochs reads it.
#include <cpuid.h>

#include <cstring>
#include <new>

#include "program.h"

namespace {

void out_byte(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }

// Memory is given out from the front of one block, and all of it is free again when the last piece is.
alignas(4096) uint8_t arena[32 << 20];
size_t arena_used = 0, pieces = 0;

void* allocate(size_t bytes) {
  void* piece = arena + arena_used;
  arena_used += (bytes + 63) / 64 * 64;
  if (arena_used > sizeof(arena)) {
    taut::other_isas::print("FAILED: out of memory\n");
    taut::other_isas::end(1);
  }
  pieces++;
  return piece;
}
void release(void* piece) {
  if (piece != nullptr && --pieces == 0) arena_used = 0;
}

// What the operating system would do: let the processor use the registers it has. XCR0 has a bit for each kind of them.
void enable_vector_state() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(0xd, 0, &a, &b, &c, &d)) return;
  const unsigned wanted = a & 0xe7;  // x87, SSE, AVX, AVX-512
  asm volatile("xsetbv" : : "c"(0), "a"(wanted), "d"(0));
}

}  // namespace

namespace taut::other_isas {
void print(const char* text) {
  while (*text) out_byte(0xe9, static_cast<uint8_t>(*text++));
}
void end(int status) {
  print(status ? "END 1\n" : "END 0\n");
  for (const char* p = "Shutdown"; *p; p++) out_byte(0x8900, static_cast<uint8_t>(*p));  // Bochs obeys
  for (;;) asm volatile("hlt");
}
}  // namespace taut::other_isas

void* operator new(size_t bytes) { return allocate(bytes); }
void* operator new[](size_t bytes) { return allocate(bytes); }
void operator delete(void* piece) noexcept { release(piece); }
void operator delete[](void* piece) noexcept { release(piece); }
void operator delete(void* piece, size_t) noexcept { release(piece); }
void operator delete[](void* piece, size_t) noexcept { release(piece); }
namespace std {
void __throw_length_error(const char* what) {
  taut::other_isas::print(what);
  __builtin_trap();
}
void __throw_logic_error(const char* what) { __throw_length_error(what); }
void __throw_out_of_range_fmt(const char* what, ...) { __throw_length_error(what); }
void __throw_bad_alloc() { __builtin_trap(); }
void __throw_bad_array_new_length() { __builtin_trap(); }
}  // namespace std

extern "C" {

void* memset(void* to, int value, size_t bytes) {
  void* at = to;
  asm volatile("rep stosb" : "+D"(at), "+c"(bytes) : "a"(value) : "memory");
  return to;
}
void* memcpy(void* __restrict to, const void* __restrict from, size_t bytes) {
  void* at = to;
  asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(bytes) : : "memory");
  return to;
}
void* memmove(void* to, const void* from, size_t bytes) {
  if (to <= from || static_cast<const char*>(from) + bytes <= to) return memcpy(to, from, bytes);
  for (size_t i = bytes; i-- > 0;) { static_cast<volatile char*>(to)[i] = static_cast<const char*>(from)[i]; }
  return to;
}
int memcmp(const void* a, const void* b, size_t bytes) {
  for (size_t i = 0; i < bytes; i++)
    if (const int difference = static_cast<const uint8_t*>(a)[i] - static_cast<const uint8_t*>(b)[i]) return difference;
  return 0;
}
size_t strlen(const char* text) {
  size_t size = 0;
  while (static_cast<const volatile char*>(text)[size]) size++;
  return size;
}
int strncmp(const char* a, const char* b, size_t size) {
  for (size_t i = 0; i < size; i++)
    if (a[i] != b[i] || a[i] == 0) return static_cast<uint8_t>(a[i]) - static_cast<uint8_t>(b[i]);
  return 0;
}
int strcmp(const char* a, const char* b) { return strncmp(a, b, SIZE_MAX); }
long syscall(long, ...) { return -1; }  // cpu_features.cpp asks Linux for the tiles of AMX
double ldexp(double value, int exponent) {
  for (; exponent > 0; exponent--) value *= 2;
  for (; exponent < 0; exponent++) value /= 2;
  return value;
}

// The x87 unit has what the C library would compute, in 64 bits of mantissa.
static long double power_of_2(long double x) {
  const long double whole = __builtin_rintl(x);
  long double power;
  asm("f2xm1; fld1; faddp; fscale" : "=t"(power) : "0"(x - whole), "u"(whole));
  return power;
}
static long double times_log2(long double x, long double factor) {
  long double result;
  asm("fyl2x" : "=t"(result) : "0"(x), "u"(factor) : "st(1)");
  return result;
}
static constexpr long double kLn2 = 0.693147180559945309417232121458L;
double exp2(double x) { return x > 1100 ? __builtin_inf() : x < -1100 ? 0 : static_cast<double>(power_of_2(x)); }
double exp(double x) { return x > 720 ? __builtin_inf() : x < -760 ? 0 : static_cast<double>(power_of_2(x / kLn2)); }
double log2(double x) { return static_cast<double>(times_log2(x, 1)); }
double log(double x) { return static_cast<double>(times_log2(x, kLn2)); }
double tanh(double x) {
  if (__builtin_fabs(x) > 20) return x > 0 ? 1 : -1;
  if (__builtin_fabs(x) < 1e-3) return x - x * x * x / 3;
  const long double e = power_of_2(2 * x / kLn2);
  return static_cast<double>((e - 1) / (e + 1));
}
float exp2f(float x) { return static_cast<float>(exp2(x)); }
float expf(float x) { return static_cast<float>(exp(x)); }
float log2f(float x) { return static_cast<float>(log2(x)); }
float logf(float x) { return static_cast<float>(log(x)); }
float tanhf(float x) { return static_cast<float>(tanh(x)); }

extern void (*constructors_begin[])();  // link.ld
extern void (*constructors_end[])();
void kmain() {
  enable_vector_state();
  taut::other_isas::print("\nBEGIN\n");
  for (auto* constructor = constructors_begin; constructor != constructors_end; constructor++) (*constructor)();
  taut::other_isas::end(taut::other_isas::run_all(false, TAUT_REQUIRED) != 0);
}

}  // extern "C"
