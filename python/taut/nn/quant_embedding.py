"""QuantEmbedding: an ``nn.Embedding`` whose table is stored in a low-bit format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _native
from ..formats import WeightFormat
from ..ops.pack_weight import pack_weight
from ..ops.quant_linear import FLOAT_DTYPES
from ..ops.quantize_weight import quantize_weight
from .packed_weight import PackedWeight
from .quant_linear import QuantLinear


class QuantEmbedding(PackedWeight, nn.Embedding):
    """Rows of ``dequant(table) [num_embeddings, embedding_dim]``, times ``embed_scale`` if it is given (as Gemma has it, in the
    dtype of the rows). Only the rows asked for are read. It is looked up on the CPU.

    How the table is kept, saved and moved: ``PackedWeight``. ``head()`` is a ``QuantLinear`` over the same packed bytes, for models
    whose output head is tied to the embeddings. ``dtype`` is that of the rows. Nothing in it trains.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None = None, *, format: WeightFormat,
        embed_scale: float | None = None, dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # WHY not nn.Embedding's: it would allocate a float table
        self._make_weight(num_embeddings, embedding_dim, format, dtype, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.embed_scale = embed_scale
        self._call = (num_embeddings, embedding_dim, format.code, format.group_size, format.zeros)
        self._scales = {} if embed_scale is None else {dtype: float(torch.tensor(embed_scale).to(dtype)) for dtype in FLOAT_DTYPES}

    @classmethod
    def from_float(cls, embedding: nn.Embedding, format: WeightFormat) -> QuantEmbedding:
        """Quantizes the table of ``embedding``; one with a scale of its own (``embed_scale``, as Gemma's) keeps it.

        Raises ``ValueError`` as ``quantize_weight``, for a table that is not on the CPU, and for one that limits the norm of its rows.
        """
        if embedding.max_norm is not None:
            raise ValueError("an embedding with max_norm changes its table as it is used, and cannot be low-bit")
        weight = embedding.weight
        parts = quantize_weight(weight.detach(), format)
        scale = getattr(embedding, "embed_scale", None)
        module = cls(
            embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx, format=format,
            embed_scale=None if scale is None else float(scale), device="meta",
        )  # fmt: skip
        module._set_packed(pack_weight(*parts, embedding.embedding_dim, format))
        module._like = torch.empty(0, dtype=weight.dtype)
        return module

    def head(self, activations: str = "auto", bias: Tensor | None = None) -> QuantLinear:
        """A ``QuantLinear`` from ``embedding_dim`` to ``num_embeddings`` over the packed table itself: no byte of it is copied.

        It stays one buffer until either module is loaded or moved anew.
        """
        self.finalize()
        module = QuantLinear(
            self.embedding_dim, self.num_embeddings, False, format=self.format, activations=activations, device="meta"
        )  # fmt: skip
        module._set_packed(self.packed)
        module._like = torch.empty_like(self._like)
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"QuantEmbedding takes ids in int64 or int32, got {ids.dtype}")
        if self.packed is None or self._layout != _native.layout_for(self.packed.device.type):
            self.finalize()
        if self.packed.device.type == "cuda" or ids.device != self.packed.device:
            raise ValueError(f"ids are on {ids.device}, the table on {self.packed.device}: a quantized embedding is looked up on the CPU")
        dtype = self._like.dtype
        rows = torch.ops.taut.quant_embedding(ids.long(), self.packed, *self._call, dtype)
        return rows * self._scales[dtype] if self._scales else rows

    def extra_repr(self) -> str:
        scale = "" if self.embed_scale is None else f", embed_scale={self.embed_scale}"
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.format}{scale}"
