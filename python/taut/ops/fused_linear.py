"""fused_linear: quant_linear with what stands before it (RMS norm, gated unit) and after it (residual) in a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _native
from ..formats import WeightFormat, activation_code
from . import quant_linear as linear_op
from .pack_weight import check_packed

# As csrc/quant_linear/op.h numbers them.
PROLOGUES = {"none": 0, "rms_norm": 1, "silu_glu": 2, "gelu_tanh_glu": 3, "gelu_glu": 4}
_UNITS = {"silu_glu": F.silu, "gelu_tanh_glu": lambda x: F.gelu(x, approximate="tanh"), "gelu_glu": F.gelu}


def fused_linear(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int, format: WeightFormat, activations: str = "auto",
    prologue: str = "none", norm_weight: Tensor | None = None, norm_eps: float = 1e-6, norm_offset: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``quant_linear(prologue(x)) + bias + residual``: ``[..., N]`` in the dtype of x, rounded once.

    ``prologue``: ``"none"``; ``"rms_norm"`` (arXiv 1910.07467): ``x * rsqrt(mean(x^2) + norm_eps) * (norm_offset + norm_weight)``,
    x ``[..., K]``, ``norm_weight [K]`` in the dtype of x or float32 (``norm_offset`` is 1 in Gemma); ``"silu_glu"``,
    ``"gelu_tanh_glu"`` and ``"gelu_glu"`` (arXiv 2002.05202): ``unit(x[..., :K]) * x[..., K:]``, x ``[..., 2K]``. The prologue is
    computed in float32 and not rounded to the dtype of x, but where AMX multiplies in bfloat16. ``residual``: of the dtype and
    shape of the output.
    ``packed``, ``bias``, ``format``, ``activations``: as in ``quant_linear``, whose impls run (``taut.force_impl("quant_linear", ...)``).
    On the CPU only, and without a backward: train through the unfused modules. A row's result does not depend on the rows
    around it. Raises ``ValueError`` for wrong shapes, dtypes or devices.
    """
    check_call(x, packed, bias, out_features, in_features, format, prologue, norm_weight, residual)
    mode = activation_code(activations, format, x.device.type)
    return torch.ops.taut.fused_linear(
        x, packed, bias, out_features, in_features, format.code, format.group_size, format.zeros, mode,
        PROLOGUES[prologue], norm_weight, norm_eps, norm_offset, residual,
    )  # fmt: skip


def check_call(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int, format: WeightFormat, prologue: str,
    norm_weight: Tensor | None, residual: Tensor | None,
) -> None:  # fmt: skip
    if prologue not in PROLOGUES:
        raise ValueError(f"unknown prologue {prologue!r}; accepted: {', '.join(PROLOGUES)}")
    if x.dim() < 1:
        raise ValueError("x must be [..., K], got a scalar")
    if x.dtype not in linear_op.FLOAT_DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    check_on_cpu("fused_linear", x=x, packed=packed, bias=bias, norm_weight=norm_weight, residual=residual)
    check_packed(packed, out_features, in_features, format)
    width = in_features * (2 if prologue.endswith("glu") else 1)
    if x.shape[-1] != width:
        raise ValueError(f"x must be [..., {width}] for prologue {prologue!r}, got {list(x.shape)}")
    if bias is not None and (tuple(bias.shape) != (out_features,) or bias.dtype != x.dtype):
        raise ValueError(f"bias must be {x.dtype} [{out_features}], got {bias.dtype} {list(bias.shape)}")
    if (norm_weight is not None) != (prologue == "rms_norm"):
        raise ValueError(f"prologue {prologue!r} {'needs' if norm_weight is None else 'takes no'} norm_weight")
    if norm_weight is not None:
        check_norm_weight("norm_weight", norm_weight, in_features, x.dtype)
    if residual is not None and (tuple(residual.shape) != (*x.shape[:-1], out_features) or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {x.dtype} {[*x.shape[:-1], out_features]}, got {residual.dtype} {list(residual.shape)}")


def check_on_cpu(op: str, **tensors: Tensor | None) -> None:
    device = _native.device_of(**tensors)
    if device.type != "cpu":
        raise ValueError(f"{op} runs on the CPU only, got tensors on {device}")


def check_norm_weight(name: str, weight: Tensor, size: int, dtype: torch.dtype) -> None:
    if tuple(weight.shape) != (size,) or weight.dtype not in (dtype, torch.float32):
        raise ValueError(f"{name} must be {dtype} or float32 [{size}], got {weight.dtype} {list(weight.shape)}")


@torch.library.register_fake("taut::fused_linear")
def _fake(
    x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int, in_features: int, format: int, group_size: int, zeros: bool,
    activations: int, prologue: int, norm_weight: Tensor | None, norm_eps: float, norm_offset: float, residual: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features))


def refuse_backward(op: str, advice: str = "train through the unfused modules") -> None:
    """Registers, for an op that nobody trains through, a backward that says so."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"taut::{op} has no backward: {advice}")

    torch.library.register_autograd(f"taut::{op}", backward)


refuse_backward("fused_linear")


def prologue_reference(x: Tensor, prologue: str, norm_weight: Tensor | None = None, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """The prologue in float64."""
    x = x.double()
    if prologue == "none":
        return x
    if prologue == "rms_norm":
        return x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * (offset + norm_weight.double())
    gate, up = x.chunk(2, dim=-1)
    return _UNITS[prologue](gate) * up


def reference(
    x: Tensor, w: Tensor, bias: Tensor | None, residual: Tensor | None, activations: str = "float", prologue: str = "none",
    norm_weight: Tensor | None = None, eps: float = 1e-6, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """The definition in float64: ``x [M, K or 2K]``, ``w`` the dequantized weight ``[N, K]``, result ``float64 [M, N]``."""
    out = linear_op.reference(prologue_reference(x, prologue, norm_weight, eps, offset), w, bias, activations)
    return out if residual is None else out + residual.double()


def cost(m: int, n: int, k: int, format: WeightFormat, prologue: str = "none", element_bytes: int = 4) -> dict[str, int]:
    """Counted work of one call: the matmul's, four flops an element of a norm, eight of a gated unit; each tensor's bytes once."""
    found = linear_op.cost(m, n, k, format, element_bytes)
    flops = {"none": 0, "rms_norm": 4}.get(prologue, 8) * m * k
    extra = m * k * element_bytes if prologue.endswith("glu") else 0
    return {"flops": found["flops"] + flops, "bytes": found["bytes"] + extra}
