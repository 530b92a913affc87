"""A decoder layer as five ops and the model's own attention: what its class is changed to once its linear layers are low-bit.

The linear layers stay modules of their own. Where several read the same input (q, k and v; gate and up) their ``packed``
weights become views, one after the other, of one buffer that the fused op reads; nothing is held twice. What is prepared
here is checked in every call by the identity of everything it was made from, and made again, or given up, when that changed.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import WeightFormat, activation_code
from ..formats.sparse import SparseFormat
from ..fuse import Family, FusedClass, family_of_layer, fused_class, grad_needed
from ..ops import rms_norm, split_rope  # noqa: F401  (they say what their ops do where shapes are only traced)
from ..ops.fused_linear import PROLOGUES
from .attention import attend, takes, takes_mask
from .quant_linear import QuantLinear
from .sparse_linear import SparseLinear

# The activation functions a gated unit may have, by the name of their module.
_UNITS = {
    "SiLU": "silu_glu", "SiLUActivation": "silu_glu", "GELUTanh": "gelu_tanh_glu", "NewGELUActivation": "gelu_tanh_glu",
    "GELUActivation": "gelu_glu",
}  # fmt: skip
_RMS_NORM = PROLOGUES["rms_norm"]


def norm_names(family: Family) -> tuple[str, str | None, str, str | None]:
    """The norms of a layer: of the attention before and after it, and of the MLP."""
    attention_post, mlp_post = family.post_norms or (None, None)
    return "input_layernorm", attention_post, family.mlp_norm, mlp_post


@dataclass(frozen=True)
class _Form:
    """What two linear layers must have in common to be read as one, and what a fused op is told of them."""

    format: WeightFormat | SparseFormat
    activations: int
    in_features: int
    bias: bool


def _form(name: str, linear: Any, rules: Mapping | None) -> tuple[_Form | None, str]:
    """The form of a linear layer of a block, or why a fused op cannot read it."""
    if type(linear) in (QuantLinear, SparseLinear):
        format, activations = linear.format, linear.activations
        device = (linear._like if linear.packed is None else linear.packed).device.type
    elif rules is not None and id(linear) in rules:
        format, activations, device = rules[id(linear)].format, rules[id(linear)].activations, linear.weight.device.type
    else:
        kind = type(linear).__name__
        return None, f"{name} is not a low-bit layer (it is a {kind})" if linear is not None else f"it has no {name}"
    if device not in ("cpu", "meta"):
        return None, f"{name} is on {device}; fused ops run on the CPU"
    return _Form(format, activation_code(activations, format), linear.in_features, linear.bias is not None), ""


def _group_reason(names: tuple[str, ...], parent: nn.Module, rules: Mapping | None) -> str | None:
    """Why the linear layers ``names`` of ``parent`` cannot be read as one; None if they can."""
    forms = []
    for name in names:
        form, reason = _form(name, getattr(parent, name, None), rules)
        if form is None:
            return reason
        forms.append(form)
    if len(names) == 1:
        return None
    listed = f"{', '.join(names[:-1])} and {names[-1]}"
    if any(form != forms[0] for form in forms):
        return f"{listed} differ in format, activations or bias"
    if forms[0].format.name == "nvfp4":
        return f"{listed} are nvfp4, whose scale of a whole matrix keeps matrices apart"
    rows = 16 if isinstance(forms[0].format, SparseFormat) and forms[0].format.pattern.v == 16 else 8
    odd = next((name for name in names if getattr(parent, name).out_features % rows), None)
    return None if odd is None else f"{odd} has {getattr(parent, odd).out_features} outputs, not a multiple of {rows}"


def why_not(layer: nn.Module, rules: Mapping | None = None) -> str | None:
    """Why a decoder layer cannot be fused, in words; None if it can. ``rules``: see ``fuse.survey``."""
    family = family_of_layer(layer)
    if family is None:
        return f"taut has no fused block for {type(layer).__name__}"
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    for child, kind in ((attention, "Attention"), (mlp, "MLP")):
        if (type(child).__module__, type(child).__name__) != (family.path, family.prefix + kind):
            return f"it has a {type(child).__name__}, not a {family.prefix}{kind}"
    groups = ((attention, family.qkv), (attention, ("o_proj",)), (mlp, family.gate_up), (mlp, ("down_proj",)))
    for parent, names in groups:
        if (reason := _group_reason(names, parent, rules)) is not None:
            return reason
    norms = [getattr(layer, name, None) for name in norm_names(family) if name is not None]
    norms += [getattr(attention, name, None) for name in ("q_norm", "k_norm")] if family.qk_norms else []
    for norm in norms:
        if type(norm).__name__ != f"{family.prefix}RMSNorm":
            return f"its norm is a {type(norm).__name__}, not a {family.prefix}RMSNorm"
    unit = getattr(mlp, family.activation, None)
    if type(unit).__name__ not in _UNITS:
        return f"its activation function {type(unit).__name__} is none that a fused op computes"
    return None


def join(modules: list[QuantLinear]) -> Tensor:
    """The packed weights of ``modules``, one after the other, as one tensor, of which theirs are views afterwards."""
    for module in modules:
        module.finalize()
    if len(modules) == 1:
        return modules[0].packed
    return _join([module.packed for module in modules], lambda index, view: setattr(modules[index], "packed", view))


def _join(parts: list[Tensor], put: Callable[[int, Tensor], None]) -> Tensor:
    storage, offset = parts[0].untyped_storage(), parts[0].storage_offset()
    begin, adjacent = offset, True
    for part in parts:
        adjacent = adjacent and part.untyped_storage()._cdata == storage._cdata and part.storage_offset() == begin and part.is_contiguous()
        begin += part.numel()
    if adjacent:  # a copy or a checkpoint of a fused model: the parts lie as they did
        return parts[0].as_strided((begin - offset,), (1,), offset)
    whole = torch.cat(parts)
    begin = 0
    for index, part in enumerate(parts):
        put(index, whole.narrow(0, begin, part.numel()))
        begin += part.numel()
    return whole


def join_biases(modules: list[QuantLinear]) -> Tensor | None:
    """The same for their biases. WHY views: an optimizer changes them in place, and the fused op must see it."""
    biases = [module.bias for module in modules]
    if biases[0] is None:
        return None
    if len(biases) == 1:
        return biases[0]
    return _join([bias.detach() for bias in biases], lambda index, view: setattr(biases[index], "data", view))


@dataclass
class Linear:
    """One matmul of a block: the arguments of ``fused_linear`` from ``packed`` to ``activations``."""

    packed: Tensor
    joined_bias: Tensor | None
    biases: list[Tensor]
    sizes: tuple[int, int, int, int, bool, int]  # out, in, format, group size, zeros, activations

    @property
    def bias(self) -> Tensor | None:
        """The bias of all its rows. WHY not the joined one in a traced graph: whether it still is that is not seen there."""
        if len(self.biases) > 1 and torch.compiler.is_compiling():
            return torch.cat(self.biases)
        return self.joined_bias

    @classmethod
    def of(cls, parent: nn.Module, names: tuple[str, ...]) -> Linear:
        modules = [getattr(parent, name) for name in names]
        first = modules[0]
        mode = activation_code(first.activations, first.format)
        format = first.format
        rows = sum(module.out_features for module in modules)
        sizes = (rows, first.in_features, format.code, format.group_size, format.zeros, mode)
        biases = [module.bias for module in modules if module.bias is not None]
        return cls(join(modules), join_biases(modules), biases, sizes)


class Plan:
    """What the fused path of one decoder layer reads, and what it must still be made from."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.family = family
        self.qkv, self.o = Linear.of(attention, family.qkv), Linear.of(attention, ("o_proj",))
        self.gate_up, self.down = Linear.of(mlp, family.gate_up), Linear.of(mlp, ("down_proj",))
        unit = getattr(mlp, family.activation)
        self.glu = PROLOGUES[_UNITS[type(unit).__name__]]
        self.attention = attention
        names = norm_names(family)
        modules = [None if name is None else getattr(layer, name) for name in names]
        self.norms = [None if norm is None else norm.weight for norm in modules]
        self.norm_eps, self.norm_offset = getattr(modules[0], family.norm_eps), family.norm_offset
        heads = [attention.q_norm, attention.k_norm] if family.qk_norms else []
        self.q_norm, self.k_norm = [norm.weight for norm in heads] or (None, None)
        self.qk_eps = getattr(heads[0], family.norm_eps) if heads else 0.0
        self.head_dim = attention.head_dim
        self.kv_heads = attention.config.num_key_value_heads
        self.q_heads = self.qkv.sizes[0] // self.head_dim - 2 * self.kv_heads
        window = getattr(attention, "sliding_window", None) if family.window == "layer" else None
        if family.window == "config":
            window = getattr(attention.config, "sliding_window", None)
        self.window: int | None = window
        # What the model's own attention function is called with besides q, k, v and the mask.
        self.extra: dict[str, Any] = {} if family.window is None else {"sliding_window": window}
        if family.softcap:
            self.extra["softcap"] = attention.attn_logit_softcapping
        self.interfaces = sys.modules["transformers.modeling_utils"].ALL_ATTENTION_FUNCTIONS
        self.default_attention = sys.modules[family.path].eager_attention_forward

        linears = [getattr(attention, name) for name in (*family.qkv, "o_proj")]
        linears += [getattr(mlp, name) for name in (*family.gate_up, "down_proj")]
        norms = [norm for norm in modules if norm is not None] + heads
        children = [attention, mlp, unit, *norms, *linears]
        self.parameters = [norm.weight for norm in norms] + [linear.bias for linear in linears if linear.bias is not None]
        # (dict, key, what it must hold): the children of each parent, the packed weights, the parameters, and eval mode.
        slots: list[tuple[dict, str, Any]] = []
        for parent in (layer, attention, mlp):
            slots += [(parent._modules, key, child) for key, child in parent._modules.items() if child in children]
        slots += [(linear._buffers, "packed", linear.packed) for linear in linears]
        slots += [(linear._parameters, "bias", linear.bias) for linear in linears]
        slots += [(norm._parameters, "weight", norm.weight) for norm in norms]
        slots += [(module.__dict__, "training", False) for module in (layer, attention, mlp)]
        self.holders, self.keys, self.held = (list(column) for column in zip(*slots, strict=True))
        self.linears = [
            (parent._modules, key, child) for parent in (attention, mlp) for key, child in parent._modules.items() if child in linears
        ]
        self.biases = [(linear.bias, linear.bias.data_ptr()) for linear in linears if linear.bias is not None]
        self.hooks = [hooks for child in children for hooks in (child._forward_hooks, child._forward_pre_hooks)]
        self.own = [child.__dict__ for child in children]
        self.children = children

    def holds(self) -> bool:
        """Whether everything this was made from is still in its place."""
        try:
            same = all(map(operator.is_, map(operator.getitem, self.holders, self.keys), self.held))
        except KeyError:
            return False
        return same and (torch.compiler.is_compiling() or all(bias.data_ptr() == pointer for bias, pointer in self.biases))

    def takes(self, dtype: torch.dtype) -> bool:
        """Whether norms and biases are of a dtype that the ops take with x of ``dtype``."""
        norms = all(
            weight.dtype == dtype or weight.dtype == torch.float32
            for weight in (*self.norms, self.q_norm, self.k_norm)
            if weight is not None
        )
        return norms and all(bias.dtype == dtype for bias, _ in self.biases)

    def free(self) -> bool:
        """Whether nobody watches or has replaced a forward that the fused path would leave out."""
        return not (any(self.hooks) and any(map(_watches, self.hooks))) and not any("forward" in names for names in self.own)


def _watches(hooks: Mapping) -> bool:
    """Whether one of these hooks has something to see: those of transformers' output capturing have while it captures."""
    for hook in hooks.values():
        if getattr(hook, "__name__", "") != "output_capturing_hook" or hook.__module__ != "transformers.utils.output_capturing":
            return True
        collector = sys.modules[hook.__module__]._active_collector.get()
        if collector is not None and collector:
            return True
    return False


def plan_of(layer: nn.Module) -> Plan | None:
    """The plan of a fused layer, made again if what it was made from changed; None where it does not fit (any more)."""
    plan = layer.__dict__.get(FusedClass.PLAN)
    if plan is not None and plan.holds():
        return plan
    if torch.compiler.is_compiling():  # no place to prepare weights
        return None
    layer.__dict__.pop(FusedClass.PLAN, None)
    if layer.training or layer.self_attn.training or layer.mlp.training:
        return None
    family = family_of_layer(layer)
    if why_not(layer) is not None or any(
        linear.packed is None or linear.packed.device.type != "cpu"
        for parent, names in ((layer.self_attn, (*family.qkv, "o_proj")), (layer.mlp, (*family.gate_up, "down_proj")))
        for linear in (getattr(parent, name) for name in names)
    ):
        return None
    with torch.inference_mode(False), torch.no_grad():  # WHY: autograd may not save what was made in inference mode
        plan = layer.__dict__[FusedClass.PLAN] = Plan(layer, family)
    return plan


class FusedLayer(FusedClass):
    """The forward of a decoder layer whose linear layers are low-bit."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = None if args or self.training or hidden_states.device.type != "cpu" else plan_of(self)
        if (
            plan is None or not plan.free() or not plan.takes(hidden_states.dtype) or hidden_states.dim() != 3
            or kwargs.get("output_attentions") or kwargs.get("position_embeddings") is None
            or torch.is_autocast_enabled("cpu") or grad_needed(hidden_states, plan.parameters)
        ):  # fmt: skip
            return super().forward(hidden_states, *args, **kwargs)
        return run_layer(plan, hidden_states, **kwargs)


def run_layer(
    plan: Plan, x: Tensor, attention_mask: Tensor | None = None, cache: Any = None, past_key_values: Any = None,
    position_embeddings: tuple[Tensor, Tensor] = (), **kwargs: Any,
) -> Tensor:  # fmt: skip
    """The layer, with the model's own attention function and cache."""
    ops, attention = torch.ops.taut, plan.attention
    eps, offset = plan.norm_eps, plan.norm_offset
    norm, post, mlp_norm, mlp_post = plan.norms
    qkv, o, gate_up, down = plan.qkv, plan.o, plan.gate_up, plan.down
    heads = ops.fused_linear(x, qkv.packed, qkv.bias, *qkv.sizes, _RMS_NORM, norm, eps, offset, None)
    cos, sin = position_embeddings
    q, k, v = ops.split_rope(heads, cos, sin, plan.q_heads, plan.kv_heads, plan.head_dim, plan.q_norm, plan.k_norm, plan.qk_eps, offset)
    cache = past_key_values if cache is None else cache
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx, **({"kwargs": kwargs} if _is_paged(cache) else {}))
    function = plan.interfaces.get_interface(attention.config._attn_implementation, plan.default_attention)
    found = own_attention(plan, function, q, k, v, attention_mask, kwargs)
    if found is None:
        found, _ = function(attention, q, k, v, attention_mask, dropout=0.0, scaling=attention.scaling, **plan.extra, **kwargs)
    found = found.reshape(*x.shape[:-1], -1).contiguous()
    if post is None:
        x = ops.fused_linear(found, o.packed, o.bias, *o.sizes, 0, None, 0.0, 0.0, x)
    else:
        x = ops.rms_norm(ops.fused_linear(found, o.packed, o.bias, *o.sizes, 0, None, 0.0, 0.0, None), post, eps, offset, x)
    wide = ops.fused_linear(x, gate_up.packed, gate_up.bias, *gate_up.sizes, _RMS_NORM, mlp_norm, eps, offset, None)
    if mlp_post is None:
        return ops.fused_linear(wide, down.packed, down.bias, *down.sizes, plan.glu, None, 0.0, 0.0, x)
    return ops.rms_norm(
        ops.fused_linear(wide, down.packed, down.bias, *down.sizes, plan.glu, None, 0.0, 0.0, None), mlp_post, eps, offset, x
    )


def _is_paged(cache: Any) -> bool:
    """Whether this is the cache of transformers' continuous batching, which changes what the attention function is called with."""
    return type(cache).__name__ == "PagedAttentionCache"


def own_attention(
    plan: Plan, function: Callable, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """What transformers' function for SDPA gives, ``[B, Lq, Hq, D]``, by taut's ops; None where that is not what is asked."""
    sdpa = sys.modules.get("transformers.integrations.sdpa_attention")
    if sdpa is None or function is not sdpa.sdpa_attention_forward or plan.extra.get("softcap") is not None:
        return None
    if any(kwargs.get(name) is not None for name in ("is_causal", "position_bias", "s_aux")):
        return None
    if not isinstance(k, Tensor) or not takes(q, k, v) or not takes_mask(mask, q, k.shape[2]):
        return None
    causal = mask is None and q.shape[2] > 1 and plan.attention.is_causal
    if causal and k.shape[2] != q.shape[2]:
        return None  # SDPA aligns its causal mask to the first key
    return attend(q, k, v, plan.attention.scaling, causal, mask=mask)


def fuse_layer(layer: nn.Module) -> None:
    """Gives a decoder layer that fits the fused class, and prepares its weights."""
    if not isinstance(layer, FusedClass):
        layer.__class__ = fused_class(FusedLayer, type(layer))
    plan_of(layer)
