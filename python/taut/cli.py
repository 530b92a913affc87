"""The ``taut`` command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="Low-bit kernels for language models on hardware people have.",
)  # fmt: skip

_FORMATS = "ternary, int2, int3, int4, nf4, mxfp4, nvfp4, int8, fp8_e4m3 or fp8_block"

Weights = Annotated[str, typer.Option(help=_FORMATS)]
GroupSize = Annotated[int | None, typer.Option(help="32, 64, 128, or 0 for one scale a row [default: the format's own]")]
Zeros = Annotated[bool, typer.Option("--zeros", help="a zero point a group, for int2, int3 and int4")]
Activations = Annotated[str, typer.Option(help="float, int8, int8_outliers, int8_row, fp8_row, or auto: int8 on the CPU, float on CUDA")]
LmHead = Annotated[
    str | None, typer.Option(help="a format for the output head as well; tied embeddings share its table [default: it stays in float]")
]
Fuse = Annotated[
    bool | None, typer.Option("--fuse/--no-fuse", help="run decoder layers as fused ops, at least one [default: those that can be]")
]
Skip = Annotated[list[str] | None, typer.Option(help="pattern of module names to leave alone; may be given again")]
Dtype = Annotated[str, typer.Option(help="of what is not swapped: auto (the checkpoint's), float32, bfloat16, float16")]
Threads = Annotated[int | None, typer.Option(help="threads to compute with [default: torch's own choice]")]
Model = Annotated[str, typer.Argument(help="a model directory, a hub id, or a GGUF file", show_default=False)]


def main() -> None:
    """Runs the command line; bad input is one line on standard error and exit code 2."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command and gives its exit code: 0, 1 where a measurement failed, 2 for bad input, 130 when interrupted."""
    from .report.worker import WorkerDied

    try:
        code = app(arguments, prog_name="taut", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except (ValueError, OSError) as error:
        message = _words(error)
    except WorkerDied as error:
        print(f"taut: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        print("taut: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # WHY by its face: typer ships its own copy of click, so its usage errors have no public type
        if not callable(getattr(error, "format_message", None)):
            raise
        message = error.format_message()
        if not message.strip():  # the help was asked for by giving nothing
            return 2
    print(f"taut: {message}", file=sys.stderr)
    return 2


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    """A progress bar on standard error; gives a function ``(done, total, what)``.

    It shows from the first call on, so that it does not cross the bar that transformers draws while it reads weights.
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    task = progress.add_task(title, total=None)

    def update(done: int, total: int, what: str) -> None:
        progress.start()
        progress.update(task, completed=done, total=total, description=what or title)

    try:
        yield update
    finally:
        progress.stop()


def _console() -> Console:
    """Standard output; wide enough for a table where it is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _write_json(path: Path, values: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(values, indent=1) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _set_threads(threads: int | None) -> None:
    import torch

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False) -> None:
    """What this machine, this torch and this build can run, and what does not fit."""
    from .report.info import describe, words

    found = describe()
    if as_json:
        typer.echo(json.dumps(found, indent=1))
        return
    console = _console()
    for line in words(found):
        console.print(line, highlight=False, markup=False)
    table = Table("op", "impl", "here", header_style="bold", pad_edge=False)
    for op, impls in found["impls"].items():
        for impl in impls:
            table.add_row(op, impl["name"], "[green]can run[/]" if impl["can_run"] else f"[yellow]cannot run:[/] {impl['reason']}")
    console.print(table)


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a model directory, a hub id, or a GGUF file", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="the directory to write", show_default=False)],
    weights: Annotated[str, typer.Option(help=f"{_FORMATS}; with --sparsity fp16 or bf16 as well")] = "int4",
    group_size: GroupSize = None,
    zeros: Zeros = False,
    sparsity: Annotated[
        str | None, typer.Option(help="2:4, 16:2:4 and the like: keep the nonzeros of a pruned model [default: dense]")
    ] = None,
    activations: Activations = "auto",
    skip: Skip = None,
    lm_head: LmHead = None,
    fuse: Fuse = None,
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option("--force", help="replace what DST holds; it stays whole until the new one is complete")] = False,
    threads: Threads = None,
) -> None:
    """Quantize a model and write it, with its tokenizer, where from_pretrained can read it."""
    from . import models

    how = "auto" if fuse is None else fuse
    settings = models.Settings(weights, group_size, zeros, activations, tuple(skip or ()), None, lm_head, how, sparsity)
    _set_threads(threads)
    models.check_target(target.absolute(), force)
    found = models.find_source(source)
    tokenizer = models.load_tokenizer(found)
    with _progress(f"quantizing {source}") as progress:
        model, report = models.load_model(found, dtype, settings, progress)
        progress(1, 1, f"writing {target}")
        models.save(model, tokenizer, target, force)
    if report is not None:
        typer.echo(str(report))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    typer.echo(f"wrote {target} ({size / 1e6:.1f} MB)")


@app.command()
def compress(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a model directory, a hub id, or a GGUF file", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="DST", help="the directory to write", show_default=False)],
    calibration: Annotated[Path, typer.Option(help="a text file that is like what the model will read", show_default=False)],
    sparsity: Annotated[str | None, typer.Option(help="2:4, 16:2:4 and the like; none: dense [default: 2:4]")] = "2:4",
    weights: Annotated[str | None, typer.Option(help="int4, int8, fp16, bf16, or none: floats with zeros [default: int4]")] = "int4",
    group_size: GroupSize = None,
    activations: Activations = "auto",
    method: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, or gptq (dense)")] = "sparsegpt",
    permute: Annotated[
        bool, typer.Option("--permute", help="reorder channels so that pruning keeps more; the model stays the same model")
    ] = False,
    recover: Annotated[int, typer.Option(help="steps of training for each pruned layer; slow, and much better", min=0)] = 0,
    sequences: Annotated[int, typer.Option(help="of the calibration text", min=1)] = 64,
    length: Annotated[int, typer.Option(help="of a sequence, in tokens", min=2)] = 512,
    skip: Skip = None,
    state: Annotated[Path | None, typer.Option(help="a directory for finished layers, so that a broken run goes on")] = None,
    dtype: Dtype = "float32",
    force: Annotated[bool, typer.Option("--force", help="replace what DST holds; it stays whole until the new one is complete")] = False,
    threads: Threads = None,
) -> None:
    """Prune a model's layers, round what is kept, and write it where from_pretrained can read it."""
    from . import models
    from .compress import calibration_ids
    from .compress import compress as compress_model

    none = (None, "none")
    _set_threads(threads)
    models.check_target(target.absolute(), force)
    text = calibration.read_text(encoding="utf-8")
    found = models.find_source(source)
    tokenizer = models.load_tokenizer(found)
    ids = calibration_ids(tokenizer, text, sequences, length)
    with _progress(f"compressing {source}") as progress:
        model, _ = models.load_model(found, dtype, None, progress)
        report = compress_model(
            model, ids, sparsity=None if sparsity in none else sparsity, weights=None if weights in none else weights,
            group_size=group_size, activations=activations, method=method, permute=permute, recover=recover, skip=skip,
            state=state, progress=progress,
        )  # fmt: skip
        progress(1, 1, f"writing {target}")
        if weights in none:
            models.write_directory(target, lambda folder: (model.save_pretrained(folder), tokenizer.save_pretrained(folder)), force)
        else:
            models.save(model, tokenizer, target, force)
    typer.echo(str(report))
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    typer.echo(f"wrote {target} ({size / 1e6:.1f} MB)")


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="what to answer, or to go on from; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    greedy: Annotated[bool | None, typer.Option("--greedy/--sample", help="[default: greedy unless --temperature]")] = None,
    temperature: Annotated[float | None, typer.Option(help="of sampling, above 0")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="use the chat template [default: if there is one]")] = None,
    weights: Annotated[str | None, typer.Option(help=f"swap a float model as it loads: {_FORMATS}")] = None,
    group_size: GroupSize = None,
    zeros: Zeros = False,
    activations: Activations = "auto",
    skip: Skip = None,
    lm_head: LmHead = None,
    fuse: Fuse = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
) -> None:  # fmt: skip
    """Write text with a model, swapped on the fly if asked, and say how fast it was."""
    from . import models

    models.require_transformers()
    from .fuse import unfuse
    from .generate import Sampling, generate_text

    sampling = Sampling(greedy, temperature, seed)
    how = "auto" if fuse is None else fuse
    settings = None if weights is None else models.Settings(weights, group_size, zeros, activations, tuple(skip or ()), None, lm_head, how)
    if weights is None and (group_size is not None or zeros or skip or lm_head or activations != "auto"):
        raise ValueError("--group-size, --zeros, --activations, --lm-head and --skip are for swapping: give --weights as well")
    _set_threads(threads)
    found = models.find_source(model)
    tokenizer = models.load_tokenizer(found)
    ids = models.prompt_tokens(tokenizer, sys.stdin.read() if prompt == "-" else prompt, chat)
    with _progress(f"loading {model}") as progress:
        loaded, report = models.load_model(found, dtype, settings, progress)
    if fuse is False:  # also where the checkpoint is a swapped one
        unfuse(loaded)
    if report is not None:
        typer.echo(str(report), err=True)
    typer.echo(str(generate_text(loaded, tokenizer, ids, max_new_tokens, sampling)), err=True)


@app.command()
def bench(
    threads: Threads = None,
    seconds: Annotated[float, typer.Option(help="to spend on each shape", min=0.05)] = 1.0,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the measurements there")] = None,
) -> None:
    """Time taut's linear layer against torch's on this machine, on a few shapes. bench/run.py of the repository times much more."""
    from .report.microbench import SHAPES, run_shape
    from .report.table import print_microbench

    _set_threads(threads)
    rows = []
    with _progress("timing") as progress:
        for index, shape in enumerate(SHAPES):
            progress(index, len(SHAPES), f"N={shape.n} K={shape.k} M={shape.m}")
            rows.extend(run_shape(shape, seconds))
    print_microbench(rows, _console())
    if json_path is not None:
        from .report.machine import describe_machine

        _write_json(json_path, {"machine": describe_machine(), "rows": rows})


@app.command()
def report(
    model: Model,
    weights: Annotated[list[str] | None, typer.Option(help="a format to swap to; may be given again [default: int8 and int4]")] = None,
    group_size: GroupSize = None,
    zeros: Zeros = False,
    activations: Activations = "auto",
    skip: Skip = None,
    dtype: Dtype = "auto",
    text: Annotated[Path | None, typer.Option(help="a file to compare predictions on [default: Python's own language reference]")] = None,
    tokens: Annotated[int, typer.Option(help="of text to compare predictions on; 0: none", min=0)] = 2048,
    window: Annotated[int, typer.Option(help="tokens of one window of text, and of the timed prompt", min=2)] = 512,
    new_tokens: Annotated[int, typer.Option(help="to write when decode is timed", min=1)] = 32,
    rounds: Annotated[int, typer.Option(help="timings of each variant, interleaved", min=2)] = 5,
    threads: Threads = None,
    watts_per_core: Annotated[str | None, typer.Option(help="model energy: watts of a busy core, or a range LOW:HIGH")] = None,
    grid_intensity: Annotated[float | None, typer.Option(help="model carbon: grams of CO2 equivalent a kWh")] = None,
    price_per_hour: Annotated[float | None, typer.Option(help="model money: dollars a machine-hour")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="model time to ship: megabits a second")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the report there")] = None,
) -> None:  # fmt: skip
    """Compare a model with its swapped selves: computation, memory, energy, money, network, fidelity."""
    from . import models
    from .report.machine import describe_machine
    from .report.measure import measure
    from .report.survey import Assumptions, build_report
    from .report.table import print_report
    from .report.text import default_text, read_text
    from .report.workload import make_variants, make_workload

    assumptions = Assumptions(_watts(watts_per_core), grid_intensity, price_per_hour, bandwidth)
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{json_path.absolute().parent}: no such directory")
    name, content = default_text() if text is None else (str(text), read_text(text))
    formats = list(dict.fromkeys(weights or ["int8", "int4"]))
    given = [models.Settings(f, group_size, zeros and f in ("int2", "int3", "int4"), activations, tuple(skip or ())) for f in formats]
    found = models.local_source(models.find_source(model))
    if quantized := models.is_quantized(found):
        raise ValueError(f"{model} is already quantized ({quantized}); report takes the float model, and swaps it itself")
    tokenizer = models.load_tokenizer(found)
    work = make_workload(tokenizer, content, window, tokens, new_tokens, rounds)
    with _progress(f"measuring {model}") as progress:
        measurements = measure(make_variants(found.name, dtype, given), work, threads=threads, flops=True, progress=progress)
    machine = describe_machine(measurements[0].facts["threads"])
    workload = {
        "text": name,
        "prompt_tokens": len(work.prompt),
        "new_tokens": new_tokens,
        "windows": len(work.windows),
        "window_tokens": window,
    }
    result = build_report(model, measurements, assumptions, machine, workload)
    print_report(result, _console())
    if json_path is not None:
        _write_json(json_path, result.as_dict())


def _watts(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    low, colon, high = text.partition(":")
    try:
        return float(low), float(high if colon else low)
    except ValueError:
        raise ValueError(f"watts-per-core must be a number or a range LOW:HIGH, got {text!r}") from None


if __name__ == "__main__":
    main()
