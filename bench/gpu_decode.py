"""Times taut's attention_decode on a CUDA GPU beside torch's attention: ``python -m bench.gpu_decode --out DIR``.

One new token of a batch of sequences attends to a static cache in each format; how many keys there are is read on the device. Each
result is checked first: the first sequence against float64 of the numbers in its cache, and against itself, bit for bit. Then as
``bench/gpu.py`` measures: many launches in a CUDA graph make a sample, each on the next of copies of the cache that together exceed three
times the L2 cache, and contenders take turns. The share is of the bandwidth that this run measured; bytes are the cache's, read once.

Lines go to DIR/decode.jsonl as they are found, of ``kind`` run, ceiling, decode, skipped, wrong or failed. Exit code: 0, 1 if a
result was wrong or failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import model
from bench.contenders import copies_for
from bench.gpu import Budget, fingerprint
from bench.gpu_device import CudaDevice, DryDevice
from bench.timing import MIN_SAMPLES, spread
from taut import _native
from taut.formats.kv import KV_FORMATS
from taut.ops.attention_decode import attention_decode
from taut.ops.kv_append import KvCache, kv_append, kv_read

FILE = "decode.jsonl"
FORMATS = ("16-bit", "int8", "int4", "fp8")
TORCH = "torch sdpa"
_TOLERANCE = 1e-2  # of the largest result, of 16 bits


@dataclass(frozen=True)
class Case:
    """``batch`` sequences of ``keys`` tokens; the heads of Llama 3 8B, unless they are others."""

    batch: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return f"B{self.batch}_L{self.keys}_H{self.heads}.{self.kv_heads}_D{self.head_dim}"


CASES = (Case(1, 4096), Case(16, 4096), Case(1, 32768), Case(64, 1024), Case(1, 1024), Case(16, 4096, 64, 8), Case(16, 4096, 32, 32))
DRY_CASES = (Case(2, 40, 4, 2, 32),)


class Bench:
    """One run on one device."""

    def __init__(self, device: CudaDevice | DryDevice, path: Path, rounds: int) -> None:
        self.device, self.rounds, self.lines = device, rounds, []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self.memory_gb_s = 0.0

    def add(self, kind: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, **fields})
        self._file.write(json.dumps(self.lines[-1]) + "\n")
        self._file.flush()

    def measure_ceilings(self) -> None:
        for name, value in self.device.ceilings().items():
            self.add("ceiling", id=name, value=value)
            if name.endswith("gb_s"):
                self.memory_gb_s = max(self.memory_gb_s, value)

    def race(self, case: Case) -> None:
        """Checks and times every format, and torch."""
        where, dtype = self.device.torch_device, self.device.dtype
        generator = torch.Generator(where).manual_seed(case.keys)

        def heads(count: int, length: int) -> Tensor:
            return torch.randn(case.batch, count, length, case.head_dim, generator=generator, device=where).to(dtype)

        q, k, v = heads(case.heads, 1), heads(case.kv_heads, case.keys), heads(case.kv_heads, case.keys)
        pool, ready = self.device.new_pool(), []
        for name in FORMATS:
            id = f"attention_decode/{case}/{name}"
            try:
                format = KV_FORMATS[str(dtype).removeprefix("torch.") if name == "16-bit" else name]
                cache = KvCache.empty(format, case.batch, case.kv_heads, case.keys, case.head_dim, device=where)
                kv_append(k, v, cache)
                caches = [cache, *(copied(cache) for _ in range(copies_for(cache.nbytes, 3 * self.device.l2_bytes) - 1))]
                lengths = torch.full((case.batch,), case.keys, dtype=torch.int32, device=where)

                def call(copy: int, caches: Sequence[KvCache] = caches, lengths: Tensor = lengths) -> Tensor:
                    return attention_decode(q, caches[copy], case.keys, lengths)[0]

                error = error_of(call(0), q, cache, case.keys)
                if not error <= _TOLERANCE or not torch.equal(call(0), call(len(caches) - 1)):
                    self.add("wrong", id=id, reason=f"off by {error:.2g} of the largest result, or not the same twice")
                    continue
                sizes = {"kv_format": format.code, "D": case.head_dim, "Dv": case.head_dim, "dtype": 1 if dtype == torch.bfloat16 else 2}
                impl = next(name for name, runs, _ in _native._C.explain("attention_decode", sizes, self.device.impls) if runs)
                ready.append((id, name, impl, error, cache.nbytes, *self._runner(call, len(caches), cache.nbytes, pool)))
            except (RuntimeError, ValueError) as problem:
                self.add("failed", id=id, reason=str(problem).splitlines()[0][:300])
        try:
            nbytes = k.nbytes + v.nbytes
            copies = [(k, v), *((k.clone(), v.clone()) for _ in range(copies_for(nbytes, 3 * self.device.l2_bytes) - 1))]
            runner = self._runner(lambda copy: scaled_dot_product_attention(q, *copies[copy], enable_gqa=True), len(copies), nbytes, pool)
            ready.append((f"attention_decode/{case}/{TORCH}", "16-bit", TORCH, None, nbytes, *runner))
        except RuntimeError as problem:
            self.add("skipped", id=f"{case}/{TORCH}", reason=str(problem).splitlines()[0][:300])
        for index in range(self.rounds + 1):
            for entry in ready[index % max(1, len(ready)) :] + ready[: index % max(1, len(ready))]:
                entry[5].take_turn()
        timings = []
        for *_, runner, _ in ready:
            if len(runner.samples) > MIN_SAMPLES:
                del runner.samples[0]  # the first turn wakes the clocks
            timings.append(spread(runner.samples))
        of_torch = next((timing.median_us for entry, timing in zip(ready, timings, strict=True) if entry[2] == TORCH), None)
        for (id, name, impl, error, nbytes, runner, copies), timing in zip(ready, timings, strict=True):
            us = timing.median_us
            self.add(
                "decode", id=id, case=str(case), format=name, impl=impl, median_us=us, p10_us=timing.p10_us, p90_us=timing.p90_us,
                samples=timing.samples, launches=runner.launches, graph=runner.graph, copies=copies, nbytes=nbytes, gb_s=nbytes / us / 1e3,
                hbm_share=nbytes / (self.memory_gb_s * 1e3) / us, max_error=error, torch_ratio=of_torch / us if of_torch else None,
            )  # fmt: skip

    def _runner(self, call: Any, copies: int, nbytes: int, pool: Any) -> tuple[Any, int]:
        """And how many copies it goes round. The bound is the prediction: nothing but bytes, and two launches."""
        expected = nbytes / (self.memory_gb_s * 1e3) + 2 * model.LAUNCH_US
        return self.device.runner(call, copies, expected, pool), copies


def copied(cache: KvCache) -> KvCache:
    names = ("k", "v", "k_scales", "v_scales")
    return replace(cache, **{name: getattr(cache, name).clone() for name in names if getattr(cache, name) is not None})


def error_of(out: Tensor, q: Tensor, cache: KvCache, keys: int) -> float:
    """The largest error of the first sequence over its largest result; ``inf`` for a NaN."""
    names = ("k", "v", "k_scales", "v_scales")
    first = replace(cache, **{name: getattr(cache, name)[:1] for name in names if getattr(cache, name) is not None})
    k, v = (t.double().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in kv_read(first, 1, 0, keys))
    expected = torch.softmax(q[:1].double() @ k.mT * q.shape[-1] ** -0.5, -1) @ v
    error = float((out[:1].double() - expected).abs().max() / expected.abs().max())
    return error if error == error else float("inf")


def render(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each measurement, case by case."""
    words = [f"{'case':>24} {'format':>7} {'us':>8} {'GB/s':>6} {'% bound':>8} {'x torch':>8}  impl"]
    for line in lines:
        if line["kind"] == "decode":
            ratio = "" if line["torch_ratio"] is None else f"{line['torch_ratio']:.2f}"
            numbers = f"{line['median_us']:>8.1f} {line['gb_s']:>6.0f} {100 * line['hbm_share']:>8.0f} {ratio:>8}"
            words.append(f"{line['case']:>24} {line['format']:>7} {numbers}  {line['impl']}")
        elif line["kind"] in ("wrong", "failed", "skipped"):
            words.append(f"{line['kind'].upper()} {line['id']}: {line['reason']}")
    return "\n".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_decode", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
