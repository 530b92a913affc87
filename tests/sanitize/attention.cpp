// The kernels of attention, of its gradients and of its caches, as kernels.cpp does it for weights: each buffer ends at a guard page, what
// must be written starts as NaN, as does every byte of a cache past its sequence; results are checked against a plain loop in double. Where
// it would not be lost in what is allowed, a fault is planted: a number is another when the kernel runs, and the comparison must notice.
//
// No stdio, no threads, no files: it also runs without an operating system (tests/other_isas).
#include "shared_checks.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <utility>
#include <vector>

#include "attention_backward/op.h"
#include "attention_decode/op.h"
#include "attention_prefill/op.h"
#include "common/cpu_features.h"
#include "guarded.h"
#include "kv_append/op.h"

namespace taut {

namespace {

// What an impl can run: any call, caches of codes alone, bf16 alone.
enum class Takes { any, codes, bf16 };
template <class Params>
struct AttentionImpl {
  const char* name;
  void (*run)(const Params&);
  Takes takes;
  bool can_run;
  int64_t cases = 0, planted = 0;
  double worst = 0;  // error, of what is allowed
};
// attention.inc, by build.py: the rows of the tables of the ops' op.cpp, each in the macro of its op.
#define TAUT_IMPL_attention_prefill(name, run, takes, can_run) {name, run, Takes::takes, can_run},
#define TAUT_IMPL_attention_backward(...)
#define TAUT_IMPL_attention_decode(...)
#define TAUT_IMPL_kv_append(...)
AttentionImpl<attention_prefill::Params> prefill_impls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_prefill
#undef TAUT_IMPL_attention_backward
#define TAUT_IMPL_attention_prefill(...)
#define TAUT_IMPL_attention_backward(name, run, takes, can_run) {name, run, Takes::takes, can_run},
AttentionImpl<attention_backward::Params> backward_impls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_backward
#undef TAUT_IMPL_attention_decode
#define TAUT_IMPL_attention_backward(...)
#define TAUT_IMPL_attention_decode(name, run, takes, can_run) {name, run, Takes::takes, can_run},
AttentionImpl<attention_decode::Params> decode_impls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_decode
#undef TAUT_IMPL_kv_append
#define TAUT_IMPL_attention_decode(...)
#define TAUT_IMPL_kv_append(name, run, takes, can_run) {name, run, Takes::takes, can_run},
AttentionImpl<kv_append::Params> append_impls[] = {
#include "attention.inc"
};

std::mt19937 bits(2);

// what(): why not. WHY a function: text is made only of a failure
template <class F>
void expect(bool condition, const F& what) {
  if (!condition) stop(what().c_str());
}
std::string text(double x) {  // d.ddde[-]dd, without the C library
  if (x != x) return "nan";
  if (std::fabs(x) > 1e300) return x < 0 ? "-inf" : "inf";
  if (std::fabs(x) < 1e-300) return "0";
  int exponent = 0;
  double size = std::fabs(x);
  for (; size >= 10; size /= 10) exponent++;
  for (; size < 1; size *= 10) exponent--;
  const int64_t thousandths = static_cast<int64_t>(size * 1000);
  return (x < 0 ? "-" : "") + std::to_string(thousandths / 1000) + "." + std::to_string(thousandths % 1000 + 1000).substr(1) + "e" + std::to_string(exponent);
}
template <class... Index>
std::string place(Index... index) {
  std::string joined;
  ((joined += (joined.empty() ? "" : ", ") + std::to_string(index)), ...);
  return " [" + joined + "]";
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
  int64_t index(int64_t b, int64_t h, int64_t i, int64_t d) const { return row_of(heads, b, h, i) + d; }
  double at(int64_t b, int64_t h, int64_t i, int64_t d) const { return load_float(memory.data(), index(b, h, i, d), dtype); }
  void set(int64_t b, int64_t h, int64_t i, int64_t d, double value) const { store_float(memory.data(), index(b, h, i, d), dtype, static_cast<float>(value)); }
  void set_rows(int64_t i, double value) const {  // of all heads
    for (int64_t row = 0; row < B * H; row++)
      for (int64_t d = 0; d < D; d++) set(row / H, row % H, i, d, value);
  }
};

// The rules of a call, and the memory they point to.
struct Rules {
  AttentionRules rules;
  GuardedBlock sinks, slopes, mask;
  int64_t hidden = -1;  // a key that nobody sees

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
    if (rules.mask.kind == MaskKind::kNone || rules.mask.key_stride == 0 || pick(turn, "hidden", 2)) return;
    hidden = keys / 2;
    for (int64_t row = 0; row < B * Hq * Lq; row++) {
      const AttentionMask& m = rules.mask;
      const int64_t at = row / Lq / Hq * m.batch_stride + row / Lq % Hq * m.head_stride + row % Lq * m.query_stride + hidden * m.key_stride;
      if (m.kind == MaskKind::kBool) mask.data()[at] = 0;
      else store_float(mask.data(), at, m.dtype, -INFINITY);
    }
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
// Of `length` keys, the query at `position`; key(j, d). Returns the log of the sum of exponentials; -infinity: no key is seen, NaN: a score is.
template <class Q, class K>
double weigh(const AttentionRules& rules, int64_t b, int64_t h, int64_t i, int64_t position, int64_t length, int64_t D, const Q& q, const K& key,
             std::vector<Weight>& weights) {
  double most = rules.s_aux ? rules.s_aux[h] : -INFINITY;
  bool is_nan = false;
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
    is_nan |= score != score;
  }
  if (is_nan) return NAN;
  if (most == -INFINITY) return most;
  double total = rules.s_aux ? std::exp(rules.s_aux[h] - most) : 0.0;
  for (const Weight& weight : weights) total += std::exp(weight.weight - most);
  for (Weight& weight : weights) weight.weight = std::exp(weight.weight - most) / total;
  return most + std::log(total);
}

// What a row [b,h,i] of each query is in double, and the weighted sum of |v|: key(b, kv_head, j, d), value(b, kv_head, j, d).
struct Reference {
  std::vector<double> out, sizes, lse;
  // The last row that sees a key, and the key it sees most of.
  int64_t row = -1, key = 0;
  double weight = 0;

  template <class K, class V, class Length>
  Reference(const AttentionRules& rules, const Tensor4& q, int64_t Hkv, int64_t Dv, const Length& length_of, const K& key_at, const V& value_at)
      : out(q.B * q.H * q.L * Dv), sizes(out.size()), lse(q.B * q.H * q.L) {
    std::vector<Weight> weights;
    for (int64_t r = 0; r < q.B * q.H * q.L; r++) {
      const int64_t b = r / q.L / q.H, h = r / q.L % q.H, i = r % q.L, kv_head = h / (q.H / Hkv), length = length_of(b);
      lse[r] = weigh(
          rules, b, h, i, i + length - q.L, length, q.D, [&](int64_t d) { return q.at(b, h, i, d); },
          [&](int64_t j, int64_t d) { return key_at(b, kv_head, j, d); }, weights);
      if (lse[r] != lse[r]) std::fill_n(&out[r * Dv], Dv, NAN);
      if (lse[r] == -INFINITY || lse[r] != lse[r]) continue;
      weight = 0;
      for (int64_t j = 0; j < length; j++) {
        if (!(weights[j].weight > 0)) continue;
        if (weights[j].weight > weight) row = r, key = j, weight = weights[j].weight;
        for (int64_t d = 0; d < Dv; d++) {
          const double v = value_at(b, kv_head, j, d);
          out[r * Dv + d] += weights[j].weight * v, sizes[r * Dv + d] += weights[j].weight * std::fabs(v);
        }
      }
    }
  }
};

double rounding_of(DType dtype) { return dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11; }

// What is farthest from what it should be, as a share of what is allowed.
struct Worst {
  double share = 0, is = 0, expected = 0;
  int64_t index[4] = {};

  void see(double found, double wanted, double allowed, int64_t b, int64_t h, int64_t i, int64_t d) {
    if (found == wanted || (found != found && wanted != wanted)) return;
    double part = std::fabs(found - wanted) / allowed;
    if (part != part) part = INFINITY;
    if (part > share) share = part, is = found, expected = wanted, index[0] = b, index[1] = h, index[2] = i, index[3] = d;
  }
  std::string text_of() const { return place(index[0], index[1], index[2], index[3]) + " is " + text(is) + ", expected " + text(expected); }
};

double allowed_at(const Reference& expected, const Tensor4& out, int64_t at, double tolerance) {
  const double size = std::fabs(expected.out[at]);
  return tolerance * (expected.sizes[at] + size) + rounding_of(out.dtype) * size + 0x1p-24;
}

Worst compare(const Tensor4& out, const GuardedBlock& lse, const Reference& expected, double tolerance) {
  Worst worst;
  for (int64_t row = 0; row < out.B * out.H * out.L; row++) {
    const int64_t b = row / out.L / out.H, h = row / out.L % out.H, i = row % out.L;
    worst.see(load_float(lse.data(), row, DType::kFloat32), expected.lse[row], tolerance * (1 + std::fabs(expected.lse[row])), b, h, i, -1);  // -1: lse
    for (int64_t d = 0; d < out.D; d++)
      worst.see(out.at(b, h, i, d), expected.out[row * out.D + d], allowed_at(expected, out, row * out.D + d, tolerance), b, h, i, d);
  }
  return worst;
}

template <class Impl, class What>
void note(Impl& impl, const Worst& worst, const What& what) {
  expect(worst.share <= 1, [&] { return what() + worst.text_of(); });
  impl.cases++, impl.worst = std::max(impl.worst, worst.share);
}
template <class Impl, class What>
void note_planted(Impl& impl, const Worst& worst, const What& what) {
  expect(worst.share > 1, [&] { return what() + ": a planted fault does not show"; });
  impl.planted++;
}

// ---- attention_prefill ----

constexpr int64_t kHeads[][2] = {{1, 1}, {4, 2}, {5, 1}, {6, 3}, {18, 1}};
std::string sizes_of(const char* op, const char* impl, int64_t turn, int64_t Lq, int64_t Lk, int64_t D, int64_t Dv) {
  return std::string(op) + " " + impl + ": turn " + std::to_string(turn) + " Lq=" + std::to_string(Lq) + " Lk=" + std::to_string(Lk) +
         " D=" + std::to_string(D) + " Dv=" + std::to_string(Dv);
}

void test_prefill(int64_t turn, int64_t Lq, int64_t Lk, int64_t D, int64_t Dv, int64_t most_products) {
  const int64_t *heads = kHeads[pick(turn, "heads", 4)], Hq = heads[0], Hkv = heads[1], B = 1 + pick(turn, "batch", 2);
  if (B * Hq * Lq * Lk * (D + Dv) > most_products) return;
  const DType dtype = static_cast<DType>(pick(turn, "dtype", 3));
  const bool tokens_first = pick(turn, "order", 2);
  const Tensor4 q(B, Hq, Lq, D, dtype, pick(turn, "q", 5), tokens_first), k(B, Hkv, Lk, D, dtype, pick(turn, "k", 3), !tokens_first);
  const Tensor4 v(B, Hkv, Lk, Dv, dtype, pick(turn, "v", 3), tokens_first);
  const Rules rules(turn, B, Hq, Lq, Lk, D);
  if (rules.hidden >= 0) k.set_rows(rules.hidden, NAN), v.set_rows(rules.hidden, NAN);
  if (pick(turn, "nan", 4) == 0) q.set(B - 1, Hq - 1, Lq - 1, 0, NAN);
  const Reference expected(
      rules.rules, q, Hkv, Dv, [&](int64_t) { return Lk; }, [&](int64_t b, int64_t h, int64_t j, int64_t d) { return k.at(b, h, j, d); },
      [&](int64_t b, int64_t h, int64_t j, int64_t d) { return v.at(b, h, j, d); });
  for (auto& impl : prefill_impls) {
    const bool pairs = impl.takes == Takes::bf16;  // it rounds the weights to bf16
    if (!impl.can_run || (pairs && dtype != DType::kBFloat16)) continue;
    const auto what = [&] { return sizes_of("attention_prefill", impl.name, turn, Lq, Lk, D, Dv); };
    const Tensor4 serial(B, Hq, Lq, Dv, dtype, 0, tokens_first, false), threaded(B, Hq, Lq, Dv, dtype, 0, tokens_first, false);
    const GuardedBlock lse(B * Hq * Lq * 4, 4), lse_threaded(B * Hq * Lq * 4, 4);
    const auto run = [&](const Tensor4& out, const GuardedBlock& to, int threads) {
      num_workers = threads;
      attention_prefill::Params p{};
      p.q = q.heads, p.k = k.heads, p.v = v.heads, p.out = out.heads, p.dtype = dtype, p.rules = rules.rules, p.num_threads = threads;
      p.lse = reinterpret_cast<float*>(to.data()), p.lse_head_stride = Lq, p.lse_batch_stride = Hq * Lq;
      p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.Lk = Lk, p.D = D, p.Dv = Dv;
      impl.run(p);
      num_workers = 1;
    };
    run(serial, lse, 1), run(threaded, lse_threaded, 3);
    // A hidden NaN makes a tile take another path, and where tiles end depends on the threads.
    expect(rules.hidden >= 0 || (same(serial.memory, threaded.memory) && same(lse, lse_threaded)),
           [&] { return what() + ": three threads give other bits than one"; });
    const double tolerance = pairs ? 0x1p-8 : 1e-5;
    note(impl, compare(serial, lse, expected, tolerance), what), note(impl, compare(threaded, lse_threaded, expected, tolerance), what);
    if (expected.row < 0 || expected.weight * 4 < 3 * allowed_at(expected, serial, expected.row * Dv, tolerance)) continue;
    const int64_t b = expected.row / Lq / Hq, kv_head = expected.row / Lq % Hq / (Hq / Hkv);
    const double kept = v.at(b, kv_head, expected.key, 0);
    v.set(b, kv_head, expected.key, 0, kept + 4);
    run(threaded, lse_threaded, 1);
    v.set(b, kv_head, expected.key, 0, kept);
    note_planted(impl, compare(threaded, lse_threaded, expected, tolerance), what);
  }
}

// ---- attention_backward ----

// Of each element of a tensor: its gradient, and the sum of the sizes of what it is the sum of.
struct Gradient {
  std::vector<double> sum, size;
  explicit Gradient(int64_t count) : sum(count), size(count) {}
  void add(int64_t at, double value, double bound) { sum[at] += value, size[at] += bound; }
  double allowed(int64_t at, DType dtype) const { return 3e-5 * size[at] + rounding_of(dtype) * std::fabs(sum[at]) + 0x1p-24; }
};

Worst compare(const Tensor4& found, const Gradient& expected) {
  Worst worst;
  for (int64_t at = 0; at < found.B * found.H * found.L * found.D; at++) {
    const int64_t d = at % found.D, row = at / found.D % found.L, h = at / found.D / found.L % found.H, b = at / found.D / found.L / found.H;
    worst.see(found.at(b, h, row, d), expected.sum[at], expected.allowed(at, found.dtype), b, h, row, d);
  }
  return worst;
}

void test_backward(int64_t turn, int64_t Lq, int64_t Lk, int64_t D, int64_t Dv, int64_t most_products) {
  const int64_t *heads = kHeads[pick(turn, "heads", 4)], Hq = heads[0], Hkv = heads[1], group = Hq / Hkv, B = 1 + pick(turn, "batch", 2);
  if (B * Hq * Lq * Lk * (3 * D + 2 * Dv) > most_products) return;
  const DType dtype = static_cast<DType>(pick(turn, "dtype", 3));
  const bool tokens_first = pick(turn, "order", 2), with_grad_lse = pick(turn, "grad_lse", 2);
  const Tensor4 q(B, Hq, Lq, D, dtype, pick(turn, "q", 5), tokens_first), k(B, Hkv, Lk, D, dtype, pick(turn, "k", 3), !tokens_first);
  const Tensor4 v(B, Hkv, Lk, Dv, dtype, pick(turn, "v", 3), tokens_first), grad_out(B, Hq, Lq, Dv, dtype, pick(turn, "grad_out", 4), !tokens_first);
  const Tensor4 out(B, Hq, Lq, Dv, dtype, pick(turn, "out", 3), tokens_first);
  const GuardedBlock lse(B * Hq * Lq * 4, 4), grad_lse = floats(B * Hq * Lq);
  const Rules rules(turn, B, Hq, Lq, Lk, D);
  if (rules.hidden >= 0) k.set_rows(rules.hidden, NAN), v.set_rows(rules.hidden, NAN);
  const auto key = [&](int64_t b, int64_t h, int64_t j, int64_t d) { return k.at(b, h, j, d); };
  const auto value = [&](int64_t b, int64_t h, int64_t j, int64_t d) { return v.at(b, h, j, d); };
  const Reference forward(rules.rules, q, Hkv, Dv, [&](int64_t) { return Lk; }, key, value);

  Gradient dq(B * Hq * Lq * D), dk(B * Hkv * Lk * D), dv(B * Hkv * Lk * Dv);
  std::vector<Weight> weights;
  for (int64_t row = 0; row < B * Hq * Lq; row++) {
    const int64_t b = row / Lq / Hq, h = row / Lq % Hq, i = row % Lq, kv_head = h / group, first_key = (b * Hkv + kv_head) * Lk;
    const double row_lse = weigh(
        rules.rules, b, h, i, i + Lk - Lq, Lk, D, [&](int64_t d) { return q.at(b, h, i, d); }, [&](int64_t j, int64_t d) { return key(b, kv_head, j, d); },
        weights);
    store_float(lse.data(), row, DType::kFloat32, static_cast<float>(row_lse));
    double shift = with_grad_lse ? -load_float(grad_lse.data(), row, DType::kFloat32) : 0.0, shift_size = std::fabs(shift);
    for (int64_t d = 0; d < Dv; d++) {
      out.set(b, h, i, d, forward.out[row * Dv + d]);
      const double product = grad_out.at(b, h, i, d) * out.at(b, h, i, d);
      shift += product, shift_size += std::fabs(product);
    }
    for (int64_t j = 0; row_lse != -INFINITY && j < Lk; j++) {
      const auto [weight, slope] = weights[j];
      if (weight == 0) continue;
      double grad = 0, grad_size = 0;
      for (int64_t d = 0; d < Dv; d++) {
        const double one = grad_out.at(b, h, i, d), product = one * value(b, kv_head, j, d);
        grad += product, grad_size += std::fabs(product);
        dv.add((first_key + j) * Dv + d, weight * one, weight * std::fabs(one));
      }
      grad = weight * (grad - shift) * slope, grad_size = weight * (grad_size + shift_size) * rules.rules.softmax_scale;
      for (int64_t d = 0; d < D; d++) {
        const double x = q.at(b, h, i, d), y = key(b, kv_head, j, d);
        dq.add(row * D + d, grad * y, grad_size * std::fabs(y));
        dk.add((first_key + j) * D + d, grad * x, grad_size * std::fabs(x));
      }
    }
  }
  for (auto& impl : backward_impls) {
    if (!impl.can_run) continue;
    const auto what = [&] { return sizes_of("attention_backward", impl.name, turn, Lq, Lk, D, Dv); };
    const auto run = [&](int threads) {
      num_workers = threads;
      std::vector<Tensor4> found;
      for (const Tensor4* like : {&q, &k, &v}) found.emplace_back(B, like->H, like->L, like->D, dtype, 0, tokens_first, false);
      attention_backward::Params p{};
      p.q = q.heads, p.k = k.heads, p.v = v.heads, p.out = out.heads, p.grad_out = grad_out.heads, p.dtype = dtype, p.rules = rules.rules;
      p.dq = found[0].heads, p.dk = found[1].heads, p.dv = found[2].heads, p.num_threads = threads;
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
      num_workers = 1;
      return found;
    };
    const std::vector<Tensor4> serial = run(1), threaded = run(3);
    for (int i = 0; i < 3; i++) expect(same(serial[i].memory, threaded[i].memory), [&] { return what() + ": three threads give other bits than one"; });
    note(impl, compare(serial[0], dq), [&] { return what() + " dq"; });
    note(impl, compare(serial[1], dk), [&] { return what() + " dk"; });
    note(impl, compare(serial[2], dv), [&] { return what() + " dv"; });
    if (forward.row < 0) continue;
    const int64_t b = forward.row / Lq / Hq, h = forward.row / Lq % Hq, i = forward.row % Lq;
    if (forward.weight * 4 < 3 * dv.allowed(((b * Hkv + h / group) * Lk + forward.key) * Dv, dtype)) continue;
    const double kept = grad_out.at(b, h, i, 0);
    grad_out.set(b, h, i, 0, kept + 4);
    const std::vector<Tensor4> planted = run(1);
    grad_out.set(b, h, i, 0, kept);
    note_planted(impl, compare(planted[2], dv), what);
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
  for (auto& impl : append_impls)
    for (const int threads : {1, 3}) {
      if (!impl.can_run) continue;
      const auto what = [&] { return sizes_of("kv_append", impl.name, turn, first, k.L, D, Dv) + " format " + std::to_string(static_cast<int>(format)); };
      Cache found(turn, format, k.B, k.H, capacity, D, Dv);
      if (kept.cache.channels) std::memcpy(found.channels.data(), kept.channels.data(), kept.channels.bytes());
      const auto run = [&](const Tensor4& keys, const Tensor4& values, int64_t start, int64_t tokens, bool reads) {
        if (tokens == 0) return;
        num_workers = threads;
        kv_append::Params p{};
        p.cache = found.cache, p.k = keys.heads, p.v = values.heads, p.dtype = keys.dtype, p.reads = reads, p.num_threads = threads;
        p.B = k.B, p.Hkv = k.H, p.D = D, p.Dv = Dv, p.L = tokens, p.start = start;
        p.k.data = static_cast<const uint8_t*>(p.k.data) + start * p.k.row_stride * dtype_bytes(keys.dtype);
        p.v.data = static_cast<const uint8_t*>(p.v.data) + start * p.v.row_stride * dtype_bytes(values.dtype);
        impl.run(p);
        num_workers = 1;
      };
      run(k, v, 0, first, false), run(k, v, first, k.L - first, false);
      const Tensor4 k_read(k.B, k.H, k.L, D, DType::kFloat32, 0, false, false), v_read(k.B, k.H, k.L, Dv, DType::kFloat32, 0, false, false);
      run(k_read, v_read, 0, k.L, true);
      for (const bool is_key : {true, false}) {
        const Tensor4 &from = is_key ? k : v, &read = is_key ? k_read : v_read;
        Worst stored, near;
        for (int64_t row = 0; row < k.B * k.H * k.L; row++) {
          const int64_t b = row / k.L / k.H, h = row / k.L % k.H, i = row % k.L;
          for (int64_t d = 0; d < from.D; d++) {
            const double exact = found.number(is_key, b, k.H, h, i, d, D, Dv), x = from.at(b, h, i, d), is = read.at(b, h, i, d);
            stored.see(is, exact, 1e-6 * (1 + std::fabs(exact)), b, h, i, d);
            // Normal numbers, and times a factor of up to 6 what channels make of them: a step of int4 is at most 12 / 7.
            near.see(is, x, format == KvFormat::kInt4 ? 6.0 : format == KvFormat::kFloat32 ? 1e-5 : 0.5, b, h, i, d);
          }
        }
        note(impl, stored, [&] { return what() + ": not read as it is stored:"; });
        note(impl, near, [&] { return what() + ": far off:"; });
      }
      if (!any) {
        kept = std::move(found), any = true;
        continue;
      }
#ifdef TAUT_BARE
      if (format == KvFormat::kFloat16) continue;  // Bochs's vcvtps2ph rounds what is half-way up, not to even
#endif
      for (const auto& [is, was] : {std::pair{&found.k, &kept.k}, {&found.v, &kept.v}, {&found.k_scales, &kept.k_scales}, {&found.v_scales, &kept.v_scales}})
        for (size_t i = 0; i < was->bytes(); i++)
          expect(is->data()[i] == was->data()[i], [&] {
            return what() + ": other bits, or a byte that is not its own: " + std::to_string(is->data()[i]) + " at " + std::to_string(i) + ", not " +
                   std::to_string(was->data()[i]);
          });
    }
  return kept;
}

// ---- attention_decode ----

void test_decode(int64_t turn, KvFormat format, int64_t keys, int64_t D, int64_t Dv, int64_t most_products) {
  const int64_t *heads = kHeads[pick(turn, "heads", 5)], Hq = heads[0], Hkv = heads[1], B = 1 + pick(turn, "batch", 2), Lq = 1 + pick(turn, "queries", 3);
  if (B * Hq * Lq * keys * (D + Dv) > most_products) return;
  const DType dtype = static_cast<DType>(pick(turn, "dtype", 3));
  const bool tokens_first = pick(turn, "order", 2), has_lengths = pick(turn, "lengths", 2);
  const Tensor4 k(B, Hkv, keys, D, dtype, pick(turn, "k", 3), tokens_first), v(B, Hkv, keys, Dv, dtype, 0, tokens_first);
  const Tensor4 q(B, Hq, Lq, D, dtype, pick(turn, "q", 4), tokens_first);
  const Rules rules(turn, B, Hq, Lq, keys, D);
  if (rules.hidden >= 0) k.set_rows(rules.hidden, NAN), v.set_rows(rules.hidden, NAN);
  if (pick(turn, "nan", 4) == 0) q.set(B - 1, Hq - 1, Lq - 1, 0, NAN);
  const Cache cache = filled(turn, format, k, v, keys + pick(turn, "room", 2) * 20);
  const GuardedBlock lengths(B * 4, 4);
  for (int64_t b = 0; b < B; b++) reinterpret_cast<int32_t*>(lengths.data())[b] = static_cast<int32_t>(has_lengths ? keys - b * keys / 3 : keys);
  const Reference expected(
      rules.rules, q, Hkv, Dv, [&](int64_t b) { return int64_t{reinterpret_cast<const int32_t*>(lengths.data())[b]}; },
      [&](int64_t b, int64_t h, int64_t j, int64_t d) { return cache.number(true, b, Hkv, h, j, d, D, Dv); },
      [&](int64_t b, int64_t h, int64_t j, int64_t d) { return cache.number(false, b, Hkv, h, j, d, D, Dv); });
  for (auto& impl : decode_impls) {
    if (!impl.can_run || (impl.takes == Takes::codes && !has_codes(format))) continue;
    const auto what = [&] { return sizes_of("attention_decode", impl.name, turn, Lq, keys, D, Dv) + " format " + std::to_string(static_cast<int>(format)); };
    const Tensor4 serial(B, Hq, Lq, Dv, dtype, 0, tokens_first, false), threaded(B, Hq, Lq, Dv, dtype, 0, tokens_first, false);
    const GuardedBlock lse(B * Hq * Lq * 4, 4), lse_threaded(B * Hq * Lq * 4, 4);
    const auto run = [&](const Tensor4& out, const GuardedBlock& to, int threads) {
      num_workers = threads;
      attention_decode::Params p{};
      p.q = q.heads, p.cache = cache.cache, p.out = out.heads, p.dtype = dtype, p.rules = rules.rules, p.num_threads = threads;
      p.lse = reinterpret_cast<float*>(to.data());
      p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.D = D, p.Dv = Dv, p.keys = keys;
      p.lengths = has_lengths ? reinterpret_cast<const int32_t*>(lengths.data()) : nullptr;
      const int64_t blocks = B * Hkv * p.row_blocks();
      const GuardedBlock partials(blocks * p.chunks() * p.partial_floats() * 4, 4), finished(blocks * 4, 4);
      std::memset(finished.data(), 0, finished.bytes());
      p.partials = reinterpret_cast<float*>(partials.data()), p.finished = reinterpret_cast<int32_t*>(finished.data());
      impl.run(p);
      num_workers = 1;
    };
    run(serial, lse, 1), run(threaded, lse_threaded, 3);
    expect(same(serial.memory, threaded.memory) && same(lse, lse_threaded), [&] { return what() + ": three threads give other bits than one"; });
    // Beside codes q is rounded, to 14 bits or to 8 (half of a 127th of its largest element, of which a score adds up D).
    const bool rounds = has_codes(format) && std::strcmp(impl.name, "cpu_scalar") != 0;
    const double tolerance = !rounds ? 2e-5 : format == KvFormat::kInt8 ? 5e-3 : 0.3;
    note(impl, compare(serial, lse, expected, tolerance), what);
    if (expected.row < 0) continue;
    // A bit of the value it sees most of.
    const int64_t b = expected.row / Lq / Hq, kv_head = expected.row / Lq % Hq / (Hq / Hkv), j = expected.key;
    const CodeAt code = value_code_at(format, Dv, j % kKvBlock, 0);
    uint8_t* byte = value_block(cache.cache, b, kv_head, j) + (has_codes(format) ? code.byte : j % kKvBlock * cache.cache.v_row_stride);
    uint8_t bit = 0x80;
    if (has_codes(format)) bit = static_cast<uint8_t>(format == KvFormat::kInt8 ? 64 : 8 << code.shift);
    else if (format != KvFormat::kFp8) byte += kv_element_bytes(format) - 1;  // its sign
    const double before = cache.number(false, b, Hkv, kv_head, j, 0, D, Dv);
    *byte ^= bit;
    const double change = std::fabs(cache.number(false, b, Hkv, kv_head, j, 0, D, Dv) - before);
    run(threaded, lse_threaded, 1);
    *byte ^= bit;
    if (expected.weight * change > 3 * allowed_at(expected, serial, expected.row * Dv, tolerance))
      note_planted(impl, compare(threaded, lse_threaded, expected, tolerance), what);
  }
}

template <class Impls>
std::string table_of(const char* op, const Impls& impls, const char* required) {
  std::string table;
  for (const auto& impl : impls) {
    const std::string name = std::string(op) + ":" + impl.name;
    expect(impl.cases > 0 || !contains_word(required, name.c_str()), [&] { return name + " was to run here"; });
    std::string line = std::string(op) + " " + impl.name;
    line.resize(std::max<size_t>(line.size(), 38), ' ');
    if (!impl.can_run) line += "not on this processor";
    else
      line += std::to_string(impl.cases) + " checks, worst share of allowed " + text(impl.worst) +
              (impl.planted ? ", planted faults found " + std::to_string(impl.planted) : "");
    table += line + "\n";
  }
  return table;
}

}  // namespace

std::string check_attention(int64_t most_products, const char* required) {
  constexpr int64_t kDims[] = {1, 7, 8, 15, 16, 17, 33, 40, 64, 80, 96, 112, 128, 256};
  constexpr int64_t kLengths[][2] = {{1, 1}, {1, 70}, {3, 3}, {17, 33}, {20, 5}, {70, 131}, {131, 40}};
  constexpr int64_t kKeys[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 512, 530};
  int64_t turn = 0;
  for (const int64_t D : kDims) {
    for (const auto& [Lq, Lk] : kLengths) {
      turn++;
      test_prefill(turn, Lq, Lk, D, kDims[pick(turn, "Dv", 14)], most_products);
      test_backward(turn, Lq, Lk, D, kDims[pick(turn, "Dv", 14)], most_products);
    }
    for (const int64_t keys : kKeys)
      turn++, test_decode(turn, static_cast<KvFormat>(pick(turn, "format", kNumKvFormats)), keys, D, kDims[pick(turn, "Dv", 14)], most_products);
  }
  return table_of("attention_prefill", prefill_impls, required) + table_of("attention_backward", backward_impls, required) +
         table_of("attention_decode", decode_impls, required) + table_of("kv_append", append_impls, required);
}

}  // namespace taut
