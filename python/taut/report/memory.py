"""Peak memory of this process."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil
from typing_extensions import Self

STATUS = Path("/proc/self/status")
INTERVAL_S = 0.003


def anonymous_bytes() -> int:
    """Memory this process holds that no file backs (``RssAnon``); where the system does not say, all it holds (RSS)."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return psutil.Process().memory_info().rss


def file_mappings() -> list[tuple[int, int]]:
    """The address ranges of this process that a file backs; none where the system does not say."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    fields = [line.split() for line in lines]
    # a line: range, permissions, offset, device, inode, path
    return [tuple(int(end, 16) for end in field[0].split("-")) for field in fields if field[4] != "0"]


class PeakSampler:
    """Samples ``anonymous_bytes`` in a thread, every 3 ms; ``peak`` is the largest seen. A context manager."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self.sample()

    def sample(self) -> None:
        self.peak = max(self.peak, anonymous_bytes())

    def __enter__(self) -> Self:
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()
