"""When is a result of attention_decode right? ``assert_decode`` says."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from checks import assert_matches, plain_attention
from kv_caches import stored
from taut.ops import attention_rules
from taut.ops.kv_append import KvCache

TILE = 128  # keys whose weights are rounded to 14 bits of the largest among them
MOST_WEIGHT = 16383
# Tensor cores take 16 bits: a weight is two float16 numbers, the second of which is whole steps of the largest in a unit of keys.
UNIT, MOST_OF_TWO_HALVES = 64, 2**36
MOST_Q = {8: 8127, 4: 127}  # of q, by the bits of a code
# How many standard deviations a sum of independent roundings may have. A rounding is at most half a step and evenly spread: 1 / sqrt(12).
DEVIATIONS = 6
ULPS = 1 + 2**-9  # what fp32 adds to a rounding of 14 bits


@dataclass(frozen=True)
class Sequence:
    """One sequence of a call in float64: ``q [Hq, Lq, D]``, its keys and values ``[Hq, n, ...]``, and the same channels aside."""

    q: Tensor
    k: Tensor
    v: Tensor
    plain_k: Tensor
    plain_v: Tensor
    channels: Tensor | None  # [Hq, 2, D + Dv]
    rules: dict

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        return tuple(t[0] for t in attention_rules.reference(self.q[None], self.k[None], self.v[None], **self.rules))

    @cached_property
    def distance(self) -> Tensor:
        queries, keys = self.q.shape[1], self.k.shape[1]
        return torch.arange(queries)[:, None] + keys - queries - torch.arange(keys)

    @cached_property
    def weights(self) -> Tensor:
        """The softmax's weights ``[Hq, Lq, n]``."""
        rules = self.rules
        scores = self.q @ self.k.mT * rules["softmax_scale"]
        scores = rules["softcap"] * torch.tanh(scores / rules["softcap"]) if rules["softcap"] else scores
        if rules["alibi_slopes"] is not None:
            scores = scores - rules["alibi_slopes"].double()[:, None, None] * self.distance.abs()
        hidden = (self.distance < 0) & rules["causal"] | ((self.distance.abs() >= rules["window"]) & (rules["window"] > 0))
        if rules["mask"] is not None:
            mask = rules["mask"][0]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
        return torch.exp(scores - self.reference[1][..., None]).masked_fill(hidden, 0.0).nan_to_num(0.0)

    def sums_of_fp32(self) -> tuple[Tensor, Tensor, Tensor]:
        """What errors of fp32 are measured in, as in ``checks.assert_attention``: magnitude and walk of out, magnitude of lse.

        With channels, the terms are what is stored times its factor, and the offset: they may cancel.
        """
        sizes = self.k.abs(), self.v.abs()
        if self.channels is not None:
            offsets, factors = self.channels.double().abs().unbind(1)
            d = self.q.shape[-1]
            sizes = [plain.abs() * factors[:, None, part] + offsets[:, None, part]
                     for plain, part in ((self.plain_k, slice(None, d)), (self.plain_v, slice(d, None)))]  # fmt: skip
        rules = self.rules
        extra = self.q.abs() @ sizes[0].mT * abs(rules["softmax_scale"])
        if rules["softcap"]:
            extra = extra.clamp(max=8 * rules["softcap"])
        if rules["alibi_slopes"] is not None:
            extra = extra + rules["alibi_slopes"].double().abs()[:, None, None] * self.distance.abs()
        if rules["mask"] is not None and rules["mask"].dtype != torch.bool:
            extra = extra + rules["mask"][0].double().nan_to_num(neginf=0.0).abs()
        out, lse = self.reference
        weights, of_score = self.weights, extra + 4.0
        magnitude = weights @ sizes[1] + (weights * of_score) @ sizes[1] + (weights * of_score).sum(-1, keepdim=True) * out.abs()
        walk = (self.k.shape[1] * (weights**2 @ sizes[1] ** 2)).sqrt()
        largest = torch.where(weights > 0, of_score, 0.0).amax(-1) if self.k.shape[1] else torch.zeros_like(lse)
        return magnitude, walk, largest + lse.abs().nan_to_num(posinf=0.0) + self.k.shape[1] / 16

    def roundings_of_q(self, bits: int, whole: bool) -> tuple[Tensor, Tensor]:
        """How far out and lse may move as q, times the channels' factors, is rounded to steps of its largest element / MOST_Q.

        An element moves by half a step h at most, a score by d_j of up to h * sum |k|, with a standard deviation of h * |k| / sqrt(3). That
        moves out by sum p_j d_j (v_j - out) and lse by sum p_j d_j, and both by some d_j^2 more. ``whole``: q is whole steps already.
        """
        out, weights = self.reference[0], self.weights
        if whole or not self.k.shape[1]:
            return torch.zeros_like(out), torch.zeros_like(out[..., 0])
        q = self.q if self.channels is None else self.q * self.channels[:, 1, None, : self.q.shape[-1]].double()
        half = q.abs().amax(-1, keepdim=True) / MOST_Q[bits] / 2 * ULPS * abs(self.rules["softmax_scale"])
        worst = (half * self.plain_k.abs().sum(-1)[:, None]).clamp(max=50)
        deviation = half / math.sqrt(3) * self.plain_k.square().sum(-1).sqrt()[:, None]
        found = []
        for v, mean in ((self.v, out), (torch.ones_like(self.v[..., :1]), torch.zeros_like(out[..., :1]))):  # out, lse
            w = (weights * deviation) ** 2
            first = (w @ v**2 - 2 * mean * (w @ v) + mean**2 * w.sum(-1, keepdim=True)).clamp(min=0).sqrt()
            w = 16 * weights * deviation**2
            likely = DEVIATIONS * first + w @ v.abs() + w.sum(-1, keepdim=True) * mean.abs()
            w = weights * torch.expm1(worst)
            certain = (w @ v.abs() + w.sum(-1, keepdim=True) * mean.abs()) * worst.amax(-1, keepdim=True).exp()
            found.append(torch.minimum(likely, certain))
        return found[0], found[1][..., 0]

    def roundings_of_weights(self, v_scales: Tensor, tile: int = TILE, most_weight: int = MOST_WEIGHT) -> Tensor:
        """How far out may move as the weights times the values' scales are rounded to steps: ``most_weight`` are a tile's largest."""
        weights, keys = self.weights, self.k.shape[1]
        scaled = weights * v_scales[:, None]
        most = torch.stack([part.amax(-1) for part in scaled.split(tile, -1)], -1) if keys else scaled
        half = most.repeat_interleave(tile, -1)[..., :keys] / most_weight / 2 * ULPS * 1.05  # q's roundings move weights, too
        half = torch.where(weights > 0, half, 0.0)
        codes = torch.where(v_scales[..., None] > 0, self.plain_v / v_scales[..., None], 0.0).abs()
        worst, likely = half @ codes, DEVIATIONS / math.sqrt(3) * (half**2 @ codes**2).sqrt()
        factor = 1.0 if self.channels is None else self.channels[:, 1, None, self.q.shape[-1] :].double()
        return torch.minimum(worst, likely) * factor


def sequences(q: Tensor, cache: KvCache, keys: int, lengths: Tensor | None, rules: dict) -> list[tuple[Sequence, Tensor | None]]:
    """Each sequence of a call, and the scales of its values."""
    batch, heads = q.shape[:2]
    group, found = heads // cache.kv_heads, []
    plain = [t.repeat_interleave(group, 1) for t in stored(cache, batch)]
    scales = None
    if cache.format.has_codes:
        scales = cache.v_scales if cache.block_table is None else cache.v_scales[cache.block_table.long()].transpose(1, 2).flatten(2)
        scales = scales.double().repeat_interleave(group, 1)
    for b in range(batch):
        n = keys if lengths is None else int(lengths[b])
        mask = rules["mask"]
        if mask is not None:
            mask = mask.broadcast_to(*q.shape[:3], keys)[b : b + 1, ..., :n]
        k, v = (t[b, :, :n] for t in plain)
        channels = None if cache.channels is None else cache.channels[b].repeat_interleave(group, 0)
        one = [k, v]
        if channels is not None:
            offsets, factors = channels.double()[:, :, None].unbind(1)
            d = q.shape[-1]
            one = [k * factors[..., :d] + offsets[..., :d], v * factors[..., d:] + offsets[..., d:]]
        found.append((Sequence(q[b].double(), *one, k, v, channels, rules | {"mask": mask}), None if scales is None else scales[b, :, :n]))
    return found


def assert_decode(
    out: Tensor, lse: Tensor, q: Tensor, cache: KvCache, keys: int, lengths: Tensor | None, rules: dict, *, exact: bool,
    whole: bool = False, tensor_cores: bool = False, context: str,
) -> None:  # fmt: skip
    """``out [B, Hq, Lq, Dv]`` and ``lse`` against float64 of the numbers in the cache. Call it after the kernel has run.

    The error of fp32 is held against that of plain torch, as ``checks.assert_attention`` does. ``exact``: nothing else is allowed. If not,
    beside codes, q and the weights are rounded as the contract says, and no further. ``whole``: q needs no rounding. ``tensor_cores``: a
    weight has the last bits of the largest beside it.
    """
    for b, (one, scales) in enumerate(sequences(q, cache, keys, lengths, rules)):
        plain = [t[0] for t in plain_attention(one.q.float()[None], one.k.float()[None], one.v.float()[None], **one.rules)]
        reference, reference_lse = one.reference
        magnitude, walk, largest = one.sums_of_fp32()
        allowed, allowed_lse = torch.zeros_like(reference), torch.zeros_like(reference_lse)
        if cache.format.has_codes and not exact:
            of_q, allowed_lse = one.roundings_of_q(cache.format.bits, whole)
            allowed = of_q + one.roundings_of_weights(scales)
        if tensor_cores:
            some = torch.ones_like(one.plain_v[..., 0]) if scales is None else scales
            allowed = one.roundings_of_weights(some, UNIT, MOST_OF_TWO_HALVES)
        for bound in (magnitude, walk, largest, allowed, allowed_lse):
            assert bool(bound.isfinite().all())  # WHY: nothing is more than NaN
        rest = {"depth": one.k.shape[1] + one.q.shape[-1], "independent": False}
        shape, context_b = (-1, out.shape[-1]), f"{context}, sequence {b}"
        assert_matches(
            out[b].reshape(shape), *(t.reshape(shape) for t in (reference, plain[0], magnitude, walk)), dtype=out.dtype,
            weight_error=allowed.reshape(shape), context=context_b, **rest,
        )  # fmt: skip
        shape = (-1, 1)
        assert_matches(
            lse[b].reshape(shape), *(t.reshape(shape) for t in (reference_lse, plain[1], largest, torch.zeros_like(largest))),
            dtype=torch.float32, weight_error=allowed_lse.reshape(shape), context=f"{context_b}, lse", **rest,
        )  # fmt: skip
