"""QuantLinear: an ``nn.Linear`` whose weight is stored in a low-bit format."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..formats import WeightFormat, activation_code
from ..ops.pack_weight import dequantize_weight, pack_weight, unpack_weight
from ..ops.quant_linear import FLOAT_DTYPES
from ..ops.quantize_weight import quantize_weight


class QuantLinear(nn.Linear):
    """``y = x @ dequant(w)^T + bias`` for ``x [..., in_features]`` in float32, bfloat16 or float16.

    In a ``state_dict`` the weight is in canonical form: ``qweight`` (codes), ``scales``, and ``zeros`` if the format has
    them, so a checkpoint depends on no machine. In memory it is ``packed``, in the layout the kernels read; the change
    happens in ``finalize`` (called by ``load_state_dict`` and the loaders) and is undone when the state is saved.

    Built on the meta device it holds empty canonical parameters for a loader to fill.
    Trains through: the gradient reaches ``x`` and ``bias``, never the weight. ``weight`` is a read-only, dequantized copy.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, format: WeightFormat, activations: str = "int8",
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # WHY not nn.Linear's: it would allocate a float weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activations = format, activations
        self._call = (out_features, format.code, format.group_size, format.zeros, activation_code(activations))
        groups = format.num_groups(in_features)

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.qweight = empty(format.codes_shape(out_features, in_features), format.codes_dtype)
        self.scales = empty((out_features, groups), torch.float16)
        self.zeros = empty((out_features, groups), torch.uint8) if format.zeros else None
        self.packed: Tensor | None
        self.register_buffer("packed", None, persistent=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        # transformers' tensor parallelism passes plain local tensors to modules that say so
        self._hf_quantized_needs_local_tp = True

    @classmethod
    def from_float(cls, linear: nn.Linear, format: WeightFormat, activations: str = "int8") -> QuantLinear:
        """Quantizes the weight of ``linear``, whose bias it takes over. Raises ``ValueError`` as ``quantize_weight``."""
        activation_code(activations)
        codes, scales, zeros = quantize_weight(linear.weight.detach(), format)
        return cls.from_canonical(codes, scales, zeros, linear.bias, linear.in_features, format, activations)

    @classmethod
    def from_canonical(
        cls, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, in_features: int,
        format: WeightFormat, activations: str = "int8",
    ) -> QuantLinear:  # fmt: skip
        """A module over an already quantized weight (canonical form, see ``taut.formats``)."""
        module = cls(in_features, codes.shape[0], bias=False, format=format, activations=activations, device="meta")
        module._set_packed(pack_weight(codes, scales, zeros, in_features, format))
        if bias is not None:
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return module

    def _set_packed(self, packed: Tensor) -> None:
        self.packed = packed
        self.qweight = self.scales = self.zeros = None

    def finalize(self) -> None:
        """Canonical parameters to ``packed``, in place. No-op if already done. Raises ``ValueError`` on a bad checkpoint."""
        if self.packed is None:
            zeros = self.zeros.data if self.zeros is not None else None
            self._set_packed(pack_weight(self.qweight.data, self.scales.data, zeros, self.in_features, self.format))

    def canonical(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """``(codes, scales, zeros or None)`` as they are stored on disk."""
        if self.packed is None:
            return self.qweight.data, self.scales.data, None if self.zeros is None else self.zeros.data
        return unpack_weight(self.packed, self.out_features, self.in_features, self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as numbers, ``[out_features, in_features]``."""
        self.finalize()
        return dequantize_weight(self.packed, self.out_features, self.in_features, self.format, dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A dequantized copy: reading it costs a pass over the weight, writing to it changes nothing."""
        return self.dequantize(self.bias.dtype if self.bias is not None else torch.float32)

    @property
    def weight_bytes(self) -> int:
        """Bytes the weight takes in memory now (codes, scales, zeros, and the layout's padding)."""
        if self.packed is not None:
            return self.packed.numel()
        return self.format.canonical_bytes(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.in_features:
            raise ValueError(f"QuantLinear takes x [..., {self.in_features}], got {list(x.shape)}")
        if x.dtype not in FLOAT_DTYPES:
            raise ValueError(f"QuantLinear takes float32, bfloat16 or float16, got {x.dtype}")
        if self.packed is None:
            self.finalize()
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        return torch.ops.taut.quant_linear(x, self.packed, bias, *self._call)

    def reset_parameters(self) -> None:
        """Nothing to draw at random: a low-bit weight comes from a float one or from a checkpoint."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.format}, activations={self.activations}"
        )

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, value in zip(("qweight", "scales", "zeros"), self.canonical(), strict=True):
                if value is not None:
                    destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        names = ["qweight", "scales"] + (["zeros"] if self.format.zeros else [])
        values = [state_dict.get(prefix + name) for name in names]
        if any(value is not None and value.device.type != "cpu" for value in values):
            super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
            return
        missing_keys.extend(prefix + name for name, value in zip(names, values, strict=True) if value is None)
        if all(value is not None for value in values):
            zeros = values[2] if self.format.zeros else None
            try:
                self._set_packed(pack_weight(values[0], values[1], zeros, self.in_features, self.format))
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in names}}
        held = self.qweight, self.scales, self.zeros
        self.qweight = self.scales = self.zeros = None  # WHY: else the parent reports the three as missing
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.packed is None:
            self.qweight, self.scales, self.zeros = held
