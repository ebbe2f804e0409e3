"""Skip-softmax on the CPU: plain torch, some query blocks of a sequence at a time, in memory linear in the length.

A block of keys is dropped for a whole block of queries iff m - M < ln(threshold) for each row that sees a key of it: m
is the row's largest score in the block, M its largest in the blocks visited before. Blocks that are not visited hold no
score, so M is a running maximum over all blocks: from the first to the last or back, and of the block that is visited
first. `fa_ops.reference` walks through the same blocks one by one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fa_ops.cpu import PLAIN_BLOCK_ELEMENTS, batched, head_major, sequence_ranges
from fa_ops.cpu_pages import gather_pages
from fa_ops_meta.skip import BITS_PER_WORD, DECODE_SEGMENT, VISIT_ORDER, VISIT_ORDERS


class Rule(NamedTuple):
    """What makes scores and blocks, the same for all sequences."""

    scale: float
    softcap: float
    left: int
    right: int
    br: int
    bc: int


class Sequence(NamedTuple):
    """A sequence of rows. Its keys and values are float32, and 0 where key_mask hides them."""

    seq: int
    queries: tuple[int, slice]  # where its rows lie in tensors (B, Hq, S, ...); packed ones have B = 1
    keys: tuple[int, slice]
    num_rows: int
    num_keys: int
    tile: int  # number of its first query block among those of all sequences
    k: Tensor  # (Hkv, num_keys, D)
    v: Tensor  # (Hkv, num_keys, Dv)
    key_mask: Tensor | None  # (num_keys,)


class Piece(NamedTuple):
    """Neighbouring query blocks of a sequence, and the key blocks that any of them may see."""

    rows: slice  # of the sequence
    tiles: slice  # of all query blocks of the batch
    blocks: slice
    keys: slice  # those of the blocks; the last block of a sequence may be short of some
    q: Tensor  # (Hkv, Hq / Hkv * rows, D) float32, times the scale, with rows of 0 up to whole query blocks
    scores: Tensor  # (Hq, tiles, br, blocks, bc) float32, -inf where not seen
    seen: Tensor  # (tiles, br, blocks, bc)
    tanh: Tensor | None  # of a softcap, (Hq, rows, keys)

    def by_row(self, t: Tensor) -> Tensor:
        """(Hq, tiles, br, ...) or (Hq, rows, ...) as (Hkv, Hq / Hkv * rows, ...)."""
        return t.reshape(*self.q.shape[:2], -1)

    def by_key(self, t: Tensor) -> Tensor:
        """Like scores, as (Hkv, Hq / Hkv * rows, keys)."""
        return self.by_row(t)[..., : self.keys.stop - self.keys.start]

    def padded(self, t: Tensor) -> Tensor:
        """(Hkv, Hq / Hkv * rows, n) float32 of the rows of the sequence's (Hq, S, n); 0 in rows that see no key."""
        sees = self.seen.flatten(2).any(-1).flatten()
        part = t[:, self.rows].float()
        part = F.pad(part, (0, 0, 0, len(sees) - part.shape[1]))
        return self.by_row(part.masked_fill(~sees[:, None], 0.0))


def varlen_attention_skip_cpu(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, sinks: Tensor | None, block_table: Tensor | None, threshold: Tensor,
    scale: float, softcap: float, left: int, right: int, br: int, bc: int,
    out: Tensor, lse: Tensor, block_bits: Tensor, counts: Tensor, order: str = VISIT_ORDER,
) -> None:  # fmt: skip
    """Fills `out`, `lse`, `block_bits` and `counts`, laid out as `fa_ops_meta.outputs` says; `threshold` is (B, Hq)."""
    if block_table is not None:
        k, v, start_k, length_k = gather_pages(q, k, v, block_table, length_k)
    out.zero_()
    lse.fill_(float("-inf"))
    block_bits.zero_()
    counts.zero_()
    log_threshold = torch.where((threshold > 0) & (threshold < 1), threshold.log(), float("-inf"))
    rule = Rule(scale, softcap, left, right, br, bc)
    queries, outs, lses = head_major(q), head_major(out), batched(lse)
    for own in _sequences(q, k, v, start, length, start_k, length_k, key_mask, rule):
        batch, rows = own.queries
        q_own, out_own, lse_own = queries[batch, :, rows], outs[batch, :, rows], lses[batch, :, rows]
        if sinks is not None:
            lse_own.copy_(sinks[:, None])
        for piece in _pieces(own, q_own, rule):
            visited, dropped, largest = _decide(piece, log_threshold[own.seq], own.num_rows == 1, rule, order)
            counts[0, own.seq] += visited.sum()
            counts[1, own.seq] += dropped.sum((1, 2))
            kept = F.pad(visited & ~dropped, (piece.blocks.start, 0))
            block_bits[:, piece.tiles] = pack_block_bits(kept, block_bits.shape[-1])
            piece.scores.masked_fill_(dropped[:, :, None, :, None], float("-inf"))
            num_rows = piece.rows.stop - piece.rows.start
            out_piece, lse_piece = _attend(piece, largest, own.v, sinks)
            out_own[:, piece.rows] = out_piece[:, :num_rows].to(out.dtype)
            lse_own[:, piece.rows] = lse_piece[:, :num_rows]


def varlen_attention_skip_backward_cpu(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, block_bits: Tensor,
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, left: int, right: int,
    br: int, bc: int, dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Fills `dq`, `dk` and `dv`, through the blocks that `block_bits` says are kept."""
    for grad in (dq, dk, dv):
        grad.zero_()
    rule = Rule(scale, softcap, left, right, br, bc)
    row_tensors = [*map(head_major, (q, dout, out, dq)), *(batched(t) for t in (lse, dlse) if t is not None)]
    for own in _sequences(q, k, v, start, length, start_k, length_k, key_mask, rule):
        batch, rows = own.queries
        q_own, dout_own, out_own, dq_own, lse_own, *dlse_own = (t[batch, :, rows] for t in row_tensors)
        dk_own, dv_own = torch.zeros_like(own.k), torch.zeros_like(own.v)
        for piece in _pieces(own, q_own, rule):
            kept = unpack_block_bits(block_bits[:, piece.tiles], piece.blocks.stop)[..., piece.blocks]
            p = _probabilities(piece, kept, lse_own)
            dout_piece, out_piece = piece.padded(dout_own), piece.padded(out_own)
            delta = (dout_piece * out_piece).sum(-1, keepdim=True)
            if dlse_own:
                delta -= piece.padded(dlse_own[0][..., None])
            ds = p * (dout_piece @ own.v[:, piece.keys].transpose(-1, -2) - delta)
            if piece.tanh is not None:
                ds *= 1.0 - piece.by_row(piece.tanh).square()
            dv_own[:, piece.keys] += p.transpose(-1, -2) @ dout_piece
            dk_own[:, piece.keys] += ds.transpose(-1, -2) @ piece.q
            dq_piece = (ds @ own.k[:, piece.keys] * scale).view(q_own.shape[0], -1, q.shape[-1])
            dq_own[:, piece.rows] = dq_piece[:, : piece.rows.stop - piece.rows.start].to(dq.dtype)
        batch, keys = own.keys
        head_major(dk)[batch, :, keys] = dk_own.to(dk.dtype)
        head_major(dv)[batch, :, keys] = dv_own.to(dv.dtype)


def pack_block_bits(kept: Tensor, num_words: int) -> Tensor:
    """(..., blocks) bool as (..., num_words) int32: bit j of word w is block 32 w + j."""
    bits = F.pad(kept, (0, num_words * BITS_PER_WORD - kept.shape[-1])).unflatten(-1, (num_words, BITS_PER_WORD))
    return (bits.int() << torch.arange(BITS_PER_WORD, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def unpack_block_bits(words: Tensor, num_blocks: int) -> Tensor:
    """The inverse of `pack_block_bits`."""
    bits = words[..., None] >> torch.arange(BITS_PER_WORD, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :num_blocks].bool()


def _sequences(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor,
    key_mask: Tensor | None, rule: Rule,
) -> Iterator[Sequence]:  # fmt: skip
    """Those that have rows."""
    is_packed = q.dim() == 3
    keys_values = head_major(k), head_major(v)
    tile = 0
    for seq, (row, row_end, key, key_end) in enumerate(sequence_ranges(q, k, start, length, start_k, length_k)):
        batch = 0 if is_packed else seq
        if not is_packed:
            tile = seq * -(-q.shape[-3] // rule.br)
        num_rows, num_keys = row_end - row, key_end - key
        if num_rows:
            own_k, own_v = (t[batch, :, key:key_end].float() for t in keys_values)
            own_mask = None if key_mask is None else key_mask[seq, key:key_end]
            if own_mask is not None:
                own_k, own_v = (t.masked_fill(~own_mask[:, None], 0.0) for t in (own_k, own_v))
            queries, keys = (batch, slice(row, row_end)), (batch, slice(key, key_end))
            yield Sequence(seq, queries, keys, num_rows, num_keys, tile, own_k, own_v, own_mask)
        tile += -(-num_rows // rule.br)


def _pieces(own: Sequence, q: Tensor, rule: Rule) -> Iterator[Piece]:
    """As many query blocks at a time as keep the scores small; q is the sequence's (Hq, S, D)."""
    heads, bc = q.shape[0], rule.bc
    br = min(rule.br, own.num_rows)  # a block alone needs no padding
    num_tiles = -(-own.num_rows // br)
    step = max(1, PLAIN_BLOCK_ELEMENTS // max(1, heads * br * own.num_keys))
    for tile in range(0, num_tiles, step):
        tiles = min(step, num_tiles - tile)
        row, row_end = tile * br, min((tile + tiles) * br, own.num_rows)
        # where row i of the sequence stands among the keys
        position = torch.arange(row, row + tiles * br) + own.num_keys - own.num_rows
        last = own.num_keys - own.num_rows + row_end - 1
        low = max(0, int(position[0]) - rule.left) if rule.left >= 0 else 0
        high = min(own.num_keys, last + rule.right + 1) if rule.right >= 0 else own.num_keys
        if low >= high:
            continue
        blocks = slice(low // bc, -(-high // bc))
        keys = slice(blocks.start * bc, min(blocks.stop * bc, own.num_keys))
        key = torch.arange(keys.start, keys.stop)
        seen = (position < own.num_keys)[:, None].repeat(1, len(key))
        if own.key_mask is not None:
            seen &= own.key_mask[keys]
        if rule.left >= 0:
            seen &= key >= (position - rule.left)[:, None]
        if rule.right >= 0:
            seen &= key <= (position + rule.right)[:, None]
        scaled = F.pad(q[:, row:row_end].float() * rule.scale, (0, 0, 0, row + tiles * br - row_end))
        scaled = scaled.reshape(own.k.shape[0], -1, q.shape[-1])
        scores = (scaled @ own.k[:, keys].transpose(-1, -2)).view(heads, *seen.shape)
        tanh = None
        if rule.softcap > 0.0:
            tanh = torch.tanh(scores / rule.softcap)
            scores = rule.softcap * tanh
        scores = scores.masked_fill_(~seen, float("-inf"))
        missing = blocks.stop * bc - keys.stop
        if missing:
            scores, seen = F.pad(scores, (0, missing), value=float("-inf")), F.pad(seen, (0, missing))
        shape = (tiles, br, blocks.stop - blocks.start, bc)
        number = slice(own.tile + tile, own.tile + tile + tiles)
        yield Piece(
            slice(row, row_end), number, blocks, keys, scaled, scores.view(heads, *shape), seen.view(shape), tanh
        )


def _decide(
    piece: Piece, log_threshold: Tensor, is_decoding: bool, rule: Rule, order: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(tiles, blocks) visited, (Hq, tiles, blocks) dropped, and the largest score of each row, (Hq, tiles, br)."""
    visited, margins, largest = _margins(piece, is_decoding, rule, order)
    return visited, visited & (margins < log_threshold[:, None, None]), largest.amax(-1)


def _margins(piece: Piece, is_decoding: bool, rule: Rule, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """(tiles, blocks) visited, (Hq, tiles, blocks) margins, and the rows' largest scores, (Hq, tiles, br, blocks)."""
    largest = piece.scores.amax(-1)
    segment = DECODE_SEGMENT // rule.bc if is_decoding else None
    return *block_margins(largest, piece.seen.any(-1), order, segment, piece.blocks.start), largest


def block_margins(
    largest: Tensor, votes: Tensor, order: str, segment: int | None, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """(tiles, blocks) visited, and (Hq, tiles, blocks) margins: the largest m - M of the rows that vote.

    A visited block is dropped iff its margin is less than ln(threshold). The first one's is inf, and that of blocks
    which are not visited says nothing.

    Args:
        largest: (Hq, tiles, br, blocks), m of each row; -inf where it does not vote.
        votes: (tiles, br, blocks), whether a row sees a key of the block.
        segment: blocks after which M starts again from what it is behind the first visited block; None for never.
        offset: of the first block within its segment.
    """
    if order not in VISIT_ORDERS:
        raise ValueError(f"order: {order!r} given; accepted are {VISIT_ORDERS}")
    visited = votes.any(1)
    num_blocks = visited.shape[1]
    indices = torch.arange(num_blocks, device=visited.device)
    if order in ("diagonal_first", "descending"):
        first = torch.where(visited, indices, -1).amax(1)
    else:
        first = torch.where(visited, indices, num_blocks).amin(1)
    is_first = (indices == first[:, None])[:, None]
    of_first = largest.masked_fill(~is_first, float("-inf")).amax(-1, keepdim=True)
    segment = segment or max(offset + num_blocks, 1)
    before = _running_maximum(largest, offset % segment, segment, order.endswith("descending"))
    margins = (largest - torch.maximum(before, of_first)).masked_fill(~votes, float("-inf")).amax(2)
    return visited, margins.masked_fill(is_first[:, 0], float("inf"))


def count_kept_cpu(
    q: Tensor, k: Tensor, start: Tensor, length: Tensor, start_k: Tensor, length_k: Tensor, key_mask: Tensor | None,
    trials: Tensor, scale: float, softcap: float, left: int, right: int, br: int, bc: int,
    kept: Tensor, order: str = VISIT_ORDER,
) -> None:  # fmt: skip
    """Fills `kept` (Hq, tiles, trials + 1) int32 where a tile, as block_bits has them, is a sequence's: the blocks of
    dense attention that each of the ascending `trials` keeps, and all visited."""
    log_trials = trials.log()
    rule = Rule(scale, softcap, left, right, br, bc)
    queries = head_major(q)
    for own in _sequences(q, k, k, start, length, start_k, length_k, key_mask, rule):
        batch, rows = own.queries
        for piece in _pieces(own, queries[batch, :, rows], rule):
            visited, margins, _ = _margins(piece, own.num_rows == 1, rule, order)
            number_keeping = torch.bucketize(margins, log_trials, right=True)
            histogram = torch.zeros_like(kept[:, piece.tiles])
            histogram.scatter_add_(-1, number_keeping, visited.int().expand_as(number_keeping))
            total = histogram.sum(-1, keepdim=True, dtype=torch.int32)
            kept[:, piece.tiles] = torch.cat([total - histogram[..., :-1].cumsum(-1, dtype=torch.int32), total], -1)


def _running_maximum(t: Tensor, offset: int, segment: int, is_back: bool) -> Tensor:
    """Along the last dimension, of the elements before each in its segment, behind it if `is_back`; -inf of none.

    The first element is number `offset` of its segment.
    """
    size = t.shape[-1]
    pad = (offset, -(offset + size) % segment)
    t = F.pad(t, pad, value=float("-inf")).unflatten(-1, (-1, segment))
    t = t.flip(-1) if is_back else t
    t = F.pad(t[..., :-1], (1, 0), value=float("-inf")).cummax(-1).values
    t = t.flip(-1) if is_back else t
    return t.flatten(-2)[..., offset : offset + size]


def _attend(piece: Piece, largest: Tensor, v: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Hq, rows, Dv) out and (Hq, rows) lse; dropping never takes away the largest score of a row."""
    largest = largest.flatten(1)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.float()[:, None])
    shift = torch.where(largest == float("-inf"), 0.0, largest)
    p = piece.scores.flatten(3).flatten(1, 2).sub_(shift[..., None]).exp_()
    total = p.sum(-1)
    if sinks is not None:
        total = total + torch.exp(sinks.float()[:, None] - shift)
    values = (piece.by_key(p) @ v[:, piece.keys]).view(*total.shape, -1)
    return values / torch.where(total == 0.0, 1.0, total)[..., None], shift + total.log()


def _probabilities(piece: Piece, kept: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) of the kept blocks, (Hkv, Hq / Hkv * rows, keys)."""
    scores = piece.scores.masked_fill_(~kept[:, :, None, :, None], float("-inf"))
    return piece.by_key(scores).sub_(piece.padded(lse[..., None])).exp_()
