// Threads and scratch memory, as kernels see them: no torch, no OpenMP, no allocation in a loop.
#pragma once

#include <cstddef>
#include <cstdint>

namespace taut {

// Runs body(context, task) for every task in [0, num_tasks), each on one thread of torch's pool where there are
// enough (torch.set_num_threads is obeyed), and returns when all are done. Nested calls run serially.
using TaskBody = void (*)(void* context, int64_t task);
void run_tasks(int64_t num_tasks, TaskBody body, void* context);

// Runs body(context, member) on up to num_threads threads at the same time: a team, every member of which goes through the same
// code. Within it run_tasks shares the tasks out and is a barrier: about 0.2 us, where starting threads and joining them again
// takes 1 to 20. What stands outside of run_tasks, each member does for itself. Returns when all are done; a body that throws ends
// the call for all.
void run_team(int64_t num_threads, TaskBody body, void* context);
bool in_team();

// Returns when *counter, which another thread raises with release order, has reached `value`.
void wait_until(const int32_t* counter, int32_t value);

// At least `bytes` bytes, 64-byte aligned, owned by the calling thread and valid until its next call for `slot`.
// It grows and is kept, so that a decode loop never pays for page faults. Slots: 0 the caller's (in a team: one for all
// members, and asking for it is a barrier), 1 a task's own, 2 as 0, of a kernel that calls another one.
constexpr int kScratchSlots = 3;
uint8_t* scratch(int slot, size_t bytes);

namespace {

template <class F>
inline void parallel_tasks(int64_t num_tasks, const F& f) {
  if (num_tasks <= 1 && !in_team()) {
    if (num_tasks == 1) f(int64_t{0});
    return;
  }
  run_tasks(num_tasks, [](void* context, int64_t task) { (*static_cast<const F*>(context))(task); }, const_cast<void*>(static_cast<const void*>(&f)));
}

template <class F>
inline void team(int64_t num_threads, const F& f) {
  run_team(num_threads, [](void* context, int64_t member) { (*static_cast<const F*>(context))(member); }, const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace
}  // namespace taut
