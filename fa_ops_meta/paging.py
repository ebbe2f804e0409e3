"""Paged caches: k and v are (pages, page size, H, D), and row b of block_table (B, max_pages) names the pages of
sequence b in their order. Key n of the sequence is row n % page_size of page block_table[b, n // page_size]."""

from torch import Tensor


def key_extent(k: Tensor, block_table: Tensor | None) -> int:
    """Keys that a sequence has room for: the rows of k, or those of the pages that its row of block_table can name."""
    if block_table is None:
        return k.shape[-3]
    return block_table.shape[1] * k.shape[1] if k.shape[0] > 0 else 0
