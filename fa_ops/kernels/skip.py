"""Skip-softmax (BLASST, arXiv 2512.12087): which blocks of scores are dropped, and how it is written down.

A block is BLOCK_M query rows, from a sequence's first one, by BLOCK_N keys, from its first one. The blocks of which
some row sees a key are visited, in VISIT_ORDER. A visited block is dropped when, for each row that sees a key of it,

    rowmax(S) - M < ln(threshold),

where M is the row's largest score in the blocks visited before; for a sequence of one row, in the first one and in
those of the same DECODE_SEGMENT keys. The block_bits of a query tile hold a bit for each block that is kept.
"""

import triton
import triton.language as tl

from fa_ops.kernels.primitives import SCAN_BLOCK
from fa_ops_meta import skip

DECODE_SEGMENT = tl.constexpr(skip.DECODE_SEGMENT)
BITS_PER_WORD = tl.constexpr(skip.BITS_PER_WORD)


@triton.jit
def visit(step, count, VISIT_ORDER: tl.constexpr):
    """Which of `count` blocks is visited at a step; VISIT_ORDER is an index of fa_ops_meta.skip.VISIT_ORDERS."""
    if VISIT_ORDER == 0:  # ascending
        return step
    elif VISIT_ORDER == 1:  # diagonal_first
        return tl.where(step == 0, count - 1, step - 1)
    elif VISIT_ORDER == 2:  # first_then_descending
        return tl.where(step == 0, 0, count - step)
    else:  # descending
        return count - 1 - step


@triton.jit
def load_log_threshold(ptr):
    """ln of a threshold; -inf, which drops nothing, for one outside (0, 1)."""
    threshold = tl.load(ptr)
    is_valid = (threshold > 0.0) & (threshold < 1.0)
    return tl.where(is_valid, tl.log(tl.where(is_valid, threshold, 0.5)), float("-inf"))


@triton.jit
def mark_kept(row_ptr, block, mask=None):
    """Sets the block's bit in the block_bits of its query tile; of those tiles, with a mask, where it is true."""
    word = block // BITS_PER_WORD
    tl.atomic_or(row_ptr + word, tl.cast(1, tl.int32) << (block - word * BITS_PER_WORD), mask=mask)


@triton.jit
def was_kept(row_ptr, block):
    word = block // BITS_PER_WORD  # no remainder: the interpreter knows none of an int by a constexpr
    return (tl.load(row_ptr + word) >> (block - word * BITS_PER_WORD)) & 1 != 0


@triton.jit
def first_tile(b_seq_len_ptr, seq, rows, BLOCK: tl.constexpr, IS_PACKED: tl.constexpr):
    """The first query tile of a sequence: packed sequences have as many as their rows ask for, padded ones all the
    same."""
    tiles = tl.cast(seq, tl.int64) * tl.cdiv(rows, BLOCK)
    if IS_PACKED:
        tiles = tl.cast(0, tl.int64)
        for scanned in tl.range(0, seq, SCAN_BLOCK):
            offs = scanned + tl.arange(0, SCAN_BLOCK)
            length = tl.load(b_seq_len_ptr + offs, mask=offs < seq, other=0)
            length = tl.minimum(tl.maximum(length.to(tl.int64), 0), rows)
            tiles += tl.sum(tl.cdiv(length, BLOCK), 0)
    return tiles
