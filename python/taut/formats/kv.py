"""What the numbers of a key-value cache are stored as. ``csrc/common/kv_cache.h`` says where each byte lies.

``float32``, ``bfloat16``, ``float16``, ``fp8`` (e4m3 of the OCP's 8-bit formats, arXiv 2209.05433; past 448 it saturates): as they are.
``int8``: codes of -127 to 127 times a float16 scale for each token and head. ``int4``: codes of -8 to 7. Keys and values may have offsets
and factors by channel (KIVI, arXiv 2402.02750, found that keys have channels that are large for every token).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_TOKENS = 16  # of codes, which lie interleaved


@dataclass(frozen=True)
class KvFormat:
    """``bits`` a number, without its scale; ``dtype`` of the tensors that hold it."""

    name: str
    code: int
    bits: int
    dtype: torch.dtype

    @property
    def has_codes(self) -> bool:
        return self.name in ("int8", "int4")

    def row_width(self, head_dim: int, values: bool) -> int:
        """The last dimension of a tensor of this format: of a token, or with codes of a block of 16."""
        if not self.has_codes:
            return head_dim
        if values:
            return -(-head_dim // 16) * 16 * (16 * self.bits // 8)
        return -(-head_dim // (32 // self.bits)) * 64

    def token_bytes(self, head_dim: int, value_dim: int) -> float:
        """Stored bytes of a token and key head, scales included."""
        if not self.has_codes:
            return (head_dim + value_dim) * self.bits / 8
        return (self.row_width(head_dim, False) + self.row_width(value_dim, True)) / BLOCK_TOKENS + 4


KV_FORMATS = {
    format.name: format
    for format in (
        KvFormat("float32", 0, 32, torch.float32), KvFormat("bfloat16", 1, 16, torch.bfloat16), KvFormat("float16", 2, 16, torch.float16),
        KvFormat("fp8", 3, 8, torch.float8_e4m3fn), KvFormat("int8", 4, 8, torch.uint8), KvFormat("int4", 5, 4, torch.uint8),
    )
}  # fmt: skip


def kv_format(name: str | torch.dtype | KvFormat) -> KvFormat:
    """The format of this name, or that stores numbers of this dtype. Raises ``ValueError`` for others."""
    if isinstance(name, KvFormat):
        return name
    known = KV_FORMATS.get(str(name).removeprefix("torch."))
    if known is None:
        raise ValueError(f"a cache holds {', '.join(KV_FORMATS)}, got {name!r}")
    return known
