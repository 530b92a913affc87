"""Loads the compiled libraries, and speaks to the impl tables through ``_C``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch  # WHY first: it puts libtorch_cpu.so, which libtaut_cpu.so needs, into the process

from . import _C

torch.ops.load_library(str(Path(_C.__file__).with_name("libtaut_cpu.so")))


def list_impls() -> dict[str, list[str]]:
    """Every op and the names of its impls, in priority order."""
    return _C.list_impls()


def cpu_features() -> dict[str, bool]:
    """Which instruction sets this processor and operating system can run."""
    return _C.cpu_features()


def build_info() -> dict[str, str]:
    """Version, compiler, architecture and the oldest torch this build serves."""
    return _C.build_info()


@contextlib.contextmanager
def force_impl(op: str, impl: str) -> Iterator[None]:
    """Within the block, ``op`` runs ``impl`` (a full name, or an ISA such as ``cpu_avx2``) or raises ``RuntimeError``.

    The environment does the same for a whole process: ``TAUT_FORCE_IMPL=quant_linear:cpu_scalar``.
    Raises ``ValueError`` if there is no such op or impl.
    """
    before = _C.forced_impl(op)
    _C.force_impl(op, impl)
    try:
        yield
    finally:
        _C.force_impl(op, before)


@dataclass(frozen=True)
class Verdict:
    """One row of an op's table for one call: whether this impl runs, and if not, why it was passed over."""

    impl: str
    chosen: bool
    reason: str

    def __str__(self) -> str:
        return f"{self.impl}: {'runs' if self.chosen else self.reason}"


def explain(op: str, **sizes: int) -> list[Verdict]:
    """Which impl of ``op`` runs for a call of these sizes, and why each one was passed over, in table order.

    ``quant_linear`` takes M, N, K, format (4 or 8), group_size, zeros, activations (0 float, 1 int8).
    Raises ``ValueError`` for an unknown op, an unknown size or a value the op refuses.
    """
    known = _EXPLAIN_SIZES.get(op)
    if known is None:
        raise ValueError(f"no op {op!r}; known ops: {', '.join(list_impls())}")
    unknown = set(sizes) - set(known)
    if unknown:
        raise ValueError(f"{op} has no size {sorted(unknown)[0]!r}; accepted: {', '.join(known) or 'none'}")
    try:
        return [Verdict(*row) for row in _C.explain(op, {name: int(value) for name, value in sizes.items()})]
    except RuntimeError as error:
        raise ValueError(str(error)) from None


_EXPLAIN_SIZES = {
    "quant_linear": ("M", "N", "K", "format", "group_size", "zeros", "activations"),
    "quantize_weight": (),
    "roofline": (),
}


def _force_from_environment() -> None:
    for entry in filter(None, os.environ.get("TAUT_FORCE_IMPL", "").split(",")):
        op, separator, impl = entry.partition(":")
        if not separator:
            raise ValueError(f"TAUT_FORCE_IMPL: {entry!r} is not of the form <op>:<impl>")
        _C.force_impl(op.strip(), impl.strip())


_force_from_environment()
