"""attention_decode: softmax attention of a few queries against a key-value cache, read in the format it is stored in."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats.kv import KvFormat
from . import attention_rules as rules
from .fused_linear import refuse_backward
from .kv_append import KvCache, check_counts, kv_read, raising_values
from .quant_linear import FLOAT_DTYPES


def attention_decode(
    q: Tensor, cache: KvCache, keys: int | None = None, lengths: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = True, window: int = 0, softcap: float = 0.0, mask: Tensor | None = None, s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None, tokens_first: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``q [B, Hq, Lq, D]`` against the first ``keys`` tokens of ``cache`` (None: its capacity) to ``out [B, Hq, Lq, Dv]`` in the dtype of
    q and ``lse``, float32 ``[B, Hq, Lq]``. ``lengths``, int32 ``[B]``: how many tokens each sequence has, at most ``keys``. Query i has the
    position ``lengths[b] - Lq + i``: with ``causal``, the queries are the newest tokens, which are in the cache by then.

    The rules (``softmax_scale``, ``window``, ``softcap``, ``mask`` broadcastable to ``[B, Hq, Lq, keys]``, ``s_aux``,
    ``alibi_slopes``), ``lse`` and ``tokens_first`` are those of ``attention_prefill``. It computes with the numbers that the cache
    stands for. On the CPU those of int8 and int4 are multiplied as integers: q is rounded to 14 bits of a row's largest element (8
    beside int4), the weights to 14 bits of the largest in a tile of keys. CUDA multiplies in float32, or, on tensor cores, q and the
    weights as two 16-bit floats each: 22 bits of a row's largest element and of the largest weight of 64 keys; beside bfloat16, 16 bits.
    The number of threads changes no bits, and the rest of the batch none of a sequence's. Without a backward.
    Raises ``ValueError`` for wrong shapes, dtypes, strides or devices, lengths beyond ``keys``, and pages out of range, before any is read.
    On CUDA the values of ``lengths`` and of the block table stay on the device (a graph may hold the call): a length counts as the
    nearest from 0 to ``keys``, and a page out of range hides its keys. Codes must begin at multiples of 16 bytes there.
    """
    if q.dim() != 4 or q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be [B, Hq, Lq, head dim], float32, bfloat16 or float16, got {q.dtype} {list(q.shape)}")
    if q.shape[3] > 1 and q.stride(3) != 1:
        raise ValueError(f"q's last dimension must be contiguous, got strides {q.stride()}")
    batch, q_heads, queries, head_dim = q.shape
    if head_dim != cache.head_dim:
        raise ValueError(f"q must be [B, Hq, Lq, {cache.head_dim}] beside this cache, got {list(q.shape)}")
    cache.check("attention_decode", batch)
    device = _native.device_of(q=q, k=cache.k, lengths=lengths, mask=mask, s_aux=s_aux, alibi_slopes=alibi_slopes)
    keys = cache.capacity if keys is None else keys
    if not 0 <= keys <= cache.capacity:
        raise ValueError(f"keys must be 0 to {cache.capacity}, what the cache holds, got {keys}")
    check_counts("lengths", lengths, batch)
    rules.check_heads(q_heads, cache.kv_heads, head_dim, cache.value_dim)
    scale = rules.check_rules(head_dim, q_heads, q.dtype, softmax_scale, window, softcap, s_aux, alibi_slopes)
    rules.check_mask(mask, (batch, q_heads, queries, keys), q.dtype)
    call = (q, *cache.tensors(), cache.value_dim, keys, lengths, scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first)
    return raising_values("attention_decode", _native.ops_for(device.type).attention_decode, *call)


@torch.library.register_fake("taut::attention_decode")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, k_scales: Tensor | None, v_scales: Tensor | None, channels: Tensor | None,
    block_table: Tensor | None, kv_format: int, value_dim: int, keys: int, lengths: Tensor | None, softmax_scale: float, causal: bool,
    window: int, softcap: float, mask: Tensor | None, s_aux: Tensor | None, alibi_slopes: Tensor | None, tokens_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_heads, queries = q.shape[:3]
    lse = q.new_empty((batch, q_heads, queries), dtype=torch.float32)
    if tokens_first:
        return q.new_empty((batch, queries, q_heads, value_dim)).transpose(1, 2), lse
    return q.new_empty((batch, q_heads, queries, value_dim)), lse


refuse_backward("attention_decode")


def reference(
    q: Tensor, cache: KvCache, keys: int | None = None, lengths: Tensor | None = None, softmax_scale: float | None = None,
    causal: bool = True, window: int = 0, softcap: float = 0.0, mask: Tensor | None = None, s_aux: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in float64, sequence by sequence, of the numbers the cache stands for (``kv_read``)."""
    keys, scale = cache.capacity if keys is None else keys, q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    k, v = kv_read(cache, q.shape[0], 0, keys)
    parts = []
    for b in range(q.shape[0]):
        length = keys if lengths is None else int(lengths[b])
        seen = mask
        if mask is not None:
            seen = mask.broadcast_to(*q.shape[:3], keys)[b : b + 1, ..., :length]
        one = slice(b, b + 1)
        parts.append(
            rules.reference(q[one], k[one, :, :length], v[one, :, :length], scale, causal, window, softcap, seen, s_aux, alibi_slopes)
        )
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def cost(
    format: KvFormat, batch: int, q_heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, value_dim: int
) -> dict[str, int]:
    """Counted work of one call: two flops for each element of the two products; the cache's bytes once."""
    return {
        "flops": 2 * batch * q_heads * queries * keys * (head_dim + value_dim),
        "bytes": int(batch * kv_heads * keys * format.token_bytes(head_dim, value_dim)),
    }
