"""What can be measured: shapes, formats, and their names.

A measurement is ``op/case/format/impl``:

* case: ``N14336_K4096_M1`` (quant_linear), ``N14336_K4096`` (quantize_weight, pack_weight)
* format: ``<weights>_<activations>``. Weights are one of ``taut.formats.KINDS``, then ``g16``, ``g32``, ``g64``, ``g128`` or ``row``
  for what a scale covers, then ``z`` where there are zero points. Activations are ``a8`` (fp32 in and out, int8 inside), or ``f32`` or
  ``bf16``: the dtype of x and of the arithmetic. For quantize_weight the last part is the dtype it reads; pack_weight has none.
* impl: the row of the op's table that ran, or a peer's name. A peer's format says what the peer computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from taut.formats import KINDS, WeightFormat

# Linear layers of models: (N, K) -> what has that shape. Fused shapes are those of one matrix for q, k and v, or for gate and up.
_LAYERS = {
    (576, 576): "SmolLM2-135M q, o",
    (192, 576): "SmolLM2-135M k, v",
    (960, 576): "SmolLM2-135M qkv",
    (1536, 576): "SmolLM2-135M gate, up",
    (576, 1536): "SmolLM2-135M down",
    (2048, 2048): "Llama 1B q, o",
    (512, 2048): "Llama 1B k, v",
    (3072, 2048): "Llama 1B qkv",
    (8192, 2048): "Llama 1B gate, up",
    (16384, 2048): "Llama 1B gate+up",
    (2048, 8192): "Llama 1B down",
    (4096, 4096): "Llama 8B q, o",
    (1024, 4096): "Llama 8B k, v",
    (6144, 4096): "Llama 8B qkv",
    (14336, 4096): "Llama 8B gate, up",
    (28672, 4096): "Llama 8B gate+up",
    (4096, 14336): "Llama 8B down",
    (8192, 8192): "Llama 70B q, o",
    (1024, 8192): "Llama 70B k, v",
    (10240, 8192): "Llama 70B qkv",
    (28672, 8192): "Llama 70B gate, up",
    (8192, 28672): "Llama 70B down",
}
HEADLINE = (14336, 4096)
_HEADLINE_M, _LAYER_M = (1, 4, 32, 512), (1, 32, 512)
_WEIGHTS = (
    "int4_g32",
    "int4_g64",
    "int4_g128",
    "int4_row",
    "int4_g32_z",
    "int4_g64_z",
    "int4_g128_z",
    "int4_row_z",
    "int8_row",
    "int8_g32",
    "ternary_row",
    "int2_g32",
    "int3_g32",
    "nf4_g64",
    "mxfp4_g32",
    "nvfp4_g16",
    "fp8_e4m3_row",
    "fp8_block_g128",
)
_ACTIVATIONS = ("a8", "oa8", "f32", "bf16")
_QUANTIZE_SHAPES = (HEADLINE, (576, 1536))
DTYPES = {"a8": torch.float32, "oa8": torch.float32, "f32": torch.float32, "bf16": torch.bfloat16}
MODES = {"a8": "int8", "oa8": "int8_outliers"}  # the others: float
DEFAULT_FORMATS = ("int4_g32_a8", "int8_row_a8")
WARM_ONLY_M = 64  # above it a matrix product is bound by arithmetic: cold and warm weights cost the same
SWEEP_M = tuple(2**power for power in range(12))


@dataclass(frozen=True)
class Case:
    """One op on one shape; ``m`` is 0 where the op has no x."""

    op: str
    n: int
    k: int
    m: int = 0

    @property
    def name(self) -> str:
        return f"N{self.n}_K{self.k}" + (f"_M{self.m}" if self.m else "")

    @property
    def bound_by_arithmetic(self) -> bool:
        """Then cold and warm weights cost the same."""
        return self.m > WARM_ONLY_M

    @property
    def float_bytes(self) -> int:
        """What a contender and its check hold besides cold copies: fp32 weights twice, and float64 results."""
        return self.n * self.k * 8 + self.m * (self.n + self.k) * 24

    @property
    def note(self) -> str:
        return _LAYERS.get((self.n, self.k), "")

    @property
    def formats(self) -> tuple[str, ...]:
        if self.op == "pack_weight":
            return _WEIGHTS
        if self.op == "quantize_weight":
            return tuple(f"{weights}_{source}" for weights in _WEIGHTS for source in ("f32", "bf16"))
        return tuple(f"{weights}_{how}" for weights in _WEIGHTS for how in _ACTIVATIONS if how not in MODES or _takes_int8(weights))


def _takes_int8(weights: str) -> bool:
    return "int8" in parse_format(weights)[0].kind.activations


def default_formats() -> tuple[str, ...]:
    """Every kind of weights in its default group, with the activations that "auto" stands for on the CPU, and with x in bf16."""
    names = [format_name(WeightFormat(kind)) for kind in KINDS]
    return tuple(f"{name}_{'a8' if _takes_int8(name) else 'f32'}" for name in names) + tuple(f"{name}_bf16" for name in names)


def all_cases() -> list[Case]:
    """Every case, the headline ones first."""
    linear = [Case("quant_linear", *HEADLINE, m) for m in _HEADLINE_M]
    linear += [Case("quant_linear", n, k, m) for n, k in _LAYERS if (n, k) != HEADLINE for m in _LAYER_M]
    weights = [Case(op, n, k) for op in ("quantize_weight", "pack_weight") for n, k in _QUANTIZE_SHAPES]
    return linear + weights


def parse_format(name: str) -> tuple[WeightFormat, str]:
    """``int4_g32_z_a8`` -> the weight format and the part after it ("" if none). Raises ``ValueError`` for anything else."""
    match = re.fullmatch(rf"({'|'.join(KINDS)})_(?:g(\d+)|row)(_z)?(?:_(a8|oa8|f32|bf16))?", name)
    if not match:
        raise ValueError(
            f"unknown format {name!r}; accepted: one of {', '.join(KINDS)}, then g16, g32, g64, g128 or row, then z, then a8, oa8, f32 "
            "or bf16"
        )
    weights, group, zeros, activations = match.groups()
    return WeightFormat(weights, int(group or 0), zeros is not None), activations or ""


def format_name(format: WeightFormat, activations: str = "") -> str:
    """The inverse of ``parse_format``."""
    group = f"g{format.group_size}" if format.group_size else "row"
    return f"{format.name}_{group}" + ("_z" if format.zeros else "") + (f"_{activations}" if activations else "")
