"""What stored weights mean: one descriptor per low-bit format.

The canonical form (the only one on disk) is row-major; see ``csrc/common/formats.h``, which every kernel reads:

* ``codes``: int4 ``uint8 [N, ceil(K/2)]``, low nibble = even k; int8 ``int8 [N, K]``; fp8_e4m3 ``float8_e4m3fn [N, K]``
* ``scales``: ``float16 [N, ceil(K/G)]``
* ``zeros``: ``uint8 [N, ceil(K/G)]``, int4 with zeros only
* value: int4 ``(q - z) * s`` with q in 0..15, z = 8 where there are no zeros; int8 and fp8_e4m3 ``q * s``
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZES = (32, 64, 128, 0)
FORMATS = {"int4": 4, "int8": 8, "fp8_e4m3": 9}  # and the integers kernels know them by
# How x enters the product, and the integers kernels know that by: as it is; int8, one scale per row and 32 k; int8 or
# float8 E4M3, one scale per row.
ACTIVATIONS = {"float": 0, "int8": 1, "int8_row": 2, "fp8_row": 3}
# What the weights of a format can be multiplied with, besides "auto".
ACCEPTED_ACTIVATIONS = {"int4": ("float", "int8"), "int8": ("float", "int8", "int8_row"), "fp8_e4m3": ("float", "fp8_row")}


@dataclass(frozen=True)
class WeightFormat:
    """A low-bit weight format: ``name`` ("int4", "int8", "fp8_e4m3"), ``group_size`` (32, 64, 128; 0 = one scale a row), ``zeros``.

    Raises ``ValueError`` for anything else.
    """

    name: str = "int4"
    group_size: int = 32
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ValueError(f"unknown weight format {self.name!r}; accepted: {', '.join(FORMATS)}")
        if isinstance(self.group_size, bool) or self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {self.group_size!r} does not fit; accepted: 32, 64, 128, or 0 for one scale a row")
        if self.zeros not in (True, False):
            raise ValueError(f"zeros must be True or False, got {self.zeros!r}")
        if self.zeros and self.name != "int4":
            raise ValueError(f"zeros=True is for int4 only; {self.name} is symmetric")

    @classmethod
    def of_code(cls, code: int, group_size: int, zeros: bool) -> WeightFormat:
        """The format as kernels are told of it."""
        return cls(next(name for name, known in FORMATS.items() if known == code), group_size, zeros)

    @property
    def code(self) -> int:
        """The integer kernels know the format by."""
        return FORMATS[self.name]

    @property
    def bits(self) -> int:
        return 4 if self.name == "int4" else 8

    @property
    def codes_dtype(self) -> torch.dtype:
        return {"int4": torch.uint8, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}[self.name]

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == 0 else -(-in_features // self.group_size)

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (out_features, -(-in_features // 2) if self.name == "int4" else in_features)

    def canonical_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes, scales and zeros for a weight ``[out_features, in_features]``."""
        rows, columns = self.codes_shape(out_features, in_features)
        return rows * columns + out_features * self.num_groups(in_features) * (3 if self.zeros else 2)

    def layout_bytes(self, out_features: int, in_features: int, layout: int = 0) -> int:
        """Bytes of the same weight in a layout of ``csrc/common/formats.h``, padding and headers included: 0 Rows8, 1 MmaTiles."""
        if layout == 1:
            tiles_n, tiles_k = -(-out_features // 64), -(-in_features // 64)
            scales = tiles_n * 64 * self.num_groups(tiles_k * 64)
            return tiles_n * tiles_k * 64 * 64 * self.bits // 8 + scales * (3 if self.zeros else 2)
        group = self.group_size or 128
        blocks, strips = -(-in_features // 32), -(-out_features // 8)
        superblocks = -(-blocks // (4 * group // 32))
        return strips * (superblocks * (96 if self.zeros else 64) + blocks * 32 * self.bits)

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "per row"
        return f"{self.name} {group}{' with zeros' if self.zeros else ''}"


def check_activations(activations: str, format: WeightFormat | None = None) -> None:
    """Raises ``ValueError`` for activations other than "auto" that nobody knows, or that weights of ``format`` do not take."""
    if activations not in ("auto", *ACTIVATIONS):
        raise ValueError(f"unknown activations {activations!r}; accepted: auto, {', '.join(ACTIVATIONS)}")
    if format is not None and activations not in ("auto", *ACCEPTED_ACTIVATIONS[format.name]):
        accepted = ", ".join(("auto", *ACCEPTED_ACTIVATIONS[format.name]))
        raise ValueError(f"{format.name} weights cannot be multiplied with {activations!r} activations; accepted: {accepted}")


def resolve_activations(activations: str, format: WeightFormat, device_type: str) -> str:
    """What "auto" means for weights of ``format`` on a device of this type: the fastest that changes results little.

    On the CPU int8, and float for fp8_e4m3; on CUDA float, since tensor cores multiply 16-bit x with any weight at full speed.
    Raises ``ValueError`` as ``check_activations``.
    """
    check_activations(activations, format)
    if activations != "auto":
        return activations
    return "float" if device_type == "cuda" or format.name == "fp8_e4m3" else "int8"


def activation_code(activations: str, format: WeightFormat, device_type: str = "cpu") -> int:
    """The integer kernels know an activation mode by. Raises ``ValueError`` as ``check_activations``."""
    return ACTIVATIONS[resolve_activations(activations, format, device_type)]
