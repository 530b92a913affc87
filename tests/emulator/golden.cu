// What every wrapper of common/ptx.cuh answers to many inputs: recorded on a GPU, replayed in the emulator ever after
// (tests/test_emulator.py). It is the one thing that shows that the emulator reads the instruction set as the hardware does.
//
//   nvcc -std=c++20 -O2 -gencode=arch=compute_90a,code=sm_90a -Icsrc tests/emulator/golden.cu -o golden && ./golden FOLDER
//
// writes FOLDER/sm<NN>-<wrapper>.golden, to be committed as tests/emulator/golden/. A file is one line of text,
//   taut golden 1 <wrapper> <sm> <inputs> <outputs> <warps> <kinds>
// then 32-bit words, little endian: inputs [warps][32 lanes][inputs], outputs [warps][32][outputs]. The first half of the warps
// has inputs whose results are exact in any order of summation.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/launch.h"
#include "common/ptx.cuh"

namespace {

using namespace taut;

constexpr int kWarps = 8;

struct Probe {
  const char* name;
  int sm;             // the oldest that has the instruction
  const char* kinds;  // of each input word; see random_word
  int outputs;
  void (*kernel)(const uint32_t*, uint32_t*);
  int threads = 32, smem_bytes = 0;  // of a block
};

// A kernel of one warp per block around a body that sees its lane's inputs as `in` and leaves `out`. On older GPUs the body
// is not compiled, and the host does not launch it.
#define TAUT_PROBE(name, inputs, outputs, exists, ...)                                                 \
  __global__ void __launch_bounds__(32) name(const uint32_t* g_in, uint32_t* g_out) {                  \
    const int lane = static_cast<int>(threadIdx.x), thread = static_cast<int>(blockIdx.x) * 32 + lane; \
    uint32_t in[inputs], out[outputs];                                                                 \
    for (int i = 0; i < (inputs); i++) in[i] = g_in[thread * (inputs) + i];                            \
    if constexpr (exists) { __VA_ARGS__ }                                                              \
    for (int i = 0; i < (outputs); i++) g_out[thread * (outputs) + i] = out[i];                        \
    (void)lane, (void)in;                                                                              \
  }

constexpr bool kSm80 = TAUT_ARCH_AT_LEAST(80), kSm89 = TAUT_ARCH_AT_LEAST(89), kSm90 = TAUT_ARCH_AT_LEAST(90);

// ---- copies -----------------------------------------------------------------------------------------------------------

TAUT_PROBE(cp_async_16, 5, 4, kSm80, {
  __shared__ __align__(16) uint32_t s_words[128];
  ptx::cp_async_16(s_words + 4 * lane, g_in + thread / 4 * 4 * 5, static_cast<int>(in[4] % 17));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 4; i++) out[i] = s_words[4 * lane + i];
})

TAUT_PROBE(cp_async_4, 2, 1, kSm80, {
  __shared__ uint32_t s_words[32];
  ptx::cp_async_4(s_words + lane, g_in + thread * 2, static_cast<int>(in[1] % 5));
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  out[0] = s_words[lane];
})

TAUT_PROBE(ld_global_nc_16, 4, 4, true, {
  const uint4 v = ptx::ld_global_nc_16(g_in + thread * 4);
  out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
})

// A lane's 4 words become row `lane` of shared memory; the rows that ldmatrix is given are in[4].
#define TAUT_LDMATRIX_PROBE(name, registers)                   \
  TAUT_PROBE(name, 5, registers, true, {                       \
    __shared__ __align__(16) uint32_t s_words[128];            \
    for (int i = 0; i < 4; i++) s_words[4 * lane + i] = in[i]; \
    __syncwarp();                                              \
    ptx::name(out, s_words + 4 * (in[4] % 32));                \
  })
TAUT_LDMATRIX_PROBE(ldmatrix_x4, 4)
TAUT_LDMATRIX_PROBE(ldmatrix_x2, 2)
TAUT_LDMATRIX_PROBE(ldmatrix_x4_trans, 4)

// ---- mma: in = a[4], b[2], d[4] ---------------------------------------------------------------------------------------

#define TAUT_MMA_PROBE(name, number, exists, call) \
  TAUT_PROBE(name, 10, 4, exists, {                \
    uint32_t a[4];                                 \
    number d[4];                                   \
    for (int i = 0; i < 4; i++) a[i] = in[i];      \
    memcpy(d, in + 6, sizeof d);                   \
    call(d, a, in[4], in[5]);                      \
    memcpy(out, d, sizeof d);                      \
  })
TAUT_MMA_PROBE(mma_m16n8k16_f16, float, kSm80, ptx::mma_m16n8k16<half>)
TAUT_MMA_PROBE(mma_m16n8k16_bf16, float, kSm80, ptx::mma_m16n8k16<__nv_bfloat16>)
TAUT_MMA_PROBE(mma_m16n8k32_s8, int, kSm80, ptx::mma_m16n8k32_s8)
TAUT_MMA_PROBE(mma_m16n8k32_e4m3, float, kSm89, ptx::mma_m16n8k32_e4m3)

// in = a[4], b[4], metadata, d[4]; out = d by the metadata of the first pair of each 4 lanes, and of the second
template <class Type>
__device__ void mma_sp_both(const uint32_t* in, uint32_t* out) {
  uint32_t a[4], b[4];
  float d[4];
  for (int i = 0; i < 4; i++) a[i] = in[i], b[i] = in[4 + i];
  memcpy(d, in + 9, sizeof d);
  ptx::mma_sp_m16n8k32<Type, 0>(d, a, b, in[8]);
  memcpy(out, d, sizeof d);
  memcpy(d, in + 9, sizeof d);
  ptx::mma_sp_m16n8k32<Type, 1>(d, a, b, in[8]);
  memcpy(out + 4, d, sizeof d);
}
TAUT_PROBE(mma_sp_m16n8k32_f16, 13, 8, kSm80, { mma_sp_both<half>(in, out); })
TAUT_PROBE(mma_sp_m16n8k32_bf16, 13, 8, kSm80, { mma_sp_both<__nv_bfloat16>(in, out); })

// in = a[2], b[2], metadata, d[4]; out as above
TAUT_PROBE(mma_sp_m16n8k32_s8, 9, 8, kSm80, {
  int d[4];
  memcpy(d, in + 5, sizeof d);
  ptx::mma_sp_m16n8k32_s8<0>(d, in[0], in[1], in[2], in[3], in[4]);
  memcpy(out, d, sizeof d);
  memcpy(d, in + 5, sizeof d);
  ptx::mma_sp_m16n8k32_s8<1>(d, in[0], in[1], in[2], in[3], in[4]);
  memcpy(out + 4, d, sizeof d);
})

// in = a[4], b[4], metadata, d[4]; call(d, a, b, metadata)
#define TAUT_MMA_SP8_PROBE(name, Sum, condition)                \
  TAUT_PROBE(name, 13, 4, condition, {                          \
    uint32_t a[4], b[4];                                        \
    Sum d[4];                                                   \
    for (int i = 0; i < 4; i++) a[i] = in[i], b[i] = in[4 + i]; \
    memcpy(d, in + 9, sizeof d);                                \
    ptx::name(d, a, b, in[8]);                                  \
    memcpy(out, d, sizeof d);                                   \
  })
TAUT_MMA_SP8_PROBE(mma_sp_m16n8k64_s8, int, kSm80)
TAUT_MMA_SP8_PROBE(mma_sp_m16n8k64_e4m3, float, kSm89)

// in = a[2], b, d[4]
TAUT_PROBE(mma_m16n8k8_f16, 7, 4, true, {
  float d[4];
  memcpy(d, in + 3, sizeof d);
  ptx::mma_m16n8k8(d, in[0], in[1], in[2]);
  memcpy(out, d, sizeof d);
})

// ---- arithmetic -------------------------------------------------------------------------------------------------------

TAUT_PROBE(lop3, 3, 3, true, {
  out[0] = ptx::lop3<0xea>(in[0], in[1], in[2]);
  out[1] = ptx::lop3<0x6a>(in[0], in[1], in[2]);
  out[2] = ptx::lop3<0x1b>(in[0], in[1], in[2]);
})
TAUT_PROBE(prmt, 3, 1, true, { out[0] = ptx::prmt(in[0], in[1], in[2] & 0xffff); })
TAUT_PROBE(arithmetic_f16, 3, 3, true, {
  out[0] = ptx::hfma2<half>(in[0], in[1], in[2]);
  out[1] = ptx::hsub2<half>(in[0], in[1]);
  out[2] = ptx::hmul2<half>(in[0], in[1]);
})
TAUT_PROBE(arithmetic_bf16, 3, 3, kSm80, {
  out[0] = ptx::hfma2<__nv_bfloat16>(in[0], in[1], in[2]);
  out[1] = ptx::hsub2<__nv_bfloat16>(in[0], in[1]);
  out[2] = ptx::hmul2<__nv_bfloat16>(in[0], in[1]);
})
TAUT_PROBE(ex2, 1, 1, true, {
  float x;
  memcpy(&x, &in[0], 4);
  out[0] = __float_as_uint(ptx::ex2(x));
})
TAUT_PROBE(cvt_e4m3x2, 2, 1, kSm89, {
  float lo, hi;
  memcpy(&lo, &in[0], 4);
  memcpy(&hi, &in[1], 4);
  out[0] = ptx::cvt_e4m3x2(lo, hi);
})

// Two E4M3 numbers in the low half of a word.
TAUT_PROBE(cvt_f16x2_e4m3x2, 1, 1, kSm89, { out[0] = ptx::cvt_f16x2_e4m3x2(static_cast<uint16_t>(in[0])); })

// ---- Hopper -----------------------------------------------------------------------------------------------------------

TAUT_PROBE(stmatrix_x4_trans, 4, 4, kSm90, {
  __shared__ __align__(16) uint32_t s_words[128];
  ptx::stmatrix_x4_trans(s_words + 4 * lane, in);
  __syncwarp();
  for (int i = 0; i < 4; i++) out[i] = s_words[4 * lane + i];
})

// 128 threads; in = a[4], half a row of b (64 rows of 64 k), d[32]. Block i multiplies by k 16i to 16i + 15 of b.
template <class Type>
__global__ void __launch_bounds__(128) wgmma_m64n64k16(const uint32_t* g_in, uint32_t* g_out) {
#if TAUT_ARCH_90A
  constexpr int kInputs = 4 + 16 + 32, kOutputs = 32;
  TAUT_DYNAMIC_SMEM(smem);
  const int t = static_cast<int>(threadIdx.x), thread = static_cast<int>(blockIdx.x) * 128 + t, row = t / 2;
  const uint32_t* const in = g_in + thread * kInputs;
  uint32_t a[4];
  float d[32];
  for (int i = 0; i < 4; i++) a[i] = in[i];
  for (int i = 0; i < 16; i++) {
    const int piece = t % 2 * 4 + i / 4;  // of 16 bytes
    reinterpret_cast<uint32_t*>(smem + row * 128 + (piece ^ row % 8) * 16)[i % 4] = in[4 + i];
  }
  memcpy(d, in + 20, sizeof d);
  ptx::fence_proxy_async();
  __syncthreads();
  ptx::wgmma_pin(a);
  ptx::wgmma_fence();
  ptx::wgmma_m64k16<Type, 64>(d, a, ptx::swizzled_128b_descriptor(smem + blockIdx.x % 4 * 32));
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  memcpy(g_out + thread * kOutputs, d, sizeof d);
#endif
}

constexpr Probe kProbes[] = {
    {"cp_async_16", 80, "xxxxx", 4, cp_async_16},
    {"cp_async_4", 80, "xx", 1, cp_async_4},
    {"ld_global_nc_16", 75, "xxxx", 4, ld_global_nc_16},
    {"ldmatrix_x4", 75, "xxxxx", 4, ldmatrix_x4},
    {"ldmatrix_x2", 75, "xxxxx", 2, ldmatrix_x2},
    {"ldmatrix_x4_trans", 75, "xxxxx", 4, ldmatrix_x4_trans},
    {"mma_m16n8k16_f16", 80, "hhhhhhffff", 4, mma_m16n8k16_f16},
    {"mma_m16n8k16_bf16", 80, "bbbbbbffff", 4, mma_m16n8k16_bf16},
    {"mma_sp_m16n8k32_f16", 80, "hhhhhhhhpffff", 8, mma_sp_m16n8k32_f16},
    {"mma_sp_m16n8k32_bf16", 80, "bbbbbbbbpffff", 8, mma_sp_m16n8k32_bf16},
    {"mma_m16n8k8_f16", 75, "hhhffff", 4, mma_m16n8k8_f16},
    {"mma_m16n8k32_s8", 80, "xxxxxxxxxx", 4, mma_m16n8k32_s8},
    {"mma_m16n8k32_e4m3", 89, "eeeeeeffff", 4, mma_m16n8k32_e4m3},
    {"lop3", 75, "xxx", 3, lop3},
    {"prmt", 75, "xxx", 1, prmt},
    {"arithmetic_f16", 75, "HHH", 3, arithmetic_f16},
    {"arithmetic_bf16", 80, "BBB", 3, arithmetic_bf16},
    {"ex2", 75, "f", 1, ex2},
    {"cvt_e4m3x2", 89, "FF", 1, cvt_e4m3x2},
    {"cvt_f16x2_e4m3x2", 89, "e", 1, cvt_f16x2_e4m3x2},
    {"stmatrix_x4_trans", 90, "xxxx", 4, stmatrix_x4_trans},
    {"mma_sp_m16n8k32_s8", 80, "xxxxpxxxx", 8, mma_sp_m16n8k32_s8},
    {"mma_sp_m16n8k64_s8", 80, "xxxxxxxxpxxxx", 4, mma_sp_m16n8k64_s8},
    {"mma_sp_m16n8k64_e4m3", 89, "eeeeeeeepffff", 4, mma_sp_m16n8k64_e4m3},
};

// sm_90 alone.
#define TAUT_WGMMA_KINDS(kind) kind kind kind kind kind "ffffffffffffffffffffffffffffffff"
constexpr Probe kHopperProbes[] = {
    {"wgmma_m64n64k16_f16", 90, TAUT_WGMMA_KINDS("hhhh"), 32, wgmma_m64n64k16<half>, 128, 8192},
    {"wgmma_m64n64k16_bf16", 90, TAUT_WGMMA_KINDS("bbbb"), 32, wgmma_m64n64k16<__nv_bfloat16>, 128, 8192},
};

// ---- inputs -----------------------------------------------------------------------------------------------------------

struct Random {
  uint64_t state = 0x9e3779b97f4a7c15;
  uint32_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 20);
  }
  int between(int low, int high) { return low + static_cast<int>(next() % static_cast<uint32_t>(high - low + 1)); }
};

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

// A 16-bit float of `mantissa` bits: a small integer, or anything near 1.
uint32_t random_16(Random& random, bool exact, int mantissa) {
  const float x = exact ? static_cast<float>(random.between(-8, 8)) : static_cast<float>(random.between(-65535, 65535)) * 0x1p-14f;
  if (mantissa == 7) return bits_of(x) >> 16;
  const __half h = __float2half_rn(x);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}

uint32_t random_word(Random& random, char kind, bool exact) {
  switch (kind) {
    case 'h': return random_16(random, exact, 10) | random_16(random, exact, 10) << 16;
    case 'b': return random_16(random, exact, 7) | random_16(random, exact, 7) << 16;
    case 'f': return bits_of(exact ? static_cast<float>(random.between(-64, 64)) : static_cast<float>(random.between(-65535, 65535)) * 0x1p-12f);
    case 'p': {  // 8 pairs of places that ascend
      constexpr uint32_t kPairs[] = {0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110};
      uint32_t word = 0;
      for (int i = 0; i < 32; i += 4) word |= kPairs[random.next() % 6] << i;
      return word;
    }
    case 'e': {  // 4 of E4M3: 0, +-1, +-2, +-4, or any number
      uint32_t word = 0;
      for (int i = 0; i < 32; i += 8) {
        const uint32_t any = random.next() & 0xff, small = (any & 0x80) | (any % 4 ? 0x30 + 8 * (any % 4) : 0);
        word |= (exact ? small : (any & 0x7f) == 0x7f ? any - 1 : any) << i;
      }
      return word;
    }
    case 'H':  // 2 of any finite half
    case 'B': {
      const uint32_t exponents = kind == 'H' ? 0x7c007c00u : 0x7f807f80u, low = kind == 'H' ? 0x04000400u : 0x00800080u;
      uint32_t word = random.next();
      if ((word & exponents & 0xffff) == (exponents & 0xffff)) word ^= low & 0xffff;
      if ((word & exponents >> 16 << 16) == exponents >> 16 << 16) word ^= low >> 16 << 16;
      return word;
    }
    case 'F': {  // floats that E4M3 has to round, saturate or refuse
      constexpr uint32_t kSpecial[] = {0, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0x43e00000u, 0x43e80000u, 0x43f00000u};
      if (random.next() % 8 == 0) return kSpecial[random.next() % 8];
      const uint32_t fraction = exact ? random.next() << 18 & 0x7fffffu : random.next() & 0x7fffffu;  // exact: ties are frequent
      return static_cast<uint32_t>(127 + random.between(-12, 10)) << 23 | fraction | (random.next() << 31);
    }
    default: return random.next();
  }
}

// ---- running ----------------------------------------------------------------------------------------------------------

void run(const Probe& probe, const uint32_t* in, uint32_t* out, int warps) {
  const size_t in_bytes = static_cast<size_t>(warps) * 128 * strlen(probe.kinds), out_bytes = static_cast<size_t>(warps) * 128 * probe.outputs;
  const dim3 grid(static_cast<unsigned>(warps * 32 / probe.threads)), block(static_cast<unsigned>(probe.threads));
#if defined(TAUT_EMULATE)
  emulator::expose("inputs", in, in_bytes, false);
  emulator::expose("outputs", out, out_bytes, true);
  launch(probe.name, probe.kernel, grid, block, probe.smem_bytes, nullptr, in, out);
  emulator::hide_all();
#else
  void *g_in = nullptr, *g_out = nullptr;
  check_cuda(cudaMalloc(&g_in, in_bytes), probe.name);
  check_cuda(cudaMalloc(&g_out, out_bytes), probe.name);
  check_cuda(cudaMemcpy(g_in, in, in_bytes, cudaMemcpyHostToDevice), probe.name);
  launch(probe.name, probe.kernel, grid, block, probe.smem_bytes, nullptr, static_cast<const uint32_t*>(g_in), static_cast<uint32_t*>(g_out));
  check_cuda(cudaMemcpy(out, g_out, out_bytes, cudaMemcpyDeviceToHost), probe.name);
  cudaFree(g_in), cudaFree(g_out);
#endif
}

void record(const std::string& folder, int sm) {
  Random random;
  const auto record_one = [&](const Probe& probe) {
    const size_t inputs = strlen(probe.kinds);
    std::vector<uint32_t> in(kWarps * 32 * inputs), out(kWarps * 32 * static_cast<size_t>(probe.outputs));
    for (size_t i = 0; i < in.size(); i++) in[i] = random_word(random, probe.kinds[i % inputs], i < in.size() / 2);
    run(probe, in.data(), out.data(), kWarps);
    const std::string path = folder + "/sm" + std::to_string(sm) + "-" + probe.name + ".golden";
    FILE* file = fopen(path.c_str(), "wb");
    if (!file) throw std::runtime_error("cannot write " + path);
    fprintf(file, "taut golden 1 %s %d %zu %d %d %s\n", probe.name, sm, inputs, probe.outputs, kWarps, probe.kinds);
    const bool whole = fwrite(in.data(), 4, in.size(), file) == in.size() && fwrite(out.data(), 4, out.size(), file) == out.size();
    if (fclose(file) != 0 || !whole) throw std::runtime_error("cannot write " + path);
  };
  for (const Probe& probe : kProbes)
    if (probe.sm <= sm) record_one(probe);
  for (const Probe& probe : kHopperProbes)
    if (sm == 90) record_one(probe);
}

}  // namespace

#if defined(TAUT_EMULATE)

// An empty string, or what went wrong.
template <class F>
const char* message_of(const F& f) {
  static std::string message;
  message.clear();
  try {
    f();
  } catch (const std::exception& failure) { message = failure.what(); }
  emulator::hide_all();
  return message.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* taut_golden_record(const char* folder, int sm) {
  return message_of([&] { record(folder, sm); });
}

extern "C" __attribute__((visibility("default"))) const char* taut_golden_run(const char* name, const uint32_t* in, uint32_t* out, int warps) {
  return message_of([&] {
    for (const Probe& probe : kProbes)
      if (strcmp(probe.name, name) == 0) return run(probe, in, out, warps);
    for (const Probe& probe : kHopperProbes)
      if (strcmp(probe.name, name) == 0) return run(probe, in, out, warps);
    throw std::runtime_error(std::string("no probe ") + name);
  });
}

#else

int main(int count, char** arguments) {
  if (count != 2) {
    fprintf(stderr, "usage: %s FOLDER\n", arguments[0]);
    return 2;
  }
  try {
    cudaDeviceProp properties;
    check_cuda(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
    record(arguments[1], properties.major * 10 + properties.minor);
  } catch (const std::exception& failure) {
    fprintf(stderr, "%s\n", failure.what());
    return 1;
  }
  return 0;
}

#endif
