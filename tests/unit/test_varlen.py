"""Starts and lengths from the forms in which callers have them."""

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa_ops
from fa_ops.varlen import from_cu_seqlens, from_lengths, from_mask

INDEX = torch.zeros(2, dtype=torch.int32)


def mask_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[x == "1" for x in row] for row in rows])


def as_lists(found: tuple[torch.Tensor, torch.Tensor]) -> tuple[list[int], list[int]]:
    assert all(t.dtype == torch.int32 and t.dim() == 1 for t in found)
    return found[0].tolist(), found[1].tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("cu_seqlens", "starts", "lengths"),
    [
        ([0, 5, 5, 12], [0, 5, 5], [5, 0, 7]),
        ([0, 0], [0], [0]),
        ([0], [], []),
        ([3, 4, 9], [3, 4], [1, 5]),
    ],
    ids=["usual", "one_empty", "no_sequences", "starts_later"],
)
def test_from_cu_seqlens(cu_seqlens, starts, lengths, dtype):
    assert as_lists(from_cu_seqlens(torch.tensor(cu_seqlens, dtype=dtype))) == (starts, lengths)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("lengths", "starts"),
    [([5, 0, 7, 1], [0, 5, 5, 12]), ([0, 0], [0, 0]), ([9], [0]), ([], [])],
    ids=["usual", "all_empty", "one", "no_sequences"],
)
def test_from_lengths(lengths, starts, dtype):
    assert as_lists(from_lengths(torch.tensor(lengths, dtype=dtype))) == (starts, lengths)


@pytest.mark.parametrize(
    ("rows", "starts", "lengths"),
    [
        (["1110", "1111", "1000"], [0, 0, 0], [3, 4, 1]),
        (["0011", "1111", "0001"], [2, 0, 3], [2, 4, 1]),
        (["0110", "0000"], [1, 0], [2, 0]),
        (["10100", "01001"], [0, 1], [3, 4]),
    ],
    ids=["right_padding", "left_padding", "both_and_none", "holes"],
)
def test_from_mask(rows, starts, lengths):
    assert as_lists(from_mask(mask_of(rows))) == (starts, lengths)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)], ids=str)
def test_from_a_mask_without_elements(shape):
    assert as_lists(from_mask(torch.zeros(shape, dtype=torch.bool))) == ([0] * shape[0], [0] * shape[0])


def test_from_mask_agrees_with_a_loop():
    mask = torch.rand(200, 9) < torch.rand(200, 1)
    starts, lengths = from_mask(mask)
    for row, start, length in zip(mask, starts.tolist(), lengths.tolist(), strict=True):
        positions = row.nonzero().flatten().tolist()
        assert (start, length) == ((positions[0], positions[-1] - positions[0] + 1) if positions else (0, 0))


def test_a_transposed_mask():
    mask = mask_of(["0011", "1110"])
    assert as_lists(from_mask(mask.t().contiguous().t())) == as_lists(from_mask(mask))


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (from_cu_seqlens, torch.tensor([0, 2, 5])),
        (from_lengths, torch.tensor([2, 3])),
        (from_mask, mask_of(["011", "110"])),
    ],
    ids=["from_cu_seqlens", "from_lengths", "from_mask"],
)
class TestWithoutReadingValues:
    """Fake and meta tensors have no values: who asks for one fails, as who asks a device for one waits."""

    def test_fake(self, function, argument):
        mode = FakeTensorMode()
        with mode:
            starts, lengths = function(mode.from_tensor(argument))
        assert starts.shape == lengths.shape == (2,)

    def test_meta(self, function, argument):
        starts, lengths = function(argument.to("meta"))
        assert starts.device.type == lengths.device.type == "meta"

    def test_compiled(self, function, argument, fresh_compiler):
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        assert as_lists(compiled(argument)) == as_lists(function(argument))


def test_all_three_say_the_same_of_a_batch():
    """Attention over a padded batch, and over the same sequences packed, by way of each of the functions."""
    mask = mask_of(["00111", "11111", "00011"])
    padded = torch.randn(3, 5, 2, 16)
    packed, lengths = padded[mask], mask.sum(1)
    expected = fa_ops.attention(padded, padded, padded, *from_mask(mask))[mask]
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    for ranges in (from_lengths(lengths), from_cu_seqlens(cu_seqlens)):
        assert torch.equal(fa_ops.attention(packed, packed, packed, *ranges), expected)


@pytest.mark.parametrize(
    ("function", "argument", "error", "message"),
    [
        (from_cu_seqlens, INDEX[None], ValueError, "cu_seqlens: shape (1, 2) given; expected (B + 1,)"),
        (from_cu_seqlens, INDEX[:0], ValueError, "cu_seqlens: shape (0,) given; expected (B + 1,)"),
        (
            from_cu_seqlens,
            INDEX.float(),
            TypeError,
            "cu_seqlens: dtype torch.float32 given; accepted are int32 and int64",
        ),
        (from_lengths, INDEX[0], ValueError, "lengths: shape () given; expected (B,)"),
        (from_lengths, INDEX.bool(), TypeError, "lengths: dtype torch.bool given; accepted are int32 and int64"),
        (from_mask, INDEX.bool(), ValueError, "mask: shape (2,) given; expected (B, S)"),
        (from_mask, INDEX[None], TypeError, "mask: dtype torch.int32 given; accepted is bool"),
    ],
)
def test_wrong_arguments(function, argument, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(argument)
