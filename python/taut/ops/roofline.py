"""roofline: the plain loops that ``taut.roofline`` times to find this machine's ceilings."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native

CEILINGS = {"read": 0, "fma_f32": 1, "dot_int8": 2, "dot_bf16": 3}
STREAMS = (1, 2, 4, 8)
MAX_STEPS = 1 << 22


def roofline(buffer: Tensor, ceiling: str, streams: int = 4, steps: int = 0) -> Tensor:
    """Runs one loop on all threads, and returns what says that the work was done: ``int64 [1]``.

    ``"read"``: the sum of ``buffer`` (``int64 [n]`` on the CPU) modulo 2^64, read in ``streams`` (1, 2, 4, 8) sequential
    streams a thread. ``"fma_f32"``, ``"dot_int8"``, ``"dot_bf16"``: the number of multiply-adds done in ``steps`` (0 to 2^22) rounds of
    the impl's accumulators on each thread; nothing of ``buffer`` is read. Raises ``ValueError`` for anything else.
    """
    if ceiling not in CEILINGS:
        raise ValueError(f"unknown ceiling {ceiling!r}; accepted: {', '.join(CEILINGS)}")
    if buffer.dtype != torch.int64 or buffer.dim() != 1 or not buffer.is_contiguous() or buffer.device.type != "cpu":
        raise ValueError(f"buffer must be a contiguous int64 [n] on the CPU, got {buffer.dtype} {list(buffer.shape)} on {buffer.device}")
    if streams not in STREAMS:
        raise ValueError(f"streams must be 1, 2, 4 or 8, got {streams!r}")
    if not 0 <= steps <= MAX_STEPS:
        raise ValueError(f"steps must be 0 to {MAX_STEPS}, got {steps}")
    return _native.ops_for("cpu").roofline(buffer, CEILINGS[ceiling], streams, steps)


@torch.library.register_fake("taut::roofline")
def _fake(buffer: Tensor, ceiling: int, streams: int, steps: int) -> Tensor:
    return buffer.new_empty(1)


def reference(buffer: Tensor) -> int:
    """What ``"read"`` returns: the sum of ``buffer`` modulo 2^64, as a signed 64-bit number."""
    return int(buffer.sum())


def cost(buffer: Tensor, ceiling: str, multiply_adds: int = 0) -> dict[str, int]:
    """Counted work of one call: 2 flops (or integer operations) a multiply-add; the bytes of ``buffer`` for a read."""
    return {"flops": 2 * multiply_adds, "bytes": buffer.nbytes if ceiling == "read" else 0}
