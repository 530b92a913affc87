"""Fixtures, and the parametrisation over impls: a test that takes ``impl`` runs once for each impl of its module's op."""

from __future__ import annotations

import os

import pytest
import torch

import taut


def pytest_configure(config: pytest.Config) -> None:
    # WHY: each xdist worker would start as many OpenMP threads as there are cores.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.module, "OP", None)
    if op and "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", taut.list_impls()[op])


@pytest.fixture
def forced(request: pytest.FixtureRequest):
    """``forced(impl, **sizes)``: from here to the end of the test the module's op runs ``impl``, or the test is skipped
    with the reason why this machine or this call rules it out."""
    op = request.module.OP
    blocks = []

    def force(impl: str, **sizes: int) -> None:
        block = taut.force_impl(op, impl)
        block.__enter__()
        blocks.append(block)
        verdict = next(verdict for verdict in taut.explain(op, **sizes) if verdict.impl == impl)
        if not verdict.chosen:
            pytest.skip(f"{impl}: {verdict.reason}")

    yield force
    for block in reversed(blocks):
        block.__exit__(None, None, None)


@pytest.fixture
def threads():
    """``threads(n)`` sets torch's thread count for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
