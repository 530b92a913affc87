"""The short table of a GPU benchmark: ``python -m bench.gpu --table PATH``."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
KINDS = ("run", "ceiling", "linear", "begin", "ready", "end", "skipped", "wrong", "failed", "facts")
_FEW_ROWS, _MANY_ROWS = 16, 1024  # up to: bound by memory; from: by arithmetic
_SHOWN = 4  # of a list of cases
WIDTH = 132
_CEILINGS = (
    ("copy_gb_s", "copy", "GB/s"), ("read_gb_s", "read", "GB/s"), ("dense_tflop_s", "16 bits", "TFLOP/s"), ("int8_top_s", "int8", "TOP/s"),
    ("fp8_tflop_s", "fp8", "TFLOP/s"),
)  # fmt: skip


def read_lines(path: Path) -> list[Line]:
    """The lines of a file; a last one that was cut off in the middle is left out. Raises ``ValueError`` for any other that is none."""
    lines = []
    texts = path.read_text().splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            if number == len(texts):
                break
            raise ValueError(f"{path}:{number}: not a JSON object: {error}") from None
        if not isinstance(line, dict) or line.get("kind") not in KINDS:
            raise ValueError(f"{path}:{number}: not a line of a GPU benchmark")
        lines.append(line)
    return lines


def render(lines: Sequence[Line]) -> str:
    """Fewer than sixty lines, the most wanted last: what was measured, against cuBLAS, against the bounds, against the prediction."""
    # a race that a resumed run did again counts once, as it was last
    measured = list({line["id"] + line["beside"]: line for line in lines if line["kind"] == "linear"}.values())
    own = [line for line in measured if not line["peer"] and line["chosen"]]
    parts = [_head(lines)]
    first = own[0]["format"] if own else None
    mine = [line for line in own if line["format"] == first]
    if mine:
        parts.append(_grid(mine, f"{first}: times as fast as cuBLAS", lambda line: _number(line["dense_ratio"])))
        parts.append(
            _grid(
                mine,
                f"{first}: % of the bound (bytes over measured bandwidth, operations over measured rate)",
                lambda line: f"{100 * line['bound_share']:.0f}",
            )
        )
    parts += [_formats(own), _peers(measured, own), _crossovers(measured), _model(measured), _problems(lines), _goals(own)]
    return "\n".join(part for part in parts if part)


def _head(lines: Sequence[Line]) -> str:
    run = next((line for line in reversed(lines) if line["kind"] == "run"), None)
    if run is None:
        return "nothing was measured"
    ceilings: dict[str, float] = {}
    for line in lines:
        if line["kind"] == "ceiling":
            ceilings[line["id"]] = max(line["value"], ceilings.get(line["id"], 0.0))
    words = ", ".join(f"{words} {ceilings[name]:.0f} {unit}" for name, words, unit in _CEILINGS if name in ceilings)
    return f"{run['device']}, torch {run['torch']}, taut {run['commit']}, {run['id']}. Measured ceilings: {words or 'none'}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _grid(lines: Sequence[Line], title: str, cell: Callable[[Line], str]) -> str:
    rows = sorted({line["m"] for line in lines})
    layers = list(dict.fromkeys((line["n"], line["k"]) for line in lines))
    cells = {(line["n"], line["k"], line["m"]): cell(line) for line in lines}
    table = [f"-- {title}", f"{'N x K':>13} M=" + "".join(f"{m:>6}" for m in rows)]
    for n, k in layers:
        table.append(f"{f'{n} x {k}':>13}   " + "".join(f"{cells.get((n, k, m), ''):>6}" for m in rows))
    return "\n".join(table)


def _formats(own: Sequence[Line]) -> str:
    names = list(dict.fromkeys(line["format"] for line in own))[1:]
    if not names:
        return ""
    rows = sorted({line["m"] for line in own})
    table = ["-- other formats: times as fast as cuBLAS, geometric mean over the layers", f"{'':>15} M=" + "".join(f"{m:>6}" for m in rows)]
    for name in names:
        means = [
            _mean([line["dense_ratio"] for line in own if (line["format"], line["m"]) == (name, m) and line["dense_ratio"]]) for m in rows
        ]
        table.append(f"{name:>15}   " + "".join(f"{_number(mean):>6}" for mean in means))
    return "\n".join(table)


def _mean(values: Sequence[float]) -> float | None:
    return math.exp(statistics.fmean(math.log(value) for value in values)) if values else None


def _peers(measured: Sequence[Line], own: Sequence[Line]) -> str:
    ours = {(line["beside"], line["case"]): line["median_us"] for line in own}
    names = list(dict.fromkeys(line["impl"] for line in measured if line["peer"]))
    rows = sorted({line["m"] for line in measured})
    table = []
    for name in names:
        if name == "cublas":
            continue
        by_m = []
        for m in rows:
            found = [
                line
                for line in measured
                if line["peer"] and (line["impl"], line["m"]) == (name, m) and (line["beside"], line["case"]) in ours
            ]
            by_m.append(_mean([line["median_us"] / ours[line["beside"], line["case"]] for line in found]))
        table.append(f"{name:>16}  " + "".join(f"{_number(mean):>6}" for mean in by_m))
    if not table:
        return ""
    return "\n".join(
        ["-- a peer's time over taut's of as many bits, geometric mean", f"{'':>15} M=" + "".join(f"{m:>6}" for m in rows), *table]
    )


def _crossovers(measured: Sequence[Line]) -> str:
    """Cases in which another impl beat the one that the table picks, the worst first."""
    races: dict[tuple[str, str], list[Line]] = {}
    for line in measured:
        if not line["peer"]:
            races.setdefault((line["format"], line["case"]), []).append(line)
    lost = []
    for race in races.values():
        chosen = next((line for line in race if line["chosen"]), None)
        best = min(race, key=lambda line: line["median_us"])
        if chosen and best["median_us"] < 0.97 * chosen["median_us"]:
            lost.append((chosen["median_us"] / best["median_us"], chosen, best))
    if not lost:
        return ""
    lost.sort(key=lambda each: -each[0])
    words = [
        f"{line['case']} {line['format']}: {best['impl']} {gain:.2f}x faster than {line['impl']}" for gain, line, best in lost[:_SHOWN]
    ]
    return "\n".join([f"-- the table picks a slower impl in {len(lost)} of {len(races)} cases", *words])


def _model(measured: Sequence[Line]) -> str:
    by_impl: dict[str, list[tuple[float, Line]]] = {}
    for line in measured:
        if line["predicted_us"]:
            by_impl.setdefault(line["impl"], []).append((line["median_us"] / line["predicted_us"], line))
    if not by_impl:
        return ""
    rows = []
    for impl, found in by_impl.items():
        ratios = sorted(ratio for ratio, _ in found)
        worst, line = max(found, key=lambda each: abs(math.log(each[0])))
        spread = f"{statistics.median(ratios):>7.2f} {ratios[0]:>6.2f} to {ratios[-1]:.2f}"
        rows.append(f"{impl:>18} {spread}   {worst:.2f} at {line['case']} {line['format']}")
    return "\n".join(["-- measured time over predicted time: median, range, farthest", *rows])


def _problems(lines: Sequence[Line]) -> str:
    found = [line for line in lines if line["kind"] in ("wrong", "failed")]
    words = [f"{line['kind'].upper()} {line['id']}: {line['reason']}"[:WIDTH] for line in found]
    skipped = [line for line in lines if line["kind"] == "skipped"]
    out = [f"-- wrong or failed: {len(found)}", *words[:_SHOWN]] if found else []
    if skipped:
        reasons = list(dict.fromkeys(f"{line['id']}: {line['reason']}" for line in skipped))
        out.append(f"-- not measured: {'; '.join(reasons[:4])}"[:WIDTH] + (f" ... {len(reasons)} in all" if len(reasons) > 4 else ""))
    return "\n".join(out)


def _goals(own: Sequence[Line]) -> str:
    """What the project asks of these kernels, and the case that is farthest from it."""
    few = [line for line in own if line["m"] <= _FEW_ROWS]
    many = [line for line in own if line["m"] >= _MANY_ROWS and line["dense_ratio"]]
    compared = [line for line in own if line["dense_ratio"]]
    rows = []

    def goal(words: str, lines: Sequence[Line], key: str, least: float) -> None:
        if lines:
            worst = min(lines, key=lambda line: line[key])
            met = sum(line[key] >= least for line in lines)
            rows.append(f"{words}: {met} of {len(lines)}; worst {worst[key]:.2f} at {worst['case']} {worst['format']} ({worst['impl']})")

    goal(f"85% of the measured bandwidth at M up to {_FEW_ROWS}", few, "hbm_share", 0.85)
    goal("1.0x cuBLAS at any M", compared, "dense_ratio", 1.0)
    goal(f"0.9x cuBLAS from M={_MANY_ROWS}", many, "dense_ratio", 0.9)
    goal(f"0.95x cuBLAS from M={_MANY_ROWS}", many, "dense_ratio", 0.95)
    return "\n".join(["-- goals", *rows]) if rows else ""
