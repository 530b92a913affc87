"""pack_weight, unpack_weight, dequantize_weight: between the canonical form, the kernels' layout, and numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import Canonical, WeightFormat


def check_device(device: torch.device, format: WeightFormat) -> None:
    """Raises ``ValueError`` where kernels of ``device`` do not take weights of this format."""
    if _native.layout_for(device.type) == _native.MMA_TILES:
        format.check_cuda()


def check_canonical(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, global_scale: Tensor | None, in_features: int, format: WeightFormat
) -> None:
    device = _native.device_of(codes=codes, scales=scales, zeros=zeros, global_scale=global_scale)
    check_device(device, format)
    if codes.dim() != 2 or tuple(codes.shape) != format.codes_shape(codes.shape[0], in_features) or codes.dtype != format.codes_dtype:
        raise ValueError(
            f"codes of a {format} weight with K={in_features} must be {format.codes_dtype} [N, {format.codes_shape(1, in_features)[1]}], "
            f"got {codes.dtype} {list(codes.shape)}"
        )
    expected = format.scales_shape(codes.shape[0], in_features)
    if tuple(scales.shape) != expected or scales.dtype != format.scales_dtype:
        raise ValueError(f"scales must be {format.scales_dtype} {list(expected)}, got {scales.dtype} {list(scales.shape)}")
    if format.zeros != (zeros is not None):
        raise ValueError(f"format {format} {'needs' if format.zeros else 'has no'} zeros")
    if zeros is not None and (tuple(zeros.shape) != expected or zeros.dtype != torch.uint8):
        raise ValueError(f"zeros must be torch.uint8 {list(expected)}, got {zeros.dtype} {list(zeros.shape)}")
    if zeros is not None and zeros.numel() and int(zeros.max()) > format.largest_zero:
        raise ValueError(f"zeros must be 0..{format.largest_zero}, got {int(zeros.max())}")
    if format.has_global_scale != (global_scale is not None):
        raise ValueError(f"format {format} {'needs' if format.has_global_scale else 'has no'} global_scale")
    if global_scale is not None and (tuple(global_scale.shape) != (1,) or global_scale.dtype != torch.float32):
        raise ValueError(f"global_scale must be torch.float32 [1], got {global_scale.dtype} {list(global_scale.shape)}")
    _check_finite(codes, scales, global_scale, format)


def _check_finite(codes: Tensor, scales: Tensor, global_scale: Tensor | None, format: WeightFormat) -> None:
    if format.name == "mxfp4":
        finite = scales != 255
    elif format.name == "nvfp4":
        finite = (scales & 0x7F != 0x7F).all() & torch.isfinite(global_scale).all()
    else:
        finite = torch.isfinite(scales)
    if not bool(finite.all()):
        raise ValueError("scales must be finite")
    if format.codes_dtype == torch.float8_e4m3fn and bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise ValueError(f"codes of an {format.name} weight must be finite, got a NaN")
    if format.name == "ternary" and codes.numel() and int(codes.max()) > 242:
        raise ValueError(f"a byte of five ternary codes is at most 242, got {int(codes.max())}")


def pack_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, global_scale: Tensor | None, in_features: int, format: WeightFormat
) -> Tensor:
    """Canonical form to the layout that the kernels of the tensors' device read: ``uint8``, 1-D, opaque, on that device.

    A bijection: ``unpack_weight`` gives the same bits back. Raises ``ValueError`` if shapes, dtypes or ranges are off, or if
    the tensors are on CUDA and the format is for the CPU only.
    """
    check_canonical(codes, scales, zeros, global_scale, in_features, format)
    device = codes.device.type
    layout = _native.layout_for(device)
    return _native.ops_for(device).pack_weight(codes, scales, zeros, in_features, format.code, format.group_size, layout, global_scale)


def unpack_weight(packed: Tensor, out_features: int, in_features: int, format: WeightFormat) -> Canonical:
    """The inverse of ``pack_weight``: ``(codes, scales, zeros or None, global_scale or None)``."""
    check_packed(packed, out_features, in_features, format)
    ops, layout = _native.ops_for(packed.device.type), _native.layout_for(packed.device.type)
    return canonical(ops.unpack_weight(packed, out_features, in_features, format.code, format.group_size, format.zeros, layout), format)


def canonical(parts: tuple[Tensor, ...], format: WeightFormat) -> Canonical:
    """What ops return, with None for what the format does not have."""
    codes, scales, zeros, global_scale = parts
    return Canonical(codes, scales, zeros if format.zeros else None, global_scale if format.has_global_scale else None)


def repack(packed: Tensor, layout: int, out_features: int, in_features: int, format: WeightFormat, device: torch.device) -> Tensor:
    """A packed weight on ``device``, in the layout that device's kernels read. ``layout`` is the one it is in.

    Raises ``ValueError`` if the device is CUDA and the format is for the CPU only.
    """
    if layout == _native.layout_for(device.type):
        return packed.to(device)
    check_device(device, format)
    if layout == _native.layout_for(packed.device.type):
        parts = unpack_weight(packed, out_features, in_features, format)
    else:  # bytes that were moved as they are; the CPU ops read every layout
        arguments = packed.cpu(), out_features, in_features, format.code, format.group_size, format.zeros, layout
        parts = canonical(torch.ops.taut.unpack_weight(*arguments), format)
    return pack_weight(*parts.to(device), in_features, format)


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
    codes: Tensor, scales: Tensor, zeros: Tensor | None, in_features: int, format: int, group_size: int, layout: int,
    global_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    f = WeightFormat.of_code(format, group_size, zeros is not None)
    return codes.new_empty(f.layout_bytes(codes.shape[0], in_features, layout), dtype=torch.uint8)


@torch.library.register_fake("taut::unpack_weight")
def _fake_unpack(
    packed: Tensor, out_features: int, in_features: int, format: int, group_size: int, zeros: bool, layout: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return empty_canonical(packed, out_features, in_features, WeightFormat.of_code(format, group_size, zeros))


def empty_canonical(like: Tensor, n: int, k: int, format: WeightFormat) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes and dtypes that ops return a canonical weight in: what a format does not have is empty."""
    return (
        like.new_empty(format.codes_shape(n, k), dtype=format.codes_dtype),
        like.new_empty(format.scales_shape(n, k), dtype=format.scales_dtype),
        like.new_empty((n if format.zeros else 0, format.num_groups(k)), dtype=torch.uint8),
        like.new_empty((1 if format.has_global_scale else 0,), dtype=torch.float32),
    )


@torch.library.register_fake("taut::dequantize_weight")
def _fake_dequantize(
    packed: Tensor, out_features: int, in_features: int, format: int, group_size: int, zeros: bool, layout: int,
    row_begin: int, row_end: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return packed.new_empty((row_end - row_begin, in_features), dtype=dtype)
