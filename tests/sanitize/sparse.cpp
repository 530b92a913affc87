// The kernels of sparse weights, as kernels.cpp does it for dense ones: each buffer ends at a guard page, what must be written starts as NaN.
// cpu_scalar is held against sums in double where x is not quantized, the others against cpu_scalar. One bit of a code is flipped in each
// case where that would not be lost in what is allowed, and the comparison must notice.
//
// No stdio, no threads, no files: it also runs without an operating system (tests/other_isas).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "common/cpu_features.h"
#include "guarded.h"
#include "shared_checks.h"
#include "sparse_linear/op.h"

namespace taut {

// The dense kernel that cpu_dense multiplies with: op.cpp, which chooses, knows torch.
void (*quant_linear::choose(const Params&))(const Params&) { return quant_linear::cpu_scalar::run; }

namespace {

using quant_linear::Activations;

struct SparseImpl {
  const char* name;
  void (*run)(const sparse_linear::Params&);
  bool can_run;
  int64_t cases = 0, planted = 0;
};
#define TAUT_IMPL_sparse_linear(name, run, takes, can_run) {name, run, can_run},
SparseImpl impls[] = {
#include "sparse.inc"
};

std::mt19937 bits(3);
float random_float() { return std::normal_distribution<float>()(bits); }
int64_t below(int64_t count) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(count)); }

bool named(const SparseImpl& impl, const char* part) {  // WHY not strstr: where there is no operating system, there is none
  for (const char* at = impl.name; *at; at++)
    if (std::strncmp(at, part, std::strlen(part)) == 0) return true;
  return false;
}

// As the table of op.cpp has it.
bool takes(const SparseImpl& impl, const sparse_linear::Params& p) {
  const bool numbers = is_16bit(p.weight.format);
  if (named(impl, "avx512bw.float_small")) return numbers && p.pattern.v != 8;
  if (named(impl, ".float")) return numbers;
  if (named(impl, "dense")) return !numbers;
  const bool integers = (p.activations == Activations::kInt8 || p.activations == Activations::kInt8Row) && p.weight.format != Format::kFp8E4M3;
  if (named(impl, ".int8_tile")) return integers;
  if (named(impl, ".int8_rows")) return integers && p.pattern.v == 1 && p.pattern.n == 2 && p.pattern.m == 4;
  if (named(impl, ".int8_vectors")) return integers && p.pattern.v == 16 && p.pattern.n * 2 == p.pattern.m;
  return true;
}

std::string describe(const sparse_linear::Params& p) {
  const auto of = [](int64_t value) { return std::to_string(value); };
  return ": M=" + of(p.M) + " N=" + of(p.weight.N) + " K=" + of(p.weight.K) + " format " + of(static_cast<int>(p.weight.format)) + " group " +
         of(p.weight.group_size) + " pattern " + of(p.pattern.v) + ":" + of(p.pattern.n) + ":" + of(p.pattern.m) + " activations " +
         of(static_cast<int>(p.activations)) + " dtype " + of(static_cast<int>(p.dtype));
}

int stored_code(const Sparse8& w, const uint8_t* packed, int64_t n, int64_t j) {
  return packed[w.code_offset(n, j)] >> w.code_shift(j) & ((1 << code_bits(w.spec.format)) - 1);
}
double number(const Sparse8& w, const uint8_t* packed, int64_t n, int64_t j) {
  if (is_16bit(w.spec.format)) return load_float(packed + w.code_offset(n, j), 0, w.spec.format == Format::kBf16 ? DType::kBFloat16 : DType::kFloat16);
  const double scale = fp16_to_float(*reinterpret_cast<const uint16_t*>(packed + w.scale_offset(n, w.dense_k(packed, n, j))));
  const int code = stored_code(w, packed, n, j);
  return (w.spec.format == Format::kFp8E4M3 ? e4m3_to_float(static_cast<uint8_t>(code)) : code - sparse_zero(w.spec.format)) * scale;
}

// Random codes at random places, ascending within each m; padding as pack_sparse leaves it.
GuardedBlock random_weight(const Sparse8& w) {
  GuardedBlock packed(w.total_bytes(), 16);
  std::memset(packed.data(), 0, packed.bytes());
  const int64_t rows = w.dense().num_strips() * 8, padded = w.dense().num_blocks() * w.kept_per_block();
  const bool fp8 = w.spec.format == Format::kFp8E4M3;
  for (int64_t n = 0; n < rows; n++) {
    for (int64_t j = 0, place = -1; j < padded; j++) {
      const bool counts = n < w.spec.N && j < w.kept();
      int code = counts ? static_cast<int>(bits() & ((1u << code_bits(w.spec.format)) - 1)) : sparse_zero(w.spec.format);
      if (fp8 && (code & 0x7f) == 0x7f) code = 0x7e;  // a NaN is no weight
      if (is_16bit(w.spec.format)) {
        const float value = j % 29 == 7 ? 0x1p-20f * random_float() : random_float();  // subnormal in fp16
        store_float(packed.data() + w.code_offset(n, j), 0, w.spec.format == Format::kBf16 ? DType::kBFloat16 : DType::kFloat16, counts ? value : 0.0f);
      } else {
        packed.data()[w.code_offset(n, j)] |= static_cast<uint8_t>(code << w.code_shift(j));
      }
      const int64_t i = j % w.pattern.n, room = w.pattern.m - w.pattern.n + i;  // so that those after it find a place
      if (i == 0) place = -1;
      place += 1 + below(room - place);
      if (!counts || (w.pattern.v > 1 && n % 8)) continue;
      packed.data()[w.place_offset(n, j)] |= static_cast<uint8_t>(w.field_of(j, static_cast<int>(place)) << w.place_shift(j));
    }
    for (int64_t k = 0; !is_16bit(w.spec.format) && n < w.spec.N && k < w.spec.K; k += w.dense().layout_group()) {
      const uint16_t scale = float_to_fp16((bits() % 4 ? 1.0f : -1.0f) * (0.01f + 0.02f * std::fabs(random_float())));
      std::memcpy(packed.data() + w.scale_offset(n, k), &scale, 2);
    }
  }
  if (w.pattern.v == 16)  // both strips of 16 rows have the same places
    for (int64_t n = 8; n < rows; n += 16)
      for (int64_t block = 0; block < w.dense().num_blocks(); block++)
        std::memcpy(packed.data() + w.block_offset(n, block) + w.code_block_bytes(), packed.data() + w.block_offset(n - 8, block) + w.code_block_bytes(),
                    w.place_block_bytes());
  return packed;
}

struct Difference {
  double worst = 0;  // error, of what is allowed
  int64_t at = 0;
};
Difference compare(const GuardedBlock& found, const GuardedBlock& expected, const std::vector<double>& allowed, DType dtype) {
  Difference difference;
  for (int64_t i = 0; i < static_cast<int64_t>(allowed.size()); i++) {
    const double error = std::fabs(static_cast<double>(load_float(found.data(), i, dtype)) - load_float(expected.data(), i, dtype)) / allowed[i];
    if (!(error <= difference.worst)) difference = {error == error ? error : 1e300, i};
  }
  return difference;
}

void test(int64_t M, const Sparse8& w, Activations activations, DType dtype, bool with_bias) {
  const int64_t N = w.spec.N, K = w.spec.K, stride = K + (M % 2 ? 0 : 5), element = dtype_bytes(dtype);
  const GuardedBlock packed = random_weight(w);
  GuardedBlock x(((M - 1) * stride + K) * element, element), bias(with_bias ? N * element : 0, element);
  std::vector<double> sizes(M);
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < K; k++) {
      store_float(x.data(), m * stride + k, dtype, random_float() * (k % 37 == 3 ? 20 : 1));
      sizes[m] = std::max<double>(sizes[m], std::fabs(load_float(x.data(), m * stride + k, dtype)));
    }
  for (int64_t n = 0; with_bias && n < N; n++) store_float(bias.data(), n, dtype, random_float());

  sparse_linear::Params p{};
  p.x = x.data(), p.x_row_stride = stride, p.packed = packed.data(), p.bias = with_bias ? bias.data() : nullptr;
  p.dtype = dtype, p.M = M, p.weight = w.spec, p.pattern = w.pattern, p.activations = activations;
  const auto run = [&](void (*kernel)(const sparse_linear::Params&), GuardedBlock& out, int threads) {
    num_workers = threads;
    p.out = out.data(), p.num_threads = threads;
    kernel(p);
    num_workers = 1;
  };
  GuardedBlock truth(M * N * element, element);
  run(sparse_linear::cpu_scalar::run, truth, 1);
  const double rounding = dtype == DType::kFloat32 ? 0x1p-24 : dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-11;
  std::vector<double> allowed(M * N);
  for (int64_t n = 0; n < N; n++)
    for (int64_t m = 0; m < M; m++) {
      double sum = with_bias ? load_float(bias.data(), n, dtype) : 0.0, size = std::fabs(sum);
      for (int64_t j = 0; j < w.kept(); j++) {
        const double product = number(w, packed.data(), n, j) * load_float(x.data(), m * stride + w.dense_k(packed.data(), n, j), dtype);
        sum += product, size += std::fabs(product);
      }
      const double found = load_float(truth.data(), m * N + n, dtype);
      // fp32 sums of K terms, each taken apart in two of up to 16 steps of w; then one rounding in each of the two results
      allowed[m * N + n] = 8 * 0x1p-24 * std::sqrt(static_cast<double>(K) + 16) * (size + sizes[m]) + 2 * rounding * std::fabs(found) + 0x1p-24;
      if (activations == Activations::kFloat && !(std::fabs(found - sum) <= allowed[m * N + n])) stop(("cpu_scalar is off" + describe(p)).c_str());
    }
  for (SparseImpl& impl : impls) {
    if (!impl.can_run || !takes(impl, p)) continue;
    const std::string what = impl.name + describe(p);
    GuardedBlock serial(M * N * element, element), threaded(M * N * element, element);
    run(impl.run, serial, 1), run(impl.run, threaded, 3);
    if (std::memcmp(serial.data(), threaded.data(), serial.bytes())) stop((what + ": three threads give other bits than one").c_str());
    const Difference difference = compare(serial, truth, allowed, dtype);
    if (difference.worst > 1)
      stop((what + ": row " + std::to_string(difference.at / N) + ", column " + std::to_string(difference.at % N) + " is " +
            std::to_string(static_cast<int64_t>(difference.worst)) + " times as far off as is allowed")
               .c_str());
    impl.cases++;
    const int64_t n = below(N), j = below(w.kept()), m = below(M);
    // Of a 16-bit number the sign, in its upper byte.
    uint8_t* code = packed.data() + w.code_offset(n, j) + is_16bit(w.spec.format);
    const uint8_t flipped = static_cast<uint8_t>((is_16bit(w.spec.format) ? 0x80 : code_bits(w.spec.format) == 8 ? 0x40 : 4) << w.code_shift(j));
    const double before = number(w, packed.data(), n, j);
    *code ^= flipped;
    // Of x quantized to 8 bits no more is sure than that it is within half a 127th of the largest.
    const double exact = std::fabs(load_float(x.data(), m * stride + w.dense_k(packed.data(), n, j), dtype));
    const double sure = activations == Activations::kFloat ? exact : exact - sizes[m] / 253, change = (number(w, packed.data(), n, j) - before) * sure;
    run(impl.run, threaded, 1);
    *code ^= flipped;
    if (sure > 0 && !(std::fabs(change) <= 3 * allowed[m * N + n])) {  // a NaN of fp8 too
      if (compare(threaded, truth, allowed, dtype).worst <= 1) stop((what + ": a flipped bit of a code was not noticed").c_str());
      impl.planted++;
    }
  }
}

}  // namespace

std::string check_sparse(int64_t most_products, const char* required) {
  constexpr int64_t kWidths[] = {1, 8, 9, 17, 33, 70}, kDepths[] = {8, 32, 40, 136, 296, 1104}, kRows[] = {1, 2, 3, 4, 5, 6, 7, 13, 21, 100};
  constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  constexpr Activations kActivations[] = {Activations::kInt8, Activations::kInt8Row, Activations::kInt8, Activations::kFloat};
  int64_t turn = 0;
  for (const Format format : {Format::kInt8, Format::kInt4, Format::kFp8E4M3, Format::kFp16, Format::kBf16})
    for (const SparsePattern pattern : {SparsePattern{2, 4, 1}, {2, 4, 16}, {4, 8, 16}, {1, 4, 1}, {2, 8, 8}, {4, 8, 1}, {2, 4, 8}, {1, 4, 16}})
      for (const int64_t group : {32, 64, 128, 0})
        for (const int64_t K : kDepths)
          for (const int64_t N : kWidths) {
            turn++;
            const int64_t M = kRows[turn % 10];
            const bool numbers = is_16bit(format);
            const Activations activations = numbers ? Activations::kFloat : kActivations[turn / 2 % 4];
            if (numbers && group != 0) continue;
            if (M * N * K > most_products || quant_linear::refused_activations(format, static_cast<int64_t>(activations))) continue;
            test(M, {{format, N, K, group, false}, pattern}, activations, kDTypes[turn % 3], turn % 2);
          }
  std::string table;
  for (const SparseImpl& impl : impls) {
    const std::string name = std::string("sparse_linear:") + impl.name;
    if (impl.cases == 0 && contains_word(required, name.c_str())) stop((name + " was to run here").c_str());
    std::string line = std::string("sparse_linear ") + impl.name;
    line.resize(std::max<size_t>(line.size(), 42), ' ');
    table +=
        line + (impl.can_run ? std::to_string(impl.cases) + " cases, planted faults found " + std::to_string(impl.planted) : "not on this processor") + "\n";
  }
  return table;
}

}  // namespace taut
