"""taut takes the slack out of language models: low-bit kernels behind PyTorch ops, swapped into models in one call."""

from typing import Any

from . import integrations
from ._native import batch_invariant, build_info, cpu_features, explain, force_impl, list_impls
from .formats import WeightFormat
from .fuse import unfuse
from .nn import QuantLinear, SparseLinear
from .roofline import Roofline, roofline
from .swap import SwapReport, swap

__version__ = build_info()["version"]
__all__ = [
    "Cache", "Config", "QuantLinear", "Roofline", "SparseLinear", "SwapReport", "WeightFormat", "batch_invariant", "build_info",
    "cpu_features", "explain", "force_impl", "list_impls", "roofline", "save", "swap", "unfuse",
]  # fmt: skip

integrations.install()


def __getattr__(name: str) -> Any:
    # WHY lazy: these need transformers, whose import takes longer than taut's own.
    if name == "Cache":
        from .integrations import kv_cache

        return kv_cache.Cache
    if name in ("Config", "save"):
        from .integrations import transformers

        return getattr(transformers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
