"""Times taut's quant_linear on a CUDA GPU beside cuBLAS and other projects' 4-bit kernels: ``python -m bench.gpu --out DIR``.

How it measures. Each result is checked before it is timed: against float64 in its first and last rows and columns, against cuBLAS over
all elements, and taut's against itself, bit for bit. Weights are cold: each launch reads the next of several copies, together more than
three times the L2 cache. Many launches in one CUDA graph make a sample, timed by events; contenders take turns. The shares are of the
bandwidth and of the matrix rate that this run measured on this GPU. Besides the impl that the op's table picks, every other one that can
run the call is timed, so that the table's crossovers can be checked.

Lines go to DIR/bench.jsonl as they are found, the most wanted first, so that a run that is cut off is worth what it measured. Each has
``kind``: run, ceiling, linear (a measurement), begin, end, skipped, wrong, failed. ``--resume`` goes on where another run was cut off, and
leaves out what it died of. Exit code: 0, 1 if a result was wrong or failed, 2 for bad input, 3 if the device was lost.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a script, Python looks for modules beside it

import torch

import taut
from bench import gpu_table, model
from bench.contenders import Skip
from bench.gpu_device import CudaDevice, DryDevice
from bench.gpu_problem import TOLERANCES, Layer, Weight, max_error, norm_error, own_layer, own_packed, rows_of_x
from bench.peers import cuda_peers
from bench.timing import MIN_SAMPLES, spread
from taut import _native

ROOT = Path(__file__).resolve().parents[1]
OP = "quant_linear"
FILE = "bench.jsonl"
DRY_SHAPES, DRY_ROWS = ((256, 512), (384, 128)), (1, 3, 40)
_DEFAULT_BUDGET = 240.0
_SECONDS_EACH = 0.25  # that a contender may take in a race; with three samples it stops there
_SLOW_IMPL, _SLOW_IMPL_ROWS = "simt", 16  # an impl for correctness: timed for many rows only where the table picks it
_PEER_TOLERANCE = 3e-2
_NORM_TOLERANCES = {"bf16": 1e-2, "f16": 1e-2, "a8row": 3e-2, "f8row": 8e-2}
_PEAKS = {"16": "dense_tflop_s", "int8": "int8_top_s", "fp8": "fp8_tflop_s"}


class DeviceLost(Exception):
    """The device answers no more; only a new process can use it."""


class Budget:
    """Seconds that may be spent, by a clock that tests can turn."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._longest = 0.0

    def left(self) -> float:
        return self._end - self._clock()

    def allows_another(self) -> bool:
        """Whether the longest thing so far would still fit."""
        return self.left() > self._longest

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        begin = self._clock()
        yield
        self._longest = max(self._longest, self._clock() - begin)


class Log:
    """Lines of ``bench.jsonl``: each one is on disk before the next thing happens."""

    def __init__(self, path: Path, resume: bool) -> None:
        self.path, self.lines = path, []
        self.over: set[str] = set()  # races that ended
        self.barred: set[str] = set()  # entries that failed, were wrong, or began and never ended: what another run died of
        if resume and path.exists():
            self.lines = gpu_table.read_lines(path)
            self.over = {line["id"] for line in self.lines if line["kind"] == "end"}
            begun = [line["id"] for line in self.lines if line["kind"] == "begin"]
            finished = {line["id"] for line in self.lines if line["kind"] in ("ready", "wrong", "failed", "skipped")}
            self.barred = {name for name in begun if name not in finished}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w")
        self._file.writelines(json.dumps(line) + "\n" for line in self.lines)  # anew: the last one may have been cut off
        for name in sorted(self.barred):
            self.add("failed", id=name, reason="a run ended in it: a crash, or a kernel that did not return")
        self.barred |= {line["id"] for line in self.lines if line["kind"] in ("failed", "wrong")}

    def add(self, kind: str, **fields: Any) -> dict[str, Any]:
        line = {"kind": kind, **fields}
        self.lines.append(line)
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return line

    def close(self) -> None:
        self._file.close()


class Bench:
    """One run on one device."""

    def __init__(self, device: CudaDevice | DryDevice, log: Log, rounds: int, peers: bool) -> None:
        self.device, self.log, self.rounds = device, log, rounds
        self.peers = []
        for peer in cuda_peers() if peers else ():
            if reason := peer.available():
                self.skip(peer.name, reason)
            else:
                self.peers.append(peer)
        self.ceilings: dict[str, float] = {}

    def skip(self, what: str, reason: str) -> None:
        if not any(line["kind"] == "skipped" and (line["id"], line["reason"]) == (what, reason) for line in self.log.lines):
            self.log.add("skipped", id=what, reason=reason)

    def measure_ceilings(self) -> None:
        """The best of what this run and the one it goes on from found."""
        for line in self.log.lines:
            if line["kind"] == "ceiling":
                self.ceilings[line["id"]] = max(line["value"], self.ceilings.get(line["id"], 0.0))
        for name, value in self.device.ceilings().items():
            self.log.add("ceiling", id=name, value=value)
            self.ceilings[name] = max(value, self.ceilings.get(name, 0.0))

    @property
    def memory_gb_s(self) -> float:
        return max(self.ceilings["copy_gb_s"], self.ceilings["read_gb_s"])

    # ---- one weight

    def layers(self, weight: Weight, m: Sequence[int]) -> tuple[list[Layer], dict[int, str]]:
        """Everyone who can compute with a weight, cuBLAS first; and the impl that the table picks for each m."""
        cold_bytes = 3 * self.device.l2_bytes
        layers = []
        for peer in self.peers:
            try:
                layers.append(peer.layer(weight, cold_bytes))
            except Skip as reason:
                self.skip(f"{peer.name}/{weight.name}", str(reason))
            except Exception as error:  # WHY any: another project's package, perhaps of another version, is no reason to stop
                self._check_alive()
                self.skip(f"{peer.name}/{weight.name}", f"{type(error).__name__}: {_first_line(error)}")
        packed = own_packed(weight, cold_bytes)
        chosen = {rows: self._chosen(weight, rows) for rows in m}
        for impl in self._impls(weight, m):
            layers.append(own_layer(weight, packed, impl))
        return layers, chosen

    def _verdicts(self, weight: Weight, m: int) -> list[tuple[str, bool]]:
        """The op's table for a call: each impl, and whether it would run."""
        return [(impl, runs) for impl, runs, _ in _native._C.explain(OP, weight.sizes(m), self.device.impls)]

    def _chosen(self, weight: Weight, m: int) -> str:
        return next((impl for impl, runs in self._verdicts(weight, m) if runs), "")

    def _can_run(self, weight: Weight, impl: str, m: int) -> bool:
        with taut.force_impl(OP, impl):
            return (impl, True) in self._verdicts(weight, m)

    def _impls(self, weight: Weight, m: Sequence[int]) -> list[str]:
        return [name for name, _ in self._verdicts(weight, m[0]) if any(self._can_run(weight, name, rows) for rows in m)]

    # ---- one race

    def race(self, weight: Weight, layers: Sequence[Layer], chosen: str, m: int) -> None:
        """Checks and times everyone on m rows of x; a line for each."""
        case = f"N{weight.n}_K{weight.k}_M{m}"
        name = f"{OP}/{case}/{weight.name}"
        if name in self.log.over:
            return
        x, pool = rows_of_x(weight, m), self.device.new_pool()
        reference: torch.Tensor | None = None
        ready = []
        for layer in layers:
            id = f"{OP}/{case}/{layer.format}/{layer.impl}"
            if id in self.log.barred or layer.refuses(m) or (not layer.peer and not self._takes_part(weight, layer, chosen, m)):
                continue
            self.log.add("begin", id=id)
            expected = self._expected(layer, weight, m)

            def call(copy: int, layer: Layer = layer) -> torch.Tensor:
                with self._forced(layer, chosen):
                    return layer.call(x, copy)

            try:
                out = call(0)
                found = self._check(layer, weight, x, out, call(layer.copies - 1), reference)
                if found.get("wrong"):
                    self.log.add("wrong", id=id, reason=found["wrong"])
                    print(f"WRONG {id}: {found['wrong']}", flush=True)
                    continue
                if reference is None and layer.impl == model.DENSE:
                    reference = out
                runner = self.device.runner(call, layer.copies, expected, pool)
                self.log.add("ready", id=id)
                ready.append((layer, id, found, runner, expected))
            except Exception as error:  # WHY any: the others are still to be timed
                self.log.add("failed", id=id, reason=_first_line(error))
                print(f"FAILED {id}: {_first_line(error)}", flush=True)
                self._check_alive()
        for index in range(self.rounds + 1):
            for _, _, _, runner, _ in ready[index % max(1, len(ready)) :] + ready[: index % max(1, len(ready))]:
                if index <= MIN_SAMPLES or runner.spent < _SECONDS_EACH:
                    runner.take_turn()
        lines = []
        for layer, id, found, runner, expected in ready:
            if len(runner.samples) > MIN_SAMPLES:
                del runner.samples[0]  # the first turn wakes the clocks
            lines.append(self._line(layer, weight, m, case, id, found, runner, expected, layer.impl == chosen))
        dense = next((line["median_us"] for line in lines if line["impl"] == model.DENSE), None)
        for line in lines:
            line["dense_ratio"] = dense / line["median_us"] if dense else None
            self.log.add("linear", **line)
        self.log.add("end", id=name)
        own = next((line for line in lines if line["chosen"]), None)
        if own:
            ratio = f"{own['dense_ratio']:.2f}x cuBLAS" if own["dense_ratio"] else ""
            print(
                f"{weight.name} {case}: {own['median_us']:.1f} us, {own['bound_share']:.0%} of the bound, {ratio} ({own['impl']})",
                flush=True,
            )

    def _takes_part(self, weight: Weight, layer: Layer, chosen: str, m: int) -> bool:
        if layer.impl == chosen:
            return True
        return (_SLOW_IMPL not in layer.impl or m <= _SLOW_IMPL_ROWS) and self._can_run(weight, layer.impl, m)

    def _forced(self, layer: Layer, chosen: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if layer.peer or layer.impl == chosen else taut.force_impl(OP, layer.impl)

    def _check(
        self, layer: Layer, weight: Weight, x: torch.Tensor, out: torch.Tensor, again: torch.Tensor, reference: torch.Tensor | None
    ) -> dict[str, Any]:
        activations = weight.format.activations
        error = max_error(out, x, weight.dense if layer.dense is None else layer.dense)
        found: dict[str, Any] = {"max_error": error}
        limit = _PEER_TOLERANCE if layer.peer else TOLERANCES[activations]
        if not error <= limit:
            found["wrong"] = f"off by {error:.2g} of the largest result from float64, more than {limit:g}"
        if reference is not None and layer.dense is None:
            found["norm_error"] = norm = norm_error(out, reference)
            if not norm <= _NORM_TOLERANCES[activations]:
                found["wrong"] = f"differs from cuBLAS by {norm:.2g} of its norm"
        if not layer.peer and not torch.equal(out, again):
            found["wrong"] = "two runs differ"
        return found

    def _expected(self, layer: Layer, weight: Weight, m: int) -> float | None:
        if self.device.model is None or (layer.peer and layer.impl != model.DENSE):
            return None
        format = weight.name if layer.peer else layer.format
        prediction = model.predict_impl(self.device.model, layer.impl, m, weight.n, weight.k, format)
        return prediction.us if prediction else None

    def _line(
        self, layer: Layer, weight: Weight, m: int, case: str, id: str, found: dict[str, Any], runner: Any, expected: float | None,
        chosen: bool,
    ) -> dict[str, Any]:  # fmt: skip
        timing = spread(runner.samples)
        nbytes, operations = model.work(m, weight.n, weight.k, layer.weight_bytes)
        us, peak = timing.median_us, self.ceilings.get(_PEAKS[layer.unit])
        memory_us = nbytes / (self.memory_gb_s * 1e3)
        bound_us = max(memory_us, operations / (peak * 1e6)) if peak else memory_us
        return {
            "id": id, "op": OP, "case": case, "format": layer.format, "beside": weight.name, "impl": layer.impl, "chosen": chosen,
            "peer": layer.peer, "m": m, "n": weight.n, "k": weight.k, "median_us": us, "p10_us": timing.p10_us, "p90_us": timing.p90_us,
            "samples": timing.samples, "launches": runner.launches, "graph": runner.graph, "copies": layer.copies, "nbytes": nbytes,
            "gb_s": nbytes / us / 1e3, "hbm_share": memory_us / us, "tflop_s": operations / us / 1e6,
            "peak_share": operations / (peak * 1e6) / us if peak else None, "bound_share": bound_us / us, "predicted_us": expected,
            "max_error": found["max_error"], "norm_error": found.get("norm_error"),
        }  # fmt: skip

    def _check_alive(self) -> None:
        if self.device.torch_device.type != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device.torch_device).item()
        except RuntimeError as error:
            raise DeviceLost(_first_line(error)) from None


def run(bench: Bench, formats: Sequence[str], shapes: Sequence[tuple[int, int]], rows: Sequence[int], budget: Budget) -> None:
    """Every race that the budget allows, in this order: formats, then layers, then m."""
    device = bench.device
    for format in formats:
        for n, k in shapes:
            names = [f"{OP}/N{n}_K{k}_M{m}/{format}" for m in rows]
            if all(name in bench.log.over for name in names):
                continue
            if not budget.allows_another():
                bench.skip(f"{format}/N{n}_K{k}", "the time was over")
                continue
            free, need = device.free_bytes(), Weight.needed_bytes(n, k, 3 * device.l2_bytes)
            if need > free:
                bench.skip(f"{format}/N{n}_K{k}", f"it needs about {need / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
                continue
            try:
                weight = Weight(n, k, format, device.torch_device, device.dtype)
                layers, chosen = bench.layers(weight, rows)
            except (Skip, ValueError) as reason:
                bench.skip(f"{format}", str(reason))
                break
            except RuntimeError as error:
                bench.log.add("failed", id=f"{format}/N{n}_K{k}", reason=_first_line(error))
                bench._check_alive()
                continue
            for m in rows:
                if not budget.allows_another():
                    bench.skip(f"{format}/N{n}_K{k}_M{m}", "the time was over")
                    continue
                with budget.counted():
                    bench.race(weight, layers, chosen[m], m)
            del weight, layers
            gc.collect()


def fingerprint() -> str:
    """The commit, with ``-dirty`` where the code differs; outside a git checkout a hash of the sources."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("-dirty" if _git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "python", "bench") else "")
    except (OSError, subprocess.CalledProcessError):
        digest = hashlib.sha256()
        for path in sorted((ROOT / "csrc").rglob("*.*")):
            digest.update(path.name.encode() + path.read_bytes())
        return f"sources-{digest.hexdigest()[:12]}"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", "gpu-out")), help=f"folder of {FILE} [default: $OUT, gpu-out]"
    )
    parser.add_argument("--budget", type=float, default=_DEFAULT_BUDGET, metavar="SECONDS", help=f"default: {_DEFAULT_BUDGET:.0f}")
    parser.add_argument("--format", action="append", help=f"such as {model.FORMATS[0]} [default: {', '.join(model.FORMATS)}]")
    parser.add_argument("--m", type=int, action="append", help="rows of x [default: 1 to 8192]")
    parser.add_argument("--shape", action="append", metavar="N,K", help="default: the layers of Llama 8B and 70B")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender [default: 7]")
    parser.add_argument("--no-peers", action="store_true", help="time only taut and cuBLAS")
    parser.add_argument("--resume", action="store_true", help="go on where another run was cut off")
    parser.add_argument(
        "--dry-run",
        nargs="?",
        const="H200",
        choices=list(model.GPUS),
        metavar="DEVICE",
        help="no GPU: tiny cases on the CPU, times of the model",
    )
    parser.add_argument("--table", type=Path, metavar="PATH", help=f"print the table of a {FILE} and stop")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and gives its exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.table:
            print(gpu_table.render(gpu_table.read_lines(args.table)))
            return 0
        return _run(args)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    shapes = [model.parse_shape(text) for text in args.shape] if args.shape else list(DRY_SHAPES if args.dry_run else model.SHAPES)
    rows = args.m or list(DRY_ROWS if args.dry_run else model.ROWS)
    if min(rows) < 1 or args.rounds < 1 or args.budget <= 0:
        raise ValueError("--m and --rounds must be at least 1, --budget above 0")
    for name in args.format or ():
        model.Format.parse(name)
    if not args.dry_run and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device; --dry-run goes through the same code without one")
    budget = Budget(args.budget)
    device = DryDevice(model.GPUS[args.dry_run]) if args.dry_run else CudaDevice()
    formats = args.format or [name.replace("bf16", "f16") if device.dtype == torch.float16 else name for name in model.FORMATS]
    log = Log(args.out / FILE, args.resume)
    try:
        log.add(
            "run", id=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), device=device.name, sm=device.sm,
            sm_count=device.sm_count, l2_bytes=device.l2_bytes, model=device.model.name if device.model else None, commit=fingerprint(),
            torch=torch.__version__, cuda=torch.version.cuda, budget_s=args.budget, **device.facts(),
        )  # fmt: skip
        bench = Bench(device, log, args.rounds, True)
        if args.no_peers:
            bench.peers = [peer for peer in bench.peers if peer.name == model.DENSE]
        lost = False
        try:
            bench.measure_ceilings()
            run(bench, formats, shapes, rows, budget)
        except DeviceLost as error:
            print(f"the device is lost: {error}", flush=True)
            lost = True
        log.add("facts", **device.facts())
        print(gpu_table.render(log.lines))
        if lost:
            return 3
        return 1 if any(line["kind"] in ("wrong", "failed") for line in log.lines) else 0
    finally:
        log.close()


if __name__ == "__main__":
    sys.exit(main())
