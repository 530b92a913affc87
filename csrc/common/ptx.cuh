// All inline PTX of taut: one instruction per wrapper, with two bodies: asm on a GPU, a call of the emulator of tests/emulator
// under TAUT_EMULATE. Shared memory is passed as ordinary pointers; the compiler folds the conversion away.
//
// WHY one instruction each: the emulator never runs the asm. What a wrapper means is pinned by golden vectors recorded on a
// GPU (tests/emulator/golden.cu), and only a wrapper without logic of its own is fully described by inputs and outputs.
#pragma once

#include <type_traits>

#include "common/cuda.cuh"

#if defined(TAUT_EMULATE)
#include "hopper.h"
#else
#include <cuda.h>  // CUtensorMap; libcuda is not linked
#endif

// The last parameter of a wrapper: where the kernel called it, for the emulator's messages. Nothing on a GPU.
#if defined(TAUT_EMULATE)
#define TAUT_SITE_ONLY std::source_location site = std::source_location::current()
#define TAUT_SITE , TAUT_SITE_ONLY
#else
#define TAUT_SITE_ONLY
#define TAUT_SITE
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

// ---- mma.sp: the same where a is sparse, 2:4 --------------------------------------------------------------------------
// d[16,8] += a[16,32] @ b[32,8]; of each 4 neighbours of a row of a two are given. g = lane / 4, t = lane % 4:
//   a     those that are given, 16 x 16, as the a of mma.m16n8k16: register a_0 has the two of (g; 4t..4t+3), a_2 of (g; 4t+16..4t+19)
//   b     (2t, 2t+1; g), (2t+8, 2t+9; g), (2t+16, 2t+17; g), (2t+24, 2t+25; g)
//   meta  2 bits for each number given: its place in its 4, the lower place first (0b1000 is places 0 and 2). Low half: row g, high half: row
//         g + 8; of k 0..15 in the lane of t = 2 * kSelector, of k 16..31 in that of t = 2 * kSelector + 1. The other two lanes' are not read.
// So that a register of metadata serves two instructions. WHY ordered_metadata: the places must ascend, and only then is it as fast on sm_90.
// Type: half or __nv_bfloat16. sm_80, PTX 8.5
#define TAUT_MMA_SP(type)                                                                  \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "                      \
               "{%0,%1,%2,%3}, %12, %13;\n"                                                \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), "n"(kSelector))

template <class Type, int kSelector>
TAUT_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta TAUT_SITE) {
  static_assert(std::is_same_v<Type, half> || std::is_same_v<Type, __nv_bfloat16>);
  static_assert(kSelector == 0 || kSelector == 1);
#if defined(TAUT_EMULATE)
  emulator::mma_sp_m16n8k32(d, a, b, meta, kSelector, std::is_same_v<Type, __nv_bfloat16>, site);
#else
  if constexpr (std::is_same_v<Type, half>) TAUT_MMA_SP("f16");
  else TAUT_MMA_SP("bf16");
#endif
}

#undef TAUT_MMA_SP

// ---- mma.sp of 8-bit numbers: the same, d[16,8] += a[16,k] @ b[k,8] with two of each 4 neighbours of a row of a given ----------------------
// g = lane / 4, t = lane % 4:
//   a     those that are given, as the a of mma.sync of half the depth: register a_0 has the four of (g; 8t..8t+7), a_1 of (g+8; the same), and
//         of k64 a_2 and a_3 those 32 further on
//   b     as of mma.sync: (4t..4t+3; g), (4t+16..4t+19; g), and of k64 the same 32 further on
//   meta  2 bits for each number given, as above, but 32 k of one row to a lane, where 16-bit types have 16 k of two rows. k32: row g in the lane of
//         t = 2 * kSelector, row g + 8 in that of t = 2 * kSelector + 1. k64: k 0..31 of g and of g + 8 in t = 0 and 1, k 32..63 in t = 2 and 3

// Sums wrap around. sm_80, PTX 8.5
template <int kSelector>
TAUT_DEVICE void mma_sp_m16n8k32_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0, uint32_t b1, uint32_t meta TAUT_SITE) {
  static_assert(kSelector == 0 || kSelector == 1);
#if defined(TAUT_EMULATE)
  const uint32_t a[2] = {a0, a1}, b[2] = {b0, b1};
  emulator::mma_sp_m16n8k32_s8(d, a, b, meta, kSelector, site);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6,%7}, "
      "{%0,%1,%2,%3}, %8, %9;\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a0), "r"(a1), "r"(b0), "r"(b1), "r"(meta), "n"(kSelector));
#endif
}

// Sums wrap around. sm_80, PTX 8.5
TAUT_DEVICE void mma_sp_m16n8k64_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mma_sp_m16n8k64_s8(d, a, b, meta, site);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "
      "{%0,%1,%2,%3}, %12, 0;\n"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
#endif
}

// float8 E4M3; of the sums what mma_m16n8k32_e4m3 says. sm_89, PTX 8.5
TAUT_DEVICE void mma_sp_m16n8k64_e4m3(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mma_sp_m16n8k64_e4m3(d, a, b, meta, site);
#else
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, "
      "{%0,%1,%2,%3}, %12, 0;\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta));
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

// ---- floats -----------------------------------------------------------------------------------------------------------

// 2^x to a relative error of 2^-22; subnormal numbers are zeros. WHY not exp2f: it takes three more instructions to give those.
TAUT_DEVICE float ex2(float x) {
#if defined(TAUT_EMULATE)
  return emulator::ex2(x);
#else
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(r) : "f"(x));
  return r;
#endif
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

// Asks for the line that holds an address of an object to be brought to the L2 cache. Nobody waits for it.
TAUT_DEVICE void prefetch_l2(const void* p TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::prefetch(p, site);
#else
  asm volatile("prefetch.global.L2 [%0];\n" ::"l"(p));
#endif
}

// WHY a wrapper: nvcc made four 4-byte stores of an assignment of a uint4 that it had loaded from shared memory.
TAUT_DEVICE void st_global_16(void* p, uint4 v) {
#if defined(TAUT_EMULATE)
  *static_cast<uint4*>(p) = v;
#else
  asm volatile("st.global.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
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

// ---- mbarrier: 8 bytes of shared memory that count arrivals and bytes ---------------------------------------------------
// Of a phase with parity 0, 1, 0, ...: it ends when `count` threads have arrived and all the bytes they expected have landed.

TAUT_DEVICE void mbarrier_init(uint64_t* barrier, int count TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mbarrier_init(barrier, count, site);
#else
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#endif
}

// Threads for which `arrives` is false do nothing. WHY not an if: a branch between wgmmas in flight makes ptxas serialize them
// (C7513); a predicated instruction does not.
TAUT_DEVICE void mbarrier_arrive(uint64_t* barrier, bool arrives TAUT_SITE) {
#if defined(TAUT_EMULATE)
  if (arrives) emulator::mbarrier_arrive(barrier, 0, site);
#else
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p mbarrier.arrive.shared::cta.b64 _, [%0];\n}\n" ::"r"(shared_address(barrier)),
               "r"(static_cast<uint32_t>(arrives))
               : "memory");
#endif
}

TAUT_DEVICE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mbarrier_arrive(barrier, bytes, site);
#else
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

// Whether the phase of this parity has ended; may wait a while for it. The emulator waits until it has.
TAUT_DEVICE bool mbarrier_try_wait(uint64_t* barrier, uint32_t parity TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::mbarrier_wait(barrier, parity, site);
  return true;
#else
  uint32_t done;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}\n"
               : "=r"(done)
               : "r"(shared_address(barrier)), "r"(parity)
               : "memory");
  return done != 0;
#endif
}

// What this thread did to shared memory by ordinary stores (mbarrier_init too) comes before what TMA and wgmma do there.
TAUT_DEVICE void fence_proxy_async(TAUT_SITE_ONLY) {
#if defined(TAUT_EMULATE)
  emulator::fence_proxy_async(site);
#else
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#endif
}

// ---- TMA: one thread asks for a copy from global to shared memory; the mbarrier counts its bytes ------------------------

// The box of a tensor map (common/tensor_map.h) whose first element is (inner, outer). What lies outside the tensor is zero.
TAUT_DEVICE void tma_load_2d(void* dst, const CUtensorMap* map, int inner, int outer, uint64_t* barrier TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::tma_load_2d(dst, map, inner, outer, barrier, site);
#else
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared_address(dst)),
               "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer)
               : "memory");
#endif
}

// The same of a map of four dimensions: a box is of one (head, batch).
TAUT_DEVICE void tma_load_4d(void* dst, const CUtensorMap* map, int inner, int outer, int head, int batch, uint64_t* barrier TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::tma_load_4d(dst, map, inner, outer, head, batch, barrier, site);
#else
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];\n" ::"r"(shared_address(dst)),
      "l"(map), "r"(shared_address(barrier)), "r"(inner), "r"(outer), "r"(head), "r"(batch)
      : "memory");
#endif
}

// A stretch of bytes: both addresses and the size are multiples of 16.
TAUT_DEVICE void bulk_load(void* dst, const void* src, int bytes, uint64_t* barrier TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::bulk_load(dst, src, bytes, barrier, site);
#else
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(shared_address(dst)), "l"(src), "r"(bytes),
               "r"(shared_address(barrier))
               : "memory");
#endif
}

TAUT_DEVICE void prefetch_tensor_map(const CUtensorMap* map) {
#if !defined(TAUT_EMULATE)
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
#endif
}

// ---- wgmma: d[64,N] += a[64,16] @ b[N,16]^T by the 128 threads of a warpgroup, asynchronously ---------------------------
// a and d in registers: warp i of the warpgroup holds rows 16i..16i+15; a as in mma.m16n8k16, d as N/8 fragments of it.
// b in shared memory: rows of 64 elements (128 bytes), K-major, swizzled by 128 bytes.

// What wgmma wants to know of b: p is 16-byte aligned inside the first row of a tile that is 1024-byte aligned.
TAUT_DEVICE uint64_t swizzled_128b_descriptor(const void* p) {
#if defined(TAUT_EMULATE)
  const uint32_t address = emulator::shared_address(p);
#else
  const uint32_t address = shared_address(p);
#endif
  // the address, and the 1024 bytes between two groups of 8 rows, in units of 16; the swizzle
  return uint64_t{(address & 0x3ffff) >> 4} | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

// Of b that lies the other way, columns of 64 n contiguous (128 bytes, swizzled): [n / 64][k][64]. block_bytes: from 64 n to the next.
TAUT_DEVICE uint64_t swizzled_128b_columns_descriptor(const void* p, int block_bytes) {
  return (swizzled_128b_descriptor(p) & ~(uint64_t{0x3fff} << 16)) | uint64_t{static_cast<uint32_t>(block_bytes) >> 4} << 16;
}

// No instruction: what computes these registers stays before this place. WHY: to the compiler they have nothing to do with
// wgmma.fence; it might put their arithmetic between the fence and the wgmma, which PTX forbids.
TAUT_DEVICE void wgmma_pin(uint32_t (&a)[4]) {
#if !defined(TAUT_EMULATE)
  asm volatile("" : "+r"(a[0]), "+r"(a[1]), "+r"(a[2]), "+r"(a[3])::"memory");
#endif
}

// The same for sums; and what reads them stays behind it.
template <int kCount>
TAUT_DEVICE void wgmma_pin(float (&d)[kCount]) {
#if !defined(TAUT_EMULATE)
#pragma unroll
  for (int i = 0; i < kCount; i++) asm volatile("" : "+f"(d[i])::"memory");
#endif
}

// Comes between the last ordinary access to registers (a or d) and the wgmma that uses them.
TAUT_DEVICE void wgmma_fence(TAUT_SITE_ONLY) {
#if defined(TAUT_EMULATE)
  emulator::wgmma_fence(site);
#else
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#endif
}

TAUT_DEVICE void wgmma_commit(TAUT_SITE_ONLY) {
#if defined(TAUT_EMULATE)
  emulator::wgmma_commit(site);
#else
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#endif
}

// Waits until at most kPending of the latest groups are in flight: until then neither a nor d may be touched.
template <int kPending>
TAUT_DEVICE void wgmma_wait(TAUT_SITE_ONLY) {
#if defined(TAUT_EMULATE)
  emulator::wgmma_wait(kPending, site);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
#endif
}

#define TAUT_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TAUT_D16(i) TAUT_D4(i), TAUT_D4(i + 4), TAUT_D4(i + 8), TAUT_D4(i + 12)
#define TAUT_D32 TAUT_D16(0), TAUT_D16(16)
#define TAUT_D64 TAUT_D32, TAUT_D16(32), TAUT_D16(48)
#define TAUT_D128 TAUT_D64, TAUT_D16(64), TAUT_D16(80), TAUT_D16(96), TAUT_D16(112)
#define TAUT_R32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define TAUT_R64 TAUT_R32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define TAUT_R128                                                                                                                                     \
  TAUT_R64                                                                                                                                            \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99," \
  "%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define TAUT_WGMMA(type, n, registers, operands, a_and_b, adds, columns)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" registers "}, " a_and_b ", " adds ", 1, 1, " columns ";\n" \
               : operands                                                                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define TAUT_WGMMA_OF(type, adds, columns)                                                                          \
  if constexpr (kN == 64) TAUT_WGMMA(type, 64, TAUT_R32, TAUT_D32, "{%32,%33,%34,%35}, %36", adds, columns);        \
  else if constexpr (kN == 128) TAUT_WGMMA(type, 128, TAUT_R64, TAUT_D64, "{%64,%65,%66,%67}, %68", adds, columns); \
  else TAUT_WGMMA(type, 256, TAUT_R128, TAUT_D128, "{%128,%129,%130,%131}, %132", adds, columns)

// Type: half or __nv_bfloat16; kN: 64, 128 or 256. kAdds: else d is the product alone. kColumns: b lies the other way.
template <class Type, int kN, bool kAdds = true, bool kColumns = false>
TAUT_DEVICE void wgmma_m64k16(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b TAUT_SITE) {
  static_assert(std::is_same_v<Type, half> || std::is_same_v<Type, __nv_bfloat16>);
  static_assert(kN == 64 || kN == 128 || kN == 256);
  static_assert(kAdds || !kColumns);
#if defined(TAUT_EMULATE)
  emulator::wgmma_m64k16(d, kN, a, b, std::is_same_v<Type, __nv_bfloat16>, kAdds, kColumns, site);
#else
  if constexpr (std::is_same_v<Type, half>) {
    if constexpr (kColumns) {
      TAUT_WGMMA_OF("f16", "1", "1");
    } else if constexpr (kAdds) {
      TAUT_WGMMA_OF("f16", "1", "0");
    } else {
      TAUT_WGMMA_OF("f16", "0", "0");
    }
  } else {
    if constexpr (kColumns) {
      TAUT_WGMMA_OF("bf16", "1", "1");
    } else if constexpr (kAdds) {
      TAUT_WGMMA_OF("bf16", "1", "0");
    } else {
      TAUT_WGMMA_OF("bf16", "0", "0");
    }
  }
#endif
}

#undef TAUT_D4
#undef TAUT_D16
#undef TAUT_D32
#undef TAUT_D64
#undef TAUT_D128
#undef TAUT_R32
#undef TAUT_R64
#undef TAUT_R128
#undef TAUT_WGMMA
#undef TAUT_WGMMA_OF

// ---- the rest of Hopper -------------------------------------------------------------------------------------------------

// The reverse of ldmatrix_x4_trans: lane l gives the address of row l % 8 of matrix l / 8; register i of lane l is written to
// elements l / 4 of rows 2 * (l % 4) and + 1 of matrix i.
TAUT_DEVICE void stmatrix_x4_trans(void* row, const uint32_t (&r)[4] TAUT_SITE) {
#if defined(TAUT_EMULATE)
  emulator::stmatrix_x4_trans(row, r, site);
#else
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared_address(row)), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#endif
}

// Two E4M3 numbers to fp16, exactly; the low byte gives the low half. sm_89
TAUT_DEVICE uint32_t cvt_f16x2_e4m3x2(uint16_t bytes) {
#if defined(TAUT_EMULATE)
  return emulator::cvt_f16x2_e4m3x2(bytes);
#else
  uint32_t r;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(r) : "h"(bytes));
  return r;
#endif
}

// A warpgroup gives registers back to the block, or waits for as many; a kernel that does so has __launch_bounds__(n, 1).
template <int kRegisters>
TAUT_DEVICE void setmaxnreg_dec() {
#if !defined(TAUT_EMULATE)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

template <int kRegisters>
TAUT_DEVICE void setmaxnreg_inc() {
#if !defined(TAUT_EMULATE)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
#endif
}

}  // namespace taut::ptx
