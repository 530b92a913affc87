// COMPUTES  out = softmax(q k^T) v and lse, with causality, windows and sinks; fp16 or bf16; products and sums in fp32. The weights, between 0
//           and 1 and relative to the largest so far, are rounded to the dtype for the second product, not for lse.
// LAYOUT    q, k, v, out [B,H,L,D] by strides; k and v by TMA (a map of four dimensions, zeros past a head's last key and a row's last
//           number), in shared memory as blocks of 64 numbers of a row, [kWidth / 64][kKeys][64], swizzled by 128 bytes. Keys are b of the
//           first product row by row; values are b of the second the other way, its columns contiguous. q from memory to A registers.
// WORK      A block has 128 rows (attention_rows.cuh), each of two consumer warpgroups 64, and goes over tiles of kKeys keys; one thread of a third
//           warpgroup asks for them, kStages ahead (FlashAttention-3, arXiv 2407.08608). A step of a consumer:
//             s = q k^T of this tile, and behind it sums += weights v of the tile before, both asynchronous;
//             s is there: maximum, exponents, new weights in fp32, while the tensor cores are at sums;
//             sums are there: they shrink where the maximum grew; the weights become the A registers of the next step.
//           The warpgroups take turns in giving products to the tensor cores, so that one has its exponents when the other multiplies.
//           Tiles that no row of the block sees are not read. Hidden keys have the weight 0, but 0 times NaN is NaN: a warp whose sums are not
//           finite sets its flag, and cuda_sm75_simt::repair computes its rows again.
// BOUND     Tensor cores: 2 * 128 * kKeys * kWidth multiply-adds a tile; for D = 128 and 128 keys 2048 cycles of an SM at 2048 a cycle. Beside it
//           16384 exponents at 16 a cycle are 1024 cycles, and some 4.5 other instructions a score 600 of each scheduler.
// LIMITS    sm_90 alone; fp16 and bf16; D and Dv to 128, multiples of 8, as the strides are; no softcap, slopes or mask, a positive scale: they
//           would need branches while products are under way, and ptxas then makes those wait for each other.
#include <type_traits>

#include "attention_prefill/cuda_rows.cuh"
#include "common/launch.h"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "common/tensor_map.h"

namespace taut::attention_prefill::cuda_sm90a_wgmma {
namespace {

constexpr int kConsumers = 2, kThreads = 128 * (1 + kConsumers), kRows = 64 * kConsumers, kKeys = 128, kStages = 2;
constexpr unsigned kAllLanes = 0xffffffffu;
// Named barriers: the turn of a consumer.
constexpr int kTurn = 1;

template <int kWidth>
struct Shared {
  static constexpr int kBlockBytes = kKeys * 128, kTileBytes = kWidth / 64 * kBlockBytes;
  static constexpr int kK = 0, kV = kK + kStages * kTileBytes, kBarriers = kV + kStages * kTileBytes, kBytes = kBarriers + 4 * kStages * 8;
};
// One for each stage: its keys (or values) are there; the consumers are done with them.
struct Barriers {
  uint64_t *k_full, *k_empty, *v_full, *v_empty;
  TAUT_DEVICE explicit Barriers(unsigned char* at)
      : k_full(reinterpret_cast<uint64_t*>(at)), k_empty(k_full + kStages), v_full(k_empty + kStages), v_empty(v_full + kStages) {}
};

struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  TAUT_DEVICE void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

TAUT_DEVICE void wait(uint64_t* barrier, uint32_t parity) {
  while (!ptx::mbarrier_try_wait(barrier, parity)) {}
}

// ---- the producer: one thread

template <int kWidth>
TAUT_DEVICE void produce(const CUtensorMap& k_map, const CUtensorMap& v_map, const Block& block, int batch, int key, int end, unsigned char* smem) {
  using S = Shared<kWidth>;
  const Barriers barriers(smem + S::kBarriers);
  const int first = static_cast<int>(block.first_k);
  Ring ring;
  for (; key < end; key += kKeys, ring.advance()) {
    const auto load = [&](const CUtensorMap& map, int to, uint64_t* full, uint64_t* empty) {
      wait(empty + ring.stage, ring.parity ^ 1);
      ptx::mbarrier_arrive_expect_tx(full + ring.stage, S::kTileBytes);
#pragma unroll
      for (int b = 0; b < kWidth / 64; b++)
        ptx::tma_load_4d(smem + to + ring.stage * S::kTileBytes + b * S::kBlockBytes, &map, 64 * b, first + key, block.kv_head, batch, full + ring.stage);
    };
    load(k_map, S::kK, barriers.k_full, barriers.k_empty);
    load(v_map, S::kV, barriers.v_full, barriers.v_empty);
  }
}

// ---- a consumer: 64 rows, 16 of each warp. Rows g and g + 8 of these are a lane's; columns 2t and 2t + 1 of each 8.

template <class T, int kWidth>
struct Consumer {
  using S = Shared<kWidth>;
  static constexpr int kSteps = kWidth / 16, kKeySteps = kKeys / 16;
  float sums[kWidth / 2];
  float s[kKeys / 2];
  uint32_t weights[kKeySteps][4], queries[kSteps][4];
  float most[2], total[2];  // total: of this lane's keys, and the sink
  int first[2], end[2];     // the keys that rows g and g + 8 see
  float scale;
  int lane, me;
  Ring k_ring, v_ring;

  TAUT_DEVICE void start(const Args& args, const Block& block, int first_row, int consumer) {
    lane = threadIdx.x % 32, me = consumer, scale = first_scale(args.rules);
#pragma unroll
    for (float& sum : sums) sum = 0;
    const int t = lane % 4;
    const uint32_t* rows[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int row = first_row + lane / 4 + 8 * h, position = block.position(args, row);
      first[h] = static_cast<int>(first_key(args.rules, position)), end[h] = static_cast<int>(end_key(args.rules, position, block.Lk));
      most[h] = sink_of(args, block, row);
      total[h] = most[h] > kLowest && t == 0 ? 1.0f : 0.0f;
      rows[h] = row < block.rows ? reinterpret_cast<const uint32_t*>(static_cast<const T*>(args.q.data) + block.query_at(args, args.q, row)) : nullptr;
    }
#pragma unroll
    for (int step = 0; step < kSteps; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int pair = 8 * step + 4 * (i / 2) + t;
        queries[step][i] = rows[i % 2] && 2 * pair < args.D ? rows[i % 2][pair] : 0;
      }
  }

  TAUT_DEVICE void multiply_keys(const unsigned char* smem) {
    const unsigned char* tile = smem + S::kK + k_ring.stage * S::kTileBytes;
#pragma unroll
    for (int step = 0; step < kSteps; step++) ptx::wgmma_pin(queries[step]);
    ptx::wgmma_pin(s);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; step++) {
      const uint64_t b = ptx::swizzled_128b_descriptor(tile + step / 4 * S::kBlockBytes + step % 4 * 32);
      if (step == 0) ptx::wgmma_m64k16<T, kKeys, false>(s, queries[step], b);
      else ptx::wgmma_m64k16<T, kKeys>(s, queries[step], b);
    }
    ptx::wgmma_commit();
  }
  TAUT_DEVICE void add_values(const unsigned char* smem) {
    const unsigned char* tile = smem + S::kV + v_ring.stage * S::kTileBytes;
#pragma unroll
    for (int step = 0; step < kKeySteps; step++) ptx::wgmma_pin(weights[step]);
    ptx::wgmma_pin(sums);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeySteps; step++)
      ptx::wgmma_m64k16<T, kWidth, true, true>(sums, weights[step], ptx::swizzled_128b_columns_descriptor(tile + step * 16 * 128, S::kBlockBytes));
    ptx::wgmma_commit();
  }
  TAUT_DEVICE void release(uint64_t* empty, Ring& ring) {
    __syncwarp();
    ptx::mbarrier_arrive(empty + ring.stage, lane == 0);
    ring.advance();
  }

  // Scores to weights, in s; gives by how much what was summed before shrinks. No branch: sums may be under way.
  template <bool kHides>
  TAUT_DEVICE void weigh(int key, float (&shrink)[2]) {
    const int t = lane % 4;
    if constexpr (kHides) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int j = key + 8 * n + 2 * t + i % 2;
          s[4 * n + i] = j >= first[i / 2] && j < end[i / 2] ? s[4 * n + i] : -INFINITY;
        }
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float highest = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
      for (int n = 1; n < kKeys / 8; n++) highest = fmaxf(highest, fmaxf(s[4 * n + 2 * h], s[4 * n + 2 * h + 1]));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      // WHY scaled after the maximum: one fma makes the exponent of 2
      highest = fmaxf(most[h], highest * scale);
      shrink[h] = ptx::ex2(most[h] - highest);
      most[h] = highest;
      float sum[2] = {};
#pragma unroll
      for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          float& weight = s[4 * n + 2 * h + e];
          weight = ptx::ex2(fmaf(weight, scale, -highest));
          sum[e] += weight;
        }
      total[h] = fmaf(total[h], shrink[h], sum[0] + sum[1]);
    }
  }
  TAUT_DEVICE void round_weights() {
#pragma unroll
    for (int step = 0; step < kKeySteps; step++)
#pragma unroll
      for (int i = 0; i < 4; i++) weights[step][i] = pack<T>(s[8 * step + 2 * i], s[8 * step + 2 * i + 1]);
  }

  TAUT_DEVICE void my_turn() { ptx::bar_sync(kTurn + me, 2 * 128); }
  TAUT_DEVICE void your_turn() { ptx::bar_arrive(kTurn + 1 - me, 2 * 128); }

  // The first tile: there are no values of one before.
  TAUT_DEVICE void begin(const Barriers& barriers, unsigned char* smem, int key) {
    wait(barriers.k_full + k_ring.stage, k_ring.parity);
    my_turn();
    multiply_keys(smem);
    your_turn();
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(s);
    release(barriers.k_empty, k_ring);
    float shrink[2];
    weigh<true>(key, shrink);
    round_weights();
  }
  template <bool kHides>
  TAUT_DEVICE void step(const Barriers& barriers, unsigned char* smem, int key) {
    wait(barriers.k_full + k_ring.stage, k_ring.parity);
    wait(barriers.v_full + v_ring.stage, v_ring.parity);
    my_turn();
    multiply_keys(smem);
    add_values(smem);
    your_turn();
    ptx::wgmma_wait<1>();
    ptx::wgmma_pin(s);
    release(barriers.k_empty, k_ring);
    float shrink[2];
    weigh<kHides>(key, shrink);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(sums);
    release(barriers.v_empty, v_ring);
#pragma unroll
    for (int n = 0; n < kWidth / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) sums[4 * n + i] *= shrink[i / 2];
    round_weights();
  }
  TAUT_DEVICE void finish_tiles(const Barriers& barriers, unsigned char* smem) {
    wait(barriers.v_full + v_ring.stage, v_ring.parity);
    add_values(smem);
    ptx::wgmma_wait<0>();
    ptx::wgmma_pin(sums);
  }

  // Divides by the totals, rounds, and stores: four lanes have 16 bytes of a row, which they turn so that each has those of another row's 8 columns.
  TAUT_DEVICE void store(const Args& args, const Block& block, int first_row) {
    float nothing = 0;  // NaN, if a sum is not finite
    const int t = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      total[h] += __shfl_xor_sync(kAllLanes, total[h], 1);
      total[h] += __shfl_xor_sync(kAllLanes, total[h], 2);
      const int row = first_row + lane / 4 + 8 * h;
      const float inverse = inverse_of(total[h]);
      T* g_out = row < block.rows ? static_cast<T*>(const_cast<void*>(args.out.data)) + block.query_at(args, args.out, row) : nullptr;
      if (t == 0 && row < block.rows) args.lse[block.lse_at(args, row)] = lse_of_row(total[h], most[h]);
#pragma unroll
      for (int n = 0; n < kWidth / 8; n += 4) {
        uint32_t mine[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float x = sums[4 * (n + i) + 2 * h], y = sums[4 * (n + i) + 2 * h + 1];
          nothing = fmaf(x, 0.0f, fmaf(y, 0.0f, nothing));
          mine[i] = pack<T>(x * inverse, y * inverse);
        }
        // Lane t gets word t of all four lanes: a transposition in two exchanges.
        uint32_t half[4];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const uint32_t there = __shfl_xor_sync(kAllLanes, t & 2 ? mine[i] : mine[i + 2], 2);
          half[i] = t & 2 ? there : mine[i];
          half[i + 2] = t & 2 ? mine[i + 2] : there;
        }
        uint4 words;
        uint32_t* word = &words.x;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
          const uint32_t there = __shfl_xor_sync(kAllLanes, t & 1 ? half[i] : half[i + 1], 1);
          word[i] = t & 1 ? there : half[i];
          word[i + 1] = t & 1 ? half[i + 1] : there;
        }
        const int d = 8 * (n + t);
        if (g_out && d < args.Dv) ptx::st_global_16(g_out + d, words);
      }
    }
    const bool finite = !__any_sync(kAllLanes, nothing != 0.0f);
    if (args.flags && lane == 0 && first_row < block.rows)
      args.flags[(int64_t{block.b} * args.kv_heads + block.kv_head) * args.flags_per_head + first_row / 16] = finite ? 0 : 1;
  }
};

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 1)
    attention_wgmma(const __grid_constant__ CUtensorMap k_map, const __grid_constant__ CUtensorMap v_map, const __grid_constant__ Args args) {
#if TAUT_ARCH_90A
  using S = Shared<kWidth>;
  TAUT_DYNAMIC_SMEM(smem);
  const Block block = Block::mine(args, kRows);
  if (block.first_row >= block.rows) return;
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);  // WHY: the compiler then knows it to be uniform
  const Barriers barriers(smem + S::kBarriers);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      ptx::mbarrier_init(barriers.k_full + i, 1), ptx::mbarrier_init(barriers.v_full + i, 1);
      ptx::mbarrier_init(barriers.k_empty + i, kConsumers * 4), ptx::mbarrier_init(barriers.v_empty + i, kConsumers * 4);  // a lane of each warp
    }
    ptx::fence_proxy_async();
  }
  const KeyRange keys(args.rules, block.position(args, block.first_row), block.position(args, block.first_row + kRows - 1), block.Lk);
  // WHY tiles begin at multiples of kKeys: then a row's sums do not depend on the rows around it.
  int key = keys.first / kKeys * kKeys;
  __syncthreads();
  if (warp / 4 == kConsumers) {
    ptx::setmaxnreg_dec<24>();
    if (threadIdx.x == kConsumers * 128)
      produce<kWidth>(k_map, v_map, block, args.cu_seqlens_k ? 0 : block.b, key, keys.end, smem);  // varlen: rows of one batch entry
  } else {
    ptx::setmaxnreg_inc<240>();
    const int consumer = warp / 4, first_row = block.first_row + 64 * consumer + warp % 4 * 16;
    Consumer<T, kWidth> rows;
    rows.start(args, block, first_row, consumer);
    if (key < keys.end) {
      if (consumer == 1) rows.your_turn();
      rows.begin(barriers, smem, key);
      key += kKeys;
      for (; key < keys.end && key < keys.all_from; key += kKeys) rows.template step<true>(barriers, smem, key);
      for (; key < keys.end && key + kKeys <= keys.all_to; key += kKeys) rows.template step<false>(barriers, smem, key);
      for (; key < keys.end; key += kKeys) rows.template step<true>(barriers, smem, key);
      if (consumer == 0) rows.my_turn();  // WHY: a barrier at which somebody has arrived should not be left behind
      rows.finish_tiles(barriers, smem);
    }
    rows.store(args, block, first_row);
  }
#endif
}

// ---- host

int flags_per_head(const CudaParams& p) { return static_cast<int>((p.Lq * (p.Hq / p.Hkv) + 15) / 16); }
// Only where a key is hidden from one row and read for another, or lies behind a sequence, can a sum lack what it should not have met.
bool wants_flags(const CudaParams& p) { return p.rules.causal || p.rules.window || p.cu_seqlens_q; }

template <class T, int kWidth>
void start(const CudaParams& p) {
  Args args = args_of(p);
  if (wants_flags(p)) args.flags = static_cast<int*>(p.workspace), args.flags_per_head = flags_per_head(p);
  const auto map = [&](const Heads& t, int64_t columns) {
    return tensor_map_16bit({t.data, columns, p.k_rows, p.Hkv, p.cu_seqlens_k ? 1 : p.B, t.row_stride * 2, t.head_stride * 2, t.batch_stride * 2},
                            std::is_same_v<T, __nv_bfloat16>, kKeys);
  };
  const dim3 grid = grid_of(args, kRows);
  launch("attention_prefill wgmma", attention_wgmma<T, kWidth>, grid, dim3(kThreads), Shared<kWidth>::kBytes, p.stream, map(p.k, p.D), map(p.v, p.Dv), args);
  if (args.flags) cuda_sm75_simt::repair(p, args.flags, args.flags_per_head, 16);
}

template <class T>
void run_type(const CudaParams& p) {
  if (std::max(p.D, p.Dv) <= 64) start<T, 64>(p);
  else start<T, 128>(p);
}

}  // namespace

const char* supported(const CudaParams& p) {
  if (p.device->sm != 90) return "needs sm_90a";
  if (p.dtype == DType::kFloat32) return "q, k and v are float32";
  if (p.k_rows == 0) return "there is no key";
  if (std::max(p.D, p.Dv) > 128) return "a head dim over 128";
  if (p.rules.softcap > 0 || p.rules.alibi_slopes || p.rules.mask.kind != MaskKind::kNone) return "softcap, slopes or a mask";
  if (!(p.rules.softmax_scale > 0)) return "a scale that is not positive";
  for (const Heads* t : {&p.q, &p.k, &p.v, &p.out})
    if (reinterpret_cast<uintptr_t>(t->data) % 16 || (t->batch_stride | t->head_stride | t->row_stride) % 8) return "rows that are not 16-byte aligned";
  if (p.D % 8 || p.Dv % 8) return "rows that are not 16-byte aligned";
  for (const Heads* t : {&p.k, &p.v})
    if (t->data && ((p.Hkv > 1 && t->head_stride == 0) || (p.B > 1 && !p.cu_seqlens_k && t->batch_stride == 0) || t->row_stride < (t == &p.k ? p.D : p.Dv)))
      return "keys or values that are expanded";
  return nullptr;
}

int64_t workspace_bytes(const CudaParams& p) { return wants_flags(p) ? p.B * p.Hkv * flags_per_head(p) * 4 : 0; }

void run(const CudaParams& p) {
  if (p.dtype == DType::kFloat16) run_type<__half>(p);
  else run_type<__nv_bfloat16>(p);
}

}  // namespace taut::attention_prefill::cuda_sm90a_wgmma
