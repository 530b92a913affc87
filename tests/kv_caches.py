"""Key-value caches in every format and order of memory, full of bytes that mean NaN; and what their bytes stand for, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.formats.kv import KV_FORMATS, KvFormat
from taut.ops.kv_append import KvCache, kv_append

FORMATS = tuple(KV_FORMATS.values())
FLOATS = tuple(format for format in FORMATS if not format.has_codes)
CODES = tuple(format for format in FORMATS if format.has_codes)
CACHE_ORDERS = ("contiguous", "strided", "paged")


def blank(
    format: KvFormat, batch: int, kv_heads: int, tokens: int, dims: tuple[int, int], order: str = "contiguous",
    page_tokens: int = 32, seed: int = 0,
) -> tuple[KvCache, list[Tensor]]:  # fmt: skip
    """A cache for ``tokens`` a sequence, every byte of it 0xff, and the memory its tensors are views of.

    ``strided``: tokens before heads where there are no codes, heads before pages where there are, and gaps. ``paged``: pages at random,
    more of them than are in the table.
    """
    rows = -(-tokens // 16) if format.has_codes else tokens
    widths = format.row_width(dims[0], False), format.row_width(dims[1], True)
    table, pages = None, batch
    if order == "paged":
        columns = -(-tokens // page_tokens)
        pages, rows = batch * columns + 3, page_tokens // 16 if format.has_codes else page_tokens
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(seed))[: batch * columns].view(batch, columns).to(torch.int32)
    memory, views = [], []
    for width in widths:
        if order != "strided":
            shape, view = (pages, kv_heads, rows, width), lambda t: t
        elif format.has_codes:
            shape, view = (kv_heads + 1, pages + 1, rows + 2, width), lambda t: t.transpose(0, 1)[1:, 1:, 1 : rows + 1]
        else:
            shape, view = (pages, rows + 3, kv_heads + 1, width + 5), lambda t, w=width: t.transpose(1, 2)[:, :-1, 2 : rows + 2, 1 : w + 1]
        memory.append(torch.full((*shape[:3], shape[3] * format.dtype.itemsize), 255, dtype=torch.uint8).view(format.dtype))
        views.append(view(memory[-1]))
    scales = [
        torch.full((pages, kv_heads, 16 * rows, 2), 255, dtype=torch.uint8).view(torch.float16)[..., 0] for _ in range(2 * format.has_codes)
    ]
    return KvCache(format, *dims, *views, *(scales or (None, None)), None, table), memory + scales


def filled(
    k: Tensor, v: Tensor, format: KvFormat, tokens: int | None = None, order: str = "contiguous", channels: Tensor | None = None, **rest
):
    """A cache of ``k [B, Hkv, L, D]`` and ``v [B, Hkv, L, Dv]``, with room for ``tokens``; what is not written stays 0xff."""
    cache, _ = blank(format, *k.shape[:2], k.shape[2] if tokens is None else tokens, (k.shape[3], v.shape[3]), order, **rest)
    cache = cache.with_channels(channels)
    kv_append(k, v, cache)
    return cache


def stored(cache: KvCache, batch: int) -> tuple[Tensor, Tensor]:
    """What is in the cache, channels aside: k ``[B, Hkv, capacity, D]`` and v in float64. ``csrc/common/kv_cache.h``, in plain torch."""
    found = []
    for values, (t, scales, width) in enumerate(((cache.k, cache.k_scales, cache.head_dim), (cache.v, cache.v_scales, cache.value_dim))):
        numbers = t.double()
        if cache.format.has_codes:
            numbers = (codes(cache, bool(values))[..., :width] - (8 if cache.format.bits == 4 else 128)) * scales.double()[..., None]
        found.append(by_sequence(numbers, cache.block_table, batch))
    return found[0], found[1]


def codes(cache: KvCache, values: bool) -> Tensor:
    """``[pages, Hkv, T, D or Dv, with what fills up the last step of a dot product]``: 0 to 15, or 0 to 255."""
    t, bits = cache.v if values else cache.k, cache.format.bits
    pages, heads, blocks, width = t.shape
    if values:  # [groups of tokens][Dv][4]: byte t of a group of 8 has token t low and t + 4 high
        columns = -(-cache.value_dim // 16) * 16
        t = t.reshape(pages, heads, blocks, bits // 2, columns, 4)
        t = torch.stack((t & 15, t >> 4), -2) if bits == 4 else (t ^ 128)[..., None, :]  # [.., group, Dv, half, 4]
        return t.permute(0, 1, 2, 3, 5, 6, 4).reshape(pages, heads, 16 * blocks, columns).double()
    t = t.reshape(pages, heads, blocks, width // 64, 16, 4)  # [groups of d][token][4]
    t = torch.stack((t & 15, t >> 4), -2) if bits == 4 else t[..., None, :]  # [.., group, token, half, 4]
    return t.transpose(3, 4).reshape(pages, heads, 16 * blocks, width * 8 // bits // 16).double()


def by_sequence(t: Tensor, table: Tensor | None, batch: int) -> Tensor:
    """``t [pages, Hkv, T, ...]`` to ``[B, Hkv, capacity, ...]``."""
    if table is None:
        return t
    return t[table.long()].transpose(1, 2).reshape(batch, t.shape[1], -1, *t.shape[3:])


def numbers(cache: KvCache, batch: int) -> tuple[Tensor, Tensor]:
    """What the cache stands for, in float64."""
    k, v = stored(cache, batch)
    if cache.channels is None:
        return k, v
    offsets, factors = cache.channels.double().unbind(2)
    d = cache.head_dim
    return k * factors[:, :, None, :d] + offsets[:, :, None, :d], v * factors[:, :, None, d:] + offsets[:, :, None, d:]
