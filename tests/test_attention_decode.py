"""attention_decode, every impl, against float64 of the numbers in the cache."""

from __future__ import annotations

import math
import random
import re
import zlib
from dataclasses import dataclass, replace
from functools import cached_property

import pytest
import torch
from torch import Tensor

import taut
from attention_cases import MASKS, ORDERS, AttentionCase
from cases import DTYPE_CODES, DTYPES, covering_set
from checks import assert_same_bits
from decode_checks import MOST_Q, assert_decode, sequences
from emulator import build, emulated
from kv_caches import CACHE_ORDERS, CODES, FLOATS, FORMATS, blank, filled, numbers
from taut.formats.kv import KV_FORMATS, KvFormat
from taut.ops import attention_decode as op
from taut.ops.attention_decode import attention_decode
from taut.ops.attention_prefill import attention_prefill
from taut.ops.kv_append import KvCache, kv_append, kv_channels

OP = "attention_decode"
MOST_PRODUCTS = 2_000_000  # of a case: the scalar impl takes 10 ms for it


def sizes_of(format: KvFormat, dims: tuple[int, int] = (64, 64), dtype: torch.dtype = torch.float32, **rest: int) -> dict[str, int]:
    """What ``taut.explain("attention_decode", ...)`` takes."""
    return {"kv_format": format.code, "D": dims[0], "Dv": dims[1], "dtype": DTYPE_CODES[dtype], **rest}


@dataclass(frozen=True)
class DecodeCase:
    """An ``AttentionCase`` against a cache. ``ragged``: a length for each sequence; one of 0, where there are three. ``spare``: how many
    tokens more the cache has room for, full of 0xff. ``whole``: no rounding of q, see ``whole_steps``."""

    attention: AttentionCase
    format: KvFormat
    cache_order: str = "contiguous"
    spare: int = 0
    channels: bool = False
    ragged: bool = False
    whole: bool = False

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("channels", "ragged", "whole") if getattr(self, name))
        return f"{self.format.name}-{self.attention}-{self.cache_order}+{self.spare}{flags}"

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    @property
    def emulated_mode(self) -> str:
        """Of the emulator's two the one that runs it. WHY not both: half the time, and either shows a wrong result."""
        return build.MODES[self.seed % 2]

    def sizes(self) -> dict[str, int]:
        """What ``taut.explain("attention_decode", ...)`` takes."""
        case = self.attention
        aligned = self.format.has_codes or self.cache_order != "strided"
        return sizes_of(self.format, case.dims, case.dtype, channels=int(self.channels and case.lengths[1] > 0), aligned=int(aligned))

    @cached_property
    def call(self) -> dict:
        """The arguments of ``attention_decode``, by name."""
        case, generator = self.attention, torch.Generator().manual_seed(self.seed)
        rules = case.make()
        q, k, v = (rules.pop(name) for name in "qkv")
        if self.whole:
            q = whole_steps(q, MOST_Q[self.format.bits])
        keys, lengths = case.lengths[1], None
        if self.ragged:
            some = torch.randint(0, keys + 1, (case.batch,), generator=generator).tolist()
            lengths = torch.tensor([*([0] if case.batch > 2 else []), *some, keys][: case.batch], dtype=torch.int32)
        channels = None
        k, v = k.float(), v.float()
        if keys and self.channels:
            k[..., torch.rand(k.shape[-1], generator=generator) < 0.1] += 6
            channels = kv_channels(k[:, :, : keys // 2 + 1], v[:, :, : keys // 2 + 1])
        cache, _ = blank(self.format, case.batch, case.heads[1], keys + self.spare, case.dims, self.cache_order, seed=self.seed)
        cache = cache.with_channels(channels)
        for b in range(case.batch):  # WHY one by one: what is past a sequence's length stays NaN
            n = keys if lengths is None else int(lengths[b])
            one = replace(cache, channels=None if channels is None else channels[b : b + 1])
            if cache.block_table is None:
                names = [name for name in ("k", "v", "k_scales", "v_scales") if getattr(cache, name) is not None]
                one = replace(one, **{name: getattr(cache, name)[b : b + 1] for name in names})
            else:
                one = replace(one, block_table=cache.block_table[b : b + 1])
            kv_append(k[b : b + 1, :, :n], v[b : b + 1, :, :n], one)
        return {"q": q, "cache": cache, "keys": keys, "lengths": lengths, **rules}


def whole_steps(q: Tensor, most: int) -> Tensor:
    """q rounded to integers of up to ``most``, each row's largest that, times a power of 2: the rounding that a kernel does beside codes
    changes nothing. Of 8127 only fp32 has all."""
    size = q.float().abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((q.float() / size * most).round() * torch.exp2((size / most).log2().round())).to(q.dtype)


def rules_of(call: dict) -> dict:
    return {name: value for name, value in call.items() if name not in ("q", "cache", "keys", "lengths", "tokens_first")}


def exact(impl: str) -> bool:
    """Whether q and the weights are multiplied as they are, in float32, beside codes too."""
    return impl.startswith(("cpu_scalar", "cuda"))


def dtype_for(impl: str, format: KvFormat) -> torch.dtype:
    """Of q: float32, or what an impl takes beside this cache."""
    return torch.bfloat16 if format.name == "bfloat16" and "mma" in impl else torch.float32


def check(impl: str, case: DecodeCase) -> None:
    call = case.call
    q, cache = call["q"], call["cache"]
    tensors = {f"cache.{i}": t for i, t in enumerate(cache.tensors()) if isinstance(t, Tensor)}
    tensors |= {name: t for name, t in call.items() if isinstance(t, Tensor)}
    before = {name: t.clone() for name, t in tensors.items()}
    # WHY: what the op allocates next is likely to be this memory, and NaN where it is not written
    shape = (*q.shape[:3], cache.value_dim)
    blocks = [torch.full(shape, float("nan"), dtype=q.dtype), torch.full(shape[:3], float("nan"))]
    del blocks
    out, lse = attention_decode(**call)
    again, lse_again = attention_decode(**call, tokens_first=True)
    assert out.is_contiguous() and again.transpose(1, 2).is_contiguous() and lse.is_contiguous() and lse.dtype == torch.float32
    context = f"{impl} on {case}, seed {case.seed}"
    assert_decode(
        out, lse, q, cache, call["keys"], call["lengths"], rules_of(call), exact=exact(impl), whole=case.whole, tensor_cores="mma" in impl,
        context=context,
    )  # fmt: skip
    assert_same_bits(out, again.contiguous(), f"{context}: twice, in another order of memory")
    assert_same_bits(lse, lse_again, f"{context}: lse, twice")
    for name, value in before.items():
        assert_same_bits(tensors[name].contiguous(), value.contiguous(), f"{context}: {name} was written to")


_HEADS = ((1, 1), (4, 4), (8, 2), (9, 3), (5, 1), (7, 1), (32, 1))
_QUERIES, _KEYS = (1, 2, 5, 17), (0, 1, 15, 16, 17, 127, 128, 129, 511, 512, 513, 1100)
_DIMS = ((64, 64), (40, 40), (80, 80), (96, 96), (112, 112), (128, 128), (256, 256), (64, 32), (72, 104), (1, 1), (33, 7), (192, 128))


def covered(formats: tuple[KvFormat, ...]) -> list[DecodeCase]:
    columns = (
        _HEADS, _QUERIES, _KEYS, _DIMS, DTYPES, (False, True), (0, 1, 16, 90), (0.0, 5.0), MASKS, (False, True), (False, True), ORDERS,
        (1, 3), (0.3, 1.0, 3.0), formats, CACHE_ORDERS, (0, 1, 40), (False, True), (False, True), (False, True),
    )  # fmt: skip

    def allowed(heads, queries, keys, dims, dtype, causal, window, cap, mask, sinks, alibi, order, batch, *_) -> bool:
        return batch * heads[0] * queries * max(keys, 1) * sum(dims) <= MOST_PRODUCTS

    found = []
    for heads, queries, keys, dims, *rules, format, cache_order, spare, channels, ragged, whole in covering_set(columns, allowed):
        case = AttentionCase(heads, (queries, keys), dims, *rules)
        # What whole steps are times other factors is not whole, and 13 bits are no bfloat16.
        whole = whole and format.has_codes and not channels and (format.bits == 4 or case.dtype == torch.float32)
        found.append(DecodeCase(case, format, cache_order, spare, channels, ragged, whole))
    return found


# WHY twice: codes have kernels of their own, which meet every length, head dim and rule.
CASES = tuple(covered(FLOATS) + covered(CODES))
EXTREMES = tuple(
    DecodeCase(
        replace(AttentionCase((4, 2), (2, 150), (64, 64), dtype, spread=spread), softcap=cap), format, spare=10, whole=format.has_codes
    )
    for format in FORMATS
    for dtype in ((torch.float32,) if format.has_codes else DTYPES)
    for spread, cap in ((1e4, 0.0), (0.0, 0.0), (1e4, 30.0), (1e-30 if dtype == torch.float32 else 1e-4, 0.0))
)


@pytest.mark.parametrize("case", CASES + EXTREMES, ids=str)
def test_matches_reference(impl, case, forced):
    forced(impl, **case.sizes())
    check(impl, case)


def test_fuzz(impl, forced):
    """Shapes and rules at random. WHY one seed a day: a run can be repeated, and runs differ."""
    import datetime

    seed = int(datetime.date.today().strftime("%Y%m%d"))
    print(f"seed {seed}")
    draw = random.Random(seed)
    runs = forced(impl, **sizes_of(KV_FORMATS["int8"]))
    for _ in range(12):
        kv_heads = draw.choice((1, 2, 3))
        attention = AttentionCase(
            (kv_heads * draw.choice((1, 2, 3, 4, 5, 7)), kv_heads), (draw.randint(1, 20), draw.randint(1, 300)),
            (draw.randint(1, 150), draw.randint(1, 150)), draw.choice(DTYPES), draw.random() < 0.5, draw.choice((0, 0, 1, 30, 77)),
            draw.choice((0.0, 0.0, 10.0)), draw.choice(MASKS), draw.random() < 0.3, draw.random() < 0.3, draw.choice(ORDERS),
            draw.choice((1, 2)), draw.choice((0.1, 1.0, 3.0)),
        )  # fmt: skip
        rest = draw.choice(CACHE_ORDERS), draw.choice((0, 3, 50)), draw.random() < 0.5, draw.random() < 0.5
        case = DecodeCase(attention, draw.choice(FORMATS), *rest)
        if runs(**case.sizes()):
            check(impl, case)


def random_heads(shape: tuple[int, int, int], *widths: int, seed: int = 1) -> list[Tensor]:
    """[B, heads, length, width] of each width."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, width, generator=generator) for width in widths]


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_one_key_gives_its_value(impl, format, forced):
    forced(impl, **sizes_of(format, (64, 40)))
    k, v = random_heads((2, 3, 1), 64, 40)
    cache = filled(k, v, format, 20)
    out, lse = attention_decode(torch.randn(2, 6, 1, 64), cache, 1)
    expected = numbers(cache, 2)[1][:, :, :1].float().repeat_interleave(2, 1)
    if format.has_codes:  # a weight of 16383 times a 16383rd of the scale
        assert torch.allclose(out, expected, rtol=2**-22, atol=0)
    else:
        assert_same_bits(out, expected.contiguous(), impl)
    assert bool(lse.isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_mode(impl, dtype, forced):
    """Small integers, and scores that are all the same or far apart: each result is a mean of some v, or one of them, bit for bit."""
    format = KV_FORMATS[str(dtype).removeprefix("torch.")]
    forced(impl, **sizes_of(format, (64, 48), dtype))
    generator = torch.Generator().manual_seed(5)
    v = torch.randint(-8, 9, (1, 2, 64, 48), generator=generator).to(dtype)
    k = torch.randint(-2, 3, (1, 2, 64, 64), generator=generator).to(dtype)
    cache = KvCache.of(k, v)
    out, _ = attention_decode(torch.zeros(1, 4, 5, 64, dtype=dtype), cache, causal=False)
    mean = v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 5, -1)
    assert_same_bits(out, mean.to(dtype).contiguous(), f"{impl}: the mean of 64")
    q = torch.randint(-2, 3, (1, 4, 40, 64), generator=generator).to(dtype)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT
    best = scores.topk(2, -1).values
    found, _ = attention_decode(q, cache, softmax_scale=128.0, causal=False)  # the next best key weighs less than the last bit of fp32
    clear = best[..., 0] > best[..., 1]
    picked = v.repeat_interleave(2, 1).gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 48))
    assert clear.any()
    assert_same_bits(found[clear], picked[clear], f"{impl}: the best key's value")


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("how", ("causal", "window", "mask", "additive", "padding", "lengths"))
def test_what_is_hidden_does_not_matter(impl, how, format, forced):
    dtype = dtype_for(impl, format)
    forced(impl, **sizes_of(format, (64, 48), dtype))
    case = AttentionCase((6, 2), (5, 170), (64, 48), dtype, causal=how == "causal", window=20 if how == "window" else 0)
    rules = case.make()
    q, k, v = (rules.pop(name) for name in "qkv")
    hidden, queries = torch.arange(170) >= 140, slice(None)
    if how == "causal":
        hidden, queries = torch.arange(170) >= 168, slice(0, 3)
    elif how == "window":
        hidden, queries = torch.arange(170) < 146, slice(0, 5)
    elif how in ("mask", "additive"):
        hidden = torch.rand(170, generator=torch.Generator().manual_seed(1)) < 0.3
    if how == "additive":
        rules["mask"] = torch.zeros(170).masked_fill(hidden, -torch.inf).expand(5, 170)
    elif how in ("mask", "padding"):
        rules["mask"] = ~hidden
    rules["lengths"] = torch.tensor([140], dtype=torch.int32) if how == "lengths" else None
    rtol = 2e-5 if dtype == torch.float32 else 2**-7
    expected = attention_decode(q, filled(k, v, format), 170, **rules)
    for value in (torch.nan,) if format.has_codes or format.name == "fp8" else (torch.nan, torch.inf):
        for name in "kv":
            rows = {"k": k.clone(), "v": v.clone()}
            rows[name][:, :, hidden] = value
            found = attention_decode(q, filled(rows["k"], rows["v"], format), 170, **rules)
            for one, other in zip(found, expected, strict=True):
                if format.has_codes:
                    assert_same_bits(one[:, :, queries].contiguous(), other[:, :, queries].contiguous(), f"{impl}: {name}")
                else:  # another order of sums
                    assert torch.allclose(one[:, :, queries], other[:, :, queries], rtol=rtol, atol=2**-23), f"{impl}: {name}"
            if how == "causal":
                seen = found[0][:, :, 3:]
                if value != value or name == "v":
                    assert bool(seen.isnan().all() if value != value else seen.isinf().all()), f"{impl}: a NaN in {name} is seen"
                assert bool(found[1][:, :, 3:].isnan().all() if name == "k" and value != value else expected[1].isfinite().all())


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_query_that_is_no_number_spoils_its_row_alone(impl, format, value, forced):
    forced(impl, **sizes_of(format, (40, 33)))
    k, v = random_heads((2, 2, 150), 40, 33)
    (q,) = random_heads((2, 8, 3), 40)
    cache = filled(k, v, format, 170)
    expected, expected_lse = attention_decode(q, cache, 150)
    for at in (0, 7, 39):
        bad = q.clone()
        bad[1, 5, 1, at] = value
        out, lse = attention_decode(bad, cache, 150)
        assert bool(out[1, 5, 1].isnan().all() and (lse[1, 5, 1].isnan() or lse[1, 5, 1].isinf())), f"{impl}: q[{at}] is {value}"
        out[1, 5, 1], lse[1, 5, 1] = expected[1, 5, 1], expected_lse[1, 5, 1]
        assert_same_bits(out, expected, f"{impl}: the other rows")
        assert_same_bits(lse, expected_lse, f"{impl}: the other rows")


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_rows_that_see_nothing(impl, format, forced):
    forced(impl, **sizes_of(format, (64, 48)))
    k, v = random_heads((3, 2, 140), 64, 48)
    (q,) = random_heads((3, 4, 6), 64)
    cache = filled(k, v, format, 150)
    lengths = torch.tensor([0, 2, 140], dtype=torch.int32)
    sinks = torch.tensor([0.5, -1.0, -torch.inf, 3.0])
    for s_aux in (None, sinks):
        out, lse = attention_decode(q, cache, 140, lengths, s_aux=s_aux)
        blind = torch.zeros(3, 6, dtype=torch.bool)
        blind[0], blind[1, :4] = True, True
        blind = blind[:, None].expand(3, 4, 6)
        assert bool((out[blind] == 0).all() and out[~blind].isfinite().all() and (out[~blind].abs().amax(-1) > 0).all()), impl
        lowest = torch.full((4,), -torch.inf) if s_aux is None else sinks
        assert torch.allclose(lse[blind], lowest[None, :, None].expand(3, 4, 6)[blind], rtol=1e-6), impl
        assert bool(lse[~blind].isfinite().all())
        hides = torch.zeros(3, 1, 1, 140, dtype=torch.bool)
        out, lse = attention_decode(q, cache, 140, mask=hides, s_aux=s_aux)
        assert bool((out == 0).all()) and torch.allclose(lse, lowest[:, None].expand(3, 4, 6), rtol=1e-6), impl
        out, lse = attention_decode(q, cache, 0, s_aux=s_aux)
        assert bool((out == 0).all()) and torch.allclose(lse, lowest[:, None].expand(3, 4, 6), rtol=1e-6), impl


@pytest.mark.parametrize("shape", ((0, 4, 5), (2, 4, 0)), ids=str)
def test_nothing_to_do(impl, shape, forced):
    forced(impl)
    cache, _ = blank(KV_FORMATS["float32"], shape[0], 2, 7, (8, 6))
    out, lse = attention_decode(torch.zeros(*shape, 8), cache)
    assert out.shape == (*shape, 6) and lse.shape == shape


def test_a_mask_of_the_lowest_number_is_a_mean(impl, forced):
    """transformers adds finfo.min; where that is everywhere, torch gives the mean of v, and so do we."""
    forced(impl)
    (q,), (k, v) = random_heads((1, 2, 5), 16), random_heads((1, 2, 80), 16, 16)
    mask = torch.full((1, 1, 5, 80), torch.finfo(torch.float32).min)
    mask[..., 2:, :50] = 0
    out, _ = attention_decode(q, KvCache.of(k, v), mask=mask, causal=False)
    assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask), atol=1e-5)
    assert torch.allclose(out[:, :, :2], v.mean(2, keepdim=True).expand(-1, -1, 2, -1), atol=1e-5)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_batch_and_threads_and_pages_change_nothing(impl, format, forced, threads):
    dtype = dtype_for(impl, format)
    forced(impl, **sizes_of(format, (64, 80), dtype))
    kv_heads, queries = (1, 2) if impl.startswith("cuda") else (3, 3)
    k, v = random_heads((3, kv_heads, 1100), 64, 80)
    (q,) = random_heads((3, 6 * kv_heads, queries), 64)
    q, channels = q.to(dtype), None if dtype != torch.float32 else kv_channels(k[:, :, :50], v[:, :, :50])
    lengths = torch.tensor([1100, 513, 40], dtype=torch.int32)
    cache = filled(k, v, format, 1100, channels=channels)
    threads(1)
    whole = attention_decode(q, cache, 1100, lengths)
    for count in () if impl.startswith("cuda") else (2, 3):
        threads(count)
        for one, other in zip(attention_decode(q, cache, 1100, lengths), whole, strict=True):
            assert_same_bits(one, other, f"{impl}: {count} threads")
    if match := re.fullmatch(r"(\S+) \(emulated, (\w+)\)", impl):
        for count in (1, 64):  # multiprocessors
            emulated.ops_library(match[2]).set_device(emulated.sm_of(match[1]), count)
            for one, other in zip(attention_decode(q, cache, 1100, lengths), whole, strict=True):
                assert_same_bits(one, other, f"{impl}: {count} multiprocessors")
    # On CUDA, floats that do not lie at multiples of 16 bytes are added up in another order.
    orders = ("paged",) if impl.startswith("cuda") and not format.has_codes else ("strided", "paged")
    for order in orders:
        other = filled(k, v, format, 1200, order, channels=channels, page_tokens=48)
        for one, expected in zip(attention_decode(q, other, 1100, lengths), whole, strict=True):
            assert_same_bits(one, expected, f"{impl}: {order}")
    for b in range(3):
        n = int(lengths[b])
        alone = filled(k[b : b + 1, :, :n], v[b : b + 1, :, :n], format, channels=None if channels is None else channels[b : b + 1])
        for one, expected in zip(attention_decode(q[b : b + 1], alone, n), whole, strict=True):
            assert_same_bits(one, expected[b : b + 1], f"{impl}: sequence {b} alone")


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_what_lies_on_the_device_is_not_trusted(impl, format, forced):
    """Lengths and pages out of range, which the CPU refuses, and which the host does not look at on CUDA."""
    if not impl.startswith("cuda"):
        pytest.skip("it refuses them: test_bad_call_is_an_error")
    dtype = dtype_for(impl, format)
    forced(impl, **sizes_of(format, dtype=dtype))
    (q,), (k, v) = random_heads((3, 4, 2), 64), random_heads((3, 2, 150), 64, 64)
    q, cache = q.to(dtype), filled(k, v, format, 150, "paged")
    for found, expected in ((counts(-5, 2**31 - 1, 70), counts(0, 150, 70)), (counts(-(2**31), 151, 150), counts(0, 150, 150))):
        for one, other in zip(attention_decode(q, cache, 150, found), attention_decode(q, cache, 150, expected), strict=True):
            assert_same_bits(one, other, f"{impl}: {found.tolist()}")
    table = cache.block_table.clone()
    seen = torch.ones(3, 1, 1, 150, dtype=torch.bool)
    for b, column, page in (
        (0, 0, -1),
        (0, 3, len(cache.k)),
        (1, 4, 2**31 - 1),
        (2, 1, -(2**31)),
        *((2, column, 10**6) for column in range(5)),
    ):
        table[b, column], seen[b, ..., 32 * column : 32 * column + 32] = page, False
    found = attention_decode(q, replace(cache, block_table=table), 150)
    assert bool((found[0][2] == 0).all() and (found[1][2] == -torch.inf).all())
    for one, other in zip(found, attention_decode(q, cache, 150, mask=seen), strict=True):
        assert_same_bits(one, other, f"{impl}: pages that are not there")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_agrees_with_attention_prefill(impl, dtype, forced):
    """Beside a cache of the dtype of q: the same sums in another order, each result rounded once."""
    format = KV_FORMATS[str(dtype).removeprefix("torch.")]
    case = AttentionCase((6, 2), (9, 300), (80, 96), dtype, window=200, softcap=20.0, mask="additive", sinks=True, alibi=True, batch=2)
    rules = case.make()
    q, k, v = (rules.pop(name) for name in "qkv")
    with taut.force_impl("attention_prefill", "cpu_scalar"):  # others may round the weights of the values too
        expected, expected_lse = attention_prefill(q, k, v, **rules)
    forced(impl, **sizes_of(format, (80, 96), dtype))
    out, lse = attention_decode(q, KvCache.of(k, v), **rules)
    rtol = {torch.float32: 2e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}[dtype]
    assert torch.allclose(out.float(), expected.float(), rtol=rtol, atol=1e-6) and torch.allclose(lse, expected_lse, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_left_padding_is_the_prompt_alone(impl, format, forced):
    """A padded prompt differs from the prompt alone by rounding only: its keys fall into other tiles."""
    forced(impl, **sizes_of(format))
    (q,), (k, v) = random_heads((2, 4, 3), 64), random_heads((2, 2, 190), 64, 64)
    mask = torch.arange(190)[None, :] >= torch.tensor([0, 137])[:, None]
    out, lse = attention_decode(q, filled(k, v, format), 190, mask=mask[:, None, None])
    expected, expected_lse = attention_decode(q[1:], filled(k[1:, :, 137:], v[1:, :, 137:], format), 53)
    # Of codes, weights are rounded to 14 bits of another tile's largest: up to 53 of them by 2^-15 of it.
    atol = 53 * 2**-15 * float(v.abs().max()) / 8 if format.has_codes else 1e-5
    assert torch.allclose(out[1:], expected, atol=atol) and torch.allclose(lse[1:], expected_lse, atol=1e-5)


@pytest.mark.parametrize("format", CODES, ids=lambda format: format.name)
def test_codes_are_near_exact_attention(impl, format, forced):
    """Keys have channels that are large for all tokens, as those of language models do. Channels take care of them."""
    forced(impl, **sizes_of(format, (128, 128)))
    (q,), (k, v) = random_heads((2, 8, 2), 128), random_heads((2, 2, 600), 128, 128)
    large = torch.randperm(128, generator=torch.Generator().manual_seed(3))[:6]
    k[..., large] = k[..., large] * 5 + 10
    exact = op.reference(q, KvCache.of(k, v))[0].float()
    nearness = []
    for channels in (kv_channels(k[:, :, :128], v[:, :, :128]), None):
        found, _ = attention_decode(q, filled(k, v, format, channels=channels), 600)
        nearness.append(float(torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), 0)))
    print(f"{impl}, {format.name}: cosine {nearness[0]:.5f} with channels, {nearness[1]:.5f} without")
    assert nearness[0] >= {8: 0.999, 4: 0.99}[format.bits]


@pytest.mark.parametrize("format", CODES, ids=lambda format: format.name)
def test_queries_are_rounded_as_the_contract_says(impl, format, forced):
    """14 bits of a row's largest element beside int8, 8 beside int4: half a step moves a score by no more, and a whole one shows."""
    forced(impl, **sizes_of(format))
    if exact(impl):
        pytest.skip("it does not round")
    most, largest = MOST_Q[format.bits], {8: 127 / 32, 4: 7.0}[format.bits]
    k = torch.zeros(1, 1, 2, 32)
    k[0, 0, 0, 1] = largest  # a scale that fp16 has; the other key is zeros
    steps = torch.tensor([3, 3.4, 3.6, -3.4, -3.6, 100, 100.4, -most])
    q = torch.zeros(1, 1, 8, 32)
    q[..., 0], q[0, 0, :, 1] = most, steps
    _, lse = attention_decode(q, filled(k, torch.ones(1, 1, 2, 16), format), 2, softmax_scale=0.1, causal=False)
    expected = torch.logaddexp(steps.round().double() * (largest * 0.1), torch.zeros(8, dtype=torch.float64))
    assert torch.allclose(lse[0, 0].double(), expected, rtol=2e-6, atol=2e-6), impl


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_a_cache_of_zeros(impl, format, forced):
    forced(impl, **sizes_of(format))
    cache = filled(torch.zeros(1, 2, 70, 64), torch.zeros(1, 2, 70, 64), format)
    out, lse = attention_decode(torch.randn(1, 4, 2, 64), cache, 70, causal=False)
    assert bool((out == 0).all()) and torch.allclose(lse, torch.tensor(math.log(70.0)))


OPCHECKED = (
    DecodeCase(AttentionCase((4, 2), (2, 9), (16, 8)), KV_FORMATS["int4"], "paged", channels=True, whole=True),
    DecodeCase(
        AttentionCase((4, 2), (2, 9), (16, 16), torch.bfloat16, order="tokens_first", mask="bool", sinks=True, alibi=True, window=3),
        KV_FORMATS["float16"], ragged=True,
    ),
)  # fmt: skip


def arguments_of_the_op(call: dict, tokens_first: bool) -> tuple:
    cache, rules = call["cache"], rules_of(call)
    return (call["q"], *cache.tensors(), cache.value_dim, call["keys"], call["lengths"], *rules.values(), tokens_first)


@pytest.mark.parametrize("tokens_first", (False, True))
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case, tokens_first):
    torch.library.opcheck(torch.ops.taut.attention_decode.default, arguments_of_the_op(case.call, tokens_first))


@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_compile_keeps_the_graph_whole(case):
    call = case.call
    rest = {name: value for name, value in call.items() if name not in ("q", "cache")}
    compiled = torch.compile(lambda q, cache: attention_decode(q * 1.0, cache, **rest)[0] + 1.0, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(call["q"], call["cache"]), attention_decode(**call)[0] + 1.0, "compiled")


def test_training_is_refused():
    k, v = random_heads((1, 2, 4), 8, 8)
    with pytest.raises(NotImplementedError, match="attention_decode has no backward"):
        attention_decode(torch.randn(1, 2, 4, 8, requires_grad=True), KvCache.of(k, v))[0].sum().backward()


def good_cache(name: str = "int4") -> KvCache:
    return blank(KV_FORMATS[name], 2, 2, 16, (8, 6))[0]


def counts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


GOOD = {
    "q": torch.zeros(2, 4, 5, 8), "cache": good_cache(), "keys": 16, "lengths": counts(9, 16), "softmax_scale": 0.5, "causal": True,
    "window": 0, "softcap": 0.0, "mask": None, "s_aux": None, "alibi_slopes": None,
}  # fmt: skip
PAGED = replace(good_cache(), block_table=counts(1, 0).view(2, 1))
# A call's change, or its cache's; what is said of it.
BAD_CALLS = {
    "q is 3-D": ({"q": torch.zeros(4, 5, 8)}, {}, "q must be .*Hq, Lq, head dim"),
    "q is float64": ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.float64)}, {}, "q must be"),
    "q is strided": ({"q": torch.zeros(2, 4, 8, 5).mT}, {}, "q's last dimension must be contiguous"),
    "q has another head dim": ({"q": torch.zeros(2, 4, 5, 9)}, {}, r"q must be \[B, Hq, Lq, 8\]|k must be"),
    "q has another batch": ({"q": torch.zeros(3, 4, 5, 8)}, {}, "a page for each of"),
    "q is elsewhere": ({"q": torch.zeros(2, 4, 5, 8, device="meta")}, {}, "q is on meta"),
    "heads do not divide": ({"q": torch.zeros(2, 3, 5, 8)}, {}, "a multiple of those of k and v, got 3 and 2"),
    "keys past the capacity": ({"keys": 17}, {}, "keys must be 0 to 16, what the cache holds, got 17"),
    "keys are negative": ({"keys": -1, "lengths": None}, {}, "keys must be 0 to 16, what the cache holds, got -1"),
    "a length past the keys": ({"keys": 10}, {}, "lengths must be 0 to 10, got 16 for sequence 1"),
    "a length is negative": ({"lengths": counts(-1, 3)}, {}, "lengths must be 0 to 16, got -1 for sequence 0"),
    "lengths are int64": ({"lengths": counts(1, 2).long()}, {}, r"lengths must be contiguous int32 \[2\]"),
    "lengths are many": ({"lengths": counts(1, 2, 3)}, {}, r"lengths must be contiguous int32 \[2\]"),
    "lengths have gaps": ({"lengths": counts(1, 2, 3, 4)[::2]}, {}, r"lengths must be contiguous int32 \[2\]"),
    "lengths are 2-D": ({"lengths": counts(1, 2)[None]}, {}, r"lengths must be contiguous int32 \[2\]"),
    "a page out of range": ({}, {"block_table": counts(1, 2).view(2, 1)}, r"block_table\[1\]\[0\] must be a page from 0 to 1, got 2"),
    "the table is for others": ({}, {"block_table": counts(1, 0, 1).view(3, 1)}, "block_table must be contiguous int32"),
    "channels are narrow": ({}, {"channels": torch.ones(2, 2, 2, 13)}, "channels must be contiguous float32"),
    "no scales": ({}, {"v_scales": None}, "v_scales must be given|are for int8 and int4"),
    "k is 1-D": ({}, {"k": torch.zeros(5, dtype=torch.uint8)}, "k must be"),
    "the scale is NaN": ({"softmax_scale": float("nan")}, {}, "softmax_scale must be finite"),
    "the window is negative": ({"window": -1}, {}, "window must be 0"),
    "the softcap is negative": ({"softcap": -1.0}, {}, "softcap must be 0"),
    "the mask is int": ({"mask": torch.zeros(5, 16, dtype=torch.int32)}, {}, "mask must be bool"),
    "the mask is of the capacity": ({"mask": torch.zeros(5, 16), "keys": 9, "lengths": None}, {}, "mask must be broadcastable to .*, got"),
    "the mask has kv heads": ({"mask": torch.zeros(2, 2, 5, 16)}, {}, "mask must be broadcastable"),
    "the mask is 5-D": ({"mask": torch.zeros(1, 1, 1, 5, 16)}, {}, "mask must be broadcastable"),
    "s_aux is short": ({"s_aux": torch.zeros(2)}, {}, r"s_aux must be .*\[4\]"),
    "slopes are int": ({"alibi_slopes": torch.zeros(4, dtype=torch.int64)}, {}, r"alibi_slopes must be .*\[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_an_error(what):
    change, cache_change, message = BAD_CALLS[what]
    call = GOOD | change
    call["cache"] = replace(call["cache"], **cache_change)
    with pytest.raises(ValueError, match=message):
        attention_decode(**call)
    if call["q"].device.type == "cpu":
        with pytest.raises(RuntimeError, match="^attention_decode: "):
            torch.ops.taut.attention_decode(*arguments_of_the_op(call, False))


def test_bad_formats_are_an_error():
    *arguments, tokens_first = arguments_of_the_op(GOOD, False)
    for code in (-1, 6):
        arguments[7] = code
        with pytest.raises(RuntimeError, match="^attention_decode: kv_format must be 0"):
            torch.ops.taut.attention_decode(*arguments, tokens_first)
    for change, cache in (({}, good_cache()), ({}, PAGED), ({"keys": None, "lengths": None}, PAGED)):
        kv_append(torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 6), cache)
        assert bool((attention_decode(**(GOOD | change | {"cache": cache}))[0] == 0).all())


def test_explain():
    for format in FORMATS:
        chosen = [verdict.impl for verdict in taut.explain(OP, kv_format=format.code) if verdict.chosen]
        assert len(chosen) == 1
        if not format.has_codes:
            assert chosen != ["cpu_avx512vnni"]
    with pytest.raises(ValueError, match="kv_format must be"):
        taut.explain(OP, kv_format=7)


def test_cost():
    cost = op.cost(KV_FORMATS["int4"], 2, 32, 8, 3, 100, 128, 64)
    assert cost["flops"] == 2 * 2 * 32 * 3 * 100 * 192 and cost["bytes"] == 2 * 8 * 100 * (64 + 32 + 4)
    assert op.cost(KV_FORMATS["bfloat16"], 1, 1, 1, 1, 7, 10, 20)["bytes"] == 7 * 30 * 2


def test_the_reference_agrees_with_the_checks():
    """Two ways to the same float64: the op's own, of what ``kv_read`` reads, and the checks', of the bytes."""
    for case in CASES[::40]:
        call = case.call
        q, cache, keys = call["q"], call["cache"], call["keys"]
        out, lse = op.reference(**call)
        parts = [one.reference for one, _ in sequences(q, cache, keys, call["lengths"], rules_of(call))]
        expected, expected_lse = (torch.stack(part) for part in zip(*parts, strict=True))
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-6) and torch.allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_cases_cover_what_they_should():
    assert {case.attention.mask for case in CASES} == set(MASKS)
    for formats in (FLOATS, CODES):
        these = [case for case in CASES if case.format in formats]
        assert {(case.format, case.attention.lengths[1]) for case in these} == {(format, keys) for format in formats for keys in _KEYS}
        assert {(case.format, case.attention.dims) for case in these} == {(format, dims) for format in formats for dims in _DIMS}
    assert any(case.whole and case.format.bits == 4 for case in CASES) and any(case.whole and case.format.bits == 8 for case in CASES)
