"""attention_prefill: softmax attention of many queries at once, without the matrix of scores in memory (arXiv 2205.14135)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from . import attention_rules as rules
from .attention_backward import differentiable


def attention_prefill(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, window: int = 0, softcap: float = 0.0,
    mask: Tensor | None = None, s_aux: Tensor | None = None, alibi_slopes: Tensor | None = None, tokens_first: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``q [B, Hq, Lq, D]``, ``k [B, Hkv, Lk, D]``, ``v [B, Hkv, Lk, Dv]`` to ``out [B, Hq, Lq, Dv]`` in the dtype of q, and
    ``lse``, float32 ``[B, Hq, Lq]``. Hq is any multiple of Hkv; query head h reads key head ``h // (Hq // Hkv)``. D and Dv: 1 to 256.
    Strides are free but for the last dimension; nothing is copied.

    ``score = q . k * softmax_scale`` (None: ``D ** -0.5``), with ``softcap`` c > 0 then ``c * tanh(score / c)``, minus
    ``alibi_slopes [Hq]`` times the distance, plus ``mask`` where that is additive. ``out`` is the sum of v weighted by the softmax
    over the visible keys; ``s_aux [Hq]``, an attention sink, is one more score that no value belongs to. ``lse`` is the log of
    what the softmax divides by, the sink included.

    Who sees whom: query i has the position ``i + Lk - Lq`` (aligned to the last key), key j the position j. ``causal``: keys up to
    its own position; where Lq > Lk, the first queries then see none. ``window`` w > 0: keys less than w away. ``mask``: bool (True:
    visible) or float32 or the dtype of q (added; -inf hides), broadcastable to ``[B, Hq, Lq, Lk]``, never expanded. A hidden key is as
    if it were not there: NaN and infinities in its k and v do not matter. A query that sees no key gets zeros, and the sink or -inf as lse.

    ``tokens_first``: out lies in memory as ``[B, Lq, Hq, Dv]``, so that ``out.transpose(1, 2)`` is contiguous. Float32 inside: bf16 and
    fp16 are multiplied exactly and rounded once at the end; units for 16-bit products (CUDA's tensor cores, AVX-512 BF16) also have the
    weights of the values rounded to the dtype of q. The number of threads changes no bits, and the other sequences and heads none of a
    row's. Differentiable, once, in q, k, v and s_aux, by out and lse (``attention_backward``); a mask or slopes that require a
    gradient raise ``NotImplementedError``.
    Raises ``ValueError`` for wrong shapes, dtypes, strides or devices.
    """
    device = _native.device_of(q=q, k=k, v=v, mask=mask, s_aux=s_aux, alibi_slopes=alibi_slopes)
    scale = rules.check_call(q, k, v, softmax_scale, window, softcap, mask, s_aux, alibi_slopes)
    ops = _native.ops_for(device.type)
    return ops.attention_prefill(q, k, v, scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first)


@torch.library.register_fake("taut::attention_prefill")
def _fake(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool, window: int, softcap: float,
    mask: Tensor | None, s_aux: Tensor | None, alibi_slopes: Tensor | None, tokens_first: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, q_heads, queries = q.shape[:3]
    lse = q.new_empty((batch, q_heads, queries), dtype=torch.float32)
    if tokens_first:
        return q.new_empty((batch, queries, q_heads, v.shape[3])).transpose(1, 2), lse
    return q.new_empty((batch, q_heads, queries, v.shape[3])), lse


differentiable("attention_prefill", 3)


def attention_prefill_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float | None = None,
    causal: bool = False, window: int = 0, softcap: float = 0.0, s_aux: Tensor | None = None, alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sequences laid end to end: ``q [Tq, Hq, D]``, ``k [Tk, Hkv, D]``, ``v [Tk, Hkv, Dv]`` to ``out [Tq, Hq, Dv]`` and ``lse [Hq, Tq]``.

    ``cu_seqlens_q``, ``cu_seqlens_k``: int32 ``[S + 1]``, where each of S sequences begins, from 0 on, and the end of the last: queries
    ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]`` attend to the keys of the same s alone. Rows past the last sequence get zeros and -inf.
    On the CPU, or where q is, which costs CUDA a wait: the host reads them.
    The rest as in ``attention_prefill``, which gives the same bits for each sequence alone. Raises ``ValueError`` as there, and for
    ends that fall, or lie past the end of q or k.
    """
    device = _native.device_of(q=q, k=k, v=v, s_aux=s_aux, alibi_slopes=alibi_slopes)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 3:
            raise ValueError(f"{name} must be [tokens, heads, head dim], got {list(t.shape)}")
    rules.check_dtypes(q, k, v)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k must be [Tk, Hkv, {q.shape[2]}] beside q {list(q.shape)}, got {list(k.shape)}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(f"v must be [{k.shape[0]}, {k.shape[1]}, Dv] beside k {list(k.shape)}, got {list(v.shape)}")
    rules.check_heads(q.shape[1], k.shape[1], q.shape[2], v.shape[2])
    scale = rules.check_rules(q.shape[2], q.shape[1], q.dtype, softmax_scale, window, softcap, s_aux, alibi_slopes)
    for name, ends in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if ends.dtype != torch.int32 or ends.dim() != 1 or ends.shape[0] < 1 or ends.device not in (device, torch.device("cpu")):
            where = "the CPU" if device.type == "cpu" else f"the CPU or {device}"
            raise ValueError(f"{name} must be int32 [S + 1] on {where}, got {ends.dtype} {list(ends.shape)} on {ends.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be of one length, got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}")
    call = (q, k, v, cu_seqlens_q, cu_seqlens_k, scale, causal, window, softcap, s_aux, alibi_slopes)
    try:
        return _native.ops_for(device.type).attention_prefill_varlen(*call)
    except RuntimeError as error:  # WHY there: the values of a tensor are not read under torch.compile
        if "cu_seqlens" not in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from None


@torch.library.register_fake("taut::attention_prefill_varlen")
def _fake_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, softmax_scale: float, causal: bool, window: int,
    softcap: float, s_aux: Tensor | None, alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


differentiable("attention_prefill_varlen", 5)


def reference(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, window: int = 0, softcap: float = 0.0,
    mask: Tensor | None = None, s_aux: Tensor | None = None, alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The definition in float64; NaN in a hidden v does matter here, as 0 times it is NaN."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return rules.reference(q, k, v, scale, causal, window, softcap, mask, s_aux, alibi_slopes)


def cost(
    batch: int, q_heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, value_dim: int, causal: bool = False,
    window: int = 0, element_bytes: int = 4,
) -> dict[str, int]:  # fmt: skip
    """Counted work of one call: two flops for each element of the two products that is visible; each tensor's bytes once."""
    pairs = rules.visible_pairs(queries, keys, causal, window)
    elements = q_heads * queries * (head_dim + value_dim) + kv_heads * keys * (head_dim + value_dim)
    return {
        "flops": 2 * batch * q_heads * pairs * (head_dim + value_dim),
        "bytes": batch * (elements * element_bytes + q_heads * queries * 4),
    }
