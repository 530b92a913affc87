// The emulator's own test of Hopper: out[64,n] = (a * scales)[64,K] @ x[n,K]^T by TMA, mbarriers and wgmma with A in
// registers, as production kernels do it, and the same with one fault planted. tests/test_emulator_hopper.py says what each
// must end in.
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/launch.h"
#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace {

using namespace taut;

constexpr int kStages = 2, kStepK = 64, kConsumerWarps = 4, kThreads = 32 * (kConsumerWarps + 1), kScaleBytes = 128;

enum Fault : int {
  kNone,
  kNoEmptyWait,          // the producer overwrites a stage that is still read
  kTooFewBytes,          // `full` does not count the scales
  kTooManyBytes,         // `full` waits for bytes that never come
  kNoFullWait,           // the consumers read what has not landed
  kNoWgmmaWait,          // the sums are used while in flight
  kAOverwritten,         // registers of a are refilled while in flight
  kAccumulatorsWritten,  // sums are written while in flight
  kNoWgmmaFence,         // a is written after the only fence
  kEarlyRelease,         // a stage is given back while wgmma reads it
  kReleaseWithoutSync,   // lane 0 gives a stage back while its warp may still read it
  kNoProxyFence,         // x is written by ordinary stores
  kProxyFence,           // the same, fenced: fine
  kUnfencedBarriers,     // mbarriers are initialised without a fence
  kWrongArrivals,        // `empty` counts one warp
  kMisalignedCopy,       // a bulk copy to an odd place
  kCopyOutOfBounds,      // a bulk copy of more than there is
  kOneWarpLess,          // a warp leaves a wgmma out
  kDescriptorOutside,    // b lies behind shared memory
  kBarrierOverwritten,   // an ordinary store hits an mbarrier
};

struct Arguments {
  const uint16_t* a;       // [64, K64], K64 = K padded to 64
  const uint16_t* scales;  // [K64 / 64, 64]
  float* out;              // [64, n]
  int n, steps, fault;
};

template <class Type>
__global__ void hopper_gemm(const CUtensorMap x_map, Arguments p) {
  TAUT_DYNAMIC_SMEM(smem);
  const int x_bytes = p.n * kStepK * 2, tid = threadIdx.x, warp = tid / 32, lane = tid % 32, fault = p.fault;
  unsigned char* const s_scales = smem + kStages * x_bytes;
  auto* const full = reinterpret_cast<uint64_t*>(s_scales + kStages * kScaleBytes);
  uint64_t* const empty = full + kStages;
  if (tid == 0) {
    for (int i = 0; i < kStages; i++) {
      ptx::mbarrier_init(full + i, 1);
      ptx::mbarrier_init(empty + i, fault == kWrongArrivals ? 1 : kConsumerWarps);
    }
    if (fault != kUnfencedBarriers) ptx::fence_proxy_async();
  }
  __syncthreads();

  if (warp == kConsumerWarps) {
    if (lane != 0) return;
    for (int step = 0; step < p.steps; step++) {
      const int stage = step % kStages, round = step / kStages;
      if (fault != kNoEmptyWait) ptx::mbarrier_try_wait(empty + stage, (round & 1) ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + stage, x_bytes + (fault == kTooFewBytes ? 0 : kScaleBytes) + (fault == kTooManyBytes ? 16 : 0));
      ptx::tma_load_2d(smem + stage * x_bytes, &x_map, step * kStepK, 0, full + stage);
      unsigned char* const to = s_scales + stage * kScaleBytes + (fault == kMisalignedCopy ? 8 : 0);
      ptx::bulk_load(to, p.scales + (step + (fault == kCopyOutOfBounds ? 1 : 0)) * 64, kScaleBytes, full + stage);
    }
    return;
  }

  float d[128];
  uint32_t a[2][4];
  for (int i = 0; i < p.n / 2; i++) d[i] = 0;
  const int g = lane / 4, t = lane % 4, row = warp * 16 + g;
  ptx::wgmma_fence();
  for (int step = 0; step < p.steps; step++) {
    const int stage = step % kStages, round = step / kStages;
    if (fault != kNoFullWait) ptx::mbarrier_try_wait(full + stage, round & 1);
    if (fault == kNoProxyFence || fault == kProxyFence) {
      auto* const word = reinterpret_cast<volatile uint16_t*>(smem + stage * x_bytes) + tid;
      const uint16_t value = *word;
      *word = value;
      if (fault == kProxyFence) ptx::fence_proxy_async();
      ptx::bar_sync(1, 32 * kConsumerWarps);
    }
    if (fault == kBarrierOverwritten && tid == 0 && step == 1) *reinterpret_cast<volatile uint16_t*>(full) = 1;
    const auto* const scale = reinterpret_cast<const uint16_t*>(s_scales + stage * kScaleBytes);
    for (int j = 0; j < 4; j++) {
      if (fault != kAOverwritten) ptx::wgmma_wait<1>();
      if (j == 1 && step > 0 && fault != kEarlyRelease) {
        if (fault != kReleaseWithoutSync) __syncwarp();
        ptx::mbarrier_arrive(empty + (step - 1) % kStages, lane == 0);
      }
      for (int i = 0; i < 4; i++) {
        uint32_t pair;
        memcpy(&pair, p.a + (row + i % 2 * 8) * p.steps * kStepK + step * kStepK + j * 16 + i / 2 * 8 + 2 * t, 4);
        a[j % 2][i] = ptx::hmul2<Type>(pair, scale[row + i % 2 * 8] * 0x00010001u);
      }
      if (fault == kAccumulatorsWritten && j == 2) d[0] = 1;
      if (fault != kNoWgmmaFence) ptx::wgmma_fence();
      const unsigned char* const b = smem + stage * x_bytes + j * 32 + (fault == kDescriptorOutside ? 64 * 1024 : 0);
      const bool left_out = fault == kOneWarpLess && warp == 3 && j == 3;
      // not by its wrapper: the wrapper has the n that production kernels use, and n is an argument here
      if (!left_out)
        emulator::wgmma_m64k16(d, p.n, a[j % 2], ptx::swizzled_128b_descriptor(b), std::is_same_v<Type, __nv_bfloat16>, true, false,
                               std::source_location::current());
      ptx::wgmma_commit();
    }
    if (fault == kEarlyRelease) __syncwarp(), ptx::mbarrier_arrive(empty + stage, lane == 0);
  }
  if (fault != kNoWgmmaWait) ptx::wgmma_wait<0>();
  for (int i = 0; i < p.n / 2; i++) p.out[(row + i % 4 / 2 * 8) * p.n + i / 4 * 8 + 2 * t + i % 2] = d[i];
}

// Through the wrappers: two E4M3 numbers to fp16, and stmatrix, transposed.
struct WrapperArguments {
  const uint32_t* in;
  uint32_t* out;
};
__global__ void wrappers(WrapperArguments p) {
  TAUT_DYNAMIC_SMEM(smem);
  const int lane = threadIdx.x;
  for (int i = 0; i < 256; i++)
    if (i % 32 == lane) p.out[i] = ptx::cvt_f16x2_e4m3x2(static_cast<uint16_t>(i | (i ^ 0x81) << 8));
  uint32_t r[4];
  for (int i = 0; i < 4; i++) r[i] = p.in[lane * 4 + i];
  ptx::stmatrix_x4_trans(smem + lane * 16, r);
  __syncwarp();
  for (int i = 0; i < 4; i++) p.out[256 + lane * 4 + i] = reinterpret_cast<const uint32_t*>(smem)[lane * 4 + i];
}

std::string message;

template <class Run>
const char* guarded(Run run) {
  message.clear();
  try {
    run();
  } catch (const std::exception& failure) { message = failure.what(); }
  emulator::hide_all();
  return message.c_str();
}

}  // namespace

#define TAUT_TEST_EXPORT extern "C" __attribute__((visibility("default")))

// An empty string, or what went wrong. x is [rows, K], its rows x_row_bytes apart; what is beyond it counts as zero.
TAUT_TEST_EXPORT const char* taut_hopper_gemm(int fault, bool bf16, int n, int K, int rows, const uint16_t* a, const uint16_t* scales, const void* x,
                                              int x_row_bytes, float* out) {
  return guarded([&] {
    const int steps = (K + kStepK - 1) / kStepK;
    emulator::expose("a", a, size_t(64) * steps * kStepK * 2, false);
    emulator::expose("scales", scales, size_t(steps) * kScaleBytes, false);
    emulator::expose("x", x, size_t(rows - 1) * x_row_bytes + size_t(K) * 2, false);
    emulator::expose("out", out, size_t(64) * n * 4, true);
    const CUtensorMap map = tensor_map_16bit(x, bf16, K, rows, x_row_bytes, n);
    const int smem_bytes = kStages * (n * kStepK * 2 + kScaleBytes) + 2 * kStages * 8;
    launch("hopper_gemm", bf16 ? hopper_gemm<__nv_bfloat16> : hopper_gemm<half>, dim3(1), dim3(kThreads), smem_bytes, nullptr, map,
           Arguments{a, scales, out, n, steps, fault});
  });
}

TAUT_TEST_EXPORT const char* taut_hopper_wrappers(const uint32_t* in, uint32_t* out) {
  return guarded([&] {
    emulator::expose("in", in, 32 * 16, false);
    emulator::expose("out", out, (256 + 128) * 4, true);
    launch("wrappers", wrappers, dim3(1), dim3(32), 512, nullptr, WrapperArguments{in, out});
  });
}
