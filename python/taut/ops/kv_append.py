"""kv_append and kv_read: keys and values into a cache, in its format, and out of it again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import _native
from ..formats.kv import BLOCK_TOKENS, KvFormat, kv_format
from .attention_rules import MOST_HEAD_DIM
from .quant_linear import FLOAT_DTYPES

_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FEW_TOKENS = 32


@dataclass(frozen=True)
class KvCache:
    """One layer's keys and values in memory, as the ops read and write them.

    Without ``block_table``: a page a sequence. With one, int32 ``[B, columns]``: tokens ``T * c`` to ``T * (c + 1)`` of sequence b are in
    page ``block_table[b, c]``, T tokens a page, a multiple of 16. ``k [pages, Hkv, T, D]``, ``v [pages, Hkv, T, Dv]`` in the format's
    dtype; with int8 and int4 uint8 ``[pages, Hkv, T / 16, bytes of a block]``, and ``k_scales``, ``v_scales`` float16 ``[pages, Hkv, T]``.
    ``channels``: float32 ``[B, Hkv, 2, D + Dv]`` or None: offsets, then factors; what is stored of x is ``(x - offset) / factor``.
    """

    format: KvFormat
    head_dim: int
    value_dim: int
    k: Tensor
    v: Tensor
    k_scales: Tensor | None = None
    v_scales: Tensor | None = None
    channels: Tensor | None = None
    block_table: Tensor | None = None

    @classmethod
    def empty(
        cls, format: str | torch.dtype | KvFormat, pages: int, kv_heads: int, tokens: int, head_dim: int, value_dim: int | None = None,
        device: torch.device | str = "cpu",
    ) -> KvCache:  # fmt: skip
        """Uninitialized memory for ``tokens`` a page (rounded up to a multiple of 16 in int8 and int4)."""
        format, value_dim = kv_format(format), head_dim if value_dim is None else value_dim
        if not 1 <= head_dim <= MOST_HEAD_DIM or not 1 <= value_dim <= MOST_HEAD_DIM:
            raise ValueError(f"head dims must be 1 to {MOST_HEAD_DIM}, got {head_dim} and {value_dim}")
        if format.has_codes:
            tokens = -(-tokens // BLOCK_TOKENS) * BLOCK_TOKENS
        rows = tokens // BLOCK_TOKENS if format.has_codes else tokens
        k, v = (
            torch.empty(pages, kv_heads, rows, format.row_width(width, values), dtype=format.dtype, device=device)
            for width, values in ((head_dim, False), (value_dim, True))
        )
        scales = (
            [torch.empty(pages, kv_heads, tokens, dtype=torch.float16, device=device) for _ in range(2)]
            if format.has_codes
            else (None, None)
        )
        return cls(format, head_dim, value_dim, k, v, *scales)

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> KvCache:
        """Keys and values as they are, ``[B, Hkv, tokens, D]``: nothing is copied."""
        return cls(kv_format(k.dtype), k.shape[-1], v.shape[-1], k, v)

    @property
    def page_tokens(self) -> int:
        return self.k.shape[2] * (BLOCK_TOKENS if self.format.has_codes else 1)

    @property
    def capacity(self) -> int:
        """Tokens a sequence."""
        return self.page_tokens * (1 if self.block_table is None else self.block_table.shape[1])

    @property
    def kv_heads(self) -> int:
        return self.k.shape[1]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.k, self.v, self.k_scales, self.v_scales, self.channels) if t is not None)

    def with_channels(self, channels: Tensor | None) -> KvCache:
        return replace(self, channels=channels)

    def tensors(self) -> tuple:
        """As ops take them."""
        return self.k, self.v, self.k_scales, self.v_scales, self.channels, self.block_table, self.format.code

    def check(self, op: str, batch: int) -> None:
        """Raises ``ValueError`` where the tensors are not what the class says, not of ``batch`` sequences, or not on one device."""
        given = {name: getattr(self, name) for name in ("k", "v", "k_scales", "v_scales", "channels", "block_table")}
        _native.device_of(**given)
        format = self.format
        for name, width, values in (("k", self.head_dim, False), ("v", self.value_dim, True)):
            t, last = given[name], format.row_width(width, values)
            if t.dtype != format.dtype or t.dim() != 4 or t.shape[3] != last or t.shape[:3] != self.k.shape[:3]:
                unit = "blocks of 16 tokens" if format.has_codes else "tokens"
                raise ValueError(
                    f"cache.{name} must be {format.dtype} [pages, Hkv, {unit}, {last}] for {format.name}, got {t.dtype} {list(t.shape)}"
                )
            if (last > 1 and t.stride(3) != 1) or (format.has_codes and t.shape[2] > 1 and t.stride(2) != last):
                raise ValueError(f"cache.{name}'s last dimension must be contiguous (the last two of codes), got strides {t.stride()}")
            scales, shape = given[f"{name}_scales"], (*self.k.shape[:2], self.page_tokens)
            if (scales is None) == format.has_codes:
                raise ValueError(f"cache.{name}_scales must be {'given' if format.has_codes else 'None'} for {format.name}")
            if scales is not None and (scales.dtype != torch.float16 or tuple(scales.shape) != shape or not scales.is_contiguous()):
                raise ValueError(f"cache.{name}_scales must be contiguous float16 {list(shape)}, got {scales.dtype} {list(scales.shape)}")
        table, channels = self.block_table, self.channels
        if channels is not None:
            shape = (batch, self.kv_heads, 2, self.head_dim + self.value_dim)
            if channels.dtype != torch.float32 or tuple(channels.shape) != shape or not channels.is_contiguous():
                raise ValueError(f"cache.channels must be contiguous float32 {list(shape)}, got {channels.dtype} {list(channels.shape)}")
        if table is None and self.k.shape[0] != batch:
            raise ValueError(f"the cache must have a page for each of {batch} sequences, got {self.k.shape[0]}")
        if table is not None and (table.dtype != torch.int32 or table.dim() != 2 or table.shape[0] != batch or not table.is_contiguous()):
            raise ValueError(f"block_table must be contiguous int32 [{batch}, columns], got {table.dtype} {list(table.shape)}")
        if table is not None and (self.page_tokens == 0 or self.page_tokens % BLOCK_TOKENS):
            raise ValueError(f"pages must hold a multiple of {BLOCK_TOKENS} tokens, got {self.page_tokens}")


def kv_append(k_new: Tensor, v_new: Tensor, cache: KvCache, start: int = 0, starts: Tensor | None = None) -> None:
    """Stores ``k_new [B, Hkv, L, D]`` and ``v_new [B, Hkv, L, Dv]``, float32, bfloat16 or float16, as tokens ``start`` to ``start + L`` of
    each sequence; with ``starts``, int32 ``[B]``, from ``start + starts[b]`` on.

    A row with a NaN or an infinity is stored as NaN where there are codes. Rounding is to the nearest, ties to even, and the same
    on every processor. Raises ``ValueError`` for wrong shapes, dtypes or devices, for tokens past the capacity, and for pages out of
    range; nothing is written then. On CUDA the values of ``starts`` and of the block table stay on the device (a graph may hold the
    call): tokens before 0, past the capacity, or of a page out of range are not stored there. Codes must begin at multiples of 16 bytes.
    """
    for name, t in (("k_new", k_new), ("v_new", v_new)):
        if t.dim() != 4 or t.dtype not in FLOAT_DTYPES or t.dtype != k_new.dtype:
            raise ValueError(
                f"{name} must be [B, Hkv, L, head dim], float32, bfloat16 or float16, one dtype for both, got {t.dtype} {list(t.shape)}"
            )
        if t.shape[3] > 1 and t.stride(3) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {t.stride()}")
    batch, kv_heads, new, head_dim = k_new.shape
    cache.check("kv_append", batch)
    if (kv_heads, head_dim) != (cache.kv_heads, cache.head_dim) or tuple(v_new.shape) != (batch, kv_heads, new, cache.value_dim):
        raise ValueError(
            f"k_new and v_new must be [B, {cache.kv_heads}, L, {cache.head_dim}] and [B, {cache.kv_heads}, L, {cache.value_dim}], "
            f"got {list(k_new.shape)} and {list(v_new.shape)}"
        )
    device = _native.device_of(k_new=k_new, v_new=v_new, k=cache.k, starts=starts)
    _check_span(cache, start, new)
    check_counts("starts", starts, batch)
    k, v, *rest, format = cache.tensors()
    raising_values("kv_append", _native.ops_for(device.type).kv_append, k_new, v_new, k, v, *rest, format, start, starts)


@torch.library.register_fake("taut::kv_append")
def _fake(
    k_new: Tensor, v_new: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, channels: Tensor | None,
    block_table: Tensor | None, kv_format: int, start: int, starts: Tensor | None,
) -> None:  # fmt: skip
    return None


def kv_read(cache: KvCache, batch: int, start: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Tokens ``start`` to ``start + length`` as numbers: k ``[B, Hkv, length, D]`` and v ``[B, Hkv, length, Dv]`` of ``dtype``.

    Raises ``ValueError`` as ``kv_append`` does. On CUDA tokens of a page out of range are read as NaN.
    """
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    cache.check("kv_read", batch)
    _check_span(cache, start, length)
    call = (*cache.tensors(), batch, cache.head_dim, cache.value_dim, start, length, _DTYPE_CODES[dtype])
    return raising_values("kv_read", _native.ops_for(cache.k.device.type).kv_read, *call)


@torch.library.register_fake("taut::kv_read")
def _fake_read(
    k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, channels: Tensor | None, block_table: Tensor | None,
    kv_format: int, batch: int, head_dim: int, value_dim: int, start: int, length: int, dtype: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape, kind = (batch, k.shape[1], length), FLOAT_DTYPES[dtype]
    return k.new_empty((*shape, head_dim), dtype=kind), k.new_empty((*shape, value_dim), dtype=kind)


def _check_span(cache: KvCache, start: int, length: int) -> None:
    if start < 0 or length < 0 or start + length > cache.capacity:
        raise ValueError(f"tokens {start} to {start + length} do not fit the cache, which holds {cache.capacity}")


def check_counts(name: str, counts: Tensor | None, batch: int) -> None:
    if counts is not None and (counts.dtype != torch.int32 or tuple(counts.shape) != (batch,) or not counts.is_contiguous()):
        raise ValueError(f"{name} must be contiguous int32 [{batch}], got {counts.dtype} {list(counts.shape)}")


def raising_values(name: str, op, *call):
    """Calls an op that looks at the values of tensors (lengths, pages), which are not read under torch.compile: there, not here."""
    try:
        return op(*call)
    except RuntimeError as error:
        message = str(error).splitlines()[0]
        if not message.startswith(f"{name}: "):
            raise
        raise ValueError(message) from None


def kv_channels(k: Tensor, v: Tensor) -> Tensor:
    """Offsets and factors for a cache from the first keys ``[B, Hkv, L, D]`` and values ``[B, Hkv, L, Dv]`` it will hold: float32
    ``[B, Hkv, 2, D + Dv]``.

    The offset is the middle of a channel's range, the factor half of the range, but at least a quarter of the mean of all channels:
    a channel that happened to be constant must not take all codes of a later token. With few tokens the range includes 0.
    """
    parts = []
    for t in (k, v):
        low, high = t.float().aminmax(dim=2)
        if t.shape[2] < _FEW_TOKENS:
            low, high = low.clamp(max=0), high.clamp(min=0)
        factor = (high - low) / 2
        floor = factor.mean(-1, keepdim=True) / 4
        factor = factor.maximum(torch.where(floor > 0, floor, 1.0))
        parts.append(torch.stack(((high + low) / 2, factor), dim=2))
    channels = torch.cat(parts, dim=-1)
    # A NaN or an infinity would spoil every later token.
    return torch.stack((channels[:, :, 0].nan_to_num(0.0, 0.0, 0.0), channels[:, :, 1].nan_to_num(1.0, 1.0, 1.0)), dim=2)


def reference(x: Tensor, format: KvFormat, offsets: Tensor | None = None, factors: Tensor | None = None) -> Tensor:
    """What is read of rows ``x [..., width]`` once stored, in float64."""
    if not format.has_codes and offsets is None:
        return (x.float().clamp(-448, 448) if format.name == "fp8" else x.float()).to(format.dtype).double()
    y = x.float() if offsets is None else (x.float() - offsets) / factors
    if not format.has_codes:
        stored = (y.clamp(-448, 448) if format.name == "fp8" else y).to(format.dtype).double()
    else:
        low, high = y.amin(-1, keepdim=True).clamp(max=0), y.amax(-1, keepdim=True).clamp(min=0)
        scale = (torch.maximum(high / 7, low / -8) if format.bits == 4 else torch.maximum(high, -low) / 127).clamp(max=65504).half()
        inverse = torch.where(scale != 0, 1 / scale.float(), 0.0)
        most = (-8, 7) if format.bits == 4 else (-127, 127)
        stored = (y * inverse).clamp(*most).round().double() * scale.double()
        stored = torch.where(y.isfinite().all(-1, keepdim=True), stored, torch.nan)
    return stored if offsets is None else stored * factors.double() + offsets.double()


def cost(format: KvFormat, batch: int, kv_heads: int, tokens: int, head_dim: int, value_dim: int, element_bytes: int = 4) -> dict[str, int]:
    """Counted work of storing ``tokens``: what is read and what is written; four flops a number."""
    numbers = batch * kv_heads * tokens * (head_dim + value_dim)
    written = batch * kv_heads * tokens * format.token_bytes(head_dim, value_dim)
    return {"flops": 4 * numbers, "bytes": int(numbers * element_bytes + written)}
