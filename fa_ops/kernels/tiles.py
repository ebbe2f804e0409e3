"""The list of tiles that a persistent kernel works through: a record each, written on the device from the lengths. And
the rows that such a kernel does not write, since no tile with blocks has them.

A record says where a tile of BLOCK_M query rows lies and which blocks of BLOCK_N keys it sees, so that a kernel that
reads it needs no search for its sequence and no rule of its own for the blocks.
"""

import triton
import triton.language as tl

from fa_ops.kernels.primitives import (
    CLEAR_ROWS,
    COUNTS,
    SCAN_BLOCK,
    clamp_range,
    fill_rows,
    find_unowned,
    has_holes,
    key_range,
    padded_tile,
    scan_lengths,
    wrap_rows,
)
from fa_ops.kernels.skip import first_tile

RECORD = tl.constexpr(16)  # int32 from one record to the next, of which FIELDS are in use
FIELDS = (
    "m0", "len_q", "len_k",  # the tile's first row in its sequence; lengths
    "begin", "num_left", "num_full", "num_right",  # where its blocks begin; how many are masked left, not, right
    "batch_row", "row",  # of the padded batch and of m0, among all rows of a contiguous tensor
    "end_q", "end_k", "end_v",  # the rows behind the sequence, a batch stride being worth as many rows as fit into it
    "seq", "skip_tile",  # with skip-softmax: the sequence, and the first query tile of its block_bits
)  # fmt: skip


@triton.jit
def find_packed_tile(tile, b_seq_len_ptr, num_seqs, rows, BLOCK: tl.constexpr):
    """What `scan_lengths` finds of a tile: (sequence, its first tile, the tile behind it, its number of tiles). For
    kernels behind opaque ops, which torch does not analyse: in others these loads stand in the kernel's own body."""
    seq, first, end, count = 0, 0, 0, 0
    scanned = 0
    while (scanned < num_seqs) & (end <= tile):
        offs = scanned + tl.arange(0, SCAN_BLOCK)
        length = tl.load(b_seq_len_ptr + offs, mask=offs < num_seqs, other=0)
        seq, first, end, count = scan_lengths(length, tile, seq, first, end, rows, BLOCK)
        scanned += SCAN_BLOCK
    return seq, first, end, count


@triton.jit
def _clear(out_ptr, lse_ptr, rows, is_row, rows_q, heads, HEAD_DIM: tl.constexpr):
    """`rows` of out and lse, which are contiguous."""
    fill_rows(out_ptr, heads * HEAD_DIM, HEAD_DIM, rows, is_row, heads, 0.0, HEAD_DIM, HEAD_DIM)
    fill_rows(lse_ptr, 1, rows_q, rows, is_row, heads, float("-inf"), 1, 1)


@triton.jit(do_not_specialize=(*COUNTS, "batch_rows_q", "batch_rows_k", "batch_rows_v", "heads"))
def tile_list_kernel(
    tiles_ptr, out_ptr, lse_ptr, b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr,
    window_left, window_right, num_seqs, rows_q, rows_k, batch_rows_q, batch_rows_k, batch_rows_v,
    heads, stride_mb, stride_ms, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    SKIP_BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Grid (tiles,): as many as any lengths can ask for, and if packed a program more for each CLEAR_ROWS rows, which
    clears those of no sequence. tiles (tiles + 1, RECORD) int32 holds FIELDS, of the tiles in use; the last record
    begins with their number and with 0, where programs count those that they take. A tile without rows has no blocks,
    nor have those of a sequence with holes in its keys, for which there is the portable kernel. batch_rows are batch
    strides, in rows; out and lse are contiguous. SKIP_BLOCK_Q is 0 without skip-softmax."""
    tile = tl.program_id(0)
    tiles = tl.num_programs(0)
    if IS_PACKED:
        tiles = tl.cdiv(rows_q, BLOCK_M) + num_seqs
        if tile >= tiles:
            row = (tile - tiles).to(tl.int64) * CLEAR_ROWS
            is_unowned = find_unowned(row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows_q)
            _clear(out_ptr, lse_ptr, row + tl.arange(0, CLEAR_ROWS), is_unowned, rows_q, heads, HEAD_DIM)
            return
    seq, index, count = padded_tile(tile, rows_q, BLOCK_M)
    used = tiles
    if IS_PACKED:
        seq, first, end, count = find_packed_tile(tile, b_seq_len_ptr, num_seqs, rows_q, BLOCK_M)
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
    m0 = (count - 1 - index) * BLOCK_M  # the tiles that see the most keys first
    begin, full, full_end, end_k = key_range(
        m0, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    num_left, num_full, num_right = 0, 0, 0
    is_holey = False
    if HAS_KEY_MASK:
        is_holey = has_holes(key_mask_ptr + seq.to(tl.int64) * stride_mb, start_k, len_k, stride_ms)
    if (m0 < len_q) & (not is_holey):
        num_left = tl.cdiv(tl.maximum(full - begin, 0), BLOCK_N)
        num_full = tl.cdiv(tl.maximum(full_end - full, 0), BLOCK_N)
        num_right = tl.cdiv(tl.maximum(end_k - full_end, 0), BLOCK_N)
    batch_row = 0
    if not IS_PACKED:
        batch_row = seq * rows_q
        out_ptr += batch_row.to(tl.int64) * heads * HEAD_DIM
        lse_ptr += batch_row.to(tl.int64) * heads
    for part in tl.range(0, BLOCK_M, CLEAR_ROWS):
        offs_m = m0 + part + tl.arange(0, CLEAR_ROWS)
        is_bare = (offs_m < len_q) & (num_left + num_full + num_right == 0)
        if not IS_PACKED:
            is_bare = (is_bare | (offs_m >= len_q)) & (offs_m < rows_q)
        rows = start_q + wrap_rows(start_q, offs_m, rows_q, IS_PACKED)
        _clear(out_ptr, lse_ptr, rows, is_bare, rows_q, heads, HEAD_DIM)
    record_ptr = tiles_ptr + tile.to(tl.int64) * RECORD
    tl.store(record_ptr + 0, m0)
    tl.store(record_ptr + 1, len_q)
    tl.store(record_ptr + 2, len_k)
    tl.store(record_ptr + 3, begin)
    tl.store(record_ptr + 4, num_left)
    tl.store(record_ptr + 5, num_full)
    tl.store(record_ptr + 6, num_right)
    tl.store(record_ptr + 7, batch_row)
    tl.store(record_ptr + 8, batch_row + start_q.to(tl.int32) + m0)
    tl.store(record_ptr + 9, seq * batch_rows_q + start_q.to(tl.int32) + len_q)
    tl.store(record_ptr + 10, seq * batch_rows_k + start_k.to(tl.int32) + len_k)
    tl.store(record_ptr + 11, seq * batch_rows_v + start_k.to(tl.int32) + len_k)
    if SKIP_BLOCK_Q:
        tl.store(record_ptr + 12, seq)
        tl.store(record_ptr + 13, first_tile(b_seq_len_ptr, seq, rows_q, SKIP_BLOCK_Q, IS_PACKED).to(tl.int32))
