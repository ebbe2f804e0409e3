"""Skip-softmax (BLASST, arXiv 2512.12087): which blocks of scores are dropped, and how it is written down.

A block is BLOCK_M query rows, from a sequence's first one, by BLOCK_N keys, from its first one. The blocks of which
some row sees a key are visited, in VISIT_ORDER. A visited block is dropped when, for each row that sees a key of it,

    rowmax(S) - M < ln(threshold),

where M is the row's largest score in the blocks visited before; for a sequence of one row, in the first one and in
those of the same DECODE_SEGMENT keys. The block_bits of a query tile hold a bit for each block that is kept.
"""

import triton
import triton.language as tl

from fa_ops.kernels.primitives import SCAN_BLOCK, is_visible
from fa_ops_meta import skip

DECODE_SEGMENT = tl.constexpr(skip.DECODE_SEGMENT)
BITS_PER_WORD = tl.constexpr(skip.BITS_PER_WORD)
STEPS = tl.constexpr(32)  # whose decisions a program holds at a time, as the bits of an int32


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
def sees_block(
    offs_m, n0, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Whether a row of the tile sees a key of the block from n0 on, with holes in its keys."""
    offs_n = n0 + tl.arange(0, BLOCK_N)
    is_key = tl.load(key_mask_ptr + (start_k + offs_n) * stride_ms, mask=offs_n < len_k, other=0) != 0
    visible = is_visible(offs_m[:, None], offs_n[None, :], len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    visible = visible & is_key[None, :] & (offs_m < len_q)[:, None]
    return tl.max(tl.max(visible.to(tl.int32), 1), 0) != 0


@triton.jit
def row_margins(s_max, offs_m, n0, len_q, scale, m_before, m_first, segment, is_first):
    """What a block's row maxima say of it, and make of the running maximum.

    Returns (margins, has_vote, m_before, m_first, segment): the block is visited if a row has a vote, and dropped if
    the margins of all that have are less than ln(threshold). The rest is carried on to the next block.
    """
    has_vote = (s_max != float("-inf")) & (offs_m < len_q)
    if (len_q == 1) & (n0 // DECODE_SEGMENT != segment):
        m_before = m_first
        segment = n0 // DECODE_SEGMENT
    margins = (s_max - m_before) * scale
    m_before = tl.maximum(m_before, tl.where(has_vote, s_max, float("-inf")))
    m_first = tl.where(is_first, m_before, m_first)
    return margins, has_vote, m_before, m_first, segment


@triton.jit
def load_log_threshold(ptr, mask=None):
    """ln of a threshold; -inf, which drops nothing, for one outside (0, 1) or of the mask."""
    threshold = tl.load(ptr, mask=mask, other=None if mask is None else 0.0)
    is_valid = (threshold > 0.0) & (threshold < 1.0)
    return tl.where(is_valid, tl.log(tl.where(is_valid, threshold, 0.5)), float("-inf"))


@triton.jit
def pack_bits(flags):
    """STEPS zeros and ones as the bits of an int64, the first the lowest."""
    return tl.sum(flags.to(tl.int64) << tl.arange(0, STEPS), 0)


@triton.jit
def lowest_bit(word):
    """The number of the lowest bit that is set in a positive integer."""
    power = (word & -word).to(tl.uint32).to(tl.float32)
    return (power.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def mark_kept(row_ptr, block, mask=None):
    """Sets the block's bit in the block_bits of its query tile; of those tiles, with a mask, where it is true."""
    word = block // BITS_PER_WORD
    tl.atomic_or(row_ptr + word, tl.cast(1, tl.int32) << (block - word * BITS_PER_WORD), mask=mask, sem="relaxed")


@triton.jit
def was_kept(row_ptr, block, mask):
    """1 for a block that is kept, 0 for one that is not or outside of the mask; `row_ptr` and `block` broadcast."""
    word = block // BITS_PER_WORD  # no remainder: the interpreter knows none of an int by a constexpr
    return (tl.load(row_ptr + word, mask=mask, other=0) >> (block - word * BITS_PER_WORD)) & 1


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
