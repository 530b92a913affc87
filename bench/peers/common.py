"""What peers share: the check of their result, and the count of their work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from taut.formats import WeightFormat

from ..contenders import Prepared, split_flops
from ..problem import Problem, max_error

# Of the largest result. A peer rounds x its own way, so it is held against the exact x.
TOLERANCE = {"f32": 2e-5, "bf16": 3e-2, "a8": 3e-2}


def prepared(
    problem: Problem, format: WeightFormat, arithmetic: str, weight_bytes: int, call: Callable[[], object], out: Tensor,
    layers: int = 1, keep: Any = None,
) -> Prepared:  # fmt: skip
    """A peer ready to run: its ``out`` checked, its work counted. ``arithmetic``: "f32", "bf16" or "a8"."""
    case = problem.case
    element_bytes = 2 if arithmetic == "bf16" else 4
    nbytes = weight_bytes + case.m * (case.k + case.n) * element_bytes
    operations = 2 * case.m * case.n * case.k
    error = max_error(out, problem.x, problem.dense(format))
    wrong = None if error <= TOLERANCE[arithmetic] else f"off by {error:.2g} of the largest result"
    return Prepared(call, nbytes, *split_flops(operations, arithmetic), error, wrong, layers, keep)


def disagreement(outputs: Sequence[np.ndarray]) -> str | None:
    """Why the nodes of one graph did not all compute what they should, or None.

    The weights of node i are those of node 0 with their rows rolled by i, so its output ``[M, N]`` must be rolled, too.
    WHY rolled: a peer may find equal weights and keep one copy of them, which then stays in the cache.
    """
    first = outputs[0]
    # WHY not bit for bit: which thread has which columns may change the order of a sum
    limit = 1e-2 * float(np.abs(first).max(initial=0.0))
    for index, output in enumerate(outputs):
        if not np.abs(output - np.roll(first, index, axis=1)).max(initial=0.0) <= limit:
            return f"its node {index} differs from its first"
    return None
