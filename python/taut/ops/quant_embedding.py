"""quant_embedding: ``out[..., :] = dequant(table)[ids]``, a table of embeddings in a low-bit format."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ..formats import WeightFormat
from .pack_weight import check_packed

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quant_embedding(
    ids: Tensor, packed: Tensor, rows: int, columns: int, format: WeightFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Rows ``ids`` (int64, any shape) of a packed table ``[rows, columns]`` as numbers, ``dtype [*ids.shape, columns]``.

    ``packed``: from ``pack_weight``, on the CPU; only the rows asked for are read. A number is rounded once to float32, and from
    there to ``dtype``. No gradient. Raises ``ValueError`` for wrong shapes, dtypes or devices, ``IndexError`` for an id outside
    ``[0, rows)``.
    """
    if ids.dtype != torch.int64:
        raise ValueError(f"ids must be int64, got {ids.dtype}")
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if _native.device_of(ids=ids, packed=packed).type != "cpu":
        raise ValueError("a quantized embedding is looked up on the CPU; there is no CUDA kernel for it")
    check_packed(packed, rows, columns, format)
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
        raise IndexError(f"an id must be 0..{rows - 1}, got {int(ids.min())}..{int(ids.max())}")
    return torch.ops.taut.quant_embedding(ids, packed, rows, columns, format.code, format.group_size, format.zeros, dtype)


@torch.library.register_fake("taut::quant_embedding")
def _fake(
    ids: Tensor, packed: Tensor, rows: int, columns: int, format: int, group_size: int, zeros: bool, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    return packed.new_empty((*ids.shape, columns), dtype=dtype)


def reference(ids: Tensor, w: Tensor) -> Tensor:
    """The definition in float64: ``w`` the dequantized table ``[rows, columns]``."""
    return w.double()[ids]


def cost(count: int, columns: int, format: WeightFormat, element_bytes: int = 4) -> dict[str, int]:
    """Counted work of one call: a multiply a number; bytes of the rows asked for in canonical form, and of out."""
    return {"flops": count * columns, "bytes": count * (format.canonical_bytes(1, columns) + columns * element_bytes)}
