"""Modules that stand in for torch's."""

from .packed_weight import PackedWeight
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear

__all__ = ["PackedWeight", "QuantEmbedding", "QuantLinear"]
