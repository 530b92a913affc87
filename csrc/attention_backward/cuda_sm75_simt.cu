// COMPUTES  dq, dk, dv and ds_aux of softmax(q k^T) v, with the rules of common/attention.h; fp32, bf16 and fp16, all of it in fp32
// LAYOUT    all [B,H,L,D] by strides, rows contiguous; lse [B,Hq,Lq]
// WORK      Four kernels, a warp a row, no atomics: what is added up is added in one order.
//           rows: a query's shift, grad_out . out - grad_lse, and by what its scores become weights (op.h).
//           dq:   a query of a head; each lane takes one of 32 keys, its score and dp; then each lane takes every 32nd column of dq and adds the keys.
//           dkv:  a key of a key head; the same with the queries of all heads that share it, which the rules leave: dk and dv.
//           sinks: a head; each lane adds every 32nd row of all sequences, lane 0 the lanes.
//           repair: dq and dkv of rows and keys in which cuda_sm80_mma met NaN or infinity, which it cannot tell from hidden ones.
//           Scores are computed twice: for dq and for dk, dv. 7 products of D multiply-adds a pair instead of 5 are the price of an order.
// BOUND     loads: two of a number for each multiply-add, of rows that lie in the L1 cache. No GPU has run it yet.
// LIMITS    none: any dtype, head dims to 256, from SM 75 on. It uses no tensor cores: the slower path
#include "attention_backward/cuda_rows.cuh"
#include "common/launch.h"

namespace taut::attention_backward::cuda_sm75_simt {
namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32, kColumns = 8;  // of 256 that a lane has
constexpr unsigned kAllLanes = 0xffffffffu;

// A sequence: its lengths, and the rows of memory before it.
struct Place {
  int b, Lq, Lk;
  int64_t first_q, first_k;
  TAUT_DEVICE Place(const Args& args, int b) : b(b), Lq(args.Lq), Lk(args.Lk), first_q(0), first_k(0) {
    if (!args.cu_seqlens_q) return;
    first_q = args.cu_seqlens_q[b], first_k = args.cu_seqlens_k[b];
    Lq = static_cast<int>(args.cu_seqlens_q[b + 1] - first_q), Lk = static_cast<int>(args.cu_seqlens_k[b + 1] - first_k);
  }
  TAUT_DEVICE int64_t query_at(const Heads& heads, int h, int i) const {
    return b * heads.batch_stride + h * heads.head_stride + (first_q + i) * heads.row_stride;
  }
  TAUT_DEVICE int64_t key_at(const Heads& heads, int h, int j) const {
    return b * heads.batch_stride + h * heads.head_stride + (first_k + j) * heads.row_stride;
  }
  TAUT_DEVICE int64_t lse_at(const Args& args, int h, int i) const { return b * args.lse_batch_stride + h * args.lse_head_stride + first_q + i; }
};

TAUT_DEVICE RowRules rules_of_row(const Args& args, const Place& place, int h, int i) {
  const AttentionMask& mask = args.rules.mask;
  return {place.b * mask.batch_stride + h * mask.head_stride + i * mask.query_stride, i + place.Lk - place.Lq,
          args.rules.alibi_slopes ? args.rules.alibi_slopes[h] * kLog2E : 0.0f};
}

TAUT_DEVICE bool sees(const Args& args, const RowRules& row, int j, int keys) {
  if (j < first_key(args.rules, row.position) || j >= end_key(args.rules, row.position, keys)) return false;
  const AttentionMask& mask = args.rules.mask;
  return mask.kind == MaskKind::kNone || mask_shows(mask, row.mask + j * mask.key_stride);
}

// A row of numbers in shared memory, x, times one in memory.
TAUT_DEVICE float dot(const float* x, const void* y, int64_t y_row, DType dtype, int count) {
  float sum = 0;
  for (int d = 0; d < count; d++) sum = fmaf(x[d], load_number(y, y_row + d, dtype), sum);
  return sum;
}

struct Pair {
  float weight, grad_score;
};
// Of a score's product of q and k, and of dp: the weight, and the gradient of that product.
TAUT_DEVICE Pair pair_of(const Args& args, const RowRules& row, int64_t at, int j, float product, float grad_weight) {
  const float scaled = product * first_scale(args.rules);
  float slope = args.rules.softmax_scale;
  if (args.rules.softcap > 0) {
    const float capped = tanhf(scaled);
    slope *= 1.0f - capped * capped;
  }
  const float weight = exp2f(apply_rules(args.rules, row, j, scaled) - args.most[at] - args.log_total[at]);
  return {weight, weight * (grad_weight - args.shift[at]) * slope};
}

TAUT_DEVICE void load_row(float* row, const void* data, int64_t at, DType dtype, int count, int lane) {
  for (int d = lane; d < count; d += 32) row[d] = load_number(data, at + d, dtype);
}
TAUT_DEVICE void store_row(void* data, int64_t at, DType dtype, int count, int lane, const float (&values)[kColumns]) {
#pragma unroll
  for (int c = 0; c < kColumns; c++)
    if (const int d = lane + 32 * c; d < count) store_number(data, at + d, dtype, values[c]);
}
// values += factor * a row
TAUT_DEVICE void add_row(float (&values)[kColumns], float factor, const void* data, int64_t at, DType dtype, int count, int lane) {
#pragma unroll
  for (int c = 0; c < kColumns; c++)
    if (const int d = lane + 32 * c; d < count) values[c] = fmaf(factor, load_number(data, at + d, dtype), values[c]);
}

// Whether a row's sums are all NaN, which no more terms change. WHY: where a loss overflows all gradients are NaN, and all rows are to be repaired.
TAUT_DEVICE bool all_nan(const float (&values)[kColumns], int count, int lane) {
  bool nan = true;
#pragma unroll
  for (int c = 0; c < kColumns; c++) nan &= lane + 32 * c >= count || values[c] != values[c];
  return __all_sync(kAllLanes, nan);
}

// Which row a warp has, of `rows` of each of `heads` heads of each sequence; rows lie side by side. b < 0: none.
struct Mine {
  int b, h, row;
  TAUT_DEVICE Mine(int batch, int heads, int rows) {
    const int64_t index = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
    b = static_cast<int>(index / rows / heads), h = static_cast<int>(index / rows % heads), row = static_cast<int>(index % rows);
    if (b >= batch) b = -1;
  }
};

__global__ void __launch_bounds__(kThreads) backward_rows(const Args args) {
  const Mine mine(args.batch, args.kv_heads * args.group, args.Lq);
  const int lane = threadIdx.x % 32;
  if (mine.b < 0) return;
  const Place place(args, mine.b);
  if (mine.row >= place.Lq) return;
  const int h = mine.h, i = mine.row;
  const int64_t at = place.lse_at(args, h, i);
  const float lse = args.lse[at];
  if (lse == -INFINITY) {  // it sees nothing: its weights are to be 0
    if (lane == 0) args.most[at] = INFINITY, args.log_total[at] = args.shift[at] = 0;
    return;
  }
  float shift = 0;
  const int64_t grad_row = place.query_at(args.grad_out, h, i), out_row = place.query_at(args.out, h, i);
  for (int d = lane; d < args.Dv; d += 32)
    shift = fmaf(load_number(args.grad_out.data, grad_row + d, args.dtype), load_number(args.out.data, out_row + d, args.dtype), shift);
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) shift += __shfl_xor_sync(kAllLanes, shift, lanes);
  if (args.grad_lse) shift -= args.grad_lse[at];
  float most = lse * kLog2E, log_total = 0;
  if (!(fabsf(lse) <= kLargestLse)) {
    const float sink = args.rules.s_aux ? args.rules.s_aux[h] * kLog2E : kLowest;
    most = sink;
    float total = args.rules.s_aux && lane == 0 ? 1.0f : 0.0f;
    const RowRules row = rules_of_row(args, place, h, i);
    const int64_t q_row = place.query_at(args.q, h, i);
    for (int j = lane; j < place.Lk; j += 32) {
      if (!sees(args, row, j, place.Lk)) continue;
      const int64_t k_row = place.key_at(args.k, h / args.group, j);
      float product = 0;
      for (int d = 0; d < args.D; d++)
        product = fmaf(load_number(args.q.data, q_row + d, args.dtype), load_number(args.k.data, k_row + d, args.dtype), product);
      const float exponent = apply_rules(args.rules, row, j, product * first_scale(args.rules));
      if (!(exponent <= most)) total *= exp2f(most - exponent), most = exponent;  // a NaN stays
      total += exp2f(exponent - most);
    }
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const float other_most = __shfl_xor_sync(kAllLanes, most, lanes), other_total = __shfl_xor_sync(kAllLanes, total, lanes);
      const float higher = fmaxf(most, other_most);
      total = total * exp2f(most - higher) + other_total * exp2f(other_most - higher);
      most = higher;
    }
    log_total = log2f(total);
  }
  if (lane == 0) args.most[at] = most, args.log_total[at] = log_total, args.shift[at] = shift;
}

// Floats of shared memory that a warp has: two rows, and two numbers for each lane.
inline int warp_floats(const Args& args) { return args.D + args.Dv + 64; }

TAUT_DEVICE void make_dq(const Args& args, const Place& place, int h, int i, unsigned char* smem) {
  const int lane = threadIdx.x % 32, kv_head = h / args.group;
  float* s_q = reinterpret_cast<float*>(smem) + threadIdx.x / 32 * (args.D + args.Dv + 64);
  float *s_grad = s_q + args.D, *s_factors = s_grad + args.Dv;
  const int64_t at = place.lse_at(args, h, i);
  float dq[kColumns] = {};
  if (args.lse[at] != -INFINITY) {
    load_row(s_q, args.q.data, place.query_at(args.q, h, i), args.dtype, args.D, lane);
    load_row(s_grad, args.grad_out.data, place.query_at(args.grad_out, h, i), args.dtype, args.Dv, lane);
    const RowRules row = rules_of_row(args, place, h, i);
    const int first = static_cast<int>(first_key(args.rules, row.position)), end = static_cast<int>(end_key(args.rules, row.position, place.Lk));
    for (int key = first / 32 * 32; key < end && !all_nan(dq, args.D, lane); key += 32) {
      __syncwarp();
      const int j = key + lane;
      float factor = 0;
      if (j < end && sees(args, row, j, place.Lk)) {
        const float product = dot(s_q, args.k.data, place.key_at(args.k, kv_head, j), args.dtype, args.D);
        const float grad_weight = dot(s_grad, args.v.data, place.key_at(args.v, kv_head, j), args.dtype, args.Dv);
        factor = pair_of(args, row, at, j, product, grad_weight).grad_score;
      }
      s_factors[lane] = factor;
      __syncwarp();
      for (int other = 0; other < 32; other++)
        // WHY: 0 times a NaN is NaN, and a hidden key has the factor 0
        if (s_factors[other] != 0.0f) add_row(dq, s_factors[other], args.k.data, place.key_at(args.k, kv_head, key + other), args.dtype, args.D, lane);
    }
  }
  store_row(const_cast<void*>(args.dq.data), place.query_at(args.dq, h, i), args.dtype, args.D, lane, dq);
}

// WHY 4 blocks, and 3 below: left to itself nvcc aims at more, and spills.
__global__ void __launch_bounds__(kThreads, 4) backward_dq(const Args args) {
  TAUT_DYNAMIC_SMEM(smem);
  const Mine mine(args.batch, args.kv_heads * args.group, args.Lq);
  if (mine.b < 0) return;
  const Place place(args, mine.b);
  if (mine.row < place.Lq) make_dq(args, place, mine.h, mine.row, smem);
}

TAUT_DEVICE void make_dkv(const Args& args, const Place& place, int kv_head, int j, unsigned char* smem) {
  const int lane = threadIdx.x % 32, ahead = place.Lk - place.Lq;
  float* s_k = reinterpret_cast<float*>(smem) + threadIdx.x / 32 * (args.D + args.Dv + 64);
  float *s_v = s_k + args.D, *s_weights = s_v + args.Dv, *s_factors = s_weights + 32;
  load_row(s_k, args.k.data, place.key_at(args.k, kv_head, j), args.dtype, args.D, lane);
  load_row(s_v, args.v.data, place.key_at(args.v, kv_head, j), args.dtype, args.Dv, lane);
  // The queries that causality and the window leave to the key.
  const int window = static_cast<int>(args.rules.window), first = max(0, args.rules.causal ? j - ahead : window ? j - window + 1 - ahead : 0);
  const int end = window ? min(place.Lq, j + window - ahead) : place.Lq;
  float dk[kColumns] = {}, dv[kColumns] = {};
  for (int h = kv_head * args.group; h < (kv_head + 1) * args.group; h++)
    for (int query = first / 32 * 32; query < end && !(all_nan(dk, args.D, lane) && all_nan(dv, args.Dv, lane)); query += 32) {
      __syncwarp();
      const int i = query + lane;
      Pair pair{};
      if (i < place.Lq && args.lse[place.lse_at(args, h, i)] != -INFINITY) {
        const RowRules row = rules_of_row(args, place, h, i);
        if (sees(args, row, j, place.Lk)) {
          const float product = dot(s_k, args.q.data, place.query_at(args.q, h, i), args.dtype, args.D);
          const float grad_weight = dot(s_v, args.grad_out.data, place.query_at(args.grad_out, h, i), args.dtype, args.Dv);
          pair = pair_of(args, row, place.lse_at(args, h, i), j, product, grad_weight);
        }
      }
      s_weights[lane] = pair.weight, s_factors[lane] = pair.grad_score;
      __syncwarp();
#pragma unroll 1
      for (int other = 0; other < 32; other++) {
        const float weight = s_weights[other], factor = s_factors[other];
        if (weight != 0.0f) add_row(dv, weight, args.grad_out.data, place.query_at(args.grad_out, h, query + other), args.dtype, args.Dv, lane);
        if (factor != 0.0f) add_row(dk, factor, args.q.data, place.query_at(args.q, h, query + other), args.dtype, args.D, lane);
      }
    }
  store_row(const_cast<void*>(args.dk.data), place.key_at(args.dk, kv_head, j), args.dtype, args.D, lane, dk);
  store_row(const_cast<void*>(args.dv.data), place.key_at(args.dv, kv_head, j), args.dtype, args.Dv, lane, dv);
}

__global__ void __launch_bounds__(kThreads, 4) backward_dkv(const Args args) {
  TAUT_DYNAMIC_SMEM(smem);
  const Mine mine(args.batch, args.kv_heads, args.Lk);
  if (mine.b < 0) return;
  const Place place(args, mine.b);
  if (mine.row < place.Lk) make_dkv(args, place, mine.h, mine.row, smem);
}

// A block has the rows of a flag.
__global__ void __launch_bounds__(kThreads, 3) backward_repair_dq(const Args args) {
  TAUT_DYNAMIC_SMEM(smem);
  const Flags& flags = args.flags;
  const int flag = static_cast<int>(blockIdx.x) % flags.row_flags, head = static_cast<int>(blockIdx.x) / flags.row_flags, kv_head = head % args.kv_heads;
  const Place place(args, head / args.kv_heads);
  const int first = flag * flags.rows_per_flag, end = min(first + flags.rows_per_flag, place.Lq * args.group);
  if (first >= end || flags.rows[blockIdx.x] == 0) return;
  for (int row = first + static_cast<int>(threadIdx.x) / 32; row < end; row += kWarps) {
    __syncwarp();
    make_dq(args, place, kv_head * args.group + row % args.group, row / args.group, smem);
  }
}

// A block has the keys of a flag.
__global__ void __launch_bounds__(kThreads, 3) backward_repair_dkv(const Args args) {
  TAUT_DYNAMIC_SMEM(smem);
  const Flags& flags = args.flags;
  const int flag = static_cast<int>(blockIdx.x) % flags.key_flags, head = static_cast<int>(blockIdx.x) / flags.key_flags;
  const Place place(args, head / args.kv_heads);
  const int first = flag * flags.keys_per_flag, end = min(first + flags.keys_per_flag, place.Lk);
  if (first >= end) return;
  bool any = false;
  for (int part = 0; part < flags.parts; part++) any |= flags.keys[int64_t{blockIdx.x} * flags.parts + part] != 0;
  if (!any) return;
  for (int j = first + static_cast<int>(threadIdx.x) / 32; j < end; j += kWarps) {
    __syncwarp();
    make_dkv(args, place, head % args.kv_heads, j, smem);
  }
}

// ds_aux[h] = - sum of the sink's weight times the row's shift.
__global__ void __launch_bounds__(32) backward_sinks(const Args args) {
  const int h = static_cast<int>(blockIdx.x), lane = threadIdx.x;
  float sum = 0;
  for (int b = 0; b < args.batch; b++) {
    const Place place(args, b);
    for (int i = lane; i < place.Lq; i += 32) {
      const int64_t at = place.lse_at(args, h, i);
      if (args.lse[at] != -INFINITY) sum -= expf(args.rules.s_aux[h] - args.lse[at]) * args.shift[at];
    }
  }
  float all = 0;
  for (int other = 0; other < 32; other++) all += __shfl_sync(kAllLanes, sum, other);
  if (lane == 0) args.ds_aux[h] = all;
}

void start(const CudaParams& p, const Args& args, const char* name, void (*kernel)(Args), int64_t blocks, int smem_bytes) {
  if (blocks > 0) launch(name, kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), smem_bytes, p.stream, args);
}
inline int64_t blocks_of(int64_t warps) { return (warps + kWarps - 1) / kWarps; }
inline int smem_bytes(const Args& args) { return kWarps * warp_floats(args) * 4; }

}  // namespace

void prepare(const CudaParams& p) { start(p, args_of(p), "attention_backward rows", backward_rows, blocks_of(p.B * p.Hq * p.Lq), 0); }

void run(const CudaParams& p) {
  const Args args = args_of(p);
  prepare(p);
  start(p, args, "attention_backward dq", backward_dq, blocks_of(p.B * p.Hq * p.Lq), smem_bytes(args));
  start(p, args, "attention_backward dkv", backward_dkv, blocks_of(p.B * p.Hkv * p.Lk), smem_bytes(args));
  finish(p);
}

void repair(const CudaParams& p, const Flags& flags) {
  Args args = args_of(p);
  args.flags = flags;
  start(p, args, "attention_backward repair dq", backward_repair_dq, p.B * p.Hkv * flags.row_flags, smem_bytes(args));
  start(p, args, "attention_backward repair dkv", backward_repair_dkv, p.B * p.Hkv * flags.key_flags, smem_bytes(args));
}

void finish(const CudaParams& p) {
  if (p.ds_aux) launch("attention_backward sinks", backward_sinks, dim3(static_cast<unsigned>(p.Hq)), dim3(32), 0, p.stream, args_of(p));
}

}  // namespace taut::attention_backward::cuda_sm75_simt
