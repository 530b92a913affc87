// What a key-value cache looks like in memory: written by kv_append, read by attention_decode and kv_read.
//
// A cache is pages of tokens. Contiguous and static caches have one page a sequence, of the whole capacity; of paged ones a block table
// says which page holds which tokens of a sequence. Blocks of kKvBlock tokens lie one after the other in a page, and hold
//
//   fp32, bf16, fp16, fp8 (e4m3)  rows of D (or Dv) numbers, a token each. Strides are free: any tensor [pages,Hkv,tokens,D] is a cache.
//   int8, int4                    codes for a dot product of 4 bytes, the scale of each token and head (fp16) beside them:
//       keys, int8    [D/4][16 tokens][4]       D/4 rounded up
//       keys, int4    [D/8][16 tokens][4]       D/8 rounded up; byte t of a token: element t in the low half, t + 4 in the high one
//       values, int8  [4 quads of tokens][Dv up to 16][4 tokens]
//       values, int4  [2 octets of tokens][Dv up to 16][4]; byte t: token t in the low half, t + 4 in the high one
//
// So a register holds one thing of many tokens (keys) or many value dims (values), and no sum runs across its lanes. What a code stands
// for comes times the token's scale: int4 -8 to 7 stored as 0 to 15; int8 -127 to 127, of keys 128 more, of values in two's complement,
// since the dot product wants one side unsigned: the codes beside q, which has a sign, and the weights, which have none, beside the values.
//
// Channels: [Hkv][2][D + Dv] fp32 a sequence, offsets and then factors; what is stored of a number x is (x - offset) / factor.
// WHY: a key's large channels are large for all tokens. Without them one scale for a token leaves its other channels no codes.
#pragma once

#include "common/dtypes.h"

namespace taut {

enum class KvFormat : int32_t { kFloat32, kBFloat16, kFloat16, kFp8, kInt8, kInt4 };
constexpr int64_t kNumKvFormats = 6, kKvBlock = 16;

// A cache of one layer. Strides and sizes of pages in bytes; of scales in elements.
struct KvCache {
  KvFormat format;
  uint8_t *k, *v;
  int64_t k_page_stride, k_head_stride, k_block_stride, k_row_stride;  // a row's stride is of no use to codes
  int64_t v_page_stride, v_head_stride, v_block_stride, v_row_stride;
  uint16_t *k_scales, *v_scales;  // [pages,Hkv,tokens] fp16, or nullptr
  int64_t scale_page_stride, scale_head_stride;
  const float* channels;  // [B,Hkv,2,D + Dv], or nullptr
  int64_t page_tokens;
  const int32_t* block_table;  // [B,table_columns], or nullptr: page b is of sequence b
  int64_t table_columns;
};

namespace {  // WHY: every translation unit gets its own copy, so that no AVX-512 copy can be linked for everyone

constexpr bool has_codes(KvFormat format) { return format == KvFormat::kInt8 || format == KvFormat::kInt4; }
constexpr int64_t kv_element_bytes(KvFormat format) { return format == KvFormat::kFloat32 ? 4 : format == KvFormat::kFp8 ? 1 : 2; }  // of floats
// Bytes of a block of codes.
constexpr int64_t key_block_bytes(KvFormat format, int64_t D) { return (format == KvFormat::kInt4 ? (D + 7) / 8 : (D + 3) / 4) * 64; }
constexpr int64_t value_block_bytes(KvFormat format, int64_t Dv) { return (Dv + 15) / 16 * 16 * (format == KvFormat::kInt4 ? 8 : 16); }

// Where a code is in its block: its byte, and by how many bits it is shifted there.
struct CodeAt {
  int64_t byte;
  int shift;
};
inline CodeAt key_code_at(KvFormat format, int64_t token, int64_t d) {
  if (format == KvFormat::kInt8) return {(d / 4 * kKvBlock + token) * 4 + d % 4, 0};
  return {(d / 8 * kKvBlock + token) * 4 + d % 4, d % 8 < 4 ? 0 : 4};
}
inline CodeAt value_code_at(KvFormat format, int64_t Dv, int64_t token, int64_t d) {
  const int64_t columns = (Dv + 15) / 16 * 16;
  if (format == KvFormat::kInt8) return {(token / 4 * columns + d) * 4 + token % 4, 0};
  return {(token / 8 * columns + d) * 4 + token % 4, token % 8 < 4 ? 0 : 4};
}

// Where token `token` of a sequence is: its page, and its place there. WHY two cases: a division costs as much as ten keys' dot products.
struct Place {
  int64_t page, token;
};
inline Place place_of(const KvCache& cache, int64_t b, int64_t token) {
  if (!cache.block_table) return {b, token};
  return {cache.block_table[b * cache.table_columns + token / cache.page_tokens], token % cache.page_tokens};
}
// The block that holds `token`, which is at most the last of the sequence's pages.
inline uint8_t* key_block(const KvCache& cache, int64_t b, int64_t h, int64_t token) {
  const Place at = place_of(cache, b, token);
  return cache.k + at.page * cache.k_page_stride + h * cache.k_head_stride + at.token / kKvBlock * cache.k_block_stride;
}
inline uint8_t* value_block(const KvCache& cache, int64_t b, int64_t h, int64_t token) {
  const Place at = place_of(cache, b, token);
  return cache.v + at.page * cache.v_page_stride + h * cache.v_head_stride + at.token / kKvBlock * cache.v_block_stride;
}
inline int64_t scale_at(const KvCache& cache, int64_t b, int64_t h, int64_t token) {
  const Place at = place_of(cache, b, token);
  return at.page * cache.scale_page_stride + h * cache.scale_head_stride + at.token;
}

inline float load_kv(const void* row, int64_t index, KvFormat format) {
  if (format == KvFormat::kFp8) return e4m3_to_float(static_cast<const uint8_t*>(row)[index]);
  return load_float(row, index, static_cast<DType>(format));  // the first three formats are numbered as dtypes are
}
inline void store_kv(void* row, int64_t index, KvFormat format, float value) {
  if (format == KvFormat::kFp8) static_cast<uint8_t*>(row)[index] = float_to_e4m3(value);
  else store_float(row, index, static_cast<DType>(format), value);
}

// The number at [b,h,token,d] of the keys, and of the values.
inline float key_at(const KvCache& cache, int64_t b, int64_t h, int64_t token, int64_t d) {
  const uint8_t* block = key_block(cache, b, h, token);
  if (!has_codes(cache.format)) return load_kv(block + token % kKvBlock * cache.k_row_stride, d, cache.format);
  const CodeAt at = key_code_at(cache.format, token % kKvBlock, d);
  const int code = cache.format == KvFormat::kInt4 ? (block[at.byte] >> at.shift & 15) - 8 : block[at.byte] - 128;
  return static_cast<float>(code) * fp16_to_float(cache.k_scales[scale_at(cache, b, h, token)]);
}
inline float value_at(const KvCache& cache, int64_t Dv, int64_t b, int64_t h, int64_t token, int64_t d) {
  const uint8_t* block = value_block(cache, b, h, token);
  if (!has_codes(cache.format)) return load_kv(block + token % kKvBlock * cache.v_row_stride, d, cache.format);
  const CodeAt at = value_code_at(cache.format, Dv, token % kKvBlock, d);
  const int code = cache.format == KvFormat::kInt4 ? (block[at.byte] >> at.shift & 15) - 8 : static_cast<int8_t>(block[at.byte]);
  return static_cast<float>(code) * fp16_to_float(cache.v_scales[scale_at(cache, b, h, token)]);
}

}  // namespace
}  // namespace taut
