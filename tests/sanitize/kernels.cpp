// Every kernel this processor can run, on small ragged shapes, under AddressSanitizer and UndefinedBehaviorSanitizer.
// Each buffer ends at a guard page (guarded.h), so that one byte past it is an error; what a kernel must write, and the
// scratch memory it gets, start as NaN; results are checked against a plain loop. Threads: none, and three.
#include <sys/types.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/cpu_features.h"
#include "guarded.h"
#include "pack_weight/op.h"
#include "quant_linear/op.h"
#include "quantize_weight/op.h"
#include "shared_checks.h"

namespace taut {

// ---- What parallel.cpp is to the library, without torch ----

int num_workers = 1;
[[noreturn]] void stop(const char* why) {
  std::fprintf(stderr, "FAILED: %s\n", why);
  std::exit(1);
}
thread_local bool inside_task = false;

bool in_team() { return false; }
void run_tasks(int64_t num_tasks, TaskBody body, void* context) {
  if (num_workers == 1 || inside_task) {
    for (int64_t task = 0; task < num_tasks; task++) body(context, task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::vector<std::thread> workers;
  for (int w = 0; w < num_workers; w++)
    workers.emplace_back([&] {
      inside_task = true;
      for (int64_t task; (task = next++) < num_tasks;) body(context, task);
    });
  for (auto& worker : workers) worker.join();
}

void wait_until(const int32_t* counter, int32_t value) {
  while (__atomic_load_n(counter, __ATOMIC_ACQUIRE) < value) std::this_thread::yield();
}

// A new block for each call: a pointer kept past the next call for its slot is a use after free.
uint8_t* scratch(int slot, size_t bytes) {
  thread_local GuardedBlock slots[kScratchSlots];
  slots[slot] = GuardedBlock(bytes, 64);
  return slots[slot].data();
}

namespace {

// ---- Buffers ----

class Buffer : public GuardedBlock {
 public:
  using GuardedBlock::GuardedBlock;
  bool same_as(const Buffer& other) const { return bytes() == other.bytes() && std::memcmp(data(), other.data(), bytes()) == 0; }
};

std::mt19937 random_bits(1);
int64_t checks = 0;

float random_float() { return std::normal_distribution<float>()(random_bits); }

void expect(bool condition, const std::string& what) {
  checks++;
  if (!condition) stop(what.c_str());
}

std::string describe(const WeightSpec& w) {
  constexpr const char* kNames[] = {"", "ternary", "int2", "int3", "int4", "nf4", "mxfp4", "nvfp4", "int8", "fp8_e4m3", "fp8_block"};
  return "N=" + std::to_string(w.N) + " K=" + std::to_string(w.K) + " " + kNames[static_cast<int>(w.format)] + " group " + std::to_string(w.group_size) +
         (w.zeros ? " with zeros" : "");
}

// E4M3 as the OCP specification defines it.
double e4m3(uint8_t byte) {
  const int exponent = byte >> 3 & 15, mantissa = byte & 7;
  const double magnitude = exponent ? std::ldexp(1 + mantissa / 8.0, exponent - 7) : std::ldexp(mantissa, -9);
  return byte & 0x80 ? -magnitude : magnitude;
}

// ---- A weight: canonical, packed, and as numbers ----

struct Weight {
  WeightSpec spec;
  Layout layout;
  int64_t num_scales;
  Buffer codes, scales, zeros, packed, global;

  explicit Weight(const WeightSpec& w, Layout order = Layout::kRows8)
      : spec(w), layout(order), num_scales(w.scale_rows() * w.num_groups()), codes(w.N * w.code_row_bytes()),
        scales(num_scales * scale_bytes(scale_type(w.format)), scale_bytes(scale_type(w.format))), zeros(w.zeros ? w.N * w.num_groups() : 0),
        packed(order == Layout::kRows8 ? Rows8{w}.total_bytes() : MmaTiles{w}.total_bytes(), 16),  // a mapped checkpoint promises 16-byte alignment, no more
        global(w.format == Format::kNvfp4 ? 4 : 0, 4) {
    const bool fp8 = w.format == Format::kFp8E4M3 || w.format == Format::kFp8Block;
    for (size_t i = 0; i < codes.bytes(); i++) {
      const uint8_t code = static_cast<uint8_t>(w.format == Format::kTernary ? random_bits() % 243 : random_bits());
      codes.data()[i] = fp8 && (code & 0x7f) == 0x7f ? 0x7e : code;  // a NaN is no weight
    }
    for (int64_t n = 0; n < w.N; n++) {  // what the last byte of a row has left over: zeros, and 1s where it is ternary
      uint8_t& last = codes.data()[(n + 1) * w.code_row_bytes() - 1];
      if (w.format == Format::kTernary) {
        for (int64_t k = w.K; k % 5; k++) last = static_cast<uint8_t>(last + (1 - last / power_of_3(k % 5) % 3) * power_of_3(k % 5));
      } else if (const int64_t bits = w.K * code_bits(w.format) % 8) {
        last &= static_cast<uint8_t>((1 << bits) - 1);
      }
    }
    for (int64_t i = 0; i < num_scales; i++) set_scale(i, (random_bits() % 4 ? 1.0f : -1.0f) * (0.01f + 0.02f * std::fabs(random_float())));
    for (size_t i = 0; i < zeros.bytes(); i++) zeros.data()[i] = random_bits() % (1u << code_bits(w.format));
    if (global.bytes()) *reinterpret_cast<float*>(global.data()) = 0.75f;
  }
  static int power_of_3(int64_t n) { return n == 0 ? 1 : 3 * power_of_3(n - 1); }
  void set_scale(int64_t i, float value) {
    switch (scale_type(spec.format)) {
      case ScaleType::kFp32: std::memcpy(scales.data() + 4 * i, &value, 4); break;
      case ScaleType::kE8M0: scales.data()[i] = static_cast<uint8_t>(127 + std::ilogb(value)); break;
      case ScaleType::kE4M3: scales.data()[i] = float_to_e4m3(value); break;
      default: {
        const uint16_t bits = float_to_fp16(value);
        std::memcpy(scales.data() + 2 * i, &bits, 2);
      }
    }
  }

  pack_weight::Params params(int threads) const {
    return {spec,
            layout,
            codes.data(),
            scales.data(),
            spec.zeros ? zeros.data() : nullptr,
            packed.data(),
            threads,
            global.bytes() ? reinterpret_cast<float*>(global.data()) : nullptr};
  }
  double scale(int64_t n, int64_t k) const {
    const int64_t row = spec.format == Format::kFp8Block ? n / 128 : n, i = row * spec.num_groups() + (spec.group_size ? k / spec.group_size : 0);
    switch (scale_type(spec.format)) {
      case ScaleType::kFp32: return reinterpret_cast<const float*>(scales.data())[i];
      case ScaleType::kE8M0: return std::ldexp(1.0, scales.data()[i] - 127);
      case ScaleType::kE4M3: return e4m3(scales.data()[i]) * *reinterpret_cast<const float*>(global.data());
      default: return fp16_to_float(reinterpret_cast<const uint16_t*>(scales.data())[i]);
    }
  }
  int code(int64_t n, int64_t k) const {  // out of a string of bits, or of the digits of a byte
    const uint8_t* row = codes.data() + n * spec.code_row_bytes();
    if (spec.format == Format::kTernary) return row[k / 5] / power_of_3(k % 5) % 3;
    int found = 0;
    const int64_t bits = code_bits(spec.format);
    for (int64_t i = 0; i < bits; i++) found |= (row[(k * bits + i) / 8] >> (k * bits + i) % 8 & 1) << i;
    return found;
  }
  double value(int64_t n, int64_t k, bool int8_activations = false) const {
    const int q = code(n, k);
    switch (spec.format) {
      case Format::kInt8: return static_cast<int8_t>(q) * scale(n, k);
      case Format::kFp8E4M3:
      case Format::kFp8Block: return e4m3(static_cast<uint8_t>(q)) * scale(n, k);
      case Format::kMxfp4:
      case Format::kNvfp4: return kTwiceE2M1[q] / 2.0 * scale(n, k);
      case Format::kNf4: return (int8_activations ? std::nearbyint(kNf4[q] * 127) / 127 : kNf4[q]) * scale(n, k);
      default:
        return (q - (spec.zeros ? zeros.data()[n * spec.num_groups() + (spec.group_size ? k / spec.group_size : 0)] : zero_code(spec.format))) * scale(n, k);
    }
  }
};

void test_pack(const WeightSpec& spec, Layout layout) {
  Weight weight(spec, layout);
  pack_weight::cpu_scalar::pack(weight.params(3));
  Weight back(spec, layout);
  std::memcpy(back.packed.data(), weight.packed.data(), weight.packed.bytes());
  std::memset(back.codes.data(), 0xff, back.codes.bytes());
  std::memset(back.scales.data(), 0xff, back.scales.bytes());
  std::memset(back.zeros.data(), 0xff, back.zeros.bytes());
  pack_weight::cpu_scalar::unpack(back.params(3));
  expect(back.codes.same_as(weight.codes) && back.scales.same_as(weight.scales) && back.zeros.same_as(weight.zeros) && back.global.same_as(weight.global),
         "pack, unpack: " + describe(spec));
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const int64_t first = spec.N / 3, last = spec.N - spec.N / 4;
    Buffer out((last - first) * spec.K * dtype_bytes(dtype), dtype_bytes(dtype));
    pack_weight::cpu_scalar::dequantize(spec, layout, weight.packed.data(), first, last, out.data(), dtype, 3);
    for (int64_t n = first; n < last; n++)
      for (int64_t k = 0; k < spec.K; k++) {
        alignas(4) uint8_t rounded[4];
        store_float(rounded, 0, dtype, static_cast<float>(weight.value(n, k)));
        expect(load_float(out.data(), (n - first) * spec.K + k, dtype) == load_float(rounded, 0, dtype), "dequantize: " + describe(spec));
      }
  }
}

// ---- quant_linear ----

using quant_linear::Activations;

// What int8_outliers take away before x is quantized; the rest stays in x.
std::vector<double> clipped_off(std::vector<float>& x) {
  const size_t blocks = (x.size() + 31) / 32;
  std::vector<double> off(x.size());
  std::vector<size_t> where(blocks);
  std::vector<float> largest(blocks), second(blocks);
  float row_max = 0;
  for (size_t b = 0; b < blocks; b++) {
    for (size_t k = where[b] = b * 32; k < std::min(x.size(), b * 32 + 32); k++)
      if (std::fabs(x[k]) > std::fabs(x[where[b]])) where[b] = k;
    largest[b] = std::fabs(x[where[b]]);
    for (size_t k = b * 32; k < std::min(x.size(), b * 32 + 32); k++)
      if (k != where[b]) second[b] = std::fmax(second[b], std::fabs(x[k]));
    row_max = std::fmax(row_max, largest[b]);
  }
  if (!(row_max >= quant_linear::kSmallestOutlierRowMax)) return off;
  const auto square = [&](float v) { return std::pow(std::fmin(std::fmax(std::ceil(v * (32767.0f / row_max)), 1.0f), 32767.0f), 2.0); };
  double squares = 0;
  for (const float v : largest) squares += square(v);
  for (size_t b = 0; b < blocks; b++)
    if ((square(largest[b]) - square(second[b])) * static_cast<double>(blocks) > squares) {
      const float clipped = std::copysign(std::fmax(second[b], largest[b] / 1024), x[where[b]]);
      off[where[b]] = x[where[b]] - clipped, x[where[b]] = clipped;
    }
  return off;
}

// 8-bit activations as op.h defines them, one fp32 operation at a time; q * m * unit.
std::vector<double> quantized(const std::vector<float>& x, Activations activations) {
  if (activations == Activations::kFloat) return {x.begin(), x.end()};
  if (activations == Activations::kInt8Outliers) {
    std::vector<float> rest = x;
    const std::vector<double> off = clipped_off(rest);
    std::vector<double> out = quantized(rest, Activations::kInt8);
    for (size_t k = 0; k < x.size(); k++) out[k] += off[k];
    return out;
  }
  float row_max = 0;
  for (const float v : x) row_max = std::fmax(row_max, std::fabs(v));
  const bool counts = row_max >= quant_linear::kSmallestRowMax;
  const float steps = counts ? 32767.0f / row_max : 0.0f;
  std::vector<double> out(x.size());
  if (activations == Activations::kFp8Row) {
    const float inverse = counts ? 448.0f / row_max : 0.0f;
    for (size_t k = 0; k < x.size(); k++) {
      const float v = x[k] * inverse;  // the nearest multiple of the step between numbers of v's size
      const double step = std::ldexp(1.0, std::max(std::fabs(v) > 0 ? std::ilogb(v) : -6, -6) - 3);
      out[k] = std::fmin(std::fmax(std::nearbyint(v / step) * step, -448.0), 448.0) * static_cast<double>(row_max / 448.0f);
    }
    return out;
  }
  for (size_t k0 = 0; k0 < x.size(); k0 += 32) {
    const size_t k1 = std::min(x.size(), k0 + 32);
    float group_max = 0;
    for (size_t k = k0; k < k1; k++) group_max = std::fmax(group_max, std::fabs(x[k]));
    const float m = activations == Activations::kInt8Row ? 32767.0f : std::fmin(std::fmax(std::ceil(group_max * steps), 1.0f), 32767.0f);
    const float inverse = steps * 127.0f / m;
    for (size_t k = k0; k < k1; k++) {
      const double code = std::fmin(std::fmax(std::nearbyint(x[k] * inverse), -127.0f), 127.0f);
      out[k] = code * m * static_cast<double>(row_max / (127.0f * 32767.0f));
    }
  }
  return out;
}

// The rows of every op.cpp's table, by build.py: TAUT_IMPL_<op>(name, run, activations it takes, whether this processor can).
struct LinearImpl {
  const char* name;
  void (*run)(const quant_linear::Params&);
  enum { kTakes_any, kTakes_float, kTakes_int8 } takes;
  bool can_run;
};
struct QuantizeImpl {
  const char* name;
  void (*run)(const quantize_weight::Params&);
  bool can_run;
};
#define TAUT_IMPL_quant_linear(name, run, takes, can_run) {name, run, LinearImpl::kTakes_##takes, can_run},
#define TAUT_IMPL_quantize_weight(...)
const LinearImpl kLinearImpls[] = {
#include "impls.inc"
};
#undef TAUT_IMPL_quant_linear
#undef TAUT_IMPL_quantize_weight
#define TAUT_IMPL_quant_linear(...)
#define TAUT_IMPL_quantize_weight(name, run, takes, can_run) {name, run, can_run},
const QuantizeImpl kQuantizeImpls[] = {
#include "impls.inc"
};

bool named(const LinearImpl& impl, const char* part) { return std::strstr(impl.name, part) != nullptr; }

// As the table of op.cpp has it.
bool takes(const LinearImpl& impl, Activations activations, const WeightSpec& w, DType dtype) {
  if ((named(impl, "amx.float") || named(impl, "avx512bf16.float")) && dtype != DType::kBFloat16) return false;
  const bool outliers = activations == Activations::kInt8Outliers && !named(impl, "amx");
  const bool int8 = activations == Activations::kInt8 || activations == Activations::kInt8Row || outliers;
  return impl.takes == LinearImpl::kTakes_any || (impl.takes == LinearImpl::kTakes_int8 ? int8 : activations == Activations::kFloat);
}

void test_linear(int64_t M, const WeightSpec& spec, DType dtype, bool with_bias) {
  const int64_t N = spec.N, K = spec.K, stride = K + (M % 2 ? 0 : 5), element = dtype_bytes(dtype);
  const Weight weight(spec);
  num_workers = 1;
  pack_weight::cpu_scalar::pack(weight.params(1));
  Buffer x(M ? ((M - 1) * stride + K) * element : 0, element), bias(with_bias ? N * element : 0, element);
  std::vector<std::vector<float>> rows(M, std::vector<float>(K));
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < K; k++) {
      store_float(x.data(), m * stride + k, dtype, random_float() * (k % 37 == 3 ? 20 : 1));
      rows[m][k] = load_float(x.data(), m * stride + k, dtype);
    }
  for (int64_t n = 0; with_bias && n < N; n++) store_float(bias.data(), n, dtype, random_float());
  Buffer x_before(x.bytes());
  std::memcpy(x_before.data(), x.data(), x.bytes());

  const double rounding = dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  for (const Activations activations : {Activations::kFloat, Activations::kInt8, Activations::kInt8Row, Activations::kFp8Row, Activations::kInt8Outliers}) {
    if (quant_linear::refused_activations(spec.format, static_cast<int64_t>(activations), true)) continue;
    std::vector<double> w(N * K), expected(M * N), allowed(M * N), sizes(M * N);
    for (int64_t n = 0; n < N; n++)
      for (int64_t k = 0; k < K; k++) w[n * K + k] = weight.value(n, k, activations != Activations::kFloat);
    for (int64_t m = 0; m < M; m++) {
      const std::vector<double> values = quantized(rows[m], activations);
      double x_size = 0;
      for (const double v : values) x_size += std::fabs(v);
      for (int64_t n = 0; n < N; n++) {
        double sum = with_bias ? load_float(bias.data(), n, dtype) : 0.0, size = std::fabs(sum);
        for (int64_t k = 0; k < K; k++) sum += values[k] * w[n * K + k], size += std::fabs(values[k] * w[n * K + k]);
        expected[m * N + n] = sum, sizes[m * N + n] = size;
        // fp32 sums of K terms, each of which a kernel may take apart in two of up to 16 steps of w; then one rounding
        allowed[m * N + n] = 8 * 0x1p-24 * std::sqrt(static_cast<double>(K) + 16) * (size + x_size) + rounding * std::fabs(sum) + 0x1p-24;
      }
    }
    for (const LinearImpl& impl : kLinearImpls) {
      if (!impl.can_run || !takes(impl, activations, spec, dtype)) continue;
      const std::string what = std::string(impl.name) + ": M=" + std::to_string(M) + " " + describe(spec) + " dtype " +
                               std::to_string(static_cast<int>(dtype)) + (with_bias ? " bias" : "");
      Buffer serial(M * N * element, element), threaded(M * N * element, element);
      for (Buffer* out : {&serial, &threaded}) {
        num_workers = out == &serial ? 1 : 3;
        impl.run({x.data(), stride, weight.packed.data(), with_bias ? bias.data() : nullptr, out->data(), dtype, M, spec, activations, num_workers});
      }
      num_workers = 1;
      expect(serial.same_as(threaded), what + ": three threads give other bits than one");
      expect(x.same_as(x_before), what + ": x was written to");
      for (int64_t i = 0; i < M * N; i++) {
        const double found = load_float(serial.data(), i, dtype);
        // to bf16: the codebook of nf4, or every weight
        const bool rounded = named(impl, "avx512bf16.float") || (named(impl, "amx.float") && spec.format == Format::kNf4);
        const double rounded_weights = rounded ? 0x1p-8 * sizes[i] : 0.0;
        expect(std::fabs(found - expected[i]) <= allowed[i] + rounded_weights,  // false for a NaN
               what + ": [" + std::to_string(i / N) + ", " + std::to_string(i % N) + "] is " + std::to_string(found) + ", expected " +
                   std::to_string(expected[i]) + " within " + std::to_string(allowed[i]));
      }
    }
  }
}

// ---- quantize_weight ----

void test_quantize(const WeightSpec& spec, DType dtype) {
  const int64_t stride = spec.K + 3, element = dtype_bytes(dtype);
  Buffer w(spec.N ? ((spec.N - 1) * stride + spec.K) * element : 0, element);
  for (int64_t n = 0; n < spec.N; n++)
    for (int64_t k = 0; k < spec.K; k++) store_float(w.data(), n * stride + k, dtype, n == 1 ? 0.0f : random_float());
  Weight first(spec);
  const char* first_name = nullptr;
  for (const auto& impl : kQuantizeImpls)
    for (const int threads : {1, 3}) {
      if (!impl.can_run) continue;
      const std::string what = std::string("quantize_weight ") + impl.name + ": " + describe(spec);
      num_workers = threads;
      Weight found(spec);
      std::memset(found.codes.data(), 0xff, found.codes.bytes());
      std::memset(found.scales.data(), 0xff, found.scales.bytes());
      std::memset(found.zeros.data(), 0xff, found.zeros.bytes());
      Buffer finite(spec.N);
      impl.run({w.data(), stride, dtype, spec, found.codes.data(), found.scales.data(), spec.zeros ? found.zeros.data() : nullptr, finite.data(), threads,
                reinterpret_cast<float*>(found.global.data())});
      num_workers = 1;
      for (int64_t n = 0; n < spec.N; n++) expect(finite.data()[n] == 1, what + ": a finite row was refused");
      if (first_name == nullptr) {
        first_name = impl.name;
        std::memcpy(first.codes.data(), found.codes.data(), first.codes.bytes());
        std::memcpy(first.scales.data(), found.scales.data(), first.scales.bytes());
        std::memcpy(first.zeros.data(), found.zeros.data(), first.zeros.bytes());
        std::memcpy(first.global.data(), found.global.data(), first.global.bytes());
      }
      expect(found.codes.same_as(first.codes) && found.scales.same_as(first.scales) && found.zeros.same_as(first.zeros) && found.global.same_as(first.global),
             what + ": not the bits of " + first_name);
      for (int64_t n = 0; n < spec.N; n++)
        for (int64_t k = 0; k < spec.K; k++) {  // normal values: a step of int4 is at most 8 / 7.5; with fewer bits the largest may be clipped to a third
          const double allowed = spec.format == Format::kInt8 ? 0.03 : spec.format == Format::kFp8E4M3 || spec.format == Format::kFp8Block ? 0.3 : 5.0;
          expect(std::fabs(found.value(n, k) - load_float(w.data(), n * stride + k, dtype)) < allowed, what + ": far off");
        }
      if (spec.N > 0) {  // a NaN, in the last element
        Buffer bad(w.bytes(), element);
        std::memcpy(bad.data(), w.data(), w.bytes());
        store_float(bad.data(), (spec.N - 1) * stride + spec.K - 1, dtype, std::nanf(""));
        impl.run({bad.data(), stride, dtype, spec, found.codes.data(), found.scales.data(), spec.zeros ? found.zeros.data() : nullptr, finite.data(), threads,
                  reinterpret_cast<float*>(found.global.data())});
        expect(finite.data()[spec.N - 1] == 0, what + ": a NaN was accepted");
      }
    }
}

int run_all() {
  constexpr int64_t kWidths[] = {1, 7, 8, 9, 17, 33, 70}, kDepths[] = {1, 8, 31, 32, 33, 75, 130, 300, 1100};
  constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 6, 7, 13, 21};
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  int64_t turn = 0;
  for (int code = 1; code <= 10; code++)
    for (const bool zeros : {false, true}) {
      const Format format = static_cast<Format>(code);
      if (zeros && !takes_zeros(format)) continue;
      for (int64_t group : {32, 64, 128, 0}) {
        if (format == Format::kMxfp4 || format == Format::kNvfp4 || format == Format::kFp8Block) {
          if (group) continue;  // one group size there is
          group = format == Format::kMxfp4 ? 32 : format == Format::kNvfp4 ? 16 : 128;
        }
        for (const int64_t K : kDepths)
          for (const int64_t N : kWidths) {
            const WeightSpec spec{format, N, K, group, zeros};
            const bool mma_tiles = format == Format::kInt4 || format == Format::kInt8 || format == Format::kFp8E4M3;
            turn++;
            if (turn % 3 == 0) test_pack(spec, turn % 2 && mma_tiles ? Layout::kMmaTiles : Layout::kRows8);
            if (turn % 3 == 1) test_quantize(spec, kDTypes[turn / 3 % 3]);
            // every shape of weight meets two row counts; every row count meets every format many times over
            for (const int64_t M : {kRows[turn % 9], kRows[(turn * 4 + 2) % 9]}) test_linear(M, spec, kDTypes[(turn + M) % 3], turn % 2);
          }
      }
    }
  test_linear(530, {Format::kInt4, 9, 40, 32, true}, DType::kFloat32, true);  // more rows than a chunk of the tiles
  test_linear(530, {Format::kInt8, 9, 40, 0, false}, DType::kBFloat16, true);
  test_linear(530, {Format::kFp8E4M3, 9, 40, 128, false}, DType::kFloat16, true);
  test_linear(530, {Format::kNvfp4, 9, 40, 16, false}, DType::kFloat32, true);
  test_linear(37, {Format::kFp8Block, 140, 300, 128, false}, DType::kFloat32, true);
  test_quantize({Format::kFp8Block, 140, 300, 128, false}, DType::kFloat32);
  test_pack({Format::kInt4, 150, 200, 128, true}, Layout::kMmaTiles);  // more tiles than one in each direction
  test_pack({Format::kFp8E4M3, 129, 130, 32, false}, Layout::kMmaTiles);
  std::string ran, missed;
  for (const LinearImpl& impl : kLinearImpls) (impl.can_run ? ran : missed) += std::string(" ") + impl.name;
  std::printf("sanitize: %lld checks passed; quant_linear ran:%s%s%s\n", static_cast<long long>(checks), ran.c_str(),
              missed.empty() ? "" : "; not on this processor:", missed.c_str());
  return 0;
}

}  // namespace
}  // namespace taut

// build.py runs the two parts at the same time.
int main(int argc, char** argv) {
  const bool attention = argc > 1 && std::strcmp(argv[1], "attention") == 0;
  if (argc == 1 || attention)
    std::printf("sanitize: attention, sparse weights\n%s%s", taut::check_attention(INT64_MAX, "").c_str(), taut::check_sparse(INT64_MAX, "").c_str());
  return attention ? 0 : taut::run_all();
}
