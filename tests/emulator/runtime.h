// The inside of the emulator, shared by its .cpp files; kernels see cuda_emulator.h only.
//
// A launch runs block after block on the calling OS thread. The threads of a block are fibers: each runs until it waits for
// others (barrier, warp collective), and the next one that can run is chosen by the thread order. Nothing ever preempts a
// fiber, so the runtime needs no locks inside a launch.
//
//   emulator.cpp  fibers, their scheduling, launches, barriers, warp collectives, errors
//   memory.cpp    what kernels may touch, and the checks of the checked mode: shadow memory, vector clocks, access hooks
//   matrix.cpp    cp.async, ldmatrix, mma
//   hopper.cpp    mbarrier, TMA, wgmma
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda_emulator.h"

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kMaxDynamicSmem = 227 * 1024;  // what sm_90 has; smaller devices are held to theirs in launch

enum class Order { kFifo, kLifo, kRandom };  // which of the threads that can run goes next; blocks are taken in this order too

struct Launch {
  bool in_kernel = false;     // a fiber is running: accesses are the kernel's
  int threads = 0;            // in a block
  int current = 0;            // the thread whose fiber runs. Collectives set it for a while to the thread an access belongs to.
  uint32_t number = 0;        // of the launch, from 1
  uint32_t block = 0;         // linear index of the running block
  uint32_t block_serial = 0;  // counts the blocks of all launches, from 1
  Order order = Order::kFifo;
  unsigned char* dynamic_smem = nullptr;
  size_t dynamic_bytes = 0;
  uintptr_t static_begin = 0, static_end = 0;  // static shared memory: the thread-local segment of the kernel's library
  uintptr_t arguments_begin = 0, arguments_end = 0;
};
extern Launch run;

// True in a library whose kernels were compiled with access hooks (see memory.cpp).
extern bool checked;

// Ends the launch with an error that names kernel, block, thread and, if known, the source line.
[[noreturn, gnu::format(printf, 1, 2)]] void fail(const char* format, ...);
// A cheap way to refuse an instruction on a device that does not have it.
void require_sm(int sm, const char* instruction, Site site);

// ---- scheduling -------------------------------------------------------------------------------------------------------

void note(const char* what, Site site);  // what the current thread is about to do, for messages
void wait();                             // suspends the current thread until wake(it)
void wake(int thread);
uint64_t random();  // the seeded stream of the thread order

// Asynchronous units (TMA, wgmma): hooks into the life of a block.
struct Unit {
  void (*reset)();     // a block starts
  bool (*progress)();  // no thread can run: finish one pending operation and say whether there was one
  void (*finish)();    // all threads of the block have returned; may fail
};
bool register_unit(Unit unit);

// One rendezvous of the lanes of a warp that are in `mask`. The last to arrive calls combine(arguments of the 32 lanes, mask).
using Combine = void (*)(void** arguments, uint32_t mask);
void collective(Combine combine, void* argument, uint32_t mask, bool orders_memory, const char* what, Site site);

// ---- memory -----------------------------------------------------------------------------------------------------------

// The last two are volatile accesses of global memory, by which blocks pass flags.
enum class Access { kRead, kWrite, kAtomic, kAtomicLoad, kAtomicStore };

inline bool in_dynamic_smem(uintptr_t a, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(run.dynamic_smem);
  return a >= begin && a + bytes <= begin + run.dynamic_bytes;
}
inline bool in_shared(uintptr_t a, size_t bytes) { return in_dynamic_smem(a, bytes) || (a >= run.static_begin && a + bytes <= run.static_end); }
bool near_shared(uintptr_t a);      // in shared memory or in the unused rest of its reservation
std::string describe(uintptr_t a);  // "dynamic shared +64", "packed[+128 bytes] (4096 bytes long)"

// Bounds in both modes; in checked mode also races, initialisation and copies in flight. The access is run.current's.
void access_shared(const void* p, size_t bytes, Access access, const char* what);
void access_global(const void* p, size_t bytes, Access access, const char* what);
void host_write(const void* p, size_t bytes);  // a copy or memset by the host, between launches

// Shared bytes that an asynchronous copy of `thread` will write: whoever touches them before the copy lands is at fault.
void set_in_flight(const void* p, size_t bytes, int thread);
void clear_in_flight(const void* p, size_t bytes);
// The thread whose ordinary store was the last one there and was not followed by its fence.proxy.async, or -1.
int unfenced_writer(const void* p, size_t bytes);
void fence_generic_writes();  // fence.proxy.async of the current thread
// A copy by the asynchronous proxy has landed: it counts as a write of `thread` at the moment of `clock`.
using Clock = std::vector<uint32_t>;  // one component for each thread of the block
void write_shared_async(const void* p, size_t bytes, int thread, const Clock& clock);

// Vector clocks, for what orders memory besides barriers (mbarrier). Nothing happens in fast mode.
void release(Clock& into);                                                              // into = max(into, the current thread's clock), which then advances
void acquire(const Clock& from);                                                        // the current thread's clock = max(it, from)
void order_threads(const std::vector<int>& arrivals, const std::vector<int>& waiters);  // a partial barrier
void order_block();                                                                     // a barrier of all threads

void start_launch_checks();
void start_block_checks();
void fence_global();  // __threadfence of the current thread

}  // namespace emulator
