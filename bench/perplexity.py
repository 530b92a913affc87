"""What int8 activations cost in perplexity: ``python bench/perplexity.py [--model NAME] [--weights KIND] [--json PATH]``.

The same low-bit weights, head included, beside float activations, int8 and int8_outliers, on the same tokens; the cost is the
ratio of the perplexities less one, with the standard error of the paired difference. Nothing is timed. JSON lines: op (perplexity),
case (the model), format (the weights), activations, ppl_float, ppl_int8 (with these activations), cost, cost_stderr, kl, tokens, text,
commit, machine, torch, run.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch

import taut
from bench.language_models import NAMES, directory_of
from taut import models
from taut.models import Source
from taut.report.fidelity import TokenStats, compare_logits, join, summarize
from taut.report.machine import processor_name, usable_cores
from taut.report.text import default_text

ROOT = Path(__file__).resolve().parents[1]
_MODELS = tuple(name for name in NAMES if not name.startswith("llama"))  # random weights have no perplexity worth the name
_WEIGHTS = ("int4", "int8")
_ACTIVATIONS = ("int8", "int8_outliers")
_HEAD = {"weights": "int8", "group_size": 32}
_WINDOW, _WINDOWS = 512, 16


def cost(directory: Path, weights: str, windows: torch.Tensor, kind: str = "int8") -> dict[str, Any]:
    """Perplexities of the model with low-bit weights on ``windows [W, T]``, and what activations of this kind cost of it."""
    pair = []
    for activations in ("float", kind):
        model, _ = models.load_model(Source("directory", str(directory)), "float32")
        taut.swap(model, weights, activations=activations, rules={"lm_head": {**_HEAD, "activations": activations}})
        pair.append(model)
    parts: list[TokenStats] = []
    for window in windows:
        with torch.inference_mode():
            base, other = (model(input_ids=window[None], use_cache=False).logits[0, :-1] for model in pair)
        parts.append(compare_logits(base, other, window[1:]))
    stats = join(parts)
    found = summarize(stats)
    ratio = math.exp(found["log_ppl_ratio"].value)
    return {
        "ppl_float": found["ppl_base"].value, "ppl_int8": found["ppl_other"].value, "cost": ratio - 1,
        "cost_stderr": ratio * found["log_ppl_ratio"].stderr, "kl": found["kl_mean"].value, "tokens": stats.kl.numel(),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(prog="bench/perplexity.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", metavar="NAME", help=f"a model or a directory [default: {', '.join(_MODELS)}]")
    parser.add_argument("--weights", action="append", choices=_WEIGHTS, help=f"[default: {', '.join(_WEIGHTS)}]")
    parser.add_argument("--activations", action="append", choices=_ACTIVATIONS, help=f"[default: {', '.join(_ACTIVATIONS)}]")
    parser.add_argument("--windows", type=int, default=_WINDOWS, help=f"of {_WINDOW} tokens [default: {_WINDOWS}]")
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

    if args.windows < 1:
        raise ValueError(f"--windows must be at least 1, got {args.windows}")
    text_name, text = default_text()
    about = {
        "text": text_name, "commit": commit(), "machine": f"{processor_name()}, {usable_cores()} cores", "torch": torch.__version__,
        "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    for name in args.model or _MODELS:
        directory = directory_of(name, args.cache)
        tokenizer = models.load_tokenizer(Source("directory", str(directory)))
        windows = models.text_windows(tokenizer, text, _WINDOW, args.windows)
        first = tokenizer("a").input_ids[0]
        if first == tokenizer.bos_token_id:  # a model that was never shown a text without it, such as Gemma, is lost
            windows[:, 0] = first
        for weights, kind in itertools.product(args.weights or _WEIGHTS, args.activations or _ACTIVATIONS):
            found = cost(directory, weights, windows, kind)
            print(
                f"{Path(name).name} {weights}: perplexity {found['ppl_float']:.4f} with float activations, "
                f"{found['ppl_int8']:.4f} with {kind}: {found['cost']:+.3%} ± {found['cost_stderr']:.3%} "
                f"({found['tokens']} tokens, KL {found['kl']:.5f})",
                flush=True,
            )
            if args.json is not None:
                with args.json.open("a") as file:
                    line = {"op": "perplexity", "case": Path(name).name, "format": weights, "activations": kind, **found, **about}
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    sys.exit(main())
