"""torch's own 4-bit linear for CUDA, ``torch.ops.aten._weight_int4pack_mm``: bf16, groups of 32, 64 or 128."""

from __future__ import annotations

import torch

from ..contenders import Skip, copies_for
from ..gpu_problem import Layer, Weight

_INNER_K_TILES = 8
_LARGEST_M = 512  # it decodes w anew for every 16 rows of x: above, a call takes longer than a benchmark should


class Int4Pack:
    name = "torch_int4pack"

    def available(self) -> str | None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
            return "_weight_int4pack_mm needs sm_80"
        return None if hasattr(torch.ops.aten, "_weight_int4pack_mm") else "this torch has no _weight_int4pack_mm"

    def layer(self, weight: Weight, cold_bytes: int) -> Layer:
        format = weight.format
        if format.weights != "int4" or not format.group or weight.dtype != torch.bfloat16:
            raise Skip("it computes int4 weights in groups, in bf16")
        if weight.n % 8 or weight.k % (16 * _INNER_K_TILES):
            raise Skip(f"it takes N in multiples of 8 and K of {16 * _INNER_K_TILES}")
        nibbles = weight.nibbles()
        pairs = nibbles[:, ::2] << 4 | nibbles[:, 1::2]  # its order: the high nibble is the even k
        packed = torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), _INNER_K_TILES)
        scales = weight.scales.to(torch.bfloat16)
        zeros = 8.0 if weight.zeros is None else weight.zeros.float()
        # its value is (q - 8) * scale + zero
        shift = ((8.0 - zeros) * scales.float()).to(torch.bfloat16)
        scale_zero = torch.stack([scales.T, shift.T], dim=-1).contiguous()
        copies = [packed, *(packed.clone() for _ in range(copies_for(packed.nbytes, cold_bytes) - 1))]
        op, group = torch.ops.aten._weight_int4pack_mm, format.group
        return Layer(
            self.name, True, weight.name, "16", lambda x, copy: op(x, copies[copy], group, scale_zero), len(copies),
            packed.nbytes + scale_zero.nbytes,
            refuses=lambda m: f"slower than cuBLAS from far below M={m}" if m > _LARGEST_M else None,
        )  # fmt: skip


PEERS = [Int4Pack()]
