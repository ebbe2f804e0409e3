"""The arithmetic of `held_out.py`, which itself needs a trained model."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from tests.sparsity.held_out import mean_and_error, pieces


@pytest.mark.parametrize(("bc", "decoded"), [(16, 16), (128, 8)])
def test_decoded_tokens_are_spread_over_the_last_block(bc, decoded):
    ids = torch.arange(2 * 512).view(2, 512)
    parts = list(pieces(ids, bc, decoded))
    assert torch.equal(torch.cat(parts, 1), ids)
    keys = torch.tensor([part.shape[1] for part in parts]).cumsum(0)
    at = [int(end) for part, end in zip(parts, keys, strict=True) if part.shape[1] == 1]
    assert at == list(range(512 - bc + bc // decoded, 513, bc // decoded))


def test_the_error_is_that_of_the_mean():
    assert mean_and_error([0.1, 0.3]) == pytest.approx((0.2, 0.1))
    assert math.isnan(mean_and_error([0.5])[1])
