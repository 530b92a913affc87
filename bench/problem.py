"""The inputs of one shape, shared by all contenders, and the check of their results against float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from taut.formats import Canonical, WeightFormat
from taut.ops.pack_weight import dequantize_weight, pack_weight
from taut.ops.quant_linear import quantize_activations
from taut.ops.quantize_weight import quantize_weight, reference

from .cases import Case

_CHECKED_ROWS = 4  # of x against all columns; and all rows of x against as many columns as below
_CHECKED_COLUMNS = 64
_CHUNK = 2048  # rows of w in float64 at a time


@dataclass
class Problem:
    """``x [M, K]`` and ``w [N, K]`` of a case, the same for everyone; low-bit forms of w are made when asked for."""

    case: Case
    x: Tensor = field(init=False)
    _w: Tensor | None = field(init=False, default=None)
    _canonical: dict[WeightFormat, Canonical] = field(init=False, default_factory=dict)
    _dense: dict[tuple[WeightFormat, str], Tensor] = field(init=False, default_factory=dict)
    _packed: dict[WeightFormat, list[Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.case.n * 31 + self.case.k)
        self.x = torch.randn(self.case.m, self.case.k, generator=generator)

    def with_rows(self, case: Case) -> Problem:
        """The problem of ``case``, which differs in M alone; what was made of w is shared with this one."""
        other = Problem(case)
        other._w, other._canonical, other._dense, other._packed = self.w, self._canonical, self._dense, self._packed
        return other

    @property
    def w(self) -> Tensor:
        if self._w is None:
            generator = torch.Generator().manual_seed(self.case.n + self.case.k * 31)
            self._w = torch.randn(self.case.n, self.case.k, generator=generator) / self.case.k**0.5
        return self._w

    def canonical(self, format: WeightFormat) -> Canonical:
        """The weight in its canonical form."""
        if format not in self._canonical:
            self._canonical[format] = quantize_weight(self.w, format)
        return self._canonical[format]

    def dense(self, format: WeightFormat, activations: str = "float") -> Tensor:
        """The numbers the low-bit weight stands for, fp32: what float peers compute with, so that all compute the same.

        ``activations``: what they are multiplied with: nf4 stands for other numbers beside int8 ones.
        """
        key = (format, activations if format.name == "nf4" else "float")
        if key not in self._dense:
            parts = self.canonical(format)
            if key[1] == "float":
                packed = pack_weight(*parts, self.case.k, format)
                self._dense[key] = dequantize_weight(packed, self.case.n, self.case.k, format)
            else:
                self._dense[key] = reference(*parts, self.case.k, format, activations).float()
        return self._dense[key]

    def packed(self, format: WeightFormat, count: int) -> list[Tensor]:
        """``count`` copies of the weight in the layout kernels read, each in memory of its own."""
        copies = self._packed.setdefault(format, [])
        # WHY packed again, not cloned: pack_weight asks for 2 MB pages, as a model's weights have them
        copies += [pack_weight(*self.canonical(format), self.case.k, format) for _ in range(count - len(copies))]
        return copies[:count]


def max_error(out: Tensor, x: Tensor, w: Tensor, activations: str = "float") -> float:
    """The largest error of ``out [M, N]`` against ``x [M, K] @ w [N, K]^T`` in float64, over the largest result.

    Every column is checked for the first and last rows of x, and every row of x for the first and last columns; ``inf``
    for a NaN. ``activations``: x is rounded first, as taut's activations of this name define it.
    """
    exact = x.double() if activations == "float" else quantize_activations(x, activations)
    rows = _ends(exact.shape[0], _CHECKED_ROWS)
    columns = _ends(w.shape[0], _CHECKED_COLUMNS)
    worst, largest = 0.0, 0.0
    parts = [(exact[rows], w[begin : begin + _CHUNK], out[rows, begin : begin + _CHUNK]) for begin in range(0, w.shape[0], _CHUNK)]
    parts.append((exact, w[columns], out[:, columns]))
    for x_part, w_part, found in parts:
        expected = x_part @ w_part.double().T
        error = (found.double() - expected).abs()
        if not bool(error.isfinite().all()):
            return float("inf")
        worst, largest = max(worst, float(error.max())), max(largest, float(expected.abs().max()))
    return worst / largest if largest else worst


def _ends(count: int, how_many: int) -> Tensor:
    if count <= how_many:
        return torch.arange(count)
    return torch.cat([torch.arange(how_many // 2), torch.arange(count - how_many // 2, count)])
