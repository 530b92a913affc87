"""pack_weight, unpack_weight, dequantize_weight: between the canonical form, the kernels' layout, and numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import WeightFormat


def check_canonical(codes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, format: WeightFormat) -> None:
    _native.device_of(codes=codes, scales=scales, zeros=zeros)
    if codes.dim() != 2 or tuple(codes.shape) != format.codes_shape(codes.shape[0], in_features) or codes.dtype != format.codes_dtype:
        raise ValueError(
            f"codes of a {format} weight with K={in_features} must be {format.codes_dtype} [N, {format.codes_shape(1, in_features)[1]}], "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    expected = (codes.shape[0], format.num_groups(in_features))
    if tuple(scales.shape) != expected or scales.dtype != torch.float16:
        raise ValueError(f"scales must be torch.float16 {list(expected)}, got {scales.dtype} {list(scales.shape)}")
    if format.zeros != (zeros is not None):
        raise ValueError(f"format {format} {'needs' if format.zeros else 'has no'} zeros")
    if zeros is not None and (tuple(zeros.shape) != expected or zeros.dtype != torch.uint8):
        raise ValueError(f"zeros must be torch.uint8 {list(expected)}, got {zeros.dtype} {list(zeros.shape)}")
    if zeros is not None and zeros.numel() and int(zeros.max()) > 15:
        raise ValueError(f"zeros must be 0..15, got {int(zeros.max())}")
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales must be finite")
    if format.name == "fp8_e4m3" and bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError("codes of an fp8_e4m3 weight must be finite, got a NaN")


def pack_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, format: WeightFormat) -> Tensor:
    """Canonical form to the layout that the kernels of the tensors' device read: ``uint8``, 1-D, opaque, on that device.

    A bijection: ``unpack_weight`` gives the same bits back. Raises ``ValueError`` if shapes, dtypes or ranges are off.
    """
    check_canonical(codes, scales, zeros, in_features, format)
    device = codes.device.type
    layout = _native.layout_for(device)
    return _native.ops_for(device).pack_weight(codes, scales, zeros, in_features, format.code, format.group_size, layout)


def unpack_weight(packed: Tensor, out_features: int, in_features: int, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """The inverse of ``pack_weight``: ``(codes, scales, zeros or None)``."""
    check_packed(packed, out_features, in_features, format)
    ops, layout = _native.ops_for(packed.device.type), _native.layout_for(packed.device.type)
    codes, scales, zeros = ops.unpack_weight(packed, out_features, in_features, format.code, format.group_size, format.zeros, layout)
    return codes, scales, zeros if format.zeros else None


def repack(packed: Tensor, layout: int, out_features: int, in_features: int, format: WeightFormat, device: torch.device) -> Tensor:
    """A packed weight on ``device``, in the layout that device's kernels read. ``layout`` is the one it is in."""
    if layout == _native.layout_for(device.type):
        return packed.to(device)
    if layout == _native.layout_for(packed.device.type):
        parts = unpack_weight(packed, out_features, in_features, format)
    else:  # bytes that were moved as they are; the CPU ops read every layout
        arguments = packed.cpu(), out_features, in_features, format.code, format.group_size, format.zeros, layout
        parts = torch.ops.taut.unpack_weight(*arguments)
    codes, scales, zeros = (None if part is None else part.to(device) for part in parts)
    return pack_weight(codes, scales, zeros if format.zeros else None, in_features, format)


def dequantize_weight(
    packed: Tensor, out_features: int, in_features: int, format: WeightFormat, dtype: torch.dtype = torch.float32,
    row_begin: int = 0, row_end: int | None = None,
) -> Tensor:  # fmt: skip
    """Rows ``[row_begin, row_end)`` of the weight as numbers, ``dtype [rows, K]`` (float32, bfloat16, float16)."""
    check_packed(packed, out_features, in_features, format)
    row_end = out_features if row_end is None else row_end
    if not 0 <= row_begin <= row_end <= out_features:
        raise ValueError(f"rows must satisfy 0 <= row_begin <= row_end <= {out_features}, got {row_begin} and {row_end}")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    ops, layout = _native.ops_for(packed.device.type), _native.layout_for(packed.device.type)
    return ops.dequantize_weight(
        packed, out_features, in_features, format.code, format.group_size, format.zeros, layout, row_begin, row_end, dtype
    )


def check_packed(packed: Tensor, out_features: int, in_features: int, format: WeightFormat) -> None:
    _native.device_of(packed=packed)
    expected = format.layout_bytes(out_features, in_features, _native.layout_for(packed.device.type))
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise ValueError(
            f"packed must be uint8 [{expected}] for a {format} weight [{out_features}, {in_features}], "
            f"got {packed.dtype} {list(packed.shape)}"
        )


@torch.library.register_fake("taut::pack_weight")
def _fake_pack(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, format: int, group_size: int, layout: int
) -> Tensor:  # fmt: skip
    f = WeightFormat.of_code(format, group_size, zeros is not None)
    return codes.new_empty(f.layout_bytes(codes.shape[0], in_features, layout), dtype=torch.uint8)


@torch.library.register_fake("taut::unpack_weight")
def _fake_unpack(
    packed: Tensor, out_features: int, in_features: int, format: int, group_size: int, zeros: bool, layout: int
) -> tuple[Tensor, Tensor, Tensor]:
    f = WeightFormat.of_code(format, group_size, zeros)
    groups = f.num_groups(in_features)
    return (
        packed.new_empty(f.codes_shape(out_features, in_features), dtype=f.codes_dtype),
        packed.new_empty((out_features, groups), dtype=torch.float16),
        packed.new_empty((out_features if zeros else 0, groups), dtype=torch.uint8),
    )


@torch.library.register_fake("taut::dequantize_weight")
def _fake_dequantize(
    packed: Tensor, out_features: int, in_features: int, format: int, group_size: int, zeros: bool, layout: int,
    row_begin: int, row_end: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty((row_end - row_begin, in_features), dtype=dtype)
