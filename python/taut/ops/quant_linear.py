"""quant_linear: ``out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias``, w in a low-bit format."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import WeightFormat, activation_code
from .pack_weight import check_packed

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# The backward dequantizes this many rows of w at a time, so that training never holds a float copy of a large layer.
_BACKWARD_ROWS = 1024


def quant_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, format: WeightFormat, activations: str = "auto"
) -> Tensor:
    """``x [..., K]`` times a packed weight ``[N, K]``, plus ``bias [N]``: ``[..., N]`` in the dtype of x.

    ``x``: float32, bfloat16 or float16; sums are float32. ``packed``: from ``pack_weight``.
    ``activations="float"``: x enters as it is. Else x is quantized inside, symmetric (``csrc/quant_linear/op.h`` defines
    how), and a row that holds a NaN or an infinity gives NaN. ``"int8"``: one scale per row per 32 k, for all weights but those
    of 8-bit floats; the product of codes is exact, where nf4's numbers are taken as 127ths. ``"int8_outliers"``: the same, but of the
    blocks of 32 k that gain most by it the largest x is clipped first, and what is clipped multiplied in float32; on CUDA it is "float".
    ``"int8_row"``: one scale per row, for int8 weights. ``"fp8_row"``: float8 E4M3, one scale per row, for fp8_e4m3 weights.
    ``"auto"``: see ``taut.formats.resolve_activations``. On CUDA weights are int4, int8 or fp8_e4m3.
    A row's result does not depend on the rows around it: on the CPU in a given impl, on CUDA within ``taut.batch_invariant()``.
    On CUDA and with AMX bfloat16 x above 2^110 in size may overflow to infinity before a small scale brings the sum back into range.
    Differentiable in ``x`` (through the dequantized weight) and ``bias``. Raises ``ValueError`` for wrong shapes, dtypes or devices.
    """
    check_call(x, packed, bias, out_features, format)
    device = x.device.type
    mode = activation_code(activations, format, device)
    return _native.ops_for(device).quant_linear(x, packed, bias, out_features, format.code, format.group_size, format.zeros, mode)


def check_call(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, format: WeightFormat) -> None:
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a scalar")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    _native.device_of(x=x, packed=packed, bias=bias)
    check_packed(packed, out_features, x.shape[-1], format)
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")


@torch.library.register_fake("taut::quant_linear")
def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, format: int, group_size: int, zeros: bool, activations: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:
    x, packed, _, *ctx.weight = inputs
    ctx.save_for_backward(packed)
    ctx.in_features = x.shape[-1]


def _backward(ctx, grad: Tensor):
    (packed,) = ctx.saved_tensors
    out_features, format, group_size, zeros, _ = ctx.weight
    ops, layout = _native.ops_for(packed.device.type), _native.layout_for(packed.device.type)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        for begin in range(0, out_features, _BACKWARD_ROWS):
            end = min(begin + _BACKWARD_ROWS, out_features)
            rows = ops.dequantize_weight(packed, out_features, ctx.in_features, format, group_size, zeros, layout, begin, end, grad.dtype)
            part = grad[..., begin:end] @ rows
            grad_x = part if grad_x is None else grad_x + part
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, out_features).sum(0)
    return grad_x, None, grad_bias, None, None, None, None, None


torch.library.register_autograd("taut::quant_linear", _backward, setup_context=_setup_context)


def quantize_activations(x: Tensor, activations: str = "int8") -> Tensor:
    """What 8-bit activations round ``x [M, K]`` to, as ``float64``: the definition in op.h, in plain torch."""
    x = x.float()
    if activations == "int8_outliers":
        clipped = clip_outliers(x)
        return quantize_activations(clipped) + torch.where(clipped == x, 0.0, (x - clipped).double())
    k = x.shape[1]
    row_max = x.abs().amax(1, keepdim=True)
    counts = row_max >= 2.0**-100
    if activations == "fp8_row":
        inverse = torch.where(counts, torch.tensor(448.0) / row_max, 0.0)  # WHY a tensor: 448.0 / t is a reciprocal times 448
        codes = (x * inverse).clamp(-448, 448).to(torch.float8_e4m3fn)
        values = codes.double() * (row_max / 448.0).double()
    else:
        blocks = torch.nn.functional.pad(x, (0, -k % 32)).unflatten(1, (-1, 32))
        steps = torch.where(counts, torch.tensor(32767.0) / row_max, 0.0)[:, :, None]
        multiple = torch.ceil(blocks.abs().amax(2, keepdim=True) * steps).clamp(1, 32767)
        if activations == "int8_row":
            multiple = torch.full_like(multiple, 32767)
        codes = torch.round(blocks * (steps * 127.0 / multiple)).clamp(-127, 127)
        unit = row_max[:, :, None] / (127.0 * 32767.0)
        values = (codes.double() * multiple.double() * unit.double()).flatten(1)[:, :k]
    return torch.where(x.isfinite().all(1, keepdim=True), values, torch.nan)


def clip_outliers(x: Tensor) -> Tensor:
    """``x [M, K]`` of float32 with the outliers clipped that ``"int8_outliers"`` takes out: the definition in op.h."""
    k = x.shape[1]
    blocks = torch.nn.functional.pad(x, (0, -k % 32)).unflatten(1, (-1, 32))
    magnitude = blocks.abs()
    largest, where = magnitude.max(2, keepdim=True)
    where = (magnitude == largest).int().argmax(2, keepdim=True)  # the first of equals
    second = magnitude.scatter(2, where, 0.0).amax(2, keepdim=True)
    row_max = x.abs().amax(1)[:, None, None]
    steps = torch.tensor(32767.0) / row_max
    squares, rest = (torch.ceil(value * steps).clamp(1, 32767).double() ** 2 for value in (largest, second))
    gains = (squares - rest) * blocks.shape[1] > squares.sum(1, keepdim=True)
    gains &= (row_max >= 2.0**-80) & row_max.isfinite()
    clipped = torch.maximum(second, largest * 2.0**-10).copysign(blocks.gather(2, where))
    return torch.where(gains, blocks.scatter(2, where, clipped), blocks).flatten(1)[:, :k]


def reference(x: Tensor, w: Tensor, bias: Tensor | None, activations: str = "float") -> Tensor:
    """The definition in float64: ``x [M, K]``, ``w`` the dequantized weight ``[N, K]``, result ``float64 [M, N]``."""
    x = x.double() if activations == "float" else quantize_activations(x, activations)
    out = x @ w.double().T
    return out if bias is None else out + bias.double()


def cost(m: int, n: int, k: int, format: WeightFormat, element_bytes: int = 4) -> dict[str, int]:
    """Counted work of one call: multiply-adds as 2 flops; bytes of w in its layout, x and out once each."""
    return {"flops": 2 * m * n * k, "bytes": format.layout_bytes(n, k) + m * (k + n) * element_bytes}
