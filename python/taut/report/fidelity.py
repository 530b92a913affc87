"""Fidelity: how far a swapped model's predictions are from its base model's.

The survey Beyond Efficiency (arXiv 2401.00625) calls agreement of predictions "label loyalty" and agreement of
distributions "probability loyalty"; the statistics here are those llama.cpp's perplexity tool made customary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 64  # of logits at a time: 64 x 152k in float32 is 39 MB


@dataclass(frozen=True)
class TokenStats:
    """Per position ``[T]``: KL divergence in nats, whether the top token is the same, and the probability and its
    negative logarithm that base and other give to the token that follows in the text."""

    kl: Tensor
    same_top: Tensor
    p_base: Tensor
    p_other: Tensor
    nll_base: Tensor
    nll_other: Tensor


@dataclass(frozen=True)
class Estimate:
    """A statistic over tokens and its standard error, which takes the tokens for independent."""

    value: float
    stderr: float


def compare_logits(base: Tensor, other: Tensor, next_ids: Tensor) -> TokenStats:
    """``base, other [T, V]`` logits of the same text, ``next_ids int64 [T]``: the token that follows each position.

    Log-probabilities are float32, sums float64. Raises ``ValueError`` for shapes that differ or logits that are not finite.
    """
    if base.dim() != 2 or base.shape != other.shape or tuple(next_ids.shape) != (base.shape[0],):
        raise ValueError(
            f"logits must be [T, V] twice and next_ids [T], got {list(base.shape)}, {list(other.shape)}, {list(next_ids.shape)}"
        )
    parts: list[tuple[Tensor, ...]] = []
    for begin in range(0, base.shape[0], _ROWS):
        rows = slice(begin, begin + _ROWS)
        log_p, log_q = (torch.log_softmax(logits[rows].float(), -1) for logits in (base, other))
        if not bool(torch.isfinite(log_p).all() and torch.isfinite(log_q).all()):
            raise ValueError("the logits hold a NaN or an infinity")
        index = next_ids[rows, None]
        nll_p, nll_q = (-log.gather(1, index)[:, 0].double() for log in (log_p, log_q))
        same = log_p.argmax(-1) == log_q.argmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        parts.append((kl, same, (-nll_p).exp(), (-nll_q).exp(), nll_p, nll_q))
    return TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def join(parts: list[TokenStats]) -> TokenStats:
    """The statistics of several windows as one."""
    names = TokenStats.__dataclass_fields__
    return TokenStats(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})


def summarize(stats: TokenStats, seed: int = 0) -> dict[str, Estimate]:
    """Estimates over the tokens of ``stats``; raises ``ValueError`` below two tokens.

    ``kl_mean, kl_median, kl_p99`` in nats; ``top1`` share of equal top tokens; ``rms_dp`` root mean square of the change
    in the probability of the actual token; ``ppl_base, ppl_other`` perplexities; ``log_ppl_ratio`` the logarithm of their
    ratio, whose error is paired and so much smaller than theirs.
    """
    n = stats.kl.numel()
    if n < 2:
        raise ValueError(f"fidelity takes at least two tokens, got {n}")
    dp2 = _mean((stats.p_other - stats.p_base) ** 2)
    rms = dp2.value**0.5
    nll_base, nll_other, ratio = _mean(stats.nll_base), _mean(stats.nll_other), _mean(stats.nll_other - stats.nll_base)
    ppl_base, ppl_other = math.exp(nll_base.value), math.exp(nll_other.value)
    return {
        "kl_mean": _mean(stats.kl),
        "kl_median": _quantile(stats.kl, 0.5, seed),
        "kl_p99": _quantile(stats.kl, 0.99, seed),
        "top1": _mean(stats.same_top.double()),
        "rms_dp": Estimate(rms, dp2.stderr / (2 * rms) if rms else 0.0),
        "ppl_base": Estimate(ppl_base, ppl_base * nll_base.stderr),
        "ppl_other": Estimate(ppl_other, ppl_other * nll_other.stderr),
        "log_ppl_ratio": ratio,
    }


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / values.numel() ** 0.5)


def _quantile(values: Tensor, q: float, seed: int, resamples: int = 200) -> Estimate:
    """A quantile, and its bootstrap standard error."""
    generator = torch.Generator().manual_seed(seed)
    n = values.numel()
    draws = torch.stack([values[torch.randint(n, (n,), generator=generator)].quantile(q) for _ in range(resamples)])
    return Estimate(float(values.quantile(q)), float(draws.std()))
