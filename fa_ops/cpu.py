"""The CPU path: per sequence, PyTorch's flash attention for CPU, in memory linear in the length.

Every case is brought to one form: after the keys that a hole hides are left out, row i sees the first `limit[i]` keys,
and limit never falls. Rows with a limit of 0 are therefore the first ones, and are set apart. What remains is one call
of flash attention where that knows the mask (none, or a causal square), and a call for each block of rows where it does
not. Plain torch steps in for what flash attention on CPU cannot do: value heads of another size than keys, and a
gradient of lse.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROW_BLOCK = 256
PLAIN_BLOCK_ELEMENTS = 1 << 21

flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Run(NamedTuple):
    """Neighbouring batch rows with the same ranges (one sequence, if packed): rows and keys, first and end."""

    batch: slice
    row: int
    row_end: int
    key: int
    key_end: int
    kept: Tensor | None  # keys inside the range that key_mask leaves, where it hides any


class Block(NamedTuple):
    """Rows of a run that one call computes, the keys they see, and what is left to mask."""

    rows: slice
    keys: slice
    is_causal: bool
    mask: Tensor | None  # (rows, keys) bool


def varlen_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, is_causal: bool, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fills `out` and `lse`, which are laid out as `fa_ops_meta.outputs` says."""
    out.zero_()
    lse.fill_(float("-inf"))
    q, scale, _ = _with_positive_scale(q, scale)
    qh, kh, vh, outh = map(_head_major, (q, k, v, out))
    lseh = lse if lse.dim() == 3 else lse.unsqueeze(0)
    attend = _flash_attend if q.shape[-1] == v.shape[-1] else _plain_attend
    for run in _runs(q, k, start, length, start_k, length_k, key_mask):
        q_run = qh[run.batch, :, run.row : run.row_end]
        k_run, v_run = _keys_of(kh, run), _keys_of(vh, run)
        for block in _blocks(run, k_run.shape[2], is_causal, q.device):
            block_out, block_lse = attend(
                q_run[:, :, block.rows], k_run[:, :, block.keys], v_run[:, :, block.keys], block, scale
            )
            rows = slice(run.row + block.rows.start, run.row + block.rows.stop)
            outh[run.batch, :, rows] = block_out
            lseh[run.batch, :, rows] = block_lse


def varlen_attention_backward_cpu(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, is_causal: bool, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Fills `dq`, `dk` and `dv`."""
    for grad in (dq, dk, dv):
        grad.zero_()
    q, scale, factor = _with_positive_scale(q, scale)
    qh, kh, vh, outh, douth = map(_head_major, (q, k, v, out, dout))
    dqh, dkh, dvh = map(_head_major, (dq, dk, dv))
    lseh, dlseh = (t if t is None or t.dim() == 3 else t.unsqueeze(0) for t in (lse, dlse))
    is_flash = q.shape[-1] == v.shape[-1] and dlse is None
    for run in _runs(q, k, start, length, start_k, length_k, key_mask):
        k_run, v_run = _keys_of(kh, run), _keys_of(vh, run)
        blocks = list(_blocks(run, k_run.shape[2], is_causal, q.device))
        # one block: its gradients are the run's; several: their sum, in float32
        sums = [torch.zeros(t.shape, dtype=torch.float32) for t in (k_run, v_run)] if len(blocks) > 1 else []
        for block in blocks:
            rows = slice(run.row + block.rows.start, run.row + block.rows.stop)
            at = (run.batch, slice(None), rows)
            tensors = (douth[at], qh[at], k_run[:, :, block.keys], v_run[:, :, block.keys], outh[at], lseh[at])
            if is_flash:
                mask = _additive(block.mask, q.dtype)
                grads = flash_backward(*tensors, 0.0, block.is_causal, attn_mask=mask, scale=scale)
            else:
                grads = _plain_gradients(*tensors, None if dlseh is None else dlseh[at], block, scale)
            dqh[at] = grads[0]
            for total, grad in zip(sums, grads[1:], strict=False):
                total[:, :, block.keys] += grad
        for target, grad in zip((dkh, dvh), sums or (grads[1:] if blocks else ()), strict=False):
            if run.kept is None:
                target[run.batch, :, run.key : run.key + grad.shape[2]] = grad
            else:
                target[run.batch, :, run.key + run.kept[: grad.shape[2]]] = grad.to(target.dtype)
    if factor != 1.0:
        dq *= factor


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q', scale', factor) with q' = factor * q and factor * scale' = scale: flash attention on CPU masks with -inf
    before it multiplies, so a scale that is not positive would give NaN."""
    if scale > 0.0:
        return q, scale, 1.0
    factor, scale = (-1.0, -scale) if scale < 0.0 else (0.0, 1.0)
    return q * factor, scale, factor


def _head_major(t: Tensor) -> Tensor:
    """(B, H, S, D) of a padded (B, S, H, D) or packed (total, H, D) tensor; packed ones have B = 1."""
    return (t if t.dim() == 4 else t.unsqueeze(0)).transpose(1, 2)


def _keys_of(t: Tensor, run: Run) -> Tensor:
    keys = t[run.batch, :, run.key : run.key_end]
    return keys if run.kept is None else keys[:, :, run.kept]


def _runs(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor, key_mask: Tensor | None
) -> Iterator[Run]:
    """Sequences with rows and keys, ranges clamped into the tensors; equal neighbours in a padded batch as one."""
    is_packed = q.dim() == 3
    ranges = []
    for first, count, first_k, count_k in zip(
        start.tolist(), length.tolist(), start_k.tolist(), length_k.tolist(), strict=True
    ):
        row, key = (min(max(x, 0), t.shape[-3]) for x, t in ((first, q), (first_k, k)))
        row_end, key_end = min(row + max(count, 0), q.shape[-3]), min(key + max(count_k, 0), k.shape[-3])
        ranges.append((row, row_end, key, key_end))
    seq = 0
    while seq < len(ranges):
        row, row_end, key, key_end = ranges[seq]
        kept = None if key_mask is None else _kept(key_mask[seq, key:key_end])
        end = seq + 1
        while not is_packed and key_mask is None and end < len(ranges) and ranges[end] == ranges[seq]:
            end += 1
        if row < row_end and key < key_end:
            yield Run(slice(0, 1) if is_packed else slice(seq, end), row, row_end, key, key_end, kept)
        seq = end


def _kept(mask: Tensor) -> Tensor | None:
    return None if bool(mask.all()) else mask.nonzero().squeeze(1)


def _blocks(run: Run, num_keys: int, is_causal: bool, device: torch.device) -> Iterator[Block]:
    """Blocks of the rows that see a key. `num_keys` is the number of keys that the mask leaves."""
    len_q, len_k = run.row_end - run.row, run.key_end - run.key
    if num_keys == 0:
        return
    if not is_causal:
        yield Block(slice(0, len_q), slice(0, num_keys), False, None)
        return
    offset = len_k - len_q
    if run.kept is None and offset <= 0:
        yield Block(slice(-offset, len_q), slice(0, num_keys), True, None)
        return
    limit = torch.arange(offset + 1, len_k + 1, device=device)
    if run.kept is not None:
        limit = torch.searchsorted(run.kept, limit)
    first = int((limit <= 0).sum())
    for row in range(first, len_q, ROW_BLOCK):
        end = min(row + ROW_BLOCK, len_q)
        fewest, most = int(limit[row]), int(limit[end - 1])
        mask = None
        if fewest < most:
            mask = torch.arange(most, device=device) < limit[row:end, None]
        yield Block(slice(row, end), slice(0, most), False, mask)


def _flash_attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    return flash_forward(q, k, v, 0.0, block.is_causal, attn_mask=_additive(block.mask, q.dtype), scale=scale)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Flash attention on CPU takes masks in q's dtype only."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))


def _plain_scores(
    q: Tensor, k: Tensor, block: Block, scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the block, a piece at a time: (rows, their queries grouped by key head, masked float32 scores)."""
    batch, heads, rows, dim = q.shape
    heads_kv, keys = k.shape[1], k.shape[2]
    piece = max(1, PLAIN_BLOCK_ELEMENTS // (batch * heads * keys))
    for row in range(0, rows, piece):
        part = slice(row, min(row + piece, rows))
        grouped = q[:, :, part].float().reshape(batch, heads_kv, -1, dim)
        scores = (grouped @ k.transpose(-1, -2) * scale).view(batch, heads_kv, heads // heads_kv, -1, keys)
        if block.mask is not None:
            scores.masked_fill_(~block.mask[part], float("-inf"))
        elif block.is_causal:
            hidden = torch.ones(part.stop - part.start, keys, dtype=torch.bool, device=q.device).triu(row + 1)
            scores.masked_fill_(hidden, float("-inf"))
        yield part, grouped, scores.view(batch, heads_kv, -1, keys)


def _plain_attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    k, v = k.float(), v.float()
    outs, lses = [], []
    for _, _, scores in _plain_scores(q, k, block, scale):
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append((torch.exp(scores - lse) @ v).view(*q.shape[:2], -1, v.shape[-1]))
        lses.append(lse.view(*q.shape[:2], -1))
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _plain_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    block: Block, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dS = P * (dO V^T - delta) with delta = rowsum(dO * O) - dlse."""
    k, v = k.float(), v.float()
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    batch, heads_kv = k.shape[:2]
    for part, grouped, scores in _plain_scores(q, k, block, scale):
        p = torch.exp(scores - lse[:, :, part].reshape(batch, heads_kv, -1, 1))
        dout_part = dout[:, :, part].float().reshape(batch, heads_kv, -1, v.shape[-1])
        ds = p * (dout_part @ v.transpose(-1, -2) - delta[:, :, part].reshape(batch, heads_kv, -1, 1))
        dv += p.transpose(-1, -2) @ dout_part
        dk += ds.transpose(-1, -2) @ grouped * scale
        dq[:, :, part] = (ds @ k * scale).view(*q.shape[:2], -1, q.shape[-1]).to(q.dtype)
    return dq, dk, dv
