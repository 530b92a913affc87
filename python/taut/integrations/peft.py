"""peft: LoRA on top of low-bit layers, with no call by the user. Adapters train, are saved and load again as on any model.

A low-bit weight cannot take up an adapter, so merging is refused, in words; so is what needs to rewrite the weight (DoRA,
PiSSA and the like).
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import model as lora_model
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..nn import QuantLinear

# How lora_A and lora_B may start; the others (PiSSA, OLoRA, LoftQ, CorDA, ...) change the weight, or need its float numbers.
INITS = (True, False, "gaussian", "eva")


class QuantLoraLinear(LoraLinear):
    """``y = quant_linear(x) + scaling * lora_B(lora_A(dropout(x)))`` over a ``QuantLinear``; only lora_A and lora_B train."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        if config.use_dora:
            raise ValueError("DoRA needs the float weight in every step; on a low-bit layer use plain LoRA (use_dora=False)")
        if config.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} rewrites the float weight, which a low-bit layer does not have; "
                f"accepted: {', '.join(map(repr, INITS))}"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ValueError(
            "an adapter cannot be merged into a low-bit weight. Keep it beside the model (save_pretrained writes it), "
            "or merge it into the float model and swap that"
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


_create_new_module = lora_model.LoraModel._create_new_module


def create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    """peft's own choice of a LoRA layer, but ours over a QuantLinear; a custom mapping of the user's still comes first."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    custom = any(isinstance(base, kind) for kind in lora_config._custom_modules or ())
    if not isinstance(base, QuantLinear) or custom:
        return _create_new_module(lora_config, adapter_name, target, **kwargs)
    if kwargs.get("parameter_name") is not None:
        raise ValueError("target_parameters cannot name the weight of a low-bit layer; name the layer in target_modules")
    kwargs.pop("parameter_name", None)
    if lora_config.fan_in_fan_out:
        raise ValueError("fan_in_fan_out=True is for layers that store the weight transposed; a QuantLinear does not")
    return QuantLoraLinear(target, adapter_name, config=lora_config, **kwargs)


_replace_module = lora_model.LoraModel._replace_module


def replace_module(self: Any, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
    """peft's own, which asks a layer that has a ``qweight`` for its device; that of a packed QuantLinear is None."""
    if isinstance(new_module, QuantLoraLinear):
        setattr(parent, child_name, new_module)  # update_layer has moved the adapter to where the layer is
    else:
        _replace_module(self, parent, child_name, new_module, child)


lora_model.LoraModel._create_new_module = staticmethod(create_new_module)
lora_model.LoraModel._replace_module = replace_module
