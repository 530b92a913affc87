"""decoder_layers: a whole stack of decoder layers for a few new tokens, in one call, with nothing of Python between the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import fused_linear as linear_op
from . import rms_norm as norm_op
from . import split_rope as rope_op
from .fused_linear import PROLOGUES
from .quant_linear import FLOAT_DTYPES

MOST_TOKENS = 16  # new ones a sequence
# What `weights` holds of each layer, in this order; an empty tensor where a model has none.
WEIGHTS = (
    "attn_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias", "attn_post_norm",
    "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "mlp_post_norm",
)  # fmt: skip
LINEARS = ("qkv", "o", "gate_up", "down")
SIZES = ("q_heads", "kv_heads", "head_dim", "hidden", "intermediate", "glu")
NUMBERS = ("norm_eps", "norm_offset", "attn_scale", "attn_softcap", "qk_norm_eps", "attn_multiplier", "residual_multiplier")


def decoder_layers(
    x: Tensor, cos: Sequence[Tensor], sin: Sequence[Tensor], mask: Tensor | None, keys: Sequence[Tensor], values: Sequence[Tensor],
    weights: Sequence[Tensor], sizes: Sequence[int], layers: Sequence[int], numbers: Sequence[float],
) -> Tensor:  # fmt: skip
    """Runs ``x [B, T, H]``, at most 16 new tokens a sequence, through a stack of decoder layers; gives the state after the last.

    A layer: ``x += post_norm(o(attention(qkv(norm(x)))))``, then ``x += post_norm(down(glu(gate_up(norm(x)))))``, each norm an
    RMS norm or absent. Its matmuls are ``fused_linear``'s, its rotation ``split_rope``'s; attention is causal softmax attention with
    grouped queries, in float32. The new keys and values are written to the caches in place: the op returns nothing else.

    ``cos``, ``sin``: rope tables ``[B or 1, T, R]`` (see ``split_rope``), which the layers choose from. ``mask``: None, or uint8 or
    bool ``[B, L]``: 0 hides a key. Its last column belongs to the last new token. A query that sees no key gets zeros.
    ``keys``, ``values``: for each layer ``[B, Hkv, capacity, D]``, last two dimensions contiguous, in the dtype of x or float32:
    rows ``begin`` to ``length`` hold the past, the new ones go to ``length`` and on. ``weights``: for each layer the 14 of
    ``WEIGHTS``, matmuls packed by ``pack_weight`` (``qkv`` are the rows of q, k and v stacked, ``gate_up`` those of gate and up).
    ``sizes``: ``SIZES``, glu as in ``fused_linear.PROLOGUES``. ``layers``: for each 20 numbers: (format code, group_size, zeros,
    activations) of each of ``LINEARS``; then the index of its rope table, ``begin``, ``length``, and ``window`` (0: none; else a query
    sees itself and the window - 1 keys before it). ``numbers``: ``NUMBERS``; scores are ``q . k * attn_scale * attn_multiplier``,
    with ``attn_softcap`` c > 0 they become ``c tanh(score / c)``; ``residual_multiplier`` scales what is added to x.

    On the CPU only, and without a backward. The number of threads changes no bits; the other sequences change none of a sequence's
    as long as ``quant_linear`` runs the same impl for that many rows.
    Raises ``ValueError`` before anything is written if a shape, dtype, device, count or range is wrong.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("decoder_layers has no backward: call it in torch.no_grad(), or train through the unfused modules")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    linear_op.check_on_cpu("decoder_layers", x=x)
    arguments = list(cos), list(sin), mask, list(keys), list(values), list(weights), list(sizes), list(layers), list(numbers)
    try:
        return torch.ops.taut.decoder_layers(x, *arguments)
    except RuntimeError as error:
        if not str(error).startswith("decoder_layers: ") or "forced impl" in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from None


@torch.library.register_fake("taut::decoder_layers")
def _fake(
    x: Tensor, cos: Sequence[Tensor], sin: Sequence[Tensor], mask: Tensor | None, keys: Sequence[Tensor], values: Sequence[Tensor],
    weights: Sequence[Tensor], sizes: Sequence[int], layers: Sequence[int], numbers: Sequence[float],
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape)


def attention_reference(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float) -> Tensor:
    """``q [B, Hq, T, D]``, ``k``, ``v [B, Hkv, L, D]``, ``visible [B, T, L]`` to ``[B, T, Hq D]``, in float64."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~visible[:, None], -torch.inf), -1).nan_to_num(0.0)
    return (weights @ v).transpose(1, 2).flatten(2)


def visible_keys(tokens: int, begin: int, length: int, window: int, mask: Tensor | None, batch: int) -> Tensor:
    """Which rows ``begin`` to ``length + tokens`` of a cache each new token sees: bool ``[B, T, L]``."""
    query, key = torch.arange(length, length + tokens)[:, None], torch.arange(begin, length + tokens)
    visible = (key <= query) & (key > query - window if window else torch.tensor(True))
    visible = visible.expand(batch, -1, -1)
    return visible if mask is None else visible & mask[:, None, mask.shape[1] - len(key) :].bool()


def reference(
    x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, k: Tensor, v: Tensor, w: Mapping[str, Tensor | None],
    sizes: Mapping[str, int], numbers: Mapping[str, float], begin: int, length: int, window: int, activations: str = "float",
) -> Tensor:  # fmt: skip
    """One layer in float64. ``w``: dense weights by the names of ``WEIGHTS``, None where absent. Writes the new rows of ``k`` and ``v``."""
    eps, offset, end = numbers["norm_eps"], numbers["norm_offset"], length + x.shape[1]

    def norm(t: Tensor, name: str) -> Tensor:
        return t if w[name] is None else norm_op.reference(t, w[name], eps, offset)

    def linear(t: Tensor, name: str) -> Tensor:
        return linear_op.reference(t.flatten(0, 1), w[name], w[f"{name}_bias"], None, activations).unflatten(0, t.shape[:2])

    heads = sizes["q_heads"], sizes["kv_heads"], sizes["head_dim"]
    qkv = linear(norm(x.double(), "attn_norm"), "qkv")
    q, new_k, new_v = rope_op.reference(qkv, *rope, *heads, w["q_norm"], w["k_norm"], numbers["qk_norm_eps"], offset)
    k[:, :, length:end], v[:, :, length:end] = new_k, new_v
    visible = visible_keys(x.shape[1], begin, length, window, mask, x.shape[0])
    scale = numbers["attn_scale"] * numbers["attn_multiplier"]
    attended = attention_reference(q, k[:, :, begin:end], v[:, :, begin:end], visible, scale, numbers["attn_softcap"])
    x = x + numbers["residual_multiplier"] * norm(linear(attended, "o"), "attn_post_norm")
    glu = next(name for name, code in PROLOGUES.items() if code == sizes["glu"])
    gated = linear_op.prologue_reference(linear(norm(x, "mlp_norm"), "gate_up"), glu)
    return x + numbers["residual_multiplier"] * norm(linear(gated, "down"), "mlp_post_norm")


def cost(
    batch: int, tokens: int, context: int, sizes: Mapping[str, int], weight_bytes: int, cache_element_bytes: int = 4
) -> dict[str, int]:
    """Counted work of one layer with ``context`` visible keys a query: multiply-adds as 2 flops; weights, keys and values read once."""
    q_width, kv_width = (sizes[name] * sizes["head_dim"] for name in ("q_heads", "kv_heads"))
    products = sizes["hidden"] * (2 * q_width + 2 * kv_width + 3 * sizes["intermediate"]) + 2 * q_width * context
    return {"flops": 2 * batch * tokens * products, "bytes": weight_bytes + 2 * batch * context * kv_width * cache_element_bytes}
