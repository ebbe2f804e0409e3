"""Key ranges where a gradient of k or v is asked for: they must not overlap.

A program of the backward computes dK and dV of one sequence, and stores them. A key of two sequences would get the
gradient from one of them alone.
"""

import operator

import torch
from torch import Tensor

from fa_ops_meta import checks

_library = torch.library.Library("modelopt", "FRAGMENT")
_library.define(
    "_disjoint_starts(Tensor b_start_loc_k, Tensor b_seq_len_k, SymInt rows_k, Tensor gradient) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _disjoint_starts(b_start_loc_k: Tensor, b_seq_len_k: Tensor, rows_k: int, gradient: Tensor) -> Tensor:
    """b_start_loc_k, clamped into the rows. Overlapping ranges raise ValueError on a CPU, and stop a GPU with an
    assertion: the host does not wait for it.

    The backward reads the result, so no compiler drops the check. It is given a gradient, so none moves it into the
    forward.
    """
    start = b_start_loc_k.clamp(0, rows_k)
    if start.device.type != "cpu":
        torch._assert_async(are_disjoint(start, b_seq_len_k, rows_k), checks.OVERLAP)
    elif not _are_disjoint_lists(start.tolist(), b_seq_len_k.tolist(), rows_k):
        raise ValueError(checks.OVERLAP)
    return start


def are_disjoint(start: Tensor, length: Tensor, rows: int) -> Tensor:
    """Whether no row belongs to two ranges, () bool; ranges begin inside the rows, and end with them.

    It is so iff, where a range begins, all that have begun before have ended.
    """
    end = start + torch.minimum(length.clamp(min=0), rows - start)
    starts, ends = torch.stack((start, end)).sort().values
    return (starts[1:] >= ends[:-1]).all()


def _are_disjoint_lists(start: list[int], length: list[int], rows: int) -> bool:
    """`are_disjoint` on a CPU, where a dozen small operations would take longer."""
    ends = sorted(min(first + max(count, 0), rows) for first, count in zip(start, length, strict=True))
    return all(map(operator.ge, sorted(start)[1:], ends))


_library.impl("_disjoint_starts", _disjoint_starts, "CPU")
_library.impl("_disjoint_starts", _disjoint_starts, "CUDA")
torch.library.register_fake(
    "modelopt::_disjoint_starts", lambda start, length, rows, gradient: torch.empty_like(start), lib=_library
)
disjoint_starts = torch.ops.modelopt._disjoint_starts.default
