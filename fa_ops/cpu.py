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
    """Neighbouring batch rows with equal ranges, or one packed sequence: rows and keys, first and end."""

    seq: int
    num_seqs: int
    row: int
    row_end: int
    key: int
    key_end: int
    kept: Tensor | None  # keys of the range that key_mask leaves, where it hides any

    @property
    def num_keys(self) -> int:
        return self.key_end - self.key if self.kept is None else self.kept.shape[0]


class Block(NamedTuple):
    """Rows of a run that one call computes, the end of the keys that they see, and how many of these each row sees."""

    row: int
    row_end: int
    key_end: int
    is_causal: bool
    limit: Tensor | None  # (rows,), where neither all rows see all keys nor is_causal says it

    def hidden(self, first: int, end: int) -> Tensor | None:
        """(end - first, keys) bool for these rows of the block, True for keys that a row does not see."""
        limit = self.limit
        if self.is_causal:
            limit = torch.arange(1, self.row_end - self.row + 1)
        return None if limit is None else torch.arange(self.key_end) >= limit[first:end, None]


def varlen_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, is_causal: bool, scale: float, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fills `out` and `lse`, which are laid out as `fa_ops_meta.outputs` says."""
    q, scale, _ = _with_positive_scale(q, scale)
    attend = _flash_attend if q.shape[-1] == v.shape[-1] else _plain_attend
    jobs = [
        (run, block)
        for run in _runs(q, k, start, length, start_k, length_k, key_mask)
        for block in _blocks(run, is_causal)
    ]
    if sum(run.num_seqs * (block.row_end - block.row) for run, block in jobs) < lse.numel() // max(1, q.shape[-2]):
        out.zero_()
        lse.fill_(float("-inf"))
    for run, block in jobs:
        block_out, block_lse = attend(_rows(q, run, block), _keys(k, run, block), _keys(v, run, block), block, scale)
        _rows(out, run, block).copy_(block_out)
        _lse_rows(lse, run, block).copy_(block_lse)


def varlen_attention_backward_cpu(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, is_causal: bool, scale: float, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Fills `dq`, `dk` and `dv`."""
    for grad in (dq, dk, dv):
        grad.zero_()
    q, scale, factor = _with_positive_scale(q, scale)
    is_flash = q.shape[-1] == v.shape[-1] and dlse is None
    for run in _runs(q, k, start, length, start_k, length_k, key_mask):
        blocks = list(_blocks(run, is_causal))
        sums = _KeyGradients(run, is_single=len(blocks) == 1)
        for block in blocks:
            tensors = (
                _rows(dout, run, block), _rows(q, run, block), _keys(k, run, block), _keys(v, run, block),
                _rows(out, run, block), _lse_rows(lse, run, block),
            )  # fmt: skip
            if is_flash:
                mask = _additive_mask(block, q.dtype)
                grads = flash_backward(*tensors, 0.0, block.is_causal, attn_mask=mask, scale=scale)
            else:
                grads = _plain_gradients(*tensors, None if dlse is None else _lse_rows(dlse, run, block), block, scale)
            _rows(dq, run, block).copy_(grads[0])
            sums.add(grads[1:])
        sums.store(dk, dv)
    if factor != 1.0:
        dq *= factor


class _KeyGradients:
    """dk and dv of a run: those of its one block, or the sum over its blocks in float32."""

    def __init__(self, run: Run, is_single: bool):
        self.run, self.is_single = run, is_single
        self.totals: list[Tensor] = []

    def add(self, grads: tuple[Tensor, Tensor]) -> None:
        if self.is_single:
            self.totals = list(grads)
            return
        if not self.totals:
            shapes = [(*grad.shape[:2], self.run.num_keys, grad.shape[3]) for grad in grads]
            self.totals = [torch.zeros(shape, dtype=torch.float32) for shape in shapes]
        for total, grad in zip(self.totals, grads, strict=True):
            total[:, :, : grad.shape[2]] += grad

    def store(self, dk: Tensor, dv: Tensor) -> None:
        run = self.run
        for target, total in zip((dk, dv), self.totals, strict=False):
            keys = _slice(target, run, run.key, run.key_end)
            if run.kept is None:
                keys[:, :, : total.shape[2]].copy_(total)
            else:
                keys[:, :, run.kept[: total.shape[2]]] = total.to(target.dtype)


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q', scale', factor) with q' = factor * q and factor * scale' = scale: flash attention on CPU masks with -inf
    before it multiplies, so a scale that is not positive would give NaN."""
    if scale > 0.0:
        return q, scale, 1.0
    factor, scale = (-1.0, -scale) if scale < 0.0 else (0.0, 1.0)
    return q * factor, scale, factor


def _slice(t: Tensor, run: Run, first: int, end: int) -> Tensor:
    """The rows [first, end) of a run as (sequences, H, rows, D)."""
    stride_b, stride_t, stride_h, stride_d = t.stride() if t.dim() == 4 else (0, *t.stride())
    offset = t.storage_offset() + run.seq * stride_b + first * stride_t
    return t.as_strided(
        (run.num_seqs, t.shape[-2], end - first, t.shape[-1]), (stride_b, stride_h, stride_t, stride_d), offset
    )


def _rows(t: Tensor, run: Run, block: Block) -> Tensor:
    return _slice(t, run, run.row + block.row, run.row + block.row_end)


def _keys(t: Tensor, run: Run, block: Block) -> Tensor:
    if run.kept is None:
        return _slice(t, run, run.key, run.key + block.key_end)
    return _slice(t, run, run.key, run.key_end)[:, :, run.kept[: block.key_end]]


def _lse_rows(lse: Tensor, run: Run, block: Block) -> Tensor:
    lse = lse if lse.dim() == 3 else lse.unsqueeze(0)
    return lse[run.seq : run.seq + run.num_seqs, :, run.row + block.row : run.row + block.row_end]


def _runs(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor, key_mask: Tensor | None
) -> Iterator[Run]:
    """Sequences with rows and keys, ranges clamped into the tensors; equal neighbours in a padded batch as one."""
    is_packed = q.dim() == 3
    rows_q, rows_k = q.shape[-3], k.shape[-3]
    ranges = []
    for first, count, first_k, count_k in zip(
        start.tolist(), length.tolist(), start_k.tolist(), length_k.tolist(), strict=True
    ):
        row, key = min(max(first, 0), rows_q), min(max(first_k, 0), rows_k)
        ranges.append((row, min(row + max(count, 0), rows_q), key, min(key + max(count_k, 0), rows_k)))
    seq = 0
    while seq < len(ranges):
        row, row_end, key, key_end = ranges[seq]
        end = seq + 1
        while not is_packed and key_mask is None and end < len(ranges) and ranges[end] == ranges[seq]:
            end += 1
        if row < row_end and key < key_end:
            kept = None
            if key_mask is not None and not key_mask[seq, key:key_end].all():
                kept = key_mask[seq, key:key_end].nonzero().squeeze(1)
            yield Run(0 if is_packed else seq, end - seq, row, row_end, key, key_end, kept)
        seq = end


def _blocks(run: Run, is_causal: bool) -> Iterator[Block]:
    """Blocks of the rows that see a key."""
    len_q, len_k = run.row_end - run.row, run.key_end - run.key
    num_keys = run.num_keys
    if num_keys == 0:
        return
    if not is_causal:
        yield Block(0, len_q, num_keys, False, None)
        return
    offset = len_k - len_q
    if run.kept is None and offset <= 0:
        yield Block(-offset, len_q, num_keys, True, None)
        return
    limit = torch.arange(offset + 1, len_k + 1)
    if run.kept is not None:
        limit = torch.searchsorted(run.kept, limit)
    first = int((limit <= 0).sum())
    for row in range(first, len_q, ROW_BLOCK):
        end = min(row + ROW_BLOCK, len_q)
        fewest, most = int(limit[row]), int(limit[end - 1])
        yield Block(row, end, most, False, limit[row:end] if fewest < most else None)


def _flash_attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float) -> tuple[Tensor, Tensor]:
    return flash_forward(q, k, v, 0.0, block.is_causal, attn_mask=_additive_mask(block, q.dtype), scale=scale)


def _additive_mask(block: Block, dtype: torch.dtype) -> Tensor | None:
    """What flash attention's own causal mask does not say; it takes masks in q's dtype only."""
    hidden = None if block.is_causal else block.hidden(0, block.row_end - block.row)
    return None if hidden is None else torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _plain_scores(q: Tensor, k: Tensor, block: Block, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows of the block, a piece at a time: (rows, their queries grouped by key head, masked float32 scores)."""
    batch, heads, rows, dim = q.shape
    heads_kv, keys = k.shape[1], k.shape[2]
    piece = max(1, PLAIN_BLOCK_ELEMENTS // (batch * heads * keys))
    for row in range(0, rows, piece):
        part = slice(row, min(row + piece, rows))
        grouped = q[:, :, part].float().reshape(batch, heads_kv, -1, dim)
        scores = (grouped @ k.transpose(-1, -2) * scale).view(batch, heads_kv, heads // heads_kv, -1, keys)
        hidden = block.hidden(part.start, part.stop)
        if hidden is not None:
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
