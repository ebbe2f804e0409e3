"""What skip-softmax would drop of dense attention, for many thresholds at once.

Dropping never changes the running maximum, so one number decides over a block at every threshold: its margin, the
largest m(i, c) - M(i) of its rows. It is dropped at λ where the margin is less than ln λ. A kernel counts the margins
of CUDA tensors, `fa_ops.cpu_skip` those of CPU tensors.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa_ops.counting import count_kept
from fa_ops.cpu_skip import block_margins as margins_of_blocks
from fa_ops_meta.skip import VISIT_ORDER
from fa_ops_meta.window import window_bounds


class BlockCounts(NamedTuple):
    """Blocks of one call of one module, by query head and by tile, a block of query rows. All int64, on its device.

    Attributes:
        visited: (Hq, tiles).
        dropped: (trials, Hq, tiles), by each trial threshold.
        sequence: (tiles,), of the tile; B for one that is left over.
        rows_behind: (tiles,), query rows of the sequence behind the tile's last.
        num_sequences: B.
    """

    visited: Tensor
    dropped: Tensor
    sequence: Tensor
    rows_behind: Tensor
    num_sequences: int

    def by_sequence(self) -> tuple[Tensor, Tensor]:
        """visited (B, Hq), dropped (trials, B, Hq)."""

        def summed(counts: Tensor) -> Tensor:
            sums = counts.new_zeros(*counts.shape[:-1], self.num_sequences + 1)
            return sums.index_add_(-1, self.sequence, counts)[..., :-1].transpose(-1, -2)

        return summed(self.visited), summed(self.dropped)


def count_dropped(
    q: Tensor,
    k: Tensor,
    trials: tuple[float, ...],
    block: tuple[int, int],
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    order: str = VISIT_ORDER,
) -> BlockCounts:
    """Counts of one call of `fa_ops.attention`, whose arguments and layouts these are; of CUDA tensors, nothing is read
    on the host.

    Args:
        trials: λ, ascending, in (0, 1).
        block: (br, bc), query rows and keys.
        sinks: never take part in the decisions.
        order: of the visit, one of `fa_ops_meta.skip.VISIT_ORDERS`.
    """
    if b_start_loc_k is None or b_seq_len_k is None:
        b_start_loc_k, b_seq_len_k = b_start_loc, b_seq_len
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    left, right = window_bounds(is_causal, *window_size)
    sequence, rows_behind = _tiles(q, b_start_loc, b_seq_len, block[0])
    kept = torch.zeros(q.shape[-2], len(sequence), len(trials) + 1, dtype=torch.int32, device=q.device)
    count_kept(
        q, k, b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, key_mask,
        torch.tensor(trials, dtype=torch.float32, device=q.device), scale, softcap, left, right, *block, kept, order,
    )  # fmt: skip
    *by_trial, visited = kept.long().unbind(-1)
    return BlockCounts(visited, visited - torch.stack(by_trial), sequence, rows_behind, len(b_seq_len))


def _tiles(q: Tensor, b_start_loc: Tensor, b_seq_len: Tensor, br: int) -> tuple[Tensor, Tensor]:
    """`sequence` and `rows_behind` of `BlockCounts`, without reading a length; tiles are those of block_bits."""
    rows, num_sequences = q.shape[-3], len(b_seq_len)
    per_row = -(-rows // br)
    start, length = b_start_loc.long().clamp(0, rows), b_seq_len.long().clamp(0, rows)
    if q.dim() == 4:
        tile = torch.arange(num_sequences * per_row, device=q.device)
        sequence, index = tile // max(per_row, 1), tile % max(per_row, 1)
    else:
        tile = torch.arange(num_sequences + per_row, device=q.device)
        own = (length + br - 1) // br
        end = own.cumsum(0)
        sequence = torch.searchsorted(end, tile, right=True)
        index = tile - torch.nn.functional.pad(end - own, (0, 1))[sequence]
    length = torch.nn.functional.pad(torch.minimum(length, rows - start), (0, 1))[sequence]
    return sequence, (length - (index + 1) * br).clamp(min=0)


def single_rows(
    q: Tensor, k: Tensor, arguments: Mapping[str, Any], parts: Tensor
) -> Iterator[tuple[Tensor, Tensor, dict[str, Any], Tensor]]:
    """Rows of a causal call as decoding steps would have them: each a packed sequence by itself.

    Args:
        q, k, arguments: of the call.
        parts: (n,), which rows: those at these parts, in [0, 1), of a packed call or of each padded sequence.

    Returns:
        Calls like the given one, (q, k, arguments, sequence): sequence (n,) is each row's in the given call, and the
        last of a row's keys is the row's own. What is no row of a sequence has length 0.
    """
    start, length = arguments["b_start_loc"].long(), arguments["b_seq_len"].long()
    start_k, length_k = arguments.get("b_start_loc_k"), arguments.get("b_seq_len_k")
    start_k, length_k = (start, length) if start_k is None or length_k is None else (start_k, length_k)
    key_mask, parts = arguments.get("key_mask"), parts.to(q.device)

    def steps(own_q: Tensor, own_k: Tensor, row: Tensor, sequence: Tensor, position: Tensor) -> tuple:
        keys = length_k[sequence] - (length[sequence] - 1 - position)
        changed = {
            "b_start_loc": torch.arange(len(row), device=q.device),
            "b_seq_len": ((position >= 0) & (position < length[sequence])).long(),
            "b_start_loc_k": start_k[sequence],
            "b_seq_len_k": keys.clamp(min=0),
            "key_mask": None if key_mask is None else key_mask[sequence],
        }
        return own_q[row], own_k, {**arguments, **changed}, sequence

    if q.dim() == 3:
        row = (q.shape[0] * parts).long()
        sequence = ((row[:, None] >= start) & (row[:, None] < start + length)).int().argmax(1)
        yield steps(q, k, row, sequence, row - start[sequence])
        return
    for batch in range(len(q)):
        sequence = torch.full(parts.shape, batch, dtype=torch.int64, device=q.device)
        position = (length[sequence] * parts).long()
        row = (start[sequence] + position).clamp(0, max(q.shape[1] - 1, 0))
        yield steps(q[batch], k[batch], row, sequence, position)


def block_margins(
    scores: Tensor, mask: Tensor, block: tuple[int, int], order: str, segment: int | None
) -> tuple[Tensor, Tensor]:
    """Margins (Hq, query blocks, key blocks) of scores (Hq, rows, keys), and which blocks are visited.

    mask: (rows, keys), where it is False scores are -inf. segment: number of key blocks after which the running maximum
    starts again from the first visited block's; None for never. Rows start at a query block's first, keys at the
    sequence's first.
    """
    (br, bc), (rows, keys) = block, mask.shape
    padding = (0, -keys % bc, 0, -rows % br)
    if any(padding):  # an empty one would copy
        scores = torch.nn.functional.pad(scores, padding, value=-torch.inf)
        mask = torch.nn.functional.pad(mask, padding, value=False)
    scores, votes = scores.unflatten(-1, (-1, bc)), mask.unflatten(-1, (-1, bc))
    largest = scores.amax(-1).unflatten(1, (-1, br))
    visited, margins = margins_of_blocks(largest, votes.any(-1).unflatten(0, (-1, br)), order, segment)
    return margins, visited
