"""transformers: the attention function and the mask function named "taut", for ``model.set_attn_implementation("taut")``.

What a call asks is computed by taut's ops where they can compute it, and by torch where not: gradients, dropout, other devices and
dtypes. The result is the same up to rounding, with one difference: a query to which every key is hidden gets zeros, where a mask of
booleans hides them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ..nn import attention as own
from .kv_cache import Part

NAME = "taut"  # WHY no "flash" in it: transformers gives functions with that in their name no masks


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor | Part, value: Tensor | Part, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    is_causal: bool | None = None, position_bias: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """``query [B, Hq, Lq, D]``, ``key [B, Hkv, Lk, D]``, ``value [B, Hkv, Lk, Dv]`` to ``[B, Lq, Hq, Dv]`` and None.

    ``key`` and ``value`` may be what a ``taut.Cache`` holds. ``attention_mask``, bool (True: visible) or additive, says who sees whom.
    Without one, where ``is_causal`` (None: the module's) and there are several queries: keys up to a query's own position, and
    within ``sliding_window``. ``position_bias`` is added to the scores, ``s_aux [Hq]`` is one more score without a value.
    """
    queries, mask = query.shape[2], attention_mask
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(is_causal) and mask is None
    held = key.held if isinstance(key, Part) else None
    if held is not None and held.exact is not None:
        key, value = held.exact
        keys, held = key.shape[2], None
        if mask is not None and mask.shape[3] > keys:  # made for all that a static cache may come to hold
            mask = mask[..., :keys]
        if position_bias is not None and position_bias.shape[3] > keys:
            position_bias = position_bias[..., :keys]
    elif held is not None:
        keys = held.keys
    else:
        keys = key.shape[2]
        if causal and 1 < queries < keys:  # SDPA's meaning: the first tokens of a static cache, which are the queries' own
            key, value, keys = key[:, :, :queries], value[:, :, :queries], queries
            position_bias = None if position_bias is None else position_bias[..., :queries]
    window = sliding_window if causal and sliding_window is not None and sliding_window < keys else 0
    if position_bias is not None:
        if causal and queries > keys:
            return sdpa_attention_forward(module, query, key, value, None, dropout, scale, is_causal=True, position_bias=position_bias)
        if causal and (queries > 1 or window):
            mask, causal, window = _causal_mask(queries, keys, window, query.device), False, 0
        mask = create_position_bias_mask(position_bias, mask, False, query, key)
    cap = softcap or 0.0
    sinks = s_aux if s_aux is None or s_aux.dtype in (query.dtype, torch.float32) else s_aux.to(query.dtype)
    plain = dropout == 0.0 and not kwargs.get("output_attentions") and not _followed(query, key, value, mask, sinks)
    if plain and own.takes_mask(mask, query, keys):
        if held is not None and own.takes_cache(query, held.cache):
            return own.attend_cache(query, held.cache, keys, held.lengths, scale, causal, window, cap, mask, sinks), None
        if held is None and own.takes(query, key, value) and not (causal and queries > keys):
            return own.attend(query, key, value, scale, causal and queries > 1, window, cap, mask, sinks), None
    if held is not None:
        key, value = held.tensors()
        if causal and held.lengths is not None:
            mask = _visible(held.lengths, queries, keys, window)
            causal, window = False, 0
    if causal and (window or 1 < queries < keys):
        mask, causal = _causal_mask(queries, keys, window, query.device), False
    if cap or sinks is not None:
        return _plain(module, query, key, value, mask, causal, dropout, scale, cap, sinks), None
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=causal, **kwargs)


def _followed(*tensors: Tensor | Part | None) -> bool:
    """Whether autograd or autocast have a part in what is computed of these."""
    if torch.is_autocast_enabled("cpu"):
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _causal_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Bool ``[1, 1, queries, keys]``; the queries are the newest tokens."""
    distance = torch.arange(queries, device=device)[:, None] + (keys - queries) - torch.arange(keys, device=device)
    seen = distance >= 0
    return (seen & (distance < window) if window else seen)[None, None]


def _visible(lengths: Tensor, queries: int, keys: int, window: int) -> Tensor:
    """The same where sequence b has ``lengths[b]`` tokens: ``[B, 1, queries, keys]``."""
    distance = lengths[:, None, None] - queries + torch.arange(queries)[:, None] - torch.arange(keys)
    seen = distance >= 0
    return (seen & (distance < window) if window else seen)[:, None]


def _plain(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, dropout: float, scale: float, softcap: float,
    s_aux: Tensor | None,
) -> Tensor:  # fmt: skip
    """What SDPA cannot do: softcap and sinks, by torch."""
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal and q.shape[2] > 1:
        mask = _causal_mask(q.shape[2], k.shape[2], 0, q.device)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        scores = torch.cat((scores, s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)), -1)
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
    weights = nn.functional.dropout(weights if s_aux is None else weights[..., :-1], dropout, module.training)
    return (weights @ v).transpose(1, 2).contiguous()


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
