// Fibers, launches, barriers, warp collectives, errors. See runtime.h for the whole.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "runtime.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

extern "C" void* __tls_get_addr(void*);

namespace emulator {

Launch run;
uint3 thread_index, block_index;
dim3 block_size, grid_size;

namespace {

constexpr size_t kStackPage = 64 << 10;
// WHY not a round number: stack tops a power of two apart would share one cache set.
constexpr size_t kStackBytes = kStackPage + 17 * 64;
constexpr size_t kCanaryBytes = 4096;  // poison behind the dynamic shared memory that must survive the block
constexpr uint64_t kStackCanary = 0x7461757463616e61;
constexpr int kBarriers = 16;

enum class State : uint8_t { kReady, kRunning, kWaiting, kDone };

struct Fiber {
  void* stack_pointer;
  State state;
  uint3 index;
  const char* doing;  // the latest synchronisation, for messages
  Site site;
};

// Lanes of a warp that wait for each other. Several may be under way at once, by different masks; a lane waits in one.
struct Rendezvous {
  void* arguments[32];
  uint32_t arrived, mask;
  Combine combine;
  const char* what;
  Site site;
};
struct Warp {
  int open;
  Rendezvous slots[32];
};

struct Barrier {
  int arrived, expected;  // expected 0: all threads
  Site site;
  std::vector<int> arrivals, waiters;
};

struct Statistics {
  uint64_t launches, blocks, switches, collectives;
} statistics;

Fiber fibers[kMaxThreads];
Warp warps[kMaxThreads / 32];
Barrier barriers[kBarriers];
std::vector<Unit>& units() {
  static std::vector<Unit> all;
  return all;
}

// The threads that can run: a ring that holds them all.
int ready[kMaxThreads];
unsigned ready_head, ready_tail;

int alive;
void* scheduler_stack;
unsigned char *stacks, *smem_reservation;
void (*thread_body)(void*);
void* thread_arguments;
const char* kernel_name = "?";
std::string error;
const void* error_pc;
uint64_t random_state = 1, seed = 0;
std::mutex launch_mutex;

// WHY: gives the thread-local segment the alignment that memory.cpp's words need.
alignas(16) __attribute__((used)) thread_local unsigned char static_smem_anchor[16];

uintptr_t library_begin, library_end;  // this library in memory: constants of kernels are there
struct {
  unsigned long module, offset;
} library_tls;
size_t library_tls_bytes;

}  // namespace

// Saves the callee-saved registers and the stack pointer to *save, and goes on with those of `load`.
extern "C" void taut_emulator_switch(void** save, void* load);
asm(R"(
.text
.hidden taut_emulator_switch
.globl taut_emulator_switch
.type taut_emulator_switch,@function
taut_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size taut_emulator_switch,.-taut_emulator_switch
)");

// ---- errors -----------------------------------------------------------------------------------------------------------

const void* access_pc;  // where the access under check is made; set by the hooks of memory.cpp

namespace {

bool same_site(Site a, Site b) { return a.line() == b.line() && (a.file_name() == b.file_name() || strcmp(a.file_name(), b.file_name()) == 0); }
std::string site_text(Site site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

// "file:line" of a code address, by addr2line where there is one.
std::string source_line(const void* pc) {
  Dl_info info;
  if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "";
  char command[1024], line[512] = "";
  const auto offset = static_cast<size_t>(static_cast<const char*>(pc) - static_cast<const char*>(info.dli_fbase)) - 1;
  snprintf(command, sizeof command, "addr2line -e '%s' 0x%zx 2>/dev/null", info.dli_fname, offset);
  if (FILE* pipe = popen(command, "r")) {
    if (!fgets(line, sizeof line, pipe)) line[0] = 0;
    pclose(pipe);
  }
  line[strcspn(line, "\n (")] = 0;
  if (!line[0] || line[0] == '?') { snprintf(line, sizeof line, "%s+0x%zx", info.dli_fname, offset); }
  return line;
}

}  // namespace

void fail(const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  vsnprintf(text, sizeof text, format, list);
  va_end(list);
  if (!run.in_kernel) throw std::runtime_error(std::string(kernel_name) + ": " + text);
  const Fiber& fiber = fibers[run.current];
  char head[256];
  snprintf(head, sizeof head, "block (%u,%u,%u) thread (%u,%u,%u)", block_index.x, block_index.y, block_index.z, fiber.index.x, fiber.index.y, fiber.index.z);
  error = std::string(kernel_name) + ", " + head + ": " + text;
  if (fiber.doing) error += std::string(" [last synchronisation: ") + fiber.doing + " at " + site_text(fiber.site) + "]";
  error_pc = access_pc;
  run.in_kernel = false;
  void* abandoned;
  taut_emulator_switch(&abandoned, scheduler_stack);
  abort();  // nobody comes back to a failed fiber
}

static void on_fault(int signal_number, siginfo_t* info, void* context) {
  if (!run.in_kernel) {  // not ours: whoever had the signal before us gets it again
    signal(signal_number, SIG_DFL);
    return;
  }
  access_pc = reinterpret_cast<const char*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]) + 1;
  const auto address = reinterpret_cast<uintptr_t>(info->si_addr);
  if (signal_number == SIGFPE) fail("integer division by zero");
  if (address) fail("memory fault at %s", describe(address).c_str());
  fail("memory fault at a null or misaligned address");
}

// ---- scheduling -------------------------------------------------------------------------------------------------------

uint64_t random() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}

void note(const char* what, Site site) {
  fibers[run.current].doing = what;
  fibers[run.current].site = site;
}

void wake(int thread) {
  fibers[thread].state = State::kReady;
  ready[ready_tail++ % kMaxThreads] = thread;
}

static int next_thread() {
  if (ready_head == ready_tail) return -1;
  if (run.order == Order::kFifo) return ready[ready_head++ % kMaxThreads];
  const unsigned last = (ready_tail - 1) % kMaxThreads;
  if (run.order == Order::kRandom) std::swap(ready[(ready_head + random() % (ready_tail - ready_head)) % kMaxThreads], ready[last]);
  ready_tail--;
  return ready[last];
}

static bool units_progress() {
  return std::any_of(units().begin(), units().end(), [](const Unit& unit) { return unit.progress && unit.progress(); });
}

bool register_unit(Unit unit) {
  units().push_back(unit);
  return true;
}

[[noreturn]] static void fail_stuck() {
  std::string text = "deadlock or barrier divergence, nobody can run:";
  const Fiber* previous = nullptr;
  int shown = 0;
  for (int t = 0; t < run.threads && shown < 8; t++) {
    const Fiber& f = fibers[t];
    if (previous && f.state == previous->state && f.doing == previous->doing && f.site.line() == previous->site.line()) continue;
    text += " [from thread " + std::to_string(t) + ": " + (f.state == State::kDone ? "returned" : std::string(f.doing) + " at " + site_text(f.site)) + "]";
    previous = &f, shown++;
  }
  access_pc = nullptr;
  fail("%s", text.c_str());
}

static void resume(int thread, void** save) {
  run.current = thread;
  fibers[thread].state = State::kRunning;
  thread_index = fibers[thread].index;
  statistics.switches++;
  taut_emulator_switch(save, fibers[thread].stack_pointer);
}

void wait() {
  const int me = run.current;
  fibers[me].state = State::kWaiting;
  int next;
  while ((next = next_thread()) < 0)
    if (!units_progress()) fail_stuck();
  if (next != me) resume(next, &fibers[me].stack_pointer);
  run.current = me;
  thread_index = fibers[me].index;
  fibers[me].state = State::kRunning;
}

void finish_thread_copies();  // matrix.cpp

static void fiber_main() {
  thread_body(thread_arguments);
  access_pc = nullptr;
  finish_thread_copies();
  if (*reinterpret_cast<uint64_t*>(stacks + kStackBytes * run.current) != kStackCanary) fail("the thread used more than %zu bytes of stack", kStackPage);
  fibers[run.current].state = State::kDone;
  alive--;
  const Barrier& block_barrier = barriers[0];
  if (block_barrier.arrived && block_barrier.expected == 0)
    fail("barrier divergence: the thread returned while %d threads wait at __syncthreads at %s", block_barrier.arrived, site_text(block_barrier.site).c_str());
  int next;
  while ((next = next_thread()) < 0 && units_progress()) {}
  void* abandoned;
  if (next >= 0) resume(next, &abandoned);
  if (alive) fail_stuck();
  taut_emulator_switch(&abandoned, scheduler_stack);
  abort();
}

// ---- launches ---------------------------------------------------------------------------------------------------------

// This library's segments, and its thread-local one, which is where __shared__ variables are.
static void find_library() {
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        uintptr_t begin = UINTPTR_MAX, end = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& segment = info->dlpi_phdr[i];
          if (segment.p_type != PT_LOAD) continue;
          begin = std::min<uintptr_t>(begin, info->dlpi_addr + segment.p_vaddr);
          end = std::max<uintptr_t>(end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
        }
        const auto here = reinterpret_cast<uintptr_t>(&find_library);
        if (here < begin || here >= end) return 0;
        library_begin = begin, library_end = end;
        for (int i = 0; i < info->dlpi_phnum; i++)
          if (info->dlpi_phdr[i].p_type == PT_TLS) library_tls.module = info->dlpi_tls_modid, library_tls_bytes = info->dlpi_phdr[i].p_memsz;
        return 1;
      },
      nullptr);
}

bool in_library(uintptr_t a) { return a >= library_begin && a < library_end; }

// Whose stack an address is on, or -1.
int stack_owner(uintptr_t a) {
  const uintptr_t offset = a - reinterpret_cast<uintptr_t>(stacks);
  return offset < kStackBytes * kMaxThreads ? static_cast<int>(offset / kStackBytes) : -1;
}

bool near_shared(uintptr_t a) {
  return a - reinterpret_cast<uintptr_t>(run.dynamic_smem) < kMaxDynamicSmem + kCanaryBytes || (a >= run.static_begin && a < run.static_end);
}

uint64_t switch_count() { return statistics.switches; }

unsigned char* dynamic_smem() { return run.dynamic_smem; }

namespace {

unsigned char* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw std::runtime_error("the emulator cannot reserve memory");
  return static_cast<unsigned char*>(p);
}

// Signals of a launch: memory faults become errors. The handlers from before come back with the destructor.
class FaultHandlers {
 public:
  FaultHandlers() {
    static unsigned char alternate[64 << 10];
    stack_t stack{};
    stack.ss_sp = alternate, stack.ss_size = sizeof alternate;
    sigaltstack(&stack, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault, action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~FaultHandlers() {
    for (int i = 0; i < 3; i++) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultHandlers(const FaultHandlers&) = delete;

 private:
  static constexpr int kSignals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  struct sigaction old_[3];
  stack_t old_stack_;
};

void start_block(uint32_t linear) {
  run.block = linear;
  run.block_serial++;
  block_index = {linear % grid_size.x, linear / grid_size.x % grid_size.y, linear / (grid_size.x * grid_size.y)};
  memset(run.dynamic_smem, 0xff, run.dynamic_bytes + kCanaryBytes);
  if (run.static_end > run.static_begin) memset(reinterpret_cast<void*>(run.static_begin), 0xff, run.static_end - run.static_begin);
  start_block_checks();
  for (const Unit& unit : units())
    if (unit.reset) unit.reset();
  for (Barrier& b : barriers) b.arrived = 0, b.arrivals.clear(), b.waiters.clear();
  for (int w = 0; w < run.threads / 32; w++) warps[w].open = 0;
  ready_head = ready_tail = 0;
  alive = run.threads;
  for (int t = 0; t < run.threads; t++) {
    Fiber& f = fibers[t];
    const auto i = static_cast<unsigned>(t);
    f.index = {i % block_size.x, i / block_size.x % block_size.y, i / (block_size.x * block_size.y)};
    f.doing = nullptr;
    unsigned char* bottom = stacks + kStackBytes * i;
    memcpy(bottom, &kStackCanary, sizeof kStackCanary);
    auto* top = reinterpret_cast<uintptr_t*>(bottom + kStackBytes - 64);
    *--top = 0;  // the return address of fiber_main, which never returns
    *--top = reinterpret_cast<uintptr_t>(fiber_main);
    for (int k = 0; k < 6; k++) *--top = 0;
    f.stack_pointer = top;
    wake(t);
  }
}

void run_block(uint32_t linear) {
  start_block(linear);
  error.clear();
  access_pc = nullptr;
  run.in_kernel = true;
  resume(next_thread(), &scheduler_stack);
  run.in_kernel = false;
  if (!error.empty()) {
    const std::string line = source_line(error_pc);
    throw std::runtime_error(line.empty() ? error : error + " (" + line + ")");
  }
  for (const Unit& unit : units())
    if (unit.finish) unit.finish();
  for (size_t i = 0; i < kCanaryBytes; i++)
    if (run.dynamic_smem[run.dynamic_bytes + i] != 0xff)
      fail("block (%u,%u,%u) wrote past the end of dynamic shared memory (%zu bytes) at +%zu", block_index.x, block_index.y, block_index.z, run.dynamic_bytes,
           run.dynamic_bytes + i);
}

}  // namespace

int device_smem_bytes();  // device.cpp

void launch_threads(const char* name, void (*body)(void*), void* arguments, size_t arguments_bytes, dim3 grid, dim3 block, int smem_bytes) {
  const std::lock_guard lock(launch_mutex);
  kernel_name = name;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads < 1 || threads > kMaxThreads || block.z > 64) fail("invalid block size (%u,%u,%u)", block.x, block.y, block.z);
  if (threads % 32) fail("the emulator wants whole warps; the block has %d threads", static_cast<int>(threads));
  if (blocks < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("invalid grid size (%u,%u,%u)", grid.x, grid.y, grid.z);
  if (smem_bytes < 0 || smem_bytes > device_smem_bytes()) fail("%d bytes of shared memory were asked for; this device has %d", smem_bytes, device_smem_bytes());
  if (!stacks) {
    stacks = reserve(kStackBytes * kMaxThreads);
    smem_reservation = reserve(kMaxDynamicSmem + kCanaryBytes + 1024);
    find_library();
  }
  run.threads = static_cast<int>(threads);
  run.number++;
  run.dynamic_smem = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(smem_reservation) + 1023) & ~uintptr_t{1023});
  run.dynamic_bytes = static_cast<size_t>(smem_bytes);
  run.static_begin = library_tls_bytes ? reinterpret_cast<uintptr_t>(__tls_get_addr(&library_tls)) : 0;
  run.static_end = run.static_begin + library_tls_bytes;
  run.arguments_begin = reinterpret_cast<uintptr_t>(arguments), run.arguments_end = run.arguments_begin + arguments_bytes;
  block_size = block, grid_size = grid;
  thread_body = body, thread_arguments = arguments;
  random_state = seed * 2654435761u + 88172645463325252u;
  statistics.launches++, statistics.blocks += blocks;
  start_launch_checks();

  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (run.order == Order::kLifo) std::reverse(order.begin(), order.end());
  if (run.order == Order::kRandom)
    for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[random() % (i + 1)]);
  const FaultHandlers handlers;
  for (const uint32_t linear : order) run_block(linear);
}

// ---- barriers and warp collectives ------------------------------------------------------------------------------------

void barrier(int id, int threads, bool wait_here, Site site) {
  const int me = run.current;
  note(threads == 0 ? "__syncthreads" : wait_here ? "bar.sync" : "bar.arrive", site);
  if (id < 0 || id >= kBarriers || threads < 0 || threads % 32 || threads > run.threads)
    fail("%s: no barrier %d of %d threads at %s", fibers[me].doing, id, threads, site_text(site).c_str());
  Barrier& b = barriers[id];
  if (!b.arrived) b.expected = threads, b.site = site;
  else if (b.expected != threads)
    fail("barrier %d has %d threads at %s, but %d at %s", id, threads, site_text(site).c_str(), b.expected, site_text(b.site).c_str());
  else if (threads == 0 && !same_site(b.site, site))
    fail("barrier divergence: __syncthreads at %s while other threads wait at %s", site_text(site).c_str(), site_text(b.site).c_str());
  b.arrived++;
  b.arrivals.push_back(me);
  if (wait_here) b.waiters.push_back(me);
  if (b.arrived < (threads ? threads : run.threads)) {
    if (wait_here) wait();
    return;
  }
  if (static_cast<int>(b.waiters.size()) == run.threads) order_block();
  else order_threads(b.arrivals, b.waiters);
  b.arrived = 0;
  for (const int t : b.waiters)
    if (t != me) wake(t);
  b.waiters.clear(), b.arrivals.clear();
}

void collective(Combine combine, void* argument, uint32_t mask, bool orders_memory, const char* what, Site site) {
  const int me = run.current, lane = me % 32, first = me - lane;
  note(what, site);
  if (!(mask >> lane & 1)) fail("%s at %s: the calling lane is not in its mask %08x", what, site_text(site).c_str(), mask);
  Warp& warp = warps[me / 32];
  int slot = 0;
  while (slot < warp.open && warp.slots[slot].mask != mask) slot++;
  Rendezvous& here = warp.slots[slot];
  if (slot == warp.open) {
    warp.open++;
    here.arrived = 0, here.mask = mask, here.combine = combine, here.what = what, here.site = site;
  } else if (here.combine != combine || !same_site(here.site, site)) {
    fail("warp divergence: %s at %s while other lanes of mask %08x are at %s at %s", what, site_text(site).c_str(), mask, here.what,
         site_text(here.site).c_str());
  }
  here.arguments[lane] = argument;
  here.arrived |= 1u << lane;
  if (here.arrived != mask) return wait();
  statistics.collectives++;
  if (combine) combine(here.arguments, mask);
  if (slot != --warp.open) here = warp.slots[warp.open];
  if (orders_memory && checked) {
    static std::vector<int> lanes;
    lanes.clear();
    for (int i = 0; i < 32; i++)
      if (mask >> i & 1) lanes.push_back(first + i);
    order_threads(lanes, lanes);
  }
  for (int i = 0; i < 32; i++)
    if (i != lane && (mask >> i & 1)) wake(first + i);
}

void sync_warp(uint32_t mask, Site site) { collective(nullptr, nullptr, mask, true, "__syncwarp", site); }

namespace {

struct ShuffleArgument {
  unsigned char* value;
  unsigned char old[16];
  size_t bytes;
  int argument, width;
  Shuffle kind;
};

void combine_shuffle(void** arguments, uint32_t mask) {
  for (int lane = 0; lane < 32; lane++) {
    if (!(mask >> lane & 1)) continue;
    auto& a = *static_cast<ShuffleArgument*>(arguments[lane]);
    const int begin = lane & ~(a.width - 1), end = begin + a.width;
    int source = lane;
    switch (a.kind) {
      case Shuffle::kIndex: source = begin + (a.argument & (a.width - 1)); break;
      case Shuffle::kUp: source = lane - a.argument < begin ? lane : lane - a.argument; break;
      case Shuffle::kDown: source = lane + a.argument >= end ? lane : lane + a.argument; break;
      case Shuffle::kXor: source = (lane ^ a.argument) >= end ? lane : lane ^ a.argument; break;
    }
    if (!(mask >> source & 1)) fail("a shuffle reads lane %d, which is not in its mask %08x", source, mask);
    memcpy(a.value, static_cast<ShuffleArgument*>(arguments[source])->old, a.bytes);
  }
}

struct VoteArgument {
  bool predicate;
  uint32_t ballot;
};

void combine_vote(void** arguments, uint32_t mask) {
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) ballot |= static_cast<uint32_t>(static_cast<VoteArgument*>(arguments[lane])->predicate) << lane;
  for (int lane = 0; lane < 32; lane++)
    if (mask >> lane & 1) static_cast<VoteArgument*>(arguments[lane])->ballot = ballot;
}

}  // namespace

void shuffle(uint32_t mask, void* value, size_t bytes, int argument, int width, Shuffle kind, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1))) fail("a shuffle of width %d", width);
  ShuffleArgument a{static_cast<unsigned char*>(value), {}, bytes, argument, width, kind};
  memcpy(a.old, value, bytes);
  collective(combine_shuffle, &a, mask, false, "shuffle", site);
}

void vote(uint32_t mask, bool predicate, uint32_t* ballot, Site site) {
  VoteArgument a{predicate, 0};
  collective(combine_vote, &a, mask, false, "vote", site);
  *ballot = a.ballot;
}

}  // namespace emulator

// ---- settings, for tests ----------------------------------------------------------------------------------------------

// order: 0 FIFO, 1 LIFO, 2 seeded random.
EMULATOR_EXPORT void taut_emulator_set_order(int order, uint64_t seed) {
  emulator::run.order = static_cast<emulator::Order>(order);
  emulator::seed = seed;
}

// Launches, blocks, fiber switches and warp collectives since the last call.
EMULATOR_EXPORT void taut_emulator_statistics(uint64_t* out) {
  memcpy(out, &emulator::statistics, sizeof emulator::statistics);
  emulator::statistics = {};
}
