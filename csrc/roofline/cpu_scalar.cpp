// COMPUTES  the sum of the 64-bit words of a buffer; a count of fp32 or int8 multiply-adds (op.h)
// LAYOUT    plain words
// WORK      one task a thread; 8 accumulators
// BOUND     what it measures: one load, one multiply and add, at a time
// LIMITS    none: any processor. It finds what plain C++ reaches, not what the machine can do.
#include "roofline/op.h"

namespace taut::roofline::cpu_scalar {
namespace {

uint64_t read(const Params& p, int64_t task) {
  const Share share = share_of(p, task);
  const int64_t part = (share.end - share.begin) / p.streams;
  uint64_t sum = 0;
  for (int64_t i = 0; i < part; i++)
    for (int64_t s = 0; s < p.streams; s++) sum += p.words[share.begin + s * part + i];
  for (int64_t i = share.begin + p.streams * part; i < share.end; i++) sum += p.words[i];
  return sum;
}

constexpr int kAccumulators = 8;

template <class T>
uint64_t count(int64_t steps) {
  T sums[kAccumulators] = {}, one = 1;
  for (int64_t step = 0; step < steps; step++) {
    asm volatile("" : "+m"(one));  // WHY: the product must be formed again at each step
    for (T& sum : sums) sum += one * one;
  }
  double total = 0;
  for (T sum : sums) total += sum;
  return static_cast<uint64_t>(total);
}

}  // namespace

void run(const Params& p) {
  parallel_tasks(p.num_threads, [&](int64_t task) {
    p.results[task] = p.ceiling == Ceiling::kRead ? read(p, task) : p.ceiling == Ceiling::kDotInt8 ? count<int32_t>(p.steps) : count<float>(p.steps);
  });
}

}  // namespace taut::roofline::cpu_scalar
