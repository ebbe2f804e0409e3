"""The kernel that counts for many thresholds at once: the CPU path's own numbers, and the op's at each of them."""

import dataclasses
import functools

import pytest
import torch

import fa_ops
from fa_ops import ops
from fa_ops.reference import skip_softmax_blocks
from fa_ops.sparsity.counting import BlockCounts, count_dropped
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS
from tests.support.cases import Case, Inputs
from tests.support.draw import Profile, draw_skip_case
from tests.support.problems import small_case
from tests.support.skip import thresholds

BLOCKS = ((16, 16), (16, 32), (32, 16), (32, 32))
PROFILE = Profile(
    dtypes=(torch.float32, torch.float16),
    head_dims=((16, 16), (32, 32), (24, 24)),
    max_len=70,
    max_rows_by_heads=160,
    max_seqs=3,
)
SEEDS = range(7000, 7030)
QUICK = SEEDS[::10]
SHARES = (0.15, 0.4, 0.6, 0.85)


@functools.cache
def drawn(seed: int) -> Case:
    return draw_skip_case(PROFILE, seed, BLOCKS)


def arguments_of(inputs: Inputs) -> dict:
    case = inputs.case
    return {
        "b_start_loc": inputs.b_start_loc, "b_seq_len": inputs.b_seq_len, "is_causal": case.is_causal,
        "softmax_scale": case.softmax_scale, "b_start_loc_k": inputs.b_start_loc_k, "b_seq_len_k": inputs.b_seq_len_k,
        "window_size": case.window_size, "softcap": case.softcap, "key_mask": inputs.key_mask,
    }  # fmt: skip


def trials_of(inputs: Inputs) -> tuple[float, ...]:
    """λ between margins of the oracle, which dropped shares from small to large call for."""
    arguments = arguments_of(inputs)
    if arguments["b_start_loc_k"] is None:
        arguments |= {"b_start_loc_k": None, "b_seq_len_k": None}
    skips = skip_softmax_blocks(inputs.q, inputs.k, **arguments, skip_softmax_block=inputs.case.skip_block)
    return tuple(sorted({thresholds(skips, share, "number") for share in SHARES}))


def counts_of(inputs: Inputs, trials: tuple[float, ...], **options) -> BlockCounts:
    return count_dropped(inputs.q, inputs.k, trials, inputs.case.skip_block, **arguments_of(inputs), **options)


def cpu_counts(monkeypatch, *args, **options) -> BlockCounts:
    with monkeypatch.context() as patch:
        patch.setattr(ops, "IS_INTERPRETED", False)
        return counts_of(*args, **options)


def assert_equal(counts: BlockCounts, expected: BlockCounts) -> None:
    for ours, theirs in zip(counts, expected, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SEEDS])
def test_equals_the_cpu_path_and_the_op(seed: int, monkeypatch):
    inputs = drawn(seed).build()
    trials = trials_of(inputs)
    counts = counts_of(inputs, trials)
    assert_equal(counts, cpu_counts(monkeypatch, inputs, trials))
    visited, dropped = counts.by_sequence()
    assert 0 < dropped[-1].sum() < visited.sum()
    for number, trial in enumerate(trials):
        case = dataclasses.replace(inputs, skip_softmax_threshold=torch.tensor(trial))
        *_, from_op = case.call(fa_ops.attention, case.q, case.k, case.v, return_skip_counts=True)
        assert torch.equal(from_op, torch.stack([visited, dropped[number]]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "is_covered"),
    [
        ("causal", lambda case: case.is_causal),
        ("full", lambda case: not case.is_causal),
        ("padded", lambda case: case.is_padded),
        ("packed", lambda case: not case.is_padded),
        ("holes", lambda case: case.key_mask is not None),
        ("a window", lambda case: case.window_size != (-1, -1)),
        ("a softcap", lambda case: case.softcap > 0),
        ("grouped heads", lambda case: case.group_size > 1),
        ("decoding", lambda case: 1 in case.lens_q),
        ("several sequences", lambda case: len(case.lens_q) > 1),
    ],
)
def test_cases_cover(what: str, is_covered):
    assert sum(is_covered(drawn(seed)) for seed in SEEDS) >= 4, what


@pytest.mark.parametrize(
    "order", [pytest.param(order, marks=() if order == VISIT_ORDER else pytest.mark.slow) for order in VISIT_ORDERS]
)
def test_orders_and_segments(order: str, monkeypatch):
    case = small_case(lens_q=(1, 1), lens_k=(2090, 70), skip_block=(16, 128), skip_share=0.5)
    inputs = case.build()
    trials = trials_of(inputs)
    assert_equal(counts_of(inputs, trials, order=order), cpu_counts(monkeypatch, inputs, trials, order=order))


def test_a_trial_more_changes_no_other():
    inputs = drawn(SEEDS[0]).build()
    trials = trials_of(inputs)
    every = counts_of(inputs, trials)
    for number, trial in enumerate(trials):
        assert torch.equal(counts_of(inputs, (trial,)).dropped[0], every.dropped[number])
