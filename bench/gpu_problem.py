"""What a GPU benchmark multiplies: one random low-bit weight, copies of it for a cold L2 cache, and the check of results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from taut import _native
from taut.formats import WeightFormat, activation_code
from taut.ops.pack_weight import pack_weight

from .contenders import Skip, copies_for
from .model import Format

WEIGHTS = {"int4": "int4", "int8": "int8", "fp8": "fp8_e4m3"}
ACTIVATIONS = {"bf16": "float", "f16": "float", "a8row": "int8_row", "f8row": "fp8_row"}
# Of the largest result. x rounded to 8 bits is held against the exact x; FP8 has 3 bits behind the point.
TOLERANCES = {"bf16": 1e-2, "f16": 1e-2, "a8row": 3e-2, "f8row": 6e-2}
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/common/dtypes.h
_RMS = {"int4": 4.6, "int8": 74.0, "fp8": 100.0}  # of the codes drawn below
_CHUNK = 2048  # rows in float64 at a time
_CHECKED_ROWS, _CHECKED_COLUMNS = 4, 64


@dataclass
class Weight:
    """A random weight ``[n, k]`` in a format of ``bench/model.py``, canonical, on a device; every code occurs."""

    n: int
    k: int
    name: str
    device: torch.device
    dtype: torch.dtype  # of x, and of dense layers
    format: Format = field(init=False)
    spec: WeightFormat = field(init=False)
    codes: Tensor = field(init=False)
    scales: Tensor = field(init=False)
    zeros: Tensor | None = field(init=False)
    dense: Tensor = field(init=False)  # fp32: the numbers it stands for, by plain torch

    def __post_init__(self) -> None:
        self.format = format = Format.parse(self.name)
        try:
            self.spec = WeightFormat(WEIGHTS[format.weights], format.group, format.zeros)
        except ValueError as error:
            raise Skip(str(error)) from None
        n, k = self.n, self.k
        generator = torch.Generator(self.device).manual_seed(n * 31 + k)
        groups = self.spec.num_groups(k)
        size = 4.0 / (_RMS[format.weights] * k**0.5)  # so that results are a few units large
        scales = (0.75 + 0.5 * torch.rand(n, groups, generator=generator, device=self.device)) * size
        self.scales = scales.half()
        self.zeros = None
        if format.zeros:
            self.zeros = torch.randint(0, 16, (n, groups), generator=generator, device=self.device, dtype=torch.uint8)
        if format.weights == "int4":
            self.codes = torch.randint(0, 256, (n, k // 2), generator=generator, device=self.device, dtype=torch.uint8)
        elif format.weights == "int8":
            self.codes = torch.randint(-128, 128, (n, k), generator=generator, device=self.device, dtype=torch.int8)
        else:
            drawn = torch.randn(n, k, generator=generator, device=self.device) * _RMS["fp8"]
            self.codes = drawn.clamp(-448, 448).to(torch.float8_e4m3fn)
        self.dense = self._numbers()

    def _numbers(self) -> Tensor:
        numbers = self.nibbles() if self.format.weights == "int4" else self.codes
        numbers = numbers.float().view(self.n, self.spec.num_groups(self.k), -1)
        if self.format.weights == "int4":
            numbers -= 8.0 if self.zeros is None else self.zeros.float()[:, :, None]
        numbers *= self.scales.float()[:, :, None]
        return numbers.view(self.n, self.k)

    def nibbles(self) -> Tensor:
        """The int4 codes one by one, ``uint8 [n, k]``."""
        return torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1)

    def sizes(self, m: int) -> dict[str, int]:
        """What ``explain`` takes. Raises ``ValueError`` where the weights do not take the activations."""
        spec = self.spec
        return {
            "M": m, "N": self.n, "K": self.k, "format": spec.code, "group_size": spec.group_size, "zeros": int(spec.zeros),
            "activations": activation_code(ACTIVATIONS[self.format.activations], spec), "dtype": _DTYPE_CODES[self.dtype],
        }  # fmt: skip

    @staticmethod
    def needed_bytes(n: int, k: int, cold_bytes: int) -> int:
        """Device memory for a weight and its contenders, about: fp32, the 16-bit copies, what makes them, and packed copies."""
        return n * k * 14 + 6 * cold_bytes


@dataclass(frozen=True)
class Layer:
    """A weight as one contender wants it, in ``copies`` copies. ``call(x, copy)`` computes with one of them.

    ``dense``: the numbers it computes with, where they are not those of the weight. ``refuses(m)``: why it cannot take m rows, or None.
    """

    impl: str
    peer: bool
    format: str
    unit: str  # of the tensor cores it computes with: 16, int8, fp8
    call: Callable[[Tensor, int], Tensor]
    copies: int
    weight_bytes: int
    dense: Tensor | None = None
    refuses: Callable[[int], str | None] = lambda m: None


def own_packed(weight: Weight, cold_bytes: int) -> list[Tensor]:
    """The weight in taut's layout, in copies that together exceed ``cold_bytes``."""
    packed = pack_weight(weight.codes, weight.scales, weight.zeros, None, weight.k, weight.spec)
    return [packed, *(packed.clone() for _ in range(copies_for(packed.nbytes, cold_bytes) - 1))]


def own_layer(weight: Weight, packed: list[Tensor], impl: str) -> Layer:
    """taut's op on a packed weight. Whoever times an impl that the table would not choose forces it around the calls."""
    spec, activations = weight.spec, weight.format.activations
    try:
        arguments = (None, weight.n, spec.code, spec.group_size, spec.zeros, activation_code(ACTIVATIONS[activations], spec))
    except ValueError as error:
        raise Skip(str(error)) from None
    op = _native.ops_for(packed[0].device.type).quant_linear
    unit = {"a8row": "int8", "f8row": "fp8"}.get(activations, "16")
    return Layer(impl, False, weight.name, unit, lambda x, copy: op(x, packed[copy], *arguments), len(packed), packed[0].nbytes)


def rows_of_x(weight: Weight, m: int) -> Tensor:
    """``x [m, k]``, normal, the same for everyone."""
    generator = torch.Generator(weight.device).manual_seed(m * 7 + weight.k)
    return torch.randn(m, weight.k, generator=generator, device=weight.device).to(weight.dtype)


def max_error(out: Tensor, x: Tensor, w: Tensor) -> float:
    """The largest error of ``out [M, N]`` against ``x @ w^T`` in float64, over the largest result; ``inf`` for a NaN.

    The first and last rows of x are checked against every column, and the first and last columns against every row.
    """
    rows, columns = _ends(x.shape[0], _CHECKED_ROWS, x.device), _ends(w.shape[0], _CHECKED_COLUMNS, x.device)
    exact_rows, exact_columns = x[rows].double(), w[columns].double()
    worst = largest = 0.0
    parts = [
        (out[rows, begin : begin + _CHUNK], exact_rows @ w[begin : begin + _CHUNK].double().T) for begin in range(0, w.shape[0], _CHUNK)
    ]
    parts += [
        (out[begin : begin + _CHUNK, columns], x[begin : begin + _CHUNK].double() @ exact_columns.T)
        for begin in range(0, x.shape[0], _CHUNK)
    ]
    for found, expected in parts:
        error = (found.double() - expected).abs()
        if not bool(error.isfinite().all()):
            return float("inf")
        worst, largest = max(worst, float(error.max())), max(largest, float(expected.abs().max()))
    return worst / largest if largest else worst


def norm_error(out: Tensor, other: Tensor) -> float:
    """``|out - other| / |other|`` over all elements, in fp32; ``inf`` for a NaN. It sees elements that ``max_error`` does not look at."""
    squares = [0.0, 0.0]
    for begin in range(0, out.shape[0], _CHUNK):
        mine, theirs = out[begin : begin + _CHUNK].float(), other[begin : begin + _CHUNK].float()
        squares[0] += float((mine - theirs).square().sum(dtype=torch.float64))
        squares[1] += float(theirs.square().sum(dtype=torch.float64))
    error = (squares[0] / squares[1]) ** 0.5 if squares[1] else squares[0]
    return error if error == error else float("inf")


def _ends(count: int, how_many: int, device: torch.device) -> Tensor:
    if count <= how_many:
        return torch.arange(count, device=device)
    first = torch.arange(how_many // 2, device=device)
    return torch.cat([first, first + count - how_many // 2])
