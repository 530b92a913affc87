"""pack_sparse, unpack_sparse: a sparse weight between its canonical form and the layout that the kernels of its device read."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats.sparse import SparseCanonical, SparseFormat


def pack_sparse(weight: SparseCanonical, in_features: int, format: SparseFormat) -> Tensor:
    """Canonical form to the layout of the tensors' device (``csrc/common/sparse.h``): ``uint8``, 1-D, opaque. A bijection.

    Raises ``ValueError`` if shapes or dtypes are off, scales or 16-bit numbers are not finite, or places within their m do not ascend.
    """
    codes, scales, meta = weight
    rows = codes.shape[0] if codes.dim() == 2 else 0
    if (scales is not None) != format.has_scales:
        raise ValueError(f"scales of a {format} weight must be {'given' if format.has_scales else 'None'}")
    if scales is None:
        scales = torch.empty(rows, 0, dtype=torch.float16, device=codes.device)
    kind = _native.device_of(codes=codes, scales=scales, meta=meta).type
    expected = (
        ("codes", codes, format.weights.codes_dtype, format.codes_shape(rows, in_features)),
        ("scales", scales, torch.float16, format.scales_shape(rows, in_features)),
        ("meta", meta, torch.uint8, format.meta_shape(rows, in_features)),
    )
    for name, part, dtype, shape in expected:
        if part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(
                f"{name} of a {format} weight [{rows}, {in_features}] must be {dtype} {list(shape)}, got {part.dtype} {list(part.shape)}"
            )
    if not bool(torch.isfinite(scales).all()):
        raise ValueError("scales must be finite")
    if not format.has_scales and not bool(torch.isfinite(codes).all()):
        raise ValueError(f"codes of a {format} weight must be finite: they are its numbers")
    try:
        return _native.ops_for(kind).pack_sparse(codes, scales, meta, in_features, *_arguments(format), _native.layout_for(kind))
    except RuntimeError as error:
        if "must ascend" not in str(error):
            raise
        raise ValueError(str(error).splitlines()[0]) from None


def unpack_sparse(packed: Tensor, out_features: int, in_features: int, format: SparseFormat) -> SparseCanonical:
    """The inverse of ``pack_sparse``. Raises ``ValueError`` where ``packed`` is no such weight's."""
    check_sparse(packed, out_features, in_features, format)
    ops, layout = _native.ops_for(packed.device.type), _native.layout_for(packed.device.type)
    return canonical(ops.unpack_sparse(packed, out_features, in_features, *_arguments(format), layout), format)


def canonical(parts: tuple[Tensor, Tensor, Tensor], format: SparseFormat) -> SparseCanonical:
    """What the op ``unpack_sparse`` gives, without the scales that the format does not have."""
    codes, scales, meta = parts
    return SparseCanonical(codes, scales if format.has_scales else None, meta)


def repack_sparse(packed: Tensor, layout: int, out_features: int, in_features: int, format: SparseFormat, device: torch.device) -> Tensor:
    """A packed weight on ``device``, in the layout that device's kernels read. ``layout`` is the one it is in."""
    if layout == _native.layout_for(device.type):
        return packed.to(device)
    if layout == _native.layout_for(packed.device.type):
        parts = unpack_sparse(packed, out_features, in_features, format)
    else:  # bytes that were moved as they are; the CPU ops read every layout
        parts = canonical(torch.ops.taut.unpack_sparse(packed.cpu(), out_features, in_features, *_arguments(format), layout), format)
    return pack_sparse(parts.to(device), in_features, format)


def check_sparse(packed: Tensor, out_features: int, in_features: int, format: SparseFormat) -> None:
    kind = _native.device_of(packed=packed).type
    expected = format.layout_bytes(out_features, in_features, _native.layout_for(kind))
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != expected:
        raise ValueError(
            f"packed must be uint8 [{expected}] for a {format} weight [{out_features}, {in_features}] on {packed.device}, "
            f"got {packed.dtype} {list(packed.shape)}"
        )


def _arguments(format: SparseFormat) -> tuple[int, int, int, int, int]:
    """How kernels are told of a format."""
    pattern = format.pattern
    return format.weights.code, format.weights.group_size, pattern.n, pattern.m, pattern.v


@torch.library.register_fake("taut::pack_sparse")
def _fake_pack(
    codes: Tensor, scales: Tensor, meta: Tensor, in_features: int, format: int, group_size: int, n: int, m: int, v: int,
    layout: int = 0,
) -> Tensor:  # fmt: skip
    f = SparseFormat.of_code(format, group_size, n, m, v)
    return codes.new_empty(f.layout_bytes(codes.shape[0], in_features, layout), dtype=torch.uint8)


@torch.library.register_fake("taut::unpack_sparse")
def _fake_unpack(
    packed: Tensor, out_features: int, in_features: int, format: int, group_size: int, n: int, m: int, v: int, layout: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    f = SparseFormat.of_code(format, group_size, n, m, v)
    return (
        packed.new_empty(f.codes_shape(out_features, in_features), dtype=f.weights.codes_dtype),
        packed.new_empty(f.scales_shape(out_features, in_features), dtype=torch.float16),
        packed.new_empty(f.meta_shape(out_features, in_features), dtype=torch.uint8),
    )
