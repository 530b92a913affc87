// COMPUTES  dq, dk, dv and ds_aux of softmax(q k^T) v, with the rules of common/attention.h; fp16 and bf16; products and sums in fp32.
//           The weights and the gradients of the scores are rounded to the dtype for the second products.
// LAYOUT    q, k, v, grad_out [B,H,L,D] by strides, rows of 16-byte chunks (else they are copied once, attention_align). In shared memory
//           rows of kWidth numbers, swizzled (chunk_offset), so that ldmatrix and cp.async meet no bank conflict.
// WORK      cuda_sm75_simt's first kernel (rows) and last (sinks), and between them two that make tiles of weights anew from lse, no atomics:
//           dq:   a block has kOwn rows (attention_rows.cuh) of q and grad_out, a warp 16 or 32 of them. Tiles of k and v pass. S = q k^T,
//                 dP = grad_out v^T; dS = P (dP - shift) stays in registers: accumulators are the A operand of dq += dS k.
//           dkv:  a block has kOwn keys of a key head, a warp 16 or 32. Tiles of the rows that see them pass, of all heads that share the key
//                 head, token by token. It makes S^T = k q^T and dP^T = v grad_out^T, so that again nothing goes through shared memory:
//                 dv += P^T grad_out, dk += dS^T q. Over 128 numbers a row two blocks share the columns of dk and dv, and both make S^T and dP^T.
//           The next tile is on its way meanwhile (cp.async). Tiles that causality and the window hide are not read, those of which a warp
//           sees nothing not computed. Hidden pairs have the weight 0, but 0 times NaN is NaN, and in fp16 dS may be beyond 65504: a warp whose
//           sums are not finite sets its flag, and cuda_sm75_simt::repair computes its rows again, in fp32.
// BOUND     Not memory: a pair of query and key costs 7 products of D, of which 5 count. An m16n8k16 is 2048 multiply-adds, 8 clocks of a
//           quarter of an A100's SM; its shared memory delivers an ldmatrix.x4 in 4 clocks. At D = 128, with the 8 warps that an SM holds,
//             dkv (4 products), of 16 keys a warp and 32 rows: 2 * 128 mma a quarter, 2048 clocks; 8 * 80 ldmatrix, 8 * 24 smaller loads and
//                 the 16 KB of the next tile: 2880 clocks of shared memory. Issued: about 700 instructions a warp, 1400 a quarter
//             dq (3 products), of 16 rows and 32 keys, q and grad_out in registers: 1536 clocks of mma; 8 * 48 ldmatrix and the rest: 1712
//           together 3584 of mma in 4592 of shared memory: at most 78% of an A100's 312 TFLOP/s in products done, 56% in those that count.
//           An H200's tensor cores do twice as much a clock beside the same shared memory: 39% and 28% of its 989. One block of 8 warps leaves
//           some latency and every barrier uncovered: we predict 40% of an A100 (125 TFLOP/s) and 20% of an H200 (200). No GPU has run it yet.
//           At D = 64 a warp has 32 keys or rows, and wants half the shared memory a product.
// LIMITS    sm_80 or newer; fp16 or bf16; head dims to 256; under 2^30 rows of a key head
#include "attention_backward/cuda_rows.cuh"
#include "common/attention_mma.cuh"

namespace taut::attention_backward::cuda_sm80_mma {
namespace {

// A warp's own rows (the A operands: queries in dq, keys in dkv) are kFragments times 16; kPassing rows pass at a time (the B operands).
// kKeep: own rows stay in registers. kParts: blocks that share the columns of what is summed.
template <int kWidth_, int kWarps_, int kFragments_, int kPassing_, bool kKeep_, int kParts_ = 1>
struct Tile {
  static constexpr int kWidth = kWidth_, kWarps = kWarps_, kThreads = 32 * kWarps, kFragments = kFragments_;
  static constexpr int kWarpOwn = 16 * kFragments, kOwn = kWarps * kWarpOwn, kPassing = kPassing_, kPassing8 = kPassing / 8;
  static constexpr bool kKeep = kKeep_;
  static constexpr int kParts = kParts_, kColumns = kWidth / kParts, kColumns8 = kColumns / 8;
  static constexpr int kSteps = kWidth / 16, kChunks = kWidth / 8, kRowBytes = kWidth * 2;
  static constexpr int kStages = 2, kOwnBytes = kOwn * kRowBytes, kPassingBytes = kPassing * kRowBytes;  // of each of two tensors
  static_assert(kPassing % 16 == 0 && kPassing <= 64 && kWidth % 32 == 0 && kColumns % 16 == 0);
  TAUT_DEVICE static int offset(int row, int chunk) { return chunk_offset<kChunks>(row, chunk); }
};

// A row's query and which of the heads it is that share the key head. WHY not / and %: they are some 40 instructions, once a tile and row.
struct Split {
  int query, head;
  TAUT_DEVICE Split(const Args& args, int row) : query(static_cast<int>(uint64_t{2u * row} * args.group_inverse >> 32)) {
    query -= query * args.group > row;  // the inverse is rounded up: for large rows it is one too many
    head = row - query * args.group;
  }
};

// What is wanted of rows, in shared memory.
template <int kCount>
struct RowNumbers {
  RowRules rules[kCount];
  float most[kCount], log_total[kCount], shift[kCount];

  // Of the row `row` as r, by cp.async but for the rules. WHY zeros past the end suffice: q and grad_out are zeros there.
  TAUT_DEVICE void fetch(const Args& args, const Block& block, int r, int row) {
    const bool there = row < block.rows;
    const Split split(args, there ? row : block.rows - 1);
    const int head = block.kv_head * args.group + split.head;
    const int64_t at = block.b * args.lse_batch_stride + head * args.lse_head_stride + block.first_q + split.query;
    ptx::cp_async_4(most + r, args.most + at, there ? 4 : 0);
    ptx::cp_async_4(log_total + r, args.log_total + at, there ? 4 : 0);
    ptx::cp_async_4(shift + r, args.shift + at, there ? 4 : 0);
    const AttentionMask& mask = args.rules.mask;
    rules[r] = {block.b * mask.batch_stride + head * mask.head_stride + split.query * mask.query_stride, split.query + block.Lk - block.Lq,
                args.rules.alibi_slopes ? args.rules.alibi_slopes[head] * kLog2E : 0.0f};
  }
};

template <class Tile, int kRowCount, int kRowStages>
struct Memory {
  static constexpr int kOwnBytes = 2 * Tile::kOwnBytes, kPassingBytes = Tile::kStages * 2 * Tile::kPassingBytes;
  // Own rows that registers hold give their place to those that pass.
  alignas(16) unsigned char tiles[Tile::kKeep ? std::max(kOwnBytes, kPassingBytes) : kOwnBytes + kPassingBytes];
  RowNumbers<kRowCount> rows[kRowStages];
  // WHY here: what is wanted once a tile must not take registers from the sums.
  Block block;
  const uint16_t* g_passing[2];  // where the rows of a key head begin

  TAUT_DEVICE unsigned char* own(int which) { return tiles + which * Tile::kOwnBytes; }
  TAUT_DEVICE unsigned char* passing(int stage, int which) { return tiles + (Tile::kKeep ? 0 : kOwnBytes) + (2 * stage + which) * Tile::kPassingBytes; }
};

// Rows of two tensors to shared memory; of row r row_at(r, from) says where they lie, and whether there is one. Zeros where not.
template <class Tile, int kCount, class RowAt>
TAUT_DEVICE void fetch_rows(unsigned char* s_first, unsigned char* s_second, int first_width, int second_width, const RowAt& row_at) {
  constexpr int kEach = (kCount * Tile::kChunks + Tile::kThreads - 1) / Tile::kThreads;
  constexpr bool kWhole = kCount * Tile::kChunks % Tile::kThreads == 0;
#pragma unroll 1  // WHY: several at once take registers from the sums
  for (int i = 0; i < kEach; i++) {
    const int c = threadIdx.x + i * Tile::kThreads, row = c / Tile::kChunks, chunk = c % Tile::kChunks, to = Tile::offset(row, chunk);
    if (!kWhole && row >= kCount) break;
    const uint16_t* from[2];
    const bool there = row_at(row, from);
    const int first_bytes = there && chunk * 8 < first_width ? 16 : 0, second_bytes = there && chunk * 8 < second_width ? 16 : 0;
    ptx::cp_async_16(s_first + to, from[0] + (first_bytes ? chunk * 8 : 0), first_bytes);
    ptx::cp_async_16(s_second + to, from[1] + (second_bytes ? chunk * 8 : 0), second_bytes);
  }
}

// Where the rows of a key head begin, in q or grad_out, and in k or v.
TAUT_DEVICE const uint16_t* first_of_queries(const Args& args, const Block& block, const Heads& heads) {
  return static_cast<const uint16_t*>(heads.data) + block.query_at(args, heads, 0);
}
TAUT_DEVICE const uint16_t* first_of_keys(const Block& block, const Heads& heads) { return static_cast<const uint16_t*>(heads.data) + block.keys_at(heads); }

// The rows `first` and later of a key head to shared memory: queries of its heads, or keys. g_rows: where they begin.
template <class Tile, int kCount>
TAUT_DEVICE void fetch_queries(unsigned char* s_q, unsigned char* s_grad, const Args& args, const uint16_t* const (&g_rows)[2], int first, int rows) {
  fetch_rows<Tile, kCount>(s_q, s_grad, args.D, args.Dv, [&](int r, const uint16_t*(&from)[2]) {
    const Split split(args, min(first + r, rows - 1));
    from[0] = g_rows[0] + split.query * args.q.row_stride + split.head * args.q.head_stride;
    from[1] = g_rows[1] + split.query * args.grad_out.row_stride + split.head * args.grad_out.head_stride;
    return first + r < rows;
  });
}
template <class Tile, int kCount>
TAUT_DEVICE void fetch_keys(unsigned char* s_k, unsigned char* s_v, const Args& args, const uint16_t* const (&g_rows)[2], int first, int keys) {
  fetch_rows<Tile, kCount>(s_k, s_v, args.D, args.Dv, [&](int r, const uint16_t*(&from)[2]) {
    const int j = min(first + r, keys - 1);
    from[0] = g_rows[0] + j * args.k.row_stride, from[1] = g_rows[1] + j * args.v.row_stride;
    return first + r < keys;
  });
}

// ---- Products -----------------------------------------------------------------------------------------------------------

// A warp's own rows as fragments.
template <class Tile>
struct Own {
  uint32_t a[Tile::kKeep ? Tile::kSteps : 1][Tile::kFragments][4];

  TAUT_DEVICE void load(uint32_t (&to)[Tile::kFragments][4], const unsigned char* s_mine, int step, int lane) const {
#pragma unroll
    for (int m = 0; m < Tile::kFragments; m++) ptx::ldmatrix_x4(to[m], s_mine + Tile::offset(16 * m + lane % 16, 2 * step + lane / 16));
  }
  TAUT_DEVICE void keep(const unsigned char* s_mine, int lane) {
    if constexpr (Tile::kKeep) {
#pragma unroll
      for (int step = 0; step < Tile::kSteps; step++) load(a[step], s_mine, step, lane);
    }
  }
};

template <class Tile>
using Pairs = float[Tile::kFragments][Tile::kPassing8][4];
template <class Tile>
using Sums = float[Tile::kFragments][Tile::kColumns8][4];

template <int kRows, int kColumns>
TAUT_DEVICE void clear(float (&x)[kRows][kColumns][4]) {
#pragma unroll
  for (int m = 0; m < kRows; m++)
#pragma unroll
    for (int n = 0; n < kColumns; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) x[m][n][i] = 0;
}

// s = own passing^T.
template <class T, class Tile>
TAUT_DEVICE void multiply(Pairs<Tile>& s, Own<Tile>& own, const unsigned char* s_mine, const unsigned char* s_passing, int lane) {
  clear(s);
#pragma unroll
  for (int step = 0; step < Tile::kSteps; step++) {
    uint32_t (&a)[Tile::kFragments][4] = own.a[Tile::kKeep ? step : 0];
    if constexpr (!Tile::kKeep) own.load(a, s_mine, step, lane);
#pragma unroll
    for (int n = 0; n < Tile::kPassing8; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, s_passing + Tile::offset(8 * n + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
#pragma unroll
      for (int m = 0; m < Tile::kFragments; m++) {
        mma<80, T>(s[m][n], a[m], b[0], b[1]);
        mma<80, T>(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// sums += s passing, of the columns from chunk first_chunk on.
template <class T, class Tile>
TAUT_DEVICE void add_product(Sums<Tile>& sums, const Pairs<Tile>& s, const unsigned char* s_passing, int first_chunk, int lane) {
#pragma unroll
  for (int step = 0; step < Tile::kPassing8 / 2; step++) {
    uint32_t a[Tile::kFragments][4];
#pragma unroll
    for (int m = 0; m < Tile::kFragments; m++) {
      const float (&low)[4] = s[m][2 * step], (&high)[4] = s[m][2 * step + 1];
      a[m][0] = pack<T>(low[0], low[1]), a[m][1] = pack<T>(low[2], low[3]);
      a[m][2] = pack<T>(high[0], high[1]), a[m][3] = pack<T>(high[2], high[3]);
    }
#pragma unroll
    for (int n = 0; n < Tile::kColumns8; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, s_passing + Tile::offset(16 * step + lane % 16, first_chunk + n + lane / 16));
#pragma unroll
      for (int m = 0; m < Tile::kFragments; m++) {
        mma<80, T>(sums[m][n], a[m], b[0], b[1]);
        mma<80, T>(sums[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// ---- Weights ------------------------------------------------------------------------------------------------------------

// Weights are made 2^kRaise times as large. WHY: those under 2^-14 would be subnormal in fp16, and with thousands of keys most are.
template <class T>
constexpr int kRaise = std::is_same_v<T, __half> ? 14 : 0;
template <class T>
constexpr float kRaised = std::is_same_v<T, __half> ? 16384.0f : 1.0f;

// f(m, n, i, query, key) for each of a lane's pairs, element i of fragment m and columns n, with the query and the key it is of, counted from the
// tile's. kDown: keys are own rows and queries pass; else the other way.
template <bool kDown, class Tile, class F>
TAUT_DEVICE void for_pairs(int lane, const F& f) {
#pragma unroll
  for (int m = 0; m < Tile::kFragments; m++)
#pragma unroll
    for (int n = 0; n < Tile::kPassing8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int own = 16 * m + 8 * (i / 2) + lane / 4, passing = 8 * n + 2 * (lane % 4) + i % 2;
        f(m, n, i, kDown ? passing : own, kDown ? own : passing);
      }
}

// Which of this lane's pairs count: bit 4 n + i of word m. first_row: of those that rules begins with; key: the first.
template <bool kRules, bool kDown, class Tile>
TAUT_DEVICE void find_visible(uint32_t (&visible)[Tile::kFragments], const Args& args, const Block& block, const RowRules* rules, int first_row, int key,
                              int lane) {
  const AttentionMask& mask = args.rules.mask;
#pragma unroll
  for (int m = 0; m < Tile::kFragments; m++) visible[m] = 0;
  for_pairs<kDown, Tile>(lane, [&](int m, int n, int i, int query, int j) {
    const int position = rules[query].position, first = static_cast<int>(first_key(args.rules, position));
    const int end = first_row + query < block.rows ? static_cast<int>(end_key(args.rules, position, block.Lk)) : 0;
    visible[m] |= static_cast<uint32_t>(key + j >= first && key + j < end) << (4 * n + i);
  });
  if constexpr (kRules) {
    const auto hide = [&](const auto& hidden) {
      for_pairs<kDown, Tile>(lane, [&](int m, int n, int i, int query, int j) {
        const uint32_t bit = 1u << (4 * n + i);
        if (visible[m] & bit && hidden(rules[query].mask + (key + j) * mask.key_stride)) visible[m] &= ~bit;
      });
    };
    if (mask.kind == MaskKind::kBool) hide([&](int64_t at) { return static_cast<const uint8_t*>(mask.data)[at] == 0; });
    else if (mask.kind == MaskKind::kAdditive && mask.dtype == DType::kFloat32)
      hide([&](int64_t at) { return static_cast<const float*>(mask.data)[at] == -INFINITY; });
    else if (mask.kind == MaskKind::kAdditive)
      hide([&](int64_t at) { return static_cast<const uint16_t*>(mask.data)[at] == (mask.dtype == DType::kBFloat16 ? 0xff80 : 0xfc00); });
  }
}

// s, products of q and k, to weights (raised), and d, their gradients, to those of the products but for softmax_scale.
// most, log_total, shift, rules: of the first of the rows. WHY what apply_rules does is done here in turns: its branches are taken once for all pairs.
template <class T, bool kRules, bool kHides, bool kDown, class Tile>
TAUT_DEVICE void weigh(Pairs<Tile>& s, Pairs<Tile>& d, const Args& args, const float* most, const float* log_total, const float* shift, const RowRules* rules,
                       int key, const uint32_t (&visible)[Tile::kFragments], int lane) {
  const float scale = first_scale(args.rules);
  const auto seen = [&](int m, int n, int i) { return !kHides || (visible[m] >> (4 * n + i) & 1); };
  const auto less_shift = [&](float grad_weight, int query) { return fmaf(grad_weight, 1.0f / kRaised<T>, shift[query] * (-1.0f / kRaised<T>)); };
  if constexpr (kRules) {
    if (const float cap = args.rules.softcap; cap > 0) {
      for_pairs<kDown, Tile>(lane, [&](int m, int n, int i, int query, int) {
        const float capped = tanhf(s[m][n][i] * scale);
        s[m][n][i] = cap * kLog2E * capped;
        d[m][n][i] = less_shift(d[m][n][i], query) * (1.0f - capped * capped);
      });
    } else {
      for_pairs<kDown, Tile>(lane, [&](int m, int n, int i, int query, int) { s[m][n][i] *= scale, d[m][n][i] = less_shift(d[m][n][i], query); });
    }
    if (args.rules.alibi_slopes)
      for_pairs<kDown, Tile>(
          lane, [&](int m, int n, int i, int query, int j) { s[m][n][i] -= rules[query].slope * static_cast<float>(abs(rules[query].position - (key + j))); });
    if (kHides && args.rules.mask.kind == MaskKind::kAdditive) {
      const auto add = [&]<class Bias>(const Bias* g_bias) {
        for_pairs<kDown, Tile>(lane, [&](int m, int n, int i, int query, int j) {
          if (!seen(m, n, i)) return;
          const float added = to_float(g_bias[rules[query].mask + (key + j) * args.rules.mask.key_stride]) * kLog2E;
          s[m][n][i] += added < kLowest ? kLowest : added;
        });
      };
      const DType dtype = args.rules.mask.dtype;
      if (dtype == DType::kFloat32) add(static_cast<const float*>(args.rules.mask.data));
      else if (dtype == DType::kBFloat16) add(static_cast<const __nv_bfloat16*>(args.rules.mask.data));
      else add(static_cast<const __half*>(args.rules.mask.data));
    }
  }
  for_pairs<kDown, Tile>(lane, [&](int m, int n, int i, int query, int) {
    const float exponent = kRules ? s[m][n][i] - most[query] : fmaf(s[m][n][i], scale, -most[query]);
    const float weight = ptx::ex2(exponent - (log_total[query] - kRaise<T>)), grad = weight * (kRules ? d[m][n][i] : less_shift(d[m][n][i], query));
    s[m][n][i] = seen(m, n, i) ? weight : 0.0f;
    d[m][n][i] = seen(m, n, i) ? grad : 0.0f;
  });
}

// Whether a warp sees any of a tile, and whether something of it is hidden. early, late: positions of the first and last row;
// the keys [key, end), of which those past the last one do not matter where end says so.
struct Sight {
  bool computes, hides;
  TAUT_DEVICE Sight(const Args& args, int early, int late, int key, int end, int Lk) {
    const KeyRange range(args.rules, early, late, Lk);
    computes = key < range.end && end > range.first;
    hides = args.rules.mask.kind != MaskKind::kNone || key < range.all_from || end > range.all_to;
  }
};

// ---- The end --------------------------------------------------------------------------------------------------------------

// Sums times factor, rounded, turned through s_rows, the warp's own, and stored 16 bytes a lane where rows are aligned; columns from
// first_chunk on. row_at(r): where the row begins, or below 0. Whether all sums are finite.
template <class T, class Tile, class RowAt>
TAUT_DEVICE bool store_sums(const Sums<Tile>& sums, float factor, unsigned char* s_rows, void* g_out, int width, int first_chunk, const RowAt& row_at,
                            int lane) {
  float nothing = 0;  // NaN, if a sum is not finite
  __syncwarp();
#pragma unroll
  for (int m = 0; m < Tile::kFragments; m++)
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int n = 0; n < Tile::kColumns8; n++) {
        nothing = fmaf(sums[m][n][2 * h], 0.0f, fmaf(sums[m][n][2 * h + 1], 0.0f, nothing));
        *reinterpret_cast<uint32_t*>(s_rows + Tile::offset(16 * m + 8 * h + lane / 4, n) + lane % 4 * 4) =
            pack<T>(sums[m][n][2 * h] * factor, sums[m][n][2 * h + 1] * factor);
      }
  __syncwarp();
  const bool aligned = width % 8 == 0;
#pragma unroll 1
  for (int c = lane; c < Tile::kWarpOwn * Tile::kColumns8; c += 32) {
    const int r = c / Tile::kColumns8, chunk = c % Tile::kColumns8, d = (first_chunk + chunk) * 8;
    const int64_t at = row_at(r);
    if (at < 0 || d >= width) continue;
    T* g_chunk = static_cast<T*>(g_out) + at + d;
    const unsigned char* s_chunk = s_rows + Tile::offset(r, chunk);
    if (aligned) {
      ptx::st_global_16(g_chunk, *reinterpret_cast<const uint4*>(s_chunk));
    } else {
#pragma unroll 1
      for (int e = 0; e < 8 && d + e < width; e++) g_chunk[e] = reinterpret_cast<const T*>(s_chunk)[e];
    }
  }
  return nothing == 0.0f;
}

// ---- Kernels --------------------------------------------------------------------------------------------------------------

template <class Tile>
using DqMemory = Memory<Tile, Tile::kOwn, 1>;
template <class Tile>
using DkvMemory = Memory<Tile, Tile::kPassing, Tile::kStages>;

// kRules: softcap, ALiBi or a mask.
template <class T, bool kRules, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) backward_dq_mma(const Args args) {
  if constexpr (kCompiledFor<80>) {
    const Block block = Block::mine(args, Tile::kOwn);
    if (block.first_row >= block.rows) return;
    TAUT_DYNAMIC_SMEM(smem);
    DqMemory<Tile>& s = *reinterpret_cast<DqMemory<Tile>*>(smem);
    RowNumbers<Tile::kOwn>& s_rows = s.rows[0];
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * Tile::kWarpOwn, first_row = block.first_row + warp_row;
    if (threadIdx.x == 0) s.block = block, s.g_passing[0] = first_of_keys(block, args.k), s.g_passing[1] = first_of_keys(block, args.v);
    for (int r = threadIdx.x; r < Tile::kOwn; r += Tile::kThreads) s_rows.fetch(args, block, r, block.first_row + r);
    const uint16_t* const g_own[2] = {first_of_queries(args, block, args.q), first_of_queries(args, block, args.grad_out)};
    fetch_queries<Tile, Tile::kOwn>(s.own(0), s.own(1), args, g_own, block.first_row, block.rows);
    const KeyRange keys(args.rules, block.position(args, block.first_row), block.position(args, block.first_row + Tile::kOwn - 1), block.Lk);
    __syncthreads();

    const auto fetch = [&](int slot, int first) {
      fetch_keys<Tile, Tile::kPassing>(s.passing(slot, 0), s.passing(slot, 1), args, s.g_passing, first, s.block.Lk);
      ptx::cp_async_commit();
    };
    // WHY tiles begin at multiples of kPassing: then a row's sums do not depend on the rows around it.
    int key = keys.first / Tile::kPassing * Tile::kPassing, slot = 0;
    unsigned char *s_q = s.own(0) + warp_row * Tile::kRowBytes, *s_grad = s.own(1) + warp_row * Tile::kRowBytes;
    Own<Tile> queries, grads;
    if constexpr (Tile::kKeep) {
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      queries.keep(s_q, lane), grads.keep(s_grad, lane);
      __syncthreads();
    }
    if (key < keys.end) fetch(0, key);
    else ptx::cp_async_commit();
    Sums<Tile> dq;
    clear(dq);
#pragma unroll 1
    for (; key < keys.end; key += Tile::kPassing) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all; and all are done with the one that is refilled now
      if (key + Tile::kPassing < keys.end) fetch(slot ^ 1, key + Tile::kPassing);
      const RowRules* rules = s_rows.rules + warp_row;
      Sight sight(args, rules[0].position, rules[Tile::kWarpOwn - 1].position, key, key + Tile::kPassing, s.block.Lk);
      sight.computes = sight.computes && first_row < s.block.rows;
      uint32_t visible[Tile::kFragments] = {};
      if (sight.computes && sight.hides) {
        find_visible<kRules, false, Tile>(visible, args, s.block, rules, first_row, key, lane);
        uint32_t any = 0;
#pragma unroll
        for (int m = 0; m < Tile::kFragments; m++) any |= visible[m];
        sight.computes = __any_sync(0xffffffffu, any != 0);
      }
      if (sight.computes) {
        Pairs<Tile> weights, pair_grads;
        multiply<T, Tile>(weights, queries, s_q, s.passing(slot, 0), lane);
        multiply<T, Tile>(pair_grads, grads, s_grad, s.passing(slot, 1), lane);
        if (sight.hides)
          weigh<T, kRules, true, false, Tile>(weights, pair_grads, args, s_rows.most + warp_row, s_rows.log_total + warp_row, s_rows.shift + warp_row, rules,
                                              key, visible, lane);
        else
          weigh<T, kRules, false, false, Tile>(weights, pair_grads, args, s_rows.most + warp_row, s_rows.log_total + warp_row, s_rows.shift + warp_row, rules,
                                               key, visible, lane);
        add_product<T, Tile>(dq, pair_grads, s.passing(slot, 0), 0, lane);
      }
      slot ^= 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // where there was no tile, q may be still on its way to where rows are turned
    if (first_row >= s.block.rows) return;
    const bool finite = store_sums<T, Tile>(
        dq, args.rules.softmax_scale, s_q, const_cast<void*>(args.dq.data), args.D, 0,
        [&](int r) { return first_row + r < s.block.rows ? s.block.query_at(args, args.dq, first_row + r) : -1; }, lane);
    const bool all_finite = __all_sync(0xffffffffu, finite);
    if (lane == 0)
      args.flags.rows[(int64_t{s.block.b} * args.kv_heads + s.block.kv_head) * args.flags.row_flags + first_row / Tile::kWarpOwn] = all_finite ? 0 : 1;
  }
}

template <class T, bool kRules, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) backward_dkv_mma(const Args args) {
  if constexpr (kCompiledFor<80>) {
    // The first keys first, which causal attention shows to most.
    const int part = static_cast<int>(blockIdx.x) % Tile::kParts, turn = static_cast<int>(blockIdx.x) / Tile::kParts, heads = args.batch * args.kv_heads;
    const Block block = Block::of(args, turn % heads / args.kv_heads, turn % args.kv_heads, 0);
    const int tile_key = turn / heads * Tile::kOwn;
    if (tile_key >= block.Lk) return;
    TAUT_DYNAMIC_SMEM(smem);
    DkvMemory<Tile>& s = *reinterpret_cast<DkvMemory<Tile>*>(smem);
    const int lane = threadIdx.x % 32, warp_key = threadIdx.x / 32 * Tile::kWarpOwn, key = tile_key + warp_key;
    if (threadIdx.x == 0)
      s.block = block, s.g_passing[0] = first_of_queries(args, block, args.q), s.g_passing[1] = first_of_queries(args, block, args.grad_out);
    const uint16_t* const g_own[2] = {first_of_keys(block, args.k), first_of_keys(block, args.v)};
    fetch_keys<Tile, Tile::kOwn>(s.own(0), s.own(1), args, g_own, tile_key, block.Lk);
    // The rows that causality and the window leave to the keys; tiles begin at multiples of kPassing.
    const int ahead = block.Lk - block.Lq, window = static_cast<int>(args.rules.window), last_key = min(tile_key + Tile::kOwn, block.Lk) - 1;
    const int first_query = max(0, args.rules.causal ? tile_key - ahead : window ? tile_key - window + 1 - ahead : 0);
    const int end_query = window ? min(block.Lq, last_key + window - ahead) : block.Lq;
    const int end_row = end_query * args.group;
    int row = min(first_query, block.Lq) * args.group / Tile::kPassing * Tile::kPassing, slot = 0;
    __syncthreads();

    const auto fetch = [&](int slot, int first) {
      if (threadIdx.x < Tile::kPassing) s.rows[slot].fetch(args, s.block, threadIdx.x, first + threadIdx.x);
      fetch_queries<Tile, Tile::kPassing>(s.passing(slot, 0), s.passing(slot, 1), args, s.g_passing, first, s.block.rows);
      ptx::cp_async_commit();
    };
    unsigned char *s_k = s.own(0) + warp_key * Tile::kRowBytes, *s_v = s.own(1) + warp_key * Tile::kRowBytes;
    Own<Tile> keys, values;
    if constexpr (Tile::kKeep) {
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
      __syncthreads();
      keys.keep(s_k, lane), values.keep(s_v, lane);
      __syncthreads();
    }
    if (row < end_row) fetch(0, row);
    else ptx::cp_async_commit();
    const int first_chunk = part * (Tile::kColumns / 8);
    Sums<Tile> dk, dv;
    clear(dk), clear(dv);
#pragma unroll 1
    for (; row < end_row; row += Tile::kPassing) {
      ptx::cp_async_wait<0>();
      __syncthreads();  // this stage is there for all; and all are done with the one that is refilled now
      if (row + Tile::kPassing < end_row) fetch(slot ^ 1, row + Tile::kPassing);
      const RowNumbers<Tile::kPassing>& s_rows = s.rows[slot];
      Sight sight(args, s_rows.rules[0].position, s_rows.rules[Tile::kPassing - 1].position, key, min(key + Tile::kWarpOwn, s.block.Lk), s.block.Lk);
      sight.computes = sight.computes && key < s.block.Lk;
      uint32_t visible[Tile::kFragments] = {};
      if (sight.computes && sight.hides) {
        find_visible<kRules, true, Tile>(visible, args, s.block, s_rows.rules, row, key, lane);
        uint32_t any = 0;
#pragma unroll
        for (int m = 0; m < Tile::kFragments; m++) any |= visible[m];
        sight.computes = __any_sync(0xffffffffu, any != 0);
      }
      if (sight.computes) {
        Pairs<Tile> weights, pair_grads;
        multiply<T, Tile>(weights, keys, s_k, s.passing(slot, 0), lane);
        multiply<T, Tile>(pair_grads, values, s_v, s.passing(slot, 1), lane);
        if (sight.hides)
          weigh<T, kRules, true, true, Tile>(weights, pair_grads, args, s_rows.most, s_rows.log_total, s_rows.shift, s_rows.rules, key, visible, lane);
        else weigh<T, kRules, false, true, Tile>(weights, pair_grads, args, s_rows.most, s_rows.log_total, s_rows.shift, s_rows.rules, key, visible, lane);
        add_product<T, Tile>(dv, weights, s.passing(slot, 1), first_chunk, lane);
        add_product<T, Tile>(dk, pair_grads, s.passing(slot, 0), first_chunk, lane);
      }
      slot ^= 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();  // where there was no tile, k may be still on its way to where rows are turned
    if (key >= s.block.Lk) return;
    const auto row_at = [&](const Heads& heads) {
      return [&](int r) { return key + r < s.block.Lk ? s.block.keys_at(heads) + (key + r) * heads.row_stride : -1; };
    };
    const bool k_finite = store_sums<T, Tile>(dk, args.rules.softmax_scale, s_k, const_cast<void*>(args.dk.data), args.D, first_chunk, row_at(args.dk), lane);
    const bool v_finite = store_sums<T, Tile>(dv, 1.0f / kRaised<T>, s_v, const_cast<void*>(args.dv.data), args.Dv, first_chunk, row_at(args.dv), lane);
    const bool all_finite = __all_sync(0xffffffffu, k_finite && v_finite);
    const int64_t flag = (int64_t{s.block.b} * args.kv_heads + s.block.kv_head) * args.flags.key_flags + key / Tile::kWarpOwn;
    if (lane == 0) args.flags.keys[flag * Tile::kParts + part] = all_finite ? 0 : 1;
  }
}

// ---- Host -----------------------------------------------------------------------------------------------------------------

// Tiles by head dim, in what sm_86, 89 and 120 give a block (99 KB). WHY others for rules at 64: they want more registers than there are.
template <class Dq_, class Dkv_, class RulesDkv_ = Dkv_>
struct Tiles {
  using Dq = Dq_;
  using Dkv = Dkv_;
  using RulesDkv = RulesDkv_;
  static_assert(Dkv::kOwn == RulesDkv::kOwn && Dkv::kWarpOwn == RulesDkv::kWarpOwn && Dkv::kParts == RulesDkv::kParts);
};
using W64 = Tiles<Tile<64, 4, 2, 32, false>, Tile<64, 4, 2, 32, false>, Tile<64, 4, 2, 16, false>>;
using W96 = Tiles<Tile<96, 8, 1, 32, true>, Tile<96, 8, 1, 32, false>>;
using W128 = Tiles<Tile<128, 8, 1, 32, true>, Tile<128, 8, 1, 32, false>>;
using W192 = Tiles<Tile<192, 4, 1, 32, false>, Tile<192, 4, 1, 32, false, 2>>;
using W256 = Tiles<Tile<256, 4, 1, 16, false>, Tile<256, 4, 1, 16, false, 2>>;

// Calls f.template operator()<Tiles>() for the tiles of this call.
template <class F>
auto with_tiles(const CudaParams& p, const F& f) {
  const int64_t width = std::max(p.D, p.Dv);
  if (width <= 64) return f.template operator()<W64>();
  if (width <= 96) return f.template operator()<W96>();
  if (width <= 128) return f.template operator()<W128>();
  if (width <= 192) return f.template operator()<W192>();
  return f.template operator()<W256>();
}

// What is in the workspace: flags of rows and keys, then copies of those of q, k, v and grad_out that must be aligned. 0: not there.
struct Plan {
  Flags flags;
  int64_t row_bytes, key_bytes, copy_bytes[4];
  int64_t bytes() const { return row_bytes + key_bytes + copy_bytes[0] + copy_bytes[1] + copy_bytes[2] + copy_bytes[3]; }
};

Plan plan_of(const CudaParams& p) {
  return with_tiles(p, [&]<class Tiles>() {
    constexpr int kRows = Tiles::Dq::kWarpOwn, kKeys = Tiles::Dkv::kWarpOwn, kParts = Tiles::Dkv::kParts;
    const int row_flags = static_cast<int>((p.Lq * (p.Hq / p.Hkv) + kRows - 1) / kRows), key_flags = static_cast<int>((p.Lk + kKeys - 1) / kKeys);
    Plan plan{{nullptr, nullptr, row_flags, kRows, key_flags, kKeys, kParts}, 0, 0, {}};
    plan.row_bytes = whole_256(p.B * p.Hkv * row_flags * 4), plan.key_bytes = whole_256(p.B * p.Hkv * key_flags * kParts * 4);
    const int64_t batch = p.cu_seqlens_q ? 1 : p.B;
    plan.copy_bytes[0] = aligned_bytes(p.q, batch, p.Hq, p.q_rows, p.D);
    plan.copy_bytes[1] = aligned_bytes(p.k, batch, p.Hkv, p.k_rows, p.D);
    plan.copy_bytes[2] = aligned_bytes(p.v, batch, p.Hkv, p.k_rows, p.Dv);
    plan.copy_bytes[3] = aligned_bytes(p.grad_out, batch, p.Hq, p.q_rows, p.Dv);
    return plan;
  });
}

template <class T>
void run_for(const CudaParams& p) {
  Plan plan = plan_of(p);
  Args args = args_of(p);
  auto* at = static_cast<unsigned char*>(p.workspace);
  plan.flags.rows = reinterpret_cast<int*>(at), at += plan.row_bytes;
  plan.flags.keys = reinterpret_cast<int*>(at), at += plan.key_bytes;
  args.flags = plan.flags;
  const auto align = [&](Heads& t, int64_t bytes, int64_t heads, int64_t rows, int64_t width) {
    if (bytes) align_heads("attention_backward align", t, at, p.cu_seqlens_q ? 1 : p.B, heads, rows, width, *p.device, p.stream);
    at += bytes;
  };
  align(args.q, plan.copy_bytes[0], p.Hq, p.q_rows, p.D);
  align(args.k, plan.copy_bytes[1], p.Hkv, p.k_rows, p.D);
  align(args.v, plan.copy_bytes[2], p.Hkv, p.k_rows, p.Dv);
  align(args.grad_out, plan.copy_bytes[3], p.Hq, p.q_rows, p.Dv);
  cuda_sm75_simt::prepare(p);
  const bool rules = p.rules.softcap > 0 || p.rules.alibi_slopes || p.rules.mask.kind != MaskKind::kNone;
  with_tiles(p, [&]<class Tiles>() {
    using Dq = typename Tiles::Dq;
    using Dkv = typename Tiles::Dkv;
    using RulesDkv = typename Tiles::RulesDkv;
    constexpr int kDqBytes = sizeof(DqMemory<Dq>), kDkvBytes = sizeof(DkvMemory<Dkv>), kRulesDkvBytes = sizeof(DkvMemory<RulesDkv>);
    static_assert(std::max({kDqBytes, kDkvBytes, kRulesDkvBytes}) <= 99 * 1024, "what every device of the generation gives a block");
    const auto start = [&](const char* name, void (*kernel)(Args), int64_t blocks, int threads, int bytes) {
      if (blocks > 0) launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), bytes, p.stream, args);
    };
    args.blocks = static_cast<int>((p.Lq * (p.Hq / p.Hkv) + Dq::kOwn - 1) / Dq::kOwn);
    const int64_t dq_blocks = p.B * p.Hkv * args.blocks, dkv_blocks = p.B * p.Hkv * ((p.Lk + Dkv::kOwn - 1) / Dkv::kOwn) * Dkv::kParts;
    const char *dq_name = "attention_backward dq mma", *dkv_name = "attention_backward dkv mma";
    if (rules) {
      start(dq_name, backward_dq_mma<T, true, Dq>, dq_blocks, Dq::kThreads, kDqBytes);
      start(dkv_name, backward_dkv_mma<T, true, RulesDkv>, dkv_blocks, RulesDkv::kThreads, kRulesDkvBytes);
    } else {
      start(dq_name, backward_dq_mma<T, false, Dq>, dq_blocks, Dq::kThreads, kDqBytes);
      start(dkv_name, backward_dkv_mma<T, false, Dkv>, dkv_blocks, Dkv::kThreads, kDkvBytes);
    }
  });
  cuda_sm75_simt::repair(p, plan.flags);
  cuda_sm75_simt::finish(p);
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm < 80) return "it needs sm_80: cp.async and mma.m16n8k16";
  if (p.dtype == DType::kFloat32) return "q is float32; tensor cores take float16 and bfloat16";
  return p.Lq * (p.Hq / p.Hkv) < int64_t{1} << 30 && p.Lk < int64_t{1} << 30 ? nullptr : "it counts queries times heads of a key head, and keys, to 2^30";
}

int64_t workspace_bytes(const CudaParams& p) { return plan_of(p).bytes(); }

void run(const CudaParams& p) {
  if (p.dtype == DType::kFloat16) run_for<__half>(p);
  else run_for<__nv_bfloat16>(p);
}

}  // namespace taut::attention_backward::cuda_sm80_mma
