"""Which weights may be nonzero. A ``Pattern`` is N:M, as sparse tensor cores have it, or vector-wise V:N:M (VENOM, arXiv 2310.02065)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PATTERNS", "VECTORS", "Pattern"]

PATTERNS = ((2, 4), (1, 4), (2, 8), (4, 8))  # N:M
VECTORS = (1, 8, 16)  # rows that share their places


@dataclass(frozen=True)
class Pattern:
    """Of each ``m`` neighbours along K at most ``n`` are kept, at places that ``v`` neighbouring rows share.

    ``str`` and ``parse`` write it as "2:4", and as "16:2:4" where rows share. Raises ``ValueError`` for what no kernel has.
    """

    n: int = 2
    m: int = 4
    v: int = 1

    def __post_init__(self) -> None:
        if (self.n, self.m) not in PATTERNS or self.v not in VECTORS:
            accepted = ", ".join(f"{n}:{m}" for n, m in PATTERNS)
            raise ValueError(f"no sparsity pattern {self}; accepted: {accepted}, and V:N:M of them with V = 8 or 16, such as 16:2:4")

    @classmethod
    def parse(cls, text: str | Pattern) -> Pattern:
        if isinstance(text, Pattern):
            return text
        found = re.fullmatch(r"(?:(\d+):)?(\d+):(\d+)", text) if isinstance(text, str) else None
        if not found:
            raise ValueError(f"{text!r} is no sparsity pattern; patterns are written 2:4, or 16:2:4 where 16 rows share their places")
        v, n, m = found.groups()
        return cls(int(n), int(m), int(v or 1))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.v == 1 else f"{self.v}:{self.n}:{self.m}"

    @property
    def density(self) -> float:
        return self.n / self.m

    def check_k(self, k: int) -> None:
        """Raises ``ValueError`` where rows of ``k`` weights cannot be cut in blocks of ``m``."""
        if k % self.m:
            raise ValueError(f"K is {k}, which blocks of {self.m} of the pattern {self} do not divide")

    def mask(self, scores: Tensor) -> Tensor:
        """Keeps what scores best: bool ``[N, K]``, exactly ``n`` true in each block of ``m``, the earlier place where scores are equal.

        ``scores`` [N, K] are of any float dtype, no NaN. Rows that share places add up their scores; the last ``N % v`` rows share too.
        """
        rows, k = scores.shape
        self.check_k(k)
        groups = -(-rows // self.v)
        summed = torch.nn.functional.pad(scores.float(), (0, 0, 0, groups * self.v - rows)).view(groups, self.v, k).sum(1)
        order = summed.view(groups, k // self.m, self.m).sort(-1, descending=True, stable=True).indices[..., : self.n]
        kept = torch.zeros(groups, k // self.m, self.m, dtype=torch.bool, device=scores.device).scatter_(-1, order, True)
        return kept.view(groups, k).repeat_interleave(self.v, 0)[:rows]

    def holds(self, weight: Tensor) -> bool:
        """Whether a dense weight [N, K] keeps to the pattern."""
        rows, k = weight.shape
        self.check_k(k)
        groups = -(-rows // self.v)
        used = torch.nn.functional.pad(weight != 0, (0, 0, 0, groups * self.v - rows)).view(groups, self.v, k).any(1)
        return bool((used.view(groups, k // self.m, self.m).sum(-1) <= self.n).all())
