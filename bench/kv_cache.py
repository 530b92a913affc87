"""What low-bit keys and values change in a model's answers: ``python bench/kv_cache.py [--model NAME] [--json PATH]``.

A text is read as a prompt and then in pieces, once into a cache of floats and once into one of each format; a piece attends to what
is stored, itself included. KL divergence and the share of positions whose most likely word is the same, over all tokens after
the prompt, with their standard errors. Nothing is timed. JSON lines: op (kv_cache), case (the model), format, kl, kl_stderr, same_top,
same_top_stderr, ppl_float, ppl, bytes_float, bytes, prompt, tokens, text, commit, machine, torch, run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch

import taut
from bench.language_models import directory_of
from taut import models
from taut.fuse import cache_name
from taut.models import Source
from taut.report.fidelity import compare_logits, join, summarize
from taut.report.machine import processor_name, usable_cores
from taut.report.text import default_text

ROOT = Path(__file__).resolve().parents[1]
_FORMATS = ("int8", "int4", "fp8")
_HOW = {"": {}, "not turned": {"turned": False}, "without channels": {"channels": False}}


def read(model: torch.nn.Module, ids: torch.Tensor, prompt: int, piece: int, kv: str, **how: bool) -> tuple[torch.Tensor, int]:
    """Logits ``[T - prompt, V]`` of the tokens after the prompt, each piece of which attends to what is stored; bytes stored."""
    cache, found = taut.Cache(model, kv, ids.shape[1], **how), []
    with torch.inference_mode():
        for begin in (0, *range(prompt, ids.shape[1], piece)):
            end = min(begin + piece, ids.shape[1]) if begin else prompt
            found.append(model(ids[:, begin:end], use_cache=True, **{cache_name(type(model)): cache}).logits[0])
    return torch.cat(found[1:]), cache.nbytes


def compare(model: torch.nn.Module, windows: torch.Tensor, prompt: int, piece: int, formats: Sequence[str]) -> list[dict[str, Any]]:
    """For each format (``int8``, ``int8 not turned``, ``int8 without channels``) what it changes on ``windows [W, T]``."""
    parts: dict[str, list] = {format: [] for format in formats}
    size: dict[str | None, int] = {}
    for window in windows:
        base, size[None] = read(model, window[None], prompt, piece, "float32")
        for format in formats:
            kv, _, how = format.partition(" ")
            other, size[format] = read(model, window[None], prompt, piece, kv, **_HOW[how])
            parts[format].append(compare_logits(base[:-1], other[:-1], window[prompt + 1 :]))
    found = []
    for format in formats:
        stats = join(parts[format])
        numbers = summarize(stats)
        found.append({
            "format": format, "kl": numbers["kl_mean"].value, "kl_stderr": numbers["kl_mean"].stderr, "same_top": numbers["top1"].value,
            "same_top_stderr": numbers["top1"].stderr, "ppl_float": numbers["ppl_base"].value, "ppl": numbers["ppl_other"].value,
            "bytes_float": size[None], "bytes": size[format], "prompt": prompt, "tokens": stats.kl.numel(),
        })  # fmt: skip
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(prog="bench/kv_cache.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", metavar="NAME", help="a model or a directory [default: smollm2-135m]")
    parser.add_argument(
        "--format", action="append", metavar="KV", help=f'also "int8 not turned", "int8 without channels" [default: {", ".join(_FORMATS)}]'
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of a text [default: 2048]")
    parser.add_argument("--prompt", type=int, default=1024, help="of which so many are the prompt [default: 1024]")
    parser.add_argument("--piece", type=int, default=32, help="tokens at a time after that [default: 32]")
    parser.add_argument("--windows", type=int, default=1, help="texts [default: 1]")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "bench", help="where models are kept [default: .cache/bench]")
    parser.add_argument("--json", type=Path, help="append one JSON object a line")
    args = parser.parse_args(arguments)
    try:
        _run(args)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    from bench.run import commit

    if not 0 < args.prompt < args.tokens - 1 or args.piece < 1 or args.windows < 1:
        raise ValueError("--prompt must be less than --tokens - 1, and --prompt, --piece and --windows at least 1")
    formats = args.format or _FORMATS
    if unknown := {format for format in formats if format.partition(" ")[2] not in _HOW}:
        raise ValueError(
            f"unknown formats {', '.join(sorted(unknown))}; after a kv format comes nothing, {' or '.join(filter(None, _HOW))}"
        )
    text_name, text = default_text()
    source = Source("directory", str(directory_of(args.model, args.cache)))
    model, _ = models.load_model(source, "float32")
    model.set_attn_implementation("taut")
    windows = models.text_windows(models.load_tokenizer(source), text, args.tokens, args.windows)
    about = {
        "text": text_name, "commit": commit(), "machine": f"{processor_name()}, {usable_cores()} cores", "torch": torch.__version__,
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    for found in compare(model, windows, args.prompt, args.piece, formats):
        print(
            f"{Path(args.model).name} {found['format']}: KL {found['kl']:.5f} ± {found['kl_stderr']:.5f}, same word "
            f"{found['same_top']:.2%} ± {found['same_top_stderr']:.2%}, perplexity {found['ppl_float']:.4f} -> {found['ppl']:.4f}, "
            f"{found['bytes_float'] / 1e6:.1f} MB -> {found['bytes'] / 1e6:.1f} MB ({found['tokens']} tokens)",
            flush=True,
        )
        if args.json is not None:
            with args.json.open("a") as file:
                file.write(json.dumps({"op": "kv_cache", "case": Path(args.model).name, **found, **about}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
