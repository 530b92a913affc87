// The walk through the layers, for every ISA: each kernel file compiles its own copy with its own flags. Dot is its arithmetic of
// attention (dots.h, cpu_scalar.cpp):
//   Dot::scores(q, rows, D, keys, dtype, n, out)     out[r * kChunk + t] = q[r] . keys[t];  rows <= kGroup of q, [rows][D] fp32
//   Dot::weighted(p, rows, D, values, dtype, n, out) out[r * D + d] = sum over t of p[r * kChunk + t] * values[t * D + d]
//
// A team of threads (common/parallel.h) goes through it together. A layer has five barriers: after each of its four matmuls and
// after attention. What attention does, in tasks of (sequence, KV head, chunk of keys), each with all queries of that head's group:
//   rotate the new keys of the chunk and store them with their values; rotate the queries; scores; softmax within the chunk (its
//   largest score and its sum are kept); the weighted sum of values. Who finishes the last chunk of a head merges them, in order.
#pragma once

#include "common/rope_math.h"
#include "decoder_layers/op.h"

namespace taut::decoder_layers {
namespace {

constexpr int64_t kGroup = 4;

inline void linear(const Params& p, const Linear& w, const void* x, quant_linear::Prologue prologue, const Norm& norm, void* out, const void* residual) {
  using quant_linear::Prologue;
  quant_linear::Params call{};
  call.x = x;
  call.x_row_stride = quant_linear::is_glu(prologue) ? 2 * w.weight.K : w.weight.K;
  call.packed = w.packed;
  call.bias = w.bias;
  call.out = out;
  call.dtype = p.dtype;
  call.M = p.B * p.T;
  call.weight = w.weight;
  call.pattern = w.pattern;
  call.activations = w.activations;
  call.num_threads = w.num_threads;
  call.prologue = prologue == Prologue::kRmsNorm && !norm.weight ? Prologue::kNone : prologue;
  call.norm_weight = norm.weight;
  call.norm_dtype = norm.dtype;
  call.norm_eps = p.norm_eps;
  call.norm_offset = p.norm_offset;
  call.residual = residual;
  w.run(call);
}

// x += multiplier * norm(sublayer)
inline void add_sublayer(const Params& p, const Norm& norm) {
  const int64_t rows = p.B * p.T, H = p.hidden, tasks = std::min(p.num_threads, rows);
  parallel_tasks(tasks, [&](int64_t task) {
    float* row = reinterpret_cast<float*>(scratch(1, H * sizeof(float)));
    for (int64_t m = rows * task / tasks; m < rows * (task + 1) / tasks; m++) {
      load_head(p.sublayer, m * H, p.dtype, H, norm.weight, norm.dtype, p.norm_eps, p.norm_offset, row);
      for_dtype(p.dtype, [&]<DType kDType>() {
        for (int64_t k = 0; k < H; k += 8) {
          const int64_t count = std::min<int64_t>(8, H - k);
          FloatLanes v, x;
          load_lanes<DType::kFloat32>(v, row, k, count);
          load_lanes<kDType>(x, p.x, m * H + k, count);
          store_lanes<kDType>(x + v * p.residual_multiplier, p.x, m * H + k, count);
        }
      });
    }
  });
}

inline void linear_and_add(const Params& p, const Linear& w, const void* x, quant_linear::Prologue prologue, const Norm& post_norm) {
  if (!post_norm.weight && p.residual_multiplier == 1.0f) return linear(p, w, x, prologue, {}, p.x, p.x);
  linear(p, w, x, prologue, {}, p.sublayer, nullptr);
  add_sublayer(p, post_norm);
}

// A piece of memory of D-element rows.
inline char* at(void* base, int64_t index, DType dtype) { return static_cast<char*>(base) + index * dtype_bytes(dtype); }

struct Partial {  // what a chunk leaves: [queries] largest scores, [queries] sums, [queries][D] weighted values
  float *largest, *sum, *values;
  Partial(const Params& p, float* memory) : largest(memory), sum(memory + p.queries()), values(memory + 2 * p.queries()) {}
};

// Scores of one query against n keys from row `first` of the buffer on, to exponentials, in place; those it does not see become 0.
inline void softmax_chunk(const Params& p, const Layer& layer, int64_t b, int64_t t, int64_t first, int64_t n, float* scores /* [kChunk] */, float& largest,
                          float& sum) {
  const int64_t position = layer.length + t, begin = std::max(layer.begin, layer.window > 0 ? position - layer.window + 1 : 0);
  const int64_t padded = (n + 7) / 8 * 8, low = std::clamp<int64_t>(begin - first, 0, n), high = std::clamp<int64_t>(position + 1 - first, low, n);
  const float hidden = -__builtin_inff();
  if (p.attn_softcap > 0)
    for (int64_t i = 0; i < padded; i += 8) {
      FloatLanes v;
      load_lanes<DType::kFloat32>(v, scores, i);
      v = v / p.attn_softcap;
      tanh_lanes(v);
      store_lanes<DType::kFloat32>(v * p.attn_softcap, scores, i);
    }
  for (int64_t i = 0; i < low; i++) scores[i] = hidden;
  for (int64_t i = high; i < padded; i++) scores[i] = hidden;
  if (p.mask) {
    const uint8_t* mask = p.mask + b * p.mask_columns + (p.mask_columns - layer.length - p.T) + first;
    for (int64_t i = low; i < high; i++) scores[i] = mask[i] ? scores[i] : hidden;
  }
  FloatLanes most = FloatLanes{} - __builtin_inff(), total = {};
  for (int64_t i = 0; i < padded; i += 8) {
    FloatLanes v;
    load_lanes<DType::kFloat32>(v, scores, i);
    most = (v > most) ? v : most;
  }
  largest = most[0];
  for (int i = 1; i < 8; i++) largest = std::max(largest, most[i]);
  const float shift = largest == hidden ? 0.0f : largest;  // nothing is seen: all exponentials are 0
  for (int64_t i = 0; i < padded; i += 8) {
    FloatLanes v;
    load_lanes<DType::kFloat32>(v, scores, i);
    v = v - shift;
    exp_lanes(v);
    store_lanes<DType::kFloat32>(v, scores, i);
    total += v;
  }
  sum = sum_lanes(total);
}

// The new keys and values that belong in rows [first, last) of one head's buffers.
inline void store_new_rows(const Params& p, const Layer& layer, int64_t b, int64_t kv_head, int64_t first, int64_t last, float* row) {
  const int64_t D = p.head_dim, width = (p.q_heads + 2 * p.kv_heads) * D;
  for (int64_t r = std::max(first, layer.length); r < last; r++) {
    const int64_t t = r - layer.length, token = b * p.T + t, rope = (layer.shared_rope ? t : token) * layer.rotated;
    const int64_t key = token * width + (p.q_heads + kv_head) * D;
    load_head(p.qkv, key, p.dtype, D, layer.k_norm.weight, layer.k_norm.dtype, p.qk_norm_eps, p.norm_offset, row);
    rotate_row(row, layer.cos, layer.sin, rope, layer.rope_dtype, layer.rotated);
    store_floats(row, D, layer.keys, b * layer.key_batch_stride + kv_head * layer.key_head_stride + r * D, layer.cache_dtype);
    load_floats(p.qkv, key + p.kv_heads * D, p.dtype, D, row);
    store_floats(row, D, layer.values, b * layer.value_batch_stride + kv_head * layer.value_head_stride + r * D, layer.cache_dtype);
  }
}

// The queries of one KV head, [T][Hq / Hkv][D], rotated and scaled.
inline void load_queries(const Params& p, const Layer& layer, int64_t b, int64_t kv_head, float* q) {
  const int64_t D = p.head_dim, group = p.q_heads / p.kv_heads, width = (p.q_heads + 2 * p.kv_heads) * D;
  for (int64_t t = 0; t < p.T; t++) {
    const int64_t token = b * p.T + t, rope = (layer.shared_rope ? t : token) * layer.rotated;
    for (int64_t g = 0; g < group; g++, q += D) {
      load_head(p.qkv, token * width + (kv_head * group + g) * D, p.dtype, D, layer.q_norm.weight, layer.q_norm.dtype, p.qk_norm_eps, p.norm_offset, q);
      rotate_row(q, layer.cos, layer.sin, rope, layer.rope_dtype, layer.rotated);
      for (int64_t d = 0; d < D; d++) q[d] *= p.attn_scale;
    }
  }
}

// All chunks of one head, in order, to its rows of `attended`. A query that saw no key gives zeros.
inline void merge_chunks(const Params& p, int64_t b, int64_t kv_head, const float* partials, int64_t chunks, float* row) {
  const int64_t D = p.head_dim, group = p.q_heads / p.kv_heads;
  for (int64_t i = 0; i < p.queries(); i++) {
    float largest = -__builtin_inff(), sum = 0;
    for (int64_t c = 0; c < chunks; c++) largest = std::max(largest, partials[c * p.partial_elems() + i]);
    for (int64_t c = 0; c < chunks; c++) {
      const Partial part(p, const_cast<float*>(partials) + c * p.partial_elems());
      const float factor = part.largest[i] == largest ? 1.0f : __builtin_expf(part.largest[i] - largest);
      sum += factor * part.sum[i];
      const float* values = part.values + i * D;
      if (c == 0)
        for (int64_t d = 0; d < D; d++) row[d] = factor * values[d];
      else
        for (int64_t d = 0; d < D; d++) row[d] += factor * values[d];
    }
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
    for (int64_t d = 0; d < D; d++) row[d] *= inverse;
    store_floats(row, D, p.attended, ((b * p.T + i / group) * p.q_heads + kv_head * group + i % group) * D, p.dtype);
  }
}

template <class Dot>
inline void attend(const Params& p, const Layer& layer) {
  const int64_t D = p.head_dim, R = p.queries(), end = layer.length + p.T;
  const int64_t begin = std::max(layer.begin, layer.window > 0 ? layer.length - layer.window + 1 : 0);
  const int64_t chunk0 = begin / kChunk, chunks = (end + kChunk - 1) / kChunk - chunk0, heads = p.B * p.kv_heads, items = heads * chunks;
  const int64_t tasks = std::min(p.num_threads, items);
  parallel_tasks(tasks, [&](int64_t task) {
    float* q = reinterpret_cast<float*>(scratch(1, (R * D + kGroup * kChunk + D) * sizeof(float)));
    float *scores = q + R * D, *row = scores + kGroup * kChunk;
    int64_t loaded = -1;
    for (int64_t item = items * task / tasks; item < items * (task + 1) / tasks; item++) {
      const int64_t head = item / chunks, chunk = item % chunks, b = head / p.kv_heads, kv_head = head % p.kv_heads;
      const int64_t first = std::max(begin, (chunk0 + chunk) * kChunk), n = std::min(end, (chunk0 + chunk + 1) * kChunk) - first;
      store_new_rows(p, layer, b, kv_head, first, first + n, row);
      if (loaded != head) load_queries(p, layer, b, kv_head, q);
      loaded = head;
      const void* keys = at(layer.keys, b * layer.key_batch_stride + kv_head * layer.key_head_stride + first * D, layer.cache_dtype);
      const void* values = at(layer.values, b * layer.value_batch_stride + kv_head * layer.value_head_stride + first * D, layer.cache_dtype);
      const Partial part(p, p.partials + item * p.partial_elems());
      for (int64_t i = 0; i < R; i += kGroup) {
        const int64_t rows = std::min(kGroup, R - i);
        Dot::scores(q + i * D, rows, D, keys, layer.cache_dtype, n, scores);
        for (int64_t r = 0; r < rows; r++)
          softmax_chunk(p, layer, b, (i + r) / (p.q_heads / p.kv_heads), first, n, scores + r * kChunk, part.largest[i + r], part.sum[i + r]);
        Dot::weighted(scores, rows, D, values, layer.cache_dtype, n, part.values + i * D);
      }
      int32_t& finished = p.finished[head];
      if (__atomic_add_fetch(&finished, 1, __ATOMIC_ACQ_REL) == chunks) {
        merge_chunks(p, b, kv_head, p.partials + head * chunks * p.partial_elems(), chunks, row);
        finished = 0;
      }
    }
  });
}

template <class Dot>
inline void run_layers(const Params& p) {
  using quant_linear::Prologue;
  team(p.num_threads, [&](int64_t) {
    for (int64_t i = 0; i < p.num_layers; i++) {
      const Layer& layer = p.layers[i];
      linear(p, layer.qkv, p.x, Prologue::kRmsNorm, layer.attn_norm, p.qkv, nullptr);
      attend<Dot>(p, layer);
      linear_and_add(p, layer.o, p.attended, Prologue::kNone, layer.attn_post_norm);
      linear(p, layer.gate_up, p.x, Prologue::kRmsNorm, layer.mlp_norm, p.gate_up, nullptr);
      linear_and_add(p, layer.down, p.gate_up, p.glu, layer.mlp_post_norm);
    }
  });
}

}  // namespace
}  // namespace taut::decoder_layers
