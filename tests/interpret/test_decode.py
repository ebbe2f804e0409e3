"""Decoding with the keys split among programs: the same function as ever, whatever the number of splits."""

import dataclasses
import random

import pytest
import torch
import triton.language as tl

import fa_ops
from fa_ops import decoding
from fa_ops.kernels import decode
from fa_ops.reference import attention_reference
from tests.support import accuracy, properties
from tests.support.accuracy import AccuracyError, check_case
from tests.support.cases import Case
from tests.support.draw import Profile, draw_case, dropped_share
from tests.support.paged import check_page_numbers_are_clamped, paged, paged_arguments
from tests.support.problems import decoding_case, op_arguments

OP = torch.ops.modelopt.varlen_attention
PROFILE = Profile(
    dtypes=(torch.float32, torch.float16),
    head_dims=((16, 16), (24, 24), (32, 64), (64, 32), (33, 17)),
    max_len=100,
    max_rows_by_heads=100,
    feature_rate=0.4,
)
SPLITS = (1, 2, 3, 8, 20)
SEEDS = range(9000, 9060)


@pytest.fixture
def split(monkeypatch):
    """Chooses the number of splits, where decoding can be split; it must be, by the end of the test."""
    launches, launch = [], decoding.launch

    def count_launches(*args):
        launches.append(args[0])
        launch(*args)

    def choose(num_splits: int | None) -> None:
        def select(q, k, block_table, is_skipping):
            return num_splits if decoding._is_decoding(q, block_table) else None

        monkeypatch.setattr(decoding, "select_splits", select)

    monkeypatch.setattr(decoding, "launch", count_launches)
    yield choose
    assert launches, "the decode kernel did not run"


def skipping_case(num_keys: int, **changes) -> Case:
    return decoding_case((num_keys,), **{"skip_block": (16, 128), "skip_share": 0.5} | changes)


def drawn(seed: int) -> Case:
    """One query, or none, for each of up to four padded sequences."""
    case, rng = draw_case(PROFILE, seed), random.Random(seed)
    lens_k = tuple(rng.choice((0, 1, rng.randint(2, PROFILE.max_len))) for _ in range(rng.randint(1, 4)))
    lens_q = tuple(rng.choice((1, 1, 1, 0)) for _ in lens_k)
    row = decoding_case((70, *lens_k), (1, *lens_q), seed=seed)
    return dataclasses.replace(
        case, seed=row.seed, is_padded=True, placement=rng.choice(("left", "right")),
        lens_q=row.lens_q, lens_k=row.lens_k, heads_kv=-(-6 // case.group_size),
        memory="contiguous" if case.memory == "fused_qkv" else case.memory,
        key_mask=rng.choice((None, "random", "hole")),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 9003 else pytest.mark.slow) for n in SEEDS])
def test_accuracy(seed: int, split):
    split(SPLITS[seed % len(SPLITS)])
    check_case(fa_ops.attention, drawn(seed))


def counts_of(attention, inputs) -> list:
    return inputs.call(attention, inputs.q, inputs.k, inputs.v, return_skip_counts=True)[-1].tolist()


def slow(*values) -> list:
    return [pytest.param(x, marks=pytest.mark.slow) for x in values]


NUM_KEYS = [1, 2049, *slow(15, 129, 2048, 4200, 9973, 20_000)]


@pytest.mark.parametrize("num_splits", [1, 8, 32])
@pytest.mark.parametrize("num_keys", NUM_KEYS)
def test_counts(num_keys: int, num_splits: int, split):
    """Visited and dropped blocks are exactly the oracle's."""
    split(num_splits)
    inputs = skipping_case(num_keys).build()
    assert num_keys < 1000 or 0.1 < dropped_share(inputs) < 0.9
    assert counts_of(fa_ops.attention, inputs) == counts_of(attention_reference, inputs)


@pytest.mark.parametrize("num_splits", [8, *slow(1, 32)])
@pytest.mark.parametrize("num_keys", NUM_KEYS)
def test_skip_softmax(num_keys: int, num_splits: int, split):
    split(num_splits)
    check_case(fa_ops.attention, skipping_case(num_keys), has_backward=num_keys < 1000)


@pytest.mark.parametrize(
    ("changes", "page_size"),
    [
        ({"key_mask": "random", "window_size": (1500, -1), "skip_form": "head"}, None),
        ({"key_mask": "hole", "has_sinks": True, "group_size": 3}, None),
        ({}, 16),
        ({"is_padded": False, "placement": "gaps", "lens_q": (5, 1, 0, 1), "lens_k": (40, 2100, 3, 90)}, 64),
    ],
    ids=["window", "hole", "paged", "paged_packed"],
)
def test_blocks_are_those_of_the_forward_kernel(changes: dict, page_size: int | None, split):
    """block_bits and counts bit for bit, so that the backward is exact."""
    inputs = dataclasses.replace(skipping_case(2300, skip_block=(16, 64)), **changes).build()
    arguments = op_arguments(inputs) if page_size is None else paged_arguments(inputs, page_size)
    split(None)
    *_, bits, counts = OP(*arguments)
    assert 0 < counts[1].sum() < counts[0].sum()
    split(2)
    *_, bits_of_splits, counts_of_splits = OP(*arguments)
    assert torch.equal(counts_of_splits, counts)
    assert torch.equal(bits_of_splits, bits)


@pytest.mark.parametrize("page_size", [7, 32])
@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_paged_caches(page_size: int, is_padded: bool, split):
    """Packed: the forward kernel computes what has more rows than one."""
    split(3)
    lens_q = (1, 0, 1, 1) if is_padded else (1, 6, 0, 1, 17, 1)
    case = decoding_case((70, 9, 33, 0, 20, 130)[: len(lens_q)], lens_q, group_size=4, has_sinks=True)
    case = dataclasses.replace(case, is_padded=is_padded, placement="right" if is_padded else "gaps")
    check_case(paged(page_size), case, has_backward=False)


@pytest.mark.parametrize("skip_share", [0.5, *slow(None)])
def test_bits(skip_share, split):
    split(4)
    case = decoding_case((40, 17), skip_share=skip_share, skip_block=(16, 16))
    properties.check_batch_invariance(fa_ops.attention, case)
    properties.check_repeats(fa_ops.attention, case)


@pytest.mark.parametrize("group_size", [5, 20, *slow(1)])
def test_group_sizes(group_size: int, split):
    split(2)
    check_case(fa_ops.attention, decoding_case((50,), group_size=group_size))


def test_number_of_splits():
    q, k = torch.randn(2, 1, 4, 16), torch.randn(2, 9000, 2, 16)
    assert decoding.select_splits(q, k, None, False) == 8
    assert decoding.select_splits(q, k, None, True) == 5
    assert decoding.select_splits(q.repeat(1, 1, 8, 1), k, None, False) == 8
    assert decoding.select_splits(q.repeat(1, 1, 16, 1), k, None, False) == 5
    assert decoding.select_splits(q, k[:, :1], None, False) == 1
    assert decoding.select_splits(q.expand(2, 2, 4, 16), k, None, False) is None
    assert decoding.select_splits(q[:, 0], k.flatten(0, 1), None, False) is None
    assert decoding.select_splits(q[:, 0], k, torch.zeros(2, 1), False) == 8


@pytest.mark.parametrize("page_size", [4, 32], ids=["single_keys", "whole_blocks"])
def test_page_numbers_are_clamped(page_size: int, split):
    split(2)
    check_page_numbers_are_clamped(page_size)


def test_opcheck(split):
    split(2)
    inputs = skipping_case(60, skip_block=(16, 16)).build()
    torch.library.opcheck(OP.default, op_arguments(inputs), test_utils=("test_schema", "test_faketensor"))
    arguments = paged_arguments(inputs, 7)
    torch.library.opcheck(OP.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_log_says_which_kernel_ran(split, caplog):
    case = decoding_case((9,))
    inputs = case.build()
    with caplog.at_level("DEBUG", "fa_ops.ops"):
        for num_splits in (3, None):
            split(num_splits)
            inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
    assert [message.partition(", since")[0] for message in caplog.messages] == [
        "varlen_attention: decode kernel, 3 splits",
        "varlen_attention: forward kernel",
    ]


# Negative controls


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("LOG2E", tl.constexpr(2.0), "out: max error"), ("SPLIT_BLOCK", tl.constexpr(2), None)],
)
def test_a_wrong_combination_fails(name: str, value, message: str | None, split, monkeypatch):
    """And a combination in other pieces does not."""
    split(5)
    monkeypatch.setattr(accuracy, "DRAWS", 1)
    monkeypatch.setattr(decode, name, value)
    case = decoding_case((300,))
    if message is None:
        check_case(fa_ops.attention, case)
    else:
        with pytest.raises(AccuracyError, match=message):
            check_case(fa_ops.attention, case)


def test_a_maximum_that_starts_anew_elsewhere_is_noticed(split, monkeypatch):
    split(8)
    monkeypatch.setattr(decode, "DECODE_SEGMENT", tl.constexpr(256))
    inputs = skipping_case(2049).build()
    assert counts_of(fa_ops.attention, inputs) != counts_of(attention_reference, inputs)
