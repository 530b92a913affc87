"""Named inputs of the attention ops: a set that covers every pair of settings (lengths and mask, head dim and dtype, ...)."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import DTYPE_CODES, DTYPES, covering_set

MASKS = ("none", "bool", "bool_heads", "left_padding", "right_padding", "additive", "additive_heads", "additive_fp32", "hides_all")
ORDERS = ("contiguous", "tokens_first", "padded")  # how q, k and v lie in memory


@dataclass(frozen=True)
class AttentionCase:
    """One call: ``q [B, Hq, Lq, D]``, ``k [B, Hkv, Lk, D]``, ``v [B, Hkv, Lk, Dv]``; ``spread``: how large scores are."""

    heads: tuple[int, int] = (4, 2)
    lengths: tuple[int, int] = (33, 33)
    dims: tuple[int, int] = (64, 64)
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int = 0
    softcap: float = 0.0
    mask: str = "none"
    sinks: bool = False
    alibi: bool = False
    order: str = "contiguous"
    batch: int = 1
    spread: float = 1.0

    def __str__(self) -> str:
        flags = "-".join(name for name in ("causal", "sinks", "alibi") if getattr(self, name))
        sizes = f"B{self.batch}_H{self.heads[0]}.{self.heads[1]}_L{self.lengths[0]}.{self.lengths[1]}_D{self.dims[0]}.{self.dims[1]}"
        rest = f"w{self.window}-cap{self.softcap:g}-{self.mask}-{self.order}-x{self.spread:g}"
        return f"{sizes}-{str(self.dtype).removeprefix('torch.')}-{flags}-{rest}"

    @property
    def seed(self) -> int:
        """The same on every machine and in every process, and printed by a failing check."""
        return zlib.crc32(str(self).encode())

    def sizes(self) -> dict[str, int]:
        """What ``taut.explain("attention_prefill", ...)`` takes."""
        names = ("Hq", "Hkv", "Lq", "Lk", "D", "Dv", "B", "dtype")
        sizes = dict(zip(names, (*self.heads, *self.lengths, *self.dims, self.batch, DTYPE_CODES[self.dtype]), strict=True))
        rules = bool(self.softcap) or self.alibi or self.mask != "none"
        aligned = self.order != "padded" and not any(dim % 8 for dim in self.dims)
        return {**sizes, "rules": int(rules), "aligned": int(aligned)}

    def make(self) -> dict[str, Tensor | float | int | bool | None]:
        """The arguments of ``attention_prefill``, by name."""
        generator = torch.Generator().manual_seed(self.seed)
        (q_heads, kv_heads), (queries, keys), (head_dim, value_dim) = self.heads, self.lengths, self.dims

        def heads(count: int, length: int, width: int, scale: float = 1.0) -> Tensor:
            values = (torch.randn(self.batch, count, length, width, generator=generator) * scale).to(self.dtype)
            return laid_out(values, self.order)

        slopes = 2.0 ** -torch.arange(1, q_heads + 1).mul(8 / q_heads) if self.alibi else None
        return {
            "q": heads(q_heads, queries, head_dim, self.spread), "k": heads(kv_heads, keys, head_dim),
            "v": heads(kv_heads, keys, value_dim), "softmax_scale": head_dim**-0.5, "causal": self.causal, "window": self.window,
            "softcap": self.softcap, "mask": self.make_mask(generator),
            "s_aux": torch.randn(q_heads, generator=generator) if self.sinks else None, "alibi_slopes": slopes,
        }  # fmt: skip

    def make_mask(self, generator: torch.Generator) -> Tensor | None:
        (queries, keys), heads = self.lengths, self.heads[0]
        row = torch.arange(keys)
        seen = torch.rand(self.batch, 1, queries, keys, generator=generator) < 0.7
        match self.mask:
            case "none":
                return None
            case "bool":
                return seen.transpose(2, 3).contiguous().transpose(2, 3)  # keys are not what is contiguous
            case "bool_heads":
                return torch.rand(self.batch, heads, queries, keys, generator=generator) < 0.5
            case "left_padding" | "right_padding":
                pads = torch.arange(1, self.batch + 1)[:, None] * (keys // (self.batch + 2))
                return (row >= pads if self.mask == "left_padding" else row < keys - pads)[:, None, None]
            case "hides_all":
                return torch.zeros(queries, keys, dtype=torch.bool)
        bias = torch.randn(self.batch, heads if self.mask == "additive_heads" else 1, queries, keys, generator=generator)
        bias = bias.masked_fill(~seen, -torch.inf if self.mask != "additive_heads" else -30.0)
        return bias if self.mask == "additive_fp32" else bias.to(self.dtype)


def laid_out(values: Tensor, order: str) -> Tensor:
    """``values [B, H, L, D]`` in the memory order ``order``; what lies between its rows is NaN."""
    if order == "contiguous":
        return values
    if order == "tokens_first":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, length, width = values.shape
    wide = torch.full((batch, heads, length + 3, width + 5), float("nan"), dtype=values.dtype)
    wide[:, :, 2 : length + 2, 1 : width + 1] = values
    return wide[:, :, 2 : length + 2, 1 : width + 1]


_HEADS = ((1, 1), (4, 4), (8, 2), (9, 3), (5, 1), (14, 2))
_LENGTHS = ((1, 1), (1, 70), (3, 3), (17, 17), (64, 64), (130, 130), (5, 200), (70, 20), (33, 100), (150, 331))
_DIMS = ((64, 64), (40, 40), (80, 80), (96, 96), (112, 112), (128, 128), (256, 256), (64, 32), (72, 104), (1, 1), (33, 7), (192, 128))
CASES = tuple(
    AttentionCase(*row)
    for row in covering_set(
        (_HEADS, _LENGTHS, _DIMS, DTYPES, (False, True), (0, 1, 16, 90), (0.0, 5.0), MASKS, (False, True), (False, True), ORDERS, (1, 3))
    )
)
LONG = (
    AttentionCase((6, 2), (700, 700), (64, 64)),
    AttentionCase((2, 1), (600, 1100), (128, 128), torch.bfloat16),
    AttentionCase((3, 3), (520, 520), (96, 96), torch.float16, window=130),
    AttentionCase((2, 1), (400, 900), (40, 40), causal=False, mask="bool"),
    AttentionCase((2, 2), (400, 900), (64, 64), torch.bfloat16, False, mask="left_padding", batch=2),
)
# For the emulator, where long cases take too long: every setting again, with at most two row blocks and up to seven tiles of keys.
_SHORT_HEADS, _SHORT_LENGTHS = (
    ((1, 1), (4, 2), (5, 1), (3, 3)),
    ((1, 1), (3, 3), (1, 200), (40, 20), (19, 100), (27, 140), (24, 221), (30, 30)),
)
SHORT = tuple(
    AttentionCase(*row)
    for row in covering_set(
        (
            _SHORT_HEADS,
            _SHORT_LENGTHS,
            _DIMS,
            DTYPES,
            (False, True),
            (0, 1, 16, 90),
            (0.0, 5.0),
            MASKS,
            (False, True),
            (False, True),
            ORDERS,
            (1, 2),
        )
    )
)
# Of what Hopper's kernel takes: more tiles of keys than its ring holds, window edges inside and between tiles, one row block and several.
PLAIN = tuple(
    case
    for heads, lengths, dims, dtype, causal, window, sinks, order, batch in covering_set(
        (
            ((1, 1), (4, 2), (5, 1), (2, 2)), ((1, 1), (1, 200), (3, 3), (40, 20), (130, 130), (9, 641), (40, 700), (27, 300)),
            ((64, 64), (40, 40), (128, 128), (64, 32), (72, 104), (96, 96)), (torch.bfloat16, torch.float16),
            (False, True), (0, 1, 16, 150, 256), (False, True), ("contiguous", "tokens_first"), (1, 2),
        )
    )
    for case in (AttentionCase(heads, lengths, dims, dtype, causal, window, 0.0, "none", sinks, False, order, batch),)
)  # fmt: skip
# Scores of ten thousand, and of all the same: no overflow, and one key takes all, or none.
EXTREMES = tuple(
    replace(AttentionCase((4, 2), (60, 150), (64, 64), dtype, spread=spread), softcap=cap)
    for dtype in DTYPES for spread, cap in ((1e4, 0.0), (0.0, 0.0), (1e4, 30.0), (1e-30 if dtype == torch.float32 else 1e-4, 0.0))
)  # fmt: skip
