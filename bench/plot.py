"""What ``python bench/run.py --plot`` draws of the results: one layer against the rows of x, and attention against its length.

From a sweep one picture for 4 and one for 8 bits: every impl of taut, every peer of as many bits, and torch's float layers, both axes
logarithmic; and the roofline: the operations a second that the bytes of taut's weights allow at a row count, and those of the int8
ceiling. From ``--attention`` one picture: the rate of prompts by their length, and the time of one token by the keys it sees.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .table import ATTENTION_PEERS, NAMES, is_older, read_lines

_PICTURES = {"int4": "int4, groups of 32, int8 activations", "int8": "int8, int8 activations"}
_COLOURS = ("#0b5fa5", "#1b9e77", "#7b3fa0", "#c2570c", "#d4a017", "#444444", "#17a2b8", "#a31545", "#6c8f00", "#000080", "#5f4b32")

Line = dict[str, Any]


def draw_all(results: Path) -> list[Path]:
    """Draws the newest sweep of ``results/*.jsonl`` that timed taut's impls and the newest attention; gives the pictures' paths, each
    beside its file.

    Raises ``ValueError`` where there is no sweep, or no matplotlib.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    newer = [path for path in sorted(results.glob("*.jsonl")) if not is_older(path)]
    found = [(line["run"], path) for path in newer for line in read_lines([path]) if line["op"] == "sweep"]
    if not found:
        raise ValueError(f"no sweep in {results}; run: python bench/run.py --sweep --peers --json bench/results/sweep-<machine>.jsonl")
    run, path = max(found)
    lines = [line for line in read_lines([path]) if line["run"] == run]
    pictures = []
    for weights, words in _PICTURES.items():
        chosen = [line for line in lines if line["format"].startswith(weights) or line["format"] in ("fp32", "bf16")]
        if any(not line["peer"] for line in chosen):
            target = path.with_name(f"{path.stem}-{weights}.png")
            draw(chosen, words, target)
            pictures.append(target)
    measured = [(line["run"], path) for path in newer for line in read_lines([path]) if _is_drawn(line)]
    if measured:
        run, path = max(measured)
        pictures.append(path.with_suffix(".png"))
        draw_attention([line for line in read_lines([path]) if line["run"] == run and _is_drawn(line)], pictures[-1])
    return pictures


# Of attention: causal prompts of one sequence, and one token of one sequence.
_PROMPT, _TOKEN = re.compile(r"B1_H32\.8_L(\d+)\.\1_D128"), re.compile(r"B1_H32\.8_L1\.(\d+)_D128")
_FORMATS = {"kv_float32": "fp32", "kv_bf16": "bf16", "kv_fp8": "fp8 cache", "kv_int8": "int8 cache", "kv_int4": "int4 cache"}


def _is_drawn(line: Line) -> bool:
    pattern = {"attention_prefill": _PROMPT, "attention_decode": _TOKEN}.get(line["op"])
    return pattern is not None and pattern.fullmatch(line["case"]) is not None


def draw_attention(lines: Sequence[Line], target: Path) -> None:
    """Draws prompts and single tokens of one run side by side to ``target``, a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    names: dict[str, str] = {}
    for axes, op, pattern, key, scale in zip(
        figure.subplots(1, 2),
        ("attention_prefill", "attention_decode"),
        (_PROMPT, _TOKEN),
        ("gflop_s", "median_us"),
        (1, 1e-3),
        strict=True,
    ):
        found: dict[str, dict[int, float]] = {}
        for line in (line for line in lines if line["op"] == op):
            name = ATTENTION_PEERS[line["impl"]] if line["peer"] else f"taut {_FORMATS.get(line['format'], line['format'])}"
            found.setdefault(name, {})[int(pattern.fullmatch(line["case"])[1])] = line[key] * scale
        for name, points in found.items():
            colour = names.setdefault(name, _COLOURS[len(names) % len(_COLOURS)])
            ours = name.startswith("taut ")
            axes.plot(
                *zip(*sorted(points.items()), strict=True), label=name, color=colour, linewidth=2.0 if ours else 1.2,
                linestyle="-" if ours else "--", marker="o", markersize=4,
            )  # fmt: skip
        lengths = sorted({length for points in found.values() for length in points})
        axes.set(
            xscale="log",
            yscale="linear" if op == "attention_prefill" else "log",
            xlabel="tokens of the prompt" if op == "attention_prefill" else "keys in the cache",
        )
        axes.set_ylabel("GFLOP/s" if op == "attention_prefill" else "ms a token")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(True, alpha=0.3)
        axes.legend(fontsize=8)
    first = lines[0]
    figure.suptitle(
        f"Attention, causal, 32 query and 8 key heads of 128\n{first['machine']}, {first['threads']} threads, commit {first['commit']}, "
        f"{first['run'][:10]}",
        fontsize=11,
    )
    figure.savefig(target, metadata={"Description": json.dumps({"run": first["run"], "commit": first["commit"]})})


def curves(lines: Sequence[Line]) -> dict[str, list[tuple[int, float]]]:
    """For each contender, taut's first: (M, GFLOP/s) in the order of M."""
    found: dict[str, dict[int, float]] = {}
    for line in sorted(lines, key=lambda line: (line["peer"], line["impl"])):
        name = NAMES.get(line["impl"], line["impl"]) if line["peer"] else f"taut {line['impl']}"
        found.setdefault(name, {})[rows_of(line)] = line["gflop_s"]
    return {name: sorted(points.items()) for name, points in found.items()}


def rows_of(line: Line) -> int:
    return int(line["case"].rpartition("_M")[2])


def ceiling(lines: Sequence[Line]) -> list[tuple[int, float]]:
    """The roofline, (M, GFLOP/s): the most that any of taut's lines, by its share of the ceiling of its time, could have reached.

    Each line holds its rate and the share of the least time that is; rate over share is the rate at the ceiling.
    """
    best: dict[int, float] = {}
    for line in lines:
        if not line["peer"] and line["roofline_share"]:
            best[rows_of(line)] = max(best.get(rows_of(line), 0.0), line["gflop_s"] / line["roofline_share"])
    return sorted(best.items())


def draw(lines: Sequence[Line], words: str, target: Path) -> None:
    """Draws one picture to ``target``, a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(curves(lines).items()):
        ours = name.startswith("taut ")
        axes.plot(
            *zip(*points, strict=True), label=name, color=_COLOURS[index % len(_COLOURS)], linewidth=2.0 if ours else 1.2,
            linestyle="-" if ours else "--", marker="osD^vP*X"[index % 8], markersize=4,
        )  # fmt: skip
    axes.plot(*zip(*ceiling(lines), strict=True), label="roofline", color="#999999", linewidth=6, alpha=0.4, zorder=0)
    first = lines[0]
    rows = sorted({rows_of(line) for line in lines})
    axes.set(xscale="log", yscale="log", xlabel="M, rows of x", ylabel="GFLOP/s (2 M N K over the median time)")
    axes.set_xticks(rows, [str(m) for m in rows])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ticks = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000]
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    axes.grid(True, alpha=0.3)
    axes.set_title(
        f"Linear layer {first['case'].rpartition('_M')[0].replace('_', ', ').replace('N', 'N=').replace('K', 'K=')}: {words}\n"
        f"{first['machine']}, {first['threads']} threads, commit {first['commit']}, {first['run'][:10]}",
        fontsize=11,
    )
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(target, metadata={"Description": json.dumps({"run": first["run"], "commit": first["commit"]})})
