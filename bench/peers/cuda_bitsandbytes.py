"""bitsandbytes' 4-bit linear (nf4, blocks of 64, no double quantization), where the package is installed."""

from __future__ import annotations

import importlib.util

from ..contenders import Skip, copies_for
from ..gpu_problem import Layer, Weight


class BitsAndBytes:
    name = "bitsandbytes_nf4"

    def available(self) -> str | None:
        return None if importlib.util.find_spec("bitsandbytes") else "bitsandbytes is not installed"

    def layer(self, weight: Weight, cold_bytes: int) -> Layer:
        if weight.format.weights != "int4":
            raise Skip("it is timed beside int4")
        import bitsandbytes
        from bitsandbytes import functional

        w = weight.dense.to(weight.dtype)
        packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
        dense = functional.dequantize_4bit(packed, state).float()  # its own rounding of the same weight
        copies = [packed, *(packed.clone() for _ in range(copies_for(packed.nbytes, cold_bytes) - 1))]
        return Layer(
            self.name, True, "nf4_g64", "16", lambda x, copy: bitsandbytes.matmul_4bit(x, copies[copy], state), len(copies),
            packed.nbytes + state.absmax.nbytes, dense=dense,
        )  # fmt: skip


PEERS = [BitsAndBytes()]
