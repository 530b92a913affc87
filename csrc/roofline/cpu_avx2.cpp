// COMPUTES  the sum of the 64-bit words of a buffer; a count of fp32 or int8 multiply-adds (op.h)
// LAYOUT    plain words
// WORK      one task a thread. Read: `streams` sequential streams, 128 B of each in turn, four sums.
//           fp32: 12 accumulators, vfmadd. int8: 12 accumulators of int16, vpmaddubsw and vpaddw, widened every 4096 steps.
// BOUND     what it measures: memory; the FMA ports; the multiply and add ports together (a pair is 32 multiply-adds)
// LIMITS    AVX2 and FMA
#include <immintrin.h>

#include "roofline/op.h"

namespace taut::roofline::cpu_avx2 {
namespace {

uint64_t sum_lanes(__m256i v) {
  alignas(32) uint64_t lanes[4];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  return lanes[0] + lanes[1] + lanes[2] + lanes[3];
}

template <int kStreams>
uint64_t read(const Params& p, int64_t task) {
  constexpr int64_t kStep = 16;  // words: two cache lines
  const Share share = share_of(p, task);
  const int64_t part = (share.end - share.begin) / kStreams / kStep * kStep;
  const uint64_t* base = p.words + share.begin;
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
  for (int64_t i = 0; i < part; i += kStep) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; s++) {
      const auto* v = reinterpret_cast<const __m256i*>(base + s * part + i);
      a = _mm256_add_epi64(a, _mm256_loadu_si256(v));
      b = _mm256_add_epi64(b, _mm256_loadu_si256(v + 1));
      c = _mm256_add_epi64(c, _mm256_loadu_si256(v + 2));
      d = _mm256_add_epi64(d, _mm256_loadu_si256(v + 3));
    }
  }
  uint64_t sum = sum_lanes(_mm256_add_epi64(_mm256_add_epi64(a, b), _mm256_add_epi64(c, d)));
  for (int64_t i = share.begin + kStreams * part; i < share.end; i++) sum += p.words[i];
  return sum;
}

constexpr int kAccumulators = 12;

uint64_t fma_f32(int64_t steps) {
  const __m256 one = _mm256_set1_ps(1.0f);
  __m256 s0 = _mm256_setzero_ps(), s1 = s0, s2 = s0, s3 = s0, s4 = s0, s5 = s0, s6 = s0, s7 = s0, s8 = s0, s9 = s0, s10 = s0, s11 = s0;
  // WHY one block of named registers: gcc 12 keeps an array of them in memory, and stores after every step.
  for (int64_t step = 0; step < steps; step++)
    asm volatile(
        "vfmadd231ps %12, %12, %0\n\tvfmadd231ps %12, %12, %1\n\tvfmadd231ps %12, %12, %2\n\tvfmadd231ps %12, %12, %3\n\t"
        "vfmadd231ps %12, %12, %4\n\tvfmadd231ps %12, %12, %5\n\tvfmadd231ps %12, %12, %6\n\tvfmadd231ps %12, %12, %7\n\t"
        "vfmadd231ps %12, %12, %8\n\tvfmadd231ps %12, %12, %9\n\tvfmadd231ps %12, %12, %10\n\tvfmadd231ps %12, %12, %11"
        : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7), "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11)
        : "x"(one));
  alignas(32) float lanes[kAccumulators][8];
  const __m256 sums[kAccumulators] = {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11};
  uint64_t total = 0;
  for (int i = 0; i < kAccumulators; i++) {
    _mm256_store_ps(lanes[i], sums[i]);
    for (float lane : lanes[i]) total += static_cast<uint64_t>(lane);
  }
  return total;
}

uint64_t dot_int8(int64_t steps) {
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  __m256i total = _mm256_setzero_si256();
  for (int64_t done = 0; done < steps;) {
    const int64_t until = done + 4096 < steps ? done + 4096 : steps;  // 2 a step: an int16 lane holds 16,383 of them
    __m256i sums[kAccumulators];
#pragma GCC unroll 12
    for (auto& sum : sums) sum = _mm256_setzero_si256();
    for (; done < until; done++) {
#pragma GCC unroll 12
      for (auto& sum : sums) {
        __m256i products;
        asm volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(ones8));
      }
    }
#pragma GCC unroll 12
    for (auto& sum : sums) {
      const __m256i wide = _mm256_madd_epi16(sum, ones16);
      total = _mm256_add_epi64(total, _mm256_add_epi64(_mm256_and_si256(wide, _mm256_set1_epi64x(0xffffffff)), _mm256_srli_epi64(wide, 32)));
    }
  }
  return sum_lanes(total);
}

uint64_t measure(const Params& p, int64_t task) {
  if (p.ceiling == Ceiling::kFmaF32 || p.ceiling == Ceiling::kDotBf16) return fma_f32(p.steps);
  if (p.ceiling == Ceiling::kDotInt8) return dot_int8(p.steps);
  switch (p.streams) {
    case 1: return read<1>(p, task);
    case 2: return read<2>(p, task);
    case 4: return read<4>(p, task);
    default: return read<8>(p, task);
  }
}

}  // namespace

void run(const Params& p) {
  parallel_tasks(p.num_threads, [&](int64_t task) { p.results[task] = measure(p, task); });
}

}  // namespace taut::roofline::cpu_avx2
