// COMPUTES  codes and scales of new keys and values, or their floats in the cache's dtype; and back. Numbers in fp32, the CPU's bits
// LAYOUT    k, v [B,Hkv,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h
// WORK      A block has the keys, or the values, of one head in one block of 16 tokens of the cache: two tokens may share a byte of it. Append: a
//           warp takes a row at a time, a lane every 32nd number; codes go to shared memory, and from there a thread has a word of the
//           cache to itself, of which it changes what is new. Read: a warp has a row, a lane every 32nd number.
// BOUND     bytes: a row of 128 bf16 is 256 read, and 66 written in int4; lanes side by side touch a whole sector of either. A single token
//           costs the launch
// LIMITS    codes at multiples of 16 bytes. What lies on the device is not checked: tokens before 0, past the capacity, or of a page that is not
//           there are not stored; of such a page NaN is read
#include "common/kv_cache.cuh"
#include "common/launch.h"
#include "kv_append/op.h"

namespace taut::kv_append::cuda_sm75_simt {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32, kTokens = static_cast<int>(kKvBlock), kMostWidth = 256;

struct Args {
  KvCache cache;
  Heads k, v;
  DType dtype;
  int batch, kv_heads, tokens, D, Dv, pages, blocks;  // blocks: of 16 tokens, as many as `tokens` may touch
  int64_t start, capacity;
  const int32_t* starts;
};

// A block's part of the work.
struct Block {
  bool is_key;
  int b, h, width;
  int64_t token, before;  // the cache's first token of the block; the one that token 0 of the call is
  KvPlace place;
  Heads rows;
  const float *offsets, *factors;  // or nullptr
  uint8_t* memory;
  int64_t row_stride;

  TAUT_DEVICE static Block mine(const Args& args) {
    Block block;
    const int turn = static_cast<int>(blockIdx.x), heads = args.batch * args.kv_heads;
    const int head = turn / 2 / args.blocks;
    block.is_key = turn % 2 == 0, block.b = head % heads / args.kv_heads, block.h = head % args.kv_heads;
    block.before = args.start + (args.starts ? args.starts[block.b] : 0);
    block.token = ((block.before >= 0 ? block.before : 0) / kTokens + turn / 2 % args.blocks) * kTokens;
    block.width = block.is_key ? args.D : args.Dv, block.rows = block.is_key ? args.k : args.v;
    block.row_stride = block.is_key ? args.cache.k_row_stride : args.cache.v_row_stride;
    block.offsets = block.factors = nullptr, block.memory = nullptr, block.place = {-1, 0};
    if (block.token >= args.capacity) return block;
    block.place = kv_place(args.cache, args.pages, block.b, static_cast<int>(block.token));
    if (block.place.page >= 0) block.memory = block.is_key ? kv_keys(args.cache, block.place, block.h) : kv_values(args.cache, block.place, block.h);
    if (args.cache.channels) {
      block.offsets = args.cache.channels + (int64_t{block.b} * args.kv_heads + block.h) * 2 * (args.D + args.Dv) + (block.is_key ? 0 : args.D);
      block.factors = block.offsets + args.D + args.Dv;
    }
    return block;
  }
  // Which of the call's tokens is the block's token t; whether there is one.
  TAUT_DEVICE int64_t row(int t) const { return token + t - before; }
  TAUT_DEVICE bool has(const Args& args, int t) const { return row(t) >= 0 && row(t) < args.tokens && token + t < args.capacity; }
  TAUT_DEVICE int64_t row_at(int t) const { return b * rows.batch_stride + h * rows.head_stride + row(t) * rows.row_stride; }
};

// To the nearest, ties to even; a NaN stays one.
TAUT_DEVICE void store_float_kv(uint8_t* row, int d, KvFormat format, float x) {
  if (format == KvFormat::kFp8) row[d] = static_cast<uint8_t>(x != x ? (__float_as_uint(x) >> 24 & 0x80u) | 0x7fu : to_e4m3(x));
  else store_number(row, d, static_cast<DType>(format), x);
}
TAUT_DEVICE float load_float_kv(const uint8_t* row, int d, KvFormat format) {
  return format == KvFormat::kFp8 ? from_e4m3(row[d]) : load_number(row, d, static_cast<DType>(format));
}

__global__ void __launch_bounds__(kThreads) append_kernel(const Args args) {
  __shared__ int8_t s_codes[kTokens][kMostWidth];
  const Block block = Block::mine(args);
  if (block.place.page < 0) return;
  const KvFormat format = args.cache.format;
  const bool codes = has_codes(format), int4 = format == KvFormat::kInt4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  // ---- Rows
  for (int t = warp; t < kTokens; t += kWarps) {
    if (!block.has(args, t)) continue;
    const int64_t at = block.row_at(t);
    float x[kMostWidth / 32], high = 0, low = 0;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < kMostWidth / 32; i++) {
      const int d = lane + 32 * i;
      if (d >= block.width) break;
      x[i] = load_number(block.rows.data, at + d, args.dtype);
      if (block.offsets) {
        const float factor = block.factors[d];
        x[i] = __fdiv_rn(__fsub_rn(x[i], block.offsets[d]), factor == 0.0f ? 1.0f : factor);
      }
      high = x[i] > high ? x[i] : high, low = x[i] < low ? x[i] : low;
      finite = finite && fabsf(x[i]) < INFINITY;
      if (!codes) store_float_kv(block.memory + t * block.row_stride, d, format, x[i]);
    }
    if (!codes) continue;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const float other_high = __shfl_xor_sync(0xffffffffu, high, lanes), other_low = __shfl_xor_sync(0xffffffffu, low, lanes);
      high = other_high > high ? other_high : high, low = other_low < low ? other_low : low;
    }
    finite = __all_sync(0xffffffffu, finite);
    const float up = int4 ? __fdiv_rn(high, 7.0f) : __fdiv_rn(high > -low ? high : -low, 127.0f), down = int4 ? __fdiv_rn(low, -8.0f) : 0.0f;
    const float step = up < down ? down : up;
    const uint16_t bits = finite ? __half_as_ushort(__float2half_rn(step < 65504.0f ? step : 65504.0f)) & 0x7fff : 0x7e00;  // a step of -0 is one of 0
    const float scale = fp16_number(bits), inverse = scale > 0.0f ? __fdiv_rn(1.0f, scale) : 0.0f;
    const float lowest = int4 ? -8.0f : -127.0f, highest = int4 ? 7.0f : 127.0f;
#pragma unroll
    for (int i = 0; i < kMostWidth / 32; i++) {
      const int d = lane + 32 * i;
      if (d >= block.width) break;
      float y = __fmul_rn(x[i], inverse);
      y = y > lowest ? y : lowest;  // a NaN too
      y = y < highest ? y : highest;
      s_codes[t][d] = static_cast<int8_t>(__float2int_rn(y));
    }
    if (lane == 0) (block.is_key ? args.cache.k_scales : args.cache.v_scales)[kv_scale(args.cache, block.place, block.h) + t] = bits;
  }
  if (!codes) return;
  __syncthreads();

  // ---- Words: [group of d][16 tokens] of keys, [group of tokens][columns] of values
  const int group = int4 ? 8 : 4, columns = (block.width + 15) / 16 * 16;
  const int words = block.is_key ? (block.width + group - 1) / group * kTokens : kTokens / group * columns;
  for (int w = threadIdx.x; w < words; w += kThreads) {
    uint32_t word = 0, mask = 0;
    for (int i = 0; i < group; i++) {
      const int t = block.is_key ? w % kTokens : w / columns * group + i, d = block.is_key ? w / kTokens * group + i : w % columns;
      if (d >= block.width || !block.has(args, t)) continue;
      const int code = s_codes[t][d] + (int4 ? 8 : block.is_key ? 128 : 0), shift = i % 4 * 8 + i / 4 * 4;
      word |= (static_cast<uint32_t>(code) & (int4 ? 15u : 255u)) << shift, mask |= (int4 ? 15u : 255u) << shift;
    }
    uint32_t* at = reinterpret_cast<uint32_t*>(block.memory) + w;
    if (mask == ~0u) *at = word;
    else if (mask) *at = (*at & ~mask) | word;
  }
}

__global__ void __launch_bounds__(kThreads) read_kernel(const Args args) {
  const Block block = Block::mine(args);
  const KvFormat format = args.cache.format;
  const bool codes = has_codes(format), int4 = format == KvFormat::kInt4;
  const int columns = (block.width + 15) / 16 * 16;
  for (int t = threadIdx.x / 32; t < kTokens; t += kWarps) {
    if (!block.has(args, t)) continue;
    const int64_t at = block.row_at(t);
    float scale = 0;
    if (codes && block.memory) scale = fp16_number((block.is_key ? args.cache.k_scales : args.cache.v_scales)[kv_scale(args.cache, block.place, block.h) + t]);
    for (int d = threadIdx.x % 32; d < block.width; d += 32) {
      float x = __uint_as_float(0x7fc00000u);
      if (block.memory && codes) {
        const int group = int4 ? 8 : 4, i = block.is_key ? d % group : t % group;
        const int byte = block.memory[(block.is_key ? d / group * kTokens + t : t / group * columns + d) * 4 + i % 4];
        const int code = int4 ? (byte >> i / 4 * 4 & 15) - 8 : block.is_key ? byte - 128 : static_cast<int8_t>(byte);
        x = __fmul_rn(static_cast<float>(code), scale);
      } else if (block.memory) {
        x = load_float_kv(block.memory + t * block.row_stride, d, format);
      }
      if (block.offsets) x = __fadd_rn(__fmul_rn(x, block.factors[d]), block.offsets[d]);
      store_number(const_cast<void*>(block.rows.data), at + d, args.dtype, x);
    }
  }
}

}  // namespace

void run(const CudaParams& p) {
  Args args{};
  args.cache = p.cache, args.k = p.k, args.v = p.v, args.dtype = p.dtype;
  args.batch = static_cast<int>(p.B), args.kv_heads = static_cast<int>(p.Hkv), args.tokens = static_cast<int>(p.L);
  args.D = static_cast<int>(p.D), args.Dv = static_cast<int>(p.Dv), args.pages = static_cast<int>(p.pages);
  args.start = p.start, args.capacity = p.cache.page_tokens * p.cache.table_columns, args.starts = p.starts;
  args.blocks = static_cast<int>(p.starts ? (p.L + 2 * kKvBlock - 2) / kKvBlock : (p.start + p.L - 1) / kKvBlock - p.start / kKvBlock + 1);
  const dim3 grid(static_cast<unsigned>(2 * p.B * p.Hkv * args.blocks));
  launch(p.reads ? "kv_read simt" : "kv_append simt", p.reads ? read_kernel : append_kernel, grid, dim3(kThreads), 0, p.stream, args);
}

}  // namespace taut::kv_append::cuda_sm75_simt
