// roofline: the plain loops that find this machine's ceilings: reading memory, multiply-adds of fp32, bf16 and int8.
#pragma once

#include "common/cpu_features.h"
#include "common/parallel.h"

namespace taut::roofline {

// kRead:    every thread sums its share of the 64-bit words of `words`, in `streams` sequential streams.
// kFmaF32:  every thread adds 1.0f * 1.0f, `steps` times, to each lane of as many accumulators as hide the latency.
// kDotInt8: the same with u8 * s8 products, summed the fastest way that is exact.
// kDotBf16: the same with bf16 products, summed in fp32 the fastest way: that of fp32 where the processor has no instruction for them.
// What a call returns says that the work was done: the sum of the words (modulo 2^64), or the number of multiply-adds.
enum class Ceiling : int64_t { kRead = 0, kFmaF32 = 1, kDotInt8 = 2, kDotBf16 = 3 };

constexpr int64_t kMaxStreams = 8;
constexpr int64_t kMaxSteps = int64_t{1} << 22;  // fp32 counts up to 2^24 exactly, and int16 sums are widened well before

struct Params {
  Ceiling ceiling;
  const uint64_t* words;  // [num_words]; kRead only
  int64_t num_words;
  int64_t streams;    // 1, 2, 4 or 8 a thread; kRead only
  int64_t steps;      // not kRead
  uint64_t* results;  // [num_threads], one a thread
  int64_t num_threads;
};

// The words of thread `task`: whole pages, but for the last thread, which takes the rest.
struct Share {
  static constexpr int64_t kWords = 512;  // a page
  int64_t begin, end;
};

namespace {

inline Share share_of(const Params& p, int64_t task) {
  const int64_t pages = p.num_words / Share::kWords;
  const auto first = [&](int64_t t) { return pages * t / p.num_threads * Share::kWords; };
  return {first(task), task + 1 == p.num_threads ? p.num_words : first(task + 1)};
}

}  // namespace

namespace cpu_scalar {
void run(const Params&);
}
namespace cpu_avx2 {
void run(const Params&);
}
namespace cpu_avx512vnni {
void run(const Params&);
}
namespace cpu_avx512bf16 {
void run(const Params&);
}

}  // namespace taut::roofline
