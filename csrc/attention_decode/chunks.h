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
  static constexpr bool kQWords = L::kWords && !kInt4;
  static constexpr int kQSums = kQWords ? 1 : kQBytes, kWeightSums = L::kWords ? 1 : 2;  // registers that a product of codes is added up in
  // Keys of a tile. WHY: 8 KiB of keys of 128 floats, so that what is asked for is soon used; codes want long loops, since their sums live in
  // registers from one end of a tile to the other. Against 64 floats and 128 codes 2% to 9% of the time (Zen 4).
  static constexpr int64_t kTile = kCodes ? 256 : 64 / kv_element_bytes(kFormat), kBlocks = kTile / kKvBlock, kMostRows = Params::kMostRows;
  // Rows lie at fixed distances, so that the loops need one pointer for all of them. q's codes: [4 rows][4 bytes of k][row][byte of q][4].
  static constexpr int64_t kRowFloats = 256, kQGroup = 4, kQStep = kQGroup * kQBytes * 4;
  static constexpr int64_t kElement = kCodes ? 1 : kv_element_bytes(kFormat);

  const Params& p;
  int64_t b, kv_head, group, first_row, rows, length;
  const float* channels;  // [2][D + Dv], or nullptr
  // Rows of D and Dv numbers are padded with zeros to whole units, or codes to whole dot products.
  int64_t key_width, value_width;
  bool loaded = false;  // q

  // By row.
  float most[kMostRows], total[kMostRows], shrink[kMostRows], sum_scale[kMostRows];
  float q_scale[kMostRows], q_offset[kMostRows];    // of codes: a unit of q; what the channels' offsets add to every score
  int32_t q_sum[kMostRows], weight_sum[kMostRows];  // times what the codes of keys, and of values, are more than what they stand for
  // [row][...]
  float *q, *scores, *bias, *sums;
  uint8_t *q_codes, *weight_codes;  // as above; [row][2][kTile]. As words (L::kWords) [4 rows][4 bytes of k][row][4], int4's q aside; [row][kTile]

  // The tile at hand, and the keys of the one after it.
  const uint8_t *keys[kBlocks], *values[kBlocks], *next_keys[kBlocks];
  alignas(64) float key_scales[kTile], value_scales[kTile], totals[kMostRows * kWidth];  // totals: of a row by lane

  int64_t head_of(int64_t r) const { return kv_head * group + (first_row + r) % group; }
  int64_t query_of(int64_t r) const { return (first_row + r) / group; }
  int64_t position_of(int64_t r) const { return query_of(r) + length - p.Lq; }

  // ---- Memory ----

  // A tile is read twice over: its keys, then its values. WHY we ask ahead: values while keys are multiplied, and the next tile's keys while
  // values are added up, so that memory is always at work. A line at a time, between the products: a core has two dozen misses under way at
  // most, and waits to ask for more. WHY to L2: what L1 is to hold keeps one of those misses until it is there. On Zen 4 that is 1.13x to 1.33x
  // (AVX2: up to 1.5x) of the speed of asking for L1 or for what is not to be kept, which are as slow as each other; Zen 5 showed no difference.
  // With it floats are read at 80% to 90% of what plain reads reach, int8 at 83%; int4 is bound by its products.
  // TRIED: all of a tile's values before its first key, 40 us in 100 slower; without asking 20% slower. On Zen 1 floats are read at half of what
  // plain reads reach: products and reads add up there, whatever is asked for (L1 or L2, tiles two or four times as long: the same; nothing: 28% slower).
  static TAUT_INLINE void ask_for(const uint8_t* line) { __builtin_prefetch(line, 0, 2); }

  // ---- Queries ----

  void load_queries() {
    const float cap = p.rules.softcap, scale = p.rules.softmax_scale * (cap > 0 ? 1 / cap : kLog2E) * kUnitFactor<kFormat>;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = b * p.q.batch_stride + head_of(r) * p.q.head_stride + query_of(r) * p.q.row_stride;
      alignas(64) float natural[kRowFloats];
      float* row = kFormat == KvFormat::kBFloat16 ? natural : q + r * kRowFloats;
      FloatLanes offset = {}, largest = {}, nothing = {};
      for_dtype(p.dtype, [&]<DType kDType>() {
        for (int64_t d = 0; d < key_width; d += 8) {
          const int64_t count = std::clamp<int64_t>(p.D - d, 0, 8);
          FloatLanes x;
          load_lanes<kDType>(x, p.q.data, at + d, count);
          x *= scale;
          if (channels) {
            FloatLanes shift, factor;
            load_lanes<DType::kFloat32>(shift, channels, d, count);
            load_lanes<DType::kFloat32>(factor, channels + p.D + p.Dv, d, count);
            offset += x * shift;
            x *= factor;
          }
          const FloatLanes size = reinterpret_cast<FloatLanes>(reinterpret_cast<UintLanes>(x) & 0x7fffffffu);
          largest = TAUT_SELECT(size, >, largest, size, largest);
          nothing += x * 0.0f;
          store_lanes<DType::kFloat32>(x, row, d);
        }
      });
      q_offset[r] = sum_lanes(offset) / kUnitFactor<kFormat>;
      if constexpr (kFormat == KvFormat::kBFloat16)
        for (int64_t d = 0; d < key_width; d++) q[r * kRowFloats + d / kUnit * kUnit + position_in_unit<kFormat>(d % kUnit, kWidth)] = natural[d];
      if constexpr (kCodes) {
        constexpr float kMost = kInt4 ? kMostQByte : kMostQ;
        float most_of_row = 0;
        for (int i = 0; i < 8; i++) most_of_row = std::max(most_of_row, largest[i]);
        const bool finite = sum_lanes(nothing) == 0;
        const float inverse = finite && most_of_row > 1e-30f ? kMost / most_of_row : 0;
        q_scale[r] = finite ? most_of_row / kMost : NAN;
        uint8_t* codes = q_codes + r / kQGroup * kRowFloats * kQGroup * kQBytes + r % kQGroup * kQBytes * 4;
        IntLanes sum = {};
        for (int64_t d = 0; d < key_width; d += 8) {
          FloatLanes x, magic = FloatLanes{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
          load_lanes<DType::kFloat32>(x, row, d);
          x = finite ? x * inverse : FloatLanes{};
          const IntLanes code = reinterpret_cast<IntLanes>(x + magic) - reinterpret_cast<IntLanes>(magic), high = kInt4 ? code : (code + 64) >> 7;
          sum += code;
          for (int i = 0; i < 8; i++) {
            uint8_t* to = codes + (d + i) / 4 * kQStep;
            if constexpr (kQWords) {  // 0, 2, 1, 3 of four
              const int16_t word = static_cast<int16_t>(code[i]);
              std::memcpy(to + (i % 4 / 2 + i % 2 * 2) * 2, &word, 2);
            } else {
              to[i % 4] = static_cast<uint8_t>(high[i]);
              if (!kInt4) to[4 + i % 4] = static_cast<uint8_t>(code[i] - high[i] * 128);
            }
          }
        }
        q_sum[r] = 0;
        for (int i = 0; i < 8; i++) q_sum[r] += sum[i] * (kInt4 ? 8 : L::kKeyCodeZero);
      }
    }
  }

  // ---- Scores ----

  // Of floats: kSums / kRows keys by kRows rows at a time.
  template <int kRows>
  __attribute__((noinline)) void some_scores(int64_t r, int64_t begin, int64_t end) {
    constexpr int kSums = L::kSums, kKeys = kSums / kRows, kTogether = std::min(kKeys, L::keys_together(kElement));
    const int64_t whole = p.D / kUnit * kUnit, value_bytes = p.Dv * kElement;
    for (int64_t j = begin; j < end; j += kKeys) {
      const uint8_t *row[kKeys], *value[kKeys];
      TAUT_FOR (int i = 0; i < kKeys; i++) {
        const int64_t key = std::min(j + i, end - 1);
        row[i] = keys[key / kKvBlock] + key % kKvBlock * p.cache.k_row_stride;
        value[i] = values[key / kKvBlock] + key % kKvBlock * p.cache.v_row_stride;
      }
      V sum[kSums];
      TAUT_FOR (int i = 0; i < kSums; i++) sum[i] = L::zero();
      const float* x = q + r * kRowFloats;
      // WHY few keys together: the processor finds a stream of its own only where loads follow each other in memory
      TAUT_FOR (int first = 0; first < kKeys; first += kTogether)
        for (int64_t d = 0; d < whole; d += kUnit) {
          V k[kTogether][2];
          TAUT_FOR (int i = 0; i < kTogether; i++) {
            if (r == 0)
              TAUT_FOR (int at = 0; at < kUnit * kElement; at += 64) ask_for(value[first + i] + d * kElement + at);
            L::template load_unit<kFormat>(row[first + i] + d * kElement, k[i][0], k[i][1]);
            L::keep(k[i][0]), L::keep(k[i][1]);
          }
          TAUT_FOR (int t = 0; t < kRows; t++)
            TAUT_FOR (int s = 0; s < 2; s++) {
              V of_q = L::load(x + t * kRowFloats + d + s * kWidth);
              if constexpr (kTogether > 1) L::keep(of_q);
              TAUT_FOR (int i = 0; i < kTogether; i++) sum[t * kKeys + first + i] = L::fma(k[i][s], of_q, sum[t * kKeys + first + i]);
            }
        }
      if (whole < p.D)
        TAUT_FOR (int i = 0; i < kKeys; i++) {
          V low, high;
          load_tail(row[i] + whole * kElement, p.D - whole, low, high);
          TAUT_FOR (int t = 0; t < kRows; t++) {
            V& to = sum[t * kKeys + i];
            to = L::fma(high, L::load(x + t * kRowFloats + whole + kWidth), L::fma(low, L::load(x + t * kRowFloats + whole), to));
          }
        }
      if (r == 0)
        for (int64_t at = whole * kElement; at < value_bytes; at += 64)
          TAUT_FOR (int i = 0; i < kKeys; i++) ask_for(value[i] + at);
      alignas(64) float found[kSums];
      L::store_sums(found, sum);
      TAUT_FOR (int t = 0; t < kRows; t++) std::memcpy(scores + (r + t) * kTile + j, found + t * kKeys, kKeys * sizeof(float));
    }
  }
  static TAUT_INLINE void load_tail(const uint8_t* from, int64_t count, V& low, V& high) {
    alignas(64) uint8_t bytes[kUnit * 4] = {};
    std::memcpy(bytes, from, count * kElement);
    L::template load_unit<kFormat>(bytes, low, high);
  }

  // Register i of a row's sums of codes; where numbers of two bytes are bytes, of both.
  template <int kSumsOfRow, int kVectors>
  static TAUT_INLINE I product_of(const I (&sum)[kSumsOfRow][kVectors], int i) {
    if constexpr (kSumsOfRow == 1) return sum[0][i];
    else return L::times_128_plus(sum[0][i], sum[1][i]);
  }

  // Of codes: whole blocks, kVectors registers of keys by kRows rows at a time.
  template <int kRows>
  __attribute__((noinline)) void some_code_scores(int64_t r, int64_t begin, int64_t end) {
    constexpr int kVectors = L::key_vectors(kInt4, kRows * kQSums);
    constexpr int64_t kLine = 4 * kWidth;  // so much of the values for a step: as much as it reads of the keys
    const int64_t steps = key_block_bytes(kFormat, p.D) / 64, value_bytes = value_block_bytes(kFormat, p.Dv);
    const uint8_t* code = q_codes + r / kQGroup * kRowFloats * kQGroup * kQBytes + r % kQGroup * kQBytes * 4;
    for (int64_t j = begin / kKvBlock * kKvBlock; j < end; j += kVectors * kWidth) {
      const uint8_t *block[kVectors], *value[kVectors];
      TAUT_FOR (int i = 0; i < kVectors; i++) {
        const int64_t key = std::min(j + i * kWidth, (end - 1) / kWidth * kWidth);
        block[i] = keys[key / kKvBlock] + key % kKvBlock * 4;
        value[i] = values[key / kKvBlock] + key % kKvBlock * value_bytes / kKvBlock;
      }
      I sum[kRows][kQSums][kVectors];
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int s = 0; s < kQSums; s++)
          TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][s][i] = L::no_codes();
      for (int64_t step = 0; step < steps; step++) {
        if (r == 0 && step * kLine < value_bytes * kWidth / kKvBlock)
          TAUT_FOR (int i = 0; i < kVectors; i++) ask_for(value[i] + step * kLine);
        I k[kVectors];
        TAUT_FOR (int i = 0; i < kVectors; i++) k[i] = kInt4 ? L::load_codes(block[i] + step * 64) : L::load_key_codes(block[i] + step * 64);
        if constexpr (L::kLanes && kInt4) {
          I high[kVectors];
          TAUT_FOR (int i = 0; i < kVectors; i++) high[i] = L::high_halves(k[i]), k[i] = L::low_halves(k[i]);
          L::dot_lanes(sum, k, code + step * 2 * kQStep);
          L::dot_lanes(sum, high, code + step * 2 * kQStep + kQStep);
        } else if constexpr (L::kLanes) {
          L::dot_lanes(sum, k, code + step * kQStep);
        } else if constexpr (kInt4) {
          I high[kVectors];
          TAUT_FOR (int i = 0; i < kVectors; i++) high[i] = L::high_halves(k[i]), k[i] = L::low_halves(k[i]);
          TAUT_FOR (int t = 0; t < kRows; t++) {
            const I x = L::four_bytes(code + step * 2 * kQStep + t * 4), y = L::four_bytes(code + step * 2 * kQStep + kQStep + t * 4);
            TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][0][i] = L::dot_twice(sum[t][0][i], k[i], x, high[i], y);
          }
        } else if constexpr (kQWords) {
          I odd[kVectors];
          TAUT_FOR (int i = 0; i < kVectors; i++) odd[i] = L::odd_words(k[i]), k[i] = L::even_words(k[i]);
          TAUT_FOR (int t = 0; t < kRows; t++) {
            const I x = L::four_bytes(code + step * kQStep + t * 8), y = L::four_bytes(code + step * kQStep + t * 8 + 4);
            TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][0][i] = L::dot_words(L::dot_words(sum[t][0][i], k[i], x), odd[i], y);
          }
        } else {
          TAUT_FOR (int t = 0; t < kRows; t++)
            TAUT_FOR (int s = 0; s < kQBytes; s++) {
              const I x = L::four_bytes(code + step * kQStep + (t * kQBytes + s) * 4);
              TAUT_FOR (int i = 0; i < kVectors; i++) sum[t][s][i] = L::dot(sum[t][s][i], k[i], x);
            }
        }
      }
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int i = 0; i < kVectors; i++) {
          if (j + i * kWidth >= end) continue;
          const V x = L::mul(L::to_float(L::minus(product_of<kQSums>(sum[t], i), q_sum[r + t])), L::load(key_scales + j + i * kWidth));
          L::store(scores + (r + t) * kTile + j + i * kWidth, L::mul(x, L::set1(q_scale[r + t])));
        }
    }
  }

  // ---- Values ----

  // WHY two rows at most: then as many columns fit the registers that memory is read in order; for the other rows the tile is in L1. But
  // four of fp8, whose conversion costs more than the order of memory gains.
  template <int kRows>
  __attribute__((noinline)) void some_values(int64_t r, int64_t begin, int64_t end) {
    constexpr int kUnits = L::kSums / 2 / kRows;
    const int64_t whole = p.Dv / kUnit * kUnit, stride = p.cache.v_row_stride;
    const float* weight = scores + r * kTile;
    const auto columns = [&]<int kCount, bool kTail>(int64_t d) __attribute__((always_inline)) {
      V sum[kRows][kCount][2];
      TAUT_FOR (int t = 0; t < kRows; t++) {
        const V factor = L::set1(shrink[r + t]);
        TAUT_FOR (int i = 0; i < kCount; i++)
          TAUT_FOR (int s = 0; s < 2; s++) sum[t][i][s] = L::mul(factor, L::load(sums + (r + t) * kRowFloats + d + i * kUnit + s * kWidth));
      }
      for (int64_t j = begin; j < end;) {
        const int64_t stop = std::min(end, j / kKvBlock * kKvBlock + kKvBlock);
        const uint8_t *row = values[j / kKvBlock] + j % kKvBlock * stride + d * kElement, *ahead = next_keys[j / kKvBlock];
        if (ahead) ahead += j % kKvBlock * p.cache.k_row_stride + d * kElement;
        for (; j < stop; j++, row += stride) {
          if (r == 0 && ahead) {
            TAUT_FOR (int at = 0; at < kCount * kUnit * kElement; at += 64) ask_for(ahead + at);
            ahead += p.cache.k_row_stride;
          }
          V x[kRows];
          TAUT_FOR (int t = 0; t < kRows; t++) x[t] = L::set1(weight[t * kTile + j]);
          TAUT_FOR (int i = 0; i < kCount; i++) {
            V low, high;
            if constexpr (kTail) load_tail(row, p.Dv - d, low, high);
            else L::template load_unit<kFormat>(row + i * kUnit * kElement, low, high);
            L::keep(low), L::keep(high);
            TAUT_FOR (int t = 0; t < kRows; t++) sum[t][i][0] = L::fma(x[t], low, sum[t][i][0]), sum[t][i][1] = L::fma(x[t], high, sum[t][i][1]);
          }
        }
      }
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int i = 0; i < kCount; i++)
          TAUT_FOR (int s = 0; s < 2; s++) L::store(sums + (r + t) * kRowFloats + d + i * kUnit + s * kWidth, sum[t][i][s]);
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
    constexpr int64_t kVisits = kInt4 ? 2 : 4;  // of a block
    const int64_t visits = (value_width + kVectors * kWidth - 1) / (kVectors * kWidth) * kVisits,
                  lines = (key_block_bytes(kFormat, p.D) / 64 + visits - 1) / visits;  // of the next tile's keys, a visit
    const auto columns = [&]<int kCount>(int64_t d) __attribute__((always_inline)) {
      I sum[kRows][kWeightSums][kCount];
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int s = 0; s < kWeightSums; s++)
          TAUT_FOR (int i = 0; i < kCount; i++) sum[t][s][i] = L::no_codes();
      for (int64_t j = begin / kKvBlock * kKvBlock; j < end; j += kKvBlock) {
        const uint8_t* block = values[j / kKvBlock] + d * 4;
        const uint8_t* ahead = r == 0 && next_keys[j / kKvBlock] ? next_keys[j / kKvBlock] + d / (kVectors * kWidth) * kVisits * lines * 64 : nullptr;
        if constexpr (L::kLanes) {
          I x[kRows][2];
          TAUT_FOR (int t = 0; t < kRows; t++)
            TAUT_FOR (int s = 0; s < 2; s++) x[t][s] = L::load_codes(weight + (t * 2 + s) * kTile + j);
          TAUT_FOR (int visit = 0; visit < kVisits; visit++, block += value_width * 4) {
            if (ahead)
              for (int64_t line = 0; line < lines; line++, ahead += 64) ask_for(ahead);
            TAUT_FOR (int i = 0; i < kCount; i++) {
              const I v = L::load_codes(block + i * kWidth * 4), low = kInt4 ? L::low_halves(v) : v, high = L::high_halves(v);
              TAUT_FOR (int t = 0; t < kRows; t++)
                TAUT_FOR (int s = 0; s < 2; s++) {
                  sum[t][s][i] = L::dot_lane(sum[t][s][i], low, x[t][s], kInt4 ? visit * 2 : visit);
                  if (kInt4) sum[t][s][i] = L::dot_lane(sum[t][s][i], high, x[t][s], visit * 2 + 1);
                }
            }
          }
        } else
          for (int64_t visit = 0; visit < kVisits; visit++, block += value_width * 4) {
            if (ahead)
              for (int64_t line = 0; line < lines; line++, ahead += 64) ask_for(ahead);
            I v[kCount], high[kCount];
            TAUT_FOR (int i = 0; i < kCount; i++) v[i] = L::load_codes(block + i * kWidth * 4);
            if constexpr (L::kWords) {
              constexpr int kPairs = kInt4 ? 4 : 2;  // of tokens: 0 and 2, 1 and 3; then those of the high halves
              TAUT_FOR (int pair = 0; pair < kPairs; pair++) {
                I words[kCount];
                TAUT_FOR (int i = 0; i < kCount; i++)
                  words[i] = kInt4 ? L::half_words(v[i], pair % 2 * 2 + pair / 2) : pair == 0 ? L::even_signed_words(v[i]) : L::odd_signed_words(v[i]);
                TAUT_FOR (int t = 0; t < kRows; t++) {
                  const I x = L::four_bytes(weight + t * 2 * kTile + (j + visit * 2 * kPairs) * 2 + pair * 4);
                  TAUT_FOR (int i = 0; i < kCount; i++) sum[t][0][i] = L::dot_words(sum[t][0][i], words[i], x);
                }
              }
            } else {
              if constexpr (kInt4)
                TAUT_FOR (int i = 0; i < kCount; i++) high[i] = L::high_halves(v[i]), v[i] = L::low_halves(v[i]);
              TAUT_FOR (int t = 0; t < kRows; t++)
                TAUT_FOR (int s = 0; s < 2; s++) {
                  const uint8_t* at = weight + (t * 2 + s) * kTile + j + visit * (kInt4 ? 8 : 4);
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
      }
      TAUT_FOR (int t = 0; t < kRows; t++)
        TAUT_FOR (int i = 0; i < kCount; i++) {
          float* to = sums + (r + t) * kRowFloats + d + i * kWidth;
          const V tile = L::to_float(L::minus(product_of<kWeightSums>(sum[t], i), weight_sum[r + t]));
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

  // The scores of kRows rows to weights 2^(score - most), and with codes to those times the values' scales, as bytes. WHY rows together, and
  // totals by lane: one row's maximum, sum and scale wait for each other, 25 cycles a time; those of four rows do so at once.
  template <int kRows>
  __attribute__((noinline)) void weigh(int64_t r, int64_t end) {
    float* row = scores + r * kTile;
    V highest[kRows], now[kRows], sum[kRows];
    TAUT_FOR (int t = 0; t < kRows; t++) highest[t] = L::load(row + t * kTile);
    for (int64_t j = kWidth; j < end; j += kWidth)
      TAUT_FOR (int t = 0; t < kRows; t++) highest[t] = L::max(L::load(row + t * kTile + j), highest[t]);
    TAUT_FOR (int t = 0; t < kRows; t++) {
      const float high = std::max(L::highest(highest[t]), most[r + t]);
      shrink[r + t] = high == most[r + t] ? 1 : most[r + t] == kLowest ? 0 : std::exp2(most[r + t] - high);
      most[r + t] = high, now[t] = L::set1(high);
      sum[t] = L::mul(L::load(totals + (r + t) * kWidth), L::set1(shrink[r + t]));
    }
    V largest[kRows];
    TAUT_FOR (int t = 0; t < kRows; t++) largest[t] = L::zero();
    for (int64_t j = 0; j < end; j += kWidth) {
      V weight[kRows];
      TAUT_FOR (int t = 0; t < kRows; t++) weight[t] = L::exp2(L::sub(L::load(row + t * kTile + j), now[t]));
      TAUT_FOR (int t = 0; t < kRows; t++) sum[t] = L::add(sum[t], weight[t]);
      if constexpr (kCodes) {
        const V scale = L::load(value_scales + j);
        TAUT_FOR (int t = 0; t < kRows; t++) weight[t] = L::mul(weight[t], scale);
        TAUT_FOR (int t = 0; t < kRows; t++) largest[t] = L::max(weight[t], largest[t]);
      }
      TAUT_FOR (int t = 0; t < kRows; t++) L::store(row + t * kTile + j, weight[t]);
    }
    TAUT_FOR (int t = 0; t < kRows; t++) L::store(totals + (r + t) * kWidth, sum[t]);
    if constexpr (kCodes) {
      V inverse[kRows];
      I sum_of_codes[kRows];
      TAUT_FOR (int t = 0; t < kRows; t++) {
        const float high = L::highest(largest[t]);
        sum_scale[r + t] = high / kMostWeight;
        inverse[t] = L::set1(high > 1e-30f ? kMostWeight / high : 0), sum_of_codes[t] = L::no_codes();
      }
      for (int64_t j = 0; j < end; j += kWidth)
        TAUT_FOR (int t = 0; t < kRows; t++) {
          uint8_t* codes = weight_codes + (r + t) * 2 * kTile;
          // WHY max: a weight that is NaN has no code; the row's total says it
          const V weight = L::max(L::mul(L::load(row + t * kTile + j), inverse[t]), L::zero());
          if constexpr (L::kWords) L::split_words(weight, codes + 2 * j, sum_of_codes[t]);
          else L::split(weight, codes + j, codes + kTile + j, sum_of_codes[t]);
        }
      TAUT_FOR (int t = 0; t < kRows; t++) weight_sum[r + t] = kInt4 ? L::sum_of_lanes(sum_of_codes[t]) * 8 : 0;
    }
  }

  // Scales of values that are no numbers: 0 instead, and NaN in the sums of the rows that see such a key. WHY apart: 0 times a NaN is NaN,
  // and a hidden key has the weight 0. Called before the scores are weights.
  __attribute__((noinline)) void hide_bad_scales(int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++)
      if (!(std::abs(value_scales[j]) <= 3.4e38f)) {
        value_scales[j] = 0;
        for (int64_t r = 0; r < rows; r++)
          if (scores[r * kTile + j] != -INFINITY) std::fill_n(sums + r * kRowFloats, value_width, NAN);
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
      float& sum = sums[r * kRowFloats + d / kUnit * kUnit + position_in_unit<kFormat>(d % kUnit, kWidth)];
      sum *= shrink[r];
      for (int64_t j = begin; j < end; j++)
        if (scores[r * kTile + j] != 0) sum += scores[r * kTile + j] * (value_of(j, d) / kUnitFactor<kFormat>);
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
    const int64_t whole_end = (end + kKvBlock - 1) / kKvBlock * kKvBlock;
    V nothing = L::zero();
    if constexpr (kCodes) std::fill_n(value_scales, begin / kKvBlock * kKvBlock, 0.0f);
    for (int64_t j = begin / kKvBlock * kKvBlock; j < end; j += kKvBlock) {
      keys[j / kKvBlock] = key_block(p.cache, b, kv_head, key + j), values[j / kKvBlock] = value_block(p.cache, b, kv_head, key + j);
      if constexpr (kCodes) {
        const int64_t at = scale_at(p.cache, b, kv_head, key + j);
        for (int64_t i = 0; i < kKvBlock; i += kWidth) {
          L::store(key_scales + j + i, L::load_scales(p.cache.k_scales + at + i));
          const V scales = L::load_scales(p.cache.v_scales + at + i);
          L::store(value_scales + j + i, scales), nothing = L::fma(scales, L::zero(), nothing);
        }
      }
    }
    const bool scales_finite = !kCodes || L::sum(nothing) == 0;
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
      for (int64_t j = end; j < whole_end; j++) row[j] = -INFINITY;
    }
    if constexpr (kCodes)
      if (!scales_finite) hide_bad_scales(0, whole_end);
    by_rows([&]<int kRows>(int64_t r) { weigh<kRows>(r, whole_end); });
    if constexpr (!kCodes)
      if (hides && !values_finite(begin, end)) {
        for (int64_t r = 0; r < rows; r++) add_visible_values(r, begin, end);
        return;
      }
    by_rows([&]<int kRows>(int64_t r) {
      if constexpr (kCodes) some_code_values<kRows>(r, begin, end);
      else if constexpr (kRows == 4 && kFormat != KvFormat::kFp8) some_values<2>(r, begin, end), some_values<2>(r + 2, begin, end);
      else some_values<kRows>(r, begin, end);
    });
  }

  // ---- Chunks ----

  static int64_t key_width_of(const Params& p) { return kCodes ? (p.D + 7) / 8 * 8 : (p.D + kUnit - 1) / kUnit * kUnit; }
  static int64_t value_width_of(const Params& p) { return kCodes ? (p.Dv + 15) / 16 * 16 : (p.Dv + kUnit - 1) / kUnit * kUnit; }

  explicit Chunks(const Params& p) : p(p) {
    group = p.Hq / p.Hkv, key_width = key_width_of(p), value_width = value_width_of(p);
    const int64_t floats = kMostRows * (kRowFloats + kTile + kRowFloats) + kTile, bytes = kMostRows * (kQBytes * kRowFloats + 2 * kTile);
    q = reinterpret_cast<float*>(scratch(1, floats * sizeof(float) + bytes));
    scores = q + kMostRows * kRowFloats, sums = scores + kMostRows * kTile, bias = sums + kMostRows * kRowFloats;
    q_codes = reinterpret_cast<uint8_t*>(bias + kTile), weight_codes = q_codes + kMostRows * kQBytes * kRowFloats;
  }

  // From here on: the block-th block of rows, of all heads and sequences.
  void begin(int64_t block) {
    const int64_t row_blocks = p.row_blocks();
    b = block / row_blocks / p.Hkv, kv_head = block / row_blocks % p.Hkv, first_row = block % row_blocks * kMostRows;
    rows = std::min(kMostRows, p.rows() - first_row), length = p.length(b);
    channels = p.cache.channels ? p.cache.channels + (b * p.Hkv + kv_head) * 2 * (p.D + p.Dv) : nullptr;
    loaded = false;
  }

  void point_to_next(int64_t sequence, int64_t head, int64_t key, int64_t end) {
    for (int64_t i = 0; i < kBlocks; i++) next_keys[i] = key + i * kKvBlock < end ? key_block(p.cache, sequence, head, key + i * kKvBlock) : nullptr;
  }
  void point_to_next_task(int64_t task) {
    const int64_t chunks = p.chunks(), block = task / chunks / p.row_blocks();
    if (task < 0) return point_to_next(0, 0, 0, 0);
    point_to_next(block / p.Hkv, block % p.Hkv, task % chunks * kChunk, std::min(p.length(block / p.Hkv), task % chunks * kChunk + kTile));
  }

  // Keys from chunk * kChunk on; their sums, maximum and total of each row to `partial`.
  // `next`: the task after this one, or -1.
  void attend(int64_t chunk, int64_t next, float* partial) {
    int64_t first = length, last = 0;  // what any row sees
    for (int64_t r = 0; r < rows; r++) {
      first = std::min(first, first_key(p.rules, position_of(r)));
      last = std::max(last, end_key(p.rules, position_of(r), length));
    }
    first = std::max({first, chunk * kChunk, int64_t{0}}), last = std::min({last, chunk * kChunk + kChunk, length});
    for (int64_t r = 0; r < rows; r++) most[r] = kLowest;
    std::memset(totals, 0, rows * kWidth * sizeof(float));
    if (first < last) {
      for (int64_t r = 0; r < rows; r++) std::memset(sums + r * kRowFloats, 0, value_width * sizeof(float));
      if (!loaded) load_queries(), loaded = true;
      for (int64_t key = first / kTile * kTile; key < last; key += kTile) {
        const int64_t after = key + kTile;
        if (after < last) point_to_next(b, kv_head, after, last);
        else point_to_next_task(next);
        tile(key, std::max(first - key, int64_t{0}), std::min(last - key, kTile));
      }
    }
    float *partial_most = partial + kMostRows * p.Dv, *partial_total = partial_most + kMostRows;
    for (int64_t r = 0; r < rows; r++) {
      partial_most[r] = most[r], partial_total[r] = total[r] = L::sum(L::load(totals + r * kWidth));
      if (total[r] == 0) continue;
      for (int64_t d = 0; d < p.Dv; d++)
        partial[r * p.Dv + d] = kUnitFactor<kFormat> * sums[r * kRowFloats + (kCodes ? d : d / kUnit * kUnit + position_in_unit<kFormat>(d % kUnit, kWidth))];
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
      std::memset(sums, 0, value_width * sizeof(float));
      for (int64_t c = 0; c < chunks; c++) {
        const float *from = partial(c), weight = std::exp2(from[kMostRows * p.Dv + r] - highest), part = from[kMostRows * (p.Dv + 1) + r];
        if (part == 0) continue;
        all += part * weight;
        for (int64_t d = 0; d < p.Dv; d += 8) {
          FloatLanes x, sum;
          load_lanes<DType::kFloat32>(x, from, r * p.Dv + d, std::min<int64_t>(8, p.Dv - d));
          load_lanes<DType::kFloat32>(sum, sums, d);
          store_lanes<DType::kFloat32>(sum + x * weight, sums, d);
        }
      }
      const float divisor = all + (sink > kLowest ? std::exp2(sink - highest) : 0), inverse = divisor != 0 ? 1 / divisor : 0;
      const int64_t at = b * p.out.batch_stride + head_of(r) * p.out.head_stride + query_of(r) * p.out.row_stride;
      for_dtype(p.dtype, [&]<DType kDType>() {
        for (int64_t d = 0; d < p.Dv; d += 8) {
          const int64_t count = std::min<int64_t>(8, p.Dv - d);
          FloatLanes x;
          load_lanes<DType::kFloat32>(x, sums, d);
          x *= inverse;
          if (channels) {
            FloatLanes shift, factor;
            load_lanes<DType::kFloat32>(shift, channels + p.D, d, count);
            load_lanes<DType::kFloat32>(factor, channels + p.D + p.Dv + p.D, d, count);
            x = x * factor + shift * (all * inverse);
          }
          store_lanes<kDType>(x, const_cast<void*>(p.out.data), at + d, count);
        }
      });
      p.lse[(b * p.Hq + head_of(r)) * p.Lq + query_of(r)] = divisor != 0 ? highest * kLn2 + std::log(divisor) : -INFINITY;
    }
  }
};

template <class L, KvFormat kFormat>
void attend_format(const Params& p) {
  const int64_t chunks = p.chunks(), blocks = p.B * p.Hkv * p.row_blocks(), tasks = blocks * std::max<int64_t>(chunks, 1);
  int64_t counter = 0;
  parallel_tasks(p.num_threads, [&](int64_t) {
    Chunks<L, kFormat> work(p);
    int64_t begun = -1;
    // A task is taken before the one in front of it is done: its keys are asked for by then.
    const auto take = [&] { return __atomic_fetch_add(&counter, 1, __ATOMIC_RELAXED); };
    for (int64_t task = take(), next; task < tasks; task = next) {
      next = take();
      const int64_t block = chunks ? task / chunks : task, chunk = chunks ? task % chunks : 0;
      if (block != begun) work.begin(begun = block);
      float* partials = p.partials + block * chunks * p.partial_floats();
      if (chunks) work.attend(chunk, next < tasks ? next : -1, partials + chunk * p.partial_floats());
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
