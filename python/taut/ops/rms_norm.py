"""rms_norm: ``residual + x * rsqrt(mean(x^2) + eps) * (offset + weight)`` (arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor

from .fused_linear import check_norm_weight, check_on_cpu, refuse_backward
from .quant_linear import FLOAT_DTYPES


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
    """RMS norm of ``x [..., K]`` over its last dimension, in the dtype of x: float32 inside, rounded once.

    ``weight [K]``: in the dtype of x or float32; ``offset``: added to it (1 in Gemma). ``residual``: of the shape and dtype of x.
    On the CPU only, and without a backward. Raises ``ValueError`` for wrong shapes, dtypes or devices.
    """
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a scalar")
    if x.dtype not in FLOAT_DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    check_on_cpu("rms_norm", x=x, weight=weight, residual=residual)
    check_norm_weight("weight", weight, x.shape[-1], x.dtype)
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {x.dtype} {list(x.shape)}, got {residual.dtype} {list(residual.shape)}")
    return torch.ops.taut.rms_norm(x, weight, eps, offset, residual)


@torch.library.register_fake("taut::rms_norm")
def _fake(x: Tensor, weight: Tensor, eps: float, offset: float, residual: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


refuse_backward("rms_norm")


def reference(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0, residual: Tensor | None = None) -> Tensor:
    """The definition in float64."""
    x = x.double()
    out = x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * (offset + weight.double())
    return out if residual is None else out + residual.double()


def cost(m: int, k: int, residual: bool = False, element_bytes: int = 4) -> dict[str, int]:
    """Counted work of one call on ``x [m, k]``: five flops an element; x, out and the residual once each."""
    return {"flops": m * k * (5 + residual), "bytes": m * k * (2 + residual) * element_bytes}
