"""Times taut's sparse_linear on a CUDA GPU beside quant_linear and cuBLAS: ``python -m bench.gpu_sparse --out DIR``.

Weights of one size, sparse in each pattern and dense, of random codes; every impl that can run a case is timed, so that the table's order
can be checked. Each result is checked first, against float64 and against itself, bit for bit. Then as ``bench/gpu.py`` measures: many
launches in a CUDA graph make a sample, each on the next of copies of the weights that together exceed three times the L2 cache, and
contenders take turns. Bytes are those of the packed weight and of x and out, flops those of the dense product.

Lines go to DIR/sparse.jsonl as they are found, of ``kind`` run, ceiling, sparse, skipped, wrong or failed. Exit code: 0, 1 if a
result was wrong or failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch
from torch import Tensor
from torch.nn.functional import linear

import taut
from bench import gpu_decode, model
from bench.contenders import copies_for
from bench.gpu import Budget, fingerprint
from bench.gpu_device import CudaDevice, DryDevice
from bench.gpu_problem import max_error
from bench.timing import MIN_SAMPLES, spread
from taut import _native
from taut.formats import ACTIVATIONS, WeightFormat
from taut.formats.sparse import Pattern, SparseCanonical, SparseFormat
from taut.ops.pack_sparse import pack_sparse
from taut.ops.pack_weight import pack_weight
from taut.ops.quant_linear import quant_linear
from taut.ops.sparse_linear import dequantize_sparse, sparse_linear

OP = "sparse_linear"
FILE = "sparse.jsonl"
CUBLAS = "torch linear"
PATTERNS = ("2:4", "16:2:4", "4:8")
TOLERANCES = {"float": 1e-2, "int8": 2e-2, "int8_row": 3e-2, "fp8_row": 6e-2}  # of the largest result, of 16 bits, by the activations
_MOST_ROWS_SIMT = 16  # rows of x: beyond, cuda_sm75.simt would only take time


@dataclass(frozen=True)
class Case:
    """A weight ``[n, k]``, its format, and numbers of rows of x."""

    n: int
    k: int
    weights: WeightFormat
    rows: tuple[int, ...] = (1, 4, 16, 64, 256, 2048)
    activations: str = "float"

    def __str__(self) -> str:
        name = f"N{self.n}_K{self.k}_{self.weights.name}_{f'g{self.weights.group_size}' if self.weights.group_size else 'row'}"
        return name if self.activations == "float" else f"{name}_a{self.activations}"


INT4, INT8 = WeightFormat("int4", 128), WeightFormat("int8", 128)
CASES = (
    Case(28672, 4096, INT4), Case(28672, 4096, INT8), Case(28672, 4096, WeightFormat("int8", 0), activations="int8_row"),
    Case(4096, 4096, INT4), Case(28672, 4096, INT8, activations="int8"), Case(4096, 14336, WeightFormat("int4", 32)),
)  # fmt: skip
DRY_CASES = (Case(72, 256, INT4, (1, 20)), Case(72, 256, WeightFormat("int8", 0), (1, 20), "int8_row"))


def random_codes(rows: int, count: int, weights: WeightFormat, generator: torch.Generator) -> Tensor:
    shape = weights.codes_shape(rows, count)
    if weights.name == "int8":
        return torch.randint(-128, 128, shape, generator=generator, device=generator.device, dtype=torch.int8)
    codes = torch.randint(0, 256, shape, generator=generator, device=generator.device, dtype=torch.uint8)
    return (codes & 0xBF).view(torch.float8_e4m3fn) if weights.name == "fp8_e4m3" else codes  # of floats: those below 2


def random_sparse(case: Case, pattern: Pattern, generator: torch.Generator) -> tuple[SparseCanonical, SparseFormat]:
    """Codes of any value, places of any choice, on the generator's device; scales that make results a few units large."""
    format = SparseFormat(case.weights, pattern)
    codes = random_codes(case.n, format.kept(case.k), case.weights, generator)
    size = (0.9 if case.weights.name == "int4" else 0.054) / case.k**0.5
    scales = (0.75 + 0.5 * torch.rand(format.scales_shape(case.n, case.k), generator=generator, device=generator.device)) * size
    bits = format.place_bits
    choices = [sum(place << (bits * i) for i, place in enumerate(places)) for places in combinations(range(pattern.m), pattern.n)]
    table = torch.tensor(choices, device=generator.device)
    blocks = table[
        torch.randint(len(choices), (format.meta_shape(case.n, 8)[0], case.k // pattern.m), generator=generator, device=generator.device)
    ]
    # 4 bits a block of 2:4 and 12 of 4:8: two blocks make whole bytes
    width = bits * pattern.n
    pairs = blocks[:, ::2] | blocks[:, 1::2] << width
    meta = torch.stack([pairs >> (8 * i) & 255 for i in range(2 * width // 8)], -1).flatten(1).to(torch.uint8)
    return SparseCanonical(codes, scales.half(), meta), format


def impls(case: Case, m: int, pattern: Pattern, dtype: torch.dtype, device: str) -> Iterator[str]:
    """Those of a device ("cuda") that can run a call, but for the one that would only take time."""
    sizes = {"M": m, "N": case.n, "K": case.k, "format": case.weights.code, "group_size": case.weights.group_size}
    sizes |= {"n": pattern.n, "m": pattern.m, "v": pattern.v, "dtype": 1 if dtype == torch.bfloat16 else 2}
    sizes["activations"] = ACTIVATIONS[case.activations]
    for impl, _, _ in _native._C.explain(OP, sizes, device):
        with taut.force_impl(OP, impl):
            runs = any(row[:2] == (impl, True) for row in _native._C.explain(OP, sizes, device))
        if runs and ("simt" not in impl or m <= _MOST_ROWS_SIMT):
            yield impl


class Bench(gpu_decode.Bench):
    """One run on one device."""

    def race(self, case: Case) -> None:
        """Checks and times every contender at each number of rows."""
        where, dtype = self.device.torch_device, self.device.dtype
        generator = torch.Generator(where).manual_seed(case.n + case.k)
        makers: dict[str, tuple[list[Tensor], Callable[[Tensor, Tensor], Tensor], Tensor]] = {}
        for text in PATTERNS:
            weight, format = random_sparse(case, Pattern.parse(text), generator)
            packed = self._copies(pack_sparse(weight, case.k, format))
            call = lambda x, packed, format=format: sparse_linear(x, packed, None, case.n, format, case.activations)  # noqa: E731
            makers[text] = packed, call, dequantize_sparse(weight, case.k, format)
        dense = makers[PATTERNS[0]][2]
        codes = random_codes(case.n, case.k, case.weights, generator)
        scales = torch.full(case.weights.scales_shape(case.n, case.k), 1.0, device=where).half()
        packed = self._copies(pack_weight(codes, scales, None, None, case.k, case.weights))
        quant = packed, (lambda x, packed: quant_linear(x, packed, None, case.n, case.weights, case.activations))
        floats = self._copies(dense.to(dtype))
        for m in case.rows:
            x = torch.randn(m, case.k, generator=generator, device=where).to(dtype)
            contenders = [("dense", CUBLAS, floats, linear, None), ("dense", "quant_linear", *quant, None)]
            for text, (copies, call, numbers) in makers.items():
                names = impls(case, m, Pattern.parse(text), dtype, self.device.impls)
                contenders += [(text, impl, copies, call, numbers) for impl in names]
            self._race_rows(case, m, x, contenders)

    def _copies(self, packed: Tensor) -> list[Tensor]:
        return [packed, *(packed.clone() for _ in range(copies_for(packed.nbytes, 3 * self.device.l2_bytes) - 1))]

    def _race_rows(self, case: Case, m: int, x: Tensor, contenders: Sequence[tuple[str, str, list[Tensor], Any, Tensor | None]]) -> None:
        pool, ready = self.device.new_pool(), []
        for pattern, impl, copies, product, numbers in contenders:
            id = f"{OP}/{case}_M{m}/{pattern}/{impl}"
            own = numbers is not None

            def call(copy: int, impl: str = impl, copies: Sequence[Tensor] = copies, product: Any = product, own: bool = own) -> Tensor:
                if not own:
                    return product(x, copies[copy])
                with taut.force_impl(OP, impl):
                    return product(x, copies[copy])

            try:
                error = None
                if own:
                    out = call(0)
                    error = max_error(out, x, numbers)
                    if not error <= TOLERANCES[case.activations] or not torch.equal(out, call(len(copies) - 1)):
                        self.add("wrong", id=id, reason=f"off by {error:.2g} of the largest result, or not the same twice")
                        continue
                nbytes = copies[0].nbytes + (m * (case.k + case.n)) * x.element_size()
                ready.append((id, pattern, impl, error, nbytes, *self._runner(call, len(copies), nbytes, pool)))
            except (RuntimeError, ValueError) as problem:
                self.add("failed", id=id, reason=str(problem).splitlines()[0][:300])
        for index in range(self.rounds + 1):
            for entry in ready[index % max(1, len(ready)) :] + ready[: index % max(1, len(ready))]:
                entry[5].take_turn()
        timings = {}
        for entry in ready:
            if len(entry[5].samples) > MIN_SAMPLES:
                del entry[5].samples[0]  # the first turn wakes the clocks
            timings[entry[0]] = spread(entry[5].samples)
        others = {entry[2]: timings[entry[0]].median_us for entry in ready if entry[1] == "dense"}
        for id, pattern, impl, error, nbytes, runner, copies in ready:
            timing = timings[id]
            us = timing.median_us
            self.add(
                "sparse", id=id, case=str(case), m=m, pattern=pattern, impl=impl, median_us=us, p10_us=timing.p10_us, p90_us=timing.p90_us,
                samples=timing.samples, launches=runner.launches, graph=runner.graph, copies=copies, nbytes=nbytes, gb_s=nbytes / us / 1e3,
                hbm_share=nbytes / (self.memory_gb_s * 1e3) / us, tflop_s=2 * m * case.n * case.k / us / 1e6, max_error=error,
                dense_ratio=others["quant_linear"] / us if "quant_linear" in others else None,
                torch_ratio=others[CUBLAS] / us if CUBLAS in others else None,
            )  # fmt: skip


def render(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each measurement, case by case."""
    words = [f"{'case':>30} {'M':>5} {'pattern':>7} {'us':>9} {'GB/s':>6} {'% read':>7} {'TFLOP/s':>8} {'x dense':>8} {'x torch':>8}  impl"]
    for line in lines:
        if line["kind"] == "sparse":
            ratios = " ".join(f"{'' if value is None else f'{value:.2f}':>8}" for value in (line["dense_ratio"], line["torch_ratio"]))
            numbers = f"{line['median_us']:>9.1f} {line['gb_s']:>6.0f} {100 * line['hbm_share']:>7.0f} {line['tflop_s']:>8.1f} {ratios}"
            words.append(f"{line['case']:>30} {line['m']:>5} {line['pattern']:>7} {numbers}  {line['impl']}")
        elif line["kind"] in ("wrong", "failed", "skipped"):
            words.append(f"{line['kind'].upper()} {line['id']}: {line['reason']}")
    return "\n".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_sparse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")), help=f"folder of {FILE} [default: $OUT, gpu-out]"
    )
    parser.add_argument("--budget", type=float, default=40.0, metavar="SECONDS", help="default: 40")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender [default: 7]")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="H200",
        choices=list(model.GPUS),
        metavar="DEVICE",
        help="a tiny case on the CPU, times of the bound",
    )
    args = parser.parse_args(arguments)
    if args.rounds < 1 or args.budget <= 0 or (not args.dry_run and not torch.cuda.is_available()):
        print("bench: --rounds must be at least 1, --budget above 0, and torch must see a CUDA device but for --dry-run", file=sys.stderr)
        return 2
    budget = Budget(args.budget)
    device = DryDevice(model.GPUS[args.dry_run]) if args.dry_run else CudaDevice()
    bench = Bench(device, args.out / FILE, args.rounds)
    bench.add(
        "run", id=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), device=device.name, sm=device.sm,
        sm_count=device.sm_count, l2_bytes=device.l2_bytes, commit=fingerprint(), torch=torch.__version__, cuda=torch.version.cuda,
        **device.facts(),
    )  # fmt: skip
    bench.measure_ceilings()
    for case in DRY_CASES if args.dry_run else CASES:
        if not budget.allows_another():
            bench.add("skipped", id=str(case), reason="the time was over")
            continue
        with budget.counted():
            bench.race(case)
    print(render(bench.lines))
    return 1 if any(line["kind"] in ("wrong", "failed") for line in bench.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
