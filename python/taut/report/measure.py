"""Measures variants of a model side by side: each in a process of its own, their timings interleaved."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ..models import Settings
from .fidelity import Estimate, TokenStats, join, summarize
from .resources import checkpoint_file_bytes
from .runner import Variant, stats_from_lists
from .worker import Worker, call_all

MIN_ROUNDS = 2


@dataclass(frozen=True)
class Workload:
    """What the variants are made to do.

    ``prompt``: the token ids whose reading is timed. ``start``: the ids after which ``steps`` tokens are written, the
    likeliest each time, and timed. ``windows``: lists of ids on which the predictions are compared with the base's;
    ``windows_of`` limits their number for a variant, by name. ``rounds`` timings of each, interleaved; a variant that has
    had ``seconds_each`` for one kind of timing gets no more of it, but always two.
    """

    prompt: list[int]
    start: list[int]
    steps: int = 48
    windows: list[list[int]] = field(default_factory=list)
    windows_of: Mapping[str, int] = field(default_factory=dict)
    rounds: int = 5
    seconds_each: float = 20.0

    def windows_for(self, name: str) -> list[list[int]]:
        return self.windows[: self.windows_of.get(name, len(self.windows))]


@dataclass
class Measurement:
    """What was found for one variant: ``facts`` as ``Runner.load`` gives them, the timings, and fidelity to the base."""

    variant: Variant
    facts: dict[str, Any]
    prompts: list[dict[str, Any]] = field(default_factory=list)
    decodes: list[dict[str, Any]] = field(default_factory=list)
    flops: int = 0
    fidelity: dict[str, Estimate] | None = None
    compared_tokens: int = 0
    interleaved: bool = True

    def rate(self, kind: str) -> tuple[float, float]:
        """Median tokens a second of "prompts" or "decodes", and half the range between the fastest and the slowest."""
        rates = [sample["tokens"] / sample["seconds"] for sample in getattr(self, kind)]
        return statistics.median(rates), (max(rates) - min(rates)) / 2

    def per_token(self, kind: str, what: str) -> float | None:
        """Median of "core_seconds" or "joules" a token of "prompts" or "decodes"; None where it is not counted."""
        values = [sample[what] / sample["tokens"] for sample in getattr(self, kind) if sample[what] is not None]
        return statistics.median(values) if values else None


def measure(
    variants: Sequence[Variant], work: Workload, *, threads: int | None = None, together: bool | None = None, flops: bool = False,
    layers: Settings | None = None, progress: Callable[[int, int, str], None] | None = None,
) -> list[Measurement]:  # fmt: skip
    """Loads ``variants`` (the first is the base), each in a fresh process, and measures them.

    ``together``: hold all in memory at once, so that their timings interleave; None decides by the memory that is free.
    ``threads``: of each process, which run one at a time while anything is timed. ``layers``: the settings whose layers
    the bytes of a base's swapped layers are counted for. ``progress(done, total, what)``.
    Raises ``ValueError`` or ``OSError`` where a model cannot be loaded, ``WorkerDied`` where a process dies.
    """
    if len({variant.name for variant in variants}) != len(variants):
        raise ValueError("variants must have different names")
    groups = [list(variants)] if (_fits(variants) if together is None else together) else [[variant] for variant in variants]
    total = sum(1 + 2 * work.rounds + len(work.windows_for(variant.name)) for variant in variants)
    done = 0

    def step(name: str, what: str) -> None:
        nonlocal done
        if progress:
            progress(done, total, f"{name}: {what}")
        done += 1

    results: dict[str, Measurement] = {}
    stats: dict[str, list[TokenStats]] = {variant.name: [] for variant in variants}
    with tempfile.TemporaryDirectory(prefix="taut-logits-") as folder:
        shapes: dict[int, list[int]] = {}
        for group in groups:
            with ExitStack() as stack:
                workers = [stack.enter_context(Worker(variant, threads)) for variant in group]
                for worker in workers:
                    step(worker.variant.name, "loading")
                loaded = call_all(workers, "load", work.start, min(work.steps, 4), None if layers is None else asdict(layers))
                for worker, facts in zip(workers, loaded, strict=True):
                    results[worker.variant.name] = Measurement(worker.variant, facts, interleaved=len(groups) == 1)
                for kind in ("prompt", "decode"):
                    _time(workers, kind, work, results, step)
                if flops:
                    for worker in workers:
                        results[worker.variant.name].flops = worker.call("flops", work.start)
                for index, window in enumerate(work.windows):
                    path = str(Path(folder) / f"{index}.f32")
                    for worker in workers:
                        if index >= len(work.windows_for(worker.variant.name)):
                            continue
                        step(worker.variant.name, "comparing predictions")
                        if worker.variant is variants[0]:
                            shapes[index] = worker.call("write_logits", window, path)
                        else:
                            stats[worker.variant.name].append(stats_from_lists(worker.call("compare", window, path, shapes[index])))
                    if len(groups) == 1:
                        Path(path).unlink(missing_ok=True)
    for name, parts in stats.items():
        if parts:
            joined = join(parts)
            results[name].fidelity, results[name].compared_tokens = summarize(joined), joined.kl.numel()
    return [results[variant.name] for variant in variants]


def _time(
    workers: Sequence[Worker], kind: str, work: Workload, results: Mapping[str, Measurement], step: Callable[[str, str], None]
) -> None:
    spent = {worker.variant.name: 0.0 for worker in workers}
    for index in range(work.rounds):
        for worker in workers:
            name = worker.variant.name
            step(name, f"timing {kind}s")
            if index >= MIN_ROUNDS and spent[name] > work.seconds_each:
                continue
            sample = worker.call("prompt", work.prompt) if kind == "prompt" else worker.call("decode", work.start, work.steps)
            spent[name] += sample["seconds"]
            (results[name].prompts if kind == "prompt" else results[name].decodes).append(sample)


def _fits(variants: Sequence[Variant]) -> bool:
    """Whether all variants are likely to fit in memory at once."""
    size = checkpoint_file_bytes(variants[0].source) or 0
    as_floats = 8 * size if variants[0].source.endswith(".gguf") else 2 * size
    return as_floats * len(variants) < 0.7 * psutil.virtual_memory().available
