"""decoder_layers, every impl of its attention, against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import Tensor

import taut
from cases import DTYPES, INT4, INT4_ZEROS, INT8, pack, random_weight
from checks import assert_same_bits
from taut.formats import WeightFormat, activation_code
from taut.ops import decoder_layers as op
from taut.ops.decoder_layers import LINEARS, MOST_TOKENS, NUMBERS, SIZES, WEIGHTS, decoder_layers
from taut.ops.fused_linear import fused_linear
from taut.ops.quantize_weight import reference as weight_reference
from taut.ops.split_rope import split_rope

OP = "decoder_layers"
NAN = float("nan")


@dataclass
class Stack:
    """Arguments of one call, and the same in dense weights for the reference."""

    layers: int = 2
    batch: int = 2
    tokens: int = 1
    q_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    hidden: int = 64
    intermediate: int = 96
    rotated: int = 0
    glu: int = 2
    past: int = 37
    begin: int = 0
    window: int = 0
    softcap: float = 0.0
    multiplier: float = 1.0
    offset: float = 0.0
    norms: bool = True
    post_norms: bool = False
    qk_norms: bool = False
    bias: bool = False
    shared_rope: bool = True
    format: WeightFormat = INT4_ZEROS
    activations: str = "float"
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    mask: Tensor | None = None
    dense: list[dict[str, Tensor | None]] = field(default_factory=list)
    arguments: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        inner, hidden = self.q_heads * self.head_dim, self.hidden
        shapes = {
            "qkv": (inner + 2 * self.kv_heads * self.head_dim, hidden), "o": (hidden, inner),
            "gate_up": (2 * self.intermediate, hidden), "down": (hidden, self.intermediate),
        }  # fmt: skip
        present = {"norm": self.norms, "post_norm": self.post_norms, "bias": self.bias, "q_norm": self.qk_norms, "k_norm": self.qk_norms}
        packed: list[Tensor] = []
        numbers: list[int] = []
        for index in range(self.layers):
            dense: dict[str, Tensor | None] = {}
            for name in WEIGHTS:
                if name in shapes:
                    n, k = shapes[name]
                    made = random_weight(n, k, self.format, generator)
                    size = 2 * k**-0.5 * (1 if self.format.name == "int4" else 0.2)
                    made = made._replace(scales=(made.scales.float() * size).half())
                    packed.append(pack(*made, k, self.format))
                    dense[name] = weight_reference(*made, k, self.format, self.activations)
                    code = activation_code(self.activations, self.format)
                    numbers += [self.format.code, self.format.group_size, int(self.format.zeros), code]
                    continue
                kind = next(kind for kind in ("post_norm", "q_norm", "k_norm", "norm", "bias") if name.endswith(kind))
                size = (
                    shapes[name.removesuffix("_bias")][0] if kind == "bias" else self.head_dim if kind in ("q_norm", "k_norm") else hidden
                )
                value = (draw(size) * 0.5 + (kind != "bias")).to(self.dtype) if present[kind] else None
                dense[name] = value
                packed.append(torch.empty(0) if value is None else value)
            self.dense.append(dense)
            numbers += [index % 2, self.begin, self.past, self.window]
        angles = [draw(1 if self.shared_rope else self.batch, self.tokens, self.rotated or self.head_dim) * 3 for _ in range(2)]
        capacity, cache_dtype = self.past + self.tokens + 3, self.cache_dtype or self.dtype
        caches = [draw(self.batch, self.kv_heads, capacity, self.head_dim).to(cache_dtype) for _ in range(2 * self.layers)]
        for cache in caches:  # what is outside of the rows in use must not matter
            cache[:, :, : self.begin], cache[:, :, self.past :] = NAN, NAN
        self.arguments = {
            "x": draw(self.batch, self.tokens, hidden).to(self.dtype),
            "cos": [a.cos() for a in angles], "sin": [a.sin() for a in angles], "mask": self.mask,
            "keys": caches[: self.layers], "values": caches[self.layers :], "weights": packed,
            "sizes": [self.q_heads, self.kv_heads, self.head_dim, hidden, self.intermediate, self.glu], "layers": numbers,
            "numbers": [1e-5, self.offset, self.head_dim**-0.5 * 2, self.softcap, 1e-6, 0.5, self.multiplier],
        }  # fmt: skip

    def run(self, **changed) -> tuple[Tensor, list[Tensor]]:
        """The result and the caches as the call leaves them; those of ``arguments`` stay as they are."""
        arguments = self.arguments | changed
        arguments["keys"], arguments["values"] = ([t.clone() for t in arguments[name]] for name in ("keys", "values"))
        return decoder_layers(**arguments), arguments["keys"] + arguments["values"]

    def reference(self) -> tuple[Tensor, list[Tensor]]:
        a = self.arguments
        keys, values = ([t.double() for t in a[name]] for name in ("keys", "values"))
        sizes, numbers, x = dict(zip(SIZES, a["sizes"], strict=True)), dict(zip(NUMBERS, a["numbers"], strict=True)), a["x"].double()
        for i, (k, v, w) in enumerate(zip(keys, values, self.dense, strict=True)):
            rope = a["cos"][i % 2], a["sin"][i % 2]
            where = self.begin, self.past, self.window
            x = op.reference(x, rope, self.mask, k, v, w, sizes, numbers, *where, activations=self.activations)
        return x, keys + values


def tail_mask(batch: int, columns: int, hidden: int) -> Tensor:
    mask = torch.ones(batch, columns, dtype=torch.uint8)
    for b in range(batch):
        mask[b, : hidden * (b + 1)] = 0
    return mask


STACKS = {
    "plain": {},
    "one head": {"q_heads": 1, "kv_heads": 1, "head_dim": 16, "batch": 1},
    "no past": {"past": 0, "tokens": 3},
    "SmolLM": {"q_heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 576, "intermediate": 160, "layers": 1, "past": 255},
    "several chunks": {"past": 900, "tokens": 2},
    "a chunk's seam": {"past": 254, "tokens": 4},
    "many tokens": {"tokens": 16, "batch": 1, "q_heads": 7, "kv_heads": 1, "past": 300},
    "more rows than the small loops take": {"tokens": 3, "batch": 9},
    "window": {"past": 900, "window": 300, "begin": 560, "tokens": 5},
    "a window of one": {"past": 40, "window": 1, "tokens": 2},
    "begin": {"past": 700, "begin": 300},
    "mask": {"past": 300, "tokens": 2, "mask": tail_mask(2, 302, 100)},
    "mask of more columns, bool": {"past": 30, "mask": tail_mask(2, 100, 72)[:, :].bool()},
    "softcap": {"softcap": 3.0, "past": 300},
    "Gemma 3": {"post_norms": True, "qk_norms": True, "offset": 1.0, "glu": 3, "window": 20},
    "only post norms": {"norms": False, "post_norms": True},
    "Qwen": {"bias": True, "qk_norms": True, "shared_rope": False},
    "Granite": {"multiplier": 0.22},
    "Phi-3": {"rotated": 24, "head_dim": 96},
    "gelu": {"glu": 4},
    "8 a head": {"head_dim": 24, "q_heads": 4, "kv_heads": 4},
    "odd head": {"head_dim": 10, "q_heads": 4, "kv_heads": 2, "past": 300},
    "int8 weights": {"format": INT8},
}
BOUNDS = {torch.float32: 4e-6, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}  # 16 bits: a dozen roundings a layer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STACKS)
def test_matches_reference(impl, name, dtype, forced):
    stack = Stack(**STACKS[name], dtype=dtype)
    forced(impl, head_dim=stack.head_dim)
    before = {key: value.clone() for key, value in stack.arguments.items() if isinstance(value, Tensor)}
    weights = [w.clone() for w in stack.arguments["weights"]]
    out, caches = stack.run()
    again, _ = stack.run()
    assert_same_bits(out, again, f"{impl}, twice")
    for key, value in before.items():
        assert_same_bits(stack.arguments[key], value, f"{impl}: {key} was written to")
    for old, new in zip(weights, stack.arguments["weights"], strict=True):
        assert_same_bits(old, new, f"{impl}: weights were written to")
    assert_close(stack, out, caches, impl)


def assert_close(stack: Stack, out: Tensor, caches: list[Tensor], impl: str, bound: float | None = None) -> None:
    expected, expected_caches = stack.reference()
    assert out.dtype == stack.dtype and out.shape == expected.shape
    bound = bound or BOUNDS[stack.dtype]
    error = float((out.double() - expected).abs().max() / expected.abs().max())
    assert error <= bound, f"{impl}: off by {error:.2e} of the largest element, where {bound:.2e} is allowed"
    end = stack.past + stack.tokens
    originals = stack.arguments["keys"] + stack.arguments["values"]
    for cache, right, original in zip(caches, expected_caches, originals, strict=True):
        new, right = cache[:, :, stack.past : end].double(), right[:, :, stack.past : end]
        assert float((new - right).abs().max() / right.abs().max()) <= bound, f"{impl}: new rows of a cache"
        kept = torch.cat((cache[:, :, : stack.past], cache[:, :, end:]), 2)
        assert_same_bits(kept, torch.cat((original[:, :, : stack.past], original[:, :, end:]), 2), f"{impl}: other rows of a cache")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_caches_of_float32(impl, dtype, forced):
    stack = Stack(dtype=dtype, cache_dtype=torch.float32, past=300)
    forced(impl, head_dim=stack.head_dim)
    out, caches = stack.run()
    assert caches[0].dtype == torch.float32
    assert_close(stack, out, caches, impl)


@pytest.mark.parametrize("format", (INT4, INT4_ZEROS, INT8), ids=str)
@pytest.mark.parametrize(("batch", "tokens"), ((1, 1), (3, 2), (2, 16)))
def test_int8_activations(impl, format, batch, tokens, forced):
    """A code of x that falls the other way moves what follows a little: held against float64 loosely, and the keys bit for bit."""
    stack = Stack(batch=batch, tokens=tokens, activations="int8", format=format, past=300, qk_norms=True, layers=1)
    forced(impl, head_dim=stack.head_dim)
    out, caches = stack.run()
    assert_close(stack, out, caches, impl, bound=0.02)
    a = stack.arguments
    width = (stack.q_heads + 2 * stack.kv_heads) * stack.head_dim
    qkv = fused_linear(a["x"], a["weights"][1], None, width, stack.hidden, format, "int8", "rms_norm", a["weights"][0], 1e-5, 0.0)
    _, k, v = split_rope(qkv, a["cos"][0], a["sin"][0], 6, 2, 32, a["weights"][3], a["weights"][4], 1e-6, 0.0)
    for cache, new in zip(caches, (k, v), strict=True):
        assert_same_bits(cache[:, :, 300 : 300 + tokens], new, f"{impl}: what split_rope gives")


@pytest.mark.parametrize("activations", ("float", "int8"))
@pytest.mark.parametrize("tokens", (1, 5, 16))  # the small loops, and the tiles, which share what one phase prepares for the next
def test_threads_change_nothing(impl, tokens, activations, forced, threads):
    stack = Stack(
        past=1100, tokens=tokens, batch=2, hidden=256, intermediate=512, activations=activations, dtype=torch.bfloat16, post_norms=True
    )
    forced(impl, head_dim=stack.head_dim)
    threads(1)
    whole, caches = stack.run()
    for count in (2, 3, 7):
        threads(count)
        out, others = stack.run()
        assert_same_bits(out, whole, f"{impl}: {count} threads")
        for cache, other in zip(caches, others, strict=True):
            assert_same_bits(cache, other, f"{impl}: {count} threads, caches")


@pytest.mark.parametrize("activations", ("float", "int8"))
def test_a_sequence_does_not_depend_on_its_batch(impl, activations, forced):
    # The floats' matmul of more than 4 rows is another impl, whose sums run in another order.
    stack = Stack(past=600, batch=4 if activations == "float" else 10, activations=activations, shared_rope=False)
    forced(impl, head_dim=stack.head_dim)
    whole, _ = stack.run()
    a = stack.arguments
    for b in (0, stack.batch - 1):
        one = {"x": a["x"][b : b + 1]}
        for name in ("cos", "sin", "keys", "values"):
            one[name] = [t[b : b + 1] for t in a[name]]
        assert_same_bits(stack.run(**one)[0], whole[b : b + 1], f"{impl}: sequence {b}")


def test_tokens_one_by_one(impl, forced):
    stack = Stack(past=254, tokens=4)
    forced(impl, head_dim=stack.head_dim)
    whole, caches = stack.run()
    a = stack.arguments
    keys, values, steps = [t.clone() for t in a["keys"]], [t.clone() for t in a["values"]], []
    for t in range(4):
        numbers = [n + t if i % 20 == 18 else n for i, n in enumerate(a["layers"])]
        rope = {name: [table[:, t : t + 1] for table in a[name]] for name in ("cos", "sin")}
        steps.append(decoder_layers(**a | rope | {"x": a["x"][:, t : t + 1], "keys": keys, "values": values, "layers": numbers}))
    assert torch.allclose(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    for cache, other in zip(caches, keys + values, strict=True):
        assert torch.allclose(cache[:, :, :258], other[:, :, :258], rtol=1e-4, atol=1e-4)


def test_caches_that_are_views(impl, forced):
    stack = Stack(past=40)
    forced(impl, head_dim=stack.head_dim)
    expected, caches = stack.run()
    wide = [torch.full((3, 5, 60, 32), NAN) for _ in range(4)]
    views = [t[1:, 2:4, 5:50] for t in wide]
    for view, cache in zip(views, stack.arguments["keys"] + stack.arguments["values"], strict=True):
        view[:, :, : cache.shape[2]] = cache
    out = decoder_layers(**stack.arguments | {"keys": views[:2], "values": views[2:]})
    assert_same_bits(out, expected, impl)
    for view, cache, whole in zip(views, caches, wide, strict=True):
        assert_same_bits(view[:, :, 40:41], cache[:, :, 40:41], impl)
        assert int(whole.isnan().sum()) == whole.numel() - 2 * 2 * 41 * 32, "rows around the view were written to"


def test_a_query_that_sees_nothing_gives_zeros(impl, forced):
    stack = Stack(past=300, mask=torch.zeros(2, 301, dtype=torch.uint8), layers=1)
    stack.mask[1] = 1
    forced(impl, head_dim=stack.head_dim)
    out, caches = stack.run()
    assert bool(out.isfinite().all())
    assert_close(stack, out, caches, impl)


@pytest.mark.parametrize("value", (NAN, float("inf")))
def test_a_nan_stays_in_its_sequence(impl, value, forced):
    stack = Stack(past=300)
    forced(impl, head_dim=stack.head_dim)
    expected, _ = stack.run()
    stack.arguments["x"][0, 0, 3] = value
    out, _ = stack.run()
    assert bool(out[0].isnan().all())
    assert_same_bits(out[1], expected[1], impl)


def test_large_scores(impl, forced):
    """Softmax must not overflow; one key takes all the weight."""
    stack = Stack(past=300, layers=1)
    forced(impl, head_dim=stack.head_dim)
    stack.arguments["keys"][0][:, :, 17] *= 1e4
    out, caches = stack.run()
    assert_close(stack, out, caches, impl)


def test_no_tokens_and_no_layers():
    assert Stack(batch=0).run()[0].shape == (0, 1, 64)
    assert Stack(tokens=0).run()[0].shape == (2, 0, 64)
    stack = Stack(layers=0)
    out, _ = stack.run()
    assert_same_bits(out, stack.arguments["x"], "no layers")
    assert out.data_ptr() != stack.arguments["x"].data_ptr()


def test_impls_of_the_matmuls_can_be_forced():
    stack = Stack(activations="int8", format=INT4)
    expected, _ = stack.run()
    for impl in taut.list_impls("cpu")["quant_linear"]:
        if next(v for v in taut.explain("quant_linear", M=2, N=64, K=64, activations=1) if v.impl == impl).reason.startswith(
            "this processor"
        ):
            continue
        with taut.force_impl("quant_linear", impl):
            if "float" in impl:
                with pytest.raises(RuntimeError, match="forced impl"):
                    stack.run()
            else:
                assert torch.allclose(stack.run()[0], expected, rtol=1e-2, atol=1e-2)


# ---- The op as torch sees it ----


def test_opcheck():
    torch.library.opcheck(torch.ops.taut.decoder_layers.default, tuple(Stack().arguments.values()))


def test_compile_keeps_the_graph_whole():
    stack = Stack()
    expected, caches = stack.run()
    a = stack.arguments
    keys, values = [t.clone() for t in a["keys"]], [t.clone() for t in a["values"]]

    def step(x: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        return decoder_layers(**a | {"x": x * 1.0, "keys": keys, "values": values}) + 1.0

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same_bits(compiled(a["x"], keys, values), expected + 1.0, "compiled")
    for cache, other in zip(caches, keys + values, strict=True):
        assert_same_bits(cache, other, "compiled, caches")


def change_list(name: str, index: int, value) -> dict:
    found = list(Stack(batch=2).arguments[name])
    found[index] = value
    return {name: found}


def bad_calls() -> dict[str, tuple[dict, str]]:
    a = Stack().arguments
    layers, weights, sizes = (partial(change_list, name) for name in ("layers", "weights", "sizes"))
    return {
        "x is 2-D": ({"x": torch.zeros(2, 64)}, r"x must be \[B, T, 64\]"),
        "x is wide": ({"x": torch.zeros(2, 1, 65)}, r"x must be \[B, T, 64\]"),
        "x is float64": ({"x": a["x"].double()}, "x must be float32, bfloat16 or float16"),
        "x is elsewhere": ({"x": torch.zeros(2, 1, 64, device="meta")}, "x must be on the CPU"),
        "too many tokens": ({"x": torch.zeros(2, MOST_TOKENS + 1, 64)}, "at most 16 new tokens"),
        "another batch": ({"x": torch.zeros(3, 1, 64)}, r"keys\[0\] must be on the CPU and \[3, 2, capacity, 32\]"),
        "a missing size": ({"sizes": a["sizes"][:5]}, r"sizes must be \[q_heads"),
        "a missing number": ({"numbers": a["numbers"][:6]}, r"numbers must be \[norm_eps"),
        "a missing weight": ({"weights": a["weights"][:-1]}, "weights must hold 14 a layer, 28 for 2 layers"),
        "a missing layer number": ({"layers": a["layers"][:-1]}, "layers must hold 20 a layer"),
        "a missing cache": ({"values": a["values"][:1]}, "values must hold 1 a layer"),
        "a missing rope table": ({"sin": a["sin"][:1]}, "cos and sin must be lists of one length"),
        "no such rope table": (layers(16, 2), "layer 0 asks for rope table 2 of 2"),
        "rope of other tokens": (change_list("cos", 0, torch.zeros(1, 2, 32)), r"cos\[0\] must be"),
        "rope too wide": (change_list("cos", 1, torch.zeros(1, 1, 34)), r"cos\[1\] must be"),
        "sin of another width": (change_list("sin", 0, torch.zeros(1, 1, 16)), r"sin\[0\] must have the shape of cos\[0\]"),
        "heads that do not divide": (sizes(1, 4), "q_heads must be a multiple of kv_heads"),
        "no heads": (sizes(0, 0), "sizes must be 1 to 2\\^20"),
        "an unknown glu": (sizes(5, 1), r"glu must be 2 \(silu\)"),
        "another intermediate size": (sizes(4, 97), r"gate_up_packed\] holds"),
        "packed is short": (weights(14 + 5, torch.zeros(10, dtype=torch.uint8)), r"weights\[1\]\[o_packed\] holds 10 bytes"),
        "packed is float": (weights(9, torch.zeros(10)), r"weights\[0\]\[gate_up_packed\] must be a contiguous 1-D uint8"),
        "packed is missing": (weights(11, torch.empty(0, dtype=torch.uint8)), r"weights\[0\]\[down_packed\] holds 0 bytes"),
        "a norm is long": (weights(8, torch.ones(65)), r"weights\[0\]\[mlp_norm\] must be \[64\] or empty, got \[65\]"),
        "a norm is int": (weights(14 + 3, torch.ones(32, dtype=torch.int32)), r"weights\[1\]\[q_norm\] must have the dtype of x"),
        "a bias is bfloat16": (weights(6, torch.ones(64, dtype=torch.bfloat16)), r"weights\[0\]\[o_bias\] must have the dtype of x"),
        "an unknown format": (layers(0, 77), "format must be|unknown format|format"),
        "an unknown group size": (layers(5, 48), "group_size must be"),
        "unknown activations": (layers(3, 9), r"weights\[0\]\[qkv_packed\]: .*take activations"),
        "begin after length": (layers(17, 38), "0 <= begin <= length"),
        "begin is negative": (layers(37, -1), "layer 1 must have 0 <= begin"),
        "no room in the cache": (layers(18, 41), r"keys\[0\] has capacity 41, but past and new tokens are 42"),
        "length is huge": (layers(18, 1 << 62), "0 <= begin <= length"),
        "window is negative": (layers(19, -5), "window of 0"),
        "a cache of another width": (change_list("keys", 1, torch.zeros(2, 2, 41, 16)), r"keys\[1\] must be"),
        "a cache of float64": (change_list("values", 0, a["values"][0].double()), r"values\[0\] must have the dtype of x"),
        "a cache with gaps": (change_list("values", 1, torch.zeros(2, 2, 41, 64)[..., ::2]), "contiguous in its last two"),
        "a cache that overlaps": (change_list("keys", 0, torch.zeros(1, 2, 41, 32).expand(2, 2, 41, 32)), "must not overlap itself"),
        "caches of two dtypes": (
            {"x": a["x"].half(), "keys": [k.half() for k in a["keys"]]},
            "must have one dtype",
        ),
        "mask is float": ({"mask": torch.ones(2, 38)}, "mask must be uint8 or bool"),
        "mask of another batch": ({"mask": torch.ones(3, 38, dtype=torch.bool)}, "mask must be \\[2"),
        "mask is short": ({"mask": torch.ones(2, 37, dtype=torch.bool)}, "mask has 37 columns, but layer 0 has 37 past and 1 new"),
        "softcap is negative": (change_list("numbers", 3, -1.0), "attn_softcap must be 0"),
    }  # fmt: skip


@pytest.mark.parametrize("what", bad_calls())
def test_bad_call_is_a_value_error_before_anything_is_written(what):
    change, message = bad_calls()[what]
    arguments = Stack().arguments | change
    before = [t.clone() for t in arguments["keys"] + arguments["values"]]
    with pytest.raises(ValueError, match=message):
        decoder_layers(**arguments)
    if what not in ("x is elsewhere",):
        with pytest.raises(RuntimeError, match="decoder_layers: "):
            torch.ops.taut.decoder_layers(*arguments.values())
    for old, new in zip(before, arguments["keys"] + arguments["values"], strict=True):
        assert_same_bits(old, new, "a cache was written to")


def test_training_is_refused():
    a = Stack().arguments
    with pytest.raises(ValueError, match="decoder_layers has no backward"):
        decoder_layers(**a | {"x": a["x"].clone().requires_grad_()})


def test_cost():
    found = op.cost(1, 1, 100, {"q_heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 32, "intermediate": 64}, 1000)
    assert found == {"flops": 2 * (32 * (64 + 32 + 192) + 6400), "bytes": 1000 + 2 * 100 * 16 * 4}
    assert set(LINEARS) <= set(WEIGHTS)
