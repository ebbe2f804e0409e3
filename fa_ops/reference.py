"""The oracle: attention over sequences of different lengths in plain, differentiable torch.

One sequence at a time, one line per equation, any device, float64 inside:

    s = softmax_scale * q @ k^T, -inf where not visible      lse = log(sum(exp(s)))
    p = exp(s - lse)                                         out = (p @ v) / sum(p)

A softcap makes s softcap * tanh(s / softcap) before the mask; a sink is one more column of s, which has no value.
sum(p) is 1 up to rounding. Dividing by it keeps the result normalised in a low precision too, and gives the gradient
of s the form p * (dp - delta) that flash attention computes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


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
    left, right = window_size
    distance = torch.arange(len_k, device=device) - torch.arange(len_k - len_q, len_k, device=device)[:, None]
    mask = torch.ones(len_q, len_k, dtype=torch.bool, device=device)
    if left >= 0:
        mask &= distance >= -left
    if right >= 0:
        mask &= distance <= right
    if is_causal:
        mask &= distance <= 0
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
    skip_softmax_threshold: Tensor | None = None,
    skip_softmax_block: tuple[int, int] = (64, 128),
    return_lse: bool = False,
    return_skip_counts: bool = False,
    upcast: bool = True,
    reorder_ops: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What `fa_ops.attention` computes, written to be read and trusted rather than to be fast.

    Arguments and layouts are those of `fa_ops.attention`; float64 is accepted as well. Memory is quadratic in the
    lengths, and lengths are read on the host. The maximum lengths and `deterministic` have no influence.

    Args:
        upcast: compute in float64, so that each result carries one rounding, to its own dtype. False computes in the
            dtype of the inputs, rounding after every operation: the yardstick of what plain torch reaches there.
        reorder_ops: do the same operations in another order, which rounds elsewhere.

    Returns:
        out, (total_q, Hq, Dv) or (B, Sq, Hq, Dv), in q's dtype. With `return_lse` also lse, (Hq, total_q) or
        (B, Hq, Sq), natural logarithm, float64 for float64 inputs and float32 for all others. Queries that see no key
        and rows of no sequence have out 0, lse -inf and gradients of exactly 0, whatever gradient arrives there; with
        sinks, lse is the sink for queries that see no key.

    Raises:
        NotImplementedError: for `skip_softmax_threshold` and `return_skip_counts`.
    """
    _refuse_unsupported(skip_softmax_threshold, return_skip_counts)
    if b_start_loc_k is None or b_seq_len_k is None:
        b_start_loc_k, b_seq_len_k = b_start_loc, b_seq_len
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    attend = _attend_reordered if reorder_ops else _attend
    compute_dtype = torch.float64 if upcast else q.dtype
    q_rows, k_rows, v_rows = (_as_rows(t).to(compute_dtype) for t in (q, k, v))
    key_mask_rows = None if key_mask is None else key_mask.flatten()
    own_sinks = None if sinks is None else sinks.to(compute_dtype).unflatten(0, (k.shape[-2], -1))

    seen_rows, outs, lses = [], [], []
    for rows_q, rows_k in zip(
        sequence_rows(q, b_start_loc, b_seq_len), sequence_rows(k, b_start_loc_k, b_seq_len_k), strict=True
    ):
        own_key_mask = None if key_mask_rows is None else key_mask_rows[rows_k]
        mask = visible(len(rows_q), len(rows_k), is_causal, own_key_mask, q.device, window_size)
        # Without the rows and keys that take no part, NaN in them reaches neither results nor gradients.
        sees, is_seen = mask.any(1) | (sinks is not None), mask.any(0)
        rows_q, rows_k = rows_q[sees], rows_k[is_seen]
        scores = Scores(mask[sees][:, is_seen], scale, softcap, own_sinks)
        out, lse = attend(q_rows[rows_q], k_rows[rows_k], v_rows[rows_k], scores)
        seen_rows.append(rows_q)
        outs.append(out)
        lses.append(lse)

    rows = torch.cat(seen_rows)
    out = q_rows.new_zeros(*q_rows.shape[:2], v.shape[-1]).index_copy(0, rows, torch.cat(outs))
    out = out.to(q.dtype).unflatten(0, q.shape[:-2])
    if not return_lse:
        return out
    lse = q_rows.new_full(q_rows.shape[:2], -torch.inf).index_copy(0, rows, torch.cat(lses))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, lse.to(lse_dtype).unflatten(0, q.shape[:-2]).transpose(-1, -2).contiguous()


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


def _as_rows(t: Tensor) -> Tensor:
    return t.flatten(0, 1) if t.dim() == 4 else t


class Scores(NamedTuple):
    """What makes scores of q and k: mask (rows, keys) bool, scale, cap (0 for none), sinks (Hkv, Hq / Hkv)."""

    mask: Tensor
    scale: float
    softcap: float
    sinks: Tensor | None

    def finish(self, s: Tensor, mask: Tensor) -> Tensor:
        """(rows, Hkv, group, keys) capped and masked, and with the sinks as one more column."""
        if self.softcap:
            s = self.softcap * torch.tanh(s / self.softcap)
        s = s.masked_fill(~mask[:, None, None, :], -torch.inf)
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
    mask = scores.mask.flip(0, 1)
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


def _refuse_unsupported(skip_softmax_threshold: Tensor | None, return_skip_counts: bool) -> None:
    if return_skip_counts:
        raise NotImplementedError("return_skip_counts: True given; not implemented yet, pass False")
    if skip_softmax_threshold is not None:
        raise NotImplementedError("skip_softmax_threshold: a Tensor given; not implemented yet, pass None")
