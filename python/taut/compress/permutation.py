"""Channels of a decoder layer in another order, so that a sparsity pattern keeps more of what matters; the layer computes the same.

Inside an MLP, and within a head's values, the order of channels is nobody's business: the rows of the layers that make them and the
columns of the layer that takes them are reordered alike, and stay a checkpoint like any other (Pool and Yu, "Channel Permutations for
N:M Sparsity", NeurIPS 2021). Queries and keys stay: a rotary embedding knows their channels by their places.

TRIED: the hidden channels, which must have one order for all layers. On SmolLM2-135M it would save 1% of the importance that 2:4 drops of
the layers that read them, against 5% (Wanda) to 14% (SparseGPT) of down_proj's by an order of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.sparse import Pattern
from .calibration import Inputs, Statistics
from .solver import inverse_factor

_TOGETHER = 2048  # channels whose pairs are all looked at
_PART = 1024  # where there are more, as many at a time
_ROWS = 1024  # a larger matrix is searched by as many of its rows (eight times as many within a head), and judged by all
_WORK = 10**11  # numbers that one search may look at: half a minute
_ROUNDS = 100  # of swaps
_PAIRS = 8  # swaps that are remembered for a channel in a round

# The layers that make an MLP's channels, and the one that takes them. A gate_up_proj makes them twice, first the gate's.
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"), (("gate_up_proj",), "down_proj"), (("up_proj",), "down_proj"), (("fc1",), "fc2"),
    (("c_fc",), "c_proj"), (("dense_h_to_4h",), "dense_4h_to_h"),
)  # fmt: skip
_ATTENTIONS = tuple((names, out) for names in (("q_proj", "k_proj", "v_proj"), ("qkv_proj",)) for out in ("o_proj", "out_proj", "dense"))
_OF_QUERIES_AND_KEYS = ("q_norm", "k_norm", "q_layernorm", "k_layernorm", "sinks")


# ---- What may be reordered


@dataclass(frozen=True)
class Channels:
    """Channels of a decoder layer, in ``heads`` of ``size`` each, which are reordered within their heads."""

    name: str  # of the module in the decoder layer that makes them and takes them
    parent: nn.Module
    makers: tuple[tuple[nn.Linear, int], ...]  # with the row of the first channel, from which on they lie head after head
    taker: nn.Linear
    heads: int
    size: int
    copies: int  # of each head, one after the other, among the taker's columns: the query heads that share its values

    def columns(self, orders: Tensor) -> Tensor:
        """The taker's columns in this order: int64 ``[K]``. ``orders``: int64 ``[heads, size]``, numbers within a head."""
        first = torch.arange(self.heads * self.copies).view(self.heads, self.copies, 1) * self.size
        return (first + orders[:, None]).flatten()

    def rows(self, linear: nn.Linear, orders: Tensor) -> Tensor:
        """All rows of a maker in this order."""
        moved = (torch.arange(self.heads)[:, None] * self.size + orders).flatten()
        found = torch.arange(linear.out_features)
        for maker, begin in self.makers:
            if maker is linear:
                found[begin : begin + len(moved)] = begin + moved
        return found

    @torch.no_grad()
    def reorder(self, orders: Tensor) -> None:
        self.taker.weight.copy_(self.taker.weight[:, self.columns(orders)])
        for linear in dict.fromkeys(maker for maker, _ in self.makers):
            rows = self.rows(linear, orders)
            linear.weight.copy_(linear.weight[rows])
            if linear.bias is not None:
                linear.bias.copy_(linear.bias[rows])


def find(layer: nn.Module, m: int) -> tuple[list[Channels], dict[str, str]]:
    """What may be reordered in a decoder layer in blocks of ``m``, and by name what looks like it and may not, with the reason."""
    found, reasons = [], {}
    for name, parent in layer.named_modules():
        own = dict(parent.named_children())
        for table, judge in ((_MLPS, _mlp), (_ATTENTIONS, _attention)):
            parts = next(((makers, out) for makers, out in table if out in own and all(each in own for each in makers)), None)
            if parts is None:
                continue
            linears = [own[each] for each in (*parts[0], parts[1])]
            odd = next((each for each in linears if type(each) is not nn.Linear), None)
            made = f"it has a {type(odd).__name__} where nn.Linear is known" if odd is not None else judge(name, parent, *parts)
            if isinstance(made, Channels) and made.size % m:
                made = f"its {made.size} channels cannot be cut in blocks of {m}"
            if isinstance(made, Channels):
                found.append(made)
            else:
                reasons[name] = made
    known = {*reasons, *(channels.name for channels in found)}
    for name, module in layer.named_modules():
        looks = any(word in type(module).__name__ for word in ("MLP", "Attention"))
        if name not in known and looks and any(isinstance(child, nn.Linear) for child in module.children()):
            reasons[name] = f"the layers of a {type(module).__name__} are not known"
    if not found and not reasons:
        reasons[""] = "it has no MLP and no attention that is known"
    return found, reasons


def _mlp(name: str, parent: nn.Module, names: tuple[str, ...], out: str) -> Channels | str:
    taker = getattr(parent, out)
    size = taker.in_features
    parts = [(getattr(parent, each), 0) for each in names]
    if names == ("gate_up_proj",):
        parts.append((parts[0][0], size))
    if any(linear.out_features != size * sum(linear is other for other, _ in parts) for linear, _ in parts):
        return f"{' and '.join(names)} do not make the {size} channels that {out} takes"
    for other, tensor in [*parent.named_parameters(), *parent.named_buffers()]:
        if other.split(".")[0] not in (*names, out) and size in tensor.shape:
            return f"{other} may hold a number for each of its channels"
    return Channels(name, parent, tuple(parts), taker, 1, size, 1)


def _attention(name: str, parent: nn.Module, names: tuple[str, ...], out: str) -> Channels | str:
    taker, size = getattr(parent, out), getattr(parent, "head_dim", None)
    if not isinstance(size, int) or taker.in_features % size:
        return "it does not say its head_dim"
    if any("kv_shared" in each for each in vars(parent)):
        return "other layers may use its values"
    known = (*names, out, *_OF_QUERIES_AND_KEYS)
    for other, _ in [*parent.named_parameters(), *parent.named_buffers()]:
        if other.split(".")[0] not in known:
            return f"{other} is not known"
    queries, last = taker.in_features // size, getattr(parent, names[-1])
    heads = last.out_features // size if len(names) == 3 else (last.out_features // size - queries) // 2
    fits = heads > 0 and queries % heads == 0
    if len(names) == 3:
        fits = fits and last.out_features == heads * size and getattr(parent, names[0]).out_features == taker.in_features
    else:
        fits = fits and last.out_features == (queries + 2 * heads) * size
    if not fits:
        return f"{', '.join(names)} do not make heads of {size} as {out} takes them"
    return Channels(name, parent, ((last, last.out_features - heads * size),), taker, heads, size, queries // heads)


# ---- The search


def importance(weight: Tensor, statistics: Statistics, method: str, damping: float) -> Tensor:
    """By which a method keeps weights: magnitude |w|, Wanda |w| times its channel's norm, SparseGPT w^2 over the inverse's diagonal.

    Float32 ``[N, K]``. SparseGPT goes by a diagonal that changes from column to column; this is that of the first one.
    """
    weight = weight.float()
    if method == "sparsegpt":
        factor, _ = inverse_factor(statistics.gram, damping)
        return weight.square() / factor.square().sum(0)
    return weight.abs() * (statistics.norms if method == "wanda" else 1.0)


def kept(scores: Tensor, order: Tensor, pattern: Pattern) -> float:
    """The sum of the scores ``[R, K]`` that are kept, where columns are in this order. A row is a row, whatever ``pattern.v``."""
    step = max(1, 2**22 // scores.shape[1])
    parts = (part[:, order].unflatten(1, (-1, pattern.m)).topk(pattern.n, sorted=False).values for part in scores.split(step))
    return sum(float(part.sum(dtype=torch.float64)) for part in parts)


def _shared(scores: Tensor, v: int) -> Tensor:
    """Rows that share places, added up."""
    if v == 1:
        return scores
    return nn.functional.pad(scores, (0, 0, 0, -len(scores) % v)).unflatten(0, (-1, v)).sum(1)


def best_order(scores: Tensor, pattern: Pattern) -> Tensor:
    """An order of the columns of ``scores`` ``[R, K]`` that keeps more of them, or as they are: int64 ``[K]``.

    Searched from the order they have, or from one where each block has its share of large and small columns, whichever keeps more.
    TRIED: to search from both, which ends within a ten-thousandth of the same and takes twice as long.
    """
    k = scores.shape[1]
    sample = scores[:: -(-len(scores) // (8 * _ROWS if k <= 256 else _ROWS))]
    dealt = scores.sum(0).argsort(descending=True, stable=True).view(pattern.m, -1).T.flatten()
    same = torch.arange(k)
    known = kept(scores, same, pattern)
    found = _search(sample, dealt if kept(scores, dealt, pattern) > known else same, pattern)
    return found if kept(scores, found, pattern) > known else same


def _search(scores: Tensor, order: Tensor, pattern: Pattern) -> Tensor:
    columns = scores.T.contiguous()
    blocks = order.view(-1, pattern.m)
    parts = 1 if len(order) <= _TOGETHER else -(-len(order) // _PART)
    least, left, share = 1e-4 * float(columns.sum(dtype=torch.float64)), _WORK, _WORK // 4 // parts
    while left > 0:
        gained = 0.0
        # WHY anew each time: a swap is seen only within a part
        shuffled = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(left % 2**31))
        for part in shuffled.tensor_split(parts) if parts > 1 else (torch.arange(len(blocks)),):
            inside = blocks[part].flatten()
            found, gain, work = _swap(columns[inside], pattern, _WORK if parts == 1 else share)
            blocks = blocks.index_copy(0, part, inside[found].view(-1, pattern.m))
            gained, left = gained + gain, left - work
            if left <= 0:
                break
        if parts == 1 or gained < least:
            break
    return blocks.flatten()


def _swap(columns: Tensor, pattern: Pattern, work: int) -> tuple[Tensor, float, int]:
    """Swaps columns between blocks as long as that gains: the order, the gain, and how many numbers were looked at.

    ``columns``: ``[K, R]``. Round after round, the best swaps of all pairs are made, of a block at most one. What a block keeps with b in
    a's place is what it keeps of the others, but for the least of these, and the larger of that one and b. So of each a it takes
    ``limit``, the n-th largest of the others, and for all pairs the sum over rows of ``max(limit_a, b)``.
    """
    k, rows = columns.shape
    n, m = pattern.n, pattern.m
    blocks = torch.arange(k).view(-1, m)
    reach, loss = columns.new_empty(k, k), columns.new_empty(k)
    stale, done, gained = torch.arange(len(blocks)), 0, 0.0
    noise = 1e-5 * float(columns.sum(dtype=torch.float64)) / len(blocks)
    for _ in range(_ROUNDS):
        if not len(stale) or done >= work:
            break
        inside = blocks[stale]
        values = columns[inside]
        best = values.topk(n + 1, 1).values
        nth, after = best[:, n - 1 : n], best[:, n:]
        limits = torch.where(values >= nth, after, nth).flatten(0, 1)
        loss[inside.flatten()] = torch.maximum(values, nth).sum(2).flatten()
        reach[inside.flatten()] = _sums_of_larger(limits, columns)
        done += len(limits) * k * rows
        block_of = torch.empty(k, dtype=torch.int64)
        block_of[blocks.flatten()] = torch.arange(k) // m
        gain = reach - loss[:, None]
        gain = (gain + gain.T).masked_fill_(block_of[:, None] == block_of, 0.0)
        gains, partners = gain.topk(min(_PAIRS, k), 1)
        a = torch.arange(k)[:, None].expand_as(partners)
        wanted = (gains > noise) & (a < partners)
        gains, a, b = gains[wanted], a[wanted], partners[wanted]
        best_first = gains.argsort(descending=True, stable=True)
        touched: set[int] = set()
        for first, second, value in zip(a[best_first].tolist(), b[best_first].tolist(), gains[best_first].tolist(), strict=True):
            one, other = int(block_of[first]), int(block_of[second])
            if one in touched or other in touched:
                continue
            touched |= {one, other}
            gained += value
            one_place, other_place = blocks[one] == first, blocks[other] == second
            blocks[one, one_place], blocks[other, other_place] = second, first
        stale = torch.tensor(sorted(touched), dtype=torch.int64)
    return blocks.flatten(), gained, done


def _sums_of_larger(a: Tensor, b: Tensor) -> Tensor:
    """``[A, R]``, ``[B, R]`` to ``[A, B]``: the sum over R of the larger one. TRIED: torch.cdist with p=1, a third as fast."""
    out, rows = a.new_zeros(len(a), len(b)), b.T.contiguous()
    for part, total in zip(a.split(64), out.split(64), strict=True):
        larger, those = torch.empty_like(total), part.T.contiguous()[:, :, None]
        for row, own in zip(rows, those, strict=True):
            total += torch.maximum(own, row, out=larger)
    return out


def _alike(blocks: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """The blocks of channels in an order where those whose rows share places are alike. ``scores``: of the makers' rows ``[K, C]``.

    One after another the first block that is left takes those most like it: by the inner product of their scores without the mean of each
    m neighbours, which is what a choice among these is made by.
    """
    together = pattern.v // pattern.m
    features = scores[blocks].sum(1).unflatten(1, (-1, pattern.m))
    features = nn.functional.normalize((features - features.mean(2, keepdim=True)).flatten(1))
    like = features @ features.T
    order: list[int] = []
    free = torch.ones(len(blocks), dtype=torch.bool)
    for first in range(len(blocks)):
        if free[first]:
            free[first] = False
            count = min(together - 1, int(free.sum()))
            more = like[first].masked_fill(~free, -torch.inf).topk(count).indices if count else torch.empty(0, dtype=torch.int64)
            free[more] = False
            order += [first, *more.tolist()]
    return blocks[order]


# ---- A decoder layer


def permute(
    inputs: Inputs, layer: nn.Module, index: int, linears: dict[str, nn.Linear], statistics: dict[str, Statistics], pattern: Pattern,
    method: str, damping: float,
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]], dict[str, str]]:  # fmt: skip
    """Reorders the channels of a decoder layer, in place, and with them their ``statistics``.

    Gives by the names of modules the orders (see ``Channels``); of each linear layer in ``linears`` whose pruning that changes, the share
    of its importance that is kept before and after; and of modules whose channels stay as they are why. What is reordered must give what
    it gave on the first batch, to rounding, or it is put back.
    """
    orders: dict[str, Tensor] = {}
    shares: dict[str, tuple[float, float]] = {}
    found, reasons = find(layer, pattern.m)
    names = {linear: name for name, linear in linears.items()}
    calls = _calls(inputs, layer, index, [each.parent for each in found])
    for channels in found:
        if channels.taker not in names:
            reasons[channels.name] = "the layer that takes its channels is left alone"
            continue
        if channels.parent not in calls:
            reasons[channels.name] = "it was not called on the calibration text"
            continue
        weights = {channels.taker: importance(channels.taker.weight, statistics[names[channels.taker]], method, damping)}
        if pattern.v > 1:
            makers = dict.fromkeys(maker for maker, _ in channels.makers if maker in names)
            weights |= {each: importance(each.weight, statistics[names[each]], method, damping) for each in makers}
        diagonal = statistics[names[channels.taker]].gram.diagonal() if method == "sparsegpt" else None
        order, before, after = _choose_order(channels, weights, pattern, diagonal)
        del weights
        if (change := _reorder_and_compare(channels, order, *calls[channels.parent])) is not None:
            reasons[channels.name] = f"it gave something else, by {change:.1e}, with its channels in another order"
            continue
        orders[channels.name] = order
        columns = channels.columns(order)
        statistics[names[channels.taker]] = statistics[names[channels.taker]].reordered(columns)
        shares |= {names[linear]: (before[linear], after[linear]) for linear in before}
    return orders, shares, reasons


def reorder(layer: nn.Module, orders: dict[str, Tensor], m: int) -> None:
    """Reorders a decoder layer as ``permute`` did."""
    found = {channels.name: channels for channels in find(layer, m)[0]}
    for name, order in orders.items():
        found[name].reorder(order)


def _choose_order(
    channels: Channels, scores: dict[nn.Linear, Tensor], pattern: Pattern, diagonal: Tensor | None
) -> tuple[Tensor, dict[nn.Linear, float], dict[nn.Linear, float]]:
    """The best order that was found, and the share of the ``scores`` of each linear layer that is kept before and after.

    Rows of the makers which share places (``pattern.v``) want neighbours that are alike, the taker's columns want them different. WHY that
    is no quarrel where v is more than m: what the columns' blocks are made of is chosen first, and then which blocks are neighbours.
    ``diagonal``: of the taker's x^T x, by which blocks lie in falling order. WHY: SparseGPT makes up for an error in the columns that
    follow, so the largest come first (GPTQ's "act order"). Measured, it takes as much off the error of a layer as the search does.
    """
    heads, size, copies = channels.heads, channels.size, channels.copies
    shared = _shared(scores[channels.taker], pattern.v).unflatten(1, (heads, copies, size))
    shared = shared.permute(1, 0, 2, 3).flatten(1, 2)  # [heads, R * copies, size]
    made = [scores[maker][begin : begin + heads * size].view(heads, size, -1) for maker, begin in channels.makers if maker in scores]
    same = torch.arange(size).expand(heads, size)
    tries = [same]
    for found in dict.fromkeys((torch.stack([best_order(head, pattern) for head in shared]), same)):
        arranged = []
        for head, order in enumerate(found):
            blocks = order.view(-1, pattern.m)
            width = 1
            if made and pattern.v > pattern.m:
                blocks = _alike(blocks, torch.cat([each[head] for each in made], 1), pattern)
                width = pattern.v // pattern.m
            if diagonal is not None:
                sums = diagonal.view(heads, copies, size)[head].sum(0)[blocks].sum(1)
                groups = nn.functional.pad(sums, (0, -len(sums) % width)).view(-1, width).sum(1)
                place = groups.argsort(descending=True, stable=True)[:, None] * width + torch.arange(width)
                blocks = blocks[place[place < len(blocks)]]
            arranged.append(blocks.flatten())
        tries.append(torch.stack(arranged))
    judged = [{linear: _share(channels, linear, each, order, pattern) for linear, each in scores.items()} for order in tries]
    best = max(range(1, len(tries)), key=lambda index: sum(judged[index].values()))
    if sum(judged[best].values()) < sum(judged[0].values()) * (1 - 1e-9):
        best = 0
    return tries[best], judged[0], judged[best]


def _share(channels: Channels, linear: nn.Linear, scores: Tensor, orders: Tensor, pattern: Pattern) -> float:
    whole = float(scores.sum(dtype=torch.float64))
    if linear is channels.taker:
        part = kept(_shared(scores, pattern.v), channels.columns(orders), pattern)
    else:
        part = kept(_shared(scores[channels.rows(linear, orders)], pattern.v), torch.arange(scores.shape[1]), pattern)
    return part / whole if whole > 0 else 1.0


def _calls(inputs: Inputs, layer: nn.Module, index: int, modules: Sequence[nn.Module]) -> dict[nn.Module, tuple[tuple, dict[str, Any]]]:
    """What these modules are called with for the first batch."""
    found: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.setdefault(module, (args, kwargs))

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        inputs.one(layer, index, 0)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _reorder_and_compare(channels: Channels, order: Tensor, args: tuple, kwargs: dict[str, Any]) -> float | None:
    """Reorders, unless the module then gives something else; by how much, as a share of what it gave."""

    def run() -> Tensor:
        out = channels.parent(*args, **kwargs)
        return (out[0] if isinstance(out, tuple) else out).double()

    before = run()
    channels.reorder(order)
    change = float((run() - before).norm() / before.norm().clamp(min=1e-30))
    if change <= max(1e-4, 8 * torch.finfo(channels.taker.weight.dtype).eps):
        return None
    channels.reorder(order.argsort(1))
    return change
