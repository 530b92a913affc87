"""What ``taut report`` makes a model do, out of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..models import Settings, text_windows
from .measure import Workload
from .runner import Variant

START_TOKENS = 32


def make_workload(tokenizer: Any, text: str, window: int, tokens: int, new_tokens: int, rounds: int) -> Workload:
    """Prompts of ``window`` tokens, decode after the first few of them, and about ``tokens`` of comparison.

    Raises ``ValueError`` if the text is shorter than one window.
    """
    windows = text_windows(tokenizer, text, window, max(1, tokens // window)).tolist()
    start = windows[0][:START_TOKENS]
    return Workload(windows[0], start, new_tokens, windows if tokens else [], rounds=rounds)


def make_variants(source: str, dtype: str, settings: Sequence[Settings]) -> list[Variant]:
    """The base, then one variant for each of ``settings``, named after its format."""
    return [Variant("base", source, dtype), *(Variant(each.weights, source, dtype, each) for each in settings)]
