"""Runs taut's CUDA ops on the GPU for tests whose tensors are on the CPU: ``with on_gpu(): ...``, as ``emulated()`` does without one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from taut import _native


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on another device with the same strides, and the same bytes around it: ``Tensor.to`` would make views contiguous."""
    storage = tensor.untyped_storage()
    # WHY 16 bytes more: an empty storage has no address
    whole = torch.empty(len(storage) + 16, dtype=torch.uint8, device=device)
    whole[: len(storage)] = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (len(storage),)).to(device)
    view = torch.empty(0, dtype=tensor.dtype, device=device)
    return view.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def bytes_of(tensor: Tensor) -> Tensor:
    """Everything its storage holds."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (len(storage),))


class _Ops:
    """The ops of ``torch.ops.taut``, computed on a device by those that have kernels for it; results come back to the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.taut, name)
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"taut::{name}", self._device.type.upper()):
            return op

        schema = torch._C._get_schema(f"taut::{name}", "")

        def call(*arguments: Any) -> Any:
            there = [moved(each, self._device) if isinstance(each, Tensor) else each for each in arguments]
            before = [bytes_of(each).clone() if isinstance(each, Tensor) else None for each in there]
            results = op(*there)
            for given, each, old, named in zip(arguments, there, before, schema.arguments, strict=True):
                if old is None:
                    continue
                if named.alias_info is not None and named.alias_info.is_write:  # what kv_append stores to
                    here = bytes_of(given)
                    here.copy_(bytes_of(each)[: len(here)])
                else:
                    assert torch.equal(bytes_of(each), old), f"{name} wrote to an input"
            if results is None:
                return None
            return tuple(each.cpu() for each in results) if isinstance(results, tuple) else results.cpu()

        return call


@contextmanager
def on_gpu(device: str = "cuda") -> Iterator[None]:
    """Within the block, taut's ops on CPU tensors run their kernels for ``device``, and packed weights are in its layout."""
    ops, layout = _Ops(torch.device(device)), _native.layout_for(torch.device(device).type)
    before = _native.ops_for, _native.layout_for
    _native.ops_for = lambda device_type: ops
    _native.layout_for = lambda device_type: layout
    # WHY: cuda_sm75.dense multiplies with torch's product, which by default may round between parts of K to 16 bits.
    products = torch.backends.cuda.matmul
    reduced = products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction
    products.allow_fp16_reduced_precision_reduction = products.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        _native.ops_for, _native.layout_for = before
        products.allow_fp16_reduced_precision_reduction, products.allow_bf16_reduced_precision_reduction = reduced
