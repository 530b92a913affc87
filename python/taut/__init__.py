"""taut takes the slack out of language models: low-bit kernels behind PyTorch ops, swapped into models in one call."""

from ._native import build_info, cpu_features, explain, force_impl, list_impls
from .formats import WeightFormat
from .nn import QuantLinear
from .swap import SwapReport, swap

__version__ = build_info()["version"]
__all__ = ["QuantLinear", "SwapReport", "WeightFormat", "build_info", "cpu_features", "explain", "force_impl", "list_impls", "swap"]
