// cp.async, ldmatrix and mma.sync.
#include <algorithm>
#include <array>
#include <cstring>

#include "runtime.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

// ---- cp.async: from its issue to its wait the destination holds poison ------------------------------------------------

struct Copy {
  void* dst;
  const void* src;
  int bytes, src_bytes;
};

struct Copies {
  std::vector<Copy> issued;    // oldest first
  std::vector<size_t> groups;  // how many copies each committed group has, oldest first
  size_t committed = 0;        // of the issued ones
};
Copies copies[kMaxThreads];

void land(const Copy& c) {
  clear_in_flight(c.dst, c.bytes);
  memcpy(c.dst, c.src, c.src_bytes);
  memset(static_cast<char*>(c.dst) + c.src_bytes, 0, c.bytes - c.src_bytes);
  if (checked) access_shared(c.dst, c.bytes, Access::kWrite, "cp.async");
}

const bool registered = register_unit({[] {
                                         for (int t = 0; t < run.threads; t++) copies[t].issued.clear(), copies[t].groups.clear(), copies[t].committed = 0;
                                       },
                                       nullptr, nullptr});

}  // namespace

void cp_async(void* dst, const void* src, int bytes, int src_bytes, Site site) {
  require_sm(80, "cp.async", site);
  const auto to = reinterpret_cast<uintptr_t>(dst), from = reinterpret_cast<uintptr_t>(src);
  if (to % bytes || from % bytes)
    fail("cp.async at %s:%u: a misaligned address, %s to %s", site.file_name(), site.line(), describe(from).c_str(), describe(to).c_str());
  if (!in_shared(to, bytes)) fail("cp.async at %s:%u: the destination, %s, is not in shared memory", site.file_name(), site.line(), describe(to).c_str());
  if (src_bytes < 0 || src_bytes > bytes) fail("cp.async at %s:%u: src_bytes is %d", site.file_name(), site.line(), src_bytes);
  if (src_bytes > 0 && near_shared(from)) fail("cp.async at %s:%u: the source is %s", site.file_name(), site.line(), describe(from).c_str());
  if (checked) {
    char what[256];
    snprintf(what, sizeof what, "cp.async at %s:%u", site.file_name(), site.line());
    if (src_bytes) access_global(src, src_bytes, Access::kRead, what);
    access_shared(dst, bytes, Access::kWrite, what);
    set_in_flight(dst, bytes, run.current);
  }
  memset(dst, 0xff, bytes);
  copies[run.current].issued.push_back({dst, src, bytes, src_bytes});
}

void cp_async_commit() {
  Copies& mine = copies[run.current];
  mine.groups.push_back(mine.issued.size() - mine.committed);
  mine.committed = mine.issued.size();
}

void cp_async_wait(int pending) {
  Copies& mine = copies[run.current];
  const auto over = static_cast<ptrdiff_t>(mine.groups.size()) - pending;
  if (over <= 0) return;
  size_t count = 0;
  for (ptrdiff_t i = 0; i < over; i++) count += mine.groups[i];
  for (size_t i = 0; i < count; i++) land(mine.issued[i]);
  mine.issued.erase(mine.issued.begin(), mine.issued.begin() + static_cast<ptrdiff_t>(count));
  mine.groups.erase(mine.groups.begin(), mine.groups.begin() + over);
  mine.committed -= count;
}

void finish_thread_copies() {
  if (!copies[run.current].issued.empty()) fail("the thread returns with cp.async copies that it never waited for");
}

// ---- ldmatrix ---------------------------------------------------------------------------------------------------------

namespace {

struct LoadArgument {
  uint32_t* r;
  const void* row;
  int matrices;
  bool transposed;
};

void combine_ldmatrix(void** arguments, uint32_t) {
  const auto of = [&](int lane) { return static_cast<LoadArgument*>(arguments[lane]); };
  const int caller = run.current, first = caller - caller % 32;
  for (int lane = 0; lane < 8 * of(0)->matrices; lane++) {
    const auto row = reinterpret_cast<uintptr_t>(of(lane)->row);
    if (row % 16) fail("ldmatrix: the row address of lane %d is misaligned: %s", lane, describe(row).c_str());
  }
  for (int m = 0; m < of(0)->matrices; m++) {
    uint16_t rows[8][8];
    for (int i = 0; i < 8; i++) {
      const void* row = of(8 * m + i)->row;
      run.current = first + 8 * m + i;
      access_shared(row, 16, Access::kRead, "ldmatrix");
      memcpy(rows[i], row, 16);
    }
    for (int lane = 0; lane < 32; lane++) {
      const int g = lane / 4, t = lane % 4;
      const bool transposed = of(0)->transposed;
      const uint32_t low = transposed ? rows[2 * t][g] : rows[g][2 * t], high = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
      of(lane)->r[m] = low | high << 16;
    }
  }
  run.current = caller;
}

// ---- mma --------------------------------------------------------------------------------------------------------------

struct MmaArgument {
  void* d;
  const uint32_t* a;
  uint32_t b[2];
};
using Doubles = double __attribute__((vector_size(64)));  // 8 columns of d, b and the sums

// The words of a (16 rows) and b (8 columns) as they lie along k: row g's words t and t + 4 are registers 0 and 2 of lane
// 4g + t, and so on. The same for 16-bit and 8-bit elements.
template <int kWords>
void gather(void** arguments, uint32_t (&a)[16][kWords], uint32_t (&b)[8][kWords]) {
  for (int lane = 0; lane < 32; lane++) {
    const auto* from = static_cast<const MmaArgument*>(arguments[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < kWords / 4; half++) {
      a[g][t + 4 * half] = from->a[2 * half], a[g + 8][t + 4 * half] = from->a[2 * half + 1];
      b[g][t + 4 * half] = from->b[half];
    }
  }
}

struct HalfTable {
  std::array<float, 65536> value;
  HalfTable() {
    for (size_t i = 0; i < value.size(); i++) value[i] = half_to_float(static_cast<uint16_t>(i));
  }
};
struct E4M3Table {
  std::array<float, 256> value;
  E4M3Table() {
    for (size_t i = 0; i < value.size(); i++) value[i] = e4m3_to_float(static_cast<uint8_t>(i));
  }
};

struct HalfElement {
  using Bits = uint16_t;
  static double value(Bits bits) {
    static const HalfTable table;
    return table.value[bits];
  }
};
struct Bf16Element {
  using Bits = uint16_t;
  static double value(Bits bits) { return bf16_to_float(bits); }
};
struct E4M3Element {
  using Bits = uint8_t;
  static double value(Bits bits) {
    static const E4M3Table table;
    return table.value[bits];
  }
};

// Products and sums in double, one rounding to fp32 at the end. WHY not the hardware's sum, which aligns and truncates: it is
// not specified. No tolerance may be tuned on this one.
template <class Element, int kWords>
void combine_mma(void** arguments, uint32_t) {
  using Bits = typename Element::Bits;
  constexpr int kDepth = kWords * 4 / sizeof(Bits);
  uint32_t a_words[16][kWords], b_words[8][kWords];
  gather(arguments, a_words, b_words);
  Bits a[16][kDepth], b[8][kDepth];
  memcpy(a, a_words, sizeof a), memcpy(b, b_words, sizeof b);
  Doubles columns[kDepth];
  for (int k = 0; k < kDepth; k++)
    for (int n = 0; n < 8; n++) columns[k][n] = Element::value(b[n][k]);
  double sums[16][8];
  for (int m = 0; m < 16; m++) {
    Doubles sum{};
    for (int k = 0; k < kDepth; k++) sum += Element::value(a[m][k]) * columns[k];
    memcpy(sums[m], &sum, sizeof sum);
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* d = static_cast<float*>(static_cast<MmaArgument*>(arguments[lane])->d);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) d[i] = static_cast<float>(sums[g + i / 2 * 8][2 * t + i % 2] + d[i]);
  }
}

struct SparseArgument {
  void* d;
  const uint32_t *a, *b;
  uint32_t meta;
  int selector;
};

// mma.sp: a is 16 x 16 of 16 x 32. What the lanes that the selector does not name give as metadata is never looked at.
template <class Element>
void combine_mma_sp(void** arguments, uint32_t) {
  const auto of = [&](int lane) -> const SparseArgument& { return *static_cast<const SparseArgument*>(arguments[lane]); };
  // Of each row what is given, and where it stands. WHY no zeros in between: what is not given is not multiplied, be it by an infinity.
  double a[16][16];
  int place[16][16];
  for (int row = 0; row < 16; row++) {
    const int g = row % 8, upper = row / 8;
    for (int chunk = 0; chunk < 8; chunk++) {  // of 4 k
      const uint32_t meta = of(4 * g + 2 * of(0).selector + chunk / 4).meta >> (upper * 16 + chunk % 4 * 4), low = meta & 3, high = meta >> 2 & 3;
      if (low >= high) fail("mma.sp: the places of row %d, k %d to %d must ascend, and are %u and %u", row, 4 * chunk, 4 * chunk + 3, low, high);
      const uint32_t pair = of(4 * g + chunk % 4).a[chunk / 4 * 2 + upper];
      a[row][2 * chunk] = Element::value(static_cast<uint16_t>(pair)), place[row][2 * chunk] = 4 * chunk + static_cast<int>(low);
      a[row][2 * chunk + 1] = Element::value(static_cast<uint16_t>(pair >> 16)), place[row][2 * chunk + 1] = 4 * chunk + static_cast<int>(high);
    }
  }
  Doubles columns[32];
  for (int k = 0; k < 32; k++)
    for (int n = 0; n < 8; n++) columns[k][n] = Element::value(static_cast<uint16_t>(of(4 * n + k % 8 / 2).b[k / 8] >> k % 2 * 16));
  double sums[16][8];
  for (int row = 0; row < 16; row++) {
    Doubles sum{};
    for (int i = 0; i < 16; i++) sum += a[row][i] * columns[place[row][i]];
    memcpy(sums[row], &sum, sizeof sum);
  }
  for (int lane = 0; lane < 32; lane++) {
    const int g = lane / 4, t = lane % 4;
    auto* d = static_cast<float*>(of(lane).d);
    for (int i = 0; i < 4; i++) d[i] = static_cast<float>(sums[g + i / 2 * 8][2 * t + i % 2] + d[i]);
  }
}

struct S8Element {
  static int64_t value(uint8_t bits) { return static_cast<int8_t>(bits); }
};

// mma.sp of 8-bit numbers: a is 16 x kDepth / 2 of 16 x kDepth. Of k32 only the two lanes that the selector names are looked at.
template <class Element, class Sum, int kDepth>
void combine_mma_sp8(void** arguments, uint32_t) {
  using Number = decltype(Element::value(0));
  const auto of = [&](int lane) -> const SparseArgument& { return *static_cast<const SparseArgument*>(arguments[lane]); };
  Number a[16][kDepth / 2];
  int place[16][kDepth / 2];
  for (int row = 0; row < 16; row++) {
    const int g = row % 8, upper = row / 8;
    for (int chunk = 0; chunk < kDepth / 4; chunk++) {  // of 4 k
      const int k32 = chunk / 8, pair = kDepth == 32 ? of(0).selector : k32;
      const uint32_t meta = of(4 * g + 2 * pair + upper).meta >> (chunk % 8 * 4), low = meta & 3, high = meta >> 2 & 3;
      if (low >= high) fail("mma.sp: the places of row %d, k %d to %d must ascend, and are %u and %u", row, 4 * chunk, 4 * chunk + 3, low, high);
      const uint32_t two = of(4 * g + chunk % 8 / 2).a[2 * k32 + upper] >> (chunk % 2 * 16);
      a[row][2 * chunk] = Element::value(static_cast<uint8_t>(two)), place[row][2 * chunk] = 4 * chunk + static_cast<int>(low);
      a[row][2 * chunk + 1] = Element::value(static_cast<uint8_t>(two >> 8)), place[row][2 * chunk + 1] = 4 * chunk + static_cast<int>(high);
    }
  }
  Number columns[kDepth][8];
  for (int k = 0; k < kDepth; k++)
    for (int n = 0; n < 8; n++) columns[k][n] = Element::value(static_cast<uint8_t>(of(4 * n + k % 16 / 4).b[k / 16] >> (k % 4 * 8)));
  Number sums[16][8] = {};
  for (int row = 0; row < 16; row++)
    for (int i = 0; i < kDepth / 2; i++)
      for (int n = 0; n < 8; n++) sums[row][n] += a[row][i] * columns[place[row][i]][n];
  for (int lane = 0; lane < 32; lane++) {
    auto* d = static_cast<Sum*>(of(lane).d);
    const int g = lane / 4, t = lane % 4;
    // Integers wrap around; of floats the sum is rounded once.
    for (int i = 0; i < 4; i++) d[i] = static_cast<Sum>(sums[g + i / 2 * 8][2 * t + i % 2] + static_cast<Number>(d[i]));
  }
}

void combine_mma_s8(void** arguments, uint32_t) {
  uint32_t a_words[16][8], b_words[8][8];
  gather(arguments, a_words, b_words);
  int8_t a[16][32], b[8][32];
  memcpy(a, a_words, sizeof a), memcpy(b, b_words, sizeof b);
  int16_t wide_b[8][32];
  for (int n = 0; n < 8; n++)
    for (int k = 0; k < 32; k++) wide_b[n][k] = b[n][k];
  int sums[16][8];
  for (int m = 0; m < 16; m++) {
    int16_t row[32];
    for (int k = 0; k < 32; k++) row[k] = a[m][k];
    for (int n = 0; n < 8; n++) {
      int sum = 0;
      for (int k = 0; k < 32; k++) sum += row[k] * wide_b[n][k];
      sums[m][n] = sum;
    }
  }
  for (int lane = 0; lane < 32; lane++) {
    auto* d = static_cast<int*>(static_cast<MmaArgument*>(arguments[lane])->d);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) d[i] = static_cast<int>(static_cast<uint32_t>(d[i]) + static_cast<uint32_t>(sums[g + i / 2 * 8][2 * t + i % 2]));
  }
}

}  // namespace

void ldmatrix(uint32_t* r, int matrices, bool transposed, const void* row, Site site) {
  LoadArgument argument{r, row, matrices, transposed};
  collective(combine_ldmatrix, &argument, ~0u, false, "ldmatrix", site);
}

void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool bf16, Site site) {
  require_sm(80, "mma.m16n8k16", site);
  MmaArgument argument{d, a, {b0, b1}};
  collective(bf16 ? combine_mma<Bf16Element, 8> : combine_mma<HalfElement, 8>, &argument, ~0u, false, "mma.m16n8k16", site);
}

void mma_sp_m16n8k32(float* d, const uint32_t* a, const uint32_t* b, uint32_t meta, int selector, bool bf16, Site site) {
  require_sm(80, "mma.sp.m16n8k32", site);
  SparseArgument argument{d, a, b, meta, selector};
  collective(bf16 ? combine_mma_sp<Bf16Element> : combine_mma_sp<HalfElement>, &argument, ~0u, false, "mma.sp.m16n8k32", site);
}

void mma_sp_m16n8k32_s8(int* d, const uint32_t* a, const uint32_t* b, uint32_t meta, int selector, Site site) {
  require_sm(80, "mma.sp.m16n8k32.s8", site);
  SparseArgument argument{d, a, b, meta, selector};
  collective(combine_mma_sp8<S8Element, int, 32>, &argument, ~0u, false, "mma.sp.m16n8k32.s8", site);
}

void mma_sp_m16n8k64_s8(int* d, const uint32_t* a, const uint32_t* b, uint32_t meta, Site site) {
  require_sm(80, "mma.sp.m16n8k64.s8", site);
  SparseArgument argument{d, a, b, meta, 0};
  collective(combine_mma_sp8<S8Element, int, 64>, &argument, ~0u, false, "mma.sp.m16n8k64.s8", site);
}

void mma_sp_m16n8k64_e4m3(float* d, const uint32_t* a, const uint32_t* b, uint32_t meta, Site site) {
  require_sm(89, "mma.sp.m16n8k64.e4m3", site);
  SparseArgument argument{d, a, b, meta, 0};
  collective(combine_mma_sp8<E4M3Element, float, 64>, &argument, ~0u, false, "mma.sp.m16n8k64.e4m3", site);
}

void mma_m16n8k8(float* d, uint32_t a0, uint32_t a1, uint32_t b0, Site site) {
  const uint32_t a[2] = {a0, a1};
  MmaArgument argument{d, a, {b0, 0}};
  collective(combine_mma<HalfElement, 4>, &argument, ~0u, false, "mma.m16n8k8", site);
}

void mma_m16n8k32_s8(int* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  require_sm(80, "mma.m16n8k32.s8", site);
  MmaArgument argument{d, a, {b0, b1}};
  collective(combine_mma_s8, &argument, ~0u, false, "mma.m16n8k32.s8", site);
}

void mma_m16n8k32_e4m3(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  require_sm(89, "mma.m16n8k32.e4m3", site);
  MmaArgument argument{d, a, {b0, b1}};
  collective(combine_mma<E4M3Element, 8>, &argument, ~0u, false, "mma.m16n8k32.e4m3", site);
}

}  // namespace emulator
