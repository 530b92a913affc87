"""Fixtures, and the parametrisation over impls: a test that takes ``impl`` runs once for each impl of its module's op."""

from __future__ import annotations

import contextlib
import math
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import taut
from cases import EMULATED_PRODUCTS
from emulator import build, emulated
from on_gpu import on_gpu
from taut.formats import WeightFormat

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    # WHY: each xdist worker would start as many OpenMP threads as there are cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.module, "OP", None)
    if op and "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", taut.list_impls()[op] + emulated_impls(op))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """WHY not skipped: no CUDA kernel takes these formats anywhere, or the emulator's other mode has the case, and they are thousands."""
    items[:] = [item for item in items if not never_runs(getattr(item, "callspec", None))]


def never_runs(callspec) -> bool:
    impl = "" if callspec is None else str(callspec.params.get("impl", ""))
    if not impl.startswith("cuda"):
        return False
    mode = getattr(callspec.params.get("case"), "emulated_mode", None)
    if mode and "emulated" in impl and mode not in impl:
        return True
    format = callspec.params.get("format") or getattr(callspec.params.get("case"), "format", None)
    return isinstance(format, WeightFormat) and not format.kind.cuda


def emulated_impls(op: str) -> list[str]:
    """Every CUDA impl of an op, in both modes of the emulator.

    WHY from the source: so that tests are collected without the minute it may take to build the emulator, and are skipped,
    with a reason, where it cannot be built. test_emulator.py holds this against the libraries.
    """
    source = ROOT / "csrc" / op / "op_cuda.cpp"
    names = re.findall(r'^ *\{"(cuda_\w+(?:\.\w+)?)",', source.read_text(), re.M) if source.exists() else []
    return [f"{name} (emulated, {mode})" for name in names for mode in build.MODES]


@pytest.fixture
def forced(request: pytest.FixtureRequest):
    """``forced(impl, **sizes)``: from here to the end of the test the module's op runs ``impl``, or the test is skipped
    with the reason why this machine or this call rules it out. An emulated impl runs on CPU tensors, on an emulated device
    that has what it needs; a CUDA impl (listed where there is a GPU) on copies of them on the GPU. Gives ``runs(**sizes)``, which
    says whether the impl takes another call as well."""
    op = request.module.OP
    with contextlib.ExitStack() as stack:

        def force(impl: str, **sizes: int) -> Callable[..., bool]:
            device = "cpu"
            if match := re.fullmatch(r"(\S+) \(emulated, (\w+)\)", impl):
                impl, mode = match.groups()
                enter_emulator(stack, request, impl, mode, sizes)
                device = f"emulated {mode}"
            elif impl.startswith("cuda"):
                stack.enter_context(on_gpu())
                device = "cuda"
            stack.enter_context(taut.force_impl(op, impl))

            def verdict(**sizes: int) -> tuple[bool, str]:
                return next((chosen, reason) for name, chosen, reason in taut._C.explain(op, sizes, device) if name == impl)

            chosen, reason = verdict(**sizes)
            if not chosen:
                pytest.skip(f"{impl}: {reason}")
            return lambda **sizes: verdict(**sizes)[0]

        yield force


def enter_emulator(stack: contextlib.ExitStack, request: pytest.FixtureRequest, impl: str, mode: str, sizes: dict[str, int]) -> None:
    if reason := build.unavailable():
        pytest.skip(reason)
    products = math.prod(sizes.get(name, 1) for name in ("M", "N", "K", "B", "Hq", "Lq", "Lk")) * max(
        sizes.get("D", 0) + sizes.get("Dv", 0), 1
    )
    if products > EMULATED_PRODUCTS[mode]:
        pytest.skip(f"{impl}: {products} products are too many for the {mode} emulator, which takes {EMULATED_PRODUCTS[mode]}")
    # Another order of threads and blocks in each test, and the same one each time.
    seed = zlib.crc32(request.node.nodeid.encode())
    order = tuple(emulated.ORDERS)[seed % len(emulated.ORDERS)]
    stack.enter_context(emulated.emulated(mode, emulated.sm_of(impl), order=order, seed=seed))


@pytest.fixture
def threads():
    """``threads(n)`` sets torch's thread count for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
