"""Key-value caches of transformers whose layers grow in place: what the fused decoder writes into.

``DynamicLayer`` concatenates: each new token copies the whole past. The layers here keep keys and values in buffers with
room to grow. They are ``DynamicLayer`` and ``DynamicSlidingWindowLayer`` to all other code, which reads and assigns
``keys`` and ``values`` as ever.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Rows of room in a new buffer. The most of them is bounded: copying the past once in so many tokens costs less than reading
# it once does, which every token needs.
LEAST_ROOM, MOST_ROOM = 64, 1024


class _Rows:
    """``keys`` and ``values`` ``[B, Hkv, rows, D]``: rows ``begin`` to ``end`` of two buffers.

    While ``key_buffer`` is None they are the plain tensors that other code assigned, and the buffers are built from them
    when rows are next appended in place. ``shown`` says that a view of the buffers may be in other hands, so that rows in
    it must not be written again.
    """

    key_buffer: Any = None
    value_buffer: Any = None
    form: Any = None  # ((B, Hkv, D), dtype) of the buffers
    capacity = begin = end = 0
    shown = False
    plain_keys: Any = None
    plain_values: Any = None

    @property
    def keys(self) -> Tensor | None:
        if self.key_buffer is None:
            return self.plain_keys
        self.shown = True
        return self.key_buffer.narrow(2, self.begin, self.end - self.begin)

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self.to_plain()
        self.plain_keys = value

    @property
    def values(self) -> Tensor | None:
        if self.value_buffer is None:
            return self.plain_values
        self.shown = True
        return self.value_buffer.narrow(2, self.begin, self.end - self.begin)

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self.to_plain()
        self.plain_values = value

    def to_plain(self) -> None:
        """From rows of buffers to plain tensors, which the next append copies."""
        if self.key_buffer is not None:
            self.plain_keys, self.plain_values = self.keys, self.values
            self.key_buffer = self.value_buffer = self.form = None

    def rows(self) -> int:
        """How many rows are held."""
        if self.key_buffer is not None:
            return self.end - self.begin
        return 0 if self.plain_keys is None or self.plain_keys.numel() == 0 else self.plain_keys.shape[2]

    def frozen(self) -> bool:
        """Whether the buffers were made in inference mode, so that they may not be written outside of it."""
        return self.key_buffer is not None and self.key_buffer.is_inference() and not torch.is_inference_mode_enabled()

    def reserve(self, new: int, like: Tensor, shape: tuple[int, int, int]) -> bool:
        """Makes room for ``new`` rows after ``end``. ``like`` gives dtype and device, ``shape`` is ``(B, Hkv, D)``.

        False where what is held is of another shape or dtype.
        """
        if self.key_buffer is not None and self.form == (shape, like.dtype) and self.end + new <= self.capacity and not self.frozen():
            return True
        held = self.rows()
        keys, values = (self.keys, self.values) if held else (None, None)
        for tensor in (keys, values):
            if tensor is not None and (tensor.dtype != like.dtype or (*tensor.shape[:2], tensor.shape[3]) != shape):
                return False
        wanted = held + new
        capacity = wanted + min(max(wanted // 2, LEAST_ROOM), MOST_ROOM)
        batch, heads, width = shape
        self.key_buffer, self.value_buffer = (like.new_empty((batch, heads, capacity, width)) for _ in range(2))
        if held:
            self.key_buffer.narrow(2, 0, held).copy_(keys)
            self.value_buffer.narrow(2, 0, held).copy_(values)
        self.begin, self.end, self.shown = 0, held, False
        self.form, self.capacity = (shape, like.dtype), capacity
        self.plain_keys = self.plain_values = None
        self.is_initialized, self.dtype, self.device = True, like.dtype, like.device
        return True

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Writes new rows after the last one; ``appended`` counts them."""
        batch, heads, new, width = keys.shape
        if not self.reserve(new, keys, (batch, heads, width)):
            raise ValueError(f"the cache holds {self.dtype} {list(self.keys.shape)}, which {keys.dtype} {list(keys.shape)} cannot follow")
        self.key_buffer.narrow(2, self.end, new).copy_(keys)
        self.value_buffer.narrow(2, self.end, new).copy_(values)

    def appended(self, new: int) -> None:
        """``new`` rows were written after ``end``."""
        self.end += new

    def visible(self, begin: int) -> tuple[Tensor, Tensor]:
        """Rows from ``begin`` on, for an attention function that does not keep them."""
        count = self.end - begin
        return self.key_buffer.narrow(2, begin, count), self.value_buffer.narrow(2, begin, count)

    def drop_last(self, count: int) -> None:
        """Forgets the last ``count`` rows."""
        if self.key_buffer is None or self.shown:
            keys, values = self.keys, self.values
            self.keys, self.values = keys[:, :, :-count], values[:, :, :-count]
        else:
            self.end = max(self.end - count, self.begin)

    def pick(self, rows: Tensor) -> None:
        """Keeps these entries of the batch, in this order."""
        if self.rows() == 0:
            return
        if self.key_buffer is None:
            self.plain_keys, self.plain_values = (t.index_select(0, rows.to(t.device)) for t in (self.plain_keys, self.plain_values))
            return
        rows = rows.to(self.key_buffer.device)
        picked = []
        for buffer in (self.key_buffer, self.value_buffer):
            new = buffer.new_empty((rows.numel(), *buffer.shape[1:]))
            held = buffer.narrow(2, self.begin, self.end - self.begin)
            picked.append(new)
            new.narrow(2, self.begin, self.end - self.begin).copy_(held.index_select(0, rows))
        self.key_buffer, self.value_buffer = picked
        self.shown = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.pick(beam_idx)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def fits(self, keys: Tensor, values: Tensor) -> bool:
        """Whether rows can be written in place: not while anything is differentiated or traced, nor where k and v differ in shape."""
        if torch.compiler.is_compiling() or keys.shape != values.shape or keys.requires_grad or values.requires_grad:
            return False
        held = self.key_buffer if self.key_buffer is not None else self.plain_keys
        if held is None or held.numel() == 0:
            return True
        return held.dtype == keys.dtype and held.device == keys.device and not held.requires_grad


class GrowingLayer(_Rows, DynamicLayer):
    """A ``DynamicLayer`` that appends in place."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.fits(key_states, value_states):
            if self.plain_keys is None and self.key_buffer is None:
                DynamicLayer.lazy_initialization(self, key_states, value_states)
            return DynamicLayer.update(self, key_states, value_states, *args, **kwargs)
        first_ones = self.rows() == 0
        self.append(key_states, value_states)
        self.appended(key_states.shape[2])
        return (key_states, value_states) if first_ones else self.visible(self.begin)

    def get_seq_length(self) -> int:
        return self.rows()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and self.is_initialized:
            self.drop_last(-tokens_to_remove)
        else:
            super().crop(tokens_to_remove)


class GrowingSlidingLayer(_Rows, DynamicSlidingWindowLayer):
    """A ``DynamicSlidingWindowLayer`` that appends in place, and moves what its window holds to the front now and then."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.fits(key_states, value_states):
            if self.plain_keys is None and self.key_buffer is None:
                DynamicLayer.lazy_initialization(self, key_states, value_states)
            return DynamicSlidingWindowLayer.update(self, key_states, value_states, *args, **kwargs)
        new, first_ones = key_states.shape[2], self.rows() == 0
        self.append(key_states, value_states)
        first = max(self.begin, self.end - self.sliding_window + 1) if self.record_past else self.begin
        self.appended(new)
        return (key_states, value_states) if first_ones else self.visible(first)

    def appended(self, new: int) -> None:
        self.end += new
        self.cumulative_length += new
        if not self.record_past:
            self.begin = max(self.begin, self.end - self.sliding_window + 1)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove < 0 and self.is_initialized and self.cumulative_length < self.sliding_window:
            self.drop_last(-tokens_to_remove)
            self.cumulative_length = self.rows()
        else:
            super().crop(tokens_to_remove)


_GROWING = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingLayer}


def make_growing(cache: Cache, layers: int) -> bool:
    """Turns the layers of ``cache`` into growing ones, in place. False if it is not a plain ``DynamicCache`` of ``layers`` layers.

    A ``taut.Cache`` of the model's own dtype has such layers already, and every other one has none.
    """
    held = cache.layers if isinstance(cache, Cache) else []
    ours = bool(held) and all(type(layer) in (GrowingLayer, GrowingSlidingLayer) for layer in held)
    if (type(cache) is not DynamicCache and not ours) or cache.offloading:
        return False
    if cache.layer_class_to_replicate is not None:
        if cache.layer_class_to_replicate not in (DynamicLayer, GrowingLayer):
            return False
        cache.layer_class_to_replicate = GrowingLayer
        held.extend(GrowingLayer() for _ in range(layers - len(held)))
    if len(held) != layers:
        return False
    for index, layer in enumerate(held):
        kind = type(layer)
        if kind is GrowingLayer or kind is GrowingSlidingLayer:
            continue
        growing = _GROWING.get(kind)
        if growing is None:
            return False
        state = dict(layer.__dict__)
        state["plain_keys"], state["plain_values"] = state.pop("keys", None), state.pop("values", None)
        held[index] = growing.__new__(growing)
        held[index].__dict__.update(state)
    return True
