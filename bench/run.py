"""Times taut's ops, beside peers if asked, on this machine: ``python bench/run.py [--filter REGEX] [--peers] [--json PATH]``.

How it measures. Every result is checked against float64 before anything is timed. All contenders of a case take turns in one
process, with the same threads and inputs; before each turn the threads of the one before must have stopped spinning. Samples
during which the hypervisor took time away are dropped. Cold: each computation reads other copies of the weights, together more
than three times the last cache, or 1.25 times in sweeps and where memory is short. Warm: the same copy. The share of the roofline
is the least time the machine could take, by the bytes and the operations counted and the ceilings measured in the same run, over
the median; bytes that a warm run finds in the cache set no bound. A long run measures the ceilings again as it goes and holds each
result against the best so far: a host that shares its memory with others has slow minutes. Operations in bf16 are held against the
fp32 ceiling: a processor with bf16 instructions can pass it.

``--sweep`` times the headline layer at M = 1, 2, 4 .. 2048 with every impl, for the plot; ``--never-slower`` every format with the impl
the table picks, beside torch's float layers, and says where one is slower. Their lines have the op ``sweep``.
``--attention`` times attention beside torch's SDPA (bench/attention.py), with ``--never-slower`` on a grid of sixty cases, which says where
SDPA is faster. ``--model NAME`` times whole models instead, through ``model.generate``; bench/generation.py says how.

JSON lines: op, case, format, impl (bench/cases.py says how they are named), peer, threads, median_us, p10_us, p90_us, gb_s,
gflop_s, roofline_share, cold, max_error (of the largest result, against float64 with unrounded x), commit, machine, torch, and
run, the time the run began. Exit code: 0, 1 if a result was wrong, 2 for bad input.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from bench import attention, generation, language_models, plot
from bench import table as readme_table
from bench.attention import AttentionCase, AttentionProblem
from bench.cases import DEFAULT_FORMATS, HEADLINE, SWEEP_M, WARM_ONLY_M, Case, all_cases, default_formats, parse_format
from bench.contenders import Entry, Prepared, Skip, default_impl, impls, own_entry
from bench.peers import all_peers, bits_of
from bench.peers import entry as peer_entry
from bench.problem import Problem
from bench.timing import Runner, Spread, interleave, spread, wait_until_idle
from taut.report.machine import processor_name, usable_cores
from taut.roofline import Roofline, last_cache_bytes, roofline

ROOT = Path(__file__).resolve().parents[1]
FIELDS = (
    "op", "case", "format", "impl", "peer", "threads", "median_us", "p10_us", "p90_us", "gb_s", "gflop_s", "roofline_share",
    "cold", "max_error", "commit", "machine", "torch", "run",
)  # fmt: skip
_SECONDS_EACH = 6.0  # that a contender may take in a race; with three samples it stops there
_BUSY_LOAD = 0.5
_SWEEP_ROUNDS, _SWEEP_SECONDS_EACH = 4, 1.5
_TOO_SLOW = {"torch_int4pack_f32"}  # to take part in a sweep: it takes minutes at many rows
_CEILINGS_SECONDS = 20.0  # how old the ceilings may be when a race begins


@dataclass(frozen=True)
class Context:
    """What is the same for every line of a run."""

    ceilings: Roofline
    threads: int
    commit: str
    machine: str
    run: str


@dataclass(frozen=True)
class Row:
    """One finished measurement."""

    entry: Entry
    prepared: Prepared
    timing: Spread
    cold: bool
    roofline_share: float

    @property
    def gb_s(self) -> float:
        return self.prepared.nbytes / self.timing.median_us / 1e3

    @property
    def gflop_s(self) -> float:
        return (self.prepared.flops + self.prepared.int8_ops + self.prepared.bf16_flops) / self.timing.median_us / 1e3

    def to_dict(self, context: Context) -> dict[str, object]:
        entry, timing = self.entry, self.timing
        values = (
            entry.case.op, entry.case.name, entry.format, entry.impl, entry.peer, context.threads, timing.median_us, timing.p10_us,
            timing.p90_us, self.gb_s, self.gflop_s, self.roofline_share, self.cold, self.prepared.max_error, context.commit,
            context.machine, torch.__version__, context.run,
        )  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    args = _parser().parse_args(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=180)
    try:
        return _run(args, console)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print what can be measured here, one op/case/format/impl a line, and stop")
    parser.add_argument(
        "--filter", metavar="REGEX",
        help="measure what this matches in op/case/format/impl. Of taut's impls the one the table picks runs; another one where "
        "the expression names it, so that it does not match without the impl; the slow scalar ones where it says scalar",
    )  # fmt: skip
    parser.add_argument(
        "--peers", action="store_true", help="also time the peers of the chosen cases: float ones, and those of the same bits"
    )
    parser.add_argument("--threads", type=int, help="threads to compute with [default: torch's own choice]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="append one JSON object a line")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each contender [default: 12]")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--cold", action="store_true", help=f"only cold weights [default: both; only warm where M is above {WARM_ONLY_M}]")
    weights.add_argument("--warm", action="store_true", help="only warm weights")
    parser.add_argument(
        "--model", action="append", metavar="NAME",
        help=f"how fast a model reads and writes: {', '.join(language_models.NAMES)}, or a directory; may be given several times",
    )  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="time the headline layer over M with every impl; --peers: and every peer")
    parser.add_argument("--never-slower", action="store_true", help="time every format over M beside torch's float layers")
    parser.add_argument("--attention", action="store_true", help="time attention; --never-slower: on sixty cases")
    parser.add_argument("--plot", action="store_true", help="draw bench/results/*.png from the newest sweep and stop")
    parser.add_argument("--quick", action="store_true", help="with --model: fewer tokens and turns")
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", default=ROOT / ".cache" / "bench",
        help="with --model: where its files are kept between runs [default: .cache/bench]",
    )  # fmt: skip
    parser.add_argument("--table", action="store_true", help="write the README's tables from bench/results/*.jsonl and stop")
    return parser


def _run(args: argparse.Namespace, console: Console) -> int:
    if args.table:
        readme_table.update_readme(ROOT / "README.md", sorted((ROOT / "bench" / "results").glob("*.jsonl")))
        return 0
    if args.plot:
        for path in plot.draw_all(ROOT / "bench" / "results"):
            print(path)
        return 0
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {args.rounds}")
    pattern = _compile(args.filter)
    if args.list:
        for entry in _listed(pattern):
            print(entry)
        return 0
    sweep = (args.sweep or args.never_slower) and not args.attention
    if args.attention:
        matching = ([entry for entry in race if pattern is None or pattern.search(entry.id)] for race in attention.races(args.never_slower))
        races = [race for race in matching if race]
    elif sweep:
        races = list(select_sweep(args.never_slower, args.peers, pattern))
    else:
        races = list(select(pattern, args.peers)) if args.model is None else []
    if not races and args.model is None:
        raise ValueError(f"--filter {args.filter!r} matches nothing that can run here; see --list")
    if args.json is not None:
        with args.json.open("a"):  # so that a path that cannot be written is known before, not after
            pass
    load = _load()
    ceilings, measured = roofline(), time.monotonic()
    machine = f"{processor_name()}, {usable_cores()} cores"
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    context = Context(ceilings, torch.get_num_threads(), commit(), machine, now)
    console.print(_words(context), highlight=False)
    _warn_if_busy(load, console)  # now, for who would rather stop, and at the end, for who reads only that
    if args.model is not None:
        wrong = _run_models(args, context, console)
        _warn_if_busy(load, console)
        return 1 if wrong else 0
    wrong: list[str] = []
    slower: list[str] = []
    skipped = {f"{peer.name}: {reason}" for peer in all_peers() if args.peers and (reason := peer.available())}
    kinds = 1 if sweep or args.attention else 2  # there is no time for both
    jobs = [(entries, cold) for entries in races for cold in _temperatures(entries[0].case, args.cold, args.warm)[:kinds]]
    shared = Problem(races[0][0].case) if sweep else None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for entries, cold in jobs:
            progress.update(task, description=entries[0].case.name)
            if time.monotonic() - measured > _CEILINGS_SECONDS:
                wait_until_idle()
                ceilings, measured = ceilings.best_of(roofline(refresh=True)), time.monotonic()
                context = replace(context, ceilings=ceilings)
            rows = race(entries, cold, args.rounds, context, wrong, skipped, shared)
            progress.advance(task)
            if rows:
                console.print(_show(rows))
                grid = f"{entries[0].case.op}_grid" if args.attention and args.never_slower else None
                _append(args.json, rows, context, "sweep" if sweep else grid)
                slower += attention.where_slower(rows) if args.attention else where_slower(rows)
    console.print(_ceilings_in_words(ceilings), highlight=False)
    for line in sorted(skipped):
        console.print(f"not measured: {line}", highlight=False, markup=False)
    for line in wrong:
        console.print(f"WRONG, not timed: {line}", style="bold red", highlight=False, markup=False)
    if args.never_slower:
        never = "No case is slower than torch's SDPA." if args.attention else "No format is slower than torch's float layers at any M."
        verdict = "\n".join(slower) or never
        console.print(verdict, highlight=False, markup=False)
    _warn_if_busy(load, console)
    if (after := _load()) > context.threads + 1:
        console.print(f"The load average is {after:.2f} with {context.threads} threads: something else runs.", style="bold yellow")
    return 1 if wrong else 0


def _run_models(args: argparse.Namespace, context: Context, console: Console) -> list[str]:
    """Times the models that ``--model`` names; gives what was wrong."""
    all_wrong: list[str] = []
    work = generation.QUICK if args.quick else generation.Work()
    for name in args.model:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("", total=None)
            results, skipped, wrong = generation.race(
                name, generation.chosen(args.peers), work, context.threads, args.cache, context.ceilings,
                lambda what, task=task, progress=progress: progress.update(task, description=what),
            )  # fmt: skip
        for case in dict.fromkeys(result.case for result in results):
            console.print(_show_model([result for result in results if result.case == case]))
        for line in dict.fromkeys(f"{each.contender.name} {each.contender.format}: {each.note}" for each in results if each.note):
            console.print(line, highlight=False, markup=False)
        if args.json is not None:
            about = {"threads": context.threads, "commit": context.commit, "machine": context.machine, "torch": torch.__version__}
            with args.json.open("a") as file:
                file.writelines(json.dumps({**result.to_dict(), **about, "run": context.run}) + "\n" for result in results)
        for line in skipped:
            console.print(f"not measured: {line}", highlight=False, markup=False)
        for line in wrong:
            console.print(f"WRONG, not timed: {line}", style="bold red", highlight=False, markup=False)
        all_wrong += wrong
    console.print(_ceilings_in_words(context.ceilings), highlight=False)
    return all_wrong


def _show_model(results: Sequence[generation.Result]) -> Table:
    table = Table(title=results[0].case, title_justify="left", header_style="bold")
    for name in ("format", "impl"):
        table.add_column(name)
    for name in ("tokens/s", "p10 - p90", "GB/s", "GFLOP/s", "of roofline", "cosine", "KL", "same top"):
        table.add_column(name, justify="right")
    for result in results:
        timing, found, line = result.timing, result.fidelity, result.to_dict()
        spread_of_rates = f"{1e6 / timing.p90_us:.1f} - {1e6 / timing.p10_us:.1f}"
        table.add_row(
            result.contender.format, result.contender.name, f"{result.tokens_s:.1f}", spread_of_rates,
            f"{line['gb_s']:.1f}", f"{line['gflop_s']:.0f}", f"{result.share:.0%}", f"{found.cosine:.4f}", f"{found.kl:.4f}",
            f"{found.top1:.0%}", style=None if result.contender.peer else "bold",
        )  # fmt: skip
    return table


def _warn_if_busy(load: float, console: Console) -> None:
    if load > _BUSY_LOAD:
        console.print(
            f"The load average was {load:.2f} when this began: something else ran. Do not trust these times.", style="bold yellow"
        )


def _load() -> float:
    """The load average of the last minute; 0 where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _compile(expression: str | None) -> re.Pattern[str] | None:
    try:
        return None if expression is None else re.compile(expression)
    except re.error as error:
        raise ValueError(f"--filter {expression!r} is not a regular expression: {error}") from None


def select(pattern: re.Pattern[str] | None, peers: bool) -> Iterator[list[Entry]]:
    """The races to run: for each case, the entries that compete."""
    ready = [peer for peer in all_peers() if peers and peer.available() is None]
    for case in all_cases():
        own = list(_own(case, pattern))
        rivals = ready if case.op == "quant_linear" else []
        if own:
            bits = {parse_format(entry.format)[0].bits for entry in own}
            chosen = [peer for peer in rivals if bits_of(peer.format) is None or bits_of(peer.format) in bits]
        else:
            chosen = [peer for peer in rivals if pattern is not None and pattern.search(peer_entry(peer, case).id)]
        entries = [*own, *(peer_entry(peer, case) for peer in chosen)]
        if entries:
            yield entries


def select_sweep(never_slower: bool, peers: bool, pattern: re.Pattern[str] | None) -> Iterator[list[Entry]]:
    """The races of a sweep: at each M every format's own impl beside torch's float layers, or the headline's formats in every impl."""
    ready = [peer for peer in all_peers() if peer.available() is None and peer.name not in _TOO_SLOW]
    if never_slower or not peers:
        ready = [peer for peer in ready if bits_of(peer.format) is None and never_slower]
    formats = default_formats() if never_slower else DEFAULT_FORMATS
    for m in SWEEP_M:
        case = Case("quant_linear", *HEADLINE, m)
        own = [
            own_entry(case, format, impl)
            for format in formats
            for impl in (impls(case, format)[: 1 if never_slower else None])
            if never_slower or "scalar" not in impl
        ]
        entries = [entry for entry in (*own, *(peer_entry(peer, case) for peer in ready)) if pattern is None or pattern.search(entry.id)]
        if entries:
            yield entries


def where_slower(rows: Sequence[Row]) -> list[str]:
    """Which of taut's rows a float layer of torch beat in the same race, and by how much: in int8 both, in fp32 or bf16 the one alike."""
    floats = [row for row in rows if row.entry.peer and bits_of(row.entry.format) is None]
    alike = {"a8": ("fp32", "bf16"), "oa8": ("fp32", "bf16"), "f32": ("fp32",), "bf16": ("bf16",)}
    return [
        f"slower: {own.entry.id} {_time(own.timing.median_us)}, {rival.entry.impl} {_time(rival.timing.median_us)}"
        for own in rows
        for rival in floats
        if not own.entry.peer and own.timing.median_us > rival.timing.median_us
        if rival.entry.format in alike[parse_format(own.entry.format)[1]]
    ]


def _own(case: Case, pattern: re.Pattern[str] | None) -> Iterator[Entry]:
    if pattern is None:
        if case.op == "quant_linear" and (case.n, case.k) == HEADLINE:
            for format in DEFAULT_FORMATS:
                yield own_entry(case, format, default_impl(case, format))
        return
    for format in case.formats:
        stem = f"{case.op}/{case.name}/{format}/"
        for index, impl in enumerate(impls(case, format)):
            named = not pattern.search(stem) and ("scalar" in pattern.pattern or "scalar" not in impl)
            if (index == 0 or named) and pattern.search(stem + impl):
                yield own_entry(case, format, impl)


def _listed(pattern: re.Pattern[str] | None) -> Iterator[str]:
    for case in all_cases():
        names = [own_entry(case, format, impl).id for format in case.formats for impl in impls(case, format)]
        if case.op == "quant_linear":
            names += [peer_entry(peer, case).id for peer in all_peers()]
        yield from (name for name in names if pattern is None or pattern.search(name))


def _temperatures(case: Case | AttentionCase, cold: bool, warm: bool) -> list[bool]:
    """True for cold weights, False for warm ones, in the order in which they are measured."""
    if cold or warm:
        return [cold]
    return [False] if case.bound_by_arithmetic else [True, False]


def cold_bytes(entries: int, few: bool) -> int:
    """How much memory the copies of cold weights of a contender must exceed, where ``entries`` of them are held at once."""
    most, least = 3 * last_cache_bytes(), last_cache_bytes() * 5 // 4
    return least if few else max(least, min(most, psutil.virtual_memory().available // (2 * entries)))


def race(
    entries: Sequence[Entry], cold: bool, rounds: int, context: Context, wrong: list[str], skipped: set[str], sweep: Problem | None = None,
) -> list[Row]:  # fmt: skip
    """Checks and times the entries of one case; what is wrong or cannot take part is added to the lists, with the reason.

    ``sweep``: in a sweep, which has many races, the problem whose weights they share; each is then a short one.
    """
    case = entries[0].case
    fresh = AttentionProblem if isinstance(case, AttentionCase) else Problem
    problem = fresh(case) if sweep is None else sweep.with_rows(case)
    copies = cold_bytes(len(entries), sweep is not None) if cold else 0
    if sweep is not None:
        rounds = min(rounds, _SWEEP_ROUNDS)
    ready: list[tuple[Entry, Prepared, Runner]] = []
    for entry in entries:
        try:
            _check_memory(entry, copies)
            prepared = entry.prepare(problem, copies)
        except Skip as reason:
            skipped.add(f"{entry.id}: {reason}")
            continue
        if prepared.wrong:
            line = f"{entry.id}: {prepared.wrong}"
            if line not in wrong:
                wrong.append(line)
            continue
        ready.append((entry, prepared, Runner(prepared.call, prepared.layers)))
    gc.collect()
    interleave([runner for _, _, runner in ready], rounds, _SECONDS_EACH if sweep is None else _SWEEP_SECONDS_EACH)
    rows = []
    for entry, prepared, runner in ready:
        timing = spread(runner.samples)
        rows.append(Row(entry, prepared, timing, cold, _share(prepared, timing, cold, context.ceilings)))
    return rows


def _check_memory(entry: Entry, cold_bytes: int) -> None:
    """Raises ``Skip`` where a contender would fill what memory is left: fp32 weights twice, the copies, and the float64 check."""
    case = entry.case
    need = case.float_bytes + cold_bytes * 2
    available = psutil.virtual_memory().available
    if need > 0.8 * available:
        raise Skip(f"it needs about {need / 1e9:.1f} GB of memory, and {available / 1e9:.1f} are free")


def _share(prepared: Prepared, timing: Spread, cold: bool, ceilings: Roofline) -> float:
    cached = not cold and prepared.nbytes <= ceilings.last_cache_bytes
    nbytes = 0 if cached else prepared.nbytes
    return ceilings.least_seconds(nbytes, prepared.flops, prepared.int8_ops, prepared.bf16_flops) / (timing.median_us * 1e-6)


def _append(path: Path | None, rows: Sequence[Row], context: Context, op: str | None) -> None:
    """Adds a line for each row; ``op`` stands in the place of its own."""
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps({**row.to_dict(context), **({"op": op} if op else {})}) + "\n" for row in rows)


def _show(rows: Sequence[Row]) -> Table:
    case, cold = rows[0].entry.case, rows[0].cold
    title = f"{case.op} {case.name}" + (f" ({case.note})" if case.note else "") + f", {'cold' if cold else 'warm'} weights"
    table = Table(title=title, title_justify="left", header_style="bold")
    for name in ("format", "impl"):
        table.add_column(name)
    for name in ("median", "p10 - p90", "GB/s", "GFLOP/s", "of roofline", "max error"):
        table.add_column(name, justify="right")
    table.add_column("times as fast as")
    peers = [row for row in rows if row.entry.peer]
    for row in rows:
        timing = row.timing
        ratios = [] if row.entry.peer else [f"{peer.entry.impl} {peer.timing.median_us / timing.median_us:.2f}" for peer in peers]
        table.add_row(
            row.entry.format, row.entry.impl, _time(timing.median_us), f"{_time(timing.p10_us)} - {_time(timing.p90_us)}",
            f"{row.gb_s:.1f}",
            f"{row.gflop_s:.0f}" if row.gflop_s else "", f"{row.roofline_share:.0%}" if row.roofline_share else "",
            f"{row.prepared.max_error:.1e}", ", ".join(ratios), style=None if row.entry.peer else "bold",
        )  # fmt: skip
    return table


def _time(micros: float) -> str:
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if micros >= size:
            return f"{micros / size:.3g} {unit}"
    return f"{micros:.3g} us"


def _words(context: Context) -> str:
    return f"{context.machine}; {context.threads} threads; torch {torch.__version__}; commit {context.commit}"


def _ceilings_in_words(ceilings: Roofline) -> str:
    huge = "" if ceilings.read_huge_pages_gb_s is None else f" ({ceilings.read_huge_pages_gb_s:.1f} with 2 MB pages)"
    return (
        f"ceilings: read {ceilings.read_gb_s:.1f} GB/s{huge}, fp32 {ceilings.fma_gflop_s:.0f} GFLOP/s, "
        f"bf16 {ceilings.bf16_gflop_s:.0f} GFLOP/s, "
        f"int8 {ceilings.dot_gop_s:.0f} GOP/s; last cache {ceilings.last_cache_bytes / 2**20:.0f} MiB"
    )


def commit() -> str:
    """The commit of the tree, with ``-dirty`` where its code differs from it; ``unknown`` outside a git checkout."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "csrc", "python", "bench", "CMakeLists.txt", ":!bench/results"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("-dirty" if changed else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
