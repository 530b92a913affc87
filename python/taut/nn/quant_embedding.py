"""QuantEmbedding: embeddings that are looked up in the packed table of the output head they are tied to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .quant_linear import QuantLinear


class QuantEmbedding(nn.Module):
    """``weight[ids]`` out of the weight of ``head``, which both share; only the rows asked for are dequantized. CPU only.

    It has no state of its own: a checkpoint holds the table once, as that of the head. ``scale``: what some models (Gemma)
    multiply their embeddings by, or None. No gradient reaches the table.
    """

    def __init__(self, head: QuantLinear, like: nn.Embedding) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = head.out_features, head.in_features
        self.padding_idx, self.original_class = like.padding_idx, type(like)
        self.scale: float | None = getattr(like, "scalar_embed_scale", None)
        self.__dict__["head"] = head  # WHY not an attribute: it is a child of the model already

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"QuantEmbedding takes ids in int64 or int32, got {ids.dtype}")
        head = self.head
        if head.packed is None or ids.device.type != "cpu" or head.packed.device.type != "cpu":
            raise ValueError(f"a QuantEmbedding is looked up on the CPU; ids are on {ids.device}, its table on {head.weight.device}")
        dtype, format = head._like.dtype, head.format
        rows = torch.ops.taut.quant_embedding(
            ids.long(), head.packed, head.out_features, head.in_features, format.code, format.group_size, format.zeros, dtype
        )
        # WHY through a tensor: these models round their factor to the dtype of the embeddings
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=dtype)

    @property
    def weight(self) -> Tensor:
        """The table as a read-only float tensor: that of the head."""
        return self.head.weight

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An embedding module of the original class, with the dequantized table."""
        extra = {} if self.scale is None else {"embed_scale": self.scale}
        with torch.device("meta"):
            module = self.original_class(self.num_embeddings, self.embedding_dim, self.padding_idx, **extra)
        if self.scale is not None:
            module.embed_scale = torch.tensor(self.scale)
        module.weight = nn.Parameter(self.head.dequantize(dtype or self.head._like.dtype))
        return module.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.head.format}"
