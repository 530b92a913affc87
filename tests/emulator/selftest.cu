// The emulator's own test: small kernels, each with one fault that the checked mode must catch, and fine ones that must pass.
// What each must end in is said in tests/test_emulator.py. A fine kernel makes out[i] = 2 * in[i] for i in 0..255.
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/ptx.cuh"

namespace {

using namespace taut;

constexpr int kElements = 256;
constexpr size_t kBytes = kElements * sizeof(float);

struct Arguments {
  float* out;         // [256]
  const float* in;    // [256]: in[i] = i
  float* workspace;   // [256], uninitialised
  unsigned* counter;  // 0
  int zero;
};

struct Case {
  const char* name;
  void (*kernel)(Arguments);
  dim3 grid, block;
  int smem_bytes;
};

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

#define TAUT_CASE(name, blocks, threads, smem_bytes)                                                         \
  __global__ void name(Arguments a);                                                                         \
  const bool name##_added = (cases().push_back({#name, name, dim3 blocks, dim3 threads, smem_bytes}), true); \
  __global__ void name([[maybe_unused]] Arguments a)

TAUT_DEVICE void pass(const Arguments& a, int i) { a.out[i] = 2 * a.in[i]; }

// ---- barriers ---------------------------------------------------------------------------------------------------------

TAUT_CASE(barrier_not_reached_by_all, (2), (128), 0) {
  if (threadIdx.x < 64) __syncthreads();
}

TAUT_CASE(barrier_after_early_return, (2), (128), 0) {
  if (threadIdx.x >= 100) return;
  __syncthreads();
}

TAUT_CASE(barriers_of_two_places, (1), (64), 0) {
  if (threadIdx.x < 32) __syncthreads();
  else __syncthreads();
}

TAUT_CASE(named_barrier_counts_differ, (1), (128), 0) { ptx::bar_sync(1, threadIdx.x < 64 ? 128 : 64); }

TAUT_CASE(named_barrier_never_full, (1), (128), 0) {
  if (threadIdx.x < 64) ptx::bar_sync(1, 128);
}

// ---- shared memory ----------------------------------------------------------------------------------------------------

TAUT_CASE(shared_store_out_of_bounds, (1), (128), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  reinterpret_cast<float*>(smem)[threadIdx.x + 1] = 1.0f;
}

TAUT_CASE(shared_load_out_of_bounds, (1), (128), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  a.out[threadIdx.x] = reinterpret_cast<const float*>(smem)[threadIdx.x + 128];
}

TAUT_CASE(shared_load_uninitialised, (1), (128), 0) {
  __shared__ float values[128];
  a.out[threadIdx.x] = values[threadIdx.x];
}

TAUT_CASE(shared_left_over_from_the_last_block, (2), (128), 0) {
  __shared__ float values[128];
  if (blockIdx.x == 0) values[threadIdx.x] = 1.0f;
  __syncthreads();
  a.out[128 * blockIdx.x + threadIdx.x] = values[127 - threadIdx.x];
}

TAUT_CASE(missing_syncwarp, (1), (128), 0) {
  __shared__ float values[128];
  values[threadIdx.x] = 0.0f;
  __syncthreads();
  values[threadIdx.x] = 1.0f;
  a.out[threadIdx.x] = values[threadIdx.x ^ 1];
}

TAUT_CASE(syncwarp_across_warps, (1), (128), 0) {
  __shared__ float values[128];
  values[threadIdx.x] = 1.0f;
  __syncwarp();
  a.out[threadIdx.x] = values[threadIdx.x ^ 32];
}

TAUT_CASE(shuffle_does_not_order_memory, (1), (32), 0) {
  __shared__ float values[32];
  values[threadIdx.x] = 1.0f;
  __shfl_sync(~0u, 1, 0);
  a.out[threadIdx.x] = values[threadIdx.x ^ 1];
}

TAUT_CASE(overwritten_before_all_have_read, (1), (128), 0) {
  __shared__ float values[128];
  values[threadIdx.x] = a.in[threadIdx.x];
  __syncthreads();
  const float value = values[127 - threadIdx.x];
  values[threadIdx.x] = value;
}

TAUT_CASE(half_words_race, (1), (64), 0) {
  __shared__ uint16_t values[64];
  values[threadIdx.x] = 1;
  __syncthreads();
  if (threadIdx.x == 3) values[40] = 2;
  if (threadIdx.x == 50) a.out[0] = values[40] + values[41];
}

TAUT_CASE(shared_flag, (1), (64), 0) {
  __shared__ int flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == 0) flag = 1;
  if (threadIdx.x == 33) a.out[0] = static_cast<float>(flag);
}

TAUT_CASE(local_memory_of_another_thread, (1), (64), 0) {
  __shared__ float* address;
  float mine = a.in[threadIdx.x];
  if (threadIdx.x == 0) address = &mine;
  __syncthreads();
  a.out[threadIdx.x] = *address;
  __syncthreads();
}

// ---- cp.async ---------------------------------------------------------------------------------------------------------

TAUT_CASE(cp_async_without_wait, (1), (32), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<1>();
  a.out[threadIdx.x] = reinterpret_cast<const float*>(smem)[4 * threadIdx.x];
  ptx::cp_async_wait<0>();
}

TAUT_CASE(cp_async_barrier_without_wait, (1), (32), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
  __syncthreads();
  a.out[threadIdx.x] = reinterpret_cast<const float*>(smem)[threadIdx.x];
  ptx::cp_async_wait<0>();
}

TAUT_CASE(cp_async_wait_without_barrier, (1), (32), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  a.out[threadIdx.x] = reinterpret_cast<const float*>(smem)[threadIdx.x];
}

TAUT_CASE(cp_async_overlapping, (1), (128), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * (threadIdx.x / 4), a.in + 4 * (threadIdx.x / 4));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

TAUT_CASE(cp_async_never_waited_for, (1), (32), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
}

TAUT_CASE(cp_async_misaligned, (1), (32), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 4 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

TAUT_CASE(cp_async_out_of_shared, (1), (32), 256) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

TAUT_CASE(cp_async_out_of_global, (1), (128), 2048) {
  TAUT_DYNAMIC_SMEM(smem);
  ptx::cp_async_16(smem + 16 * threadIdx.x, a.in + 4 * threadIdx.x);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
}

// Two stages, and the barrier that keeps the next copy from overtaking slow readers of the stage is missing.
TAUT_CASE(pipeline_without_second_barrier, (1), (64), 2 * 256) {
  TAUT_DYNAMIC_SMEM(smem);
  const auto stage = [&](int i) { return reinterpret_cast<float*>(smem + i % 2 * 256); };
  const auto load = [&](int i) {
    ptx::cp_async_4(stage(i) + threadIdx.x, a.in + 64 * i + threadIdx.x);
    ptx::cp_async_commit();
  };
  load(0);
  for (int i = 0; i < 4; i++) {
    if (i + 1 < 4) load(i + 1);
    else ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    a.out[64 * i + threadIdx.x] = stage(i)[63 - threadIdx.x];
  }
}

// ---- warps ------------------------------------------------------------------------------------------------------------

TAUT_CASE(shuffle_without_all_lanes, (1), (64), 0) {
  if (threadIdx.x % 32 < 16) a.out[threadIdx.x] = __shfl_xor_sync(~0u, 1.0f, 1);
}

TAUT_CASE(shuffle_from_a_lane_outside_its_mask, (1), (32), 0) {
  if (threadIdx.x < 16) a.out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 20);
}

TAUT_CASE(lane_not_in_its_own_mask, (1), (32), 0) { __syncwarp(0xffff); }

TAUT_CASE(mma_in_a_divergent_branch, (1), (32), 0) {
  float d[4] = {};
  const uint32_t x[4] = {};
  if (threadIdx.x & 1) ptx::mma_m16n8k16<half>(d, x, 0, 0);
  else ptx::mma_m16n8k16<half>(d, x, 0, 0);
  a.out[threadIdx.x] = d[0];
}

TAUT_CASE(mma_sp_places_do_not_ascend, (1), (32), 0) {
  float d[4] = {};
  const uint32_t words[4] = {};
  ptx::mma_sp_m16n8k32<half, 1>(d, words, words, threadIdx.x == 14 ? 0x44446444u : 0x44444444u);
  a.out[threadIdx.x] = d[0];
}

TAUT_CASE(mma_sp_8bit_places_do_not_ascend, (1), (32), 0) {
  int d[4] = {};
  const uint32_t words[4] = {};
  ptx::mma_sp_m16n8k64_s8(d, words, words, threadIdx.x == 15 ? 0x44464444u : 0x44444444u);
  a.out[threadIdx.x] = static_cast<float>(d[0]);
}

TAUT_CASE(ldmatrix_misaligned, (1), (32), 1024) {
  TAUT_DYNAMIC_SMEM(smem);
  uint32_t r[4];
  ptx::ldmatrix_x4(r, smem + 8 * threadIdx.x);
}

TAUT_CASE(ldmatrix_out_of_bounds, (1), (32), 512 - 16) {
  TAUT_DYNAMIC_SMEM(smem);
  for (int i = threadIdx.x; i < 124; i += 32) reinterpret_cast<float*>(smem)[i] = 0.0f;
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, smem + 16 * threadIdx.x);
}

TAUT_CASE(ldmatrix_before_barrier, (1), (64), 1024) {
  TAUT_DYNAMIC_SMEM(smem);
  for (int i = threadIdx.x; i < 256; i += 64) reinterpret_cast<float*>(smem)[i] = 0.0f;
  __syncwarp();
  uint32_t r[4];
  ptx::ldmatrix_x4(r, smem + 16 * threadIdx.x);
}

// ---- global memory ----------------------------------------------------------------------------------------------------

TAUT_CASE(global_load_out_of_bounds, (1), (128), 0) { a.out[threadIdx.x] = a.in[2 * threadIdx.x + 2]; }
TAUT_CASE(global_store_out_of_bounds, (1), (256), 0) { a.out[threadIdx.x + 1] = 1.0f; }
TAUT_CASE(global_store_to_an_input, (1), (128), 0) { const_cast<float*>(a.in)[threadIdx.x] = 1.0f; }
TAUT_CASE(global_vector_misaligned, (1), (32), 0) {
  const float4 v = *reinterpret_cast<const float4*>(a.in + 1 + 4 * threadIdx.x);
  a.out[threadIdx.x] = v.x + v.w;
}
TAUT_CASE(global_nc_load_misaligned, (1), (32), 0) { a.out[threadIdx.x] = __uint_as_float(ptx::ld_global_nc_16(a.in + threadIdx.x).x); }
TAUT_CASE(workspace_uninitialised, (1), (128), 0) { a.out[threadIdx.x] = a.workspace[threadIdx.x]; }
TAUT_CASE(output_read_before_written, (1), (128), 0) { a.out[threadIdx.x] += 1.0f; }
TAUT_CASE(null_pointer, (1), (32), 0) { a.out[0] = *static_cast<const volatile float*>(nullptr); }
TAUT_CASE(atomic_misaligned, (1), (32), 0) { atomicAdd(reinterpret_cast<unsigned*>(reinterpret_cast<char*>(a.counter) + 2), 1u); }
TAUT_CASE(two_blocks_write_one_element, (2), (32), 0) { a.out[threadIdx.x + 31 * blockIdx.x] = 1.0f; }
TAUT_CASE(two_threads_write_one_element, (1), (64), 0) { a.out[threadIdx.x / 2] = 1.0f; }
TAUT_CASE(a_block_reads_what_another_wrote, (2), (32), 0) {
  if (blockIdx.x == 0) a.workspace[threadIdx.x] = 1.0f;
  else a.out[threadIdx.x] = a.workspace[threadIdx.x];
}
TAUT_CASE(atomic_and_plain_write, (2), (32), 0) {
  if (blockIdx.x == 0) atomicAdd(a.counter, 1u);
  else if (threadIdx.x == 0) *a.counter = 5;
}

// The last block adds up what all have written. kFence: whether the writes are made visible before the counter says so.
template <bool kFence>
TAUT_DEVICE void last_block_finishes(const Arguments& a) {
  __shared__ bool last;
  const int i = static_cast<int>(128 * blockIdx.x + threadIdx.x);
  a.workspace[i] = 2 * a.in[i];
  if constexpr (kFence) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(a.counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
  for (int k = threadIdx.x; k < kElements; k += 128) a.out[k] = a.workspace[k];
  if (threadIdx.x == 0) *a.counter = 0;
}
TAUT_CASE(last_block_without_fence, (2), (128), 0) { last_block_finishes<false>(a); }

// A block that waits for the other one to have run: on a GPU it may wait for ever too, if that one finds no place.
TAUT_CASE(a_block_waits_for_another, (2), (32), 0) {
  if (threadIdx.x == 0) {
    atomicAdd(a.counter, 1u);
    while (*const_cast<volatile unsigned*>(a.counter) < 2) {}
  }
}

TAUT_CASE(too_much_shared_memory, (1), (32), 164 * 1024) {}
TAUT_CASE(integer_division_by_zero, (1), (32), 0) { a.out[0] = static_cast<float>(7 / a.zero); }

// ---- fine kernels -----------------------------------------------------------------------------------------------------

TAUT_CASE(fine_features, (2), (128), 512) {
  __shared__ float values[128];
  __shared__ int sum;
  TAUT_DYNAMIC_SMEM(smem);
  auto* exchanged = reinterpret_cast<float*>(smem);
  const int t = threadIdx.x, i = static_cast<int>(128 * blockIdx.x) + t;
  if (t == 0) sum = 0;
  __syncthreads();
  atomicAdd(&sum, t);
  values[t] = a.in[i];
  if (t < 64) {
    ptx::bar_sync(1, 64);
    exchanged[t] = values[63 - t];
  } else {
    ptx::bar_sync(2, 64);
    exchanged[t] = values[64 + 127 - t];
  }
  __syncthreads();
  const float mine = exchanged[t / 64 * 64 + 63 - t % 64];
  const bool sums_agree = sum == 127 * 64, lanes_agree = __shfl_xor_sync(~0u, t, 5) == (t ^ 5);
  const unsigned ballot = __ballot_sync(~0u, t % 2);
  if (sums_agree && lanes_agree && ballot == 0xaaaaaaaau) a.out[i] = 2 * mine;
}

TAUT_CASE(fine_syncwarp, (2), (128), 0) {
  __shared__ float values[128];
  const int t = threadIdx.x, i = static_cast<int>(128 * blockIdx.x) + t;
  values[t] = a.in[i];
  __syncwarp();
  const float other = values[t ^ 1];
  __syncwarp();
  values[t ^ 1] = other;
  __syncwarp();
  a.out[i] = 2 * values[t];
}

TAUT_CASE(fine_half_words, (1), (256), 512) {
  TAUT_DYNAMIC_SMEM(smem);
  auto* values = reinterpret_cast<half*>(smem);
  const int t = threadIdx.x;
  values[t] = __float2half_rn(a.in[t]);
  __syncthreads();
  const half2 pair = reinterpret_cast<const half2*>(smem)[t / 2];
  __syncthreads();
  values[255 - t] = t % 2 ? __high2half(pair) : __low2half(pair);
  __syncthreads();
  a.out[t] = 2 * __half2float(values[255 - t]);
}

TAUT_CASE(fine_producers_and_consumers, (1), (256), 0) {
  __shared__ float values[128];
  const int t = threadIdx.x;
  if (t < 128) {
    values[t] = a.in[t];
    ptx::bar_arrive(3, 256);
    pass(a, t + 128);
  } else {
    ptx::bar_sync(3, 256);
    a.out[t - 128] = 2 * values[t - 128];
  }
}

TAUT_CASE(fine_pipeline, (1), (64), 2 * 256) {
  TAUT_DYNAMIC_SMEM(smem);
  const auto stage = [&](int i) { return reinterpret_cast<float*>(smem + i % 2 * 256); };
  const auto load = [&](int i) {
    if (i < 4) ptx::cp_async_4(stage(i) + threadIdx.x, a.in + 64 * i + threadIdx.x);
    ptx::cp_async_commit();
  };
  load(0);
  for (int i = 0; i < 4; i++) {
    load(i + 1);
    ptx::cp_async_wait<1>();
    __syncthreads();
    a.out[64 * i + 63 - threadIdx.x] = 2 * stage(i)[63 - threadIdx.x];
    __syncthreads();
  }
}

TAUT_CASE(fine_zero_fill, (1), (256), 256 * 16) {
  TAUT_DYNAMIC_SMEM(smem);
  const int t = threadIdx.x;
  // The source of a copy of 0 bytes may be anywhere, if aligned.
  ptx::cp_async_16(smem + 16 * t, t % 2 ? a.in + t / 4 * 4 : a.in + 4096, t % 2 ? 4 + t % 4 * 4 : 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  const auto* got = reinterpret_cast<const float*>(smem + 16 * t);
  const int count = t % 2 ? 1 + t % 4 : 0;
  bool right = true;
  for (int i = 0; i < 4; i++) right = right && got[i] == (i < count ? a.in[t / 4 * 4 + i] : 0.0f);
  if (right) pass(a, t);
}

TAUT_CASE(fine_last_block, (2), (128), 0) { last_block_finishes<true>(a); }

TAUT_CASE(fine_indices, (2, 2), (8, 4, 2), 0) {
  const int t = static_cast<int>(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
  pass(a, t + 64 * static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y));
}

TAUT_CASE(fine_partial_masks, (1), (256), 0) {
  const int t = threadIdx.x, lane = t % 32;
  float value = a.in[t];
  if (lane < 16) value = __shfl_xor_sync(0xffffu, value, 1);
  else if (lane >= 24) value = __shfl_down_sync(0xff000000u, value, 4, 8);
  __syncwarp();
  const int expected = lane < 16 ? t ^ 1 : lane >= 24 && lane < 28 ? t + 4 : t;
  if (value == a.in[expected]) pass(a, t);
}

TAUT_CASE(fine_atomics, (2), (128), 0) {
  const int i = static_cast<int>(128 * blockIdx.x + threadIdx.x);
  const unsigned before = atomicAdd(a.counter, 1u);
  pass(a, i);
  if (before >= kElements) a.out[i] = -1;
}

TAUT_CASE(fine_vectors, (1), (64), 0) {
  const int t = threadIdx.x;
  const uint4 nc = ptx::ld_global_nc_16(a.in + 4 * t);
  const float4 plain = *reinterpret_cast<const float4*>(a.in + 4 * t);
  *reinterpret_cast<float4*>(a.out + 4 * t) = make_float4(2 * plain.x, 2 * __uint_as_float(nc.y), 2 * __ldg(a.in + 4 * t + 2), 2 * plain.w);
}

}  // namespace

#define TAUT_TEST_EXPORT extern "C" __attribute__((visibility("default")))

TAUT_TEST_EXPORT const char* taut_selftest_name(int index) { return index < static_cast<int>(cases().size()) ? cases()[index].name : nullptr; }

// Runs one case: an empty string, or what went wrong.
TAUT_TEST_EXPORT const char* taut_selftest_run(int index) {
  static std::string message;
  message.clear();
  // Of the heap, as torch's tensors are, and far from each other.
  const auto allocate = [](size_t bytes) { return std::unique_ptr<void, void (*)(void*)>(aligned_alloc(256, 4096 + bytes), free); };
  const auto in_memory = allocate(kBytes), out_memory = allocate(kBytes), workspace_memory = allocate(kBytes), counter_memory = allocate(256);
  auto *in = static_cast<float*>(in_memory.get()), *out = static_cast<float*>(out_memory.get()), *workspace = static_cast<float*>(workspace_memory.get());
  auto* counter = static_cast<unsigned*>(counter_memory.get());
  for (int i = 0; i < kElements; i++) in[i] = static_cast<float>(i), out[i] = workspace[i] = -1.0f;
  const Case& test = cases()[index];
  emulator::expose("in", in, kBytes, false);
  emulator::expose("out", out, kBytes, true);
  emulator::expose("workspace", workspace, kBytes, true);
  emulator::expose("counter", counter, 8, true);
  cudaMemsetAsync(counter, 0, 8, nullptr);
  try {
    launch(test.name, test.kernel, test.grid, test.block, test.smem_bytes, nullptr, Arguments{out, in, workspace, counter, 0});
    for (int i = 0; i < kElements && message.empty(); i++)
      if (out[i] != 2 * in[i]) message = "wrong result: out[" + std::to_string(i) + "] is " + std::to_string(out[i]);
  } catch (const std::exception& failure) { message = failure.what(); }
  emulator::hide_all();
  return message.c_str();
}
