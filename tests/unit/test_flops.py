"""FLOP counts: by hand, against pairs counted one by one, and through FlopCounterMode, forward and backward."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import fa_ops
from fa_ops_meta.flops import count_pairs

FORWARD, BACKWARD = torch.ops.modelopt.varlen_attention, torch.ops.modelopt.varlen_attention_backward


def count_pairs_one_by_one(len_q: int, len_k: int, is_causal: bool, left: int, right: int) -> int:
    pairs = 0
    for i, j in itertools.product(range(len_q), range(len_k)):
        distance = j - (i + len_k - len_q)
        is_left = left == -1 or distance >= -left
        is_right = distance <= 0 if is_causal else right == -1 or distance <= right
        pairs += is_left and is_right
    return pairs


@pytest.mark.parametrize("is_causal", [False, True])
def test_pairs_are_those_that_the_definition_makes_visible(is_causal):
    windows = (-1, 0, 1, 2, 4, 9)
    for len_q, len_k, left, right in itertools.product(range(7), range(7), windows, windows):
        expected = count_pairs_one_by_one(len_q, len_k, is_causal, left, right)
        assert count_pairs(len_q, len_k, is_causal, left, right) == expected, (len_q, len_k, left, right)


def count(*args, **kwargs) -> tuple[int, int]:
    """FLOPs of `fa_ops.attention` and of its backward."""
    args = [t.requires_grad_() if t.is_floating_point() else t for t in args]
    with FlopCounterMode(display=False) as counter:
        fa_ops.attention(*args, **kwargs).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert set(counts) == {FORWARD, BACKWARD}
    return counts[FORWARD], counts[BACKWARD]


def index(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_packed_full_attention():
    q, k, v = torch.randn(7, 4, 16), torch.randn(7, 2, 16), torch.randn(7, 2, 32)
    pairs = 4 * (3 * 3 + 4 * 4)
    expected = (2 * pairs * (16 + 32), 2 * pairs * (3 * 16 + 2 * 32))
    assert count(q, k, v, index(0, 3), index(3, 4), is_causal=False) == expected


def test_packed_causal_attention_counts_the_triangle():
    q = torch.randn(7, 2, 16)
    pairs = 2 * (6 + 10)
    assert count(q, q, q, index(0, 3), index(3, 4)) == (2 * pairs * 32, 2 * pairs * 80)


def test_causal_is_bottom_right_aligned():
    q, k = torch.randn(5, 2, 16), torch.randn(5, 2, 16)
    # two rows with three keys see 2 + 3, three rows with two keys see 0 + 1 + 2
    keys = {"b_start_loc_k": index(0, 3), "b_seq_len_k": index(3, 2)}
    assert count(q, k, k, index(0, 2), index(2, 3), **keys) == (2 * 2 * 8 * 32, 2 * 2 * 8 * 80)


def test_padding_does_not_count():
    q = torch.randn(2, 8, 2, 16)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 1] = False  # a hole counts as a key
    pairs = 2 * (3 + 15)
    assert count(q, q, q, index(0, 3), index(2, 5), key_mask=mask) == (2 * pairs * 32, 2 * pairs * 80)


def test_ranges_are_clamped_into_the_tensors():
    q = torch.randn(4, 2, 16)
    lengths = torch.tensor([-3, 2**31 - 1], dtype=torch.int32)
    assert count(q, q, q, index(0, 1), lengths, is_causal=False) == (2 * 2 * 9 * 32, 2 * 2 * 9 * 80)


@pytest.mark.parametrize("num_seqs", [0, 3])
def test_empty_sequences_cost_nothing(num_seqs):
    q = torch.randn(4, 2, 16)
    nothing = index(*[0] * num_seqs)
    assert count(q, q, q, nothing, nothing) == (0, 0)


def test_agrees_with_torch_for_full_attention():
    b, s, h, d = 2, 24, 4, 16
    q = torch.randn(b, s, h, d)
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    like = q.new_empty(b, h, s, d)
    expected = (flop_registry[flash](like, like, like), flop_registry[flash_backward](like, like, like, like))
    assert count(q, q, q, index(0, 0), index(s, s), is_causal=False) == expected


def test_keys_outside_the_window_do_not_count():
    q = torch.randn(6, 2, 16)
    pairs = 2 * (1 + 2 + 3 * 4)
    assert count(q, q, q, index(0), index(6), window_size=(2, -1)) == (2 * pairs * 32, 2 * pairs * 80)
    pairs = 2 * (2 + 3 * 4 + 2)
    assert count(q, q, q, index(0), index(6), is_causal=False, window_size=(1, 1)) == (2 * pairs * 32, 2 * pairs * 80)


def count_on_shapes(*args, **kwargs) -> int:
    with FlopCounterMode(display=False) as counter:
        FORWARD(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("is_causal", [False, True])
def test_without_values_the_count_is_that_of_the_whole_tensors(is_causal):
    packed, padded = torch.randn(7, 2, 16), torch.randn(3, 7, 2, 16)
    meta = [t.to("meta") for t in (packed, padded, index(0, 3), index(3, 4), index(0, 0, 0))]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (packed, padded, index(0, 3), index(3, 4), index(0, 0, 0))]
        in_mode = count_on_shapes(*[fake[0]] * 3, fake[2], fake[3], None, is_causal)
    one = 2 * 2 * 32 * (28 if is_causal else 49)
    assert in_mode == one
    assert count_on_shapes(*[fake[0]] * 3, fake[2], fake[3], None, is_causal) == one
    assert count_on_shapes(*[meta[0]] * 3, meta[2], meta[3], None, is_causal) == one
    assert count_on_shapes(*[meta[1]] * 3, meta[4], meta[4], None, is_causal) == 3 * one


def test_without_values_the_count_is_an_upper_bound():
    for total_q, total_k, *window in itertools.product((2, 5), (3, 5), (False, True), (-1, 0, 1, 3), (-1, 0, 2)):
        of_q, of_k = ([(a, b) for a in range(n + 1) for b in range(n + 1 - a)] for n in (total_q, total_k))
        for (a, b), (c, d) in itertools.product(of_q, of_k):
            exact = count_pairs(a, c, *window) + count_pairs(b, d, *window)
            assert exact <= count_pairs(total_q, total_k, *window), (a, b, c, d, window)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_paged_cache_counts_its_lengths(is_causal):
    q, cache, table = torch.randn(5, 2, 16), torch.randn(9, 4, 2, 16), torch.zeros(2, 3, dtype=torch.int32)
    arguments = (q, cache, cache, index(0, 2), index(2, 3), None, is_causal)
    pairs = 2 * sum(count_pairs(n, m, is_causal) for n, m in ((2, 7), (3, 12)))
    assert count_on_shapes(*arguments, b_seq_len_k=index(7, 99), block_table=table) == 2 * 32 * pairs
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in arguments]
    bound = count_on_shapes(*meta, b_seq_len_k=index(7, 99).to("meta"), block_table=table.to("meta"))
    assert bound == 2 * 32 * 2 * 5 * 12
