"""Sparsity patterns: what they keep, and what they refuse."""

import pytest
import torch

from taut.formats.sparse import Pattern


@pytest.mark.parametrize("text", ["2:4", "1:4", "2:8", "4:8", "8:2:4", "16:1:4", "16:4:8"])
def test_mask_keeps_the_best(text):
    pattern = Pattern.parse(text)
    assert str(pattern) == text
    scores = torch.randn(37, 48, generator=torch.Generator().manual_seed(1)).abs()
    mask = pattern.mask(scores)
    assert mask.view(37, -1, pattern.m).sum(-1).eq(pattern.n).all()
    assert pattern.holds(mask.float())
    for first in range(0, 37, pattern.v):
        rows, kept = scores[first : first + pattern.v].sum(0), mask[first]
        assert mask[first : first + pattern.v].eq(kept).all()
        for place in range(0, 48, pattern.m):
            block, chosen = rows[place : place + pattern.m], kept[place : place + pattern.m]
            assert block[chosen].min() >= block[~chosen].max()


def test_equal_scores_keep_the_earlier_place():
    assert Pattern(2, 4).mask(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


def test_holds():
    weight = torch.tensor([[1.0, 0, 2, 0], [0, 3, 0, 4]])
    assert Pattern(2, 4).holds(weight)
    assert not Pattern(1, 4).holds(weight)
    assert not Pattern(2, 4, 8).holds(weight)  # the two rows do not share their places


@pytest.mark.parametrize("text", ["3:4", "2:5", "4:2:4", "2", "2:4:", "", "a:b", None, 2])
def test_what_no_kernel_has_is_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        Pattern.parse(text)


def test_k_must_hold_whole_blocks():
    with pytest.raises(ValueError, match="K is 6, which blocks of 4"):
        Pattern(2, 4).mask(torch.ones(2, 6))
