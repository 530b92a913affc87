"""bench/: names, selection, statistics, the check before timing, the JSON lines, the README table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import run, table
from bench.cases import Case, all_cases, format_name, parse_format
from bench.contenders import Entry, Prepared, Skip, copies_for, default_impl, impls, own_entry, rotation
from bench.peers import all_peers, bits_of, entry
from bench.peers.common import disagreement
from bench.problem import Problem, max_error
from bench.timing import Runner, Sample, clean, interleave, percentile, spread, steal_ticks, wait_until_idle

from taut.formats import WeightFormat
from taut.roofline import Roofline

SMALL = Case("quant_linear", 64, 96, 3)
JSON_TYPES = {
    "op": str, "case": str, "format": str, "impl": str, "peer": bool, "threads": int, "median_us": float, "p10_us": float, "p90_us": float,
    "gb_s": float, "gflop_s": float, "roofline_share": float, "cold": bool, "max_error": float, "commit": str, "machine": str, "torch": str,
    "run": str,
}  # fmt: skip


# ---- names


def test_every_case_has_its_own_name_and_formats_that_parse() -> None:
    cases = all_cases()
    names = [(case.op, case.name) for case in cases]
    assert len(set(names)) == len(names)
    assert {("quant_linear", f"N14336_K4096_M{m}") for m in (1, 4, 32, 512)} <= set(names)
    for case in cases:
        for name in case.formats:
            assert format_name(*parse_format(name)) == name


@pytest.mark.parametrize(
    ("name", "format", "activations"),
    [
        ("int4_g32_a8", WeightFormat("int4", 32), "a8"),
        ("int4_row_z_bf16", WeightFormat("int4", 0, True), "bf16"),
        ("int8_row_f32", WeightFormat("int8", 0), "f32"),
        ("int8_g128", WeightFormat("int8", 128), ""),
        ("ternary_row_a8", WeightFormat("ternary", 0), "a8"),
        ("fp8_block_g128_f32", WeightFormat("fp8_block"), "f32"),
    ],
)
def test_parse_format(name: str, format: WeightFormat, activations: str) -> None:
    assert parse_format(name) == (format, activations)


@pytest.mark.parametrize("name", ["", "int4", "int5_g32_a8", "int4_g33_a8", "int8_g32_z_a8", "int4_g32_a4", "mxfp4_g64_a8"])
def test_unknown_formats_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"accepted|does not fit|int4 only"):
        parse_format(name)


# ---- statistics


def test_stolen_samples_are_dropped_where_three_clean_ones_stay() -> None:
    stolen = [Sample(9.0, True)] * 5
    assert clean([*stolen, *[Sample(1.0, False)] * 3]) == [1.0] * 3
    assert len(clean([*stolen, *[Sample(1.0, False)] * 2])) == 7
    found = spread([*stolen, *(Sample(micros * 1e-6, False) for micros in (1, 2, 3, 4, 5))])
    assert (found.samples, found.dropped) == (5, 5)
    assert found.median_us == pytest.approx(3)
    assert found.p10_us == pytest.approx(1.4)
    assert found.p90_us == pytest.approx(4.6)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentile_is_numpys(count: int) -> None:
    values = np.random.default_rng(count).random(count).tolist()
    for share in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert percentile(values, share) == pytest.approx(np.quantile(values, share))


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        spread([])


def test_steal_counter_never_falls() -> None:
    first = steal_ticks()
    assert 0 <= first <= steal_ticks()


def test_wait_until_idle_returns_at_once_when_nothing_spins() -> None:
    wait_until_idle(limit_s=60.0)  # a hang here is the failure


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runners = [Runner(lambda: order.append("a")), Runner(lambda: order.append("b"), layers=4)]
    interleave(runners, rounds=3, seconds_each=60.0)
    turns = re.findall(r"a+|b+", "".join(order))
    assert [turn[0] for turn in turns] == ["a", "b", "a", "b", "a", "b"]  # warm-up a b; then ab, ba, ab: neighbours join
    assert all(len(runner.samples) == 3 * runner.burst for runner in runners)
    assert all(sample.seconds > 0 for runner in runners for sample in runner.samples)


def test_a_contender_that_has_had_its_time_stops_with_three_samples() -> None:
    runner = Runner(lambda: None, burst=1)
    runner.warm_up = lambda: None  # keeps a burst of one sample
    interleave([runner], rounds=10, seconds_each=0.0)
    assert len(runner.samples) == 3


def test_cold_copies_exceed_what_they_must() -> None:
    assert copies_for(100, 0) == 1
    assert all(copies_for(nbytes, 1000) * nbytes > 1000 for nbytes in (1, 7, 500, 1000, 5000))
    take = rotation(["a", "b"])
    assert [take() for _ in range(5)] == ["a", "b", "a", "b", "a"]


# ---- correctness before time


def test_max_error_sees_every_row_and_column_it_says() -> None:
    x, w = torch.randn(40, 32), torch.randn(3000, 32)
    exact = (x.double() @ w.double().T).float()
    assert max_error(exact, x, w) < 1e-6
    for row, column in ((0, 1500), (39, 2999), (20, 0), (20, 2999)):
        broken = exact.clone()
        broken[row, column] += float(exact.abs().max())
        assert max_error(broken, x, w) > 0.99
    exact[0, 0] = torch.nan
    assert max_error(exact, x, w) == float("inf")


def _context() -> run.Context:
    return run.Context(run.roofline(), torch.get_num_threads(), "abc", "a machine", "2026-01-01T00:00:00+00:00")


@pytest.mark.parametrize("name", ["int4_g32_a8", "int4_row_z_f32", "int8_row_bf16", "int8_g32_a8"])
@pytest.mark.parametrize("cold", [True, False])
def test_every_impl_runs_a_small_race(name: str, cold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "last_cache_bytes", lambda: 4096)
    entries = [own_entry(SMALL, name, impl) for impl in impls(SMALL, name)]
    wrong: list[str] = []
    rows = run.race(entries, cold, 1, _context(), wrong, set())
    assert not wrong
    assert [row.entry.impl for row in rows] == impls(SMALL, name)
    assert rows[0].entry.impl == default_impl(SMALL, name)
    for row in rows:
        assert 0 < row.prepared.max_error < 0.03
        assert row.timing.median_us > 0
        assert row.roofline_share > 0


@pytest.mark.parametrize("op", ["quantize_weight", "pack_weight"])
def test_weight_ops_run_a_small_race(op: str) -> None:
    case = Case(op, 64, 96)
    for name in ("int4_g32", "int4_g64_z", "int8_row"):
        name += "_bf16" if op == "quantize_weight" else ""
        wrong: list[str] = []
        rows = run.race([own_entry(case, name, impl) for impl in impls(case, name)], False, 1, _context(), wrong, set())
        assert not wrong
        assert len(rows) == len(impls(case, name))


def test_a_wrong_result_is_reported_and_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def off_by_one(*arguments: object) -> torch.Tensor:
        return right(*arguments) + 1.0

    right = torch.ops.taut.quant_linear
    monkeypatch.setattr(torch.ops.taut, "quant_linear", off_by_one)
    monkeypatch.setattr(run, "all_cases", lambda: [SMALL])
    lines = tmp_path / "lines.jsonl"
    assert run.main(["--filter", "N64_K96_M3/int4_g32_a8", "--warm", "--rounds", "1", "--json", str(lines)]) == 1
    assert "WRONG, not timed: quant_linear/N64_K96_M3/int4_g32_a8/" in capsys.readouterr().out
    assert lines.read_text() == ""


def test_a_long_run_holds_results_against_the_best_ceilings_so_far(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    speeds = iter((10.0, 1000.0))
    monkeypatch.setattr(
        run, "roofline", lambda refresh=False: Roofline(torch.get_num_threads(), "cpu_scalar", 1, 1, next(speeds), None, 1, 1e9, 1e9, 1e9)
    )
    monkeypatch.setattr(run, "all_cases", lambda: [SMALL])
    clock = iter((0.0, run._CEILINGS_SECONDS - 1, run._CEILINGS_SECONDS + 1, run._CEILINGS_SECONDS + 1))
    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    lines = tmp_path / "lines.jsonl"
    assert run.main(["--filter", "N64_K96_M3/int4_g32_a8", "--rounds", "1", "--json", str(lines)]) == 0
    first, second = [json.loads(text) for text in lines.read_text().splitlines()]
    assert first["roofline_share"] == pytest.approx(first["gb_s"] / 10)
    assert second["roofline_share"] == pytest.approx(second["gb_s"] / 1000)
    assert "ceilings: read 1000.0 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "said"), [(0.5, 0), (0.51, 2)])
def test_a_busy_machine_is_named_first_and_last(
    load: float, said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "all_cases", lambda: [SMALL])
    monkeypatch.setattr(run, "_load", lambda: load)
    assert run.main(["--filter", "N64_K96_M3/int4_g32_a8", "--warm", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.count("Do not trust these times") == said


def test_who_cannot_take_part_is_skipped_with_the_reason() -> None:
    def refuse(problem: Problem, cold_bytes: int) -> Prepared:
        raise Skip("not today")

    skipped: set[str] = set()
    assert run.race([Entry(SMALL, "fp32", "nobody", True, refuse)], False, 1, _context(), [], skipped) == []
    assert skipped == {"quant_linear/N64_K96_M3/fp32/nobody: not today"}


# ---- peers


@pytest.mark.parametrize("peer", all_peers(), ids=lambda peer: peer.name)
@pytest.mark.parametrize("cold_bytes", [0, 40_000])
def test_peer_computes_the_same(peer, cold_bytes: int) -> None:
    if reason := peer.available():
        pytest.skip(reason)
    try:
        prepared = peer.prepare(Problem(SMALL), cold_bytes)
    except Skip as reason:
        pytest.skip(str(reason))
    assert prepared.wrong is None
    assert prepared.layers == 1 or cold_bytes
    prepared.call()


def test_peers_are_named_once_and_know_their_bits() -> None:
    names = [peer.name for peer in all_peers()]
    assert len(set(names)) == len(names) == 10
    assert [bits_of(name) for name in ("fp32", "bf16", "int4_g32_a8", "int8_g32_a8")] == [None, None, 4, 8]
    assert entry(all_peers()[0], SMALL).id == "quant_linear/N64_K96_M3/fp32/torch_fp32"


def test_disagreement_finds_a_node_that_computed_something_else() -> None:
    first = np.arange(12.0).reshape(2, 6)
    good = [first, np.roll(first, 1, axis=1), np.roll(first, 2, axis=1)]
    assert disagreement(good) is None
    assert disagreement([first, first]) == "its node 1 differs from its first"
    assert disagreement([first, first * np.nan]) == "its node 1 differs from its first"


# ---- selection and the command line


def _selected(expression: str | None, peers: bool = False) -> list[str]:
    pattern = None if expression is None else re.compile(expression)
    return [entry.id for entries in run.select(pattern, peers) for entry in entries]


def test_the_default_is_the_headline_layer_in_two_formats() -> None:
    chosen = _selected(None)
    assert {name.rpartition("/")[0] for name in chosen} == {
        f"quant_linear/N14336_K4096_M{m}/{format}" for m in (1, 4, 32, 512) for format in ("int4_g32_a8", "int8_row_a8")
    }
    assert len(chosen) == 8


def test_other_impls_run_where_the_filter_names_them() -> None:
    stem = "quant_linear/N576_K576_M1/int4_g32_a8"
    chosen = default_impl(Case("quant_linear", 576, 576, 1), "int4_g32_a8")
    assert _selected(f"^{stem}") == [f"{stem}/{chosen}"]
    assert _selected(f"^{stem}/cpu_scalar") == [f"{stem}/cpu_scalar"]
    assert "cpu_scalar" not in str(_selected(f"^{stem}/cpu_")) or chosen == "cpu_scalar"


def test_peers_of_the_same_bits_join() -> None:
    chosen = _selected("^quant_linear/N576_K576_M1/int4_g32_a8/", peers=True)
    assert "quant_linear/N576_K576_M1/fp32/torch_fp32" in chosen
    assert not any("/int8" in name for name in chosen)
    assert _selected("N576_K576_M1/fp32/torch_fp32", peers=True) == ["quant_linear/N576_K576_M1/fp32/torch_fp32"]


def test_temperatures() -> None:
    small, large = Case("quant_linear", 8, 8, 4), Case("quant_linear", 8, 8, 512)
    assert run._temperatures(small, False, False) == [True, False]
    assert run._temperatures(large, False, False) == [False]
    assert run._temperatures(large, True, False) == [True]
    assert run._temperatures(small, False, True) == [False]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--filter", "quant_linear/N14336_K4096_M1/int4_g32_a8"]) == 0
    lines = capsys.readouterr().out.split()
    assert f"quant_linear/N14336_K4096_M1/int4_g32_a8/{impls(Case('quant_linear', 14336, 4096, 1), 'int4_g32_a8')[0]}" in lines
    assert "quant_linear/N14336_K4096_M1/int4_g32_a8/onnxruntime_4bit" in lines
    assert all(re.fullmatch(r"\w+/N\d+_K\d+(_M\d+)?/\w+/[\w.]+", line) for line in lines)


def test_a_tiny_run_writes_lines_of_the_schema(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"kept": True}) + "\n")
    command = [sys.executable, str(ROOT / "bench" / "run.py"), "--filter", "N192_K576_M1/int4_g32_a8", "--rounds", "1", "--threads", "1"]
    finished = subprocess.run([*command, "--json", str(lines)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "N192_K576_M1" in finished.stdout
    assert "ceilings: read " in finished.stdout
    first, *rest = [json.loads(text) for text in lines.read_text().splitlines()]
    assert first == {"kept": True}
    assert [line["cold"] for line in rest] == [True, False]
    for line in rest:
        assert tuple(line) == run.FIELDS
        assert set(JSON_TYPES) == set(run.FIELDS)
        for name, kind in JSON_TYPES.items():
            assert isinstance(line[name], kind), name
        assert line["op"] == "quant_linear"
        assert line["case"] == "N192_K576_M1"
        assert line["format"] == "int4_g32_a8"
        assert line["peer"] is False
        assert line["impl"] == default_impl(Case("quant_linear", 192, 576, 1), "int4_g32_a8")
        assert line["threads"] == 1
        assert 0 < line["p10_us"] <= line["median_us"] <= line["p90_us"]
        assert line["gb_s"] > 0
        assert line["gflop_s"] > 0
        assert line["roofline_share"] > 0
        assert 0 < line["max_error"] < 0.03
        assert line["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--filter", "("], "is not a regular expression"),
        (["--filter", "no such case"], "matches nothing that can run here"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--filter", "N192_K576_M1/int4_g32_a8", "--json", "/no/such/folder/x.jsonl"], "/no/such/folder/x.jsonl"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(arguments) == 2
    assert words in capsys.readouterr().err


# ---- the README table


def _line(m: int, micros: float, format: str = "int4_g32_a8", impl: str = "cpu_avx2.int8_tile", **other: object) -> dict:
    line = {
        "op": "quant_linear", "case": f"N14336_K4096_M{m}", "format": format, "impl": impl, "peer": False, "threads": 2,
        "median_us": micros, "cold": True, "commit": "abc", "machine": "a machine", "torch": "2.13.0", "run": "2026-11-23T10:00:00+00:00",
    }  # fmt: skip
    return {**line, **other}


def _full_run(run: str, scale: float = 1.0) -> list[dict]:
    own = [_line(m, scale * 1000.0 * m, run=run) for m in (1, 4, 32, 512)]
    return [*own, _line(1, scale * 2500.0, impl="onnxruntime_4bit", peer=True, run=run)]


def test_the_newest_full_run_is_shown() -> None:
    old, new = _full_run("2026-11-01T10:00:00+00:00"), _full_run("2026-11-02T10:00:00+00:00", 2.0)
    partial = [_line(1, 1.0, run="2026-11-03T10:00:00+00:00")]
    assert table.newest_run([*new, *old, *partial]) == new
    assert table.newest_run(partial) == partial
    with pytest.raises(ValueError, match="no line times taut"):
        table.newest_run([_line(1, 1.0, impl="torch_fp32", format="fp32", peer=True)])


def test_render_shows_cold_times_and_ratios() -> None:
    lines = [*_full_run("2026-11-02T10:00:00+00:00"), _line(1, 1.0, cold=False), _line(1, 4000.0, "fp32", "torch_fp32", peer=True)]
    lines += [_line(1, 2000.0, "int8_row_a8"), _line(1, 5000.0, "int8_g32_a8", "openvino_u8", peer=True)]
    rows = table.render(lines).splitlines()
    assert rows[0] == "| ms (times taut of as many bits; floats: times int4) | M=1 | M=4 | M=32 | M=512 |"
    assert rows[2] == "| **taut int4** | 1 | 4 | 32 | 512 |"
    assert rows[3] == "| **taut int8** | 2 |  |  |  |"
    assert rows[4] == "| torch fp32 | 4 (4.0x) |  |  |  |"
    assert rows[5] == "| ONNX Runtime, 4 bits | 2.5 (2.5x) |  |  |  |"
    assert rows[6] == "| OpenVINO, 8 bits | 5 (2.5x) |  |  |  |"
    assert "a machine, 2 threads, torch 2.13.0, commit abc, 2026-11-02" in rows[-1]


def test_attention_is_shown_beside_torch_in_the_same_precision() -> None:
    case = "B1_H32.8_L1.4096_D128"
    lines = [
        {**_line(1, us, format, impl, peer=peer, run=run), "op": "attention_decode", "case": case}
        for us, format, impl, peer, run in (
            (9000.0, "kv_float32", "cpu_avx2", False, "2026-11-01T10:00:00+00:00"),
            (1000.0, "kv_float32", "cpu_avx2", False, "2026-11-02T10:00:00+00:00"),
            (250.0, "kv_int8", "cpu_avx2", False, "2026-11-02T10:00:00+00:00"),
            (3000.0, "fp32", "torch_sdpa_fp32", True, "2026-11-02T10:00:00+00:00"),
            (5000.0, "bf16", "torch_flex_bf16", True, "2026-11-02T10:00:00+00:00"),
        )
    ]
    rows = table.render_attention(lines).splitlines()
    assert rows[2:6] == [
        "| **taut fp32** |  |  | 1 |  |  |", "| **taut, int8 cache** |  |  | 0.25 |  |  |", "| torch SDPA fp32 |  |  | 3 (3.0x) |  |  |",
        "| torch FlexAttention bf16 |  |  | 5 |  |  |",
    ]  # fmt: skip
    assert "2026-11-02" in rows[-1]
    assert "Not measured yet" in table.render_attention(_full_run("2026-11-02T10:00:00+00:00"))


def test_sparse_speed_is_shown_as_picked_and_beside_the_fastest_dense_kernel() -> None:
    about = {"op": "sparse_linear", "threads": 2, "commit": "abc", "machine": "a machine", "torch": "2.13.0"}
    lines = [
        {**about, "case": f"N14336_K4096_M{m}", "pattern": pattern, "format": f"{pattern}_int8_g32_a8", "impl": impl, "picked": picked,
         "median_us": us, "dense_ratio": ratio, "run": run}
        for m, pattern, impl, picked, us, ratio, run in (
            (1, "dense", "cpu_avx2.int8_small", True, 900.0, 1.0, "2026-11-02"), (1, "2:4", "cpu_avx2", True, 600.0, 1.5, "2026-11-02"),
            (1, "2:4", "cpu_scalar", False, 9000.0, 0.1, "2026-11-02"), (16, "2:4", "cpu_avx2", True, 2000.0, 0.9, "2026-11-02"),
            (1, "2:4", "cpu_avx2", True, 1.0, 99.0, "2026-11-01"),
        )
    ]  # fmt: skip
    lines += [
        {**lines[0], "pattern": pattern, "format": f"{pattern}_bf16", "impl": impl, "median_us": us, "dense_ratio": ratio}
        for pattern, impl, us, ratio in (("dense", "torch linear, bfloat16", 900.0, 1.0), ("2:4", "cpu_avx2.float_small", 300.0, 3.0))
    ]
    rows = table.render_sparse_speed(lines).splitlines()
    assert rows[2:4] == ["| int8, groups of 32, dense | 0.9 |  |  |", "| int8, groups of 32, 2:4 | 0.6 (1.50x) | 2 (0.90x) |  |"]
    assert rows[4:6] == ["| bf16, dense (torch) | 0.9 |  |  |", "| bf16, 2:4 | 0.3 (3.00x) |  |  |"]
    assert "a machine, 2 threads, torch 2.13.0, commit abc, 2026-11-02" in rows[-1]
    assert "not measured yet" in table.render_sparse_speed([])


def test_sparsity_is_shown_from_worst_to_best_after_dense() -> None:
    about = {"op": "sparsity", "ppl_float": 18.0, "same_top": 0.5, "tokens": 4088, "commit": "abc"}
    lines = [
        {**about, "case": case, "format": entry, "bits": bits, "kl": kl, "ppl": ppl, "run": run}
        for case, entry, bits, kl, ppl, run in (
            ("smollm2-135m", "sparsegpt 2:4 int4", 3.5, 0.8, 40.0, "2"), ("smollm2-135m", "magnitude 2:4 int4", 3.5, 4.5, 1894.2, "2"),
            ("smollm2-135m", "gptq dense int4", 4.5, 0.1, 20.0, "2"), ("gemma3-270m", "sparsegpt 2:4 int4", 3.5, 0.9, 50.0, "1"),
            ("smollm2-135m", "sparsegpt 2:4 int4", 3.5, 9.9, 99.0, "1"),
        )
    ]  # fmt: skip
    rows = table.render_sparsity(lines).splitlines()
    assert rows[2:5] == [
        "| gptq dense int4 | 4.50 | 0.1 | 50.0% | 20 |  |  |  |", "| magnitude 2:4 int4 | 3.50 | 4.5 | 50.0% | 1894 |  |  |  |",
        "| sparsegpt 2:4 int4 | 3.50 | 0.8 | 50.0% | 40 | 0.9 | 50.0% | 50 |",
    ]  # fmt: skip
    assert "18 of SmolLM2 135M, 18 of Gemma 3 270M" in rows[-1]
    assert "not measured yet" in table.render_sparsity([])


def test_the_readme_holds_what_the_committed_results_say(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text((ROOT / "README.md").read_text())
    table.update_readme(readme, sorted((ROOT / "bench" / "results").glob("*.jsonl")))
    assert readme.read_text() == (ROOT / "README.md").read_text()


def test_an_older_processor_is_not_in_the_tables(tmp_path: Path) -> None:
    readme, results, older = tmp_path / "README.md", tmp_path / "a-zen4-2core.jsonl", tmp_path / "a-zen1-2core.jsonl"
    readme.write_text(f"{table.BEGIN}{table.END}")
    results.write_text("".join(json.dumps(line) + "\n" for line in _full_run("2026-11-02T10:00:00+00:00")))
    table.update_readme(readme, [results])
    text = readme.read_text()
    older.write_text("".join(json.dumps(line) + "\n" for line in _full_run("2026-11-03T10:00:00+00:00", 2.0)))
    table.update_readme(readme, [older, results])
    assert readme.read_text() == text


def test_update_readme_changes_only_what_is_between_the_markers(tmp_path: Path) -> None:
    readme, results = tmp_path / "README.md", tmp_path / "a.jsonl"
    readme.write_text(f"# top\n{table.BEGIN}\nold\n{table.END}\nrest\n")
    results.write_text("".join(json.dumps(line) + "\n" for line in _full_run("2026-11-02T10:00:00+00:00")))
    for _ in range(2):  # the second time changes nothing
        table.update_readme(readme, [results])
        text = readme.read_text()
        assert text.startswith(f"# top\n{table.BEGIN}\n| ms")
        assert text.endswith(f"{table.END}\nrest\n")
        assert "old" not in text
    assert set(tmp_path.iterdir()) == {readme, results}


@pytest.mark.parametrize("text", ["no markers", f"{table.END} {table.BEGIN}", f"{table.BEGIN}{table.BEGIN}{table.END}"])
def test_a_readme_without_its_markers_is_left_alone(tmp_path: Path, text: str) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="once each, in this order"):
        table.update_readme(readme, [])
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("text", "words"), [("{", "x.jsonl:1: not a JSON object"), ('{"op": "a"}', "x.jsonl:1: has no 'case'"), ("3", "x.jsonl:1: not")]
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ValueError, match=words):
        table.read_lines([path])
