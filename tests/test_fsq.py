"""Our quantiser against an independent implementation (a development dependency, so it is always there)."""
import pytest
import torch
from vector_quantize_pytorch import FSQ as Other

from flextok_edu.fsq import FSQ


@pytest.mark.parametrize("levels", ((8, 5, 5, 5), (8, 8, 8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 6, 5)), ids=str)
def test_same_codes_and_ids(levels):
    z = torch.randn(32, 9, len(levels), generator=torch.Generator().manual_seed(0)) * 2
    theirs, ids = Other(list(levels))(z)
    ours = FSQ(levels)
    assert torch.allclose(ours(z), theirs, atol=1e-6)
    assert torch.equal(ours.codes_to_ids(ours(z)), ids.long())
