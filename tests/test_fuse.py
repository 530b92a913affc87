"""Fused decoder blocks: the same numbers as the modules they stand for, in every way a model is run, and a way back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import transformers

import taut
from taut import QuantLinear
from taut.fuse import FusedClass
from tiny_models import FAMILIES, tiny


def pair(family: str = "llama", activations: str = "float", dtype: torch.dtype = torch.float32, weights: str = "int4", **changes):
    """The same swapped model twice: not fused, and fused."""
    plain = tiny(family, **changes).to(dtype)
    fused = copy.deepcopy(plain)
    taut.swap(plain, weights, activations=activations, fuse=False)
    report = taut.swap(fused, weights, activations=activations, strict=True)
    assert all(entry.reason is None for entry in report.fused)
    return plain, fused


def prompt(batch: int = 2, length: int = 13, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(seed))


class Calls:
    """Counts how often the fused path is taken: by layer, and by stack."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from taut.nn import fused_block, fused_stack

        self.layers = self.stacks = 0
        run, write = fused_block.run_layer, fused_stack.write

        def count_layer(*args, **kwargs):
            self.layers += 1
            return run(*args, **kwargs)

        def count_stack(*args, **kwargs):
            found = write(*args, **kwargs)
            self.stacks += found is not None
            return found

        monkeypatch.setattr(fused_block, "run_layer", count_layer)
        monkeypatch.setattr(fused_stack, "write", count_stack)

    def take(self) -> tuple[int, int]:
        found = self.layers, self.stacks
        self.layers = self.stacks = 0
        return found


@pytest.fixture
def calls(monkeypatch):
    return Calls(monkeypatch)


def steps(model: torch.nn.Module, ids: torch.Tensor, sizes: tuple[int, ...], cache=None, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all of ``ids``, given to the model in pieces of these sizes with a cache."""
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    found, begin = [], 0
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for size in sizes:
            end = begin + size
            given = {} if mask is None else {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            found.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **given).logits)
            begin = end
    return torch.cat(found, 1)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", [True, False])
def test_logits_equal_those_of_the_modules(family, config, calls):
    plain, fused = pair(family)
    ids, sizes = prompt(2, 34), (20, 1, 1, 3, 1, 5, 1, 1, 1)
    caches = [transformers.DynamicCache(config=plain.config) if config else transformers.DynamicCache() for _ in range(2)]
    expected = steps(plain, ids, sizes, caches[0])
    assert calls.take() == (0, 0)
    assert_close(steps(fused, ids, sizes, caches[1]), expected)
    assert calls.take() == (2, 8)  # the prompt layer by layer, the rest in one call each
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert one.get_seq_length() == other.get_seq_length() == 34
        assert_close(other.keys, one.keys)
        assert_close(other.values, one.values)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_batch(family, calls):
    plain, fused = pair(family)
    ids, mask = prompt(3, 30), torch.ones(3, 30, dtype=torch.int64)
    mask[0, :7], mask[2, :12] = 0, 0
    sizes = (17, 1, 1, 2, 1, 4, 1, 1, 1, 1)
    expected, found = steps(plain, ids, sizes, mask=mask), steps(fused, ids, sizes, mask=mask)
    assert calls.take() == (2, 9)
    assert_close(found[mask.bool()], expected[mask.bool()])


def generate(model: torch.nn.Module, ids: torch.Tensor, **arguments) -> torch.Tensor:
    torch.manual_seed(7)
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids), **arguments}
    return model.generate(ids, eos_token_id=None, pad_token_id=0, **settings)


@pytest.mark.parametrize(
    ("arguments", "stacked"),
    [
        ({}, 11), ({"do_sample": True, "top_k": 20}, 11), ({"num_beams": 3}, 11), ({"num_beams": 2, "do_sample": True}, 11),
        ({"cache_implementation": "static", "disable_compile": True}, 0), ({"use_cache": False}, 0),
        ({"num_return_sequences": 2, "do_sample": True}, 11), ({"prompt_lookup_num_tokens": 3, "max_new_tokens": 30}, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_writes_the_same(family, arguments, stacked, calls):
    plain, fused = pair(family)
    ids = prompt(1, 17)
    expected = generate(plain, ids, **arguments)
    calls.take()
    found = generate(fused, ids, **arguments)
    layers, stacks = calls.take()
    assert stacks == stacked if stacked is not None else stacks > 5
    assert layers > 0
    assert torch.equal(found, expected)


def test_recorded_states_are_all_there_and_the_next_call_is_fused_again(calls):
    plain, fused = pair("qwen3")
    plain.set_attn_implementation("eager")
    fused.set_attn_implementation("eager")
    ids = prompt(1, 20)
    with torch.no_grad():
        expected, found = (model(ids, output_hidden_states=True, output_attentions=True) for model in (plain, fused))
        assert calls.take() == (0, 0)
        for one, other in ((expected.hidden_states, found.hidden_states), (expected.attentions, found.attentions)):
            assert len(one) == len(other)
            assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, other, strict=True))
        fused(ids)
    assert calls.take() == (2, 0)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_with_a_static_cache(family):
    torch.compiler.reset()
    plain, fused = pair(family)
    ids = prompt(1, 17)
    expected = generate(plain, ids, cache_implementation="static", disable_compile=True)
    compiled = torch.compile(fused.forward, fullgraph=True, backend="eager")
    cache = transformers.StaticCache(config=fused.config, max_cache_len=32)
    with torch.no_grad():
        logits = fused(ids, past_key_values=cache).logits
        found = [ids, logits[:, -1:].argmax(-1)]
        for position in range(17, 28):
            step = compiled(found[-1], past_key_values=cache, position_ids=torch.tensor([[position]]))
            found.append(step.logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(found, 1), expected)
