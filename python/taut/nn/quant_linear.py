"""QuantLinear: an ``nn.Linear`` whose weight is stored in a low-bit format."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import _native
from ..formats import Canonical, WeightFormat, activation_code, check_activations
from ..ops.pack_weight import dequantize_weight, pack_weight, repack, unpack_weight
from ..ops.quant_linear import FLOAT_DTYPES
from ..ops.quantize_weight import quantize_weight


class DequantizedWeight(Tensor):
    """What ``QuantLinear.weight`` gives: the float weight, computed when an operation first needs its numbers.

    Models and libraries read ``weight.dtype``, ``.device`` and ``.shape`` in every forward; those cost nothing here.
    Any operation on it yields a plain tensor; writing to it raises ``ValueError``, since the write would be lost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, linear: QuantLinear, dtype: torch.dtype, device: torch.device) -> DequantizedWeight:
        shape = (linear.out_features, linear.in_features)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)

    def __init__(self, linear: QuantLinear, dtype: torch.dtype, device: torch.device) -> None:
        self._linear = linear
        self._is_hf_initialized = True  # transformers' weight initialization leaves it alone

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                if isinstance(value, cls):
                    raise ValueError(_READ_ONLY)

        def numbers(value):
            return value._linear.dequantize(value.dtype) if isinstance(value, cls) else value

        return func(*tree_map(numbers, args), **tree_map(numbers, kwargs))

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(_READ_ONLY)

    def numpy(self, *, force: bool = False):
        return self.detach().numpy(force=force)

    def __deepcopy__(self, memo) -> Tensor:
        return self.detach()

    def __reduce_ex__(self, protocol):
        return self.detach().__reduce_ex__(protocol)

    def __repr__(self, **_) -> str:
        return f"DequantizedWeight({list(self.shape)}, dtype={self.dtype}, of {self._linear.format})"


_READ_ONLY = "the weight of a QuantLinear is read-only: it is stored in low bits. Merge or edit the float model, then swap it"


# The parameters that hold the canonical form, in the order of ``taut.formats.Canonical``.
PARTS = ("qweight", "scales", "zeros", "global_scale")


class QuantLinear(nn.Linear):
    """``y = x @ dequant(w)^T + bias`` for ``x [..., in_features]`` in float32, bfloat16 or float16, on the CPU or on CUDA.

    ``format``: see ``taut.formats.KINDS``; on CUDA int4, int8 or fp8_e4m3. ``activations``: how x enters the product, see
    ``taut.ops.quant_linear``; "auto" is int8 on the CPU (float for weights of 8-bit floats) and float on CUDA.

    In a ``state_dict`` the weight is in canonical form: ``qweight`` (codes), ``scales``, and ``zeros`` or ``global_scale`` if
    the format has them, so a checkpoint depends on no machine. In memory it is ``packed``, in the layout the kernels of its device read;
    the change happens in ``finalize`` (called by ``load_state_dict`` and the loaders), is done again when the module moves
    between the CPU and CUDA, and is undone when the state is saved.

    Built on the meta device it holds empty canonical parameters for a loader to fill. ``dtype`` is that of the bias and of
    ``weight``; casting the module (``.half()``) changes those two and nothing that is stored.
    Trains through: the gradient reaches ``x`` and ``bias``, never the weight. ``weight`` is a ``DequantizedWeight``.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, format: WeightFormat, activations: str = "auto",
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        nn.Module.__init__(self)  # WHY not nn.Linear's: it would allocate a float weight
        self.in_features, self.out_features = in_features, out_features
        self.format, self.activations = format, activations
        call = (out_features, format.code, format.group_size, format.zeros)
        self._calls = {device: (*call, activation_code(activations, format, device)) for device in ("cpu", "cuda", "meta")}

        def empty(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.qweight = empty(format.codes_shape(out_features, in_features), format.codes_dtype)
        self.scales = empty(format.scales_shape(out_features, in_features), format.scales_dtype)
        self.zeros = empty((out_features, format.num_groups(in_features)), torch.uint8) if format.zeros else None
        self.global_scale = empty((1,), torch.float32) if format.has_global_scale else None
        self.packed: Tensor | None
        self.register_buffer("packed", None, persistent=False)
        self._layout = _native.ROWS8
        # Holds no number: it is what remembers the dtype through .to(), .half() and the like.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=device), persistent=False)
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
        if device.type == "cuda":
            format.check_cuda()
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

    def _set_packed(self, packed: Tensor) -> None:
        self.packed, self._layout = packed, _native.layout_for(packed.device.type)
        for name in PARTS:
            setattr(self, name, None)

    def finalize(self) -> None:
        """Canonical parameters to ``packed``, in place, in the layout of the device they are on. No-op if that is done.

        Raises ``ValueError`` on a bad checkpoint.
        """
        if self.packed is not None:
            if self._layout != _native.layout_for(self.packed.device.type):
                shape = self.out_features, self.in_features
                self._set_packed(repack(self.packed, self._layout, *shape, self.format, self.packed.device))
        else:
            if self.qweight.device.type == "meta":
                raise ValueError("this QuantLinear was built on the meta device and holds no weight yet: load a state_dict first")
            self._set_packed(pack_weight(*self.canonical(), self.in_features, self.format))

    def canonical(self) -> Canonical:
        """``(codes, scales, zeros or None, global_scale or None)`` as they are stored on disk."""
        if self.packed is None:
            parts = (getattr(self, name) for name in PARTS)
            return Canonical(*(None if part is None else part.data for part in parts))
        self.finalize()
        return unpack_weight(self.packed, self.out_features, self.in_features, self.format)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as numbers, ``[out_features, in_features]``."""
        self.finalize()
        return dequantize_weight(self.packed, self.out_features, self.in_features, self.format, dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight as a read-only float tensor, dequantized where an operation needs it (a pass over the weight each time)."""
        if torch.compiler.is_compiling():
            return self.dequantize(self._like.dtype)
        return DequantizedWeight(self, self._like.dtype, self._like.device if self.packed is None else self.packed.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes the weight takes in memory now (codes, scales, and the layout's padding)."""
        if self.packed is not None:
            return self.packed.numel()
        return self.format.canonical_bytes(self.out_features, self.in_features)

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

    def reset_parameters(self) -> None:
        """Nothing to draw at random: a low-bit weight comes from a float one or from a checkpoint."""

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"weight={self.format}, activations={self.activations}"
        )

    def _apply(self, fn, recurse: bool = True):
        # .half() and .to(dtype) cast every float parameter; codes and scales are what is stored, and must not be rounded.
        held = {name: value for name in (*PARTS, "packed") if (value := getattr(self, name)) is not None}
        for name in held:
            setattr(self, name, None)
        try:
            super()._apply(fn, recurse)
            for name in held:
                held[name] = self._moved_packed(held[name], fn) if name == "packed" else _moved_parameter(held[name], fn)
        finally:  # also where a device has no memory left: the weight stays what it was
            for name, value in held.items():
                setattr(self, name, value)
        return self

    def _moved_packed(self, packed: Tensor, fn) -> Tensor:
        device = fn(packed.new_empty(0)).device
        layout = _native.layout_for(device.type)
        if layout == self._layout:
            return _moved(packed, fn)
        if "meta" in (packed.device.type, device.type):
            moved = torch.empty(self.format.layout_bytes(self.out_features, self.in_features, layout), dtype=torch.uint8, device=device)
        else:
            moved = repack(packed, self._layout, self.out_features, self.in_features, self.format, device)
        self._layout = layout
        return moved

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, value in zip(PARTS, self.canonical(), strict=True):
                if value is not None:
                    destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        has = {"zeros": self.format.zeros, "global_scale": self.format.has_global_scale}
        names = [name for name in PARTS if has.get(name, True)]
        values = {name: state_dict.get(prefix + name) for name in names}
        missing_keys.extend(prefix + name for name, value in values.items() if value is None)
        if all(value is not None for value in values.values()):
            try:
                if tuple(values["qweight"].shape) != self.format.codes_shape(self.out_features, self.in_features):
                    expected = list(self.format.codes_shape(self.out_features, self.in_features))
                    raise ValueError(f"qweight must be {expected}, got {list(values['qweight'].shape)}")
                parts = Canonical(*(values[name].detach() if name in values else None for name in PARTS))
                if not (local_metadata.get("assign_to_params_buffers") or self._like.is_meta):
                    parts = parts.to(self._like.device)
                self._set_packed(pack_weight(*parts, self.in_features, self.format))
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in names}}
        held = {name: getattr(self, name) for name in PARTS}
        for name in PARTS:  # WHY: else the parent reports them as missing
            setattr(self, name, None)
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if self.packed is None:
            for name, value in held.items():
                setattr(self, name, value)
        elif self._like.device.type == "meta":
            self._like = torch.empty(0, dtype=self._like.dtype, device=self.packed.device)


def _moved(tensor: Tensor, fn) -> Tensor:
    """What ``fn`` of ``Module._apply`` makes of a tensor, but for its dtype."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)


def _moved_parameter(parameter: nn.Parameter, fn) -> nn.Parameter:
    return nn.Parameter(_moved(parameter.data, fn), requires_grad=False)
