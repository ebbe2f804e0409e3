"""Sparse models under torch.compile, and in two threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fa_ops.sparsity as mtsa
from fa_ops.sparsity.attach import sparse_methods
from fa_ops.sparsity.curves import Calibrated
from tests.sparsity.models import config_of, logits, sharp_model, tokens

LENGTHS = (31, 48, 50, 64, 77, 90, 100, 111, 120, 150)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("is_calibrated", [False, True])
def test_lengths_thresholds_and_targets_take_at_most_two_frames(is_calibrated):
    model = mtsa.sparsify(sharp_model(), config_of(backend="triton", collect_stats=True))
    if is_calibrated:
        for method in sparse_methods(model).values():
            method.set_calibrated({"prefill": Calibrated(40.0, 1.0, 0.5)})
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for number, length in enumerate(LENGTHS):
        share = 0.1 + 0.15 * (number % 5)
        if is_calibrated:
            mtsa.set_target_sparse_ratio(model, {"prefill": share})
        else:
            mtsa.set_thresholds(model, {"prefill": [share]})
        with torch.no_grad():
            expected = model(tokens(length), use_cache=False).logits
            torch.testing.assert_close(compiled(tokens(length), use_cache=False).logits, expected)
    assert 1 <= counter.frame_count <= 2
    assert 0 < mtsa.dropped_share(model, "prefill") < 0.95


def test_two_threads_give_what_each_would_alone():
    models = [
        mtsa.sparsify(sharp_model(), config_of(thresholds={"prefill": [value], "decode": [value]}))
        for value in (0.05, 0.9)
    ]
    ids = tokens()
    alone = [logits(model, ids) for model in models]
    assert not torch.equal(*alone)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda model: [logits(model, ids) for _ in range(3)], models))
    for expected, results in zip(alone, together, strict=True):
        assert all(torch.equal(result, expected) for result in results)
