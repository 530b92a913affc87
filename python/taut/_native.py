"""Loads the compiled libraries, and speaks to the impl tables through ``_C``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # WHY first: it puts libtorch_cpu.so, which libtaut_cpu.so needs, into the process

from . import _C

# The byte orders of packed weights, by their numbers in csrc/common/formats.h.
ROWS8, MMA_TILES = 0, 1

torch.ops.load_library(str(Path(_C.__file__).with_name("libtaut_cpu.so")))


def _load_cuda() -> str:
    """Loads the CUDA kernels. Gives the reason where there are none, else an empty string."""
    library = Path(_C.__file__).with_name("libtaut_cuda.so")
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if not library.exists():
        return "this build of taut has no CUDA kernels: install a wheel that has them, or build taut where nvcc is installed"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"the CUDA kernels of this build cannot be loaded: {error}"
    return ""


_WHY_NO_CUDA = _load_cuda()


def why_not(device_type: str) -> str:
    """Why taut cannot compute on devices of this type here; an empty string if it can."""
    if device_type == "cuda":
        return _WHY_NO_CUDA
    return "" if device_type == "cpu" else f"it has kernels for the CPU and for CUDA, none for {device_type!r}"


def ops_for(device_type: str) -> Any:
    """The ops, as a namespace of ``torch.ops``, for tensors on a device of this type. Raises ``ValueError`` where taut has none."""
    if device_type not in ("cpu", "meta") and (why := why_not(device_type)):
        raise ValueError(f"taut cannot compute on {device_type} tensors: {why}")
    return torch.ops.taut


def layout_for(device_type: str) -> int:
    """The byte order in which the kernels of this device type read a packed weight."""
    return MMA_TILES if device_type == "cuda" else ROWS8


def device_of(**tensors: torch.Tensor | None) -> torch.device:
    """The one device these tensors are on. Raises ``ValueError`` where there are several, or one that taut has no kernels for."""
    given = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first, device = next(iter(given.items()))
    for name, other in given.items():
        if other != device:
            raise ValueError(f"tensors must be on one device; {first} is on {device}, {name} on {other}")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{first} must be on the CPU or on a CUDA device, got {device}")
    ops_for(device.type)
    return device


def list_impls(device: str | None = None) -> dict[str, list[str]]:
    """Every op and the names of its impls, in priority order: those for "cpu" or "cuda", or (None) all whose kernels are loaded."""
    found: dict[str, list[str]] = {}
    for op, where, impls in _C.list_ops():
        if where == device or (device is None and where in ("cpu", "cuda")):
            found.setdefault(op, []).extend(impls)
    return found


def cpu_features() -> dict[str, bool]:
    """Which instruction sets this processor and operating system can run."""
    return _C.cpu_features()


def build_info() -> dict[str, str | None]:
    """Version, compiler, architecture, the oldest torch this build serves, and the GPUs ``cuda`` it has code for (None: none)."""
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


def explain(op: str, device: str = "cpu", **sizes: Any) -> list[Verdict]:
    """Which impl of ``op`` runs for a call of these sizes, and why each one was passed over, in table order.

    ``device``: "cpu" or "cuda". ``quant_linear`` takes M, N, K, format (a number of ``taut.formats.FORMATS``), group_size, zeros,
    activations (0 float, 1 int8, 2 int8_row, 3 fp8_row), dtype (of x), and device_index; ``sparse_linear`` takes the pattern's n, m and v
    instead of zeros. ``attention_decode`` takes kv_format, dtype (of q), D, Dv, channels and aligned (0 or 1: are there some; do rows of
    floats lie at multiples of 16 bytes), and device_index.
    Raises ``ValueError`` for an unknown op, size or device, or a value the op refuses.
    """
    known = _EXPLAIN_SIZES.get(op)
    if known is None:
        raise ValueError(f"no op {op!r}; known ops: {', '.join(list_impls())}")
    unknown = set(sizes) - set(known)
    if unknown:
        raise ValueError(f"{op} has no size {sorted(unknown)[0]!r}; accepted: {', '.join(known) or 'none'}")
    if why := why_not(device):
        raise ValueError(f"taut cannot compute on {device} here: {why}")
    try:
        return [Verdict(*row) for row in _C.explain(op, {name: int(_DTYPES.get(value, value)) for name, value in sizes.items()}, device)]
    except RuntimeError as error:
        raise ValueError(str(error)) from None


_EXPLAIN_SIZES = {
    "attention_backward": ("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "dtype"),
    "attention_decode": ("kv_format", "dtype", "D", "Dv", "channels", "aligned", "device_index"),
    "attention_prefill": ("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv", "dtype", "rules", "aligned", "device_index"),
    "decoder_layers": ("head_dim",),
    "kv_append": ("device_index",),
    "quant_linear": ("M", "N", "K", "format", "group_size", "zeros", "activations", "dtype", "device_index"),
    "quant_embedding": (),
    "quantize_weight": (),
    "pack_sparse": (),
    "rms_norm": (),
    "roofline": (),
    "sparse_linear": ("M", "N", "K", "format", "group_size", "n", "m", "v", "activations", "dtype", "device_index"),
    "split_rope": (),
}
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/common/dtypes.h numbers them


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Within the block, a row's result on CUDA does not depend on how many other rows are in the call, bit for bit.

    It rules out the kernels, and the ways to split K, that are chosen by the number of rows, so that large batches run slower.
    On the CPU it is always so. The setting is one for the whole process, not for a thread.
    """
    before = _C.batch_invariant()
    _C.set_batch_invariant(True)
    try:
        yield
    finally:
        _C.set_batch_invariant(before)


def _force_from_environment() -> None:
    for entry in filter(None, os.environ.get("TAUT_FORCE_IMPL", "").split(",")):
        op, separator, impl = entry.partition(":")
        if not separator:
            raise ValueError(f"TAUT_FORCE_IMPL: {entry!r} is not of the form <op>:<impl>")
        _C.force_impl(op.strip(), impl.strip())


_force_from_environment()
