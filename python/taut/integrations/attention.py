"""transformers: the attention function and the mask function named "taut", for ``model.set_attn_implementation("taut")``.

What a call asks is computed by taut's ops where they can compute it, training included, and by torch where not: dropout, weights that
are asked for, other devices and dtypes. The result is the same up to rounding, with one difference: a query to which every key is
hidden gets zeros, where a mask of booleans hides them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import create_position_bias_mask, repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from ..nn import attention as own
from .kv_cache import Held, Part

NAME = "taut"  # WHY no "flash" in it: transformers gives functions with that in their name no masks


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor | Part, value: Tensor | Part, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    is_causal: bool | None = None, position_bias: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None, output_attentions: bool | None = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``query [B, Hq, Lq, D]``, ``key [B, Hkv, Lk, D]``, ``value [B, Hkv, Lk, Dv]`` to ``[B, Lq, Hq, Dv]``, and with
    ``output_attentions`` the weights ``[B, Hq, Lq, Lk]``.

    ``key`` and ``value`` may be what a ``taut.Cache`` holds. ``attention_mask``, bool (True: visible) or additive, says who sees whom.
    Without one, where ``is_causal`` (None: the module's) and there are several queries: keys up to a query's own position, and
    within ``sliding_window``. ``position_bias`` is added to the scores, ``s_aux [Hq]`` is one more score without a value.
    ``cu_seq_lens_q`` and ``cu_seq_lens_k``, ``[S + 1]``: where each of several sequences begins that lie end to end, row of the batch
    after row. Each attends to itself alone, causal and within the window as above, and to no more than a mask allows.
    """
    key, value, held = _held(key, value)
    if torch.is_autocast_enabled(query.device.type):  # as it does for SDPA
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (t.to(dtype) if isinstance(t, Tensor) else t for t in (query, key, value))
    queries, mask = query.shape[2], attention_mask
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    sinks = s_aux if s_aux is None or s_aux.dtype in (query.dtype, torch.float32) else s_aux.to(query.dtype)
    cap = softcap or 0.0
    if held is not None and held.exact is not None:
        key, value = held.exact
        keys, held = key.shape[2], None
        if mask is not None and mask.shape[-1] > keys:  # made for all that a static cache may come to hold
            mask = mask[..., :keys]
        if position_bias is not None and position_bias.shape[-1] > keys:
            position_bias = position_bias[..., :keys]
    ends = None if cu_seq_lens_q is None or cu_seq_lens_k is None else (_ends(cu_seq_lens_q), _ends(cu_seq_lens_k))
    if ends is not None:
        if held is not None:
            (key, value), held = held.tensors(), None
        window = sliding_window or 0
        if mask is not None:
            mask = _mask_of_sequences(*ends, query, key.shape[2], is_causal, window, mask)
        if mask is None and dropout == 0.0 and not output_attentions and position_bias is None and own.takes(query, key, value):
            return own.attend_sequences(query, key, value, *ends, scale, is_causal, window, cap, sinks), None
        if mask is None:
            mask = _mask_of_sequences(*ends, query, key.shape[2], is_causal, window)
    causal = is_causal and mask is None
    if held is not None:
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
    if dropout == 0.0 and not output_attentions and own.takes_mask(mask, query, keys) and not _followed(mask):
        if held is not None and not _followed(query, key, value) and own.takes_cache(query, held.cache):
            return held.attend(query, scale, causal, window, cap, mask, sinks), None
        if held is None and own.takes(query, key, value) and not (causal and queries > keys):
            return own.attend(query, key, value, scale, causal and queries > 1, window, cap, mask, sinks), None
    if held is not None:
        key, value = held.tensors()
        if causal and held.lengths is not None:
            mask = _visible(held.lengths, queries, keys, window)
            causal, window = False, 0
    if causal and (window or 1 < queries < keys):
        mask, causal = _causal_mask(queries, keys, window, query.device), False
    if cap or sinks is not None or output_attentions:
        out, weights = _plain(module, query, key, value, mask, causal, dropout, scale, cap, sinks)
        return out, weights if output_attentions else None
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, is_causal=causal, **kwargs)


def _held(key: Tensor | Part, value: Tensor | Part) -> tuple[Tensor | Part, Tensor | Part, Held | None]:
    """What a cache holds, where these are its keys and its values. A model may have made something else of one of them."""
    if isinstance(key, Part) and isinstance(value, Part) and key.held is value.held and (key.index, value.index) == (0, 1):
        return key, value, key.held
    return *(t.tensor() if isinstance(t, Part) else t for t in (key, value)), None


def _followed(*tensors: Tensor | Part | None) -> bool:
    """Whether a gradient flows to one of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _ends(cu_seq_lens: Tensor) -> Tensor:
    return cu_seq_lens.to(torch.int32).contiguous()


def _mask_of_sequences(
    ends_q: Tensor, ends_k: Tensor, query: Tensor, keys: int, causal: bool, window: int, mask: Tensor | None = None
) -> Tensor | None:
    """Who sees whom where sequences lie end to end, ``[B, 1, Lq, keys]``, within ``mask``; None if that hides nothing more."""
    (batch, _, queries, _), device = query.shape, query.device
    ends_q, ends_k = ends_q.to(device), ends_k.to(device)
    owner_q, owner_k = (
        torch.searchsorted(ends, torch.arange(batch * count, device=device), right=True).view(batch, count) - 1
        for ends, count in ((ends_q, queries), (ends_k, keys))
    )
    rows, columns = (torch.arange(batch * count, device=device).view(batch, count) for count in (queries, keys))
    last = ends_q.shape[0] - 1
    # Positions count back from the end of a sequence, where its queries and its keys meet.
    from_q, from_k = (ends[1:][owner.clamp(max=last - 1)] - at for ends, owner, at in ((ends_q, owner_q, rows), (ends_k, owner_k, columns)))
    distance = from_k[:, None, :] - from_q[:, :, None]
    seen = (owner_q[:, :, None] == owner_k[:, None, :]) & (owner_q[:, :, None] < last)
    if causal:
        seen &= distance >= 0
    if window:
        seen &= distance.abs() < window
    seen = seen[:, None]
    if mask is None:
        return seen
    if mask.dtype != torch.bool:
        return mask.masked_fill(~seen, torch.finfo(mask.dtype).min)
    both = mask & seen
    # WHY look: transformers makes such a mask itself where position_ids tell sequences apart, and the op for sequences needs none.
    return None if not torch.compiler.is_compiling() and torch.equal(both, seen.expand_as(both)) else both


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
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What SDPA cannot do: softcap, sinks, and weights to look at, by torch."""
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
    return (weights @ v).transpose(1, 2).contiguous(), weights


def _accept_in_continuous_batching() -> None:
    """Has ``model.generate_batch`` take models that attend by this function.

    Its manager asks for one of a few names, though nothing else depends on them: keys and values come gathered from the paged cache,
    with ``cu_seq_lens_q`` and ``cu_seq_lens_k`` in place of a mask.
    """
    manager = getattr(sys.modules.get("transformers.generation.continuous_batching.continuous_api"), "ContinuousBatchingManager", None)
    check = getattr(manager, "switch_to_cb_friendly_attn", None)
    if check is None:  # a transformers that has no such check
        return

    def switch_to_cb_friendly_attn(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation != NAME:
            check(self, model, *args, **kwargs)

    manager.switch_to_cb_friendly_attn = switch_to_cb_friendly_attn


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
_accept_in_continuous_batching()
