// The skeleton of cuda_sm75_mma and cuda_sm80_mma: attention of a few queries on mma.sync.
//
// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; q fp32, bf16 and fp16. Stored numbers are
//           exact in fp16 (int8, int4, fp8, fp16) or bf16. q and the weights are two such numbers each, what the first leaves over and the
//           second takes: 22 bits of a row's largest element beside fp16, 16 bits of each element beside bf16. Sums fp32
// LAYOUT    q, out [B,H,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h, 16-byte chunks
// WORK      cuda_split.cuh says who has which keys; a block has up to eight rows. A fragment of 16 rows is eight rows twice: their first halves,
//           and 8 further down what those leave over. Both halves of a product end in one lane.
//           Nothing goes through shared memory: a lane's 16 bytes of the cache are its part of B operands, since any order of the summed
//           dimension will do. Of keys, lane 4 g + t loads dims of tokens 4 g to 4 g + 3 of 32, one for each of four fragments; so it gets the
//           scores of row g of tokens 8 t to 8 t + 7, and these, as weights, are the A operand for values that it loads: of just
//           those tokens. In codes a 32-bit word is four numbers of one token, or of one column: a whole operand. Of floats, two tokens'
//           words are shuffled bytewise. The scale of a key's codes multiplies the score, that of a value's the weight.
// BOUND     memory. On an H200 (4.34 TB/s measured), batch 16, 4096 keys, D = 128: int8 3.56 TB/s where each head has its own keys, 3.1 with a group
//           of 4 (a quarter of the bytes, so that a block's first and last microseconds count); 16 bits 3.5; int4 2.4, bound by instructions:
//           some 1100 of a unit of 64 tokens are conversions and mma, and 16 warps of a multiprocessor issue half of the time.
//           Eight loads of 16 bytes a lane are under way at once, 4 KB a warp.
//           WHY no cp.async: it would carry to shared memory what then is read once, by the lane that asked for it.
//           TRIED: units all of one kind, with every question asked of every key: 1.7 to 2.1 times slower. prefetch.global.L2 of the next unit's keys, or
//           this one's values: 6 to 11% slower, the L2 cache holds less than all warps ask for. Of a part's first unit, while the queries are loaded: it stays.
// LIMITS    no float32 cache; bf16: from sm_80 on, q not float32, no channels (16 bits are too few for their products)
#pragma once

#include <type_traits>

#include "attention_decode/cuda_split.cuh"
#include "common/mma.cuh"

namespace taut::attention_decode {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kWeightUnit = 4096;  // the largest weight: then what fp16's smallest step is of it no longer counts

// x as two numbers of T.
template <class T>
struct Halves {
  T first, second;
  TAUT_DEVICE explicit Halves(float x) : first(from_float<T>(x)), second(from_float<T>(x - to_float(first))) {}
};
template <class T>
TAUT_DEVICE uint32_t pair_of(T low, T high) {
  if constexpr (std::is_same_v<T, __half>) return __half_as_ushort(low) | static_cast<uint32_t>(__half_as_ushort(high)) << 16;
  else return __bfloat16_as_ushort(low) | static_cast<uint32_t>(__bfloat16_as_ushort(high)) << 16;
}
// An A operand of four numbers x of this lane's row: elements a and b of a pair are in one register.
template <class T>
TAUT_DEVICE void operand_of(uint32_t (&a)[4], float x0, float y0, float x1, float y1) {
  const Halves<T> p(x0), q(y0), r(x1), s(y1);
  a[0] = pair_of(p.first, q.first), a[1] = pair_of(p.second, q.second);
  a[2] = pair_of(r.first, s.first), a[3] = pair_of(r.second, s.second);
}

TAUT_DEVICE uint32_t word_of(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }

// Two E4M3 numbers, in the upper bytes of both halves of a word, times 2^-8 as fp16, exactly; the lower bytes may hold anything. Shifted so
// that its exponent lies at the low end of a wider one, a number is that times 2^(7 - 15). Only NaN carries, to fp16's highest exponent.
constexpr float kE4m3Unit = 256;
TAUT_DEVICE uint32_t halves_of_e4m3(uint32_t word) {
  const uint32_t size = word >> 1 & 0x3f803f80u, nan = (size + 0x00800080u) & 0x40004000u;
  return (word & 0x80008000u) | size | nan;
}

// Four bytes as fp16, two a register: 0 and 2, 1 and 3. An integer in the mantissa of 1024.0 is that number plus the integer.
struct FourHalves {
  uint32_t even, odd;
};
// 128 more than what they stand for
TAUT_DEVICE FourHalves halves_of_bytes(uint32_t word) {
  return {ptx::hsub2<__half>(ptx::prmt(word, 0x64646464u, 0x4240), 0x64806480u), ptx::hsub2<__half>(ptx::prmt(word, 0x64646464u, 0x4341), 0x64806480u)};
}
// The lower or upper halves of bytes, 8 more than what they stand for. WHY an fma: 1024 + 16 x needs no shift
TAUT_DEVICE FourHalves halves_of_nibbles(uint32_t word, bool upper) {
  constexpr int kAndOr = 0xea;  // lop3: (a & b) | c
  const auto half = [&](uint32_t w) {
    if (upper) return ptx::hfma2<__half>(ptx::lop3<kAndOr>(w, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // / 16 - 72
    return ptx::hsub2<__half>(ptx::lop3<kAndOr>(w, 0x000f000fu, 0x64006400u), 0x64086408u);
  };
  return {half(word), half(word >> 8)};
}

template <int kSm, KvFormat kFormat, int kRowWidth>
struct MmaUnit {
  static constexpr int kRows = 8, kWidth = kRowWidth, kHalves = 2;  // halves of a unit: 32 tokens, of four fragments
  static constexpr bool kCodes = has_codes(kFormat), kFp8 = kFormat == KvFormat::kFp8;
  [[maybe_unused]] static constexpr bool kInt4 = kFormat == KvFormat::kInt4;
  using T = std::conditional_t<kFormat == KvFormat::kBFloat16, __nv_bfloat16, __half>;
  static constexpr int kBlock = static_cast<int>(kKvBlock), kLoads = 8;

  // Keys: 16 bytes are so many dims of a token (of codes: of four), kSteps steps of 16 of an mma; a row is kKeyChunks times as much from
  // four lanes.
  static constexpr int kDims = kInt4 || !(kCodes || kFp8) ? 8 : kFp8 ? 16 : 4, kSteps = kDims / 4, kKeyChunks = kWidth / (4 * kDims);
  static constexpr int kKeyLoads = kHalves * (kCodes ? 1 : 4) * kKeyChunks, kKeyBatch = kKeyLoads < kLoads ? kKeyLoads : kLoads;
  // Values: 16 bytes are so many columns, of a token, or of four or (int4) eight. Eight lanes have kSpan of them, each a fragment's.
  static constexpr int kColumns = kCodes ? 4 : kFp8 ? 16 : 8, kSpan = 8 * kColumns, kSpans = kWidth / kSpan;
  static constexpr int kSpanLoads = kHalves * (kInt4 ? 1 : kCodes ? 2 : 8);  // of a lane, of a span
  static constexpr int kBatchSpans = kSpanLoads >= kLoads ? 1 : kLoads / kSpanLoads < kSpans ? kLoads / kSpanLoads : kSpans;
  static_assert(kKeyChunks >= 1 && kSpans >= 1 && kSpans % kBatchSpans == 0 && kKeyLoads % kKeyBatch == 0);

  struct Shared {
    uint4 q[kWidth / 16][32];  // A operands of lanes
    Row rows[kRows];
    float units[kRows];  // what 1 in them stands for
  };
  struct Scratch {
    float key_scales[kUnit], value_scales[kUnit];
    Places places[2];  // of units by turns
  };

  // A lane's elements of a row of q, every 32nd. WHY the switch around the loop: all loads are under way at once.
  static constexpr int kLaneDims = kWidth / 32;
  TAUT_DEVICE static void load_row(float (&x)[kLaneDims], const Args& args, int64_t at, int lane, bool there) {
    const auto load = [&](auto of) {
#pragma unroll
      for (int i = 0; i < kLaneDims; i++) {
        const int d = lane + 32 * i;
        x[i] = there && d < args.D ? of(at + d) : 0.0f;
      }
    };
    switch (args.dtype) {
      case DType::kFloat32: return load([&](int64_t i) { return static_cast<const float*>(args.q.data)[i]; });
      case DType::kBFloat16: return load([&](int64_t i) { return to_float(static_cast<const __nv_bfloat16*>(args.q.data)[i]); });
      default: return load([&](int64_t i) { return to_float(static_cast<const __half*>(args.q.data)[i]); });
    }
  }
  // Through `s_rows`, shared memory that nobody uses yet.
  TAUT_DEVICE static void load_queries(const Args& args, const Rows& rows, Shared& shared, Sums<kRows, kWidth>& s_rows) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const float* channels = rows.channels(args);
    float x[kRows / kWarps][kLaneDims];
#pragma unroll
    for (int i = 0; i < kRows / kWarps; i++) {
      const int r = warp + kWarps * i;
      load_row(x[i], args, r < rows.count ? rows.at(args, args.q, r) : 0, lane, r < rows.count);
    }
#pragma unroll
    for (int i = 0; i < kRows / kWarps; i++) {
      const int r = warp + kWarps * i;
      float offset = 0, largest = 0;
      if (channels) {
#pragma unroll
        for (int j = 0; j < kLaneDims; j++)
          if (const int d = lane + 32 * j; d < args.D) offset = fmaf(x[i][j], channels[d], offset), x[i][j] *= channels[args.D + args.Dv + d];
      }
#pragma unroll
      for (int j = 0; j < kLaneDims; j++) largest = fmaxf(largest, fabsf(x[i][j]));
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        offset += __shfl_xor_sync(kAllLanes, offset, lanes);
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      }
      // A power of 2, so that nothing is rounded: the largest element becomes 2^10 to 2^11. Of what is no number, or too small, 1.
      const uint32_t exponent = __float_as_uint(largest) & 0x7f800000u;
      const bool scales = std::is_same_v<T, __half> && exponent != 0x7f800000u && exponent >= 0x0d000000u;
      const float unit = scales ? __uint_as_float(exponent - 0x05000000u) : 1.0f, inverse = __uint_as_float(0x7f000000u - __float_as_uint(unit));
      if (lane == 0) shared.rows[r] = row_of(args, rows, r), shared.rows[r].offset = offset, shared.units[r] = unit;
#pragma unroll
      for (int j = 0; j < kLaneDims; j++) s_rows.values[r][lane + 32 * j] = x[i][j] * inverse;
    }
    __syncthreads();
    const int g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (int step = warp; step < kWidth / 16; step += kWarps) {
      const float4 y = *reinterpret_cast<const float4*>(&s_rows.values[g][kDims * (4 * (step / kSteps) + t) + 4 * (step % kSteps)]);
      uint32_t a[4];
      if constexpr (kCodes || kFp8) operand_of<T>(a, y.x, y.z, y.y, y.w);
      else operand_of<T>(a, y.x, y.y, y.z, y.w);
      shared.q[step][lane] = make_uint4(a[0], a[1], a[2], a[3]);
    }
    __syncthreads();
  }

  // Of a plain unit every row sees every key, and rows are as wide as the kernel: then nothing is asked of a key, and what a lane loads lies at
  // fixed distances from two places. WHY: the questions are two thirds of a unit's instructions.
  static constexpr int kElement = kCodes ? 4 : static_cast<int>(kv_element_bytes(kFormat));  // bytes from a column of values to the next
  static constexpr int kRowBytes = kWidth * kElement;                                        // of values: of a token, or of four or (int4) eight
  static constexpr int kBlockBytes = kCodes ? kWidth * (kInt4 ? 8 : 16) : kBlock * kRowBytes;
  TAUT_DEVICE static bool is_plain(const Args& args, const Rows& rows, const Places& places, int first) {
    return args.plain && args.D == kWidth && first >= rows.all_first && first + kUnit <= rows.all_end && places.whole();
  }
  // A lane's first bytes of each half of a plain unit.
  struct Bases {
    const uint8_t* of[kHalves];
  };
  TAUT_DEVICE static Bases key_bases(const Places& places, int lane) {
    const int g = lane / 4, t = lane % 4, token = 4 * g % kBlock, at = kCodes ? t * 64 + token * 4 : token * kRowBytes + t * 16;
    return {{places.keys[g / 4] + at, places.keys[2 + g / 4] + at}};
  }
  TAUT_DEVICE static Bases value_bases(const Places& places, int lane) {
    const int g = lane / 4, t = lane % 4, token = 8 * t % kBlock;
    const int at = (kInt4 ? token / 8 : kCodes ? token / 4 : token) * kRowBytes + kColumns * g * kElement;
    return {{places.values[t / 2] + at, places.values[2 + t / 2] + at}};
  }
  // Asks for the keys or values of a plain unit to be brought to the L2 cache.
  TAUT_DEVICE static void prefetch(const uint8_t* const* blocks, int lane) {
    constexpr int kLine = 128, kLines = kBlockBytes / kLine;
    static_assert(kBlockBytes % kLine == 0);
#pragma unroll
    for (int begin = 0; begin < kUnitBlocks * kLines; begin += 32) {
      const int i = begin + lane;
      const uint8_t* block = i < kUnitBlocks * kLines ? blocks[i / kLines] : nullptr;
      if (block) ptx::prefetch_l2(block + i % kLines * kLine);
    }
  }
  TAUT_DEVICE static void prefetch_keys(const Args& args, const Places& places, int lane) {
    prefetch(places.keys, lane);
    if constexpr (kCodes) {
      const int i = lane % kUnitBlocks;
      if (lane < 2 * kUnitBlocks && places.keys[i]) ptx::prefetch_l2((lane < kUnitBlocks ? args.cache.k_scales : args.cache.v_scales) + places.scales[i]);
    }
  }

  // ---- q k^T: scores[h][j] is of tokens 32 h + 4 n + j
  using Scores = float[kHalves][4][4];
  template <bool kPlain>
  TAUT_DEVICE static uint4 load_keys(const Args& args, const Rows& rows, const Places& places, const Bases& bases, int first, int index, int lane) {
    if constexpr (kPlain) {
      const int chunk = 4 * (index % kKeyChunks), part = index / kKeyChunks;
      return ptx::ld_global_nc_16(kCodes ? bases.of[part] + chunk * 64 : bases.of[part / 4] + part % 4 * kRowBytes + chunk * 16);
    }
    const int g = lane / 4, t = lane % 4, chunk = 4 * (index % kKeyChunks) + t, part = index / kKeyChunks;
    const int token = kCodes ? 32 * part + 4 * g : 32 * (part / 4) + 4 * g + part % 4;
    const uint8_t* block = places.keys[token / kBlock];
    if (block == nullptr || chunk * kDims >= args.D || (!kCodes && first + token >= rows.length)) return make_uint4(0, 0, 0, 0);
    return ptx::ld_global_nc_16(kCodes ? block + chunk * 64 + token % kBlock * 4 : block + token % kBlock * args.cache.k_row_stride + chunk * 16);
  }
  template <bool kPlain>
  TAUT_DEVICE static void multiply_keys(Scores& scores, const Args& args, const Rows& rows, const Shared& shared, const Places& places, int first, int lane) {
    const Bases bases = kPlain ? key_bases(places, lane) : Bases{};
#pragma unroll
    for (int begin = 0; begin < kKeyLoads; begin += kKeyBatch) {
      uint4 words[kKeyBatch];
#pragma unroll
      for (int i = 0; i < kKeyBatch; i++) words[i] = load_keys<kPlain>(args, rows, places, bases, first, begin + i, lane);
#pragma unroll
      for (int i = 0; i < kKeyBatch; i++) {
        const int chunk = (begin + i) % kKeyChunks, part = (begin + i) / kKeyChunks;
#pragma unroll
        for (int step = 0; step < kSteps; step++) {
          const uint4 q = shared.q[chunk * kSteps + step][lane];
          const uint32_t a[4] = {q.x, q.y, q.z, q.w};
          if constexpr (kCodes) {
#pragma unroll
            for (int j = 0; j < 4; j++) {
              const uint32_t word = word_of(words[i], j);
              const FourHalves b = kInt4 ? halves_of_nibbles(word, step == 1) : halves_of_bytes(word);
              mma<kSm, T>(scores[part][j], a, b.even, b.odd);
            }
          } else if constexpr (kFp8) {
            const uint32_t word = word_of(words[i], step);
            mma<kSm, T>(scores[part / 4][part % 4], a, halves_of_e4m3(word << 8), halves_of_e4m3(word));
          } else {
            mma<kSm, T>(scores[part / 4][part % 4], a, word_of(words[i], 2 * step), word_of(words[i], 2 * step + 1));
          }
        }
      }
    }
  }

  // ---- Scores to weights: of row g, tokens 32 h + 8 t + 4 e + j, as A operands a[h][e]
  using Weights = uint32_t[kHalves][2][4];
  template <bool kPlain>
  TAUT_DEVICE static void weigh(Weights& a, float& most, float& total, const Scores& scores, const Args& args, const Shared& shared, const Places& places,
                                const Scratch& scratch, int first, int lane, float inverse) {
    const int g = lane / 4, t = lane % 4;
    const Row& row = shared.rows[g];
    const AttentionMask& mask = args.rules.mask;
    const float scale = first_scale(args.rules), unit = shared.units[g] * (kFp8 ? kE4m3Unit : 1.0f);
    float weights[kHalves][2][4];
    most = kLowest;
#pragma unroll
    for (int h = 0; h < kHalves; h++)
#pragma unroll
      for (int e = 0; e < 2; e++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int token = 32 * h + 8 * t + 4 * e + j, key = first + token;
          float product = (scores[h][j][e] + scores[h][j][2 + e]) * unit;
          if constexpr (kCodes) product *= scratch.key_scales[token];
          if constexpr (kPlain) {
            weights[h][e][j] = (product + row.offset) * scale;
            most = fmaxf(most, weights[h][e][j]);
            continue;
          }
          const bool seen = key >= row.first && key < row.end && places.has(token) &&
                            (mask.kind == MaskKind::kNone || mask_shows(mask, row.rules.mask + key * mask.key_stride));
          weights[h][e][j] = seen ? apply_rules(args.rules, row.rules, key, (product + row.offset) * scale) : -INFINITY;
          most = fmaxf(most, weights[h][e][j]);
        }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
    total = 0;
#pragma unroll
    for (int h = 0; h < kHalves; h++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        float (&w)[4] = weights[h][e];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          w[j] = ptx::ex2(w[j] - most);
          total += w[j];
          if constexpr (kCodes) {
            if (kPlain || w[j] != 0.0f) w[j] *= scratch.value_scales[32 * h + 8 * t + 4 * e + j] * inverse;  // WHY: that of a hidden one may be NaN
          }
          w[j] *= kWeightUnit;
        }
        operand_of<T>(a[h][e], w[0], w[2], w[1], w[3]);
      }
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) total += __shfl_xor_sync(kAllLanes, total, lanes);
  }

  // ---- Weights times values: sums[j] is of columns kSpan * span + kColumns * n + j
  using SpanSums = float[kColumns][4];
  // The lane's 16 bytes of a span: of codes, index is h, or 2 h + e; of floats 8 h + 4 e + which of four tokens.
  template <bool kPlain>
  TAUT_DEVICE static uint4 load_values(const Args& args, const Rows& rows, const Places& places, const Bases& bases, int first, int span, int index, int lane) {
    if constexpr (kPlain) {
      const uint8_t* base = bases.of[kInt4 ? index : kCodes ? index / 2 : index / 8] + kSpan * span * kElement;
      return ptx::ld_global_nc_16(kInt4 ? base : kCodes ? base + index % 2 * kRowBytes : base + index % 8 * kRowBytes);
    }
    const int g = lane / 4, t = lane % 4, column = kSpan * span + kColumns * g;
    const int token = kInt4 ? 32 * index + 8 * t : kCodes ? 32 * (index / 2) + 8 * t + 4 * (index % 2) : 32 * (index / 8) + 8 * t + index % 8;
    const int columns = kCodes ? (args.Dv + 15) / 16 * 16 : args.Dv;
    const uint8_t* block = places.values[token / kBlock];
    if (block == nullptr || column >= columns || (!kCodes && first + token >= rows.length)) return make_uint4(0, 0, 0, 0);
    const int64_t row = kCodes ? token % kBlock / (kInt4 ? 8 : 4) * columns * 4 : token % kBlock * args.cache.v_row_stride;
    return ptx::ld_global_nc_16(block + row + column * kElement);
  }
  TAUT_DEVICE static void add_codes(SpanSums& sums, const uint4& words, const Weights& a, int index) {
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const uint32_t word = word_of(words, j);
      if constexpr (kInt4) {
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const FourHalves b = halves_of_nibbles(word, e == 1);
          mma<kSm, T>(sums[j], a[index][e], b.even, b.odd);
        }
      } else {
        const FourHalves b = halves_of_bytes(word ^ 0x80808080u);
        mma<kSm, T>(sums[j], a[index / 2][index % 2], b.even, b.odd);
      }
    }
  }
  // Of four tokens.
  TAUT_DEVICE static void add_floats(SpanSums& sums, const uint4 (&words)[kLoads], int begin, const uint32_t (&a)[4]) {
#pragma unroll
    for (int j = 0; j < kColumns; j++) {
      const auto pair = [&](int one, int other) {
        if constexpr (kFp8) {
          const uint32_t selector = static_cast<uint32_t>((4 + j % 4) << 12 | (j % 4) << 4);
          return halves_of_e4m3(ptx::prmt(word_of(words[begin + one], j / 4), word_of(words[begin + other], j / 4), selector));
        } else {
          return ptx::prmt(word_of(words[begin + one], j / 2), word_of(words[begin + other], j / 2), j % 2 ? 0x7632 : 0x5410);
        }
      };
      mma<kSm, T>(sums[j], a, pair(0, 2), pair(1, 3));
    }
  }

  // To sums of floats: those of the row that is no mma's. WHY: 0 times NaN is NaN, and a hidden key has the weight 0. Seldom: a warp comes here where
  // a sum is not finite, one of a NaN that is seen as well.
  TAUT_DEVICE static void add_one_by_one(SpanSums& sums, const Args& args, const Rows& rows, const Places& places, int first, int span, int lane,
                                         const Weights& a) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < kColumns; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[j][i] = 0;
#pragma unroll 1
    for (int token = 0; token < kUnit; token++) {
      // The weight is in pair `odd` of a[h][e] of lane t of the row.
      const int h = token / 32, e = token / 4 % 2, odd = token % 2, upper = token / 2 % 2;
      float weight = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t (&words)[4] = a[i / 2][i % 2];
        const uint32_t one = odd ? words[2] : words[0], other = odd ? words[3] : words[1];
        const auto number = [&](uint32_t word) {
          const uint32_t bits = upper ? word >> 16 : word & 0xffffu;
          if constexpr (std::is_same_v<T, __half>) return fp16_number(static_cast<uint16_t>(bits));
          else return __uint_as_float(bits << 16);
        };
        if (i == 2 * h + e) weight = number(one) + number(other);
      }
      weight = __shfl_sync(kAllLanes, weight, 4 * g + token / 8 % 4);
      const uint8_t* block = places.values[token / kBlock];
      if (weight == 0.0f || block == nullptr || first + token >= rows.length) continue;
      const uint8_t* row = block + token % kBlock * args.cache.v_row_stride;
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < kColumns; j++) {
          const int column = kSpan * span + kColumns * (2 * t + i) + j;
          if (column >= args.Dv) continue;
          float x;
          if constexpr (kFp8) x = from_e4m3(row[column]) * (1.0f / kE4m3Unit);
          else x = to_float(reinterpret_cast<const T*>(row)[column]);
          sums[j][i] = fmaf(weight, x, sums[j][i]);
        }
    }
  }

  // Before the queries are loaded: what the warp's first unit will want.
  TAUT_DEVICE static void begin(const Args& args, const Rows& rows, int unit, Scratch& scratch) {
    const int lane = threadIdx.x % 32;
    Places& places = scratch.places[unit / kWarps % 2];
    places.find(args, rows, unit, lane);
    __syncwarp();
    if (!is_plain(args, rows, places, unit * kUnit)) return;
    prefetch_keys(args, places, lane);
    prefetch(places.values, lane);
  }
  // Where the keys of a unit are is looked up while the one before it is attended to.
  TAUT_DEVICE static void attend(const Args& args, const Rows& rows, int unit, int next, const Shared& shared, Scratch& scratch, Sums<kRows, kWidth>& s_sums) {
    const int lane = threadIdx.x % 32, now = unit / kWarps % 2;
    if (next >= 0) scratch.places[1 - now].find(args, rows, next, lane);
    __syncwarp();
    // WHY not all: on sm_80 the registers of rows of 256 floats do not suffice for two loops.
    constexpr bool kHasPlain = kCodes || kWidth <= 128;
    if (kHasPlain && is_plain(args, rows, scratch.places[now], unit * kUnit)) attend_to<kHasPlain>(args, rows, unit, shared, scratch, s_sums);
    else attend_to<false>(args, rows, unit, shared, scratch, s_sums);
  }
  template <bool kPlain>
  TAUT_DEVICE static void attend_to(const Args& args, const Rows& rows, int unit, const Shared& shared, Scratch& scratch, Sums<kRows, kWidth>& s_sums) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = unit * kUnit;
    const Places& places = scratch.places[unit / kWarps % 2];
    float key_scale[2] = {}, value_scale[2] = {};
    if constexpr (kCodes) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (const int key = lane + 32 * i; kPlain || (first + key < rows.length && places.has(key))) {
          key_scale[i] = places.scale(args.cache.k_scales, key);
          value_scale[i] = places.scale(args.cache.v_scales, key);
        }
    }
    Scores scores = {};
    multiply_keys<kPlain>(scores, args, rows, shared, places, first, lane);
    float inverse = 1, value_unit = (kFp8 ? kE4m3Unit : 1.0f) / kWeightUnit;
    if constexpr (kCodes) {
      // Scales of values relative to the largest, as a power of 2: so fp16 has them, whatever they are.
      float largest = fmaxf(value_scale[0], value_scale[1]);
#pragma unroll
      for (int i = 0; i < 2; i++) scratch.key_scales[lane + 32 * i] = key_scale[i], scratch.value_scales[lane + 32 * i] = value_scale[i];
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, lanes));
      const uint32_t exponent = __float_as_uint(largest) & 0x7f800000u;
      inverse = __uint_as_float(0x7f000000u - exponent), value_unit *= __uint_as_float(exponent);
    }
    __syncwarp();
    Weights a;
    float most, total;
    weigh<kPlain>(a, most, total, scores, args, shared, places, scratch, first, lane, inverse);

    const float most_before = s_sums.most[g], total_before = s_sums.total[g];
    const Merge merge(most_before, most);
    __syncwarp();
    if (t == 0) s_sums.most[g] = merge.most, s_sums.total[g] = merge(total_before, total);
    const Bases bases = kPlain ? value_bases(places, lane) : Bases{};
#pragma unroll 1
    for (int begin = 0; begin < kSpans; begin += kBatchSpans) {
      SpanSums sums[kBatchSpans] = {};
      if constexpr (kCodes) {
        uint4 words[kBatchSpans][kSpanLoads];
#pragma unroll
        for (int s = 0; s < kBatchSpans; s++)
#pragma unroll
          for (int i = 0; i < kSpanLoads; i++) words[s][i] = load_values<kPlain>(args, rows, places, bases, first, begin + s, i, lane);
#pragma unroll
        for (int s = 0; s < kBatchSpans; s++)
#pragma unroll
          for (int i = 0; i < kSpanLoads; i++) add_codes(sums[s], words[s][i], a, i);
      } else {
        bool finite = true;
#pragma unroll
        for (int h = 0; h < kHalves; h++) {
          uint4 words[kLoads];
#pragma unroll
          for (int i = 0; i < kLoads; i++) words[i] = load_values<kPlain>(args, rows, places, bases, first, begin, kLoads * h + i, lane);
#pragma unroll
          for (int e = 0; e < 2; e++) add_floats(sums[0], words, 4 * e, a[h][e]);
        }
#pragma unroll
        for (int j = 0; j < kColumns; j++)
#pragma unroll
          for (int i = 0; i < 4; i++) finite = finite && fabsf(sums[0][j][i]) < INFINITY;
        if constexpr (!kPlain)
          if (!__all_sync(kAllLanes, finite)) add_one_by_one(sums[0], args, rows, places, first, begin, lane, a);
      }
#pragma unroll
      for (int s = 0; s < kBatchSpans; s++)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
          for (int j = 0; j < kColumns; j += 4) {
            float4& to = *reinterpret_cast<float4*>(&s_sums.values[g][kSpan * (begin + s) + kColumns * (2 * t + i) + j]);
            const auto sum = [&](int more) { return (sums[s][j + more][i] + sums[s][j + more][2 + i]) * value_unit; };
            const float4 before = to;
            to = make_float4(merge(before.x, sum(0)), merge(before.y, sum(1)), merge(before.z, sum(2)), merge(before.w, sum(3)));
          }
    }
    __syncwarp();
  }
};

// Blocks of a multiprocessor. TRIED: one more or one fewer, 3 to 25% slower.
template <int kSm, KvFormat kFormat, int kWidth>
constexpr int kMmaBlocks = kWidth > 128                ? 2
                           : has_codes(kFormat)        ? (kSm < 80 ? 3 : 4)
                           : kFormat == KvFormat::kFp8 ? 3
                                                       : 2;

template <int kSm, KvFormat kFormat, int kWidth>
__global__ void __launch_bounds__(kThreads, kMmaBlocks<kSm, kFormat, kWidth>) decode_mma(const Args args) {
  if constexpr (kCompiledFor<kSm>) {
    TAUT_DYNAMIC_SMEM(smem);
    walk<MmaUnit<kSm, kFormat, kWidth>>(args, smem);
  }
}

// ---- Host

inline const char* why_no_mma(const CudaParams& p) {
  if (p.cache.format == KvFormat::kFloat32) return "a float32 cache; tensor cores take 16 bits";
  if (!whole_chunks(p)) return "keys and values that do not lie in chunks of 16 bytes";
  return nullptr;
}

template <int kSm, KvFormat kFormat>
void start_mma(const CudaParams& p) {
  const auto start = [&]<int kWidth>() {
    using Unit = MmaUnit<kSm, kFormat, kWidth>;
    launch_decode(p, "attention_decode mma", decode_mma<kSm, kFormat, kWidth>, smem_bytes_of<Unit>(), kMmaBlocks<kSm, kFormat, kWidth>,
                  args_of(p, Unit::kRows));
  };
  const int64_t width = std::max(p.D, p.Dv);
  if (width > 128) return start.template operator()<256>();
  if constexpr (kFormat == KvFormat::kFp8) {
    start.template operator()<128>();  // WHY: eight lanes of 16 columns
  } else {
    if (width > 64) start.template operator()<128>();
    else start.template operator()<64>();
  }
}

}  // namespace
}  // namespace taut::attention_decode
