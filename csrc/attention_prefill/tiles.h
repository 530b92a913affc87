// The tiled walk, for every ISA: each kernel file compiles its own copy with its own flags.
//
// A row is one query of one head; the heads that share a key head are rows of one block, token by token, so that each key is read once
// for all of them. A panel is kRows rows, transposed: q as [d][row], scores as [key][row], sums as [value dim][row]. So the lanes of a
// register are rows, everywhere: both products add up register times one number of k or v, the softmax runs down the keys with no sum
// across lanes, and k is read as it lies.
//
// A block has up to kPanels panels, which go together over tiles of kKeys keys: v (and k in 16 bits) is made fp32 once a tile. Meanwhile the next
// tile's keys and values are asked for. Both, and 384 rows a block instead of 192: 4% to 6% (Zen 4). TRIED: asking also for the rows of the result
// and for the next block's queries, while the last tile is at hand: less than 1%.
//
// Where the ISA multiplies pairs of bf16 (kPack 2), what is a float below is a pair, in q [d/2][row] of two d, in weights and values
// [key/2] of two keys, and k in bf16 is read as it lies. Scores and sums are fp32; weights are rounded to bf16, their total is not.
#pragma once

#include "attention_prefill/op.h"
#include "common/attention_lanes.h"

namespace taut::attention_prefill {
namespace {

template <class L>
struct Tiles {
  using V = typename L::V;
  static constexpr int kWidth = L::kWidth, kRows = L::kVectors * kWidth, kColumns = L::kColumns, kPack = L::kPack;
  static constexpr int64_t kKeys = 128, kPanels = 384 / kRows;
  static constexpr int64_t kValueStride = (kKeys / kPack + 2) * 8;  // of v's tile, by 8 columns. WHY + 2: not a multiple of 4096 bytes

  struct Panel {
    float* q;               // [D][kRows], times score_scale; of pairs [D/2][kRows], as they are
    float* sums;            // [Dv up to 8][kRows]
    int64_t rows, vectors;  // rows in use, and registers they fill
    int64_t first_token, last_token;
    float *most, *total, *shrink;  // [kRows]: maximum, sum of weights; by what the tile at hand scales the sums before it
    float *position, *slope;       // [kRows]
  };
  struct Block {
    const Params& p;
    Sequence s;
    int64_t b, kv_head, group, first_row;  // rows are token * group + head
    int64_t num_panels;
    Panel panels[kPanels];
    float *scores, *bias;    // [kKeys + 8][kRows]
    float *keys, *values;    // [kKeys + 8][steps of D]; [Dv/8][kKeys + 2][8], of pairs [Dv/8][kKeys/2 + 2][8]
    bool values_finite;      // of the tile at hand
    int64_t next, next_end;  // keys of the tile after it that have not been asked for yet
  };

  // ---- Products ----

  static int64_t steps(int64_t count) { return (count + kPack - 1) / kPack; }

  // What makes q . k an exponent of 2, or an argument of tanh.
  static float score_scale(const AttentionRules& rules) { return rules.softmax_scale * (rules.softcap > 0 ? 1 / rules.softcap : kLog2E); }

  // scores[kColumns][kRows] of as many keys, and the maximum so far.
  template <int kVec>
  static __attribute__((noinline)) void some_scores(const float* q, int64_t n, const float* keys, int64_t stride, float scale, float* scores, float* most) {
    V sum[kColumns][kVec];
    TAUT_FOR (int c = 0; c < kColumns; c++)
      TAUT_FOR (int i = 0; i < kVec; i++) sum[c][i] = L::zero();
    multiply_columns<L, kVec>(sum, q, kRows, keys, stride, 1, n);
    TAUT_FOR (int i = 0; i < kVec; i++) {
      V highest = L::load(most + i * kWidth);
      TAUT_FOR (int c = 0; c < kColumns; c++) {
        if constexpr (kPack > 1) sum[c][i] = L::mul(sum[c][i], L::set1(scale));
        L::store(scores + c * kRows + i * kWidth, sum[c][i]);
        highest = L::max(sum[c][i], highest);
      }
      L::store(most + i * kWidth, highest);
    }
  }

  // sums[kColumns][kRows] = sums * shrink + weights . values, over n keys or pairs of keys
  template <int kVec>
  static __attribute__((noinline)) void some_values(const float* weights, const float* values, int64_t n, const float* shrink, float* sums) {
    V sum[kColumns][kVec];
    TAUT_FOR (int c = 0; c < kColumns; c++)
      TAUT_FOR (int i = 0; i < kVec; i++) sum[c][i] = L::mul(L::load(shrink + i * kWidth), L::load(sums + c * kRows + i * kWidth));
    multiply_columns<L, kVec>(sum, weights, kRows, values, 1, 8, n);
    TAUT_FOR (int c = 0; c < kColumns; c++)
      TAUT_FOR (int i = 0; i < kVec; i++) L::store(sums + c * kRows + i * kWidth, sum[c][i]);
  }

  // ---- Softmax ----

  // scores[n][kRows] to weights 2^(score - most), in place, and with kTogether 2 to [n/2][kRows] of pairs, the last with a 0;
  // their sums are added to total, which shrinks first.
  template <int kVec, int kTogether>
  static __attribute__((noinline)) void weigh(float* scores, int64_t n, const float* before, const float* most, float* shrink, float* total) {
    V highest[kVec], sum[kVec];
    TAUT_FOR (int i = 0; i < kVec; i++) {
      highest[i] = L::load(most + i * kWidth), sum[i] = L::zero();
      L::store(shrink + i * kWidth, L::exp2(L::sub(L::load(before + i * kWidth), highest[i])));
    }
    float* weights = scores;
    for (int64_t j = 0; j < n; j += kTogether, scores += kTogether * kRows, weights += kRows)
      TAUT_FOR (int i = 0; i < kVec; i++) {
        V weight = L::exp2(L::sub(L::load(scores + i * kWidth), highest[i]));
        sum[i] = L::add(sum[i], weight);
        if constexpr (kTogether == 2) {
          const V second = j + 1 < n ? L::exp2(L::sub(L::load(scores + kRows + i * kWidth), highest[i])) : L::zero();
          sum[i] = L::add(sum[i], second);
          weight = L::pack(weight, second);
        }
        L::store(weights + i * kWidth, weight);
      }
    TAUT_FOR (int i = 0; i < kVec; i++) L::store(total + i * kWidth, L::fma(L::load(total + i * kWidth), L::load(shrink + i * kWidth), sum[i]));
  }

  // What the rules do to scores[n][kRows] of the keys from `key` on, -infinity to hidden ones; and their maximum.
  static __attribute__((noinline)) void apply_rules(const Block& block, const Panel& panel, int64_t key, int64_t n, const float* bias, float* scores,
                                                    float* most) {
    const AttentionRules& rules = block.p.rules;
    if (rules.softcap > 0)
      for (int64_t i = 0; i < n * kRows; i += 8) {
        FloatLanes x;
        load_lanes<DType::kFloat32>(x, scores, i);
        tanh_lanes(x);
        x *= rules.softcap * kLog2E;
        store_lanes<DType::kFloat32>(x, scores, i);
      }
    const V hidden = L::set1(-INFINITY), high = L::set1(rules.window ? static_cast<float>(rules.window - 1) : INFINITY);
    const V low = rules.causal ? L::zero() : L::set1(rules.window ? static_cast<float>(1 - rules.window) : -INFINITY);
    for (int64_t i = 0; i < panel.vectors; i++) {
      const V position = L::load(panel.position + i * kWidth), slope = L::load(panel.slope + i * kWidth);
      V highest = L::load(most + i * kWidth);
      for (int64_t j = 0; j < n; j++) {
        float* at = scores + j * kRows + i * kWidth;
        const V distance = L::sub(position, L::set1(static_cast<float>(key + j)));
        V score = L::load(at);
        if (rules.alibi_slopes) score = L::sub(score, L::mul(slope, L::abs(distance)));
        if (bias) {
          const V added = L::load(bias + j * kRows + i * kWidth);
          score = L::between(added, L::set1(kLowest), L::set1(INFINITY), L::add(score, added), hidden);
        }
        score = L::between(distance, low, high, score, hidden);
        L::store(at, score);
        highest = L::max(score, highest);
      }
      L::store(most + i * kWidth, highest);
    }
  }

  // The mask of a panel and n keys from `key` on as bias[n][kRows], in exponents of 2. Whether it hides all, and whether it does nothing.
  struct MaskSays {
    bool hides_all, does_nothing;
  };
  static __attribute__((noinline)) MaskSays make_bias(const Block& block, int64_t first_row, int64_t rows, int64_t key, int64_t n, float* bias) {
    const AttentionMask& mask = block.p.rules.mask;
    bool any_visible = false, any_effect = false;
    // Rows that share a row of the mask: all where it says the same to every query and head, the heads of a token where it does to heads.
    const bool all_heads = mask.head_stride == 0, all_rows = all_heads && mask.query_stride == 0;
    for (int64_t r = 0, same = 0; r < rows; r += same) {
      const int64_t row = first_row + r, head = block.kv_head * block.group + row % block.group, query = row / block.group;
      same = all_rows ? rows : all_heads ? std::min(rows - r, block.group - row % block.group) : 1;
      const auto fill = [&](const auto& value) __attribute__((always_inline)) {
        for (int64_t j = 0; j < n; j++) {
          const float found = value(j);
          any_visible |= found != -INFINITY, any_effect |= found != 0;
          for (int64_t i = 0; i < same; i++) bias[j * kRows + r + i] = found;
        }
      };
      if (mask.kind == MaskKind::kBool) {
        const uint8_t* visible = static_cast<const uint8_t*>(mask.data) + block.b * mask.batch_stride + head * mask.head_stride + query * mask.query_stride;
        fill([&](int64_t j) { return visible[(key + j) * mask.key_stride] ? 0.0f : -INFINITY; });
      } else {
        fill([&](int64_t j) {
          const float found = mask_value(mask, block.b, head, query, key + j);
          return found == -INFINITY ? found : std::max(found * kLog2E, kLowest);
        });
      }
    }
    for (int64_t j = 0; j < n; j++)
      for (int64_t r = rows; r < kRows; r++) bias[j * kRows + r] = 0;
    return {!any_visible, !any_effect};
  }

  // ---- Blocks ----

  static int64_t value_columns(const Params& p) { return (p.Dv + 7) / 8 * 8; }
  static size_t scratch_floats(const Params& p) {
    return kPanels * kRows * (p.D + value_columns(p) + 8) + 2 * (kKeys + 8) * kRows + (kKeys + 8) * steps(p.D) + value_columns(p) / 8 * kValueStride + 64;
  }

  // q of a panel's rows, transposed and scaled; rows that are not there are another's.
  static void load_queries(const Block& block, int64_t first_row, Panel& panel) {
    const Params& p = block.p;
    const float scale = score_scale(p.rules);
    for_dtype(p.dtype, [&]<DType kDType>() {
      for (int64_t r = 0; r < panel.vectors * kWidth; r += 8) {
        int64_t at[8];
        for (int64_t i = 0; i < 8; i++) {
          const int64_t row = first_row + std::min(r + i, panel.rows - 1);
          at[i] = row_of(p.q, block.b, block.kv_head * block.group + row % block.group, block.s.first_q + row / block.group);
        }
        if constexpr (kPack == 2) {
          for (int64_t d = 0; d < p.D; d += 16) {
            const int64_t count = std::min<int64_t>(16, p.D - d);
            FloatLanes x[8] = {};
            for (int i = 0; i < 8; i++) {
              const uint16_t* from = static_cast<const uint16_t*>(p.q.data) + at[i] + d;
              if (count == 16) std::memcpy(&x[i], from, 32);
              else std::memcpy(&x[i], from, 2 * count);
            }
            transpose8(x);
            for (int64_t i = 0; i < steps(count); i++) store_lanes<DType::kFloat32>(x[i], panel.q, (d / 2 + i) * kRows + r);
          }
          continue;
        }
        for (int64_t d = 0; d < p.D; d += 8) {
          const int64_t count = std::min<int64_t>(8, p.D - d);
          FloatLanes x[8];
          for (int i = 0; i < 8; i++) load_lanes<kDType>(x[i], p.q.data, at[i] + d, count);
          transpose8(x);
          for (int64_t i = 0; i < count; i++) store_lanes<DType::kFloat32>(x[i] * scale, panel.q, (d + i) * kRows + r);
        }
      }
    });
  }

  static void start_panel(const Block& block, int64_t first_row, Panel& panel) {
    const Params& p = block.p;
    for (int64_t r = 0; r < kRows; r++) {
      const int64_t row = first_row + std::min(r, panel.rows - 1), head = block.kv_head * block.group + row % block.group;
      const float sink = p.rules.s_aux ? p.rules.s_aux[head] * kLog2E : -INFINITY;
      panel.most[r] = sink > kLowest ? sink : kLowest;
      panel.total[r] = sink > kLowest ? 1 : 0;
      panel.position[r] = static_cast<float>(row / block.group + block.s.Lk - block.s.Lq);
      panel.slope[r] = p.rules.alibi_slopes ? p.rules.alibi_slopes[head] * kLog2E : 0;
    }
    std::memset(panel.sums, 0, value_columns(p) * kRows * sizeof(float));
    load_queries(block, first_row, panel);
  }

  static void finish_panel(const Block& block, int64_t first_row, const Panel& panel) {
    const Params& p = block.p;
    float inverse[kRows];
    for (int64_t r = 0; r < kRows; r++) inverse[r] = panel.total[r] != 0 ? 1 / panel.total[r] : 0;
    int64_t at[kRows];
    for (int64_t r = 0; r < panel.rows; r++) {
      const int64_t row = first_row + r, head = block.kv_head * block.group + row % block.group, token = block.s.first_q + row / block.group;
      at[r] = row_of(p.out, block.b, head, token);
      *lse_of(p, block.b, head, token) = panel.total[r] != 0 ? panel.most[r] * kLn2 + std::log(panel.total[r]) : -INFINITY;
    }
    for_dtype(p.dtype, [&]<DType kDType>() {
      for (int64_t r = 0; r < panel.rows; r += 8) {
        FloatLanes scale;
        load_lanes<DType::kFloat32>(scale, inverse, r);
        for (int64_t d = 0; d < p.Dv; d += 8) {
          FloatLanes x[8];
          for (int64_t i = 0; i < 8; i++) {
            load_lanes<DType::kFloat32>(x[i], panel.sums, (d + i) * kRows + r);
            x[i] *= scale;
          }
          transpose8(x);
          const int64_t count = std::min<int64_t>(8, p.Dv - d);
          for (int64_t i = 0; i < std::min<int64_t>(8, panel.rows - r); i++) store_lanes<kDType>(x[i], const_cast<void*>(p.out.data), at[r + i] + d, count);
        }
      }
    });
  }

  // k of a tile, where a product can read it as it lies; else nullptr.
  static const float* keys_in_place(const Block& block, int64_t key) {
    const Params& p = block.p;
    const int64_t at = row_of(p.k, block.b, block.kv_head, block.s.first_k + key);
    if constexpr (kPack == 1) return p.dtype == DType::kFloat32 ? static_cast<const float*>(p.k.data) + at : nullptr;
    const uint16_t* k = static_cast<const uint16_t*>(p.k.data) + at;
    return p.D % 2 == 0 && p.k.row_stride % 2 == 0 && reinterpret_cast<uintptr_t>(k) % 4 == 0 ? reinterpret_cast<const float*>(k) : nullptr;
  }

  // The same in pairs, where p.dtype is bf16.
  static void load_pairs(Block& block, int64_t key, int64_t n) {
    const Params& p = block.p;
    const auto* k = static_cast<const uint16_t*>(p.k.data) + row_of(p.k, block.b, block.kv_head, block.s.first_k + key);
    const auto* v = static_cast<const uint16_t*>(p.v.data) + row_of(p.v, block.b, block.kv_head, block.s.first_k + key);
    HalfLanes not_finite = {};
    const auto load = [&](HalfLanes& x, int64_t j, int64_t d) __attribute__((always_inline)) {
      x = HalfLanes{};
      if (j >= n) return;
      const uint16_t* from = v + j * p.v.row_stride + d;
      if (p.Dv - d >= 8) std::memcpy(&x, from, 16);
      else std::memcpy(&x, from, 2 * (p.Dv - d));
    };
    for (int64_t j = 0; j < n; j += 2)
      for (int64_t d = 0; d < p.Dv; d += 8) {
        HalfLanes first, second, low, high;
        load(first, j, d), load(second, j + 1, d);
        not_finite |= (HalfLanes)((first & 0x7f80) == 0x7f80) | (HalfLanes)((second & 0x7f80) == 0x7f80);
        low = __builtin_shuffle(first, second, HalfLanes{0, 8, 1, 9, 2, 10, 3, 11});
        high = __builtin_shuffle(first, second, HalfLanes{4, 12, 5, 13, 6, 14, 7, 15});
        float* to = block.values + d / 8 * kValueStride + j / 2 * 8;
        std::memcpy(to, &low, 16), std::memcpy(to + 4, &high, 16);
      }
    uint64_t words[2];
    std::memcpy(words, &not_finite, 16);
    block.values_finite = (words[0] | words[1]) == 0;
    if (keys_in_place(block, key)) return;
    for (int64_t j = 0; j < n; j++) {
      float* to = block.keys + j * steps(p.D);
      to[steps(p.D) - 1] = 0;
      std::memcpy(to, k + j * p.k.row_stride, p.D * 2);
    }
  }

  // v of n keys from `key` on to [Dv/8][kKeys + 2][8]; k, if it is not read as it lies, to [n up to kColumns][D].
  static void load_tile(Block& block, int64_t key, int64_t n) {
    if constexpr (kPack == 2) return load_pairs(block, key, n);
    const Params& p = block.p;
    const int64_t k_row = row_of(p.k, block.b, block.kv_head, block.s.first_k + key), v_row = row_of(p.v, block.b, block.kv_head, block.s.first_k + key);
    FloatLanes nothing = {};
    for_dtype(p.dtype, [&]<DType kDType>() {
      for (int64_t j = 0; j < n; j++)
        for (int64_t d = 0; d < p.Dv; d += 8) {
          FloatLanes x;
          load_lanes<kDType>(x, p.v.data, v_row + j * p.v.row_stride + d, std::min<int64_t>(8, p.Dv - d));
          nothing += x * 0.0f;
          store_lanes<DType::kFloat32>(x, block.values, d / 8 * kValueStride + j * 8);
        }
      if (kDType != DType::kFloat32)
        for (int64_t j = 0; j < n; j++)
          for (int64_t d = 0; d < p.D; d += 8) {
            const int64_t count = std::min<int64_t>(8, p.D - d);
            FloatLanes x;
            load_lanes<kDType>(x, p.k.data, k_row + j * p.k.row_stride + d, count);
            store_lanes<DType::kFloat32>(x, block.keys, j * p.D + d, count);
          }
    });
    block.values_finite = sum_lanes(nothing) == 0;
  }

  // A share of the keys and values of the next tile, to L2. WHY: a head's do not fit there, and load_tile does nothing but wait for them.
  static void ask_for_next(Block& block) {
    const Params& p = block.p;
    const int64_t bytes = dtype_bytes(p.dtype), times = block.num_panels * (kKeys / kColumns);  // that this is called for a whole tile
    const int64_t end = std::min(block.next + (kKeys + times - 1) / times, block.next_end);
    for (; block.next < end; block.next++) {
      const char* k = static_cast<const char*>(p.k.data) + row_of(p.k, block.b, block.kv_head, block.s.first_k + block.next) * bytes;
      const char* v = static_cast<const char*>(p.v.data) + row_of(p.v, block.b, block.kv_head, block.s.first_k + block.next) * bytes;
      for (int64_t at = 0; at < p.D * bytes; at += 64) __builtin_prefetch(k + at, 0, 2);
      for (int64_t at = 0; at < p.Dv * bytes; at += 64) __builtin_prefetch(v + at, 0, 2);
    }
  }

  static float value_at(const Block& block, int64_t key, int64_t d) {
    const float* at = block.values + d / 8 * kValueStride + key / kPack * 8 + d % 8;
    return kPack == 1 ? *at : load_float(at, key % kPack, DType::kBFloat16);
  }

  // WHY: 0 times a NaN is NaN, and a hidden key has the weight 0. One number at a time; v is seldom like that.
  static __attribute__((noinline)) void add_visible_values(const Block& block, const Panel& panel, const float* weights, int64_t skip, int64_t n) {
    for (int64_t d = 0; d < block.p.Dv; d++)
      for (int64_t r = 0; r < panel.rows; r++) {
        float sum = panel.sums[d * kRows + r] * panel.shrink[r];
        for (int64_t j = 0; j < n; j++)
          if (weights[j * kRows + r] != 0) sum += weights[j * kRows + r] * value_at(block, skip + j, d);
        panel.sums[d * kRows + r] = sum;
      }
  }

  // A panel over the tile of n keys from `key` on.
  template <int kVec>
  static void tile(Block& block, Panel& panel, int64_t first_row, int64_t key, int64_t n) {
    const Params& p = block.p;
    const AttentionRules& rules = p.rules;
    const int64_t offset = block.s.Lk - block.s.Lq, early = panel.first_token + offset, late = panel.last_token + offset;
    const int64_t begin = std::max(key, first_key(rules, early)) / kPack * kPack;
    int64_t end = std::min(key + n, end_key(rules, late, block.s.Lk));
    if (begin >= end) return;
    end = std::min(key + n, begin + (end - begin + kColumns - 1) / kColumns * kColumns);
    const int64_t count = end - begin, whole = count / kColumns * kColumns;
    bool hides = begin < first_key(rules, late) || end > end_key(rules, early, block.s.Lk);
    const float* bias = nullptr;
    if (rules.mask.kind != MaskKind::kNone) {
      const MaskSays says = make_bias(block, first_row, panel.rows, begin, count, block.bias);
      if (says.hides_all) return;
      if (!says.does_nothing) bias = block.bias, hides = true;
    }
    float before[kRows], most[kRows];
    std::memcpy(before, panel.most, sizeof before);
    std::memcpy(most, panel.most, sizeof most);
    const float* keys = keys_in_place(block, key);
    const int64_t stride = keys ? p.k.row_stride / kPack : steps(p.D);
    keys = (keys ? keys : block.keys) + (begin - key) * stride;
    const float scale = score_scale(rules);
    for (int64_t j = 0; j < whole; j += kColumns) {
      ask_for_next(block);
      some_scores<kVec>(panel.q, steps(p.D), keys + j * stride, stride, scale, block.scores + j * kRows, most);
    }
    if (whole < count) {  // WHY copied: the product is of kColumns keys
      float last[kColumns * 256];
      for (int64_t j = 0; j < kColumns; j++) std::memcpy(last + j * steps(p.D), keys + std::min(whole + j, count - 1) * stride, steps(p.D) * sizeof(float));
      some_scores<kVec>(panel.q, steps(p.D), last, steps(p.D), scale, block.scores + whole * kRows, most);
    }
    if (hides || rules.softcap > 0 || rules.alibi_slopes) {
      std::memcpy(most, before, sizeof most);
      apply_rules(block, panel, begin, count, bias, block.scores, most);
    }
    std::memcpy(panel.most, most, sizeof most);
    if (hides && !block.values_finite) {
      weigh<kVec, 1>(block.scores, count, before, panel.most, panel.shrink, panel.total);
      return add_visible_values(block, panel, block.scores, begin - key, count);
    }
    weigh<kVec, kPack>(block.scores, count, before, panel.most, panel.shrink, panel.total);
    for (int64_t d = 0; d < p.Dv; d += kColumns) {
      const float* values = block.values + d / 8 * kValueStride + (begin - key) / kPack * 8 + d % 8;
      some_values<kVec>(block.scores, values, steps(count), panel.shrink, panel.sums + d * kRows);
    }
  }

  static void attend(const Params& p, int64_t b, int64_t kv_head, int64_t first_row, int64_t rows, const Sequence& s) {
    float* memory = reinterpret_cast<float*>(scratch(1, scratch_floats(p) * sizeof(float)));
    const auto take = [&](int64_t count) { return memory += count, memory - count; };
    Block block{p, s, b, kv_head, p.Hq / p.Hkv, first_row, (rows + kRows - 1) / kRows, {}, nullptr, nullptr, nullptr, nullptr, true, 0, 0};
    block.scores = take((kKeys + 8) * kRows), block.bias = take((kKeys + 8) * kRows);
    for (int64_t i = 0; i < block.num_panels; i++) {
      Panel& panel = block.panels[i];
      panel.q = take(steps(p.D) * kRows), panel.sums = take(value_columns(p) * kRows);
      for (float** row : {&panel.most, &panel.total, &panel.shrink, &panel.position, &panel.slope}) *row = take(kRows);
      panel.rows = std::min<int64_t>(kRows, rows - i * kRows), panel.vectors = (panel.rows + kWidth - 1) / kWidth;
      panel.first_token = (first_row + i * kRows) / block.group, panel.last_token = (first_row + i * kRows + panel.rows - 1) / block.group;
      start_panel(block, first_row + i * kRows, panel);
    }
    block.keys = take((kKeys + 8) * steps(p.D)), block.values = take(value_columns(p) / 8 * kValueStride);
    const int64_t offset = s.Lk - s.Lq, early = first_row / block.group + offset, late = (first_row + rows - 1) / block.group + offset;
    const int64_t end = end_key(p.rules, late, s.Lk);
    // WHY tiles begin at multiples of kKeys: then a row's sums do not depend on the rows around it
    for (int64_t key = first_key(p.rules, early) / kKeys * kKeys; key < end; key += kKeys) {
      const int64_t n = std::min(kKeys, end - key);
      load_tile(block, key, n);
      block.next = key + n, block.next_end = std::min(block.next + kKeys, end);
      for (int64_t i = 0; i < block.num_panels; i++) {
        Panel& panel = block.panels[i];
        if (panel.vectors == 1) tile<1>(block, panel, first_row + i * kRows, key, n);
        else if (panel.vectors == 2) tile<2>(block, panel, first_row + i * kRows, key, n);
        else tile<L::kVectors>(block, panel, first_row + i * kRows, key, n);
      }
    }
    for (int64_t i = 0; i < block.num_panels; i++) finish_panel(block, first_row + i * kRows, block.panels[i]);
  }
};

template <class L>
void attend_all(const Params& p) {
  using T = Tiles<L>;
  const int64_t group = p.Hq / p.Hkv, heads = p.B * p.Hkv, most_rows = p.Lq * group;
  // Blocks as large as leave each thread several: they end at different times.
  int64_t panels = T::kPanels;
  while (panels > 1 && heads * ((most_rows + panels * T::kRows - 1) / (panels * T::kRows)) < 6 * p.num_threads && p.num_threads > 1) panels /= 2;
  const int64_t block_rows = panels * T::kRows, blocks = (most_rows + block_rows - 1) / block_rows;
  int64_t next = 0;
  parallel_tasks(p.num_threads, [&](int64_t) {
    // Whoever is free takes the next block, the longest (of causal attention) first.
    for (int64_t turn; (turn = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < heads * blocks;) {
      const int64_t b = turn % heads / p.Hkv, kv_head = turn % p.Hkv, first_row = (blocks - 1 - turn / heads) * block_rows;
      const Sequence s = sequence_of(p, b);
      const int64_t rows = std::min(block_rows, s.Lq * group - first_row);
      if (rows > 0) T::attend(p, b, kv_head, first_row, rows, s);
    }
  });
}

}  // namespace
}  // namespace taut::attention_prefill
