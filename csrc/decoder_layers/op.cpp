#include "decoder_layers/op.h"

#include <algorithm>
#include <cstring>
#include <sstream>

#include "common/impl.h"
#include "common/sparse_bridge.h"

namespace taut::decoder_layers {
namespace {

constexpr const char* kOp = "decoder_layers";
constexpr const char* kSchema =
    "decoder_layers(Tensor x, Tensor[] cos, Tensor[] sin, Tensor? mask, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor[] weights, int[] sizes, int[] layers, "
    "float[] numbers) -> Tensor";

#if defined(__x86_64__)
const char* avx2_supported(const Params& p) {
  if (const char* why = needs_avx2(p)) return why;
  return p.head_dim % 8 == 0 ? nullptr : "head_dim is no multiple of 8";
}
const char* avx512bw_supported(const Params& p) {
  if (const char* why = needs_avx512bw(p)) return why;
  return p.head_dim % 16 == 0 ? nullptr : "head_dim is no multiple of 16";
}
#elif defined(__aarch64__)
const char* needs_neon(const Params& p) { return p.head_dim % 4 == 0 ? nullptr : "head_dim is no multiple of 4"; }
#endif

// Attention's arithmetic; which matmul runs is quant_linear's affair.
constexpr Impl<Params> kImpls[] = {
#if defined(__x86_64__)
    {"cpu_avx512bw", avx512bw_supported, always, cpu_avx512bw::run},
    {"cpu_avx2", avx2_supported, always, cpu_avx2::run},
#elif defined(__aarch64__)
    {"cpu_neon", needs_neon, always, cpu_neon::run},
#endif
    {"cpu_scalar", always, always, cpu_scalar::run},
};

// A barrier of the team costs about 0.2 us; one thread does this many multiply-adds in twice that time.
constexpr int64_t kMinWorkPerThread = 1 << 14;

constexpr int64_t kWeightsPerLayer = 14, kIntsPerLayer = 20, kMostElems = int64_t{1} << 31;
enum WeightIndex { kAttnNorm, kQkv, kQkvBias, kQNorm, kKNorm, kO, kOBias, kAttnPostNorm, kMlpNorm, kGateUp, kGateUpBias, kDown, kDownBias, kMlpPostNorm };
constexpr const char* kWeightNames[] = {"attn_norm",      "qkv_packed", "qkv_bias",       "q_norm",       "k_norm",      "o_packed",  "o_bias",
                                        "attn_post_norm", "mlp_norm",   "gate_up_packed", "gate_up_bias", "down_packed", "down_bias", "mlp_post_norm"};

// WHY a macro: there are a thousand checks in a call of thirty layers, and their messages must cost nothing.
#define REQUIRE(condition, ...)                             \
  do {                                                      \
    if (!(condition)) check(false, kOp, ": ", __VA_ARGS__); \
  } while (0)

// Reads the arguments of one call; every check is made before anything is written.
struct Reader {
  const Tensor& x;
  const std::vector<Tensor>&weights, &cos, &sin, &keys, &values;
  const std::vector<int64_t>& ints;
  Params& p;
  std::vector<Tensor> kept;  // contiguous copies that the kernels read

  std::string name(int64_t layer, int64_t index) const { return "weights[" + std::to_string(layer) + "][" + kWeightNames[index] + "]"; }

  const Tensor& weight(int64_t layer, int64_t index) const { return weights[layer * kWeightsPerLayer + index]; }

  const void* contiguous(const Tensor& t) {
    kept.push_back(torch::stable::contiguous(t));
    return kept.back().const_data_ptr();
  }

  // A vector of `size` in the dtype of x (or, for norms, float32); nullptr where it is empty.
  const void* vector(int64_t layer, int64_t index, int64_t size, bool float32_too, DType* dtype) {
    const Tensor& t = weight(layer, index);
    if (t.numel() == 0) return nullptr;
    REQUIRE(t.is_cpu(), name(layer, index), " must be on the CPU");
    REQUIRE(t.dim() == 1 && t.size(0) == size, name(layer, index), " must be [", size, "] or empty, got ", shape_string(t));
    REQUIRE(t.scalar_type() == x.scalar_type() || (float32_too && t.scalar_type() == ScalarType::Float), name(layer, index), " must have the dtype of x",
            float32_too ? " or be float32" : "");
    if (dtype) *dtype = float_dtype(kOp, "a norm", t);
    return contiguous(t);
  }
  Norm norm(int64_t layer, int64_t index, int64_t size) {
    Norm norm;
    norm.weight = vector(layer, index, size, true, &norm.dtype);
    return norm;
  }

  // The `which`-th of a layer's four matmuls.
  Linear linear(int64_t layer, int64_t which, int64_t index, int64_t N, int64_t K, bool glu) {
    const int64_t* numbers = &ints[layer * kIntsPerLayer + which * 4];
    Linear linear;
    const AnyWeight any = any_weight(kOp, N, K, numbers[0], numbers[1], numbers[2] != 0);
    linear.weight = any.spec, linear.pattern = any.pattern;
    const char* why = quant_linear::refused_activations(linear.weight.format, numbers[3], linear.pattern.m == 0);
    REQUIRE(!why, name(layer, index), ": ", why ? why : "", ", got ", numbers[3]);
    linear.activations = static_cast<quant_linear::Activations>(numbers[3]);
    const Tensor& packed = weight(layer, index);
    REQUIRE(packed.is_cpu(), name(layer, index), " must be on the CPU");
    REQUIRE(packed.scalar_type() == ScalarType::Byte && packed.dim() == 1 && packed.is_contiguous(), name(layer, index),
            " must be a contiguous 1-D uint8 tensor from pack_weight or pack_sparse");
    REQUIRE(packed.numel() == any.packed_bytes(), name(layer, index), " holds ", packed.numel(), " bytes, but [", N, ", ", K, "] in this format takes ",
            any.packed_bytes());
    linear.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
    linear.bias = vector(layer, index + 1, N, false, nullptr);
    linear.num_threads = std::clamp<int64_t>(p.B * p.T * N * K / kMinWorkPerThread, 1, p.num_threads);
    quant_linear::Params call{};  // what the choice depends on
    call.dtype = p.dtype;
    call.M = p.B * p.T;
    call.weight = linear.weight, call.pattern = linear.pattern;
    call.activations = linear.activations;
    call.prologue = glu ? p.glu : quant_linear::Prologue::kNone;
    linear.run = quant_linear::choose(call);
    return linear;
  }

  // One layer's keys or values.
  void* cache(const char* what, const Tensor& t, int64_t layer, int64_t rows, int64_t* batch_stride, int64_t* head_stride) {
    REQUIRE(t.is_cpu() && t.dim() == 4 && t.size(0) == p.B && t.size(1) == p.kv_heads && t.size(3) == p.head_dim, what, "[", layer,
            "] must be on the CPU and [", p.B, ", ", p.kv_heads, ", capacity, ", p.head_dim, "], got ", shape_string(t));
    REQUIRE(t.scalar_type() == x.scalar_type() || t.scalar_type() == ScalarType::Float, what, "[", layer, "] must have the dtype of x or be float32");
    REQUIRE(t.size(2) >= rows, what, "[", layer, "] has capacity ", t.size(2), ", but past and new tokens are ", rows);
    REQUIRE(t.stride(3) == 1 && t.stride(2) == p.head_dim, what, "[", layer, "] must be contiguous in its last two dimensions");
    REQUIRE((p.B == 1 || t.stride(0) >= p.kv_heads * t.size(2) * p.head_dim) && (p.kv_heads == 1 || t.stride(1) >= t.size(2) * p.head_dim), what, "[", layer,
            "] must not overlap itself");
    *batch_stride = t.stride(0);
    *head_stride = t.stride(1);
    return t.mutable_data_ptr();
  }

  Layer layer(int64_t i) {
    const int64_t* numbers = &ints[i * kIntsPerLayer + 16];
    Layer layer{};
    const int64_t H = p.hidden, D = p.head_dim, I = p.intermediate;
    layer.attn_norm = norm(i, kAttnNorm, H);
    layer.qkv = linear(i, 0, kQkv, (p.q_heads + 2 * p.kv_heads) * D, H, false);
    layer.q_norm = norm(i, kQNorm, D);
    layer.k_norm = norm(i, kKNorm, D);
    layer.o = linear(i, 1, kO, H, p.q_heads * D, false);
    layer.attn_post_norm = norm(i, kAttnPostNorm, H);
    layer.mlp_norm = norm(i, kMlpNorm, H);
    layer.gate_up = linear(i, 2, kGateUp, 2 * I, H, false);
    layer.down = linear(i, 3, kDown, H, I, true);
    layer.mlp_post_norm = norm(i, kMlpPostNorm, H);

    const int64_t table = numbers[0];
    REQUIRE(0 <= table && table < static_cast<int64_t>(cos.size()), "layer ", i, " asks for rope table ", table, " of ", cos.size());
    const Tensor &c = cos[table], &s = sin[table];
    REQUIRE(c.is_cpu() && c.dim() == 3 && (c.size(0) == p.B || c.size(0) == 1) && c.size(1) == p.T && c.size(2) % 2 == 0 && c.size(2) <= D, "cos[", table,
            "] must be on the CPU and [", p.B, " or 1, ", p.T, ", R] with R even and at most ", D, ", got ", shape_string(c));
    REQUIRE(s.is_cpu() && s.dim() == 3 && s.size(0) == c.size(0) && s.size(1) == p.T && s.size(2) == c.size(2), "sin[", table, "] must have the shape of cos[",
            table, "], ", shape_string(c), ", got ", shape_string(s));
    REQUIRE(c.scalar_type() == s.scalar_type() && (c.scalar_type() == x.scalar_type() || c.scalar_type() == ScalarType::Float),
            "cos and sin must have the dtype of x or be float32, both the same");
    layer.cos = contiguous(c);
    layer.sin = contiguous(s);
    layer.rope_dtype = float_dtype(kOp, "cos", c);
    layer.rotated = c.size(2);
    layer.shared_rope = c.size(0) == 1;

    layer.begin = numbers[1];
    layer.length = numbers[2];
    layer.window = numbers[3];
    REQUIRE(0 <= layer.begin && layer.begin <= layer.length && layer.length < kMostElems, "layer ", i,
            " must have 0 <= begin <= length, got begin=", layer.begin, ", length=", layer.length);
    REQUIRE(layer.window >= 0, "layer ", i, " must have a window of 0 (none) or more, got ", layer.window);
    REQUIRE(!p.mask || p.mask_columns >= layer.length - layer.begin + p.T, "mask has ", p.mask_columns, " columns, but layer ", i, " has ",
            layer.length - layer.begin, " past and ", p.T, " new tokens");
    const int64_t rows = layer.length + p.T;
    layer.keys = cache("keys", keys[i], i, rows, &layer.key_batch_stride, &layer.key_head_stride);
    layer.values = cache("values", values[i], i, rows, &layer.value_batch_stride, &layer.value_head_stride);
    REQUIRE(keys[i].scalar_type() == values[i].scalar_type(), "keys[", i, "] and values[", i, "] must have one dtype");
    layer.cache_dtype = float_dtype(kOp, "keys", keys[i]);
    return layer;
  }
};

Tensor decoder_layers(const Tensor& x, const std::vector<Tensor>& cos, const std::vector<Tensor>& sin, const std::optional<Tensor>& mask,
                      const std::vector<Tensor>& keys, const std::vector<Tensor>& values, const std::vector<Tensor>& weights, const std::vector<int64_t>& sizes,
                      const std::vector<int64_t>& layers, const std::vector<double>& numbers) {
  check_cpu(kOp, "x", x);
  Params p{};
  p.dtype = float_dtype(kOp, "x", x);
  REQUIRE(sizes.size() == 6, "sizes must be [q_heads, kv_heads, head_dim, hidden, intermediate, glu], got ", sizes.size(), " numbers");
  REQUIRE(numbers.size() == 7, "numbers must be [norm_eps, norm_offset, attn_scale, attn_softcap, qk_norm_eps, attn_multiplier, residual_multiplier], got ",
          numbers.size());
  p.num_layers = static_cast<int64_t>(keys.size());
  const auto count = [&](const char* what, size_t found, int64_t per_layer) {
    REQUIRE(static_cast<int64_t>(found) == p.num_layers * per_layer, what, " must hold ", per_layer, " a layer, ", p.num_layers * per_layer, " for ",
            p.num_layers, " layers (as many as keys), got ", found);
  };
  count("values", values.size(), 1);
  count("weights", weights.size(), kWeightsPerLayer);
  count("layers", layers.size(), kIntsPerLayer);
  REQUIRE(cos.size() == sin.size(), "cos and sin must be lists of one length, got ", cos.size(), " and ", sin.size());
  constexpr int64_t kMost = 1 << 20;
  for (int i = 0; i < 5; i++)
    REQUIRE(1 <= sizes[i] && sizes[i] <= kMost, "sizes must be 1 to 2^20 (q_heads, kv_heads, head_dim, hidden, intermediate), got ", sizes[i]);
  REQUIRE(2 <= sizes[5] && sizes[5] <= 4, "glu must be 2 (silu), 3 (gelu_tanh) or 4 (gelu), got ", sizes[5]);
  p.q_heads = sizes[0];
  p.kv_heads = sizes[1];
  p.head_dim = sizes[2];
  p.hidden = sizes[3];
  p.intermediate = sizes[4];
  p.glu = static_cast<quant_linear::Prologue>(sizes[5]);
  REQUIRE(p.q_heads % p.kv_heads == 0, "q_heads must be a multiple of kv_heads, got ", p.q_heads, " and ", p.kv_heads);
  REQUIRE((p.q_heads + 2 * p.kv_heads) * p.head_dim < kMostElems, "(q_heads + 2 kv_heads) * head_dim must be under 2^31");
  REQUIRE(x.dim() == 3 && x.size(2) == p.hidden, "x must be [B, T, ", p.hidden, "], got ", shape_string(x));
  p.B = x.size(0);
  p.T = x.size(1);
  REQUIRE(p.T <= kMostTokens, "x must have at most ", kMostTokens, " new tokens a sequence, got ", p.T);
  p.norm_eps = static_cast<float>(numbers[0]);
  p.norm_offset = static_cast<float>(numbers[1]);
  p.attn_scale = static_cast<float>(numbers[2] * numbers[5]);
  p.attn_softcap = static_cast<float>(numbers[3]);
  REQUIRE(numbers[3] >= 0, "attn_softcap must be 0 (none) or positive, got ", numbers[3]);
  p.qk_norm_eps = static_cast<float>(numbers[4]);
  p.residual_multiplier = static_cast<float>(numbers[6]);
  Tensor mask_rows;
  if (mask) {
    REQUIRE(mask->is_cpu() && (mask->scalar_type() == ScalarType::Byte || mask->scalar_type() == ScalarType::Bool), "mask must be uint8 or bool, on the CPU");
    REQUIRE(mask->dim() == 2 && mask->size(0) == p.B, "mask must be [", p.B, ", past + new tokens], got ", shape_string(*mask));
    mask_rows = torch::stable::contiguous(*mask);
    p.mask = static_cast<const uint8_t*>(mask_rows.const_data_ptr());
    p.mask_columns = mask->size(1);
  }
  p.num_threads = torch::stable::get_num_threads();

  Reader reader{x, weights, cos, sin, keys, values, layers, p, {}};
  std::vector<Layer> parsed;
  parsed.reserve(p.num_layers);
  reader.kept.reserve(p.num_layers * 8);
  const Tensor start = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(start);
  const bool empty = p.B * p.T == 0;
  p.most_chunks = 1;
  for (int64_t i = 0; i < p.num_layers; i++) {
    parsed.push_back(reader.layer(i));
    p.most_chunks = std::max(p.most_chunks, (parsed[i].length + p.T + kChunk - 1) / kChunk - parsed[i].begin / kChunk);
  }
  p.layers = parsed.data();
  const auto& impl = select(kOp, kImpls, p);
  if (empty) return out;

  const int64_t rows = p.B * p.T, element = dtype_bytes(p.dtype), heads = p.B * p.kv_heads;
  int64_t bytes = 0;
  const auto piece = [&](int64_t size) {
    const int64_t begin = bytes;
    bytes += (size + 63) / 64 * 64;
    return begin;
  };
  const int64_t qkv = piece(rows * (p.q_heads + 2 * p.kv_heads) * p.head_dim * element), attended = piece(rows * p.q_heads * p.head_dim * element),
                gate_up = piece(rows * 2 * p.intermediate * element), sublayer = piece(rows * p.hidden * element),
                partials = piece(p.most_chunks * heads * p.partial_elems() * sizeof(float)), finished = piece(heads * sizeof(int32_t));
  const int64_t shape[] = {bytes + 64};
  Tensor workspace = torch::stable::new_empty(x, torch::headeronly::IntHeaderOnlyArrayRef(shape, 1), ScalarType::Byte);
  char* memory = static_cast<char*>(workspace.mutable_data_ptr());
  memory += -reinterpret_cast<uintptr_t>(memory) & 63;
  p.qkv = memory + qkv;
  p.attended = memory + attended;
  p.gate_up = memory + gate_up;
  p.sublayer = memory + sublayer;
  p.partials = reinterpret_cast<float*>(memory + partials);
  p.finished = reinterpret_cast<int32_t*>(memory + finished);
  std::memset(p.finished, 0, heads * sizeof(int32_t));
  p.x = out.mutable_data_ptr();
  std::memcpy(p.x, start.const_data_ptr(), rows * p.hidden * element);
  impl.run(p);
  return out;
}

std::vector<Verdict> explain(const std::map<std::string, int64_t>& sizes) {
  Params p{};
  const auto found = sizes.find("head_dim");
  p.head_dim = found == sizes.end() ? 64 : found->second;
  return explain_table(kOp, kImpls, p);
}

const bool registered = register_table(kOp, "cpu", kImpls, explain);

}  // namespace
}  // namespace taut::decoder_layers

STABLE_TORCH_LIBRARY_FRAGMENT(taut, m) { m.def(taut::decoder_layers::kSchema); }
STABLE_TORCH_LIBRARY_IMPL(taut, CPU, m) { m.impl("decoder_layers", TORCH_BOX(&taut::decoder_layers::decoder_layers)); }
