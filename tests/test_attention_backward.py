"""attention_backward, every impl, against autograd in float64; and training through attention_prefill."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn import functional as F

import taut
from attention_cases import CASES, EXTREMES, LONG, MASKS, PLAIN, SHORT, AttentionCase, laid_out
from cases import DTYPE_CODES, DTYPES
from checks import ROUND_GRADIENTS, ROUNDING, assert_attention_gradients, assert_same_bits
from taut import _native
from taut.ops import attention_backward as op
from taut.ops.attention_backward import attention_backward
from taut.ops.attention_prefill import attention_prefill, attention_prefill_varlen

OP = "attention_backward"
NAMES = ("dq", "dk", "dv", "ds_aux")


def make(case: AttentionCase, with_lse: bool = True) -> dict:
    """The arguments of ``attention_backward``, by name."""
    arguments = case.make()
    out, lse = attention_prefill(**arguments)
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad_out = laid_out(torch.randn(out.shape, generator=generator).to(out.dtype), case.order)
    grad_lse = torch.randn(lse.shape, generator=generator) if with_lse else None
    return {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse} | arguments


def check(impl: str, case: AttentionCase) -> None:
    arguments = make(case, with_lse=case.seed % 2 == 0)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    blocks = [torch.full(arguments[name].shape, float("nan"), dtype=case.dtype) for name in "qkvqk"]
    del blocks
    found = attention_backward(**arguments)
    again = attention_backward(**arguments, tokens_first=True)
    context = f"{case}, seed {case.seed}"
    call = {name: value for name, value in arguments.items() if name not in ("grad_out", "grad_lse", "out", "lse")}
    assert_attention_gradients(found, arguments["grad_out"], arguments["grad_lse"], call, impl=impl, context=context)
    for name, one, other in zip(NAMES, found, again, strict=True):
        assert name == "ds_aux" or (one.is_contiguous() and other.transpose(1, 2).is_contiguous())
        assert_same_bits(one, other.contiguous(), f"{impl} on {context}: {name} twice, in another order of memory")
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
    runs = forced(impl)
    for _ in range(12):
        kv_heads = draw.choice((1, 2, 3))
        case = AttentionCase(
            (kv_heads * draw.choice((1, 2, 3, 4, 5, 7)), kv_heads), (draw.randint(1, 150), draw.randint(1, 260)),
            (draw.randint(1, 150), draw.randint(1, 150)), draw.choice(DTYPES), draw.random() < 0.5, draw.choice((0, 0, 1, 30, 77)),
            draw.choice((0.0, 0.0, 10.0)), draw.choice(MASKS), draw.random() < 0.3, draw.random() < 0.3,
            draw.choice(("contiguous", "tokens_first", "padded")), draw.choice((1, 2)), draw.choice((0.1, 1.0, 4.0)),
        )  # fmt: skip
        if runs(**case.sizes()):
            check(impl, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_mode(impl, dtype, forced):
    """Small integers, and one key that takes all: weights are 1 and 0, dv is a sum of integers bit for bit, no score has a gradient."""
    forced(impl, dtype=DTYPE_CODES[dtype], D=64)
    generator = torch.Generator().manual_seed(5)
    grad_out, v = (torch.randint(-2, 3, (1, heads, 40, 24), generator=generator).to(dtype) for heads in (4, 2))
    k = torch.eye(40)[None, None].expand(1, 2, -1, -1).to(dtype).contiguous()
    picked = torch.randint(0, 40, (1, 4, 40), generator=generator)
    q = F.one_hot(picked, 40).to(dtype)
    out, lse = attention_prefill(q, k, v, softmax_scale=1024.0)
    dq, dk, dv, _ = attention_backward(grad_out, None, q, k, v, out, lse, softmax_scale=1024.0)
    expected = (F.one_hot(picked, 40).double().mT @ grad_out.double()).unflatten(1, (2, 2)).sum(2)
    assert_same_bits(dv, expected.to(dtype) + 0.0, impl)
    assert bool((dq == 0).all()) and bool((dk == 0).all())


@pytest.mark.parametrize("value", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ("causal", "window", "mask", "additive", "padding"))
def test_what_is_hidden_does_not_matter(impl, how, dtype, value, forced):
    """The keys that some queries do not see are NaN: nothing reaches those, and the keys that nobody sees get zeros."""
    forced(impl, dtype=DTYPE_CODES[dtype], D=64)
    case = AttentionCase((6, 2), (50, 170), (64, 48), dtype, causal=how == "causal", window=20 if how == "window" else 0)
    hidden = torch.zeros(170, dtype=torch.bool)
    arguments = case.make()
    if how in ("mask", "additive", "padding"):
        hidden[torch.randperm(170, generator=torch.Generator().manual_seed(1))[:60]] = True
        if how == "padding":
            hidden = torch.arange(170) < 140
        arguments["mask"] = torch.zeros(170).masked_fill(hidden, -torch.inf).expand(50, 170) if how == "additive" else ~hidden
    elif how == "causal":
        hidden[160:] = True
    else:
        hidden[:100] = True
    queries = slice(0, 40) if how == "causal" else slice(30, None) if how == "window" else slice(None)
    keys = ~hidden if how in ("mask", "additive", "padding") else torch.zeros(170, dtype=torch.bool)
    grad_out = torch.randn(1, 6, 50, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    out, lse = attention_prefill(**arguments)
    expected = attention_backward(grad_out, None, out=out, lse=lse, **arguments)
    # Of the same bits: lse and out are those of clean keys.
    for name in "kv":
        poisoned = arguments | {name: arguments[name].clone()}
        poisoned[name][:, :, hidden] = value
        found = attention_backward(grad_out, None, out=out, lse=lse, **poisoned)
        rtol = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
        # Rows in which tensor cores met a hidden NaN are computed again without rounding weights: sums of terms of about 1 move.
        atol = 2 * ROUNDING[dtype][0] if impl.startswith(ROUND_GRADIENTS) else 2e-6
        close = lambda a, b: torch.allclose(a.float(), b.float(), rtol=rtol, atol=atol)  # noqa: B023, E731
        assert close(found[0][:, :, queries], expected[0][:, :, queries]), f"{impl}: dq, {name}"
        for one, other in zip(found[1:3], expected[1:3], strict=True):
            assert close(one[:, :, keys], other[:, :, keys]), f"{impl}: {name}"
            if bool(keys.any()):
                assert bool((one[:, :, hidden] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_and_keys_that_see_nothing(impl, dtype, forced):
    """Their gradients are zeros, whatever is in q and grad_out; and a sink gets what nobody else does: nothing."""
    forced(impl, dtype=DTYPE_CODES[dtype], D=64)
    case = AttentionCase((4, 2), (40, 25), (64, 64), dtype, sinks=True)
    for sinks in (False, True):
        arguments = case.make() | ({} if sinks else {"s_aux": None})
        out, lse = attention_prefill(**arguments)
        grad_out = torch.randn(1, 4, 40, 64).to(dtype)
        if not sinks:
            arguments["q"][:, :, :15], grad_out[:, :, :15] = float("nan"), float("inf")
        dq, dk, dv, ds_aux = attention_backward(grad_out, None, out=out, lse=lse, **arguments)
        assert bool((dq[:, :, :15] == 0).all() and (dq[:, :, 16:] != 0).any() and ds_aux.numel() == 4 * sinks)
        assert bool(dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all())
    arguments = AttentionCase((2, 2), (30, 300), (16, 8), dtype, window=20).make()
    out, lse = attention_prefill(**arguments)
    _, dk, dv, _ = attention_backward(torch.randn(1, 2, 30, 8).to(dtype), None, out=out, lse=lse, **arguments)
    assert bool((dk[:, :, :250] == 0).all() and (dv[:, :, :250] == 0).all() and (dv[:, :, 251:] != 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "queries", "keys"), ((0, 5, 7), (2, 0, 7), (2, 5, 0)))
def test_nothing_to_do(impl, batch, queries, keys, dtype, forced):
    forced(impl, dtype=DTYPE_CODES[dtype], D=8)
    q, k, v = (torch.zeros(batch, *shape, dtype=dtype) for shape in ((4, queries, 8), (2, keys, 8), (2, keys, 6)))
    out, lse = attention_prefill(q, k, v, s_aux=torch.zeros(4))
    found = attention_backward(out, lse, q, k, v, out, lse, s_aux=torch.zeros(4))
    for one, like in zip(found, (q, k, v, torch.zeros(4)), strict=True):
        assert one.shape == like.shape and bool((one == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mask_of_the_lowest_number_is_a_mean(impl, dtype, forced):
    """transformers adds finfo.min; where that is everywhere, lse no longer says of how many keys the mean is."""
    forced(impl, dtype=DTYPE_CODES[dtype], D=16)
    case = AttentionCase((2, 2), (5, 80), (16, 16), dtype, causal=False)
    mask = torch.full((1, 1, 5, 80), torch.finfo(torch.float32).min)
    mask[..., 2:, :50] = 0
    arguments = case.make() | {"mask": mask}
    q, k, v = (arguments[name].clone().requires_grad_() for name in "qkv")
    grad_out = torch.randn(1, 2, 5, 16).to(dtype)
    weights = torch.softmax(q.double() @ k.double().mT / 4 + mask.double(), -1)  # WHY not SDPA: its backward is 80 times off here
    expected = torch.autograd.grad(weights @ v.double(), (q, k, v), grad_out.double())
    atol = 1e-5 if dtype == torch.float32 else 4 * ROUNDING[dtype][0]
    out, lse = attention_prefill(**arguments)
    for one, other in zip(attention_backward(grad_out, None, out=out, lse=lse, **arguments), expected, strict=False):
        assert torch.allclose(one, other, rtol=atol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", (1, 64))
def test_nan_goes_where_it_is_seen(impl, columns, dtype, forced):
    """Of one query's gradient, as where a loss overflows: to that query, and to the keys it sees, in all columns but those of dv."""
    forced(impl, dtype=DTYPE_CODES[dtype], D=64)
    arguments = AttentionCase((4, 2), (40, 90), (64, 64), dtype, window=30).make()
    out, lse = attention_prefill(**arguments)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(dtype)
    grad_out[:, 3, 20, :columns] = float("nan")
    dq, dk, dv, _ = attention_backward(grad_out, None, out=out, lse=lse, **arguments)
    queries, keys = torch.zeros(1, 4, 40, 64, dtype=torch.bool), torch.zeros(1, 2, 90, 64, dtype=torch.bool)
    queries[:, 3, 20], keys[:, 1, 41:71] = True, True
    values = keys & (torch.arange(64) < columns)
    for one, expected in ((dq, queries), (dk, keys), (dv, values)):
        assert bool((one.isnan() == expected).all())


def test_gradients_of_scores_beyond_fp16(impl, forced):
    """What gets to k and q is small enough for fp16, and on the way to it are gradients of scores that are not."""
    case = AttentionCase((4, 2), (20, 2), (64, 64), torch.float16, causal=False)
    forced(impl, **case.sizes())
    arguments = case.make()
    for name, factor in (("q", 2.0**-9), ("k", 2.0**-9), ("v", 8.0)):
        arguments[name] = arguments[name] * factor
    out, lse = attention_prefill(**arguments)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).mul(2048).half()
    grad_scores = (grad_out.double() @ arguments["v"].double().repeat_interleave(2, 1).mT).diff(dim=-1).abs() / 4
    assert float(grad_scores.max()) > torch.finfo(torch.float16).max
    found = attention_backward(grad_out, None, out=out, lse=lse, **arguments)
    assert all(bool(one.isfinite().all()) for one in found)
    assert_attention_gradients(found, grad_out, None, arguments, impl=impl, context="large gradients")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "batch", "lengths"), (((6, 2), 3, (290, 400)), ((3, 1), 1, (290, 400)), ((4, 2), 2, (60, 90))), ids=str)
def test_batch_and_threads_change_nothing(impl, dtype, heads, batch, lengths, forced, threads):
    case = AttentionCase(heads, lengths, (64, 64), dtype, batch=batch, mask="left_padding", sinks=True)
    forced(impl, **case.sizes())
    arguments = make(case)
    threads(1)
    whole = attention_backward(**arguments)
    for count in (2, 3, 7):
        threads(count)
        for name, one, other in zip(NAMES, attention_backward(**arguments), whole, strict=True):
            assert_same_bits(one, other, f"{impl}: {name}, {count} threads")
    single = {name: arguments[name][-1:] for name in ("grad_out", "grad_lse", "q", "k", "v", "out", "lse", "mask")}
    for one, other in zip(attention_backward(**arguments | single)[:3], whole, strict=False):
        assert_same_bits(one, other[-1:], f"{impl}: one sequence")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_varlen_is_each_sequence_alone(impl, dtype, forced):
    forced(impl, dtype=DTYPE_CODES[dtype], D=40)
    generator = torch.Generator().manual_seed(3)
    lengths, key_lengths = (5, 0, 70, 1, 33), (9, 4, 70, 200, 0)
    ends_q, ends_k = (torch.tensor((0, *ls)).cumsum(0).to(torch.int32) for ls in (lengths, key_lengths))
    q = torch.randn(sum(lengths) + 2, 6, 40, generator=generator).to(dtype)
    k, v = (torch.randn(sum(key_lengths) + 3, 2, width, generator=generator).to(dtype) for width in (40, 24))
    slopes, sinks = torch.rand(6, generator=generator), torch.rand(6, generator=generator)
    rules = {"causal": True, "window": 50, "s_aux": sinks, "alibi_slopes": slopes}
    out, lse = attention_prefill_varlen(q, k, v, ends_q, ends_k, **rules)
    grads = torch.randn(out.shape, generator=generator).to(dtype), torch.randn(lse.shape, generator=generator)
    call = (*grads, q, k, v, out, lse, ends_q, ends_k, 40**-0.5, True, 50, 0.0, sinks, slopes)
    *found, ds_aux = _native.ops_for("cpu").attention_backward_varlen(*call)
    sums = torch.zeros(6)
    for s in range(5):
        queries, keys = slice(int(ends_q[s]), int(ends_q[s + 1])), slice(int(ends_k[s]), int(ends_k[s + 1]))
        parts = [t[rows].transpose(0, 1)[None] for t, rows in ((q, queries), (k, keys), (v, keys))]
        alone = attention_prefill(*parts, **rules)
        grads_alone = grads[0][queries].transpose(0, 1)[None], grads[1][:, queries][None].contiguous()
        *expected, ds = attention_backward(*grads_alone, *parts, *alone, **rules)
        for name, one, other, rows in zip(NAMES, found, expected, (queries, keys, keys), strict=False):
            assert_same_bits(one[rows].transpose(0, 1)[None].contiguous(), other.contiguous(), f"{impl}: {name} of sequence {s}")
        sums += ds
    assert torch.allclose(sums, ds_aux, rtol=1e-5, atol=1e-5)
    assert bool((found[0][-2:] == 0).all() and (found[1][-3:] == 0).all() and (found[2][-3:] == 0).all())


def test_sequences_laid_end_to_end_train():
    ends = torch.tensor([0, 9, 9, 30], dtype=torch.int32)
    q, k, v = (torch.randn(30, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.rand(4, requires_grad=True)
    out, lse = attention_prefill_varlen(q, k, v, ends, ends, causal=True, s_aux=sinks)
    grads = torch.randn(out.shape), torch.randn(lse.shape)
    found = torch.autograd.grad((out, lse), (q, k, v, sinks), grads)
    plain = [t.detach() for t in (q, k, v, out, lse)]
    call = (*grads, *plain, ends, ends, 0.25, True, 0, 0.0, sinks.detach(), None)
    for name, one, other in zip(NAMES, found, torch.ops.taut.attention_backward_varlen(*call), strict=True):
        assert_same_bits(one, other, name)


@pytest.mark.parametrize("causal", (False, True))
def test_trains_as_torch_does(causal):
    q, k, v = (torch.randn(2, heads, 50, 32, requires_grad=True) for heads in (6, 2, 2))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).sum(), (q, k, v))
    attention_prefill(q, k, v, causal=causal)[0].sum().backward()  # of which the gradient is one number, expanded
    for one, other in zip((q.grad, k.grad, v.grad), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_gradients_of_differences():
    """What gradcheck does, with steps that float32 can tell apart: along a direction, a difference of losses is the gradient's part."""
    case = AttentionCase((4, 2), (30, 45), (24, 16), softcap=5.0, alibi=True, sinks=True, mask="additive_heads", window=30)
    arguments = case.make()
    generator = torch.Generator().manual_seed(1)
    weigh_out, weigh_lse = torch.randn(1, 4, 30, 16, generator=generator), torch.randn(1, 4, 30, generator=generator)

    def loss(arguments: dict) -> torch.Tensor:
        out, lse = attention_prefill(**arguments)
        return (out.double() * weigh_out).sum() + (lse.double() * weigh_lse).sum()

    names = ("q", "k", "v", "s_aux")
    leaves = {name: arguments[name].clone().requires_grad_() for name in names}
    grads = torch.autograd.grad(loss(arguments | leaves), list(leaves.values()))
    for name, grad in zip(names, grads, strict=True):
        direction, step = torch.randn(grad.shape, generator=generator), 2.0**-7
        ahead, behind = (loss(arguments | {name: arguments[name] + way * direction}) for way in (step, -step))
        slope = float((grad.double() * direction).sum())
        assert abs(float(ahead - behind) / (2 * step) - slope) <= 2e-3 * (1 + abs(slope)), name


def test_only_what_is_asked_for():
    """Gradients of lse alone, of s_aux in its own dtype; a mask or slopes that want one are refused, and so is a second derivative."""
    case = AttentionCase((4, 2), (9, 9), (16, 16), torch.bfloat16, sinks=True, alibi=True, mask="additive")
    arguments = case.make()
    arguments["s_aux"] = arguments["s_aux"].bfloat16().requires_grad_()
    attention_prefill(**arguments)[1].sum().backward()
    assert arguments["s_aux"].grad.dtype == torch.bfloat16 and bool((arguments["s_aux"].grad > 0).all())
    for name in ("mask", "alibi_slopes"):
        refused = arguments | {name: arguments[name].clone().requires_grad_()}
        with pytest.raises(NotImplementedError, match=f"attention_prefill gives {name} no gradient"):
            attention_prefill(**refused)[0].sum().backward()
    q, k, v = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attention_prefill(q, k, v)[0].square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_backward has no backward: attention is differentiable once"):
        grad.sum().backward()


OPCHECKED = (
    AttentionCase((4, 2), (5, 9), (16, 8)),
    AttentionCase((4, 2), (5, 9), (16, 16), torch.bfloat16, order="tokens_first", mask="bool", sinks=True, alibi=True, window=3),
)


@pytest.mark.parametrize("tokens_first", (False, True))
@pytest.mark.parametrize("case", OPCHECKED, ids=str)
def test_opcheck(case, tokens_first):
    arguments = make(case)
    order = (
        "grad_out",
        "grad_lse",
        "q",
        "k",
        "v",
        "out",
        "lse",
        "softmax_scale",
        "causal",
        "window",
        "softcap",
        "mask",
        "s_aux",
        "alibi_slopes",
    )
    call = (*(arguments[name] for name in order), tokens_first)
    torch.library.opcheck(torch.ops.taut.attention_backward.default, call)
    forward = [arguments[name] for name in case.make()]
    forward = [t.requires_grad_() if isinstance(t, torch.Tensor) and i in (0, 1, 2, 8) else t for i, t in enumerate(forward)]
    torch.library.opcheck(torch.ops.taut.attention_prefill.default, (*forward, tokens_first))


def test_opcheck_varlen():
    ends = torch.tensor([0, 2, 7], dtype=torch.int32)
    q, k, v = (torch.randn(7, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    torch.library.opcheck(torch.ops.taut.attention_prefill_varlen.default, (q, k, v, ends, ends, 0.3, True, 0, 0.0, torch.randn(4), None))
    q, k, v = (t.detach() for t in (q, k, v))
    out, lse = attention_prefill_varlen(q, k, v, ends, ends, 0.3, True)
    call = (out, None, q, k, v, out, lse, ends, ends, 0.3, True, 0, 0.0, None, None)
    torch.library.opcheck(torch.ops.taut.attention_backward_varlen.default, call)


@pytest.mark.parametrize("tokens_first", (False, True))
def test_compile_keeps_the_graph_whole(tokens_first):
    arguments = AttentionCase((4, 2), (20, 20), (16, 16), mask="bool", sinks=True).make()
    rest = {name: value for name, value in arguments.items() if name not in "qkv"} | {"tokens_first": tokens_first}
    leaves = [arguments[name].requires_grad_() for name in "qkv"]
    step = lambda q, k, v: (attention_prefill(q * 1.0, k, v, **rest)[0] + 1.0).square().sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(step(*leaves), leaves), strict=True):
        assert_same_bits(one, other, "compiled")


GOOD = {
    "grad_out": torch.zeros(2, 4, 5, 6), "grad_lse": torch.zeros(2, 4, 5), "q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 2, 7, 8),
    "v": torch.zeros(2, 2, 7, 6), "out": torch.zeros(2, 4, 5, 6), "lse": torch.zeros(2, 4, 5), "softmax_scale": 0.5, "causal": False,
    "window": 0, "softcap": 0.0, "mask": None, "s_aux": None, "alibi_slopes": None, "tokens_first": False,
}  # fmt: skip
BAD_CALLS = {
    "grad_out is short": ({"grad_out": torch.zeros(2, 4, 4, 6)}, r"grad_out must be .*\[2, 4, 5, 6\]"),
    "grad_out is bfloat16": ({"grad_out": torch.zeros(2, 4, 5, 6).bfloat16()}, "grad_out must be"),
    "grad_out is elsewhere": ({"grad_out": torch.zeros(2, 4, 5, 6, device="meta")}, "on meta"),
    "grad_lse has a dimension more": ({"grad_lse": torch.zeros(2, 4, 5, 1)}, r"grad_lse must be .*\[2, 4, 5\]"),
    "out has the head dim of q": ({"out": torch.zeros(2, 4, 5, 8)}, r"out must be .*\[2, 4, 5, 6\]"),
    "lse is float64": ({"lse": torch.zeros(2, 4, 5, dtype=torch.float64)}, "lse must be"),
    "lse has kv heads": ({"lse": torch.zeros(2, 2, 5)}, r"lse must be .*\[2, 4, 5\]"),
    "q is 3-D": ({"q": torch.zeros(4, 5, 8)}, "q.* must be .*heads, length, head dim"),
    "k has another head dim": ({"k": torch.zeros(2, 2, 7, 9)}, r"k must be \[2, Hkv, Lk, 8\]"),
    "v has other keys": ({"v": torch.zeros(2, 2, 6, 6)}, r"v must be \[2, 2, 7, Dv\]"),
    "heads do not divide": ({"k": torch.zeros(2, 3, 7, 8), "v": torch.zeros(2, 3, 7, 6)}, "a multiple of those of k and v, got 4 and 3"),
    "k is strided": ({"k": torch.zeros(2, 2, 8, 7).mT}, "k's last dimension must be contiguous"),
    "the window is negative": ({"window": -1}, "window must be 0"),
    "the mask has kv heads": ({"mask": torch.zeros(2, 2, 5, 7)}, "mask must be broadcastable"),
    "s_aux is short": ({"s_aux": torch.zeros(2)}, r"s_aux must be .*\[4\]"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_an_error(what):
    change, message = BAD_CALLS[what]
    call = GOOD | change
    with pytest.raises(ValueError, match=message):
        attention_backward(**call)
    if all(t.device.type == "cpu" for t in call.values() if isinstance(t, torch.Tensor)):
        with pytest.raises(RuntimeError, match="attention_backward: "):
            torch.ops.taut.attention_backward(*call.values())


def test_explain():
    assert [verdict.chosen for verdict in taut.explain(OP, Hq=32, Hkv=8, Lq=1024, D=128)].count(True) == 1
    with pytest.raises(ValueError, match="dtype must be"):
        taut.explain(OP, dtype=7)


def test_cost():
    assert op.cost(1, 4, 2, 3, 3, 8, 8)["flops"] == 2 * 4 * 9 * 40
    assert op.cost(2, 1, 1, 3, 5, 8, 4, causal=True, window=2)["flops"] == 2 * 2 * 6 * 32
    assert op.cost(1, 1, 1, 2, 3, 8, 4, element_bytes=2)["bytes"] == (2 * 24 + 3 * 24) * 2 + 2 * 4
