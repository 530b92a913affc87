// The ISAs that Int8Kernel (x86_int8_kernel.h) is compiled for; a file has those that its own flags allow.
#pragma once

#include "quant_linear/x86_int8_kernel.h"

namespace taut::quant_linear {
namespace {

struct Avx2 : Simd256 {
  static constexpr bool kInt32 = false;
  static constexpr int kSmallRows = 4, kTileRows = 6, kTileVectors = 2;  // 6 x 2 sums + 2 codes + 1 broadcast + 1 product = 16 registers
  static constexpr int64_t kPanelBytes = 16384;

  using X = Bytes;
  static TAUT_INLINE X at(const uint8_t* p) { return broadcast4(p); }
  // WHY asm: gcc 12 reassociates the int16 sum into a tree and spills it (2x slower); this keeps one running sum.
  static TAUT_INLINE void dot(Bytes& sum, Bytes codes, X x) {
    Bytes product;
    asm volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0" : "+x"(sum), "=&x"(product) : "x"(codes), "x"(x));
  }
  static TAUT_INLINE void dot_from(Bytes& sum, Bytes start, Bytes codes, X x) {  // without a copy, and without a product
    asm volatile("vpmaddubsw %2,%1,%0\n\tvpaddw %0,%3,%0" : "=&x"(sum) : "x"(codes), "x"(x), "x"(start));
  }
  static TAUT_INLINE void dot_first(Bytes& sum, Bytes codes, X x) { asm volatile("vpmaddubsw %2,%1,%0" : "=x"(sum) : "x"(codes), "x"(x)); }
};

#if defined(__AVXVNNI__)
struct AvxVnni : Simd256 {
  static constexpr bool kInt32 = true;
  static constexpr int kSmallRows = 4, kTileRows = 6, kTileVectors = 2;  // 6 x 2 sums + 2 codes + 1 broadcast
  static constexpr int64_t kPanelBytes = 16384;

  using X = Bytes;
  static TAUT_INLINE X at(const uint8_t* p) { return broadcast4(p); }
  // WHY asm: gcc would gather the loads in front and spill them.
  static TAUT_INLINE void dot(Bytes& sum, Bytes codes, X x) { asm volatile("%{vex%} vpdpbusd %2,%1,%0" : "+x"(sum) : "x"(codes), "x"(x)); }
  static TAUT_INLINE void dot_from(Bytes& sum, Bytes start, Bytes codes, X x) {
    sum = start;
    dot(sum, codes, x);
  }
};
#endif

#if defined(__AVX512BW__)
struct Avx512Bw : Simd512 {
  static constexpr bool kInt32 = false;
  static constexpr int kSmallRows = 4, kTileRows = 12, kTileVectors = 1;  // 12 integer sums, 12 totals, codes, broadcast, product
  static constexpr int64_t kPanelBytes = 8192;

  using X = Bytes;
  static TAUT_INLINE Bytes broadcast4(const uint8_t* p) {
    Bytes v;
    asm volatile("vpbroadcastd %1,%0" : "=v"(v) : "m"(*reinterpret_cast<const int32_t*>(p)));
    return v;
  }
  static TAUT_INLINE X at(const uint8_t* p) { return broadcast4(p); }
  // WHY asm: as for Avx2, one running sum.
  static TAUT_INLINE void dot(Bytes& sum, Bytes codes, X x) {
    Bytes product;
    asm volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0" : "+v"(sum), "=&v"(product) : "v"(codes), "v"(x));
  }
  static TAUT_INLINE void dot_from(Bytes& sum, Bytes start, Bytes codes, X x) {
    asm volatile("vpmaddubsw %2,%1,%0\n\tvpaddw %0,%3,%0" : "=&v"(sum) : "v"(codes), "v"(x), "v"(start));
  }
  static TAUT_INLINE void dot_first(Bytes& sum, Bytes codes, X x) { asm volatile("vpmaddubsw %2,%1,%0" : "=v"(sum) : "v"(codes), "v"(x)); }
};
#endif

#if defined(__AVX512VNNI__)
struct Avx512Vnni : Simd512 {
  static constexpr bool kInt32 = true;
  static constexpr int kSmallRows = 6, kTileRows = 5, kTileVectors = 2;
  static constexpr int64_t kPanelBytes = 16384;  // beside 3 KB of A

  using X = Bytes;
  // WHY asm: gcc 12 would give each product a broadcast of its own, and the loads would bind.
  static TAUT_INLINE X at(const uint8_t* p) {
    Bytes v;
    asm volatile("vpbroadcastd %1,%0" : "=v"(v) : "m"(*reinterpret_cast<const int32_t*>(p)));
    return v;
  }
  static TAUT_INLINE void dot(Bytes& sum, Bytes codes, X x) { asm volatile("vpdpbusd %2,%1,%0" : "+v"(sum) : "v"(codes), "v"(x)); }
  static TAUT_INLINE void dot_from(Bytes& sum, Bytes start, Bytes codes, X x) {
    sum = start;
    dot(sum, codes, x);
  }
};
#endif

}  // namespace
}  // namespace taut::quant_linear
