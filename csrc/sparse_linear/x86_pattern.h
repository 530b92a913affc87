// Patterns at compile time, for the x86 kernels.
#pragma once

#include "common/sparse.h"

namespace taut::sparse_linear {
namespace {

// f.template operator()<n, m, kShared>(): whether rows share their places.
template <class F>
void with_pattern(const SparsePattern& pattern, const F& f) {
  const auto with = [&]<int n, int m>() { pattern.v == 1 ? f.template operator()<n, m, false>() : f.template operator()<n, m, true>(); };
  if (pattern.m == 4) pattern.n == 1 ? with.template operator()<1, 4>() : with.template operator()<2, 4>();
  else pattern.n == 2 ? with.template operator()<2, 8>() : with.template operator()<4, 8>();
}

}  // namespace
}  // namespace taut::sparse_linear
