"""sparse_linear: ``out[M,N] = x[M,K] @ dequant(w)[N,K]^T + bias``, w sparse, N:M or vector-wise V:N:M, in low bits or in 16."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import activation_code
from ..formats.sparse import SparseCanonical, SparseFormat, densify
from .pack_sparse import canonical, check_sparse
from .quant_linear import FLOAT_DTYPES, quantize_activations


def sparse_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, format: SparseFormat, activations: str = "auto"
) -> Tensor:
    """``x [..., K]`` times a packed sparse weight ``[N, K]``, plus ``bias [N]``: ``[..., N]`` in the dtype of x.

    ``x``: float32, bfloat16 or float16; sums are float32. ``packed``: from ``pack_sparse``. ``activations``: as ``quant_linear`` takes
    them for the dense format, but for "int8_outliers"; beside weights of 16 bits "float" alone, which "auto" is there. Where a weight is
    not kept, NaN and infinities of x may count or not. A row's result does not depend on the rows around it: on the CPU in a given impl,
    on CUDA within ``taut.batch_invariant()``. Differentiable in ``x`` and ``bias``. Raises ``ValueError`` for wrong shapes, dtypes or
    devices.
    """
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a scalar")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    kind = _native.device_of(x=x, packed=packed, bias=bias).type
    mode = activation_code(activations, format, kind)
    check_sparse(packed, out_features, x.shape[-1], format)
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")
    weights, pattern = format.weights, format.pattern
    return _native.ops_for(kind).sparse_linear(
        x, packed, bias, out_features, weights.code, weights.group_size, pattern.n, pattern.m, pattern.v, mode
    )


@torch.library.register_fake("taut::sparse_linear")
def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, format: int, group_size: int, n: int, m: int, v: int,
    activations: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def _setup_context(ctx, inputs, output) -> None:
    x, packed, _, *ctx.weight = inputs
    ctx.save_for_backward(packed)
    ctx.in_features = x.shape[-1]


def _backward(ctx, grad: Tensor):
    (packed,) = ctx.saved_tensors
    out_features, format, group_size, n, m, v, _ = ctx.weight
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        sparse = SparseFormat.of_code(format, group_size, n, m, v)
        parts = torch.ops.taut.unpack_sparse(
            packed, out_features, ctx.in_features, format, group_size, n, m, v, _native.layout_for(packed.device.type)
        )
        grad_x = grad @ dequantize_sparse(canonical(parts, sparse), ctx.in_features, sparse).to(grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.reshape(-1, out_features).sum(0)
    return grad_x, None, grad_bias, *[None] * 7


torch.library.register_autograd("taut::sparse_linear", _backward, setup_context=_setup_context)


def dequantize_sparse(weight: SparseCanonical, in_features: int, format: SparseFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as numbers, ``dtype [N, K]``, by plain torch."""
    from .quantize_weight import reference as numbers

    codes, mask = densify(weight, in_features, format)
    dense = numbers(codes, weight.scales, None, None, in_features, format.weights)
    return torch.where(mask, dense, 0.0).to(dtype)


def reference(x: Tensor, w: Tensor, bias: Tensor | None, activations: str = "float") -> Tensor:
    """The definition in float64: ``x [M, K]``, ``w`` the dequantized weight ``[N, K]``, result ``float64 [M, N]``."""
    x = x.double() if activations == "float" else quantize_activations(x, activations)
    out = x @ w.double().T
    return out if bias is None else out + bias.double()


def cost(m: int, n: int, k: int, format: SparseFormat, element_bytes: int = 4) -> dict[str, int]:
    """Counted work of one call: multiply-adds of what is kept as 2 flops; bytes of w in its layout, x and out once each."""
    return {"flops": 2 * m * n * format.kept(k), "bytes": format.layout_bytes(n, k) + m * (k + n) * element_bytes}
