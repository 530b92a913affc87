// All inline PTX of taut: one instruction per wrapper, with two bodies: asm on a GPU, a call of the emulator of tests/emulator
// under TAUT_EMULATE. Shared memory is passed as ordinary pointers; the compiler folds the conversion away.
//
// WHY one instruction each: the emulator never runs the asm. What a wrapper means is pinned by golden vectors recorded on a
// GPU (tests/emulator/golden.cu), and only a wrapper without logic of its own is fully described by inputs and outputs.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"

// The last parameter of a wrapper: where the kernel called it, for the emulator's messages. Nothing on a GPU.
#if defined(TAUT_EMULATE)
#define TAUT_SITE \
  , emulator::Site site = emulator::Site { __builtin_FILE(), __builtin_LINE() }
#define TAUT_SITE_ONLY \
  emulator::Site site = emulator::Site { __builtin_FILE(), __builtin_LINE() }
#else
#define TAUT_SITE
#define TAUT_SITE_ONLY
#endif

namespace taut::ptx {

#if !defined(TAUT_EMULATE)
TAUT_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// ---- cp.async: global to shared, sm_80 --------------------------------------------------------------------------------
// The bytes past src_bytes are filled with zeros; src is not touched for src_bytes = 0, but must still be aligned.

TAUT_DEVICE void cp_async_16(void* dst, const void* src, int src_bytes = 16 TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::cp_async(dst, src, 16, src_bytes, site);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(src_bytes) : "memory");
#endif
}

TAUT_DEVICE void cp_async_4(void* dst, const void* src, int src_bytes = 4 TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::cp_async(dst, src, 4, src_bytes, site);
#else
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared_address(dst)), "l"(src), "r"(src_bytes) : "memory");
#endif
}

TAUT_DEVICE void cp_async_commit() {
#if defined(TAUT_EMULATE)
  emulator::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's latest groups are still in flight. Other threads need a barrier after it.
template <int kPending>
TAUT_DEVICE void cp_async_wait() {
#if defined(TAUT_EMULATE)
  emulator::cp_async_wait(kPending);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
#endif
}

// ---- ldmatrix, sm_75 --------------------------------------------------------------------------------------------------
// Lane l gives the address of row l % 8 of matrix l / 8: 8 elements of 16 bits, 16-byte aligned. Register i of lane l gets
// elements 2 * (l % 4) and + 1 of row l / 4 of matrix i; transposed, of column l / 4.

TAUT_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::ldmatrix(r, 4, false, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

TAUT_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::ldmatrix(r, 2, false, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
#endif
}

TAUT_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::ldmatrix(r, 4, true, row, site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// ---- mma.sync: d[16,8] += a[16,k] @ b[k,8] ----------------------------------------------------------------------------
// Fragments by lane, g = lane / 4, t = lane % 4, as the PTX manual has them:
//   d     (g; 2t, 2t+1), (g+8; 2t, 2t+1)
//   a     16 bits: (g; 2t, 2t+1), (g+8; the same), (g; 2t+8, 2t+9), (g+8; the same); k8 has the first two
//         8 bits:  (g; 4t..4t+3), (g+8; the same), (g; 4t+16..4t+19), (g+8; the same)
//   b     16 bits: (2t, 2t+1; g), (2t+8, 2t+9; g);  8 bits: (4t..4t+3; g), (4t+16..4t+19; g)

// Type: half or __nv_bfloat16. sm_80
template <class Type>
TAUT_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 TAUT_SITE) {
  static_assert(std::is_same_v<Type, half> || std::is_same_v<Type, __nv_bfloat16>);
#if defined(TAUT_EMULATE)
  emulator::mma_m16n8k16(d, a, b0, b1, std::is_same_v<Type, __nv_bfloat16>, site);
#else
  if constexpr (std::is_same_v<Type, half>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// half. sm_75, which has no m16n8k16
TAUT_DEVICE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0 TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mma_m16n8k8(d, a0, a1, b0, site);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a0), "r"(a1), "r"(b0));
#endif
}

// Signed 8-bit integers, sums modulo 2^32. sm_80
TAUT_DEVICE void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mma_m16n8k32_s8(d, a, b0, b1, site);
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// float8 E4M3. WHY a caller promotes its sums: sm_89 and sm_90 add with about 14 bits. sm_89
TAUT_DEVICE void mma_m16n8k32_e4m3(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mma_m16n8k32_e4m3(d, a, b0, b1, site);
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- bits -------------------------------------------------------------------------------------------------------------

// Any function of three bits: kTable is f(0xf0, 0xcc, 0xaa). (a & b) | c is 0xea.
template <int kTable>
TAUT_DEVICE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(TAUT_EMULATE)
  return emulator::lop3<kTable>(a, b, c);
#else
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, %4;\n" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return r;
#endif
}

// Byte i of the result is the byte of {b, a} (a low) that nibble i of the selector names; its bit 3 spreads the sign instead.
TAUT_DEVICE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
#if defined(TAUT_EMULATE)
  return emulator::prmt(a, b, selector);
#else
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
  return r;
#endif
}

// ---- two 16-bit floats in a register, one rounding each ---------------------------------------------------------------
// Type: half (sm_75) or __nv_bfloat16 (sm_80, which has no sub and mul of bf16x2: an fma with the same single rounding).

// a * b + c
template <class Type>
TAUT_DEVICE uint32_t hfma2(uint32_t a, uint32_t b, uint32_t c) {
  static_assert(std::is_same_v<Type, half> || std::is_same_v<Type, __nv_bfloat16>);
#if defined(TAUT_EMULATE)
  return emulator::fma2<std::is_same_v<Type, __nv_bfloat16>>(a, b, c);
#else
  uint32_t r;
  if constexpr (std::is_same_v<Type, half>) asm("fma.rn.f16x2 %0, %1, %2, %3;\n" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  else asm("fma.rn.bf16x2 %0, %1, %2, %3;\n" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
#endif
}

// a - b
template <class Type>
TAUT_DEVICE uint32_t hsub2(uint32_t a, uint32_t b) {
#if !defined(TAUT_EMULATE)
  if constexpr (std::is_same_v<Type, half>) {
    uint32_t r;
    asm("sub.rn.f16x2 %0, %1, %2;\n" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
#endif
  return hfma2<Type>(b, std::is_same_v<Type, half> ? 0xbc00bc00u : 0xbf80bf80u, a);  // b * -1 + a
}

// a * b
template <class Type>
TAUT_DEVICE uint32_t hmul2(uint32_t a, uint32_t b) {
#if !defined(TAUT_EMULATE)
  if constexpr (std::is_same_v<Type, half>) {
    uint32_t r;
    asm("mul.rn.f16x2 %0, %1, %2;\n" : "=r"(r) : "r"(a), "r"(b));
    return r;
  }
#endif
  return hfma2<Type>(a, b, 0x80008000u);  // a * b + -0, which keeps the sign of a zero
}

// ---- float8 E4M3 ------------------------------------------------------------------------------------------------------

// Nearest even, saturating to +-448; NaN gives NaN. The low byte is lo's. sm_89
TAUT_DEVICE uint16_t cvt_e4m3x2(float lo, float hi) {
#if defined(TAUT_EMULATE)
  return emulator::cvt_e4m3x2(lo, hi);
#else
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;\n" : "=h"(r) : "f"(hi), "f"(lo));
  return r;
#endif
}

// ---- global loads -----------------------------------------------------------------------------------------------------

// 16 bytes that nobody writes while the kernel runs and that are read once: past the L1 cache. WHY not volatile: the compiler
// may move the load up, which is what hides its latency.
TAUT_DEVICE uint4 ld_global_nc_16(const void* p TAUT_SITE) {
#if defined(TAUT_EMULATE)
  return emulator::load_global_16(p, site);
#else
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#endif
}

// ---- named barriers: id 1 to 15 (0 is __syncthreads), of `threads` threads, a multiple of 32 --------------------------

TAUT_DEVICE void bar_sync(int id, int threads TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::barrier(id, threads, true, site);
#else
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// Arrives without waiting.
TAUT_DEVICE void bar_arrive(int id, int threads TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::barrier(id, threads, false, site);
#else
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
#endif
}

// ---- programmatic dependent launch, sm_90 -----------------------------------------------------------------------------
// The emulator runs kernels one after the other: both do nothing there.

// Waits until the kernel before this one in the stream has finished and its writes can be seen.
TAUT_DEVICE void griddep_wait() {
#if !defined(TAUT_EMULATE)
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next kernel in the stream may start.
TAUT_DEVICE void griddep_launch() {
#if !defined(TAUT_EMULATE)
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// ==== Hopper, sm_90a: mbarrier, TMA, wgmma, setmaxnreg ====

}  // namespace taut::ptx
