"""Paged caches on the CPU: the keys of a sequence are gathered from its pages, in memory linear in their number."""

import torch
from torch import Tensor

from fa_ops_meta.paging import key_extent


def gather_pages(
    q: Tensor, k: Tensor, v: Tensor, block_table: Tensor, length_k: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k, v, start_k, length_k) of a cache without pages, of q's kind: packed, or padded to the longest sequence.

    Numbers in the table are clamped to those of pages, and what is behind a sequence's last key is not read.
    """
    page_size, num_pages = k.shape[1], k.shape[0]
    length_k = length_k.long().clamp(0, key_extent(k, block_table))
    longest = int(length_k.max()) if len(length_k) else 0
    key = torch.arange(longest)
    is_key = key < length_k[:, None]
    page = block_table[:, key // page_size].long().masked_fill(~is_key, 0).clamp(0, max(0, num_pages - 1))
    row = (key % page_size).expand_as(page)
    start_k = torch.zeros_like(length_k)
    if q.dim() == 3:
        page, row = page[is_key], row[is_key]
        start_k = length_k.cumsum(0) - length_k
    return k[page, row], v[page, row], start_k, length_k
