"""PackedWeight: what modules with a low-bit weight have in common. Its states, its layouts, and how it moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .. import _native
from ..formats import Canonical, WeightFormat
from ..ops.pack_weight import dequantize_weight, pack_weight, repack, unpack_weight

# The parameters that hold the canonical form, in the order of ``taut.formats.Canonical``.
PARTS = ("qweight", "scales", "zeros", "global_scale")


class DequantizedWeight(Tensor):
    """What ``weight`` of a module with low-bit weights gives: the float weight, computed when an operation first needs its numbers.

    Models and libraries read ``weight.dtype``, ``.device`` and ``.shape`` in every forward; those cost nothing here.
    Any operation on it yields a plain tensor; writing to it raises ``ValueError``, since the write would be lost.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, module: PackedWeight, dtype: torch.dtype, device: torch.device) -> DequantizedWeight:
        shape = (module.out_features, module.in_features)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)

    def __init__(self, module: PackedWeight, dtype: torch.dtype, device: torch.device) -> None:
        self._module = module
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
            return value._module.dequantize(value.dtype) if isinstance(value, cls) else value

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
        return f"DequantizedWeight({list(self.shape)}, dtype={self.dtype}, of {self._module.format})"


_READ_ONLY = "the weight of a QuantLinear is read-only: it is stored in low bits. Merge or edit the float model, then swap it"


class PackedWeight(nn.Module):
    """A weight ``[out_features, in_features]`` in a low-bit format, and all of a module that does not depend on what it computes.

    In a ``state_dict`` the weight is in canonical form: ``qweight`` (codes), ``scales``, and ``zeros`` or ``global_scale`` if
    the format has them, so a checkpoint depends on no machine. In memory it is ``packed``, in the layout the kernels of its
    device read; the change happens in ``finalize`` (called by ``load_state_dict`` and the loaders), is done again when the module
    moves between the CPU and CUDA, and is undone when the state is saved.
    """

    out_features: int
    in_features: int
    format: WeightFormat
    parts = PARTS  # names of the canonical form's parameters
    canonical_type: type = Canonical

    def _pack(self, parts: Canonical) -> Tensor:
        """Canonical form to the layout of the device it is on. Raises ``ValueError`` where it is not of this format."""
        return pack_weight(*parts, self.in_features, self.format)

    def _unpack(self) -> Canonical:
        return unpack_weight(self.packed, self.out_features, self.in_features, self.format)

    def _repack(self, packed: Tensor, device: torch.device) -> Tensor:
        """``packed``, which is in the layout ``_layout``, on a device and in its layout."""
        return repack(packed, self._layout, self.out_features, self.in_features, self.format, device)

    def _make_weight(
        self, out_features: int, in_features: int, format: WeightFormat, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> None:
        """Empty canonical parameters. To be called once, after ``nn.Module.__init__``."""
        self.in_features, self.out_features, self.format = in_features, out_features, format

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

    def _set_packed(self, packed: Tensor) -> None:
        self.packed, self._layout = packed, _native.layout_for(packed.device.type)
        for name in self.parts:
            setattr(self, name, None)

    def finalize(self) -> None:
        """Canonical parameters to ``packed``, in place, in the layout of the device they are on. No-op if that is done.

        Raises ``ValueError`` on a bad checkpoint.
        """
        if self.packed is not None:
            if self._layout != _native.layout_for(self.packed.device.type):
                self._set_packed(self._repack(self.packed, self.packed.device))
        else:
            if self.qweight.device.type == "meta":
                raise ValueError("this module was built on the meta device and holds no weight yet: load a state_dict first")
            self._set_packed(self._pack(self.canonical()))

    def canonical(self) -> Canonical:
        """``(codes, scales, zeros or None, global_scale or None)`` as they are stored on disk."""
        if self.packed is None:
            parts = (getattr(self, name) for name in self.parts)
            return self.canonical_type(*(None if part is None else part.data for part in parts))
        self.finalize()
        return self._unpack()

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

    def reset_parameters(self) -> None:
        """Nothing to draw at random: a low-bit weight comes from a float one or from a checkpoint."""

    def _apply(self, fn, recurse: bool = True):
        # .half() and .to(dtype) cast every float parameter; codes and scales are what is stored, and must not be rounded.
        held = {name: value for name in (*self.parts, "packed") if (value := getattr(self, name)) is not None}
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
            moved = self._repack(packed, device)
        self._layout = layout
        return moved

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, value in zip(self.parts, self.canonical(), strict=True):
                if value is not None:
                    destination[prefix + name] = value

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs) -> None:
        has = {"scales": self.format.has_scales, "zeros": self.format.zeros, "global_scale": self.format.has_global_scale}
        names = [name for name in self.parts if has.get(name, True)]
        values = {name: state_dict.get(prefix + name) for name in names}
        missing_keys.extend(prefix + name for name, value in values.items() if value is None)
        if all(value is not None for value in values.values()):
            try:
                if tuple(values["qweight"].shape) != self.format.codes_shape(self.out_features, self.in_features):
                    expected = list(self.format.codes_shape(self.out_features, self.in_features))
                    raise ValueError(f"qweight must be {expected}, got {list(values['qweight'].shape)}")
                parts = self.canonical_type(*(values[name].detach() if name in values else None for name in self.parts))
                if not (local_metadata.get("assign_to_params_buffers") or self._like.is_meta):
                    parts = parts.to(self._like.device)
                self._set_packed(self._pack(parts))
            except ValueError as error:
                error_msgs.append(f"{prefix.rstrip('.')}: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in names}}
        held = {name: getattr(self, name) for name in self.parts}
        for name in self.parts:  # WHY: else the parent reports them as missing
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
