"""GemLite's Triton kernels for int4 and int8 weights, where the package is installed."""

from __future__ import annotations

import importlib.util

import torch

from ..contenders import Skip, copies_for
from ..gpu_problem import Layer, Weight

# It tunes itself at the first call of each kernel and shape, which takes minutes over all of them: one layer, and one or two
# sizes of each of its kernels (for vectors, for few rows, for many) must do.
_TIMED_LAYER, _TIMED_ROWS = (28672, 4096), (1, 8, 64, 1024)


class GemLite:
    name = "gemlite"

    def available(self) -> str | None:
        return None if importlib.util.find_spec("gemlite") else "gemlite is not installed"

    def layer(self, weight: Weight, cold_bytes: int) -> Layer:
        format = weight.format
        if format.weights != "int4" or not format.group or format.activations not in ("bf16", "f16"):
            raise Skip("it is timed beside int4 in groups")
        if (weight.n, weight.k) != _TIMED_LAYER:
            raise Skip("it is timed on one layer only: it tunes itself for each")
        from gemlite.helper import A16Wn

        zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros.to(weight.scales.dtype)
        maker = A16Wn(device=str(weight.device), dtype=weight.dtype)
        first = maker.from_weights(weight.nibbles(), weight.scales.to(weight.dtype), zeros.to(weight.dtype), 4, format.group)
        nbytes = first.W_q.nbytes + first.scales.nbytes
        layers = [first]
        for _ in range(copies_for(nbytes, cold_bytes) - 1):
            layers.append(maker.from_weights(weight.nibbles(), weight.scales.to(weight.dtype), zeros.to(weight.dtype), 4, format.group))
        return Layer(
            self.name, True, weight.name, "16", lambda x, copy: layers[copy](x), len(layers), nbytes,
            refuses=lambda m: None if m in _TIMED_ROWS else "it is timed at some M only: it tunes itself for each",
        )  # fmt: skip


PEERS = [GemLite()]
