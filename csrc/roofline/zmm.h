// What the loops of the AVX-512 impls share, on zmm registers.
// WORK      read: `streams` sequential streams, 128 B of each in turn, four sums.
//           fp32: 16 accumulators, vfmadd. int8: 16 accumulators of int32, vpdpbusd (64 multiply-adds).
#pragma once

#include <immintrin.h>

#include "roofline/op.h"

namespace taut::roofline {
namespace {

template <int kStreams>
uint64_t read(const Params& p, int64_t task) {
  constexpr int64_t kStep = 16;  // words: two cache lines
  const Share share = share_of(p, task);
  const int64_t part = (share.end - share.begin) / kStreams / kStep * kStep;
  const uint64_t* base = p.words + share.begin;
  __m512i even[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()}, odd[2] = {even[0], even[0]};
  for (int64_t i = 0; i < part; i += kStep) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; s++) {
      const auto* v = base + s * part + i;
      even[s & 1] = _mm512_add_epi64(even[s & 1], _mm512_loadu_si512(v));
      odd[s & 1] = _mm512_add_epi64(odd[s & 1], _mm512_loadu_si512(v + 8));
    }
  }
  const __m512i all = _mm512_add_epi64(_mm512_add_epi64(even[0], even[1]), _mm512_add_epi64(odd[0], odd[1]));
  uint64_t sum = static_cast<uint64_t>(_mm512_reduce_add_epi64(all));
  for (int64_t i = share.begin + kStreams * part; i < share.end; i++) sum += p.words[i];
  return sum;
}

constexpr int kAccumulators = 16;

uint64_t fma_f32(int64_t steps) {
  __m512 sums[kAccumulators];
  const __m512 one = _mm512_set1_ps(1.0f);
#pragma GCC unroll 16
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 16
    for (auto& sum : sums) asm volatile("vfmadd231ps %1, %1, %0" : "+v"(sum) : "v"(one));
  }
  uint64_t total = 0;
#pragma GCC unroll 16
  for (auto& sum : sums) {
    alignas(64) float lanes[16];
    _mm512_store_ps(lanes, sum);
    for (float lane : lanes) total += static_cast<uint64_t>(lane);
  }
  return total;
}

uint64_t dot_int8(int64_t steps) {
  __m512i sums[kAccumulators];
  const __m512i ones = _mm512_set1_epi8(1);
#pragma GCC unroll 16
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (int64_t step = 0; step < steps; step++) {
#pragma GCC unroll 16
    for (auto& sum : sums) asm volatile("vpdpbusd %1, %1, %0" : "+v"(sum) : "v"(ones));
  }
  uint64_t total = 0;
#pragma GCC unroll 16
  for (auto& sum : sums) {
    alignas(64) uint32_t lanes[16];
    _mm512_store_si512(lanes, sum);
    for (uint32_t lane : lanes) total += lane;
  }
  return total;
}

// `dot_bf16(steps)`: the impl's own.
template <class DotBf16>
uint64_t measure(const Params& p, int64_t task, DotBf16 dot_bf16) {
  if (p.ceiling == Ceiling::kFmaF32) return fma_f32(p.steps);
  if (p.ceiling == Ceiling::kDotBf16) return dot_bf16(p.steps);
  if (p.ceiling == Ceiling::kDotInt8) return dot_int8(p.steps);
  switch (p.streams) {
    case 1: return read<1>(p, task);
    case 2: return read<2>(p, task);
    case 4: return read<4>(p, task);
    default: return read<8>(p, task);
  }
}

}  // namespace
}  // namespace taut::roofline
