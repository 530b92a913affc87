"""What sparse and low-bit weights change in a model's answers: ``python -m bench.sparsity [--model NAME] [--json PATH] [--plot PATH]``.

Each entry compresses the model anew: ``method pattern weights`` ("sparsegpt 2:4 int4"), with "dense" for no pattern and "float" for no
format; "sparsegpt+100" trains each pruned layer for 100 steps (``recover``), "sparsegpt~p" and "sparsegpt+100~p" put channels in a better
order first (``permute``); "nearest dense int4" is ``taut.swap`` alone. Activations stay float. KL divergence, share of positions whose
most likely word is the same and perplexity on text that calibration does not see, with standard errors; bytes of the layers in canonical
form, for each weight in bits. Nothing is timed but how long compressing took. JSON lines: op (sparsity), case (the
model), format (the entry), bits, bytes, kl, kl_stderr, same_top, ppl_float, ppl, layer_error, seconds, calibration_tokens, tokens, text,
commit, machine, torch, run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch
from torch import nn

import taut
from bench.gpu import fingerprint
from bench.language_models import directory_of
from taut import QuantLinear, models
from taut.compress import METHODS, compress
from taut.models import Source
from taut.report.fidelity import compare_logits, join, summarize
from taut.report.machine import processor_name, usable_cores
from taut.report.text import default_text

ROOT = Path(__file__).resolve().parents[1]
MODELS = ("smollm2-135m", "gemma3-270m")
ENTRIES = (
    "nearest dense int8", "nearest dense int4", "gptq dense int4",
    "magnitude 2:4 float", "wanda 2:4 float", "sparsegpt 2:4 float",
    "magnitude 2:4 int4", "wanda 2:4 int4", "sparsegpt 2:4 int4", "sparsegpt 2:4 int8", "sparsegpt 4:8 int4", "sparsegpt 16:2:4 int4",
    "wanda~p 2:4 float", "sparsegpt~p 2:4 float",
    "sparsegpt+64 2:4 float", "sparsegpt+64 2:4 int4", "sparsegpt+64 4:8 int4", "sparsegpt+64 16:2:4 int4",
)  # fmt: skip
_WINDOW, _WINDOWS = 512, 8
_SEQUENCES, _LENGTH = 32, 256


def parse(entry: str) -> tuple[str, int, bool, str | None, str | None]:
    """Method, steps of recovery, whether channels are permuted, pattern and weights. Raises ``ValueError`` for what is no entry."""
    parts = entry.split()
    how = parts[0] if parts else ""
    method, plus, steps = how.removesuffix("~p").partition("+")
    if len(parts) != 3 or method not in ("nearest", *METHODS) or steps.isdigit() != bool(plus):
        raise ValueError(f"unknown entry {entry!r}; known for example: {', '.join(ENTRIES[:4])}")
    _, pattern, weights = parts
    return method, int(steps or 0), how.endswith("~p"), None if pattern == "dense" else pattern, None if weights == "float" else weights


def apply(model: nn.Module, entry: str, ids: torch.Tensor) -> tuple[float | None, list[str]]:
    """Compresses the model in place: the layers' mean error, if it is known, and their names."""
    method, steps, permute, pattern, weights = parse(entry)
    if method == "nearest":
        report = taut.swap(model, weights, activations="float", fuse=False)
        return None, [layer.name for layer in report.swapped]
    found = compress(
        model, ids, sparsity=pattern, weights=weights, method=method, permute=permute, recover=steps, activations="float"
    )  # fmt: skip
    return found.mean_error, [layer.name for layer in found.layers]


def size_of(model: nn.Module, names: Sequence[str]) -> tuple[int, float]:
    """Bytes of these layers as a checkpoint holds them, and bits for each of their weights; floats with zeros count as 16 bits each."""
    nbytes = count = 0
    for module in map(model.get_submodule, names):
        weights = module.in_features * module.out_features
        count += weights
        low = isinstance(module, QuantLinear)
        nbytes += module.format.canonical_bytes(module.out_features, module.in_features) if low else 2 * weights
    return nbytes, 8 * nbytes / count


@torch.inference_mode()
def logits_of(model: nn.Module, windows: torch.Tensor) -> list[torch.Tensor]:
    return [model(input_ids=window[None], use_cache=False).logits[0, :-1] for window in windows]


def plot(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """KL against bits a weight, a point for each entry, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(line["case"] for line in lines))
    figure, axes = plt.subplots(1, len(cases), figsize=(7 * len(cases), 5), squeeze=False)
    for axis, case in zip(axes[0], cases, strict=True):
        points = [line for line in lines if line["case"] == case]
        for line in points:
            axis.scatter(line["bits"], line["kl"], s=24)
            axis.annotate(line["format"], (line["bits"], line["kl"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
        best = float("inf")
        front = []
        for line in sorted(points, key=lambda each: (each["bits"], each["kl"])):
            if line["kl"] < best:
                best = line["kl"]
                front.append((line["bits"], line["kl"]))
        axis.plot(*zip(*front, strict=True), linewidth=0.8, color="gray")
        axis.set(xlabel="bits a weight, scales and places included", ylabel="KL divergence, nats a token", title=case, yscale="log")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sparsity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", metavar="NAME", help=f"a model or a directory [default: {', '.join(MODELS)}]")
    parser.add_argument("--entry", action="append", help=f"such as {ENTRIES[8]!r} [default: {len(ENTRIES)} of them]")
    parser.add_argument("--windows", type=int, default=_WINDOWS, help=f"of {_WINDOW} tokens to compare on [default: {_WINDOWS}]")
    parser.add_argument("--sequences", type=int, default=_SEQUENCES, help=f"of {_LENGTH} tokens to calibrate on [default: {_SEQUENCES}]")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "bench", help="where models are kept [default: .cache/bench]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="append one JSON object a line")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="a picture of what --json holds")
    args = parser.parse_args(arguments)
    try:
        for entry in args.entry or ENTRIES:
            parse(entry)
        if args.windows < 1 or args.sequences < 1:
            raise ValueError("--windows and --sequences must be at least 1")
        for name in args.model or MODELS:
            run(args, name)
        if args.plot is not None:
            if args.json is None:
                raise ValueError("--plot draws what --json holds: give both")
            plot([json.loads(line) for line in args.json.read_text().splitlines()], args.plot)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def run(args: argparse.Namespace, name: str) -> None:
    directory = directory_of(name, args.cache)
    tokenizer = models.load_tokenizer(Source("directory", str(directory)))
    text_name, text = default_text()
    needed = args.windows * _WINDOW + args.sequences * _LENGTH
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    if len(ids) < needed:
        raise ValueError(f"the text has {len(ids)} tokens, and --windows and --sequences take {needed}")
    windows, ids = ids[: args.windows * _WINDOW].view(-1, _WINDOW).clone(), ids[args.windows * _WINDOW : needed].view(-1, _LENGTH).clone()
    first = tokenizer("a").input_ids[0]
    if first == tokenizer.bos_token_id:  # a model that was never shown a text without it, such as Gemma, is lost
        windows[:, 0] = ids[:, 0] = first
    load = lambda: models.load_model(Source("directory", str(directory)), "float32")[0]  # noqa: E731
    base = logits_of(load(), windows)
    about = {
        "text": text_name, "tokens": args.windows * (_WINDOW - 1), "calibration_tokens": ids.numel(), "commit": fingerprint(),
        "machine": f"{processor_name()}, {usable_cores()} cores", "torch": torch.__version__,
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    for entry in args.entry or ENTRIES:
        model, begin = load(), time.perf_counter()
        error, names = apply(model, entry, ids)
        seconds = time.perf_counter() - begin
        nbytes, bits = size_of(model, names)
        parts = [
            compare_logits(one, other, window[1:]) for one, other, window in zip(base, logits_of(model, windows), windows, strict=True)
        ]
        found = summarize(join(parts))
        line = {
            "op": "sparsity", "case": Path(name).name, "format": entry, "bits": bits, "bytes": nbytes, "kl": found["kl_mean"].value,
            "kl_stderr": found["kl_mean"].stderr, "same_top": found["top1"].value, "ppl_float": found["ppl_base"].value,
            "ppl": found["ppl_other"].value, "layer_error": error, "seconds": seconds, **about,
        }  # fmt: skip
        print(
            f"{line['case']} {entry}: {bits:.2f} bits, KL {line['kl']:.4f} ± {line['kl_stderr']:.4f}, same top {line['same_top']:.1%}, "
            f"perplexity {line['ppl_float']:.2f} -> {line['ppl']:.2f}, {seconds:.0f} s",
            flush=True,
        )
        if args.json is not None:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
