"""Attention: many queries at once (attention_prefill), and few against a cache (attention_decode), beside torch's SDPA and FlexAttention.

A case is ``B<batch>_H<query heads>.<key heads>_L<queries>.<keys>_D<head dim>``, causal. A format is the dtype of q, k and v
(``fp32``, ``bf16``, ``fp16``), or for decoding what the cache holds (``kv_<format>``, q in fp32; ``kv_bf16`` with q in bf16). Cold: each
call reads another cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

import taut
from taut.ops import attention_prefill, attention_rules
from taut.ops.kv_append import KvCache, kv_append, kv_channels

from .contenders import Entry, Prepared, copies_for, rotation

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PREFILL_FORMATS = ("fp32", "bf16")
_DECODE_FORMATS = ("kv_float32", "kv_bf16", "kv_fp8", "kv_int8", "kv_int4")
# Of the largest result, against float64 attention of the unrounded k and v.
_TOLERANCE = {
    "fp32": 2e-5,
    "bf16": 2e-2,
    "fp16": 5e-3,
    "kv_float32": 2e-5,
    "kv_bf16": 2e-2,
    "kv_fp8": 2e-1,
    "kv_int8": 3e-2,
    "kv_int4": 3e-1,
}
_CHECKED_QUERIES = 4
_HEADS = {
    (9, 3, 64): "SmolLM2-135M", (32, 8, 64): "Llama 1B", (32, 8, 128): "Llama 8B", (14, 2, 64): "Qwen2 0.5B",
    (12, 12, 64): "BERT base", (4, 1, 256): "Gemma 3 270M",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionCase:
    """``queries`` of each of ``q_heads`` against ``keys``, the newest of which are the queries' own."""

    op: str
    batch: int
    q_heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int

    @property
    def name(self) -> str:
        return f"B{self.batch}_H{self.q_heads}.{self.kv_heads}_L{self.queries}.{self.keys}_D{self.head_dim}"

    @property
    def note(self) -> str:
        return _HEADS.get((self.q_heads, self.kv_heads, self.head_dim), "")

    @property
    def formats(self) -> tuple[str, ...]:
        return _PREFILL_FORMATS if self.op == "attention_prefill" else _DECODE_FORMATS

    @property
    def bound_by_arithmetic(self) -> bool:
        return self.op == "attention_prefill"

    @property
    def float_bytes(self) -> int:
        """What the contenders of a race and its check hold besides cold copies."""
        return self.batch * self.kv_heads * self.keys * self.head_dim * 2 * 24


@dataclass
class AttentionProblem:
    """q, k and v of a case in fp32, and the first and last queries' exact result."""

    case: AttentionCase

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator().manual_seed(self.case.keys)
        self.q = torch.randn(case.batch, case.q_heads, case.queries, case.head_dim, generator=generator)
        self.k, self.v = (torch.randn(case.batch, case.kv_heads, case.keys, case.head_dim, generator=generator) for _ in range(2))

    @cached_property
    def exact(self) -> Tensor:
        case, scale = self.case, self.case.head_dim**-0.5
        parts = []
        for i in self._checked():
            keys = case.keys - case.queries + i + 1
            one, k, v = self.q[:, :, i : i + 1], self.k[:, :, :keys], self.v[:, :, :keys]
            parts.append(attention_rules.reference(one, k, v, scale, causal=True)[0])
        return torch.cat(parts, 2)

    def _checked(self) -> list[int]:
        return sorted({*range(self.case.queries)[:_CHECKED_QUERIES], *range(self.case.queries)[-_CHECKED_QUERIES:]})

    def error(self, out: Tensor) -> float:
        difference = (out[:, :, self._checked()].double() - self.exact).abs().max()
        return float(difference / self.exact.abs().max())

    def prepared(self, format: str, call, out: Tensor, nbytes: int) -> Prepared:
        case = self.case
        flops = attention_prefill.cost(
            case.batch, case.q_heads, case.kv_heads, case.queries, case.keys, case.head_dim, case.head_dim, causal=True
        )["flops"]
        error = self.error(out)
        wrong = None if error <= _TOLERANCE[format] else f"off by {error:.2g} of the largest result"
        integers = format in ("kv_int8", "kv_int4")
        return Prepared(call, nbytes, 0 if integers else flops, flops if integers else 0, error, wrong)


def own_entry(case: AttentionCase, format: str) -> Entry:
    """taut's entry: the impl that the table picks."""
    code = 0 if case.op == "attention_prefill" else _kv_format(format).code
    sizes = {"dtype": _DTYPES[format]} if case.op == "attention_prefill" else {"kv_format": code}
    impl = next(verdict.impl for verdict in taut.explain(case.op, **sizes) if verdict.chosen)
    prepare = _prepare_prefill if case.op == "attention_prefill" else _prepare_decode
    return Entry(case, format, impl, False, lambda problem, cold_bytes: prepare(problem, format, cold_bytes))


def _kv_format(format: str):
    return taut.formats.kv.kv_format({"kv_bf16": "bfloat16"}.get(format, format.removeprefix("kv_")))


def _prepare_prefill(problem: AttentionProblem, format: str, cold_bytes: int) -> Prepared:
    case = problem.case
    q, k, v = (t.to(_DTYPES[format]) for t in (problem.q, problem.k, problem.v))
    op, scale = torch.ops.taut.attention_prefill, case.head_dim**-0.5

    def call() -> Tensor:
        return op(q, k, v, scale, True, 0, 0.0, None, None, None, False)[0]

    return problem.prepared(format, call, call(), (q.nbytes * 2 + k.nbytes * 2))


def _prepare_decode(problem: AttentionProblem, format: str, cold_bytes: int) -> Prepared:
    case, kv = problem.case, _kv_format(format)
    q = problem.q.bfloat16() if format == "kv_bf16" else problem.q
    caches: list[KvCache] = []
    channels = kv_channels(problem.k, problem.v) if kv.has_codes else None
    nbytes = int(case.batch * case.kv_heads * case.keys * kv.token_bytes(case.head_dim, case.head_dim))
    for _ in range(copies_for(nbytes, cold_bytes)):
        caches.append(KvCache.empty(kv, case.batch, case.kv_heads, case.keys, case.head_dim).with_channels(channels))
        kv_append(problem.k, problem.v, caches[-1])
    rest = (case.head_dim, case.keys, None, case.head_dim**-0.5, True, 0, 0.0, None, None, None, False)
    take, op = rotation([(q, *cache.tensors(), *rest) for cache in caches]), torch.ops.taut.attention_decode

    def call() -> Tensor:
        return op(*take())[0]

    return problem.prepared(format, call, call(), nbytes)


def sdpa_entry(case: AttentionCase, format: str) -> Entry:
    """torch's scaled_dot_product_attention in one dtype, the heads of a group sharing k and v as it lets them."""

    def prepare(problem: AttentionProblem, cold_bytes: int) -> Prepared:
        q, k, v = (t.to(_DTYPES[format]) for t in (problem.q, problem.k, problem.v))
        queries, keys = case.queries, case.keys
        mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if 1 < queries < keys else None
        take = rotation([(k, v), *((k.clone(), v.clone()) for _ in range(copies_for(k.nbytes * 2, cold_bytes) - 1))])

        def call() -> Tensor:
            return F.scaled_dot_product_attention(q, *take(), mask, is_causal=1 < queries == keys, enable_gqa=True)

        return problem.prepared(format, call, call(), k.nbytes * 2 + (q.nbytes * 2 if case.bound_by_arithmetic else 0))

    return Entry(case, format, f"torch_sdpa_{format}", True, prepare)


def flex_entry(case: AttentionCase, format: str) -> Entry:
    """torch's flex_attention in one dtype, compiled for the case, with a block mask where there are several queries."""

    def prepare(problem: AttentionProblem, cold_bytes: int) -> Prepared:
        from torch.nn.attention import flex_attention as flex

        q, k, v = (t.to(_DTYPES[format]) for t in (problem.q, problem.k, problem.v))
        queries, offset = case.queries, case.keys - case.queries
        visible = lambda b, h, i, j: i + offset >= j  # noqa: E731
        mask = flex.create_block_mask(visible, None, None, queries, case.keys, device="cpu") if queries > 1 else None
        take = rotation([(k, v), *((k.clone(), v.clone()) for _ in range(copies_for(k.nbytes * 2, cold_bytes) - 1))])
        compiled = torch.compile(flex.flex_attention, dynamic=False)

        def call() -> Tensor:
            with torch.no_grad():
                return compiled(q, *take(), block_mask=mask, enable_gqa=True)

        return problem.prepared(format, call, call(), k.nbytes * 2 + (q.nbytes * 2 if case.bound_by_arithmetic else 0))

    return Entry(case, format, f"torch_flex_{format}", True, prepare)


def races(grid: bool) -> Iterator[list[Entry]]:
    """The headline cases; ``grid``: sixty small and large ones, in one precision a race, for who is never to be slower."""
    if not grid:
        for queries in (128, 512, 1024, 2048, 4096, 8192):
            yield _race(AttentionCase("attention_prefill", 1, 32, 8, queries, queries, 128))
        yield _race(AttentionCase("attention_prefill", 1, 9, 3, 512, 512, 64))
        for batch, keys in ((1, 128), (1, 512), (1, 1024), (1, 4096), (1, 16384), (1, 32768), (4, 1024), (16, 1024), (64, 1024)):
            yield _race(AttentionCase("attention_decode", batch, 32, 8, 1, keys, 128))
        yield _race(AttentionCase("attention_decode", 1, 9, 3, 1, 1024, 64))
        return
    for format in ("fp32", "bf16"):
        for heads in ((9, 3, 64), (32, 8, 128), (14, 2, 64), (12, 12, 64), (4, 1, 256)):
            for batch, queries, keys in ((1, 64, 64), (1, 512, 512), (4, 128, 640)):
                case = AttentionCase("attention_prefill", batch, *heads[:2], queries, keys, heads[2])
                yield [own_entry(case, format), sdpa_entry(case, format)]
            for batch, queries, keys in ((1, 1, 256), (1, 1, 4096), (8, 1, 1024)):
                case = AttentionCase("attention_decode", batch, *heads[:2], queries, keys, heads[2])
                yield [own_entry(case, {"fp32": "kv_float32", "bf16": "kv_bf16"}[format]), sdpa_entry(case, format)]


def _race(case: AttentionCase) -> list[Entry]:
    peers = [entry(case, format) for entry in (sdpa_entry, flex_entry) for format in ("fp32", "bf16")]
    return [*(own_entry(case, format) for format in case.formats), *peers]


def where_slower(rows) -> list[str]:
    """Which of taut's rows SDPA beat in the same race, in the same precision."""
    alike = {"kv_float32": "fp32", "kv_bf16": "bf16"}
    return [
        f"slower: {own.entry.id} {own.timing.median_us:.1f} us, {rival.entry.impl} {rival.timing.median_us:.1f} us"
        for own in rows
        for rival in rows
        if rival.entry.peer and not own.entry.peer and rival.entry.format == alike.get(own.entry.format, own.entry.format)
        if own.timing.median_us > rival.timing.median_us
    ]
