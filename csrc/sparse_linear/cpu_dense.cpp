// COMPUTES  out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias, as quant_linear does for the same weight with its zeros written out: the same bits
// LAYOUT    w: Sparse8 (common/sparse.h), made Rows8 (common/formats.h) in scratch memory, kRowsAtATime rows at a time
// WORK      strips are made dense in parallel; then the best kernel of quant_linear multiplies by them all; its outputs move to their columns
// BOUND     quant_linear's, plus about a nanosecond for four dense weights of a thread (cpu_avx2.dense: 12 instructions for 32, where 2:4);
//           x is prepared for each kRowsAtATime again, a fifth of the time for many rows. What is left to it: float activations, and AMX
// LIMITS    none: any N, K, M, format, pattern, group, dtype, and any processor
#include <algorithm>
#include <cstring>

#include "sparse_linear/op.h"

namespace taut::sparse_linear::cpu_dense {
namespace {

constexpr int64_t kRowsAtATime = 512;  // 2 MB of int8 at K = 4096

// A strip of Sparse8 as one of Rows8.
void expand_strip(const Sparse8& w, const uint8_t* in, uint8_t* out) {
  const Rows8 dense = w.dense();
  const int64_t per_superblock = dense.blocks_per_superblock(), kept = w.kept_per_block(), vectors = w.chunks() * code_bits(w.spec.format) / 8;
  const bool whole = code_bits(w.spec.format) == 8;
  for (int64_t block = 0; block < dense.num_blocks(); block++) {
    if (block % per_superblock == 0) {
      std::memcpy(out, in, dense.header_bytes());
      in += dense.header_bytes(), out += dense.header_bytes();
    }
    uint8_t codes[8][32];
    std::memset(codes, sparse_zero(w.spec.format), sizeof codes);
    const uint8_t* places = in + w.code_block_bytes();
    for (int64_t j = 0; j < kept; j++) {
      const int64_t chunk = j / 4, first = j / w.pattern.n * w.pattern.m, at = chunk % vectors * 32 + j % 4;
      const int shift = whole ? 0 : static_cast<int>(chunk / vectors * 4), mask = whole ? 255 : 15;
      if (w.pattern.v == 1) {
        const uint8_t* fields = places + chunk * w.field_bits() / 8 * 32 + j % 4;
        const int field_shift = static_cast<int>(chunk * w.field_bits() % 8);
        for (int64_t r = 0; r < 8; r++) codes[r][first + (fields[r * 4] >> field_shift & w.field_mask())] = in[at + r * 4] >> shift & mask;
      } else {
        const int64_t k = first + (places[j / 2] >> j % 2 * 4 & 15) % w.pattern.m;
        for (int64_t r = 0; r < 8; r++) codes[r][k] = in[at + r * 4] >> shift & mask;
      }
    }
    for (int64_t r = 0; r < 8; r++)
      for (int64_t c = 0; c < (whole ? 8 : 4); c++)
        for (int64_t i = 0; i < 4; i++)
          out[c * 32 + r * 4 + i] = static_cast<uint8_t>(whole ? codes[r][c * 4 + i] : codes[r][c * 4 + i] | codes[r][(c + 4) * 4 + i] << 4);
    in += w.block_bytes(), out += dense.block_bytes();
  }
}

}  // namespace

void run_with(const Params& p, ExpandStrip expand) {
  const Sparse8 w = p.sparse();
  const int64_t N = p.weight.N, M = p.M, element = p.dtype == DType::kFloat32 ? 4 : 2, strip_bytes = w.dense().strip_bytes();
  const int64_t rows_at_a_time = std::min(N, kRowsAtATime), dense_bytes = ((rows_at_a_time + 7) / 8 * strip_bytes + 63) / 64 * 64;
  const bool whole = N <= rows_at_a_time;
  uint8_t* dense = scratch(2, dense_bytes + (whole ? 0 : M * rows_at_a_time * element));
  uint8_t* part = dense + dense_bytes;  // [M, rows at a time]
  for (int64_t n = 0; n < N; n += rows_at_a_time) {
    const int64_t rows = std::min(rows_at_a_time, N - n), strips = (rows + 7) / 8, tasks = std::clamp<int64_t>(strips, 1, p.num_threads);
    parallel_tasks(tasks, [&](int64_t task) {
      for (int64_t s = strips * task / tasks; s < strips * (task + 1) / tasks; s++)
        expand(w, p.packed + (n / 8 + s) * w.strip_bytes(), dense + s * strip_bytes);
    });
    const auto copy_rows = [&](const auto& copy) {
      const int64_t copies = std::clamp<int64_t>(M, 1, p.num_threads);
      parallel_tasks(copies, [&](int64_t task) {
        for (int64_t m = M * task / copies; m < M * (task + 1) / copies; m++) copy((m * N + n) * element, part + m * rows * element);
      });
    };
    quant_linear::Params call = p;
    call.packed = dense, call.weight.N = rows, call.pattern = {0, 0, 0};
    if (p.bias) call.bias = static_cast<const uint8_t*>(p.bias) + n * element;
    if (!whole) {
      call.out = part;
      if (p.residual) {
        call.residual = part;
        copy_rows([&](int64_t offset, uint8_t* row) { std::memcpy(row, static_cast<const uint8_t*>(p.residual) + offset, rows * element); });
      }
    }
    quant_linear::choose(call)(call);
    if (!whole) copy_rows([&](int64_t offset, const uint8_t* row) { std::memcpy(static_cast<uint8_t*>(p.out) + offset, row, rows * element); });
  }
}

void run(const Params& p) { run_with(p, expand_strip); }

}  // namespace taut::sparse_linear::cpu_dense
