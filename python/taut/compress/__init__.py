"""How weights are chosen: which are kept, and what the kept ones become, so that a layer's outputs on real text change least."""

from .calibration import calibration_ids
from .pruning import METHODS, CompressReport, LayerReport, compress

__all__ = ["METHODS", "CompressReport", "LayerReport", "calibration_ids", "compress"]
