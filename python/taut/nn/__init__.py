"""Modules that stand in for torch's."""

from .quant_linear import QuantLinear

__all__ = ["QuantLinear"]
