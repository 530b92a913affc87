"""The output head in low bits, which is opt-in: it is often the largest matrix of a small model, and the most sensitive one.

Where it is tied to the embeddings, both share one packed table: the embeddings look their rows up in that of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from .nn import QuantEmbedding, QuantLinear

if TYPE_CHECKING:
    from .swap import Rule


@dataclass(frozen=True)
class Head:
    """A model's output head and, if it shares its weight with them, the embeddings."""

    name: str
    module: nn.Linear
    embeddings: str | None


def find_head(model: nn.Module) -> Head:
    """The output head of a transformers model. Raises ``ValueError`` where it has none that can be swapped."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if head is None:
        raise ValueError(f"lm_head is for models with an output head; {type(model).__name__} has none")
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None or type(head) is not nn.Linear:
        raise ValueError(f"lm_head: the output head is a {type(head).__name__}, not an nn.Linear")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    table = model.get_input_embeddings()
    shares = table is not None and getattr(table, "weight", None) is head.weight
    if not shares and not any(f"{name}.weight" in pair for pair in tied.items()):
        return Head(name, head, None)
    users = [key for key, module in model.named_modules() if any(p is head.weight for p in module.parameters(recurse=False))]
    embeddings = next((key for key, module in model.named_modules() if module is table), None)
    if embeddings is None or not isinstance(table, nn.Embedding) or set(users) - {name, embeddings} or head.bias is not None:
        raise ValueError(f"lm_head: the weight of {name} is shared by {', '.join(users)}, not by it and the embeddings alone")
    known = type(table) is nn.Embedding or hasattr(table, "scalar_embed_scale")
    if not known or table.max_norm is not None:
        raise ValueError(f"lm_head: {name} is tied to {embeddings}, a {type(table).__name__} with behaviour of its own")
    return Head(name, head, embeddings)


def check_head(model: nn.Module, rule: Rule) -> Head:
    """The head that ``swap_head`` would swap. Raises ``ValueError`` where it cannot, so that nothing is changed then."""
    from .swap import check_values

    head = find_head(model)
    for module in (head.module, model.get_submodule(head.embeddings) if head.embeddings else head.module):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
            raise ValueError(f"lm_head: {head.name} or its embeddings carry hooks, which a swap would lose")
    if not head.module.weight.is_meta:
        if head.embeddings and head.module.weight.device.type != "cpu":
            raise ValueError(
                f"lm_head: {head.name} is tied to the embeddings, which are looked up on the CPU; it is on {head.module.weight.device}"
            )
        check_values(head.name, head.module.weight, rule)
    return head


def swap_head(model: nn.Module, head: Head, rule: Rule) -> QuantLinear:
    """Puts the output head, and embeddings tied to it, in low bits, in place."""
    from .swap import untie

    new = QuantLinear.from_float(head.module, rule.format, rule.activations).train(head.module.training)
    model.set_submodule(head.name, new)
    if head.embeddings is not None:
        tie(model, head.embeddings, new)
        untie(model, head.name)
    return new


def tie(model: nn.Module, embeddings: str, head: QuantLinear) -> None:
    """Has the embeddings look up the table of ``head``."""
    old = model.get_submodule(embeddings)
    model.set_submodule(embeddings, QuantEmbedding(head, old).train(old.training))


def tied_tables(model: nn.Module) -> dict[str, str]:
    """The embeddings that share the packed table of a head: their names, and its name."""
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    embeddings = ((name, module) for name, module in model.named_modules() if isinstance(module, QuantEmbedding))
    return {name: names[id(module.head)] for name, module in embeddings if id(module.head) in names}


def make_head_rule(lm_head: str | None) -> Rule | None:
    """The rule of ``lm_head="int8"`` and the like. Raises ``ValueError`` for what is no format."""
    from .swap import make_rule

    return None if lm_head is None else make_rule(lm_head)


def to_float(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Gives embeddings that share a packed table a float table of their own again, which the head's float layer then shares."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantEmbedding):
            model.set_submodule(name, module.to_float(dtype))
