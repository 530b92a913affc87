"""A stack of decoder layers that writes a few tokens in one call: what the class of a transformers model is changed to.

``torch.ops.taut.decoder_layers`` runs every layer on up to 16 new tokens with no Python between them, and appends to the
caches in place. Everything else (prompts, training, a static cache, masks of four dimensions, recorded attentions, hooks)
goes through the original forward, whose layers are fused one by one.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..fuse import Family, FusedClass, family_of_stack, fused_class
from ..ops.decoder_layers import MOST_TOKENS
from .fused_block import Plan, plan_of

_INTS = 20  # of each layer; the last four: rope table, begin, length, window
_BEGIN, _LENGTH = _INTS - 3, _INTS - 2
_ROPE_ROWS = 256
# Rotary tables that depend on the position only, not on how long the text is.
_STEADY_ROPES = ("default", "linear", "llama3", "yarn")
# What the original forward takes besides its named arguments, with the values for which it does nothing else.
_PLAIN = {"return_dict": (None, True), "output_attentions": (None, False), "output_hidden_states": (None, False)}


class Rope:
    """A model's rotary table for the positions around those of the last call, computed by its own module."""

    def __init__(self, module: nn.Module, layer_type: str | None) -> None:
        self.module, self.layer_type = module, layer_type
        kind = module.rope_type if layer_type is None else module.rope_type[layer_type]
        self.steady = kind in _STEADY_ROPES
        self.buffer = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
        # The first position, cos and sin of those from there on, and what they were made from; one tuple, for threads' sake.
        self.table: tuple[int, Tensor, Tensor, Tensor, int] | None = None

    def _compute(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(x, positions) if self.layer_type is None else self.module(x, positions, self.layer_type)

    def rows(self, x: Tensor, positions: Tensor | None, first: int, last: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the new tokens: of ``positions``, which lie between ``first`` and ``last``, or (None) of all those."""
        if not self.steady or last - first >= _ROPE_ROWS:
            return self._compute(x, torch.arange(first, last + 1)[None] if positions is None else positions)
        frequencies, table = self.module._buffers[self.buffer], self.table
        version = 0 if frequencies.is_inference() else frequencies._version  # those of inference mode have none
        if (
            table is None or table[3] is not frequencies or table[4] != version or table[1].dtype != x.dtype
            or first < table[0] or last >= table[0] + 2 * _ROPE_ROWS
        ):  # fmt: skip
            with torch.inference_mode(False), torch.no_grad():
                cos, sin = self._compute(torch.empty(0, dtype=x.dtype), torch.arange(first, first + 2 * _ROPE_ROWS)[None])
            table = self.table = first, cos, sin, frequencies, version
        base, cos, sin = table[:3]
        if positions is None or positions.numel() == 1:
            return cos.narrow(1, first - base, last - first + 1), sin.narrow(1, first - base, last - first + 1)
        rows = positions - base
        return F.embedding(rows, cos[0]), F.embedding(rows, sin[0])


class StackPlan:
    """What one call of ``decoder_layers`` is given for all layers, and what it must still be made from."""

    def __init__(self, stack: nn.Module, family: Family, plans: list[Plan]) -> None:
        layers = list(stack.layers)
        first = plans[0]
        self.count, self.plans = len(plans), plans
        none = torch.empty(0)
        self.weights: list[Tensor] = []
        self.ints: list[int] = []
        types = list(dict.fromkeys(stack.config.layer_types)) if family.ropes_by_type else [None]
        self.ropes = [Rope(stack.rotary_emb, kind) for kind in types]
        for index, plan in enumerate(plans):
            norm, post, mlp_norm, mlp_post = plan.norms
            held = (
                norm, plan.qkv.packed, plan.qkv.bias, plan.q_norm, plan.k_norm, plan.o.packed, plan.o.bias, post,
                mlp_norm, plan.gate_up.packed, plan.gate_up.bias, plan.down.packed, plan.down.bias, mlp_post,
            )  # fmt: skip
            self.weights += [none if tensor is None else tensor for tensor in held]
            for linear in (plan.qkv, plan.o, plan.gate_up, plan.down):
                self.ints += map(int, linear.sizes[2:])
            rope = types.index(stack.config.layer_types[index]) if family.ropes_by_type else 0
            self.ints += [rope, 0, 0, plan.window or 0]
        hidden, intermediate = first.o.sizes[0], first.down.sizes[1]
        self.kv_heads, self.head_dim = first.kv_heads, first.head_dim
        self.sizes = [first.q_heads, first.kv_heads, first.head_dim, hidden, intermediate, first.glu]
        softcap = first.extra.get("softcap") or 0.0
        self.numbers = [first.norm_eps, first.norm_offset, first.attention.scaling, softcap, first.qk_eps, 1.0, 1.0]
        self.output = sys.modules["transformers.modeling_outputs"].BaseModelOutputWithPast
        self.final_norm, self.final_eps = stack.norm.weight, getattr(stack.norm, family.norm_eps)

        self.holders = [*chain.from_iterable(plan.holders for plan in plans), stack._modules, stack._modules, stack.norm._parameters]
        self.keys = [*chain.from_iterable(plan.keys for plan in plans), "norm", "rotary_emb", "weight"]
        self.held = [*chain.from_iterable(plan.held for plan in plans), stack.norm, stack.rotary_emb, stack.norm.weight]
        self.layers = layers
        # How many hooks there had been in this process at the last look at all modules, and the cache then; whose turn it
        # was since; and the dtype that was found to fit.
        self.seen: int | None = None
        self.cache: Callable[[], Any] = lambda: None
        self.turn = 0
        self.dtype: torch.dtype | None = None
        self.biases = [pair for plan in plans for pair in plan.biases]
        self.norms = [w for plan in plans for w in (*plan.norms, plan.q_norm, plan.k_norm) if w is not None] + [self.final_norm]
        watched = [*layers, stack.layers, stack.norm, stack.rotary_emb]
        self.hooks = [hooks for module in watched for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks += chain.from_iterable(plan.hooks for plan in plans)
        self.own = [module.__dict__ for module in watched] + [names for plan in plans for names in plan.own]

        self.linears = [slot for plan in plans for slot in plan.linears]

    def has_linears(self) -> bool:
        return all(parent.get(name) is linear for parent, name, linear in self.linears)

    def holds(self, stack: nn.Module) -> bool:
        """Whether everything this was made from is still in its place."""
        try:
            same = all(map(operator.is_, map(operator.getitem, self.holders, self.keys), self.held))
        except KeyError:
            return False
        layers = stack._modules["layers"]._modules.values()
        return (
            same and len(layers) == self.count and all(map(operator.is_, layers, self.layers))
            and all(bias.data_ptr() == pointer for bias, pointer in self.biases)
        )  # fmt: skip

    free = Plan.free

    def takes(self, dtype: torch.dtype) -> bool:
        dtypes = set(map(operator.attrgetter("dtype"), self.norms))
        dtypes.discard(torch.float32)
        fits = dtypes <= {dtype} and all(bias.dtype == dtype for bias, _ in self.biases)
        self.dtype = dtype if fits else None
        return fits


def _plan_of(stack: nn.Module) -> StackPlan | None:
    plan = stack.__dict__.get(FusedClass.PLAN)
    if plan is not None and plan.holds(stack):
        return plan
    stack.__dict__.pop(FusedClass.PLAN, None)
    family, config = family_of_stack(stack), stack.config
    kinds = {(type(module).__module__, type(module).__name__) for module in (stack.norm, stack.rotary_emb)}
    if kinds != {(family.path, f"{family.prefix}RMSNorm"), (family.path, f"{family.prefix}RotaryEmbedding")}:
        return None
    if config.num_hidden_layers != len(stack.layers) or getattr(config, "use_bidirectional_attention", None):
        return None
    plans = []
    for index, layer in enumerate(stack.layers):
        plan = plan_of(layer) if isinstance(layer, FusedClass) else None
        if plan is None or plan.attention.layer_idx != index or not _alike(plan, plans[0] if plans else plan):
            return None
        plans.append(plan)
    if not plans:
        return None
    found = stack.__dict__[FusedClass.PLAN] = StackPlan(stack, family, plans)
    return found


def _alike(plan: Plan, first: Plan) -> bool:
    """Whether two layers have the sizes and numbers that the op takes once for all layers."""

    def facts(p: Plan) -> tuple:
        attention = p.attention
        numbers = p.norm_eps, p.qk_eps, attention.scaling, p.extra.get("softcap")
        return p.q_heads, p.kv_heads, p.head_dim, p.o.sizes[:2], p.down.sizes[:2], p.glu, numbers

    return facts(plan) == facts(first)


class FusedStack(FusedClass):
    """The forward of a transformers model whose decoder layers are fused."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None, inputs_embeds=None, use_cache=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        cache = past_key_values if cache is None else cache
        if cache is not None and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and not self.training:
            found = write(self, input_ids, attention_mask, position_ids, cache, inputs_embeds, use_cache, kwargs)
            if found is not None:
                return found
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds,
            use_cache=use_cache, **{self.cache_name: cache}, **kwargs,
        )  # fmt: skip


def write(
    stack: nn.Module, input_ids: Tensor | None, attention_mask: Any, position_ids: Tensor | None, cache: Any,
    inputs_embeds: Tensor | None, use_cache: bool | None, kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    """The new tokens through all layers in one call; None where this call is one for the original forward."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None) or given.device.type != "cpu":
        return None
    for key, value in kwargs.items():
        if value is not None and value not in _PLAIN.get(key, ()):
            return None
    config, tokens = stack.config, given.shape[1]
    if use_cache is False or (use_cache is None and not config.use_cache):
        return None
    plan = _ready_plan(stack, cache)
    if plan is None or not 0 < tokens <= MOST_TOKENS:
        return None
    if config.num_hidden_layers != plan.count or config._attn_implementation not in ("sdpa", "eager", "taut"):
        return None
    if config.output_attentions or config.output_hidden_states or not config.return_dict:
        return None
    if attention_mask is not None and (not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2):
        return None
    x = stack.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if x.dtype != plan.dtype and not plan.takes(x.dtype):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    layers, batch = cache.layers, x.shape[0]
    past, mask = layers[0].get_seq_length(), None
    if attention_mask is not None:
        if attention_mask.shape != (batch, past + tokens):
            return None
        if not attention_mask.all():
            mask = attention_mask.bool()
    if position_ids is None:
        first, last = past, past + tokens - 1
    elif position_ids.dim() != 2 or position_ids.shape[1] != tokens:
        return None
    elif position_ids.numel() == 1:
        first = last = int(position_ids)
    else:
        first, last = map(int, torch.aminmax(position_ids))
    if not _reserve(layers, past, tokens, x, plan):
        return None
    ropes = [rope.rows(x, position_ids, first, last) for rope in plan.ropes]
    ints = plan.ints.copy()  # WHY: other threads may write with this model
    ints[_BEGIN::_INTS] = [layer.begin for layer in layers]
    ints[_LENGTH::_INTS] = [layer.end for layer in layers]
    with torch._C._AutoDispatchBelowAutograd():
        x = torch.ops.taut.decoder_layers(
            x, [cos for cos, _ in ropes], [sin for _, sin in ropes], mask, [layer.key_buffer for layer in layers],
            [layer.value_buffer for layer in layers], plan.weights, plan.sizes, ints, plan.numbers,
        )  # fmt: skip
        x = torch.ops.taut.rms_norm(x, plan.final_norm, plan.final_eps, plan.numbers[1], None)
    for layer in layers:
        layer.appended(tokens)
    return plan.output(last_hidden_state=x, **{stack.cache_name: cache})


def _ready_plan(stack: nn.Module, cache: Any) -> StackPlan | None:
    """The plan of a stack that may write into ``cache``, whose layers grow from now on; None where the modules must be called.

    While tokens are written to one cache, and no hook is registered anywhere, only the linear layers of all layers and the
    rest of one, in turn, are looked at. WHY: everything takes thousands of cache lines, which the weights push out for each token.
    """
    plan, hooks = stack.__dict__.get(FusedClass.PLAN), RemovableHandle.next_id
    if plan is not None and plan.seen == hooks and plan.cache() is cache and plan.has_linears():
        plan.turn = (plan.turn + 1) % plan.count
        turn = plan.plans[plan.turn]
        if turn.holds() and turn.free():
            return plan
    plan = _plan_of(stack)
    if plan is None or not plan.free():
        return None
    from ..integrations.growing_cache import make_growing

    if not make_growing(cache, plan.count):
        return None
    plan.dtype = None
    if not any(plan.hooks):  # those of output capturing may come to life without a word
        plan.seen, plan.cache = hooks, weakref.ref(cache)
    return plan


def _reserve(layers: list, past: int, tokens: int, x: Tensor, plan: StackPlan) -> bool:
    """Room for the new tokens in every layer of a cache; False where the layers differ, or hold something else than x would."""
    form = (x.shape[0], plan.kv_heads, plan.head_dim), x.dtype
    if len(layers) != plan.count:
        return False
    if layers[0].frozen():
        for layer in layers:
            layer.to_plain()
    for layer in layers:
        if layer.get_seq_length() != past:
            return False
        if (layer.form != form or layer.end + tokens > layer.capacity) and not layer.reserve(tokens, x, form[0]):
            return False
    return True


def fuse_stack(stack: nn.Module) -> None:
    """Gives a stack whose layers are fused its fused class."""
    if not isinstance(stack, FusedClass):
        stack.__class__ = fused_class(FusedStack, type(stack))
