// mbarrier, TMA and wgmma.
//
// TMA. From its issue until it lands the destination holds poison, and in checked mode whoever touches it is at fault. With
// FIFO thread order a copy lands at once, with the others as late as possible: when no thread can run. A kernel that is right
// only for one of the two fails in the other.
//
// WGMMA with A in registers. From its issue until the wait that retires its group the accumulators hold poison; a and b are
// read at that wait. What changed in between is reported: a by comparison with what it was, b by the shared-memory checks,
// which are made at the issue and at the wait. A group retires when all 128 threads of the warpgroup wait for it.
//
// wgmma.fence is required as far as it can be seen: before the first wgmma of a thread, and whenever a or the accumulators
// of a wgmma are not what the latest wgmma with the same registers had or left there.
//
// Not modelled: clusters, A in shared memory, other swizzles than 128 bytes, TMA stores.
#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <unordered_map>

#include "common/device.h"
#include "hopper.h"
#include "runtime.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

constexpr int kWarpgroup = 128;
constexpr uint32_t kSmemBase = 1024;  // where dynamic shared memory begins in the shared window, as on sm_90

std::string at(const char* what, Site site) { return std::string(what) + " at " + site.file_name() + ":" + std::to_string(site.line()); }
std::string place(const void* p) { return describe(reinterpret_cast<uintptr_t>(p)); }

// ---- mbarrier ---------------------------------------------------------------------------------------------------------

constexpr uint64_t kMagic = 0x6d62617272696572;

struct Mbarrier {
  int count, missing;  // arrivals of a phase, and those it still waits for
  uint32_t parity;     // of the phase that is going on
  int64_t bytes;       // expected minus landed
  Clock arrivals, released;
  std::vector<int> waiters;
};
std::unordered_map<uint64_t*, Mbarrier> mbarriers;

Mbarrier& mbarrier_at(uint64_t* p, const char* what, Site site) {
  const auto found = mbarriers.find(p);
  if (found == mbarriers.end()) fail("%s: no mbarrier was initialised at %s", at(what, site).c_str(), place(p).c_str());
  if (*p != kMagic) fail("%s: the mbarrier at %s was overwritten", at(what, site).c_str(), place(p).c_str());
  return found->second;
}

void end_phase_if_over(Mbarrier& b) {
  if (b.missing != 0 || b.bytes != 0) return;
  b.parity ^= 1;
  b.missing = b.count;
  b.released = std::move(b.arrivals);
  b.arrivals.clear();
  for (const int t : b.waiters) wake(t);
  b.waiters.clear();
}

void join(Clock& into, const Clock& from) {
  into.resize(std::max(into.size(), from.size()), 0u);
  for (size_t u = 0; u < from.size(); u++) into[u] = std::max(into[u], from[u]);
}

// ---- TMA --------------------------------------------------------------------------------------------------------------

constexpr uint64_t kMapMagic = 0x54656e736f724d70;

struct TensorMap {
  uint64_t magic;
  const unsigned char* data;
  int64_t columns, rows, row_bytes;
  int box_columns, box_rows;
  int64_t heads, head_bytes, batches, batch_bytes;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

struct BulkCopy {
  unsigned char* dst;
  const unsigned char* src;  // of a stretch; a box has its map
  size_t bytes;
  TensorMap map;
  int inner, outer;
  uint64_t* barrier;
  int thread;
  Clock clock;
  Site site;
};
std::deque<BulkCopy> copies;

// The 128-byte swizzle: bits 4 to 6 of an address are changed by bits 7 to 9.
uintptr_t swizzled(uintptr_t a) { return a ^ (a >> 3 & 0x70); }

void land(const BulkCopy& c) {
  clear_in_flight(c.dst, c.bytes);
  if (c.src) {
    memcpy(c.dst, c.src, c.bytes);
  } else {
    const TensorMap& map = c.map;
    for (int r = 0; r < map.box_rows; r++)
      for (int column = 0; column < map.box_columns; column++) {
        const int64_t x = int64_t{c.inner} + column, y = int64_t{c.outer} + r;
        uint16_t value = 0;
        if (x >= 0 && y >= 0 && x < map.columns && y < map.rows) memcpy(&value, map.data + y * map.row_bytes + x * 2, 2);
        const auto to = reinterpret_cast<uintptr_t>(c.dst) + (static_cast<size_t>(r) * map.box_columns + column) * 2;
        memcpy(reinterpret_cast<void*>(swizzled(to)), &value, 2);
      }
  }
  write_shared_async(c.dst, c.bytes, c.thread, c.clock);
  Mbarrier& b = mbarrier_at(c.barrier, "the landing of a copy", c.site);
  b.bytes -= static_cast<int64_t>(c.bytes);
  if (checked) join(b.arrivals, c.clock);
  end_phase_if_over(b);
}

bool land_one() {
  if (copies.empty()) return false;
  const size_t i = run.order == Order::kRandom ? random() % copies.size() : 0;
  const BulkCopy c = std::move(copies[i]);
  copies.erase(copies.begin() + static_cast<ptrdiff_t>(i));
  land(c);
  return true;
}

void issue(BulkCopy c, size_t alignment, const std::string& what) {
  const auto to = reinterpret_cast<uintptr_t>(c.dst);
  if (!in_dynamic_smem(to, c.bytes)) fail("%s: the destination, %zu bytes at %s, is not all in shared memory", what.c_str(), c.bytes, describe(to).c_str());
  if (to % alignment) fail("%s: the destination, %s, is not %zu-byte aligned", what.c_str(), describe(to).c_str(), alignment);
  mbarrier_at(c.barrier, "a copy", c.site);
  if (const int writer = unfenced_writer(c.barrier, 8); writer >= 0)
    fail("%s: its mbarrier was initialised by thread %d without fence.proxy.async", what.c_str(), writer);
  access_shared(c.dst, c.bytes, Access::kWrite, what.c_str());
  set_in_flight(c.dst, c.bytes, run.current);
  memset(c.dst, 0xff, c.bytes);
  c.thread = run.current;
  if (checked) release(c.clock);
  if (run.order == Order::kFifo) land(c);
  else copies.push_back(std::move(c));
}

// ---- wgmma ------------------------------------------------------------------------------------------------------------

struct Wgmma {
  float* d;
  int n;
  const uint32_t* a;
  uint32_t a_then[4];
  uint64_t b;
  bool bf16, adds, columns;  // columns: b lies the other way
  Site site;
};

// What a thread's registers held when wgmma last had to do with them, and how many fences it had made.
struct ARegisters {
  uint32_t value[4];
  uint64_t fences;
};
struct Accumulators {
  bool in_flight;
  std::vector<float> value;  // in flight: the sums; otherwise what was handed back
  uint64_t fences;
};

struct WgmmaThread {
  std::vector<Wgmma> open;                // issued, not committed
  std::deque<std::vector<Wgmma>> groups;  // committed, oldest first
  std::map<const uint32_t*, ARegisters> a;
  std::map<float*, Accumulators> d;
  uint64_t fences = 0;
};
WgmmaThread wgmma_threads[kMaxThreads];

struct Rendezvous {
  int pending;
  std::vector<int> waiting;
};
Rendezvous rendezvous[kMaxThreads / kWarpgroup];

constexpr uint32_t kPoison = 0xffffffff;

bool all_poison(const float* d, size_t count) {
  for (size_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, d + i, 4);
    if (bits != kPoison) return false;
  }
  return true;
}

// 16 bytes of b: of a row elements 8 * half to 8 * half + 7; of b that lies the other way, of 8 rows from `row` on the element k.
const unsigned char* b_bytes(const Wgmma& w, int row, int half, int k) {
  if (w.b >> 62 != 1) fail("%s: the emulator knows the 128-byte swizzle only", at("wgmma", w.site).c_str());
  const uint32_t start = static_cast<uint32_t>(w.b & 0x3fff) << 4, leading = static_cast<uint32_t>(w.b >> 16 & 0x3fff) << 4,
                 group_bytes = static_cast<uint32_t>(w.b >> 32 & 0x3fff) << 4;
  const uint32_t in_tile =
      w.columns ? row / 64 * leading + k / 8 * group_bytes + k % 8 * 128 + row % 64 * 2 : row / 8 * group_bytes + row % 8 * 128 + half * 16;
  const auto address = static_cast<uint32_t>(swizzled(start + in_tile));
  if (address < kSmemBase || address + 16 > kSmemBase + run.dynamic_bytes)
    fail("%s: row %d of b is at shared address %u, outside of it", at("wgmma", w.site).c_str(), row, address);
  return run.dynamic_smem + (address - kSmemBase);
}
const unsigned char* b_piece(const Wgmma& w, int row, int half) { return b_bytes(w, row, half, 0); }

void check_piece(const Wgmma& w, const unsigned char* p) {
  if (const int writer = unfenced_writer(p, 16); writer >= 0)
    fail("%s: %s in b was written by thread %d by ordinary stores without fence.proxy.async", at("wgmma", w.site).c_str(), place(p).c_str(), writer);
  access_shared(p, 16, Access::kRead, "wgmma, operand b,");
}
// A row, or its part of those of b that lies the other way: all 16 k of 8 rows are checked by the first of these.
void check_b(const Wgmma& w, int row) {
  if (!w.columns) {
    for (int half = 0; half < 2; half++) check_piece(w, b_piece(w, row, half));
  } else if (row % 8 == 0) {
    for (int k = 0; k < 16; k++) check_piece(w, b_bytes(w, row, 0, k));
  }
}

// d += a @ b^T for the warpgroup whose first thread is given. Products and sums in double, one rounding (see matrix.cpp).
void execute(const Wgmma* const (&of)[kWarpgroup], float* const (&d)[kWarpgroup], int first) {
  using Doubles = double __attribute__((vector_size(64)));
  constexpr int kMaxN = 256, kWidth = 8;
  const Wgmma& w = *of[0];
  const auto value = [&](uint32_t bits) {
    return static_cast<double>(w.bf16 ? bf16_to_float(static_cast<uint16_t>(bits)) : half_to_float(static_cast<uint16_t>(bits)));
  };
  static Doubles columns[16][kMaxN / kWidth];
  const int caller = run.current;
  for (int row = 0; row < w.n; row++) {
    run.current = first + row % kWarpgroup;
    if (checked) check_b(w, row);
    if (w.columns && row % 8 != 0) continue;
    for (int k = 0; w.columns && k < 16; k++) {
      uint16_t bits[8];
      memcpy(bits, b_bytes(w, row, 0, k), 16);
      for (int i = 0; i < 8; i++) columns[k][row / kWidth][i] = value(bits[i]);
    }
    for (int half = 0; !w.columns && half < 2; half++) {
      uint16_t bits[8];
      memcpy(bits, b_piece(w, row, half), 16);
      for (int k = 0; k < 8; k++) columns[8 * half + k][row / kWidth][row % kWidth] = value(bits[k]);
    }
  }
  run.current = caller;
  double a[64][16];
  for (int t = 0; t < kWarpgroup; t++)
    for (int i = 0; i < 4; i++)
      for (int half = 0; half < 2; half++) a[t / 32 * 16 + t % 32 / 4 + i % 2 * 8][t % 4 * 2 + i / 2 * 8 + half] = value(of[t]->a_then[i] >> (16 * half));
  for (int eight = 0; eight < w.n / kWidth; eight++)
    for (int row = 0; row < 64; row++) {
      Doubles sum{};
      for (int k = 0; k < 16; k++) sum += a[row][k] * columns[k][eight];
      for (int column = 0; column < 8; column++) {
        float& to = d[row / 16 * 32 + row % 8 * 4 + column / 2][eight * 4 + row % 16 / 8 * 2 + column % 2];
        to = static_cast<float>(w.adds ? sum[column] + to : sum[column]);
      }
    }
}

// The oldest group of all threads of a warpgroup.
void retire(int first) {
  const size_t count = wgmma_threads[first].groups.front().size();
  for (int t = 0; t < kWarpgroup; t++)
    if (wgmma_threads[first + t].groups.front().size() != count) fail("wgmma: threads of a warpgroup put different numbers of wgmmas into a group");
  for (size_t i = 0; i < count; i++) {
    const Wgmma* of[kWarpgroup];
    float* d[kWarpgroup];
    const Wgmma& w = wgmma_threads[first].groups.front()[i];
    for (int t = 0; t < kWarpgroup; t++) {
      const Wgmma& other = wgmma_threads[first + t].groups.front()[i];
      if (other.b != w.b || other.n != w.n || other.bf16 != w.bf16 || other.adds != w.adds || other.columns != w.columns || other.site.line() != w.site.line())
        fail("%s: thread %d of the warpgroup issued another one, %s", at("wgmma", w.site).c_str(), t, at("wgmma", other.site).c_str());
      if (memcmp(other.a, other.a_then, sizeof other.a_then) != 0)
        fail("%s: registers of a changed in thread %d before wgmma.wait_group", at("wgmma", w.site).c_str(), first + t);
      of[t] = &other;
      d[t] = wgmma_threads[first + t].d[other.d].value.data();
    }
    execute(of, d, first);
  }
  for (int t = 0; t < kWarpgroup; t++) wgmma_threads[first + t].groups.pop_front();
}

// Hands the sums back that no wgmma in flight adds to any more.
void deliver(int thread) {
  WgmmaThread& mine = wgmma_threads[thread];
  for (auto& [d, sums] : mine.d) {
    if (!sums.in_flight) continue;
    const auto uses = [d = d](const std::vector<Wgmma>& list) { return std::any_of(list.begin(), list.end(), [d](const Wgmma& w) { return w.d == d; }); };
    if (uses(mine.open) || std::any_of(mine.groups.begin(), mine.groups.end(), uses)) continue;
    if (!all_poison(d, sums.value.size())) fail("wgmma: accumulators of thread %d were written before wgmma.wait_group", thread);
    memcpy(d, sums.value.data(), sums.value.size() * sizeof(float));
    sums.in_flight = false;
    sums.fences = mine.fences;
  }
}

void reset() {
  mbarriers.clear();
  copies.clear();
  for (int t = 0; t < run.threads; t++) wgmma_threads[t] = {};
  for (Rendezvous& r : rendezvous) r.waiting.clear();
}

void finish() {
  for (int t = 0; t < run.threads; t++)
    if (!wgmma_threads[t].open.empty() || !wgmma_threads[t].groups.empty()) fail("thread %d returned with wgmmas that it never waited for", t);
}

const bool registered = register_unit({reset, land_one, finish});

}  // namespace

void mbarrier_init(uint64_t* p, int count, Site site) {
  const std::string what = at("mbarrier.init", site);
  require_sm(90, "mbarrier", site);
  if (reinterpret_cast<uintptr_t>(p) % 8) fail("%s: %s is misaligned", what.c_str(), place(p).c_str());
  if (count < 1 || count >= 1 << 20) fail("%s: a count of %d", what.c_str(), count);
  access_shared(p, 8, Access::kWrite, what.c_str());
  *p = kMagic;
  mbarriers[p] = {count, count, 0, 0, {}, {}, {}};
}

void mbarrier_arrive(uint64_t* p, int expected_bytes, Site site) {
  note("mbarrier.arrive", site);
  access_shared(p, 8, Access::kRead, "mbarrier.arrive");
  Mbarrier& b = mbarrier_at(p, "mbarrier.arrive", site);
  if (b.missing == 0) fail("%s: more than %d arrivals in a phase of the mbarrier at %s", at("mbarrier.arrive", site).c_str(), b.count, place(p).c_str());
  if (checked) release(b.arrivals);
  b.bytes += expected_bytes;
  b.missing--;
  end_phase_if_over(b);
}

void mbarrier_wait(uint64_t* p, uint32_t parity, Site site) {
  note("mbarrier.try_wait", site);
  access_shared(p, 8, Access::kRead, "mbarrier.try_wait");
  Mbarrier& b = mbarrier_at(p, "mbarrier.try_wait", site);
  if (parity > 1) fail("%s: a parity of %u", at("mbarrier.try_wait", site).c_str(), parity);
  while (b.parity == parity) {
    b.waiters.push_back(run.current);
    wait();
  }
  acquire(b.released);
}

void fence_proxy_async(Site site) {
  require_sm(90, "fence.proxy.async", site);
  fence_generic_writes();
}

void tensor_map_16bit(CUtensorMap* map, const void* data, int64_t columns, int64_t rows, int64_t row_bytes, int box_columns, int box_rows, int64_t heads,
                      int64_t head_bytes, int64_t batches, int64_t batch_bytes) {
  if (heads < 1 || batches < 1 || head_bytes % 16 || batch_bytes % 16 || reinterpret_cast<uintptr_t>(data) % 16 || row_bytes % 16 || row_bytes <= 0 ||
      columns < 1 || rows < 1 || columns > INT64_C(1) << 32 || rows > INT64_C(1) << 32 || box_columns * 2 != 128 || box_rows < 1 || box_rows > 256)
    fail("not a tensor map: %td columns, %td rows of %td bytes at %p, boxes of %d by %d", static_cast<ptrdiff_t>(columns), static_cast<ptrdiff_t>(rows),
         static_cast<ptrdiff_t>(row_bytes), data, box_columns, box_rows);
  const TensorMap m{kMapMagic,  static_cast<const unsigned char*>(data), columns, rows, row_bytes, box_columns, box_rows, heads, head_bytes, batches,
                    batch_bytes};
  memcpy(map, &m, sizeof m);
}

void tma_load_2d(void* dst, const CUtensorMap* map, int inner, int outer, uint64_t* barrier, Site site) {
  tma_load_4d(dst, map, inner, outer, 0, 0, barrier, site);
}

void tma_load_4d(void* dst, const CUtensorMap* map, int inner, int outer, int head, int batch, uint64_t* barrier, Site site) {
  const std::string what = at("a TMA load", site);
  TensorMap m;
  memcpy(&m, map, sizeof m);
  if (m.magic != kMapMagic) fail("%s: not a tensor map", what.c_str());
  if (head < 0 || head >= m.heads || batch < 0 || batch >= m.batches) fail("%s: there is no head %d of %d", what.c_str(), head, batch);
  m.data += head * m.head_bytes + batch * m.batch_bytes;
  for (int64_t r = std::max(0, outer); r < std::min(m.rows, int64_t{outer} + m.box_rows); r++) {
    const int64_t begin = std::max(0, inner), end = std::min(m.columns, int64_t{inner} + m.box_columns);
    if (checked && end > begin) access_global(m.data + r * m.row_bytes + begin * 2, static_cast<size_t>(end - begin) * 2, Access::kRead, what.c_str());
  }
  issue({.dst = static_cast<unsigned char*>(dst),
         .src = nullptr,
         .bytes = static_cast<size_t>(m.box_columns) * m.box_rows * 2,
         .map = m,
         .inner = inner,
         .outer = outer,
         .barrier = barrier,
         .thread = 0,
         .clock = {},
         .site = site},
        1024, what);
}

void bulk_load(void* dst, const void* src, int bytes, uint64_t* barrier, Site site) {
  const std::string what = at("a bulk copy", site);
  if (bytes <= 0 || bytes % 16) fail("%s: %d bytes", what.c_str(), bytes);
  if (reinterpret_cast<uintptr_t>(src) % 16) fail("%s: the source, %s, is not 16-byte aligned", what.c_str(), place(src).c_str());
  if (near_shared(reinterpret_cast<uintptr_t>(src))) fail("%s: the source is %s", what.c_str(), place(src).c_str());
  if (checked) access_global(src, static_cast<size_t>(bytes), Access::kRead, what.c_str());
  issue({.dst = static_cast<unsigned char*>(dst),
         .src = static_cast<const unsigned char*>(src),
         .bytes = static_cast<size_t>(bytes),
         .map = {},
         .inner = 0,
         .outer = 0,
         .barrier = barrier,
         .thread = 0,
         .clock = {},
         .site = site},
        16, what);
}

uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - run.dynamic_smem) + kSmemBase; }

void wgmma_fence(Site site) {
  require_sm(90, "wgmma", site);
  if (taut::device(0).sm != 90) fail("%s: only sm_90 has it; this device is sm_%d", at("wgmma.fence", site).c_str(), taut::device(0).sm);
  wgmma_threads[run.current].fences++;
}

void wgmma_commit(Site) {
  WgmmaThread& mine = wgmma_threads[run.current];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

void wgmma_m64k16(float* d, int n, const uint32_t* a, uint64_t b, bool bf16, bool adds, bool columns, Site site) {
  note("wgmma", site);
  if (n < 8 || n > 256 || n % 8) fail("%s: n is %d", at("wgmma", site).c_str(), n);
  if (run.current / kWarpgroup * kWarpgroup + kWarpgroup > run.threads)
    fail("%s: thread %d belongs to no whole warpgroup", at("wgmma", site).c_str(), run.current);
  WgmmaThread& mine = wgmma_threads[run.current];
  if (mine.fences == 0) fail("%s: no wgmma.fence before the first wgmma", at("wgmma", site).c_str());
  if (const auto found = mine.a.find(a); found != mine.a.end() && found->second.fences == mine.fences && memcmp(found->second.value, a, 16) != 0)
    fail("%s: registers of a were written after the latest wgmma.fence", at("wgmma", site).c_str());
  Accumulators& sums = mine.d[d];
  const size_t count = static_cast<size_t>(n) / 2;
  if (!sums.in_flight) {
    if (!sums.value.empty() && sums.fences == mine.fences && memcmp(sums.value.data(), d, count * 4) != 0)
      fail("%s: accumulators were written after the latest wgmma.fence", at("wgmma", site).c_str());
    sums.value.assign(d, d + count);
    sums.in_flight = true;
    memset(d, 0xff, count * 4);
  } else if (sums.value.size() != count) {
    fail("%s: n is %d, but %zu with the wgmma in flight on the same accumulators", at("wgmma", site).c_str(), n, sums.value.size() * 2);
  }
  Wgmma w{d, n, a, {}, b, bf16, adds, columns, site};
  memcpy(w.a_then, a, 16);
  ARegisters& registers = mine.a[a];
  memcpy(registers.value, a, 16);
  registers.fences = mine.fences;
  if (checked)
    for (int row = run.current % kWarpgroup; row < n; row += kWarpgroup) check_b(w, row);
  mine.open.push_back(w);
}

void wgmma_wait(int pending, Site site) {
  WgmmaThread& mine = wgmma_threads[run.current];
  if (static_cast<int>(mine.groups.size()) <= pending) return;
  note("wgmma.wait_group", site);
  const int first = run.current / kWarpgroup * kWarpgroup;
  Rendezvous& r = rendezvous[first / kWarpgroup];
  if (r.waiting.empty()) r.pending = pending;
  else if (r.pending != pending) fail("%s: pending is %d, but %d in other threads of the warpgroup", at("wgmma.wait_group", site).c_str(), pending, r.pending);
  r.waiting.push_back(run.current);
  if (r.waiting.size() < kWarpgroup) return wait();
  for (int t = 0; t < kWarpgroup; t++)
    if (wgmma_threads[first + t].groups.size() != mine.groups.size()) fail("wgmma: threads of a warpgroup committed different numbers of groups");
  while (static_cast<int>(mine.groups.size()) > pending) retire(first);
  for (int t = 0; t < kWarpgroup; t++) deliver(first + t);
  for (const int t : r.waiting)
    if (t != run.current) wake(t);
  r.waiting.clear();
}

namespace {

struct StoreArgument {
  void* row;
  const uint32_t* r;
};

void combine_stmatrix(void** arguments, uint32_t) {
  const auto of = [&](int lane) { return static_cast<StoreArgument*>(arguments[lane]); };
  const int caller = run.current, first = caller - caller % 32;
  for (int m = 0; m < 4; m++)
    for (int i = 0; i < 8; i++) {
      uint16_t row[8];
      for (int g = 0; g < 8; g++) row[g] = static_cast<uint16_t>(of(4 * g + i / 2)->r[m] >> (16 * (i % 2)));
      void* const to = of(8 * m + i)->row;
      run.current = first + 8 * m + i;
      if (reinterpret_cast<uintptr_t>(to) % 16) fail("stmatrix: the row address of lane %d is misaligned: %s", 8 * m + i, place(to).c_str());
      access_shared(to, 16, Access::kWrite, "stmatrix");
      memcpy(to, row, 16);
    }
  run.current = caller;
}

}  // namespace

void stmatrix_x4_trans(void* row, const uint32_t* r, Site site) {
  require_sm(90, "stmatrix", site);
  StoreArgument argument{row, r};
  collective(combine_stmatrix, &argument, ~0u, false, "stmatrix", site);
}

}  // namespace emulator
