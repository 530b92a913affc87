"""SparseLinear: an ``nn.Linear`` of whose weight few numbers are kept, in a low-bit format or in 16 bits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _native
from ..formats import NumberFormat, check_activations
from ..formats.sparse import SparseCanonical, SparseFormat, sparsify
from ..ops.pack_sparse import pack_sparse, repack_sparse, unpack_sparse
from ..ops.quant_linear import FLOAT_DTYPES
from ..ops.quantize_weight import quantize_weight
from ..ops.sparse_linear import dequantize_sparse, sparse_linear
from .quant_linear import QuantLinear


def numbers_or_codes(weight: Tensor, format: SparseFormat) -> tuple[Tensor, Tensor | None]:
    """A dense weight [N, K] as codes and scales of ``format.weights``, or as its numbers and no scales. Raises ``ValueError``."""
    if isinstance(format.weights, NumberFormat):
        return format.weights.codes_of(weight), None
    parts = quantize_weight(weight, format.weights)
    return parts.codes, parts.scales


class SparseLinear(QuantLinear):
    """``y = x @ dequant(w)^T + bias`` for ``x [..., in_features]`` in float32, bfloat16 or float16; w is N:M or V:N:M sparse.

    ``format``: a ``taut.formats.sparse.SparseFormat``. ``activations``: as for ``QuantLinear``, but for "int8_outliers".
    In a ``state_dict`` the weight is in canonical form: ``qweight``, ``scales`` but for weights of 16 bits, ``meta`` (``SparseCanonical``).
    Else as ``PackedWeight``.
    Raises ``ValueError`` where the pattern's blocks do not divide ``in_features``, and for other devices than the CPU and CUDA.
    """

    parts = ("qweight", "scales", "meta")
    canonical_type = SparseCanonical
    format: SparseFormat

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, format: SparseFormat, activations: str = "auto",
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # WHY not nn.Linear's: it would allocate a float weight
        self.in_features, self.out_features, self.format, self.activations = in_features, out_features, format, activations
        check_activations(activations, format)
        shapes = (
            (format.codes_shape(out_features, in_features), format.weights.codes_dtype),
            (format.scales_shape(out_features, in_features), format.weights.scales_dtype),
            (format.meta_shape(out_features, in_features), torch.uint8),
        )
        for name, (shape, kind) in zip(self.parts, shapes, strict=True):
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=kind, device=device), requires_grad=False))
        if not format.has_scales:
            self.scales = None
        self.zeros = self.global_scale = None  # what a QuantLinear may have besides
        self.register_buffer("packed", None, persistent=False)
        self._layout = _native.ROWS8
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None)

    @classmethod
    def from_float(cls, linear: nn.Linear, format: SparseFormat, activations: str = "auto") -> SparseLinear:
        """Prunes the weight of ``linear`` and quantizes it, or rounds it to 16 bits; its bias is taken over.

        A weight that holds to the pattern keeps its nonzeros; of another one the largest of each block are kept. Raises ``ValueError``.
        That is the CPU's work: a weight on a CUDA device is copied for as long as it takes, and packed where it was.
        """
        check_activations(activations, format)
        device = _native.device_of(weight=linear.weight)
        weight = linear.weight.detach().cpu()
        mask = weight != 0 if format.pattern.holds(weight) else format.pattern.mask(weight.float().abs())
        codes, scales = numbers_or_codes(torch.where(mask, weight, 0.0), format)
        module = cls(linear.in_features, weight.shape[0], bias=False, format=format, activations=activations, device="meta")
        module._set_packed(pack_sparse(sparsify(codes, scales, mask, format).to(device), linear.in_features, format))
        module._like = torch.empty(0, dtype=weight.dtype, device=device)
        if linear.bias is not None:
            module.bias = linear.bias
        return module

    def _pack(self, parts: SparseCanonical) -> Tensor:
        return pack_sparse(parts, self.in_features, self.format)

    def _unpack(self) -> SparseCanonical:
        return unpack_sparse(self.packed, self.out_features, self.in_features, self.format)

    def _repack(self, packed: Tensor, device: torch.device) -> Tensor:
        return repack_sparse(packed, self._layout, self.out_features, self.in_features, self.format, device)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        self.finalize()
        return dequantize_sparse(self.canonical(), self.in_features, self.format, dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"SparseLinear takes x [..., {self.in_features}], got {list(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"SparseLinear takes float32, bfloat16 or float16, got {x.dtype}")
        if self.packed is None or self._layout != _native.layout_for(x.device.type):
            self.finalize()
        for name, tensor in (("weight", self.packed), ("bias", self.bias)):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"x is on {x.device}, the {name} of this SparseLinear on {tensor.device}: move one of them")
        bias = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        return sparse_linear(x, self.packed, bias, self.out_features, self.format, self.activations)
