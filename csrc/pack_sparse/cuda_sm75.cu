// COMPUTES  packed = SparseTiles(codes, scales, meta); its inverse; and rows of dequant(w) with their zeros, float(q - z) * scale rounded once to
//           fp32, bf16 or fp16
// LAYOUT    canonical and SparseTiles (common/sparse.h). The kept numbers of 2:4 are pack_weight's affair, but for those of 16 bits
// WORK      places: a thread makes one word of them, or one byte of meta; kept numbers of 16 bits: two neighbours. Dense: a thread makes 8 neighbours of a row, 16 bytes of 16-bit numbers
// BOUND     dense: DRAM, 2 bytes written for every weight, zero or not, where at most 1.2 are read. The rest: once, when a model is loaded
// LIMITS    none: any N, K, format, pattern, group
#include <algorithm>
#include <cstring>

#include "common/launch.h"
#include "common/numbers.cuh"
#include "common/ptx.cuh"
#include "pack_sparse/op.h"
#include "pack_weight/op.h"

namespace taut::pack_sparse::cuda_sm75 {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 8192;  // threads stride over the rest

dim3 grid_for(int64_t count) { return dim3(static_cast<unsigned>(std::clamp<int64_t>((count + kThreads - 1) / kThreads, 1, kMaxBlocks))); }

template <class F>
TAUT_DEVICE void for_each(int64_t count, const F& f) {
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kThreads) f(i);
}

// Bits [at, at + count) of a little-endian string; count is 2 or 3.
TAUT_DEVICE int bits_at(const uint8_t* bytes, int64_t at, int count) {
  int value = bytes[at / 8] >> at % 8;
  if (at % 8 + count > 8) value |= bytes[at / 8 + 1] << (8 - at % 8);
  return value & ((1 << count) - 1);
}

// An element is a block of m in a row of meta.
__global__ void __launch_bounds__(kThreads) check_places_kernel(SparseTiles w, const uint8_t* __restrict__ meta, int32_t* descents) {
  const int64_t blocks = w.spec.K / w.pattern.m;
  for_each(w.meta_rows() * blocks, [&](int64_t i) {
    const int64_t row = i / blocks, first = i % blocks * w.pattern.n;
    const int bits = static_cast<int>(w.place_bits());
    int before = -1;
    for (int64_t j = 0; j < w.pattern.n; j++) {
      const int place = bits_at(meta + row * w.meta_row_bytes(), (first + j) * bits, bits);
      if (place <= before) atomicMax(descents, static_cast<int32_t>(row + 1));
      before = place;
    }
  });
}

__global__ void __launch_bounds__(kThreads) pack_places_kernel(SparseTiles w, const uint8_t* __restrict__ meta, uint32_t* __restrict__ words) {
  const int64_t blocks = w.spec.K / 4;
  for_each(w.num_place_words(), [&](int64_t i) {
    uint32_t word = 0;
#pragma unroll
    for (int at = 0; at < 8; at++) {
      const int64_t n = w.row_of_word(i) + at / 4 * 8, block = w.k16_of_word(i) * 4 + at % 4;  // of 4 k
      uint32_t places = SparseTiles::kPaddingPlaces;
      if (n < w.spec.N && block < blocks) places = meta[n / w.pattern.v * w.meta_row_bytes() + block / 2] >> block % 2 * 4 & 15;
      word |= places << (4 * at);
    }
    words[i] = word;
  });
}

__global__ void __launch_bounds__(kThreads) unpack_places_kernel(SparseTiles w, const uint32_t* __restrict__ words, uint8_t* __restrict__ meta) {
  const int64_t row_bytes = w.meta_row_bytes();
  for_each(w.meta_rows() * row_bytes, [&](int64_t i) {
    const int64_t n = i / row_bytes * w.pattern.v, block = i % row_bytes * 2;
    const uint32_t word = words[w.place_word(n, block / 4)] >> (SparseTiles::place_shift(n) + static_cast<int>(block % 4) * 4);
    meta[i] = static_cast<uint8_t>(word & (block + 1 < w.spec.K / 4 ? 255 : 15));
  });
}

// Kept numbers of 16 bits, a pair that stands together in a register of the tiles: rows of `kept` numbers to MmaTiles and back.
__global__ void __launch_bounds__(kThreads) pack_numbers_kernel(MmaTiles tiles, const uint16_t* __restrict__ codes, uint8_t* __restrict__ packed) {
  const int64_t kept = tiles.spec.K, pairs = tiles.num_tiles_k() * (MmaTiles::kTileK / 2);
  for_each(tiles.num_tiles_n() * MmaTiles::kTileN * pairs, [&](int64_t i) {
    const int64_t n = i / pairs, k = i % pairs * 2;
    uint32_t word = 0;
    if (n < tiles.spec.N && k < kept) word = codes[n * kept + k];
    if (n < tiles.spec.N && k + 1 < kept) word |= uint32_t{codes[n * kept + k + 1]} << 16;
    *reinterpret_cast<uint32_t*>(packed + tiles.code_offset(n, k)) = word;
  });
}

__global__ void __launch_bounds__(kThreads) unpack_numbers_kernel(MmaTiles tiles, const uint8_t* __restrict__ packed, uint16_t* __restrict__ codes) {
  const int64_t kept = tiles.spec.K;
  for_each(tiles.spec.N * kept, [&](int64_t i) { codes[i] = *reinterpret_cast<const uint16_t*>(packed + tiles.code_offset(i / kept, i % kept)); });
}

// Of patterns that are not 2:4: bytes from one place to another, then zeros up to target_bytes.
__global__ void __launch_bounds__(kThreads) copy_kernel(uint8_t* __restrict__ target, const uint8_t* __restrict__ source, int64_t bytes, int64_t target_bytes) {
  for_each(target_bytes, [&](int64_t i) { target[i] = i < bytes ? source[i] : uint8_t{0}; });
}

void copy_parts(const Params& p, const SparseTiles& w, bool pack, void* stream) {
  struct Part {
    void* canonical;
    int64_t begin, bytes, end;
  };
  const Part parts[] = {{p.codes, 0, w.spec.N * w.kept_row_bytes(), w.scales_begin()},
                        {p.scales, w.scales_begin(), w.spec.N * w.spec.num_groups() * 2, w.places_begin()},
                        {p.meta, w.places_begin(), w.meta_rows() * w.meta_row_bytes(), w.total_bytes()}};
  for (const Part& part : parts) {
    if (part.bytes == 0) continue;  // of 16-bit numbers there are no scales
    auto *canonical = static_cast<uint8_t*>(part.canonical), *packed = p.packed + part.begin;
    const int64_t bytes = pack ? part.end - part.begin : part.bytes;
    launch("pack_sparse copy", copy_kernel, grid_for(bytes), dim3(kThreads), 0, stream, pack ? packed : canonical, pack ? canonical : packed, part.bytes,
           bytes);
  }
}

// The number a code stands for.
template <Format kFormat>
TAUT_DEVICE float number_of(uint32_t code) {
  if constexpr (kFormat == Format::kInt4) return static_cast<float>(static_cast<int>(code) - 8);
  else if constexpr (kFormat == Format::kInt8) return static_cast<float>(static_cast<int8_t>(code));
  else if constexpr (is_16bit(kFormat)) return from_16bit<kFormat>(code);
  else return from_e4m3(code);
}

// The kept number j of row n, times its scale.
template <Format kFormat, bool kTiled>
TAUT_DEVICE float load_kept(const SparseTiles& w, int64_t row_bytes, const uint8_t* packed, int64_t n, int64_t j, float scale) {
  uint32_t code;
  if constexpr (is_16bit(kFormat)) {
    const int64_t at = kTiled ? w.kept_tiles().code_offset(n, j) : n * row_bytes + j * 2;
    return number_of<kFormat>(*reinterpret_cast<const uint16_t*>(packed + at));
  }
  if constexpr (kTiled) code = packed[w.kept_tiles().code_offset(n, j)] >> w.kept_tiles().code_shift(n, j);
  else if constexpr (kFormat == Format::kInt4) code = packed[n * row_bytes + j / 2] >> j % 2 * 4;
  else code = packed[n * row_bytes + j];
  return __fmul_rn(number_of<kFormat>(code & (kFormat == Format::kInt4 ? 15 : 255)), scale);
}

// 8 neighbours of a row of out, of which `valid` exist.
template <class T>
TAUT_DEVICE void store_8(T* out, const float (&values)[8], int64_t valid) {
  if (valid >= 8 && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    constexpr int kPerVector = 16 / sizeof(T);
#pragma unroll
    for (int v = 0; v < 8 / kPerVector; v++) {
      T numbers[kPerVector];
#pragma unroll
      for (int i = 0; i < kPerVector; i++) numbers[i] = from_float<T>(values[v * kPerVector + i]);
      uint4 bits;
      memcpy(&bits, numbers, 16);
      ptx::st_global_16(reinterpret_cast<uint4*>(out) + v, bits);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; i++)
      if (i < valid) out[i] = from_float<T>(values[i]);
  }
}

// What would be a division for every thread, counted once on the host.
struct ExpandShape {
  SparseTiles w;
  int64_t scales_begin, places_begin, kept, row_bytes, meta_row_bytes;
  uint32_t groups;                // as they are stored
  int group_shift, shared_shift;  // log2 of the group's size, and of v

  explicit ExpandShape(const SparseTiles& w) : w(w) {
    scales_begin = w.is_tiled() ? w.kept_tiles().scales_begin() : w.scales_begin();
    places_begin = w.places_begin(), kept = w.kept(), row_bytes = w.kept_row_bytes(), meta_row_bytes = w.meta_row_bytes();
    groups = static_cast<uint32_t>(w.is_tiled() ? w.kept_tiles().num_groups() : w.spec.num_groups());
    group_shift = w.spec.group_size == 0 ? 31 : w.spec.group_size == 32 ? 5 : w.spec.group_size == 64 ? 6 : 7;
    shared_shift = w.pattern.v == 16 ? 4 : w.pattern.v == 8 ? 3 : 0;
  }
};

// kKept: numbers kept of 8 dense k, 4 or 2. A row of blocks makes rows of out, a thread 8 neighbours at a time. WHY 4 blocks: without a
// number nvcc spills a few registers of one instance to fit more.
template <Format kFormat, bool kTiled, int kKept, class T>
__global__ void __launch_bounds__(kThreads, 4) expand_kernel(ExpandShape shape, const uint8_t* __restrict__ packed, int64_t row_begin, int64_t row_end,
                                                             T* __restrict__ out /* [row_end - row_begin, K] */) {
  // WHY the pattern again: of one that the compiler knows, it makes no divisions, which are function calls (and spills, on sm_120).
  const SparseTiles w = kTiled ? SparseTiles{shape.w.spec, {2, 4, 1}} : shape.w;
  const int per_row = static_cast<int>((w.spec.K + 7) / 8);
  for (int64_t n = row_begin + blockIdx.y; n < row_end; n += gridDim.y)
    for (int block = blockIdx.x * kThreads + threadIdx.x; block < per_row; block += gridDim.x * kThreads) {
      const int k = block * 8, first = block * kKept;
      const uint32_t group = static_cast<uint32_t>(k) >> shape.group_shift;
      const int64_t scale_at =
          kTiled ? (n / MmaTiles::kTileN * shape.groups + group) * MmaTiles::kTileN + n % 8 * 8 + n % MmaTiles::kTileN / 8 : n * shape.groups + group;
      float scale = 1.0f;
      if constexpr (!is_16bit(kFormat)) scale = __half2float(reinterpret_cast<const __half*>(packed + shape.scales_begin)[scale_at]);
      const uint8_t* places = packed + shape.places_begin;
      uint32_t pairs = 0;  // kTiled: the places of two blocks of 4, 2 bits each
      if constexpr (kTiled) pairs = reinterpret_cast<const uint32_t*>(places)[w.place_word(n, k / 16)] >> (SparseTiles::place_shift(n) + k % 16);
      else places += (n >> shape.shared_shift) * shape.meta_row_bytes;
      float values[8] = {};
#pragma unroll
      for (int j = 0; j < kKept; j++) {
        if ((kTiled || kKept == 2) && first + j >= shape.kept) break;  // 4:8 keeps 4 of every 8 to the end
        int at;                                                        // within the 8
        if constexpr (kTiled) {
          at = j / 2 * 4 + static_cast<int>(pairs >> 2 * j & 3);
        } else {
          const int bits = w.pattern.m == 4 ? 2 : 3;
          at = bits_at(places, int64_t{first + j} * bits, bits);
          if (w.pattern.m == 4) at += j * 4;  // 1:4
        }
        const float value = load_kept<kFormat, kTiled>(w, shape.row_bytes, packed, n, first + j, scale);
#pragma unroll
        for (int e = 0; e < 8; e++)
          if (e == at) values[e] = value;
      }
      store_8(out + (n - row_begin) * w.spec.K + k, values, w.spec.K - k);
    }
}

// The kept numbers of a 2:4 weight, as pack_weight packs them.
pack_weight::Params kept_params(const Params& p, const SparseTiles& w) { return {w.kept_spec(), Layout::kMmaTiles, p.codes, p.scales, nullptr, p.packed, 0}; }

}  // namespace

void check_places(const Params& p, int32_t* descents, void* stream) {
  const SparseTiles w{p.weight.spec, p.weight.pattern};
  launch("pack_sparse check_places", check_places_kernel, grid_for(w.meta_rows() * (w.spec.K / w.pattern.m)), dim3(kThreads), 0, stream, w, p.meta, descents);
}

void pack(const Params& p, void* stream) {
  const SparseTiles w{p.weight.spec, p.weight.pattern};
  if (w.spec.N == 0) return;
  if (!w.is_tiled()) return copy_parts(p, w, true, stream);
  if (is_16bit(w.spec.format)) {
    const MmaTiles tiles = w.kept_tiles();
    launch("pack_sparse numbers", pack_numbers_kernel, grid_for(tiles.codes_bytes() / 4), dim3(kThreads), 0, stream, tiles,
           reinterpret_cast<const uint16_t*>(p.codes), p.packed);
  } else {
    pack_weight::cuda_sm75::pack(kept_params(p, w), stream);
  }
  launch("pack_sparse places", pack_places_kernel, grid_for(w.num_place_words()), dim3(kThreads), 0, stream, w, p.meta,
         reinterpret_cast<uint32_t*>(p.packed + w.places_begin()));
}

void unpack(const Params& p, void* stream) {
  const SparseTiles w{p.weight.spec, p.weight.pattern};
  if (w.spec.N == 0) return;
  if (!w.is_tiled()) return copy_parts(p, w, false, stream);
  if (is_16bit(w.spec.format)) {
    launch("unpack_sparse numbers", unpack_numbers_kernel, grid_for(w.spec.N * w.kept()), dim3(kThreads), 0, stream, w.kept_tiles(), p.packed,
           reinterpret_cast<uint16_t*>(p.codes));
  } else {
    pack_weight::cuda_sm75::unpack(kept_params(p, w), stream);
  }
  launch("unpack_sparse places", unpack_places_kernel, grid_for(w.meta_rows() * w.meta_row_bytes()), dim3(kThreads), 0, stream, w,
         reinterpret_cast<const uint32_t*>(p.packed + w.places_begin()), p.meta);
}

void dequantize(const SparseTiles& w, const uint8_t* packed, int64_t row_begin, int64_t row_end, void* out, DType dtype, void* stream) {
  if (row_begin == row_end) return;
  with_dtype(dtype, [&]<class T>(T) {
    const auto run = [&]<Format kFormat>() {
      const auto kernel = w.is_tiled()                     ? expand_kernel<kFormat, true, 4, T>
                          : w.pattern.n * 2 == w.pattern.m ? expand_kernel<kFormat, false, 4, T>
                                                           : expand_kernel<kFormat, false, 2, T>;
      const dim3 grid(static_cast<unsigned>((w.spec.K + 8 * kThreads - 1) / (8 * kThreads)),
                      static_cast<unsigned>(std::min<int64_t>(row_end - row_begin, 65535)));
      launch("sparse dequantize", kernel, grid, dim3(kThreads), 0, stream, ExpandShape(w), packed, row_begin, row_end, static_cast<T*>(out));
    };
    if (w.spec.format == Format::kInt4) run.template operator()<Format::kInt4>();
    else if (w.spec.format == Format::kInt8) run.template operator()<Format::kInt8>();
    else if (w.spec.format == Format::kFp16) run.template operator()<Format::kFp16>();
    else if (w.spec.format == Format::kBf16) run.template operator()<Format::kBf16>();
    else run.template operator()<Format::kFp8E4M3>();
  });
}

}  // namespace taut::pack_sparse::cuda_sm75
