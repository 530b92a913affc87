"""quant_embedding and QuantEmbedding: exact numbers of any format, states and sharing, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import taut
from cases import ALL_FORMATS, DTYPES, EACH_FORMAT, pack, random_weight
from checks import assert_same_bits
from taut import QuantLinear, WeightFormat
from taut.nn import QuantEmbedding
from taut.ops import quant_embedding as embedding_op
from taut.ops import quantize_weight as weight_op
from taut.ops.quant_embedding import quant_embedding

OP = "quant_embedding"
N, K = 53, 76
FORMATS = (WeightFormat("int4"), WeightFormat("int8"), WeightFormat("int3", 64, True), WeightFormat("nvfp4"))


def make_table(format: WeightFormat, n: int = N, k: int = K):
    parts = random_weight(n, k, format, torch.Generator().manual_seed(1))
    return pack(*parts, k, format), weight_op.reference(*parts, k, format)


@pytest.mark.parametrize("format", ALL_FORMATS, ids=str)
def test_matches_reference(impl, format, forced, threads):
    """A number is exact in float64, rounded to float32, and from there to the dtype."""
    forced(impl)
    for n, k in ((1, 1), (9, 33), (130, 333)):
        packed, w = make_table(format, n, k)
        ids = torch.randint(0, n, (3, 50), generator=torch.Generator().manual_seed(2))
        for dtype in DTYPES:
            for count in (1, 3):
                threads(count)
                out = quant_embedding(ids, packed, n, k, format, dtype)
                expected = embedding_op.reference(ids, w).float().to(dtype)
                assert_same_bits(out + 0.0, expected + 0.0, f"{format} [{n}, {k}] to {dtype}")  # -0.0 + 0.0 is 0.0


def test_shapes_of_ids(impl, forced):
    forced(impl)
    packed, w = make_table(FORMATS[0])
    for ids in (
        torch.tensor(5),
        torch.tensor([]).long(),
        torch.zeros(2, 0, 3).long(),
        torch.arange(12).view(3, 4).t(),
        torch.arange(40)[::2],
    ):
        out = quant_embedding(ids, packed, N, K, FORMATS[0])
        assert out.shape == (*ids.shape, K)
        assert_same_bits(out + 0.0, embedding_op.reference(ids, w).float() + 0.0, str(list(ids.shape)))


@pytest.mark.parametrize("format", EACH_FORMAT, ids=str)
def test_opcheck(format):
    packed, _ = make_table(format)
    arguments = (torch.tensor([[1, 2], [0, 52]]), packed, N, K, format.code, format.group_size, format.zeros, torch.bfloat16)
    torch.library.opcheck(torch.ops.taut.quant_embedding.default, arguments)


GOOD = {"ids": torch.tensor([1]), "rows": N, "columns": K, "format": FORMATS[0], "dtype": torch.float32}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": torch.tensor([1.0])}, ValueError, "ids must be int64, got torch.float32"),
        ({"ids": torch.tensor([1], device="meta")}, ValueError, "ids is on meta, packed on cpu"),
        ({"ids": torch.tensor([0, N])}, IndexError, "an id must be 0..52, got 0..53"),
        ({"ids": torch.tensor([-1])}, IndexError, "an id must be 0..52, got -1..-1"),
        ({"dtype": torch.float64}, ValueError, "dtype must be float32, bfloat16 or float16, got torch.float64"),
        ({"rows": 100}, ValueError, "packed must be uint8"),
        ({"columns": 400}, ValueError, "packed must be uint8"),
        ({"packed": torch.zeros(10)}, ValueError, "packed must be uint8"),
    ],
    ids=("dtype", "device", "large", "negative", "out", "rows", "columns", "packed"),
)
def test_bad_call_is_an_error(change, error, message):
    with pytest.raises(error, match=message):
        quant_embedding(**GOOD | {"packed": make_table(FORMATS[0])[0]} | change)


def test_bad_raw_call_is_an_error_and_no_crash():
    packed, _ = make_table(FORMATS[0])
    good = [torch.tensor([1]), packed, N, K, 4, 32, False, torch.float32]
    bad = [
        (0, torch.tensor([N]), "an id must be 0..52, got 53"),
        (0, torch.tensor([-1]), "an id must be 0..52, got -1"),
        (0, torch.tensor([1], dtype=torch.int32), "ids must be int64"),
        (1, packed[:-1], "packed must be a contiguous uint8 tensor"),
        (2, 1000, "packed must be"),
        (4, 11, "format must be 1"),
        (7, torch.int32, "dtype must be float32"),
    ]
    for index, value, message in bad:
        arguments = [value if i == index else old for i, old in enumerate(good)]
        with pytest.raises(RuntimeError, match=message):
            torch.ops.taut.quant_embedding(*arguments)


def test_cost_counts_the_rows_asked_for():
    found = embedding_op.cost(3, 64, FORMATS[0], element_bytes=2)
    assert found == {"flops": 3 * 64, "bytes": 3 * (FORMATS[0].canonical_bytes(1, 64) + 64 * 2)}


# ---- The module: a view of a packed output head ----


IDS = torch.tensor([[0, 5, 52], [7, 7, 1]])


def make(
    format: WeightFormat = FORMATS[0], dtype: torch.dtype = torch.float32, scale: float | None = None
) -> tuple[QuantEmbedding, QuantLinear]:
    torch.manual_seed(0)
    head = QuantLinear.from_float(nn.Linear(K, N, bias=False).to(dtype), format)
    like = nn.Embedding(N, K, padding_idx=3)
    if scale is not None:
        like.scalar_embed_scale = scale  # transformers' Gemma
    return QuantEmbedding(head, like), head


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_looks_up_the_table_of_the_head(format, dtype):
    module, head = make(format, dtype)
    expected = weight_op.reference(*head.canonical(), K, format)
    out = module(IDS)
    assert out.dtype == dtype and module.padding_idx == 3 and not module.state_dict() and not list(module.parameters())
    assert_same_bits(out + 0.0, expected[IDS].float().to(dtype) + 0.0, str(format))
    assert_same_bits(module(IDS.int()), out, "int32 ids")
    assert_same_bits(module.to_float().weight.detach() + 0.0, expected.float().to(dtype) + 0.0, "as floats")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_of_its_own(dtype):
    """As transformers' Gemma: the rows times the scale in their dtype."""
    scaled, _ = make(dtype=dtype, scale=K**0.5)
    plain, _ = make(dtype=dtype)
    assert_same_bits(scaled(IDS), plain(IDS) * torch.tensor(K**0.5).to(dtype), "scaled")


def test_compile_keeps_the_graph_whole():
    module, _ = make()
    compiled = torch.compile(lambda ids: module(ids) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    for ids in (IDS, IDS[:1], IDS[:, :2]):
        assert_same_bits(compiled(ids), module(ids) * 2, "compiled")


def test_bad_ids():
    module, _ = make()
    with pytest.raises(ValueError, match="takes ids in int64 or int32, got torch.float32"):
        module(IDS.float())
    with pytest.raises(ValueError, match="looked up on the CPU"):
        module(IDS.to("meta"))
    with pytest.raises(RuntimeError, match="an id must be 0..52, got 53"):
        module(torch.tensor([53]))


def test_it_runs_by_its_name():
    assert [verdict.impl for verdict in taut.explain(OP) if verdict.chosen] == ["cpu_scalar"]
