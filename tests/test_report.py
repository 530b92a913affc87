"""The five-resource report: its statistics against definitions, its counts against formulas, and one whole run."""

from __future__ import annotations

import gc
import json
import math
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rich.console import Console

from taut.formats import WeightFormat
from taut.fuse import cache_name
from taut.models import Settings
from taut.report import figures
from taut.report.energy import EnergyCounter
from taut.report.fidelity import compare_logits, join, summarize
from taut.report.machine import describe_machine
from taut.report.measure import Workload, measure
from taut.report.memory import PeakSampler, anonymous_bytes, file_mappings
from taut.report.microbench import Shape, run_shape
from taut.report.resources import cache_bytes_per_token, decode_flops, parameter_count, ship_bytes, swapped_bytes, weight_bytes
from taut.report.runner import Runner, Variant
from taut.report.survey import RESOURCES, Assumptions, build_report
from taut.report.table import print_microbench, print_report
from taut.report.text import default_text, read_text
from taut.report.worker import Worker, WorkerDied
from taut.swap import RuleBook, swap

HIDDEN, MLP, LAYERS, VOCABULARY, HEADS, KV_HEADS = 64, 96, 2, 300, 4, 2
LINEAR_WEIGHTS = LAYERS * (HIDDEN * HIDDEN * 2 + 2 * HIDDEN * HIDDEN * KV_HEADS // HEADS + 3 * HIDDEN * MLP)


def tiny_llama(tied: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=tied, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder)
    return folder


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Figures


def test_a_figure_has_a_value_exactly_if_it_is_available():
    assert figures.unavailable("J", "no counter").value is None
    for wrong in (
        (0.0, "J", "unavailable", "no counter"),
        (None, "J", "measured", ""),
        (1.0, "J", "guessed", ""),
        (1.0, "$", "modelled", ""),
    ):
        with pytest.raises(ValueError):
            figures.Figure(*wrong)
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            figures.measured(value, "s")


@pytest.mark.parametrize(
    ("figure", "text"),
    [
        (figures.counted(1_234_567, "B"), "1.235 MB"),
        (figures.counted(900, "B"), "900 B"),
        (figures.counted(134_515_008, "parameters"), "134.5 M parameters"),
        (figures.measured(0.5, "share", error=0.0123), "50 ± 1.2 %"),
        (figures.measured(0.25, "s"), "250 ms"),
        (figures.measured(12_345.6, "tokens/s", error=210.0), "12,346 ± 210 tokens/s"),
        (figures.unavailable("J", "no counter"), "unavailable"),
    ],
)
def test_figures_read_well(figure, text):
    assert str(figure) == text


# Fidelity


def test_kl_and_probabilities_match_their_definitions():
    generator = torch.Generator().manual_seed(1)
    base, other = (4 * torch.randn(150, 77, generator=generator, dtype=torch.float64) for _ in range(2))
    next_ids = torch.randint(77, (150,), generator=generator)
    stats = compare_logits(base.float(), other.float(), next_ids)
    p, q = (logits.softmax(-1) for logits in (base, other))
    torch.testing.assert_close(stats.kl, (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.p_base, p[torch.arange(150), next_ids], rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(stats.nll_other, -q[torch.arange(150), next_ids].log(), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.same_top, base.argmax(-1) == other.argmax(-1))

    found = summarize(stats)
    assert found["kl_mean"].value == pytest.approx(float(stats.kl.mean()))
    assert found["kl_mean"].stderr == pytest.approx(float(stats.kl.std()) / 150**0.5)
    assert found["ppl_base"].value == pytest.approx(math.exp(stats.nll_base.mean()))
    assert found["log_ppl_ratio"].value == pytest.approx(math.log(found["ppl_other"].value / found["ppl_base"].value))
    assert found["rms_dp"].value == pytest.approx(float(((stats.p_other - stats.p_base) ** 2).mean().sqrt()))
    assert found["kl_median"].value <= found["kl_p99"].value
    assert all(estimate.stderr > 0 for estimate in found.values())
    assert summarize(stats) == found, "the bootstrap must not depend on torch's global seed"


def test_a_model_against_itself_is_exactly_equal():
    logits = 5 * torch.randn(130, 50, generator=torch.Generator().manual_seed(2))
    stats = compare_logits(logits, logits.clone(), torch.zeros(130, dtype=torch.int64))
    found = summarize(join([stats, stats]))
    for name in ("kl_mean", "kl_median", "kl_p99", "rms_dp", "log_ppl_ratio"):
        assert found[name].value == found[name].stderr == 0, name
    assert found["top1"].value == 1


def test_fidelity_refuses_what_it_cannot_compare():
    logits, follow = torch.zeros(4, 9), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[4, 9\], \[4, 8\]"):
        compare_logits(logits, logits[:, :8], follow)
    with pytest.raises(ValueError, match="NaN"):
        compare_logits(logits, torch.full_like(logits, math.nan), follow)
    with pytest.raises(ValueError, match="two tokens"):
        summarize(compare_logits(logits[:1], logits[:1], follow[:1]))


# Counts


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", [WeightFormat("int8", 0), WeightFormat("int4", 32, True)], ids=str)
def test_counts_agree_with_the_shapes(tied, format):
    model = tiny_llama(tied)
    book = RuleBook(format.name, format.group_size, format.zeros)
    numbers = LINEAR_WEIGHTS + VOCABULARY * HIDDEN * (1 if tied else 2) + (2 * LAYERS + 1) * HIDDEN
    assert parameter_count(model) == numbers
    assert ship_bytes(model) == 4 * numbers
    assert swapped_bytes(model, book) == 4 * LINEAR_WEIGHTS
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert weight_bytes(model) == 4 * numbers + buffers

    prompt = torch.tensor([ids(10)])
    flops = decode_flops(model, prompt)
    attention = LAYERS * 2 * 2 * 11 * HIDDEN  # 11 keys: the prompt and the token itself
    assert flops == 2 * (LINEAR_WEIGHTS + VOCABULARY * HIDDEN) + attention
    cache = model(prompt, use_cache=True)[cache_name(type(model))]
    assert cache_bytes_per_token(cache) == LAYERS * 2 * KV_HEADS * (HIDDEN // HEADS) * 4

    report = swap(model, format.name, group_size=format.group_size, zeros=format.zeros)
    canonical = sum(value.nbytes for name, value in model.state_dict().items() if name.endswith(("qweight", ".scales", ".zeros")))
    assert parameter_count(model) == numbers
    assert ship_bytes(model) == 4 * (numbers - LINEAR_WEIGHTS) + canonical
    assert swapped_bytes(model, book) == report.bytes_after
    assert weight_bytes(model) == 4 * (numbers - LINEAR_WEIGHTS) + buffers + report.bytes_after
    assert decode_flops(model, prompt) == flops


def make_zone(root: Path, name: str, label: str, energy: str, limit: int = 1000) -> Path:
    zone = root / name
    zone.mkdir(parents=True)
    (zone / "name").write_text(label + "\n")
    (zone / "energy_uj").write_text(energy)
    (zone / "max_energy_range_uj").write_text(f"{limit}\n")
    return zone


def test_energy_counters_add_packages_and_wrap(tmp_path):
    first = make_zone(tmp_path, "intel-rapl:0", "package-0", "900")
    second = make_zone(tmp_path, "intel-rapl:1", "package-1", "100")
    make_zone(tmp_path, "intel-rapl:0:0", "core", "5")  # a part of package 0, which counts it already
    make_zone(tmp_path, "intel-rapl:2", "psys", "7")  # the whole board
    counter = EnergyCounter(tmp_path)
    assert counter.available
    before = counter.read()
    assert before == [900, 100]
    (first / "energy_uj").write_text("50")
    (second / "energy_uj").write_text("400")
    assert counter.joules_since(before) == pytest.approx((150 + 300) / 1e6)


def test_energy_says_why_it_is_unavailable(tmp_path):
    assert "no energy counters" in EnergyCounter(tmp_path / "absent").reason
    assert not EnergyCounter(tmp_path).available
    make_zone(tmp_path, "intel-rapl:0", "package-0", "not a number")
    counter = EnergyCounter(tmp_path)
    assert not counter.available
    assert "cannot be read" in counter.reason


def test_peak_memory_sees_what_was_freed():
    gc.collect()  # else what earlier tests left may be given back in between, and hide a part of the block
    before = anonymous_bytes()
    with PeakSampler() as sampler:
        block = torch.ones(256 << 20, dtype=torch.uint8)
        sampler.sample()
        del block
    assert sampler.peak >= before + (180 << 20)


# A whole run


def test_runner_measures_in_this_process(checkpoint):
    runner = Runner(Variant("base", str(checkpoint)))
    facts = runner.load(ids(8), 2)
    assert facts["parameters"] == parameter_count(tiny_llama())
    assert facts["peak_bytes"] >= facts["before_bytes"]
    timed = runner.decode(ids(8), 5)
    expected = tiny_llama().generate(torch.tensor([ids(8)]), max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 8:]
    assert timed["ids"] == expected.tolist()
    assert timed["seconds"] > 0
    assert timed["core_seconds"] > 0
    assert timed["joules"] is None or timed["joules"] >= 0


@pytest.mark.parametrize("together", [True, False])
def test_report_of_a_whole_run(checkpoint, together, capsys):
    source = str(checkpoint)
    variants = [
        Variant("base", source),
        Variant("same", source),
        Variant("int8", source, "auto", Settings("int8")),
        Variant("int4", source, "auto", Settings("int4", 32)),
    ]
    work = Workload(ids(32), ids(8), 4, [ids(32, seed) for seed in range(3)], {"int8": 2}, rounds=3)
    steps = []
    found = measure(variants, work, threads=1, together=together, flops=True, progress=lambda *step: steps.append(step))
    base, same, int8, int4 = found

    assert [len(each.prompts) for each in found] == [len(each.decodes) for each in found] == [3] * 4
    assert same.fidelity["kl_mean"].value == 0
    assert same.fidelity["top1"].value == 1
    assert same.compared_tokens == int4.compared_tokens == 3 * 31
    assert int8.compared_tokens == 2 * 31
    assert base.fidelity is None
    assert 0 < int8.fidelity["kl_mean"].value < int4.fidelity["kl_mean"].value
    assert base.flops == int4.flops > 0
    assert int4.facts["swapped_weight_bytes"] < int8.facts["swapped_weight_bytes"] < base.facts["swapped_weight_bytes"]
    assert [done for done, _, _ in steps] == list(range(steps[0][1]))

    assumed = Assumptions(watts_per_core=(3.0, 10.0), grid_intensity=300.0, price_per_hour=0.1, bandwidth=100.0)
    for assumptions in (Assumptions(), assumed):
        report = build_report("tiny", found, assumptions, describe_machine(1), {"text": "random"})
        values = json.loads(json.dumps(report.as_dict()))
        for variant in values["variants"]:
            assert list(variant["figures"]) == list(RESOURCES)
            for name, figure in [(name, f) for group in variant["figures"].values() for name, f in group.items()]:
                assert figure["source"] in figures.SOURCES, name
                assert (figure["value"] is None) == (figure["source"] == "unavailable"), name
        print_report(report, Console(width=140))
        shown = capsys.readouterr().out
        assert "same top token" in shown
        assert "unavailable" in shown or assumptions is assumed

    last = report.variants[-1].figures
    core_seconds = last["energy"]["core-seconds a token"].value
    assert last["energy"]["energy a token, high"].value == pytest.approx(10 * core_seconds)
    assert last["energy"]["carbon of 1M tokens, low"].value == pytest.approx(3 * core_seconds * 1e6 / 3.6e6 * 0.3)
    assert last["money"]["1M tokens written"].value == pytest.approx(0.1 / 3600 * 1e6 / int4.rate("decodes")[0])
    assert last["network"]["time to ship"].value == pytest.approx(int4.facts["ship_bytes"] * 8 / 1e8)
    assert last["computation"]["decode speed-up"].value == pytest.approx(int4.rate("decodes")[0] / base.rate("decodes")[0])
    assert ("not interleaved" in last["computation"]["decode throughput"].note) == (not together)


def test_without_assumptions_nothing_is_modelled(checkpoint):
    with Worker(Variant("base", str(checkpoint)), 1) as worker:
        facts = worker.call("load", ids(8), 2, None)
        prompt, decode = worker.call("prompt", ids(8)), worker.call("decode", ids(8), 2)
        with pytest.raises(ValueError, match="no method 'frobnicate'"):
            worker.call("frobnicate")
    from taut.report.measure import Measurement

    found = Measurement(Variant("base", str(checkpoint)), facts, [prompt], [decode], flops=1)
    report = build_report("tiny", [found], Assumptions(), describe_machine(), {})
    groups = report.variants[0].figures
    assert {f.source for group in groups.values() for f in group.values()} <= {"measured", "counted", "unavailable"}
    for resource, name in (("money", "1M tokens written"), ("network", "time to ship"), ("energy", "carbon of 1M tokens")):
        assert groups[resource][name].value is None


def test_a_worker_that_cannot_go_on_says_why(checkpoint, tmp_path):
    with Worker(Variant("gone", str(tmp_path / "absent" / "x" / "y"))) as worker, pytest.raises(ValueError, match="gone: .*no such file"):
        worker.call("load", ids(4), 1, None)
    with Worker(Variant("base", str(checkpoint))) as worker:
        worker._process.kill()
        with pytest.raises(WorkerDied, match="base: its process was killed"):
            worker.call("load", ids(4), 1, None)


def test_variants_need_names_of_their_own(checkpoint):
    with pytest.raises(ValueError, match="different names"):
        measure([Variant("a", str(checkpoint))] * 2, Workload(ids(4), ids(4)))


@pytest.mark.parametrize(
    "wrong", [{"price_per_hour": -1.0}, {"bandwidth": 0.0}, {"grid_intensity": math.nan}, {"watts_per_core": (5.0, 2.0)}]
)
def test_assumptions_must_be_positive(wrong):
    with pytest.raises(ValueError, match="must be a positive number"):
        Assumptions(**wrong)


def test_default_text_is_prose():
    name, text = default_text()
    assert "Python" in name
    assert len(text) > 100_000
    assert sum(character.isalpha() or character == " " for character in text) / len(text) > 0.85


def test_text_files_are_checked(tmp_path):
    good, bad, empty = (tmp_path / name for name in ("good", "bad", "empty"))
    good.write_text("Es grünt.", encoding="utf-8")
    bad.write_bytes(b"\xff\xfe\x00")
    empty.write_text("\n")
    assert read_text(good) == "Es grünt."
    with pytest.raises(ValueError, match="not UTF-8"):
        read_text(bad)
    with pytest.raises(ValueError, match="empty"):
        read_text(empty)


def test_microbench_checks_and_times(capsys):
    rows = run_shape(Shape(72, 96, 3), 0.01)
    assert [row["name"] for row in rows] == ["torch fp32", "torch bf16", "taut int8 per row", "taut int4 group 32"]
    assert rows[0]["speed_up"] == 1
    for row in rows:
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["gflop_s"] == pytest.approx(2 * 72 * 96 * 3 / row["median_us"] / 1e3)
    print_microbench(rows, Console(width=120))
    assert "N=72 K=96 M=3" in capsys.readouterr().out


def test_file_mappings_tell_mapped_memory_from_its_own(tmp_path):
    path = tmp_path / "numbers"
    path.write_bytes(bytes(1 << 20))
    mapped = torch.from_file(str(path), shared=True, size=1 << 18)
    own = torch.zeros(1 << 18)
    ranges = file_mappings()
    assert any(begin <= mapped.data_ptr() < end for begin, end in ranges)
    assert not any(begin <= own.data_ptr() < end for begin, end in ranges)
