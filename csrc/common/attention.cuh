// What is done to a score, in the CUDA kernels of every attention op. Exponents are of 2.
#pragma once

#include "common/attention.h"
#include "common/cuda.cuh"
#include "common/numbers.cuh"

namespace taut {
namespace {

// What the rules want to know of a row; in shared memory.
struct RowRules {
  int64_t mask;  // where its row of the mask begins, in elements
  int position;
  float slope;
};

TAUT_DEVICE float additive(const AttentionMask& mask, int64_t at) { return load_number(mask.data, at, mask.dtype); }

TAUT_DEVICE bool mask_shows(const AttentionMask& mask, int64_t at) {
  return mask.kind == MaskKind::kBool ? static_cast<const uint8_t*>(mask.data)[at] != 0 : additive(mask, at) != -INFINITY;
}

// By what a sum of products of q and k is multiplied first: then it is an exponent of 2, or the argument of tanh.
TAUT_DEVICE float first_scale(const AttentionRules& rules) { return rules.softmax_scale * (rules.softcap > 0 ? 1.0f / rules.softcap : kLog2E); }

// That product to the exponent of 2 of a visible key.
TAUT_DEVICE float apply_rules(const AttentionRules& rules, const RowRules& row, int key, float score) {
  if (rules.softcap > 0) score = rules.softcap * kLog2E * tanhf(score);
  if (rules.alibi_slopes) score -= row.slope * static_cast<float>(abs(row.position - key));
  if (rules.mask.kind == MaskKind::kAdditive) {
    const float added = additive(rules.mask, row.mask + key * rules.mask.key_stride) * kLog2E;
    score += added < kLowest ? kLowest : added;  // WHY: the lowest float times log2(e) would be -infinity, and hide
  }
  return score;
}

// total: the sum of the weights, most: the exponent of 2 they are relative to.
TAUT_DEVICE float lse_of_row(float total, float most) { return total != 0.0f ? most * kLn2 + logf(total) : -INFINITY; }
TAUT_DEVICE float inverse_of(float total) { return total != 0.0f ? 1.0f / total : 0.0f; }

}  // namespace
}  // namespace taut
