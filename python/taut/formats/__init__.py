"""What stored weights mean. ``kinds`` has one descriptor per low-bit format; a ``WeightFormat`` is one of them with its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .kinds import ACTIVATIONS, GROUP_SIZES, KINDS, SPARSE_KINDS, Kind

__all__ = [
    "ACTIVATIONS", "FORMATS", "GROUP_SIZES", "KINDS", "SPARSE_KINDS", "Canonical", "Kind", "NumberFormat", "WeightFormat",
    "activation_code", "check_activations", "resolve_activations",
]  # fmt: skip

FORMATS = {kind.name: kind.code for kind in KINDS.values()}  # and the integers kernels know them by
_CUDA = tuple(kind.name for kind in KINDS.values() if kind.cuda)


class Canonical(NamedTuple):
    """A weight in canonical form. ``zeros`` and ``global_scale`` are None in formats that have none."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    global_scale: Tensor | None = None

    def to(self, device: torch.device | str) -> Canonical:
        return Canonical(*(None if part is None else part.to(device) for part in self))


@dataclass(frozen=True)
class WeightFormat:
    """A low-bit weight format: ``name`` (see ``taut.formats.KINDS``), ``group_size`` (32, 64, 128, 0 = one scale a row, or what the
    format fixes; None: the format's default), ``zeros`` (int2, int3, int4: a zero point a group).

    Raises ``ValueError`` for anything else.
    """

    name: str = "int4"
    group_size: int | None = None
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.name not in self._known():
            if self.name in SPARSE_KINDS:
                raise ValueError(
                    f"{self.name} weights are for sparse layers alone: give a sparsity, such as 2:4. Dense ones are {', '.join(KINDS)}"
                )
            raise ValueError(f"unknown weight format {self.name!r}; accepted: {', '.join(self._known())}")
        if self.group_size is None:
            object.__setattr__(self, "group_size", self.kind.default_group_size)
        accepted = self.kind.group_sizes
        if isinstance(self.group_size, bool) or self.group_size not in accepted:
            if not self.kind.has_scales:
                raise ValueError(f"group_size {self.group_size!r} does not fit; {self.name} weights have no scales: give none")
            if len(accepted) == 1:
                raise ValueError(f"group_size {self.group_size!r} does not fit; {self.name} has groups of {accepted[0]}")
            raise ValueError(f"group_size {self.group_size!r} does not fit; accepted: 32, 64, 128, or 0 for one scale a row")
        if self.zeros not in (True, False):
            raise ValueError(f"zeros must be True or False, got {self.zeros!r}")
        if self.zeros and not self.kind.takes_zeros:
            raise ValueError(f"zeros=True is for int2, int3 and int4 only; {self.name} is symmetric")

    @classmethod
    def of_code(cls, code: int, group_size: int, zeros: bool) -> WeightFormat:
        """The format as kernels are told of it."""
        return cls(next(name for name, known in FORMATS.items() if known == code), group_size, zeros)

    @classmethod
    def _known(cls) -> dict[str, Kind]:
        """The kinds that are formats of this class, by name."""
        return KINDS

    @property
    def kind(self) -> Kind:
        return self._known()[self.name]

    @property
    def code(self) -> int:
        """The integer kernels know the format by."""
        return self.kind.code

    @property
    def bits(self) -> int:
        """Of a code in a kernel's layout."""
        return self.kind.bits

    @property
    def label(self) -> str:
        """Whose weights these are, in an error."""
        return self.name

    @property
    def activations(self) -> tuple[str, ...]:
        """The modes that multiply weights of this format, by name."""
        return self.kind.activations

    @property
    def codes_dtype(self) -> torch.dtype:
        return self.kind.codes_dtype

    @property
    def scales_dtype(self) -> torch.dtype:
        return self.kind.scales_dtype

    @property
    def has_scales(self) -> bool:
        return self.kind.has_scales

    @property
    def has_global_scale(self) -> bool:
        return self.kind.has_global_scale

    @property
    def largest_zero(self) -> int:
        """The largest zero point there is."""
        return 2**self.bits - 1

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == 0 else -(-in_features // self.group_size)

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        codes, size = self.kind.codes_in
        return (out_features, -(-in_features * size // codes))

    def scales_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (-(-out_features // self.kind.block_rows), self.num_groups(in_features))

    def canonical_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes, scales, zeros and global scale for a weight ``[out_features, in_features]``."""
        rows, columns = self.codes_shape(out_features, in_features)
        scale_rows, groups = self.scales_shape(out_features, in_features)
        zeros = out_features * groups if self.zeros else 0
        return rows * columns + scale_rows * groups * self.scales_dtype.itemsize + zeros + 4 * self.has_global_scale

    def layout_bytes(self, out_features: int, in_features: int, layout: int = 0) -> int:
        """Bytes of the same weight in a layout of ``csrc/common/formats.h``, padding and headers included: 0 Rows8, 1 MmaTiles.

        Raises ``ValueError`` for MmaTiles, the layout of CUDA, and a format that is for the CPU only.
        """
        if layout == 1:
            self.check_cuda()
            tiles_n, tiles_k = -(-out_features // 64), -(-in_features // 64)
            scales = tiles_n * 64 * self.num_groups(tiles_k * 64)
            return tiles_n * tiles_k * 64 * 64 * self.bits // 8 + scales * (3 if self.zeros else 2)
        group = max(self.group_size or 128, 32)
        scales = 2 if self.group_size == 16 else 1  # a row's, to a group of the layout
        blocks, strips = -(-in_features // 32), -(-out_features // 8)
        header = 32 * (scales * self.scales_dtype.itemsize + self.zeros)
        superblocks = -(-blocks // (4 * group // 32))
        return strips * (superblocks * header + blocks * 32 * self.bits) + (64 if self.has_global_scale else 0)

    def check_cuda(self) -> None:
        """Raises ``ValueError`` if CUDA kernels do not take weights of this format."""
        if not self.kind.cuda:
            raise ValueError(f"{self.name} weights are for the CPU only; on CUDA taut takes {', '.join(_CUDA)}")

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "per row"
        return f"{self.name} {group}{' with zeros' if self.zeros else ''}"


@dataclass(frozen=True)
class NumberFormat(WeightFormat):
    """Numbers of 16 bits as they are, "fp16" or "bf16": what is kept of a sparse weight that is pruned and not rounded to few bits.

    A format of sparse weights alone (``taut.formats.sparse.SparseFormat``). Raises ``ValueError`` for other names, and for groups.
    """

    name: str = "bf16"

    @classmethod
    def _known(cls) -> dict[str, Kind]:
        return SPARSE_KINDS

    @classmethod
    def of_code(cls, code: int, group_size: int, zeros: bool) -> NumberFormat:
        return cls(next(kind.name for kind in SPARSE_KINDS.values() if kind.code == code), group_size, zeros)

    def codes_of(self, weight: Tensor) -> Tensor:
        """``weight`` (any float dtype) rounded to nearest. Raises ``ValueError`` where it is not finite, or is not any more."""
        codes = weight.to(self.codes_dtype)
        if not bool(codes.isfinite().all()):
            raise ValueError(f"weights that are stored as {self.name} must be finite and at most {self.kind.largest:g} in size")
        return codes

    def __str__(self) -> str:
        return self.name


class Multiplied(Protocol):
    """What is asked of a format here: a ``WeightFormat`` or a ``taut.formats.sparse.SparseFormat``."""

    @property
    def label(self) -> str: ...
    @property
    def activations(self) -> tuple[str, ...]: ...


def check_activations(activations: str, format: Multiplied | None = None) -> None:
    """Raises ``ValueError`` for activations other than "auto" that nobody knows, or that weights of ``format`` do not take."""
    if activations not in ("auto", *ACTIVATIONS):
        raise ValueError(f"unknown activations {activations!r}; accepted: auto, {', '.join(ACTIVATIONS)}")
    if format is not None and activations not in ("auto", *format.activations):
        accepted = ", ".join(("auto", *format.activations))
        raise ValueError(f"{format.label} weights cannot be multiplied with {activations!r} activations; accepted: {accepted}")


def resolve_activations(activations: str, format: Multiplied, device_type: str) -> str:
    """What "auto" means for weights of ``format`` on a device of this type: the fastest that changes results little.

    On the CPU int8, and float for the two 8-bit floats; on CUDA float, since tensor cores multiply 16-bit x with any weight at
    full speed, and so "int8_outliers" is there, which mends what float does not break. Raises ``ValueError`` as ``check_activations``.
    """
    check_activations(activations, format)
    if device_type == "cuda" and activations == "int8_outliers":
        return "float"
    if activations != "auto":
        return activations
    return "int8" if device_type != "cuda" and "int8" in format.activations else "float"


def activation_code(activations: str, format: Multiplied, device_type: str = "cpu") -> int:
    """The integer kernels know an activation mode by. Raises ``ValueError`` as ``check_activations``."""
    return ACTIVATIONS[resolve_activations(activations, format, device_type)]
