"""Key ranges that overlap: right where no gradient of k or v is asked for, refused in the backward where one is."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fa_ops
from fa_ops import key_ranges
from fa_ops.reference import attention_reference

REFUSED = pytest.raises(ValueError, match=r"^b_start_loc_k, b_seq_len_k: ranges given that overlap, where a gradient")
OVERLAPPING = {
    "in_part": ((0, 3), (5, 5)),
    "the_same": ((2, 2), (4, 4)),
    "one_inside": ((0, 2), (8, 3)),
    "not_in_order": ((5, 2), (3, 4)),
    "in_the_first_row": ((0, 0), (1, 8)),
    "behind_the_end": ((0, 7), (99, 1)),
    "before_the_begin": ((-3, 0), (2, 2)),
    "neighbours_but_for_one": ((0, 4), (5, 4)),
}
DISJOINT = {
    "one_after_the_other": ((0, 4), (4, 4)),
    "in_the_other_order": ((4, 0), (4, 4)),
    "with_gaps": ((5, 1), (2, 3)),
    "an_empty_one_inside": ((0, 3), (8, 0)),
    "an_empty_one_at_the_begin": ((0, 0), (8, 0)),
    "both_empty": ((3, 3), (0, 0)),
    "cut_at_the_end": ((0, 6), (6, 99)),
    "behind_the_end": ((0, 99), (8, 4)),
    "negative_lengths": ((0, 4), (5, -2)),
}


def index(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def ranges(pair, dtype: torch.dtype = torch.int32) -> dict[str, Tensor]:
    start, length = pair
    return {"b_start_loc_k": index(*start, dtype=dtype), "b_seq_len_k": index(*length, dtype=dtype)}


def inputs(needs_grad: str = "qkv") -> list[Tensor]:
    shapes = {"q": (10, 4, 16), "k": (8, 2, 16), "v": (8, 2, 16)}
    return [torch.randn(shape, requires_grad=name in needs_grad) for name, shape in shapes.items()]


def attend(q: Tensor, k: Tensor, v: Tensor, attention=fa_ops.attention, **options) -> Tensor:
    return attention(q, k, v, index(0, 5), index(5, 5), is_causal=False, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("pair", OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_overlap_is_refused_in_the_backward(pair, dtype):
    tensors = inputs()
    out = attend(*tensors, **ranges(pair, dtype))
    with REFUSED:
        out.sum().backward()
    assert all(t.grad is None for t in tensors)


@pytest.mark.parametrize("pair", DISJOINT.values(), ids=DISJOINT.keys())
def test_disjoint_ranges_are_not(pair):
    q, k, v = inputs()
    attend(q, k, v, **ranges(pair)).sum().backward()
    assert all(t.grad is not None for t in (q, k, v))
    assert torch.equal(key_ranges.disjoint_starts(*ranges(pair).values(), 8, q), index(*pair[0]).clamp(0, 8))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_gradients_of_disjoint_ranges(order):
    """In any order of the sequences."""
    pair = [(0, 3, 6)[i] for i in order], [(3, 3, 2)[i] for i in order]
    tensors = inputs()
    given = {"b_start_loc": index(0, 4, 7), "b_seq_len": index(4, 3, 3), "is_causal": False} | ranges(pair)
    found, expected = (
        torch.autograd.grad(f(*tensors, **given).square().sum(), tensors)
        for f in (fa_ops.attention, attention_reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("needs_grad", ["q", "k", "v", "qk"])
def test_only_gradients_of_keys_and_values_are_refused(needs_grad):
    """Two sequences of queries over one prefix."""
    tensors = inputs(needs_grad)
    given = ranges(OVERLAPPING["in_part"])
    out = attend(*tensors, **given)
    torch.testing.assert_close(out, attend(*tensors, **given, attention=attention_reference))
    if needs_grad == "q":
        expected = attend(*tensors, **given, attention=attention_reference)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), tensors[0])[0] for t in (out, expected)))
        return
    with REFUSED:
        out.sum().backward()


@pytest.mark.parametrize("options", [{"skip_softmax_threshold": 0.5}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}])
def test_overlap_is_refused_on_every_path(options):
    out = attend(*inputs(), **ranges(OVERLAPPING["the_same"]), **options)
    with REFUSED:
        out.sum().backward()


def test_overlap_is_refused_where_lse_alone_has_a_gradient():
    _, lse = attend(*inputs(), **ranges(OVERLAPPING["the_same"]), return_lse=True)
    with REFUSED:
        lse.sum().backward()


@pytest.fixture
def unchecked(monkeypatch):
    def refuse(*args):
        raise AssertionError("key ranges were compared")

    monkeypatch.setattr(key_ranges, "disjoint_starts", refuse)


def test_padded_sequences_have_keys_of_their_own(unchecked):
    q, k, v = (torch.randn(2, n, 2, 16, requires_grad=True) for n in (5, 8, 8))
    attend_padded = fa_ops.attention(q, k, v, index(0, 0), index(5, 5), **ranges(OVERLAPPING["the_same"]))
    attend_padded.sum().backward()


def test_ranges_of_queries_are_not_compared(unchecked):
    q = torch.randn(10, 2, 16, requires_grad=True)
    fa_ops.attention(q, q, q, index(0, 5), index(5, 5)).sum().backward()
    cu_seq = index(0, 5, 10)
    fa_ops.varlen_attn(q, q, q, cu_seq, cu_seq, 5, 5).sum().backward()


def test_varlen_attn_compares_other_ranges():
    q = torch.randn(10, 2, 16, requires_grad=True)
    out = fa_ops.varlen_attn(q, q, q, index(0, 5, 10), index(0, 5, 10), 5, 5, seqused_k=index(7, 3))
    with REFUSED:
        out.sum().backward()
    cu_seq = index(0, 5, 10)
    out = fa_ops.varlen_attn(q, q, q, cu_seq, cu_seq, 5, 5, seqused_k=index(7, 3))
    with REFUSED:
        out.sum().backward()


@pytest.mark.parametrize("seed", range(20))
def test_the_comparison_finds_every_common_row(seed):
    generator = torch.Generator().manual_seed(seed)
    for num_seqs in (1, 2, 3, 7):
        rows = 4 * num_seqs
        start = torch.randint(-2, rows + 2, (num_seqs,), generator=generator)
        length = torch.randint(-1, 4, (num_seqs,), generator=generator)
        owners = torch.zeros(rows + 9, dtype=torch.int32)
        for first, count in zip(start.clamp(0, rows).tolist(), length.clamp(min=0).tolist(), strict=True):
            owners[first : min(first + count, rows)] += 1
        given = start, length, rows, torch.zeros(())
        # what a GPU compares with
        assert key_ranges.are_disjoint(start.clamp(0, rows), length, rows) == (owners.max() <= 1)
        if owners.max() > 1:
            with REFUSED:
                key_ranges.disjoint_starts(*given)
        else:
            assert torch.equal(key_ranges.disjoint_starts(*given), start.clamp(0, rows))


def test_other_devices_compare_without_a_synchronisation():
    """Meta tensors have no values: reading one would fail, as it would wait on a GPU."""

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(op)
            return op(*args, **(kwargs or {}))

    called = []
    start, length = (t.to("meta") for t in ranges(OVERLAPPING["in_part"]).values())
    with Calls():
        found = key_ranges._disjoint_starts(start, length, 8, torch.zeros((), device="meta"))
    assert (found.shape, found.dtype) == (start.shape, start.dtype)
    assert torch.ops.aten._assert_async.msg in called


def test_no_sequences():
    assert key_ranges.disjoint_starts(index(), index(), 8, torch.zeros(())).shape == (0,)
    assert key_ranges.are_disjoint(index(), index(), 8)


@pytest.mark.parametrize(("pairs", "expected"), [(OVERLAPPING, False), (DISJOINT, True)], ids=["overlap", "disjoint"])
@pytest.mark.parametrize("dtypes", itertools.product([torch.int32, torch.int64], repeat=2), ids=str)
def test_what_a_gpu_compares_with(pairs, expected, dtypes):
    for name, pair in pairs.items():
        start, length = (index(*values, dtype=dtype) for values, dtype in zip(pair, dtypes, strict=True))
        assert key_ranges.are_disjoint(start.clamp(0, 8), length, 8) == expected, name
    largest = index(2**31 - 1, 2**31 - 1, dtype=dtypes[1])  # end + length is beyond 32 bits
    assert not key_ranges.are_disjoint(index(4, 0, dtype=dtypes[0]), largest, 2**31 - 1)
