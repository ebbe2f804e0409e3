"""What the backward for sm_90 needs before it can start: its lists of tiles, with 0 in the gradients that no tile with
blocks has, and lse and delta in its own layout.

Rows of a sequence that see no key come first in it, since it is its last row that stands at its last key. Here they are
left out: `len_q` is the number of the rows behind them, and `m` counts these. Nothing changes in which keys a row sees.
"""

import triton
import triton.language as tl

from fa_ops.kernels.primitives import (
    CLEAR_ROWS,
    COUNTS,
    LOG2E,
    clamp_range,
    fill_rows,
    find_unowned,
    has_holes,
    key_range,
    load_rows,
    padded_tile,
    query_range,
    wrap_rows,
)
from fa_ops.kernels.skip import first_tile
from fa_ops.kernels.tiles import find_packed_tile

RECORD = tl.constexpr(16)  # int32 from one record to the next, of which FIELDS are in use
FIELDS = (
    "first", "len_q", "len_k",  # the tile's first row in its sequence; lengths
    "begin", "num_left", "num_full", "num_right",  # where its blocks begin; how many are masked left, not, right
    "row", "terms",  # of `first`, among all rows of a contiguous tensor; of the sequence's first query, in the terms
    "end_q", "end_dout", "end_k", "end_v",  # as in tiles.py
)  # fmt: skip


@triton.jit
def seeing_rows(len_q, len_k, window_right, HAS_RIGHT: tl.constexpr):
    """How many rows of a sequence can see a key, its last ones."""
    if HAS_RIGHT:
        return tl.maximum(tl.minimum(len_q, len_k + window_right), 0)
    else:
        return len_q


@triton.jit
def _clear(grad_ptr, dv_ptr, rows, is_row, heads, HEAD_DIM: tl.constexpr, OF_KEYS: tl.constexpr):
    """`rows` of the gradients, which are contiguous."""
    fill_rows(grad_ptr, heads * HEAD_DIM, HEAD_DIM, rows, is_row, heads, 0.0, HEAD_DIM, HEAD_DIM)
    if OF_KEYS:
        fill_rows(dv_ptr, heads * HEAD_DIM, HEAD_DIM, rows, is_row, heads, 0.0, HEAD_DIM, HEAD_DIM)


@triton.jit(do_not_specialize=(*COUNTS, "batch_rows_q", "batch_rows_dout", "batch_rows_k", "batch_rows_v", "heads"))
def backward_tiles_kernel(
    tiles_ptr, grad_ptr, dv_ptr, b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr,
    window_right, num_seqs, rows_q, rows_k,
    batch_rows_q, batch_rows_dout, batch_rows_k, batch_rows_v, heads, stride_mb, stride_ms,
    HEAD_DIM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr, TERMS_BLOCK: tl.constexpr, OF_KEYS: tl.constexpr,
    HAS_RIGHT: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,): as many as any lengths can ask for, and if packed a program more for each CLEAR_ROWS rows, which
    clears those of no sequence. tiles (tiles + 1, RECORD) int32 holds FIELDS of the tiles in use, of TILE query rows
    and their blocks of BLOCK keys, or OF_KEYS the other way round; the last record begins with their number, and with 0
    to count those taken. A tile without rows has no blocks, nor have those of a sequence with holes in its keys, for
    which there are the portable kernels. grad is dq, of `heads` heads; OF_KEYS dk, and dv is like it."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    rows = rows_q
    own_start_ptr, own_length_ptr = b_start_loc_ptr, b_seq_len_ptr
    if OF_KEYS:
        rows = rows_k
        own_start_ptr, own_length_ptr = b_start_loc_k_ptr, b_seq_len_k_ptr
    if IS_PACKED:
        tiles = tl.cdiv(rows, TILE) + num_seqs
        if tile >= tiles:
            row = (tile - tiles).to(tl.int64) * CLEAR_ROWS
            is_unowned = find_unowned(row, own_start_ptr, own_length_ptr, num_seqs, rows)
            _clear(grad_ptr, dv_ptr, row + tl.arange(0, CLEAR_ROWS), is_unowned, heads, HEAD_DIM, OF_KEYS)
            return
    seq, index, count = padded_tile(tile, rows, TILE)
    used = tiles
    if IS_PACKED:
        seq, first, end, count = find_packed_tile(tile, own_length_ptr, num_seqs, rows, TILE)
        index = tile - first
        used = tl.minimum(end, tiles)
    if tile == tiles - 1:
        # only the last one has always scanned all lengths, or as many as there can be tiles of
        tl.store(tiles_ptr + tiles.to(tl.int64) * RECORD, used)
        tl.store(tiles_ptr + tiles.to(tl.int64) * RECORD + 1, 0)
    if seq >= num_seqs:
        return
    start_q, len_q = clamp_range(tl.load(b_start_loc_ptr + seq), tl.load(b_seq_len_ptr + seq), rows_q)
    start_k, len_k = clamp_range(tl.load(b_start_loc_k_ptr + seq), tl.load(b_seq_len_k_ptr + seq), rows_k)
    end_q = start_q.to(tl.int32) + len_q
    end_k = start_k.to(tl.int32) + len_k
    own_len = len_q
    len_q = seeing_rows(len_q, len_k, window_right, HAS_RIGHT)
    num_bare = own_len - len_q
    # the tiles with the most blocks first
    if OF_KEYS:
        first_row = index * TILE
        is_tile = first_row < len_k
        row = end_k - len_k + first_row
        begin, full, full_end, block_end = query_range(
            first_row, len_q, len_k, -1, window_right, BLOCK, TILE, False, HAS_RIGHT
        )
    else:
        first_row = (count - 1 - index) * TILE
        is_tile = first_row < len_q
        row = end_q - len_q + first_row
        begin, full, full_end, block_end = key_range(
            first_row, len_q, len_k, -1, window_right, TILE, BLOCK, False, HAS_RIGHT
        )
    is_holey = False
    if HAS_KEY_MASK:
        is_holey = has_holes(key_mask_ptr + seq.to(tl.int64) * stride_mb, start_k, len_k, stride_ms)
        is_tile = is_tile & (not is_holey)
    num_left, num_full, num_right = 0, 0, 0
    if is_tile:
        num_left = tl.cdiv(tl.maximum(full - begin, 0), BLOCK)
        num_full = tl.cdiv(tl.maximum(full_end - full, 0), BLOCK)
        num_right = tl.cdiv(tl.maximum(block_end - full_end, 0), BLOCK)
    # as many of its first rows as see no key, or all, are in no tile with blocks
    is_bare = (len_k == 0) | is_holey
    own_start = start_q
    if OF_KEYS:
        own_start, own_len, num_bare = start_k, len_k, 0
        is_bare = num_left + num_full + num_right == 0
    if is_bare:
        num_bare = own_len
    if not IS_PACKED:
        row += seq * rows
        grad_ptr += (seq * rows).to(tl.int64) * heads * HEAD_DIM
        dv_ptr += (seq * rows).to(tl.int64) * heads * HEAD_DIM
    for part in tl.range(0, TILE, CLEAR_ROWS):
        offs = first_row + part + tl.arange(0, CLEAR_ROWS)
        is_row = offs < num_bare
        if not IS_PACKED:
            is_row = (is_row | (offs >= own_len)) & (offs < rows)
        cleared = own_start + wrap_rows(own_start, offs, rows, IS_PACKED)
        _clear(grad_ptr, dv_ptr, cleared, is_row, heads, HEAD_DIM, OF_KEYS)
    terms = first_tile(b_seq_len_ptr, seq, rows_q, TERMS_BLOCK, IS_PACKED).to(tl.int32) * TERMS_BLOCK
    record_ptr = tiles_ptr + tile.to(tl.int64) * RECORD
    tl.store(record_ptr + 0, first_row)
    tl.store(record_ptr + 1, len_q)
    tl.store(record_ptr + 2, len_k)
    tl.store(record_ptr + 3, begin)
    tl.store(record_ptr + 4, num_left)
    tl.store(record_ptr + 5, num_full)
    tl.store(record_ptr + 6, num_right)
    tl.store(record_ptr + 7, row)
    tl.store(record_ptr + 8, terms)
    tl.store(record_ptr + 9, seq * batch_rows_q + end_q)
    tl.store(record_ptr + 10, seq * batch_rows_dout + end_q)
    tl.store(record_ptr + 11, seq * batch_rows_k + end_k)
    tl.store(record_ptr + 12, seq * batch_rows_v + end_k)


@triton.jit(do_not_specialize=(*COUNTS, "terms_rows"))
def row_terms_kernel(
    out_ptr, lse_ptr, dout_ptr, dlse_ptr, terms_ptr, delta_ptr,
    b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr,
    window_right, num_seqs, rows_q, rows_k, terms_rows,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh, stride_dob, stride_dot, stride_doh,
    stride_dlb, stride_dlh, stride_dlt,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_PACKED: tl.constexpr,
    HAS_DLSE: tl.constexpr, HAS_DELTA: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of BLOCK query rows, Hq). terms (Hq, 2, terms_rows) float32 holds BLOCK rows for each tile: lse times
    log2(e), +inf where there is no row or it sees no key; and delta = rowsum(dO * O) - dlse, 0 there. HAS_DELTA: delta
    is written where lse has the row, too."""
    tile = tl.program_id(0)
    seq, index, _ = padded_tile(tile, rows_q, BLOCK)
    if IS_PACKED:
        seq, first, _, _ = find_packed_tile(tile, b_seq_len_ptr, num_seqs, rows_q, BLOCK)
        index = tile - first
    if seq >= num_seqs:
        return
    start_q, len_q = clamp_range(tl.load(b_start_loc_ptr + seq), tl.load(b_seq_len_ptr + seq), rows_q)
    _, len_k = clamp_range(tl.load(b_start_loc_k_ptr + seq), tl.load(b_seq_len_k_ptr + seq), rows_k)
    num_rows = seeing_rows(len_q, len_k, window_right, HAS_RIGHT)
    m0 = index * BLOCK
    if m0 >= num_rows:
        return
    first_row = start_q + len_q - num_rows + m0
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, HEAD_DIM)
    is_row = m0 + offs < num_rows
    head = tl.program_id(1).to(tl.int64)
    batch = seq.to(tl.int64)
    out_ptr += batch * stride_ob + head * stride_oh + first_row * stride_ot
    dout_ptr += batch * stride_dob + head * stride_doh + first_row * stride_dot
    out = load_rows(out_ptr, stride_ot, offs, offs_d, is_row, HEAD_DIM, HEAD_DIM, True)
    dout = load_rows(dout_ptr, stride_dot, offs, offs_d, is_row, HEAD_DIM, HEAD_DIM, True)
    lse_offs = batch * stride_lb + head * stride_lh + first_row + offs
    lse = tl.load(lse_ptr + lse_offs, mask=is_row, other=float("-inf"))
    sees_key = lse != float("-inf")
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptr += batch * stride_dlb + head * stride_dlh
        delta -= tl.load(dlse_ptr + (first_row + offs) * stride_dlt, mask=sees_key, other=0.0)
    delta = tl.where(sees_key, delta, 0.0)
    if HAS_DELTA:
        tl.store(delta_ptr + lse_offs, delta, mask=is_row)
    terms_ptr += head * 2 * terms_rows + tile.to(tl.int64) * BLOCK
    tl.store(terms_ptr + offs, tl.where(sees_key, lse * LOG2E, float("inf")))
    tl.store(terms_ptr + terms_rows + offs, delta)
