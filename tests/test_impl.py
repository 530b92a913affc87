"""The op machinery: impl tables, forcing, explaining, and what the build says of itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import taut
from cases import FORMATS, PAIRS, LinearCase
from taut import _C, _native
from taut.formats import WeightFormat
from taut.ops.quant_linear import quant_linear

CASE = LinearCase(3, 9, 40, WeightFormat("int4", 32), "float")


def run(case: LinearCase = CASE) -> torch.Tensor:
    inputs = case.make()
    return quant_linear(inputs.x, inputs.packed, inputs.bias, case.N, case.format, case.activations)


def test_every_op_has_a_scalar_impl_last():
    impls = taut.list_impls("cpu")
    assert {"quant_linear", "quantize_weight"} <= set(impls)
    for op, names in impls.items():
        assert names[-1] == "cpu_scalar", op
        assert len(names) == len(set(names))


def test_exactly_one_impl_is_chosen_for_any_call():
    for activations, formats in PAIRS.items():
        for rows in (0, 1, 4, 16, 17, 100, 10_000):
            for format in formats:
                verdicts = taut.explain("quant_linear", **LinearCase(rows, 24, 96, format, activations).sizes())
                assert [verdict.impl for verdict in verdicts] == taut.list_impls("cpu")["quant_linear"]
                assert sum(verdict.chosen for verdict in verdicts) == 1
                assert all(verdict.chosen or verdict.reason for verdict in verdicts), "an impl was passed over without a reason"


def test_what_explain_says_is_what_runs():
    """cpu_scalar sums in double: its bits differ from any other impl's on a case long enough."""
    case = LinearCase(5, 40, 2000, WeightFormat("int4", 32), "float")
    results = {}
    for impl in taut.list_impls("cpu")["quant_linear"]:
        with taut.force_impl("quant_linear", impl):
            if any(verdict.chosen for verdict in taut.explain("quant_linear", **case.sizes())):
                results[impl] = run(case)
    chosen = next(verdict.impl for verdict in taut.explain("quant_linear", **case.sizes()) if verdict.chosen)
    assert torch.equal(run(case), results[chosen])
    for impl, result in results.items():
        assert impl == "cpu_scalar" or not torch.equal(result, results["cpu_scalar"])


def test_forcing_ends_with_the_block():
    with taut.force_impl("quant_linear", "cpu_scalar"):
        assert _C.forced_impl("quant_linear") == "cpu_scalar"
        with taut.force_impl("quant_linear", taut.list_impls()["quant_linear"][0]):
            assert _C.forced_impl("quant_linear") != "cpu_scalar"
        assert _C.forced_impl("quant_linear") == "cpu_scalar"
        with pytest.raises(KeyError), taut.force_impl("quant_linear", "cpu_scalar"):
            raise KeyError
    assert _C.forced_impl("quant_linear") == ""


def test_forcing_one_op_leaves_the_others_alone():
    with taut.force_impl("quant_linear", "cpu_scalar"):
        assert _C.forced_impl("quantize_weight") == ""
        assert sum(verdict.chosen for verdict in taut.explain("quantize_weight")) == 1


def test_forcing_by_isa_admits_its_variants():
    if not taut.cpu_features()["avx2"]:
        pytest.skip("this processor has no AVX2")
    with taut.force_impl("quant_linear", "cpu_avx2"):
        for activations in ("float", "int8"):
            for rows in (1, 50):
                chosen = [
                    v.impl for v in taut.explain("quant_linear", **LinearCase(rows, 8, 32, FORMATS[0], activations).sizes()) if v.chosen
                ]
                assert len(chosen) == 1
                assert chosen[0].startswith("cpu_avx2.")


def test_a_forced_impl_that_cannot_run_is_an_error():
    with taut.force_impl("quant_linear", "cpu_avx2.int8_tile"):
        assert not any(verdict.chosen for verdict in taut.explain("quant_linear", **CASE.sizes()))
        with pytest.raises(RuntimeError, match=r"the forced impl cpu_avx2.int8_tile cannot run this call. cpu_avx2.int8_tile: "):
            run()


@pytest.mark.parametrize(
    ("op", "impl", "message"),
    [
        ("quant_linear", "cpu_avx3", "op quant_linear has no impl 'cpu_avx3'; it has: .*cpu_scalar"),
        ("quant_linear", "cpu_avx", "no impl 'cpu_avx'"),
        ("matmul", "cpu_scalar", "no op 'matmul'; known ops:"),
    ],
)
def test_forcing_the_unknown_is_a_value_error(op, impl, message):
    with pytest.raises(ValueError, match=message), taut.force_impl(op, impl):
        pass


@pytest.mark.parametrize(
    ("op", "sizes", "message"),
    [
        ("matmul", {}, "no op 'matmul'; known ops:"),
        ("quant_linear", {"Q": 3}, "quant_linear has no size 'Q'; accepted: M, N, K"),
        ("quantize_weight", {"M": 3}, "quantize_weight has no size 'M'; accepted: none"),
        ("quant_linear", {"format": 11}, "format must be 1"),
        ("quant_linear", {"group_size": 5}, "group_size must be"),
        ("quant_linear", {"format": 8, "zeros": 1}, "zeros are for int2, int3 and int4 only"),
        ("quant_linear", {"K": 0}, "K >= 1"),
        ("quant_linear", {"format": 9, "activations": 1}, "fp8_e4m3 weights take activations 0"),
    ],
)
def test_explaining_the_impossible_is_a_value_error(op, sizes, message):
    with pytest.raises(ValueError, match=message):
        taut.explain(op, **sizes)


def test_verdicts_read_well():
    with taut.force_impl("quant_linear", "cpu_scalar"):
        lines = [str(verdict) for verdict in taut.explain("quant_linear", **CASE.sizes())]
    assert lines[-1] == "cpu_scalar: runs"
    assert all(line.endswith("another impl is forced: cpu_scalar") for line in lines[:-1])


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_forcing_by_environment():
    code = "import taut; from taut import _C; print(_C.forced_impl('quant_linear'), _C.forced_impl('quantize_weight'))"
    done = python(code, TAUT_FORCE_IMPL="quant_linear:cpu_scalar, quantize_weight:cpu_avx2")
    assert done.stdout.split() == ["cpu_scalar", "cpu_avx2"], done.stderr


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("quant_linear", "TAUT_FORCE_IMPL: 'quant_linear' is not of the form <op>:<impl>"),
        ("quant_linear:cpu_avx9", "no impl 'cpu_avx9'"),
        ("matmul:cpu_scalar", "no op 'matmul'"),
    ],
)
def test_a_bad_environment_stops_the_import(value, message):
    done = python("import taut", TAUT_FORCE_IMPL=value)
    assert done.returncode != 0
    assert "ValueError" in done.stderr
    assert message in done.stderr


def test_impls_by_device():
    assert set(taut.list_impls("cpu")) == set(taut.list_impls())
    assert all(impl.startswith("cpu_") for impls in taut.list_impls("cpu").values() for impl in impls)
    assert all(impl.startswith("cuda_") for impls in taut.list_impls("cuda").values() for impl in impls)
    assert taut.list_impls("tpu") == {}


def test_explaining_for_a_device(monkeypatch):
    found = taut.explain("quant_linear", M=3, N=64, K=64, dtype=torch.bfloat16, device="cpu")
    assert sum(verdict.chosen for verdict in found) == 1
    with pytest.raises(ValueError, match="taut cannot compute on tpu here: it has kernels for the CPU and for CUDA"):
        taut.explain("quant_linear", device="tpu")
    monkeypatch.setattr(_native, "_WHY_NO_CUDA", "no CUDA device is visible to torch")
    with pytest.raises(ValueError, match="taut cannot compute on cuda here: no CUDA device is visible to torch"):
        taut.explain("quant_linear", device="cuda")


def test_batch_invariance_ends_with_the_block():
    assert not _C.batch_invariant()
    with taut.batch_invariant():
        assert _C.batch_invariant()
        with pytest.raises(KeyError), taut.batch_invariant():
            raise KeyError
        assert _C.batch_invariant()
    assert not _C.batch_invariant()


def test_ops_are_found_by_device():
    assert _native.ops_for("cpu") is torch.ops.taut
    assert (_native.layout_for("cpu"), _native.layout_for("cuda")) == (0, 1)
    with pytest.raises(ValueError, match="taut cannot compute on xpu tensors: it has kernels for the CPU and for CUDA"):
        _native.ops_for("xpu")


def test_cuda_without_its_library_is_a_value_error(monkeypatch):
    monkeypatch.setattr(_native, "_WHY_NO_CUDA", "this build of taut has no CUDA kernels")
    with pytest.raises(ValueError, match="taut cannot compute on cuda tensors: this build of taut has no CUDA kernels"):
        _native.ops_for("cuda")


def test_features_agree_with_the_kernel():
    features = taut.cpu_features()
    assert all(isinstance(value, bool) for value in features.values())
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((set(line.split(":")[1].split()) for line in file if line.startswith("flags")), None)
    except OSError:
        flags = None
    if flags is None:
        pytest.skip("no /proc/cpuinfo with x86 flags here")
    assert features["avx2"] == ({"avx2", "fma", "f16c"} <= flags)
    assert features["avxvnni"] == ({"avx2", "fma", "f16c", "avx_vnni"} <= flags)
    assert features["avx512bw"] == ({"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags)
    assert features["avx512vnni"] == ({"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni"} <= flags)
    assert features["avx512bf16"] == (features["avx512vnni"] and "avx512_bf16" in flags)


def test_build_info():
    info = taut.build_info()
    assert set(info) >= {"version", "compiler", "torch_target", "architecture", "cuda"}
    assert info["torch_target"] == "2.11"
    assert all(value for key, value in info.items() if key != "cuda")  # a build without CUDA kernels says None
    assert taut.__version__ == info["version"]
