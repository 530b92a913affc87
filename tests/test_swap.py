"""taut.swap: what is replaced, what is kept and why, rules and patterns, and that a refused swap changes nothing."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import taut
from taut import QuantLinear, WeightFormat
from taut.formats import KINDS
from taut.swap import RuleBook, matches


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.mlp(self.norm(self.attn(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(64, 32, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def kept(report: taut.SwapReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.kept}


def formats(model: nn.Module) -> dict[str, str]:
    return {name: f"{m.format}, {m.activations}" for name, m in model.named_modules() if isinstance(m, QuantLinear)}


def snapshot(model: nn.Module) -> dict:
    return {"types": [type(m) for m in model.modules()], "state": {key: value.clone() for key, value in model.state_dict().items()}}


def assert_unchanged(model: nn.Module, before: dict) -> None:
    assert [type(m) for m in model.modules()] == before["types"]
    assert all(torch.equal(value, before["state"][key]) for key, value in model.state_dict().items())


def test_swaps_every_linear_and_reports_it():
    model = Model()
    ids = torch.arange(12)[None]
    expected = model(ids)
    seen = []
    report = taut.swap(model, "int8", progress=lambda done, total, name: seen.append((done, total, name)))
    assert list(formats(model)) == ["layers.0.attn", "layers.0.mlp", "layers.1.attn", "layers.1.mlp", "head"]
    assert set(formats(model).values()) == {"int8 per row, auto"}
    assert seen[0] == (0, 5, "layers.0.attn")
    assert seen[-1] == (5, 5, "")
    assert [entry.name for entry in report.swapped] == list(formats(model))
    assert report.bytes_before == (4 * 64 * 64 + 32 * 64) * 4
    assert report.bytes_after == sum(m.packed.numel() for m in model.modules() if isinstance(m, QuantLinear))
    assert list(kept(report)) == ["embed"]
    assert report.kept[0].bytes == 32 * 64 * 4
    text = str(report)
    assert "swapped 5 linear layers to int8 per row" in text
    assert "embed (Embedding" in text
    found = model(ids)
    assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.999


def test_each_weight_is_its_own_quantization():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64))
    alone = [QuantLinear.from_float(linear, WeightFormat("int4", 64, True), "float") for linear in model]
    biases = [linear.bias for linear in model]
    taut.swap(model, "int4", group_size=64, zeros=True, activations="float")
    for module, single, bias in zip(model, alone, biases, strict=True):
        assert torch.equal(module.packed, single.packed)
        assert module.bias is bias
        assert module.activations == "float"


def test_float_weights_are_freed_as_it_goes():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4)))
    alive = [weakref.ref(linear.weight) for linear in model]
    counts = []

    def count(done, total, name):
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))

    taut.swap(model, progress=count)
    assert counts == [4, 3, 2, 1, 0]


def test_training_mode_is_kept():
    model = Model().train()
    model.layers[0].attn.eval()
    taut.swap(model)
    assert not model.layers[0].attn.training
    assert model.layers[0].mlp.training


def test_rules_and_skip():
    model = Model()
    report = taut.swap(
        model, "int4", group_size=128, zeros=True, skip=["head"],
        rules={"layers.0.*": {"weights": "int8"}, "layers.1.mlp": {"activations": "float"}, "*.attn": None},
    )  # fmt: skip
    assert formats(model) == {
        "layers.0.attn": "int8 per row, auto",  # the first rule that matches wins; int4's group and zeros are not int8's
        "layers.0.mlp": "int8 per row, auto",
        "layers.1.mlp": "int4 group 128 with zeros, float",
    }
    assert kept(report)["layers.1.attn"] == "left alone by rule '*.attn'"
    assert kept(report)["head"] == "left alone by skip 'head'"


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("model.layers.1.mlp", "mlp", True), ("model.layers.1.mlp", "layers.1", True), ("model.layers.11.mlp", "layers.1", False),
        ("model.layers.1.mlp", "*.mlp", True), ("model.layers.1.mlp", "ml", False), ("lm_head", "lm_head", True),
        ("lm_head", "LM_HEAD", False), ("a.b", "a.?", True),
    ],
)  # fmt: skip
def test_patterns(name, pattern, fits):
    assert matches(name, pattern) is fits


def test_tied_weights_are_kept():
    model = Model()
    model.head.weight = model.embed.weight
    report = taut.swap(model)
    assert kept(report)["head"] == "its weight is tied to another module's"
    assert model.head.weight is model.embed.weight


def test_a_module_used_twice_is_kept():
    model = nn.Module()
    model.a, model.c = nn.Linear(64, 64), nn.Linear(64, 64)
    model.b = model.a
    assert kept(taut.swap(model)) == {"a": "its weight is tied to another module's"}
    assert model.a is model.b


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_odd_modules_are_kept_and_named():
    class OwnLinear(nn.Linear):
        pass

    model = nn.Module()
    model.plain, model.own, model.double = nn.Linear(64, 64), OwnLinear(64, 64), nn.Linear(64, 64).double()
    model.attention = nn.MultiheadAttention(64, 4)
    model.conv = nn.Conv1d(8, 8, 3)
    model.hooked = nn.Linear(64, 64)
    model.hooked.register_forward_hook(lambda *_: None)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))
    model.empty = nn.Linear(0, 8)
    report = taut.swap(model)
    assert list(formats(model)) == ["plain"]
    reasons = kept(report)
    assert "OwnLinear is a subclass" in reasons["own"]
    assert "torch.float64" in reasons["double"]
    assert "MultiheadAttention" in reasons["attention.out_proj"]
    assert "Conv1d" in reasons["conv"]
    assert "hooks" in reasons["hooked"]
    assert reasons["empty"] == "it is empty"
    assert any(name.startswith("normed") for name in reasons)
    assert model.attention(*[torch.randn(3, 2, 64)] * 3)[0].shape == (3, 2, 64)


def test_fused_experts_are_named_and_the_router_is_kept():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.randn(4, 32, 64))

    model = nn.Module()
    model.gate, model.experts, model.out = nn.Linear(64, 4), Experts(), nn.Linear(64, 64)
    report = taut.swap(model)
    assert list(formats(model)) == ["out"]
    assert kept(report)["experts"] == "fused experts are not supported yet"
    assert next(entry for entry in report.kept if entry.name == "experts").bytes == 4 * 32 * 64 * 4
    assert "fused experts are not supported yet" in str(report)
    assert "routes tokens" in kept(report)["gate"]


def test_a_second_swap_takes_the_rest():
    model = Model()
    taut.swap(model, "int8", skip=["head"])
    report = taut.swap(model, "int4")
    assert formats(model)["head"] == "int4 group 32, auto"
    assert kept(report)["layers.0.attn"] == "already low-bit"
    with pytest.raises(ValueError, match="nothing to swap"):
        taut.swap(model)


def test_other_copies_keep_the_float_weights():
    # A model built from another's layers must not lose its own when that one is swapped.
    linear = nn.Linear(64, 64)
    a, b = nn.Sequential(linear), nn.Sequential(linear)
    taut.swap(a)
    assert b[0] is linear
    assert type(b[0].weight) is nn.Parameter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int5"}, "unknown weight format 'int5'; accepted: ternary, int2, int3, int4"),
        ({"weights": 4}, "unknown weight format 4"),
        ({"weights": None}, "weights must be one of ternary, int2, int3, int4"),
        ({"group_size": 48}, "group_size 48 does not fit; accepted: 32, 64, 128"),
        ({"group_size": "32"}, "group_size must be"),
        ({"group_size": True}, "group_size"),
        ({"weights": "int8", "zeros": True}, "int2, int3 and int4 only"),
        ({"zeros": 1}, "zeros must be True or False"),
        ({"activations": "int4"}, "unknown activations 'int4'; accepted: auto, float, int8"),
        ({"activations": None}, "activations must be one of"),
        ({"skip": "head"}, "skip must be a list"),
        ({"skip": [3]}, "skip must be a list"),
        ({"rules": ["head"]}, "rules must map"),
        ({"rules": {"head": "int8"}}, "rule 'head' must be None or a dict"),
        ({"rules": {"head": {"bits": 4}}}, "rule 'head': unknown key 'bits'; accepted: weights"),
        ({"rules": {"head": {"weights": "int1"}}}, "unknown weight format 'int1'"),
        ({"rules": {3: None}}, "got the pattern 3"),
        ({"skip": ["haed"]}, "pattern 'haed' matches no module"),
        ({"rules": {"*.haed": None}}, r"pattern '\*\.haed' matches no module"),
        ({"skip": ["layers", "head"]}, "nothing to swap"),
    ],
)  # fmt: skip
def test_bad_settings_change_nothing(arguments, message):
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        taut.swap(model, **arguments)
    assert_unchanged(model, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_bad_weights_change_nothing(value, weights):
    model = Model()
    model.head.weight.data[3, 5] = value  # the last one to be looked at
    before = snapshot(model)
    with pytest.raises(ValueError, match="^head: its weight holds"):
        taut.swap(model, weights)
    assert torch.equal(model.head.weight.isfinite(), before["state"]["head.weight"].isfinite())
    assert [type(m) for m in model.modules()] == before["types"]


@pytest.mark.parametrize("weights", KINDS)
def test_every_format(weights):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    report = taut.swap(model, weights, rules={"1": {"weights": "int8"}})
    assert [entry.rule.format for entry in report.swapped] == [WeightFormat(weights), WeightFormat("int8")]
    assert report.swapped[0].rule.activations == ("float" if weights.startswith("fp8") else "int8")
    assert model(torch.randn(3, 64)).isfinite().all()


@pytest.mark.parametrize(
    ("weights", "most"),
    [("int4", 65504.0 * 7), ("int8", 65504.0 * 127), ("int2", 65504.0), ("int3", 65504.0 * 3), ("ternary", 65504.0), ("nf4", 1e38)],
)
def test_the_largest_weights_that_are_accepted(weights, most):
    model = nn.Sequential(nn.Linear(64, 64))
    model[0].weight.data[0, 0], model[0].weight.data[1, 0] = most, -most
    taut.swap(model, weights, activations="float")
    assert model[0].dequantize().isfinite().all()


def test_models_that_cannot_be_swapped():
    for model, message in (
        (nn.Linear(8, 8), "it is the model itself"),
        (nn.Sequential(nn.Conv1d(8, 8, 3)), "nothing to swap"),
        (nn.Sequential(), "nothing to swap"),
    ):
        with pytest.raises(ValueError, match=message):
            taut.swap(model)
    with pytest.raises(ValueError, match="must be a torch.nn.Module, got dict"):
        taut.swap({})
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="meta device"):
        taut.swap(model)


def test_rule_book_is_the_order_of_rules_then_skip_then_default():
    book = RuleBook("int4", skip=["a"], rules={"a.b": {"group_size": 64}})
    assert book.rule_for("a.b")[0].format == WeightFormat("int4", 64)
    assert book.rule_for("a.c")[0].format is None
    assert book.rule_for("d")[0].format == WeightFormat("int4", 32)
