// What kernels may touch, and the checks of the checked mode.
//
// HOW ACCESSES ARE SEEN. Kernels of the checked library are compiled with -fsanitize=thread, but its runtime is not linked:
// the functions that gcc calls at each load and store (__tsan_read4, ...) are defined here. -fsanitize=alignment likewise.
//
// SHARED MEMORY has a cell for every byte: who wrote it last and who has read it since, by vector clock; whether it holds
// anything; whether an asynchronous copy to it is in flight. Two accesses by different threads, one of them a write, must be
// ordered by barriers, whatever order the threads happened to run in. Aligned 4-byte words use one cell until a narrower
// access splits them.
//
// GLOBAL MEMORY that was exposed as writable has such cells too, with the block of each access: blocks are ordered only by a
// __threadfence before an atomic (or volatile store) of the one and an atomic (or volatile load) of the same address by the
// other. Of the readers since the last write only the latest is known, so a write that races with an earlier reader may be missed.
//
// VECTOR CLOCKS. clocks[t][u] is the latest step of thread u that thread t knows to be over. A barrier of the whole block
// starts a new epoch: whatever is older is ordered, and nobody's clock has to be touched but for the step.
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <unordered_map>

#include "runtime.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {

bool checked = false;
bool in_library(uintptr_t a);  // emulator.cpp
int stack_owner(uintptr_t a);  // emulator.cpp
uint64_t switch_count();       // emulator.cpp
extern const void* access_pc;  // emulator.cpp

namespace {

constexpr uint16_t kNobody = 0xffff, kMany = 0xfffe;

// ---- vector clocks ----------------------------------------------------------------------------------------------------

std::vector<uint32_t> clocks;  // [threads][threads]
uint32_t epoch;                // of the block; never 0

uint32_t* clock_of(int thread) { return clocks.data() + static_cast<size_t>(thread) * run.threads; }
uint32_t& step_of(int thread) { return clock_of(thread)[thread]; }

void join(uint32_t* into, const uint32_t* from) {
  for (int u = 0; u < run.threads; u++) into[u] = std::max(into[u], from[u]);
}

// ---- shared memory ----------------------------------------------------------------------------------------------------

struct Cell {
  uint32_t block_serial;  // of the block that the rest belongs to: an older cell counts as fresh
  uint32_t epoch;         // of the accesses below: older ones are ordered before everything
  uint32_t write_step, read_step;
  uint32_t readers;           // if reader is kMany: index of their steps in reader_steps
  uint16_t writer, reader;    // threads, kNobody or kMany
  uint16_t in_flight;         // thread + 1 of an asynchronous copy to here
  uint16_t unfenced;          // thread + 1 of an ordinary store that no fence.proxy.async has followed
  bool initialised, is_word;  // is_word: stands for all 4 bytes of an aligned word
};

std::vector<Cell> dynamic_cells, static_cells;
std::vector<uint32_t> reader_steps;  // rows of one step a thread
uint32_t reader_rows;

Cell* cell_of(uintptr_t a) {
  if (in_dynamic_smem(a, 1)) return &dynamic_cells[a - reinterpret_cast<uintptr_t>(run.dynamic_smem)];
  if (a >= run.static_begin && a < run.static_end) return &static_cells[a - run.static_begin];
  return nullptr;
}

void refresh(Cell& c) {
  if (c.block_serial != run.block_serial) {
    c = Cell{};
    c.block_serial = run.block_serial;
    c.writer = c.reader = kNobody;
    c.epoch = epoch;
  } else if (c.epoch != epoch) {
    c.epoch = epoch;
    c.writer = c.reader = kNobody;
  }
}

// WHY a split may need refreshed bytes: they are as old as the word's last use as bytes.
void split_word(Cell* word) {
  word->is_word = false;
  for (int i = 1; i < 4; i++) {
    word[i] = *word;
    if (word->reader != kMany) continue;
    word[i].readers = reader_rows++;  // each byte needs a row of its own
    if (reader_steps.size() < size_t{reader_rows} * run.threads) reader_steps.resize(reader_steps.size() * 2 + size_t{64} * run.threads);
    std::copy_n(&reader_steps[size_t{word->readers} * run.threads], run.threads, &reader_steps[size_t{word[i].readers} * run.threads]);
  }
}

void add_reader(Cell& c) {
  const auto me = static_cast<uint16_t>(run.current);
  if (c.reader == kMany) {
    reader_steps[size_t{c.readers} * run.threads + me] = step_of(me);
  } else if (c.reader == kNobody || c.reader == me) {
    c.reader = me, c.read_step = step_of(me);
  } else {
    const uint32_t row = reader_rows++;
    if (reader_steps.size() < size_t{reader_rows} * run.threads) reader_steps.resize(reader_steps.size() * 2 + size_t{64} * run.threads);
    uint32_t* steps = &reader_steps[size_t{row} * run.threads];
    std::fill_n(steps, run.threads, 0u);
    steps[c.reader] = c.read_step, steps[me] = step_of(me);
    c.reader = kMany, c.readers = row;
  }
}

[[noreturn]] void fail_race(uintptr_t a, const char* what, const char* earlier, int thread) {
  fail("data race at %s: %s by thread %d after an unordered %s by thread %d", describe(a).c_str(), what, run.current, earlier, thread);
}

void check_cell(Cell& c, uintptr_t a, Access access, const char* what) {
  refresh(c);
  const int me = run.current;
  const uint32_t* known = clock_of(me);
  if (c.in_flight) fail("%s touches %s while an asynchronous copy by thread %d is in flight there", what, describe(a).c_str(), c.in_flight - 1);
  if (c.writer != kNobody && c.writer != me && known[c.writer] < c.write_step && access != Access::kAtomic) fail_race(a, what, "write", c.writer);
  if (access == Access::kRead) {
    if (!c.initialised) fail("%s reads uninitialised %s", what, describe(a).c_str());
    add_reader(c);
    return;
  }
  if (c.reader == kMany) {
    const uint32_t* steps = &reader_steps[size_t{c.readers} * run.threads];
    for (int u = 0; u < run.threads; u++)
      if (u != me && steps[u] > known[u]) fail_race(a, what, "read", u);
  } else if (c.reader != kNobody && c.reader != me && known[c.reader] < c.read_step) {
    fail_race(a, what, "read", c.reader);
  }
  c.initialised = true;
  if (access == Access::kAtomic) return;
  c.writer = static_cast<uint16_t>(me), c.write_step = step_of(me);
  c.reader = kNobody;
  c.unfenced = static_cast<uint16_t>(me + 1);
}

// Calls visit(cell, address) for the cells that stand for these bytes.
template <class Visit>
void for_cells(uintptr_t a, size_t bytes, Visit visit) {
  const uintptr_t end = a + bytes;
  while (a < end) {
    Cell* word = cell_of(a & ~uintptr_t{3});
    const bool whole = a % 4 == 0 && a + 4 <= end;
    if (whole) {
      const bool fresh = word->block_serial != run.block_serial;
      if (fresh) refresh(*word), word->is_word = true;
      if (word->is_word) visit(*word, a);
      else
        for (int i = 0; i < 4; i++) visit(word[i], a + i);
      a += 4;
    } else {
      if (word->block_serial == run.block_serial && word->is_word) split_word(word);
      else refresh(*word);
      visit(*cell_of(a), a);
      a++;
    }
  }
}

// ---- global memory ----------------------------------------------------------------------------------------------------

struct GlobalCell {
  uint32_t launch;  // that the rest, but for `initialised`, belongs to
  uint32_t write_block, write_epoch, write_step;
  uint32_t read_block, read_epoch, read_step;
  uint16_t writer, reader;   // threads or kNobody
  bool initialised, atomic;  // atomic: the last write was one
};

struct Buffer {
  std::string name;
  uintptr_t begin, end;
  bool writable;
  GlobalCell* cells;  // one a byte, if writable and checked; untouched pages cost nothing
};

std::vector<Buffer> buffers;
size_t last_buffer;

const Buffer* buffer_of(uintptr_t a, size_t bytes) {
  const auto holds = [&](const Buffer& b) { return a >= b.begin && a + bytes <= b.end; };
  if (last_buffer < buffers.size() && holds(buffers[last_buffer])) return &buffers[last_buffer];
  for (size_t i = 0; i < buffers.size(); i++)
    if (holds(buffers[i])) return &buffers[last_buffer = i];
  return nullptr;
}

// By block: the steps of its threads whose writes others may see, or are known to have seen.
using BlockKnowledge = std::map<uint32_t, Clock>;

BlockKnowledge acquired;                                 // what the running block knows of others
std::unordered_map<uintptr_t, BlockKnowledge> released;  // by the address of the atomic that said so

// Of the running block: the steps that a __threadfence has made visible, as each thread knows them [threads][threads]; and as
// all know them since the last barrier. Barriers pass this on: whoever does the atomic need not be who did the fence.
std::vector<uint32_t> fenced;
Clock fenced_for_all;
bool any_fence, fence_since_barrier;
Clock epoch_steps;  // everybody's steps when the epoch began

void join(Clock& into, const Clock& from) {
  into.resize(std::max(into.size(), from.size()), 0u);
  for (size_t u = 0; u < from.size(); u++) into[u] = std::max(into[u], from[u]);
}

uint32_t* fenced_of(int thread) { return fenced.data() + static_cast<size_t>(thread) * run.threads; }

// WHY a limit: a block that waits for another one would do so for ever, since blocks run one after the other.
void count_poll(uintptr_t a) {
  constexpr uint64_t kMostPolls = 1 << 20;
  static uint64_t polls, switches;
  if (switches != switch_count()) polls = 0, switches = switch_count();
  if (++polls > kMostPolls) fail("the thread spins on %s: blocks run one after the other here, and none may wait for a later one", describe(a).c_str());
}

void synchronise(uintptr_t a) {
  count_poll(a);
  BlockKnowledge& at = released[a];
  for (const auto& [block, steps] : at)
    if (block != run.block) join(acquired[block], steps);
  if (!any_fence) return;
  for (const auto& [block, steps] : acquired) join(at[block], steps);
  join(at[run.block], Clock(fenced_of(run.current), fenced_of(run.current) + run.threads));
  join(at[run.block], fenced_for_all);
}

bool is_ordered(uint32_t block, uint32_t then_epoch, int thread, uint32_t step) {
  if (block == run.block) return then_epoch < epoch || thread == run.current || clock_of(run.current)[thread] >= step;
  const auto found = acquired.find(block);
  return found != acquired.end() && static_cast<size_t>(thread) < found->second.size() && found->second[thread] >= step;
}

[[noreturn]] void fail_global_race(uintptr_t a, const char* what, const char* earlier, uint32_t block, int thread) {
  if (block == run.block) fail_race(a, what, earlier, thread);
  fail("data race between blocks at %s: %s by block %u after an unordered %s by block %u (thread %d)", describe(a).c_str(), what, run.block, earlier, block,
       thread);
}

void check_global_cell(GlobalCell& c, uintptr_t a, Access access, const char* what) {
  if (c.launch != run.number) {
    c.launch = run.number;
    c.writer = c.reader = kNobody;
  }
  const int me = run.current;
  const bool atomic = access >= Access::kAtomic, reads = access != Access::kWrite && access != Access::kAtomicStore;
  if (reads && !c.initialised) fail("%s reads uninitialised %s", what, describe(a).c_str());
  if (c.writer != kNobody && !(c.atomic && atomic) && !is_ordered(c.write_block, c.write_epoch, c.writer, c.write_step))
    fail_global_race(a, what, c.atomic ? "atomic" : "write", c.write_block, c.writer);
  if (access == Access::kAtomicLoad) return;
  if (access == Access::kRead) {
    c.reader = static_cast<uint16_t>(me);
    c.read_block = run.block, c.read_epoch = epoch, c.read_step = step_of(me);
    return;
  }
  if (c.reader != kNobody && !is_ordered(c.read_block, c.read_epoch, c.reader, c.read_step)) fail_global_race(a, what, "read", c.read_block, c.reader);
  c.initialised = true;
  c.atomic = atomic;
  c.writer = static_cast<uint16_t>(me), c.reader = kNobody;
  c.write_block = run.block, c.write_epoch = epoch, c.write_step = step_of(me);
}

}  // namespace

// ---- clocks, for whatever orders memory -------------------------------------------------------------------------------

void release(Clock& into) {
  if (!checked) return;
  into.resize(run.threads, 0u);
  join(into.data(), clock_of(run.current));
  step_of(run.current)++;
}

void acquire(const Clock& from) {
  if (checked && !from.empty()) join(clock_of(run.current), from.data());
}

void order_threads(const std::vector<int>& arrivals, const std::vector<int>& waiters) {
  if (!checked) return;
  static Clock all;
  all.assign(run.threads, 0u);
  for (const int t : arrivals) join(all.data(), clock_of(t));
  for (const int t : waiters) join(clock_of(t), all.data());
  if (any_fence) {
    all.assign(run.threads, 0u);
    for (const int t : arrivals) join(all.data(), fenced_of(t));
    for (const int t : waiters) join(fenced_of(t), all.data());
  }
  for (const int t : arrivals) step_of(t)++;
}

void order_block() {
  if (!checked) return;
  epoch++;
  reader_rows = 0;
  for (int t = 0; t < run.threads; t++) epoch_steps[t] = step_of(t)++;
  if (!fence_since_barrier) return;
  for (int t = 0; t < run.threads; t++) join(fenced_for_all.data(), fenced_of(t));
  fence_since_barrier = false;
}

void fence_global() {
  if (!checked) return;
  if (!any_fence) {
    fenced.assign(static_cast<size_t>(run.threads) * run.threads, 0u);
    fenced_for_all.assign(run.threads, 0u);
  }
  any_fence = fence_since_barrier = true;
  join(fenced_of(run.current), clock_of(run.current));
  join(fenced_of(run.current), epoch_steps.data());
  step_of(run.current)++;
}

void start_launch_checks() {
  if (!checked) return;
  released.clear();
  clocks.resize(static_cast<size_t>(run.threads) * run.threads);
  dynamic_cells.resize(run.dynamic_bytes + 4);  // +4: the word of the last bytes
  static_cells.resize(run.static_end - run.static_begin + 4);
}

void start_block_checks() {
  if (!checked) return;
  std::fill(clocks.begin(), clocks.end(), 0u);
  for (int t = 0; t < run.threads; t++) step_of(t) = 1;
  epoch = 1;
  reader_rows = 0;
  epoch_steps.assign(run.threads, 0u);
  acquired.clear();
  any_fence = fence_since_barrier = false;
}

// ---- what may be touched ----------------------------------------------------------------------------------------------

static void forget(const Buffer& b) {
  if (b.cells) munmap(b.cells, (b.end - b.begin) * sizeof(GlobalCell));
}

void expose(const char* name, const void* p, size_t bytes, bool writable, bool initialised) {
  if (bytes == 0) return;
  // NaN in every float format: an element of out that no kernel writes must not keep the result of the call before.
  if (writable && !initialised) memset(const_cast<void*>(p), 0xff, bytes);
  Buffer b{name, reinterpret_cast<uintptr_t>(p), reinterpret_cast<uintptr_t>(p) + bytes, writable, nullptr};
  // What was exposed there before has been freed since.
  std::erase_if(buffers, [&](const Buffer& old) {
    const bool overlaps = old.begin < b.end && b.begin < old.end;
    if (overlaps) forget(old);
    return overlaps;
  });
  if (writable && checked) {
    void* cells = mmap(nullptr, bytes * sizeof(GlobalCell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cells == MAP_FAILED) fail("no memory to watch %zu bytes of %s", bytes, name);
    b.cells = static_cast<GlobalCell*>(cells);
    if (initialised)
      for (size_t i = 0; i < bytes; i++) b.cells[i].initialised = true;
  }
  buffers.push_back(std::move(b));
}

void expose(const char* name, const void* p, size_t bytes, bool writable) { expose(name, p, bytes, writable, !writable); }

void hide_all() {
  for (const Buffer& b : buffers) forget(b);
  buffers.clear();
}

std::string describe(uintptr_t a) {
  char text[256];
  if (a >= run.static_begin && a < run.static_end) snprintf(text, sizeof text, "static shared memory +%zu", static_cast<size_t>(a - run.static_begin));
  else if (near_shared(a))
    snprintf(text, sizeof text, "dynamic shared memory +%zu (of %zu bytes)", static_cast<size_t>(a - reinterpret_cast<uintptr_t>(run.dynamic_smem)),
             run.dynamic_bytes);
  else {
    const Buffer* nearest = nullptr;
    uintptr_t distance = 1 << 20;
    for (const Buffer& b : buffers) {
      const uintptr_t away = a < b.begin ? b.begin - a : a >= b.end ? a - b.end + 1 : 0;
      if (away < distance) nearest = &b, distance = away;
    }
    if (nearest)
      snprintf(text, sizeof text, "%s[%+td bytes] (%zu bytes long)", nearest->name.c_str(), static_cast<ptrdiff_t>(a - nearest->begin),
               static_cast<size_t>(nearest->end - nearest->begin));
    else snprintf(text, sizeof text, "address %#zx", static_cast<size_t>(a));
  }
  return text;
}

void access_shared(const void* p, size_t bytes, Access access, const char* what) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (!in_shared(a, bytes)) fail("%s: %zu bytes at %s are not all in shared memory", what, bytes, describe(a).c_str());
  if (checked) for_cells(a, bytes, [&](Cell& c, uintptr_t at) { check_cell(c, at, access, what); });
}

void access_global(const void* p, size_t bytes, Access access, const char* what) {
  if (buffers.empty()) return;  // nobody said what is allowed
  const auto a = reinterpret_cast<uintptr_t>(p);
  const Buffer* b = buffer_of(a, bytes);
  if (!b) fail("%s of %zu bytes outside every exposed buffer: %s", what, bytes, describe(a).c_str());
  if (!b->writable && access != Access::kRead && access != Access::kAtomicLoad) fail("%s to a buffer that is only to be read: %s", what, describe(a).c_str());
  if (!b->cells) return;
  for (size_t i = 0; i < bytes; i++) check_global_cell(b->cells[a - b->begin + i], a + i, access, what);
}

void host_write(const void* p, size_t bytes) {
  const Buffer* b = buffer_of(reinterpret_cast<uintptr_t>(p), bytes);
  if (b && b->cells)
    for (size_t i = 0; i < bytes; i++) b->cells[reinterpret_cast<uintptr_t>(p) - b->begin + i].initialised = true;
}

void set_in_flight(const void* p, size_t bytes, int thread) {
  if (!checked) return;
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [&](Cell& c, uintptr_t) { refresh(c), c.in_flight = static_cast<uint16_t>(thread + 1); });
}

void clear_in_flight(const void* p, size_t bytes) {
  if (!checked) return;
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [](Cell& c, uintptr_t) { refresh(c), c.in_flight = 0; });
}

int unfenced_writer(const void* p, size_t bytes) {
  int thread = -1;
  if (checked)
    for_cells(reinterpret_cast<uintptr_t>(p), bytes, [&](Cell& c, uintptr_t) {
      if (!c.in_flight && c.unfenced && c.block_serial == run.block_serial) thread = c.unfenced - 1;
    });
  return thread;
}

void fence_generic_writes() {
  if (!checked) return;
  const auto me = static_cast<uint16_t>(run.current + 1);
  for (auto* cells : {&dynamic_cells, &static_cells})
    for (Cell& c : *cells)
      if (c.unfenced == me && c.block_serial == run.block_serial) c.unfenced = 0;
}

void write_shared_async(const void* p, size_t bytes, int thread, const Clock& clock) {
  if (!checked) return;
  for_cells(reinterpret_cast<uintptr_t>(p), bytes, [&](Cell& c, uintptr_t) {
    refresh(c);
    c.in_flight = c.unfenced = 0;
    c.initialised = true;
    c.writer = static_cast<uint16_t>(thread), c.write_step = clock[thread];
    c.reader = kNobody;
  });
}

void atomic_access(const void* p, size_t bytes, Site site) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (a % bytes) fail("a misaligned atomic of %s at %s:%u", describe(a).c_str(), site.file_name(), site.line());
  if (!checked) return;
  char what[256];
  snprintf(what, sizeof what, "atomic at %s:%u", site.file_name(), site.line());
  if (near_shared(a)) return access_shared(p, bytes, Access::kAtomic, what);
  access_global(p, bytes, Access::kAtomic, what);
  synchronise(a);
}

uint4 load_global_16(const void* p, Site site) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (a % 16) fail("misaligned 16-byte load of %s at %s:%u", describe(a).c_str(), site.file_name(), site.line());
  if (near_shared(a)) fail("a global load of %s at %s:%u", describe(a).c_str(), site.file_name(), site.line());
  if (checked) access_global(p, 16, Access::kRead, "16-byte load");
  uint4 value;
  memcpy(&value, p, 16);
  return value;
}

void prefetch(const void* p, Site site) {
  const auto a = reinterpret_cast<uintptr_t>(p);
  if (near_shared(a)) fail("a prefetch of %s at %s:%u", describe(a).c_str(), site.file_name(), site.line());
  if (checked) access_global(p, 1, Access::kRead, "prefetch");
}

// ---- the hooks of instrumented code -----------------------------------------------------------------------------------

namespace {

inline void hook(const void* p, size_t bytes, bool write, bool aligned, bool is_volatile, const void* pc) {
  if (!run.in_kernel) return;
  const auto a = reinterpret_cast<uintptr_t>(p);
  const int owner = stack_owner(a);
  if (owner == run.current) return;
  access_pc = pc;
  if (owner >= 0) fail("%s of thread %d's local memory", write ? "store" : "load", owner);
  if (aligned && a % bytes) fail("misaligned %zu-byte %s at %s", bytes, write ? "store" : "load", describe(a).c_str());
  if (near_shared(a)) {
    access_shared(p, bytes, write ? Access::kWrite : Access::kRead, write ? "store" : "load");
  } else if (in_library(a) && !buffer_of(a, bytes)) {
    if (write) fail("store to a variable of the library");
  } else if (a < run.arguments_begin || a >= run.arguments_end) {
    // A volatile access is how a flag is passed between blocks: never torn, ordered by fences.
    if (is_volatile) access_global(p, bytes, write ? Access::kAtomicStore : Access::kAtomicLoad, write ? "volatile store" : "volatile load"), synchronise(a);
    else access_global(p, bytes, write ? Access::kWrite : Access::kRead, write ? "store" : "load");
  }
  access_pc = nullptr;
}

}  // namespace
}  // namespace emulator

#define EMULATOR_HOOKS(bytes)                                                                                                        \
  void __tsan_read##bytes(void* p) { emulator::hook(p, bytes, false, true, false, __builtin_return_address(0)); }                    \
  void __tsan_write##bytes(void* p) { emulator::hook(p, bytes, true, true, false, __builtin_return_address(0)); }                    \
  void __tsan_unaligned_read##bytes(void* p) { emulator::hook(p, bytes, false, false, false, __builtin_return_address(0)); }         \
  void __tsan_unaligned_write##bytes(void* p) { emulator::hook(p, bytes, true, false, false, __builtin_return_address(0)); }         \
  void __tsan_volatile_read##bytes(void* p) { emulator::hook(p, bytes, false, true, true, __builtin_return_address(0)); }            \
  void __tsan_volatile_write##bytes(void* p) { emulator::hook(p, bytes, true, true, true, __builtin_return_address(0)); }            \
  void __tsan_unaligned_volatile_read##bytes(void* p) { emulator::hook(p, bytes, false, false, true, __builtin_return_address(0)); } \
  void __tsan_unaligned_volatile_write##bytes(void* p) { emulator::hook(p, bytes, true, false, true, __builtin_return_address(0)); }

extern "C" {
EMULATOR_HOOKS(1)
EMULATOR_HOOKS(2)
EMULATOR_HOOKS(4)
EMULATOR_HOOKS(8)
EMULATOR_HOOKS(16)
void __tsan_read_range(void* p, unsigned long bytes) { emulator::hook(p, bytes, false, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, unsigned long bytes) { emulator::hook(p, bytes, true, false, false, __builtin_return_address(0)); }
// Guards of static variables in host functions, which are compiled along with the kernels.
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_init() { emulator::checked = true; }  // a constructor of every instrumented object calls it

// The layout of what -fsanitize=alignment passes.
struct UbsanLocation {
  const char* file;
  uint32_t line, column;
};
struct UbsanTypeMismatch {
  UbsanLocation location;
  void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(UbsanTypeMismatch* data, uintptr_t p) {
  if (emulator::run.in_kernel)
    emulator::fail("misaligned pointer for an access that must be %d-byte aligned: %s, at %s:%u", 1 << data->log_alignment, emulator::describe(p).c_str(),
                   data->location.file, data->location.line);
}
}
