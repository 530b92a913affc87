"""Named inputs of each op: ``linear_cases`` are a set that covers every pair of settings (row count and format, width and
depth, dtype and format, ...), since the whole product would be a hundred thousand of them.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taut import _native
from taut.formats import ACTIVATIONS, KINDS, Canonical, WeightFormat

# Every format there is; and those that tests of kernels run on: what CUDA takes too in full, of the others enough for every
# kind of scale, of zero point and of group.
ALL_FORMATS = tuple(
    WeightFormat(kind.name, group, zeros)
    for kind in KINDS.values()
    for zeros in ((False, True) if kind.takes_zeros else (False,))
    for group in kind.group_sizes
)
CUDA_FORMATS = tuple(format for format in ALL_FORMATS if format.kind.cuda)
CPU_FORMATS = (
    WeightFormat("ternary", 0),
    WeightFormat("ternary", 32),
    WeightFormat("int2", 32),
    WeightFormat("int2", 128, True),
    WeightFormat("int3", 64),
    WeightFormat("int3", 32, True),
    WeightFormat("int3", 0, True),
    WeightFormat("nf4", 64),
    WeightFormat("nf4", 0),
    WeightFormat("mxfp4"),
    WeightFormat("nvfp4"),
    WeightFormat("fp8_block"),
)
FORMATS = CUDA_FORMATS + CPU_FORMATS
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # csrc/common/dtypes.h
# What each activation mode is multiplied with.
PAIRS = {mode: tuple(format for format in FORMATS if mode in format.kind.activations) for mode in ACTIVATIONS}
INT4, INT4_ZEROS, INT8, FP8 = (
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, True),
    WeightFormat("int8", 0),
    WeightFormat("fp8_e4m3", 128),
)
EACH_FORMAT = (INT4, INT4_ZEROS, INT8, FP8, *(format for format in CPU_FORMATS if format.group_size or format.name == "ternary"))
# (activations, format) for tests of one property: each mode once, and each kind of weight with each mode it takes.
EACH_MODE = (("float", INT4_ZEROS), ("int8", INT4_ZEROS), ("int8_row", INT8), ("fp8_row", FP8), ("int8_outliers", INT4_ZEROS))
EACH_KIND = tuple((mode, format) for mode in ACTIVATIONS for format in EACH_FORMAT if format in PAIRS[mode])


@dataclass(frozen=True)
class LinearCase:
    """One call of quant_linear: ``x [M, K]`` in ``dtype``, ``w [N, K]`` in ``format``, with or without bias."""

    M: int
    N: int
    K: int
    format: WeightFormat
    activations: str = "int8"
    dtype: torch.dtype = torch.float32
    bias: bool = False

    @property
    def name(self) -> str:
        return f"N{self.N}_K{self.K}_M{self.M}"

    def __str__(self) -> str:
        group = f"g{self.format.group_size}" if self.format.group_size else "row"
        format = f"{self.format.name}{group}{'z' if self.format.zeros else ''}"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}-{format}-a{self.activations}-{dtype}{'-bias' if self.bias else ''}"

    @property
    def seed(self) -> int:
        """The same on every machine and in every process, and printed by a failing check."""
        return zlib.crc32(str(self).encode())

    def sizes(self) -> dict[str, int]:
        """What ``taut.explain("quant_linear", ...)`` takes."""
        return {
            "M": self.M, "N": self.N, "K": self.K, "format": self.format.code, "group_size": self.format.group_size,
            "zeros": int(self.format.zeros), "activations": ACTIVATIONS[self.activations],
            "dtype": DTYPE_CODES[self.dtype],
        }  # fmt: skip

    def make(self) -> LinearInputs:
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.M, self.K, generator=generator)
        # a few channels far larger than the rest, as language models have
        x[:, torch.rand(self.K, generator=generator) < 0.02] *= 30
        bias = torch.randn(self.N, generator=generator).to(self.dtype) if self.bias else None
        parts = random_weight(self.N, self.K, self.format, generator)
        return LinearInputs(x.to(self.dtype), pack(*parts, self.K, self.format), bias, *parts)


@dataclass(frozen=True)
class LinearInputs:
    x: Tensor
    packed: Tensor
    bias: Tensor | None
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    global_scale: Tensor | None

    @property
    def canonical(self) -> Canonical:
        return Canonical(self.codes, self.scales, self.zeros, self.global_scale)


def pack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, global_scale: Tensor | None, k: int, format: WeightFormat
) -> Tensor:  # fmt: skip
    """pack_weight past the checks of its Python contract: kernels are tested with every code a byte can hold, -128 too, and
    with scales that are infinite or NaN."""
    device = codes.device.type
    layout = _native.layout_for(device)
    return _native.ops_for(device).pack_weight(codes, scales, zeros, k, format.code, format.group_size, layout, global_scale)


def encode(q: Tensor, format: WeightFormat) -> Tensor:
    """Codes ``q [N, K]`` (bits as they are stored, 0..255) in their canonical form: the definition, in plain torch."""
    if format.name == "ternary":
        digits = torch.nn.functional.pad(q, (0, -q.shape[1] % 5), value=1).unflatten(1, (-1, 5))
        return (digits * torch.tensor([1, 3, 9, 27, 81])).sum(2).to(torch.uint8)
    if format.bits == 8:
        return q.to(torch.uint8).view(format.codes_dtype)
    string = (q[:, :, None] >> torch.arange(format.bits) & 1).flatten(1)
    string = torch.nn.functional.pad(string, (0, -string.shape[1] % 8)).unflatten(1, (-1, 8))
    return (string << torch.arange(8)).sum(2).to(torch.uint8)


# About how large a scale makes weights near 1 in size.
_SCALE = {
    "ternary": 1.0,
    "int2": 0.5,
    "int3": 0.25,
    "int4": 0.1,
    "nf4": 1.0,
    "nvfp4": 1.0,
    "int8": 0.01,
    "fp8_e4m3": 0.005,
    "fp8_block": 0.005,
}


def random_weight(n: int, k: int, format: WeightFormat, generator: torch.Generator) -> Canonical:
    """A canonical weight of uniformly drawn codes, every one of them reachable, and scales of either sign.

    WHY not a quantized random matrix: its extreme codes are rare, and a group's scale never has a sign of its own.
    """
    q = torch.randint(0, 3 if format.name == "ternary" else 2**format.bits, (n, k), generator=generator)
    if format.codes_dtype == torch.float8_e4m3fn:
        q = torch.where(q & 0x7F == 0x7F, q - 1, q)  # a NaN is no weight
    shape, groups = format.scales_shape(n, k), format.num_groups(k)
    if format.name == "mxfp4":
        scales = torch.randint(122, 128, shape, generator=generator).to(torch.uint8)
    else:
        scales = (torch.rand(shape, generator=generator) + 0.5) * _SCALE[format.name]
        scales *= torch.where(torch.rand(shape, generator=generator) < 0.25, -1.0, 1.0)
        scales = scales.to(torch.float8_e4m3fn).view(torch.uint8) if format.name == "nvfp4" else scales.to(format.scales_dtype)
    zeros = torch.randint(0, format.largest_zero + 1, (n, groups), generator=generator).to(torch.uint8) if format.zeros else None
    global_scale = torch.rand(1, generator=generator) + 0.1 if format.has_global_scale else None
    return Canonical(encode(q, format), scales, zeros, global_scale)


ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 20, 21, 33, 70)
WIDTHS = (1, 7, 17, 100)
DEPTHS = (1, 31, 33, 75, 576, 1536, 10944)
MAX_PRODUCTS = 6_000_000  # M * N * K of one case: the scalar impl takes 50 ms for it
EMULATED_PRODUCTS = {"fast": 6_000_000, "checked": 6_000_000}  # what the CUDA emulator takes, by its mode


def linear_cases(activations: str) -> list[LinearCase]:
    """Every pair of (M, N, K, format, dtype, bias) values, each with the others at least once.

    WHY fewer for the modes with one scale a row: they differ from the other two in how x is rounded, and in nothing else.
    WHY fewer for formats of the CPU alone: what they have of their own is how a block is decoded; the loops are the same.
    """
    whole = activations in ("float", "int8")
    few = (False, True)
    known = [format for format in PAIRS[activations] if format in CUDA_FORMATS]
    rows = covering_set(
        (ROWS if whole else ROWS[1::3], WIDTHS if whole else WIDTHS[::2], DEPTHS if whole else DEPTHS[1:6], known, DTYPES, few),
        allowed=lambda m, n, k, *_: m * n * k <= MAX_PRODUCTS,
    )
    if new := [format for format in PAIRS[activations] if format not in CUDA_FORMATS]:
        rows += covering_set(
            ((1, 2, 4, 7, 20, 33), WIDTHS, DEPTHS[:6], new, DTYPES, few), allowed=lambda m, n, k, *_: m * n * k <= MAX_PRODUCTS
        )
    return [LinearCase(m, n, k, format, activations, dtype, bias) for m, n, k, format, dtype, bias in rows]


def covering_set(values: Sequence[Sequence], allowed=lambda *_: True) -> list[tuple]:
    """A small set of rows in which every allowed pair of values of two columns occurs. Greedy, and always the same."""
    draw = random.Random(0)
    columns = range(len(values))
    missing = {(i, a, j, b) for i, j in itertools.combinations(columns, 2) for a in range(len(values[i])) for b in range(len(values[j]))}
    rows: list[tuple] = []
    barren = 0
    while missing and barren < 200:
        best, best_gain = None, 0
        i, a, j, b = draw.choice(sorted(missing))
        for _ in range(30):
            row = [draw.randrange(len(column)) for column in values]
            row[i], row[j] = a, b
            if not allowed(*(values[c][row[c]] for c in columns)):
                continue
            gain = sum((p, row[p], q, row[q]) in missing for p, q in itertools.combinations(columns, 2))
            if gain > best_gain:
                best, best_gain = row, gain
        barren = barren + 1 if best is None else 0
        if best is not None:
            missing -= {(p, best[p], q, best[q]) for p, q in itertools.combinations(columns, 2)}
            rows.append(tuple(values[c][best[c]] for c in columns))
    return sorted(rows, key=str)
