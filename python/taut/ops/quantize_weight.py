"""quantize_weight: float weights to the canonical low-bit form, round to nearest with a scale search per group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import WeightFormat

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_weight(w: Tensor) -> None:
    if w.dim() != 2 or w.shape[1] < 1:
        raise ValueError(f"w must be [N, K] with K >= 1, got {list(w.shape)}")
    if w.dtype not in FLOAT_DTYPES:
        raise ValueError(f"w must be float32, bfloat16 or float16, got {w.dtype}")
    if w.device.type != "cpu":
        raise ValueError(f"w must be on the CPU, got {w.device}")


def quantize_weight(w: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantizes ``w [N, K]`` (float32, bfloat16, float16) to ``(codes, scales, zeros or None)``, canonical form.

    int8: the largest magnitude maps to 127, 126, ... or 112, whichever has the least squared error. int4 without zeros:
    the largest magnitude maps to code -8, as llama.cpp's Q4_0, then eight scales around that one are tried and the least
    squared error wins; with zeros: min and max map to 0 and 15, likewise searched. fp8_e4m3: the largest magnitude maps to
    one of the sixteen largest codes, 448 down to 120. The result is the same, bit for bit, on every machine.
    Raises ``ValueError`` for a wrong shape, dtype or device, or if ``w`` holds a NaN, an infinity or a number whose
    scale float16 cannot hold.
    """
    check_weight(w)
    try:
        codes, scales, zeros = _native.ops_for("cpu").quantize_weight(w, format.code, format.group_size, format.zeros)
    except RuntimeError as error:
        if "holds a NaN" not in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from None
    return codes, scales, zeros if format.zeros else None


@torch.library.register_fake("taut::quantize_weight")
def _fake(w: Tensor, format: int, group_size: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor]:
    n, k = w.shape
    f = WeightFormat.of_code(format, group_size, zeros)
    groups = f.num_groups(k)
    codes = w.new_empty(f.codes_shape(n, k), dtype=f.codes_dtype)
    return codes, w.new_empty((n, groups), dtype=torch.float16), w.new_empty((n if zeros else 0, groups), dtype=torch.uint8)


def reference(codes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, format: WeightFormat) -> Tensor:
    """The numbers a canonical weight stands for, ``float64 [N, K]``: the definition, in plain torch."""
    if format.name == "int4":
        q = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, :in_features].double()
        offset = zeros.double() if zeros is not None else torch.full_like(scales, 8).double()
    else:
        q, offset = codes.double(), torch.zeros_like(scales).double()
    group = torch.arange(in_features) // (format.group_size or in_features)
    return (q - offset[:, group]) * scales.double()[:, group]


def cost(n: int, k: int, format: WeightFormat, element_bytes: int = 4) -> dict[str, int]:
    """Counted flops and bytes: about seven operations a candidate scale, eight of them for int4, sixteen for int8 and fp8_e4m3."""
    return {"flops": n * k * (56 if format.name == "int4" else 112), "bytes": n * k * element_bytes + format.canonical_bytes(n, k)}
