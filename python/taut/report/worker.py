"""A process of its own for one variant, so that its peak memory is its own; calls go over its standard input and output.

``Worker`` starts it (``python -m taut.report.worker``) and calls the methods of its ``Runner``, one JSON line each way.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from typing_extensions import Self

from ..models import Settings, first_line
from .runner import Runner, Variant

METHODS = ("load", "prompt", "decode", "flops", "write_logits", "compare")


class WorkerDied(RuntimeError):
    """The process of a variant ended before it answered: out of memory, most often."""


class Worker:
    """A ``Runner`` in a fresh process. ``call`` waits for its answer; ``send`` and ``receive`` let several work at once.

    Raises ``ValueError`` with the worker's own message where it refuses, ``WorkerDied`` where it dies. A context manager.
    """

    def __init__(self, variant: Variant, threads: int | None = None) -> None:
        self.variant = variant
        self._errors = tempfile.TemporaryFile("w+")
        # the worker must find the same taut as its parent, wherever that was imported from
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "taut.report.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
            text=True, env=environment,
        )  # fmt: skip
        self._started = False
        self.send("start", variant.as_dict(), threads)

    def send(self, method: str, *arguments: Any) -> None:
        try:
            self._process.stdin.write(json.dumps([method, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> Any:
        if not self._started:  # its import takes seconds, so nobody waited for the first answer
            self._started = True
            self.receive()
        line = self._process.stdout.readline()
        if not line:
            raise self._death()
        status, value = json.loads(line)
        if status == "refused":
            raise ValueError(f"{self.variant.name}: {value}")
        return value

    def call(self, method: str, *arguments: Any) -> Any:
        self.send(method, *arguments)
        return self.receive()

    def _death(self) -> WorkerDied:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        how = "was killed, perhaps for want of memory" if code == -signal.SIGKILL else f"ended with code {code}"
        return WorkerDied(f"{self.variant.name}: its process {how}: {first_line(lines[-1]) if lines else 'it left no message'}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                pipe.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(timeout=5 if exception[0] is None else 0.1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()


def call_all(workers: Sequence[Worker], method: str, *arguments: Any) -> list[Any]:
    """Calls ``method`` on all workers at the same time; for work whose duration does not matter."""
    for worker in workers:
        worker.send(method, *arguments)
    return [worker.receive() for worker in workers]


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # WHY: whatever a library prints must not land between the answers
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    runner: Runner | None = None
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            if method == "start":
                runner, answer = Runner(Variant.from_dict(arguments[0]), arguments[1]), None
            elif method == "load" and arguments[2] is not None:
                answer = runner.load(arguments[0], arguments[1], Settings(**arguments[2]))
            elif method in METHODS:
                answer = getattr(runner, method)(*arguments)
            else:
                raise ValueError(f"no method {method!r}; accepted: {', '.join(METHODS)}")
            reply = ["ok", answer]
        except (ValueError, OSError) as error:
            reply = ["refused", first_line(error)]
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
