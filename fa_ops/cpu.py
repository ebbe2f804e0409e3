"""The CPU path: per sequence, PyTorch's flash attention for CPU, in memory linear in the length.

Every case is brought to one form: after the keys that a hole hides are left out, row i sees the keys from `low[i]` to
`high[i]`, and neither ever falls. Rows that see nothing are set apart. What remains is one call of flash attention
where that knows the mask (none, or a causal square), and a call for each block of rows where it does not. Plain torch
steps in for what flash attention on CPU cannot do: softcaps, value heads of another size than keys, and a gradient of
lse.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fa_ops.cpu_pages import gather_pages

ROW_BLOCK = 256
PLAIN_BLOCK_ELEMENTS = 1 << 21

# the binding costs 3 us a call less than torch.ops; the backward has none
flash_forward = torch._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Run(NamedTuple):
    """Neighbouring batch rows with equal ranges, or one packed sequence: its rows and keys, each (first, end)."""

    seq: int
    num_seqs: int
    rows: tuple[int, int]
    keys: tuple[int, int]
    kept: Tensor | None  # keys of the range that key_mask leaves, where it hides any

    @property
    def num_rows(self) -> int:
        return self.rows[1] - self.rows[0]

    @property
    def num_keys(self) -> int:
        return self.keys[1] - self.keys[0] if self.kept is None else self.kept.shape[0]


class Block(NamedTuple):
    """Rows of a run that one call computes, the keys that any of them sees, and which of these each row sees."""

    row: int
    row_end: int
    key: int
    key_end: int
    is_causal: bool
    seen: tuple[Tensor, Tensor] | None  # low and high, (rows,), where the rows do not all see all, and not causally

    def hidden(self, first: int, end: int) -> Tensor | None:
        """(end - first, keys) bool for these rows of the block, True for keys that a row does not see."""
        if self.is_causal:
            return torch.arange(self.key_end) > torch.arange(first, end)[:, None]
        if self.seen is None:
            return None
        low, high = (bound[first:end, None] for bound in self.seen)
        keys = torch.arange(self.key, self.key_end)
        return (keys < low) | (keys >= high)


def varlen_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, sinks: Tensor | None, block_table: Tensor | None,
    scale: float, softcap: float, left: int, right: int,
    out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Fills `out` and `lse`, which are laid out as `fa_ops_meta.outputs` says."""
    if block_table is not None:
        k, v, start_k, length_k = gather_pages(q, k, v, block_table, length_k)
    q, scale, _ = _with_positive_scale(q, scale)
    is_flash = q.shape[-1] == v.shape[-1] and softcap == 0.0
    runs = list(_runs(q, k, start, length, start_k, length_k, key_mask, is_flash))
    blocks = [list(_blocks(run, left, right)) for run in runs]
    num_written = sum(
        run.num_seqs * (block.row_end - block.row)
        for run, run_blocks in zip(runs, blocks, strict=True)
        for block in run_blocks
    )
    if num_written < lse.numel() // max(1, q.shape[-2]):
        out.zero_()
        lse.fill_(float("-inf"))
    row_views = _views(runs, [run.rows for run in runs], (head_major(q), head_major(out), batched(lse)))
    key_views = _views(runs, [run.keys for run in runs], (head_major(k), head_major(v)))
    for run, run_blocks, (q_run, out_run, lse_run), (k_run, v_run) in zip(
        runs, blocks, row_views, key_views, strict=True
    ):
        if run.kept is not None:
            k_run, v_run = k_run[:, :, run.kept], v_run[:, :, run.kept]
        for block in run_blocks:
            tensors = _rows(q_run, run, block), _keys(k_run, run, block), _keys(v_run, run, block)
            if is_flash:
                mask = _additive_mask(block, q.dtype)
                block_out, block_lse = flash_forward(*tensors, 0.0, block.is_causal, attn_mask=mask, scale=scale)
            else:
                block_out, block_lse = _plain_attend(*tensors, block, scale, softcap)
            _rows(out_run, run, block).copy_(block_out)
            _rows(lse_run, run, block).copy_(block_lse)
        if sinks is not None:
            _add_sinks(out_run, lse_run, sinks)


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """One more score for every row, with no value."""
    after = torch.logaddexp(lse, sinks.float()[:, None])
    out.copy_(out * torch.where(lse == float("-inf"), 0.0, torch.exp(lse - after))[..., None])
    lse.copy_(after)


def varlen_attention_backward_cpu(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor,
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, left: int, right: int,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Fills `dq`, `dk` and `dv`."""
    for grad in (dq, dk, dv):
        grad.zero_()
    q, scale, factor = _with_positive_scale(q, scale)
    is_flash = q.shape[-1] == v.shape[-1] and softcap == 0.0 and dlse is None
    runs = list(_runs(q, k, start, length, start_k, length_k, key_mask, is_flash))
    lses = [batched(t) for t in (lse, dlse) if t is not None]
    row_views = _views(runs, [run.rows for run in runs], (*map(head_major, (dout, q, out, dq)), *lses))
    key_views = _views(runs, [run.keys for run in runs], tuple(map(head_major, (k, v, dk, dv))))
    for run, (dout_run, q_run, out_run, dq_run, lse_run, *dlse_run), (k_run, v_run, dk_run, dv_run) in zip(
        runs, row_views, key_views, strict=True
    ):
        if run.kept is not None:
            k_run, v_run = k_run[:, :, run.kept], v_run[:, :, run.kept]
        sums = _KeyGradients(run)
        for block in _blocks(run, left, right):
            tensors = (
                _rows(dout_run, run, block), _rows(q_run, run, block),
                _keys(k_run, run, block), _keys(v_run, run, block),
                _rows(out_run, run, block), _rows(lse_run, run, block),
            )  # fmt: skip
            if is_flash:
                mask = _additive_mask(block, q.dtype)
                grads = flash_backward(*tensors, 0.0, block.is_causal, attn_mask=mask, scale=scale)
            else:
                block_dlse = _rows(dlse_run[0], run, block) if dlse_run else None
                grads = _plain_gradients(*tensors, block_dlse, block, scale, softcap)
            _rows(dq_run, run, block).copy_(grads[0])
            sums.add(block, grads[1:])
        sums.store(dk_run, dv_run)
    if factor != 1.0:
        dq *= factor


class _KeyGradients:
    """dk and dv of a run: those of its one block, or the sum over its blocks in float32."""

    def __init__(self, run: Run):
        self.run = run
        self.totals: list[Tensor] = []

    def add(self, block: Block, grads: tuple[Tensor, Tensor]) -> None:
        num_keys = self.run.num_keys
        if block.row_end - block.row == self.run.num_rows and block.key_end - block.key == num_keys:
            self.totals = list(grads)
            return
        if not self.totals:
            shapes = [(*grad.shape[:2], num_keys, grad.shape[3]) for grad in grads]
            self.totals = [torch.zeros(shape, dtype=torch.float32) for shape in shapes]
        for total, grad in zip(self.totals, grads, strict=True):
            total[:, :, block.key : block.key_end] += grad

    def store(self, dk: Tensor, dv: Tensor) -> None:
        for target, total in zip((dk, dv), self.totals, strict=False):
            if self.run.kept is None:
                target.copy_(total)
            else:
                target[:, :, self.run.kept] = total.to(target.dtype)


def _with_positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float, float]:
    """(q', scale', factor) with q' = factor * q and factor * scale' = scale: flash attention on CPU masks with -inf
    before it multiplies, so a scale that is not positive would give NaN."""
    if scale > 0.0:
        return q, scale, 1.0
    factor, scale = (-1.0, -scale) if scale < 0.0 else (0.0, 1.0)
    return q * factor, scale, factor


def head_major(t: Tensor) -> Tensor:
    """(B, H, S, D) of a padded (B, S, H, D) or packed (total, H, D) tensor; packed ones have B = 1."""
    return (t if t.dim() == 4 else t.unsqueeze(0)).transpose(1, 2)


def batched(lse: Tensor) -> Tensor:
    """(B, H, S) of lse; packed ones have B = 1."""
    return lse if lse.dim() == 3 else lse.unsqueeze(0)


def _views(runs: list[Run], ranges: list[tuple[int, int]], tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Of each run its range of (B, H, S, D) and (B, H, S) tensors, all of one B and S.

    One split where the ranges tile the tensors, as in most packed batches: half the cost of cutting each out.
    """
    if _are_tiles(runs, ranges, tensors[0]):
        sizes = [end - first for first, end in ranges]
        return zip(*(t.split_with_sizes(sizes, 2) for t in tensors), strict=True)
    return (tuple(_slice(t, run, *ends) for t in tensors) for run, ends in zip(runs, ranges, strict=True))


def _slice(t: Tensor, run: Run, first: int, end: int) -> Tensor:
    """The rows [first, end) of a run, of a (B, H, S, D) or (B, H, S) tensor."""
    if t.shape[0] != run.num_seqs:
        t = t.narrow(0, run.seq, run.num_seqs)
    return t.narrow(2, first, end - first)


def _are_tiles(runs: list[Run], ranges: list[tuple[int, int]], t: Tensor) -> bool:
    """Whether the ranges of the runs, one after the other, make up the whole of t."""
    num_seqs, _, size = t.shape[:3]
    tiled = 0
    for run, (first, end) in zip(runs, ranges, strict=True):
        if run.num_seqs != num_seqs or first != tiled:
            return False
        tiled = end
    return tiled == size


def _rows(t: Tensor, run: Run, block: Block) -> Tensor:
    num_rows = block.row_end - block.row
    return t if num_rows == run.num_rows else t.narrow(2, block.row, num_rows)


def _keys(t: Tensor, run: Run, block: Block) -> Tensor:
    num_keys = block.key_end - block.key
    return t if num_keys == run.num_keys else t.narrow(2, block.key, num_keys)


def _runs(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, is_flash: bool,
) -> Iterator[Run]:  # fmt: skip
    """Sequences with rows, ranges clamped into the tensors; equal neighbours in a padded batch as one where flash
    attention computes them, whose results do not depend on the size of a batch."""
    is_packed = q.dim() == 3
    is_grouped = is_flash and not is_packed and key_mask is None
    ranges = sequence_ranges(q, k, start, length, start_k, length_k)
    seq = 0
    while seq < len(ranges):
        row, row_end, key, key_end = ranges[seq]
        end = seq + 1
        while is_grouped and end < len(ranges) and ranges[end] == ranges[seq]:
            end += 1
        if row < row_end:
            kept = None
            if key_mask is not None and not key_mask[seq, key:key_end].all():
                kept = key_mask[seq, key:key_end].nonzero().squeeze(1)
            yield Run(0 if is_packed else seq, end - seq, (row, row_end), (key, key_end), kept)
        seq = end


def sequence_ranges(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor
) -> list[tuple[int, int, int, int]]:
    """(first row, end, first key, end) of each sequence, clamped into the tensors."""
    rows_q, rows_k = q.shape[-3], k.shape[-3]
    ranges = []
    for first, count, first_k, count_k in zip(
        start.tolist(), length.tolist(), start_k.tolist(), length_k.tolist(), strict=True
    ):
        row, key = min(max(first, 0), rows_q), min(max(first_k, 0), rows_k)
        ranges.append((row, min(row + max(count, 0), rows_q), key, min(key + max(count_k, 0), rows_k)))
    return ranges


def _blocks(run: Run, left: int, right: int) -> Iterator[Block]:
    """Blocks of the rows that see a key."""
    len_q, len_k, num_keys = run.num_rows, run.keys[1] - run.keys[0], run.num_keys
    if num_keys == 0:
        return
    offset = len_k - len_q
    if left < 0 and right < 0:
        yield Block(0, len_q, 0, num_keys, False, None)
        return
    if run.kept is None and left < 0 and right == 0 and offset <= 0:
        yield Block(-offset, len_q, 0, num_keys, True, None)
        return
    position = torch.arange(offset, len_k)
    low = (position - left if left >= 0 else torch.zeros_like(position)).clamp(0, len_k)
    high = (position + right + 1 if right >= 0 else torch.full_like(position, len_k)).clamp(0, len_k)
    if run.kept is not None:
        low, high = torch.searchsorted(run.kept, low), torch.searchsorted(run.kept, high)
    for first, last in _stretches(low < high):
        for row in range(first, last, ROW_BLOCK):
            end = min(row + ROW_BLOCK, last)
            key, key_end = int(low[row]), int(high[end - 1])
            is_whole = int(low[end - 1]) == key and int(high[row]) == key_end
            yield Block(row, end, key, key_end, False, None if is_whole else (low[row:end], high[row:end]))


def _stretches(flags: Tensor) -> Iterator[tuple[int, int]]:
    """(first, end) of each stretch of True."""
    values, counts = torch.unique_consecutive(flags, return_counts=True)
    end = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        end += count
        if value:
            yield end - count, end


def _additive_mask(block: Block, dtype: torch.dtype) -> Tensor | None:
    """What flash attention's own causal mask does not say; it takes masks in q's dtype only."""
    hidden = None if block.is_causal else block.hidden(0, block.row_end - block.row)
    return None if hidden is None else torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))


def _plain_scores(
    q: Tensor, k: Tensor, block: Block, scale: float, softcap: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
    """Rows of the block, a piece at a time: (rows, their queries grouped by key head, masked float32 scores, and of a
    softcap the tanh)."""
    batch, heads, rows, dim = q.shape
    heads_kv, keys = k.shape[1], k.shape[2]
    piece = max(1, PLAIN_BLOCK_ELEMENTS // (batch * heads * keys))
    for row in range(0, rows, piece):
        part = slice(row, min(row + piece, rows))
        grouped = q[:, :, part].float().reshape(batch, heads_kv, -1, dim)
        scores = grouped @ k.transpose(-1, -2) * scale
        tanh = None
        if softcap > 0.0:
            tanh = torch.tanh(scores / softcap)
            scores = softcap * tanh
        hidden = block.hidden(part.start, part.stop)
        if hidden is not None:
            scores.view(batch, heads, -1, keys).masked_fill_(hidden, float("-inf"))
        yield part, grouped, scores, tanh


def _plain_attend(q: Tensor, k: Tensor, v: Tensor, block: Block, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    k, v = k.float(), v.float()
    outs, lses = [], []
    for _, _, scores, _ in _plain_scores(q, k, block, scale, softcap):
        lse = scores.logsumexp(-1, keepdim=True)
        outs.append((torch.exp(scores - lse) @ v).view(*q.shape[:2], -1, v.shape[-1]))
        lses.append(lse.view(*q.shape[:2], -1))
    return torch.cat(outs, 2).to(q.dtype), torch.cat(lses, 2)


def _plain_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
    block: Block, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dS = P * (dO V^T - delta) with delta = rowsum(dO * O) - dlse."""
    k, v = k.float(), v.float()
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (dout.float() * out.float()).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    batch, heads_kv = k.shape[:2]
    for part, grouped, scores, tanh in _plain_scores(q, k, block, scale, softcap):
        p = torch.exp(scores - lse[:, :, part].reshape(batch, heads_kv, -1, 1))
        dout_part = dout[:, :, part].float().reshape(batch, heads_kv, -1, v.shape[-1])
        ds = p * (dout_part @ v.transpose(-1, -2) - delta[:, :, part].reshape(batch, heads_kv, -1, 1))
        if tanh is not None:
            ds *= 1.0 - tanh * tanh
        dv += p.transpose(-1, -2) @ dout_part
        dk += ds.transpose(-1, -2) @ grouped * scale
        dq[:, :, part] = (ds @ k * scale).view(*q.shape[:2], -1, q.shape[-1]).to(q.dtype)
    return dq, dk, dv
