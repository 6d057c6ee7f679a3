"""Our quantiser against an independent implementation (a development dependency, so it is always there)."""

import math

import pytest
import torch
from vector_quantize_pytorch import FSQ as Other

from flextok_edu.fsq import FSQ, CodebookUsage


@pytest.mark.parametrize("levels", ((8, 5, 5, 5), (8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5)), ids=str)
def test_same_codes_and_ids(levels):
    z = torch.randn(32, 9, len(levels), generator=torch.Generator().manual_seed(0)) * 2
    theirs, ids = Other(list(levels))(z)
    ours = FSQ(levels)
    assert torch.allclose(ours(z), theirs, atol=1e-6)
    assert torch.equal(ours.codes_to_ids(ours(z)), ids.long())


def counted(codes, keep):
    use = CodebookUsage((8, 5, 5, 5), codes.shape[1])
    use.collect(codes, keep)
    return use


@pytest.mark.parametrize("bad", (math.nan, math.inf, -math.inf))
def test_codes_that_are_not_finite_count_nothing(bad):
    """They come when a training goes wrong, and must not end it with an IndexError before its loss is looked
    at.
    """
    fsq, keep = FSQ((8, 5, 5, 5)), torch.ones(6, 3, dtype=torch.bool)
    codes = fsq(torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)))
    sick = codes.clone()
    sick[2, 1, 3] = bad
    sick[4] = bad
    without = keep.clone()
    without[2, 1] = without[4] = False
    use, wanted = counted(sick, keep), counted(codes, without)
    assert (
        torch.equal(use.words, wanted.words)
        and torch.equal(use.digits, wanted.digits)
        and use.words.sum() == 14
    )
    assert counted(torch.full((2, 3, 4), bad), keep[:2]).words.sum() == 0
