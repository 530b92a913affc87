"""taut.compress: what is kept and what it becomes, on tiny models and on matrices whose right answer is known."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import taut
from checks import assert_same_bits
from taut import QuantLinear, SparseLinear
from taut.compress import calibration_ids, compress, pruning
from taut.compress.calibration import Inputs
from taut.compress.recovery import recover
from taut.compress.solver import by_error, by_score, error_of, inverse_factor, order_of
from taut.formats import WeightFormat
from taut.formats.sparse import Pattern
from taut.ops.quantize_weight import reference
from tiny_models import byte_tokenizer, tiny, tiny_llama

TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps. " * 40


def tokens(sequences: int = 6, length: int = 48) -> torch.Tensor:
    return torch.randint(3, 200, (sequences, length), generator=torch.Generator().manual_seed(1))


def correlated(k: int, seed: int = 0) -> torch.Tensor:
    """Activations ``[2000, k]`` of channels that go together, some a hundred times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2000, k // 2, generator=generator) @ torch.randn(k // 2, k, generator=generator)
    return (mixed + 0.1 * torch.randn(2000, k, generator=generator)) * 10 ** (2 * torch.rand(k, generator=generator))


def problem(n: int = 48, k: int = 160) -> tuple[torch.Tensor, torch.Tensor]:
    w, x = torch.randn(n, k, generator=torch.Generator().manual_seed(3)), correlated(k).double()
    return w, x.T @ x


@pytest.mark.parametrize("text", ("2:4", "4:8", "16:2:4"))
@pytest.mark.parametrize("format", (None, WeightFormat("int8", 0), WeightFormat("int4", 32)), ids=str)
def test_making_up_for_errors_beats_scores(text, format):
    w, gram = problem()
    pattern = Pattern.parse(text)
    magnitude = by_score(w, w.abs(), pattern, format)
    wanda = by_score(w, w.abs() * gram.diagonal().sqrt().float(), pattern, format)
    sparse = by_error(w, gram, pattern, format, 0.01)
    errors = [error_of(w, each.weight, gram) for each in (magnitude, wanda, sparse)]
    assert errors[2] < 0.7 * errors[1] < 0.7 * errors[0]
    for each in (magnitude, wanda, sparse):
        assert pattern.holds(each.weight) and each.mask.sum() == w.numel() * pattern.density


@pytest.mark.parametrize("format", (WeightFormat("int4", 32), WeightFormat("int4", 0), WeightFormat("int8", 64)), ids=str)
def test_gptq_beats_rounding_to_nearest(format):
    w, gram = problem()
    nearest, solved = by_score(w, w.abs(), None, format), by_error(w, gram, None, format, 0.01)
    assert error_of(w, solved.weight, gram) < 0.6 * error_of(w, nearest.weight, gram)
    assert solved.mask is None


@pytest.mark.parametrize("format", (WeightFormat("int4", 32), WeightFormat("int8", 128), WeightFormat("int8", 0)), ids=str)
@pytest.mark.parametrize("pattern", (None, Pattern(2, 4)), ids=str)
def test_the_weight_is_what_its_codes_say(format, pattern):
    w, gram = problem(k=200)
    solved = by_error(w, gram, pattern, format, 0.01)
    numbers = reference(solved.codes, solved.scales, None, None, 200, format).float()
    assert_same_bits(solved.weight, numbers, f"{format}, {pattern}")


@pytest.mark.parametrize(
    ("pattern", "format", "unit"),
    (
        (None, WeightFormat("int4", 32), 32),
        (Pattern(2, 4), WeightFormat("int4", 32), 32),
        (Pattern(2, 4), None, 4),
        (None, WeightFormat("int8", 0), 1),
    ),
    ids=str,
)
def test_the_order_of_columns_in_memory_does_not_matter(pattern, format, unit):
    """They go by the energy of their channels: the same result wherever a group, or a block of m, lies."""
    w, gram = problem()
    order = torch.randperm(w.shape[1] // unit, generator=torch.Generator().manual_seed(8))[:, None] * unit + torch.arange(unit)
    order = order.flatten()
    solved, moved = by_error(w, gram, pattern, format, 0.01), by_error(w[:, order], gram[order][:, order], pattern, format, 0.01)
    assert_same_bits(moved.weight, solved.weight[:, order], f"{pattern}, {format}")
    assert pattern is None or torch.equal(moved.mask, solved.mask[:, order])
    if format is not None and format.group_size:
        assert torch.equal(moved.scales, solved.scales[:, order[::unit] // unit])


def test_channels_with_the_most_energy_go_first():
    gram = torch.diag(torch.tensor([1.0, 2.0, 9.0, 1.0, 4.0, 4.0, 99.0]))
    assert order_of(gram, 2).tolist() == [2, 3, 4, 5, 0, 1, 6] and order_of(gram, 1).tolist() == [6, 2, 4, 5, 1, 0, 3]


def test_without_correlation_it_is_pruning_by_norm():
    """Where channels have nothing to do with each other there is nothing to make up for."""
    w = torch.randn(32, 64, generator=torch.Generator().manual_seed(4))
    gram = torch.diag(torch.linspace(1, 50, 64).double())
    solved = by_error(w, gram, Pattern(2, 4), None, 1e-6)
    expected = by_score(w, w.abs() * gram.diagonal().sqrt().float(), Pattern(2, 4), None)
    assert torch.equal(solved.mask, expected.mask) and torch.allclose(solved.weight, expected.weight, atol=1e-5)


def test_dead_channels_and_statistics_that_are_singular():
    w, gram = problem()
    gram[5], gram[:, 5] = 0, 0
    solved = by_error(w, gram, Pattern(2, 4), None, 0.01)
    assert bool(solved.weight.isfinite().all()) and not bool(solved.weight[:, 5].any())
    rank_one = torch.ones(160, 160, dtype=torch.float64)
    factor, dead = inverse_factor(rank_one, 0.01)
    assert bool(factor.isfinite().all()) and not bool(dead.any())


@pytest.mark.parametrize("family", ("llama", "gemma3", "qwen3", "phi3"))
def test_errors_fall_with_better_methods(family):
    found = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        model = tiny(family)
        report = compress(model, tokens(), sparsity="2:4", method=method)
        found[method] = report.mean_error
        pattern = Pattern(2, 4)
        assert all(pattern.holds(model.get_submodule(layer.name).weight) for layer in report.layers)
        assert bool(model(tokens()).logits.isfinite().all())
    assert found["sparsegpt"] < found["wanda"] <= found["magnitude"] * 1.02, found


def test_the_last_layers_see_what_the_first_ones_became():
    """A compressed model's report is of the inputs its own layers gave."""
    model, ids = tiny_llama(), tokens()
    original = {name: module.weight.clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    report = compress(model, ids, sparsity="2:4", method="magnitude")
    seen = {}
    name = "model.layers.1.mlp.gate_proj"
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    assert "x" in seen
    # its own decoder layer's attention was compressed after its inputs were looked at
    first = "model.layers.1.self_attn.q_proj"
    handle = model.get_submodule(first).register_forward_pre_hook(lambda module, args: seen.update(q=args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    x = seen["q"].reshape(-1, seen["q"].shape[-1]).double()
    error = error_of(original[first], model.get_submodule(first).weight.detach(), x.T @ x)
    assert error == pytest.approx(next(layer.error for layer in report.layers if layer.name == first), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"weights": "int4", "sparsity": "2:4"}, SparseLinear),
        ({"weights": "int8", "sparsity": "16:2:4", "method": "wanda"}, SparseLinear),
        ({"weights": "bf16", "sparsity": "2:4"}, SparseLinear),
        ({"weights": "fp16", "sparsity": "16:2:4", "method": "magnitude"}, SparseLinear),
        ({"weights": "int4", "group_size": 64, "sparsity": None, "method": "gptq"}, QuantLinear),
    ],
    ids=str,
)
def test_low_bit_layers_hold_the_codes_that_were_found(settings, kind, tmp_path):
    model = tiny_llama()
    report = compress(model, tokens(), activations="float", **settings)
    assert len(report.layers) == 14 and report.format in str(report)
    assert all(type(model.get_submodule(layer.name)) is kind for layer in report.layers)
    assert isinstance(model.lm_head, nn.Linear) and not isinstance(model.lm_head, QuantLinear)
    with torch.no_grad():
        expected = model(tokens()).logits
    taut.save(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    taut.unfuse(loaded)
    with torch.no_grad():
        assert_same_bits(loaded(tokens()).logits, expected, "saved and loaded again")


@torch.no_grad()
def gap(model: nn.Module, dense: nn.Module) -> float:
    """How far the states after the last decoder layer are off, on the calibration text."""
    last, right = (m.model(tokens(), use_cache=False).last_hidden_state for m in (model, dense))
    return float((last - right).square().sum() / right.square().sum())


@pytest.mark.parametrize("family", ("llama", "gemma3"))
@pytest.mark.parametrize(("method", "weights"), [("sparsegpt", None), ("sparsegpt", "int4"), ("magnitude", "int8")])
def test_recovery_brings_layers_closer_to_the_dense_ones(family, method, weights):
    plain, model = tiny(family), tiny(family)
    settings = {"sparsity": "2:4", "weights": weights, "method": method, "activations": "float"}
    compress(plain, tokens(), **settings)
    before = {name: value.clone() for name, value in model.named_parameters() if "layers" not in name}
    report = compress(model, tokens(), recover=40, **settings)
    assert len(report.recovered) == len(model.model.layers) and "recovery: the decoder layers' mean error" in str(report)
    for first, last in report.recovered.values():
        assert last < 0.95 * first
    assert gap(model, tiny(family)) < 0.95 * gap(plain, tiny(family))
    for name, value in before.items():  # embeddings, the last norm, the head
        assert_same_bits(model.get_parameter(name), value, name)
    for entry in report.layers:
        layer = model.get_submodule(entry.name)
        weight = layer.weight if weights is None else layer.dequantize()
        assert Pattern(2, 4).holds(weight)
        assert weights is not None or int((weight != 0).sum()) == weight.numel() // 2  # none of the kept died
    assert all(parameter.requires_grad == plain.get_parameter(name).requires_grad for name, parameter in model.named_parameters())


def test_recovery_goes_on_where_it_was_broken_off(tmp_path):
    settings = {"sparsity": "2:4", "weights": "int4", "recover": 6}
    expected = tiny("gemma3")
    compress(expected, tokens(), **settings)

    def broken(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny("gemma3"), tokens(), state=tmp_path, progress=broken, **settings)
    model = tiny("gemma3")
    report = compress(model, tokens(), state=tmp_path, **settings)
    assert len(report.recovered) == len(model.model.layers)
    for name, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
    with pytest.raises(ValueError, match="recover differ"):
        compress(tiny("gemma3"), tokens(), state=tmp_path, **{**settings, "recover": 7})


def test_recovery_that_does_not_help_is_undone():
    model = tiny_llama()
    layer = model.model.layers[0]
    with torch.no_grad():
        inputs = Inputs(model, model.model.layers, tokens(), 4)
        targets = list(inputs.run(layer, 0))
        kept = layer.mlp.up_proj.weight.detach().clone()
        masks = {layer.mlp.up_proj: torch.ones_like(kept, dtype=torch.bool)}
        assert recover(inputs, layer, 0, targets, masks, 5) == (0.0, 0.0)  # it is the dense layer already
    assert_same_bits(layer.mlp.up_proj.weight, kept, "a weight that was right")


def test_a_run_that_was_broken_off_goes_on(tmp_path, monkeypatch):
    settings = {"sparsity": "2:4", "weights": "int4", "state": tmp_path / "state"}
    expected = tiny_llama()
    compress(expected, tokens(), sparsity="2:4", weights="int4")
    calls = []

    def broken(done: int, total: int, name: str) -> None:
        calls.append(name)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(tiny_llama(), tokens(), progress=broken, **settings)
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["layer-0.pt", "state.json"]
    solves = []
    before = pruning._solve
    monkeypatch.setattr(pruning, "_solve", lambda linear, *rest: solves.append(linear) or before(linear, *rest))
    model = tiny_llama()
    report = compress(model, tokens(), **settings)
    assert len(solves) == 7 and len(report.layers) == 14
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert_same_bits(value, other, name)
    with pytest.raises(ValueError, match="state of another run: method, weights differ"):
        compress(tiny_llama(), tokens(), sparsity="2:4", method="wanda", state=tmp_path / "state")
    with pytest.raises(ValueError, match="state of another run: text differ"):
        compress(tiny_llama(), tokens() + 1, **settings)


def test_numbers_are_the_pruned_weights_rounded_once():
    """Packed in 16 bits a layer holds what compress(weights=None) leaves in float, up to that rounding, in 9 bits a weight."""
    dense, packed = tiny_llama(), tiny_llama()
    compress(dense, tokens(), sparsity="2:4", method="wanda", skip=["model.layers.1"])
    report = compress(packed, tokens(), sparsity="2:4", method="wanda", weights="fp16", skip=["model.layers.1"])
    for layer in report.layers:
        expected = dense.get_submodule(layer.name).weight.detach()
        assert_same_bits(packed.get_submodule(layer.name).dequantize(), (expected + 0.0).half().float(), layer.name)
        assert layer.bytes_after * 32 == layer.bytes_before * 9


def test_skip_and_what_does_not_fit():
    model = tiny_llama()
    report = compress(model, tokens(), sparsity="2:4", skip=["down_proj"])
    assert len(report.layers) == 12 and report.kept["model.layers.0.mlp.down_proj"] == "skip 'down_proj'"
    odd = tiny("llama", intermediate_size=92)
    report = compress(odd, tokens(), sparsity="4:8")
    assert "92 inputs cannot be cut in blocks of 8" in report.kept["model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recover": -1}, "recover is a number of steps"),
        ({"recover": 5, "sparsity": None, "weights": "int4", "method": "gptq"}, "with sparsity"),
        ({"method": "guess"}, "unknown method 'guess'; accepted: magnitude, wanda, sparsegpt, gptq"),
        ({"sparsity": None}, "nothing to do"),
        ({"method": "gptq"}, "gptq rounds dense weights"),
        ({"sparsity": None, "weights": "int4"}, "sparsegpt prunes"),
        ({"weights": "nf4"}, "weights must be int4, int8, fp16, bf16 or None"),
        ({"weights": "bf16", "group_size": 32}, "bf16 weights have no scales"),
        ({"sparsity": None, "weights": "bf16", "method": "gptq"}, "bf16 weights are for sparse layers alone"),
        ({"sparsity": "3:4"}, "no sparsity pattern"),
        ({"skip": ["embed_tokens"]}, "matches no linear layer"),
        ({"skip": ["self_attn", "mlp"]}, "nothing to compress"),
        ({"damping": 0.0}, "damping must be between 0 and 1"),
    ],
    ids=str,
)
def test_bad_settings_change_nothing(settings, words):
    model = tiny_llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        compress(model, tokens(), **{"sparsity": "2:4", **settings})
    for name, value in model.state_dict().items():
        assert_same_bits(value, before[name], name)


def test_bad_models_and_texts():
    with pytest.raises(ValueError, match="takes a float32 model"):
        compress(tiny_llama().bfloat16(), tokens(), recover=3)
    with pytest.raises(ValueError, match="one list of decoder layers, got none"):
        compress(nn.Linear(8, 8), tokens())
    with pytest.raises(ValueError, match="ids must be int64"):
        compress(tiny_llama(), tokens().int())
    model = tiny_llama()
    taut.swap(model, "int8")
    with pytest.raises(ValueError, match="low-bit layers already"):
        compress(model, tokens())
    with pytest.raises(ValueError, match=r"too short: \d+ tokens, and 100 sequences of 256 take 25600"):
        calibration_ids(byte_tokenizer(False), TEXT, 100, 256)
    assert calibration_ids(byte_tokenizer(False), TEXT, 4, 32).shape == (4, 32)
