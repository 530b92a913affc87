// Cases of quant_linear, the comparison with cpu_scalar (the truth in C++), and what parallel.cpp is to the library, one thread.
// Attention's and sparse weights' cases and comparisons are the sanitizers' (tests/sanitize/attention.cpp, sparse.cpp).
#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "common/cpu_features.h"
#include "quant_linear/op.h"
#include "shared_checks.h"

namespace taut {

int num_workers = 1;  // and it stays so
[[noreturn]] void stop(const char* why) {
  other_isas::print("FAILED "), other_isas::print(why), other_isas::print("\n");
  other_isas::end(1);
}

bool in_team() { return false; }
void run_tasks(int64_t num_tasks, TaskBody body, void* context) {
  for (int64_t task = 0; task < num_tasks; task++) body(context, task);
}

void wait_until(const int32_t* counter, int32_t value) {
  if (*counter < value) stop("a task waits for one that has not begun");
}

uint8_t* scratch(int slot, size_t bytes) {  // NaN in any dtype at each call
  constexpr size_t kBytes = size_t{3} << 20;
  alignas(64) static uint8_t slots[kScratchSlots][kBytes];
  if (bytes > kBytes) stop("the test program's scratch memory is too small");
  std::memset(slots[slot], 0xff, bytes);
  return slots[slot];
}

namespace other_isas {
namespace {

using quant_linear::Activations;
using quant_linear::Params;

// ---- Text ----

void print_integer(int64_t value, int width = 0) {
  char digits[24];
  int i = 24;
  digits[--i] = 0;
  uint64_t rest = value < 0 ? -static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  do digits[--i] = static_cast<char>('0' + rest % 10);
  while (rest /= 10);
  if (value < 0) digits[--i] = '-';
  while (23 - i < width) digits[--i] = ' ';
  print(digits + i);
}
void print_padded(const char* text, size_t width) {
  print(text);
  for (size_t i = std::strlen(text); i < width; i++) print(" ");
}
void print_number(double value) {  // d.ddde[-]dd
  if (value != value) return print("nan");
  if (value < 0) print("-"), value = -value;
  if (value > 1e300) return print("inf");
  if (value < 1e-300) return print("0");
  int exponent = 0;
  while (value >= 10) value /= 10, exponent++;
  while (value < 1) value *= 10, exponent--;
  const int64_t thousandths = static_cast<int64_t>(value * 1000);
  print_integer(thousandths / 1000), print(".");
  for (int64_t place = 100; place; place /= 10) print_integer(thousandths / place % 10);
  print("e"), print_integer(exponent);
}

// ---- Inputs ----

uint32_t random_state = 1;
uint32_t random_bits() {  // xorshift32
  random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
  return random_state;
}
float random_float() {  // roughly normal
  float sum = 0;
  for (int i = 0; i < 4; i++) sum += static_cast<float>(random_bits() >> 8) * 0x1p-24f;
  return (sum - 2.0f) * 1.73f;
}

enum class Data { kRandom, kHighest, kLowest, kSmallIntegers, kSpecial };
constexpr const char* kDataNames[] = {"random", "highest", "lowest", "small integers", "NaN and infinities"};

struct Case {
  WeightSpec weight;
  int64_t M;
  DType dtype;
  bool bias, residual;
  Activations activations;
  Data data;
};

constexpr const char* kFormatNames[] = {"", "ternary", "int2", "int3", "int4", "nf4", "mxfp4", "nvfp4", "int8", "fp8_e4m3", "fp8_block"};
constexpr const char* kActivationNames[] = {"float", "int8", "int8_row", "fp8_row", "int8_outliers"};
constexpr const char* kDTypeNames[] = {"fp32", "bf16", "fp16"};

void print_case(const Case& c) {
  print(kFormatNames[static_cast<int>(c.weight.format)]);
  if (c.weight.zeros) print(" with zeros");
  print(" group "), print_integer(c.weight.group_size), print(" M="), print_integer(c.M), print(" N="), print_integer(c.weight.N);
  print(" K="), print_integer(c.weight.K), print(" activations "), print(kActivationNames[static_cast<int>(c.activations)]);
  print(" "), print(kDTypeNames[static_cast<int>(c.dtype)]), print(c.bias ? " bias" : ""), print(c.residual ? " residual, " : ", "),
      print(kDataNames[static_cast<int>(c.data)]);
}

// A packed weight written code by code through the offsets of Rows8, and the numbers it stands for.
struct Weight {
  std::vector<uint8_t> memory;
  uint8_t* packed;
  std::vector<double> values, steps;  // [N, K]; the largest |number| that a kernel may take one apart into

  explicit Weight(const Case& c) : memory(Rows8{c.weight}.total_bytes() + 64), values(c.weight.N * c.weight.K), steps(c.weight.N * c.weight.K) {
    packed = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    const WeightSpec& w = c.weight;
    const Rows8 layout{w};
    double global = 1;
    if (w.format == Format::kNvfp4) {
      const float scale = c.data == Data::kSmallIntegers ? 0.5f : 0.37f;
      std::memcpy(packed + layout.global_scale_offset(), &scale, 4);
      global = scale;
    }
    for (int64_t n = 0; n < w.N; n++)
      for (int64_t k = 0; k < w.K; k++) {
        const int64_t group = w.group_size ? k / w.group_size : 0;
        const double scale = write_scale(c, n, k, packed + layout.scale_offset(n, k)) * global;
        int zero = w.format == Format::kInt8 ? 0 : is_integer(w.format) ? zero_code(w.format) : 0;
        if (w.zeros) {
          const int codes = 1 << code_bits(w.format);
          const int drawn = static_cast<int>(hash(n, group, 7) % codes);
          zero = c.data == Data::kHighest ? 0 : c.data == Data::kLowest ? codes - 1 : drawn;
          packed[layout.zero_offset(n, k)] = static_cast<uint8_t>(zero);
        }
        const int q = draw_code(c);
        const double code = write_code(layout, c, n, k, q, zero);
        values[n * w.K + k] = code * scale;
        steps[n * w.K + k] = (c.activations == Activations::kFloat || code_bits(w.format) == 8 || w.format == Format::kNf4 ? 16 : 1) * std::fabs(scale);
      }
  }

 private:
  static uint32_t hash(int64_t a, int64_t b, uint32_t seed) {
    uint32_t h = static_cast<uint32_t>(a * 2654435761u + b * 40503u + seed * 977u + 12345u);
    h ^= h >> 15, h *= 0x2c1b3c6du, h ^= h >> 12, h *= 0x297a2d39u, h ^= h >> 15;
    return h;
  }
  static int draw_code(const Case& c) {
    const Format format = c.weight.format;
    const int codes = format == Format::kTernary ? 3 : 1 << code_bits(format);
    int q = c.data == Data::kHighest ? codes - 1 : c.data == Data::kLowest ? 0 : static_cast<int>((random_bits() >> 8) % codes);
    if (code_bits(format) == 4 && !is_integer(format)) {  // the ends of the codebook are elsewhere than the ends of the codes
      if (format == Format::kNf4) return q;
      return c.data == Data::kHighest ? 7 : c.data == Data::kLowest ? 15 : q;
    }
    if (format == Format::kFp8E4M3 || format == Format::kFp8Block) {
      if (c.data == Data::kHighest) q = 0x7e;
      if (c.data == Data::kLowest) q = 0xfe;
      if ((q & 0x7f) == 0x7f) q ^= 1;  // a NaN is no weight
    }
    return q;
  }
  // The number in steps of its scale, after writing code q (int8: q - 128).
  double write_code(const Rows8& layout, const Case& c, int64_t n, int64_t k, int q, int zero) {
    const Format format = c.weight.format;
    uint8_t& byte = packed[layout.code_offset(n, k)];
    if (format == Format::kInt3) {
      byte = static_cast<uint8_t>(byte | (q & 3) << layout.code_shift(k));
      packed[layout.third_bit_offset(n, k)] |= static_cast<uint8_t>((q >> 2) << (k % 32 / 4));
    } else byte = static_cast<uint8_t>(byte | q << layout.code_shift(k));
    switch (format) {
      case Format::kInt8: return q - 128;
      case Format::kFp8E4M3:
      case Format::kFp8Block: return e4m3_to_float(static_cast<uint8_t>(q));
      case Format::kMxfp4:
      case Format::kNvfp4: return kTwiceE2M1[q] * 0.5;
      case Format::kNf4: return c.activations == Activations::kFloat ? static_cast<double>(kNf4[q]) : std::nearbyint(kNf4[q] * 127.0) / 127.0;
      default: return q - zero;
    }
  }
  static double write_scale(const Case& c, int64_t n, int64_t k, uint8_t* at) {
    const WeightSpec& w = c.weight;
    const int64_t row = w.format == Format::kFp8Block ? n / 128 : n, group = w.group_size ? k / w.group_size : 0;
    const uint32_t drawn = hash(row, group, 3);
    const bool special = c.data == Data::kSpecial && row == 1 && group == 0, exact = c.data == Data::kSmallIntegers;
    const float size = exact ? 0.5f * static_cast<float>(1 << drawn % 3) : (0.5f + static_cast<float>(drawn >> 8) * 0x1p-24f) * 0.05f;
    const float value = drawn % 4 == 0 ? -size : size;
    switch (scale_type(w.format)) {
      case ScaleType::kFp16: {
        uint16_t bits = float_to_fp16(value);
        if (special) bits = 0x0001 + static_cast<uint16_t>(drawn % 3);  // a subnormal must not be flushed
        std::memcpy(at, &bits, 2);
        return fp16_to_float(bits);
      }
      case ScaleType::kFp32: {
        const float scale = special ? 0.0f : value;
        std::memcpy(at, &scale, 4);
        return scale;
      }
      case ScaleType::kE8M0: *at = static_cast<uint8_t>(special ? 0 : 120 + drawn % 8); return std::ldexp(1.0, *at - 127);
      default: *at = special ? 1 : float_to_e4m3(value); return e4m3_to_float(*at);
    }
  }
};

struct Inputs {
  std::vector<uint8_t> x, bias, residual;
  int64_t stride;

  explicit Inputs(const Case& c) : stride(c.weight.K + (c.M % 2 ? 3 : 0)) {
    const int64_t element = dtype_bytes(c.dtype), K = c.weight.K;
    x.resize(((c.M - 1) * stride + K) * element);
    if (c.bias) bias.resize(c.weight.N * element);
    if (c.residual) residual.resize(c.M * c.weight.N * element);
    for (int64_t m = 0; m < c.M; m++)
      for (int64_t k = 0; k < K; k++) {
        float value = random_float() * (k % 37 == 3 ? 20.0f : 1.0f);
        if (c.data == Data::kHighest) value = 3.0f;
        if (c.data == Data::kLowest) value = k % 5 ? -3.0f : 3.0f;
        if (c.data == Data::kSmallIntegers) value = static_cast<float>(static_cast<int>(random_bits() >> 8 & 7) - 3);
        if (c.data == Data::kSpecial && m == 1 && k == K / 2) value = NAN;
        if (c.data == Data::kSpecial && m == 2 && k == K - 1) value = INFINITY;
        if (c.data == Data::kSpecial && m == 3) value *= 0x1p-140f;  // counts as zeros where x is quantized
        store_float(x.data(), m * stride + k, c.dtype, value);
      }
    for (int64_t n = 0; c.bias && n < c.weight.N; n++)
      store_float(bias.data(), n, c.dtype, c.data == Data::kSmallIntegers ? static_cast<float>(n % 9) : random_float());
    for (int64_t i = 0; c.residual && i < c.M * c.weight.N; i++)
      store_float(residual.data(), i, c.dtype, c.data == Data::kSmallIntegers ? static_cast<float>(i % 7) : random_float());
  }
};

// ---- Impls ----

// A row of the table; as in common/impl.h, which needs exceptions.
template <class Params>
struct Impl {
  const char* name;
  const char* (*supported)(const Params&);
  const char* (*preferred)(const Params&);
  void (*run)(const Params&);
};
template <class Params>
const char* always(const Params&) {
  return nullptr;
}
}  // namespace
}  // namespace other_isas

namespace quant_linear {
namespace {
using other_isas::always;
using other_isas::Impl;
#include "table.inc"  // kImpls, out of op.cpp, by build.py
}  // namespace
}  // namespace quant_linear

namespace other_isas {
namespace {

using quant_linear::kImpls;
constexpr int kNumImpls = sizeof(kImpls) / sizeof(kImpls[0]);
// Rounds weights, or the codebook of nf4, to bf16 and takes subnormal numbers for zeros.
bool computes_in_bf16(int impl, Format format) {
  const auto begins = [&](const char* name) { return std::strncmp(kImpls[impl].name, name, std::strlen(name)) == 0; };
  return begins("cpu_avx512bf16.float") || (begins("cpu_amx.float") && format == Format::kNf4);
}
bool is_truth(int impl) { return kImpls[impl].run == quant_linear::cpu_scalar::run; }

struct Tally {
  int64_t cases = 0, planted = 0, missed = 0, failed = 0;
  double worst_error = 0, worst_share = 0;  // |error| / sum of |x| |w|; |error| / what is allowed
};
Tally tallies[kNumImpls][11][2];  // [impl][format][zeros]
int printed_failures = 0;

struct Output {
  std::vector<uint8_t> bytes;
  int64_t size;
  static constexpr int64_t kGuard = 64;
  explicit Output(int64_t bytes_needed) : bytes(bytes_needed + 2 * kGuard, 0xff), size(bytes_needed) {}  // NaN in any dtype
  uint8_t* data() { return bytes.data() + kGuard; }
  bool guards_whole() const {
    for (int64_t i = 0; i < kGuard; i++)
      if (bytes[i] != 0xff || bytes[kGuard + size + i] != 0xff) return false;
    return true;
  }
};

// ---- One case ----

void fail(int impl, const Case& c, Tally& tally, const char* what) {
  tally.failed++;
  if (printed_failures++ > 20) return;
  print("FAILED "), print(kImpls[impl].name), print(": "), print_case(c), print(": "), print(what), print("\n");
}

// Whether `found` is `expected` but for rounding. Notes the worst.
bool matches(int impl, const Case& c, const Params& p, const Weight& weight, const uint8_t* found, const uint8_t* expected, Tally* tally, int64_t* where) {
  const int64_t M = c.M, N = c.weight.N, K = c.weight.K;
  const double rounding = c.dtype == DType::kFloat32 ? 0x1p-23 : c.dtype == DType::kBFloat16 ? 0x1p-7 : 0x1p-10;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) {
      *where = m * N + n;
      const double value = load_float(found, *where, c.dtype), truth = load_float(expected, *where, c.dtype);
      if (std::isnan(truth) || std::isinf(truth)) {
        bool product_is_nan = false;  // infinity times what is taken for zero
        for (int64_t k = 0; k < K && computes_in_bf16(impl, c.weight.format); k++)
          product_is_nan |= std::isinf(load_float(p.x, m * p.x_row_stride + k, c.dtype)) && std::fabs(weight.values[n * K + k]) < 0x1p-126;
        if (std::isnan(truth) || product_is_nan ? !std::isnan(value) : value != truth) return false;
        continue;
      }
      const double bias = p.bias ? load_float(p.bias, n, c.dtype) : 0.0, residual = p.residual ? load_float(p.residual, *where, c.dtype) : 0.0;
      const double added = std::fabs(bias) + std::fabs(residual);
      double size = added, products = 0;
      for (int64_t k = 0; k < K; k++) {
        const double x = std::fabs(load_float(p.x, m * p.x_row_stride + k, c.dtype)), w = std::fabs(weight.values[n * K + k]);
        size += x * (w + weight.steps[n * K + k]), products += x * w;
      }
      const double error = std::fabs(value - truth);
      // fp32 sums of K terms; one block of 32 k is a sum of integers, exact but for the few products after it
      const bool integers = c.activations != Activations::kFloat && c.activations != Activations::kInt8Outliers && K <= 32 &&
                            c.weight.format != Format::kNvfp4 && code_bits(c.weight.format) < 8 && c.weight.format != Format::kNf4;
      const bool exact = c.data == Data::kSmallIntegers && c.activations == Activations::kFloat && c.weight.format != Format::kNf4 &&
                         c.weight.format != Format::kFp8E4M3 && c.weight.format != Format::kFp8Block;
      double allowed = integers ? 6 * 0x1p-23 * std::fabs(truth - bias - residual) : 4 * 0x1p-24 * std::sqrt(static_cast<double>(K) + 16) * size;
      allowed += rounding * (std::fabs(truth) + (integers ? added : 0)) + 0x1p-140;
      if (c.dtype == DType::kFloat16) allowed += 0x1p-24;
      if (computes_in_bf16(impl, c.weight.format)) allowed += 0x1p-8 * products + 0x1p-110;
      if (exact) allowed = 0;
      if (!(error <= allowed)) return false;
      if (tally != nullptr && size > 0 && c.data != Data::kSpecial) {
        tally->worst_error = std::max(tally->worst_error, c.dtype == DType::kFloat32 ? error / size : 0.0);
        tally->worst_share = std::max(tally->worst_share, allowed > 0 ? error / allowed : 0.0);
      }
    }
  return true;
}

// The truth itself, held against the numbers that were packed.
void check_truth(const Case& c, const Params& p, const Weight& weight, const uint8_t* found) {
  if (c.activations != Activations::kFloat || c.data == Data::kSpecial || c.dtype != DType::kFloat32) return;
  const int64_t N = c.weight.N, K = c.weight.K;
  for (int i = 0; i < kNumImpls; i++) {
    if (!is_truth(i)) continue;
    Tally& tally = tallies[i][static_cast<int>(c.weight.format)][c.weight.zeros];
    tally.cases++;
    for (int64_t m = 0; m < c.M; m++)
      for (int64_t n = 0; n < N; n++) {
        double sum = (p.bias ? load_float(p.bias, n, c.dtype) : 0.0) + (p.residual ? load_float(p.residual, m * N + n, c.dtype) : 0.0), size = std::fabs(sum);
        for (int64_t k = 0; k < K; k++) {
          const double term = load_float(p.x, m * p.x_row_stride + k, c.dtype) * weight.values[n * K + k];
          sum += term, size += std::fabs(term);
        }
        const double error = std::fabs(load_float(found, m * N + n, c.dtype) - sum), allowed = 0x1p-23 * std::fabs(sum) + 0x1p-40 * size;
        tally.worst_error = std::max(tally.worst_error, size > 0 ? error / size : 0.0);
        tally.worst_share = std::max(tally.worst_share, allowed > 0 ? error / allowed : 0.0);
        if (!(error <= allowed)) return fail(i, c, tally, "the truth is not what was packed");
      }
  }
}

void run_case(const Case& c) {
  const Weight weight(c);
  const Inputs in(c);
  const int64_t bytes = c.M * c.weight.N * dtype_bytes(c.dtype);
  Params p{};
  p.x = in.x.data(), p.x_row_stride = in.stride, p.packed = weight.packed, p.bias = c.bias ? in.bias.data() : nullptr;
  p.residual = c.residual ? in.residual.data() : nullptr;
  p.dtype = c.dtype, p.M = c.M, p.weight = c.weight, p.activations = c.activations, p.num_threads = 1;
  Output expected(bytes);
  p.out = expected.data();
  quant_linear::cpu_scalar::run(p);
  check_truth(c, p, weight, expected.data());

  for (int i = 0; i < kNumImpls; i++) {
    if (is_truth(i) || kImpls[i].supported(p)) continue;
    Tally& tally = tallies[i][static_cast<int>(c.weight.format)][c.weight.zeros];
    tally.cases++;
    Output found(bytes), threaded(bytes);
    p.out = found.data(), p.num_threads = 1;
    kImpls[i].run(p);
    p.out = threaded.data(), p.num_threads = 3;
    kImpls[i].run(p);
    int64_t where = 0;
    if (!found.guards_whole()) fail(i, c, tally, "it wrote past its output");
    if (std::memcmp(found.data(), threaded.data(), bytes) != 0) fail(i, c, tally, "other bits when split in three");
    if (!matches(i, c, p, weight, found.data(), expected.data(), &tally, &where)) {
      fail(i, c, tally, "not what cpu_scalar gives");
      if (printed_failures <= 21) {
        print("       ["), print_integer(where / c.weight.N), print(", "), print_integer(where % c.weight.N), print("] is ");
        print_number(load_float(found.data(), where, c.dtype)), print(", expected "), print_number(load_float(expected.data(), where, c.dtype)), print("\n");
      }
    }
    if (c.data != Data::kRandom || c.dtype != DType::kFloat32) continue;
    // A planted fault: one bit of one code turns over between the truth's run and the kernel's. It must show.
    const Rows8 layout{c.weight};
    int64_t k = 0;
    for (int64_t j = 1; j < c.weight.K; j++)
      if (std::fabs(load_float(p.x, j, c.dtype)) > std::fabs(load_float(p.x, k, c.dtype))) k = j;
    uint8_t& code = weight.packed[layout.code_offset(c.weight.N - 1, k)];
    const int bits = static_cast<int>(code_bits(c.weight.format));
    const uint8_t bit = static_cast<uint8_t>((bits == 8 ? 64 : bits == 4 ? 4 : 2) << layout.code_shift(k));
    code ^= bit;
    p.out = found.data(), p.num_threads = 1;
    kImpls[i].run(p);
    code ^= bit;
    tally.planted++;
    if (matches(i, c, p, weight, found.data(), expected.data(), nullptr, &where)) {
      tally.missed++;
      if (printed_failures++ <= 20) print("MISSED "), print(kImpls[i].name), print(": a planted fault does not show: "), print_case(c), print("\n");
    }
  }
}

// ---- All cases ----

template <class F>
void for_each_weight(const F& f) {  // every format with every group size and zero points it takes
  for (int format = 1; format <= 10; format++) {
    const Format name = static_cast<Format>(format);
    for (const int64_t group : {16, 32, 64, 128, 0}) {
      const int64_t fixed = name == Format::kMxfp4 ? 32 : name == Format::kNvfp4 ? 16 : name == Format::kFp8Block ? 128 : -1;
      if (fixed >= 0 ? group != fixed : group == 16) continue;
      for (const bool zeros : {false, true})
        if (!zeros || takes_zeros(name)) f(name, group, zeros);
    }
  }
}

}  // namespace

int run_all(bool thorough, const char* required) {
  constexpr int64_t kWidths[] = {1, 7, 8, 9, 16, 17, 33}, kDepths[] = {32, 1, 31, 33, 75, 130, 300, 1100}, kRows[] = {1, 2, 3, 4, 5, 6, 7, 12, 13, 21};
  int64_t turn = 0;
  for_each_weight([&](Format format, int64_t group, bool zeros) {
    for (int mode = 0; mode < 5; mode++) {
      if (quant_linear::refused_activations(format, mode, true)) continue;
      const auto next = [&](int64_t M, int64_t N, int64_t K, Data data, int dtype) {
        turn++;
        run_case({{format, N, K, group, zeros}, M, static_cast<DType>(dtype), turn % 2 == 0, turn % 5 == 0, static_cast<Activations>(mode), data});
      };
      if (!thorough) {
        next(1 + turn % 4, 17, 130, Data::kRandom, 0);
        next(kRows[turn % 10], 9, 32, turn % 2 ? Data::kHighest : Data::kLowest, static_cast<int>(turn % 3));
        next(5 + turn % 9, 17, 75, Data::kSmallIntegers, 0);
        continue;
      }
      for (const int64_t M : kRows) {  // every row count meets random numbers in fp32, and so a planted fault
        next(M, kWidths[turn % 7], kDepths[turn % 8], Data::kRandom, 0);
        next(M, kWidths[(turn + 3) % 7], kDepths[turn % 8], Data::kRandom, static_cast<int>(1 + turn % 2));
      }
      for (const int64_t N : kWidths)
        for (const int64_t K : kDepths) next(kRows[turn % 10], N, K, Data::kRandom, static_cast<int>(turn % 3));
      for (const Data data : {Data::kHighest, Data::kLowest, Data::kSmallIntegers, Data::kSpecial})
        for (const int64_t M : {1, 4, 6, 13})
          next(M, kWidths[turn % 7], kDepths[turn % 8], data, data == Data::kSmallIntegers ? 0 : static_cast<int>(turn % 3));
    }
  });
  // more rows than a chunk of the tiles, and more k than a panel
  if (thorough)
    for (const int mode : {0, 1, 4})
      run_case({{Format::kInt4, 9, 40, 32, true}, 530, DType::kFloat32, true, false, static_cast<Activations>(mode), Data::kRandom});

  int failures = 0;
  print_padded("impl", 30), print_padded("format", 18), print(" cases  planted faults found  worst |error| / sum |x||w|  share of allowed\n");
  for (int i = 0; i < kNumImpls; i++) {
    int64_t cases = 0;
    for (int format = 1; format <= 10; format++)
      for (int zeros = 0; zeros < 2; zeros++) {
        const Tally& t = tallies[i][format][zeros];
        if (t.cases == 0) continue;
        print_padded(kImpls[i].name, 30), print(kFormatNames[format]), print_padded(zeros ? " zeros" : "", 18 - std::strlen(kFormatNames[format]));
        print_integer(t.cases, 6), print_integer(t.planted - t.missed, 12), print(" of "), print_integer(t.planted), print("          ");
        print_number(t.worst_error), print("            "), print_number(t.worst_share);
        if (t.failed) print("  FAILED "), print_integer(t.failed);
        print("\n");
        cases += t.cases, failures += static_cast<int>(t.failed + t.missed);
      }
    if (is_truth(i) || cases) continue;
    Params p{};
    p.weight = {Format::kInt4, 8, 32, 32, false};
    p.dtype = DType::kBFloat16;
    const char* why = kImpls[i].supported(p);
    p.activations = Activations::kInt8;
    if (why == nullptr || kImpls[i].supported(p) == nullptr) why = "no case";
    print_padded(kImpls[i].name, 30), print("passed over: "), print(why), print("\n");
    if (contains_word(required, (std::string("quant_linear:") + kImpls[i].name).c_str()))
      print("FAILED "), print(kImpls[i].name), print(" was to run here\n"), failures++;
  }
  if (turn == 0) print("no case ran\n"), failures++;
  // WHY not all of them: the sums in double that they are held against take an emulator longer than any kernel
  print(check_attention(thorough ? 4'000'000 : 100'000, required).c_str());
  print(check_sparse(thorough ? 4'000'000 : 20'000, required).c_str());
  print(failures ? "FAILURES: " : "all as expected; cases: "), print_integer(failures ? failures : turn), print("\n");
  return failures;
}

}  // namespace other_isas
}  // namespace taut
