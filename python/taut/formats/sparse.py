"""Which weights may be nonzero, and what a sparse weight is stored as.

A ``Pattern`` is N:M, as sparse tensor cores have it, or vector-wise V:N:M (VENOM, arXiv 2310.02065); a ``SparseFormat`` a pattern over a
low-bit format; a ``SparseCanonical`` a weight in it, as checkpoints hold it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import SPARSE_KINDS, Kind, NumberFormat, WeightFormat

__all__ = [
    "PATTERNS", "SPARSE_WEIGHTS", "VECTORS", "Pattern", "SparseCanonical", "SparseFormat", "densify", "sparsify",
]  # fmt: skip

SPARSE_WEIGHTS = ("int8", "int4", "fp8_e4m3", *SPARSE_KINDS)  # without zero points

PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8))  # N:M
VECTORS = (1, 8, 16)  # rows that share their places


@dataclass(frozen=True)
class Pattern:
    """Of each ``m`` neighbours along K at most ``n`` are kept, at places that ``v`` neighbouring rows share.

    ``str`` and ``parse`` write it as "2:4", and as "16:2:4" where rows share. Raises ``ValueError`` for what no kernel has.
    """

    n: int = 2
    m: int = 4
    v: int = 1

    def __post_init__(self) -> None:
        if (self.n, self.m) not in PATTERNS or self.v not in VECTORS:
            accepted = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
            raise ValueError(f"no sparsity pattern {self}; accepted: {accepted}, and V:N:M of them with V = 8 or 16, such as 16:2:4")

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        if isinstance(text, Pattern):
            return text
        found = re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)", text) if isinstance(text, str) else None
        if not found:
            raise ValueError(f"{text!r} is no sparsity pattern; patterns are written 2:4, or 16:2:4 where 16 rows share their places")
        v, n, m = found.groups()
        return cls(int(n), int(m), int(v or 1))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.v == 1 else f"{self.v}:{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    def check_k(self, k: int) -> None:
        """Raises ``ValueError`` where rows of ``k`` weights cannot be cut in blocks of ``m``."""
        if k % self.m:
            raise ValueError(f"K is {k}, which blocks of {self.m} of the pattern {self} do not divide")

    def mask(self, scores: Tensor) -> Tensor:
        """Keeps what scores best: bool ``[N, K]``, exactly ``n`` true in each block of ``m``, the earlier place where scores are equal.

        ``scores`` [N, K] are of any float dtype, no NaN. Rows that share places add up their scores; the last ``N % v`` rows share too.
        """
        rows, k = scores.shape
        self.check_k(k)
        groups = -(-rows // self.v)
        summed = torch.nn.functional.pad(scores.float(), (0, 0, 0, groups * self.v - rows)).view(groups, self.v, k).sum(1)
        order = summed.view(groups, k // self.m, self.m).sort(dim=-1, descending=True, stable=True).indices[..., : self.n]
        kept = torch.zeros(groups, k // self.m, self.m, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)
        return kept.view(groups, k).repeat_interleave(self.v, 0)[:rows]

    def holds(self, weight: Tensor) -> bool:
        """Whether a dense weight [N, K] keeps to the pattern."""
        rows, k = weight.shape
        self.check_k(k)
        groups = -(-rows // self.v)
        used = torch.nn.functional.pad(weight != 0, (0, 0, 0, groups * self.v - rows)).view(groups, self.v, k).any(1)
        return bool((used.view(groups, k // self.m, self.m).sum(-1) <= self.n).all())


class SparseCanonical(NamedTuple):
    """A sparse weight ``[N, K]`` in canonical form, row-major, of which ``Kk = K * n / m`` are kept in a row.

    ``codes``: of ``[N, Kk]``, as the dense format has them, or the numbers themselves, float16 or bfloat16. ``scales``: of ``[N, K]``, as
    the dense format has them; groups count the dense k. None beside numbers. ``meta``: uint8 ``[ceil(N / v), ceil(Kk * b / 8)]``: places
    within their m, ascending, b = 2 (m = 4) or 3 (m = 8) bits each, a little-endian string.
    """

    codes: Tensor
    scales: Tensor | None
    meta: Tensor

    def to(self, device: torch.device | str) -> SparseCanonical:
        return SparseCanonical(*(None if part is None else part.to(device) for part in self))


@dataclass(frozen=True)
class SparseFormat:
    """``pattern`` over ``weights``, which are int8, int4 or fp8_e4m3 without zero points, or a ``NumberFormat``: fp16 or bf16.

    Raises ``ValueError`` for other weights.
    """

    weights: WeightFormat
    pattern: Pattern

    def __post_init__(self) -> None:
        if self.weights.name not in SPARSE_WEIGHTS or self.weights.zeros:
            raise ValueError(f"sparse weights are {', '.join(SPARSE_WEIGHTS)}, without zero points; got {self.weights}")

    def __str__(self) -> str:
        return f"{self.pattern} {self.weights}"

    # As a dense format has them.
    zeros = has_global_scale = False

    @classmethod
    def of_names(cls, weights: str, group_size: int | None, zeros: bool, pattern: str | Pattern) -> SparseFormat:
        """Of a kind of weights by its name, and a pattern as ``Pattern.parse`` takes it."""
        kind = NumberFormat if weights in SPARSE_KINDS else WeightFormat
        return cls(kind(weights, group_size, zeros), Pattern.parse(pattern))

    @classmethod
    def of_code(cls, code: int, group_size: int, n: int, m: int, v: int) -> SparseFormat:
        """The format as kernels are told of it."""
        numbers = code in (kind.code for kind in SPARSE_KINDS.values())
        return cls((NumberFormat if numbers else WeightFormat).of_code(code, group_size, False), Pattern(n, m, v))

    @property
    def kind(self) -> Kind:
        return self.weights.kind

    @property
    def name(self) -> str:
        return self.weights.name

    @property
    def label(self) -> str:
        """Whose weights these are, in an error."""
        return f"sparse {self.name}"

    @property
    def activations(self) -> tuple[str, ...]:
        """As beside dense weights, but for "int8_outliers"."""
        return tuple(name for name in self.weights.activations if name != "int8_outliers")

    @property
    def code(self) -> int:
        """The integer that fused ops know it by; see ``any_weight`` in ``csrc/common/sparse_bridge.h``."""
        return self.weights.code | self.pattern.n << 8 | self.pattern.m << 12 | self.pattern.v << 16

    @property
    def has_scales(self) -> bool:
        return self.weights.has_scales

    @property
    def group_size(self) -> int:
        return self.weights.group_size

    @property
    def place_bits(self) -> int:
        return 2 if self.pattern.m == 4 else 3

    def kept(self, in_features: int) -> int:
        """Numbers a row keeps. Raises ``ValueError`` where blocks of m do not divide ``in_features``."""
        self.pattern.check_k(in_features)
        return in_features // self.pattern.m * self.pattern.n

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return self.weights.codes_shape(out_features, self.kept(in_features))

    def scales_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """``[N, 0]`` where there are none."""
        return self.weights.scales_shape(out_features, in_features) if self.has_scales else (out_features, 0)

    def meta_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (-(-out_features // self.pattern.v), -(-self.kept(in_features) * self.place_bits // 8))

    def canonical_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes, scales and places."""
        rows, columns = self.codes_shape(out_features, in_features)
        scale_rows, groups = self.scales_shape(out_features, in_features)
        meta_rows, meta_columns = self.meta_shape(out_features, in_features)
        return rows * columns * self.weights.codes_dtype.itemsize + scale_rows * groups * 2 + meta_rows * meta_columns

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Of the canonical form, for each weight of the dense matrix: codes, scales and places."""
        return 8 * self.canonical_bytes(out_features, in_features) / (out_features * in_features)

    def layout_bytes(self, out_features: int, in_features: int, layout: int = 0) -> int:
        """Bytes in a layout of ``csrc/common/sparse.h``, padding and headers included: 0 Sparse8, 1 SparseTiles."""
        self.pattern.check_k(in_features)
        if layout == 1:
            return self._tiles_bytes(out_features, in_features)
        blocks, strips, group = -(-in_features // 32), -(-out_features // 8), max(self.weights.group_size or 128, 32)
        kept, field = 32 // self.pattern.m * self.pattern.n, 2 if self.pattern.m == 4 else 4
        places = -(-kept // 4 * field // 8) * 32 if self.pattern.v == 1 else kept // 2
        superblocks = -(-blocks // (4 * group // 32))
        return strips * (superblocks * 64 * self.has_scales + blocks * (kept * self.weights.bits + places))

    def _tiles_bytes(self, out_features: int, in_features: int) -> int:
        if (self.pattern.n, self.pattern.m) == (2, 4):  # the kept numbers in tiles of 64 x 64 with their scales, a 2-bit place each
            tiles_n, tiles_k = -(-out_features // 64), -(-in_features // 128)
            groups = tiles_k * 128 // self.group_size if self.group_size else int(self.has_scales)
            return tiles_n * (tiles_k * 64 * 64 * (self.weights.bits + 2) // 8 + 64 * groups * 2)
        shapes = (self.codes_shape, self.scales_shape, self.meta_shape)
        counts = [math.prod(shape(out_features, in_features)) for shape in shapes]
        return sum(-(-count * size // 16) * 16 for count, size in zip(counts, (self.weights.codes_dtype.itemsize, 2, 1), strict=True))


def _unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """``count`` integers of ``bits`` bits from each row of little-endian strings: uint8 ``[rows, count]``."""
    each = (packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    each = each.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (each << torch.arange(bits, dtype=torch.uint8, device=packed.device)).sum(-1, dtype=torch.uint8)


def _pack_bits(values: Tensor, bits: int) -> Tensor:
    each = ((values[..., None] >> torch.arange(bits, dtype=torch.uint8, device=values.device)) & 1).flatten(-2)
    each = torch.nn.functional.pad(each, (0, -each.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (each << torch.arange(8, dtype=torch.uint8, device=values.device)).sum(-1, dtype=torch.uint8)


def _plain(codes: Tensor, count: int, format: SparseFormat) -> Tensor:
    """``count`` codes of each row as integers, bits as they are stored: an element each."""
    if format.weights.bits == 4:
        return _unpack_bits(codes, 4, count)
    return codes.view(torch.int16 if format.weights.bits == 16 else torch.uint8)


def _packed(plain: Tensor, format: SparseFormat) -> Tensor:
    return _pack_bits(plain, 4) if format.weights.bits == 4 else plain.view(format.weights.codes_dtype)


def sparsify(codes: Tensor, scales: Tensor | None, mask: Tensor, format: SparseFormat) -> SparseCanonical:
    """A dense weight in canonical form, and which of it are kept (bool ``[N, K]``, as ``Pattern.mask`` gives), to a sparse one.

    A block of m that keeps fewer than n keeps zeros besides, at its first free places. What is not kept is dropped, zero or not.
    Raises ``ValueError`` if the mask does not hold to the pattern.
    """
    rows, k = mask.shape
    pattern = format.pattern
    if not pattern.holds(mask):
        raise ValueError(f"the mask keeps more than {pattern} allows")
    shared = torch.nn.functional.pad(mask, (0, 0, 0, -rows % pattern.v)).unflatten(0, (-1, pattern.v)).any(1)
    blocks = shared.unflatten(1, (-1, pattern.m))
    # kept ones first, then the first free places; then in order
    order = (~blocks).to(torch.uint8).sort(dim=-1, stable=True).indices[..., : pattern.n].sort(-1).values
    places = order.flatten(1).to(torch.uint8)
    index = (order + torch.arange(0, k, pattern.m, device=mask.device)[:, None]).flatten(1).repeat_interleave(pattern.v, 0)[:rows]
    zero = 8 if format.weights.name == "int4" else 0
    kept = _packed(torch.where(mask, _plain(codes, k, format), zero).gather(1, index), format)
    return SparseCanonical(kept.contiguous(), scales, _pack_bits(places, format.place_bits))


def densify(weight: SparseCanonical, in_features: int, format: SparseFormat) -> tuple[Tensor, Tensor]:
    """The dense weight's codes, and which are kept (bool ``[N, K]``): the inverse of ``sparsify``."""
    rows, pattern, kept = weight.codes.shape[0], format.pattern, format.kept(in_features)
    places = _unpack_bits(weight.meta, format.place_bits, kept).long()
    first = torch.arange(kept, device=places.device) // pattern.n * pattern.m
    index = (places + first).repeat_interleave(pattern.v, 0)[:rows]
    whole = _plain(weight.codes, kept, format)
    dense = torch.full((rows, in_features), 8 if format.weights.name == "int4" else 0, dtype=whole.dtype, device=whole.device)
    dense.scatter_(1, index, whole)
    mask = torch.zeros(rows, in_features, dtype=torch.bool, device=whole.device).scatter_(1, index, True)
    return _packed(dense, format), mask
