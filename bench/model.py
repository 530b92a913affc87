"""The time taut's CUDA kernels should take, from counted work and a device's datasheet: ``python -m bench.model [--device NAME]``.

For each device, layer, number of rows M and format: the fewest bytes and operations, the two times no kernel can beat, and the time
that the kernel's own structure adds up to: tiles that pad M and fill waves of multiprocessors, x and w read again through the L2
cache, instructions that turn codes into numbers, launches, partial sums. Beside it a dense bf16 product, modelled the same way.

A prediction is there to be compared with a measurement (bench/gpu.py shows one over the other): where they differ, either the kernel
or the model is wrong, and both are worth knowing. Three kinds of numbers go in, and only the first is sure:

* datasheet: memory bandwidth, dense tensor rates, multiprocessors, clock, L2 size
* counted: bytes of a layout, operations, instructions a weight (from the kernels' inner loops)
* assumed, here and nowhere else: ``REACH``, ``OVERLAP``, ``LAUNCH_US`` and so on below, and in ``Gpu`` what no datasheet says

It needs neither a GPU nor taut's libraries.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

REACH = 0.90  # of the datasheet's memory bandwidth: what a long copy gets
OVERLAP = 0.15  # of the shorter ones among memory, L2, tensor and issue time that is not hidden behind the longest
LAUNCH_US = 1.5  # from the end of one kernel to the start of the next, both in one CUDA graph
FILL_US = 1.0  # the first bytes' way from memory, and the last sums' way out
ISSUE_PER_CLOCK = 4  # instructions of warps a multiprocessor starts in a clock
CACHE_SHARE = 0.5  # of the L2 cache that x may take before w is read from memory again
LATENCY_US = 0.8  # of memory under load: bandwidth needs this long's worth of bytes under way


@dataclass(frozen=True)
class Gpu:
    """One device: rates in 10^9 bytes and 10^12 operations a second, dense, with fp32 (integers: int32) sums."""

    name: str
    sm: int
    sm_count: int
    ghz: float  # boost
    hbm_gb_s: float
    l2_mib: float
    tflops_16: float  # fp16 and bf16 (sm_75 has fp16 only)
    tops_int8: float
    tflops_fp8: float  # 0: none
    l2_gb_s: float  # assumed
    dense_share: float  # assumed: of tflops_16 that a large dense product reaches, under the power limit
    mma_share: float  # assumed: of the same that mma.sync can reach; 1 where it is the native instruction


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 90, 132, 1.83, 4800, 50, 989.4, 1978.9, 1978.9, 7000, 0.80, 0.65),
        Gpu("H100", 90, 132, 1.83, 3350, 50, 989.4, 1978.9, 1978.9, 7000, 0.75, 0.65),
        Gpu("A100", 80, 108, 1.41, 2039, 40, 312.0, 624.0, 0, 4500, 0.85, 1.0),
        Gpu("L4", 89, 58, 2.04, 300, 48, 121.0, 242.0, 242.0, 1800, 0.70, 1.0),
        Gpu("RTX 3090", 86, 82, 1.695, 936, 6, 71.0, 284.0, 0, 2500, 0.92, 1.0),
        Gpu("RTX 4090", 89, 128, 2.52, 1008, 72, 165.2, 660.6, 330.3, 5000, 0.95, 1.0),
        Gpu("RTX 2080 Ti", 75, 68, 1.545, 616, 5.5, 53.8, 215.2, 0, 1800, 0.90, 1.0),
        Gpu("T4", 75, 40, 1.59, 320, 4, 65.0, 130.0, 0, 1200, 0.60, 1.0),
        Gpu("RTX 5090", 120, 170, 2.407, 1792, 96, 209.5, 838.0, 419.0, 7000, 0.92, 1.0),
        Gpu("B200", 100, 148, 1.85, 8000, 126, 2250.0, 4500.0, 4500.0, 10000, 0.75, 0.25),
    )
}  # fmt: skip

SHAPES = {
    (6144, 4096): "Llama 8B qkv",
    (4096, 4096): "Llama 8B o",
    (28672, 4096): "Llama 8B gate+up",
    (4096, 14336): "Llama 8B down",
    (10240, 8192): "Llama 70B qkv",
    (8192, 8192): "Llama 70B o",
    (57344, 8192): "Llama 70B gate+up",
    (8192, 28672): "Llama 70B down",
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
FORMATS = ("int4_g128_bf16", "int4_g32_bf16", "int8_row_bf16", "fp8_row_bf16", "int8_row_a8row", "fp8_row_f8row")


@dataclass(frozen=True)
class Format:
    """A format by its name in benchmarks: weights, group, zeros, activations."""

    weights: str  # int4, int8, fp8
    group: int  # 0: one scale a row
    zeros: bool
    activations: str  # bf16, f16: x as it is; a8row, f8row: x rounded to 8 bits, one scale a row

    @classmethod
    def parse(cls, name: str) -> Format:
        match = re.fullmatch(r"(int4|int8|fp8)_(?:g(32|64|128)|row)(_z)?_(bf16|f16|a8row|f8row)", name)
        if not match:
            raise ValueError(f"unknown format {name!r}; known for example: {', '.join(FORMATS)}")
        weights, group, zeros, activations = match.groups()
        return cls(weights, int(group or 0), zeros is not None, activations)

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of a weight in the MmaTiles layout (csrc/common/formats.h): N and K padded to 64, scales of whole groups."""
        tiles_n, padded_k = -(-n // 64), -(-k // 64) * 64
        groups = -(-padded_k // self.group) if self.group else 1
        codes = tiles_n * 64 * padded_k // (2 if self.weights == "int4" else 1)
        return codes + tiles_n * 64 * groups * (3 if self.zeros else 2)


@dataclass(frozen=True)
class Tile:
    """What a block computes at a time: ``columns`` x ``rows`` of out, ``depth`` of k in a step of its pipeline."""

    columns: int
    rows: int
    depth: int
    warp: tuple[int, int]  # columns and rows of out that one warp (wgmma: one of four of a warpgroup) computes
    stages: int
    per_sm: int  # blocks that a multiprocessor holds

    @property
    def warps(self) -> float:
        return self.columns / self.warp[0] * self.rows / self.warp[1] * self.depth / 64


@dataclass(frozen=True)
class Kernel:
    """The structure of one kernel, as far as its time depends on it."""

    name: str
    source: str  # where it is, and where the numbers below are from
    unit: str  # of the tensor cores: 16, int8, fp8
    tiles: tuple[Tile, ...]
    cuts: str  # how k is shared by blocks: stream (equal stretches of all steps), split (few blocks: k in parts)
    wgmma: bool = False  # multiplies by itself what mma.sync does warp by warp, and is fed by a copy engine
    scales_weights: bool = False  # the scale of a group multiplies w; else the sums, every 64 k or every group of 32
    rounds_x: bool = False  # x is rounded to 8 bits by a kernel of its own
    sms: tuple[int, int] = (75, 999)  # from, to

    def refuses(self, gpu: Gpu, format: Format) -> str | None:
        """Why it cannot run, or None."""
        if not self.sms[0] <= gpu.sm <= self.sms[1]:
            return f"needs sm_{self.sms[0]}" + ("" if self.sms[1] == 999 else f" to sm_{self.sms[1]}")
        if (format.activations == "a8row") != (self.unit == "int8") or (format.activations == "f8row") != (self.unit == "fp8"):
            return f"computes with {self.unit} activations"
        if self.unit in ("int8", "fp8") and format.weights != self.unit:
            return f"computes with {self.unit} weights"
        if gpu.sm < 80 and format.activations == "bf16":
            return "has no bf16"
        return None


# Instructions that turn a weight into a number, counted in csrc/common/dequant.cuh. A word of 8 int4 takes 4 lop3, 4 hsub2 or hfma2
# and one shift in fp16, three in bf16; a word of 4 int8 takes a xor, 2 prmt and 2 hsub2 in fp16, a shift, 4 lop3 and 2 hsub2 in bf16; of
# 4 fp8, 3 shifts, 2 ands and 2 lop3, and in bf16 2 hmul2 more.
CONVERT = {
    ("int4", "f16"): 9 / 8, ("int8", "f16"): 5 / 4, ("fp8", "f16"): 7 / 4,
    ("int4", "bf16"): 11 / 8, ("int8", "bf16"): 7 / 4, ("fp8", "bf16"): 9 / 4,
}  # fmt: skip
# Where the scale multiplies w: one hmul2 a pair in fp16; in bf16 an hmul2 and an hfma2, since an fp16 scale is the sum of two bf16.
SCALE = {"f16": 1 / 2, "bf16": 1.0}

_MMA_TILES = (
    Tile(64, 8, 256, (64, 8), 4, 3), Tile(128, 16, 128, (64, 16), 4, 2), Tile(128, 32, 64, (32, 32), 4, 3),
    Tile(128, 64, 64, (32, 32), 3, 1), Tile(128, 128, 64, (32, 64), 3, 1),
)  # fmt: skip
_MMA75_TILES = (
    Tile(64, 8, 256, (64, 8), 2, 3), Tile(128, 16, 128, (64, 16), 2, 2), Tile(128, 32, 64, (32, 32), 2, 2),
    Tile(128, 64, 64, (32, 32), 2, 1),
)  # fmt: skip
_MMA8_TILES = (
    Tile(32, 8, 256, (32, 8), 4, 4), Tile(32, 16, 256, (32, 16), 4, 4), Tile(64, 32, 256, (64, 32), 3, 2),
    Tile(64, 64, 128, (64, 32), 4, 2), Tile(128, 128, 64, (64, 64), 4, 2),
)  # fmt: skip
_WGMMA_STEP_CYCLES = {256: 1140, 128: 620, 64: 390}  # what its host code reckons with when it picks a tile and the parts of k
_WGMMA_TILES = tuple(Tile(128, rows, 64, (16, rows), 5 if rows == 256 else 8, 1) for rows in (256, 128, 64))

KERNELS = (
    Kernel("cuda_sm90a.wgmma", "cuda_sm90a_wgmma.cu", "16", _WGMMA_TILES, "split", wgmma=True, scales_weights=True, sms=(90, 90)),
    Kernel("cuda_sm89.fp8", "cuda_mma8.cuh", "fp8", _MMA8_TILES, "split", rounds_x=True, sms=(89, 999)),
    Kernel("cuda_sm80.int8", "cuda_mma8.cuh", "int8", _MMA8_TILES, "split", rounds_x=True, sms=(80, 999)),
    Kernel("cuda_sm80.mma", "cuda_mma.cuh", "16", _MMA_TILES, "stream", sms=(80, 999)),
    Kernel("cuda_sm75.mma", "cuda_mma.cuh", "16", _MMA75_TILES, "stream", sms=(75, 79)),
)
EXPANDED = "cuda_sm75.dense"  # w is turned into 16-bit numbers in memory, and the library's dense product does the rest
DENSE = "cublas"
DENSE_TILES = ((64, 8), (64, 32), (64, 64), (128, 64), (128, 128), (128, 256), (256, 128))


def _splits(k: int) -> tuple[int, ...]:
    return tuple(splits for splits in (1, 2, 4, 8, 16) if splits == 1 or k // splits >= 512)


@dataclass(frozen=True)
class Prediction:
    """Times in microseconds of one call. ``bound_us``: what no kernel can beat at the datasheet's rates."""

    device: str
    case: str
    format: str
    impl: str
    tile: tuple[int, int]
    blocks: int
    nbytes: int
    operations: int
    bound_us: float
    memory_us: float
    l2_us: float
    tensor_us: float
    issue_us: float
    fixed_us: float
    us: float
    limit: str
    dense_us: float | None = None

    @property
    def bound_share(self) -> float:
        return self.bound_us / self.us

    @property
    def ratio(self) -> float | None:
        """The dense product's time over this one's: above 1, this one is faster."""
        return self.dense_us / self.us if self.dense_us else None


def work(m: int, n: int, k: int, weight_bytes: int) -> tuple[int, int]:
    """Fewest bytes (w, x and out once each, x and out in 16 bits), and operations."""
    return weight_bytes + 2 * m * (n + k), 2 * m * n * k


def bound_us(gpu: Gpu, nbytes: int, operations: int, unit: str) -> float:
    """The least time for them at the rates of the datasheet."""
    return max(nbytes / (gpu.hbm_gb_s * 1e3), operations / (_tensor_rate(gpu, unit) * 1e6))


def _tensor_rate(gpu: Gpu, unit: str) -> float:
    return {"16": gpu.tflops_16, "int8": gpu.tops_int8, "fp8": gpu.tflops_fp8}[unit]


def predict(gpu: Gpu, m: int, n: int, k: int, format: str) -> Prediction:
    """The fastest of taut's kernels that can run the call, beside the dense product. Raises ``ValueError`` where none can."""
    parsed = Format.parse(format)
    able = [kernel for kernel in KERNELS if kernel.refuses(gpu, parsed) is None]
    tries = [predict_kernel(gpu, kernel, m, n, k, format) for kernel in able]
    dense = predict_dense(gpu, m, n, k)
    if any(kernel.unit == "16" for kernel in able):
        tries.append(_expanded(gpu, dense, n, k, format))
    if not tries:
        raise ValueError(
            f"no modelled kernel computes {format} on {gpu.name}: "
            + "; ".join(f"{each.name} {each.refuses(gpu, parsed)}" for each in KERNELS)
        )
    best = min(tries, key=lambda each: each.us)
    return replace(best, dense_us=dense.us)


def predict_impl(gpu: Gpu, impl: str, m: int, n: int, k: int, format: str) -> Prediction | None:
    """One impl by its name in results, the dense product among them; None where the model does not know it, or it cannot run."""
    if impl == DENSE:
        return predict_dense(gpu, m, n, k)
    parsed = Format.parse(format)
    if impl == EXPANDED and parsed.activations in ("bf16", "f16"):
        return _expanded(gpu, predict_dense(gpu, m, n, k), n, k, format)
    kernel = next((each for each in KERNELS if each.name == impl), None)
    return None if kernel is None or kernel.refuses(gpu, parsed) else predict_kernel(gpu, kernel, m, n, k, format)


def _expanded(gpu: Gpu, dense: Prediction, n: int, k: int, name: str) -> Prediction:
    """Two kernels: one reads the codes and writes 16-bit numbers, the other is the dense product."""
    weight_bytes = Format.parse(name).packed_bytes(n, k)
    written_us = (weight_bytes + 2 * n * k) / (gpu.hbm_gb_s * REACH * 1e3)
    nbytes = dense.nbytes - 2 * n * k + weight_bytes
    least = bound_us(gpu, nbytes, dense.operations, "16")
    return replace(
        dense, impl=EXPANDED, format=name, nbytes=nbytes, bound_us=least, memory_us=dense.memory_us + written_us,
        fixed_us=dense.fixed_us + LAUNCH_US + FILL_US, us=dense.us + written_us + LAUNCH_US + FILL_US,
    )  # fmt: skip


def predict_dense(gpu: Gpu, m: int, n: int, k: int) -> Prediction:
    """A dense product of 16-bit numbers: cuBLAS at ``dense_share`` of the tensor rate and ``REACH`` of the bandwidth, with the tile and the
    split of k that suit the case best. Pairs of blocks share what they read. What else it loses is in ``dense_share``."""
    nbytes, operations = work(m, n, k, 2 * n * k)
    least = bound_us(gpu, nbytes, operations, "16")
    memory_us = nbytes / (gpu.hbm_gb_s * REACH * 1e3)
    tries = []
    for tile in DENSE_TILES:
        blocks_n, blocks_m = -(-n // tile[0]), -(-m // tile[1])
        l2_us = 2 * k * (m * blocks_n + n * blocks_m) / 2 / (gpu.l2_gb_s * 1e3)
        for splits in _splits(k):
            padded = 2 * blocks_n * tile[0] * blocks_m * tile[1] * k
            blocks = blocks_n * blocks_m * splits
            # waves of blocks: the last takes as long as a full one, and multiprocessors without a block do nothing
            uneven = -(-blocks // gpu.sm_count) * gpu.sm_count / blocks
            tensor_us = padded / (gpu.tflops_16 * gpu.dense_share * 1e6) * uneven
            parts = {"memory": memory_us, "l2": l2_us, "tensor": tensor_us}
            limit = max(parts, key=parts.__getitem__)
            fixed = LAUNCH_US + FILL_US
            tries.append(
                Prediction(
                    gpu.name, f"N{n}_K{k}_M{m}", "bf16", DENSE, tile, blocks, nbytes, operations, least, memory_us, l2_us, tensor_us, 0.0,
                    fixed, fixed + parts[limit], limit,
                )
            )  # fmt: skip
    return min(tries, key=lambda each: each.us)


def predict_kernel(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int, name: str) -> Prediction:
    """One kernel on one case."""
    format, (tile, splits) = Format.parse(name), _plan(gpu, kernel, m, n, k)
    weight_bytes = format.packed_bytes(n, k)
    nbytes, operations = work(m, n, k, weight_bytes)
    blocks_n, blocks_m = -(-n // tile.columns), -(-m // tile.rows)
    tiles, steps = blocks_n * blocks_m, -(-k // tile.depth)
    if kernel.cuts == "stream":  # equal stretches of at least four steps
        blocks = min(gpu.sm_count * tile.per_sm, max(tiles, -(-tiles * steps // 4)))
        longest, partial_tiles = -(-tiles * steps // blocks), 0 if tiles % blocks == 0 else blocks
    else:
        blocks, longest, partial_tiles = tiles * splits, -(-steps // splits), tiles * splits if splits > 1 else 0
    # Steps of the multiprocessor that has the most of them, over its fair share.
    uneven = -(-blocks // gpu.sm_count) * longest * gpu.sm_count / (tiles * steps)

    x_bytes, weight_size = m * k * (1 if kernel.rounds_x else 2), 0.5 if format.weights == "int4" else 1.0
    # Blocks that share columns of w run one after the other; where the x between them fills the cache, w comes from memory again.
    passes = max(1.0, min(blocks_m, x_bytes / (CACHE_SHARE * gpu.l2_mib * 2**20)))
    held = min(tile.per_sm, -(-blocks // gpu.sm_count)) * (tile.stages - 1) * tile.columns * tile.depth * weight_size
    asked_for = min(blocks, gpu.sm_count) * held / (LATENCY_US * 1e3)
    memory_us = (weight_bytes * passes + nbytes - weight_bytes) / (min(gpu.hbm_gb_s * REACH, asked_for) * 1e3)
    partial_bytes = 2 * 4 * partial_tiles * tile.columns * tile.rows  # fp32, written and read again
    l2_us = (x_bytes * blocks_n + weight_bytes * blocks_m + 2 * m * n + partial_bytes) / (gpu.l2_gb_s * 1e3)
    share = gpu.dense_share * (1.0 if kernel.wgmma else gpu.mma_share)
    padded = 2 * tiles * tile.columns * tile.rows * steps * tile.depth
    tensor_us = padded / (_tensor_rate(gpu, kernel.unit) * share * 1e6) * uneven
    issued = instructions(kernel, format, tile) * tiles * steps
    issue_us = issued * uneven / (ISSUE_PER_CLOCK * gpu.sm_count * gpu.ghz * 1e3)

    parts = {"memory": memory_us, "l2": l2_us, "tensor": tensor_us, "issue": issue_us}
    limit = max(parts, key=parts.__getitem__)
    fixed = LAUNCH_US + FILL_US
    if partial_tiles:  # a second kernel adds the partial sums up; from sm_90 on it is there before the first ends
        fixed += FILL_US / 2 + (0.0 if kernel.unit == "16" and gpu.sm >= 90 else LAUNCH_US)
    if kernel.rounds_x:  # and one before rounds x
        fixed += LAUNCH_US + FILL_US
    us = fixed + parts[limit] + OVERLAP * (sum(parts.values()) - parts[limit])
    return Prediction(
        gpu.name, f"N{n}_K{k}_M{m}", name, kernel.name, (tile.columns, tile.rows), blocks, nbytes, operations,
        bound_us(gpu, nbytes, operations, kernel.unit), memory_us, l2_us, tensor_us, issue_us, fixed, us, limit,
    )  # fmt: skip


def _plan(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int) -> tuple[Tile, int]:
    """The tile, and the number of parts of k, that the kernel's host code picks."""
    if kernel.wgmma:
        return min(_wgmma_plans(gpu, kernel, m, n, k), key=lambda plan: plan[0])[1:]
    tile = next((tile for tile in kernel.tiles if tile.rows >= m), kernel.tiles[-1])
    if kernel.cuts == "stream":
        return tile, 1
    if m > 32:  # the largest tile where it keeps every multiprocessor busy
        few = -(-n // kernel.tiles[-1].columns) * -(-m // kernel.tiles[-1].rows) < gpu.sm_count
        tile = kernel.tiles[-2 if few else -1]
    tiles, steps = -(-n // tile.columns) * -(-m // tile.rows), -(-k // tile.depth)
    return tile, max(1, min(gpu.sm_count // tiles, steps // tile.stages, 16))


def _wgmma_plans(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int) -> Iterator[tuple[float, Tile, int]]:
    """Cycles, tile and parts of k, by the counts in cuda_sm90a_wgmma.cu."""
    steps = -(-k // 64)
    for tile in kernel.tiles:
        tiles = -(-n // tile.columns) * -(-m // tile.rows)
        for splits in range(1, 9):
            partial_bytes = splits * tiles * tile.columns * tile.rows * 4 if splits > 1 else 0
            if splits > 1 and (steps < 4 * splits or partial_bytes > 64 << 20):
                break
            cycles = -(-tiles * splits // gpu.sm_count) * (-(-steps // splits) * _WGMMA_STEP_CYCLES[tile.rows] + 2500)
            yield cycles + (3000 + 2 * partial_bytes // (gpu.sm_count * 16) if splits > 1 else 0), tile, splits


def instructions(kernel: Kernel, format: Format, tile: Tile) -> float:
    """Instructions that the warps of a block issue in one step of its pipeline."""
    columns, rows = tile.warp
    strips, tokens = columns / 16, rows / 8
    pieces = 1 if format.weights == "int4" else 2  # of 16 bytes a lane, of a strip of 64 k
    groups = 2 if format.group == 32 else 1  # that 64 k meet
    dtype = format.activations if kernel.unit == "16" else ""
    convert = CONVERT[format.weights, dtype] * columns * 64 / 32 if dtype else 0.0
    if kernel.wgmma:
        scale = SCALE[dtype] * columns * 64 / 32 if format.group else 0.0
        # 4 warpgroup instructions with their fences, the barriers, the codes and scales out of shared memory; 8 warps
        return tile.columns / columns * (convert + scale + 4 * 3 + 8 + pieces + 10 * groups)
    # codes, scales and x out of shared memory; x anew for each pair of strips where it does not stay in registers
    load = strips * (pieces + 4 * groups) + 2 * tokens * (1 if rows <= 16 else max(1.0, strips / 2))
    multiply = strips * tokens * (4 if kernel.unit == "16" else 2)
    promote = strips * tokens * 4 * groups if kernel.unit == "16" else strips * tokens * 8 * groups if format.group else 0.0
    copied = (tile.rows * tile.depth * (2 if kernel.unit == "16" else 1) + tile.columns * tile.depth * pieces / 2) / (16 * 32)
    return tile.warps * (convert + load + multiply + promote + 12) + 3 * copied


def predictions(
    gpu: Gpu, formats: Sequence[str] = FORMATS, shapes: Sequence[tuple[int, int]] = tuple(SHAPES), rows: Sequence[int] = ROWS
) -> Iterator[Prediction]:
    """Every case that has a kernel on the device. bf16 becomes f16 where there is none."""
    for format in formats:
        name = format.replace("bf16", "f16") if gpu.sm < 80 else format
        for n, k in shapes:
            for m in rows:
                try:
                    yield predict(gpu, m, n, k, name)
                except ValueError:
                    break


def to_json(found: Sequence[Prediction]) -> str:
    """One object: what was assumed, and a line for each prediction."""
    gpu = GPUS[found[0].device]
    assumed = {"reach": REACH, "overlap": OVERLAP, "launch_us": LAUNCH_US, "fill_us": FILL_US, "issue_per_clock": ISSUE_PER_CLOCK}
    lines = []
    for each in found:
        names = ("case", "format", "impl", "limit", "bound_us", "memory_us", "l2_us", "tensor_us", "issue_us", "us", "dense_us", "ratio")
        values = ((name, getattr(each, name)) for name in names)
        lines.append(json.dumps({name: round(value, 2) if isinstance(value, float) else value for name, value in values}))
    head = json.dumps({"device": asdict(gpu), "assumed": assumed, "measured": False})
    return head[:-1] + ', "predictions": [\n ' + ",\n ".join(lines) + "\n]}\n"


def render(found: Sequence[Prediction]) -> str:
    """Fixed-width lines, a block for each format and layer."""
    lines: list[str] = []
    block = None
    for each in found:
        n, k, m = map(int, re.findall(r"\d+", each.case))
        if block != (each.format, n, k):
            block = (each.format, n, k)
            lines.append(f"\n{each.device}, {each.format}, N={n} K={k} ({SHAPES.get((n, k), 'another layer')})")
            lines.append(
                f"{'M':>6} {'bound us':>9} {'predicted':>9} {'of bound':>8} {'GB/s':>6} {'TFLOP/s':>8} {'limit':>7} "
                f"{'dense us':>9} {'x dense':>7}  impl, tile, blocks"
            )
        lines.append(
            f"{m:>6} {each.bound_us:>9.1f} {each.us:>9.1f} {each.bound_share:>8.0%} {each.nbytes / each.us / 1e3:>6.0f} "
            f"{each.operations / each.us / 1e6:>8.1f} {each.limit:>7} {each.dense_us or 0:>9.1f} {each.ratio or 0:>7.2f}  "
            f"{each.impl} {each.tile[0]}x{each.tile[1]}, {each.blocks}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", action="append", choices=list(GPUS), help="default: all")
    parser.add_argument("--format", action="append", help=f"such as {FORMATS[0]} [default: {', '.join(FORMATS)}]")
    parser.add_argument("--m", type=int, action="append", help="rows of x [default: 1 to 8192]")
    parser.add_argument("--shape", action="append", metavar="N,K", help="default: the layers of Llama 8B and 70B")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the predictions of one device there, too")
    args = parser.parse_args(arguments)
    try:
        shapes = [parse_shape(text) for text in args.shape] if args.shape else list(SHAPES)
        if args.m and min(args.m) < 1:
            raise ValueError(f"--m must be at least 1, got {min(args.m)}")
        for name in args.format or ():
            Format.parse(name)
        if args.json and len(args.device or ()) != 1:
            raise ValueError("--json takes one --device")
        for name in args.device or GPUS:
            found = list(predictions(GPUS[name], args.format or FORMATS, shapes, args.m or ROWS))
            if not found:
                raise ValueError(f"no modelled kernel computes this on {name}")
            print(render(found))
            if args.json:
                args.json.write_text(to_json(found))
    except (ValueError, OSError) as error:
        print(f"model: {error}", file=sys.stderr)
        return 2
    return 0


def parse_shape(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)", text)
    if not match:
        raise ValueError(f"--shape {text!r} is not N,K")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
