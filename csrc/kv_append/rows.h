// A row of keys or values to a cache and back, for every ISA: each kernel file compiles its own copy with its own flags.
#pragma once

#include "common/row_math.h"
#include "kv_append/op.h"

namespace taut::kv_append {
namespace {

// row[width up to 8] = (x - offsets) / factors; what a step between codes has to be, NaN if one is no finite number.
TAUT_INLINE float load_row(const Params& p, const Heads& from, int64_t index, int64_t width, const float* offsets, const float* factors, float* row) {
  float high = 0, low = 0;
  FloatLanes highest = {}, lowest = {}, nothing = {};
  for_dtype(p.dtype, [&]<DType kDType>() {
    for (int64_t d = 0; d < width; d += 8) {
      const int64_t count = std::min<int64_t>(8, width - d);
      FloatLanes x;
      load_lanes<kDType>(x, from.data, index + d, count);
      if (offsets) {
        FloatLanes offset, factor;
        load_lanes<DType::kFloat32>(offset, offsets, d, count);
        load_lanes<DType::kFloat32>(factor, factors, d, count);
        x = (x - offset) / TAUT_SELECT(factor, ==, 0.0f, FloatLanes{} + 1.0f, factor);  // the lanes past `width` have a factor of 0
      }
      store_lanes<DType::kFloat32>(x, row, d);
      highest = TAUT_SELECT(x, >, highest, x, highest);
      lowest = TAUT_SELECT(x, <, lowest, x, lowest);
      nothing += x * 0.0f;
    }
  });
  for (int i = 0; i < 8; i++) high = std::max(high, highest[i]), low = std::min(low, lowest[i]);
  if (sum_lanes(nothing) != 0) return __builtin_nanf("");
  return p.cache.format == KvFormat::kInt4 ? std::max(high / 7.0f, low / -8.0f) : std::max(high, -low) / 127.0f;
}

// codes[width up to 8] of row, and the scale in fp16. int8: [-127, 127]. int4: [-8, 7], and the step is the larger of what each side needs.
TAUT_INLINE uint16_t encode(KvFormat format, const float* row, int64_t width, float step, int32_t* codes) {
  const bool int4 = format == KvFormat::kInt4;
  const uint16_t bits = float_to_fp16(std::min(step, 65504.0f));
  const float scale = fp16_to_float(bits), inverse = scale > 0 ? 1.0f / scale : 0.0f;
  const FloatLanes low = FloatLanes{} + (int4 ? -8.0f : -127.0f), high = FloatLanes{} + (int4 ? 7.0f : 127.0f), magic = FloatLanes{} + 12582912.0f;
  for (int64_t d = 0; d < width; d += 8) {
    FloatLanes x;
    load_lanes<DType::kFloat32>(x, row, d);
    x *= inverse;
    x = TAUT_SELECT(x, >, low, x, low);  // a NaN too
    x = TAUT_SELECT(x, <, high, x, high);
    const IntLanes code = reinterpret_cast<IntLanes>(x + magic) - reinterpret_cast<IntLanes>(magic);  // to the nearest, ties to even
    std::memcpy(codes + d, &code, 32);
  }
  return bits;
}

// One nibble of a byte, the other stays.
TAUT_INLINE void put(uint8_t& byte, int shift, int32_t code) { byte = static_cast<uint8_t>((byte & (0xf0 >> shift)) | (code + 8) << shift); }

TAUT_INLINE void put_key(KvFormat format, uint8_t* block, int64_t token, int64_t D, const int32_t* codes) {
  if (format == KvFormat::kInt8)
    for (int64_t d = 0; d < D; d++) block[(d / 4 * kKvBlock + token) * 4 + d % 4] = static_cast<uint8_t>(codes[d] + 128);
  else
    for (int64_t d = 0; d < D; d++) {
      const CodeAt at = key_code_at(format, token, d);
      put(block[at.byte], at.shift, codes[d]);
    }
}
TAUT_INLINE void put_value(KvFormat format, uint8_t* block, int64_t token, int64_t Dv, const int32_t* codes) {
  const CodeAt first = value_code_at(format, Dv, token, 0);
  if (format == KvFormat::kInt8)
    for (int64_t d = 0; d < Dv; d++) block[first.byte + d * 4] = static_cast<uint8_t>(codes[d]);
  else
    for (int64_t d = 0; d < Dv; d++) put(block[first.byte + d * 4], first.shift, codes[d]);
}

TAUT_INLINE void append_one(const Params& p, int64_t b, int64_t h, int64_t i, int64_t token) {
  const KvCache& cache = p.cache;
  const float* channels = cache.channels ? cache.channels + (b * p.Hkv + h) * 2 * (p.D + p.Dv) : nullptr;
  for (const bool is_key : {true, false}) {
    const Heads& from = is_key ? p.k : p.v;
    const int64_t width = is_key ? p.D : p.Dv, index = b * from.batch_stride + h * from.head_stride + i * from.row_stride;
    const float* offsets = channels ? channels + (is_key ? 0 : p.D) : nullptr;
    alignas(32) float row[256];
    const float step = load_row(p, from, index, width, offsets, offsets ? offsets + p.D + p.Dv : nullptr, row);
    uint8_t* block = is_key ? key_block(cache, b, h, token) : value_block(cache, b, h, token);
    const int64_t place = token % cache.page_tokens % kKvBlock;
    if (!has_codes(cache.format)) {
      uint8_t* stored = block + place * (is_key ? cache.k_row_stride : cache.v_row_stride);
      if (cache.format == KvFormat::kFp8)
        for (int64_t d = 0; d < width; d++) stored[d] = float_to_e4m3(row[d]);
      else
        for_dtype(static_cast<DType>(cache.format), [&]<DType kDType>() {
          for (int64_t d = 0; d < width; d += 8) {
            FloatLanes x;
            load_lanes<DType::kFloat32>(x, row, d);
            store_lanes<kDType>(x, stored, d, std::min<int64_t>(8, width - d));
          }
        });
      continue;
    }
    alignas(32) int32_t codes[256];
    const uint16_t scale = encode(cache.format, row, width, step, codes);
    (is_key ? cache.k_scales : cache.v_scales)[scale_at(cache, b, h, token)] = scale;
    if (is_key) put_key(cache.format, block, place, width, codes);
    else put_value(cache.format, block, place, width, codes);
  }
}

TAUT_INLINE void read_one(const Params& p, int64_t b, int64_t h, int64_t i, int64_t token) {
  const float* channels = p.cache.channels ? p.cache.channels + (b * p.Hkv + h) * 2 * (p.D + p.Dv) : nullptr;
  for (const bool is_key : {true, false}) {
    const Heads& to = is_key ? p.k : p.v;
    const int64_t width = is_key ? p.D : p.Dv, index = b * to.batch_stride + h * to.head_stride + i * to.row_stride;
    const float* offsets = channels ? channels + (is_key ? 0 : p.D) : nullptr;
    for (int64_t d = 0; d < width; d++) {
      const float stored = is_key ? key_at(p.cache, b, h, token, d) : value_at(p.cache, p.Dv, b, h, token, d);
      store_float(const_cast<void*>(to.data), index + d, p.dtype, offsets ? stored * offsets[d + p.D + p.Dv] + offsets[d] : stored);
    }
  }
}

// A task takes whole blocks of the cache: two tokens may share a byte of it.
void append_or_read(const Params& p) {
  parallel_tasks(p.num_threads, [&](int64_t task) {
    for (int64_t b = 0; b < p.B; b++) {
      const int64_t start = p.start + (p.starts ? p.starts[b] : 0), first = start / kKvBlock, blocks = (start + p.L + kKvBlock - 1) / kKvBlock - first;
      const int64_t pieces = blocks * p.Hkv;
      for (int64_t piece = pieces * task / p.num_threads; piece < pieces * (task + 1) / p.num_threads; piece++) {
        const int64_t h = piece / blocks, block = (first + piece % blocks) * kKvBlock;
        for (int64_t token = std::max(block, start); token < std::min(block + kKvBlock, start + p.L); token++)
          if (p.reads) read_one(p, b, h, token - start, token);
          else append_one(p, b, h, token - start, token);
      }
    }
  });
}

}  // namespace
}  // namespace taut::kv_append
