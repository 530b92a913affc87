"""What a weight becomes: pruned by a score, or column by column with each column's error made up for by those after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import WeightFormat
from ..formats.sparse import Pattern
from ..ops.quantize_weight import quantize_weight, reference

_BLOCK = 128  # columns whose changes are put off, as in the papers
_LARGEST = {"int4": (-8, 7), "int8": (-128, 127)}


@dataclass
class Solved:
    """``weight``: float32 ``[N, K]``, pruned, and where there is a format rounded to it; then ``codes`` and ``scales`` are its canonical
    form, dense. ``mask``: bool ``[N, K]``, what is kept; None for a dense weight."""

    weight: Tensor
    mask: Tensor | None
    codes: Tensor | None = None
    scales: Tensor | None = None


def error_of(before: Tensor, after: Tensor, gram: Tensor) -> float:
    """``|x (before - after)^T|^2 / |x before^T|^2`` over the calibration tokens, whose x^T x is ``gram``."""
    change, before = (before - after).detach().double(), before.detach().double()
    whole = float(((before @ gram) * before).sum())
    return float(((change @ gram) * change).sum()) / whole if whole > 0 else 0.0


def by_score(weight: Tensor, scores: Tensor, pattern: Pattern | None, format: WeightFormat | None) -> Solved:
    """Keeps what scores best; the kept ones are rounded to nearest. Magnitude: |w|. Wanda: |w| times its channel's norm (2306.11695)."""
    mask = None if pattern is None else pattern.mask(scores)
    kept = weight if mask is None else torch.where(mask, weight, 0.0)
    if format is None:
        return Solved(kept, mask)
    parts = quantize_weight(kept, format)
    return Solved(reference(*parts, weight.shape[1], format).float(), mask, parts.codes, parts.scales)


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the inverse of the damped ``gram``, float32, and which channels are dead (never anything but 0).

    Damped by a share of the mean diagonal, ten times as much as long as it is not positive definite. Raises ``ValueError`` in the end.
    """
    gram = gram.clone()
    dead = gram.diagonal() <= 0
    gram[dead, dead] = 1.0
    mean = float(gram.diagonal().mean())
    for share in (damping, 10 * damping, 100 * damping):
        damped = gram + share * mean * torch.eye(len(gram), dtype=gram.dtype)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return upper.float(), dead
    raise ValueError("the calibration statistics of a layer cannot be inverted: give more text, or more damping")


def order_of(gram: Tensor, unit: int) -> Tensor:
    """The columns, unit by unit of ``unit`` neighbours, those whose channels have the most energy first; what is left over comes last.

    GPTQ's "act order": a column's error is made up for by those after it, so the ones that matter most should have all the others
    for that, and not be what the errors of others end up in.
    """
    whole = len(gram) // unit
    energy = gram.diagonal()[: whole * unit].view(whole, unit).sum(1)
    units = energy.argsort(descending=True, stable=True)
    found = (units[:, None] * unit + torch.arange(unit)).flatten()
    return torch.cat([found, torch.arange(whole * unit, len(gram))])


def by_error(
    weight: Tensor, gram: Tensor, pattern: Pattern | None, format: WeightFormat | None, damping: float, kept: Tensor | None = None
) -> Solved:
    """SparseGPT (arXiv 2301.00774), and without a pattern GPTQ (2210.17323): column by column, a column's error in pruning and rounding
    is made up for by the columns that are still to come, as the second-order model of the layer's output error says. Columns go in the
    order of ``order_of``, group by group of the scales, or block by block of m; that alone nearly halves the KL divergence of dense
    int4 (SmolLM2 135M).

    What is kept of a block of m is decided when it is reached, by w^2 over the squared diagonal of the inverse's factor, summed over
    rows that share places. A group's scale is searched for what it keeps when it is reached; one scale a row is searched before.
    ``format``: int4 or int8 without zeros, or None. ``kept``: bool ``[N, K]``, what is kept, where that is decided already.
    """
    group = 0 if format is None else format.group_size
    unit = group or (1 if pattern is None else pattern.m)
    order = order_of(gram, unit)
    back = order.argsort()
    upper, dead = inverse_factor(gram[order][:, order], damping)
    w = weight[:, order]
    w[:, dead] = 0
    rows, k = w.shape
    diagonal = upper.diagonal()
    mask = torch.ones(rows, k, dtype=torch.bool) if kept is None else kept[:, order]
    decides = pattern is not None and kept is None
    scales: list[Tensor] = []
    scale = torch.ones(rows)
    if format is not None and group == 0:
        likely = pattern.mask((w / diagonal).square()) if decides else mask
        scales = [quantize_weight(torch.where(likely, w, 0.0), format).scales]
        scale = scales[0][:, 0].float()
    out = torch.empty_like(w)
    codes = torch.zeros(rows, k, dtype=torch.int32)
    for begin in range(0, k, _BLOCK):
        end = min(begin + _BLOCK, k)
        part, errors, factor = w[:, begin:end].clone(), torch.zeros(rows, end - begin), upper[begin:end, begin:end]
        for i in range(end - begin):
            column = begin + i
            if column % unit == 0:  # WHY a group's blocks of m together: the scale must know what it is for
                last = min(i + unit, end - begin)
                ahead = part[:, i:last]
                if decides:
                    mask[:, column : begin + last] = pattern.mask((ahead / diagonal[column : begin + last]).square())
                if group:
                    found = quantize_weight(torch.where(mask[:, column : begin + last], ahead, 0.0), WeightFormat(format.name, 0))
                    scales.append(found.scales)
                    scale = found.scales[:, 0].float()
            now = torch.where(mask[:, column], part[:, i], 0.0)
            if format is not None:
                low, high = _LARGEST[format.name]
                ratio = torch.where(scale == 0, 0.0, now / torch.where(scale == 0, 1.0, scale))
                codes[:, column] = ratio.round().clamp(low, high).int()
                now = codes[:, column] * scale
            out[:, column] = now
            error = (part[:, i] - now) / factor[i, i]
            part[:, i:] -= error[:, None] * factor[i, i:]
            errors[:, i] = error
        w[:, end:] -= errors @ upper[begin:end, end:]
    out, mask, codes = out[:, back], mask[:, back], codes[:, back]
    if format is None:
        return Solved(out, None if pattern is None else mask)
    if format.name == "int4":
        nibbles = torch.nn.functional.pad((codes + 8).to(torch.uint8), (0, k % 2))
        stored = nibbles[:, ::2] | nibbles[:, 1::2] << 4
    else:
        stored = codes.to(torch.int8)
    if group:  # from the order in which the groups were reached to that in which they lie
        scales = [scales[i] for i in (order[::group] // group).argsort().tolist()]
    return Solved(out, None if pattern is None else mask, stored.contiguous(), torch.cat(scales, 1).contiguous())
