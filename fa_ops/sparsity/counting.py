"""What skip-softmax would drop of dense attention, for many thresholds at once.

Dropping never changes the running maximum, so one number decides over a block at every threshold: its margin, the
largest m(i, c) - M(i) of its rows. It is dropped at λ where the margin is less than ln λ.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fa_ops.reference import sequence_rows, visible
from fa_ops_meta.skip import DECODE_SEGMENT, VISIT_ORDER, VISIT_ORDERS

# Scores that are held at a time.
SCORES_AT_ONCE = 1 << 24


class BlockCounts(NamedTuple):
    """Blocks of one call of one module: visited (B, Hq), and dropped at each trial threshold (trials, B, Hq), int64."""

    visited: Tensor
    dropped: Tensor


class _Sequence(NamedTuple):
    """One sequence: q (len_q, Hq, D) and k (len_k, Hkv, D) float32, and what makes their scores."""

    q: Tensor
    k: Tensor
    key_mask: Tensor | None
    is_causal: bool
    window_size: tuple[int, int]
    scale: float
    softcap: float

    def scores(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """(Hq, rows, keys) of some query rows, -inf where not visible, and which are, (rows, keys).

        Causal rows see no key behind the last one's: without those the rows' end is again the keys' end.
        """
        behind = len(self.q) - end if self.is_causal else 0
        keys = max(len(self.k) - behind, 0)
        key_mask = None if self.key_mask is None else self.key_mask[:keys]
        first = begin if self.is_causal else 0
        last = end if self.is_causal else len(self.q)
        mask = visible(last - first, keys, self.is_causal, key_mask, self.q.device, self.window_size)
        mask = mask[begin - first : end - first]
        q = self.q[begin:end].unflatten(1, (self.k.shape[1], -1))
        s = torch.einsum("qhgd,khd->hgqk", q, self.k[:keys]).flatten(0, 1) * self.scale
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        return s.masked_fill(~mask, -torch.inf), mask


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
    """Counts of one call of `fa_ops.attention`, whose arguments and layouts these are; lengths are read on the host.

    Args:
        trials: λ, ascending, in (0, 1).
        block: (br, bc), query rows and keys.
        sinks: never take part in the decisions.
        order: of the visit, one of `VISIT_ORDERS`.
    """
    if b_start_loc_k is None or b_seq_len_k is None:
        b_start_loc_k, b_seq_len_k = b_start_loc, b_seq_len
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_rows, k_rows = (t.flatten(0, 1) if t.dim() == 4 else t for t in (q, k))
    ln_trials = torch.tensor(trials, device=q.device).log()
    ranges = zip(sequence_rows(q, b_start_loc, b_seq_len), sequence_rows(k, b_start_loc_k, b_seq_len_k), strict=True)
    visited, dropped = [], []
    for rows_q, rows_k in list(ranges)[: len(b_start_loc)]:
        own_key_mask = None if key_mask is None else key_mask.flatten()[rows_k]
        sequence = _Sequence(
            q_rows[rows_q].float(), k_rows[rows_k].float(), own_key_mask, is_causal, window_size, scale, softcap
        )
        counts = _count_sequence(sequence, ln_trials, block, order)
        visited.append(counts.visited)
        dropped.append(counts.dropped)
    return BlockCounts(torch.stack(visited), torch.stack(dropped, 1))


def _count_sequence(sequence: _Sequence, ln_trials: Tensor, block: tuple[int, int], order: str) -> BlockCounts:
    """visited (Hq,), dropped (trials, Hq)."""
    br, bc = block
    len_q, heads, _ = sequence.q.shape
    len_k = len(sequence.k)
    # histogram[h, i]: blocks whose margin is less than the trials from i on, but no earlier one
    histogram = torch.zeros(heads, len(ln_trials) + 1, dtype=torch.int64, device=sequence.q.device)
    segment = DECODE_SEGMENT // bc if len_q == 1 else None
    step = br * max(1, SCORES_AT_ONCE // max(1, heads * len_k * br))
    for begin in range(0, len_q, step):
        scores, mask = sequence.scores(begin, min(begin + step, len_q))
        if not mask.any():
            continue
        margins, is_visited = block_margins(scores, mask, block, order, segment)
        first_trial = torch.bucketize(margins[:, is_visited], ln_trials, right=True)
        histogram.scatter_add_(1, first_trial, torch.ones_like(first_trial))
    cumulative = histogram.cumsum(1)
    return BlockCounts(cumulative[:, -1], cumulative[:, :-1].T)


def block_margins(
    scores: Tensor, mask: Tensor, block: tuple[int, int], order: str, segment: int | None
) -> tuple[Tensor, Tensor]:
    """Margins (Hq, query blocks, key blocks) of scores (Hq, rows, keys), and which blocks are visited.

    segment: number of key blocks after which the running maximum starts again from the first visited block's; None for
    never. Rows start at a query block's first, keys at the sequence's first.
    """
    br, bc = block
    rows, keys = mask.shape
    num_blocks = -(-keys // bc)
    padding = (0, num_blocks * bc - keys, 0, -rows % br)
    scores = torch.nn.functional.pad(scores, padding, value=-torch.inf)
    mask = torch.nn.functional.pad(mask, padding, value=False)
    m = scores.unflatten(2, (num_blocks, bc)).amax(-1).unflatten(1, (-1, br))  # (Hq, query blocks, br, key blocks)
    is_visited = mask.unflatten(1, (num_blocks, bc)).any(-1).unflatten(0, (-1, br)).any(1)
    rank = _visiting_rank(is_visited, order)
    sequence_first = rank.masked_fill(~is_visited, num_blocks).argmin(-1, keepdim=True)
    m_first = m.gather(-1, sequence_first[None, :, None].expand(*m.shape[:3], 1))
    earlier = torch.full_like(m, -torch.inf)
    segment = segment or max(num_blocks, 1)
    for begin in range(0, num_blocks, segment):
        part = slice(begin, begin + segment)
        by_rank = rank[:, part].argsort(-1)[None, :, None].expand(*m.shape[:3], -1)
        running = m[..., part].gather(-1, by_rank).cummax(-1).values
        running = torch.nn.functional.pad(running[..., :-1], (1, 0), value=-torch.inf)
        earlier[..., part] = torch.empty_like(running).scatter_(-1, by_rank, running)
    is_first = torch.arange(num_blocks, device=m.device) == sequence_first
    earlier = torch.where(is_first[:, None], earlier, torch.maximum(earlier, m_first))
    margins = torch.where(m == -torch.inf, m, m - earlier)
    return margins.amax(2), is_visited


def _visiting_rank(is_visited: Tensor, order: str) -> Tensor:
    """(query blocks, key blocks): the place of each block in the order; blocks not visited have one, which says nothing
    since their scores are -inf."""
    num_blocks = is_visited.shape[-1]
    index = torch.arange(num_blocks, device=is_visited.device).expand(is_visited.shape)
    first = is_visited.to(torch.uint8).argmax(-1, keepdim=True)
    last = num_blocks - 1 - is_visited.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    match order:
        case "ascending":
            return index
        case "descending":
            return num_blocks - 1 - index
        case "diagonal_first":
            return torch.where(index == last, 0, index + 1)
        case "first_then_descending":
            return torch.where(index == first, 0, num_blocks - index)
    raise ValueError(f"order: {order!r} given; accepted are {VISIT_ORDERS}")
