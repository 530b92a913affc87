// COMPUTES  packed = layout(codes, scales, zeros); its inverse; and rows of dequant(w), float(q - z) * scale rounded once to fp32, bf16 or fp16
// LAYOUT    canonical and MmaTiles (common/formats.h). Between them a lane and its quad exchange 4x4 words (transpose_quad):
//           as stored, word i of lane t; exchanged, lane i holds the word i of all four t, and that is 16 consecutive k:
//             int4         of k16-step i, of rows g and g + 8:  8 canonical bytes of each
//             int8, fp8    of k16-step i / 2 of the fragment, of row g + 8 * (i % 2):  16 canonical bytes
// WORK      a warp makes one fragment of 512 B at a time (16 n x 64 k, or 32 k of 8-bit codes), 16 B a lane; warps stride over
//           all fragments. Then threads stride over the scales and zeros.
// BOUND     DRAM: every byte of w is read once and written once, with whole 32-byte sectors on both sides
// LIMITS    none: any N, K, format, group; rows that no vector load or store can reach go byte by byte
#include <algorithm>
#include <cstring>

#include "common/launch.h"
#include "common/numbers.cuh"
#include "pack_weight/op.h"

namespace taut::pack_weight::cuda_sm75 {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 2048;  // more than any GPU runs at a time; warps stride over the rest

// What a kernel needs of a WeightSpec and its MmaTiles, counted once on the host.
// WHY 32-bit counts of tiles and groups: a 64-bit division is a function call, and 2^32 fragments are more than a terabyte.
struct Shape {
  int64_t N, K, row_bytes, scales_begin, zeros_begin;
  uint32_t tiles_n, tiles_k, groups, stored_groups, group_size;
  bool zeros;

  explicit Shape(const WeightSpec& w) {
    const MmaTiles layout{w};
    N = w.N, K = w.K, row_bytes = w.code_row_bytes(), scales_begin = layout.scales_begin(), zeros_begin = layout.zeros_begin();
    tiles_n = static_cast<uint32_t>(layout.num_tiles_n()), tiles_k = static_cast<uint32_t>(layout.num_tiles_k());
    groups = static_cast<uint32_t>(w.num_groups()), stored_groups = static_cast<uint32_t>(layout.num_groups());
    group_size = static_cast<uint32_t>(w.group_size), zeros = w.zeros;
  }
};
template <bool kInt4>
constexpr uint32_t kFragmentsPerTile = kInt4 ? 4 : 8;

// Word i of lane t becomes word t of lane i, within each quad of lanes.
TAUT_DEVICE void transpose_quad(uint32_t (&w)[4]) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
#pragma unroll
    for (int pair = 0; pair < 2; pair++) {
      const int low = step == 1 ? 2 * pair : pair, high = low + step;  // of the two, the lane gives away the one that is not its own
      const uint32_t received = __shfl_xor_sync(0xffffffffu, t & step ? w[low] : w[high], step);
      if (t & step) w[low] = received;
      else w[high] = received;
    }
  }
}

// 4 * kWords bytes of a canonical row, of which `valid` exist.
template <int kWords>
TAUT_DEVICE void load_bytes(uint32_t (&words)[kWords], const uint8_t* source, int64_t valid) {
  using Vector = std::conditional_t<kWords == 4, uint4, uint2>;
#pragma unroll
  for (int i = 0; i < kWords; i++) words[i] = 0;
  if (valid >= kWords * 4 && reinterpret_cast<uintptr_t>(source) % sizeof(Vector) == 0) {
    const Vector v = *reinterpret_cast<const Vector*>(source);
    words[0] = v.x, words[1] = v.y;
    if constexpr (kWords == 4) words[2] = v.z, words[3] = v.w;
  } else {
#pragma unroll
    for (int i = 0; i < kWords * 4; i++)
      if (i < valid) words[i / 4] |= uint32_t{source[i]} << (i % 4 * 8);
  }
}

template <int kWords>
TAUT_DEVICE void store_bytes(uint8_t* target, const uint32_t (&words)[kWords], int64_t valid) {
  using Vector = std::conditional_t<kWords == 4, uint4, uint2>;
  if (valid >= kWords * 4 && reinterpret_cast<uintptr_t>(target) % sizeof(Vector) == 0) {
    if constexpr (kWords == 4) *reinterpret_cast<Vector*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
    else *reinterpret_cast<Vector*>(target) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords * 4; i++)
      if (i < valid) target[i] = static_cast<uint8_t>(words[i / 4] >> (i % 4 * 8));
  }
}

// Where a lane stands after transpose_quad: row n (int4: and n + 8) and the first of its 16 k.
struct Place {
  int64_t n;
  uint32_t k;
};
template <bool kInt4>
TAUT_DEVICE Place place(const Shape& shape, uint32_t fragment) {
  const uint32_t tile = fragment / kFragmentsPerTile<kInt4>, within = fragment % kFragmentsPerTile<kInt4>;
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, i = lane % 4, strip = kInt4 ? within : within / 2;
  const int64_t n = int64_t{tile / shape.tiles_k} * MmaTiles::kTileN + strip * MmaTiles::kStripN + g;
  const uint32_t k = tile % shape.tiles_k * MmaTiles::kTileK;
  if constexpr (kInt4) return {n, k + i * 16};
  return {n + i % 2 * 8, k + within % 2 * 32 + i / 2 * 16};
}

// f(i, n, group) for the places i of the scales section; n and group may lie in the padding.
template <class F>
TAUT_DEVICE void for_scales(const Shape& shape, const F& f) {
  const int64_t count = int64_t{shape.tiles_n} * shape.stored_groups * MmaTiles::kTileN;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) {
    const uint32_t row = static_cast<uint32_t>(i / MmaTiles::kTileN), slot = static_cast<uint32_t>(i % MmaTiles::kTileN);
    f(i, int64_t{row / shape.stored_groups} * MmaTiles::kTileN + slot % 8 * 8 + slot / 8, row % shape.stored_groups);
  }
}

// The canonical bytes of 16 k: int4 of two rows, 2 words each; else of one row, 4 words. To and from the words of the four t.
template <bool kInt4>
TAUT_DEVICE void to_tile_words(uint32_t (&w)[4], const uint32_t (&c)[4]) {
#pragma unroll
  for (int t = 0; t < 4; t++) {
    if constexpr (kInt4) {  // byte t of a canonical row is k = 2t, 2t+1; byte t + 4 is k = 2t+8, 2t+9
      const int at = t * 8;
      const uint32_t bytes[4] = {c[0] >> at & 255u, c[2] >> at & 255u, c[1] >> at & 255u, c[3] >> at & 255u};
      w[t] = 0;
#pragma unroll
      for (int i = 0; i < 4; i++) w[t] |= ((bytes[i] & 15u) | bytes[i] >> 4 << 16) << (4 * i);
    } else {
      w[t] = __byte_perm(c[t / 2], c[t / 2 + 2], t % 2 ? 0x7362 : 0x5140);
    }
  }
}
template <bool kInt4>
TAUT_DEVICE void from_tile_words(uint32_t (&c)[4], const uint32_t (&w)[4]) {
  if constexpr (kInt4) {
#pragma unroll
    for (int i = 0; i < 4; i++) c[i] = 0;
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {  // i: register a_i of the fragment
        const uint32_t nibbles = w[t] >> (4 * i) & 0x000f000fu;
        c[i % 2 * 2 + i / 2] |= ((nibbles | nibbles >> 12) & 255u) << (8 * t);
      }
  } else {
    c[0] = __byte_perm(w[0], w[1], 0x6420), c[1] = __byte_perm(w[2], w[3], 0x6420);
    c[2] = __byte_perm(w[0], w[1], 0x7531), c[3] = __byte_perm(w[2], w[3], 0x7531);
  }
}

template <bool kInt4>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Shape shape, const uint8_t* __restrict__ codes /* [N, code_row_bytes] */, const uint16_t* __restrict__ scales /* [N, groups] */,
                const uint8_t* __restrict__ zeros /* [N, groups] */, uint8_t* __restrict__ packed) {
  for (uint32_t f = blockIdx.x * kWarps + threadIdx.x / 32; f < shape.tiles_n * shape.tiles_k * kFragmentsPerTile<kInt4>; f += gridDim.x * kWarps) {
    const Place at = place<kInt4>(shape, f);
    uint32_t canonical[4], words[4];
    if constexpr (kInt4) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        uint32_t row[2];
        const int64_t n = at.n + 8 * h, valid = n < shape.N ? shape.row_bytes - at.k / 2 : 0;
        load_bytes(row, codes + (valid > 0 ? n * shape.row_bytes + at.k / 2 : 0), valid);
        if (shape.K % 2 && valid > 0 && valid <= 8) row[(valid - 1) / 4] &= ~(0xf0u << ((valid - 1) % 4 * 8));  // an odd K: the last nibble is nobody's
        canonical[2 * h] = row[0], canonical[2 * h + 1] = row[1];
      }
    } else {
      const int64_t valid = at.n < shape.N ? shape.K - at.k : 0;
      load_bytes(canonical, codes + (valid > 0 ? at.n * shape.row_bytes + at.k : 0), valid);
    }
    to_tile_words<kInt4>(words, canonical);
    transpose_quad(words);
    reinterpret_cast<uint4*>(packed)[int64_t{f} * 32 + threadIdx.x % 32] = make_uint4(words[0], words[1], words[2], words[3]);
  }

  for_scales(shape, [&](int64_t i, int64_t n, uint32_t group) {
    const bool exists = n < shape.N && group < shape.groups;
    reinterpret_cast<uint16_t*>(packed + shape.scales_begin)[i] = exists ? scales[n * shape.groups + group] : 0;
    if (shape.zeros) packed[shape.zeros_begin + i] = exists ? zeros[n * shape.groups + group] : 0;
  });
}

template <bool kInt4>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Shape shape, const uint8_t* __restrict__ packed, uint8_t* __restrict__ codes /* [N, code_row_bytes] */,
                  uint16_t* __restrict__ scales /* [N, groups] */, uint8_t* __restrict__ zeros /* [N, groups] */) {
  for (uint32_t f = blockIdx.x * kWarps + threadIdx.x / 32; f < shape.tiles_n * shape.tiles_k * kFragmentsPerTile<kInt4>; f += gridDim.x * kWarps) {
    const Place at = place<kInt4>(shape, f);
    const uint4 v = reinterpret_cast<const uint4*>(packed)[int64_t{f} * 32 + threadIdx.x % 32];
    uint32_t words[4] = {v.x, v.y, v.z, v.w}, canonical[4];
    transpose_quad(words);
    from_tile_words<kInt4>(canonical, words);
    if constexpr (kInt4) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const uint32_t row[2] = {canonical[2 * h], canonical[2 * h + 1]};
        const int64_t n = at.n + 8 * h, valid = n < shape.N ? shape.row_bytes - at.k / 2 : 0;
        if (valid > 0) store_bytes(codes + n * shape.row_bytes + at.k / 2, row, valid);
      }
    } else {
      const int64_t valid = at.n < shape.N ? shape.K - at.k : 0;
      if (valid > 0) store_bytes(codes + at.n * shape.row_bytes + at.k, canonical, valid);
    }
  }

  for_scales(shape, [&](int64_t i, int64_t n, uint32_t group) {
    if (n >= shape.N || group >= shape.groups) return;
    scales[n * shape.groups + group] = reinterpret_cast<const uint16_t*>(packed + shape.scales_begin)[i];
    if (shape.zeros) zeros[n * shape.groups + group] = packed[shape.zeros_begin + i];
  });
}

// 16 consecutive k of a row of out, of which `valid` exist.
template <class T>
TAUT_DEVICE void store_row(T* out, const float (&values)[16], int64_t valid) {
  constexpr int kPerVector = 16 / sizeof(T);
  if (valid >= 16 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
#pragma unroll
    for (int v = 0; v < 16 / kPerVector; v++) {
      T numbers[kPerVector];
#pragma unroll
      for (int i = 0; i < kPerVector; i++) numbers[i] = from_float<T>(values[v * kPerVector + i]);
      uint4 bits;
      memcpy(&bits, numbers, 16);
      reinterpret_cast<uint4*>(out)[v] = bits;
    }
  } else {
#pragma unroll
    for (int i = 0; i < 16; i++)
      if (i < valid) out[i] = from_float<T>(values[i]);
  }
}

template <Format kFormat, class T>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Shape shape, const uint8_t* __restrict__ packed, int64_t row_begin, int64_t row_end, T* __restrict__ out /* [row_end - row_begin, K] */) {
  constexpr bool kInt4 = kFormat == Format::kInt4;
  const uint32_t per_tile_row = shape.tiles_k * kFragmentsPerTile<kInt4>;
  const uint32_t first = static_cast<uint32_t>(row_begin / MmaTiles::kTileN) * per_tile_row;
  const uint32_t last = static_cast<uint32_t>((row_end + MmaTiles::kTileN - 1) / MmaTiles::kTileN) * per_tile_row;
  for (uint32_t f = first + blockIdx.x * kWarps + threadIdx.x / 32; f < last; f += gridDim.x * kWarps) {
    const Place at = place<kInt4>(shape, f);
    const uint4 v = reinterpret_cast<const uint4*>(packed)[int64_t{f} * 32 + threadIdx.x % 32];
    uint32_t words[4] = {v.x, v.y, v.z, v.w}, canonical[4];
    transpose_quad(words);
    from_tile_words<kInt4>(canonical, words);
#pragma unroll
    for (int h = 0; h < (kInt4 ? 2 : 1); h++) {
      const int64_t n = at.n + 8 * h;
      if (n < row_begin || n >= row_end || at.k >= shape.K) continue;
      const uint32_t group = shape.group_size ? at.k / shape.group_size : 0;
      const int64_t i = (n / MmaTiles::kTileN * shape.stored_groups + group) * MmaTiles::kTileN + n % 8 * 8 + n % MmaTiles::kTileN / 8;
      const float scale = __half2float(reinterpret_cast<const __half*>(packed + shape.scales_begin)[i]);
      const int zero = shape.zeros ? packed[shape.zeros_begin + i] : 8;
      float values[16];
#pragma unroll
      for (int i = 0; i < 16; i++) {
        if constexpr (kInt4) values[i] = __fmul_rn(static_cast<float>(static_cast<int>(canonical[2 * h + i / 8] >> (i % 8 * 4) & 15u) - zero), scale);
        else if constexpr (kFormat == Format::kInt8) values[i] = __fmul_rn(static_cast<float>(static_cast<int8_t>(canonical[i / 4] >> (i % 4 * 8))), scale);
        else values[i] = __fmul_rn(from_e4m3(canonical[i / 4] >> (i % 4 * 8) & 255u), scale);
      }
      store_row(out + (n - row_begin) * shape.K + at.k, values, shape.K - at.k);
    }
  }
}

dim3 grid_for(const WeightSpec& w, int64_t rows) {
  const int64_t tiles = (rows + MmaTiles::kTileN - 1) / MmaTiles::kTileN * MmaTiles{w}.num_tiles_k();
  const int64_t fragments = tiles * (w.format == Format::kInt4 ? kFragmentsPerTile<true> : kFragmentsPerTile<false>);
  return dim3(static_cast<unsigned>(std::clamp<int64_t>((fragments + kWarps - 1) / kWarps, 1, kMaxBlocks)));
}

}  // namespace

void pack(const Params& p, void* stream) {
  if (p.weight.N == 0) return;
  const auto kernel = p.weight.format == Format::kInt4 ? pack_kernel<true> : pack_kernel<false>;
  launch("pack_weight", kernel, grid_for(p.weight, p.weight.N), dim3(kThreads), 0, stream, Shape(p.weight), p.codes, static_cast<const uint16_t*>(p.scales),
         p.zeros, p.packed);
}

void unpack(const Params& p, void* stream) {
  if (p.weight.N == 0) return;
  const auto kernel = p.weight.format == Format::kInt4 ? unpack_kernel<true> : unpack_kernel<false>;
  launch("unpack_weight", kernel, grid_for(p.weight, p.weight.N), dim3(kThreads), 0, stream, Shape(p.weight), p.packed, p.codes,
         static_cast<uint16_t*>(p.scales), p.zeros);
}

void dequantize(const WeightSpec& w, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, void* stream) {
  if (row_begin == row_end) return;
  with_dtype(dtype, [&]<class T>(T) {
    const auto kernel = w.format == Format::kInt4   ? dequantize_kernel<Format::kInt4, T>
                        : w.format == Format::kInt8 ? dequantize_kernel<Format::kInt8, T>
                                                    : dequantize_kernel<Format::kFp8E4M3, T>;
    // A first row inside a tile may touch one tile more than the count of rows says: the stride covers it.
    launch("dequantize_weight", kernel, grid_for(w, row_end - row_begin), dim3(kThreads), 0, stream, Shape(w), packed, row_begin, row_end,
           static_cast<T*>(out));
  });
}

}  // namespace taut::pack_weight::cuda_sm75
