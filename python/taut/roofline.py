"""The ceilings of this machine, measured where it runs: what any kernel's time can be held against."""

from __future__ import annotations

import mmap
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from ._native import explain
from .ops import roofline as op

_MIB = 1 << 20
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE_BYTES = 32 * _MIB
_READ_PASSES = 8  # of each kind of read; the best counts
_COMPUTE_BURSTS = 8
_cached: dict[tuple[int, str], Roofline] = {}


@dataclass(frozen=True)
class Roofline:
    """What this machine can do with ``threads`` threads; the best of several tries, so a ceiling and no average.

    ``read_gb_s``: gigabytes (10^9) a second of memory read in sequential streams, 4 KB pages; ``read_huge_pages_gb_s``:
    the same from 2 MB pages, None where the system has no ``madvise``. ``read_streams``: how many streams a thread were
    fastest. ``fma_gflop_s``: fp32 multiply-adds, 2 flops each; ``dot_gop_s``: int8 multiply-adds, 2 operations each; ``bf16_gflop_s``:
    bf16 multiply-adds summed in fp32, that of fp32 where the processor has no instruction for them; all 10^9 a second from registers.
    ``last_cache_bytes``: the last-level cache; ``buffer_bytes``: what was read; ``impl``: the loops that ran.
    """

    threads: int
    impl: str
    last_cache_bytes: int
    buffer_bytes: int
    read_gb_s: float
    read_huge_pages_gb_s: float | None
    read_streams: int
    fma_gflop_s: float
    dot_gop_s: float
    bf16_gflop_s: float

    @property
    def best_read_gb_s(self) -> float:
        """The faster of the two kinds of pages."""
        return max(self.read_gb_s, self.read_huge_pages_gb_s or 0.0)

    def least_seconds(self, nbytes: float, flops: float = 0.0, int8_ops: float = 0.0, bf16_flops: float = 0.0) -> float:
        """The least time this machine could take to read ``nbytes`` and do so many operations in fp32, in int8 and in bf16."""
        arithmetic = flops / self.fma_gflop_s + int8_ops / self.dot_gop_s + bf16_flops / self.bf16_gflop_s
        return max(nbytes / self.best_read_gb_s, arithmetic) * 1e-9

    def best_of(self, other: Roofline) -> Roofline:
        """The higher of each ceiling, of two measurements on one machine with the same threads and impl.

        Raises ``ValueError`` where threads or impl differ.
        """
        if (self.threads, self.impl) != (other.threads, other.impl):
            raise ValueError(
                f"ceilings of {self.threads} threads of {self.impl} and of {other.threads} threads of {other.impl} do not compare"
            )
        huge = [found for found in (self.read_huge_pages_gb_s, other.read_huge_pages_gb_s) if found is not None]
        return replace(
            self,
            read_gb_s=max(self.read_gb_s, other.read_gb_s),
            read_huge_pages_gb_s=max(huge, default=None),
            read_streams=max(self, other, key=lambda found: found.best_read_gb_s).read_streams,
            fma_gflop_s=max(self.fma_gflop_s, other.fma_gflop_s),
            dot_gop_s=max(self.dot_gop_s, other.dot_gop_s),
            bf16_gflop_s=max(self.bf16_gflop_s, other.bf16_gflop_s),
        )

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def roofline(refresh: bool = False) -> Roofline:
    """Measures this machine's ceilings with ``torch.get_num_threads()`` threads, in one or two seconds.

    The result is kept for the process, by number of threads and impl; ``refresh=True`` measures again.
    """
    impl = next(verdict.impl for verdict in explain("roofline") if verdict.chosen)
    key = (torch.get_num_threads(), impl)
    if refresh or key not in _cached:
        _cached[key] = _measure(*key)
    return _cached[key]


def last_cache_bytes() -> int:
    """Bytes of the largest data cache the first core sees; 32 MiB where the system does not say."""
    found = 0
    for index in _CACHES.glob("index*"):
        try:
            kind, size = (index / "type").read_text().strip(), (index / "size").read_text().strip()
        except OSError:
            continue
        match = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and match:
            found = max(found, int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return found or _UNKNOWN_CACHE_BYTES


def _measure(threads: int, impl: str) -> Roofline:
    cache = last_cache_bytes()
    # WHY an eighth: a machine with little memory must not swap for this; then the cache helps, and the size says so.
    nbytes = min(max(4 * cache, 192 * _MIB), 1024 * _MIB, psutil.virtual_memory().available // 8) // (2 * _MIB) * (2 * _MIB)
    small, small_streams = _read(_buffer(nbytes, huge=False))
    huge, huge_streams = _read(_buffer(nbytes, huge=True)) if hasattr(mmap, "MADV_HUGEPAGE") else (None, 0)
    return Roofline(
        threads=threads,
        impl=impl,
        last_cache_bytes=cache,
        buffer_bytes=nbytes,
        read_gb_s=small,
        read_huge_pages_gb_s=huge,
        read_streams=huge_streams if (huge or 0.0) > small else small_streams,
        fma_gflop_s=_compute("fma_f32"),
        dot_gop_s=_compute("dot_int8"),
        bf16_gflop_s=_compute("dot_bf16"),
    )


def _buffer(nbytes: int, huge: bool) -> Tensor:
    """``int64`` memory of its own pages, touched by all threads."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.ones(nbytes // 8, dtype=torch.int64)
    # WHY private: Python's default is shared memory, to which another switch for huge pages applies
    memory = mmap.mmap(-1, nbytes + 2 * _MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    except OSError:
        pass  # a kernel built without huge pages: then both kinds of read are of 4 KB pages
    buffer = torch.frombuffer(memory, dtype=torch.int64)
    first = -buffer.data_ptr() % (2 * _MIB) // 8
    return buffer[first : first + nbytes // 8].fill_(1)


def _read(buffer: Tensor) -> tuple[float, int]:
    """The best GB/s, and the streams a thread that gave it."""
    best = (0.0, 0)
    for _ in range(_READ_PASSES):
        for streams in op.STREAMS:
            start = time.perf_counter()
            total = op.roofline(buffer, "read", streams)
            seconds = time.perf_counter() - start
            if int(total) != buffer.numel():
                raise RuntimeError(f"roofline read {int(total)} of {buffer.numel()} words")
            best = max(best, (buffer.nbytes / seconds / 1e9, streams))
    return best


def _compute(ceiling: str) -> float:
    """The best rate, 10^9 operations a second."""
    nothing = torch.empty(0, dtype=torch.int64)
    best = 0.0
    for _ in range(_COMPUTE_BURSTS):
        start = time.perf_counter()
        # WHY not as many steps as fill some time: on a busy machine a thread that starts late fills it. These take 8 to 30 ms.
        multiply_adds = int(op.roofline(nothing, ceiling, steps=op.MAX_STEPS))
        best = max(best, 2 * multiply_adds / (time.perf_counter() - start) / 1e9)
    return best
