"""attention_prefill, every impl, against the float64 reference."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import taut
from attention_cases import CASES, EXTREMES, LONG, MASKS, PLAIN, SHORT, AttentionCase
from cases import DTYPE_CODES, DTYPES
from checks import ROUND_SOFTMAX, ROUNDING, assert_attention, assert_same_bits
from taut.ops import attention_prefill as op
from taut.ops.attention_prefill import attention_prefill, attention_prefill_varlen

OP = "attention_prefill"


def dtype_of(impl: str) -> torch.dtype:
    """float32, or a dtype that an impl takes which has no float32."""
    if impl.startswith("cpu_avx512bf16"):
        return torch.bfloat16
    return torch.float16 if impl.startswith(ROUND_SOFTMAX) else torch.float32


def tolerance(impl: str, dtype: torch.dtype) -> float:
    """How far two results of ``impl`` may lie apart that differ in the order of sums, where v is of the size of 1."""
    return 2 * ROUNDING[dtype][0] if impl.startswith(ROUND_SOFTMAX) else 2.0**-23


def check(impl: str, case: AttentionCase, arguments: dict | None = None) -> None:
    arguments = case.make() if arguments is None else arguments
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    (queries, _), heads = case.lengths, case.heads[0]
    blocks = [torch.full((case.batch, heads, queries, case.dims[1]), float("nan"), dtype=case.dtype) for _ in range(2)]
    blocks.append(torch.full((case.batch, heads, queries), float("nan")))
    del blocks
    out, lse = attention_prefill(**arguments)
    again, lse_again = attention_prefill(**arguments, tokens_first=True)
    assert out.is_contiguous() and again.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    context = f"{case}, seed {case.seed}"
    assert_attention(out, lse, arguments, impl=impl, context=context)
    assert_same_bits(out, again.contiguous(), f"{impl} on {context}: twice, in another order of memory")
    assert_same_bits(lse, lse_again, f"{impl} on {context}: lse, twice")
    for name, value in before.items():
        assert_same_bits(arguments[name], value, f"{impl} on {context}: {name} was written to")


@pytest.mark.parametrize("case", CASES + LONG + SHORT + PLAIN + EXTREMES, ids=str)
def test_matches_reference(impl, case, forced):
    forced(impl, **case.sizes())
    check(impl, case)


def test_fuzz(impl, forced):
    """Shapes and rules at random. WHY one seed a day: a run can be repeated, and runs differ."""
    import datetime

    seed = int(datetime.date.today().strftime("%Y%m%d"))
    print(f"seed {seed}")
    draw = random.Random(seed)
    runs = forced(impl, dtype=DTYPE_CODES[dtype_of(impl)])
    queries, keys = (24, 200) if "emulated" in impl else (150, 260)
    for _ in range(12):
        kv_heads = draw.choice((1, 2, 3))
        case = AttentionCase(
            (kv_heads * draw.choice((1, 2, 3, 4, 5, 7)), kv_heads), (draw.randint(1, queries), draw.randint(1, keys)),
            (draw.randint(1, 150), draw.randint(1, 150)), draw.choice(DTYPES), draw.random() < 0.5, draw.choice((0, 0, 1, 30, 77)),
            draw.choice((0.0, 0.0, 10.0)), draw.choice(MASKS), draw.random() < 0.3, draw.random() < 0.3,
            draw.choice(("contiguous", "tokens_first", "padded")), draw.choice((1, 2)), draw.choice((0.1, 1.0, 4.0)),
        )  # fmt: skip
        if runs(**case.sizes()):
            check(impl, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_key_gives_its_value(impl, dtype, forced):
    forced(impl, dtype=DTYPE_CODES[dtype], D=64)
    v = torch.randn(2, 3, 1, 40).to(dtype)
    q, k = torch.randn(2, 6, 19, 64).to(dtype), torch.randn(2, 3, 1, 64).to(dtype)
    out, lse = attention_prefill(q, k, v)
    assert_same_bits(out, v.repeat_interleave(2, 1).expand(-1, -1, 19, -1).contiguous(), impl)
    exact = (q.double() @ k.double().repeat_interleave(2, 1).mT)[..., 0] / 8
    assert bool(((lse.double() - exact).abs() <= 2.0**-20 * (1 + exact.abs())).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_mode(impl, dtype, forced):
    """Small integers, and scores that are all the same or far apart: each result is a mean of some v, or one of them, bit for bit."""
    forced(impl, dtype=DTYPE_CODES[dtype], D=64)
    generator = torch.Generator().manual_seed(5)
    v = torch.randint(-8, 9, (1, 2, 64, 48), generator=generator).to(dtype)
    q, k = torch.zeros(1, 4, 40, 64, dtype=dtype), torch.randn(1, 2, 64, 64, generator=generator).to(dtype)
    out, _ = attention_prefill(q, k, v)
    mean = v.double().mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 40, -1)
    assert_same_bits(out, mean.to(dtype).contiguous(), f"{impl}: the mean of 64")
    q = torch.randint(-2, 3, (1, 4, 40, 64), generator=generator).to(dtype)
    k = torch.randint(-2, 3, (1, 2, 64, 64), generator=generator).to(dtype)
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT
    best = scores.topk(2, -1).values
    # The next best key weighs nothing in fp32. WHY ln 2: then scores are whole exponents of 2, which nothing rounds.
    found, _ = attention_prefill(q, k, v, softmax_scale=256 * math.log(2))
    clear = best[..., 0] > best[..., 1]
    picked = v.repeat_interleave(2, 1).gather(2, scores.argmax(-1, keepdim=True).expand(-1, -1, -1, 48))
    assert clear.any()
    assert_same_bits(found[clear], picked[clear], f"{impl}: the best key's value")


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ("causal", "window", "mask", "additive", "padding"))
def test_what_is_hidden_does_not_matter(impl, how, dtype, value, forced):
    forced(impl, dtype=DTYPE_CODES[dtype], D=64, rules=int(how not in ("causal", "window")))
    case = AttentionCase((6, 2), (50, 170), (64, 48), dtype, causal=how == "causal", window=20 if how == "window" else 0)
    arguments = case.make()
    hidden = torch.zeros(170, dtype=torch.bool)
    if how in ("mask", "additive", "padding"):
        hidden[torch.randperm(170, generator=torch.Generator().manual_seed(1))[:60]] = True
        if how == "padding":
            hidden = torch.arange(170) < 140
        bias = torch.zeros(170).masked_fill(hidden, -torch.inf)
        arguments["mask"] = bias.expand(50, 170) if how == "additive" else ~hidden
    elif how == "causal":
        hidden[160:] = True
    else:
        hidden[:100] = True
    queries = slice(0, 40) if how == "causal" else slice(30, None) if how == "window" else slice(None)
    expected = attention_prefill(**arguments)
    for name in "kv":
        poisoned = arguments[name].clone()
        poisoned[:, :, hidden] = value
        found = attention_prefill(**arguments | {name: poisoned})
        for one, other in zip(found, expected, strict=True):
            # Two last places of the dtype: another order of sums. 2^-23 is two steps of fp16's subnormal numbers.
            rtol = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[one.dtype if one.dim() == 4 else torch.float32]
            assert torch.allclose(one[:, :, queries].float(), other[:, :, queries].float(), rtol=rtol, atol=tolerance(impl, dtype)), (
                f"{impl}: {name}"
            )
        if how == "causal" and name == "v":
            assert bool(found[0][:, :, -1].isnan().all() if value != value else found[0][:, :, -1].isinf().all())


def test_rows_that_see_nothing(impl, forced):
    forced(impl, dtype=DTYPE_CODES[dtype_of(impl)])
    case = AttentionCase((4, 2), (40, 25), (64, 64), dtype_of(impl))
    arguments = case.make()
    out, lse = attention_prefill(**arguments)
    assert bool((out[:, :, :15] == 0).all() and (lse[:, :, :15] == -torch.inf).all() and out[:, :, 15:].isfinite().all())
    assert bool(lse[:, :, 15:].isfinite().all())
    arguments["s_aux"] = torch.tensor([0.5, -1.0, -torch.inf, 3.0])  # one that is none
    out, lse = attention_prefill(**arguments)
    assert bool((out[:, :, :15] == 0).all())
    assert torch.allclose(lse[:, :, :15], arguments["s_aux"][:, None].expand(-1, 15)[None], rtol=1e-6)
    if "wgmma" in impl:
        return  # where there is no key at all, another impl is chosen
    q, k, v = (torch.zeros(shape, dtype=dtype_of(impl)) for shape in ((1, 2, 3, 8), (1, 1, 0, 8), (1, 1, 0, 5)))
    out, lse = attention_prefill(q, k, v)
    assert out.shape == (1, 2, 3, 5) and bool((out == 0).all() and (lse == -torch.inf).all())


@pytest.mark.parametrize("shape", ((0, 4, 5), (2, 4, 0)))
def test_nothing_to_do(impl, shape, forced):
    forced(impl, dtype=DTYPE_CODES[dtype_of(impl)])
    batch, heads, queries = shape
    q, k, v = (torch.zeros(each, dtype=dtype_of(impl)) for each in ((batch, heads, queries, 8), (batch, 2, 7, 8), (batch, 2, 7, 6)))
    out, lse = attention_prefill(q, k, v)
    assert out.shape == (*shape, 6) and lse.shape == shape


def test_a_mask_of_the_lowest_number_is_a_mean(impl, forced):
    """transformers adds finfo.min; where that is everywhere, torch gives the mean of v, and so do we."""
    dtype = dtype_of(impl)
    forced(impl, dtype=DTYPE_CODES[dtype], rules=1)
    q, k, v = (torch.randn(1, 2, length, 16).to(dtype) for length in (5, 80, 80))
    mask = torch.full((1, 1, 5, 80), torch.finfo(torch.float32).min)
    mask[..., 2:, :50] = 0
    out, _ = attention_prefill(q, k, v, mask=mask)
    atol = max(1e-5, tolerance(impl, dtype))
    q, k, v, out = (t.float() for t in (q, k, v, out))
    assert torch.allclose(out, F.scaled_dot_product_attention(q, k, v, mask), atol=atol)
    assert torch.allclose(out[:, :, :2], v.mean(2, keepdim=True).expand(-1, -1, 2, -1), atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_and_threads_change_nothing(impl, dtype, forced, threads):
    lengths = (14, 140) if "emulated" in impl else (190, 190)
    case = AttentionCase((6, 2), lengths, (64, 64), dtype, batch=3, mask="left_padding")
    forced(impl, **case.sizes())
    arguments = case.make()
    threads(1)
    whole = attention_prefill(**arguments)
    for count in (2, 3):
        threads(count)
        for one, other in zip(attention_prefill(**arguments), whole, strict=True):
            assert_same_bits(one, other, f"{impl}: {count} threads")
    single = {name: arguments[name][1:2] for name in ("q", "k", "v", "mask")}
    for one, other in zip(attention_prefill(**arguments | single), whole, strict=True):
        assert_same_bits(one, other[1:2], f"{impl}: one sequence")


def test_left_padding_is_the_prompt_alone(impl, forced):
    """A padded prompt differs from the prompt alone by rounding only: its keys fall into other tiles."""
    forced(impl, dtype=DTYPE_CODES[dtype_of(impl)], rules=1)
    case = AttentionCase((4, 2), (90, 90), (64, 64), dtype_of(impl), batch=2)
    arguments = case.make()
    mask = torch.arange(90)[None, :] >= torch.tensor([0, 37])[:, None]
    out, lse = attention_prefill(**arguments | {"mask": mask[:, None, None]})
    alone = {name: arguments[name][1:, :, 37:] for name in "qkv"}
    expected, expected_lse = attention_prefill(**arguments | alone)
    assert torch.allclose(out[1:, :, 37:], expected, atol=max(1e-5, tolerance(impl, out.dtype)))
    assert torch.allclose(lse[1:, :, 37:], expected_lse, atol=1e-5)
    assert bool((out[1, :, :37] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_is_each_sequence_alone(impl, dtype, forced):
    plain = "wgmma" in impl  # it takes no slopes
    forced(impl, dtype=DTYPE_CODES[dtype], D=40)
    generator = torch.Generator().manual_seed(3)
    lengths, key_lengths = (5, 0, 70, 1, 33), (9, 4, 70, 200, 0)
    ends_q, ends_k = (torch.tensor((0, *ls)).cumsum(0).to(torch.int32) for ls in (lengths, key_lengths))
    q = torch.randn(sum(lengths) + 2, 6, 40, generator=generator).to(dtype)
    k, v = (torch.randn(sum(key_lengths), 2, width, generator=generator).to(dtype) for width in (40, 24))
    slopes = None if plain else torch.rand(6, generator=generator)
    out, lse = attention_prefill_varlen(q, k, v, ends_q, ends_k, causal=True, window=50, alibi_slopes=slopes)
    for s in range(5):
        queries, keys = slice(int(ends_q[s]), int(ends_q[s + 1])), slice(int(ends_k[s]), int(ends_k[s + 1]))
        if plain and key_lengths[s] == 0:  # which it does not take alone
            assert bool((out[queries] == 0).all() and (lse[:, queries] == -torch.inf).all())
            continue
        parts = (t[rows].transpose(0, 1)[None] for t, rows in ((q, queries), (k, keys), (v, keys)))
        alone, alone_lse = attention_prefill(*parts, causal=True, window=50, alibi_slopes=slopes)
        assert_same_bits(out[queries].transpose(0, 1)[None].contiguous(), alone, f"{impl}: sequence {s}")
        assert_same_bits(lse[:, queries][None].contiguous(), alone_lse, f"{impl}: lse of sequence {s}")
    assert bool((out[-2:] == 0).all() and (lse[:, -2:] == -torch.inf).all())


OPCHECKED = (
    AttentionCase((4, 2), (5, 9), (16, 8)),
    AttentionCase((4, 2), (5, 9), (16, 16), torch.bfloat16, order="tokens_first", mask="bool", sinks=True, alibi=True, window=3),
)


@pytest.mark.parametrize("tokens_first", (False, True))
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case, tokens_first):
    torch.library.opcheck(torch.ops.taut.attention_prefill.default, (*case.make().values(), tokens_first))


def test_opcheck_varlen():
    ends = torch.tensor([0, 2, 7], dtype=torch.int32)
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    torch.library.opcheck(torch.ops.taut.attention_prefill_varlen.default, (q, k, v, ends, ends, 0.3, True, 0, 0.0, None, None))


@pytest.mark.parametrize("tokens_first", (False, True))
def test_compile_keeps_the_graph_whole(tokens_first):
    arguments = AttentionCase((4, 2), (20, 20), (16, 16), mask="bool").make()
    rest = {name: value for name, value in arguments.items() if name != "q"} | {"tokens_first": tokens_first}
    compiled = torch.compile(lambda q: attention_prefill(q * 1.0, **rest)[0] + 1.0, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(arguments["q"]), attention_prefill(**arguments, tokens_first=tokens_first)[0] + 1.0, "compiled")


GOOD = {
    "q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 7, 8), "v": torch.zeros(2, 2, 7, 6), "softmax_scale": 0.5, "causal": False,
    "window": 0, "softcap": 0.0, "mask": None, "s_aux": None, "alibi_slopes": None, "tokens_first": False,
}  # fmt: skip
BAD_CALLS = {
    "q is 3-D": ({"q": torch.zeros(4, 5, 8)}, "q.* must be .*heads, length, head dim"),
    "q is float64": ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.float64)}, "q must be float32, bfloat16 or float16"),
    "k is bfloat16": ({"k": torch.zeros(2, 2, 7, 8, dtype=torch.bfloat16)}, "k.* must have the dtype of q"),
    "k has another head dim": ({"k": torch.zeros(2, 2, 7, 9)}, r"k must be \[2, Hkv, Lk, 8\]"),
    "k has another batch": ({"k": torch.zeros(1, 2, 7, 8)}, r"k must be \[2, Hkv, Lk, 8\]"),
    "v has other keys": ({"v": torch.zeros(2, 2, 6, 6)}, r"v must be \[2, 2, 7, Dv\]"),
    "v has other heads": ({"v": torch.zeros(2, 4, 7, 6)}, r"v must be \[2, 2, 7, Dv\]"),
    "heads do not divide": ({"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 6)}, "a multiple of those of k and v, got 4 and 3"),
    "the head dim is large": ({"q": torch.zeros(2, 4, 5, 257), "k": torch.zeros(2, 2, 7, 257)}, "head dims must be 1 to 256, got 257"),
    "the value dim is 0": ({"v": torch.zeros(2, 2, 7, 0)}, "head dims must be 1 to 256, got 8 of q and k, 0 of v"),
    "k is strided": ({"k": torch.zeros(2, 2, 8, 7).mT}, "k's last dimension must be contiguous"),
    "q is elsewhere": ({"q": torch.zeros(2, 4, 5, 8, device="meta")}, "q is on meta"),
    "the scale is NaN": ({"softmax_scale": float("nan")}, "softmax_scale must be finite"),
    "the window is negative": ({"window": -1}, "window must be 0"),
    "the softcap is negative": ({"softcap": -1.0}, "softcap must be 0"),
    "the mask is int": ({"mask": torch.zeros(5, 7, dtype=torch.int32)}, "mask must be bool"),
    "the mask has other keys": ({"mask": torch.zeros(5, 8)}, r"mask must be broadcastable to .*\[2, 4, 5, 7\], got \[5, 8\]"),
    "the mask has kv heads": ({"mask": torch.zeros(2, 2, 5, 7)}, "mask must be broadcastable"),
    "the mask is 5-D": ({"mask": torch.zeros(1, 1, 1, 5, 7)}, "mask must be broadcastable"),
    "s_aux is short": ({"s_aux": torch.zeros(2)}, r"s_aux must be .*\[4\]"),
    "slopes are int": ({"alibi_slopes": torch.zeros(4, dtype=torch.int64)}, r"alibi_slopes must be .*\[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_an_error(what):
    change, message = BAD_CALLS[what]
    call = GOOD | change
    with pytest.raises(ValueError, match=message):
        attention_prefill(**call)
    if call["q"].device.type == "cpu":
        with pytest.raises(RuntimeError, match="attention_prefill: "):
            torch.ops.taut.attention_prefill(*call.values())


ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
BAD_ENDS = {
    "falls": (torch.tensor([0, 4, 3], dtype=torch.int32), ENDS, "cu_seqlens_q must not fall"),
    "begins late": (ENDS, torch.tensor([1, 2, 3], dtype=torch.int32), "cu_seqlens_k must begin with 0"),
    "is negative": (torch.tensor([0, -1, 3], dtype=torch.int32), ENDS, "cu_seqlens_q must not fall"),
    "ends late": (ENDS, torch.tensor([0, 2, 8], dtype=torch.int32), "cu_seqlens_k must end within the 7 tokens"),
    "is int64": (ENDS.long(), ENDS, "cu_seqlens_q must be int32"),
    "is 2-D": (ENDS[None], ENDS, "cu_seqlens_q must be int32"),
    "is empty": (ENDS[:0], ENDS[:0], "cu_seqlens_q must be int32"),
    "is short": (ENDS, ENDS[:2], "must be of one length"),
}


@pytest.mark.parametrize("what", BAD_ENDS)
def test_bad_sequence_ends_are_an_error(what):
    ends_q, ends_k, message = BAD_ENDS[what]
    q, k, v = torch.zeros(5, 4, 8), torch.zeros(7, 2, 8), torch.zeros(7, 2, 8)
    with pytest.raises(ValueError, match=message):
        attention_prefill_varlen(q, k, v, ends_q, ends_k)
    with pytest.raises(RuntimeError, match="attention_prefill_varlen: "):
        torch.ops.taut.attention_prefill_varlen(q, k, v, ends_q, ends_k, 1.0, False, 0, 0.0, None, None)


def test_explain():
    chosen = [verdict.impl for verdict in taut.explain(OP, Hq=32, Hkv=8, Lq=1024, D=128) if verdict.chosen]
    assert len(chosen) == 1
    with pytest.raises(ValueError, match="dtype must be"):
        taut.explain(OP, dtype=7)


def test_cost():
    assert op.cost(1, 4, 2, 3, 3, 8, 8)["flops"] == 2 * 4 * 9 * 16
    assert op.cost(1, 4, 2, 3, 3, 8, 8, causal=True)["flops"] == 2 * 4 * 6 * 16
    assert op.cost(2, 1, 1, 3, 5, 8, 4, causal=True, window=2)["flops"] == 2 * 2 * 6 * 12
    assert op.cost(1, 1, 1, 2, 3, 8, 4, element_bytes=2)["bytes"] == (2 * 12 + 3 * 12) * 2 + 2 * 4


def test_agrees_with_torch():
    q, k, v = torch.randn(2, 6, 50, 32), torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(attention_prefill(q, k, v, causal=True)[0], expected, atol=1e-5)
    assert torch.allclose(op.reference(q, k, v, causal=True)[0].float(), expected, atol=1e-5)


def test_cases_cover_what_they_should():
    assert {case.mask for case in CASES} == set(MASKS) and {case.dtype for case in CASES} == set(DTYPES)
    assert replace(CASES[0]).seed == CASES[0].seed
