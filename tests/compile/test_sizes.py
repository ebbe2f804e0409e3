"""No size is frozen: one exported program holds for all lengths, and torch.compile makes two frames for them.

The lengths cross every boundary: a window, blocks of queries and of keys, the 32 blocks of a word of block_bits.
"""

import itertools

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import fa_ops

LENGTHS = (2, 3, 16, 129, 70, 600, 513, 40)
SKIP = {"skip_softmax_threshold": 0.5, "skip_softmax_block": (16, 16)}
THRESHOLDS = torch.tensor([0.5, 0.1])
OPTIONS = {
    "dense": {},
    "window": {"window_size": (64, 0)},
    "skip_softmax": SKIP,
    "skip_softmax_of_a_tensor": SKIP | {"skip_softmax_threshold": THRESHOLDS, "return_skip_counts": True},
}


class Attention(torch.nn.Module):
    """Of tensors with one length, S, that changes."""

    def __init__(self, num_seqs: int = 2, **options):
        super().__init__()
        self.num_seqs, self.options = num_seqs, options

    def draw(self, size: int) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def dynamic(self, size: Dim) -> tuple:
        raise NotImplementedError

    def index(self, *values: int) -> Tensor:
        return torch.tensor(values[: self.num_seqs], dtype=torch.int32)


class Packed(Attention):
    def draw(self, size):
        first = size // 2 if self.num_seqs > 1 else size
        return *(torch.randn(size, n, 16) for n in (4, 2, 2)), self.index(0, first), self.index(first, size - first)

    def dynamic(self, size):
        return ({0: size},) * 3 + (None, None)

    def forward(self, q, k, v, start, length):
        return fa_ops.attention(q, k, v, start, length, **self.options)


class Padded(Packed):
    def draw(self, size):
        qkv = (torch.randn(self.num_seqs, size, n, 16) for n in (4, 2, 2))
        return *qkv, self.index(0, 1), self.index(size, size - 1)

    def dynamic(self, size):
        return ({1: size},) * 3 + (None, None)


class Decode(Attention):
    """Over a cache that grows."""

    def draw(self, size):
        q, k, v = (torch.randn(self.num_seqs, n, heads, 16) for n, heads in ((1, 4), (size, 2), (size, 2)))
        return q, k, v, self.index(0, 0), self.index(1, 1), self.index(0, 1), self.index(size, size - 1)

    def dynamic(self, size):
        return None, {1: size}, {1: size}, None, None, None, None

    def forward(self, q, k, v, start, length, start_k, length_k):
        return fa_ops.attention(q, k, v, start, length, b_start_loc_k=start_k, b_seq_len_k=length_k, **self.options)


class Paged(Attention):
    """Over a table of pages that grows."""

    def draw(self, size):
        table = torch.arange(self.num_seqs * size).view(self.num_seqs, size) % 50
        k, v = torch.randn(2, 50, 8, 2, 16).unbind()
        return torch.randn(6, 4, 16), k, v, self.index(0, 5), self.index(5, 1), self.index(8 * size, 5), table

    def dynamic(self, size):
        return None, None, None, None, None, None, {1: size}

    def forward(self, q, k, v, start, length, length_k, table):
        return fa_ops.attention(
            q, k, v, start, length, b_seq_len_k=length_k, block_table=table, **self.options
        )  # fmt: skip


LAYOUTS = Packed, Padded, Decode, Paged
FAST = {(layout, "skip_softmax") for layout in LAYOUTS} | {(Packed, "window"), (Padded, "skip_softmax_of_a_tensor")}


def layouts_and_options(*others) -> list:
    """All, with each of the `others` if there are any; FAST ones, with the first of the others, in `make test`."""
    combinations = itertools.product(LAYOUTS, OPTIONS, *others)
    firsts = [values[0] for values in others]
    return [
        pytest.param(
            layout, OPTIONS[name], *rest, id="-".join(map(str, (layout.__name__, name, *rest))),
            marks=[] if (layout, name) in FAST and rest == firsts else pytest.mark.slow,
        )
        for layout, name, *rest in combinations
    ]  # fmt: skip


def check_equal(found, expected) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layout", "options", "num_seqs", "strict"), layouts_and_options((1, 2), ("non_strict", "strict"))
)
def test_one_program_for_all_lengths(layout, options, num_seqs, strict, fresh_compiler):
    if "return_skip_counts" in options:
        options = options | {"skip_softmax_threshold": THRESHOLDS[:num_seqs]}
    module = layout(num_seqs, **options)
    shapes = module.dynamic(Dim("length", min=2, max=100_000))
    program = torch.export.export(module, module.draw(70), dynamic_shapes=shapes, strict=strict == "strict").module()
    for size in LENGTHS:
        tensors = module.draw(size)
        check_equal(program(*tensors), module(*tensors))


@pytest.mark.parametrize(("layout", "options"), layouts_and_options())
def test_two_frames_for_eight_lengths(layout, options, fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    module = layout(**options)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for size in LENGTHS:
        q, *others = module.draw(size)
        q.requires_grad_(layout in (Packed, Padded))
        found, expected = compiled(q, *others), module(q, *others)
        check_equal(found, expected)
        if q.requires_grad:
            outs = [results if isinstance(results, Tensor) else results[0] for results in (found, expected)]
            check_equal(*(torch.autograd.grad(out.sum(), q) for out in outs))
    assert 1 <= counter.frame_count <= 2


def test_two_frames_for_windows_of_all_sizes(fresh_compiler):
    """A window that the caller reckons from a length is a symbol, too."""
    counter = CompileCounterWithBackend("aot_eager")

    def attend(q, k, v, start, length):
        return fa_ops.attention(q, k, v, start, length, window_size=(q.shape[0] // 3 + 1, q.shape[0]), is_causal=False)

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for size in LENGTHS:
        q, *others = Packed().draw(size)
        q.requires_grad_()
        found, expected = compiled(q, *others), attend(q, *others)
        check_equal(found, expected)
        check_equal(*(torch.autograd.grad(out.sum(), q) for out in (found, expected)))
    assert 1 <= counter.frame_count <= 2
