"""Paged caches on the kernels: the oracle on the same keys without pages is the reference."""

import dataclasses

import pytest
import torch

from fa_ops.reference import attention_reference
from tests.interpret.test_accuracy import PROFILE
from tests.interpret.test_skip_softmax import drawn as drawn_skip_case
from tests.support.accuracy import check_case
from tests.support.cases import Case
from tests.support.draw import draw_case
from tests.support.paged import check_page_numbers_are_clamped, paged

# pages that hold a block of keys, several or a part of one; 7 divides nothing
PAGE_SIZES = (1, 7, 16, 32, 64)
SMALL = dataclasses.replace(PROFILE, max_len=70, max_rows_by_heads=150, feature_rate=0.4)
SEEDS = range(7000, 7120)


def drawn(seed: int) -> Case:
    return dataclasses.replace(draw_case(SMALL, seed), key_mask=None)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 7005 else pytest.mark.slow) for n in SEEDS])
def test_accuracy(seed: int):
    attention = paged(PAGE_SIZES[seed % len(PAGE_SIZES)], is_head_major=seed % 2 == 0)
    check_case(attention, drawn(seed), has_backward=False)


@pytest.mark.parametrize("seed", [5002, *(pytest.param(n, marks=pytest.mark.slow) for n in range(5011, 5100, 9))])
def test_skip_softmax(seed: int):
    case = dataclasses.replace(drawn_skip_case(seed), key_mask=None)
    attention, inputs = paged(PAGE_SIZES[seed % len(PAGE_SIZES)]), case.build()
    counts = [
        inputs.call(f, inputs.q, inputs.k, inputs.v, return_skip_counts=True)[-1]
        for f in (attention, attention_reference)
    ]
    assert counts[0].tolist() == counts[1].tolist()
    check_case(attention, case, has_backward=False)


@pytest.mark.parametrize("page_size", [4, 32], ids=["single_keys", "whole_blocks"])
def test_page_numbers_are_clamped(page_size: int):
    check_page_numbers_are_clamped(page_size)


def test_the_cases_are_varied():
    cases = [drawn(seed) for seed in SEEDS]
    for what in (
        lambda case: case.is_padded,
        lambda case: not case.is_padded,
        lambda case: case.window_size != (-1, -1),
        lambda case: case.softcap > 0,
        lambda case: case.has_sinks,
        lambda case: case.dtype == torch.float16,
        lambda case: case.lens_q and set(case.lens_q) == {1},
        lambda case: 0 in case.lens_q,
    ):
        assert sum(map(bool, map(what, cases))) >= 5
