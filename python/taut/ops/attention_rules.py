"""What every attention op means by its arguments: the checks, and the float64 reference."""

from __future__ import annotations

from math import isfinite

import torch
from torch import Tensor

from .quant_linear import FLOAT_DTYPES

MOST_HEAD_DIM = 256


def reference(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False, window: int = 0, softcap: float = 0.0,
    mask: Tensor | None = None, s_aux: Tensor | None = None, alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention in float64: ``q [B, Hq, Lq, D]``, ``k [B, Hkv, Lk, D]``, ``v [B, Hkv, Lk, Dv]`` to out and lse.

    ``mask``: bool or additive, broadcastable to ``[B, Hq, Lq, Lk]``. Query i has the position ``i + Lk - Lq``.
    """
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q.double() @ k.mT * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(q.shape[2])[:, None] + (k.shape[2] - q.shape[2]) - torch.arange(k.shape[2])
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.double()[:, None, None] * distance.abs()
    visible = (distance >= 0 if causal else distance == distance) & (distance.abs() < window if window else distance == distance)
    if mask is not None:
        scores = scores if mask.dtype == torch.bool else scores + mask.double()
        visible = visible & (mask if mask.dtype == torch.bool else mask > -torch.inf)
    scores = scores.masked_fill(~visible, -torch.inf)
    sinks = torch.full((q.shape[1],), -torch.inf) if s_aux is None else s_aux
    lse = torch.logsumexp(torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)), -1), -1)
    weights = torch.where(visible, torch.exp(scores - lse[..., None]), 0.0)
    return weights @ v, lse


def visible_pairs(queries: int, keys: int, causal: bool, window: int) -> int:
    """How many pairs of query and key causality and the window leave."""
    pairs = 0
    for i in range(queries):
        position = i + keys - queries
        first = max(0, position - window + 1) if window else 0
        end = min(keys, position + 1) if causal else min(keys, position + window) if window else keys
        pairs += max(0, end - first)
    return pairs


def check_call(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, window: int, softcap: float, mask: Tensor | None,
    s_aux: Tensor | None, alibi_slopes: Tensor | None,
) -> float:  # fmt: skip
    """Raises ``ValueError`` unless ``q [B, Hq, Lq, D]``, ``k``, ``v`` and the rules fit each other; gives the scale."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise ValueError(f"{name} must be [B, heads, length, head dim], got {list(t.shape)}")
    check_dtypes(q, k, v)
    batch, q_heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    if tuple(k.shape) != (batch, kv_heads, keys, head_dim):
        raise ValueError(f"k must be [{batch}, Hkv, Lk, {head_dim}] beside q {list(q.shape)}, got {list(k.shape)}")
    if tuple(v.shape[:3]) != (batch, kv_heads, keys):
        raise ValueError(f"v must be [{batch}, {kv_heads}, {keys}, Dv] beside k {list(k.shape)}, got {list(v.shape)}")
    check_heads(q_heads, kv_heads, head_dim, v.shape[3])
    scale = check_rules(head_dim, q_heads, q.dtype, softmax_scale, window, softcap, s_aux, alibi_slopes)
    check_mask(mask, (batch, q_heads, queries, keys), q.dtype)
    return scale


def check_rules(
    head_dim: int, q_heads: int, dtype: torch.dtype, softmax_scale: float | None, window: int, softcap: float,
    s_aux: Tensor | None, alibi_slopes: Tensor | None,
) -> float:  # fmt: skip
    """Raises ``ValueError`` for rules no attention op takes; gives the scale, ``head_dim ** -0.5`` where none is set."""
    if softmax_scale is not None and not isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if window < 0:
        raise ValueError(f"window must be 0 (none) or positive, got {window}")
    if not 0 <= softcap or not isfinite(softcap):
        raise ValueError(f"softcap must be 0 (none) or positive and finite, got {softcap}")
    for name, values in (("s_aux", s_aux), ("alibi_slopes", alibi_slopes)):
        if values is not None and (tuple(values.shape) != (q_heads,) or values.dtype not in (dtype, torch.float32)):
            raise ValueError(f"{name} must be {dtype} or float32 [{q_heads}], got {values.dtype} {list(values.shape)}")
    return head_dim**-0.5 if softmax_scale is None else float(softmax_scale)


def check_dtypes(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in FLOAT_DTYPES:
        raise ValueError(f"q must be float32, bfloat16 or float16, got {q.dtype}")
    for name, t in (("k", k), ("v", v)):
        if t.dtype != q.dtype:
            raise ValueError(f"{name} must have the dtype of q, {q.dtype}, got {t.dtype}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {t.stride()}")


def check_heads(q_heads: int, kv_heads: int, head_dim: int, value_dim: int) -> None:
    if q_heads < 1 or kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"the heads of q must be a multiple of those of k and v, got {q_heads} and {kv_heads}")
    if not 1 <= head_dim <= MOST_HEAD_DIM or not 1 <= value_dim <= MOST_HEAD_DIM:
        raise ValueError(f"head dims must be 1 to {MOST_HEAD_DIM}, got {head_dim} of q and k, {value_dim} of v")


def check_mask(mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """``mask`` must broadcast to ``shape``, ``[B, Hq, Lq, Lk]``."""
    if mask is None:
        return
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(f"mask must be bool (True: visible), float32 or {dtype} (added to the scores), got {mask.dtype}")
    wrong = mask.dim() > 4 or any(size not in (1, full) for size, full in zip(mask.shape[::-1], shape[::-1], strict=False))
    if wrong:
        raise ValueError(f"mask must be broadcastable to [B, Hq, Lq, Lk] = {list(shape)}, got {list(mask.shape)}")
