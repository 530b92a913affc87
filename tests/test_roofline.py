"""taut.roofline: the loops do the work they say, on every impl, and what they measure makes sense."""

from __future__ import annotations

import math

import pytest
import torch

import taut
from taut.ops import roofline as op
from taut.roofline import Roofline, last_cache_bytes, roofline

OP = "roofline"
IMPLS = taut.list_impls()[OP]


@pytest.fixture(params=(1, 2, 3))
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("streams", op.STREAMS)
@pytest.mark.parametrize("words", [0, 1, 15, 16, 511, 512, 4096 + 7, 100_003])
def test_read_sums_every_word(impl: str, threads: int, words: int, streams: int, forced) -> None:
    forced(impl)
    generator = torch.Generator().manual_seed(words)
    buffer = torch.randint(-(2**62), 2**62, (words,), generator=generator)
    assert int(op.roofline(buffer, "read", streams)) == op.reference(buffer)


def test_read_of_unaligned_words(impl: str, forced) -> None:
    forced(impl)
    buffer = torch.arange(5000)[3:]
    assert int(op.roofline(buffer, "read", 2)) == op.reference(buffer)


@pytest.mark.parametrize("ceiling", ["fma_f32", "dot_int8", "dot_bf16"])
def test_multiply_adds_are_counted_by_doing_them(impl: str, threads: int, ceiling: str, forced) -> None:
    forced(impl)
    nothing = torch.empty(0, dtype=torch.int64)
    one = int(op.roofline(nothing, ceiling, steps=1))
    assert one > 0
    assert one % threads == 0
    for steps in (0, 2, 4095, 4096, 4097, 20_001):  # around the place where int16 sums are widened
        assert int(op.roofline(nothing, ceiling, steps=steps)) == steps * one


@pytest.mark.parametrize("ceiling", ["fma_f32", "dot_bf16"])
def test_floats_count_exactly_up_to_the_limit(impl: str, ceiling: str, forced) -> None:
    forced(impl)
    nothing = torch.empty(0, dtype=torch.int64)
    one = int(op.roofline(nothing, ceiling, steps=1))
    assert int(op.roofline(nothing, ceiling, steps=op.MAX_STEPS)) == op.MAX_STEPS * one


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.taut.roofline.default, (torch.arange(1000), 0, 2, 0))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(8, dtype=torch.int64), "write"), "unknown ceiling 'write'; accepted: read"),
        ((torch.zeros(8), "read"), "buffer must be a contiguous int64"),
        ((torch.zeros(8, dtype=torch.int64)[::2], "read"), "buffer must be a contiguous int64"),
        ((torch.zeros(8, dtype=torch.int64), "read", 3), "streams must be 1, 2, 4 or 8, got 3"),
        ((torch.zeros(8, dtype=torch.int64), "fma_f32", 1, -1), "steps must be 0 to"),
        ((torch.zeros(8, dtype=torch.int64), "fma_f32", 1, op.MAX_STEPS + 1), "steps must be 0 to"),
    ],
)
def test_bad_input(arguments: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        op.roofline(*arguments)


def test_the_op_itself_refuses_too() -> None:
    for bad in ((torch.zeros(8), 0, 1, 0), (torch.zeros(8, dtype=torch.int64), 4, 1, 0), (torch.zeros(8, dtype=torch.int64), 0, 5, 0)):
        with pytest.raises(RuntimeError, match="roofline: "):
            torch.ops.taut.roofline(*bad)


def test_what_is_measured_is_positive_finite_and_kept() -> None:
    found = roofline()
    assert found.threads == torch.get_num_threads()
    assert found.impl in IMPLS
    for value in (found.read_gb_s, found.best_read_gb_s, found.fma_gflop_s, found.dot_gop_s, found.bf16_gflop_s):
        assert math.isfinite(value)
        assert value > 0
    assert found.buffer_bytes > 0
    assert found.read_streams in op.STREAMS
    assert roofline() is found


def test_a_forced_impl_is_measured_by_itself() -> None:
    found = {}
    for name in IMPLS:
        with taut.force_impl("roofline", name):
            if any(verdict.chosen for verdict in taut.explain("roofline")):
                found[name] = roofline()
                assert found[name].impl == name
    if "cpu_avx2" in found:  # 16 multiply-adds an instruction against one: true on the busiest machine
        assert found["cpu_avx2"].dot_gop_s > found["cpu_scalar"].dot_gop_s


def test_least_seconds_is_the_slower_of_memory_and_arithmetic() -> None:
    ceilings = Roofline(2, "cpu_scalar", 1 << 20, 1 << 28, 10.0, 20.0, 4, 100.0, 400.0, 200.0)
    assert ceilings.best_read_gb_s == 20.0
    assert ceilings.least_seconds(20e9) == pytest.approx(1.0)
    assert ceilings.least_seconds(1e9, flops=50e9) == pytest.approx(0.5)
    assert ceilings.least_seconds(1e9, flops=50e9, int8_ops=200e9) == pytest.approx(1.0)
    assert ceilings.least_seconds(1e9, flops=50e9, bf16_flops=200e9) == pytest.approx(1.5)
    assert Roofline(2, "cpu_scalar", 1, 1, 10.0, None, 4, 1.0, 1.0, 1.0).best_read_gb_s == 10.0


def test_best_of_takes_the_higher_of_each() -> None:
    first = Roofline(2, "cpu_scalar", 1, 1, 10.0, None, 1, 100.0, 400.0, 200.0)
    second = Roofline(2, "cpu_scalar", 1, 1, 9.0, 20.0, 8, 110.0, 300.0, 100.0)
    assert first.best_of(second) == Roofline(2, "cpu_scalar", 1, 1, 10.0, 20.0, 8, 110.0, 400.0, 200.0)
    assert second.best_of(first) == first.best_of(second)
    assert first.best_of(first) == first
    with pytest.raises(ValueError, match="ceilings of 2 threads of cpu_scalar and of 1 threads of cpu_scalar"):
        first.best_of(Roofline(1, "cpu_scalar", 1, 1, 9.0, 20.0, 8, 110.0, 300.0, 100.0))


def test_last_cache_has_a_size() -> None:
    assert last_cache_bytes() >= 1 << 16
