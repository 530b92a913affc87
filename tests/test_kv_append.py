"""kv_append and kv_read, every impl, against the definition in float64, byte by byte."""

from __future__ import annotations

import itertools
import random
import zlib
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import taut
from cases import DTYPES, covering_set
from checks import FP32_ROUNDING, assert_same_bits
from kv_caches import CACHE_ORDERS, CODES, FLOATS, FORMATS, blank, by_sequence, codes, filled, numbers, stored
from taut.formats.kv import KV_FORMATS, KvFormat
from taut.ops import kv_append as op
from taut.ops.kv_append import KvCache, kv_append, kv_channels, kv_read

OP = "kv_append"


@dataclass(frozen=True)
class AppendCase:
    """``tokens`` new ones from ``start`` on (and ``b`` later in sequence b, with ``starts``) in a cache for ``capacity``."""

    format: KvFormat
    dims: tuple[int, int] = (64, 64)
    order: str = "contiguous"
    channels: bool = False
    dtype: torch.dtype = torch.float32
    span: tuple[int, int] = (5, 23)
    starts: bool = False
    kv_heads: int = 2
    batch: int = 2
    capacity: int = 70

    def __str__(self) -> str:
        flags = "-".join(name for name in ("channels", "starts") if getattr(self, name))
        sizes = f"B{self.batch}_H{self.kv_heads}_T{self.span[0]}.{self.span[1]}_D{self.dims[0]}.{self.dims[1]}"
        return f"{self.format.name}-{sizes}-{self.order}-{str(self.dtype).removeprefix('torch.')}-{flags}"

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    def make(self) -> tuple[KvCache, list[Tensor], Tensor, Tensor, Tensor | None]:
        """An empty cache, its memory, ``k_new``, ``v_new`` and ``starts``; keys have channels that are large for every token."""
        generator = torch.Generator().manual_seed(self.seed)
        cache, memory = blank(self.format, self.batch, self.kv_heads, self.capacity, self.dims, self.order, seed=self.seed)
        k, v = (torch.randn(self.batch, self.kv_heads, self.span[1], width, generator=generator) for width in self.dims)
        k[..., torch.rand(self.dims[0], generator=generator) < 0.1] += 20
        k, v = k.to(self.dtype), v.transpose(1, 2).contiguous().transpose(1, 2).to(self.dtype)
        starts = torch.arange(self.batch).mul(7).to(torch.int32) if self.starts else None
        if self.channels:
            offsets = torch.randn(self.batch, self.kv_heads, 1, sum(self.dims), generator=generator)
            cache = cache.with_channels(torch.cat((offsets, torch.rand(offsets.shape, generator=generator) * 3 + 0.1), 2))
        return cache, memory, k, v, starts

    def touched(self, cache: KvCache, starts: Tensor | None) -> Tensor:
        """``[B, capacity]``: where the new tokens are."""
        at = torch.arange(cache.capacity)[None] - self.span[0] - (0 if starts is None else starts[:, None])
        return ((at >= 0) & (at < self.span[1])).expand(self.batch, -1)


_DIMS = ((1, 1), (33, 40), (40, 33), (64, 64), (80, 80), (112, 128), (128, 112), (256, 256), (64, 33), (7, 256))
_SPANS = ((0, 1), (5, 1), (0, 16), (16, 16), (15, 2), (3, 40), (0, 0), (31, 18), (0, 56))
CASES = tuple(
    AppendCase(*row) for row in covering_set((FORMATS, _DIMS, CACHE_ORDERS, (False, True), DTYPES, _SPANS, (False, True), (1, 3), (1, 3)))
)


def in_stored_form(x: Tensor, cache: KvCache, first: int) -> Tensor:
    """``x [B, Hkv, L, width]`` less its channels' offsets, by their factors, in fp32 as the contract has it."""
    if cache.channels is None:
        return x.float()
    part = cache.channels[:, :, :, first : first + x.shape[-1]]
    return (x.float() - part[:, :, 0, None]) / part[:, :, 1, None]


def expected_stored(case: AppendCase, cache: KvCache, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(op.reference(in_stored_form(x, cache, first), case.format) for x, first in ((k, 0), (v, cache.head_dim)))


def check_stored(case: AppendCase, impl: str, special: Tensor | None = None) -> None:
    cache, memory, k, v, starts = case.make()
    if special is not None:
        k, v = (special[:, : x.shape[-1]].to(case.dtype, copy=True)[None, None].expand(case.batch, case.kv_heads, -1, -1) for x in (k, v))
    inputs, context = [k.clone(), v.clone()], f"{impl} on {case}, seed {case.seed}"
    kv_append(k, v, cache, case.span[0], starts)
    touched = case.touched(cache, starts)
    for x, before in zip((k, v), inputs, strict=True):
        assert_same_bits(x, before, f"{context}: an input was written to")
    # What is stored: to the last bit.
    found_all, expected_all = stored(cache, case.batch), expected_stored(case, cache, k, v)
    for name, found, expected in zip("kv", found_all, expected_all, strict=True):
        found = torch.stack([found[b][:, touched[b]] for b in range(case.batch)])
        same = (found == expected) | (found.isnan() & expected.isnan())
        at = (~same).nonzero()
        assert not len(at), (
            f"{context}: {name}{at[0].tolist()} is {found[tuple(at[0])]}, expected {expected[tuple(at[0])]}; {len(at)} differ"
        )
    # What is not written to: what fills up blocks, other tokens and pages, what lies between.
    if case.format.has_codes:
        for values, width, scales in ((False, case.dims[0], cache.k_scales), (True, case.dims[1], cache.v_scales)):
            blanks = 15 if case.format.bits == 4 else 127 if values else 255
            found = codes(cache, values)
            assert bool((found[..., width:] == blanks).all()), f"{context}: codes past the head dim were written to"
            assert untouched(found == blanks, cache, touched), f"{context}: codes of other tokens were written to"
            assert untouched(scales.view(torch.int16) == -1, cache, touched), f"{context}: scales of other tokens were written to"
    else:
        for t in (cache.k, cache.v):
            bits = t.contiguous().view(torch.uint8).view(*t.shape[:3], -1) == 255
            assert untouched(bits, cache, touched), f"{context}: other tokens were written to"
    # What is read: numbers that codes and scales stand for are exact in fp32, a factor and an offset round once each.
    read = kv_read(cache, case.batch, 0, cache.capacity)
    for name, found, exact, plain in zip("kv", read, numbers(cache, case.batch), found_all, strict=True):
        found, exact, plain = ([x[b][:, touched[b]] for b in range(case.batch)] for x in (found, exact, plain))
        found, exact, plain = torch.stack(found), torch.stack(exact), torch.stack(plain)
        assert bool((found.isnan() == exact.isnan()).all()) and found.dtype == torch.float32
        sizes = 0 if cache.channels is None else exact.abs() + (factors_of(cache, name) * plain).abs()
        bound = sizes * FP32_ROUNDING * (1 + 2**-20)
        same = (found == exact.float()) | found.isnan() | (exact.float().isfinite() & ((found.double() - exact).abs() <= bound))
        at = (~same).nonzero()
        assert not len(at), f"{context}: {name}{at[0].tolist()} is read as {found[tuple(at[0])]}, and is {exact[tuple(at[0])]}"
    for t in (cache.k, cache.v, *(t for t in (cache.k_scales, cache.v_scales) if t is not None)):
        t.copy_(torch.full((*t.shape, t.element_size()), 255, dtype=torch.uint8).view(t.dtype)[..., 0])
    for t in memory:
        assert bool((t.contiguous().view(torch.uint8) == 255).all()), f"{context}: memory beside the cache was written to"
    kv_append(k, v, cache, case.span[0], starts)
    again = stored(cache, case.batch)
    for found, expected in zip(again, found_all, strict=True):
        assert_same_bits(found, expected, f"{context}: twice")


def factors_of(cache: KvCache, name: str) -> Tensor:
    part = slice(None, cache.head_dim) if name == "k" else slice(cache.head_dim, None)
    return cache.channels[:, :, 1, None, part].double()


def untouched(as_it_was: Tensor, cache: KvCache, touched: Tensor) -> bool:
    """Whether ``as_it_was [pages, Hkv, T, ...]`` holds of every token but those ``touched [B, capacity]``."""
    others = by_sequence(as_it_was, cache.block_table, len(touched))
    fine = all(bool(others[b][:, ~touched[b]].all()) for b in range(len(touched)))
    if cache.block_table is not None:
        free = torch.ones(len(as_it_was), dtype=torch.bool)
        free[cache.block_table.long().flatten()] = False
        assert free.sum() == 3
        fine = fine and bool(as_it_was[free].all())
    return fine


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stores_what_the_definition_says(impl, case, forced):
    forced(impl)
    check_stored(case, impl)


def special_rows() -> Tensor:
    """Rows of 256: all zeros, one number, huge, tiny, subnormal, a NaN, infinities, halves between codes, of one sign."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(24, 256, generator=generator)
    x[0] = 0
    x[1] = -0.0
    x[2], x[2, 0] = 0, 3
    x[3], x[3, 0] = 0, -3
    for row, size in enumerate((1e38, 1e7, 3e5, 1e-4, 1e-7, 1e-8, 1e-20, 1e-40, 1e-45), 4):
        x[row] *= size
    x[13, 0] = torch.nan
    x[14, 0], x[15, 0] = torch.inf, -torch.inf
    x[16, 0], x[17, 0] = torch.finfo(torch.float32).max, torch.finfo(torch.float32).min
    x[18] = torch.arange(256) / 2 - 64 + 0.5  # a step of 1/2 or 1: every other one is halfway between two codes
    x[18, 0] = 63.5
    x[19] = torch.arange(256) % 15 / 2.0  # int4: a step of 1
    x[20], x[21] = x[20].abs(), -x[21].abs()
    x[22] = torch.tensor([448.0, 464, 465, 1e3, 2.0**-10, 1.5 * 2.0**-9, 2.5 * 2.0**-9, 1 + 2.0**-4]).repeat(32)  # e4m3's corners
    x[23] = 65504 * 127.0 * torch.linspace(-2, 2, 256)  # the largest scale, and past it
    return x


@pytest.mark.parametrize("dims", ((1, 40), (40, 1), (256, 77)), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_rows_of_every_kind(impl, format, dims, forced):
    forced(impl)
    for dtype in DTYPES:
        for channels in (False, True):
            check_stored(AppendCase(format, dims, dtype=dtype, channels=channels, span=(9, 24)), impl, special_rows())


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_the_reference_is_what_is_read(impl, format, forced):
    """Of the whole path, with channels and without, against the contract's own float64."""
    forced(impl)
    for channels in (False, True):
        cache, _, k, v, _ = AppendCase(format, (112, 64), channels=channels, span=(0, 70)).make()
        kv_append(k, v, cache)
        for x, found, first in zip((k, v), kv_read(cache, 2, 0, 70), (0, 112), strict=True):
            part = None if not channels else cache.channels[:, :, :, None, first : first + x.shape[-1]]
            expected = op.reference(x, format, *(() if part is None else part.unbind(2)))
            terms = 0 if part is None else expected.abs() + (expected - part[:, :, 0]).abs()
            assert bool(((found.double() - expected).abs() <= FP32_ROUNDING * (1 + 2**-20) * terms).all())
            # And near x: a step between codes is at most the row's largest number by 7, or by 127.
            if format.has_codes:
                y = x if part is None else (x - part[:, :, 0]) / part[:, :, 1]
                step = y.abs().amax(-1, keepdim=True) / (7 if format.bits == 4 else 127) * (1 if part is None else part[:, :, 1])
                assert bool(((found - x).abs() <= 0.501 * step + 1e-5).all())


@pytest.mark.parametrize("order", CACHE_ORDERS)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_pieces_are_the_same_as_all_at_once(impl, format, order, forced):
    """In turn, as decoding has it, and in any order: in int4 two tokens share a byte."""
    forced(impl)
    case = AppendCase(format, (40, 33), order, channels=True, dtype=torch.bfloat16, span=(0, 67))
    cache, memory, k, v, _ = case.make()
    kv_append(k, v, cache)
    whole = [t.clone() for t in memory]
    draw = random.Random(1)
    for cuts in ((0, 1, 2, 15, 17, 40, 66, 67), tuple(range(68))):
        for shuffled in (False, True):
            other, memory, *_ = case.make()
            pieces = list(itertools.pairwise(cuts))
            if shuffled:
                draw.shuffle(pieces)
            for begin, end in pieces:
                kv_append(k[:, :, begin:end], v[:, :, begin:end], other, begin)
            for found, expected in zip(memory, whole, strict=True):
                assert_same_bits(found.contiguous(), expected.contiguous(), f"{impl}, {format.name}: pieces")


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_batch_and_starts_and_threads_change_nothing(impl, format, forced, threads):
    forced(impl)
    case = AppendCase(format, (128, 96), "paged", dtype=torch.float16, kv_heads=3, batch=3, span=(2, 150), capacity=192, starts=True)
    threads(1)
    cache, memory, k, v, starts = case.make()
    kv_append(k, v, cache, 2, starts)
    for count in (2, 3):
        threads(count)
        other, found, *_ = case.make()
        kv_append(k, v, other, 2, starts)
        for one, expected in zip(found, memory, strict=True):
            assert_same_bits(one, expected, f"{impl}: {count} threads")
        for one, expected in zip(kv_read(other, 3, 0, 170), kv_read(cache, 3, 0, 170), strict=True):
            assert_same_bits(one, expected, f"{impl}: read by {count} threads")
    threads(1)
    for one, expected in zip(kv_read(other, 3, 0, 170), kv_read(cache, 3, 0, 170), strict=True):
        assert_same_bits(one, expected, f"{impl}: read by one thread")
    for b in range(3):
        alone = replace(cache, k=cache.k.clone(), v=cache.v.clone(), block_table=cache.block_table[b : b + 1].contiguous())
        kv_append(k[b : b + 1], v[b : b + 1], alone, 2 + int(starts[b]))
        assert_same_bits(alone.k, cache.k, f"{impl}: sequence {b} alone")
        assert_same_bits(alone.v, cache.v, f"{impl}: sequence {b} alone")


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_reads_any_span_in_any_dtype(impl, format, forced):
    forced(impl)
    for order in CACHE_ORDERS:
        cache, _, k, v, _ = AppendCase(format, (33, 40), order, channels=True, span=(0, 70)).make()
        kv_append(k, v, cache)
        whole = kv_read(cache, 2, 0, 70)
        for begin, length in ((0, 1), (17, 0), (13, 40), (69, 1)):
            for dtype in DTYPES:
                for found, one in zip(kv_read(cache, 2, begin, length, dtype), whole, strict=True):
                    expected = one[:, :, begin : begin + length].to(dtype)
                    assert_same_bits(found, expected.contiguous(), f"{impl}, {format.name}, {order}: {length} from {begin} on")


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_lies_on_the_device_is_not_trusted(impl, format, forced):
    """Starts and pages out of range, which the CPU refuses, and CUDA's host does not look at: nothing is stored there, NaN is read."""
    if not impl.startswith("cuda"):
        pytest.skip("it refuses them: test_bad_call_is_an_error")
    forced(impl)
    case = AppendCase(format, (40, 33), "paged", span=(0, 30), batch=3, capacity=96)
    cache, memory, k, v, _ = case.make()
    table = cache.block_table.clone()
    table[0, 1], table[1, 0], table[2, 2] = -1, len(cache.k), 2**31 - 1
    bad = replace(cache, block_table=table)
    starts = counts(20, -7, 80)  # tokens 20 to 49, -7 to 22 and 80 to 109: of a page each that is not there, before 0, past 95
    kv_append(k, v, bad, 0, starts)
    expected_cache, expected, *_ = case.make()
    kv_append(k[:1, :, :12], v[:1, :, :12], replace(expected_cache, block_table=cache.block_table[:1].contiguous()), 20)
    for found, one in zip(memory, expected, strict=True):
        assert_same_bits(found.contiguous(), one.contiguous(), f"{impl}: what is stored")
    for t, whole in zip(kv_read(bad, 3, 0, 96), kv_read(cache, 3, 0, 96), strict=True):
        there = torch.ones(3, 96, dtype=torch.bool)
        there[0, 32:64], there[1, :32], there[2, 64:] = False, False, False
        assert bool(t.transpose(1, 2)[~there].isnan().all())
        assert_same_bits(t.transpose(1, 2)[there], whole.transpose(1, 2)[there], f"{impl}: what is read")


@pytest.mark.parametrize("shape", ((0, 2, 5), (2, 2, 0)), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_nothing_to_do(impl, format, shape, forced):
    forced(impl)
    cache, memory = blank(format, shape[0], 2, 32, (8, 8))
    kv_append(torch.zeros(*shape, 8), torch.zeros(*shape, 8), cache)
    assert all(bool((t.contiguous().view(torch.uint8) == 255).all()) for t in memory)
    assert kv_read(cache, shape[0], 0, shape[2])[0].shape == (*shape, 8)
    empty = KvCache.empty(format, 2, 2, 0, 8)
    kv_append(torch.zeros(2, 2, 0, 8), torch.zeros(2, 2, 0, 8), empty)
    assert empty.capacity == 0 and kv_read(empty, 2, 0, 0)[1].shape == (2, 2, 0, 8)


def test_every_impl_gives_the_same_bits():
    for case in CASES[::5] + tuple(AppendCase(format, (256, 77), span=(0, 24)) for format in FORMATS):
        kept = {}
        for impl in taut.list_impls()[OP]:
            cache, memory, k, v, starts = case.make()
            with taut.force_impl(OP, impl):
                if not any(verdict.chosen and verdict.impl == impl for verdict in taut.explain(OP)):
                    continue  # not on this processor
                kv_append(k, v, cache, case.span[0], starts)
                kept[impl] = memory + list(kv_read(cache, case.batch, 0, cache.capacity))
        first = next(iter(kept))
        for impl, tensors in kept.items():
            for one, other in zip(tensors, kept[first], strict=True):
                if one.is_floating_point() and one.element_size() == 4:
                    one, other = one.nan_to_num(7.25e30), other.nan_to_num(7.25e30)  # WHY: a sum with a NaN keeps either's payload
                assert_same_bits(one.contiguous(), other.contiguous(), f"{impl} and {first} on {case}")


OPCHECKED = (AppendCase(KV_FORMATS["int4"], (16, 8), "paged", True, starts=True), AppendCase(KV_FORMATS["float32"], (16, 8)))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case):
    cache, _, k, v, starts = case.make()
    cache = replace(cache, k=torch.zeros_like(cache.k), v=torch.zeros_like(cache.v))  # WHY: it compares, and NaN is not NaN
    if cache.format.has_codes:
        cache = replace(cache, k_scales=torch.zeros_like(cache.k_scales), v_scales=torch.zeros_like(cache.v_scales))
    torch.library.opcheck(torch.ops.taut.kv_append.default, (k, v, *cache.tensors(), case.span[0], starts))
    kv_append(k, v, cache)
    torch.library.opcheck(torch.ops.taut.kv_read.default, (*cache.tensors(), 2, 16, 8, 0, 20, 0))


@pytest.mark.parametrize("format", (KV_FORMATS["int4"], KV_FORMATS["bfloat16"]), ids=lambda format: format.name)
def test_compile_keeps_the_graph_whole(format):
    case = AppendCase(format, (16, 8), "paged")

    def step(k, v, cache):
        kv_append(k * 1.0, v * 1.0, cache, 5)
        return kv_read(cache, 2, 5, 23)[0] + 1.0

    cache, memory, k, v, _ = case.make()
    expected = step(k, v, cache)
    kept = [t.clone() for t in memory]
    other, memory, *_ = case.make()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(k, v, other), expected, "compiled")
    for found, one in zip(memory, kept, strict=True):
        assert_same_bits(found, one, "compiled: the cache")


# ---- Channels ----


def test_channels_are_the_middle_and_half_of_the_range():
    k, v = torch.randn(2, 3, 40, 16) * 2 + 5, torch.randn(2, 3, 40, 8)
    channels = kv_channels(k, v)
    assert channels.shape == (2, 3, 2, 24) and channels.dtype == torch.float32 and channels.is_contiguous()
    both = torch.cat((k, v), -1)
    low, high = both.amin(2), both.amax(2)
    assert torch.allclose(channels[:, :, 0], (low + high) / 2) and torch.allclose(channels[:, :, 1], (high - low) / 2)
    # A few tokens say little: 0 counts as well.
    few = kv_channels(k[:, :, :3], v[:, :, :3])
    low, high = k[:, :, :3].amin(2).clamp(max=0), k[:, :, :3].amax(2).clamp(min=0)
    factors = (high - low) / 2
    assert torch.allclose(few[:, :, 0, :16], (low + high) / 2)
    assert torch.allclose(few[:, :, 1, :16], factors.maximum(factors.mean(-1, keepdim=True) / 4))


def test_a_constant_channel_does_not_take_all_codes():
    k = torch.randn(1, 1, 64, 16)
    k[..., 3] = 2.0
    channels = kv_channels(k, torch.zeros(1, 1, 64, 4))
    factors = channels[0, 0, 1]
    others = (k.amax(2) - k.amin(2))[0, 0] / 2
    assert float(factors[3]) == pytest.approx(float(others.mean()) / 4) and torch.allclose(factors[:3], others[:3])
    assert bool((factors[16:] == 1).all()) and bool((channels[0, 0, 0, 16:] == 0).all())  # nothing but zeros


@pytest.mark.parametrize("value", (float("nan"), float("inf"), -float("inf")), ids=str)
def test_channels_are_finite(value):
    k, v = torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    k[0, 1, 7, 3] = value
    channels = kv_channels(k, v)
    assert bool(channels.isfinite().all() and (channels[:, :, 1] > 0).all())
    clean = kv_channels(torch.randn(1, 2, 40, 8), v)
    assert torch.equal(channels[0, 0, :, 8:], clean[0, 0, :, 8:]), "another tensor's"
    for dtype in (torch.bfloat16, torch.float16):
        assert kv_channels(k.to(dtype), v.to(dtype)).isfinite().all()


@pytest.mark.parametrize("format", CODES, ids=lambda format: format.name)
def test_channels_make_room_for_small_numbers(format):
    """A key's few channels with an offset of 10 and a scale of 5 leave the others no codes, unless they have their own."""
    generator = torch.Generator().manual_seed(4)
    k, v = torch.randn(1, 2, 256, 64, generator=generator), torch.randn(1, 2, 256, 64, generator=generator)
    k[..., :4] = k[..., :4] * 5 + 10
    errors = []
    for channels in (None, kv_channels(k[:, :, :64], v[:, :, :64])):
        found, _ = kv_read(filled(k, v, format, channels=channels), 1, 0, 256)
        errors.append(float((found - k)[..., 4:].square().mean().sqrt()))
    print(f"{format.name}: root mean square error of the small channels {errors[0]:.4f}, with channels {errors[1]:.4f}")
    assert errors[1] < errors[0] / 3


# ---- Formats and caches ----


def test_bytes_of_a_token():
    for format in FORMATS:
        for dims in _DIMS:
            cache = KvCache.empty(format, 3, 2, 64, *dims)
            assert cache.nbytes == 3 * 2 * 64 * format.token_bytes(*dims), (format.name, dims)
            cost = op.cost(format, 3, 2, 64, *dims, element_bytes=2)
            assert cost["bytes"] == 3 * 2 * 64 * sum(dims) * 2 + cache.nbytes and cost["flops"] == 4 * 3 * 2 * 64 * sum(dims)
    assert KV_FORMATS["int4"].token_bytes(128, 128) == 132 and KV_FORMATS["int8"].token_bytes(128, 128) == 260


def test_a_cache_knows_its_capacity():
    assert KvCache.empty("int4", 2, 1, 17, 8).capacity == 32 and KvCache.empty("fp8", 2, 1, 17, 8, 4).capacity == 17
    paged = replace(KvCache.empty("int8", 5, 1, 32, 8), block_table=torch.zeros(2, 3, dtype=torch.int32))
    assert paged.capacity == 96 and paged.page_tokens == 32 and paged.value_dim == 8 and paged.kv_heads == 1
    k = torch.randn(2, 3, 20, 8)
    assert KvCache.of(k, k[..., :5]).format.name == "float32" and KvCache.of(k, k).k is k
    for name in ("int2", torch.float64, torch.uint8):
        with pytest.raises(ValueError, match="a cache holds float32, bfloat16"):
            KvCache.empty(name, 1, 1, 16, 8)
    for dims in ((0, 8), (8, 257)):
        with pytest.raises(ValueError, match="head dims must be 1 to 256"):
            KvCache.empty("int8", 1, 1, 16, *dims)


GOOD = {"k_new": torch.ones(2, 3, 5, 8), "v_new": torch.ones(2, 3, 5, 6), "start": 4, "starts": None}


def counts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def table(*pages: int) -> Tensor:
    return counts(*pages).view(2, -1)


TABLE = table(4, 0, 3, 1)


def good_cache(format: str = "int4", paged: bool = True) -> KvCache:
    cache, _ = blank(KV_FORMATS[format], 5 if paged else 2, 3, 16, (8, 6))
    return replace(cache, block_table=TABLE) if paged else cache


# A call's change, or a cache's; what is said of it.
BAD_CALLS = {
    "k_new is 3-D": ({"k_new": torch.ones(3, 5, 8)}, {}, r"k_new must be \[B, Hkv, L, head dim\]"),
    "k_new is float64": ({"k_new": torch.ones(2, 3, 5, 8, dtype=torch.float64)}, {}, "k_new must be"),
    "v_new is bfloat16": ({"v_new": torch.ones(2, 3, 5, 6, dtype=torch.bfloat16)}, {}, "v_new must be .* one dtype for both"),
    "k_new is strided": ({"k_new": torch.ones(2, 3, 8, 5).mT}, {}, "k_new's last dimension must be contiguous"),
    "v_new is strided": ({"v_new": torch.ones(2, 3, 6, 5).mT}, {}, "v_new's last dimension must be contiguous"),
    "k_new has other heads": ({"k_new": torch.ones(2, 4, 5, 8)}, {}, r"k_new and v_new must be \[B, 3, L, 8\]"),
    "k_new has another head dim": ({"k_new": torch.ones(2, 3, 5, 9)}, {}, r"k_new and v_new must be \[B, 3, L, 8\]"),
    "v_new has another head dim": ({"v_new": torch.ones(2, 3, 5, 33)}, {}, r"\[B, 3, L, 6\]"),
    "v_new has other tokens": ({"v_new": torch.ones(2, 3, 4, 6)}, {}, "k_new and v_new must be"),
    "k_new is elsewhere": ({"k_new": torch.ones(2, 3, 5, 8, device="meta")}, {}, "k_new is on meta"),
    "another batch": ({"k_new": torch.ones(1, 3, 5, 8), "v_new": torch.ones(1, 3, 5, 6)}, {}, "block_table must be|a page for each"),
    "start is negative": ({"start": -1}, {}, "tokens -1 to 4 do not fit the cache, which holds|tokens from -1 on do not fit"),
    "past the capacity": ({"start": 28}, {}, "do not fit the cache, which holds 32"),
    "far past the capacity": ({"start": 2**63 - 1}, {}, "do not fit the cache, which holds 32"),
    "starts go past the capacity": ({"starts": counts(0, 24)}, {}, "starts must be 0 to 23, got 24 for sequence 1"),
    "starts are negative": ({"starts": counts(-1, 0)}, {}, "starts must be 0 to 23, got -1 for sequence 0"),
    "starts are int64": ({"starts": counts(0, 1).long()}, {}, r"starts must be contiguous int32 \[2\]"),
    "starts are many": ({"starts": counts(0, 1, 2)}, {}, r"starts must be contiguous int32 \[2\]"),
    "starts have gaps": ({"starts": counts(0, 1, 2, 3)[::2]}, {}, r"starts must be contiguous int32 \[2\]"),
    "a page out of range": ({"start": 14}, {"block_table": table(4, 0, 3, 5)}, r"block_table\[1\]\[1\] must be a page from 0 to 4, got 5"),
    "a page is negative": ({}, {"block_table": table(4, 0, -1, 2)}, r"block_table\[1\]\[0\] must be a page from 0 to 4, got -1"),
    "the table is int64": ({}, {"block_table": TABLE.long()}, "block_table must be contiguous int32"),
    "the table is 1-D": ({}, {"block_table": TABLE[0]}, "block_table must be contiguous int32"),
    "the table has gaps": ({}, {"block_table": TABLE.mT}, "block_table must be contiguous int32"),
    "channels are float64": ({}, {"channels": torch.ones(2, 3, 2, 14).double()}, r"channels must be contiguous float32 \[2, 3, 2, 14\]"),
    "channels are narrow": ({}, {"channels": torch.ones(2, 3, 2, 13)}, "channels must be contiguous float32"),
    "channels have gaps": ({}, {"channels": torch.ones(2, 3, 14, 2).mT}, "channels must be contiguous float32"),
    "k is int8": ({}, {"k": torch.zeros(5, 3, 1, 64, dtype=torch.int8)}, "k must be torch.uint8|k is not of the dtype"),
    "k is 1-D": ({}, {"k": torch.zeros(5, dtype=torch.uint8)}, r"k must be .*4|k must be torch.uint8 \[pages, Hkv, blocks"),
    "k is narrow": ({}, {"k": torch.zeros(5, 3, 1, 32, dtype=torch.uint8)}, r"k must be "),
    "v has fewer pages": ({}, {"v": torch.zeros(4, 3, 1, 128, dtype=torch.uint8)}, "v must be|as many pages"),
    "v has more tokens": ({}, {"v": torch.zeros(5, 3, 2, 128, dtype=torch.uint8)}, "v must be|as many pages"),
    "k has gaps": ({}, {"k": torch.zeros(5, 3, 1, 128, dtype=torch.uint8)[..., ::2]}, "k's last dimension must be contiguous"),
    "no scales": ({}, {"k_scales": None}, "k_scales must be given|k_scales and v_scales are for int8 and int4"),
    "scales are float32": ({}, {"v_scales": torch.zeros(5, 3, 16)}, "v_scales must be "),
    "scales are short": ({}, {"v_scales": torch.zeros(5, 3, 15).half()}, "v_scales must be "),
    "scales have gaps": ({}, {"v_scales": torch.zeros(5, 16, 3).half().mT}, "v_scales must be contiguous"),
    "the cache is elsewhere": ({}, {"v": torch.zeros(5, 3, 1, 128, dtype=torch.uint8, device="meta")}, "k is on cpu, v on meta"),
}  # fmt: skip


def memory_of(cache: KvCache) -> list[Tensor]:
    return [t.clone() for t in (cache.k, cache.v, cache.k_scales, cache.v_scales) if t is not None and t.device.type == "cpu"]


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_an_error(what):
    change, cache_change, message = BAD_CALLS[what]
    call, cache = GOOD | change, replace(good_cache(), **cache_change)
    before = memory_of(cache)
    with pytest.raises(ValueError, match=message):
        kv_append(call["k_new"], call["v_new"], cache, call["start"], call["starts"])
    if all(t is None or t.device.type == "cpu" for t in (*call.values(), *cache.tensors()) if isinstance(t, Tensor)):
        with pytest.raises(RuntimeError, match="^kv_append: "):
            torch.ops.taut.kv_append(call["k_new"], call["v_new"], *cache.tensors(), call["start"], call["starts"])
    for found, expected in zip(memory_of(cache), before, strict=True):
        assert_same_bits(found, expected, "something was written")


def test_bad_caches_of_floats():
    k, v = GOOD["k_new"], GOOD["v_new"]
    cache = good_cache("float32", paged=False)
    kv_append(k, v, cache, 4)
    scales, zeros = torch.zeros(2, 3, 16).half(), table(0, 0, 0, 0, 0, 0)
    for change, message in (
        ({"k_scales": scales, "v_scales": scales}, "k_scales must be None|are for int8 and int4"),
        ({"block_table": zeros, "k": cache.k[:, :, :15], "v": cache.v[:, :, :15]}, "multiple of 16 tokens, got 15"),
        ({"block_table": zeros, "k": cache.k[:, :, :0], "v": cache.v[:, :, :0]}, "multiple of 16 tokens, got 0"),
        ({"k": cache.k[:1], "v": cache.v[:1]}, "a page for each of"),
        ({"k": cache.k.bfloat16()}, "k must be torch.float32|not of the dtype"),
        ({"k": torch.zeros(2, 3, 8, 16).mT}, "k's last dimension must be contiguous"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kv_append(k, v, replace(cache, **change))
        with pytest.raises(RuntimeError, match="^kv_append: "):
            torch.ops.taut.kv_append(k, v, *replace(cache, **change).tensors(), 0, None)


def test_bad_reads():
    cache = good_cache()
    for arguments, message in (
        ((2, -1, 3), "tokens -1 to 2"),
        ((2, 30, 3), "tokens 30 to 33 do not fit"),
        ((2, 0, -1), "tokens 0 to -1"),
        ((3, 0, 1), "block_table must be"),
    ):
        with pytest.raises(ValueError, match=message):
            kv_read(cache, *arguments)
    with pytest.raises(ValueError, match="dtype must be float32"):
        kv_read(cache, 2, 0, 1, torch.float64)
    with pytest.raises(ValueError, match=r"kv_read: block_table\[0\]\[1\] must be a page from 0 to 4, got 9"):
        kv_read(replace(cache, block_table=table(1, 9, 2, 3)), 2, 15, 2)
    tensors = cache.tensors()
    for rest in (
        (2, 8, 6, 0, 1, 3),
        (2, 8, 6, -1, 1, 0),
        (2, 8, 6, 2**63 - 1, 1, 0),
        (2, 8, 6, 0, -1, 0),
        (-1, 8, 6, 0, 1, 0),
        (2, 300, 6, 0, 1, 0),
        (2, 8, -9, 0, 1, 0),
    ):
        with pytest.raises(RuntimeError, match="^kv_read: "):
            torch.ops.taut.kv_read(*tensors, *rest)
    with pytest.raises(RuntimeError, match="^kv_read: kv_format must be 0"):
        torch.ops.taut.kv_read(*tensors[:-1], 6, 2, 8, 6, 0, 1, 0)


def test_explain():
    chosen = [verdict.impl for verdict in taut.explain(OP) if verdict.chosen]
    assert len(chosen) == 1


def test_cases_cover_what_they_should():
    assert {case.format for case in CASES} == set(FORMATS) and len(FLOATS) + len(CODES) == 6
    assert {(case.format, case.order) for case in CASES} == {(format, order) for format in FORMATS for order in CACHE_ORDERS}
