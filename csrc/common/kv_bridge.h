// From the tensors of a key-value cache to KvCache, checked. No kernel includes this.
#pragma once

#include "common/kv_cache.h"
#include "common/torch_bridge.h"

namespace taut {

struct KvSizes {
  int64_t B, Hkv, D, Dv;
};

// What op schemas call it: Tensor k, Tensor v, Tensor? k_scales, Tensor? v_scales, Tensor? channels, Tensor? block_table, int kv_format
inline KvCache kv_cache_of(const char* op, const KvSizes& sizes, const Tensor& k, const Tensor& v, const std::optional<Tensor>& k_scales,
                           const std::optional<Tensor>& v_scales, const std::optional<Tensor>& channels, const std::optional<Tensor>& block_table,
                           int64_t format, CheckPlace check_place = check_cpu) {
  const auto [B, Hkv, D, Dv] = sizes;
  check(0 <= format && format < kNumKvFormats, op, ": kv_format must be 0 (float32), 1 (bfloat16), 2 (float16), 3 (fp8), 4 (int8) or 5 (int4), got ", format);
  KvCache cache{};
  cache.format = static_cast<KvFormat>(format);
  const bool codes = has_codes(cache.format);
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Float8_e4m3fn, ScalarType::Byte, ScalarType::Byte};
  for (const Tensor* t : {&k, &v}) {
    const char* what = t == &k ? "k" : "v";
    const int64_t last = codes ? (t == &k ? key_block_bytes(cache.format, D) : value_block_bytes(cache.format, Dv)) : t == &k ? D : Dv;
    check_place(op, what, *t);
    check(t->scalar_type() == kTypes[format], op, ": ", what, " is not of the dtype of kv_format ", format);
    check(t->dim() == 4 && t->size(1) == Hkv && t->size(3) == last, op, ": ", what, " must be [pages, ", Hkv, codes ? ", blocks of 16 tokens, " : ", tokens, ",
          last, "], got ", shape_string(*t));
    check(t->size(3) == 1 || t->stride(3) == 1, op, ": ", what, "'s last dimension must be contiguous");
    check(!codes || t->size(2) <= 1 || t->stride(2) == last, op, ": ", what, "'s last two dimensions must be contiguous");
  }
  check(k.size(0) == v.size(0) && k.size(2) == v.size(2), op, ": k and v must have as many pages and tokens, got ", shape_string(k), " and ", shape_string(v));
  cache.page_tokens = k.size(2) * (codes ? kKvBlock : 1);
  const int64_t element = codes ? 1 : kv_element_bytes(cache.format), rows = codes ? 1 : kKvBlock;
  cache.k = static_cast<uint8_t*>(const_cast<void*>(k.const_data_ptr())), cache.v = static_cast<uint8_t*>(const_cast<void*>(v.const_data_ptr()));
  cache.k_page_stride = k.stride(0) * element, cache.v_page_stride = v.stride(0) * element;
  cache.k_head_stride = k.stride(1) * element, cache.v_head_stride = v.stride(1) * element;
  cache.k_row_stride = k.stride(2) * element, cache.v_row_stride = v.stride(2) * element;
  cache.k_block_stride = cache.k_row_stride * rows, cache.v_block_stride = cache.v_row_stride * rows;
  check(codes == k_scales.has_value() && codes == v_scales.has_value(), op, ": k_scales and v_scales are for int8 and int4, which need both");
  if (codes) {
    for (const Tensor* t : {&*k_scales, &*v_scales}) {
      const char* what = t == &*k_scales ? "k_scales" : "v_scales";
      check_place(op, what, *t);
      check(t->scalar_type() == ScalarType::Half && t->dim() == 3 && t->size(0) == k.size(0) && t->size(1) == Hkv && t->size(2) == cache.page_tokens, op, ": ",
            what, " must be float16 [", k.size(0), ", ", Hkv, ", ", cache.page_tokens, "], got ", shape_string(*t));
      check(t->is_contiguous(), op, ": ", what, " must be contiguous");
    }
    cache.k_scales = static_cast<uint16_t*>(const_cast<void*>(k_scales->const_data_ptr()));
    cache.v_scales = static_cast<uint16_t*>(const_cast<void*>(v_scales->const_data_ptr()));
    cache.scale_page_stride = Hkv * cache.page_tokens, cache.scale_head_stride = cache.page_tokens;
  }
  if (channels) {
    check_place(op, "channels", *channels);
    check(channels->scalar_type() == ScalarType::Float && channels->is_contiguous() && channels->dim() == 4 && channels->size(0) == B &&
              channels->size(1) == Hkv && channels->size(2) == 2 && channels->size(3) == D + Dv,
          op, ": channels must be contiguous float32 [", B, ", ", Hkv, ", 2, ", D + Dv, "], got ", shape_string(*channels));
    cache.channels = static_cast<const float*>(channels->const_data_ptr());
  }
  if (!block_table) {
    check(k.size(0) == B, op, ": k must have a page for each of the ", B, " sequences, got ", shape_string(k));
    cache.table_columns = 1;
    return cache;
  }
  check_place(op, "block_table", *block_table);
  check(block_table->scalar_type() == ScalarType::Int && block_table->is_contiguous() && block_table->dim() == 2 && block_table->size(0) == B, op,
        ": block_table must be contiguous int32 [", B, ", pages], got ", shape_string(*block_table));
  check(cache.page_tokens % kKvBlock == 0 && cache.page_tokens > 0, op, ": pages must hold a multiple of ", kKvBlock, " tokens, got ", cache.page_tokens);
  cache.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
  cache.table_columns = block_table->size(1);
  return cache;
}

// That kernels can load codes 16 bytes at a time; their last two dimensions are a multiple of it already.
inline void check_words(const char* op, const KvCache& cache) {
  if (!has_codes(cache.format)) return;
  const uintptr_t bytes = reinterpret_cast<uintptr_t>(cache.k) | reinterpret_cast<uintptr_t>(cache.v) | static_cast<uintptr_t>(cache.k_page_stride) |
                          static_cast<uintptr_t>(cache.k_head_stride) | static_cast<uintptr_t>(cache.v_page_stride) |
                          static_cast<uintptr_t>(cache.v_head_stride);
  check(bytes % 16 == 0, op, ": blocks of codes must lie at multiples of 16 bytes on CUDA");
}

// `t`, int32 [B], as one number a sequence, which is not looked at.
inline const int32_t* kv_counts(const char* op, const char* what, const Tensor& t, int64_t B, CheckPlace check_place) {
  check_place(op, what, t);
  check(t.scalar_type() == ScalarType::Int && t.is_contiguous() && t.dim() == 1 && t.size(0) == B, op, ": ", what, " must be contiguous int32 [", B, "], got ",
        shape_string(t));
  return static_cast<const int32_t*>(t.const_data_ptr());
}
// Each in [low, high].
inline const int32_t* kv_counts(const char* op, const char* what, const Tensor& t, int64_t B, int64_t low, int64_t high) {
  const int32_t* values = kv_counts(op, what, t, B, check_cpu);
  for (int64_t b = 0; b < B; b++)
    check(low <= values[b] && values[b] <= high, op, ": ", what, " must be ", low, " to ", high, ", got ", values[b], " for sequence ", b);
  return values;
}

// That the pages which hold tokens [begin, end) of sequence b are there. WHY here: a wrong page would be read, or written, in silence.
inline void check_pages(const char* op, const KvCache& cache, int64_t pages, int64_t b, int64_t begin, int64_t end) {
  if (!cache.block_table || begin >= end) return;
  for (int64_t column = begin / cache.page_tokens; column <= (end - 1) / cache.page_tokens; column++) {
    const int64_t page = cache.block_table[b * cache.table_columns + column];
    check(0 <= page && page < pages, op, ": block_table[", b, "][", column, "] must be a page from 0 to ", pages - 1, ", got ", page);
  }
}

}  // namespace taut
