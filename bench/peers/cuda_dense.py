"""cuBLAS through ``torch.nn.functional.linear``: 16-bit weights, the numbers that taut's low-bit ones stand for."""

from __future__ import annotations

import torch

from ..contenders import copies_for
from ..gpu_problem import Layer, Weight


class Dense:
    name = "cublas"

    def available(self) -> str | None:
        return None

    def layer(self, weight: Weight, cold_bytes: int) -> Layer:
        w = weight.dense.to(weight.dtype)
        copies = [w, *(w.clone() for _ in range(copies_for(w.nbytes, cold_bytes) - 1))]
        format = "bf16" if weight.dtype == torch.bfloat16 else "f16"
        return Layer(self.name, True, format, "16", lambda x, copy: torch.nn.functional.linear(x, copies[copy]), len(copies), w.nbytes)


PEERS = [Dense()]
