"""Calibration: text as token ids, and what the linear layers of one decoder layer at a time are given for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def calibration_ids(tokenizer: Any, text: str, sequences: int = 32, length: int = 256) -> Tensor:
    """``int64 [sequences, length]``: tokens of ``text``, from its beginning on, without gaps.

    Raises ``ValueError`` where the text has fewer tokens, and says how many there are and how many it takes.
    """
    if sequences < 1 or length < 2:
        raise ValueError(f"calibration needs at least one sequence of two tokens, got {sequences} of {length}")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    needed = sequences * length
    if len(ids) < needed:
        raise ValueError(f"the calibration text is too short: {len(ids)} tokens, and {sequences} sequences of {length} take {needed}")
    return ids[:needed].view(sequences, length)


class _Stop(Exception):
    """The first layer's inputs are there; the rest of the model need not run."""


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The list of a language model's decoder layers, and its name. Raises ``ValueError`` where there is none, or more than one."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and any(isinstance(part, nn.Linear) for part in module[0].modules())
    ]
    if len(found) != 1:
        names = ", ".join(name for name, _ in found) or "none"
        raise ValueError(f"the model must have one list of decoder layers, got {names}")
    return found[0]


class Inputs:
    """The hidden states that a decoder layer is given, batch by batch; ``advance`` makes them the next layer's.

    Memory: one float tensor of all tokens' hidden states, whatever the number of layers.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module], ids: Tensor, batch: int) -> None:
        self.batches = list(ids.split(batch))
        self.hidden: list[Tensor] = []
        self._arguments: dict[tuple[int, int], tuple[tuple, dict[str, Any]]] = {}  # by layer and batch size
        for size in sorted({len(part) for part in self.batches}):
            self._record(model, layers, next(part for part in self.batches if len(part) == size))
        with _before(layers[0], self._keep_and_stop):
            for part in self.batches:
                try:
                    model(part, use_cache=False)
                except _Stop:
                    continue
                raise ValueError("the model never called its first decoder layer")

    def _keep_and_stop(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.hidden.append((args[0] if args else kwargs["hidden_states"]).detach())
        raise _Stop

    def _record(self, model: nn.Module, layers: Sequence[nn.Module], ids: Tensor) -> None:
        """What each layer is called with besides the hidden states; the same for all batches of a size, since none is padded."""
        handles = []
        for index, layer in enumerate(layers):

            def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], index: int = index) -> None:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                self._arguments[index, len(ids)] = (args[1:], rest)

            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            model(ids, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()

    def copy(self) -> Inputs:
        """The same, to be advanced through other layers."""
        other = object.__new__(Inputs)
        other.batches, other.hidden, other._arguments = self.batches, list(self.hidden), self._arguments
        return other

    def run(self, layer: nn.Module, index: int) -> Iterator[Tensor]:
        """The layer's outputs, batch by batch."""
        for place in range(len(self.hidden)):
            yield self.one(layer, index, place)

    def one(self, layer: nn.Module, index: int, place: int) -> Tensor:
        """The layer's output for one batch."""
        hidden = self.hidden[place]
        args, kwargs = self._arguments[index, len(hidden)]
        out = layer(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def advance(self, layer: nn.Module, index: int) -> None:
        for place, out in enumerate(self.run(layer, index)):
            self.hidden[place] = out


@contextmanager
def _before(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class Statistics:
    """``sum x^T x`` (float64 ``[K, K]``) over the tokens that a linear layer was given, and their number.

    Layers that are given the same tensor share one: q, k and v; gate and up.
    """

    def __init__(self, k: int) -> None:
        self.gram, self.tokens = torch.zeros(k, k, dtype=torch.float64), 0

    def add(self, x: Tensor) -> None:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.gram += (rows.T @ rows).double()
        self.tokens += len(rows)

    @property
    def norms(self) -> Tensor:
        """Of each input channel over all tokens: float32 ``[K]``."""
        return self.gram.diagonal().clamp(min=0).sqrt().float()

    def reordered(self, order: Tensor) -> Statistics:
        """Of the same tokens with their channels in this order."""
        other = object.__new__(Statistics)
        other.gram, other.tokens = self.gram[order[:, None], order], self.tokens
        return other


@torch.no_grad()
def gather(inputs: Inputs, layer: nn.Module, index: int, linears: dict[str, nn.Linear]) -> dict[str, Statistics]:
    """Statistics of each of these linear layers. Raises ``ValueError`` where one is never called, or given no finite numbers."""
    found: dict[str, Statistics] = {}
    owners: dict[int, str] = {}
    leader: dict[str, str] = {}
    handles = []
    for name, linear in linears.items():

        def hook(module: nn.Module, args: tuple, name: str = name) -> None:
            x = args[0]
            if name not in leader:  # in the first batch
                leader[name] = owners.setdefault(id(x), name)
                keep.append(x)  # WHY: an id is a tensor's own only while it lives
                found[name] = found.get(leader[name]) or Statistics(x.shape[-1])
            if leader[name] == name:
                found[name].add(x)

        handles.append(linear.register_forward_pre_hook(hook))
    keep: list[Tensor] = []
    try:
        for _ in inputs.run(layer, index):
            keep.clear()
            owners.clear()
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:
        if name not in found:
            raise ValueError(f"{name} is never called on the calibration text: leave it alone by `skip`")
        if not bool(found[name].gram.isfinite().all()):
            raise ValueError(f"{name} is given NaN or infinity on the calibration text")
    return found
