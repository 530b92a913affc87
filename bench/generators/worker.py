"""The process of one generator: ``python -m bench.generators.worker``; it answers calls on its standard input and output.

Every line in is ``[method, arguments]``, every line out ``["ok", result]`` or ``["refused", why]``. An answer to something timed is
given when no thread of this process runs any more, so that the next generator has the machine to itself.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

import numpy as np

from bench.timing import steal_ticks, wait_until_idle


class Worker:
    """The calls of a process; ``load`` comes first."""

    def load(self, module: str, arguments: dict[str, Any], prompt: list[int], start: list[int]) -> dict[str, Any]:
        """Makes the generator and warms it up."""
        self.generator = importlib.import_module(f"bench.generators.{module}").Generator(**arguments)
        if hasattr(self.generator, "choose"):
            self.generator.choose(prompt, start)
        else:
            self.generator.prompt(prompt)
            self.generator.decode(start, 2)
        wait_until_idle()
        found = self.generator
        return {"weight_bytes": found.weight_bytes, "cache_element_bytes": found.cache_element_bytes, "note": found.note}

    def logits(self, ids: list[int], forced: list[int], path: str) -> list[int]:
        """Writes the logits to ``path`` as fp32; gives their shape."""
        found = self.generator.logits(ids, forced)
        np.save(path, found)
        wait_until_idle()
        return list(found.shape)

    def prompt(self, ids: list[int]) -> dict[str, Any]:
        stolen, begin = steal_ticks(), time.perf_counter()
        self.generator.prompt(ids)
        return self._sample(time.perf_counter() - begin, stolen)

    def decode(self, ids: list[int], steps: int) -> dict[str, Any]:
        stolen = steal_ticks()
        return self._sample(self.generator.decode(ids, steps), stolen)

    @staticmethod
    def _sample(seconds: float, stolen: int) -> dict[str, Any]:
        now = steal_ticks()
        wait_until_idle()
        return {"seconds": seconds, "stolen": now != stolen}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    worker = Worker()
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = ["ok", getattr(worker, method)(*arguments)]
        except Exception as error:  # WHY broad: every library has its own; whatever it is, the generator is out, with the reason
            answer = ["refused", " ".join(f"{type(error).__name__}: {error}".split())[:300]]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
