"""What writes tokens, each in a process of its own: one file a library, with a class that follows ``Generator``.

The rules: the same weights in the same bits as near as a library stores them, the same threads, the same token ids, greedy; a
library's fastest settings that its users have. Head and embeddings are what each library's users get, and its note says what.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


class Generator(Protocol):
    """``weight_bytes``: of the weights one token reads. ``cache_element_bytes``: of a number in the key and value cache.

    ``note``: settings that a reader of the numbers must know. Methods do what is timed; who calls them holds the clock, except
    where ``decode`` must leave out the first token, which belongs to the prompt.
    """

    weight_bytes: int
    cache_element_bytes: int
    note: str

    def prompt(self, ids: list[int]) -> None:
        """Reads ``ids``, up to the first token after them."""

    def decode(self, ids: list[int], steps: int) -> float:
        """Writes ``steps`` tokens after the first one after ``ids``, the likeliest each time; the seconds they took."""

    def logits(self, ids: list[int], forced: list[int]) -> np.ndarray:
        """Predictions after ``ids``, and after each of ``forced`` as it is added, one at a time: ``fp32 [1 + len(forced), V]``."""


@dataclass(frozen=True)
class Contender:
    """A generator before it is loaded: ``module`` here and its arguments; ``gguf`` where it needs a GGUF file of that kind."""

    name: str
    format: str
    peer: bool
    module: str
    arguments: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    gguf: str | None = None

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        gone = [package for package in self.needs if importlib.util.find_spec(package) is None]
        return f"{' and '.join(gone)} not installed" if gone else None

    @property
    def bits(self) -> int:
        """Of a weight."""
        return {"int4": 4, "int8": 8, "bf16": 16, "fp32": 32}[self.format.partition("_")[0]]


def contenders() -> list[Contender]:
    """Everyone, installed or not; the first is what the others are held against."""
    return [
        Contender("transformers_fp32", "fp32", True, "transformers", {"dtype": "float32"}),
        Contender("transformers_bf16", "bf16", True, "transformers", {"dtype": "bfloat16"}),
        Contender("taut", "int4_g32_a8", False, "transformers", {"dtype": "float32", "weights": "int4"}),
        Contender("taut", "int8_row_a8", False, "transformers", {"dtype": "float32", "weights": "int8"}),
        Contender("llama_cpp_q4_0", "int4_g32_a8", True, "llama_cpp", {}, ("llama_cpp", "gguf"), "q4_0"),
        Contender("llama_cpp_q8_0", "int8_g32_a8", True, "llama_cpp", {}, ("llama_cpp", "gguf"), "q8_0"),
        Contender("onnxruntime_4bit", "int4_g32_a8", True, "onnxruntime", {"bits": 4}, ("onnx", "onnxruntime")),
        Contender("onnxruntime_8bit", "int8_g32_a8", True, "onnxruntime", {"bits": 8}, ("onnx", "onnxruntime")),
    ]
