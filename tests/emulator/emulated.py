"""Runs taut's CUDA ops on CPU tensors, in the emulator: ``with emulated("checked", sm=80): ...``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from emulator import build
from taut import _native

ORDERS = {"fifo": 0, "lifo": 1, "random": 2}
# A device each kernel runs on, by the prefix of its name.
SM_OF = {"cuda_sm75": 75, "cuda_sm80": 80, "cuda_sm86": 86, "cuda_sm89": 89, "cuda_sm90a": 90, "cuda_sm100": 100, "cuda_sm120": 120}


class Emulator:
    """One of the emulator's libraries, and the settings of the device it plays."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.taut_emulator_set_order.argtypes = (ctypes.c_int, ctypes.c_uint64)

    def set_device(self, sm: int, sm_count: int = 4) -> None:
        if self.library.taut_emulator_set_device(sm, sm_count):
            raise ValueError(f"the emulator has no device sm_{sm} with {sm_count} multiprocessors")

    def set_order(self, order: str, seed: int = 0) -> None:
        """Which thread, and which block, goes next: ``fifo``, ``lifo`` or ``random``, which depends on the seed."""
        self.library.taut_emulator_set_order(ORDERS[order], seed)

    def statistics(self) -> dict[str, int]:
        """Counts since the last call."""
        counts = (ctypes.c_uint64 * 4)()
        self.library.taut_emulator_statistics(counts)
        return dict(zip(("launches", "blocks", "switches", "collectives"), counts, strict=True))


class _Ops:
    """The emulated ops; for those that have no CUDA kernels, the CPU's."""

    def __init__(self, mode: str) -> None:
        self._emulated = getattr(torch.ops, f"taut_emulated_{mode}")

    def __getattr__(self, name: str):
        return getattr(self._emulated if hasattr(self._emulated, name) else torch.ops.taut, name)


@cache
def ops_library(mode: str) -> Emulator:
    """The emulated ops of a mode, built and loaded: ``torch.ops.taut_emulated_<mode>``. Raises ``build.Unavailable``."""
    library = build.build_ops(mode)
    torch.ops.load_library(str(library))
    return Emulator(library)


@contextmanager
def emulated(mode: str, sm: int, sm_count: int = 4, order: str = "fifo", seed: int = 0) -> Iterator[Emulator]:
    """Within the block, taut's ops on CPU tensors run their CUDA kernels on an emulated device with compute capability ``sm``.

    ``mode``: ``fast``, or ``checked``, which ends in a ``RuntimeError`` at a race, a missing wait, an access out of bounds or
    misaligned, or a read of what nobody wrote.
    """
    emulator = ops_library(mode)
    emulator.set_device(sm, sm_count)
    emulator.set_order(order, seed)
    ops = _Ops(mode)
    before = _native.ops_for, _native.layout_for
    _native.ops_for = lambda device_type: ops
    _native.layout_for = lambda device_type: _native.MMA_TILES
    try:
        yield emulator
    finally:
        _native.ops_for, _native.layout_for = before


def sm_of(impl: str) -> int:
    """The emulated device on which an impl of this name is tested."""
    return SM_OF[impl.split(".")[0]]
