"""What stored weights mean: one descriptor per low-bit format.

The canonical form (the only one on disk) is row-major; see ``csrc/common/formats.h``, which every kernel reads:

* ``codes``: int4 ``uint8 [N, ceil(K/2)]``, low nibble = even k; int8 ``int8 [N, K]``
* ``scales``: ``float16 [N, ceil(K/G)]``
* ``zeros``: ``uint8 [N, ceil(K/G)]``, int4 with zeros only
* value: int4 ``(q - z) * s`` with q in 0..15, z = 8 where there are no zeros; int8 ``q * s``
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

GROUP_SIZES = (32, 64, 128, 0)
ACTIVATIONS = {"float": 0, "int8": 1}


@dataclass(frozen=True)
class WeightFormat:
    """A low-bit weight format: ``name`` ("int4" or "int8"), ``group_size`` (32, 64, 128; 0 = one scale a row), ``zeros``.

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
            raise ValueError("zeros=True is for int4 only; int8 is symmetric")

    @property
    def code(self) -> int:
        """The integer kernels know the format by: the bits a code takes."""
        return FORMATS[self.name]

    @property
    def bits(self) -> int:
        return FORMATS[self.name]

    @property
    def codes_dtype(self) -> torch.dtype:
        return torch.uint8 if self.name == "int4" else torch.int8

    def num_groups(self, in_features: int) -> int:
        return 1 if self.group_size == 0 else -(-in_features // self.group_size)

    def codes_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        return (out_features, -(-in_features // 2) if self.name == "int4" else in_features)

    def canonical_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of codes, scales and zeros for a weight ``[out_features, in_features]``."""
        rows, columns = self.codes_shape(out_features, in_features)
        return rows * columns + out_features * self.num_groups(in_features) * (3 if self.zeros else 2)

    def layout_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the same weight in the Rows8 layout of ``csrc/common/formats.h`` (padding and headers included)."""
        group = self.group_size or 128
        blocks, strips = -(-in_features // 32), -(-out_features // 8)
        superblocks = -(-blocks // (4 * group // 32))
        return strips * (superblocks * (96 if self.zeros else 64) + blocks * (128 if self.name == "int4" else 256))

    def __str__(self) -> str:
        group = f"group {self.group_size}" if self.group_size else "per row"
        return f"{self.name} {group}{' with zeros' if self.zeros else ''}"


FORMATS = {"int4": 4, "int8": 8}


def activation_code(activations: str) -> int:
    """The integer kernels know an activation mode by. Raises ``ValueError`` for an unknown one."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}; accepted: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[activations]
