"""split_rope, every impl, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from cases import DTYPES, covering_set
from checks import ROUNDING, assert_same_bits
from taut.ops import split_rope as op
from taut.ops.split_rope import split_rope

OP = "split_rope"


def make(batch=2, tokens=3, heads=(6, 2), head_dim=16, rotated=16, dtype=torch.float32, rope=torch.float32, shared=True, norms=True):
    generator = torch.Generator().manual_seed(batch * 100 + head_dim + rotated)
    angles = torch.randn(1 if shared else batch, tokens, rotated, generator=generator) * 3
    q_norm, k_norm = ((torch.randn(head_dim, generator=generator) + 1).to(dtype) if norms else None for _ in "qk")
    qkv = (torch.randn(batch, tokens, (heads[0] + 2 * heads[1]) * head_dim, generator=generator) * 2).to(dtype)
    # halves that differ: the contract has a number for each of the R elements
    return qkv, angles.cos().to(rope), angles.sin().to(rope), *heads, head_dim, q_norm, k_norm, 1e-5, 1.0


CASES = covering_set(
    ((1, 2, 5), (1, 3, 17), ((1, 1), (6, 2), (9, 3), (8, 1)), ((2, 2), (16, 16), (20, 8), (96, 24), (64, 64), (10, 0)), DTYPES,
     (False, True), (False, True), (False, True))
)  # fmt: skip


@pytest.mark.parametrize(("batch", "tokens", "heads", "dims", "dtype", "same_rope", "shared", "norms"), CASES, ids=str)
def test_matches_reference(impl, batch, tokens, heads, dims, dtype, same_rope, shared, norms, forced):
    forced(impl)
    arguments = make(batch, tokens, heads, *dims, dtype, dtype if same_rope else torch.float32, shared, norms)
    before = [a.clone() for a in arguments if isinstance(a, torch.Tensor)]
    block = [torch.full((batch, h, tokens, dims[0]), float("nan"), dtype=dtype) for h in (heads[0], heads[1], heads[1])]
    del block
    found, again, expected = split_rope(*arguments), split_rope(*arguments), op.reference(*arguments)
    for old, new in zip(before, (a for a in arguments if isinstance(a, torch.Tensor)), strict=True):
        assert_same_bits(old, new, f"{impl}: an input was written to")
    relative, tiny = ROUNDING[dtype]
    for name, out, same, right in zip("qkv", found, again, expected, strict=True):
        assert out.dtype == dtype and out.shape == right.shape and out.is_contiguous()
        assert_same_bits(out, same, f"{impl}: {name}, twice")
        bound = 2.0**-19 * right.abs().amax(-1, keepdim=True)  # of a turned pair, either element may be the large one
        bound = bound + (relative * (right.abs() + bound)).clamp(min=tiny)
        assert bool(((out.double() - right).abs() <= bound).all()), f"{impl}: {name}"
    assert_same_bits(found[2].transpose(1, 2).flatten(2), arguments[0][..., (heads[0] + heads[1]) * dims[0] :], "v is copied")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_impls_agree_bit_for_bit(impl, dtype, forced):
    arguments = make(2, 5, (9, 3), 80, 40, dtype)
    expected = split_rope(*arguments)
    forced(impl)
    for name, out, right in zip("qkv", split_rope(*arguments), expected, strict=True):
        assert_same_bits(out, right, f"{impl}: {name}")


def test_strided(impl, forced):
    forced(impl)
    qkv, cos, sin, *rest = make()
    expected = split_rope(qkv, cos, sin, *rest)
    gaps = [torch.stack((t, torch.full_like(t, float("nan"))), -1)[..., 0] for t in (qkv, cos, sin)]
    assert not gaps[0].is_contiguous()
    for out, right in zip(split_rope(*gaps, *rest), expected, strict=True):
        assert_same_bits(out, right, impl)


def test_batch_and_threads_change_nothing(impl, forced, threads):
    forced(impl)
    qkv, cos, sin, *rest = make(4, 60, (9, 3), 64, 64, torch.bfloat16, shared=False)
    threads(1)
    whole = split_rope(qkv, cos, sin, *rest)
    for count in (2, 3):
        threads(count)
        for out, right in zip(split_rope(qkv, cos, sin, *rest), whole, strict=True):
            assert_same_bits(out, right, f"{impl}: {count} threads")
    for out, right in zip(split_rope(qkv[2:3], cos[2:3], sin[2:3], *rest), whole, strict=True):
        assert_same_bits(out, right[2:3], f"{impl}: one sequence")


def test_nothing_to_do():
    q, k, v = split_rope(*make(batch=0, shared=True))
    assert q.shape == (0, 6, 3, 16) and k.shape == v.shape == (0, 2, 3, 16)


@pytest.mark.parametrize("norms", (False, True))
def test_opcheck(norms):
    torch.library.opcheck(torch.ops.taut.split_rope.default, make(norms=norms))


def test_compile_keeps_the_graph_whole():
    qkv, *rest = make()
    compiled = torch.compile(lambda qkv: split_rope(qkv * 1.0, *rest)[0] + 1.0, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(qkv), split_rope(qkv, *rest)[0] + 1.0, "compiled")


def test_training_is_refused():
    qkv, *rest = make()
    with pytest.raises(NotImplementedError, match="split_rope has no backward"):
        split_rope(qkv.requires_grad_(), *rest)[1].sum().backward()


NAMES = ("qkv", "cos", "sin", "q_heads", "kv_heads", "head_dim", "q_norm", "k_norm", "norm_eps", "norm_offset")
BAD_CALLS = {
    "qkv is 2-D": ({"qkv": torch.zeros(3, 160)}, r"qkv must be \[B, T, 160\]"),
    "qkv is narrow": ({"qkv": torch.zeros(2, 3, 150)}, r"qkv must be \[B, T, 160\]"),
    "qkv is float64": ({"qkv": torch.zeros(2, 3, 160, dtype=torch.float64)}, "qkv must be float32, bfloat16 or float16"),
    "qkv is elsewhere": ({"qkv": torch.zeros(2, 3, 160, device="meta")}, "qkv is on meta"),
    "no heads": ({"kv_heads": 0}, "kv_heads and head_dim must be"),
    "R is odd": ({"cos": torch.zeros(1, 3, 15), "sin": torch.zeros(1, 3, 15)}, "cos must be"),
    "R is over D": ({"cos": torch.zeros(1, 3, 18), "sin": torch.zeros(1, 3, 18)}, "cos must be"),
    "cos has other tokens": ({"cos": torch.zeros(1, 4, 16)}, "cos must be"),
    "cos has another batch": ({"cos": torch.zeros(3, 3, 16)}, "cos must be"),
    "sin is another": ({"sin": torch.zeros(1, 3, 14)}, "sin must have the shape of cos"),
    "cos is float16": ({"cos": torch.zeros(1, 3, 16, dtype=torch.float16)}, "cos and sin must"),
    "q_norm is long": ({"q_norm": torch.ones(17)}, r"q_norm must be .*\[16\]"),
    "k_norm is float16": ({"k_norm": torch.ones(16, dtype=torch.float16)}, "k_norm must"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_CALLS)
def test_bad_call_is_an_error(what):
    change, message = BAD_CALLS[what]
    call = dict(zip(NAMES, make(), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        split_rope(**call)
    if call["qkv"].device.type == "cpu":
        with pytest.raises(RuntimeError, match="split_rope: "):
            torch.ops.taut.split_rope(*call.values())


def test_cost():
    assert op.cost(1, 2, 4, 2, 8)["bytes"] == 2 * 2 * 8 * 8 * 4
