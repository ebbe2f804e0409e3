"""What holds bit for bit, on the kernels."""

import dataclasses

import pytest
import torch

import fa_ops
from tests.interpret.test_accuracy import PROFILE
from tests.support import properties
from tests.support.accuracy import evaluate
from tests.support.cases import Case
from tests.support.draw import draw_case

SMALL = dataclasses.replace(PROFILE, max_len=40, max_rows_by_heads=100)
# The accuracy rule wants many numbers, and so many heads; bits are as equal with one head for keys.
BATCHES = [
    dataclasses.replace(case, heads_kv=1)
    for case in (draw_case(SMALL, seed) for seed in range(1000, 1100))
    if len(case.lens_q) > 1
]


@pytest.mark.parametrize("case", BATCHES[:10], ids=str)
def test_batch_invariance(case: Case):
    properties.check_batch_invariance(fa_ops.attention, case)


@pytest.mark.parametrize("case", BATCHES[10:14], ids=str)
def test_repeats(case: Case):
    properties.check_repeats(fa_ops.attention, case)


@pytest.mark.parametrize("case", BATCHES[14:18], ids=str)
def test_max_input_len_is_ignored(case: Case):
    properties.check_max_input_len_ignored(fa_ops.attention, case)


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_nan_stays_in_its_sequence(is_padded: bool, is_causal: bool):
    properties.check_nan_isolation(fa_ops.attention, plain_case(is_padded, is_causal, (5, 17), (20, 17)))


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_gradients_that_arrive_where_nothing_is_seen_have_no_effect(is_padded: bool):
    case = plain_case(is_padded, True, (20, 4, 3), (7, 0, 3))
    inputs = case.build()
    assert inputs.dout.isnan().any()
    assert inputs.dlse.isnan().any()
    blind = ~inputs.sees
    clean = case.build()
    clean.dout[blind] = 0.0
    clean.dlse.transpose(-1, -2)[blind] = 0.0
    found, expected = evaluate(fa_ops.attention, inputs), evaluate(fa_ops.attention, clean)
    properties.assert_same_bits(found, expected, "for gradients of NaN and of 0 where no key is seen")
    assert torch.equal(found["dq"][blind], torch.zeros_like(found["dq"][blind]))


def plain_case(is_padded: bool, is_causal: bool, lens_q: tuple[int, ...], lens_k: tuple[int, ...]) -> Case:
    return Case(
        seed=7,
        dtype=torch.float32,
        is_padded=is_padded,
        placement="right" if is_padded else "tight",
        lens_q=lens_q,
        lens_k=lens_k,
        heads_kv=1,
        group_size=2,
        head_dim=16,
        value_dim=16,
        is_causal=is_causal,
        softmax_scale=None,
        key_mask=None,
        memory="contiguous",
        dout="dense",
        has_dlse=True,
        index_dtype=torch.int32,
        max_input_len="none",
    )
