// The walk over a cache, for every ISA: each kernel file compiles its own copy with its own flags.
//
// A task is a chunk of keys of one key head and up to kMostRows rows: queries of the heads that share it, token by token, so that each
// key is read once for all of them. A chunk goes tile by tile: scores [row][key], the rules, the softmax down to weights, and the
// weighted sum of values, kept in fp32. Chunks leave their sums, maximum and total in memory; whoever finishes the last chunk of a
// block of rows puts them together, in their order.
//
// Floats: a key's numbers are multiplied by q in registers, one sum a key and row, and a tree of shuffles adds up a register of such
// sums at a time. Codes lie so that lanes are keys, or value dims, and dot products of four bytes need no such tree.
#pragma once

#include "attention_decode/lanes.h"
#include "attention_decode/op.h"

namespace taut::attention_decode {
namespace {

constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
// The maximum of a row that has seen nothing. WHY not -infinity: it is subtracted.
constexpr float kLowest = -3.0e38f;
// q is -kMostQ to kMostQ, high * 128 + low, both within 64: beside a code of 255 two products fit 16 bits. Beside int4, which adds more
// than a hundred times that error itself, q is one byte.
constexpr float kMostQ = 8127, kMostQByte = 127;
// Weights are 0 to kMostWeight, high * 128 + low, both within 127.
constexpr float kMostWeight = 16383;

template <class L, KvFormat kFormat>
struct Chunks {
  using V = typename L::V;
  using I = typename L::I;
  static constexpr bool kCodes = has_codes(kFormat), kInt4 = kFormat == KvFormat::kInt4;
  static constexpr int kWidth = L::kWidth, kUnit = L::kUnit, kQBytes = kInt4 ? 1 : 2;
  static constexpr int64_t kTile = 128, kBlocks = kTile / kKvBlock, kMostRows = Params::kMostRows;
  static constexpr int64_t kElement = kCodes ? 1 : kv_element_bytes(kFormat);

  const Params& p;
  int64_t b, kv_head, group, first_row, rows, length;
  const float* channels;  // [2][D + Dv], or nullptr
  // Rows of D and Dv numbers are padded with zeros to whole units, or codes to whole dot products.
  int64_t key_width, value_width;

  // By row.
  float most[kMostRows], total[kMostRows], shrink[kMostRows], sum_scale[kMostRows];
  float q_scale[kMostRows], q_offset[kMostRows];  // of codes: a unit of q; what the channels' offsets add to every score
  int32_t q_sum[kMostRows];                       // of codes of keys that stand for 0
  // [row][...]
  float *q, *scores, *bias, *sums;
  uint8_t *q_codes, *weight_codes;  // [row][kQBytes][key_width]; [row][2][kTile]

  // The tile at hand.
  const uint8_t *keys[kBlocks], *values[kBlocks];
  alignas(64) float key_scales[kTile], value_scales[kTile];

  int64_t head_of(int64_t r) const { return kv_head * group + (first_row + r) % group; }
  int64_t query_of(int64_t r) const { return (first_row + r) / group; }
  int64_t position_of(int64_t r) const { return query_of(r) + length - p.Lq; }

  // ---- Queries ----

  void load_queries() {
    const float cap = p.rules.softcap, scale = p.rules.softmax_scale * (cap > 0 ? 1 / cap : kLog2E);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = b * p.q.batch_stride + head_of(r) * p.q.head_stride + query_of(r) * p.q.row_stride;
      float* row = q + r * key_width;
      std::memset(row, 0, key_width * sizeof(float));
      float offset = 0, largest = 0;
      for (int64_t d = 0; d < p.D; d++) {
        float x = load_float(p.q.data, at + d, p.dtype) * scale;
        if (channels) offset += x * channels[d], x *= channels[p.D + p.Dv + d];
        if (!(std::abs(x) <= largest) && largest == largest) largest = std::abs(x);  // a NaN stays
        row[kCodes ? d : d / kUnit * kUnit + position_in_unit<kFormat>(d % kUnit, kWidth)] = x;
      }
      q_offset[r] = offset;
      if constexpr (kCodes) {
        constexpr float kMost = kInt4 ? kMostQByte : kMostQ;
        const bool finite = largest <= 3.4e38f;
        const float inverse = finite && largest > 1e-30f ? kMost / largest : 0;
        q_scale[r] = finite ? largest / kMost : NAN;
        uint8_t* codes = q_codes + r * kQBytes * key_width;
        int32_t sum = 0;
        for (int64_t d = 0; d < key_width; d++) {
          const int32_t code = finite ? static_cast<int32_t>(std::nearbyint(row[d] * inverse)) : 0;
          sum += code;
          if (kInt4) codes[d] = static_cast<uint8_t>(code);
          else codes[d] = static_cast<uint8_t>((code + 64) >> 7), codes[key_width + d] = static_cast<uint8_t>(code - ((code + 64) >> 7) * 128);
        }
        q_sum[r] = sum * (kInt4 ? 8 : 128);
      }
    }
  }

  // ---- Scores ----

  // Of floats: kWidth / kRows keys by kRows rows at a time.
  template <int kRows>
  __attribute__((noinline)) void some_scores(int64_t r, int64_t begin, int64_t end) {
    constexpr int kKeys = kWidth / kRows;
    const int64_t whole = p.D / kUnit * kUnit, value_bytes = p.Dv * kElement;
    for (int64_t j = begin; j < end; j += kKeys) {
      const uint8_t* row[kKeys];
      TAUT_FOR (int i = 0; i < kKeys; i++) {
        const int64_t key = std::min(j + i, end - 1);
        row[i] = keys[key / kKvBlock] + key % kKvBlock * p.cache.k_row_stride;
        // WHY: values are read in columns; asked for here, row by row, they come as one stream
        const uint8_t* value = values[key / kKvBlock] + key % kKvBlock * p.cache.v_row_stride;
        if (r == 0)
          for (int64_t at = 0; at < value_bytes; at += 64) __builtin_prefetch(value + at);
      }
      V sum[kWidth];
      TAUT_FOR (int i = 0; i < kWidth; i++) sum[i] = L::zero();
      const float* x = q + r * key_width;
      for (int64_t d = 0; d < whole; d += kUnit)
        TAUT_FOR (int i = 0; i < kKeys; i++) {
          V low, high;
          L::template load_unit<kFormat>(row[i] + d * kElement, low, high);
          TAUT_FOR (int t = 0; t < kRows; t++) {
            V& to = sum[t * kKeys + i];
            to = L::fma(high, L::load(x + t * key_width + d + kWidth), L::fma(low, L::load(x + t * key_width + d), to));
          }
        }
      if (whole < p.D)
        TAUT_FOR (int i = 0; i < kKeys; i++) {
          V low, high;
          load_tail(row[i] + whole * kElement, p.D - whole, low, high);
          TAUT_FOR (int t = 0; t < kRows; t++) {
            V& to = sum[t * kKeys + i];
            to = L::fma(high, L::load(x + t * key_width + whole + kWidth), L::fma(low, L::load(x + t * key_width + whole), to));
          }
        }
      alignas(64) float found[kWidth];
      L::store(found, L::sums_of(sum));
      TAUT_FOR (int t = 0; t < kRows; t++) std::memcpy(scores + (r + t) * kTile + j, found + t * kKeys, kKeys * sizeof(float));
    }
  }
  static TAUT_INLINE void load_tail(const uint8_t* from, int64_t count, V& low, V& high) {
    alignas(64) uint8_t bytes[kUnit * 4] = {};
    std::memcpy(bytes, from, count * kElement);
    L::template load_unit<kFormat>(bytes, low, high);
  }

  // Of codes: whole blocks, kKeyVectors registers of keys by kRows rows at a time.
  template <int kRows>
  __attribute__((noinline)) void some_code_scores(int64_t r, int64_t begin, int64_t end) {
    constexpr int kVectors = L::kKeyVectors;
    const int64_t steps = key_width / (kInt4 ? 8 : 4), value_bytes = value_block_bytes(kFormat, p.Dv);
    const uint8_t* code = q_codes + r * kQBytes * key_width;
    for (int64_t j = begin / kKvBlock * kKvBlock; j < end; j += kVectors * kWidth) {
      const uint8_t* block[kVectors];
      TAUT_FOR (int i = 0; i < kVectors; i++) {
        const int64_t key = std::min(j + i * kWidth, (end - 1) / kWidth * kWidth);
        block[i] = keys[key / kKvBlock] + key % kKvBlock * 4;
        if (r == 0 && key % kKvBlock == 0)
          for (int64_t at = 0; at < value_bytes; at += 64) __builtin_prefetch(values[key / kKvBlock] + at);
      }
      I sum[kRows][kQBytes][kVectors];
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int s = 0; s < kQBytes; s++)
          TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][s][i] = L::no_codes();
      for (int64_t step = 0; step < steps; step++) {
        I k[kVectors];
        TAUT_FOR (int i = 0; i < kVectors; i++) k[i] = L::load_codes(block[i] + step * 64);
        if constexpr (kInt4) {
          I high[kVectors];
          TAUT_FOR (int i = 0; i < kVectors; i++) high[i] = L::high_halves(k[i]), k[i] = L::low_halves(k[i]);
          TAUT_FOR (int t = 0; t < kRows; t++) {
            const I x = L::four_bytes(code + t * key_width + step * 8), y = L::four_bytes(code + t * key_width + step * 8 + 4);
            TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][0][i] = L::dot_twice(sum[t][0][i], k[i], x, high[i], y);
          }
        } else {
          TAUT_FOR (int t = 0; t < kRows; t++)
            TAUT_FOR (int s = 0; s < kQBytes; s++) {
              const I x = L::four_bytes(code + (t * kQBytes + s) * key_width + step * 4);
              TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][s][i] = L::dot(sum[t][s][i], k[i], x);
            }
        }
      }
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int i = 0; i < kVectors; i++) {
          if (j + i * kWidth >= end) continue;
          const I product = kInt4 ? sum[t][0][i] : L::times_128_plus(sum[t][0][i], sum[t][kQBytes - 1][i]);
          const V x = L::mul(L::to_float(L::minus(product, q_sum[r + t])), L::load(key_scales + j + i * kWidth));
          L::store(scores + (r + t) * kTile + j + i * kWidth, L::mul(x, L::set1(q_scale[r + t])));
        }
    }
  }

  // ---- Values ----

  template <int kRows>
  __attribute__((noinline)) void some_values(int64_t r, int64_t begin, int64_t end) {
    constexpr int kUnits = kRows * 4 <= 4 * L::kValueVectors * 2 ? L::kValueVectors : 1;
    const int64_t whole = p.Dv / kUnit * kUnit, stride = p.cache.v_row_stride;
    const float* weight = scores + r * kTile;
    const auto columns = [&]<int kCount, bool kTail>(int64_t d) __attribute__((always_inline)) {
      V sum[kRows][kCount][2];
      TAUT_FOR (int t = 0; t < kRows; t++) {
        const V factor = L::set1(shrink[r + t]);
        TAUT_FOR (int i = 0; i < kCount; i++)
          TAUT_FOR (int s = 0; s < 2; s++) sum[t][i][s] = L::mul(factor, L::load(sums + (r + t) * value_width + d + i * kUnit + s * kWidth));
      }
      for (int64_t j = begin; j < end;) {
        const int64_t stop = std::min(end, j / kKvBlock * kKvBlock + kKvBlock);
        const uint8_t* row = values[j / kKvBlock] + j % kKvBlock * stride + d * kElement;
        for (; j < stop; j++, row += stride)
          TAUT_FOR (int i = 0; i < kCount; i++) {
            V low, high;
            if constexpr (kTail) load_tail(row, p.Dv - d, low, high);
            else L::template load_unit<kFormat>(row + i * kUnit * kElement, low, high);
            TAUT_FOR (int t = 0; t < kRows; t++) {
              const V x = L::set1(weight[t * kTile + j]);
              sum[t][i][0] = L::fma(x, low, sum[t][i][0]), sum[t][i][1] = L::fma(x, high, sum[t][i][1]);
            }
          }
      }
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int i = 0; i < kCount; i++)
          TAUT_FOR (int s = 0; s < 2; s++) L::store(sums + (r + t) * value_width + d + i * kUnit + s * kWidth, sum[t][i][s]);
    };
    int64_t d = 0;
    for (; d + kUnits * kUnit <= whole; d += kUnits * kUnit) columns.template operator()<kUnits, false>(d);
    for (; d < whole; d += kUnit) columns.template operator()<1, false>(d);
    if (d < p.Dv) columns.template operator()<1, true>(d);
  }

  template <int kRows>
  __attribute__((noinline)) void some_code_values(int64_t r, int64_t begin, int64_t end) {
    constexpr int kVectors = L::kValueVectors;
    const uint8_t* weight = weight_codes + r * 2 * kTile;
    const auto columns = [&]<int kCount>(int64_t d) __attribute__((always_inline)) {
      I sum[kRows][2][kCount];
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int s = 0; s < 2; s++)
          TAUT_FOR (int i = 0; i < kCount; i++) sum[t][s][i] = L::no_codes();
      for (int64_t j = begin / kKvBlock * kKvBlock; j < end; j += kKvBlock) {
        const uint8_t* block = values[j / kKvBlock] + d * 4;
        for (int64_t q4 = 0; q4 < (kInt4 ? 2 : 4); q4++, block += value_width * 4) {
          I v[kCount], high[kCount];
          TAUT_FOR (int i = 0; i < kCount; i++) {
            v[i] = L::load_codes(block + i * kWidth * 4);
            if constexpr (kInt4) high[i] = L::minus_eight(L::high_halves(v[i])), v[i] = L::minus_eight(L::low_halves(v[i]));
          }
          TAUT_FOR (int t = 0; t < kRows; t++)
            TAUT_FOR (int s = 0; s < 2; s++) {
              const uint8_t* at = weight + (t * 2 + s) * kTile + j + q4 * (kInt4 ? 8 : 4);
              const I x = L::four_bytes(at);
              if constexpr (kInt4) {
                const I y = L::four_bytes(at + 4);
                TAUT_FOR (int i = 0; i < kCount; i++) sum[t][s][i] = L::dot_twice(sum[t][s][i], x, v[i], y, high[i]);
              } else {
                TAUT_FOR (int i = 0; i < kCount; i++) sum[t][s][i] = L::dot(sum[t][s][i], x, v[i]);
              }
            }
        }
      }
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int i = 0; i < kCount; i++) {
          float* to = sums + (r + t) * value_width + d + i * kWidth;
          const V tile = L::to_float(L::times_128_plus(sum[t][0][i], sum[t][1][i]));
          L::store(to, L::fma(tile, L::set1(sum_scale[r + t]), L::mul(L::load(to), L::set1(shrink[r + t]))));
        }
    };
    int64_t d = 0;
    for (; d + kVectors * kWidth <= value_width; d += kVectors * kWidth) columns.template operator()<kVectors>(d);
    for (; d < value_width; d += kWidth) columns.template operator()<1>(d);
  }

  // ---- Rules and softmax ----

  // The mask of row r and keys [begin, end) of a tile that begins with `key`, in exponents of 2. Whether it hides any.
  bool load_bias(int64_t r, int64_t key, int64_t begin, int64_t end) {
    bool hides = false;
    for (int64_t j = begin; j < end; j++) {
      const float value = mask_value(p.rules.mask, b, head_of(r), query_of(r), key + j);
      hides |= value == -INFINITY;
      bias[j] = value == -INFINITY ? value : std::max(value * kLog2E, kLowest);
    }
    return hides;
  }

  // What the rules do to a row's scores of keys [begin, end); -infinity for the others. Whether it hides any.
  __attribute__((noinline)) bool apply_rules(int64_t r, int64_t key, int64_t begin, int64_t end) {
    const AttentionRules& rules = p.rules;
    float* row = scores + r * kTile;
    const int64_t position = position_of(r), first = std::clamp(first_key(rules, position) - key, begin, end),
                  last = std::clamp(end_key(rules, position, length) - key, first, end);
    if (rules.softcap > 0)
      for (int64_t j = 0; j < kTile; j += 8) {
        FloatLanes x;
        load_lanes<DType::kFloat32>(x, row, j);
        tanh_lanes(x);
        x *= rules.softcap * kLog2E;
        store_lanes<DType::kFloat32>(x, row, j);
      }
    if (rules.alibi_slopes) {
      const float slope = rules.alibi_slopes[head_of(r)] * kLog2E;
      for (int64_t j = first; j < last; j++) row[j] -= slope * static_cast<float>(std::abs(position - key - j));
    }
    bool hides = first > begin || last < end;
    if (rules.mask.kind != MaskKind::kNone) {
      hides |= load_bias(r, key, first, last);
      for (int64_t j = first; j < last; j++) row[j] = bias[j] == -INFINITY ? bias[j] : row[j] + bias[j];
    }
    for (int64_t j = begin; j < first; j++) row[j] = -INFINITY;
    for (int64_t j = last; j < end; j++) row[j] = -INFINITY;
    return hides;
  }

  // A row's scores to weights 2^(score - most), and with codes to those times the values' scales, as bytes.
  TAUT_INLINE void weigh(int64_t r) {
    float* row = scores + r * kTile;
    V highest = L::load(row);
    for (int64_t j = kWidth; j < kTile; j += kWidth) highest = L::max(L::load(row + j), highest);
    alignas(64) float lanes[kWidth];
    L::store(lanes, highest);
    float now = most[r];
    for (int i = 0; i < kWidth; i++) now = lanes[i] > now ? lanes[i] : now;
    shrink[r] = most[r] == now ? 1 : std::exp2(most[r] - now);
    most[r] = now;
    V sum = L::zero(), largest = L::zero(), nothing = L::zero();
    for (int64_t j = 0; j < kTile; j += kWidth) {
      V weight = L::exp2(L::sub(L::load(row + j), L::set1(now)));
      sum = L::add(sum, weight);
      if constexpr (kCodes) {
        // WHY not the product alone: where nothing is seen, the scale may be NaN
        weight = L::between(weight, L::zero(), L::zero(), L::zero(), L::mul(weight, L::load(value_scales + j)));
        largest = L::max(weight, largest), nothing = L::fma(weight, L::zero(), nothing);
      }
      L::store(row + j, weight);
    }
    L::store(lanes, sum);
    float added = 0;
    for (int i = 0; i < kWidth; i++) added += lanes[i];
    total[r] = total[r] * shrink[r] + added;
    if constexpr (kCodes) {
      float high = 0, not_finite = 0;
      L::store(lanes, largest);
      for (int i = 0; i < kWidth; i++) high = std::max(high, lanes[i]);
      L::store(lanes, nothing);
      for (int i = 0; i < kWidth; i++) not_finite += lanes[i];
      // A NaN among weights or scales, where a key is seen, is one in the result.
      sum_scale[r] = not_finite != 0 ? NAN : high / kMostWeight;
      const V inverse = L::set1(high > 1e-30f && not_finite == 0 ? kMostWeight / high : 0);
      uint8_t* codes = weight_codes + r * 2 * kTile;
      for (int64_t j = 0; j < kTile; j += kWidth) L::split(L::mul(L::load(row + j), inverse), codes + j, codes + kTile + j);
    }
  }

  // WHY: 0 times a NaN is NaN, and a hidden key has the weight 0. Floats alone: a NaN among codes is in the scale.
  bool values_finite(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j++)
      for (int64_t d = 0; d < p.Dv; d++)
        if (!(std::abs(value_of(j, d)) <= 3.4e38f)) return false;
    return true;
  }
  float value_of(int64_t j, int64_t d) const { return load_kv(values[j / kKvBlock] + j % kKvBlock * p.cache.v_row_stride, d, kFormat); }
  void add_visible_values(int64_t r, int64_t begin, int64_t end) {
    for (int64_t d = 0; d < p.Dv; d++) {
      float& sum = sums[r * value_width + d / kUnit * kUnit + position_in_unit<kFormat>(d % kUnit, kWidth)];
      sum *= shrink[r];
      for (int64_t j = begin; j < end; j++)
        if (scores[r * kTile + j] != 0) sum += scores[r * kTile + j] * value_of(j, d);
    }
  }

  // ---- Tiles ----

  template <class F>
  TAUT_INLINE void by_rows(const F& f) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) f.template operator()<4>(r);
    if (r + 2 <= rows) f.template operator()<2>(r), r += 2;
    if (r < rows) f.template operator()<1>(r);
  }

  // Keys [begin, end) of the tile that begins with `key`; no row sees others of it.
  void tile(int64_t key, int64_t begin, int64_t end) {
    for (int64_t j = begin / kKvBlock * kKvBlock; j < end; j += kKvBlock) {
      keys[j / kKvBlock] = key_block(p.cache, b, kv_head, key + j), values[j / kKvBlock] = value_block(p.cache, b, kv_head, key + j);
      if constexpr (kCodes) {
        const int64_t at = scale_at(p.cache, b, kv_head, key + j);
        for (int64_t i = 0; i < kKvBlock; i += kWidth) {
          L::store(key_scales + j + i, L::load_scales(p.cache.k_scales + at + i));
          L::store(value_scales + j + i, L::load_scales(p.cache.v_scales + at + i));
        }
      }
    }
    by_rows([&]<int kRows>(int64_t r) {
      if constexpr (kCodes) some_code_scores<kRows>(r, begin, end);
      else some_scores<kRows>(r, begin, end);
    });
    const AttentionRules& rules = p.rules;
    const bool plain = query_of(0) == query_of(rows - 1) && rules.softcap == 0 && !rules.alibi_slopes && rules.mask.kind == MaskKind::kNone;
    bool hides = false;
    for (int64_t r = 0; r < rows; r++) {
      float* row = scores + r * kTile;
      if (q_offset[r] != 0)
        for (int64_t j = begin; j < end; j++) row[j] += q_offset[r];
      if (!plain) hides |= apply_rules(r, key, begin, end);
      for (int64_t j = 0; j < begin; j++) row[j] = -INFINITY;
      for (int64_t j = end; j < kTile; j++) row[j] = -INFINITY;
    }
    for (int64_t r = 0; r < rows; r++) weigh(r);
    if constexpr (!kCodes)
      if (hides && !values_finite(begin, end)) {
        for (int64_t r = 0; r < rows; r++) add_visible_values(r, begin, end);
        return;
      }
    by_rows([&]<int kRows>(int64_t r) {
      if constexpr (kCodes) some_code_values<kRows>(r, begin, end);
      else some_values<kRows>(r, begin, end);
    });
  }

  // ---- Chunks ----

  static int64_t key_width_of(const Params& p) { return kCodes ? (p.D + 7) / 8 * 8 : (p.D + kUnit - 1) / kUnit * kUnit; }
  static int64_t value_width_of(const Params& p) { return kCodes ? (p.Dv + 15) / 16 * 16 : (p.Dv + kUnit - 1) / kUnit * kUnit; }

  Chunks(const Params& p, int64_t b, int64_t kv_head, int64_t first_row) : p(p), b(b), kv_head(kv_head), first_row(first_row) {
    group = p.Hq / p.Hkv, rows = std::min(kMostRows, p.rows() - first_row), length = p.length(b);
    channels = p.cache.channels ? p.cache.channels + (b * p.Hkv + kv_head) * 2 * (p.D + p.Dv) : nullptr;
    key_width = key_width_of(p), value_width = value_width_of(p);
    const int64_t floats = kMostRows * (key_width + kTile + value_width) + kTile, bytes = kMostRows * (kQBytes * key_width + 2 * kTile);
    q = reinterpret_cast<float*>(scratch(1, floats * sizeof(float) + bytes));
    scores = q + kMostRows * key_width, sums = scores + kMostRows * kTile, bias = sums + kMostRows * value_width;
    q_codes = reinterpret_cast<uint8_t*>(bias + kTile), weight_codes = q_codes + kMostRows * kQBytes * key_width;
  }

  // Keys from chunk * kChunk on; their sums, maximum and total of each row to `partial`.
  void attend(int64_t chunk, float* partial) {
    int64_t first = length, last = 0;  // what any row sees
    for (int64_t r = 0; r < rows; r++) {
      first = std::min(first, first_key(p.rules, position_of(r)));
      last = std::max(last, end_key(p.rules, position_of(r), length));
    }
    first = std::max({first, chunk * kChunk, int64_t{0}}), last = std::min({last, chunk * kChunk + kChunk, length});
    for (int64_t r = 0; r < rows; r++) most[r] = kLowest, total[r] = 0;
    if (first < last) {
      std::memset(sums, 0, rows * value_width * sizeof(float));
      load_queries();
      for (int64_t key = first / kTile * kTile; key < last; key += kTile) tile(key, std::max(first - key, int64_t{0}), std::min(last - key, kTile));
    }
    float *partial_most = partial + kMostRows * p.Dv, *partial_total = partial_most + kMostRows;
    for (int64_t r = 0; r < rows; r++) {
      partial_most[r] = most[r], partial_total[r] = total[r];
      if (total[r] == 0) continue;
      for (int64_t d = 0; d < p.Dv; d++)
        partial[r * p.Dv + d] = sums[r * value_width + (kCodes ? d : d / kUnit * kUnit + position_in_unit<kFormat>(d % kUnit, kWidth))];
    }
  }

  // All chunks of this block of rows to out and lse.
  void combine(const float* partials) {
    const int64_t chunks = p.chunks();
    for (int64_t r = 0; r < rows; r++) {
      const float sink = p.rules.s_aux ? p.rules.s_aux[head_of(r)] * kLog2E : -INFINITY;
      float highest = sink > kLowest ? sink : kLowest, all = 0;
      const auto partial = [&](int64_t c) { return partials + c * p.partial_floats(); };
      for (int64_t c = 0; c < chunks; c++) highest = std::max(highest, partial(c)[kMostRows * p.Dv + r]);
      std::memset(sums, 0, p.Dv * sizeof(float));
      for (int64_t c = 0; c < chunks; c++) {
        const float *from = partial(c), weight = std::exp2(from[kMostRows * p.Dv + r] - highest), part = from[kMostRows * (p.Dv + 1) + r];
        if (part == 0) continue;
        all += part * weight;
        for (int64_t d = 0; d < p.Dv; d++) sums[d] += from[r * p.Dv + d] * weight;
      }
      const float divisor = all + (sink > kLowest ? std::exp2(sink - highest) : 0), inverse = divisor != 0 ? 1 / divisor : 0;
      const int64_t at = b * p.out.batch_stride + head_of(r) * p.out.head_stride + query_of(r) * p.out.row_stride;
      for (int64_t d = 0; d < p.Dv; d++) {
        float value = sums[d] * inverse;
        if (channels) value = value * channels[p.D + p.Dv + p.D + d] + channels[p.D + d] * (all * inverse);
        store_float(const_cast<void*>(p.out.data), at + d, p.dtype, value);
      }
      p.lse[(b * p.Hq + head_of(r)) * p.Lq + query_of(r)] = divisor != 0 ? highest * kLn2 + std::log(divisor) : -INFINITY;
    }
  }
};

template <class L, KvFormat kFormat>
void attend_format(const Params& p) {
  const int64_t chunks = p.chunks(), row_blocks = p.row_blocks(), tasks = p.B * p.Hkv * row_blocks * std::max<int64_t>(chunks, 1);
  int64_t next = 0;
  parallel_tasks(p.num_threads, [&](int64_t) {
    for (int64_t turn; (turn = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) < tasks;) {
      const int64_t block = turn / std::max<int64_t>(chunks, 1), chunk = turn % std::max<int64_t>(chunks, 1);
      Chunks<L, kFormat> work(p, block / row_blocks / p.Hkv, block / row_blocks % p.Hkv, block % row_blocks * Params::kMostRows);
      float* partials = p.partials + block * chunks * p.partial_floats();
      if (chunks) work.attend(chunk, partials + chunk * p.partial_floats());
      if (chunks <= 1 || __atomic_add_fetch(&p.finished[block], 1, __ATOMIC_ACQ_REL) == chunks) work.combine(partials);
    }
  });
}

template <class L>
void attend_codes(const Params& p) {
  if (p.cache.format == KvFormat::kInt8) attend_format<L, KvFormat::kInt8>(p);
  else attend_format<L, KvFormat::kInt4>(p);
}

template <class L>
void attend_all(const Params& p) {
  switch (p.cache.format) {
    case KvFormat::kFloat32: return attend_format<L, KvFormat::kFloat32>(p);
    case KvFormat::kBFloat16: return attend_format<L, KvFormat::kBFloat16>(p);
    case KvFormat::kFloat16: return attend_format<L, KvFormat::kFloat16>(p);
    case KvFormat::kFp8: return attend_format<L, KvFormat::kFp8>(p);
    default: return attend_codes<L>(p);
  }
}

}  // namespace
}  // namespace taut::attention_decode
