"""A report as a table in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .figures import Figure
from .survey import RESOURCES, Report

_COLORS = {"measured": "green", "counted": "cyan", "modelled": "yellow", "unavailable": "dim"}


def print_report(report: Report, console: Console) -> None:
    """Prints the report: one column a variant, one row a figure with its source; then the notes."""
    machine = report.machine
    console.print(Text(f"{report.model} on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}", style="bold"))
    for variant in report.variants:
        console.print(f"  {variant.name}: {variant.description}", highlight=False)
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("", min_width=24)
    for variant in report.variants:
        table.add_column(variant.name, justify="right")
    table.add_column("source")
    notes: dict[str, list[str]] = {}
    for resource in RESOURCES:
        table.add_section()
        table.add_row(Text(resource, style="bold"))
        for name in dict.fromkeys(name for variant in report.variants for name in variant.figures[resource]):
            figures = [variant.figures[resource].get(name) for variant in report.variants]
            sources = list(dict.fromkeys(figure.source for figure in figures if figure))
            for figure in figures:
                if figure and figure.note and name not in notes.setdefault(figure.note, []):
                    notes[figure.note].append(name)
            # the unit once, on the left, where all columns agree on its prefix
            units = {figure.parts()[1] for figure in figures if figure}
            unit = units.pop() if len(units) == 1 else ""
            cells = [_cell(figure, not unit) for figure in figures]
            table.add_row(f"{name}{f', {unit}' if unit else ''}", *cells, ", ".join(sources))
    console.print(table)
    for note, names in notes.items():
        console.print(Text(f"{', '.join(names)}: {note}", style="dim"))


def _cell(figure: Figure | None, with_unit: bool) -> Text:
    if figure is None:
        return Text("")
    if figure.value is None:
        return Text("-", style=_COLORS[figure.source])
    return Text(str(figure) if with_unit else figure.parts()[0], style=_COLORS[figure.source])


def print_microbench(rows: list[dict], console: Console) -> None:
    """Prints the rows of ``microbench.run_shape``."""
    table = Table(
        "shape", "linear layer", "median", "10% - 90%", "GB/s", "GFLOP/s", "against torch fp32",
        header_style="bold", pad_edge=False, title="cold weights, int8 activations inside taut's times",
    )  # fmt: skip
    shape = None
    for row in rows:
        here = f"N={row['n']} K={row['k']} M={row['m']}"
        if here != shape:
            table.add_section()
        table.add_row(
            here if here != shape else "", row["name"], f"{row['median_us']:.0f} us", f"{row['p10_us']:.0f} - {row['p90_us']:.0f}",
            f"{row['gb_s']:.1f}", f"{row['gflop_s']:.1f}", f"{row['speed_up']:.2f}x",
        )  # fmt: skip
        shape = here
    console.print(table)
