"""taut.compress, permute=True: the model stays the same model, and the pattern keeps more of what matters."""

from __future__ import annotations

import itertools

import pytest
import torch
import transformers
from bench import sparsity as bench_sparsity
from torch import nn
from transformers import AutoModelForCausalLM

from checks import assert_same_bits
from taut import SparseLinear
from taut.compress import compress
from taut.compress import permutation as perm
from taut.compress.calibration import Inputs, decoder_layers, gather
from taut.formats.sparse import Pattern
from tiny_models import FAMILIES, tiny

TWO_OF_FOUR = Pattern(2, 4)
# Families whose MLP is no gated one, or whose attention has other names: configuration, settings, what can be reordered.
_SMALL = {"vocab_size": 259, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "opt": (transformers.OPTConfig, {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64}, {"", "self_attn"}),
    "phi": (transformers.PhiConfig, {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 96}, {"mlp", "self_attn"}),
    "starcoder2": (transformers.Starcoder2Config, {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 96}, {"mlp", "self_attn"}),
    "gpt_neox": (transformers.GPTNeoXConfig, {**_SMALL, "intermediate_size": 96}, {"mlp"}),
    "olmo2": (transformers.Olmo2Config, {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 96}, {"mlp", "self_attn"}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        {**_SMALL, "num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96},
        {"mlp.shared_expert", "self_attn"},
    ),
}


def tokens(sequences: int = 6, length: int = 48) -> torch.Tensor:
    return torch.randint(3, 200, (sequences, length), generator=torch.Generator().manual_seed(1))


def other(family: str) -> nn.Module:
    torch.manual_seed(0)
    kind, settings, _ = OTHERS[family]
    model = AutoModelForCausalLM.from_config(kind(**settings, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("eager")  # the others take no float64
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data = (0.0 if name.endswith("bias") else 1.0) + 0.3 * torch.randn_like(parameter)
    return model


def biased() -> nn.Module:
    return tiny("llama", attention_bias=True, mlp_bias=True)


@torch.no_grad()
def shuffle(model: nn.Module) -> set[str]:
    """Reorders everything that may be, at random; names of what was."""
    names = set()
    generator = torch.Generator().manual_seed(5)
    for layer in decoder_layers(model)[1]:
        for channels in perm.find(layer, 4)[0]:
            orders = torch.stack([torch.randperm(channels.size, generator=generator) for _ in range(channels.heads)])
            before = channels.taker.weight.clone()
            channels.reorder(orders)
            assert not torch.equal(before, channels.taker.weight)
            names.add(channels.name)
    return names


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS, "biased llama"])
@torch.no_grad()
def test_any_order_is_the_same_model(family):
    build = {"biased llama": biased}.get(family, lambda: tiny(family) if family in FAMILIES else other(family))
    model = build().double()
    expected = model(tokens()).logits
    assert shuffle(model) == (OTHERS[family][2] if family in OTHERS else {"mlp", "self_attn"})
    assert float((model(tokens()).logits - expected).abs().max()) < 1e-11 * float(expected.abs().max())
    single = build()
    expected = single(tokens()).logits
    shuffle(single)
    assert float((single(tokens()).logits - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def uneven(rows: int, k: int, seed: int = 0) -> torch.Tensor:
    """Scores of columns that differ tenfold, the large ones side by side."""
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** torch.rand(k, generator=generator).sort(descending=True).values
    return torch.rand(rows, k, generator=generator) * size


@pytest.mark.parametrize("text", ("2:4", "1:4", "2:8", "4:8"))
@pytest.mark.parametrize("seed", range(3))
def test_no_swap_is_left_that_would_gain(text, seed):
    pattern, scores = Pattern.parse(text), uneven(23, 32, seed)
    order = perm.best_order(scores, pattern)
    assert torch.equal(order.sort().values, torch.arange(32))
    best = perm.kept(scores, order, pattern)
    assert best > 1.01 * perm.kept(scores, torch.arange(32), pattern)
    for a, b in itertools.combinations(range(32), 2):
        swapped = order.clone()
        swapped[a], swapped[b] = order[b], order[a]
        assert perm.kept(scores, swapped, pattern) <= best * (1 + 1e-5)


@pytest.mark.parametrize("text", ("2:4", "1:4", "4:8"))
def test_the_gain_of_swaps_is_what_was_gained(text):
    pattern, scores = Pattern.parse(text), uneven(50, 64)
    order, gained, work = perm._swap(scores.T.contiguous(), pattern, 10**9)
    true = perm.kept(scores, order, pattern) - perm.kept(scores, torch.arange(64), pattern)
    assert gained == pytest.approx(true, rel=1e-4) and gained > 0 and work >= 64 * 64 * 50


def test_kept_is_what_a_mask_keeps():
    scores = torch.rand(48, 64, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    for text in ("2:4", "2:8", "16:2:4"):
        pattern = Pattern.parse(text)
        there = scores[:, order]
        assert perm.kept(perm._shared(scores, pattern.v), order, pattern) == pytest.approx(
            float(there[pattern.mask(there)].sum()), rel=1e-5
        )


def test_an_order_that_keeps_everything_is_found():
    scores = torch.zeros(8, 64)
    scores[:, :32] = 1 + torch.rand(8, 32, generator=torch.Generator().manual_seed(4))
    order = perm.best_order(scores, TWO_OF_FOUR)
    assert perm.kept(scores, order, TWO_OF_FOUR) == pytest.approx(float(scores.sum()), rel=1e-6)


def test_where_nothing_can_be_gained_the_order_stays():
    assert torch.equal(perm.best_order(torch.ones(8, 64), TWO_OF_FOUR), torch.arange(64))
    assert torch.equal(perm.best_order(torch.zeros(8, 64), TWO_OF_FOUR), torch.arange(64))


def test_many_channels_are_searched_part_by_part(monkeypatch):
    scores = uneven(40, 256)
    whole = perm.kept(scores, perm.best_order(scores, TWO_OF_FOUR), TWO_OF_FOUR)
    before = perm.kept(scores, torch.arange(256), TWO_OF_FOUR)
    monkeypatch.setattr(perm, "_TOGETHER", 64)
    monkeypatch.setattr(perm, "_PART", 64)
    order = perm.best_order(scores, TWO_OF_FOUR)
    assert torch.equal(order.sort().values, torch.arange(256))
    assert perm.kept(scores, order, TWO_OF_FOUR) - before > 0.95 * (whole - before)
    assert torch.equal(order, perm.best_order(scores, TWO_OF_FOUR))
    monkeypatch.setattr(perm, "_WORK", 10**5)  # and with hardly any time it ends at once
    assert perm.kept(scores, perm.best_order(scores, TWO_OF_FOUR), TWO_OF_FOUR) >= before


def test_rows_that_share_places_become_neighbours():
    """An MLP whose gate's rows are of two kinds, in turn: after it blocks of one kind lie together, and what the columns keep stays."""
    generator = torch.Generator().manual_seed(6)
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.up_proj, layer.mlp.down_proj = nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False)
    channels = perm.find(layer, 4)[0][0]
    kinds = torch.tensor([1.0, 0.1, 1.0, 0.1]).repeat(8), torch.tensor([0.1, 1.0, 0.1, 1.0]).repeat(8)
    up = torch.stack([kinds[row // 4 % 2] for row in range(64)]) + 0.01 * torch.rand(64, 32, generator=generator)
    scores = {channels.taker: torch.rand(32, 64, generator=generator), channels.makers[0][0]: up}
    pattern = Pattern(2, 4, 16)
    order, before, after = perm._choose_order(channels, scores, pattern, None)
    assert sum(after.values()) > sum(before.values()) and torch.equal(order.sort(1).values, torch.arange(64)[None])
    scores[channels.taker] = torch.ones(32, 64)  # nothing to gain there: the blocks stay what they are
    order, before, after = perm._choose_order(channels, scores, pattern, None)
    up, taker = channels.makers[0][0], channels.taker
    assert before[up] < 0.6 and after[up] > 0.9 and after[taker] == pytest.approx(before[taker], rel=1e-6)
    assert all(torch.equal(block, block[0] + torch.arange(4)) for block in order.view(-1, 4))


def test_an_order_that_keeps_less_is_not_taken(monkeypatch):
    channels = perm.find(decoder_layers(tiny("llama"))[1][0], 4)[0][1]
    made = torch.tensor([1.0, 0.1, 1.0, 0.1]).repeat(96, 16)  # of two kinds, side by side until _alike deals them
    made[48:] = made[48:].flip(1)
    scores = {channels.taker: torch.ones(64, 96), channels.makers[0][0]: made}
    monkeypatch.setattr(perm, "_alike", lambda blocks, scores, pattern: blocks.view(2, -1, 4).transpose(0, 1).reshape(-1, 4))
    order, before, after = perm._choose_order(channels, scores, Pattern(2, 4, 16), None)
    assert before == after and torch.equal(order, torch.arange(96)[None])


@pytest.mark.parametrize("method", ("magnitude", "wanda", "sparsegpt"))
@pytest.mark.parametrize("text", ("2:4", "16:2:4"))
@torch.no_grad()
def test_statistics_go_with_the_channels(method, text):
    model, ids, pattern = biased(), tokens(), Pattern.parse(text)
    layers = decoder_layers(model)[1]
    inputs = Inputs(model, layers, ids, 4)
    linears = {each: module for each, module in layers[0].named_modules() if isinstance(module, nn.Linear)}
    statistics = gather(inputs, layers[0], 0, linears)
    before = next(inputs.run(layers[0], 0))
    orders, shares, reasons = perm.permute(inputs, layers[0], 0, linears, statistics, pattern, method, 0.01)
    assert set(orders) == {"mlp", "self_attn"} and not reasons
    torch.testing.assert_close(next(inputs.run(layers[0], 0)), before, rtol=1e-4, atol=1e-5)
    again = gather(inputs, layers[0], 0, linears)
    for each, expected in again.items():
        torch.testing.assert_close(statistics[each].gram, expected.gram, rtol=1e-4, atol=1e-3)
        assert statistics[each].tokens == expected.tokens
    for each, (first, last) in shares.items():  # what is kept now is what was said
        scores = perm.importance(linears[each].weight, again[each], method, 0.01)
        assert float((scores * pattern.mask(scores)).sum() / scores.sum()) == pytest.approx(last, abs=2e-4)
        assert pattern.v > 1 or last > first
    assert sum(last for _, last in shares.values()) > sum(first for first, _ in shares.values())


@pytest.mark.parametrize("method", ("magnitude", "wanda", "sparsegpt"))
@pytest.mark.parametrize("family", ("llama", "gemma3", "phi3", "qwen2"))
def test_more_is_kept_and_errors_fall(family, method):
    plain, model = tiny(family), tiny(family)
    without = compress(plain, tokens(), sparsity="2:4", method=method)
    report = compress(model, tokens(), sparsity="2:4", method=method, permute=True)
    assert without.permuted == {} == report.unpermuted and "permuted" not in str(without)
    taken = [layer.name for layer in report.layers if layer.name.endswith(("down_proj", "o_proj"))]
    assert sorted(report.permuted) == sorted(taken) and "permuted: 4 linear layers keep" in str(report)
    assert all(last > first for first, last in report.permuted.values())
    down = [sum(each.error for each in found.layers if "down_proj" in each.name) for found in (without, report)]
    assert down[1] < 0.97 * down[0]
    assert all(TWO_OF_FOUR.holds(model.get_submodule(layer.name).weight) for layer in report.layers)
    if method == "magnitude":  # what is kept are the model's own weights, in columns of another order
        dense, pruned = (each.model.layers[0].mlp.down_proj.weight for each in (tiny(family), model))
        distance = torch.where(pruned.T[:, None] == 0, 0.0, pruned.T[:, None] - dense.T[None]).abs().sum(-1)
        nearest, which = distance.min(1)
        assert not bool(nearest.any()) and sorted(which.tolist()) == list(range(dense.shape[1]))


@pytest.mark.parametrize(
    ("family", "taken", "left"),
    [
        ("opt", {"fc2", "out_proj"}, {}),
        ("starcoder2", {"c_proj", "o_proj"}, {}),
        ("gpt_neox", {"dense_4h_to_h"}, {"attention": "the layers of a GPTNeoXAttention are not known"}),
    ],
)
def test_models_of_other_makes(family, taken, left, tmp_path):
    model, again = other(family), other(family)
    report = compress(model, tokens(), sparsity="2:4", method="wanda", permute=True, state=tmp_path)
    assert {name.rpartition(".")[2] for name in report.permuted} == taken and len(report.permuted) == 2 * len(taken)
    assert all(last > first for first, last in report.permuted.values())
    name = decoder_layers(model)[0]
    assert report.unpermuted == {f"{name}.{index}.{own}": reason for index in range(2) for own, reason in left.items()}
    assert compress(again, tokens(), sparsity="2:4", method="wanda", permute=True, state=tmp_path).permuted == report.permuted
    for name, value in model.state_dict().items():
        assert_same_bits(again.state_dict()[name], value, name)


@pytest.mark.parametrize("recover", (0, 4))
def test_it_is_deterministic_and_goes_on_where_it_was_broken_off(tmp_path, recover):
    """With biases, which lie in the state only where layers are recovered."""
    settings = {"sparsity": "2:4", "weights": "int4", "permute": True, "recover": recover}
    expected = biased()
    first = compress(expected, tokens(), **settings)
    assert not torch.equal(expected.model.layers[0].mlp.up_proj.bias, biased().model.layers[0].mlp.up_proj.bias)

    def broken(done: int, total: int, name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(biased(), tokens(), state=tmp_path, progress=broken, **settings)
    model = biased()
    report = compress(model, tokens(), state=tmp_path, **settings)
    assert report.permuted == first.permuted and len(report.permuted) == 4
    for name, value in expected.state_dict().items():
        assert_same_bits(model.state_dict()[name], value, name)
    with pytest.raises(ValueError, match="state of another run: permute differ"):
        compress(biased(), tokens(), state=tmp_path, **{**settings, "permute": False})


def test_the_checkpoint_is_one_of_plain_transformers(tmp_path):
    model = tiny("phi3")
    compress(model, tokens(), sparsity="2:4", method="wanda", permute=True)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()).logits, "loaded again")


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounding_of_small_floats_is_no_other_model(dtype):
    model = tiny("llama").to(dtype)
    report = compress(model, tokens(), sparsity="2:4", method="wanda", permute=True)
    assert report.unpermuted == {} and len(report.permuted) == 4 and bool(model(tokens()).logits.isfinite().all())


def test_low_bits_and_shared_places():
    model = tiny("qwen3")
    report = compress(model, tokens(), sparsity="16:2:4", weights="int8", permute=True, activations="float")
    assert all(type(model.get_submodule(layer.name)) is SparseLinear for layer in report.layers)
    assert {name.rpartition(".")[2] for name in report.permuted} == {"o_proj", "v_proj", "gate_proj", "up_proj", "down_proj"}
    for layer in ("model.layers.0.", "model.layers.1."):
        found = [share for name, share in report.permuted.items() if name.startswith(layer)]
        assert sum(last for _, last in found) > sum(first for first, _ in found)


class _ByPlace(nn.Module):
    """An activation that treats channels differently and holds nothing that would show it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((x[..., : x.shape[-1] // 2].relu(), x[..., x.shape[-1] // 2 :].tanh()), -1)


def test_what_would_change_the_model_is_put_back():
    def build() -> nn.Module:
        model = tiny("llama")
        model.model.layers[1].mlp.act_fn = _ByPlace()
        return model

    plain, model = build(), build()
    settings = {"sparsity": "2:4", "method": "magnitude", "skip": ["self_attn.o_proj"]}
    compress(plain, tokens(), **settings)
    report = compress(model, tokens(), permute=True, **settings)
    assert list(report.permuted) == ["model.layers.0.mlp.down_proj"]
    assert "it gave something else, by" in report.unpermuted["model.layers.1.mlp"]
    assert report.unpermuted["model.layers.0.self_attn"] == "the layer that takes its channels is left alone"
    assert "not permuted model.layers.1.mlp: it gave something else" in str(report)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert_same_bits(model.model.layers[1].mlp.get_submodule(name).weight, plain.model.layers[1].mlp.get_submodule(name).weight, name)


def _with(model: nn.Module, name: str, value: object) -> nn.Module:
    parent, _, own = name.rpartition(".")
    for layer in model.model.layers:
        setattr(layer.get_submodule(parent), own, value)
    return model


class _Own(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("build", "place", "words"),
    [
        (lambda: _with(tiny("llama"), "mlp.norm", nn.LayerNorm(96)), "mlp", "norm.weight may hold a number for each of its channels"),
        (lambda: _with(tiny("llama"), "mlp.up_proj", _Own(64, 96, bias=False)), "mlp", "it has a _Own where nn.Linear is known"),
        (lambda: _with(tiny("llama"), "mlp.up_proj", nn.Linear(64, 48)), "mlp", "do not make the 96 channels that down_proj takes"),
        (lambda: tiny("llama", intermediate_size=90), "mlp", "its 90 channels cannot be cut in blocks of 4"),
        (lambda: _with(tiny("llama"), "self_attn.is_kv_shared_layer", False), "self_attn", "other layers may use its values"),
        (lambda: _with(tiny("llama"), "self_attn.head_dim", None), "self_attn", "it does not say its head_dim"),
        (lambda: _with(tiny("llama"), "self_attn.gate", nn.Linear(64, 64)), "self_attn", "gate.weight is not known"),
        (lambda: _with(tiny("llama"), "self_attn.q_proj", nn.Linear(64, 128)), "self_attn", "do not make heads of 16 as o_proj takes them"),
        (lambda: other("gpt_neox"), "attention", "the layers of a GPTNeoXAttention are not known"),
    ],
)
def test_what_is_not_known_is_left_alone(build, place, words):
    layer = decoder_layers(build())[1][0]
    found, reasons = perm.find(layer, 4)
    assert words in reasons[place] and [each.name for each in found] == [{"mlp": "self_attn"}.get(place, "mlp")]


def test_a_layer_of_unknown_kind_says_so():
    layer = nn.Module()
    layer.mixer = nn.Linear(8, 8)
    assert perm.find(layer, 4) == ([], {"": "it has no MLP and no attention that is known"})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"permute": "yes"}, "permute orders channels for a sparsity pattern: True, with sparsity, or False; got 'yes'"),
        ({"permute": True, "sparsity": None, "weights": "int4", "method": "gptq"}, "with sparsity, or False; got True"),
    ],
    ids=str,
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        compress(tiny("llama"), tokens(), **{"sparsity": "2:4", **settings})


def test_entries_of_the_benchmark():
    assert bench_sparsity.parse("sparsegpt~p 2:4 int4") == ("sparsegpt", 0, True, "2:4", "int4")
    assert bench_sparsity.parse("sparsegpt+64~p 4:8 float") == ("sparsegpt", 64, True, "4:8", None)
    assert bench_sparsity.parse("gptq dense int4") == ("gptq", 0, False, None, "int4")
    for entry in ("sparsegpt~ 2:4 int4", "~p 2:4 int4", "sparsegpt~p+64 2:4 int4", ""):
        with pytest.raises(ValueError, match="unknown entry"):
            bench_sparsity.parse(entry)
