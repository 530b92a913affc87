"""Which op attends: the one place where the number of queries decides between reading keys in tiles and streaming them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats.kv import KV_FORMATS
from ..ops import attention_decode, attention_prefill, kv_append  # noqa: F401  (they say what their ops do where shapes are only traced)
from ..ops.attention_rules import MOST_HEAD_DIM
from ..ops.kv_append import KvCache
from ..ops.quant_linear import FLOAT_DTYPES

# Rows are queries times the heads that share a key head. From so many on attention_prefill's tiles are full and it is faster (measured
# at 64 and 1024 keys: 6 and 16 rows); below, attention_decode, which is never slower than SDPA.
_FEWEST_PREFILL_ROWS = 12
# From so many on, turning all of a cache into floats costs less than attention_decode, which does it again for every few rows.
_FEWEST_READ_ROWS = 512
_FLOAT_CODES = {format.dtype: format.code for format in KV_FORMATS.values() if format.dtype in FLOAT_DTYPES}
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as kv_read takes them


def rows_of(q: Tensor, kv_heads: int) -> int:
    return q.shape[2] * (q.shape[1] // kv_heads)


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the ops take these: ``q [B, Hq, Lq, D]``, ``k [B, Hkv, Lk, D]``, ``v [B, Hkv, Lk, Dv]``."""
    return (
        q.device.type == k.device.type == v.device.type == "cpu" and q.dtype == k.dtype == v.dtype and q.dtype in DTYPE_CODES
        and q.dim() == k.dim() == v.dim() == 4 and q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]
        and _takes_heads(q, k.shape[1], k.shape[3], v.shape[3])
    )  # fmt: skip


def takes_cache(q: Tensor, cache: KvCache) -> bool:
    return q.device.type == "cpu" and q.dtype in DTYPE_CODES and _takes_heads(q, cache.kv_heads, cache.head_dim, cache.value_dim)


def _takes_heads(q: Tensor, kv_heads: int, head_dim: int, value_dim: int) -> bool:
    known = 1 <= head_dim <= MOST_HEAD_DIM and 1 <= value_dim <= MOST_HEAD_DIM
    return known and q.shape[3] == head_dim and q.shape[1] % kv_heads == 0


def takes_mask(mask: Tensor | None, q: Tensor, keys: int) -> bool:
    """Whether the ops take ``mask``: bool or additive, 4-dimensional and broadcastable to ``[B, Hq, Lq, keys]``."""
    if mask is None:
        return True
    if mask.device.type != "cpu" or mask.dim() != 4 or mask.dtype not in (torch.bool, torch.float32, q.dtype):
        return False
    # WHY not `in (1, size)`: under torch.compile a size may be a symbol
    return all(size == 1 or size == full for size, full in zip(mask.shape, (*q.shape[:3], keys), strict=True))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, window: int = 0, softcap: float = 0.0,
    mask: Tensor | None = None, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``attention_prefill``'s attention of what ``takes`` and ``takes_mask`` let pass, as ``[B, Lq, Hq, Dv]``, by the faster op."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    if rows_of(q, k.shape[1]) >= _FEWEST_PREFILL_ROWS:
        out, _ = torch.ops.taut.attention_prefill(q, k, v, scale, causal, window, softcap, mask, s_aux, None, True)
    else:
        out, _ = torch.ops.taut.attention_decode(
            q, k, v, None, None, None, None, _FLOAT_CODES[k.dtype], v.shape[3], k.shape[2], None, scale, causal, window, softcap,
            mask, s_aux, None, True,
        )  # fmt: skip
    return out.transpose(1, 2)


def attend_cache(
    q: Tensor, cache: KvCache, keys: int, lengths: Tensor | None, scale: float, causal: bool = False, window: int = 0,
    softcap: float = 0.0, mask: Tensor | None = None, s_aux: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``attention_decode``'s attention, as ``[B, Lq, Hq, Dv]``; of many rows against floats read from the cache.

    ``causal`` is taken by the op as it is where there are ``lengths``, which only attention_decode reads.
    """
    q = q if q.stride(3) == 1 else q.contiguous()
    if lengths is None and rows_of(q, cache.kv_heads) >= _FEWEST_READ_ROWS:
        k, v = read(cache, q.shape[0], keys, q.dtype)
        return attend(q, k, v, scale, causal, window, softcap, mask, s_aux)
    out, _ = torch.ops.taut.attention_decode(
        q, *cache.tensors(), cache.value_dim, keys, lengths, scale, causal, window, softcap, mask, s_aux, None, True
    )
    return out.transpose(1, 2)


def read(cache: KvCache, batch: int, keys: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first ``keys`` tokens of ``cache`` as numbers of ``dtype``."""
    return torch.ops.taut.kv_read(*cache.tensors(), batch, cache.head_dim, cache.value_dim, 0, keys, DTYPE_CODES[dtype])
