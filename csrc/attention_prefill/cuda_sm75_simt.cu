// COMPUTES  out = softmax(q k^T) v and lse, with the rules of common/attention.h; fp32, bf16 and fp16, all of it in fp32
// LAYOUT    q, k, v, out [B,H,L,D] by strides, rows contiguous; lse [B,Hq,Lq]
// WORK      A block has 32 rows (attention_rows.cuh) and goes over tiles of kKeys keys that are made fp32 in shared memory, k and v in one buffer.
//           Eight lanes share two rows: a lane has every eighth key of the scores, and every eighth four columns of the sums. Softmax online.
//           `repair` does so for the rows in which the mma kernels met NaN or infinity, which they cannot tell from hidden ones.
// BOUND     fp32 FMA and shared memory: 6 reads of 16 bytes for 32 multiply-adds in q k^T
// LIMITS    none: any dtype, head dims to 256, from SM 75 on. It uses no tensor cores: the slower path
#include "attention_prefill/cuda_rows.cuh"
#include "common/launch.h"
#include "common/ptx.cuh"

namespace taut::attention_prefill::cuda_sm75_simt {
namespace {

constexpr int kRows = 32, kThreads = 128;

// Floats between rows in shared memory. WHY an odd number of four: eight rows at once meet no bank conflict.
TAUT_DEVICE int row_floats(int width) { return 4 * ((width + 3) / 4 | 1); }
inline int smem_bytes(const Args& args, int keys) {
  const int width = std::max(args.D, args.Dv), floats = 4 * ((width + 3) / 4 | 1);
  return (kRows + keys) * floats * 4 + kRows * keys * 4 + kRows * static_cast<int>(sizeof(RowRules));
}

// `count` rows of `width` numbers to fp32 in shared memory, those that are not there as zeros.
template <class RowAt>
TAUT_DEVICE void load_rows(float* s_rows, int stride, const void* data, DType dtype, int count, int present, int width, const RowAt& row_at) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int r = warp; r < count; r += kThreads / 32) {
    const int64_t at = r < present ? row_at(r) : 0;
    for (int d = lane; d < (width + 3) / 4 * 4; d += 32) s_rows[r * stride + d] = r < present && d < width ? load_number(data, at + d, dtype) : 0.0f;
  }
}

// kColumns: fours of value columns that a lane has, 32 apart.
template <int kColumns, int kKeys>
__global__ void __launch_bounds__(kThreads, 2) attention_simt(const Args args) {
#if TAUT_ARCH_AT_LEAST(90)
  ptx::griddep_wait();  // as `repair` it begins before the kernel is done that writes the flags
#endif
  constexpr int kLaneKeys = kKeys / 8;
  const Block block = Block::mine(args, kRows);
  const int rows = min(kRows, block.rows - block.first_row);
  if (rows <= 0) return;
  const int* flags = args.flags ? args.flags + (int64_t{block.b} * args.kv_heads + block.kv_head) * args.flags_per_head : nullptr;
  if (flags) {
    bool any = false;
    for (int row = 0; row < rows; row += args.rows_per_flag) any |= flags[(block.first_row + row) / args.rows_per_flag] != 0;
    if (!any) return;
  }
  TAUT_DYNAMIC_SMEM(smem);
  const int stride = row_floats(max(args.D, args.Dv));
  RowRules* s_rules = reinterpret_cast<RowRules*>(smem);
  float* s_q = reinterpret_cast<float*>(s_rules + kRows);
  float* s_kv = s_q + kRows * stride;
  float* s_weights = s_kv + kKeys * stride;  // [kRows][kKeys]
  const int x = threadIdx.x % 8, y = threadIdx.x / 8 * 2;

  load_rows(s_q, stride, args.q.data, args.dtype, kRows, rows, args.D, [&](int r) { return block.query_at(args, args.q, block.first_row + r); });
  if (threadIdx.x < kRows) s_rules[threadIdx.x] = rules_of_row(args, block, block.first_row + threadIdx.x);
  float sums[2][kColumns][4] = {}, most[2], total[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    most[r] = sink_of(args, block, block.first_row + y + r);
    total[r] = most[r] > kLowest && x == 0 ? 1.0f : 0.0f;  // of this lane's keys, and the sink
  }
  const KeyRange keys(args.rules, block.position(args, block.first_row), block.position(args, block.first_row + rows - 1), block.Lk);
  const AttentionMask& mask = args.rules.mask;
  const float scale = first_scale(args.rules);
  // WHY tiles begin at multiples of kKeys: then a row's sums do not depend on the rows around it
  for (int key = keys.first / kKeys * kKeys; key < keys.end; key += kKeys) {
    const int present = min(kKeys, block.Lk - key);
    __syncthreads();
    load_rows(s_kv, stride, args.k.data, args.dtype, kKeys, present, args.D, [&](int r) { return block.keys_at(args.k) + (key + r) * args.k.row_stride; });
    __syncthreads();
    uint32_t visible = 0;  // bit r * kLaneKeys + i
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const RowRules row = s_rules[y + r];
      const int first = static_cast<int>(first_key(args.rules, row.position)), end = static_cast<int>(end_key(args.rules, row.position, block.Lk));
#pragma unroll
      for (int i = 0; i < kLaneKeys; i++) {
        const int j = key + x + 8 * i;
        const bool seen = j >= first && j < end && (mask.kind == MaskKind::kNone || mask_shows(mask, row.mask + j * mask.key_stride));
        visible |= static_cast<uint32_t>(seen) << (r * kLaneKeys + i);
      }
    }
    const bool any = __any_sync(0xffffffffu, visible != 0);
    if (any) {
      float scores[2][kLaneKeys] = {};
      for (int d = 0; d < args.D; d += 4) {
        const float4 q[2] = {*reinterpret_cast<const float4*>(s_q + y * stride + d), *reinterpret_cast<const float4*>(s_q + (y + 1) * stride + d)};
#pragma unroll
        for (int i = 0; i < kLaneKeys; i++) {
          const float4 k = *reinterpret_cast<const float4*>(s_kv + (x + 8 * i) * stride + d);
#pragma unroll
          for (int r = 0; r < 2; r++)
            scores[r][i] = __fmaf_rn(q[r].w, k.w, __fmaf_rn(q[r].z, k.z, __fmaf_rn(q[r].y, k.y, __fmaf_rn(q[r].x, k.x, scores[r][i]))));
        }
      }
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const RowRules row = s_rules[y + r];
        float highest = most[r];
#pragma unroll
        for (int i = 0; i < kLaneKeys; i++) {
          const bool seen = visible >> (r * kLaneKeys + i) & 1;
          scores[r][i] = seen ? apply_rules(args.rules, row, key + x + 8 * i, scores[r][i] * scale) : -INFINITY;
          highest = fmaxf(highest, scores[r][i]);
        }
#pragma unroll
        for (int lanes = 1; lanes < 8; lanes *= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, lanes));
        const float shrink = exp2f(most[r] - highest);
        most[r] = highest, total[r] *= shrink;
#pragma unroll
        for (int c = 0; c < kColumns; c++)
#pragma unroll
          for (int e = 0; e < 4; e++) sums[r][c][e] *= shrink;
#pragma unroll
        for (int i = 0; i < kLaneKeys; i++) {
          const float weight = exp2f(scores[r][i] - highest);
          total[r] += weight;
          s_weights[(y + r) * kKeys + x + 8 * i] = weight;
        }
      }
    }
    __syncthreads();
    load_rows(s_kv, stride, args.v.data, args.dtype, kKeys, present, args.Dv, [&](int r) { return block.keys_at(args.v) + (key + r) * args.v.row_stride; });
    __syncthreads();
    if (any) {
      for (int j = 0; j < present; j++) {
        const float weight[2] = {s_weights[y * kKeys + j], s_weights[(y + 1) * kKeys + j]};
        float4 v[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; c++)
          v[c] = x * 4 + 32 * c < args.Dv ? *reinterpret_cast<const float4*>(s_kv + j * stride + x * 4 + 32 * c) : make_float4(0, 0, 0, 0);
#pragma unroll
        for (int r = 0; r < 2; r++)
          if (weight[r] != 0.0f) {  // WHY: 0 times a NaN is NaN, and a hidden key has the weight 0
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
              sums[r][c][0] = __fmaf_rn(weight[r], v[c].x, sums[r][c][0]), sums[r][c][1] = __fmaf_rn(weight[r], v[c].y, sums[r][c][1]);
              sums[r][c][2] = __fmaf_rn(weight[r], v[c].z, sums[r][c][2]), sums[r][c][3] = __fmaf_rn(weight[r], v[c].w, sums[r][c][3]);
            }
          }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], lanes);
    const int row = block.first_row + y + r;
    if (y + r >= rows || (flags && flags[row / args.rows_per_flag] == 0)) continue;
    const float inverse = inverse_of(total[r]);
    const int64_t at = block.query_at(args, args.out, row);
#pragma unroll
    for (int c = 0; c < kColumns; c++)
#pragma unroll
      for (int e = 0; e < 4; e++)
        if (const int d = x * 4 + 32 * c + e; d < args.Dv) store_number(const_cast<void*>(args.out.data), at + d, args.dtype, sums[r][c][e] * inverse);
    if (x == 0) args.lse[block.lse_at(args, row)] = lse_of_row(total[r], most[r]);
  }
}

void run_kernel(const CudaParams& p, Args args) {
  const int width = static_cast<int>(std::max(p.D, p.Dv));
  const auto start = [&](void (*kernel)(Args), int keys) {
    const dim3 grid = grid_of(args, kRows);
    if (args.flags) launch_dependent(*p.device, "attention_prefill repair", kernel, grid, dim3(kThreads), smem_bytes(args, keys), p.stream, args);
    else launch("attention_prefill simt", kernel, grid, dim3(kThreads), smem_bytes(args, keys), p.stream, args);
  };
  if (width <= 64) start(attention_simt<2, 32>, 32);
  else if (width <= 128) start(attention_simt<4, 32>, 32);
  else start(attention_simt<8, 16>, 16);
}

}  // namespace

void run(const CudaParams& p) { run_kernel(p, args_of(p)); }

void repair(const CudaParams& p, const int* flags, int flags_per_head, int rows_per_flag) {
  Args args = args_of(p);
  args.flags = const_cast<int*>(flags), args.flags_per_head = flags_per_head, args.rows_per_flag = rows_per_flag;
  run_kernel(p, args);
}

}  // namespace taut::attention_prefill::cuda_sm75_simt
