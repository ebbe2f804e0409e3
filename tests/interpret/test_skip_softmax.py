"""The kernels under skip-softmax: the oracle's own blocks, counted exactly, and the accuracy rule on what is kept."""

import dataclasses
import functools

import pytest
import torch

import fa_ops
from fa_ops.reference import attention_reference
from tests.support import properties
from tests.support.accuracy import check_case
from tests.support.cases import Case
from tests.support.draw import Profile, draw_skip_case, dropped_share
from tests.support.problems import small_case

BLOCKS = ((16, 16), (16, 32), (32, 16), (32, 32))
PROFILE = Profile(
    dtypes=(torch.float32, torch.float16),
    head_dims=((16, 16), (32, 32), (32, 16), (24, 24)),
    max_len=100,
    max_rows_by_heads=300,
    max_seqs=2,
)
SEEDS = range(5000, 5100)
QUICK = (5024, 5048)


@functools.cache
def drawn(seed: int) -> Case:
    return draw_skip_case(PROFILE, seed, BLOCKS)


def counts_of(attention, inputs) -> torch.Tensor:
    return inputs.call(attention, inputs.q, inputs.k, inputs.v, return_skip_counts=True)[-1]


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SEEDS])
def test_accuracy_and_counts(seed: int):
    inputs = drawn(seed).build()
    assert 0.1 <= dropped_share(inputs) <= 0.9
    assert torch.equal(counts_of(fa_ops.attention, inputs), counts_of(attention_reference, inputs))
    check_case(fa_ops.attention, drawn(seed))


@pytest.mark.parametrize("block", [(64, 64), (16, 128), pytest.param((64, 128), marks=pytest.mark.slow)])
def test_blocks_of_several_tiles(block: tuple[int, int]):
    """A block holds more keys than a tile of the forward, and more rows than one of the backward."""
    lens = {"lens_q": (block[0] + 6,), "lens_k": (4 * block[1] - 3,)}
    case = small_case(**lens, heads_kv=1, group_size=1, skip_block=block, skip_share=0.4)
    inputs = case.build()
    assert 0.1 <= dropped_share(inputs) <= 0.9
    assert torch.equal(counts_of(fa_ops.attention, inputs), counts_of(attention_reference, inputs))
    check_case(fa_ops.attention, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "is_covered"),
    [
        ("causal", lambda case: case.is_causal),
        ("full", lambda case: not case.is_causal),
        ("padded", lambda case: case.is_padded),
        ("holes", lambda case: case.key_mask is not None),
        ("a window", lambda case: case.window_size != (-1, -1)),
        ("grouped heads", lambda case: case.group_size > 1),
        ("decoding", lambda case: 1 in case.lens_q),
        ("a threshold for each head", lambda case: case.skip_form == "head"),
        ("sinks", lambda case: case.has_sinks),
        ("a gradient of lse", lambda case: case.has_dlse),
    ],
)
def test_cases_cover(what: str, is_covered):
    assert sum(is_covered(drawn(seed)) for seed in SEEDS) >= 5, what


@pytest.mark.parametrize("seed", [SEEDS[5], *(pytest.param(n, marks=pytest.mark.slow) for n in SEEDS[25::20])])
def test_batch_invariance(seed: int):
    properties.check_batch_invariance(fa_ops.attention, drawn(seed))


@pytest.mark.parametrize("num_keys", [1, 15, 129, *(pytest.param(n, marks=pytest.mark.slow) for n in (2049, 4200))])
def test_decoding(num_keys: int):
    """Segments of 2048 keys, at whose begin the maximum starts anew."""
    case = small_case(lens_q=(1,), lens_k=(num_keys,), heads_kv=2, group_size=2, skip_block=(16, 128), skip_share=0.5)
    inputs = case.build()
    assert torch.equal(counts_of(fa_ops.attention, inputs), counts_of(attention_reference, inputs))
    check_case(fa_ops.attention, case)


def test_a_threshold_that_drops_nothing():
    """Outside (0, 1) all blocks are kept."""
    inputs = dataclasses.replace(drawn(SEEDS[0]).build(), skip_softmax_threshold=torch.tensor(1.0))
    visited, dropped = counts_of(fa_ops.attention, inputs)
    assert visited.sum() > 0
    assert dropped.sum() == 0
