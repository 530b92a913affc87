// The kernels of attention and of its caches, as kernels.cpp does it for weights: each buffer ends at a guard page, what must be
// written starts as NaN, as does every byte of a cache past its sequence; results are checked against a plain loop.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

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
#define TAUT_IMPL_attention_decode(...)
#define TAUT_IMPL_kv_append(...)
const AttentionImpl<attention_prefill::Params> kPrefillImpls[] = {
#include "attention.inc"
};
#undef TAUT_IMPL_attention_prefill
#undef TAUT_IMPL_attention_decode
#define TAUT_IMPL_attention_prefill(...)
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
bool same(const GuardedBlock& a, const GuardedBlock& b) { return a.bytes() == b.bytes() && std::memcmp(a.data(), b.data(), a.bytes()) == 0; }

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

// The rules of a call, by the bits of `turn`, and the memory they point to.
struct Rules {
  AttentionRules rules;
  GuardedBlock sinks, slopes, mask;

  Rules(int64_t turn, int64_t B, int64_t Hq, int64_t Lq, int64_t keys, int64_t D) : sinks(floats(Hq)), slopes(floats(Hq, DType::kFloat32, 0.1f)) {
    rules.softmax_scale = 1 / std::sqrt(static_cast<float>(D));
    rules.causal = turn % 2, rules.window = turn % 3 == 1 ? 1 + turn % 70 : 0, rules.softcap = turn % 5 == 2 ? 3.0f : 0.0f;
    if (turn % 4 == 1) rules.s_aux = reinterpret_cast<const float*>(sinks.data());
    if (turn % 7 == 3) rules.alibi_slopes = reinterpret_cast<const float*>(slopes.data());
    if (turn % 3 == 0) {  // bool [Lq,keys]
      mask = GuardedBlock(Lq * keys);
      for (int64_t i = 0; i < Lq * keys; i++) mask.data()[i] = bits() % 4 != 0;
      rules.mask = {MaskKind::kBool, mask.data(), DType::kFloat32, 0, 0, keys, 1};
    } else if (turn % 3 == 1) {  // bf16 [B,1,1,keys]
      mask = floats(B * keys, DType::kBFloat16);
      for (int64_t i = 0; i < B * keys; i += 3) store_float(mask.data(), i, DType::kBFloat16, -INFINITY);
      rules.mask = {MaskKind::kAdditive, mask.data(), DType::kBFloat16, keys, 0, 0, 1};
    }
  }
};

// Row [b,h,i] in double: key(j, d), value(j, d); `length` keys, the query at `position`. sizes[d]: the weighted sum of |v|.
template <class Q, class K, class V>
double attend(const AttentionRules& rules, int64_t b, int64_t h, int64_t i, int64_t position, int64_t length, int64_t D, int64_t Dv, const Q& q, const K& key,
              const V& value, std::vector<double>& out, std::vector<double>& sizes) {
  double total = rules.s_aux ? std::exp(rules.s_aux[h]) : 0.0;
  out.assign(Dv, 0.0), sizes.assign(Dv, 0.0);
  for (int64_t j = 0; j < length; j++) {
    const double distance = static_cast<double>(position - j), bias = mask_value(rules.mask, b, h, i, j);
    if ((rules.causal && distance < 0) || (rules.window && std::fabs(distance) >= static_cast<double>(rules.window)) || bias == -INFINITY) continue;
    double score = 0;
    for (int64_t d = 0; d < D; d++) score += q(d) * key(j, d);
    score *= rules.softmax_scale;
    if (rules.softcap > 0) score = rules.softcap * std::tanh(score / rules.softcap);
    if (rules.alibi_slopes) score -= rules.alibi_slopes[h] * std::fabs(distance);
    const double weight = std::exp(score + bias);
    total += weight;
    for (int64_t d = 0; d < Dv; d++) out[d] += weight * value(j, d), sizes[d] += weight * std::fabs(value(j, d));
  }
  for (int64_t d = 0; d < Dv && total > 0; d++) out[d] /= total, sizes[d] /= total;
  return std::log(total);
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
  const int64_t Hq = kHeads[turn % 4][0], Hkv = kHeads[turn % 4][1], B = 1 + turn % 2;
  const DType dtype = static_cast<DType>(turn % 3);
  const Tensor4 q(B, Hq, Lq, D, dtype, turn % 5, turn % 2), k(B, Hkv, Lk, D, dtype, turn % 2 * 3, turn % 3 == 1), v(B, Hkv, Lk, Dv, dtype, turn % 3, turn % 2);
  const Rules rules(turn, B, Hq, Lq, Lk, D);
  for (const auto& impl : kPrefillImpls) {
    if (!impl.can_run) continue;
    const std::string what = std::string("attention_prefill ") + impl.name + ": turn " + std::to_string(turn) + " Lq=" + std::to_string(Lq) +
                             " Lk=" + std::to_string(Lk) + " D=" + std::to_string(D) + " Dv=" + std::to_string(Dv);
    Tensor4 serial(B, Hq, Lq, Dv, dtype, 0, turn % 2, false), threaded(B, Hq, Lq, Dv, dtype, 0, turn % 2, false);
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
      expect_row(serial, reinterpret_cast<float*>(lse.data())[row], b, h, i, expected, sizes, expected_lse, 1e-5, what);
    }
  }
}

// ---- Caches ----

struct Cache {
  KvCache cache{};
  GuardedBlock k, v, k_scales, v_scales, channels, table;

  // For `tokens` of each of B sequences; `turn`: pages or none, channels or none, gaps between rows of floats or none.
  Cache(int64_t turn, KvFormat format, int64_t B, int64_t Hkv, int64_t tokens, int64_t D, int64_t Dv) {
    const bool codes = has_codes(format), paged = turn % 3 == 2;
    const int64_t page_tokens = paged ? 16 + turn % 2 * 16 : codes ? (tokens + 15) / 16 * 16 : tokens;
    const int64_t columns = paged ? (tokens + page_tokens - 1) / page_tokens : 1, pages = paged ? B * columns + 1 : B;
    const int64_t element = codes ? 1 : kv_element_bytes(format), gap = codes ? 0 : turn % 4 * element;
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
    if (turn % 4 == 1) {
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
  const int64_t first = k.L * (turn % 5) / 5, D = k.D, Dv = v.D;
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
  const int64_t Hq = kHeads[turn % 5][0], Hkv = kHeads[turn % 5][1], B = 1 + turn % 2, Lq = 1 + turn % 3;
  const DType dtype = static_cast<DType>(turn % 3);
  const Tensor4 k(B, Hkv, keys, D, dtype, turn % 3, turn % 2), v(B, Hkv, keys, Dv, dtype, 0, turn % 2), q(B, Hq, Lq, D, dtype, turn % 4, turn % 2);
  const Cache cache = filled(turn, format, k, v, keys + turn % 2 * 20);
  const Rules rules(turn, B, Hq, Lq, keys, D);
  GuardedBlock lengths(B * 4, 4);
  for (int64_t b = 0; b < B; b++) reinterpret_cast<int32_t*>(lengths.data())[b] = static_cast<int32_t>(keys - b * keys / 3);
  for (const auto& impl : kDecodeImpls) {
    if (!impl.can_run || (std::strstr(impl.name, "vnni") && !has_codes(format))) continue;
    const std::string what = std::string("attention_decode ") + impl.name + ": turn " + std::to_string(turn) + " format " +
                             std::to_string(static_cast<int>(format)) + " keys=" + std::to_string(keys) + " D=" + std::to_string(D) +
                             " Dv=" + std::to_string(Dv);
    Tensor4 serial(B, Hq, Lq, Dv, dtype, 0, turn % 2, false), threaded(B, Hq, Lq, Dv, dtype, 0, turn % 2, false);
    GuardedBlock lse(B * Hq * Lq * 4, 4), lse_threaded(B * Hq * Lq * 4, 4);
    for (Tensor4* out : {&serial, &threaded}) {
      num_workers = out == &serial ? 1 : 3;
      attention_decode::Params p{};
      p.q = q.heads, p.cache = cache.cache, p.out = out->heads, p.dtype = dtype, p.rules = rules.rules, p.num_threads = num_workers;
      p.lse = reinterpret_cast<float*>((out == &serial ? lse : lse_threaded).data());
      p.B = B, p.Hq = Hq, p.Hkv = Hkv, p.Lq = Lq, p.D = D, p.Dv = Dv, p.keys = keys;
      p.lengths = turn % 4 >= 2 ? reinterpret_cast<const int32_t*>(lengths.data()) : nullptr;
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
      const int64_t length = turn % 4 >= 2 ? reinterpret_cast<const int32_t*>(lengths.data())[b] : keys;
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
  constexpr int64_t kDims[] = {1, 7, 8, 15, 16, 17, 33, 40, 64, 100, 128, 256};
  constexpr int64_t kLengths[][2] = {{1, 1}, {1, 70}, {3, 3}, {17, 33}, {20, 5}, {70, 130}, {130, 40}};
  constexpr int64_t kKeys[] = {1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200, 512, 530};
  int64_t turn = 0;
  for (const int64_t D : kDims) {
    for (const auto& [Lq, Lk] : kLengths) turn++, test_prefill(turn, Lq, Lk, D, kDims[turn * 5 % 12]);
    // The two steps share no factor with 12, nor with 6: every format meets every D, Dv and number of keys.
    for (const int64_t keys : kKeys) turn++, test_decode(turn, static_cast<KvFormat>(turn % 6), keys, D, kDims[(turn / 6) * 7 % 12]);
  }
  std::string ran;
  for (const auto& impl : kPrefillImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  ran += "; attention_decode:";
  for (const auto& impl : kDecodeImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  ran += "; kv_append:";
  for (const auto& impl : kAppendImpls) ran += impl.can_run ? std::string(" ") + impl.name : "";
  std::printf("sanitize: %lld checks of attention passed; attention_prefill ran:%s\n", static_cast<long long>(checks), ran.c_str());
  return checks;
}

}  // namespace taut
