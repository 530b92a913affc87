"""Times sparse weights beside dense ones of the same format: ``python -m bench.sparse [--json PATH]``.

One layer, ``N14336_K4096`` unless it is another, at each number of rows of x. Contenders: quant_linear with the dense weight, as its table
picks and with each kernel that runs no AMX (a processor without it has those); sparse_linear with each pattern, by every impl. Formats
"bf16" and "fp16" keep numbers as they are, and x is of the same type: the dense ones beside them are torch's linear of that type, and of
fp32. Each result is checked against float64 first. Weights are cold: copies that together exceed ``--cold-mb`` are rotated. Contenders
take turns (``bench/timing.py``). JSON lines: op (sparse_linear), case, format (pattern and weights), activations, impl, median_us,
p10_us, p90_us, nbytes (of the packed weight), gb_s, gflop_s (of the dense product), dense_ratio (over the fastest dense kernel),
dense_ratio_no_amx, commit, machine, torch, threads, run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch
from torch import Tensor
from torch.nn.functional import linear

import taut
from bench.contenders import copies_for, rotation
from bench.gpu import fingerprint
from bench.timing import Runner, interleave, spread
from taut.formats import ACTIVATIONS, SPARSE_KINDS, NumberFormat, WeightFormat
from taut.formats.sparse import Pattern, SparseFormat, sparsify
from taut.nn.attention import DTYPE_CODES
from taut.ops.pack_sparse import pack_sparse
from taut.ops.pack_weight import pack_weight
from taut.ops.quant_linear import quant_linear, quantize_activations
from taut.ops.quantize_weight import quantize_weight, reference
from taut.ops.sparse_linear import sparse_linear
from taut.report.machine import processor_name, usable_cores

PATTERNS = ("2:4", "16:2:4")
FORMATS = ("int8_row_a8row", "int8_g32_a8", "int4_g32_a8", "int4_g128_a8", "bf16")
TORCH = "torch linear, "  # and its dtype: beside weights of 16 bits
ROWS = (1, 4, 16, 128, 512)
_ACTIVATIONS = {"a8": "int8", "a8row": "int8_row"}
_CHECKED = 64  # columns, and rows
_TOLERANCE, _TOLERANCE_16BIT = 1e-4, 1e-2  # of the largest result; where results are of 16 bits


def parse(name: str) -> tuple[WeightFormat, str]:
    """``int4_g32_a8``, or ``bf16``, to its weights and activations. Raises ``ValueError`` for what is not of that form."""
    if name in SPARSE_KINDS:
        return NumberFormat(name), "float"
    parts = name.split("_")
    if len(parts) != 3 or parts[2] not in _ACTIVATIONS or not (parts[1] == "row" or parts[1][1:].isdigit()):
        raise ValueError(f"unknown format {name!r}; known for example: {', '.join(FORMATS)}")
    return WeightFormat(parts[0], 0 if parts[1] == "row" else int(parts[1][1:])), _ACTIVATIONS[parts[2]]


class Layer:
    """The weights of one format, dense and in each pattern, in copies that together are larger than the caches."""

    def __init__(self, n: int, k: int, name: str, patterns: Sequence[str], cold_bytes: int) -> None:
        self.n, self.k, self.name = n, k, name
        self.weights, self.activations = parse(name)
        self.dtype = self.weights.codes_dtype if isinstance(self.weights, NumberFormat) else torch.float32  # of x
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) / k**0.5
        # By what they are, "dense" or a pattern, and with 16 bits torch's dense ones by dtype: numbers of the first rows, and copies.
        self.numbers: dict[str, Tensor] = {}
        self.packed: dict[str, list[Tensor]] = {}
        self.formats: dict[str, SparseFormat] = {}
        if isinstance(self.weights, NumberFormat):
            for dtype in (self.dtype, torch.float32):
                name = f"{TORCH}{str(dtype).removeprefix('torch.')}"
                self.packed[name] = copied(w.to(dtype), cold_bytes)
                self.numbers[name] = self.packed[name][0][:_CHECKED]
        else:
            codes, scales, self.numbers["dense"] = self._of(w)
            self.packed["dense"] = copied(pack_weight(codes, scales, None, None, k, self.weights), cold_bytes)
        for text in patterns:
            self.formats[text] = format = SparseFormat(self.weights, Pattern.parse(text))
            mask = format.pattern.mask(w.abs())
            codes, scales, self.numbers[text] = self._of(torch.where(mask, w, 0.0))
            self.packed[text] = copied(pack_sparse(sparsify(codes, scales, mask, format), k, format), cold_bytes)

    def _of(self, w: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Codes, scales and numbers of the first rows."""
        if isinstance(self.weights, NumberFormat):
            codes = self.weights.codes_of(w)
            return codes, None, codes[:_CHECKED]
        parts = quantize_weight(w, self.weights)
        return parts.codes, parts.scales, reference(*parts, self.k, self.weights)[:_CHECKED]

    def sizes(self, m: int, pattern: Pattern | None) -> dict[str, int]:
        found = {
            "M": m, "N": self.n, "K": self.k, "format": self.weights.code, "group_size": self.weights.group_size,
            "activations": ACTIVATIONS[self.activations], "dtype": DTYPE_CODES[self.dtype],
        }  # fmt: skip
        return found if pattern is None else {**found, "n": pattern.n, "m": pattern.m, "v": pattern.v}

    def contenders(self, m: int) -> list[tuple[str, str, str, bool]]:
        """(op, pattern, impl, picked by the table)."""
        found = []
        for pattern in self.packed:
            if pattern.startswith(TORCH):
                found.append(("torch", pattern, pattern, self.packed[pattern][0].dtype == self.dtype))
                continue
            op = "quant_linear" if pattern == "dense" else "sparse_linear"
            sizes = self.sizes(m, None if pattern == "dense" else self.formats[pattern].pattern)
            picked = next(row.impl for row in taut.explain(op, **sizes) if row.chosen)
            for impl in (row.impl for row in taut.explain(op, **sizes)):
                with taut.force_impl(op, impl):
                    runs = next(row.chosen for row in taut.explain(op, **sizes) if row.impl == impl)
                if runs and (impl == picked or not (impl.startswith("cpu_scalar") or ("small" in impl and m > 64))):
                    found.append((op, pattern, impl, impl == picked))
        return found

    def call(self, op: str, pattern: str, impl: str, x: Tensor) -> Callable[[], Tensor]:
        following = rotation(self.packed[pattern])
        if op == "torch":
            x = x.to(self.packed[pattern][0].dtype)
            return lambda: linear(x, following())

        def call() -> Tensor:
            with taut.force_impl(op, impl):
                if op == "quant_linear":
                    return quant_linear(x, following(), None, self.n, self.weights, self.activations)
                return sparse_linear(x, following(), None, self.n, self.formats[pattern], self.activations)

        return call


def copied(packed: Tensor, cold_bytes: int) -> list[Tensor]:
    return [packed, *(packed.clone() for _ in range(copies_for(packed.nbytes, cold_bytes) - 1))]


def error_of(out: Tensor, x: Tensor, numbers: Tensor, activations: str) -> float:
    """Over the first columns and rows, as a share of the largest result; ``inf`` for a NaN."""
    seen = x[:_CHECKED].double() if activations == "float" else quantize_activations(x[:_CHECKED], activations)
    expected = seen @ numbers.double().T
    error = float((out[:_CHECKED, : len(numbers)].double() - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


def race(layer: Layer, m: int, rounds: int, seconds_each: float, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Checks and times everyone at m rows of x. Raises ``RuntimeError`` for a wrong result."""
    x = torch.randn(m, layer.k, generator=torch.Generator().manual_seed(m)).to(layer.dtype)
    entries = []
    for op, pattern, impl, picked in layer.contenders(m):
        call = layer.call(op, pattern, impl, x)
        error = error_of(call(), x, layer.numbers[pattern], layer.activations)
        if not error <= (_TOLERANCE if x.dtype == torch.float32 else _TOLERANCE_16BIT):
            raise RuntimeError(f"{impl} with {pattern} {layer.name}, M={m}, is off by {error:.2g} of the largest result")
        entries.append((pattern, impl, picked, error, Runner(call)))
    interleave([entry[-1] for entry in entries], rounds, seconds_each)
    timings = [spread(runner.samples) for *_, runner in entries]

    def fastest(admits: Callable[[str], bool]) -> float:
        dense = (timing for (p, impl, *_), timing in zip(entries, timings, strict=True) if p not in layer.formats and admits(impl))
        return min(timing.median_us for timing in dense)

    dense, without_amx = fastest(lambda impl: True), fastest(lambda impl: "amx" not in impl)
    lines = []
    for (pattern, impl, picked, error, _), timing in zip(entries, timings, strict=True):
        us, nbytes = timing.median_us, layer.packed[pattern][0].nbytes
        shown = pattern if pattern in layer.formats else "dense"
        line = {"op": "sparse_linear", "case": f"N{layer.n}_K{layer.k}_M{m}", "format": f"{shown}_{layer.name}", "pattern": shown}
        line |= {"impl": impl, "picked": picked, "median_us": us, "p10_us": timing.p10_us, "p90_us": timing.p90_us}
        line |= {"samples": timing.samples, "nbytes": nbytes, "copies": len(layer.packed[pattern]), "gb_s": nbytes / us / 1e3}
        line |= {"gflop_s": 2 * m * layer.n * layer.k / us / 1e3, "dense_ratio": dense / us, "dense_ratio_no_amx": without_amx / us}
        lines.append({**line, "max_error": error, **shared})
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sparse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="14336,4096", metavar="N,K", help="default: 14336,4096")
    parser.add_argument("--m", type=int, action="append", help=f"rows of x [default: {', '.join(map(str, ROWS))}]")
    parser.add_argument("--format", action="append", help=f"such as {FORMATS[0]} [default: {', '.join(FORMATS)}]")
    parser.add_argument("--pattern", action="append", help=f"default: {', '.join(PATTERNS)}")
    parser.add_argument("--cold-mb", type=float, default=1500.0, help="of copies of a weight [default: 1500]")
    parser.add_argument("--rounds", type=int, default=9, help="turns of each contender [default: 9]")
    parser.add_argument("--seconds", type=float, default=1.5, help="that a contender may take [default: 1.5]")
    parser.add_argument("--json", type=Path, metavar="PATH", help="append the lines there")
    args = parser.parse_args(arguments)
    try:
        n, k = map(int, args.shape.split(","))
        shared = {
            "commit": fingerprint(), "machine": processor_name(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "cores": usable_cores(), "run": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        for name in args.format or FORMATS:
            layer = Layer(n, k, name, args.pattern or PATTERNS, int(args.cold_mb * 1e6))
            for m in args.m or ROWS:
                lines = race(layer, m, args.rounds, args.seconds, shared)
                for line in lines:
                    speed = f"{line['median_us']:>9.0f} us {line['gb_s']:>6.1f} GB/s {line['gflop_s']:>7.0f} GFLOP/s"
                    ratios = f"{line['dense_ratio']:>5.2f}x dense, {line['dense_ratio_no_amx']:>5.2f}x without AMX"
                    impl = f"{line['impl']}{' *' if line['picked'] else ''}"
                    print(f"{line['case']:>18} {line['format']:>22} {speed} {ratios}  {impl}", flush=True)
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    with args.json.open("a") as file:
                        file.writelines(json.dumps(line) + "\n" for line in lines)
            del layer
    except (ValueError, RuntimeError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
