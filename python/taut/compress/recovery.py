"""Recovery: a pruned decoder layer is trained, alone, to give what it gave in the dense model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .calibration import Inputs

# Of a tensor's root mean square, that an element may move by in a step of Adam: the same for weights of any size.
_RATE = 0.01


def recover(
    inputs: Inputs, layer: nn.Module, index: int, targets: list[Tensor], masks: dict[nn.Linear, Tensor], steps: int
) -> tuple[float, float]:
    """Trains the kept weights of ``masks`` and the layer's vectors (norms, biases), in place; gives the error before and after.

    ``targets``: for each batch of ``inputs``, what the decoder layer gave in the dense model, where it saw what the dense layers before it
    gave: so it makes up for their errors too. Error: the mean over tokens of ``|out - target|^2 / |target|^2``. ``steps`` of Adam (arXiv
    1412.6980) over the batches in turn, the rate rising for a twentieth of them and then falling to 0 as a cosine. The best of the weights
    before and after stays. Layer-wise distillation of this kind: arXiv 2305.18403, 2402.12419.
    """
    parameters = {id(linear.weight): (linear.weight, mask.to(linear.weight.dtype)) for linear, mask in masks.items()}
    parameters |= {id(each): (each, None) for each in layer.parameters() if each.dim() == 1}
    wanted = {id(each): each.requires_grad for each in layer.parameters()}
    before = {key: each.detach().clone() for key, (each, _) in parameters.items()}
    first = error(inputs, layer, index, targets)
    for each in layer.parameters():
        each.requires_grad_(id(each) in parameters)
    groups = [{"params": [each], "rate": _RATE * float(each.detach().square().mean().sqrt())} for each, _ in parameters.values()]
    adam = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.95))
    for step in range(steps):
        share = min((step + 1) / max(1, steps // 20), 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in adam.param_groups:
            group["lr"] = group["rate"] * share
        place = step % len(targets)
        with torch.enable_grad():
            loss = _distance(inputs.one(layer, index, place), targets[place]).mean()
            loss.backward()
        for each, mask in parameters.values():
            if mask is not None and each.grad is not None:
                each.grad *= mask
        adam.step()
        adam.zero_grad(set_to_none=True)
    for each in layer.parameters():
        each.requires_grad_(wanted[id(each)])
    last = error(inputs, layer, index, targets)
    if not last < first:  # or no number
        for key, (each, _) in parameters.items():
            each.data.copy_(before[key])
        last = first
    return first, last


def _distance(out: Tensor, target: Tensor) -> Tensor:
    return (out - target).float().square().sum(-1) / target.float().square().sum(-1).clamp(min=1e-12)


@torch.no_grad()
def error(inputs: Inputs, layer: nn.Module, index: int, targets: list[Tensor]) -> float:
    parts = [_distance(out, target).flatten() for out, target in zip(inputs.run(layer, index), targets, strict=True)]
    return float(torch.cat(parts).mean())
