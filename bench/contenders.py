"""What competes in a case, and taut's own entries."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import taut
from taut.formats import ACTIVATIONS
from taut.ops import quant_linear, quantize_weight
from taut.ops.pack_weight import canonical, dequantize_weight, pack_weight, unpack_weight

from .cases import DTYPES, MODES, Case, parse_format
from .problem import Problem, max_error

_OWN_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
_COMPARED_ROWS = 64  # of quantize_weight, against the scalar impl


@dataclass
class Prepared:
    """A contender ready to run. ``call`` does ``layers`` computations, each on other weights where they are cold.

    ``nbytes``, ``flops``, ``int8_ops``, ``bf16_flops``: counted work of one computation. ``max_error``: what the check found (see
    ``problem.max_error``); ``wrong``: why the result is wrong, or None. ``warm_bytes``: the bytes that a warm run finds in cache.
    """

    call: Callable[[], object]
    nbytes: int
    flops: float
    int8_ops: float
    bf16_flops: float
    max_error: float
    wrong: str | None = None
    layers: int = 1
    keep: Any = None  # what must outlive the call


def split_flops(count: float, arithmetic: str) -> tuple[float, float, float]:
    """``count`` operations as (fp32, int8, bf16) ones; ``arithmetic``: "a8", "oa8" and "bf16" are of those two."""
    int8, bf16 = arithmetic in ("a8", "oa8"), arithmetic == "bf16"
    return (0.0 if int8 or bf16 else count, count if int8 else 0.0, count if bf16 else 0.0)


@dataclass(frozen=True)
class Entry:
    """One line of a race before it is prepared."""

    case: Case
    format: str
    impl: str
    peer: bool
    prepare: Callable[[Problem, int], Prepared]  # (problem, bytes that the copies of the weights must exceed; 0 = one, warm)

    @property
    def id(self) -> str:
        return f"{self.case.op}/{self.case.name}/{self.format}/{self.impl}"


class Skip(Exception):
    """A contender cannot take part; the message says why."""


def copies_for(nbytes: int, cold_bytes: int) -> int:
    """How many copies of weights of ``nbytes`` exceed ``cold_bytes`` together; 1 where they are to be warm."""
    return cold_bytes // max(1, nbytes) + 1 if cold_bytes else 1


def rotation(copies: list[Any]) -> Callable[[], Any]:
    """Gives the copies one after the other, for ever."""
    return itertools.cycle(copies).__next__


def default_impl(case: Case, format: str) -> str:
    """The impl that the op's table picks for a case."""
    if case.op == "pack_weight":
        return "cpu_scalar"
    return next(verdict.impl for verdict in taut.explain(case.op, **_sizes(case, format)) if verdict.chosen)


def impls(case: Case, format: str) -> list[str]:
    """Every impl that can run a case, the table's choice first."""
    chosen = default_impl(case, format)
    if case.op == "pack_weight":
        return [chosen]
    return [chosen, *(name for name in taut.list_impls()[case.op] if name != chosen and _can_run(case, format, name))]


def own_entry(case: Case, format: str, impl: str) -> Entry:
    """taut's entry. ``impl`` is forced where the table would pick another."""
    prepare = {"quant_linear": _prepare_linear, "quantize_weight": _prepare_quantize, "pack_weight": _prepare_pack}[case.op]
    return Entry(case, format, impl, False, lambda problem, cold_bytes: prepare(problem, format, impl, cold_bytes))


def _sizes(case: Case, format: str) -> dict[str, int]:
    if case.op != "quant_linear":
        return {}
    weights, activations = parse_format(format)
    return {
        "M": case.m, "N": case.n, "K": case.k, "format": weights.code, "group_size": weights.group_size,
        "zeros": int(weights.zeros), "activations": ACTIVATIONS[MODES.get(activations, "float")], "dtype": int(activations == "bf16"),
    }  # fmt: skip


def _can_run(case: Case, format: str, impl: str) -> bool:
    with taut.force_impl(case.op, impl):
        return any(verdict.impl == impl and verdict.chosen for verdict in taut.explain(case.op, **_sizes(case, format)))


def _forced(op: str, impl: str, call: Callable[[], object], default: bool) -> Callable[[], object]:
    """``call`` with ``impl`` forced; as users call it where the table picks ``impl`` anyway."""
    if default:
        return call

    def forced() -> object:
        with taut.force_impl(op, impl):
            return call()

    return forced


def _prepare_linear(problem: Problem, format: str, impl: str, cold_bytes: int) -> Prepared:
    case = problem.case
    weights, activations = parse_format(format)
    mode = MODES.get(activations, "float")
    x = problem.x.to(DTYPES[activations])
    packed = problem.packed(weights, copies_for(weights.layout_bytes(case.n, case.k), cold_bytes))
    take, arguments = rotation(packed), (None, case.n, weights.code, weights.group_size, weights.zeros, ACTIVATIONS[mode])
    op = torch.ops.taut.quant_linear
    call = _forced(case.op, impl, lambda: op(x, take(), *arguments), impl == default_impl(case, format))
    out = call()
    w = problem.dense(weights)
    exact = max_error(out, x, problem.dense(weights, mode), mode)
    wrong = None if exact <= _OWN_TOLERANCE[x.dtype] else f"off by {exact:.2g} of the largest result from its definition"
    counted = quant_linear.cost(case.m, case.n, case.k, weights, x.element_size())
    arithmetic = "a8" if mode != "float" else activations
    return Prepared(call, counted["bytes"], *split_flops(counted["flops"], arithmetic), max_error(out, x, w), wrong)


def _prepare_quantize(problem: Problem, format: str, impl: str, cold_bytes: int) -> Prepared:
    case = problem.case
    weights, source = parse_format(format)
    w = problem.w.to(DTYPES[source])
    take = rotation([w.clone() for _ in range(copies_for(w.nbytes, cold_bytes))])
    call = _forced(
        case.op,
        impl,
        lambda: torch.ops.taut.quantize_weight(take(), weights.code, weights.group_size, weights.zeros),
        impl == default_impl(case, format),
    )
    found = canonical(call(), weights)
    with taut.force_impl(case.op, "cpu_scalar"):
        expected = quantize_weight.quantize_weight(w[:_COMPARED_ROWS], weights)
    same = all((a is None and b is None) or torch.equal(a[:_COMPARED_ROWS], b) for a, b in zip(found, expected, strict=True))
    packed = pack_weight(*found, case.k, weights)
    largest = float(w.float().abs().max())
    error = float((dequantize_weight(packed, case.n, case.k, weights) - w.float()).abs().max()) / largest
    counted = quantize_weight.cost(case.n, case.k, weights, w.element_size())
    return Prepared(call, counted["bytes"], counted["flops"], 0, 0, error, None if same else "its bits differ from the scalar impl's")


def _prepare_pack(problem: Problem, format: str, impl: str, cold_bytes: int) -> Prepared:
    case = problem.case
    weights, _ = parse_format(format)
    parts = problem.canonical(weights)
    codes, scales, zeros, global_scale = parts
    nbytes = weights.canonical_bytes(case.n, case.k)
    take = rotation([codes.clone() for _ in range(copies_for(nbytes, cold_bytes))])

    def call() -> Tensor:
        return torch.ops.taut.pack_weight(take(), scales, zeros, case.k, weights.code, weights.group_size, 0, global_scale)

    back = unpack_weight(call(), case.n, case.k, weights)
    pairs = zip(back, parts, strict=True)
    same = all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    return Prepared(
        call, nbytes + weights.layout_bytes(case.n, case.k), 0, 0, 0, 0.0, None if same else "unpacking does not give the same bits back"
    )
