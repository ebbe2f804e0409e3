"""Rows of a packed batch that belong to no sequence are written by the kernels, wherever they lie."""

import pytest
import torch
import triton.language as tl

import fa_ops
from fa_ops import launching, ops
from fa_ops.kernels import primitives
from tests.support.memory import Canaries, poisoned_allocations

PIECE = primitives.CLEAR_ROWS.value
SCAN = 32  # sequences that are looked at together: fewer than on a GPU, for the interpreter's sake
ROWS = 2 * PIECE + 10
# (first row, rows) of each sequence
BATCHES = {
    "none_unowned": [(0, ROWS)],
    "at_both_ends": [(3, ROWS - 4)],
    "one_between": [(0, PIECE - 1), (PIECE, ROWS - PIECE)],
    "a_whole_piece": [(PIECE + PIECE - 1, 5), (0, PIECE)],
    "one_owned": [(PIECE, 1)],
    "none_owned": [(5, 0), (ROWS, 0)],
    "lengths_out_of_range": [(-3, 2), (ROWS - 2, 1000), (7, -5)],
    "more_than_one_scan": [(n, int(n % 7 == 3)) for n in range(2 * SCAN + 9)],
}
OVERLAPPING = {"the_same_rows_often": [(1, 9)] * 3, "nested": [(0, PIECE + 3), (5, 2), (PIECE, 2)]}


@pytest.fixture(autouse=True)
def _few_at_once(monkeypatch):
    monkeypatch.setattr(primitives, "CLEAR_SCAN", tl.constexpr(SCAN))


def attend(ranges: list[tuple[int, int]]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Which rows are owned, and all results by name with the rows first, amid poison; the keys' ranges are `ranges`."""
    is_owned = torch.zeros(ROWS, dtype=torch.bool)
    for start, length in ranges:
        is_owned[min(max(start, 0), ROWS) :][: max(length, 0)] = True
    start, length = torch.tensor(ranges, dtype=torch.int32).T
    q, k, v = (torch.randn(ROWS, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    with poisoned_allocations(Canaries()):
        out, lse = fa_ops.attention(q, k, v, start, length, window_size=(0, 0), return_lse=True)
        grads = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(q), torch.ones(2, ROWS)))
    return is_owned, {"out": out.detach(), "lse": lse.detach().T} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


@pytest.mark.parametrize("ranges", BATCHES.values(), ids=BATCHES.keys())
def test_rows_of_no_sequence_are_cleared_and_no_others(ranges):
    is_owned, results = attend(ranges)
    for name, t in results.items():
        assert t[is_owned].isfinite().all(), name
        assert (t[~is_owned] == (float("-inf") if name == "lse" else 0.0)).all(), name
    assert (results["out"][is_owned] != 0.0).all()


@pytest.mark.parametrize("ranges", OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_ranges_that_overlap_hide_no_row(ranges):
    """They are no batch that the op promises results for; still nobody is given what was in memory."""
    is_owned, results = attend(ranges)
    for name, t in results.items():
        assert (t[~is_owned] == (float("-inf") if name == "lse" else 0.0)).all(), name


def test_without_the_programs_that_clear_poison_is_left(monkeypatch):
    monkeypatch.setattr(ops, "clearing_grid", launching.grid)
    is_owned, results = attend(BATCHES["one_between"])
    assert all(t[~is_owned].isnan().all() for t in results.values())
