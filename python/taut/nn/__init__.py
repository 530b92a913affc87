"""Modules that stand in for torch's."""

from .quant_embedding import QuantEmbedding
from .quant_linear import QuantLinear

__all__ = ["QuantEmbedding", "QuantLinear"]
