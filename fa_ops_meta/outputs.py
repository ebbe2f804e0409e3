"""Shape, dtype and strides of what the ops return: the fakes and the real ops both allocate here, so they agree."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_ops_meta.paging import key_extent
from fa_ops_meta.skip import BITS_PER_WORD


def empty_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse): out is contiguous, like q with v's head dimension; lse is float32,
    (Hq, total_q) packed or (B, Hq, Sq) padded."""
    *batch, rows, heads, _ = q.shape
    out = q.new_empty((*batch, rows, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, rows), dtype=torch.float32)


def empty_skip(
    q: Tensor, k: Tensor, b_seq_len: Tensor, skip_blocks: Sequence[int] | None, block_table: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Uninitialised (block_bits, counts) of skip-softmax with blocks of (query rows, keys); without elements if None.

    block_bits (Hq, query tiles, words) int32: bit j of word w is the sequence's key block 32 w + j, set if it was kept.
    A packed batch has ceil(total_q / block_q) + B tiles, its sequences' own numbered in a row; a padded one
    B * ceil(Sq / block_q), and a spare one. There is a spare word, too: tracing asks of every size whether it is 1, and
    takes the answer for one that holds at all lengths. counts (2, B, Hq) int64: blocks visited and dropped.
    """
    if skip_blocks is None:
        return q.new_empty((0,), dtype=torch.int32), q.new_empty((0,), dtype=torch.int64)
    num_seqs = b_seq_len.shape[0]
    bits = q.new_empty(skip_shape(q, k, num_seqs, skip_blocks, block_table), dtype=torch.int32)
    return bits, q.new_empty((2, num_seqs, q.shape[-2]), dtype=torch.int64)


def skip_shape(
    q: Tensor, k: Tensor, num_seqs: int, skip_blocks: Sequence[int], block_table: Tensor | None = None
) -> tuple[int, int, int]:
    """(Hq, query tiles, words) of block_bits."""
    block_q, block_k = skip_blocks
    tiles = (q.shape[-3] + block_q - 1) // block_q
    tiles = tiles + num_seqs if q.dim() == 3 else tiles * num_seqs + 1
    blocks = (key_extent(k, block_table) + block_k - 1) // block_k
    return q.shape[-2], tiles, (blocks + BITS_PER_WORD - 1) // BITS_PER_WORD + 1


def empty_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised, contiguous (dq, dk, dv)."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def empty_dsinks(q: Tensor, sinks: Tensor | None) -> Tensor:
    """dsinks, like sinks; no elements, float32, without them."""
    return q.new_empty((0,), dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
