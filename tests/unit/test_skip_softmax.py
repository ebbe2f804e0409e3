"""Skip-softmax three times: the definition in scalar loops, the oracle, and the CPU path."""

import dataclasses
import functools
import math

import pytest
import torch
from torch import Tensor

import fa_ops
import fa_ops.reference
from fa_ops.cpu_skip import pack_block_bits, unpack_block_bits, varlen_attention_skip_cpu
from fa_ops.reference import attention_reference, skip_softmax_blocks
from fa_ops_meta import outputs
from fa_ops_meta.skip import VISIT_ORDERS
from tests.support import properties, skip
from tests.support.accuracy import check_case
from tests.support.cases import Case, Inputs
from tests.support.draw import Profile, draw_skip_case, dropped_share
from tests.support.problems import small_case

PROFILE = Profile(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=((16, 16), (32, 32), (64, 64), (64, 32), (32, 80), (33, 17)),
    max_len=220,
    max_rows_by_heads=2000,
)
BLOCKS = ((16, 16), (16, 32), (32, 16), (32, 32), (64, 16), (16, 64), (64, 32), (128, 16))
SEEDS = range(110)


@functools.cache
def drawn(seed: int) -> Case:
    return draw_skip_case(PROFILE, seed, BLOCKS)


def drawn_in_float32(seed: int) -> Inputs:
    return dataclasses.replace(drawn(seed), dtype=torch.float32).build()


def cpu_forward(inputs: Inputs, threshold: Tensor, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """out, lse and counts of the CPU path in an order that the op does not take; threshold is (B, Hq)."""
    case, start, length = inputs.case, inputs.b_start_loc, inputs.b_seq_len
    start_k, length_k = (start, length) if case.lens_k is None else (inputs.b_start_loc_k, inputs.b_seq_len_k)
    results = (
        *outputs.empty_forward(inputs.q, inputs.v), *outputs.empty_skip(inputs.q, inputs.k, length, case.skip_block)
    )  # fmt: skip
    varlen_attention_skip_cpu(
        inputs.q, inputs.k, inputs.v, start, length, start_k, length_k, inputs.key_mask, inputs.sinks, None, threshold,
        case.softmax_scale or case.head_dim**-0.5, case.softcap, case.window_size[0],
        0 if case.is_causal else case.window_size[1], *case.skip_block, *results, order,
    )  # fmt: skip
    out, lse, _, counts = results
    return out, lse, counts


def call(attention, inputs, **options):
    return inputs.call(attention, inputs.q, inputs.k, inputs.v, return_skip_counts=True, **options)


# The definition, number by number


def by_hand(s, visible, v, block, threshold, order, segment):
    """One head of one sequence: s[i][j] scores, visible[i][j], v[j] -> out, lse, visited, dropped."""
    (br, bc), num_rows, num_keys = block, len(s), len(s[0])
    out, lse, num_visited, num_dropped = [], [], 0, 0
    for row in range(0, num_rows, br):
        rows = range(row, min(row + br, num_rows))
        blocks = [range(key, min(key + bc, num_keys)) for key in range(0, num_keys, bc)]
        blocks = [keys for keys in blocks if any(visible[i][j] for i in rows for j in keys)]
        if order == "descending":
            blocks = list(reversed(blocks))
        elif order == "diagonal_first":
            blocks = [*blocks[-1:], *blocks[:-1]]
        elif order == "first_then_descending":
            blocks = [*blocks[:1], *reversed(blocks[1:])]
        kept = []
        for turn, keys in enumerate(blocks):
            earlier = blocks[:turn]
            if num_rows == 1:
                same = [other for other in earlier if other[0] // segment == keys[0] // segment]
                earlier = blocks[: min(turn, 1)] + same
            is_dropped = True
            for i in rows:
                own = [s[i][j] for j in keys if visible[i][j]]
                before = [s[i][j] for other in earlier for j in other if visible[i][j]]
                if own and not (before and max(own) - max(before) < math.log(threshold)):
                    is_dropped = False
            num_visited += 1
            num_dropped += is_dropped
            if turn == 0:
                assert not is_dropped
            if not is_dropped:
                kept += keys
        for i in rows:
            seen = [j for j in kept if visible[i][j]]
            total = sum(math.exp(s[i][j]) for j in seen)
            lse.append(math.log(total) if seen else -math.inf)
            out.append([sum(math.exp(s[i][j]) * v[j][d] for j in seen) / (total or 1.0) for d in range(len(v[0]))])
    return out, lse, num_visited, num_dropped


@pytest.mark.parametrize("order", VISIT_ORDERS)
@pytest.mark.parametrize(
    ("lens_q", "lens_k", "is_causal", "window"),
    [
        ((17, 9), (17, 9), True, (-1, -1)),
        ((7, 12), (16, 5), True, (-1, -1)),
        ((11, 3), (14, 8), False, (-1, -1)),
        ((13, 6), (15, 12), False, (4, 2)),
        ((1, 1), (31, 6), True, (-1, -1)),
        ((1, 9), (29, 13), True, (20, 0)),
    ],
    ids=["causal", "causal_chunks", "full", "window", "decode", "mixed"],
)
def test_the_definition_by_hand(monkeypatch, order, lens_q, lens_k, is_causal, window):
    """Padded, with holes, blocks of 3 rows and 2 keys, and segments of 8 keys."""
    monkeypatch.setattr(fa_ops.reference, "DECODE_SEGMENT", 8)
    scale, threshold, block = 0.7, torch.tensor([[0.3, 0.6], [0.1, 0.45]], dtype=torch.float64), (3, 2)
    q, k, v = (torch.randn(2, rows, heads, 4).double() for rows, heads in ((20, 2), (33, 1), (33, 1)))
    k *= 2.5 * torch.rand(2, 33, 1, 1)
    key_mask = torch.rand(2, 33) < 0.8
    starts_q, starts_k = torch.tensor([2, 1]), torch.tensor([1, 2])
    out, lse, counts = attention_reference(
        q, k, v, starts_q, torch.tensor(lens_q), None, is_causal, scale, starts_k, torch.tensor(lens_k),
        window_size=window, key_mask=key_mask, skip_softmax_threshold=threshold, skip_softmax_block=block,
        return_lse=True, return_skip_counts=True, order=order,
    )  # fmt: skip
    right = 0 if is_causal else window[1]
    for seq, (n, m) in enumerate(zip(lens_q, lens_k, strict=True)):
        rows, keys = (slice(int(start), int(start) + size) for start, size in ((starts_q[seq], n), (starts_k[seq], m)))
        visible = [
            [
                bool(key_mask[seq, keys][j])
                and (window[0] < 0 or j - i - m + n >= -window[0])
                and (right < 0 or j - i - m + n <= right)
                for j in range(m)
            ]
            for i in range(n)
        ]
        for head in range(2):
            s = (scale * q[seq, rows, head] @ k[seq, keys, 0].T).tolist()
            own = float(threshold[seq, head])
            out_own, lse_own, *counts_own = by_hand(s, visible, v[seq, keys, 0].tolist(), block, own, order, 8)
            assert counts[:, seq, head].tolist() == counts_own
            expected = [torch.tensor(t, dtype=torch.float64) for t in (out_own, lse_own)]
            torch.testing.assert_close(out[seq, rows, head], expected[0], rtol=0, atol=1e-10)
            torch.testing.assert_close(lse[seq, head, rows], expected[1], rtol=0, atol=1e-10)
    assert 0 < counts[1].sum() < counts[0].sum()


@pytest.mark.parametrize("lens", [((12, 9), None), ((1, 5), (40, 14))], ids=["prefill", "decode"])
def test_gradcheck(lens):
    """The gradient of the kept blocks, through out and lse."""
    inputs = small_case(
        lens_q=lens[0], lens_k=lens[1], has_sinks=True, seed=3, skip_share=0.5, skip_block=(2, 3)
    ).build()

    def outputs(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
        return inputs.call(attention_reference, q, k, v, sinks=sinks)

    assert 0.1 < dropped_share(inputs) < 0.9
    leaves = [t.double().requires_grad_() for t in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


# The CPU path


@pytest.mark.parametrize("seed", SEEDS)
def test_cpu_path_is_the_oracle(seed: int):
    """Counts exactly, results and gradients under the accuracy rule."""
    case = drawn(seed)
    inputs = case.build()
    *_, counts = call(fa_ops.attention, inputs)
    *_, expected = call(attention_reference, inputs)
    assert 0.1 <= expected[1].sum() / expected[0].sum() <= 0.9
    assert counts.tolist() == expected.tolist()
    check_case(fa_ops.attention, case)


def test_the_cases_are_varied():
    cases = [drawn(seed) for seed in SEEDS]
    assert len(set(map(str, cases))) >= 100
    assert {case.skip_form for case in cases} == set(skip.FORMS)
    assert {case.skip_block for case in cases} == set(BLOCKS)
    assert {case.dtype for case in cases} == set(PROFILE.dtypes)
    for what in (
        lambda case: case.is_causal and case.lens_k is None,
        lambda case: not case.is_causal,
        lambda case: case.is_padded,
        lambda case: not case.is_padded,
        lambda case: case.group_size > 1,
        lambda case: case.window_size != (-1, -1),
        lambda case: case.key_mask is not None,
        lambda case: case.softcap > 0,
        lambda case: case.has_sinks,
        lambda case: case.has_dlse,
        lambda case: case.lens_q and set(case.lens_q) == {1},
        lambda case: case.lens_k and case.lens_k > case.lens_q and max(case.lens_q) > 1,
        lambda case: case.lens_k and case.lens_k < case.lens_q,
        lambda case: 0 in case.lens_q,
    ):
        assert sum(map(bool, map(what, cases))) >= 5


@pytest.mark.parametrize("order", VISIT_ORDERS)
@pytest.mark.parametrize("seed", range(6))
def test_orders(seed: int, order: str):
    """Each in turn, on thresholds that are made for the order: blocks, counts, results."""
    inputs = drawn(seed).build()
    case = inputs.case
    index = [t for t in (inputs.b_start_loc_k, inputs.b_seq_len_k) if t is not None]
    skips = skip_softmax_blocks(
        inputs.q, inputs.k, inputs.b_start_loc, inputs.b_seq_len, case.is_causal, case.softmax_scale, *index,
        window_size=case.window_size, softcap=case.softcap, key_mask=inputs.key_mask,
        skip_softmax_block=case.skip_block, order=order,
    )  # fmt: skip
    inputs.skip_softmax_threshold = skip.thresholds(skips, 0.5, "head")
    out, lse, counts = cpu_forward(inputs, inputs.skip_softmax_threshold, order)
    expected_out, expected_lse, expected_counts = call(attention_reference, inputs, order=order)
    assert counts.tolist() == expected_counts.tolist()
    assert expected_counts[1].any()
    tolerance = {} if case.dtype == torch.float32 else {"rtol": 2 * torch.finfo(case.dtype).eps, "atol": 1e-3}
    torch.testing.assert_close(out, expected_out, **tolerance)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("block", [(16, 16), (64, 128), (128, 64)], ids=str)
@pytest.mark.parametrize("num_keys", [1, 17, 2047, 2048, 2049, 4100, 9973, 20_000])
def test_decoding(num_keys: int, block: tuple[int, int]):
    """Segments of 2,048 keys; a second sequence of another length beside it."""
    case = small_case(
        lens_q=(1, 1), lens_k=(num_keys, num_keys // 2), seed=num_keys, skip_share=0.5, skip_block=block, head_dim=32
    )
    inputs = case.build()
    *_, counts = call(fa_ops.attention, inputs)
    *_, expected = call(attention_reference, inputs)
    assert counts.tolist() == expected.tolist()
    assert num_keys < 1000 or 0.1 < dropped_share(inputs) < 0.9
    check_case(fa_ops.attention, case)


# What holds of each


@pytest.mark.parametrize("attention", [attention_reference, fa_ops.attention])
@pytest.mark.parametrize("seed", range(4))
def test_nested_in_the_threshold(attention, seed: int):
    """A larger threshold drops what a smaller one drops, and lse never rises."""
    inputs = drawn_in_float32(seed)
    last_lse, last_dropped = torch.tensor(torch.inf), torch.tensor(0)
    for threshold in (1e-4, 0.01, 0.1, 0.3, 0.6, 0.99):
        inputs.skip_softmax_threshold = threshold
        _, lse, counts = call(attention, inputs)
        assert (lse <= last_lse).all()
        assert (counts[1] >= last_dropped).all()
        last_lse, last_dropped = lse, counts[1]
    assert last_dropped.any()


@pytest.mark.parametrize("seed", range(4))
def test_dropped_sets_are_nested(seed: int):
    inputs = drawn(seed).build()
    last = [False] * len(inputs.b_seq_len)
    for threshold in (0.01, 0.1, 0.3, 0.6, 0.99):
        skips = skip_softmax_blocks(
            inputs.q, inputs.k, inputs.b_start_loc, inputs.b_seq_len, inputs.case.is_causal,
            b_start_loc_k=inputs.b_start_loc_k, b_seq_len_k=inputs.b_seq_len_k, key_mask=inputs.key_mask,
            skip_softmax_threshold=threshold, skip_softmax_block=inputs.case.skip_block,
        )  # fmt: skip
        for seq, own in enumerate(skips):
            assert not (last[seq] & ~own.dropped).any()
            assert not (own.dropped & ~own.visited).any()
            last[seq] = own.dropped


@pytest.mark.parametrize("attention", [attention_reference, fa_ops.attention])
@pytest.mark.parametrize("threshold", [0.0, 1.0, 1.5, -0.1, float("nan")])
def test_outside_of_0_and_1_nothing_is_dropped(attention, threshold: float):
    inputs = drawn_in_float32(0)
    dense_out, dense_lse = inputs.call(attention_reference, inputs.q, inputs.k, inputs.v, skip_softmax_threshold=None)
    inputs.skip_softmax_threshold = torch.tensor(threshold)
    out, lse, counts = call(attention, inputs)
    assert counts[0].any()
    assert not counts[1].any()
    torch.testing.assert_close(out, dense_out)
    torch.testing.assert_close(lse, dense_lse)


def test_batch_invariance():
    """A sequence's results, gradients included, are the same bits alone and in its batch."""
    batches = [case for case in map(drawn, SEEDS) if len(case.lens_q) > 1][:20]
    assert {case.skip_form for case in batches} == set(skip.FORMS)
    for case in batches:
        properties.check_batch_invariance(fa_ops.attention, case)


def test_nan_stays_in_its_sequence():
    batches = [case for case in map(drawn, SEEDS) if len(case.lens_q) > 1 and case.dout != "expanded"][:8]
    for case in batches:
        # the values of a block that is dropped have no influence
        properties.check_nan_isolation(fa_ops.attention, case, hidden=("v",))


@pytest.mark.parametrize("seed", range(4))
def test_repeats(seed: int):
    properties.check_repeats(fa_ops.attention, drawn(seed))


def test_long_rows_in_pieces(monkeypatch):
    """The scores of some query blocks at a time give what all at once give."""
    case = draw_skip_case(PROFILE, 5, ((16, 16),))
    whole = call(fa_ops.attention, case.build())
    monkeypatch.setattr("fa_ops.cpu_skip.PLAIN_BLOCK_ELEMENTS", 1)
    check_case(fa_ops.attention, case)
    for found, expected in zip(call(fa_ops.attention, case.build()), whole, strict=True):
        torch.testing.assert_close(found, expected)


def test_block_bits():
    """Bit j of word w is block 32 w + j."""
    kept = torch.zeros(2, 3, 70, dtype=torch.bool)
    kept[1, 2, [0, 31, 33, 69]] = True
    words = pack_block_bits(kept, 4)
    assert words.dtype == torch.int32
    assert words[1, 2].tolist() == [1 - 2**31, 2, 32, 0]
    assert not words[0].any()
    assert torch.equal(unpack_block_bits(words, 70), kept)


@pytest.mark.parametrize("off", [0.0, 0, -0.0])
def test_a_threshold_of_zero_is_dense(off):
    """As Model Optimizer's users write it: no block is looked at, and the bits are those of dense attention."""
    inputs = small_case(has_dlse=True).build()
    tensors = [t.requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    dense, found = (
        inputs.call(fa_ops.attention, *tensors, skip_softmax_threshold=threshold) for threshold in (None, off)
    )
    gradients = [torch.autograd.grad(results, tensors, (inputs.dout, inputs.dlse)) for results in (dense, found)]
    for one, other in zip((*found, *gradients[1]), (*dense, *gradients[0]), strict=True):
        assert torch.equal(one, other)


def test_counts_need_a_threshold():
    q = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match=r"^return_skip_counts: True given"):
        attention_reference(q, q, q, torch.tensor([0]), torch.tensor([4]), return_skip_counts=True)


def test_an_unknown_order_names_itself():
    q = torch.randn(4, 2, 16)
    with pytest.raises(ValueError, match=r"^order: 'sideways' given; accepted are "):
        attention_reference(q, q, q, torch.tensor([0]), torch.tensor([4]), skip_softmax_threshold=0.5, order="sideways")
