"""The CPU path under the accuracy rule, forward and backward, and what of it holds bit for bit."""

import dataclasses

import pytest
import torch

import fa_ops
from tests.support import properties
from tests.support.accuracy import check_case
from tests.support.cases import Case
from tests.support.draw import Profile, draw_case

PROFILE = Profile(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=((16, 16), (24, 24), (40, 40), (64, 64), (80, 80), (128, 128), (64, 32), (32, 80), (33, 17)),
    max_len=150,
    max_rows_by_heads=2000,
)
LONG = dataclasses.replace(PROFILE, max_len=600, max_rows_by_heads=6000)  # more rows than the CPU path takes at once
CASES = [draw_case(PROFILE, seed) for seed in range(2000, 2150)] + [draw_case(LONG, seed) for seed in range(2150, 2170)]
BATCHES = [case for case in CASES if len(case.lens_q) > 1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_accuracy(case: Case):
    # PyTorch's flash attention for CPU takes a coarser exponential in 16 bits, which its lse shows
    check_case(fa_ops.attention, case, is_lse_float32=False)


@pytest.mark.parametrize("case", BATCHES[:20], ids=str)
def test_batch_invariance(case: Case):
    properties.check_batch_invariance(fa_ops.attention, case)


@pytest.mark.parametrize("case", BATCHES[20:30], ids=str)
def test_repeats(case: Case):
    properties.check_repeats(fa_ops.attention, case)


@pytest.mark.parametrize("case", BATCHES[30:40], ids=str)
def test_max_input_len_is_ignored(case: Case):
    properties.check_max_input_len_ignored(fa_ops.attention, case)


@pytest.mark.parametrize("case", [case for case in BATCHES if case.dout != "expanded"][40:50], ids=str)
def test_nan_stays_in_its_sequence(case: Case):
    # PyTorch's flash attention for CPU takes a row of NaN scores for one that sees nothing
    properties.check_nan_isolation(fa_ops.attention, case, hidden=("q", "k"))
