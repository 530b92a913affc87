#include "common/parallel.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>

namespace taut {
namespace {

// WHY capped: a thread keeps its scratch for life; past this a block is given back when a smaller one will do.
constexpr size_t kKeepBytes = size_t{64} << 20;

struct Scratch {
  uint8_t* data = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(data); }
};

struct Team {
  std::atomic<int64_t> covered{0}, joined{0};  // of the members to be: how many are accounted for, how many there are
  alignas(64) std::atomic<int64_t> arrived{0};
  alignas(64) std::atomic<int64_t> phase{0};
  std::atomic<bool> failed{false};
  std::atomic<int64_t> members{0};
  uint8_t* shared[kScratchSlots] = {};
};
// Which team this thread is in; none while it runs a task.
thread_local Team* current_team = nullptr;
thread_local int64_t current_member = 0;

template <class Condition>
void spin_until(const Condition& condition) {
  // WHY yield at last: where threads are more than processors, the one that is waited for may not be running.
  for (int64_t turn = 0; !condition(); turn++) {
    if (turn >= 1 << 10) std::this_thread::yield();
#if defined(__x86_64__)
    else __builtin_ia32_pause();
#elif defined(__aarch64__)
    else asm volatile("yield");
#endif
  }
}

void barrier(Team& team) {
  const int64_t phase = team.phase.load(std::memory_order_relaxed);
  if (team.arrived.fetch_add(1, std::memory_order_acq_rel) == team.members.load(std::memory_order_relaxed) - 1) {
    team.arrived.store(0, std::memory_order_relaxed);
    team.phase.store(phase + 1, std::memory_order_release);
  } else {
    spin_until([&] { return team.phase.load(std::memory_order_acquire) != phase || team.failed.load(std::memory_order_relaxed); });
  }
  if (team.failed.load(std::memory_order_relaxed)) throw std::runtime_error("another thread of this call failed");
}

uint8_t* own_scratch(int slot, size_t bytes) {
  thread_local Scratch slots[kScratchSlots];
  Scratch& block = slots[slot];
  if (bytes > block.size || (block.size > kKeepBytes && bytes <= kKeepBytes)) {
    std::free(block.data);
    block.data = nullptr;
    block.size = (bytes + 4095) / 4096 * 4096;
    block.data = static_cast<uint8_t*>(std::aligned_alloc(4096, block.size));
    if (!block.data) {
      block.size = 0;
      throw std::bad_alloc();
    }
  }
  return block.data;
}

}  // namespace

bool in_team() { return current_team != nullptr; }

void run_tasks(int64_t num_tasks, TaskBody body, void* context) {
  if (Team* team = current_team) {
    const int64_t members = team->members.load(std::memory_order_relaxed);
    current_team = nullptr;  // a task's own calls are serial
    for (int64_t task = current_member; task < num_tasks; task += members) body(context, task);
    current_team = team;
    return barrier(*team);
  }
  torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) body(context, task);
  });
}

void run_team(int64_t num_threads, TaskBody body, void* context) {
  if (num_threads <= 1 || current_team) return body(context, 0);
  Team team;
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    // WHY counted: inside another parallel region, or where the pool is smaller than asked for, one call comes for several members.
    const int64_t order = team.joined.fetch_add(1, std::memory_order_acq_rel);
    team.covered.fetch_add(end - begin, std::memory_order_acq_rel);
    spin_until([&] { return team.covered.load(std::memory_order_acquire) == num_threads; });
    const int64_t members = team.joined.load(std::memory_order_acquire);
    team.members.store(members, std::memory_order_relaxed);  // by each, the same
    current_team = &team;
    current_member = members == num_threads ? begin : order;  // the same part of the work on the same thread in every call
    try {
      body(context, current_member);
    } catch (...) {
      current_team = nullptr;
      team.failed.store(true, std::memory_order_relaxed);
      throw;
    }
    current_team = nullptr;
  });
}

void wait_until(const int32_t* counter, int32_t value) {
  spin_until([&] { return __atomic_load_n(counter, __ATOMIC_ACQUIRE) >= value; });
}

uint8_t* scratch(int slot, size_t bytes) {
  Team* team = slot != 1 ? current_team : nullptr;
  if (!team) return own_scratch(slot, bytes);
  if (current_member == 0) team->shared[slot] = own_scratch(slot, bytes);
  barrier(*team);
  return team->shared[slot];
}

}  // namespace taut
