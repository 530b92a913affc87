"""split_rope: a fused q, k, v projection to heads, with their norms and rotary positions (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_linear import check_norm_weight, check_on_cpu, refuse_backward
from .quant_linear import FLOAT_DTYPES


def split_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int, head_dim: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6, norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``qkv [B, T, (Hq + 2 Hkv) D]`` to ``q [B, Hq, T, D]``, ``k`` and ``v [B, Hkv, T, D]``, contiguous, in the dtype of qkv.

    ``cos``, ``sin [B or 1, T, R]``: R <= D even, in the dtype of qkv or float32. The first R elements of each head of q and k turn
    as in Llama: ``x * cos + rotate_half(x) * sin`` with ``rotate_half(x) = cat(-x[R/2:], x[:R/2])``; the others stay.
    ``q_norm``, ``k_norm [D]``: the weights of an RMS norm of each head of q and k before that (Qwen3, Gemma 3), with ``norm_eps``
    and ``norm_offset`` (1 in Gemma). Float32 inside, rounded once. On the CPU only, and without a backward.
    Raises ``ValueError`` for wrong shapes, dtypes or devices.
    """
    check_on_cpu("split_rope", qkv=qkv, cos=cos, sin=sin, q_norm=q_norm, k_norm=k_norm)
    if qkv.dtype not in FLOAT_DTYPES:
        raise ValueError(f"qkv must be float32, bfloat16 or float16, got {qkv.dtype}")
    if min(q_heads, kv_heads, head_dim) < 1:
        raise ValueError(f"q_heads, kv_heads and head_dim must be positive, got {q_heads}, {kv_heads} and {head_dim}")
    width = (q_heads + 2 * kv_heads) * head_dim
    if qkv.dim() != 3 or qkv.shape[2] != width:
        raise ValueError(f"qkv must be [B, T, {width}], got {list(qkv.shape)}")
    check_rope(cos, sin, *qkv.shape[:2], head_dim, qkv.dtype)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_norm_weight(name, weight, head_dim, qkv.dtype)
    return torch.ops.taut.split_rope(qkv, cos, sin, q_heads, kv_heads, head_dim, q_norm, k_norm, norm_eps, norm_offset)


def check_rope(cos: Tensor, sin: Tensor, batch: int, tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    rotated = cos.shape[2] if cos.dim() == 3 else -1
    if cos.dim() != 3 or cos.shape[0] not in (1, batch) or cos.shape[1] != tokens or rotated % 2 or rotated > head_dim:
        raise ValueError(f"cos must be [{batch} or 1, {tokens}, R] with R even and at most {head_dim}, got {list(cos.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"sin must have the shape of cos, {list(cos.shape)}, got {list(sin.shape)}")
    if cos.dtype not in (dtype, torch.float32) or sin.dtype != cos.dtype:
        raise ValueError(f"cos and sin must both be {dtype} or both float32, got {cos.dtype} and {sin.dtype}")


@torch.library.register_fake("taut::split_rope")
def _fake(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int, head_dim: int,
    q_norm: Tensor | None, k_norm: Tensor | None, norm_eps: float, norm_offset: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens = qkv.shape[:2]
    heads = (q_heads, kv_heads, kv_heads)
    return tuple(qkv.new_empty((batch, count, tokens, head_dim)) for count in heads)


refuse_backward("split_rope")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x [B, H, T, D]`` turned by ``cos``, ``sin [B or 1, T, R]``, in the dtype of x."""
    rotated = cos.shape[-1]
    turning, rest = x[..., :rotated], x[..., rotated:]
    half = torch.cat((-turning[..., rotated // 2 :], turning[..., : rotated // 2]), dim=-1)
    return torch.cat((turning * cos[:, None].to(x.dtype) + half * sin[:, None].to(x.dtype), rest), dim=-1)


def reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_heads: int, kv_heads: int, head_dim: int,
    q_norm: Tensor | None = None, k_norm: Tensor | None = None, norm_eps: float = 1e-6, norm_offset: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The definition in float64."""
    heads = qkv.double().unflatten(-1, (-1, head_dim)).transpose(1, 2)
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)
    normed = []
    for x, weight in ((q, q_norm), (k, k_norm)):
        if weight is not None:
            x = x * torch.rsqrt((x**2).mean(-1, keepdim=True) + norm_eps) * (norm_offset + weight.double())
        normed.append(rotate(x, cos, sin))
    return *normed, v


def cost(batch: int, tokens: int, q_heads: int, kv_heads: int, head_dim: int, element_bytes: int = 4) -> dict[str, int]:
    """Counted work of one call without norms: three flops a turned element; each element read and written once."""
    turned, all_heads = q_heads + kv_heads, q_heads + 2 * kv_heads
    return {
        "flops": 3 * batch * tokens * turned * head_dim,
        "bytes": 2 * batch * tokens * all_heads * head_dim * element_bytes,
    }
