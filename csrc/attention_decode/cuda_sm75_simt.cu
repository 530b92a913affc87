// COMPUTES  out = softmax(q k^T) v and lse against a cache, with the rules of common/attention.h; q fp32, bf16 and fp16; all of it in fp32
// LAYOUT    q, out [B,H,L,D] by strides, rows contiguous; the cache as in common/kv_cache.h, every format
// WORK      cuda_split.cuh says who has which keys; a block has up to four rows. A warp asks for a unit's keys 16 bytes a lane, up to eight loads at
//           once: of floats a lane has some dims of a token, of codes some dims of four tokens. Its products are added up over lanes by a
//           tree that leaves each lane fewer keys, and go to shared memory, where a lane becomes two keys: the rules, the maximum,
//           weights. Then the values in the same way: of floats a lane has 16 bytes of a token's columns, of codes four columns of four
//           or eight tokens. The scale of a key's codes multiplies the score, that of a value's the weight, and channels q and out:
//           a code is an integer made a float by the mantissa of 2^23.
// BOUND     memory, as long as a number costs less than it takes to arrive: an FMA for each of four rows, and about two operations that make
//           it a float. bf16 on 132 multiprocessors that read 3.35 TB/s: 1.7e12 numbers a second, 6.7e12 FMAs of 33e12. fp32: half of it.
//           int4: 6.7e12 numbers, 27e12 FMAs and as many operations again: cuda_sm80_mma is for it.
//           Floats between which 16-byte loads do not fit (a head dim of 33, a view) are read one by one
// LIMITS    none: every format, head dims to 256, from SM 75 on
#include "attention_decode/cuda_split.cuh"

namespace taut::attention_decode::cuda_sm75_simt {
namespace {

constexpr int kLoads = 8;  // that a lane has under way at once
constexpr unsigned kAllLanes = 0xffffffffu;

// How a unit's keys (kValues: values), of kWidth numbers, lie over lanes and loads.
template <KvFormat kFormat, int kWidth, bool kValues>
struct Lanes {
  static constexpr bool kCodes = has_codes(kFormat), kInt4 = kFormat == KvFormat::kInt4, kCodeKeys = kCodes && !kValues;
  // 16 bytes are so many tokens, of so many dims each.
  static constexpr int kTokens = !kCodes ? 1 : !kValues ? 4 : kInt4 ? 8 : 4;
  static constexpr int kDims = kCodes ? (kInt4 ? 32 : 16) / kTokens : 16 / static_cast<int>(kv_element_bytes(kFormat));
  static constexpr int kChunks = kWidth / kDims;  // of a token
  // So many lanes share tokens, each has kLaneChunks of their chunks; the others have other tokens. Codes of keys lie chunk by chunk.
  static constexpr int kSharers = kCodeKeys ? 8 : kChunks < 32 ? kChunks : 32, kLaneChunks = kChunks / kSharers, kSlots = 32 / kSharers;
  static constexpr int kFirstBit = kCodeKeys ? kSlots : 1, kSlotBit = kCodeKeys ? 1 : kSharers;  // of a lane's number
  static constexpr int kAllSets = kUnit / (kSlots * kTokens);                                    // of kTokens tokens, of a lane
  // WHY at most two sets of keys' codes at once: each is four scores a row.
  static constexpr int kSets = std::min({kLoads / kLaneChunks, kAllSets, kCodeKeys ? 2 : kLoads}), kSteps = kAllSets / kSets;
  static_assert(kLaneChunks <= kLoads && kLaneChunks * kSharers == kChunks && kAllSets * kSlots * kTokens == kUnit && kSteps * kSets == kAllSets);

  TAUT_DEVICE static int sharer(int lane) { return lane / kFirstBit % kSharers; }
  // The first token, in the unit, of a lane's set, and which of their chunks its c-th is.
  TAUT_DEVICE static int token(int lane, int set) { return (set * kSlots + lane / kSlotBit % kSlots) * kTokens; }
  TAUT_DEVICE static int chunk(int lane, int c) { return c * kSharers + sharer(lane); }
};

// Adds v up over the kSharers lanes whose numbers differ in the bits from kBit on. Each is left with the first kCount / kSharers of v, or
// one that others have, too; which had the index that is returned.
template <int kCount, int kSharers, int kBit, int kSize>
TAUT_DEVICE int add_over_lanes(float (&v)[kSize], int lane) {
  if constexpr (kSharers == 1) {
    return 0;
  } else if constexpr (kCount == 1) {
    v[0] += __shfl_xor_sync(kAllLanes, v[0], kBit);
    return add_over_lanes<1, kSharers / 2, kBit * 2>(v, lane);
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const float sent = upper ? v[i] : v[i + kHalf], kept = upper ? v[i + kHalf] : v[i];
      v[i] = kept + __shfl_xor_sync(kAllLanes, sent, kBit);
    }
    return (upper ? kHalf : 0) + add_over_lanes<kHalf, kSharers / 2, kBit * 2>(v, lane);
  }
}

TAUT_DEVICE uint32_t word_of(const uint4& words, int i) { return i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w; }
TAUT_DEVICE float part_of(const float4& numbers, int i) { return i == 0 ? numbers.x : i == 1 ? numbers.y : i == 2 ? numbers.z : numbers.w; }

// A byte of a word less kZero. WHY not a conversion: a float's lowest bits are those of an integer added to 2^23, and those take one permutation.
template <int kZero>
TAUT_DEVICE float byte_number(uint32_t word, int byte) {
  return __uint_as_float(ptx::prmt(word, 0x4b000000u, 0x7440u + static_cast<uint32_t>(byte))) - (8388608.0f + kZero);
}

// Four numbers of floats: those from 4 j on of 16 bytes.
template <KvFormat kFormat>
TAUT_DEVICE void float_numbers(float (&x)[4], const uint4& words, int j) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (kFormat == KvFormat::kFloat32) {
      x[i] = __uint_as_float(word_of(words, i));
    } else if constexpr (kFormat == KvFormat::kFp8) {
      x[i] = from_e4m3(word_of(words, j) >> 8 * i & 0xffu);
    } else {
      const uint32_t word = word_of(words, 2 * j + i / 2);
      if constexpr (kFormat == KvFormat::kBFloat16) x[i] = __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
      else x[i] = i % 2 ? upper_half(word) : lower_half(word);
    }
  }
}

// 16 bytes of a row, `left` of whose numbers are still to come.
template <KvFormat kFormat, bool kAligned>
TAUT_DEVICE uint4 load_chunk(const uint8_t* p, int left) {
  if constexpr (kAligned) {
    return ptx::ld_global_nc_16(p);
  } else {
    constexpr int kBytes = static_cast<int>(kv_element_bytes(kFormat)), kPerWord = 4 / kBytes;
    uint32_t words[4] = {};
#pragma unroll
    for (int i = 0; i < 16 / kBytes; i++)
      if (i < left) {
        uint32_t bits;
        if constexpr (kBytes == 4) bits = reinterpret_cast<const uint32_t*>(p)[i];
        else if constexpr (kBytes == 2) bits = reinterpret_cast<const uint16_t*>(p)[i];
        else bits = p[i];
        words[i / kPerWord] |= bits << (i % kPerWord * 8 * kBytes % 32);
      }
    return make_uint4(words[0], words[1], words[2], words[3]);
  }
}

template <KvFormat kFormat, int kRowWidth, bool kAligned>
struct Unit {
  static constexpr int kRows = 4, kWidth = kRowWidth;
  static constexpr bool kCodes = has_codes(kFormat);
  using Keys = Lanes<kFormat, kWidth, false>;
  using Values = Lanes<kFormat, kWidth, true>;

  struct Shared {
    float4 q[kRows][kWidth / 4];  // times the channels' factors; the fours of a chunk kChunks apart, so that lanes read side by side
    Row rows[kRows];
  };
  struct Scratch {
    float4 weights[kUnit];  // of the rows
    float scores[kRows][kUnit];
    Places places;
  };

  TAUT_DEVICE static void load_queries(const Args& args, const Rows& rows, Shared& shared, Sums<kRows, kWidth>&) {
    const int r = threadIdx.x / 32, lane = threadIdx.x % 32;  // a warp has a row
    static_assert(kRows == kWarps);
    const int64_t at = r < rows.count ? rows.at(args, args.q, r) : 0;
    const float* channels = rows.channels(args);
    float offset = 0;
    for (int d = lane; d < kWidth; d += 32) {
      float x = r < rows.count && d < args.D ? load_number(args.q.data, at + d, args.dtype) : 0.0f;
      if (channels && d < args.D) offset = fmaf(x, channels[d], offset), x *= channels[args.D + args.Dv + d];
      reinterpret_cast<float*>(&shared.q[r][d % Keys::kDims / 4 * Keys::kChunks + d / Keys::kDims])[d % 4] = x;
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) offset += __shfl_xor_sync(kAllLanes, offset, lanes);
    if (lane == 0) shared.rows[r] = row_of(args, rows, r), shared.rows[r].offset = offset;
  }

  // ---- What a lane has of a step: zeros where there is nothing to read.
  struct KeyLoads {
    uint4 words[Keys::kSets][Keys::kLaneChunks];
    TAUT_DEVICE void load(const Args& args, const Rows& rows, const Places& places, int first, int step, int lane) {
#pragma unroll
      for (int i = 0; i < Keys::kSets; i++) {
        const int token = Keys::token(lane, step * Keys::kSets + i), in_block = token % static_cast<int>(kKvBlock);
        const uint8_t* block = places.keys[token / static_cast<int>(kKvBlock)];
        const bool there = block != nullptr && (kCodes || first + token < rows.length);
        const uint8_t* row = kCodes ? block + in_block * 4 : block + in_block * args.cache.k_row_stride;
#pragma unroll
        for (int c = 0; c < Keys::kLaneChunks; c++) {
          const int chunk = Keys::chunk(lane, c), d = chunk * Keys::kDims;
          words[i][c] = there && d < args.D ? load_chunk<kFormat, kAligned>(row + chunk * (kCodes ? 64 : 16), args.D - d) : make_uint4(0, 0, 0, 0);
        }
      }
    }
  };
  struct ValueLoads {
    uint4 words[Values::kSets][Values::kLaneChunks];
    TAUT_DEVICE void load(const Args& args, const Rows& rows, const Places& places, int first, int step, int lane) {
      const int columns = kCodes ? (args.Dv + 15) / 16 * 16 : args.Dv;
#pragma unroll
      for (int i = 0; i < Values::kSets; i++) {
        const int token = Values::token(lane, step * Values::kSets + i), in_block = token % static_cast<int>(kKvBlock);
        const uint8_t* block = places.values[token / static_cast<int>(kKvBlock)];
        const bool there = block != nullptr && (kCodes || first + token < rows.length);
        const uint8_t* row = kCodes ? block + in_block / Values::kTokens * columns * 4 : block + in_block * args.cache.v_row_stride;
#pragma unroll
        for (int c = 0; c < Values::kLaneChunks; c++) {
          const int chunk = Values::chunk(lane, c), d = chunk * Values::kDims;
          words[i][c] = there && d < columns ? load_chunk<kFormat, kAligned>(row + chunk * 16, columns - d) : make_uint4(0, 0, 0, 0);
        }
      }
    }
  };

  // ---- Products of q and a step's keys, to scores
  TAUT_DEVICE static void multiply(const KeyLoads& loads, const Shared& shared, Scratch& scratch, int step, int lane) {
    constexpr int kKeys = Keys::kSets * Keys::kTokens;
    float products[kRows][kKeys] = {};
#pragma unroll
    for (int c = 0; c < Keys::kLaneChunks; c++)
#pragma unroll
      for (int j = 0; j < Keys::kDims / 4; j++) {
        float4 q[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) q[r] = shared.q[r][j * Keys::kChunks + Keys::chunk(lane, c)];
#pragma unroll
        for (int key = 0; key < kKeys; key++) {
          const uint4& words = loads.words[key / Keys::kTokens][c];
          float x[4];
          if constexpr (kCodes) {
            uint32_t word = word_of(words, key % Keys::kTokens);
            if constexpr (Keys::kInt4) word = word >> 4 * j & 0x0f0f0f0fu;
#pragma unroll
            for (int e = 0; e < 4; e++) x[e] = byte_number<Keys::kInt4 ? 8 : 128>(word, e);
          } else {
            float_numbers<kFormat>(x, words, j);
          }
#pragma unroll
          for (int r = 0; r < kRows; r++)
#pragma unroll
            for (int e = 0; e < 4; e++) products[r][key] = fmaf(x[e], part_of(q[r], e), products[r][key]);
        }
      }
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const int first = add_over_lanes<kKeys, Keys::kSharers, Keys::kFirstBit>(products[r], lane);
      if (Keys::sharer(lane) >= kKeys) continue;
#pragma unroll
      for (int i = 0; i < std::max(1, kKeys / Keys::kSharers); i++) {
        const int key = first + i;
        scratch.scores[r][Keys::token(lane, step * Keys::kSets + key / Keys::kTokens) + key % Keys::kTokens] = products[r][i];
      }
    }
  }

  // ---- Scores to weights, by what they are to be multiplied by; the maximum of each row and the sum of its weights
  TAUT_DEVICE static void weigh(const Args& args, const Rows& rows, const Shared& shared, Scratch& scratch, int first, int lane, const float (&key_scale)[2],
                                const float (&value_scale)[2], float (&most)[kRows], float (&total)[kRows]) {
    const float scale = first_scale(args.rules);
    const AttentionMask& mask = args.rules.mask;
    float weights[kRows][2];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      const Row& row = shared.rows[r];
      float highest = kLowest;
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int key = lane + 32 * i, j = first + key;
        float product = scratch.scores[r][key];
        if constexpr (kCodes) product *= key_scale[i];
        const bool seen = j >= row.first && j < row.end && scratch.places.has(key) &&
                          (mask.kind == MaskKind::kNone || mask_shows(mask, row.rules.mask + j * mask.key_stride));
        weights[r][i] = seen ? apply_rules(args.rules, row.rules, j, (product + row.offset) * scale) : -INFINITY;
        highest = fmaxf(highest, weights[r][i]);
      }
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, lanes));
      most[r] = highest;
#pragma unroll
      for (int i = 0; i < 2; i++) weights[r][i] = exp2f(weights[r][i] - highest);
      total[r] = weights[r][0] + weights[r][1];
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) total[r] += __shfl_xor_sync(kAllLanes, total[r], lanes);
      if constexpr (kCodes) {
#pragma unroll
        for (int i = 0; i < 2; i++)
          if (weights[r][i] != 0.0f) weights[r][i] *= value_scale[i];  // WHY: the scale of a hidden one may be NaN
      }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) scratch.weights[lane + 32 * i] = make_float4(weights[0][i], weights[1][i], weights[2][i], weights[3][i]);
  }

  // ---- Sums of a step's values
  static constexpr int kColumns = Values::kLaneChunks * Values::kDims;
  TAUT_DEVICE static void add_values(float (&sums)[kRows][kColumns], const ValueLoads& loads, const Scratch& scratch, int step, int lane) {
#pragma unroll
    for (int i = 0; i < Values::kSets; i++) {
      const int token = Values::token(lane, step * Values::kSets + i);
#pragma unroll
      for (int t = 0; t < Values::kTokens; t++) {
        const float4 weight = scratch.weights[token + t];
#pragma unroll
        for (int c = 0; c < Values::kLaneChunks; c++) {
          const uint4& words = loads.words[i][c];
#pragma unroll
          for (int j = 0; j < Values::kDims / 4; j++) {
            float x[4];
            if constexpr (kCodes) {
#pragma unroll
              for (int e = 0; e < 4; e++) {
                const uint32_t word = word_of(words, e);
                if constexpr (Keys::kInt4) x[e] = byte_number<8>(word >> t / 4 * 4 & 0x0f0f0f0fu, t % 4);
                else x[e] = byte_number<128>(word ^ 0x80808080u, t);
              }
            } else {
              float_numbers<kFormat>(x, words, j);
            }
#pragma unroll
            for (int r = 0; r < kRows; r++)
              if (kCodes || part_of(weight, r) != 0.0f) {  // WHY: 0 times a NaN is NaN, and a hidden key has the weight 0
#pragma unroll
                for (int e = 0; e < 4; e++) {
                  float& sum = sums[r][c * Values::kDims + j * 4 + e];
                  sum = fmaf(part_of(weight, r), x[e], sum);
                }
              }
          }
        }
      }
    }
  }

  TAUT_DEVICE static void begin(const Args&, const Rows&, int, Scratch&) {}
  TAUT_DEVICE static void attend(const Args& args, const Rows& rows, int unit, int, const Shared& shared, Scratch& scratch, Sums<kRows, kWidth>& s_sums) {
    const int lane = threadIdx.x % 32, first = unit * kUnit;
    scratch.places.find(args, rows, unit, lane);
    __syncwarp();
    float key_scale[2] = {}, value_scale[2] = {};
    if constexpr (kCodes) {
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (const int key = lane + 32 * i; first + key < rows.length && scratch.places.has(key)) {
          key_scale[i] = scratch.places.scale(args.cache.k_scales, key);
          value_scale[i] = scratch.places.scale(args.cache.v_scales, key);
        }
    }
    KeyLoads keys, next_keys;
    next_keys.load(args, rows, scratch.places, first, 0, lane);
#pragma unroll 1
    for (int step = 0; step < Keys::kSteps; step++) {
      keys = next_keys;
      if (step + 1 < Keys::kSteps) next_keys.load(args, rows, scratch.places, first, step + 1, lane);
      multiply(keys, shared, scratch, step, lane);
    }
    ValueLoads values, next_values;
    next_values.load(args, rows, scratch.places, first, 0, lane);
    __syncwarp();
    float most[kRows], total[kRows];
    weigh(args, rows, shared, scratch, first, lane, key_scale, value_scale, most, total);
    __syncwarp();
    float sums[kRows][kColumns] = {};
#pragma unroll 1
    for (int step = 0; step < Values::kSteps; step++) {
      values = next_values;
      if (step + 1 < Values::kSteps) next_values.load(args, rows, scratch.places, first, step + 1, lane);
      add_values(sums, values, scratch, step, lane);
    }

    int column = 0;
    float merged_most[kRows], merged_total[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
      column = add_over_lanes<kColumns, Values::kSlots, Values::kSlotBit>(sums[r], lane);
      const Merge merge(s_sums.most[r], most[r]);
      merged_most[r] = merge.most, merged_total[r] = merge(s_sums.total[r], total[r]);
#pragma unroll
      for (int i = 0; i < kColumns / Values::kSlots; i++) {
        const int d = Values::chunk(lane, (column + i) / Values::kDims) * Values::kDims + (column + i) % Values::kDims;
        s_sums.values[r][d] = merge(s_sums.values[r][d], sums[r][i]);
      }
    }
    __syncwarp();
    if (lane == 0) {
#pragma unroll
      for (int r = 0; r < kRows; r++) s_sums.most[r] = merged_most[r], s_sums.total[r] = merged_total[r];
    }
    __syncwarp();
  }
};

// WHY 2 of one: with 3 its registers do not suffice.
template <KvFormat kFormat, int kWidth>
constexpr int kSimtBlocks = kFormat == KvFormat::kBFloat16 && kWidth == 128 ? 2 : 3;

template <KvFormat kFormat, int kWidth>
__global__ void __launch_bounds__(kThreads, kSimtBlocks<kFormat, kWidth>) decode_simt(const Args args) {
  TAUT_DYNAMIC_SMEM(smem);
  walk<Unit<kFormat, kWidth, true>>(args, smem);
}
template <KvFormat kFormat>
__global__ void __launch_bounds__(kThreads, 2) decode_simt_unaligned(const Args args) {
  TAUT_DYNAMIC_SMEM(smem);
  walk<Unit<kFormat, 256, false>>(args, smem);
}

template <KvFormat kFormat, int kWidth>
void start(const CudaParams& p) {
  using ThisUnit = Unit<kFormat, kWidth, true>;
  launch_decode(p, "attention_decode simt", decode_simt<kFormat, kWidth>, smem_bytes_of<ThisUnit>(), kSimtBlocks<kFormat, kWidth>, args_of(p, ThisUnit::kRows));
}
template <KvFormat kFormat>
void start_unaligned(const CudaParams& p) {
  using ThisUnit = Unit<kFormat, 256, false>;
  launch_decode(p, "attention_decode simt", decode_simt_unaligned<kFormat>, smem_bytes_of<ThisUnit>(), 2, args_of(p, ThisUnit::kRows));
}

// WHY few instances: tensor cores take all but float32 caches (and bf16 ones where q is float32 or before sm_80). What is left for this kernel
// of the other formats is what does not lie in chunks of 16 bytes, and codes where it is asked for by name.
template <KvFormat kFormat>
void start_format(const CudaParams& p) {
  if constexpr (has_codes(kFormat)) {
    start<kFormat, 256>(p);
  } else if constexpr (kFormat == KvFormat::kFp8 || kFormat == KvFormat::kFloat16) {
    start_unaligned<kFormat>(p);
  } else {
    const int64_t width = std::max(p.D, p.Dv);
    if (!whole_chunks(p)) start_unaligned<kFormat>(p);
    else if (width <= 64) start<kFormat, 64>(p);
    else if (width <= 128) start<kFormat, 128>(p);
    else start<kFormat, 256>(p);
  }
}

}  // namespace

int64_t workspace_bytes(const CudaParams& p) { return workspace_bytes_of(p, 4); }

void run(const CudaParams& p) {
  switch (p.cache.format) {
    case KvFormat::kFloat32: return start_format<KvFormat::kFloat32>(p);
    case KvFormat::kBFloat16: return start_format<KvFormat::kBFloat16>(p);
    case KvFormat::kFloat16: return start_format<KvFormat::kFloat16>(p);
    case KvFormat::kFp8: return start_format<KvFormat::kFp8>(p);
    case KvFormat::kInt8: return start_format<KvFormat::kInt8>(p);
    case KvFormat::kInt4: return start_format<KvFormat::kInt4>(p);
  }
}

}  // namespace taut::attention_decode::cuda_sm75_simt
