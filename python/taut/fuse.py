"""Whole decoder blocks: which layers of a model can run as a few fused ops, and why others cannot.

The module tree, its names and its state stay what they are. A decoder layer (and the stack of them) only changes its
class to a subclass that takes the fused path where it may and calls the original ``forward`` everywhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

MODES = ("auto", True, False)


@dataclass(frozen=True)
class Family:
    """What a decoder layer of one family is made of: names of classes and attributes, and how its parts differ from Llama's."""

    module: str  # transformers.models.<module>.modeling_<module>
    prefix: str  # of its classes: <prefix>DecoderLayer, <prefix>Attention, <prefix>MLP, <prefix>RMSNorm
    stack: str  # the class that holds the layers
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    activation: str = "act_fn"
    norm_eps: str = "variance_epsilon"
    norm_offset: float = 0.0  # a norm multiplies by offset + weight
    mlp_norm: str = "post_attention_layernorm"
    post_norms: tuple[str, ...] = ()  # of the attention and of the MLP, before their residuals are added
    qk_norms: bool = False
    window: str | None = None  # where an attention's sliding window is said: in the "config" or in the "layer"
    softcap: bool = False
    ropes_by_type: bool = False  # one rope table for each of config.layer_types

    @property
    def path(self) -> str:
        return f"transformers.models.{self.module}.modeling_{self.module}"


_GEMMA = {
    "norm_eps": "eps", "norm_offset": 1.0, "window": "layer", "mlp_norm": "pre_feedforward_layernorm",
    "post_norms": ("post_attention_layernorm", "post_feedforward_layernorm"),
}  # fmt: skip
FAMILIES = (
    Family("llama", "Llama", "LlamaModel"),
    Family("mistral", "Mistral", "MistralModel", window="config"),
    Family("qwen2", "Qwen2", "Qwen2Model", window="layer"),
    Family("qwen3", "Qwen3", "Qwen3Model", window="layer", qk_norms=True),
    Family("gemma2", "Gemma2", "Gemma2Model", softcap=True, **_GEMMA),
    Family("gemma3", "Gemma3", "Gemma3TextModel", qk_norms=True, ropes_by_type=True, **_GEMMA),
    Family("phi3", "Phi3", "Phi3Model", ("qkv_proj",), ("gate_up_proj",), "activation_fn", window="config"),
)
_LAYERS = {(family.path, f"{family.prefix}DecoderLayer"): family for family in FAMILIES}
_STACKS = {(family.path, family.stack): family for family in FAMILIES}


def _class_key(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__qualname__


def family_of_layer(module: nn.Module) -> Family | None:
    return _LAYERS.get(_class_key(module))


def family_of_stack(module: nn.Module) -> Family | None:
    return _STACKS.get(_class_key(module))


@dataclass(frozen=True)
class Fused:
    """A decoder layer (or a stack of them, ``kind`` "stack") that runs fused now, or the reason why it does not."""

    name: str
    kind: str
    reason: str | None = None


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What looks like a decoder layer of some transformer: a member of a ModuleList with an attention of its own."""
    for name, module in model.named_modules():
        if family_of_layer(module) is not None:
            yield name, module
        elif name.rpartition(".")[2].isdigit() and any("attention" in type(child).__name__.lower() for child in module.children()):
            yield name, module


def check_mode(fuse: bool | str, strict: bool) -> None:
    """Raises ``ValueError`` for values ``swap`` does not take."""
    if fuse not in MODES or not isinstance(fuse, (bool, str)):
        raise ValueError(f"fuse must be 'auto', True or False, got {fuse!r}")
    if not isinstance(strict, bool):
        raise ValueError(f"strict must be True or False, got {strict!r}")
    if strict and fuse is False:
        raise ValueError("strict=True asks that every block is fused, and fuse=False that none is: give one of them")


def survey(model: nn.Module, linears: dict | None = None) -> list[Fused]:
    """Which decoder layers and stacks of ``model`` can be fused. Changes nothing.

    ``linears``: where the model is not swapped yet, for each ``nn.Linear`` (by ``id``) that will be, its rule.
    """
    from .nn.fused_block import why_not

    found = [Fused(name, "layer", why_not(module, linears)) for name, module in _candidates(model)]
    fitting = {entry.name for entry in found if entry.reason is None}
    for name, module in model.named_modules():
        if family_of_stack(module) is None:
            continue
        layers = [f"{name}.layers.{index}".lstrip(".") for index in range(len(module.layers))]
        out = next((layer for layer in layers if layer not in fitting), None)
        found.append(Fused(name or type(module).__name__, "stack", None if out is None else f"{out} is not fused"))
    return found


def check_strict(found: list[Fused]) -> None:
    """Raises ``ValueError`` where a block of the survey does not fit."""
    layers = [entry for entry in found if entry.kind == "layer"]
    if not layers:
        raise ValueError("strict=True: this model has no decoder layers that taut knows how to fuse")
    bad = [f"{entry.name}: {entry.reason}" for entry in layers if entry.reason is not None]
    if bad:
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"strict=True: {len(bad)} of {len(layers)} decoder layers cannot be fused: {'; '.join(bad[:5])}{more}")


def check_wanted(model: nn.Module, linears: dict, fuse: bool | str, strict: bool) -> None:
    """Raises ``ValueError`` where a swap by these rules would not fuse what it was asked to. ``linears``: see ``survey``."""
    if strict:
        check_strict(survey(model, linears))
    elif fuse is True:
        found = [entry for entry in survey(model, linears) if entry.kind == "layer"]
        if not any(entry.reason is None for entry in found):
            why = f"{found[0].name}: {found[0].reason}" if found else "it has no decoder layers that taut knows"
            raise ValueError(f"fuse=True, but nothing in this model can be fused: {why}")


def summary(found: list[Fused]) -> str:
    """The end of a report's line: how many decoder layers are fused, where there are any."""
    layers = [entry for entry in found if entry.kind == "layer"]
    if not layers:
        return ""
    return f"; fused {sum(entry.reason is None for entry in layers)} of {len(layers)} decoder layers"


def words(found: list[Fused]) -> list[str]:
    """A line for each reason why blocks are not fused."""
    by_reason: dict[tuple[str, str], list[str]] = {}
    for entry in found:
        if entry.reason is not None:
            by_reason.setdefault((entry.kind, entry.reason), []).append(entry.name)
    lines = []
    for (kind, reason), names in by_reason.items():
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        what = "not fused" if kind == "layer" else "layers called one by one in"
        lines.append(f"{what} {', '.join(names[:3])}{more}: {reason}")
    return lines


def fuse_model(model: nn.Module) -> list[Fused]:
    """Gives the decoder layers and stacks of a swapped ``model`` their fused classes, in place; says what was fused and what not."""
    from .nn.fused_block import fuse_layer
    from .nn.fused_stack import fuse_stack

    found = survey(model)
    modules = dict(model.named_modules())
    for entry in found:
        if entry.reason is None and entry.kind == "layer":
            fuse_layer(modules[entry.name])
    for module in modules.values():
        if family_of_stack(module) is not None and all(isinstance(layer, FusedClass) for layer in module.layers):
            fuse_stack(module)
    return found


def unfuse(model: nn.Module) -> None:
    """Gives every module its original class back. Weights stay where they are."""
    for module in model.modules():
        if isinstance(module, FusedClass):
            module._drop_plan()
            module.__class__ = type(module).original_class


class FusedClass:
    """What the subclasses that modules are changed to have in common: they carry the name of the original, and are
    pickled and copied by it, without what was prepared for the fused path."""

    original_class: type = nn.Module
    PLAN = "_taut_plan"

    def __reduce_ex__(self, protocol):
        state = {key: value for key, value in self.__dict__.items() if key != self.PLAN}
        return _rebuild, (type(self).mixin, type(self).original_class), state

    def _drop_plan(self) -> None:
        self.__dict__.pop(self.PLAN, None)


_CLASSES: dict[tuple[type, type], type] = {}


def fused_class(mixin: type, original: type) -> type:
    """The subclass of ``original`` with the forward of ``mixin``, under the original's own name."""
    found = _CLASSES.get((mixin, original))
    if found is None:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        names |= {"original_class": original, "mixin": mixin, "cache_name": cache_name(original)}
        found = type(original.__name__, (mixin, original), names)
        _CLASSES[mixin, original] = found
    return found


def cache_name(kind: type) -> str:
    """What the forward of a transformers model calls its cache: ``cache``, before transformers 5.24 ``past_key_values``."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def _rebuild(mixin: type, original: type) -> nn.Module:
    kind = fused_class(mixin, original)
    return kind.__new__(kind)


def grad_needed(x: torch.Tensor, parameters: list[torch.Tensor]) -> bool:
    """Whether autograd would have to follow a computation on these."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
