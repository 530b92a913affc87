// A key-value cache (common/kv_cache.h) as CUDA kernels see it.
#pragma once

#include "common/cuda.cuh"
#include "common/kv_cache.h"
#include "common/numbers.cuh"

namespace taut {
namespace {

// A block of kKvBlock tokens: its page, or -1 where the table names none of the cache's `pages`, and its first token there.
struct KvPlace {
  int page, token;
};
TAUT_DEVICE KvPlace kv_place(const KvCache& cache, int pages, int b, int first_token) {
  if (!cache.block_table) return {b, first_token};
  const int page_tokens = static_cast<int>(cache.page_tokens), page = cache.block_table[b * cache.table_columns + first_token / page_tokens];
  return {0 <= page && page < pages ? page : -1, first_token % page_tokens};
}
TAUT_DEVICE uint8_t* kv_keys(const KvCache& cache, KvPlace at, int h) {
  return cache.k + at.page * cache.k_page_stride + h * cache.k_head_stride + at.token / static_cast<int>(kKvBlock) * cache.k_block_stride;
}
TAUT_DEVICE uint8_t* kv_values(const KvCache& cache, KvPlace at, int h) {
  return cache.v + at.page * cache.v_page_stride + h * cache.v_head_stride + at.token / static_cast<int>(kKvBlock) * cache.v_block_stride;
}
TAUT_DEVICE int64_t kv_scale(const KvCache& cache, KvPlace at, int h) { return at.page * cache.scale_page_stride + h * cache.scale_head_stride + at.token; }

TAUT_DEVICE float fp16_number(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

}  // namespace
}  // namespace taut
