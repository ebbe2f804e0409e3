"""The oracle: attention over sequences of different lengths in plain, differentiable torch.

One sequence at a time, one line per equation, any device, float64 inside:

    s = softmax_scale * q @ k^T, -inf where not visible      lse = log(sum(exp(s)))
    p = exp(s - lse)                                         out = (p @ v) / sum(p)

A softcap makes s softcap * tanh(s / softcap) before the mask; a sink is one more column of s, which has no value.
sum(p) is 1 up to rounding. Dividing by it keeps the result normalised in a low precision too, and gives the gradient
of s the form p * (dp - delta) that flash attention computes.

Skip-softmax (BLASST, arXiv 2512.12087) hides whole blocks of keys from blocks of rows: block c of a query block that
visits its blocks one after the other, iff m(i, c) - M(i) < ln(threshold) for each of its rows i that sees a key of c.
m(i, c) is the row's largest score in c, M(i) the largest in the blocks visited before.
"""

import math
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_ops_meta.skip import DECODE_SEGMENT, VISIT_ORDER, VISIT_ORDERS
from fa_ops_meta.window import window_bounds


def visible(
    len_q: int,
    len_k: int,
    is_causal: bool,
    key_mask: Tensor | None,
    device: torch.device,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """Which keys each query of one sequence sees: (len_q, len_k) bool.

    Aligned bottom-right: query i stands at key i + (len_k - len_q), and sees the keys from `window_size[0]` before to
    `window_size[1]` after it, -1 for all; causal is 0 after it. `key_mask` is the sequence's own, (len_k,) bool.
    """
    left, right = window_bounds(is_causal, *window_size)
    distance = torch.arange(len_k, device=device) - torch.arange(len_k - len_q, len_k, device=device)[:, None]
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    return mask if key_mask is None else mask & key_mask


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    max_input_len: int | None = None,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    max_input_len_k: int | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    deterministic: bool | None = None,
    skip_softmax_threshold: float | Tensor | None = None,
    skip_softmax_block: tuple[int, int] = (64, 128),
    return_lse: bool = False,
    return_skip_counts: bool = False,
    block_table: Tensor | None = None,
    upcast: bool = True,
    reorder_ops: bool = False,
    order: str = VISIT_ORDER,
) -> Tensor | tuple[Tensor, ...]:
    """What `fa_ops.attention` computes, written to be read and trusted rather than to be fast.

    Arguments and layouts are those of `fa_ops.attention`; float64 is accepted as well. Memory is quadratic in the
    lengths, and lengths are read on the host. The maximum lengths and `deterministic` have no influence.

    Args:
        upcast: compute in float64, so that each result carries one rounding, to its own dtype. False computes in the
            dtype of the inputs, rounding after every operation: the yardstick of what plain torch reaches there.
        reorder_ops: do the same operations in another order, which rounds elsewhere.
        skip_softmax_threshold: as in `fa_ops.attention`, but that any number outside (0, 1) drops nothing, without a
            warning. Which blocks are dropped is decided in float64, whatever `upcast` says.
        block_table: (B, max_pages), which makes k and v a paged cache, (pages, page size, Hkv, D): the keys of a
            sequence lie in the pages that its row names. ``b_start_loc_k`` is None then.
        order: in which order a query block visits its key blocks, one of `fa_ops_meta.skip.VISIT_ORDERS`.

    Returns:
        out, (total_q, Hq, Dv) or (B, Sq, Hq, Dv), in q's dtype. With `return_lse` also lse, (Hq, total_q) or
        (B, Hq, Sq), natural logarithm, float64 for float64 inputs and float32 for all others. Queries that see no key
        and rows of no sequence have out 0, lse -inf and gradients of exactly 0, whatever gradient arrives there; with
        sinks, lse is the sink for queries that see no key. With `return_skip_counts` also counts, (2, B, Hq) int64:
        blocks visited, blocks dropped. Gradients pass through the kept blocks; what is dropped is held constant.

    Raises:
        ValueError: for `return_skip_counts` without `skip_softmax_threshold`, and for an unknown order.
    """
    if return_skip_counts and skip_softmax_threshold is None:
        raise ValueError(
            "return_skip_counts: True given with skip_softmax_threshold None; dense attention counts nothing, pass a "
            "threshold or False"
        )
    if block_table is not None and b_seq_len_k is not None:
        k, v = (_without_pages(t, block_table, b_seq_len_k) for t in (k, v))
        b_start_loc_k = torch.zeros_like(b_seq_len_k)
    if b_start_loc_k is None or b_seq_len_k is None:
        b_start_loc_k, b_seq_len_k = b_start_loc, b_seq_len
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    attend = _attend_reordered if reorder_ops else _attend
    compute_dtype = torch.float64 if upcast else q.dtype
    q_rows, k_rows, v_rows = (_as_rows(t).to(compute_dtype) for t in (q, k, v))
    key_mask_rows = None if key_mask is None else key_mask.flatten()
    own_sinks = None if sinks is None else sinks.to(compute_dtype).unflatten(0, (k.shape[-2], -1))
    skips: list[SkipBlocks] = []
    if skip_softmax_threshold is not None:
        skips = skip_softmax_blocks(
            q, k, b_start_loc, b_seq_len, is_causal, softmax_scale, b_start_loc_k, b_seq_len_k,
            window_size=window_size, softcap=softcap, key_mask=key_mask,
            skip_softmax_threshold=skip_softmax_threshold, skip_softmax_block=skip_softmax_block, order=order,
        )  # fmt: skip

    seen_rows, outs, lses = [], [], []
    for rows_q, rows_k, skip in zip_longest(
        sequence_rows(q, b_start_loc, b_seq_len), sequence_rows(k, b_start_loc_k, b_seq_len_k), skips
    ):
        own_key_mask = None if key_mask_rows is None else key_mask_rows[rows_k]
        mask = visible(len(rows_q), len(rows_k), is_causal, own_key_mask, q.device, window_size)
        # Without the rows and keys that take no part, NaN in them reaches neither results nor gradients.
        sees, is_seen = mask.any(1) | (sinks is not None), mask.any(0)
        rows_q, rows_k = rows_q[sees], rows_k[is_seen]
        head_mask = mask[:, None, None]
        if skip is not None:
            head_mask = head_mask & skip.kept(mask.shape, skip_softmax_block).unflatten(1, (k.shape[-2], -1))
        scores = Scores(head_mask[sees][..., is_seen], scale, softcap, own_sinks)
        out, lse = attend(q_rows[rows_q], k_rows[rows_k], v_rows[rows_k], scores)
        seen_rows.append(rows_q)
        outs.append(out)
        lses.append(lse)

    rows = torch.cat(seen_rows)
    out = q_rows.new_zeros(*q_rows.shape[:2], v.shape[-1]).index_copy(0, rows, torch.cat(outs))
    results = [out.to(q.dtype).unflatten(0, q.shape[:-2])]
    if return_lse:
        lse = q_rows.new_full(q_rows.shape[:2], -torch.inf).index_copy(0, rows, torch.cat(lses))
        lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        results.append(lse.to(lse_dtype).unflatten(0, q.shape[:-2]).transpose(-1, -2).contiguous())
    if return_skip_counts:
        results.append(_skip_counts(skips, q))
    return results[0] if len(results) == 1 else tuple(results)


def sequence_rows(t: Tensor, starts: Tensor, lengths: Tensor) -> list[Tensor]:
    """For each sequence, the indices of its rows in `t` seen as (rows, H, D); an empty sequence is added at the end.

    That empty one gives every batch, B = 0 included, something to concatenate that autograd knows of.
    """
    batch_stride = t.shape[1] if t.dim() == 4 else 0
    ranges = [
        (start + b * batch_stride, n)
        for b, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
    ]
    return [torch.arange(start, start + n, device=t.device) for start, n in (*ranges, (0, 0))]


def _without_pages(t: Tensor, block_table: Tensor, lengths: Tensor) -> Tensor:
    """(pages, page size, H, D) -> (B, longest, H, D), the rows of each sequence in their order, and 0 behind them."""
    longest = max(lengths.tolist(), default=0)
    padded = t.new_zeros(len(lengths), longest, *t.shape[2:])
    for seq, (pages, n) in enumerate(zip(block_table.tolist(), lengths.tolist(), strict=True)):
        if n:
            rows = torch.cat([t[page] for page in pages[: -(-n // t.shape[1])]])[:n]
            padded[seq, :n] = rows
    return padded


def _as_rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1) if t.dim() == 4 else t


class Scores(NamedTuple):
    """What makes scores of q and k: mask (rows, 1 or Hkv, 1 or Hq / Hkv, keys) bool, scale, cap (0 for none), sinks
    (Hkv, Hq / Hkv)."""

    mask: Tensor
    scale: float
    softcap: float
    sinks: Tensor | None

    def finish(self, s: Tensor, mask: Tensor) -> Tensor:
        """(rows, Hkv, group, keys) capped and masked, and with the sinks as one more column."""
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        s = s.masked_fill(~mask, -torch.inf)
        if self.sinks is None:
            return s
        return torch.cat([s, self.sinks[None, ..., None].expand(*s.shape[:3], 1)], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """(rows, Hq, D), (keys, Hkv, D), (keys, Hkv, Dv) -> (rows, Hq, Dv), (rows, Hq)."""
    q = q.unflatten(1, (k.shape[1], -1))
    s = scores.finish(torch.einsum("qhgd,khd->qhgk", q, k) * scores.scale, scores.mask)
    lse = s.logsumexp(-1)
    p = torch.exp(s - lse.detach()[..., None])
    out = torch.einsum("qhgk,khd->qhgd", p[..., : len(k)], v) / p.sum(-1, keepdim=True)
    return out.flatten(1, 2), lse.flatten(1, 2)


def _attend_reordered(q: Tensor, k: Tensor, v: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """`_attend` in flash attention's order, where the gradient comes from p made anew of q, k and lse, and from
    delta = rowsum(dout * out); in base 2, the scale folded into q, every sum from its other end, v in halves."""
    q, k, v = q.flip(0).unflatten(1, (k.shape[1], -1)) * scores.scale, k.flip(0), v.flip(0)
    mask = scores.mask.flip(0, -1)
    s = scores.finish(torch.einsum("qhgd,khd->qhgk", q, k), mask)
    lse = s.logsumexp(-1)
    s_again = scores.finish(torch.einsum("qhgd,khd->qhgk", q.flip(-1), k.flip(-1)), mask)
    p, p_again = (torch.exp2((t - lse.detach()[..., None]) / math.log(2)) for t in (s.detach(), s_again))
    value = torch.einsum("qhgk,khd->qhgd", p[..., : len(k)], v.detach()) / p.sum(-1, keepdim=True)
    # its gradient is that of out: dp = dout v^T - delta
    halves = [torch.einsum("qhgk,khd->qhgd", p_again[..., : len(k)], half) for half in v.chunk(2, -1)]
    gradient = torch.cat(halves, -1) - p_again.sum(-1, keepdim=True) * value
    out = value + (gradient - gradient.detach())
    return out.flatten(1, 2).flip(0), lse.flatten(1, 2).flip(0)


class SkipBlocks(NamedTuple):
    """What skip-softmax makes of one sequence, each (Hq, query blocks, key blocks).

    margin is the largest m(i, c) - M(i) over the rows i that see a key of the block, +inf for the first of a row and
    for blocks that are not visited. No threshold changes it, and a block is dropped iff it is below ln(threshold).
    """

    visited: Tensor
    dropped: Tensor
    margin: Tensor

    def kept(self, shape: torch.Size, block: tuple[int, int]) -> Tensor:
        """(len_q, Hq, len_k) bool of shape (len_q, len_k): keys in blocks that are not dropped."""
        elements = (~self.dropped).repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)
        return elements[:, : shape[0], : shape[1]].transpose(0, 1)


def skip_softmax_blocks(
    q: Tensor,
    k: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    key_mask: Tensor | None = None,
    skip_softmax_threshold: float | Tensor | None = None,
    skip_softmax_block: tuple[int, int] = (64, 128),
    order: str = VISIT_ORDER,
) -> list[SkipBlocks]:
    """The blocks that `attention_reference` visits and drops, sequence by sequence, in float64; sinks take no part.

    Arguments are those of `attention_reference`; without a threshold nothing is dropped.

    Raises:
        ValueError: for an unknown order.
    """
    if order not in VISIT_ORDERS:
        raise ValueError(f"order: {order!r} given; accepted are {VISIT_ORDERS}")
    if b_start_loc_k is None or b_seq_len_k is None:
        b_start_loc_k, b_seq_len_k = b_start_loc, b_seq_len
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q_rows, k_rows = (_as_rows(t).detach().double() for t in (q, k))
    rows_of_k = sequence_rows(k, b_start_loc_k, b_seq_len_k)
    skips = []
    for seq, rows_q in enumerate(sequence_rows(q, b_start_loc, b_seq_len)[:-1]):
        rows_k = rows_of_k[seq]
        own_key_mask = None if key_mask is None else key_mask.flatten()[rows_k]
        mask = visible(len(rows_q), len(rows_k), is_causal, own_key_mask, q.device, window_size)
        own_q = q_rows[rows_q].unflatten(1, (k.shape[-2], -1))
        s = torch.einsum("qhgd,khd->qhgk", own_q, k_rows[rows_k]) * scale
        s = Scores(mask[:, None, None], scale, softcap, None).finish(s, mask[:, None, None])
        visited, margin = _margins(s.flatten(1, 2).transpose(0, 1), mask, skip_softmax_block, order)
        log_threshold = _log_threshold(skip_softmax_threshold, len(b_seq_len), q)[seq]
        skips.append(SkipBlocks(visited.expand_as(margin), margin < log_threshold[:, None, None], margin))
    return skips


def _margins(s: Tensor, mask: Tensor, block: tuple[int, int], order: str) -> tuple[Tensor, Tensor]:
    """Of masked scores (Hq, len_q, len_k): (query blocks, key blocks) visited, (Hq, query blocks, key blocks) margin.

    A single row restarts M in every segment of its keys, at what it is after the first block.
    """
    (br, bc), (heads, len_q, len_k) = block, s.shape
    tiles, blocks = -(-len_q // br), -(-len_k // bc)
    pad = (0, blocks * bc - len_k, 0, tiles * br - len_q)
    largest = F.pad(s, pad, value=-torch.inf).view(heads, tiles, br, blocks, bc).amax(-1)
    votes = F.pad(mask, pad).view(tiles, br, blocks, bc).any(-1)
    visited = votes.any(1)
    margin = s.new_full((heads, tiles, blocks), torch.inf)
    for tile in range(tiles):
        running = after_first = s.new_full((heads, br), -torch.inf)
        segment = None
        for position, c in enumerate(visit(visited[tile].nonzero().flatten().tolist(), order)):
            if len_q == 1 and c * bc // DECODE_SEGMENT != segment:
                segment, running = c * bc // DECODE_SEGMENT, after_first
            m = largest[:, tile, :, c]
            margin[:, tile, c] = (m - running).masked_fill(~votes[tile, :, c], -torch.inf).amax(-1)
            running = torch.maximum(running, m)
            if position == 0:
                after_first = running
    return visited, margin


def visit(blocks: list[int], order: str) -> list[int]:
    """The blocks, which ascend, in the order of their visit."""
    return {
        "ascending": blocks,
        "diagonal_first": blocks[-1:] + blocks[:-1],
        "first_then_descending": blocks[:1] + blocks[:0:-1],
        "descending": blocks[::-1],
    }[order]


def _log_threshold(threshold: float | Tensor | None, num_seqs: int, q: Tensor) -> Tensor:
    """(B, Hq) float64, -inf for what drops nothing; `threshold` is a number, (), (B,) or (B, Hq)."""
    lam = torch.as_tensor(0.0 if threshold is None else threshold, dtype=torch.float64, device=q.device)
    lam = lam.unsqueeze(-1).expand(num_seqs, q.shape[-2]) if lam.dim() < 2 else lam
    return torch.where((lam > 0) & (lam < 1), lam.log(), -torch.inf)


def _skip_counts(skips: list[SkipBlocks], q: Tensor) -> Tensor:
    """(2, B, Hq) int64, visited and dropped."""
    counts = torch.zeros(2, len(skips), q.shape[-2], dtype=torch.int64, device=q.device)
    for seq, skip in enumerate(skips):
        counts[:, seq] = torch.stack([skip.visited.sum((1, 2)), skip.dropped.sum((1, 2))])
    return counts
