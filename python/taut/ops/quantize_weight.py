"""quantize_weight: float weights to the canonical low-bit form, round to nearest with a scale search per group."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import Canonical, WeightFormat
from .pack_weight import canonical, empty_canonical

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_weight(w: Tensor) -> None:
    if w.dim() != 2 or w.shape[1] < 1:
        raise ValueError(f"w must be [N, K] with K >= 1, got {list(w.shape)}")
    if w.dtype not in FLOAT_DTYPES:
        raise ValueError(f"w must be float32, bfloat16 or float16, got {w.dtype}")
    if w.device.type != "cpu":
        raise ValueError(f"w must be on the CPU, got {w.device}")


def quantize_weight(w: Tensor, format: WeightFormat) -> Canonical:
    """Quantizes ``w [N, K]`` (float32, bfloat16, float16) to its canonical form: ``(codes, scales, zeros, global_scale)``, the
    last two None where the format has none.

    int8: the largest magnitude maps to 127, 126, ... or 112, whichever has the least squared error. int4 without zeros:
    the largest magnitude maps to code -8, as llama.cpp's Q4_0, then eight scales around that one are tried and the least
    squared error wins; with zeros: min and max map to 0 and 15, likewise searched. int2, int3: the same over a wider range of
    scales, of either sign or with three zero points. ternary: nineteen scales around the mean magnitude (BitNet b1.58 takes
    the mean), each then the least squares one for the weights it does not make 0. fp8_e4m3: the largest magnitude maps to
    one of the sixteen largest codes, 448 down to 120. nf4: the largest magnitude is the scale, codes are bitsandbytes'.
    mxfp4: the specification's scale, ``2^(floor(log2(largest)) - 2)``, or twice that where it is closer. nvfp4: the global
    scale maps the weight's largest magnitude to 448 * 6, a group's scale its own to 6. fp8_block: a block's largest
    magnitude maps to 448. E2M1 and E4M3 codes are the nearest, ties to even.
    The result is the same, bit for bit, on every machine. Raises ``ValueError`` for a wrong shape, dtype or device, or if
    ``w`` holds a NaN, an infinity or a number whose scale float16 cannot hold, in formats with float16 scales.
    """
    check_weight(w)
    if not format.has_scales:
        raise ValueError(f"{format} weights are numbers as they are, and are not quantized: they are for SparseLinear alone")
    try:
        parts = _native.ops_for("cpu").quantize_weight(w, format.code, format.group_size, format.zeros)
    except RuntimeError as error:
        if "holds a NaN" not in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from None
    return canonical(parts, format)


@torch.library.register_fake("taut::quantize_weight")
def _fake(w: Tensor, format: int, group_size: int, zeros: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_canonical(w, *w.shape, WeightFormat.of_code(format, group_size, zeros))


_E2M1 = [sign * number for sign in (1.0, -1.0) for number in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)]
# From QLoRA's appendix E, as float32.
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def reference(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, global_scale: Tensor | None, in_features: int, format: WeightFormat,
    activations: str = "float",
) -> Tensor:  # fmt: skip
    """The numbers a canonical weight stands for, ``float64 [N, K]``: the definition, in plain torch.

    ``activations``: what they are multiplied with, since nf4's are 127ths beside 8-bit ones.
    """
    if not format.has_scales:
        return codes.double()
    name, k = format.name, in_features
    if name == "ternary":
        q = torch.stack([codes // 3**i % 3 for i in range(5)], -1).flatten(1)[:, :k]
    elif name == "int3":
        string = torch.stack([codes >> i & 1 for i in range(8)], -1).flatten(1)[:, : 3 * k].unflatten(1, (k, 3))
        q = string @ torch.tensor([1, 2, 4], dtype=torch.uint8)
    elif codes.dtype == torch.uint8:
        q = torch.stack([codes >> i & 2**format.bits - 1 for i in range(0, 8, format.bits)], -1).flatten(1)[:, :k]
    else:
        q = codes
    if name in ("nf4", "mxfp4", "nvfp4"):
        table = torch.tensor(_NF4 if name == "nf4" else _E2M1, dtype=torch.float64)
        if name == "nf4" and activations != "float":
            table = torch.round(table * 127) / 127
        q = table[q.int()]
    if name == "mxfp4":
        scales = torch.where(scales == 255, torch.nan, 2.0 ** (scales.double() - 127))
    elif name == "nvfp4":
        scales = scales.view(torch.float8_e4m3fn).double() * global_scale.double()
    column = torch.arange(k) // (format.group_size or k)
    row = torch.arange(codes.shape[0])[:, None] // (128 if name == "fp8_block" else 1)
    offset = zeros.double()[:, column] if zeros is not None else {"ternary": 1, "int2": 2, "int3": 4, "int4": 8}.get(name, 0)
    return (q.double() - offset) * scales.double()[row, column]


_CANDIDATES = {"ternary": 19, "int2": 52, "int3": 52, "int4": 8, "int8": 16, "fp8_e4m3": 16, "mxfp4": 2}


def cost(n: int, k: int, format: WeightFormat, element_bytes: int = 4) -> dict[str, int]:
    """Counted flops and bytes: about seven operations for each candidate of a scale, and seven where there is one."""
    flops = n * k * 7 * _CANDIDATES.get(format.name, 1)
    return {"flops": flops, "bytes": n * k * element_bytes + format.canonical_bytes(n, k)}
