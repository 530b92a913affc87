"""Named inputs of the ops on sparse weights: a set that covers every pair of settings."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cases import DTYPE_CODES, DTYPES, LinearCase, LinearInputs, covering_set
from taut.formats import ACTIVATIONS, NumberFormat, WeightFormat
from taut.formats.sparse import Pattern, SparseCanonical, SparseFormat, densify, sparsify
from taut.nn.sparse_linear import numbers_or_codes
from taut.ops.pack_sparse import pack_sparse

PATTERNS = tuple(Pattern(n, m, v) for n, m in ((2, 4), (1, 4), (2, 8), (4, 8)) for v in (1, 8, 16))
NUMBERS = (NumberFormat("fp16"), NumberFormat("bf16"))
WEIGHTS = (
    *(WeightFormat(name, group) for name, group in (("int8", 0), ("int8", 32), ("int8", 128), ("int4", 32), ("int4", 64), ("int4", 0))),
    *(WeightFormat("fp8_e4m3", group) for group in (0, 64)),
    *NUMBERS,
)


@dataclass(frozen=True)
class SparseCase:
    """``x [M, K]`` in ``dtype`` times a sparse weight ``[N, K]``."""

    M: int
    N: int
    K: int
    format: SparseFormat
    activations: str = "int8"
    dtype: torch.dtype = torch.float32
    bias: bool = False

    def __str__(self) -> str:
        weights = self.format.weights
        name = f"{weights.name}{f'g{weights.group_size}' if weights.group_size else 'row'}"
        end = f"{str(self.dtype).removeprefix('torch.')}{'-bias' if self.bias else ''}"
        return f"N{self.N}_K{self.K}_M{self.M}-{str(self.format.pattern).replace(':', '_')}-{name}-a{self.activations}-{end}"

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    @property
    def dense(self) -> LinearCase:
        return LinearCase(self.M, self.N, self.K, self.format.weights, self.activations, self.dtype, self.bias)

    def sizes(self) -> dict[str, int]:
        weights, pattern = self.format.weights, self.format.pattern
        return {
            "M": self.M, "N": self.N, "K": self.K, "format": weights.code, "group_size": weights.group_size, "n": pattern.n, "m": pattern.m,
            "v": pattern.v, "activations": ACTIVATIONS[self.activations], "dtype": DTYPE_CODES[self.dtype],
        }  # fmt: skip

    def weight(self) -> SparseCanonical:
        """Random, now and then a block with fewer nonzeros than the pattern allows, and extreme codes."""
        return random_sparse(self.N, self.K, self.format, torch.Generator().manual_seed(self.seed))

    def make(self, weight: SparseCanonical | None = None) -> tuple[LinearInputs, Tensor]:
        """What the dense op would take, but for its packed weight; and the packed sparse weight."""
        weight = self.weight() if weight is None else weight
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.M, self.K, generator=generator)
        x[:, torch.rand(self.K, generator=generator) < 0.02] *= 30
        bias = torch.randn(self.N, generator=generator).to(self.dtype) if self.bias else None
        codes, _ = densify(weight, self.K, self.format)
        inputs = LinearInputs(x.to(self.dtype), torch.empty(0, dtype=torch.uint8), bias, codes, weight.scales, None, None)
        return inputs, pack_sparse(weight, self.K, self.format)


def random_sparse(rows: int, k: int, format: SparseFormat, generator: torch.Generator) -> SparseCanonical:
    w = torch.randn(rows, k, generator=generator)
    mask = format.pattern.mask(torch.rand(rows, k, generator=generator))
    if rows:
        mask &= torch.rand(rows, k, generator=generator) < 0.97
    codes, scales = numbers_or_codes(torch.where(mask, w, 0.0), format)
    if format.weights.name == "int8" and rows:
        codes[torch.rand(rows, k, generator=generator) < 0.02] = -128
    if not format.has_scales and rows:  # subnormal, and large
        for size in (2.0**-20, 2.0**12):
            codes[mask & (torch.rand(rows, k, generator=generator) < 0.02)] *= size
    return sparsify(codes, scales, mask, format)


def sparse_cases() -> tuple[SparseCase, ...]:
    rows = covering_set(
        (
            (1, 2, 3, 5, 13, 40), ((1, 8), (8, 32), (17, 64), (40, 200), (33, 1096), (70, 520), (16, 128)), WEIGHTS, PATTERNS,
            ("float", "int8", "int8_row", "fp8_row"), DTYPES, (False, True),
        )
    )  # fmt: skip
    return tuple(
        SparseCase(m, n, k, SparseFormat(weights, pattern), activations, dtype, bias)
        for m, (n, k), weights, pattern, activations, dtype, bias in rows
        if activations in weights.kind.activations
    )


# Besides, what the special kernels take, in every format and with both kinds of activations.
SPECIAL = tuple(
    SparseCase(m, n, k, SparseFormat(weights, pattern), "float", dtype, m % 2 == 0)
    for m, dtype in zip((1, 2, 7, 8, 33, 60), (torch.float32, torch.bfloat16, torch.float16) * 2, strict=True)
    for n, k in ((16, 256), (72, 1032), (9, 96))
    for weights in NUMBERS
    for pattern in (Pattern(2, 4), Pattern(2, 4, 16), Pattern(4, 8, 8))
) + tuple(
    SparseCase(m, n, k, SparseFormat(WeightFormat(name, group), pattern), activations, torch.float32, True)
    for m in (1, 4, 6, 27)
    for n, k in ((16, 256), (72, 1032), (9, 96))
    for name, group in (("int8", 0), ("int8", 64), ("int4", 32), ("int4", 0))
    for pattern in (Pattern(2, 4), Pattern(2, 4, 16), Pattern(4, 8, 16))
    for activations in (("int8", "int8_row") if name == "int8" else ("int8",))
)


def cuda_8bit_cases() -> tuple[SparseCase, ...]:
    """What CUDA kernels take besides, with 8-bit activations: every shape of a block, splits of K, pipelines that go around."""
    weights = (
        *((WeightFormat("int8", group), mode) for mode in ("int8", "int8_row") for group in (0, 32, 64, 128)),
        *((WeightFormat("int4", group), "int8") for group in (32, 128)),
        *((WeightFormat("fp8_e4m3", group), "fp8_row") for group in (0, 32, 128)),
    )  # fmt: skip
    # tokens to a block: 8, 8 and K split, 16, 32, 64, 128
    shapes = ((3, 136, 2304), (7, 24, 4096), (13, 72, 1668), (30, 40, 1292), (50, 130, 908), (33, 385, 468))
    rows = covering_set((shapes, weights, (1, 8, 16), (torch.float16, torch.bfloat16), (False, True)))
    return tuple(
        SparseCase(m, n, k, SparseFormat(format, Pattern(2, 4, v)), mode, dtype, bias) for (m, n, k), (format, mode), v, dtype, bias in rows
    )


def cuda_cases() -> tuple[SparseCase, ...]:
    """What CUDA kernels take: float activations; every tile, ragged in all ways, and deep enough for their pipelines to go around."""
    weights = (*(WeightFormat(name, group) for name in ("int4", "int8") for group in (32, 64, 128, 0)), WeightFormat("fp8_e4m3", 64))
    weights = (*weights, *NUMBERS)
    rows = covering_set(
        (
            (1, 7, 13, 30, 50, 130), ((16, 128), (72, 1032), (136, 2304), (40, 4), (200, 524)), weights, PATTERNS,
            (torch.float16, torch.bfloat16), (False, True),
        ),
        lambda m, shape, weights, pattern, *_: shape[1] % pattern.m == 0,
    )  # fmt: skip
    # so many units for the few rows that blocks take more of them than they have stages
    deep = ((1, (512, 4096), WeightFormat("int4", 128), torch.float16), (2, (640, 4096), WeightFormat("int8", 32), torch.bfloat16),
            (9, (256, 2560), WeightFormat("int4", 32), torch.float16), (3, (512, 3200), NUMBERS[0], torch.float16),
            (12, (128, 3072), NUMBERS[1], torch.bfloat16))  # fmt: skip
    two_of_four = covering_set(((1, 8, 16, 32, 64, 200), ((64, 1024), (8, 3200), (130, 268)), weights, (torch.float16, torch.bfloat16)))
    return tuple(
        SparseCase(m, min(n, 5_900_000 // (m * k)), k, SparseFormat(weights, pattern), "float", dtype, bias)
        for m, (n, k), weights, pattern, dtype, bias in (
            *rows, *((m, shape, weights, Pattern(2, 4), dtype, m % 3 == 0) for m, shape, weights, dtype in (*two_of_four, *deep))
        )
    )  # fmt: skip
