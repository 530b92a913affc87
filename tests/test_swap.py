"""taut.swap on any torch model: what is swapped, what is kept, and that each kept module is named with a reason."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

import taut
from taut.swap import RuleBook, matches

INT4, INT8 = taut.WeightFormat("int4", 32), taut.WeightFormat("int8", 0)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, layers: int = 2, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 16)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.arange(10)[None]


def reasons(report: taut.SwapReport) -> dict[str, str]:
    return {entry.name: entry.reason for entry in report.kept}


def formats(model: nn.Module) -> dict[str, taut.WeightFormat]:
    return {name: module.format for name, module in model.named_modules() if isinstance(module, taut.QuantLinear)}


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize(("weights", "bound"), [("int4", 0.15), ("int8", 0.02)])
def test_swap_replaces_every_linear_and_the_output_stays_close(weights, activations, bound):
    model = Model()
    with torch.no_grad():
        before = model(IDS)
        report = taut.swap(model, weights, activations=activations)
        after = model(IDS)
    assert set(formats(model)) == {"layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down", "head"}
    assert ((after - before).norm() / before.norm()) < bound
    assert reasons(report) == {"embed": "Embedding is not a linear layer taut knows"}
    assert report.bytes_before == 4 * (4 * 48 * 96 + 48 * 16)
    assert report.bytes_after == sum(m.packed.numel() for m in model.modules() if isinstance(m, taut.QuantLinear))
    assert "swapped 5 linear layers" in str(report) and "\n" not in report.summary


def test_swapped_model_takes_the_dequantized_weights():
    model, x = nn.Sequential(nn.Linear(40, 24)), torch.randn(3, 40)
    bias = model[0].bias
    taut.swap(model, zeros=True, group_size=64, activations="float")
    assert model[0].bias is bias and model[0].format == taut.WeightFormat("int4", 64, True)
    torch.testing.assert_close(model(x), nn.functional.linear(x, model[0].dequantize(), bias), rtol=1e-5, atol=1e-5)


def test_rules_come_before_skip_before_the_default_and_merge_with_it():
    model = Model()
    report = taut.swap(
        model, "int4", group_size=64, zeros=True, skip=["layers.1"],
        rules={"*.down": {"weights": "int8"}, "layers.0.up": {"group_size": 128, "activations": "float"}, "head": None},
    )  # fmt: skip
    assert formats(model) == {"layers.0.up": taut.WeightFormat("int4", 128, True), "layers.0.down": INT8, "layers.1.down": INT8}
    assert model.layers[0].up.activations == "float" and model.layers[0].down.activations == "int8"
    assert reasons(report)["layers.1.up"] == "left alone by skip 'layers.1'" and reasons(report)["head"] == "left alone by rule 'head'"


@pytest.mark.parametrize(
    ("name", "pattern", "fits"),
    [
        ("model.layers.1.mlp", "layers.1", True), ("model.layers.11.mlp", "layers.1", False), ("lm_head", "lm_head", True),
        ("model.lm_head_2", "lm_head", False), ("a.mlp.up", "*.mlp.*", True), ("a.up", "up", True), ("a.up", "*.down", False),
    ],
)  # fmt: skip
def test_patterns(name, pattern, fits):
    assert matches(name, pattern) is fits


def test_float_weights_are_freed_one_by_one():
    model = Model()
    alive = [weakref.ref(model.layers[i].up.weight) for i in range(2)]
    seen = []
    taut.swap(model, progress=lambda done, total, name: seen.append((done, total, name, sum(r() is not None for r in alive))))
    assert [entry[:3] for entry in seen] == [
        (0, 5, "layers.0.up"), (1, 5, "layers.0.down"), (2, 5, "layers.1.up"), (3, 5, "layers.1.down"), (4, 5, "head"), (5, 5, ""),
    ]  # fmt: skip
    assert [entry[3] for entry in seen] == [2, 1, 1, 0, 0, 0]


def test_train_flag_and_untouched_modules_stay():
    model = Model().eval()
    model.layers[1].train()
    norm = model.norm
    taut.swap(model)
    assert not model.head.training and model.layers[1].up.training and model.norm is norm


class OwnLinear(nn.Linear):
    pass


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 64, 32))


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(32, 4), Experts()


def odd_model() -> nn.Module:
    model = nn.Module()
    model.plain, model.own, model.moe = nn.Linear(32, 32), OwnLinear(32, 32), Moe()
    model.attention, model.conv = nn.MultiheadAttention(32, 2), nn.Conv1d(32, 32, 1)
    model.tied, model.embed = nn.Linear(32, 16, bias=False), nn.Embedding(16, 32)
    model.tied.weight = model.embed.weight
    model.hooked, model.double, model.empty = nn.Linear(32, 32), nn.Linear(32, 32).double(), nn.Linear(32, 0)
    model.hooked.register_forward_hook(lambda *_: None)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    model.one = model.two = nn.Linear(32, 32)
    return model


def test_what_cannot_be_swapped_is_named_with_its_reason():
    model = odd_model()
    report = taut.swap(model)
    assert list(formats(model)) == ["plain"]
    why = reasons(report)
    for name, words in {
        "own": "subclass of nn.Linear", "moe.gate": "routes tokens", "moe.experts": "fused experts are not supported yet",
        "attention": "not a linear layer", "attention.out_proj": "MultiheadAttention reads", "conv": "Conv1d", "tied": "tied",
        "embed": "Embedding", "hooked": "hooks", "double": "float64", "empty": "empty", "one": "tied to another",
    }.items():  # fmt: skip
        assert words in why[name], (name, why[name])
    assert any(name.startswith("normed") for name in why)
    experts = next(entry for entry in report.kept if entry.name == "moe.experts")
    assert experts.bytes == 4 * 64 * 32 * 4 and "moe.experts" in str(report)


def test_a_second_swap_takes_what_is_left_and_names_what_is_done():
    model = Model()
    taut.swap(model, "int4", skip=["head"])
    report = taut.swap(model, "int8")
    assert [entry.name for entry in report.swapped] == ["head"] and reasons(report)["layers.0.up"] == "already low-bit"
    with pytest.raises(ValueError, match=r"nothing to swap.*\n.*embed"):
        taut.swap(model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int3"}, "'int3'; accepted: int4, int8"),
        ({"weights": None}, "use skip or rules"),
        ({"weights": ["int4"]}, "unknown weight format"),
        ({"group_size": 48}, "group_size 48"),
        ({"group_size": "32"}, "group_size"),
        ({"group_size": 32.0}, "group_size"),
        ({"group_size": True}, "group_size"),
        ({"zeros": 1}, "zeros must be True or False"),
        ({"weights": "int8", "zeros": True}, "int8 is symmetric"),
        ({"activations": "int4"}, "accepted: float, int8"),
        ({"activations": None}, "activations"),
        ({"skip": "head"}, "skip must be a list"),
        ({"skip": [1]}, "skip must be a list"),
        ({"skip": 3}, "skip must be a list"),
        ({"skip": ["nowhere"]}, "'nowhere' matches no module"),
        ({"rules": {"nowhere.*": None}}, "matches no module"),
        ({"rules": {"head": {"bits": 4}}}, "unknown key 'bits'; accepted: weights"),
        ({"rules": {"head": {"weights": "nf4"}}}, "'nf4'"),
        ({"rules": {"head": "int8"}}, "rule 'head' must be"),
        ({"rules": {1: None}}, "pattern 1"),
        ({"rules": ["head"]}, "rules must map"),
        ({"skip": ["*"]}, "nothing to swap"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_and_the_model_is_unchanged(arguments, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        taut.swap(model, **arguments)
    assert not formats(model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e9])
def test_weights_that_cannot_be_quantized_are_found_before_anything_is_changed(value):
    model = Model()
    model.layers[1].down.weight.data[3, 7] = value
    with pytest.raises(ValueError, match="layers.1.down: its weight holds"):
        taut.swap(model)
    assert not formats(model)


def test_models_that_cannot_be_swapped():
    with pytest.raises(ValueError, match="must be a torch.nn.Module, got dict"):
        taut.swap({})
    with pytest.raises(ValueError, match="it is the model itself"):
        taut.swap(nn.Linear(8, 8))
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="meta device"):
        taut.swap(model)
    with pytest.raises(ValueError, match="use skip or rules"):
        RuleBook(None)


def test_compile_and_export_without_a_graph_break():
    model = Model().eval()
    taut.swap(model)
    with torch.no_grad():
        expected = model(IDS)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(IDS), expected)
        program = torch.export.export(model, (IDS,))
        assert torch.equal(program.module()(IDS), expected)
    assert sum("quant_linear" in str(node.target) for node in program.graph.nodes) == 5


def test_a_weight_read_inside_a_compiled_graph_is_the_dequantized_one():
    model = nn.Sequential(nn.Linear(40, 24))
    taut.swap(model)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: x.to(model[0].weight.dtype) @ model[0].weight.T, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 40)
    assert torch.equal(compiled(x), x @ model[0].dequantize().T)
