"""QuantLinear: an ``nn.Linear`` whose weight is stored in a low-bit format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _native
from ..formats import WeightFormat, activation_code, check_activations
from ..ops.pack_weight import check_device, pack_weight
from ..ops.quant_linear import FLOAT_DTYPES
from ..ops.quantize_weight import quantize_weight
from .packed_weight import PackedWeight


class QuantLinear(PackedWeight, nn.Linear):
    """``y = x @ dequant(w)^T + bias`` for ``x [..., in_features]`` in float32, bfloat16 or float16, on the CPU or on CUDA.

    ``format``: see ``taut.formats.KINDS``; on CUDA int4, int8 or fp8_e4m3. ``activations``: how x enters the product, see
    ``taut.ops.quant_linear``; "auto" is int8 on the CPU (float for weights of 8-bit floats) and float on CUDA.

    How the weight is kept, saved and moved: ``PackedWeight``.

    Built on the meta device it holds empty canonical parameters for a loader to fill. ``dtype`` is that of the bias and of
    ``weight``; casting the module (``.half()``) changes those two and nothing that is stored.
    Trains through: the gradient reaches ``x`` and ``bias``, never the weight. ``weight`` is a ``DequantizedWeight``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, format: WeightFormat, activations: str = "auto",
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # WHY not nn.Linear's: it would allocate a float weight
        self._make_weight(out_features, in_features, format, dtype, device)
        self.activations = activations
        call = (out_features, format.code, format.group_size, format.zeros)
        self._calls = {device: (*call, activation_code(activations, format, device)) for device in ("cpu", "cuda", "meta")}
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None)
        # transformers' tensor parallelism passes plain local tensors to modules that say so
        self._hf_quantized_needs_local_tp = True

    @classmethod
    def from_float(cls, linear: nn.Linear, format: WeightFormat, activations: str = "auto") -> QuantLinear:
        """Quantizes the weight of ``linear``, whose bias it takes over. Raises ``ValueError`` as ``quantize_weight``.

        Quantizing is the CPU's work: a weight on a CUDA device is copied for as long as that takes, and packed where it was.
        """
        check_activations(activations, format)
        device = _native.device_of(weight=linear.weight)
        check_device(device, format)
        parts = quantize_weight(linear.weight.detach().cpu(), format).to(device)
        return cls.from_canonical(*parts, linear.bias, linear.in_features, format, activations, linear.weight.dtype)

    @classmethod
    def from_canonical(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, global_scale: Tensor | None, bias: Tensor | None, in_features: int,
        format: WeightFormat, activations: str = "auto", dtype: torch.dtype | None = None,
    ) -> QuantLinear:  # fmt: skip
        """A module over an already quantized weight (canonical form, see ``taut.formats``); ``dtype`` default: the bias's."""
        module = cls(in_features, codes.shape[0], bias=False, format=format, activations=activations, device="meta")
        module._set_packed(pack_weight(codes, scales, zeros, global_scale, in_features, format))
        if dtype is None and bias is not None:
            dtype = bias.dtype
        module._like = torch.empty(0, dtype=dtype, device=codes.device)
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"QuantLinear takes x [..., {self.in_features}], got {list(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"QuantLinear takes float32, bfloat16 or float16, got {x.dtype}")
        packed, bias = self._buffers["packed"], self._parameters["bias"]  # WHY: nn.Module's __getattr__ costs 0.5 us each
        device = x.device
        kind = device.type
        # WHY the layout is looked at in every call: unpickling to another device and accelerate move `packed` byte for byte.
        if packed is None or self._layout != _native.layout_for(kind):
            self.finalize()
            packed = self.packed
        if device != packed.device:
            raise ValueError(f"x is on {device}, the weight of this QuantLinear on {packed.device}: move one of them")
        if bias is not None:
            if bias.device != device:
                raise ValueError(f"x is on {device}, the bias of this QuantLinear on {bias.device}: move one of them")
            if bias.dtype != x.dtype:
                bias = bias.to(x.dtype)
        quant_linear = _native.ops_for(kind).quant_linear
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return quant_linear(x, packed, bias, *self._calls[kind])
        with torch._C._AutoDispatchBelowAutograd():  # WHY: asking a Python autograd formula that nothing needs takes 5 us
            return quant_linear(x, packed, bias, *self._calls[kind])

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.format}, activations={self.activations}"
        )
