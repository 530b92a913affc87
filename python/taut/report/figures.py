"""A figure of a report: a number that says where it comes from."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

SOURCES = ("measured", "counted", "modelled", "unavailable")


@dataclass(frozen=True)
class Figure:
    """``value`` in ``unit``, its standard error or spread where known, its ``source`` and a ``note``.

    ``source``: "measured" (a clock or a counter read in this run), "counted" (exact, from shapes and sizes), "modelled"
    (from an assumption, which ``note`` names) or "unavailable" (``value`` is None, never 0; ``note`` says why).
    Raises ``ValueError`` where these do not go together.
    """

    value: float | None
    unit: str
    source: str
    note: str = ""
    error: float | None = None

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source {self.source!r}; accepted: {', '.join(SOURCES)}")
        if (self.value is None) != (self.source == "unavailable"):
            raise ValueError(f"a figure has no value exactly if it is unavailable, got {self.value!r}, {self.source}")
        if self.source in ("modelled", "unavailable") and not self.note:
            raise ValueError(f"a figure that is {self.source} says why in its note")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a figure must be finite, got {self.value}")

    def as_dict(self) -> dict[str, float | str | None]:
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return "unavailable"
        text, unit = self.parts()
        return f"{text} {unit}".rstrip()

    def parts(self) -> tuple[str, str]:
        """The value with its error, and the unit with its prefix, to show in two places."""
        if self.value is None:
            return "unavailable", self.unit
        text, unit = human(self.value, self.unit)
        return text if self.error is None else f"{text} ± {human(self.error, self.unit, like=self.value)[0]}", unit


def measured(value: float, unit: str, note: str = "", error: float | None = None) -> Figure:
    return Figure(float(value), unit, "measured", note, error)


def counted(value: float, unit: str, note: str = "") -> Figure:
    return Figure(value, unit, "counted", note)


def modelled(value: float, unit: str, assumption: str) -> Figure:
    return Figure(float(value), unit, "modelled", assumption)


def unavailable(unit: str, why: str) -> Figure:
    return Figure(None, unit, "unavailable", why)


_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_PREFIXED = ("B", "FLOP", "B/token", "parameters")


def human(value: float, unit: str, like: float | None = None) -> tuple[str, str]:
    """``value`` as a short number and its unit, in the prefix that fits ``like``.

    Without ``like`` four digits are shown; with it (``value`` is then the error of ``like``), two.
    """
    size = abs(value if like is None else like)
    scale, shown = 1.0, unit
    if unit in _PREFIXED:
        scale, prefix = next(((s, p) for s, p in _PREFIXES if size >= s), (1.0, ""))
        shown = f"{prefix} {unit}".strip() if unit == "parameters" else prefix + unit
    elif unit == "share":
        scale, shown = 0.01, "%"
    elif unit in ("s", "core-s") and size < 1:
        scale, shown = 1e-3, f"m{unit}" if unit == "s" else "core-ms"
    number = value / scale
    if abs(number) >= 10_000:
        return f"{number:,.0f}", shown
    return f"{number:.4g}" if like is None else f"{number:.2g}" if abs(number) < 100 else f"{number:.0f}", shown
