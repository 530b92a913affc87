"""attention_backward: the gradients of attention_prefill, which computes its scores anew instead of keeping them (arXiv 2307.08691)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from . import attention_rules as rules
from .fused_linear import refuse_backward


def attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    softmax_scale: float | None = None, causal: bool = False, window: int = 0, softcap: float = 0.0, mask: Tensor | None = None,
    s_aux: Tensor | None = None, alibi_slopes: Tensor | None = None, tokens_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``dq``, ``dk`` and ``dv`` in the dtype and shape of q, k and v, and ``ds_aux``, float32 ``[Hq]`` (``[0]`` without ``s_aux``).

    ``grad_out [B, Hq, Lq, Dv]`` in the dtype of q, ``grad_lse [B, Hq, Lq]`` in float32 or None; ``out`` and ``lse`` are what
    ``attention_prefill`` gave for the other arguments, which mean what they mean there. A mask and ``alibi_slopes`` get no gradient.
    ``tokens_first``: the gradients lie in memory as ``[B, L, H, D]``.

    Beside its results it needs a tile a thread, three numbers a row, and for bf16 and fp16 on the CPU dq in float32, on CUDA copies of what
    is not aligned to 16 bytes: nothing of size ``Lq * Lk``.
    Float32 inside; in bf16 and fp16 the rounding of ``out`` is part of the result, as everywhere where scores are not kept, and CUDA's
    tensor cores have the weights and the gradients of the scores rounded to the dtype of q before what is summed of them.
    A query that sees no key has the gradient 0, and so has a key that none sees; NaN in hidden keys do not matter.
    The number of threads changes no bits, nor do other sequences. Not differentiable itself.
    Raises ``ValueError`` for wrong shapes, dtypes, strides or devices.
    """
    device = _native.device_of(
        grad_out=grad_out, grad_lse=grad_lse, q=q, k=k, v=v, out=out, lse=lse, mask=mask, s_aux=s_aux, alibi_slopes=alibi_slopes
    )
    scale = rules.check_call(q, k, v, softmax_scale, window, softcap, mask, s_aux, alibi_slopes)
    shape = (*q.shape[:3], v.shape[3])
    for name, t, expected, dtype in (
        ("grad_out", grad_out, shape, q.dtype), ("out", out, shape, q.dtype), ("lse", lse, shape[:3], torch.float32),
        ("grad_lse", grad_lse, shape[:3], torch.float32),
    ):  # fmt: skip
        if t is not None and (tuple(t.shape) != expected or t.dtype != dtype):
            raise ValueError(f"{name} must be {dtype} {list(expected)} beside q {list(q.shape)}, got {t.dtype} {list(t.shape)}")
    call = (grad_out, grad_lse, q, k, v, out, lse, scale, causal, window, softcap, mask, s_aux, alibi_slopes, tokens_first)
    return _native.ops_for(device.type).attention_backward(*call)


@torch.library.register_fake("taut::attention_backward")
def _fake(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, softmax_scale: float,
    causal: bool, window: int, softcap: float, mask: Tensor | None, s_aux: Tensor | None, alibi_slopes: Tensor | None, tokens_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(t: Tensor) -> Tensor:
        batch, heads, length, width = t.shape
        return t.new_empty((batch, length, heads, width)).transpose(1, 2) if tokens_first else t.new_empty(t.shape)

    return like(q), like(k), like(v), q.new_empty((0 if s_aux is None else q.shape[1],), dtype=torch.float32)


@torch.library.register_fake("taut::attention_backward_varlen")
def _fake_varlen(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, softmax_scale: float, causal: bool, window: int, softcap: float, s_aux: Tensor | None,
    alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    sinks = q.new_empty((0 if s_aux is None else q.shape[1],), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), sinks


for _op in ("attention_backward", "attention_backward_varlen"):
    refuse_backward(_op, "attention is differentiable once")


def differentiable(op: str, tensors: int) -> None:
    """Registers the backward of ``taut::<op>``, of which the first ``tensors`` arguments (q, k, v, and ends of sequences) are
    followed by the rules: ``softmax_scale, causal, window, softcap``, with ``mask`` if it takes one, ``s_aux, alibi_slopes``."""
    names = ("softmax_scale", "causal", "window", "softcap", *(("mask",) if tensors == 3 else ()), "s_aux", "alibi_slopes")
    backward_op = getattr(torch.ops.taut, op.replace("prefill", "backward"))

    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *(x if isinstance(x, Tensor) else None for x in inputs))
        ctx.others = tuple(None if isinstance(x, Tensor) else x for x in inputs)

    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        needs = dict(zip(names, ctx.needs_input_grad[tensors:], strict=False))
        for name in ("mask", "alibi_slopes"):
            if needs.get(name):
                raise NotImplementedError(f"taut::{op} gives {name} no gradient: detach it")
        out, lse, *saved = ctx.saved_tensors
        inputs = [other if t is None else t for t, other in zip(saved, ctx.others, strict=True)]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        dq, dk, dv, ds_aux = backward_op(grad_out, grad_lse, *inputs[:3], out, lse, *inputs[3:])
        grads: list[Tensor | None] = [dq, dk, dv, *[None] * (len(inputs) - 3)]
        if needs["s_aux"]:
            sinks = tensors + names.index("s_aux")
            grads[sinks] = ds_aux.to(inputs[sinks].dtype)
        return tuple(grads)

    torch.library.register_autograd(f"taut::{op}", backward, setup_context=setup_context)


def reference(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool = False,
    window: int = 0, softcap: float = 0.0, mask: Tensor | None = None, s_aux: Tensor | None = None, alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Autograd through the float64 reference of attention: dq, dk, dv, and ds_aux where there is an s_aux."""
    inputs = [t.detach().double().requires_grad_() for t in (q, k, v, s_aux) if t is not None]
    sinks = None if s_aux is None else inputs[3]
    with torch.enable_grad():
        out, lse = rules.reference(*inputs[:3], softmax_scale, causal, window, softcap, mask, sinks, alibi_slopes)
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse.double()
    return torch.autograd.grad((out, lse), inputs, (grad_out.double(), grad_lse))


def cost(
    batch: int, q_heads: int, kv_heads: int, queries: int, keys: int, head_dim: int, value_dim: int, causal: bool = False,
    window: int = 0, element_bytes: int = 4,
) -> dict[str, int]:  # fmt: skip
    """Counted work of one call: two flops for each element of the five products that is visible; each tensor's bytes once."""
    pairs = rules.visible_pairs(queries, keys, causal, window)
    rows, columns = q_heads * queries, kv_heads * keys
    elements = rows * (2 * head_dim + 2 * value_dim) + columns * 2 * (head_dim + value_dim)
    return {
        "flops": 2 * batch * q_heads * pairs * (3 * head_dim + 2 * value_dim),
        "bytes": batch * (elements * element_bytes + rows * 4),
    }
