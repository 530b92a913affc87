"""Timing contenders side by side: interleaved, with stolen samples dropped."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_STAT = Path("/proc/stat")
MIN_CLEAN = 3  # with fewer clean samples than this, all are kept
MIN_SAMPLES = 3
_SAMPLE_SECONDS = 0.5e-3  # a shorter call is repeated within a sample
_BURST_SECONDS = 0.02  # of samples a contender takes at its turn
_MAX_BURST = 8
_SLOW_SECONDS = 0.05  # a call this long needs no untimed one before it


def steal_ticks() -> int:
    """Clock ticks the hypervisor has taken from this machine so far; 0 where the system does not count them."""
    try:
        with _STAT.open() as file:
            return int(file.readline().split()[8])
    except (OSError, IndexError, ValueError):
        return 0


@dataclass(frozen=True)
class Sample:
    seconds: float
    stolen: bool  # the steal counter moved meanwhile


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile in microseconds, of ``samples`` samples after ``dropped`` stolen ones went."""

    median_us: float
    p10_us: float
    p90_us: float
    samples: int
    dropped: int


def clean(samples: Sequence[Sample]) -> list[float]:
    """The seconds of the samples from which nothing was stolen; of all, where fewer than three such stay."""
    kept = [sample.seconds for sample in samples if not sample.stolen]
    return kept if len(kept) >= MIN_CLEAN else [sample.seconds for sample in samples]


def spread(samples: Sequence[Sample]) -> Spread:
    """Statistics of the clean samples. Raises ``ValueError`` if there are none."""
    if not samples:
        raise ValueError("there are no samples")
    kept = clean(samples)
    micros = [seconds * 1e6 for seconds in kept]
    return Spread(statistics.median(micros), percentile(micros, 0.1), percentile(micros, 0.9), len(kept), len(samples) - len(kept))


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of ``values`` lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def wait_until_idle(limit_s: float = 3.0) -> None:
    """Returns when no thread of this process is running any more, or after ``limit_s``.

    WHY: OpenMP's and ONNX Runtime's threads go on spinning for 10 ms to a second after a call, ready for the next. That is how
    each of them is fastest, so it stays on; but it must be over before the next contender starts.
    """
    deadline = time.perf_counter() + limit_s
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.002)
        if time.process_time() - before < 0.0004:
            return


@dataclass
class Runner:
    """One contender while it is timed. ``call`` does ``layers`` computations; samples are seconds for one."""

    call: Callable[[], object]
    layers: int = 1
    samples: list[Sample] = field(default_factory=list)
    spent: float = 0.0
    repeats: int = 1
    burst: int = 1
    slow: bool = False

    def warm_up(self) -> None:
        """Two calls; the second says how many make a sample, and how many samples make a turn."""
        self.call()
        start = time.perf_counter()
        self.call()
        seconds = max(time.perf_counter() - start, 1e-7)
        self.repeats = max(1, round(_SAMPLE_SECONDS / seconds))
        self.burst = max(1, min(_MAX_BURST, round(_BURST_SECONDS / (seconds * self.repeats))))
        self.slow = seconds >= _SLOW_SECONDS

    def take_turn(self) -> None:
        """An untimed call that wakes the threads (and, where weights are warm, brings them back), then the samples."""
        begin = time.perf_counter()
        if not self.slow:
            self.call()
        for _ in range(self.burst):
            stolen = steal_ticks()
            start = time.perf_counter()
            for _ in range(self.repeats):
                self.call()
            seconds = time.perf_counter() - start
            self.samples.append(Sample(seconds / (self.repeats * self.layers), steal_ticks() != stolen))
        self.spent += time.perf_counter() - begin


def interleave(runners: Sequence[Runner], rounds: int, seconds_each: float) -> None:
    """Gives every runner a turn in each round, starting with another one each time.

    A runner that has had ``seconds_each`` and three samples waits for the others to finish.
    """
    for runner in runners:
        wait_until_idle()
        runner.warm_up()
    for index in range(rounds):
        first = index % max(1, len(runners))
        for runner in (*runners[first:], *runners[:first]):
            if runner.spent >= seconds_each and len(runner.samples) >= MIN_SAMPLES:
                continue
            wait_until_idle()
            runner.take_turn()
