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
from taut.formats import ACCEPTED_ACTIVATIONS, ACTIVATIONS, WeightFormat

FORMATS = tuple(
    WeightFormat(name, group, zeros)
    for name, zeros in (("int4", False), ("int4", True), ("int8", False), ("fp8_e4m3", False))
    for group in (32, 64, 128, 0)
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}  # csrc/common/dtypes.h
# What each activation mode is multiplied with.
PAIRS = {mode: tuple(format for format in FORMATS if mode in ACCEPTED_ACTIVATIONS[format.name]) for mode in ACTIVATIONS}
INT4, INT4_ZEROS, INT8, FP8 = (
    WeightFormat("int4", 32),
    WeightFormat("int4", 64, True),
    WeightFormat("int8", 0),
    WeightFormat("fp8_e4m3", 128),
)
# (activations, format) for tests of one property: each mode once, and each kind of weight with each mode it takes.
EACH_MODE = (("float", INT4_ZEROS), ("int8", INT4_ZEROS), ("int8_row", INT8), ("fp8_row", FP8))
EACH_KIND = tuple((mode, format) for mode in ACTIVATIONS for format in (INT4, INT4_ZEROS, INT8, FP8) if format in PAIRS[mode])


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
        codes, scales, zeros = random_weight(self.N, self.K, self.format, generator)
        return LinearInputs(x.to(self.dtype), pack(codes, scales, zeros, self.K, self.format), bias, codes, scales, zeros)


@dataclass(frozen=True)
class LinearInputs:
    x: Tensor
    packed: Tensor
    bias: Tensor | None
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None


def pack(codes: Tensor, scales: Tensor, zeros: Tensor | None, k: int, format: WeightFormat) -> Tensor:
    """pack_weight past the checks of its Python contract: kernels are tested with every code a byte can hold, -128 too."""
    device = codes.device.type
    return _native.ops_for(device).pack_weight(codes, scales, zeros, k, format.code, format.group_size, _native.layout_for(device))


def random_weight(n: int, k: int, format: WeightFormat, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
    """A canonical weight of uniformly drawn codes, every one of them reachable, and scales of either sign.

    WHY not a quantized random matrix: its extreme codes are rare, and a group's scale never has a sign of its own.
    """
    groups = format.num_groups(k)
    if format.name == "int4":
        codes = torch.randint(0, 256, format.codes_shape(n, k), generator=generator, dtype=torch.uint8)
        if k % 2:
            codes[:, -1] &= 15  # the unused nibble is zero in the canonical form
    elif format.name == "int8":
        codes = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    else:
        codes = torch.randint(0, 256, (n, k), generator=generator, dtype=torch.uint8)
        codes = torch.where(codes & 0x7F == 0x7F, codes - 1, codes).view(torch.float8_e4m3fn)  # a NaN is no weight
    scales = (torch.rand(n, groups, generator=generator) + 0.5) * {"int4": 0.1, "int8": 0.01, "fp8_e4m3": 0.005}[format.name]
    scales *= torch.where(torch.rand(n, groups, generator=generator) < 0.25, -1.0, 1.0)
    zeros = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8) if format.zeros else None
    return codes, scales.half(), zeros


ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 13, 20, 21, 33, 70)
WIDTHS = (1, 7, 17, 100)
DEPTHS = (1, 31, 33, 75, 576, 1536, 10944)
MAX_PRODUCTS = 6_000_000  # M * N * K of one case: the scalar impl takes 50 ms for it
EMULATED_PRODUCTS = {"fast": 6_000_000, "checked": 6_000_000}  # what the CUDA emulator takes, by its mode


def linear_cases(activations: str) -> list[LinearCase]:
    """Every pair of (M, N, K, format, dtype, bias) values, each with the others at least once.

    WHY fewer for the modes with one scale a row: they differ from the other two in how x is rounded, and in nothing else.
    """
    whole = activations in ("float", "int8")
    rows = covering_set(
        (
            ROWS if whole else ROWS[1::3],
            WIDTHS if whole else WIDTHS[::2],
            DEPTHS if whole else DEPTHS[1:6],
            PAIRS[activations],
            DTYPES,
            (False, True),
        ),
        allowed=lambda m, n, k, *_: m * n * k <= MAX_PRODUCTS,
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
