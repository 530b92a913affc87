// The tiled walk, for every ISA: each kernel file compiles its own copy with its own flags.
//
// A task holds a tile of kKeys keys of one key head, with its sums of dk and dv, and goes over all rows that see any of it, kBlockRows at a
// time (op.h says what a row is). Five products a step: scores and the weights' gradients with keys in the lanes, against k and v transposed
// once a task; then dv, dk and dq with head dims in the lanes, against rows as they lie. So nothing is transposed for a row.
//
// dq is summed over the tiles of keys, which are tasks of their own: each adds to a block of rows when all tiles before it have (turns), so
// the order of sums, and every bit, is the same for any number of threads, and no sum is stored twice.
#pragma once

#include "attention_backward/rows.h"
#include "common/attention_lanes.h"

namespace taut::attention_backward {
namespace {

// The factor that a product broadcasts: b[column][step].
struct Columns {
  const float* at;
  int64_t column_stride, step_stride;
};

template <class L>
struct Tiles {
  using V = typename L::V;
  static constexpr int kWidth = L::kWidth, kColumns = L::kColumns;
  static constexpr int kSlice = std::max(kWidth, kColumns);  // keys are lanes of some products, columns of others: so many go together
  static constexpr int64_t kKeys = 128, kRows = kBlockRows;
  // A row of a tile's matrices. WHY + 16: strides of a multiple of 512 bytes share few sets of the L1 cache
  static constexpr int64_t kStride = kKeys + 16;
  static int64_t up(int64_t count, int64_t to) { return (count + to - 1) / to * to; }
  static int64_t wide(int64_t width) { return up(width, 16) + 16; }

  struct Tile {
    const Params& p;
    Sequence s;
    int64_t b, kv_head, group, key, n;  // its keys: n from `key` on
    bool keys_finite;
    float *keys_across, *values_across;     // [D][kStride] times what makes scores exponents of 2 (or arguments of tanh), [Dv][kStride]
    float *keys, *dk, *dv;                  // [kKeys][wide(D or Dv)]
    float *q, *grad_out, *dq;               // of the rows at hand: [kRows][wide(D or Dv)]
    float *scores, *grads, *slopes, *bias;  // [kRows][kStride]: scores, then weights; gradients of weights, then of scores; of softcap; of the mask
    float *most, *log_total, *shift, *alibi, *position, *first, *last;  // [kRows]; `position`, and the first and last key it sees, from `key` on
  };
  static size_t scratch_floats(const Params& p) {
    return (p.D + p.Dv + 4 * kRows) * kStride + (2 * kKeys + 2 * kRows) * wide(p.D) + (kKeys + kRows) * wide(p.Dv) + 7 * kRows;
  }
  static void take_memory(Tile& tile, float* memory) {
    const Params& p = tile.p;
    const auto take = [&](int64_t count) { return memory += count, memory - count; };
    tile.keys_across = take(p.D * kStride), tile.values_across = take(p.Dv * kStride);
    for (float** rows : {&tile.scores, &tile.grads, &tile.slopes, &tile.bias}) *rows = take(kRows * kStride);
    tile.keys = take(kKeys * wide(p.D)), tile.dk = take(kKeys * wide(p.D)), tile.dv = take(kKeys * wide(p.Dv));
    tile.q = take(kRows * wide(p.D)), tile.dq = take(kRows * wide(p.D)), tile.grad_out = take(kRows * wide(p.Dv));
    for (float** row : {&tile.most, &tile.log_total, &tile.shift, &tile.alibi, &tile.position, &tile.first, &tile.last}) *row = take(kRows);
  }

  // ---- Products ----

  // c[columns][kVec lanes] = or += a[n][kVec lanes] . b; columns: a multiple of kColumns
  template <int kVec>
  static __attribute__((noinline)) void product(const float* a, int64_t a_stride, Columns b, int64_t n, float* c, int64_t c_stride, int64_t columns, bool add) {
    for (int64_t first = 0; first < columns; first += kColumns, b.at += kColumns * b.column_stride, c += kColumns * c_stride) {
      V sum[kColumns][kVec];
      TAUT_FOR (int j = 0; j < kColumns; j++)
        TAUT_FOR (int i = 0; i < kVec; i++) sum[j][i] = add ? L::load(c + j * c_stride + i * kWidth) : L::zero();
      multiply_columns<L, kVec>(sum, a, a_stride, b.at, b.column_stride, b.step_stride, n);
      TAUT_FOR (int j = 0; j < kColumns; j++)
        TAUT_FOR (int i = 0; i < kVec; i++) L::store(c + j * c_stride + i * kWidth, sum[j][i]);
    }
  }

  static void multiply(const float* a, int64_t a_stride, Columns b, int64_t n, float* c, int64_t c_stride, int64_t columns, int64_t lanes, bool add) {
    for (int64_t lane = 0; lane < lanes;) {
      const int64_t left = (lanes - lane + kWidth - 1) / kWidth;
      if (L::kVectors == 3 && (left >= 5 || left == 3))
        product<L::kVectors>(a + lane, a_stride, b, n, c + lane, c_stride, columns, add), lane += L::kVectors * kWidth;
      else if (left > 1) product<2>(a + lane, a_stride, b, n, c + lane, c_stride, columns, add), lane += 2 * kWidth;
      else product<1>(a + lane, a_stride, b, n, c + lane, c_stride, columns, add), lane += kWidth;
    }
  }

  // WHY: 0 times a NaN is NaN, and what a row does not see has the weight 0. One number at a time; numbers are seldom like that.
  static __attribute__((noinline)) void multiply_visible(const float* a, int64_t a_stride, Columns b, int64_t n, float* c, int64_t c_stride, int64_t columns,
                                                         int64_t lanes, bool add) {
    for (int64_t j = 0; j < columns; j++)
      for (int64_t i = 0; i < lanes; i++) {
        float sum = add ? c[j * c_stride + i] : 0;
        for (int64_t t = 0; t < n; t++) {
          const float one = b.at[j * b.column_stride + t * b.step_stride];
          if (one != 0) sum += a[t * a_stride + i] * one;
        }
        c[j * c_stride + i] = sum;
      }
  }

  // ---- Loads ----

  // Rows (a multiple of 8) of `width` numbers, which begin at `at` (elements; below 0: a row of zeros), to plain[row][wide(width)] and, times
  // factor, to across[width][kStride], where those are given. Whether all are finite.
  static __attribute__((noinline)) bool load(const void* data, DType dtype, const int64_t* at, int64_t rows, int64_t width, float* plain, float* across,
                                             float factor) {
    FloatLanes nothing = {};
    for_dtype(dtype, [&]<DType kDType>() {
      for (int64_t r = 0; r < rows; r += 8)
        for (int64_t d = 0; d < up(width, kWidth); d += 8) {
          const int64_t count = std::clamp<int64_t>(width - d, 0, 8);
          FloatLanes x[8];
          for (int i = 0; i < 8; i++) {
            if (at[r + i] < 0) x[i] = FloatLanes{};
            else load_lanes<kDType>(x[i], data, at[r + i] + d, count);
            nothing += x[i] * 0.0f;
            if (plain) store_lanes<DType::kFloat32>(x[i], plain, (r + i) * wide(width) + d);
          }
          if (!across) continue;
          transpose8(x);
          for (int64_t i = 0; i < count; i++) store_lanes<DType::kFloat32>(x[i] * factor, across, (d + i) * kStride + r);
        }
    });
    return sum_lanes(nothing) == 0;
  }

  static void load_keys(Tile& tile) {
    const Params& p = tile.p;
    int64_t k_rows[kKeys], v_rows[kKeys];
    const int64_t count = up(tile.n, kSlice);
    for (int64_t j = 0; j < count; j++) {
      const bool there = j < tile.n;
      k_rows[j] = there ? row_of(p.k, tile.b, tile.kv_head, tile.s.first_k + tile.key + j) : -1;
      v_rows[j] = there ? row_of(p.v, tile.b, tile.kv_head, tile.s.first_k + tile.key + j) : -1;
    }
    const float cap = p.rules.softcap;
    tile.keys_finite = load(p.k.data, p.dtype, k_rows, count, p.D, tile.keys, tile.keys_across, p.rules.softmax_scale * (cap > 0 ? 1 / cap : kLog2E));
    load(p.v.data, p.dtype, v_rows, count, p.Dv, nullptr, tile.values_across, 1);
    std::memset(tile.dk, 0, count * wide(p.D) * sizeof(float));
    std::memset(tile.dv, 0, count * wide(p.Dv) * sizeof(float));
  }

  // Whether they are finite; those that are not there, or see nothing, are zeros.
  static bool load_rows(Tile& tile, int64_t first_row, int64_t rows) {
    const Params& p = tile.p;
    int64_t q_rows[kRows], grad_rows[kRows];
    for (int64_t r = 0; r < up(rows, 8); r++) {
      const int64_t row = first_row + std::min(r, rows - 1), head = tile.kv_head * tile.group + row % tile.group, i = row / tile.group;
      const int64_t at = lse_at(p, tile.b, head, tile.s.first_q + i), position = i + tile.s.Lk - tile.s.Lq;
      const bool there = r < rows && p.most[at] != INFINITY;
      q_rows[r] = there ? row_of(p.q, tile.b, head, tile.s.first_q + i) : -1;
      grad_rows[r] = there ? row_of(p.grad_out, tile.b, head, tile.s.first_q + i) : -1;
      tile.most[r] = there ? p.most[at] : INFINITY, tile.log_total[r] = there ? p.log_total[at] : 0, tile.shift[r] = there ? p.shift[at] : 0;
      tile.alibi[r] = p.rules.alibi_slopes ? p.rules.alibi_slopes[head] * kLog2E : 0;
      tile.position[r] = static_cast<float>(position - tile.key);
      tile.first[r] = static_cast<float>(first_key(p.rules, position) - tile.key);
      tile.last[r] = r < rows ? static_cast<float>(end_key(p.rules, position, tile.s.Lk) - 1 - tile.key) : -INFINITY;
    }
    const bool q_finite = load(p.q.data, p.dtype, q_rows, up(rows, 8), p.D, tile.q, nullptr, 1);
    return load(p.grad_out.data, p.dtype, grad_rows, up(rows, 8), p.Dv, tile.grad_out, nullptr, 1) && q_finite;
  }

  // The mask of a block of rows, and n keys of the tile from `from` on, in exponents of 2. Whether it hides all, and whether it does nothing.
  struct MaskSays {
    bool hides_all, does_nothing;
  };
  static __attribute__((noinline)) MaskSays load_bias(const Tile& tile, int64_t first_row, int64_t rows, int64_t from, int64_t n) {
    const AttentionMask& mask = tile.p.rules.mask;
    bool any_visible = false, any_effect = false;
    for (int64_t r = 0; r < up(rows, kColumns); r++) {
      const int64_t row = first_row + std::min(r, rows - 1), head = tile.kv_head * tile.group + row % tile.group, query = row / tile.group;
      float* bias = tile.bias + r * kStride + from;
      const bool as_before = mask.head_stride == 0 && (mask.query_stride == 0 || query == (row - 1) / tile.group);
      if (r > 0 && (r >= rows || as_before)) {
        std::memcpy(bias, bias - kStride, up(n, kSlice) * sizeof(float));
        continue;
      }
      const auto fill = [&](const auto& value) __attribute__((always_inline)) {
        for (int64_t j = 0; j < n; j++) {
          bias[j] = value(j);
          any_visible |= bias[j] != -INFINITY, any_effect |= bias[j] != 0;
        }
      };
      if (mask.kind == MaskKind::kBool) {
        const uint8_t* visible = static_cast<const uint8_t*>(mask.data) + tile.b * mask.batch_stride + head * mask.head_stride + query * mask.query_stride;
        fill([&](int64_t j) { return visible[(tile.key + from + j) * mask.key_stride] ? 0.0f : -INFINITY; });
      } else {
        fill([&](int64_t j) {
          const float found = mask_value(mask, tile.b, head, query, tile.key + from + j);
          return found == -INFINITY ? found : std::max(found * kLog2E, kLowest);
        });
      }
      for (int64_t j = n; j < up(n, kSlice); j++) bias[j] = 0;
    }
    return {!any_visible, !any_effect};
  }

  // ---- A step ----

  // scores to weights, and their gradients to those of the products q . k, where both are of `lanes` keys from `from` on.
  template <bool kRules>
  static __attribute__((noinline)) void weigh(const Tile& tile, int64_t rows, int64_t from, int64_t lanes, bool hides, bool masked) {
    const AttentionRules& rules = tile.p.rules;
    const float cap = rules.softcap;
    const V scale = L::set1(rules.softmax_scale), lowest = L::set1(kLowest), highest = L::set1(INFINITY);
    alignas(64) float count[kWidth];
    for (int i = 0; i < kWidth; i++) count[i] = static_cast<float>(i);
    for (int64_t r = 0; r < rows; r++) {
      float *scores = tile.scores + r * kStride, *grads = tile.grads + r * kStride, *slopes = tile.slopes + r * kStride;
      if (kRules && cap > 0)
        for (int64_t j = from; j < from + lanes; j += 8) {
          FloatLanes x;
          load_lanes<DType::kFloat32>(x, scores, j);
          tanh_lanes(x);
          store_lanes<DType::kFloat32>(1.0f - x * x, slopes, j);
          store_lanes<DType::kFloat32>(x * (cap * kLog2E), scores, j);
        }
      const V most = L::set1(tile.most[r]), log_total = L::set1(tile.log_total[r]), shift = L::set1(tile.shift[r]);
      const V alibi = L::set1(tile.alibi[r]), position = L::set1(tile.position[r]), first = L::set1(tile.first[r]), last = L::set1(tile.last[r]);
      for (int64_t j = from; j < from + lanes; j += kWidth) {
        V score = L::load(scores + j), bias, index;
        if constexpr (kRules) {
          index = L::add(L::load(count), L::set1(static_cast<float>(j)));
          if (rules.alibi_slopes) score = L::sub(score, L::mul(alibi, L::abs(L::sub(position, index))));
          if (masked) bias = L::load(tile.bias + r * kStride + j), score = L::add(score, bias);
        }
        V weight = L::exp2(L::sub(L::sub(score, most), log_total));
        V grad = L::mul(L::mul(weight, L::sub(L::load(grads + j), shift)), scale);
        if constexpr (kRules) {
          if (cap > 0) grad = L::mul(grad, L::load(slopes + j));
          if (masked) weight = L::between(bias, lowest, highest, weight, L::zero()), grad = L::between(bias, lowest, highest, grad, L::zero());
          if (hides) weight = L::between(index, first, last, weight, L::zero()), grad = L::between(index, first, last, grad, L::zero());
        }
        L::store(scores + j, weight);
        L::store(grads + j, grad);
      }
    }
  }

  // The tile's part of dq, which is not zero but in `rows`, when its turn has come.
  static void add_dq(const Tile& tile, int64_t first_row, int64_t rows) {
    const Params& p = tile.p;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t row = first_row + r;
      float* sum = static_cast<float*>(const_cast<void*>(p.dq_sum.data)) +
                   row_of(p.dq_sum, tile.b, tile.kv_head * tile.group + row % tile.group, tile.s.first_q + row / tile.group);
      for (int64_t d = 0; d < p.D; d += 8) {
        const int64_t count = std::min<int64_t>(8, p.D - d);
        FloatLanes x, y;
        load_lanes<DType::kFloat32>(x, sum, d, count);
        load_lanes<DType::kFloat32>(y, tile.dq, r * wide(p.D) + d);
        store_lanes<DType::kFloat32>(x + y, sum, d, count);
      }
    }
  }

  // The rows of a block that see any of the tile's keys [begin, end); whether dq has anything to add.
  static bool step(Tile& tile, int64_t first_row, int64_t rows, int64_t begin, int64_t end) {
    const Params& p = tile.p;
    const AttentionRules& rules = p.rules;
    const int64_t offset = tile.s.Lk - tile.s.Lq, early = first_row / tile.group + offset, late = (first_row + rows - 1) / tile.group + offset;
    const int64_t from = (begin - tile.key) / kSlice * kSlice, n = end - tile.key - from, lanes = up(n, kSlice), columns = up(rows, kColumns);
    bool masked = rules.mask.kind != MaskKind::kNone;
    if (masked) {
      const MaskSays says = load_bias(tile, first_row, rows, from, n);
      if (says.hides_all) return false;
      masked = !says.does_nothing;
    }
    const bool hides = tile.key + from < first_key(rules, late) || tile.key + from + lanes > end_key(rules, early, tile.s.Lk) || rows < columns;
    const bool finite = load_rows(tile, first_row, rows) && tile.keys_finite;
    multiply(tile.keys_across + from, kStride, {tile.q, wide(p.D), 1}, p.D, tile.scores + from, kStride, columns, lanes, false);
    multiply(tile.values_across + from, kStride, {tile.grad_out, wide(p.Dv), 1}, p.Dv, tile.grads + from, kStride, columns, lanes, false);
    if (hides || masked || rules.softcap > 0 || rules.alibi_slopes) weigh<true>(tile, columns, from, lanes, hides, masked);
    else weigh<false>(tile, columns, from, lanes, false, false);
    const auto times = (hides || masked) && !finite ? multiply_visible : multiply;
    const float *weights = tile.scores + from, *grads = tile.grads + from;
    times(tile.grad_out, wide(p.Dv), {weights, 1, kStride}, rows, tile.dv + from * wide(p.Dv), wide(p.Dv), lanes, p.Dv, true);
    times(tile.q, wide(p.D), {grads, 1, kStride}, rows, tile.dk + from * wide(p.D), wide(p.D), lanes, p.D, true);
    times(tile.keys + from * wide(p.D), wide(p.D), {grads, kStride, 1}, lanes, tile.dq, wide(p.D), columns, p.D, false);
    return true;
  }

  // ---- A task ----

  static void differentiate(Tile& tile) {
    const Params& p = tile.p;
    load_keys(tile);
    const int64_t all_rows = tile.s.Lq * tile.group, offset = tile.s.Lk - tile.s.Lq;
    int32_t* turns = p.turns + (tile.b * p.Hkv + tile.kv_head) * row_blocks(p);
    for (int64_t first_row = 0; first_row < all_rows; first_row += kRows) {
      const int64_t rows = std::min(kRows, all_rows - first_row);
      const int64_t first = first_key(p.rules, first_row / tile.group + offset),
                    end = end_key(p.rules, (first_row + rows - 1) / tile.group + offset, tile.s.Lk);
      const int64_t begin = std::max(first, tile.key), until = std::min(end, tile.key + tile.n);
      if (begin >= until) continue;
      const bool adds = step(tile, first_row, rows, begin, until);
      int32_t* turn = turns + first_row / kRows;
      const int32_t tiles_before = static_cast<int32_t>(tile.key / kKeys - first / kKeys);
      wait_until(turn, tiles_before);
      if (adds) add_dq(tile, first_row, rows);
      __atomic_store_n(turn, tiles_before + 1, __ATOMIC_RELEASE);
    }
    for_dtype(p.dtype, [&]<DType kDType>() {
      const auto store = [&](const Heads& heads, const float* sums, int64_t width) __attribute__((always_inline)) {
        for (int64_t j = 0; j < tile.n; j++)
          for (int64_t d = 0; d < width; d += 8) {
            FloatLanes x;
            load_lanes<DType::kFloat32>(x, sums, j * wide(width) + d);
            store_lanes<kDType>(x, const_cast<void*>(heads.data), row_of(heads, tile.b, tile.kv_head, tile.s.first_k + tile.key + j) + d,
                                std::min<int64_t>(8, width - d));
          }
      };
      store(p.dk, tile.dk, p.D);
      store(p.dv, tile.dv, p.Dv);
    });
  }
};

template <class L>
void differentiate_all(const Params& p) {
  using T = Tiles<L>;
  for_rows(p, [&](int64_t b, int64_t h, int64_t i, const Sequence& s) { prepare_row(p, s, b, h, i); });
  const int64_t heads = p.B * p.Hkv, tiles = (p.Lk + T::kKeys - 1) / T::kKeys;
  int64_t next = 0;
  parallel_tasks(p.num_threads, [&](int64_t) {
    // WHY memory first: a thread that took a tile and then had none would be waited for without end.
    float* memory = reinterpret_cast<float*>(scratch(1, T::scratch_floats(p) * sizeof(float)));
    // Whoever is free takes the next tile, those of the first keys (which causal attention shows to most) first. A tile waits for earlier
    // ones only, so the first that is not done never waits; heads come in turn, so that others seldom do.
    for (int64_t turn; (turn = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < heads * tiles;) {
      const int64_t b = turn % heads / p.Hkv, key = turn / heads * T::kKeys;
      const Sequence s = sequence_of(p, b);
      if (key >= s.Lk) continue;
      typename T::Tile tile{p, s, b, turn % p.Hkv, p.Hq / p.Hkv, key, std::min(T::kKeys, s.Lk - key)};
      T::take_memory(tile, memory);
      T::differentiate(tile);
    }
  });
  if (p.dtype != DType::kFloat32) for_rows(p, [&](int64_t b, int64_t h, int64_t i, const Sequence& s) { round_dq(p, s, b, h, i); });
}

}  // namespace
}  // namespace taut::attention_backward
