"""What taut is compared with. One file a peer; each has ``PEERS``, a list of objects that follow ``Peer``.

Rules that keep the comparison fair: the same x, the same low-bit weights where the peer has the format (else the numbers
they stand for), the same threads, and each peer as fast as it can be made with what it offers its users. Where weights are
cold, the copies live in one session or graph whose nodes run one after the other, and the time is divided by their number:
a second session would bring a second pool of threads. The nodes of a graph pay no call from Python, taut's calls do: that
shows where a layer takes microseconds.
"""

from __future__ import annotations

from typing import Any, Protocol

from ..cases import Case
from ..contenders import Entry, Prepared
from ..problem import Problem


class Peer(Protocol):
    """``name``: the impl in the results. ``format``: what it computes, as ``bench/cases.py`` names formats; or ``fp32``, ``bf16``."""

    name: str
    format: str

    def available(self) -> str | None:
        """None if it can run here, else why not."""

    def prepare(self, problem: Problem, cold_bytes: int) -> Prepared:
        """Sets up a quant_linear case and checks its result. Raises ``contenders.Skip`` with the reason if it cannot."""


def all_peers() -> list[Peer]:
    """Every peer, installed or not."""
    from . import ggml, onnxruntime, openvino, torch_int4pack, torch_linear

    return [peer for module in (torch_linear, torch_int4pack, onnxruntime, openvino, ggml) for peer in module.PEERS]


def cuda_peers() -> list[Any]:
    """The peers of ``bench/gpu.py``, installed or not: each has ``name``, ``available()`` and ``layer(weight, cold_bytes)``."""
    from . import cuda_bitsandbytes, cuda_dense, cuda_gemlite, cuda_int4pack

    return [peer for module in (cuda_dense, cuda_int4pack, cuda_bitsandbytes, cuda_gemlite) for peer in module.PEERS]


def entry(peer: Peer, case: Case) -> Entry:
    """The peer as an entry of a race."""
    return Entry(case, peer.format, peer.name, True, peer.prepare)


def bits_of(format: str) -> int | None:
    """4 or 8 for a low-bit format, None for a float one."""
    return {"int4": 4, "int8": 8}.get(format.partition("_")[0])
