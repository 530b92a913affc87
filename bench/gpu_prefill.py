"""Times taut's attention_prefill on a CUDA GPU beside torch's attention (cuDNN, FlashAttention): ``python -m bench.gpu_prefill --out DIR``.

Every impl of the op that can run a case is timed, so that the table's order can be checked. Each result is checked first: its last
query rows of the first and the last head against float64, all of it against torch's, and against itself, bit for bit. Contenders take
turns, launches come from a CUDA graph (``bench/gpu_device.py``). The flops are those of the visible pairs; the share is of the matrix
rate that this run measured. Then, while there is time, training steps: attention and its gradients, by every impl of attention_backward;
the gradients of one key head are held against float64. A step counts five products for the gradients beside the two of attention.

Lines go to DIR/prefill.jsonl as they are found, of ``kind`` run, ceiling, prefill, training, skipped, wrong or failed. Exit code: 0, 1 if
a result was wrong or failed, 2 for bad input.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import taut
from bench import model
from bench.gpu import Budget, fingerprint
from bench.gpu_device import CudaDevice, DryDevice
from bench.timing import MIN_SAMPLES, spread
from taut import _native
from taut.ops.attention_prefill import attention_prefill, cost

OP, BACKWARD = "attention_prefill", "attention_backward"
FILE = "prefill.jsonl"
PEERS = {"torch cudnn": SDPBackend.CUDNN_ATTENTION, "torch flash": SDPBackend.FLASH_ATTENTION}
DRY_PEERS = {"torch math": SDPBackend.MATH}
_TOLERANCE, _PEER_TOLERANCE = 1e-2, 2e-2  # of the largest result, of 16 bits
_CHECKED_ROWS = 64
_SLOW_IMPL = "simt"  # an impl for correctness: minutes at these sizes


Call = Callable[[int], tuple[Tensor, ...]]  # of a copy of the inputs, of which there is one


@dataclass(frozen=True)
class Case:
    """``batch`` prompts of ``length`` tokens; the heads of Llama 3 8B, unless they are others."""

    batch: int
    length: int
    causal: bool = True
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return f"B{self.batch}_L{self.length}_H{self.heads}.{self.kv_heads}_D{self.head_dim}{'' if self.causal else '_full'}"

    @property
    def flops(self) -> int:
        sizes = (self.batch, self.heads, self.kv_heads, self.length, self.length, self.head_dim, self.head_dim)
        return cost(*sizes, causal=self.causal, element_bytes=2)["flops"]


CASES = (
    Case(1, 16384), Case(4, 4096), Case(16, 1024), Case(1, 16384, False), Case(4, 4096, heads=14, kv_heads=2, head_dim=64),
    Case(32, 512, False, 12, 12, 64), Case(1, 1024), Case(2, 4096, heads=8, kv_heads=4, head_dim=256),
)  # fmt: skip
DRY_CASES = (Case(2, 40, True, 4, 2, 32),)
TRAINED = (Case(4, 4096), Case(4, 4096, heads=14, kv_heads=2, head_dim=64), Case(4, 2048, False, 12, 12, 64))


class Bench:
    """One run on one device."""

    def __init__(self, device: CudaDevice | DryDevice, path: Path, rounds: int) -> None:
        self.device, self.rounds, self.lines = device, rounds, []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self.peak = 0.0

    def add(self, kind: str, **fields: Any) -> None:
        self.lines.append({"kind": kind, **fields})
        self._file.write(json.dumps(self.lines[-1]) + "\n")
        self._file.flush()

    def measure_ceilings(self) -> None:
        for name, value in self.device.ceilings().items():
            self.add("ceiling", id=name, value=value)
        self.peak = next(line["value"] for line in self.lines if line.get("id") == "dense_tflop_s")

    def impls(self, op: str, case: Case) -> list[str]:
        """The impls of an op that can run a case, the one the table picks first."""
        dtype = 1 if self.device.dtype == torch.bfloat16 else 2
        sizes = {"D": case.head_dim, "Dv": case.head_dim, "dtype": dtype, "B": case.batch, "Hq": case.heads, "Hkv": case.kv_heads}
        sizes |= {"Lq": case.length, "Lk": case.length, "causal": int(case.causal)}
        found = []
        for impl, _, _ in _native._C.explain(op, sizes, self.device.impls):
            with taut.force_impl(op, impl):
                if any(row[:2] == (impl, True) for row in _native._C.explain(op, sizes, self.device.impls)):
                    found.append(impl)
        return [impl for impl in found if _SLOW_IMPL not in impl] or found[:1]

    def inputs(self, case: Case) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator(self.device.torch_device).manual_seed(case.length)

        def heads(count: int) -> Tensor:
            shape = (case.batch, count, case.length, case.head_dim)
            return torch.randn(shape, generator=generator, device=self.device.torch_device).to(self.device.dtype)

        return heads(case.heads), heads(case.kv_heads), heads(case.kv_heads)

    def race(self, case: Case) -> None:
        """Checks and times every impl, and torch."""
        q, k, v = self.inputs(case)

        def torchs(backend: SDPBackend) -> Call:
            def call(copy: int) -> tuple[Tensor, ...]:
                with sdpa_kernel(backend):
                    return (scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads),)

            return call

        def own(impl: str) -> Call:
            def call(copy: int) -> tuple[Tensor, ...]:
                with taut.force_impl(OP, impl):
                    return attention_prefill(q, k, v, causal=case.causal)[:1]

            return call

        self._race("prefill", OP, case, case.flops, torchs, own, lambda found: error_of(*found, q, k, v, case.causal))

    def train(self, case: Case) -> None:
        """The same with the gradients of q, k and v."""
        leaves = tuple(t.requires_grad_() for t in self.inputs(case))
        grad_out = torch.randn_like(leaves[0])

        def torchs(backend: SDPBackend) -> Call:
            def call(copy: int) -> tuple[Tensor, ...]:
                with sdpa_kernel(backend):
                    out = scaled_dot_product_attention(*leaves, is_causal=case.causal, enable_gqa=case.heads != case.kv_heads)
                    return torch.autograd.grad(out, leaves, grad_out)

            return call

        def own(impl: str) -> Call:
            def call(copy: int) -> tuple[Tensor, ...]:
                with taut.force_impl(BACKWARD, impl):
                    return torch.autograd.grad(attention_prefill(*leaves, causal=case.causal)[0], leaves, grad_out)

            return call

        error_in = lambda found: gradient_error(found, grad_out, *leaves, case.causal)  # noqa: E731
        self._race("training", BACKWARD, case, case.flops * 7 // 2, torchs, own, error_in)

    def _race(
        self, kind: str, op: str, case: Case, flops: int, torchs: Callable[[SDPBackend], Call], own: Callable[[str], Call],
        error_in: Callable[[tuple[Tensor, ...]], float],
    ) -> None:  # fmt: skip
        pool, ready, expected = self.device.new_pool(), [], None
        bound_us = flops / (self.peak * 1e6)
        peers = PEERS if self.device.impls == "cuda" else DRY_PEERS
        contenders = {name: torchs(backend) for name, backend in peers.items()} | {impl: own(impl) for impl in self.impls(op, case)}
        for name, call in contenders.items():
            id = f"{op}/{case}/{name}"
            try:
                out = call(0)
                error = error_in(out)
                if name not in peers:
                    again = all(torch.equal(one, other) for one, other in zip(out, call(0), strict=True))
                    apart = 0.0 if expected is None else max(furthest(one, other) for one, other in zip(out, expected, strict=True))
                    if not error <= _TOLERANCE or not apart <= _PEER_TOLERANCE or not again:
                        words = f"off by {error:.2g} of the largest result, {apart:.2g} from torch's" + (
                            "" if again else ", not the same twice"
                        )
                        self.add("wrong", id=id, reason=words)
                        print(f"WRONG {id}: {words}", flush=True)
                        continue
                elif expected is None:
                    expected = out
                ready.append((id, name, error, self.device.runner(call, 1, bound_us, pool)))
            except (RuntimeError, ValueError) as problem:
                self.add("skipped" if name in peers else "failed", id=id, reason=str(problem).splitlines()[0][:300])
        for index in range(self.rounds + 1):
            for entry in ready[index % max(1, len(ready)) :] + ready[: index % max(1, len(ready))]:
                entry[3].take_turn()
        timings = []
        for *_, runner in ready:
            if len(runner.samples) > MIN_SAMPLES:
                del runner.samples[0]  # the first turn wakes the clocks
            timings.append(spread(runner.samples))
        best = min((timing.median_us for entry, timing in zip(ready, timings, strict=True) if entry[1] in peers), default=None)
        for (id, name, error, runner), timing in zip(ready, timings, strict=True):
            us, dtype = timing.median_us, str(self.device.dtype).removeprefix("torch.")
            self.add(
                kind, id=id, case=str(case), dtype=dtype, impl=name, peer=name in peers, median_us=us,
                p10_us=timing.p10_us, p90_us=timing.p90_us, samples=timing.samples, launches=runner.launches, graph=runner.graph,
                flops=flops, tflop_s=flops / us / 1e6, peak_share=bound_us / us, max_error=error,
                torch_ratio=best / us if best else None,
            )  # fmt: skip


def error_of(out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """The largest error of the last rows of the first and of the last head over the largest result; ``inf`` for a NaN."""
    worst, rows = 0.0, min(_CHECKED_ROWS, q.shape[2])
    for b, h in ((0, 0), (q.shape[0] - 1, q.shape[1] - 1)):
        key_head = h // (q.shape[1] // k.shape[1])
        scores = (q[b, h, -rows:].double() @ k[b, key_head].double().T) * q.shape[-1] ** -0.5
        if causal:
            length = k.shape[2]
            places = torch.arange(length, device=q.device)
            scores.masked_fill_(places > places[-rows:, None], float("-inf"))
        expected = torch.softmax(scores, -1) @ v[b, key_head].double()
        error = float((out[b, h, -rows:].double() - expected).abs().max() / expected.abs().max())
        worst = max(worst, error) if error == error else float("inf")
    return worst


def gradient_error(found: tuple[Tensor, ...], grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> float:
    """The largest error of the gradients of the first key head's q, k and v over the largest of each; ``inf`` for a NaN."""
    group = q.shape[1] // k.shape[1]
    leaves = [t.detach()[0, :heads].double().requires_grad_() for t, heads in ((q, group), (k, 1), (v, 1))]
    scores = leaves[0] @ leaves[1].mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    expected = torch.autograd.grad(torch.softmax(scores, -1) @ leaves[2], leaves, grad_out[0, :group].double())
    worst = max(furthest(one[0, : other.shape[0]], other) for one, other in zip(found, expected, strict=True))
    return worst if all(bool(one.isfinite().all()) for one in found) else float("inf")


def furthest(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


def render(lines: Sequence[dict[str, Any]]) -> str:
    """A line for each measurement, case by case."""
    words = [f"{'case':>28} {'us':>9} {'TFLOP/s':>8} {'% peak':>7} {'x torch':>8}  impl"]
    for line in lines:
        if line["kind"] in ("prefill", "training"):
            ratio = "" if line["torch_ratio"] is None else f"{line['torch_ratio']:.2f}"
            numbers = f"{line['median_us']:>9.1f} {line['tflop_s']:>8.1f} {100 * line['peak_share']:>7.1f} {ratio:>8}"
            what = ", and gradients" if line["kind"] == "training" else ""
            words.append(f"{line['case']:>28} {numbers}  {line['impl']}{what}")
        elif line["kind"] in ("wrong", "failed", "skipped"):
            words.append(f"{line['kind'].upper()} {line['id']}: {line['reason']}")
    return "\n".join(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_prefill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")), help=f"folder of {FILE} [default: $OUT, gpu-out]"
    )
    parser.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="default: 30")
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
    cases, trained = (DRY_CASES, DRY_CASES) if args.dry_run else (CASES, TRAINED)
    for race, case in [(bench.race, case) for case in cases] + [(bench.train, case) for case in trained]:
        if not budget.allows_another():
            bench.add("skipped", id=str(case), reason="the time was over")
            continue
        with budget.counted():
            race(case)
    print(render(bench.lines))
    return 1 if any(line["kind"] in ("wrong", "failed") for line in bench.lines) else 0


if __name__ == "__main__":
    sys.exit(main())
