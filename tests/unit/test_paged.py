"""Paged caches on the CPU: fa_ops.varlen_attn and the op, against the oracle on the same keys without pages."""

import dataclasses
import re

import pytest
import torch

import fa_ops
from fa_ops.reference import attention_reference
from tests.support.accuracy import AccuracyError, check_case
from tests.support.cases import Case
from tests.support.draw import Profile, draw_case, draw_skip_case
from tests.support.paged import check_page_numbers_are_clamped, paged, to_pages
from tests.support.problems import op_arguments, small_case

OP = torch.ops.modelopt.varlen_attention
PROFILE = Profile(
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    head_dims=((16, 16), (40, 40), (64, 64), (32, 80)),
    max_len=150,
    max_rows_by_heads=1500,
    feature_rate=0.3,
)
PAGE_SIZES = (1, 7, 16, 64, 256)


def drawn(seed: int, draw=draw_case, *options) -> Case:
    return dataclasses.replace(draw(PROFILE, seed, *options), key_mask=None)


def seeds(count: int, quick: int):
    marks = ((), pytest.mark.slow)
    return pytest.mark.parametrize("seed", [pytest.param(n, marks=marks[n >= quick]) for n in range(count)])


@seeds(40, 15)
def test_accuracy(seed: int):
    # PyTorch's flash attention for CPU takes a coarser exponential in 16 bits, which its lse shows
    attention = paged(PAGE_SIZES[seed % len(PAGE_SIZES)], is_head_major=seed % 2 == 0)
    check_case(attention, drawn(seed), is_lse_float32=False, has_backward=False)


@seeds(12, 5)
def test_skip_softmax(seed: int):
    case = drawn(seed, draw_skip_case, ((16, 16), (16, 32), (32, 16)))
    attention, inputs = paged(PAGE_SIZES[seed % len(PAGE_SIZES)]), case.build()
    found, expected = (
        inputs.call(f, inputs.q, inputs.k, inputs.v, return_skip_counts=True)[-1]
        for f in (attention, attention_reference)
    )
    assert expected[0].any()
    assert found.tolist() == expected.tolist()
    check_case(attention, case, has_backward=False)


def test_a_wrong_page_is_noticed():
    def wrong(*args, **options):
        def swapped(*tensors):
            k, v, table = to_pages(*tensors)
            return k, v, table.flip(0)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tests.support.paged.to_pages", swapped)
            return paged(4)(*args, **options)

    with pytest.raises(AccuracyError):
        check_case(wrong, small_case(lens_k=(6, 6)), has_backward=False)


def cache(lengths=(6, 9), page_size=4):
    """q (8, 4, 16) of 3 and 5 rows; k and v pages, their table and lengths."""
    inputs = small_case(lens_q=(3, 5), lens_k=lengths).build()
    k, v, table = to_pages(inputs.canaries, inputs.k, inputs.v, inputs.b_start_loc_k, inputs.b_seq_len_k, page_size)
    return inputs, k, v, table


def call(inputs, k, v, table, **changes):
    given = {"cu_seq_k": None, "enable_gqa": True, "window_size": (-1, 0), "seqused_k": inputs.b_seq_len_k}
    given |= {"block_table": table, "max_q": 5, "max_k": 9} | changes
    return fa_ops.varlen_attn(inputs.q, k, v, torch.tensor([0, 3, 8]), **given)


def test_varlen_attn():
    inputs, k, v, table = cache()
    expected, _ = inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
    assert torch.equal(call(inputs, k, v, table), expected)
    assert torch.equal(call(inputs, k, v, table.long()), expected)


@pytest.mark.parametrize("cu_seq_k", [[0, 6, 15], [0, 256, 512], [0, 0, 0]])
def test_varlen_attn_takes_cu_seq_k_beside_pages(cu_seq_k):
    """torch's FlashAttention-2 backend requires it, and reads lengths from seqused_k."""
    inputs, k, v, table = cache()
    expected = call(inputs, k, v, table)
    assert torch.equal(call(inputs, k, v, table, cu_seq_k=torch.tensor(cu_seq_k)), expected)


def test_varlen_attn_out():
    inputs, k, v, table = cache()
    out = torch.full_like(inputs.q, torch.nan)
    given = {"seqused_k": inputs.b_seq_len_k, "block_table": table, "enable_gqa": True}
    found = fa_ops.varlen_attn_out(out, inputs.q, k, v, torch.tensor([0, 3, 8]), None, 5, 9, **given)
    assert found is out
    assert torch.equal(out, call(inputs, k, v, table, window_size=(-1, -1)))


def test_the_oracle_reads_pages():
    inputs, k, v, table = cache()
    expected = attention_reference(
        inputs.q, inputs.k, inputs.v, inputs.b_start_loc, inputs.b_seq_len,
        b_start_loc_k=inputs.b_start_loc_k, b_seq_len_k=inputs.b_seq_len_k,
    )  # fmt: skip
    found = attention_reference(
        inputs.q, k, v, inputs.b_start_loc, inputs.b_seq_len, b_seq_len_k=inputs.b_seq_len_k, block_table=table
    )
    assert torch.equal(found, expected)


def test_sequences_share_pages():
    """Two sequences of one prefix: whoever names the same pages gets the same results."""
    _, k, v, table = cache(lengths=(9, 9))
    q, length = torch.randn(2, 1, 4, 16), torch.tensor([9, 7])
    start, one = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)

    def attend(table):
        return OP(q, k, v, start, one, None, True, None, None, length, block_table=table)[0]

    alone = torch.cat([attend(table[[0, 0]])[:1], attend(table[[0, 0]])[1:]])
    assert torch.equal(attend(table[:1].expand(2, -1)), alone)


@pytest.mark.parametrize("length", [-1, 0, 1 << 30])
def test_lengths_are_clamped_to_the_table(length: int):
    inputs, k, v, table = cache()
    k, v = k.nan_to_num(), v.nan_to_num()
    room = table.shape[1] * 4
    found, expected = (
        call(inputs, k, v, table, seqused_k=torch.tensor([n, 9])) for n in (length, min(max(length, 0), room))
    )
    assert torch.equal(found, expected)


def test_page_numbers_are_clamped():
    check_page_numbers_are_clamped(4)


def test_a_cache_without_pages():
    inputs, k, v, table = cache()
    assert not call(inputs, k[:0], v[:0], table).any()
    assert not call(inputs, k, v, table[:, :0]).any()


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "cu_seq_k: None given without block_table", {"block_table": None}),
        (
            ValueError, "cu_seq_k: shape (2,) given; expected cu_seq_q's, (3,)",
            {"cu_seq_k": torch.tensor([0, 6])},
        ),
        (
            ValueError, "seqused_k: None given with block_table",
            {"cu_seq_k": torch.tensor([0, 6, 15]), "seqused_k": None},
        ),
        (ValueError, "seqused_k: None given with block_table", {"seqused_k": None}),
        (
            ValueError, "block_table: shape (2,) given; expected (B, max_pages), the pages of each sequence",
            {"block_table": torch.zeros(2, dtype=torch.int32)},
        ),
        (
            TypeError, "block_table: dtype torch.float32 given; accepted are int32 and int64",
            {"block_table": torch.zeros(2, 5)},
        ),
        (
            ValueError, "block_table: 3 sequences given; expected as many as b_seq_len has, 2",
            {"block_table": torch.zeros(3, 5, dtype=torch.int32)},
        ),
        (
            ValueError, "block_table: device meta given; expected q's, cpu",
            {"block_table": torch.zeros(2, 5, dtype=torch.int32, device="meta")},
        ),
        (TypeError, "block_table: list given; accepted is a Tensor or None", {"block_table": [[0, 1], [2, 3]]}),
        (
            ValueError, "b_seq_len_k: 3 sequences given; expected as many as b_seq_len has, 2",
            {"seqused_k": torch.tensor([1, 2, 3])},
        ),
        (TypeError, "b_seq_len_k: dtype torch.float32 given", {"seqused_k": torch.ones(2)}),
    ],
    ids=lambda x: x.partition(";")[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_refused_in_these_words(error, message: str, changes: dict):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call(*cache(), **changes)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (
            "k: shape (15, 2, 16) given with block_table; expected (pages, page size, Hkv, D)",
            {"k": torch.zeros(15, 2, 16)},
        ),
        ("k: page size 0 given; with block_table it must be 1 or more", {n: torch.zeros(3, 0, 2, 16) for n in "kv"}),
        (
            "b_start_loc_k: a Tensor given with block_table; a sequence's keys begin with the first row of its "
            "first page, pass None",
            {"b_start_loc_k": torch.zeros(2, dtype=torch.int32)},
        ),
        (
            "b_seq_len_k: None given with block_table; a paged cache needs the number of keys of each sequence, (B,)",
            {"b_seq_len_k": None},
        ),
        (
            "key_mask: given with block_table; it is for the padded layout, (B, S, Hkv, D), pass None",
            {"key_mask": torch.ones(2, 9, dtype=torch.bool)},
        ),
    ],
    ids=lambda x: x.partition(";")[0] if isinstance(x, str) else "",
)
def test_the_op_refuses(message: str, changes: dict):
    inputs, k, v, table = cache()
    names = [argument.name for argument in OP.default._schema.arguments]
    given = dict(zip(names, op_arguments(inputs), strict=True))
    given |= {"k": k, "v": v, "block_table": table, "b_start_loc_k": None} | changes
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OP(**given)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_no_gradients(name: str, monkeypatch):
    inputs, k, v, table = cache()
    tensors = {"q": inputs.q, "k": k, "v": v}
    tensors[name].requires_grad_()
    message = "^block_table: a Tensor given where a gradient is asked for; a paged cache has no backward"
    with torch.no_grad():
        assert not call(inputs, k, v, table).requires_grad
    with pytest.raises(NotImplementedError, match=message):
        OP(inputs.q, k, v, inputs.b_start_loc, inputs.b_seq_len, b_seq_len_k=inputs.b_seq_len_k, block_table=table)
    monkeypatch.setattr("fa_ops_meta.outputs.empty_forward", None)  # nothing is allocated
    with pytest.raises(NotImplementedError, match=message):
        call(inputs, k, v, table)


def test_the_backward_op_refuses():
    inputs, k, v, table = cache()
    arguments = (inputs.q, k, v, inputs.b_start_loc, inputs.b_seq_len)
    out, lse, bits, _ = OP(*arguments, b_seq_len_k=inputs.b_seq_len_k, block_table=table)
    with pytest.raises(NotImplementedError, match="block_table: a Tensor given where a gradient"):
        torch.ops.modelopt.varlen_attention_backward(
            out, None, out, lse, bits, *arguments, b_seq_len_k=inputs.b_seq_len_k, block_table=table
        )
