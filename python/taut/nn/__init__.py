"""Modules that stand in for torch's."""

from .packed_weight import PackedWeight
from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear
from .sparse_linear import SparseLinear

__all__ = ["PackedWeight", "QuantEmbedding", "QuantLinear", "SparseLinear"]
