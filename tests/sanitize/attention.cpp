// The kernels of attention, of its gradients and of its caches, as kernels.cpp does it for weights: each buffer ends at a guard page, what
// must be written starts as NaN, as does every byte of a cache past its sequence; results are checked against a plain loop.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "attention_backward/op.h"
#include "attention_decode/op.h"
#include "attention_prefill/op.h"
#include "common/cpu_features.h"
#include "guarded.h"
#include "kv_append/op.h"

namespace taut {

extern int num_workers;     // kernels.cpp
int64_t check_attention();  // how many checks were made

namespace {

template <class Params>
struct AttentionImpl {
  const char* name;
  void (*run)(const Params&);
  bool can_run;
};
// attention.inc, by build.py: the rows of the tables of the ops' op.cpp, each in the macro of its op.
#define TAUT_IMPL_attention_prefill(name, run, takes, can_run) {name, run, can_run},
#define TAUT_IMPL_attention_backward(...)
#define TAUT_IMPL_attention_decode(...)
#define TAUT_IMPL_kv_append(...)
const AttentionImpl<attention_prefill::Params> kPrefillImpls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_prefill
#undef TAUT_IMPL_attention_backward
#define TAUT_IMPL_attention_prefill(...)
#define TAUT_IMPL_attention_backward(name, run, takes, can_run) {name, run, can_run},
const AttentionImpl<attention_backward::Params> kBackwardImpls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_backward
#undef TAUT_IMPL_attention_decode
#define TAUT_IMPL_attention_backward(...)
#define TAUT_IMPL_attention_decode(name, run, takes, can_run) {name, run, can_run},
const AttentionImpl<attention_decode::Params> kDecodeImpls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_decode
#undef TAUT_IMPL_kv_append
#define TAUT_IMPL_attention_decode(...)
#define TAUT_IMPL_kv_append(name, run, takes, can_run) {name, run, can_run},
const AttentionImpl<kv_append::Params> kAppendImpls[] = {
#include "attention.inc"
};

std::mt19937 bits(2);
int64_t checks = 0;

void expect(bool condition, const std::string& what) {
  checks++;
  if (condition) return;
  std::fprintf(stderr, "FAILED: %s\n", what.c_str());
  std::exit(1);
}
float random_float() { return std::normal_distribution<float>()(bits); }
bool same(const GuardedBlock& a, const GuardedBlock& b) { return a.bytes() == b.bytes() && std::equal(a.data(), a.data() + a.bytes(), b.data()); }

// 0 to count - 1: what test number `turn` has of one setting, whatever it has of others.
int64_t pick(int64_t turn, const char* setting, int64_t count) {
  uint64_t hash = static_cast<uint64_t>(turn) * 0x9e3779b97f4a7c15;
  for (const char* c = setting; *c; c++) hash = (hash ^ static_cast<uint64_t>(*c)) * 0x100000001b3;
  return static_cast<int64_t>((hash ^ hash >> 32) % static_cast<uint64_t>(count));
}

GuardedBlock floats(int64_t count, DType dtype = DType::kFloat32, float scale = 1) {
  GuardedBlock block(count * dtype_bytes(dtype), dtype_bytes(dtype));
  for (int64_t i = 0; i < count; i++) store_float(block.data(), i, dtype, random_float() * scale);
  return block;
}

// [B,H,L,D], rows `gap` elements apart, heads before tokens or after them; the last row ends the memory.
struct Tensor4 {
  int64_t B, H, L, D;
  DType dtype;
  Heads heads;
  GuardedBlock memory;

  Tensor4(int64_t B, int64_t H, int64_t L, int64_t D, DType dtype, int64_t gap, bool tokens_first, bool fill = true) : B(B), H(H), L(L), D(D), dtype(dtype) {
    const int64_t row = D + gap, rows = B * H * L, elements = rows ? (rows - 1) * row + D : 0;
    memory = GuardedBlock(elements * dtype_bytes(dtype), dtype_bytes(dtype));
    heads = tokens_first ? Heads{memory.data(), H * L * row, row, H * row} : Heads{memory.data(), H * L * row, L * row, row};
    for (int64_t r = 0; fill && r < rows; r++)
      for (int64_t d = 0; d < D; d++) store_float(memory.data(), r * row + d, dtype, random_float());
  }
  double at(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return load_float(memory.data(), b * heads.batch_stride + h * heads.head_stride + i * heads.row_stride + d, dtype);
  }
};

// The rules of a call, and the memory they point to.
struct Rules {
  AttentionRules rules;
  GuardedBlock sinks, slopes, mask;

  Rules(int64_t turn, int64_t B, int64_t Hq, int64_t Lq, int64_t keys, int64_t D) : sinks(floats(Hq)), slopes(floats(Hq, DType::kFloat32, 0.1f)) {
    rules.softmax_scale = 1 / std::sqrt(static_cast<float>(D));
    rules.causal = pick(turn, "causal", 2);
    rules.window = pick(turn, "window", 3) == 0 ? 1 + pick(turn, "width", 70) : 0;
    rules.softcap = pick(turn, "softcap", 4) == 0 ? 3.0f : 0.0f;
    if (pick(turn, "sinks", 3) == 0) rules.s_aux = reinterpret_cast<const float*>(sinks.data());
    if (pick(turn, "slopes", 4) == 0) rules.alibi_slopes = reinterpret_cast<const float*>(slopes.data());
    switch (pick(turn, "mask", 7)) {
      case 0: hide(Lq * keys, {MaskKind::kBool, nullptr, DType::kFloat32, 0, 0, keys, 1}); break;             // [Lq,keys]
      case 1: hide(Hq * keys * Lq, {MaskKind::kBool, nullptr, DType::kFloat32, 0, keys * Lq, 1, Lq}); break;  // [1,Hq,keys,Lq], transposed
      case 2: add(B * keys, {MaskKind::kAdditive, nullptr, DType::kBFloat16, keys, 0, 0, 1}); break;          // [B,1,1,keys]
      case 3: {                                                                                               // [B,Hq,Lq,keys], rows apart
        const int64_t row = keys + 3, rows = B * Hq * Lq;
        add((rows - 1) * row + keys, {MaskKind::kAdditive, nullptr, DType::kFloat32, Hq * Lq * row, Lq * row, row, 1});
        break;
      }
      case 4: add(Lq, {MaskKind::kAdditive, nullptr, DType::kFloat16, 0, 0, 1, 0}); break;  // [Lq,1]
    }
    // All keys of every third query, as low as transformers puts what it hides: of such a row only the number of keys counts.
    if (rules.mask.kind == MaskKind::kAdditive && rules.mask.dtype == DType::kFloat32 && !rules.s_aux)
      for (int64_t row = 0; row < B * Hq * Lq; row += 3)
        for (int64_t j = 0; j < keys; j++) store_float(mask.data(), row * (keys + 3) + j, DType::kFloat32, -1e30f);
  }

 private:
  void hide(int64_t count, const AttentionMask& as) {
    mask = GuardedBlock(count);
    for (int64_t i = 0; i < count; i++) mask.data()[i] = bits() % 4 != 0;
    rules.mask = as, rules.mask.data = mask.data();
  }
  void add(int64_t count, const AttentionMask& as) {
    mask = floats(count, as.dtype);
    for (int64_t i = 0; i < count; i += 3) store_float(mask.data(), i, as.dtype, -INFINITY);
    rules.mask = as, rules.mask.data = mask.data();
  }
};

// What row [b,h,i] gives a key: its weight, and by how much the score grows with q . k.
struct Weight {
  double weight, slope;
};
// Of `length` keys, the query at `position`; key(j, d). Returns the log of the sum of exponentials; -infinity: no key is seen.
template <class Q, class K>
double weigh(const AttentionRules& rules, int64_t b, int64_t h, int64_t i, int64_t position, int64_t length, int64_t D, const Q& q, const K& key,
             std::vector<Weight>& weights) {
  double most = rules.s_aux ? rules.s_aux[h] : -INFINITY;
  weights.assign(length, {-INFINITY, 0.0});
  for (int64_t j = 0; j < length; j++) {
    const double distance = static_cast<double>(position - j), bias = mask_value(rules.mask, b, h, i, j);
    if ((rules.causal && distance < 0) || (rules.window && std::fabs(distance) >= static_cast<double>(rules.window)) || bias == -INFINITY) continue;
    double score = 0, slope = rules.softmax_scale;
    for (int64_t d = 0; d < D; d++) score += q(d) * key(j, d);
    score *= rules.softmax_scale;
    if (rules.softcap > 0) {
      const double capped = std::tanh(score / rules.softcap);
      score = rules.softcap * capped, slope *= 1 - capped * capped;
    }
    if (rules.alibi_slopes) score -= rules.alibi_slopes[h] * std::fabs(distance);
    weights[j] = {score + bias, slope};  // not a weight yet
    most = std::max(most, weights[j].weight);
  }
  if (most == -INFINITY) return most;
  double total = rules.s_aux ? std::exp(rules.s_aux[h] - most) : 0.0;
  for (const Weight& weight : weights) total += std::exp(weight.weight - most);
  for (Weight& weight : weights) weight.weight = std::exp(weight.weight - most) / total;
  return most + std::log(total);
}

// Row [b,h,i] in double: key(j, d), value(j, d). sizes[d]: the weighted sum of |v|.
template <class Q, class K, class V>
double attend(const AttentionRules& rules, int64_t b, int64_t h, int64_t i, int64_t position, int64_t length, int64_t D, int64_t Dv, const Q& q, const K& key,
              const V& value, std::vector<double>& out, std::vector<double>& sizes) {
  std::vector<Weight> weights;
  const double lse = weigh(rules, b, h, i, position, length, D, q, key, weights);
  out.assign(Dv, 0.0), sizes.assign(Dv, 0.0);
  for (int64_t j = 0; lse != -INFINITY && j < length; j++)
    for (int64_t d = 0; d < Dv && weights[j].weight > 0; d++) out[d] += weights[j].weight * value(j, d), sizes[d] += weights[j].weight * std::fabs(value(j, d));
  return lse;
}

void expect_row(const Tensor4& out, double lse, int64_t b, int64_t h, int64_t i, const std::vector<double>& expected, const std::vector<double>& sizes,
                double expected_lse, double tolerance, const std::string& what) {
  const double rounding = out.dtype == DType::kFloat32 ? 0x1p-24 : out.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  const std::string at = what + ": [" + std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(i);
  expect(lse == expected_lse || std::fabs(lse - expected_lse) <= tolerance * (1 + std::fabs(expected_lse)),
         at + "] lse is " + std::to_string(lse) + ", expected " + std::to_string(expected_lse));
  for (int64_t d = 0; d < out.D; d++) {
    const double found = out.at(b, h, i, d), allowed = tolerance * (sizes[d] + std::fabs(expected[d])) + rounding * std::fabs(expected[d]) + 0x1p-24;
    expect(std::fabs(found - expected[d]) <= allowed,  // false for a NaN
           at + ", " + std::to_string(d) + "] is " + std::to_string(found) + ", expected " + std::to_string(expected[d]));
  }
}

// ---- attention_prefill ----

void test_prefill(int64_t turn, int64_t Lq, int64_t Lk, int64_t D, int64_t Dv) {
  constexpr int64_t kHeads[][2] = {{1, 1}, {4, 2}, {5, 1}, {6, 3}};
  const int64_t *heads = kHeads[pick(turn, "heads", 4)], Hq = heads[0], Hkv = heads[1], B = 1 + pick(turn, "batch", 2);
  const DType dtype = static_cast<DType>(pick(turn, "dtype", 3));
  const bool tokens_first = pick(turn, "order", 2);
  const Tensor4 q(B, Hq, Lq, D, dtype, pick(turn, "q", 5), tokens_first), k(B, Hkv, Lk, D, dtype, pick(turn, "k", 3), !tokens_first);
  const Tensor4 v(B, Hkv, Lk, Dv, dtype, pick(turn, "v", 3), tokens_first);
  const Rules rules(turn, B, Hq, Lq, Lk, D);
  for (const auto& impl : kPrefillImpls) {
    const bool pairs = std::strcmp(impl.name, "cpu_avx512bf16") == 0;  // it takes bf16 alone, and rounds the weights to it
    if (!impl.can_run || (pairs && dtype != DType::kBFloat16)) continue;
    const std::string what = std::string("attention_prefill ") + impl.name + ": turn " + std::to_string(turn) + " Lq=" + std::to_string(Lq) +
                             " Lk=" + std::to_string(Lk) + " D=" + std::to_string(D) + " Dv=" + std::to_string(Dv);
    Tensor4 serial(B, Hq, Lq, Dv, dtype, 0, tokens_first, false), threaded(B, Hq, Lq, Dv, dtype, 0, tokens_first, false);
    GuardedBlock lse(B * Hq * Lq * 4, 4), lse_threaded(B * Hq * Lq * 4, 4);
    for (Tensor4* out : {&serial, &threaded}) {
      num_workers = out == &serial ? 1 : 3;
      attention_prefill::Params p{};
      p.q = q.heads, p.k = k.heads, p.v = v.heads, p.out = out->heads, p.dtype = dtype, p.rules = rules.rules, p.num_threads = num_workers;
      p.lse = reinterpret_cast<float*>((out == &serial ? lse : lse_threaded).data()), p.lse_head_stride = Lq, p.lse_batch_stride = Hq * Lq;
      p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
      impl.run(p);
    }
    num_workers = 1;
    expect(same(serial.memory, threaded.memory) && same(lse, lse_threaded), what + ": three threads give other bits than one");
    std::vector<double> expected, sizes;
    for (int64_t row = 0; row < B * Hq * Lq; row++) {
      const int64_t b = row / Lq / Hq, h = row / Lq % Hq, i = row % Lq, kv_head = h / (Hq / Hkv);
      const double expected_lse = attend(
          rules.rules, b, h, i, i + Lk - Lq, Lk, D, Dv, [&](int64_t d) { return q.at(b, h, i, d); },
          [&](int64_t j, int64_t d) { return k.at(b, kv_head, j, d); }, [&](int64_t j, int64_t d) { return v.at(b, kv_head, j, d); }, expected, sizes);
      expect_row(serial, reinterpret_cast<float*>(lse.data())[row], b, h, i, expected, sizes, expected_lse, pairs ? 0x1p-8 : 1e-5, what);
    }
  }
}

// ---- attention_backward ----

// Of each element of a tensor: its gradient, and the sum of the sizes of what it is the sum of.
struct Gradient {
  std::vector<double> sum, size;
  explicit Gradient(int64_t count) : sum(count), size(count) {}
  void add(int64_t at, double value, double bound) { sum[at] += value, size[at] += bound; }
};

void expect_gradient(const Tensor4& found, const Gradient& expected, const std::string& what) {
  const double rounding = found.dtype == DType::kFloat32 ? 0x1p-24 : found.dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  for (int64_t i = 0; i < found.B * found.H * found.L * found.D; i++) {
    const int64_t d = i % found.D, row = i / found.D % found.L, h = i / found.D / found.L % found.H, b = i / found.D / found.L / found.H;
    const double is = found.at(b, h, row, d), allowed = 3e-5 * expected.size[i] + rounding * std::fabs(expected.sum[i]) + 0x1p-24;
    expect(std::fabs(is - expected.sum[i]) <= allowed,  // false for a NaN
           what + " [" + std::to_string(b) + ", " + std::to_string(h) + ", " + std::to_string(row) + ", " + std::to_string(d) + "] is " + std::to_string(is) +
               ", expected " + std::to_string(expected.sum[i]));
  }
}

void test_backward(int64_t turn, int64_t Lq, int64_t Lk, int64_t D, int64_t Dv) {
  constexpr int64_t kHeads[][2] = {{1, 1}, {4, 2}, {5, 1}, {6, 3}};
  const int64_t *heads = kHeads[pick(turn, "heads", 4)], Hq = heads[0], Hkv = heads[1], group = Hq / Hkv, B = 1 + pick(turn, "batch", 2);
  const DType dtype = static_cast<DType>(pick(turn, "dtype", 3));
  const bool tokens_first = pick(turn, "order", 2), with_grad_lse = pick(turn, "grad_lse", 2);
  const Tensor4 q(B, Hq, Lq, D, dtype, pick(turn, "q", 5), tokens_first), k(B, Hkv, Lk, D, dtype, pick(turn, "k", 3), !tokens_first);
  const Tensor4 v(B, Hkv, Lk, Dv, dtype, pick(turn, "v", 3), tokens_first), grad_out(B, Hq, Lq, Dv, dtype, pick(turn, "grad_out", 4), !tokens_first);
  const Tensor4 out(B, Hq, Lq, Dv, dtype, pick(turn, "out", 3), tokens_first);
  const GuardedBlock lse(B * Hq * Lq * 4, 4), grad_lse = floats(B * Hq * Lq);
  const Rules rules(turn, B, Hq, Lq, Lk, D);

  Gradient dq(B * Hq * Lq * D), dk(B * Hkv * Lk * D), dv(B * Hkv * Lk * Dv);
  std::vector<double> expected, sizes;
  std::vector<Weight> weights;
  for (int64_t row = 0; row < B * Hq * Lq; row++) {
    const int64_t b = row / Lq / Hq, h = row / Lq % Hq, i = row % Lq, kv_head = h / group, position = i + Lk - Lq, first_key = (b * Hkv + kv_head) * Lk;
    const auto query = [&](int64_t d) { return q.at(b, h, i, d); };
    const auto key = [&](int64_t j, int64_t d) { return k.at(b, kv_head, j, d); };
    const auto value = [&](int64_t j, int64_t d) { return v.at(b, kv_head, j, d); };
    attend(rules.rules, b, h, i, position, Lk, D, Dv, query, key, value, expected, sizes);
    const double row_lse = weigh(rules.rules, b, h, i, position, Lk, D, query, key, weights);
    reinterpret_cast<float*>(lse.data())[row] = static_cast<float>(row_lse);
    double shift = with_grad_lse ? -reinterpret_cast<const float*>(grad_lse.data())[row] : 0.0, shift_size = std::fabs(shift);
    for (int64_t d = 0; d < Dv; d++) {
      store_float(out.memory.data(), b * out.heads.batch_stride + h * out.heads.head_stride + i * out.heads.row_stride + d, dtype,
                  static_cast<float>(expected[d]));
      shift += grad_out.at(b, h, i, d) * out.at(b, h, i, d), shift_size += std::fabs(grad_out.at(b, h, i, d) * out.at(b, h, i, d));
    }
    for (int64_t j = 0; row_lse != -INFINITY && j < Lk; j++) {
      const auto [weight, slope] = weights[j];
      if (weight == 0) continue;
      double grad = 0, grad_size = 0;
      for (int64_t d = 0; d < Dv; d++) {
        const double one = grad_out.at(b, h, i, d);
        grad += one * value(j, d), grad_size += std::fabs(one * value(j, d));
        dv.add((first_key + j) * Dv + d, weight * one, weight * std::fabs(one));
      }
      grad = weight * (grad - shift) * slope, grad_size = weight * (grad_size + shift_size) * rules.rules.softmax_scale;
      for (int64_t d = 0; d < D; d++) {
        dq.add(row * D + d, grad * key(j, d), grad_size * std::fabs(key(j, d)));
        dk.add((first_key + j) * D + d, grad * query(d), grad_size * std::fabs(query(d)));
      }
    }
  }
  for (const auto& impl : kBackwardImpls) {
    if (!impl.can_run) continue;
    const std::string what = std::string("attention_backward ") + impl.name + ": turn " + std::to_string(turn) + " Lq=" + std::to_string(Lq) +
                             " Lk=" + std::to_string(Lk) + " D=" + std::to_string(D) + " Dv=" + std::to_string(Dv);
    std::vector<Tensor4> found;
    for (const int threads : {1, 3}) {
      num_workers = threads;
      for (const Tensor4* like : {&q, &k, &v}) found.emplace_back(B, like->H, like->L, like->D, dtype, 0, tokens_first, false);
      const Tensor4* grads = &found[found.size() - 3];
      attention_backward::Params p{};
      p.q = q.heads, p.k = k.heads, p.v = v.heads, p.out = out.heads, p.grad_out = grad_out.heads, p.dtype = dtype, p.rules = rules.rules;
      p.dq = grads[0].heads, p.dk = grads[1].heads, p.dv = grads[2].heads, p.num_threads = threads;
      p.lse = reinterpret_cast<float*>(lse.data()), p.lse_head_stride = Lq, p.lse_batch_stride = Hq * Lq;
      p.grad_lse = with_grad_lse ? reinterpret_cast<const float*>(grad_lse.data()) : nullptr;
      p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
      const int64_t rows = B * Hq * Lq;
      const GuardedBlock dq_sum(dtype == DType::kFloat32 ? 0 : rows * D * 4, 4), space(3 * rows * 4, 4),
          turns(B * Hkv * attention_backward::row_blocks(p) * 4, 4);
      std::memset(turns.data(), 0, turns.bytes());
      p.dq_sum = p.dq;
      if (dtype != DType::kFloat32) p.dq_sum.data = dq_sum.data();
      p.most = reinterpret_cast<float*>(space.data()), p.log_total = p.most + rows, p.shift = p.log_total + rows;
      p.turns = reinterpret_cast<int32_t*>(turns.data());
      impl.run(p);
    }
    num_workers = 1;
    for (int i = 0; i < 3; i++) expect(same(found[i].memory, found[i + 3].memory), what + ": three threads give other bits than one");
    expect_gradient(found[0], dq, what + ": dq");
    expect_gradient(found[1], dk, what + ": dk");
    expect_gradient(found[2], dv, what + ": dv");
  }
}

// ---- Caches ----

struct Cache {
  KvCache cache{};
  GuardedBlock k, v, k_scales, v_scales, channels, table;

  // For `tokens` of each of B sequences; `turn`: pages or none, channels or none, gaps between rows of floats or none.
  Cache(int64_t turn, KvFormat format, int64_t B, int64_t Hkv, int64_t tokens, int64_t D, int64_t Dv) {
    const bool codes = has_codes(format), paged = pick(turn, "paged", 2);
    const int64_t page_tokens = paged ? 16 + pick(turn, "page", 2) * 16 : codes ? (tokens + 15) / 16 * 16 : tokens;
    const int64_t columns = paged ? (tokens + page_tokens - 1) / page_tokens : 1, pages = paged ? B * columns + 1 : B;
    const int64_t element = codes ? 1 : kv_element_bytes(format), gap = codes ? 0 : pick(turn, "gap", 4) * element;
    const int64_t k_row = codes ? key_block_bytes(format, D) : D * element, v_row = codes ? value_block_bytes(format, Dv) : Dv * element;
    const int64_t rows = codes ? page_tokens / kKvBlock : page_tokens, all = pages * Hkv * rows;
    k = GuardedBlock(all ? (all - 1) * (k_row + gap) + k_row : 0, element), v = GuardedBlock(all ? (all - 1) * (v_row + gap) + v_row : 0, element);
    cache.format = format, cache.k = k.data(), cache.v = v.data(), cache.page_tokens = page_tokens, cache.table_columns = columns;
    cache.k_row_stride = k_row + gap, cache.v_row_stride = v_row + gap;
    cache.k_block_stride = cache.k_row_stride * (codes ? 1 : kKvBlock), cache.v_block_stride = cache.v_row_stride * (codes ? 1 : kKvBlock);
    cache.k_head_stride = cache.k_row_stride * rows, cache.v_head_stride = cache.v_row_stride * rows;
    cache.k_page_stride = cache.k_head_stride * Hkv, cache.v_page_stride = cache.v_head_stride * Hkv;
    if (codes) {
      k_scales = GuardedBlock(pages * Hkv * page_tokens * 2, 2), v_scales = GuardedBlock(pages * Hkv * page_tokens * 2, 2);
      cache.k_scales = reinterpret_cast<uint16_t*>(k_scales.data()), cache.v_scales = reinterpret_cast<uint16_t*>(v_scales.data());
      cache.scale_page_stride = Hkv * page_tokens, cache.scale_head_stride = page_tokens;
    }
    if (pick(turn, "channels", 3) == 0) {
      channels = floats(B * Hkv * 2 * (D + Dv));
      float* values = reinterpret_cast<float*>(channels.data());
      for (int64_t i = 0; i < B * Hkv * 2 * (D + Dv); i++)
        if (i / (D + Dv) % 2) values[i] = 0.5f + std::fabs(values[i]);  // factors
      cache.channels = values;
    }
    if (paged) {  // from the last page on
      table = GuardedBlock(B * columns * 4, 4);
      for (int64_t i = 0; i < B * columns; i++) reinterpret_cast<int32_t*>(table.data())[i] = static_cast<int32_t>(pages - 1 - i);
      cache.block_table = reinterpret_cast<const int32_t*>(table.data());
    }
  }
  double number(bool is_key, int64_t b, int64_t Hkv, int64_t h, int64_t token, int64_t d, int64_t D, int64_t Dv) const {
    const double stored = is_key ? key_at(cache, b, h, token, d) : value_at(cache, Dv, b, h, token, d);
    const float* own = cache.channels ? cache.channels + (b * Hkv + h) * 2 * (D + Dv) + (is_key ? 0 : D) + d : nullptr;
    return own ? stored * own[D + Dv] + own[0] : stored;
  }
};

// k and v in a cache with room for `capacity`, in two pieces, by every impl: the same bits, and numbers near what was stored.
Cache filled(int64_t turn, KvFormat format, const Tensor4& k, const Tensor4& v, int64_t capacity) {
  const int64_t first = k.L * pick(turn, "first", 5) / 5, D = k.D, Dv = v.D;
  Cache kept(turn, format, k.B, k.H, capacity, D, Dv);
  bool any = false;
  for (const auto& impl : kAppendImpls)
    for (const int threads : {1, 3}) {
      if (!impl.can_run) continue;
      const std::string what = std::string("kv_append ") + impl.name + ": turn " + std::to_string(turn) + " format " +
                               std::to_string(static_cast<int>(format)) + " D=" + std::to_string(D) + " Dv=" + std::to_string(Dv) +
                               " tokens=" + std::to_string(k.L);
      num_workers = threads;
      Cache found(turn, format, k.B, k.H, capacity, D, Dv);
      if (kept.cache.channels) std::memcpy(found.channels.data(), kept.channels.data(), kept.channels.bytes());
      for (const bool rest : {false, true}) {
        kv_append::Params p{};
        p.cache = found.cache, p.k = k.heads, p.v = v.heads, p.dtype = k.dtype, p.num_threads = threads;
        p.B = k.B, p.Hkv = k.H, p.D = D, p.Dv = Dv, p.L = rest ? k.L - first : first, p.start = rest ? first : 0;
        if (p.L == 0) continue;
        if (rest) {
          p.k.data = static_cast<const uint8_t*>(p.k.data) + first * p.k.row_stride * dtype_bytes(k.dtype);
          p.v.data = static_cast<const uint8_t*>(p.v.data) + first * p.v.row_stride * dtype_bytes(v.dtype);
        }
        impl.run(p);
      }
      Tensor4 k_read(k.B, k.H, k.L, D, DType::kFloat32, 0, false, false), v_read(k.B, k.H, k.L, Dv, DType::kFloat32, 0, false, false);
      kv_append::Params p{};
      p.cache = found.cache, p.k = k_read.heads, p.v = v_read.heads, p.dtype = DType::kFloat32, p.reads = true, p.num_threads = threads;
      p.B = k.B, p.Hkv = k.H, p.D = D, p.Dv = Dv, p.L = k.L;
      impl.run(p);
      num_workers = 1;
      for (const bool is_key : {true, false}) {
        const Tensor4 &from = is_key ? k : v, &read = is_key ? k_read : v_read;
        for (int64_t row = 0; row < k.B * k.H * k.L; row++) {
          const int64_t b = row / k.L / k.H, h = row / k.L % k.H, i = row % k.L;
          for (int64_t d = 0; d < from.D; d++) {
            const double exact = found.number(is_key, b, k.H, h, i, d, D, Dv), x = from.at(b, h, i, d), is = read.at(b, h, i, d);
            expect(std::fabs(is - exact) <= 1e-6 * (1 + std::fabs(exact)), what + ": not read as it is stored");
            // Normal numbers, and times a factor of up to 6 what channels make of them: a step of int4 is at most 12 / 7.
            expect(std::fabs(is - x) <= (format == KvFormat::kInt4 ? 6.0 : format == KvFormat::kFloat32 ? 1e-5 : 0.5), what + ": far off");
          }
        }
      }
      if (!any) kept = std::move(found), any = true;
      else
        expect(same(found.k, kept.k) && same(found.v, kept.v) && same(found.k_scales, kept.k_scales) && same(found.v_scales, kept.v_scales),
               what + ": other bits, or a byte that is not its own");
    }
  return kept;
}

// ---- attention_decode ----

void test_decode(int64_t turn, KvFormat format, int64_t keys, int64_t D, int64_t Dv) {
  constexpr int64_t kHeads[][2] = {{1, 1}, {4, 2}, {5, 1}, {9, 3}, {18, 1}};
  const int64_t *heads = kHeads[pick(turn, "heads", 5)], Hq = heads[0], Hkv = heads[1], B = 1 + pick(turn, "batch", 2), Lq = 1 + pick(turn, "queries", 3);
  const DType dtype = static_cast<DType>(pick(turn, "dtype", 3));
  const bool tokens_first = pick(turn, "order", 2), has_lengths = pick(turn, "lengths", 2);
  const Tensor4 k(B, Hkv, keys, D, dtype, pick(turn, "k", 3), tokens_first), v(B, Hkv, keys, Dv, dtype, 0, tokens_first);
  const Tensor4 q(B, Hq, Lq, D, dtype, pick(turn, "q", 4), tokens_first);
  const Cache cache = filled(turn, format, k, v, keys + pick(turn, "room", 2) * 20);
  const Rules rules(turn, B, Hq, Lq, keys, D);
  GuardedBlock lengths(B * 4, 4);
  for (int64_t b = 0; b < B; b++) reinterpret_cast<int32_t*>(lengths.data())[b] = static_cast<int32_t>(keys - b * keys / 3);
  for (const auto& impl : kDecodeImpls) {
    if (!impl.can_run || (std::strstr(impl.name, "vnni") && !has_codes(format))) continue;
    const std::string what = std::string("attention_decode ") + impl.name + ": turn " + std::to_string(turn) + " format " +
                             std::to_string(static_cast<int>(format)) + " keys=" + std::to_string(keys) + " D=" + std::to_string(D) +
                             " Dv=" + std::to_string(Dv);
    Tensor4 serial(B, Hq, Lq, Dv, dtype, 0, tokens_first, false), threaded(B, Hq, Lq, Dv, dtype, 0, tokens_first, false);
    GuardedBlock lse(B * Hq * Lq * 4, 4), lse_threaded(B * Hq * Lq * 4, 4);
    for (Tensor4* out : {&serial, &threaded}) {
      num_workers = out == &serial ? 1 : 3;
      attention_decode::Params p{};
      p.q = q.heads, p.cache = cache.cache, p.out = out->heads, p.dtype = dtype, p.rules = rules.rules, p.num_threads = num_workers;
      p.lse = reinterpret_cast<float*>((out == &serial ? lse : lse_threaded).data());
      p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.D = D, p.Dv = Dv, p.keys = keys;
      p.lengths = has_lengths ? reinterpret_cast<const int32_t*>(lengths.data()) : nullptr;
      const int64_t blocks = B * Hkv * p.row_blocks();
      GuardedBlock partials(blocks * p.chunks() * p.partial_floats() * 4, 4), finished(blocks * 4, 4);
      std::memset(finished.data(), 0, finished.bytes());
      p.partials = reinterpret_cast<float*>(partials.data()), p.finished = reinterpret_cast<int32_t*>(finished.data());
      impl.run(p);
    }
    num_workers = 1;
    expect(same(serial.memory, threaded.memory) && same(lse, lse_threaded), what + ": three threads give other bits than one");
    // Beside codes q is rounded, to 14 bits or to 8 (half of a 127th of its largest element, of which a score adds up D).
    const bool rounds = has_codes(format) && std::strcmp(impl.name, "cpu_scalar") != 0;
    const double tolerance = !rounds ? 2e-5 : format == KvFormat::kInt8 ? 5e-3 : 0.3;
    std::vector<double> expected, sizes;
    for (int64_t row = 0; row < B * Hq * Lq; row++) {
      const int64_t b = row / Lq / Hq, h = row / Lq % Hq, i = row % Lq, kv_head = h / (Hq / Hkv);
      const int64_t length = has_lengths ? reinterpret_cast<const int32_t*>(lengths.data())[b] : keys;
      const double expected_lse = attend(
          rules.rules, b, h, i, i + length - Lq, length, D, Dv, [&](int64_t d) { return q.at(b, h, i, d); },
          [&](int64_t j, int64_t d) { return cache.number(true, b, Hkv, kv_head, j, d, D, Dv); },
          [&](int64_t j, int64_t d) { return cache.number(false, b, Hkv, kv_head, j, d, D, Dv); }, expected, sizes);
      expect_row(serial, reinterpret_cast<float*>(lse.data())[row], b, h, i, expected, sizes, expected_lse, tolerance, what);
    }
  }
}

}  // namespace

int64_t check_attention() {
  constexpr int64_t kDims[] = {1, 7, 8, 15, 16, 17, 33, 40, 64, 80, 96, 112, 128, 256};
  constexpr int64_t kLengths[][2] = {{1, 1}, {1, 70}, {3, 3}, {17, 33}, {20, 5}, {70, 131}, {131, 40}};
  constexpr int64_t kKeys[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 512, 530};
  int64_t turn = 0;
  for (const int64_t D : kDims) {
    for (const auto& [Lq, Lk] : kLengths) {
      turn++;
      test_prefill(turn, Lq, Lk, D, kDims[pick(turn, "Dv", 14)]);
      test_backward(turn, Lq, Lk, D, kDims[pick(turn, "Dv", 14)]);
    }
    for (const int64_t keys : kKeys)
      turn++, test_decode(turn, static_cast<KvFormat>(pick(turn, "format", kNumKvFormats)), keys, D, kDims[pick(turn, "Dv", 14)]);
  }
  std::string ran;
  for (const auto& impl : kPrefillImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  ran += "; attention_backward:";
  for (const auto& impl : kBackwardImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  ran += "; attention_decode:";
  for (const auto& impl : kDecodeImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  ran += "; kv_append:";
  for (const auto& impl : kAppendImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  std::printf("sanitize: %lld checks of attention passed; attention_prefill ran:%s\n", static_cast<long long>(checks), ran.c_str());
  return checks;
}

}  // namespace taut
