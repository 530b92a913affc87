// What the CUDA kernels share: which part of the work is whose, what a part leaves in memory, and how parts are put together.
//
// A row is one query of one head. The heads that share a key head are rows of one block, token by token (row = token * group + head),
// kRows of them at a time, so that keys and values are read once for all of them.
//
// Keys come in units of kUnit, counted from the first of the cache. A warp does a unit by itself: scores, their maximum, weights, the sum of
// values. Units are added up in one order, whoever does them: of a group of kGroupUnits first those that a warp of the block would
// have (every kWarps-th), then the warps', then the groups. So neither the number of multiprocessors nor the rest of the batch nor the
// capacity of the cache changes a bit, and there is a choice of how much a block does: a group, and leaves one part in memory, or,
// where that would leave multiprocessors idle, a unit a warp, and leaves kWarps parts. `combine` adds up the parts.
#pragma once

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "attention_decode/op.h"
#include "common/attention.cuh"
#include "common/kv_cache.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"

namespace taut::attention_decode {
namespace {

constexpr int kUnit = 64, kUnitBlocks = kUnit / static_cast<int>(kKvBlock);
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kGroupUnits = 16, kWarpUnits = kGroupUnits / kWarps;
constexpr int kCombineWarps = 8;

struct Args {
  Heads q, out;
  KvCache cache;
  float* lse;
  AttentionRules rules;
  const int32_t* lengths;  // on the device, or nullptr
  DType dtype;
  int kv_heads, group, Lq, D, Dv, keys, pages;
  bool plain;                               // D = Dv, rows of a block contiguous; no mask, softcap or slopes: a score is a product times a scale
  int block_rows, row_blocks, head_blocks;  // rows a block has room for; blocks of rows, of a key head and of all
  int tasks;                                // parts of work, of all blocks of rows
  int parts, part_units;                    // of a block of rows: as many as `keys` makes; kGroupUnits, or 1
  // [head_blocks][parts][block_rows]: sums [row_floats]; behind all of them maximum and total. What no key is seen in is not written.
  float* sums;
  float2* totals;
  int row_floats;
};

// A block of rows: whose they are, and the keys that any of them may see.
struct Rows {
  int b, kv_head, first, count, length;
  int first_unit, end_unit;
  int all_first, all_end;  // the keys that every row sees, but for a mask

  TAUT_DEVICE static Rows of(const Args& args, int head_block) {
    Rows rows;
    const int head = head_block / args.row_blocks;
    rows.b = head / args.kv_heads, rows.kv_head = head % args.kv_heads;
    rows.first = head_block % args.row_blocks * args.block_rows;
    rows.count = min(args.block_rows, args.Lq * args.group - rows.first);
    rows.length = args.lengths ? max(0, min(args.lengths[rows.b], args.keys)) : args.keys;
    const int first_position = rows.position(args, 0), last_position = rows.position(args, rows.count - 1);
    const int64_t first_seen = first_key(args.rules, first_position), end_seen = end_key(args.rules, last_position, rows.length);
    rows.all_first = static_cast<int>(first_key(args.rules, last_position)), rows.all_end = static_cast<int>(end_key(args.rules, first_position, rows.length));
    rows.first_unit = static_cast<int>(first_seen / kUnit), rows.end_unit = static_cast<int>((max(end_seen, int64_t{0}) + kUnit - 1) / kUnit);
    return rows;
  }
  TAUT_DEVICE int query(const Args& args, int r) const { return (first + r) / args.group; }
  TAUT_DEVICE int head(const Args& args, int r) const { return kv_head * args.group + (first + r) % args.group; }
  TAUT_DEVICE int position(const Args& args, int r) const { return query(args, r) + length - args.Lq; }
  TAUT_DEVICE int64_t at(const Args& args, const Heads& heads, int r) const {
    return b * heads.batch_stride + head(args, r) * heads.head_stride + query(args, r) * heads.row_stride;
  }
  // Offsets, and D + Dv further on factors, of the channels; or nullptr.
  TAUT_DEVICE const float* channels(const Args& args) const {
    return args.cache.channels ? args.cache.channels + (int64_t{b} * args.kv_heads + kv_head) * 2 * (args.D + args.Dv) : nullptr;
  }
};

// What scores want to know of a row; in shared memory. Of a row that is not there no key is seen.
struct Row {
  RowRules rules;
  int first, end;  // the keys that causality, the window and the length leave
  float offset;    // what the channels' offsets add to the sum of products
};
TAUT_DEVICE Row row_of(const Args& args, const Rows& rows, int r) {
  if (r >= rows.count) return {{0, 0, 0.0f}, 0, 0, 0.0f};
  const AttentionMask& mask = args.rules.mask;
  const int head = rows.head(args, r), query = rows.query(args, r), position = rows.position(args, r);
  return {{rows.b * mask.batch_stride + head * mask.head_stride + query * mask.query_stride, position,
           args.rules.alibi_slopes ? args.rules.alibi_slopes[head] * kLog2E : 0.0f},
          static_cast<int>(first_key(args.rules, position)),
          static_cast<int>(end_key(args.rules, position, rows.length)),
          0.0f};
}

// Two sums of weights and of values relative to their maxima, made one. WHY no operators: two kernels do this, and must round alike.
struct Merge {
  float most, of_a, of_b;
  TAUT_DEVICE Merge(float most_a, float most_b) : most(fmaxf(most_a, most_b)), of_a(exp2f(most_a - most)), of_b(exp2f(most_b - most)) {}
  TAUT_DEVICE float operator()(float a, float b) const { return __fmaf_rn(b, of_b, __fmul_rn(a, of_a)); }
};

// ---- A unit's keys and values in memory

// Where the unit's blocks of 16 tokens are; in shared memory, a warp's own. nullptr: none of its tokens are seen, or the block table
// names no page of the cache.
struct Places {
  const uint8_t *keys[kUnitBlocks], *values[kUnitBlocks];
  int64_t scales[kUnitBlocks];

  // By lanes 0 to kUnitBlocks - 1; a __syncwarp must follow.
  TAUT_DEVICE void find(const Args& args, const Rows& rows, int unit, int lane) {
    if (lane >= kUnitBlocks) return;
    const int token = unit * kUnit + lane * static_cast<int>(kKvBlock);
    KvPlace place{-1, 0};
    if (token < rows.length) place = kv_place(args.cache, args.pages, rows.b, token);
    keys[lane] = place.page < 0 ? nullptr : kv_keys(args.cache, place, rows.kv_head);
    values[lane] = place.page < 0 ? nullptr : kv_values(args.cache, place, rows.kv_head);
    scales[lane] = place.page < 0 ? 0 : kv_scale(args.cache, place, rows.kv_head);
  }
  TAUT_DEVICE bool whole() const {
    bool all = true;
#pragma unroll
    for (int i = 0; i < kUnitBlocks; i++) all = all && keys[i] != nullptr;
    return all;
  }
  TAUT_DEVICE bool has(int key) const { return keys[key / static_cast<int>(kKvBlock)] != nullptr; }
  // The scale of a token of the unit that `has`.
  TAUT_DEVICE float scale(const uint16_t* all, int key) const {
    return fp16_number(all[scales[key / static_cast<int>(kKvBlock)] + key % static_cast<int>(kKvBlock)]);
  }
};

// ---- What a warp has added up, in shared memory

template <int kRows, int kWidth>
struct Sums {
  float values[kRows][kWidth + 4];  // WHY 4 more: lanes that have the same columns of several rows meet no bank conflict
  float most[kRows], total[kRows];

  TAUT_DEVICE void clear(int lane) {
#pragma unroll 1
    for (int i = lane; i < kRows * kWidth; i += 32) values[i / kWidth][i % kWidth] = 0;
    if (lane < kRows) most[lane] = kLowest, total[lane] = 0;
  }
};

// Puts a warp's sums, or those of all warps added up, where `combine` finds them. The block must have come together before.
template <int kRows, int kWidth>
TAUT_DEVICE void store_part(const Args& args, int head_block, int part, int count, const Sums<kRows, kWidth>* s_sums, int warps, int thread, int threads) {
  const int64_t at = (int64_t{head_block} * args.parts + part) * kRows;
  for (int i = thread; i < count * (args.row_floats / 4); i += threads) {
    const int r = i / (args.row_floats / 4), d = i % (args.row_floats / 4) * 4;
    float4 sum = make_float4(0, 0, 0, 0);
    float most = kLowest, total = 0;
    for (int w = 0; w < warps; w++) {
      const Merge merge(most, s_sums[w].most[r]);
      const float4 x = *reinterpret_cast<const float4*>(&s_sums[w].values[r][d]);
      sum = make_float4(merge(sum.x, x.x), merge(sum.y, x.y), merge(sum.z, x.z), merge(sum.w, x.w));
      most = merge.most, total = merge(total, s_sums[w].total[r]);
    }
    *reinterpret_cast<float4*>(args.sums + (at + r) * args.row_floats + d) = sum;
    if (d == 0) args.totals[at + r] = make_float2(most, total);
  }
}

// ---- The blocks' walk

// What a block does at a time: some units, up to end_unit, of a block of rows.
struct Part {
  Rows rows;
  int head_block, first_unit, end_unit;
};

// The first of a warp's units, every kWarps-th from first_unit on, that any row sees.
TAUT_DEVICE int first_warp_unit(const Rows& rows, int first_unit, int warp) {
  const int unit = first_unit + warp, unseen = rows.first_unit - unit;
  return unseen <= 0 ? unit : unit + (unseen + kWarps - 1) / kWarps * kWarps;
}

// Each block goes over parts of work until there are no more. `Unit` is how a warp does a unit:
//   Shared            what the block's warps have in common: the queries
//   Scratch           a warp's own shared memory
//   load_queries(...) by all threads of the block
//   begin(...)        is told a warp's first unit of a part before the queries are loaded
//   attend(...)       adds a unit to the warp's sums; it is told which comes next, or -1
template <class Unit>
TAUT_DEVICE void walk(const Args& args, unsigned char* smem) {
  constexpr int kRows = Unit::kRows;
  using WarpSums = Sums<kRows, Unit::kWidth>;
  WarpSums* s_sums = reinterpret_cast<WarpSums*>(smem);
  auto* s_shared = reinterpret_cast<typename Unit::Shared*>(s_sums + kWarps);
  auto* s_scratch = reinterpret_cast<typename Unit::Scratch*>(s_shared + 1);
  auto* s_part = reinterpret_cast<Part*>(s_scratch + kWarps);
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_launch();  // `combine` may take a place that becomes free, and wait
#endif
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int task = blockIdx.x; task < args.tasks; task += gridDim.x) {
    {
      // WHY the block of rows fastest: those of one key head meet in the L2 cache
      const int block_units = args.part_units == 1 ? kWarps : kGroupUnits;
      const int head_block = task % args.head_blocks, first_unit = task / args.head_blocks * block_units;
      const Rows rows = Rows::of(args, head_block);
      if (first_unit >= rows.end_unit || first_unit + block_units <= rows.first_unit) continue;
      __syncthreads();  // the task before is done with shared memory
      if (threadIdx.x == 0) *s_part = {rows, head_block, first_unit, min(first_unit + block_units, rows.end_unit)};
      const int unit = first_warp_unit(rows, first_unit, warp);
      if (unit < min(first_unit + block_units, rows.end_unit)) Unit::begin(args, rows, unit, s_scratch[warp]);
      Unit::load_queries(args, rows, *s_shared, s_sums[0]);
      s_sums[warp].clear(lane);
    }
    __syncthreads();
    const Part& part = *s_part;  // WHY in shared memory: kernels have no registers to keep it in
    for (int unit = first_warp_unit(part.rows, part.first_unit, warp); unit < part.end_unit; unit += kWarps)
      Unit::attend(args, part.rows, unit, unit + kWarps < part.end_unit ? unit + kWarps : -1, *s_shared, s_scratch[warp], s_sums[warp]);
    if (args.part_units == 1) {
      __syncwarp();
      const int unit = part.first_unit + warp;
      if (unit >= part.rows.first_unit && unit < part.end_unit) store_part<kRows>(args, part.head_block, unit, part.rows.count, s_sums + warp, 1, lane, 32);
    } else {
      __syncthreads();
      store_part<kRows>(args, part.head_block, part.first_unit / kGroupUnits, part.rows.count, s_sums, kWarps, static_cast<int>(threadIdx.x), kThreads);
    }
  }
}
template <class Unit>
constexpr int smem_bytes_of() {
  return static_cast<int>(kWarps * sizeof(Sums<Unit::kRows, Unit::kWidth>) + sizeof(typename Unit::Shared) + kWarps * sizeof(typename Unit::Scratch) +
                          sizeof(Part));
}

// ---- All parts to out and lse

// Four columns, and 128 further on four more, of a row.
struct Columns {
  float4 values[2];
  float most, total;

  TAUT_DEVICE void clear() { values[0] = values[1] = make_float4(0, 0, 0, 0), most = kLowest, total = 0; }
  TAUT_DEVICE void load(const float* row, int lane, int width) {
#pragma unroll
    for (int c = 0; c < 2; c++) values[c] = lane * 4 + 128 * c < width ? *reinterpret_cast<const float4*>(row + lane * 4 + 128 * c) : make_float4(0, 0, 0, 0);
  }
  TAUT_DEVICE void add(const Columns& other) {
    const Merge merge(most, other.most);
#pragma unroll
    for (int c = 0; c < 2; c++) {
      const float4 a = values[c], b = other.values[c];
      values[c] = make_float4(merge(a.x, b.x), merge(a.y, b.y), merge(a.z, b.z), merge(a.w, b.w));
    }
    most = merge.most, total = merge(total, other.total);
  }
};

// A block has a row; a warp a group of units at a time, which the first warp adds up.
__global__ void __launch_bounds__(32 * kCombineWarps) decode_combine(const Args args) {
  __shared__ __align__(16) float s_values[kCombineWarps][256];
  __shared__ float2 s_totals[kCombineWarps];
  const int head_block = blockIdx.x / args.block_rows, r = blockIdx.x % args.block_rows, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Rows rows = Rows::of(args, head_block);
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_wait();
#endif
  if (r >= rows.count) return;
  const int warps = blockDim.x / 32;
  const int first_group = rows.first_unit / kGroupUnits, end_group = (rows.end_unit + kGroupUnits - 1) / kGroupUnits;
  const auto load = [&](Columns& columns, int part) {
    const int64_t at = (int64_t{head_block} * args.parts + part) * args.block_rows + r;
    const float2 total = args.totals[at];
    columns.load(args.sums + at * args.row_floats, lane, args.row_floats);
    columns.most = total.x, columns.total = total.y;
  };
  Columns all;
  all.clear();
  for (int group = first_group; group < end_group; group += warps) {
    const int mine = group + warp;
    if (mine < end_group) {
      Columns of_group;
      if (args.part_units == 1) {
        of_group.clear();
#pragma unroll 1
        for (int w = 0; w < kWarps; w++) {
          Columns of_warp, parts[kWarpUnits];
          of_warp.clear();
#pragma unroll
          for (int i = 0; i < kWarpUnits; i++) {
            const int unit = mine * kGroupUnits + i * kWarps + w;
            if (unit >= rows.first_unit && unit < rows.end_unit) load(parts[i], unit);
            else parts[i].clear();
          }
#pragma unroll
          for (int i = 0; i < kWarpUnits; i++) of_warp.add(parts[i]);
          of_group.add(of_warp);
        }
      } else {
        load(of_group, mine);
      }
#pragma unroll
      for (int c = 0; c < 2; c++) *reinterpret_cast<float4*>(&s_values[warp][lane * 4 + 128 * c]) = of_group.values[c];
      if (lane == 0) s_totals[warp] = make_float2(of_group.most, of_group.total);
    }
    __syncthreads();
    if (warp == 0) {
      for (int w = 0; w < min(warps, end_group - group); w++) {
        Columns of_group;
        of_group.load(s_values[w], lane, 256);
        of_group.most = s_totals[w].x, of_group.total = s_totals[w].y;
        all.add(of_group);
      }
    }
    __syncthreads();
  }
  if (warp != 0) return;

  const float sink = args.rules.s_aux ? args.rules.s_aux[rows.head(args, r)] * kLog2E : -INFINITY, most = fmaxf(all.most, sink);
  const float part = exp2f(all.most - most), total = all.total * part, divisor = total + (sink > kLowest ? exp2f(sink - most) : 0.0f);
  const float inverse = inverse_of(divisor);
  const float* channels = rows.channels(args);
  const int64_t at = rows.at(args, args.out, r);
#pragma unroll
  for (int c = 0; c < 2; c++) {
    const float values[4] = {all.values[c].x, all.values[c].y, all.values[c].z, all.values[c].w};
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const int d = lane * 4 + 128 * c + e;
      if (d >= args.Dv) continue;
      float x = values[e] * part * inverse;
      if (channels) x = x * channels[args.D + args.Dv + args.D + d] + channels[args.D + d] * (total * inverse);
      store_number(const_cast<void*>(args.out.data), at + d, args.dtype, x);
    }
  }
  if (lane == 0) args.lse[(int64_t{rows.b} * args.kv_heads * args.group + rows.head(args, r)) * args.Lq + rows.query(args, r)] = lse_of_row(divisor, most);
}

// ---- Host

// Whether the floats of a cache can be loaded 16 bytes at a time; codes can.
inline bool whole_chunks(const CudaParams& p) {
  const KvCache& cache = p.cache;
  if (has_codes(cache.format)) return true;
  const int64_t bytes = reinterpret_cast<int64_t>(cache.k) | reinterpret_cast<int64_t>(cache.v) | cache.k_page_stride | cache.k_head_stride |
                        cache.k_row_stride | cache.v_page_stride | cache.v_head_stride | cache.v_row_stride | (p.D | p.Dv) * kv_element_bytes(cache.format);
  return bytes % 16 == 0;
}

inline Args args_of(const CudaParams& p, int block_rows) {
  Args args{};
  args.q = p.q, args.out = p.out, args.cache = p.cache, args.lse = p.lse, args.rules = p.rules, args.lengths = p.lengths, args.dtype = p.dtype;
  args.rules.window = std::min(p.rules.window, p.Lq + p.keys);  // WHY: sums with it must not overflow
  const int64_t row_bytes = p.D * kv_element_bytes(p.cache.format);
  args.plain = p.rules.mask.kind == MaskKind::kNone && p.rules.softcap == 0 && p.rules.alibi_slopes == nullptr && p.D == p.Dv &&
               (has_codes(p.cache.format) || (p.cache.k_row_stride == row_bytes && p.cache.v_row_stride == row_bytes));
  args.kv_heads = static_cast<int>(p.Hkv), args.group = static_cast<int>(p.Hq / p.Hkv), args.Lq = static_cast<int>(p.Lq);
  args.D = static_cast<int>(p.D), args.Dv = static_cast<int>(p.Dv), args.keys = static_cast<int>(p.keys), args.pages = static_cast<int>(p.pages);
  args.block_rows = block_rows, args.row_blocks = static_cast<int>((p.rows() + block_rows - 1) / block_rows);
  args.head_blocks = static_cast<int>(p.B * p.Hkv * args.row_blocks);
  const int units = static_cast<int>((p.keys + kUnit - 1) / kUnit), groups = (units + kGroupUnits - 1) / kGroupUnits;
  const bool whole = int64_t{args.head_blocks} * groups >= p.device->sm_count;
  args.parts = whole ? groups : units, args.part_units = whole ? kGroupUnits : 1;
  args.row_floats = (args.Dv + 3) / 4 * 4;
  const int64_t tasks = int64_t{args.head_blocks} * (whole ? groups : (units + kWarps - 1) / kWarps);
  if (tasks > std::numeric_limits<int>::max()) throw std::runtime_error("attention_decode: more than 2^31 parts of work");
  args.tasks = static_cast<int>(tasks);
  const int64_t rows = int64_t{args.head_blocks} * args.parts * block_rows;
  args.sums = static_cast<float*>(p.workspace), args.totals = reinterpret_cast<float2*>(args.sums + rows * args.row_floats);
  return args;
}
inline int64_t workspace_bytes_of(const CudaParams& p, int block_rows) {
  const Args args = args_of(p, block_rows);
  return int64_t{args.head_blocks} * args.parts * block_rows * (args.row_floats * 4 + 8);
}

// The kernel that walks, on as many blocks as run at once, `kernel_blocks` a multiprocessor; and what adds up its parts.
inline void launch_decode(const CudaParams& p, const char* name, void (*kernel)(Args), int smem_bytes, int kernel_blocks, const Args& args) {
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(args.tasks, int64_t{p.device->sm_count} * kernel_blocks));
  if (blocks) launch(name, kernel, dim3(blocks), dim3(kThreads), smem_bytes, p.stream, args);
  launch_dependent(*p.device, "attention_decode combine", decode_combine, dim3(static_cast<unsigned>(args.head_blocks * args.block_rows)),
                   dim3(static_cast<unsigned>(32 * std::clamp((args.parts * args.part_units + kGroupUnits - 1) / kGroupUnits, 1, kCombineWarps))), 0, p.stream,
                   args);
}

}  // namespace
}  // namespace taut::attention_decode
