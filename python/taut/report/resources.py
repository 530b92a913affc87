"""What can be counted from a model's shapes: operations, bytes in memory, bytes to ship.

The survey (arXiv 2401.00625) measures computation in FLOPs, memory in parameters and bytes, network in bytes moved.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..formats import WeightFormat
from ..fuse import FusedClass, cache_name, fuse_model, unfuse
from ..nn import PackedWeight, QuantLinear
from ..nn.packed_weight import PARTS
from ..ops.quant_linear import cost
from ..swap import RuleBook, plan


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Every parameter and buffer once, ties counted once."""
    seen: set[int] = set()
    for tensor in [*model.parameters(), *model.buffers()]:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers in memory; a tied one counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _held(model))


def parameter_count(model: nn.Module) -> int:
    """Numbers the model has learned: a low-bit weight counts the numbers it stands for, not its bytes."""
    low_bit = [module for module in model.modules() if isinstance(module, PackedWeight)]
    numbers = sum(module.in_features * module.out_features for module in low_bit)
    return numbers + sum(p.numel() for p in model.parameters() if id(p) not in _stored(low_bit))


def _stored(modules: list[PackedWeight]) -> set[int]:
    """The parameters that hold canonical weights not packed yet."""
    return {id(part) for module in modules for name in PARTS if (part := getattr(module, name)) is not None}


def swapped_bytes(model: nn.Module, book: RuleBook) -> int:
    """Bytes in memory of the weights of the linear layers that ``book`` swaps, in whatever form this model holds them."""
    low_bit = [module.weight_bytes for module in model.modules() if isinstance(module, QuantLinear)]
    if low_bit:
        return sum(low_bit)
    chosen, _ = plan(model, book)
    return sum(module.weight.numel() * module.weight.element_size() for _, module, _ in chosen)


def ship_bytes(model: nn.Module) -> int:
    """Bytes of the weights of a checkpoint of this model: low-bit layers in their canonical form, ties once."""
    low_bit = [m for m in model.modules() if isinstance(m, PackedWeight)]
    canonical = sum(m.format.canonical_bytes(m.out_features, m.in_features) for m in low_bit)
    return canonical + sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in _stored(low_bit))


def checkpoint_file_bytes(path: str | Path) -> int | None:
    """Bytes of the weight files at ``path`` (a GGUF file, or a directory with safetensors or bin files); None if none are there."""
    path = Path(path)
    if path.is_file():
        return path.stat().st_size
    for pattern in ("*.safetensors", "*.bin"):
        sizes = [file.stat().st_size for file in path.glob(pattern)]
        if sizes:
            return sum(sizes)
    return None


def _linear_flops(
    x_shape, packed_shape, bias_shape, out_features, format, group_size, zeros, activations, *args, out_shape=None, **kw
) -> int:
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return cost(rows, out_features, x_shape[-1], WeightFormat.of_code(format, group_size, zeros))["flops"]


def _attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kw) -> int:
    b, heads, queries, d = q_shape
    return 2 * b * heads * queries * k_shape[-2] * (d + v_shape[-1])


@torch.inference_mode()
def decode_flops(model: nn.Module, ids: Tensor) -> int:
    """Operations of one decode step after ``ids [1, T]``: matrix products and attention, a multiply-add counted as two.

    Low-bit products count as the products they stand for, so base and swapped model have the same number.
    """
    fused = any(isinstance(module, FusedClass) for module in model.modules())
    unfuse(model)  # WHY: the counter sees matrix products, not what one op does with a stack of layers
    try:
        return _count(model, ids)
    finally:
        if fused:
            fuse_model(model)


def _count(model: nn.Module, ids: Tensor) -> int:
    name = cache_name(type(model))
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1)[name]
    counting = {
        torch.ops.taut.quant_linear: _linear_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=counting) as counter:
        model(input_ids=ids[:, -1:], use_cache=True, **{name: cache})
    return counter.get_total_flops()


def cache_bytes_per_token(cache) -> float | None:
    """Bytes of keys and values a token takes in a transformers cache; None for a cache without such layers."""
    total = tokens = 0
    for layer in getattr(cache, "layers", []):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, Tensor) or not keys.numel():
            return None
        total += keys.nbytes + values.nbytes
        tokens = max(tokens, keys.shape[-2])
    return total / tokens if tokens else None
