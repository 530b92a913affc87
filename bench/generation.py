"""End to end: how fast a model reads a prompt and writes tokens, beside other libraries (``python bench/run.py --model NAME``).

Each contender runs in a process of its own, all of them loaded before anything is timed; they take turns, and one answers only when
its threads have stopped. First its predictions are held against those of transformers in fp32: after a prompt, and after each of
some tokens that follow, so that its cache is checked, too. One whose predictions are wrong is not timed.

A sample of a prompt is the time from its ids to the first token after it; of decoding, the time between the first token and the
last, over the tokens between. Counted: the bytes of the weights a step reads and of the cache; two operations a weight and token,
in int8 where the activations are, and attention's. Bytes bound a decoding step as if all came from memory: a share of the roofline
above 1 says that a small model's weights stayed in the cache. A JSON line holds what a layer's line holds, and tokens_s, cosine (of the
centred logits, the least over the checked positions), kl (mean, nats), top1 (share of positions with the same likeliest token), note.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import Self

from taut.roofline import Roofline

from . import language_models
from .generators import Contender, contenders
from .language_models import Shape
from .timing import Sample, Spread, spread

ROOT = Path(__file__).resolve().parents[1]
# By bits of a weight; a wrong mask or rotation gives less than 0.5, llama.cpp's Q4_0 of 16 layers of random weights 0.64.
_LEAST_COSINE = {4: 0.6, 8: 0.97, 16: 0.97, 32: 0.9999}
_CHECKED_TOKENS = 8  # after the prompt


@dataclass(frozen=True)
class Work:
    """What is timed: reading ``prompt`` tokens; writing ``steps`` tokens after ``start`` ones. ``rounds`` turns of each; a contender

    that has had ``seconds_each`` for one kind of work, and two samples, waits for the others to finish.
    """

    prompt: int = 512
    start: int = 32
    steps: int = 64
    rounds: int = 5
    seconds_each: float = 12.0


QUICK = Work(steps=24, rounds=2, seconds_each=6.0)
_MIN_SAMPLES = 2


@dataclass(frozen=True)
class Fidelity:
    """How near predictions are to those of the base: see the module."""

    cosine: float
    kl: float
    top1: float


@dataclass
class Running:
    """A contender that is loaded: its process, what it said of itself, and its samples in seconds a token."""

    contender: Contender
    process: Process
    facts: dict[str, Any]
    fidelity: Fidelity = field(default_factory=lambda: Fidelity(1.0, 0.0, 1.0))
    samples: dict[str, list[Sample]] = field(default_factory=lambda: {"prompt": [], "decode": []})


@dataclass(frozen=True)
class Result:
    """One finished measurement. ``case``: ``<model>/prompt512`` or ``<model>/decode64``."""

    case: str
    contender: Contender
    timing: Spread
    nbytes: float  # these three a token
    flops: float
    int8_ops: float
    share: float
    fidelity: Fidelity
    note: str

    @property
    def tokens_s(self) -> float:
        return 1e6 / self.timing.median_us

    def to_dict(self) -> dict[str, Any]:
        timing = self.timing
        return {
            "op": "generate", "case": self.case, "format": self.contender.format, "impl": self.contender.name,
            "peer": self.contender.peer, "median_us": timing.median_us, "p10_us": timing.p10_us, "p90_us": timing.p90_us,
            "tokens_s": self.tokens_s, "gb_s": self.nbytes / timing.median_us / 1e3,
            "gflop_s": (self.flops + self.int8_ops) / timing.median_us / 1e3, "roofline_share": self.share, "cold": False,
            "cosine": self.fidelity.cosine, "kl": self.fidelity.kl, "top1": self.fidelity.top1, "note": self.note,
        }  # fmt: skip


class Died(RuntimeError):
    """A process ended before it answered."""


class Process:
    """A worker (see ``bench/generators/worker.py``). A context manager; the process ends with it."""

    def __init__(self, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+")
        # it must find the same taut as this process, wherever that was imported from
        path = os.pathsep.join([str(ROOT), *(part for part in sys.path if part)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.generators.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)},
        )  # fmt: skip

    def call(self, method: str, *arguments: Any) -> Any:
        """The answer. Raises ``ValueError`` with the worker's reason where it refuses, ``Died`` where it ends instead."""
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = [text.strip() for text in self._errors if text.strip()]
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise Died(f"its process {how}" + (f": {said[-1][:200]}" if said else ""))
        status, value = json.loads(line)
        if status == "refused":
            raise ValueError(value)
        return value

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        with suppress(BrokenPipeError):  # of a call that it did not live to read
            self._process.stdin.close()
        self._process.stdout.close()
        self._errors.close()


def chosen(peers: bool) -> list[Contender]:
    """Transformers and taut; with ``peers`` the other libraries, too."""
    return [each for each in contenders() if peers or each.module == "transformers"]


def race(
    name: str, entries: Sequence[Contender], work: Work, threads: int, cache: Path, ceilings: Roofline, say: Callable[[str], None],
) -> tuple[list[Result], list[str], list[str]]:  # fmt: skip
    """Loads, checks and times ``entries`` (the first is the base) on a model.

    Gives the results, why contenders could not take part, and which were wrong. ``say`` is told what goes on.
    """
    cache.mkdir(parents=True, exist_ok=True)
    say(f"{name}: files")
    directory = language_models.directory_of(name, cache)
    shape = Shape.of(_config(directory))
    ids = language_models.prompt_ids(directory, shape.vocabulary, work.prompt)
    skipped, wrong, ready = [], [], []
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="taut-logits-") as folder:
        forced: list[int] = []
        base: np.ndarray | None = None
        for contender in entries:
            label = f"{contender.name} {contender.format}"
            say(f"{name}: loading {label}")
            if reason := contender.missing():
                skipped.append(f"{label}: {reason}")
                continue
            try:
                running = _start(stack, contender, directory, cache, threads, ids, work)
                if base is None:
                    forced = _greedy(running, ids[: work.start], folder)
                found = _logits(running, ids[: work.start], forced, folder)
            except (ValueError, OSError, Died) as error:
                if base is None:
                    raise ValueError(f"{label}, the base: {error}") from None
                skipped.append(f"{label}: {error}")
                continue
            base = found if base is None else base
            running.fidelity = compare(base, found)
            if not running.fidelity.cosine >= _LEAST_COSINE[contender.bits]:
                wrong.append(f"{name} {label}: the cosine of its logits with the base's is {running.fidelity.cosine:.4f}")
                continue
            ready.append(running)
        for kind in ("prompt", "decode"):
            _interleave(ready, kind, ids, work, lambda text: say(f"{name}: {text}"))
    results = [_result(running, kind, Path(name).name, shape, work, ceilings) for kind in ("prompt", "decode") for running in ready]
    return results, skipped, wrong


def _config(directory: Path) -> Any:
    import transformers

    return transformers.AutoConfig.from_pretrained(directory)


def _start(stack: ExitStack, contender: Contender, directory: Path, cache: Path, threads: int, ids: list[int], work: Work) -> Running:
    where = {"directory": str(directory)}
    if contender.gguf is not None:
        where = {"gguf": str(language_models.gguf_of(directory, contender.gguf, cache))}
    arguments = {**where, "threads": threads, **contender.arguments}
    process = stack.enter_context(Process(threads))
    try:
        facts = process.call("load", contender.module, arguments, ids, ids[: work.start])
    except Died:
        if contender.gguf is None:
            raise
        # WHY again: see bench/peers/ggml.py on how libggml's AMX code may be broken
        process = stack.enter_context(Process(threads))
        facts = process.call("load", contender.module, {**arguments, "repack": False}, ids, ids[: work.start])
    return Running(contender, process, facts)


def _greedy(running: Running, ids: list[int], folder: str) -> list[int]:
    """The likeliest tokens after ``ids``, found one by one: what the check goes on with."""
    forced: list[int] = []
    for _ in range(_CHECKED_TOKENS):
        forced.append(int(_logits(running, ids, forced, folder)[-1].argmax()))
    return forced


def _logits(running: Running, ids: list[int], forced: list[int], folder: str) -> np.ndarray:
    path = str(Path(folder) / "logits.npy")
    running.process.call("logits", ids, forced, path)
    return np.load(path)


def compare(base: np.ndarray, other: np.ndarray) -> Fidelity:
    """How near the logits ``other [T, V]`` are to ``base``; the cosine of logits that hold a NaN is a NaN."""
    if base.shape != other.shape:
        return Fidelity(float("nan"), float("nan"), 0.0)
    a, b = base.astype(np.float64), other.astype(np.float64)
    a_centred, b_centred = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    norms = np.linalg.norm(a_centred, axis=-1) * np.linalg.norm(b_centred, axis=-1)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Fidelity(float("nan"), float("nan"), 0.0)
    cosines = (a_centred * b_centred).sum(-1) / norms
    log_p, log_q = (values - np.logaddexp.reduce(values, axis=-1, keepdims=True) for values in (a, b))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return Fidelity(float(cosines.min()), float(kl.mean()), float((a.argmax(-1) == b.argmax(-1)).mean()))


def _interleave(ready: Sequence[Running], kind: str, ids: list[int], work: Work, say: Callable[[str], None]) -> None:
    """Turns of one kind of work, each round beginning with another contender."""
    spent = dict.fromkeys(range(len(ready)), 0.0)
    for index in range(work.rounds):
        for place in range(len(ready)):
            who = (index + place) % len(ready)
            running = ready[who]
            if spent[who] >= work.seconds_each and len(running.samples[kind]) >= _MIN_SAMPLES:
                continue
            say(f"{kind} {index + 1} of {work.rounds}: {running.contender.name} {running.contender.format}")
            if kind == "prompt":
                sample, tokens = running.process.call("prompt", ids), len(ids)
            else:
                sample, tokens = running.process.call("decode", ids[: work.start], work.steps), work.steps
            spent[who] += sample["seconds"]
            running.samples[kind].append(Sample(sample["seconds"] / tokens, sample["stolen"]))


def _result(running: Running, kind: str, model: str, shape: Shape, work: Work, ceilings: Roofline) -> Result:
    timing, facts = spread(running.samples[kind]), running.facts
    if kind == "prompt":
        tokens, linear = work.prompt, 2 * (work.prompt * shape.layer_weights + shape.head_weights)
        attention = shape.attention_flops(work.prompt, 0)
        nbytes = facts["weight_bytes"] + shape.cache_bytes(work.prompt, facts["cache_element_bytes"])
    else:
        tokens, linear = work.steps, 2 * work.steps * (shape.layer_weights + shape.head_weights)
        attention = shape.attention_flops(work.steps, work.start)
        nbytes = sum(
            facts["weight_bytes"] + shape.cache_bytes(work.start + step, facts["cache_element_bytes"]) for step in range(work.steps)
        )
    int8 = running.contender.bits <= 8
    flops, int8_ops = (attention, linear) if int8 else (attention + linear, 0)
    share = ceilings.least_seconds(nbytes, flops, int8_ops) / (timing.median_us * 1e-6 * tokens)
    case = f"{model}/{kind}{tokens}"
    return Result(
        case, running.contender, timing, nbytes / tokens, flops / tokens, int8_ops / tokens, share, running.fidelity, facts["note"]
    )
