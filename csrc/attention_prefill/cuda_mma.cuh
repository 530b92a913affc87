// The skeleton of cuda_sm75_mma and cuda_sm80_mma: flash attention on mma.sync.
//
// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; fp16 or bf16; products and sums in fp32. The weights,
//           between 0 and 1 and relative to the largest so far, are rounded to the dtype for the second product, not for lse.
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows of 16-byte chunks (else they are copied once, attention_align). In shared memory rows
//           of kWidth numbers, chunk c of row r at c ^ (r % 8), so that ldmatrix and cp.async meet no bank conflict.
// WORK      A block has kRows rows (attention_rows.cuh), a warp 16 or 32 of them, and goes over tiles of kKeys keys: both products from shared
//           memory, the next tile of k and v on its way meanwhile (cp.async; sm_75: through registers). The weights of a tile stay in
//           registers: the accumulators of q k^T are the A operand of the other product. Softmax online, in exponents of 2.
//           Tiles that no row of the block sees by causality and window are not read, tiles that no row of a warp sees not computed.
//           Hidden keys have the weight 0, but 0 times NaN is NaN: a warp whose sums are not finite sets its flag, and
//           cuda_sm75_simt::repair computes its rows again.
// BOUND     Tensor cores: 2 * 16 * kKeys * D multiply-adds a fragment of rows and tile. A warp of 32 rows reads 16 bytes of shared memory a
//           lane for 4 mma.m16n8k16, half of what an SM can deliver meanwhile; of 16 rows for 2, all of it.
// LIMITS    fp16 or bf16 (sm_75: fp16)
#pragma once

#include "attention_prefill/cuda_rows.cuh"
#include "common/attention_mma.cuh"

namespace taut::attention_prefill {
namespace {

// WHY in shared memory: what a thread wants once a tile, or at the end, must not take registers from the sums.
struct Shared {
  Block block;
  const unsigned char *k, *v;  // of the first key
};

// kWidth: the numbers of a row of q, k and v in shared memory, which D and Dv do not exceed.
template <int kWidth_, int kWarps_, int kRowTiles_, int kKeys_, bool kKeepQ_>
struct Tile {
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRowTiles_, kWarpRows = 16 * kRowTiles, kRows = kWarps * kWarpRows;
  static constexpr int kKeys = kKeys_, kStages = 2;
  static constexpr bool kKeepQ = kKeepQ_;  // in registers
  static constexpr int kChunks = kWidth / 8, kRowBytes = kWidth * 2;
  static constexpr int kTileBytes = kKeys * kRowBytes, kStageBytes = 2 * kTileBytes, kQueryBytes = kRows * kRowBytes;
  static constexpr int kSmemBytes = kQueryBytes + kStages * kStageBytes + kRows * static_cast<int>(sizeof(RowRules)) + static_cast<int>(sizeof(Shared));
  static_assert(kKeys % 16 == 0 && kKeys <= 64 && kWidth % 32 == 0);

  TAUT_DEVICE static int offset(int row, int chunk) { return chunk_offset<kChunks>(row, chunk); }
};

// A tile of k or v on its way to shared memory.
template <bool kDeferred, class Tile>
struct Loader {
  static constexpr int kCount = (Tile::kKeys * Tile::kChunks + Tile::kThreads - 1) / Tile::kThreads;
  static constexpr bool kWhole = Tile::kKeys * Tile::kChunks % Tile::kThreads == 0;
  Chunk<kDeferred> chunks[kCount];

  // Keys from `key` on, up to `keys`; chunks past the end of a row, or of the keys, are zeros.
  TAUT_DEVICE void fetch(unsigned char* s_tile, const unsigned char* source, int64_t row_bytes, int key, int keys, int width) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int c = threadIdx.x + i * Tile::kThreads, row = c / Tile::kChunks, chunk = c % Tile::kChunks;
      if (!kWhole && row >= Tile::kKeys) break;
      const bool there = key + row < keys && chunk * 8 < width;
      chunks[i].fetch(s_tile + Tile::offset(row, chunk), there ? source + (key + row) * row_bytes + chunk * 16 : source, there ? 16 : 0);
    }
  }
  TAUT_DEVICE void land(unsigned char* s_tile) {
#pragma unroll
    for (int i = 0; i < kCount; i++) {
      const int c = threadIdx.x + i * Tile::kThreads, row = c / Tile::kChunks;
      if (!kWhole && row >= Tile::kKeys) break;
      chunks[i].land(s_tile + Tile::offset(row, c % Tile::kChunks));
    }
  }
};

// A warp's rows: the sums over v, the maximum and the total weight so far. Row 16 m + 8 h + g is lane g * 4 + t's, columns 2t, 2t+1 of each 8.
template <int kSm, class T, bool kRules, class Tile>
struct Warp {
  static constexpr int kRowTiles = Tile::kRowTiles, kSteps = Tile::kWidth / 16, kColumns8 = Tile::kWidth / 8, kKeys8 = Tile::kKeys / 8;
  float sums[kRowTiles][kColumns8][4];
  float most[kRowTiles][2], total[kRowTiles][2];              // total: of this lane's keys, and the sink
  uint32_t queries[Tile::kKeepQ ? kSteps : 1][kRowTiles][4];  // if they are not kept, the step's
  int lane;

  TAUT_DEVICE void start(const Args& args, const Block& block, int first_row) {
    lane = threadIdx.x % 32;
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int n = 0; n < kColumns8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[m][n][i] = 0;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        most[m][h] = sink_of(args, block, first_row + 16 * m + 8 * h + lane / 4);
        total[m][h] = most[m][h] > kLowest && lane % 4 == 0 ? 1.0f : 0.0f;
      }
    }
  }

  TAUT_DEVICE void load_queries(uint32_t (&a)[kRowTiles][4], const unsigned char* s_q, int warp_row, int step) const {
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) ptx::ldmatrix_x4(a[m], s_q + Tile::offset(warp_row + 16 * m + lane % 16, 2 * step + lane / 16));
  }
  TAUT_DEVICE void keep_queries(const unsigned char* s_q, int warp_row) {
    if constexpr (Tile::kKeepQ) {
#pragma unroll
      for (int step = 0; step < kSteps; step++) load_queries(queries[step], s_q, warp_row, step);
    }
  }

  // Which of this lane's scores count: bit 4 n + i of word m.
  TAUT_DEVICE void find_visible(uint32_t (&visible)[kRowTiles], const Args& args, int keys, const RowRules* s_rules, int key) const {
    const AttentionMask& mask = args.rules.mask;
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
      visible[m] = 0;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const RowRules row = s_rules[16 * m + 8 * h + lane / 4];
        const int first = static_cast<int>(first_key(args.rules, row.position)), end = static_cast<int>(end_key(args.rules, row.position, keys));
#pragma unroll
        for (int n = 0; n < kKeys8; n++)
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int j = key + 8 * n + 2 * (lane % 4) + e;
            bool seen = j >= first && j < end;
            if constexpr (kRules) seen = seen && (mask.kind == MaskKind::kNone || mask_shows(mask, row.mask + j * mask.key_stride));
            visible[m] |= static_cast<uint32_t>(seen) << (4 * n + 2 * h + e);
          }
      }
    }
  }

  // s = q k^T.
  TAUT_DEVICE void multiply_keys(float (&s)[kRowTiles][kKeys8][4], const unsigned char* s_q, const unsigned char* s_k, int warp_row) {
#pragma unroll
    for (int m = 0; m < kRowTiles; m++)
#pragma unroll
      for (int n = 0; n < kKeys8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) s[m][n][i] = 0;
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      uint32_t (&a)[kRowTiles][4] = queries[Tile::kKeepQ ? step : 0];
      if constexpr (!Tile::kKeepQ) load_queries(a, s_q, warp_row, step);
#pragma unroll
      for (int n = 0; n < kKeys8; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, s_k + Tile::offset(8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          mma<kSm, T>(s[m][n], a[m], b[0], b[1]);
          mma<kSm, T>(s[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Scores to weights; what was summed before shrinks where the maximum grew.
  TAUT_DEVICE void weigh(float (&s)[kRowTiles][kKeys8][4], const Args& args, const RowRules* s_rules, int key, bool hides,
                         const uint32_t (&visible)[kRowTiles]) {
    const float scale = first_scale(args.rules);
    float shrink[kRowTiles][2];
    bool grew = false;
#pragma unroll
    for (int m = 0; m < kRowTiles; m++) {
#pragma unroll
      for (int n = 0; n < kKeys8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float& score = s[m][n][i];
          if constexpr (kRules) {
            const bool seen = !hides || (visible[m] >> (4 * n + i) & 1);
            score = seen ? apply_rules(args.rules, s_rules[16 * m + 8 * (i / 2) + lane / 4], key + 8 * n + 2 * (lane % 4) + i % 2, score * scale) : -INFINITY;
          } else if (hides && !(visible[m] >> (4 * n + i) & 1)) {
            score = -INFINITY;
          }
        }
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float highest = s[m][0][2 * h];
#pragma unroll
        for (int n = 0; n < kKeys8; n++) highest = fmaxf(highest, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        // WHY scaled after the maximum: one fma makes the exponent of 2, so the scale must be positive without rules
        highest = fmaxf(most[m][h], kRules ? highest : highest * scale);
        shrink[m][h] = ptx::ex2(most[m][h] - highest);
        grew |= most[m][h] != highest;
        most[m][h] = highest;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < kKeys8; n++)
#pragma unroll
          for (int e = 2 * h; e < 2 * h + 2; e++) {
            s[m][n][e] = ptx::ex2(kRules ? s[m][n][e] - highest : fmaf(s[m][n][e], scale, -highest));
            sum += s[m][n][e];
          }
        total[m][h] = fmaf(total[m][h], shrink[m][h], sum);
      }
    }
    if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
      for (int m = 0; m < kRowTiles; m++)
#pragma unroll
        for (int n = 0; n < kColumns8; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) sums[m][n][i] *= shrink[m][i / 2];
    }
  }

  // sums += s v.
  TAUT_DEVICE void add_values(const float (&s)[kRowTiles][kKeys8][4], const unsigned char* s_v) {
#pragma unroll
    for (int step = 0; step < kKeys8 / 2; step++) {
      uint32_t a[kRowTiles][4];
#pragma unroll
      for (int m = 0; m < kRowTiles; m++) {
        const float (&low)[4] = s[m][2 * step], (&high)[4] = s[m][2 * step + 1];
        a[m][0] = pack<T>(low[0], low[1]), a[m][1] = pack<T>(low[2], low[3]);
        a[m][2] = pack<T>(high[0], high[1]), a[m][3] = pack<T>(high[2], high[3]);
      }
#pragma unroll
      for (int n = 0; n < kColumns8; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, s_v + Tile::offset(16 * step + lane % 16, n + lane / 16));
#pragma unroll
        for (int m = 0; m < kRowTiles; m++) {
          mma<kSm, T>(sums[m][n], a[m], b[0], b[1]);
          mma<kSm, T>(sums[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Divides by the totals, rounds, turns rows through s_rows (this warp's part of q, which it has read), and stores 16 bytes a lane.
  TAUT_DEVICE void finish(const Args& args, const Block& block, unsigned char* s_rows, int first_row) {
    float nothing = 0;  // NaN, if a sum is not finite
#pragma unroll
    for (int m = 0; m < kRowTiles; m++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        total[m][h] += __shfl_xor_sync(0xffffffffu, total[m][h], 1);
        total[m][h] += __shfl_xor_sync(0xffffffffu, total[m][h], 2);
        const int in_warp = 16 * m + 8 * h + lane / 4, row = first_row + in_warp;
        const float inverse = inverse_of(total[m][h]);
#pragma unroll
        for (int n = 0; n < kColumns8; n++) {
          nothing = fmaf(sums[m][n][2 * h], 0.0f, fmaf(sums[m][n][2 * h + 1], 0.0f, nothing));
          *reinterpret_cast<uint32_t*>(s_rows + Tile::offset(in_warp, n) + lane % 4 * 4) =
              pack<T>(sums[m][n][2 * h] * inverse, sums[m][n][2 * h + 1] * inverse);
        }
        if (lane % 4 == 0 && row < block.rows) args.lse[block.lse_at(args, row)] = lse_of_row(total[m][h], most[m][h]);
      }
    const bool finite = !__any_sync(0xffffffffu, nothing != 0.0f);
    if (args.flags && lane == 0)
      args.flags[(int64_t{block.b} * args.kv_heads + block.kv_head) * args.flags_per_head + first_row / Tile::kWarpRows] = finite ? 0 : 1;
    __syncwarp();
    const bool aligned = args.Dv % 8 == 0;
#pragma unroll 1
    for (int c = lane; c < Tile::kWarpRows * Tile::kChunks; c += 32) {
      const int in_warp = c / Tile::kChunks, row = first_row + in_warp, d = c % Tile::kChunks * 8;
      if (row >= block.rows || d >= args.Dv) continue;
      T* g_out = static_cast<T*>(const_cast<void*>(args.out.data)) + block.query_at(args, args.out, row) + d;
      const unsigned char* s_chunk = s_rows + Tile::offset(in_warp, c % Tile::kChunks);
      if (aligned) {
        ptx::st_global_16(g_out, *reinterpret_cast<const uint4*>(s_chunk));
      } else {
#pragma unroll 1
        for (int e = 0; e < 8 && d + e < args.Dv; e++) g_out[e] = reinterpret_cast<const T*>(s_chunk)[e];
      }
    }
  }
};

// kRules: softcap, ALiBi, a mask, or a scale that is not positive.
template <int kSm, class T, bool kRules, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) attention_mma(const Args args) {
  if constexpr (kCompiledFor<kSm>) {
    constexpr bool kAsync = kSm >= 80;
    const Block block = Block::mine(args, Tile::kRows);
    if (block.first_row >= block.rows) return;
    TAUT_DYNAMIC_SMEM(smem);
    unsigned char *s_q = smem, *s_stages = smem + Tile::kQueryBytes;
    RowRules* s_rules = reinterpret_cast<RowRules*>(s_stages + Tile::kStages * Tile::kStageBytes);
    Shared& s_shared = *reinterpret_cast<Shared*>(s_rules + Tile::kRows);
    const int warp = threadIdx.x / 32, warp_row = warp * Tile::kWarpRows, first_row = block.first_row + warp_row;

    if (threadIdx.x == 0) {
      const auto first = [&](const Heads& heads) { return static_cast<const unsigned char*>(heads.data) + block.keys_at(heads) * 2; };
      s_shared = {block, first(args.k), first(args.v)};
    }
    for (int r = threadIdx.x; r < Tile::kRows; r += Tile::kThreads) s_rules[r] = rules_of_row(args, block, block.first_row + r);
#pragma unroll 1
    for (int c = threadIdx.x; c < Tile::kRows * Tile::kChunks; c += Tile::kThreads) {
      const int row = block.first_row + c / Tile::kChunks, chunk = c % Tile::kChunks;
      const bool there = row < block.rows && chunk * 8 < args.D;
      const T* source = static_cast<const T*>(args.q.data) + (there ? block.query_at(args, args.q, row) + chunk * 8 : 0);
      Chunk<!kAsync> bytes;
      bytes.fetch(s_q + Tile::offset(c / Tile::kChunks, chunk), source, there ? 16 : 0);
      bytes.land(s_q + Tile::offset(c / Tile::kChunks, chunk));
    }
    const KeyRange keys(args.rules, block.position(args, block.first_row), block.position(args, block.first_row + Tile::kRows - 1), block.Lk);
    Warp<kSm, T, kRules, Tile> rows;
    rows.start(args, block, first_row);
    __syncthreads();

    Loader<!kAsync, Tile> loader;
    const auto fetch_k = [&](unsigned char* s_stage, int key) { loader.fetch(s_stage, s_shared.k, args.k.row_stride * 2, key, s_shared.block.Lk, args.D); };
    const auto fetch_v = [&](unsigned char* s_stage, int key) {
      loader.fetch(s_stage + Tile::kTileBytes, s_shared.v, args.v.row_stride * 2, key, s_shared.block.Lk, args.Dv);
    };
    // WHY tiles begin at multiples of kKeys: then a row's sums do not depend on the rows around it.
    int key = keys.first / Tile::kKeys * Tile::kKeys, slot = 0;
    if (key < keys.end) {
      fetch_k(s_stages, key), loader.land(s_stages);
      fetch_v(s_stages, key), loader.land(s_stages + Tile::kTileBytes);
    }
    if constexpr (kAsync) ptx::cp_async_commit();
    if constexpr (Tile::kKeepQ) {
      if constexpr (kAsync) ptx::cp_async_wait<0>();
      __syncthreads();
      rows.keep_queries(s_q, warp_row);
    }
#pragma unroll 1
    for (; key < keys.end; key += Tile::kKeys) {
      unsigned char *s_k = s_stages + slot * Tile::kStageBytes, *s_v = s_k + Tile::kTileBytes, *s_next = s_stages + (slot ^ 1) * Tile::kStageBytes;
      if constexpr (kAsync) ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all; and all are done with the one that is refilled now
      const bool more = key + Tile::kKeys < keys.end;
      if (more) {
        fetch_k(s_next, key + Tile::kKeys);
        if constexpr (kAsync) {
          fetch_v(s_next, key + Tile::kKeys);
          ptx::cp_async_commit();
        }
      }

      const KeyRange mine(args.rules, s_rules[warp_row].position, s_rules[warp_row + Tile::kWarpRows - 1].position, s_shared.block.Lk);
      bool computes = first_row < s_shared.block.rows && key < mine.end && key + Tile::kKeys > mine.first;
      const bool hides = (kRules && args.rules.mask.kind != MaskKind::kNone) || key < mine.all_from || key + Tile::kKeys > mine.all_to;
      uint32_t visible[Tile::kRowTiles] = {};
      if (computes && hides) {
        rows.find_visible(visible, args, s_shared.block.Lk, s_rules + warp_row, key);
        uint32_t any = 0;
#pragma unroll
        for (int m = 0; m < Tile::kRowTiles; m++) any |= visible[m];
        computes = __any_sync(0xffffffffu, any != 0);
      }
      float s[Tile::kRowTiles][Tile::kKeys / 8][4];
      if (computes) rows.multiply_keys(s, s_q, s_k, warp_row);
      if constexpr (!kAsync) {
        if (more) loader.land(s_next), fetch_v(s_next, key + Tile::kKeys);
      }
      if (computes) {
        rows.weigh(s, args, s_rules + warp_row, key, hides, visible);
        rows.add_values(s, s_v);
      }
      if constexpr (!kAsync) {
        if (more) loader.land(s_next + Tile::kTileBytes);
      }
      slot ^= 1;
    }
    if constexpr (kAsync) ptx::cp_async_wait<0>();
    __syncthreads();  // where there was no tile, q may be still on its way to where rows are turned
    if (first_row < s_shared.block.rows) rows.finish(args, s_shared.block, s_q + warp_row * Tile::kRowBytes, first_row);
  }
}

// ---- Host --------------------------------------------------------------------------------------------------------------

// What is in the workspace: the flags, then copies of those of q, k and v that must be aligned. 0: not there.
struct Plan {
  int flags_per_head;
  int64_t flag_bytes, copy_bytes[3];
  int64_t bytes() const { return flag_bytes + copy_bytes[0] + copy_bytes[1] + copy_bytes[2]; }
};

template <class Tile>
Plan make_plan(const CudaParams& p) {
  const auto copy = [&](const Heads& t, int64_t heads, int64_t rows, int64_t width) { return aligned_bytes(t, p.cu_seqlens_q ? 1 : p.B, heads, rows, width); };
  Plan plan{};
  plan.flags_per_head = static_cast<int>((p.Lq * (p.Hq / p.Hkv) + Tile::kWarpRows - 1) / Tile::kWarpRows);
  // Only where a key is hidden from one row and read for another can a sum lack what it should not have met.
  const bool hides = p.rules.causal || p.rules.window || p.rules.mask.kind != MaskKind::kNone;
  plan.flag_bytes = hides ? whole_256(p.B * p.Hkv * plan.flags_per_head * 4) : 0;
  plan.copy_bytes[0] = copy(p.q, p.Hq, p.q_rows, p.D);
  plan.copy_bytes[1] = copy(p.k, p.Hkv, p.k_rows, p.D);
  plan.copy_bytes[2] = copy(p.v, p.Hkv, p.k_rows, p.Dv);
  return plan;
}

// Tiles by head dim. Two blocks of an SM are 8 warps, more where shared memory (sm_86, 89 and 120: 99 KB) and registers allow.
template <int kSm>
struct Tiles {
  using W64 = Tile<64, 4, 2, 64, true>;
  using W96 = Tile<96, 4, 2, 32, false>;
  using W128 = Tile<128, 4, 2, 32, false>;
  using W192 = Tile<192, 4, 1, 32, false>;
  using W256 = Tile<256, 4, 1, 32, false>;
};
template <>
struct Tiles<75> {  // 64 KB of shared memory, and registers that hold a tile of k or v
  using W64 = Tile<64, 4, 1, 64, true>;
  using W96 = Tile<96, 4, 1, 32, false>;
  using W128 = Tile<128, 4, 1, 32, false>;
  using W192 = Tile<192, 4, 1, 16, false>;
  using W256 = Tile<256, 3, 1, 16, false>;
};

// Calls f.template operator()<Tile>() for the tile of this call.
template <int kSm, class F>
auto with_tile(const CudaParams& p, const F& f) {
  const int64_t width = std::max(p.D, p.Dv);
  if (width <= 64) return f.template operator()<typename Tiles<kSm>::W64>();
  if (width <= 96) return f.template operator()<typename Tiles<kSm>::W96>();
  if (width <= 128) return f.template operator()<typename Tiles<kSm>::W128>();
  if (width <= 192) return f.template operator()<typename Tiles<kSm>::W192>();
  return f.template operator()<typename Tiles<kSm>::W256>();
}

template <int kSm>
int64_t workspace_bytes_for(const CudaParams& p) {
  return with_tile<kSm>(p, [&]<class Tile>() { return make_plan<Tile>(p).bytes(); });
}

template <int kSm, class T>
void run_for(const CudaParams& p) {
  with_tile<kSm>(p, [&]<class Tile>() {
    // What every device of the generation gives a block.
    static_assert(Tile::kSmemBytes <= (kSm >= 80 ? 99 : 64) * 1024);
    const Plan plan = make_plan<Tile>(p);
    Args args = args_of(p);
    auto* at = static_cast<unsigned char*>(p.workspace);
    if (plan.flag_bytes) args.flags = reinterpret_cast<int*>(at), args.flags_per_head = plan.flags_per_head;
    at += plan.flag_bytes;
    const auto align = [&](Heads& t, int64_t bytes, int64_t heads, int64_t rows, int64_t width) {
      if (bytes) align_heads("attention_prefill align", t, at, p.cu_seqlens_q ? 1 : p.B, heads, rows, width, *p.device, p.stream);
      at += bytes;
    };
    align(args.q, plan.copy_bytes[0], p.Hq, p.q_rows, p.D);
    align(args.k, plan.copy_bytes[1], p.Hkv, p.k_rows, p.D);
    align(args.v, plan.copy_bytes[2], p.Hkv, p.k_rows, p.Dv);
    const bool rules = p.rules.softcap > 0 || p.rules.alibi_slopes || p.rules.mask.kind != MaskKind::kNone || !(p.rules.softmax_scale > 0);
    const dim3 grid = grid_of(args, Tile::kRows);
    launch("attention_prefill mma", rules ? attention_mma<kSm, T, true, Tile> : attention_mma<kSm, T, false, Tile>, grid, dim3(Tile::kThreads),
           Tile::kSmemBytes, p.stream, args);
    if (args.flags) cuda_sm75_simt::repair(p, args.flags, args.flags_per_head, Tile::kWarpRows);
  });
}

}  // namespace
}  // namespace taut::attention_prefill
