"""The time taut's CUDA kernels should take, from counted work and a device's datasheet: ``python -m bench.model [--device NAME]``.

For each device, layer, number of rows M and format: the fewest bytes and operations, the two times no kernel can beat, and the time
that the kernel's own structure adds up to: tiles that pad M and fill waves of multiprocessors, x and w read again through the L2
cache, instructions that turn codes into numbers, launches, partial sums. Beside it a dense bf16 product, modelled the same way.

A prediction is there to be compared with a measurement (``python -m bench.gpu --compare``): where they differ, either the kernel or
the model is wrong, and both are worth knowing. Three kinds of numbers go in, and only the first is sure:

* datasheet: memory bandwidth, dense tensor rates, multiprocessors, clock, L2 size
* counted: bytes of a layout, operations, instructions a weight (from the kernels' inner loops)
* assumed, here and nowhere else: ``REACH``, ``OVERLAP``, ``LAUNCH_US`` and so on below, and in ``Gpu`` what no datasheet says

It needs neither a GPU nor taut's libraries.
"""

from __future__ import annotations

import argparse
import json
import math
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
class Kernel:
    """The structure of one kernel, as far as its time depends on it."""

    name: str
    tiles: tuple[tuple[int, int], ...]  # (columns of out, rows of out) that a block computes; the best one for a case is taken
    unit: str  # of the tensor cores: 16, int8, fp8
    instructions: dict[str, float]  # for a weight, each time a block turns its code into a number; by weight format
    splits_k: bool  # several blocks may share the k of a tile
    in_flight_bytes: int = 32 * 1024  # of w that a multiprocessor has asked for at a time
    warp_columns: int = 64  # columns of out that a warp multiplies with the fragments of x that it loads
    scales_sums: bool = True  # a group's scale multiplies the fp32 sums of the group; else the numbers of w
    rounds_x: bool = False  # x is rounded to 8 bits by a kernel of its own
    wgmma: bool = False
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


# Instructions a weight, counted in the inner loops: a word of 8 int4 codes takes 3 shifts, 4 lop3 and 4 hsub2 to become 4 registers
# of 16-bit numbers; a word of 4 int8 codes 2 lop3 (or prmt), a xor and 2 hsub2 in fp16; fp8 a prmt, 2 lop3, a shift and an hmul2 a pair.
# A kernel that multiplies by the scale there needs 4 hmul2 a word more (bf16 with the scale's fp16 bits: by way of fp32, 2.5 a weight).
_CONVERT = {"int4": 11 / 8, "int8": 7 / 4, "fp8": 10 / 4}
_CONVERT_SCALED = {"int4": 11 / 8 + 2.0, "int8": 7 / 4 + 2.0, "fp8": 10 / 4 + 2.0}

_ROWS = (8, 16, 32, 64, 128)


def _tiles(columns: Sequence[int], rows: Sequence[int] = _ROWS) -> tuple[tuple[int, int], ...]:
    return tuple((n, m) for n in columns for m in rows)


_WGMMA = Kernel(
    "cuda_sm90a.wgmma", _tiles((128,), (64, 128, 256)), "16", _CONVERT_SCALED, False, scales_sums=False, wgmma=True, sms=(90, 90)
)
KERNELS = (
    _WGMMA,
    Kernel("cuda_sm89.fp8", _tiles((64, 128)), "fp8", {"fp8": 0.0}, True, rounds_x=True, sms=(89, 999)),
    Kernel("cuda_sm80.int8", _tiles((64, 128)), "int8", {"int8": 0.0}, True, rounds_x=True, sms=(80, 999)),
    Kernel("cuda_sm80.mma", _tiles((64, 128, 256)), "16", _CONVERT, True, sms=(80, 999)),
    Kernel("cuda_sm75.mma", _tiles((64, 128, 256), _ROWS[:-1]), "16", _CONVERT, True),
)
EXPANDED = "cuda_sm75.dense"  # w is turned into 16-bit numbers in memory, and the library's dense product does the rest
DENSE = "cublas"
DENSE_TILES = ((64, 8), (64, 32), (64, 64), (128, 64), (128, 128), (128, 256), (256, 128))


@dataclass(frozen=True)
class Prediction:
    """Times in microseconds of one call. ``bound_us``: what no kernel can beat at the datasheet's rates."""

    device: str
    case: str
    format: str
    impl: str
    tile: tuple[int, int]
    splits: int
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
            tensor_us = padded / (gpu.tflops_16 * gpu.dense_share * 1e6) * _uneven(gpu, blocks_n * blocks_m * splits)
            parts = {"memory": memory_us, "l2": l2_us, "tensor": tensor_us}
            limit = max(parts, key=parts.__getitem__)
            fixed = LAUNCH_US + FILL_US
            tries.append(
                Prediction(
                    gpu.name, f"N{n}_K{k}_M{m}", "bf16", DENSE, tile, splits, nbytes, operations, least, memory_us, l2_us, tensor_us, 0.0,
                    fixed, fixed + parts[limit], limit,
                )
            )  # fmt: skip
    return min(tries, key=lambda each: each.us)


def _uneven(gpu: Gpu, blocks: int) -> float:
    """By how much waves of blocks are longer than the work: the last takes as long as a full one, and who has no block does nothing."""
    return -(-blocks // gpu.sm_count) * gpu.sm_count / blocks


def predict_kernel(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int, format: str) -> Prediction:
    """One kernel, with the tile and the split of k that suit the case best."""
    tries = ((tile, splits) for tile in kernel.tiles for splits in (_splits(k) if kernel.splits_k else (1,)))
    return min((_with_tile(gpu, kernel, m, n, k, format, *each) for each in tries), key=lambda each: each.us)


def _splits(k: int) -> tuple[int, ...]:
    return tuple(splits for splits in (1, 2, 4, 8, 16) if splits == 1 or k // splits >= 512)


def _with_tile(gpu: Gpu, kernel: Kernel, m: int, n: int, k: int, name: str, tile: tuple[int, int], splits: int) -> Prediction:
    format = Format.parse(name)
    weight_bytes = format.packed_bytes(n, k)
    nbytes, operations = work(m, n, k, weight_bytes)
    least = bound_us(gpu, nbytes, operations, kernel.unit)
    blocks_n, blocks_m = -(-n // tile[0]), -(-m // tile[1])
    blocks = blocks_n * blocks_m * splits
    uneven = _uneven(gpu, blocks)
    x_bytes = m * k * (1 if kernel.rounds_x else 2)
    # Blocks that share columns of w run one after the other; where the x between them fills the cache, w comes from memory again.
    passes = max(1.0, min(blocks_m, x_bytes / (CACHE_SHARE * gpu.l2_mib * 2**20)))
    asked_for = min(blocks, gpu.sm_count) * kernel.in_flight_bytes / (LATENCY_US * 1e3)
    memory_us = (weight_bytes * passes + nbytes - weight_bytes) / (min(gpu.hbm_gb_s * REACH, asked_for) * 1e3)
    partial_bytes = 2 * 4 * splits * m * n if splits > 1 else 0  # fp32, written and read again
    l2_us = (x_bytes * blocks_n + weight_bytes * blocks_m + 2 * m * n + partial_bytes) / (gpu.l2_gb_s * 1e3)
    share = gpu.dense_share * (1.0 if kernel.wgmma else gpu.mma_share)
    padded = 2 * blocks_n * tile[0] * blocks_m * tile[1] * k
    tensor_us = padded / (_tensor_rate(gpu, kernel.unit) * share * 1e6) * uneven
    issue_us = _instructions(kernel, format, tile, blocks_n, blocks_m, k) * uneven / (ISSUE_PER_CLOCK * gpu.sm_count * gpu.ghz * 1e3)
    parts = {"memory": memory_us, "l2": l2_us, "tensor": tensor_us, "issue": issue_us}
    limit = max(parts, key=parts.__getitem__)
    fixed = LAUNCH_US + FILL_US
    if splits > 1:  # a second launch adds the partial sums up
        fixed += LAUNCH_US + FILL_US / 2
    if kernel.rounds_x:  # and one before rounds x
        fixed += LAUNCH_US + FILL_US
    us = fixed + parts[limit] + OVERLAP * (sum(parts.values()) - parts[limit])
    return Prediction(
        gpu.name, f"N{n}_K{k}_M{m}", name, kernel.name, tile, splits, nbytes, operations, least, memory_us, l2_us, tensor_us, issue_us,
        fixed, us, limit,
    )  # fmt: skip


def _instructions(kernel: Kernel, format: Format, tile: tuple[int, int], blocks_n: int, blocks_m: int, k: int) -> float:
    """Instructions of warps that a call issues in its inner loops."""
    columns, rows = blocks_n * tile[0], blocks_m * tile[1]
    convert = kernel.instructions[format.weights] * columns * k * blocks_m / 32
    if kernel.wgmma:
        return convert  # its matrix instructions and copies of x are a few for thousands of these
    depth = 16 if kernel.unit == "16" else 32
    multiply = (columns / 16) * (rows / 8) * (k / depth)
    load_x = (
        (columns / kernel.warp_columns) * (rows / 16) * (k / depth) if rows >= 16 else (columns / kernel.warp_columns) * (k / (2 * depth))
    )
    load_w = (
        columns * k * blocks_m * (0.5 if format.weights == "int4" else 1) / 512 * 2
    )  # 16 bytes a lane, into shared memory and out of it
    groups = math.ceil(k / format.group) if format.group and kernel.scales_sums else 1
    scale = 2 * columns * rows / 32 * groups  # a multiply-add, and a zero for the next group's sum
    return convert + multiply + load_x + load_w + scale


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
        row = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(each).items() if key != "device"}
        lines.append(json.dumps({**row, "bound_share": round(each.bound_share, 3), "ratio": round(each.ratio or 0.0, 3)}))
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
                f"{'dense us':>9} {'x dense':>7}  impl, tile, splits"
            )
        lines.append(
            f"{m:>6} {each.bound_us:>9.1f} {each.us:>9.1f} {each.bound_share:>8.0%} {each.nbytes / each.us / 1e3:>6.0f} "
            f"{each.operations / each.us / 1e6:>8.1f} {each.limit:>7} {each.dense_us or 0:>9.1f} {each.ratio or 0:>7.2f}  "
            f"{each.impl} {each.tile[0]}x{each.tile[1]}" + (f" /{each.splits}" if each.splits > 1 else "")
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
