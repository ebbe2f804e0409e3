"""FLOP formulas of the ops, for `torch.utils.flop_counter.FlopCounterMode`.

PyTorch's convention: 2 FLOPs for a multiply-add, matrix products alone. Each pair of a query and a key that attends
takes two products of the heads' vectors in the forward (scores, out) and five in the backward (scores again, dP, dQ, dK
and dV), whatever a kernel recomputes beyond that. Pairs are counted exactly from the lengths, which reads them from the
device; the holes of a key_mask count as keys, and so does what skip-softmax drops. Where lengths have no values to read
(meta tensors, and subclasses: fake, functional, DTensor) the count is an upper bound from shapes: every row of a padded
batch, or one sequence that holds all packed rows (which bounds key ranges that do not overlap); of a paged cache, each
packed row with all keys that a row of block_table has room for.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from fa_ops_meta.paging import key_extent
from fa_ops_meta.schema import bind


def attention_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of `modelopt::varlen_attention`. Takes the op's arguments."""
    given = bind(torch.ops.modelopt.varlen_attention.default, args, kwargs)
    return 2 * _count_all_pairs(given) * (given["q"].shape[-1] + given["v"].shape[-1])


def attention_backward_flops(*args: Any, **kwargs: Any) -> int:
    """FLOPs of `modelopt::varlen_attention_backward`. Takes the op's arguments."""
    given = bind(torch.ops.modelopt.varlen_attention_backward.default, args, kwargs)
    return 2 * _count_all_pairs(given) * (3 * given["q"].shape[-1] + 2 * given["v"].shape[-1])


def count_pairs(len_q: int, len_k: int, is_causal: bool, window_left: int = -1, window_right: int = -1) -> int:
    """Pairs (i, j) of a query and a key of one sequence with j visible to i: -window_left <= j - (i + len_k - len_q) <=
    window_right, where -1 is unlimited and causal means a window_right of 0."""
    offset = len_k - len_q
    if is_causal:
        window_right = 0
    pairs = len_q * len_k
    if window_right != -1:
        pairs = _sum_clamped(offset + window_right + 1, len_q, len_k)
    if window_left != -1:
        pairs -= _sum_clamped(offset - window_left, len_q, len_k)
    return pairs


def register_flop_formulas() -> None:
    """Makes the formulas known to `FlopCounterMode`. The ops must be defined; registering twice is an error."""
    logger = logging.getLogger("torch.utils.flop_counter")
    logger.disabled = True  # importing it warns where Triton is missing
    from torch.utils.flop_counter import register_flop_formula

    logger.disabled = False
    register_flop_formula(torch.ops.modelopt.varlen_attention, get_raw=True)(attention_flops)
    register_flop_formula(torch.ops.modelopt.varlen_attention_backward, get_raw=True)(attention_backward_flops)


def _sum_clamped(first: int, count: int, most: int) -> int:
    """Sum of min(max(x, 0), most) over the integers x in [first, first + count)."""

    def sum_to(end: int) -> int:
        end = max(end, 0)
        ramp = min(end, most)
        return ramp * (ramp - 1) // 2 + (end - ramp) * most

    return sum_to(first + count) - sum_to(first)


def _count_all_pairs(given: dict[str, Any]) -> int:
    """Pairs of all query heads and sequences."""
    q, block_table = given["q"], given["block_table"]
    rows_k = key_extent(given["k"], block_table)
    lengths = _read_lengths(given["b_start_loc"], given["b_seq_len"], q.shape[-3])
    side = "" if given["b_seq_len_k"] is None else "_k"
    start_k = given["b_start_loc" + side] if block_table is None else None
    lengths_k = _read_lengths(start_k, given["b_seq_len" + side], rows_k)
    if lengths is None or lengths_k is None:
        if q.dim() == 3 and block_table is not None:  # as many keys for each row, whichever sequence it belongs to
            return q.shape[-2] * q.shape[-3] * rows_k
        num_seqs = 1 if q.dim() == 3 else q.shape[0]
        lengths, lengths_k = [q.shape[-3]] * num_seqs, [rows_k] * num_seqs
    return q.shape[-2] * sum(
        count_pairs(len_q, len_k, given["is_causal"], given["window_left"], given["window_right"])
        for len_q, len_k in zip(lengths, lengths_k, strict=True)
    )


def _read_lengths(start: Tensor | None, length: Tensor, rows: int) -> list[int] | None:
    """Lengths of the ranges clamped into `rows` rows, as the ops clamp them; None where they have no values. Without
    starts all begin at 0."""
    if length.is_meta or type(length) is not Tensor:
        return None
    counts = length.tolist()
    firsts = [0] * len(counts) if start is None else (min(max(first, 0), rows) for first in start.tolist())
    return [min(max(count, 0), rows - first) for first, count in zip(firsts, counts, strict=True)]
