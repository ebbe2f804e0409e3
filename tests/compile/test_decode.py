"""How many programs share a cache's keys, where the size of the cache is symbolic."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from fa_ops import decoding


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(decoding, "multi_processors", lambda device: 132)


@pytest.mark.parametrize("is_skipping", [False, True], ids=["dense", "skip_softmax"])
def test_a_growing_cache_needs_no_new_trace(is_skipping, hopper):
    def splits(q, k):
        return q.new_zeros(decoding.select_splits(q, k, None, is_skipping))

    q = torch.randn(2, 1, 4, 16)
    traced = make_fx(splits, tracing_mode="symbolic")(q, torch.randn(2, 300, 2, 16))
    found = [len(traced(q, torch.empty(2, extent, 2, 16))) for extent in (2, 512, 513, 20_000, 100_000)]
    assert found == ([1, 1, 1, 10, 49] if is_skipping else [1, 1, 2, 40, 66])
