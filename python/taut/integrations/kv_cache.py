"""``taut.Cache``: a key-value cache of transformers that holds keys and values in low bits, and attends to them as they are.

``update`` of its layers gives the attention function named "taut" a ``Part`` in place of a tensor, which says where what is held lies
(``Held``). Every other attention function gets floats, read from the cache for each token: correct, and slower.

What int8 and int4 hold is turned first: keys and values times a Hadamard matrix, which spreads a channel that is large over all of
them, so that the scale of a token fits all its numbers (QuaRot, arXiv 2404.00456). Queries are turned the same way and what comes out is
turned back; no score changes. Keys are held less their mean over the prompt. In four bits that changes a model's answers by less than
half of what a factor for each channel does (KL divergence of SmolLM2 135M 0.04 instead of 0.10). And it asks little of the prompt: the
ranges of a prompt of one token say nothing of those of later ones, and with factors from them eight bits were as bad as four.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..formats.kv import BLOCK_TOKENS, KV_FORMATS, KvFormat
from ..nn import attention as own
from ..ops.kv_append import KvCache, kv_channels
from .growing_cache import LEAST_ROOM, MOST_ROOM, GrowingLayer, GrowingSlidingLayer


class _NoGradient(torch.autograd.Function):
    """``held`` as it is, with a backward that refuses: what is stored has no gradient, and must not pass for a constant."""

    @staticmethod
    def forward(ctx, held: Tensor, source: Tensor) -> Tensor:
        return held.view_as(held)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("keys and values that a taut.Cache holds have no backward: train without a cache")


# A turn mixes at least so many channels; head dims that no greater power of two divides are held as they are.
_LEAST_TURNED = 16
# A mean of the first tokens is taken for that of later ones as if so many more had been zero.
_ZERO_TOKENS = 16


class Turn(NamedTuple):
    """Orthogonal matrices ``[D, D]`` and ``[Dv, Dv]``, each its own inverse, that multiply keys and values before they are held."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, head_dim: int, value_dim: int) -> Turn | None:
        if any(width & -width < _LEAST_TURNED for width in (head_dim, value_dim)):
            return None
        make = _hadamard.__wrapped__ if torch.compiler.is_compiling() else _hadamard  # WHY: no tensor of a traced graph may stay
        return cls(make(head_dim), make(value_dim))

    def apply(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k.float() @ self.keys, v.float() @ self.values

    def offsets(self, k: Tensor, v: Tensor) -> Tensor:
        """What a cache is given as ``channels`` where it will hold turned keys and values: offsets of the keys, and no factors."""
        tokens = k.shape[2]
        mean = (k.float().sum(2) / (tokens + _ZERO_TOKENS)).nan_to_num(0.0, 0.0, 0.0) @ self.keys
        offsets = torch.cat((mean, mean.new_zeros(*mean.shape[:2], v.shape[3])), 2)
        return torch.stack((offsets, torch.ones_like(offsets)), 2)


@functools.cache
def _hadamard(width: int) -> Tensor:
    """Sylvester's matrix of the largest power of two that divides ``width``, along the diagonal, with rows of length 1."""
    with torch.inference_mode(False):
        block, size = torch.ones(1, 1), width & -width
        while block.shape[0] < size:
            block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
        return torch.block_diag(*[block * size**-0.5] * (width // size))


@dataclass
class Held:
    """What a layer holds right after an update: the first ``keys`` tokens of ``cache``, of which each sequence has ``lengths``
    (None: all). ``exact``: the new keys and values themselves, where they are all there is. ``source``: what a gradient would flow to.
    ``turn``: what the cache's keys and values were multiplied by."""

    cache: KvCache
    batch: int
    keys: int
    dtype: torch.dtype
    lengths: Tensor | None = None
    exact: tuple[Tensor, Tensor] | None = None
    source: Tensor | None = None
    turn: Turn | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """All that is stored, as floats."""
        if self.turn is None:
            return own.read(self.cache, self.batch, self.keys, self.dtype)
        k, v = self.turn.apply(*own.read(self.cache, self.batch, self.keys, torch.float32))
        return k.to(self.dtype), v.to(self.dtype)

    def attend(
        self, q: Tensor, scale: float, causal: bool, window: int, softcap: float, mask: Tensor | None, s_aux: Tensor | None
    ) -> Tensor:
        """``attend_cache`` of what is stored."""
        if self.turn is None:
            return own.attend_cache(q, self.cache, self.keys, self.lengths, scale, causal, window, softcap, mask, s_aux)
        mask = mask.float() if mask is not None and mask.dtype == q.dtype else mask
        s_aux = None if s_aux is None else s_aux.float()
        turned = q.float() @ self.turn.keys
        out = own.attend_cache(turned, self.cache, self.keys, self.lengths, scale, causal, window, softcap, mask, s_aux)
        return (out @ self.turn.values).to(q.dtype)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values as floats."""
        if self.exact is not None and self.lengths is None:
            return self.exact
        found = self.read()
        if self.exact is not None:  # the rest of a static cache is hidden by the mask
            new = self.exact[0].shape[2]
            return tuple(torch.cat((exact, rest[:, :, new:]), 2) for exact, rest in zip(self.exact, found, strict=True))
        if self.source is not None:
            return tuple(_NoGradient.apply(t, self.source) for t in found)
        return found

    def parts(self) -> tuple[Part, Part]:
        return Part(self, 0), Part(self, 1)


class Part:
    """The keys or the values of a layer. Code that knows nothing of it can use it as a tensor: it is read when looked at."""

    def __init__(self, held: Held, index: int) -> None:
        self.held, self.index = held, index
        cache = held.cache
        self.shape = torch.Size((held.batch, cache.kv_heads, held.keys, cache.value_dim if index else cache.head_dim))
        self.dtype, self.device, self.requires_grad = held.dtype, cache.k.device, held.source is not None

    def tensor(self) -> Tensor:
        return self.held.tensors()[self.index]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Tensor:
        return self.tensor()[index]

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        def plain(value: Any) -> Any:
            if isinstance(value, Part):
                return value.tensor()
            return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

        return function(*map(plain, args), **{key: plain(value) for key, value in (kwargs or {}).items()})


@dataclass(frozen=True)
class _Settings:
    """What the layers of a cache have in common. ``format`` None: the dtype of what is stored."""

    config: Any
    format: KvFormat | None
    channels: bool
    turned: bool

    def packed(self) -> bool:
        """Whether the attention function of the model takes a ``Part``."""
        return self.config._attn_implementation == "taut"

    def __deepcopy__(self, memo: dict) -> _Settings:
        return self  # WHY: the config is the model's, which may be given another attention function


class PackedLayer(CacheLayerMixin):
    """A layer that grows. With ``window``, it forgets the oldest tokens once no later one can see them."""

    is_compileable = False
    is_croppable = True
    turn: Turn | None = None

    def __init__(self, settings: _Settings, window: int | None = None) -> None:
        # WHY not the base's: it assigns keys and values, which are read from the cache here
        self.settings, self.window, self.is_sliding = settings, window, window is not None
        if window is not None:
            self.sliding_window = window
        self.record_past = False
        self.is_initialized = False
        self.dtype = self.device = None
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.store: KvCache | None = None
        self.first = self.end = 0  # the position of the store's first token; how many it holds
        self.is_initialized = False

    def allocate(self, k: Tensor, v: Tensor, tokens: int) -> KvCache:
        batch, heads, _, width = k.shape
        format = KV_FORMATS[str(k.dtype).removeprefix("torch.")] if self.settings.format is None else self.settings.format
        with torch.inference_mode(False):  # WHY: what is made in inference mode could not be written outside of it
            cache = KvCache.empty(format, batch, heads, tokens, width, v.shape[3])
            return cache.with_channels(_no_channels(cache, batch)) if self.settings.channels else cache

    def turn_for(self, k: Tensor, v: Tensor) -> Turn | None:
        return Turn.of(k.shape[3], v.shape[3]) if self.settings.turned else None

    def channels_of(self, k: Tensor, v: Tensor) -> Tensor:
        """Offsets and factors from the first keys and values."""
        return kv_channels(k, v) if self.turn is None else self.turn.offsets(k, v)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.turn = self.turn_for(key_states, value_states)
        self.store = self.allocate(key_states, value_states, key_states.shape[2] + LEAST_ROOM)
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def check(self, k: Tensor, v: Tensor) -> None:
        """Raises ``ValueError`` where these cannot follow what is held."""
        if k.device.type != "cpu" or k.dtype not in own.DTYPE_CODES or k.dtype != v.dtype:
            accepted = "float32, bfloat16 or float16 keys and values on the CPU"
            raise ValueError(f"taut.Cache holds {accepted}, got {k.dtype} and {v.dtype} on {k.device}")
        held = self.store
        if held is None:
            return
        shape = (held.k.shape[0], held.kv_heads, held.head_dim, held.value_dim)
        if (*k.shape[:2], k.shape[3], v.shape[3]) != shape or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"this cache holds {shape[0]} sequences of {shape[1]} heads, head dims {shape[2]} and {shape[3]}; "
                f"keys {list(k.shape)} and values {list(v.shape)} cannot follow"
            )

    def dropped(self, new: int) -> int:
        """How many of the oldest tokens leave before ``new`` ones come: whole blocks, once there is no more room."""
        if self.window is None or self.record_past or self.store is None or self.end + new <= self.store.capacity:
            return 0
        return max(0, self.end - self.window + 1) // BLOCK_TOKENS * BLOCK_TOKENS

    def make_room(self, k: Tensor, v: Tensor, new: int) -> None:
        drop = self.dropped(new)
        kept = self.end - drop
        if self.end + new <= self.store.capacity:
            return
        wanted = kept + new
        tokens = self.store.capacity if wanted <= self.store.capacity else wanted + min(max(wanted // 2, LEAST_ROOM), MOST_ROOM)
        old, self.store = self.store, self.allocate(k, v, tokens).with_channels(self.store.channels)
        for (to, unit), (source, _) in zip(_by_tokens(self.store), _by_tokens(old), strict=True):
            begin, count = drop // unit, -(-kept // unit)
            to.narrow(2, 0, count).copy_(source.narrow(2, begin, count))
        self.first, self.end = self.first + drop, kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.check(key_states, value_states)
        followed = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        k, v = (_rows(t.detach()) for t in (key_states, value_states))
        new, exact = k.shape[2], None
        if self.end == 0:
            exact = key_states, value_states
            if self.window is not None and not self.record_past:  # of a long prompt, what a later token can see
                k, v = k[:, :, -max(self.window - 1, 1) :], v[:, :, -max(self.window - 1, 1) :]
            self.first = self.first + new - k.shape[2]
        if not self.is_initialized:
            self.lazy_initialization(k, v)
        if exact is not None and self.store.channels is not None and new:
            self.store.channels.copy_(self.channels_of(*(t.detach() for t in exact)))
        self.make_room(k, v, k.shape[2])
        if self.turn is not None:
            k, v = self.turn.apply(k, v)
        torch.ops.taut.kv_append(k, v, *self.store.tensors(), self.end, None)
        self.end += k.shape[2]
        source = (key_states if key_states.requires_grad else value_states) if followed else None
        held = Held(self.store, k.shape[0], self.end, key_states.dtype, None, exact, source, self.turn)
        return held.parts() if self.settings.packed() else held.tensors()

    def held(self) -> Held | None:
        return None if self.store is None else Held(self.store, self.store.k.shape[0], self.end, self.dtype, turn=self.turn)

    @property
    def keys(self) -> Tensor | None:
        """What is held, as floats; of a sliding layer, what is left of it."""
        return None if self.store is None else self.held().tensors()[0]

    @property
    def values(self) -> Tensor | None:
        return None if self.store is None else self.held().tensors()[1]

    @property
    def nbytes(self) -> int:
        """Bytes of memory it holds."""
        return 0 if self.store is None else self.store.nbytes

    def get_seq_length(self) -> int:
        return self.first + self.end

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        drop = self.dropped(query_length)
        if self.end == 0:
            return query_length, self.first
        return self.end - drop + query_length, self.first + drop

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    get_max_cache_shape = get_max_length  # its name before transformers 5.24

    def activate_past_recording(self) -> None:
        """Nothing is forgotten from now on but by ``crop``."""
        self.record_past = self.window is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest ``-tokens_to_remove`` tokens (a positive number: all but so many, as before transformers 5.24)."""
        length = self.get_seq_length()
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove)
        count = min(count, length)
        if self.first and self.end - count < self.window - 1:
            raise RuntimeError(f"{count} tokens cannot be taken back: a window of {self.window} would need what was forgotten before")
        self.end -= count
        if self.record_past and (drop := max(0, self.end - self.window + 1) // BLOCK_TOKENS * BLOCK_TOKENS) > self.window:
            self.record_past = False
            self.forget(drop)
            self.record_past = True

    def forget(self, drop: int) -> None:
        old, kept = self.store, self.end - drop
        for tensor, unit in _by_tokens(old):
            count = -(-kept // unit)
            tensor.narrow(2, 0, count).copy_(tensor.narrow(2, drop // unit, count).clone())
        self.first, self.end = self.first + drop, kept

    def pick(self, rows: Tensor) -> None:
        """Keeps these entries of the batch, in this order."""
        if self.store is None:
            return
        with torch.inference_mode(False):
            picked = {}
            for name in ("k", "v", "k_scales", "v_scales"):
                old = getattr(self.store, name)
                if old is None:
                    continue
                unit = self.store.capacity // old.shape[2]
                used = -(-self.end // unit)
                new = picked[name] = old.new_empty((rows.numel(), *old.shape[1:]))
                new.narrow(2, 0, used).copy_(old.narrow(2, 0, used).index_select(0, rows))
            channels = self.store.channels
            self.store = replace(self.store, **picked, channels=None if channels is None else channels.index_select(0, rows))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.pick(beam_idx.to("cpu"))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.pick(torch.arange(self.store.k.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.store is not None:
            self.pick(torch.arange(self.store.k.shape[0])[indices])

    def offload(self) -> None:
        raise ValueError("taut.Cache is on the CPU, and is not offloaded")

    prefetch = offload


class StaticPackedLayer(PackedLayer):
    """A layer with room for ``max_cache_len`` tokens, written in place. What a window hides stays in it."""

    is_compileable = True

    def __init__(self, settings: _Settings, max_cache_len: int, window: int | None = None) -> None:
        codes = settings.format is not None and settings.format.has_codes
        self.max_cache_len = -(-max_cache_len // BLOCK_TOKENS) * BLOCK_TOKENS if codes else max_cache_len
        super().__init__(settings, window)

    def reset(self) -> None:
        """Forgets everything, and keeps the memory."""
        self.filled = False
        if not getattr(self, "is_initialized", False):
            self.store = None
            self.cumulative_length = torch.tensor(0, dtype=torch.int64)
        else:
            self.cumulative_length.zero_()
            self.lengths.zero_()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.turn = self.turn_for(key_states, value_states)
        self.store = self.allocate(key_states, value_states, self.max_cache_len)
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        with torch.inference_mode(False):
            self.lengths = torch.zeros(self.batch_size, dtype=torch.int32)
            self.cumulative_length = torch.zeros((), dtype=torch.int64)
        # WHY zeros: other attention functions multiply what lies behind the last token by zero, and a NaN would stay
        for tensor in self.tensors():
            tensor.zero_()
        if not torch.compiler.is_compiling():
            for tensor in (*self.tensors(), self.lengths, self.cumulative_length):
                torch._dynamo.mark_static_address(tensor)
        if self.store.channels is not None:
            self.store.channels.copy_(_no_channels(self.store, self.batch_size))

    def tensors(self) -> list[Tensor]:
        store = self.store
        return [t for t in (store.k, store.v, store.k_scales, store.v_scales, store.channels) if t is not None]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.check(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        followed = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        k, v = (_rows(t.detach()) for t in (key_states, value_states))
        new, exact, store = k.shape[2], None, self.store
        if not torch.compiler.is_compiling() and int(self.cumulative_length) + new > self.max_cache_len:
            there = int(self.cumulative_length)
            raise ValueError(f"this cache has room for {self.max_cache_len} tokens, {there} are there: {new} more do not fit")
        if not self.filled and new:
            exact, self.filled = (key_states, value_states), True
            if store.channels is not None:
                store.channels.copy_(self.channels_of(k, v))
        if self.turn is not None:
            k, v = self.turn.apply(k, v)
        torch.ops.taut.kv_append(k, v, *store.tensors(), 0, self.lengths)
        self.lengths.add_(new)
        self.cumulative_length.add_(new)
        source = (key_states if key_states.requires_grad else value_states) if followed else None
        held = Held(store, k.shape[0], self.max_cache_len, key_states.dtype, self.lengths, exact, source, self.turn)
        return held.parts() if self.settings.packed() else held.tensors()

    def held(self) -> Held | None:
        return (
            None if self.store is None else Held(self.store, self.batch_size, self.max_cache_len, self.dtype, self.lengths, turn=self.turn)
        )

    def get_seq_length(self) -> Tensor | int:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """Nothing is ever forgotten."""

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_initialized:
            return
        length = int(self.cumulative_length)
        count = min(length, -tokens_to_remove if tokens_to_remove <= 0 else max(0, length - tokens_to_remove))
        self.lengths.sub_(count)
        self.cumulative_length.sub_(count)
        self.filled = length > count

    def pick(self, rows: Tensor) -> None:
        if self.store is None:
            return
        if rows.numel() == self.batch_size:  # WHY in place: a compiled graph has these addresses
            for tensor in self.tensors():
                tensor.copy_(tensor.index_select(0, rows))
            return
        store = self.store
        with torch.inference_mode(False):
            names = [name for name in ("k", "v", "k_scales", "v_scales", "channels") if getattr(store, name) is not None]
            self.store = replace(store, **{name: getattr(store, name).index_select(0, rows) for name in names})
            self.lengths, self.batch_size = self.lengths[:1].repeat(rows.numel()), rows.numel()


def _rows(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 or t.shape[3] == 1 else t.contiguous()


def _by_tokens(cache: KvCache) -> list[tuple[Tensor, int]]:
    """The tensors of a cache that have tokens as their third dimension, and how many tokens an index of it is."""
    held = (cache.k, cache.v, cache.k_scales, cache.v_scales)
    return [(t, cache.capacity // t.shape[2]) for t in held if t is not None]


def _no_channels(cache: KvCache, batch: int) -> Tensor:
    """Offsets of 0 and factors of 1."""
    channels = torch.zeros(batch, cache.kv_heads, 2, cache.head_dim + cache.value_dim)
    channels[:, :, 1] = 1.0
    return channels


class Cache(cache_utils.Cache):
    """A cache for ``model.generate(..., cache=taut.Cache(model, "int8"))`` (``past_key_values=`` before transformers 5.24).

    ``model``: a transformers model or its config. ``kv``: what keys and values are held as: "int8" and "int4" (with a float16 scale a
    token and head), "fp8", "float32", "bfloat16", "float16", or None, the dtype they come in. ``max_cache_len``: room for so many
    tokens (of int8 and int4 rounded up to 16), allocated at once, for ``torch.compile``; None: it grows. Layers whose attention
    slides hold little more than their window where they grow. ``channels``: whether each channel gets an offset and a factor from
    the first tokens that are stored (the prompt); None: for int8 and int4. ``turned``: whether int8 or int4 hold keys and values times a
    Hadamard matrix, and channels have offsets alone; None: where there are channels. Head dims that 16 does not divide are not turned.

    With the attention function "taut" (``model.set_attn_implementation("taut")``, ``taut.swap(model, attention=True)``) what is held is
    read as it is; with others it is turned into floats for each token. The prompt attends to its own keys and values unrounded.
    On the CPU only. Raises ``ValueError`` for an unknown ``kv``, a length below 1, or layers that hold something else than keys and values,
    and, when it is used, for another batch, other heads, or more tokens than there is room for.
    """

    def __init__(
        self, model: Any, kv: str | torch.dtype | None = "int8", max_cache_len: int | None = None, channels: bool | None = None,
        turned: bool | None = None,
    ) -> None:  # fmt: skip
        config = getattr(model, "config", model)
        if not hasattr(config, "get_text_config"):
            raise ValueError(f"taut.Cache takes a transformers model or its config, got {type(model).__name__}")
        format = None if kv is None else KV_FORMATS.get(str(kv).removeprefix("torch."))
        if kv is not None and format is None:
            raise ValueError(f"kv must be one of {', '.join(map(repr, KV_FORMATS))} or None (the model's dtype), got {kv!r}")
        if max_cache_len is not None and (not isinstance(max_cache_len, int) or isinstance(max_cache_len, bool) or max_cache_len < 1):
            raise ValueError(f"max_cache_len must be a positive number of tokens, or None for a cache that grows, got {max_cache_len!r}")
        if channels is not None and not isinstance(channels, bool):
            raise ValueError(f"channels must be True, False or None (for int8 and int4), got {channels!r}")
        config = config.get_text_config(decoder=True)
        channels = format is not None and format.has_codes if channels is None else channels
        if channels and format is None:
            raise ValueError("channels=True is for a kv format, and kv is None")
        if turned is not None and not isinstance(turned, bool):
            raise ValueError(f"turned must be True, False or None (for int8 and int4 with channels), got {turned!r}")
        if turned and (format is None or not format.has_codes):
            raise ValueError(f"turned=True is for int8 and int4, and kv is {kv!r}")
        turned = channels and format.has_codes if turned is None else turned
        settings = _Settings(config, format, channels, turned)
        layers = [_layer_for(layer, index, settings, max_cache_len) for index, layer in enumerate(DynamicCache(config=config).layers)]
        if not layers:
            raise ValueError(f"the config of {getattr(config, 'model_type', 'this model')} has no decoder layers")
        super().__init__(layers=layers)
        self.kv = None if format is None else format.name

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the layers hold now."""
        return sum(layer.nbytes if isinstance(layer, PackedLayer) else _float_bytes(layer) for layer in self.layers)

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """The name of ``get_max_length`` before transformers 5.24."""
        return self.layers[layer_idx or 0].get_max_length()

    def __repr__(self) -> str:
        room = getattr(self.layers[0], "max_cache_len", None)
        held = f"{int(self.get_seq_length())} tokens{'' if room is None else f' of {room}'}, {self.nbytes / 1e6:.1f} MB"
        return f"taut.Cache({len(self.layers)} layers, kv={self.kv}, {held})"


def _float_bytes(layer: Any) -> int:
    held = [getattr(layer, name, None) for name in ("key_buffer", "value_buffer", "plain_keys", "plain_values")]
    return sum(t.nbytes for t in held if isinstance(t, Tensor))


def _layer_for(layer: Any, index: int, settings: _Settings, max_cache_len: int | None) -> Any:
    """Our layer in the place of one of transformers' ``DynamicCache``."""
    kind = type(layer)
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        window = layer.sliding_window if kind is DynamicSlidingWindowLayer else None
        if max_cache_len is not None:
            return StaticPackedLayer(settings, max_cache_len, window)
        if settings.format is None:
            return GrowingLayer() if window is None else GrowingSlidingLayer(window)
        return PackedLayer(settings, window)
    if hasattr(layer, "keys") and kind.__name__ != "DummyLayer":
        raise ValueError(f"layer {index} has a {kind.__name__}: taut.Cache holds keys and values of full and sliding attention")
    return layer
