"""Decoding: when a sequence's keys are split among programs, among how many, and the launch of both kernels.

Everything is decided from static shapes, so it holds for any lengths on the device, and no result depends on a
neighbour in the batch. Padded queries of one row go to the decode kernel, and so do, among packed queries over a paged
cache, the sequences that turn out to have one row; the forward kernel computes the others. Packed queries over packed
keys are the forward kernel's alone: most are no decoding, and each would pay for one launch more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fa_ops.launching import (
    HAS_TRITON,
    launch_kernel,
    leading_strides,
    lse_strides,
    mask_strides,
    multi_processors,
    page_counts,
    paging,
    strides_of,
)
from fa_ops_meta.paging import key_extent
from fa_ops_meta.skip import DECODE_SEGMENT, VISIT_ORDER, VISIT_ORDERS

if HAS_TRITON:
    from fa_ops.kernels.configs import Tile, block_dim
    from fa_ops.kernels.decode import attention_combine_kernel, attention_decode_kernel

MIN_SPLIT_KEYS = 512
MIN_KEYS_PER_HEAD = 64  # of a group; fewer, and the parts in float32 are more than a few percent of the keys' bytes


def select_splits(q: Tensor, k: Tensor, block_table: Tensor | None, is_skipping: bool) -> int | None:
    """Programs that share the keys of a sequence of one row, or None where there is no decode kernel for the call.

    As many as half of the device's multiprocessors, of at least MIN_SPLIT_KEYS keys each, MIN_KEYS_PER_HEAD for each
    query head of a key head, or of a segment each with skip-softmax: from the device and the room for keys alone. Tests
    replace this function to choose for themselves.
    """
    if not _is_decoding(q, block_table):
        return None
    unit = max(MIN_SPLIT_KEYS, MIN_KEYS_PER_HEAD * (q.shape[-2] // k.shape[-2]))
    if is_skipping:
        unit = DECODE_SEGMENT
    extent = key_extent(k, block_table)
    # no branch on the extent: it may be symbolic, and nothing is to be traced anew for a cache that grows
    return torch.sym_max(1, torch.sym_min(multi_processors(q.device) // 2, (extent + unit - 1) // unit))


def _is_decoding(q: Tensor, block_table: Tensor | None) -> bool:
    return q.shape[1] == 1 if q.dim() == 4 else block_table is not None


def launch(
    num_splits: int, tile: "Tile", q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, index: Sequence[Tensor],
    key_mask: Tensor | None, block_table: Tensor | None, sinks: Tensor | None, threshold: Tensor | None,
    block_bits: Tensor, counts: Tensor, numbers: tuple[float, float, int, int], block_q: int,
) -> None:  # fmt: skip
    """Fills the rows of `out` and `lse` that are sequences of one row, and their blocks and counts of skip-softmax.

    Args:
        index: starts and lengths of queries and of keys, contiguous.
        numbers: softmax_scale, softcap, window_left, window_right.
        block_q: query rows of a block of skip-softmax.
    """
    num_seqs, rows_q, heads_q, heads_kv = index[0].shape[0], q.shape[-3], q.shape[-2], k.shape[-2]
    _, _, left, right = numbers
    room = torch.sym_max(2, num_splits)  # tracing asks whether a size is 1, and takes the answer for one that holds
    part_out = q.new_empty((room, num_seqs, heads_q, v.shape[-1]), dtype=torch.float32)
    part_lse = q.new_empty((room, num_seqs, heads_q), dtype=torch.float32)
    block_m = block_dim(heads_q // heads_kv)
    args = (
        q, k, v, part_out, part_lse, *index,
        index[1] if key_mask is None else key_mask, index[1] if block_table is None else block_table,
        *((lse, index[1], index[1]) if threshold is None else (threshold, block_bits, counts)),
        *numbers, num_seqs, rows_q, key_extent(k, block_table), *page_counts(k, block_table),
        *strides_of(q), *strides_of(k), *strides_of(v), *mask_strides(key_mask), *leading_strides(block_table),
        *leading_strides(threshold), *leading_strides(block_bits),
    )  # fmt: skip
    constants = {
        "GROUP_SIZE": heads_q // heads_kv, "HEAD_DIM": q.shape[-1], "HEAD_DIM_V": v.shape[-1],
        "BLOCK_D": block_dim(q.shape[-1]), "BLOCK_DV": block_dim(v.shape[-1]),
        "BLOCK_M": block_m, "BLOCK_N": tile.block_n,
        "HAS_LEFT": left >= 0, "HAS_RIGHT": right >= 0, "HAS_SOFTCAP": numbers[1] > 0.0, "IS_PACKED": q.dim() == 3,
        "HAS_KEY_MASK": key_mask is not None, "PAGING": paging(k, block_table, tile.block_n),
        "SKIP_SOFTMAX": threshold is not None, "SKIP_BLOCK_Q": block_q, "VISIT_ORDER": VISIT_ORDERS.index(VISIT_ORDER),
        "num_warps": max(tile.num_warps, block_m // 16), "num_stages": tile.num_stages,
    }  # fmt: skip
    launch_kernel(attention_decode_kernel, (num_seqs, heads_kv, num_splits), args, constants)
    args = (
        part_out, part_lse, out, lse, index[0], index[1], lse if sinks is None else sinks, num_seqs, rows_q, num_splits,
        *strides_of(out), *lse_strides(lse),
    )  # fmt: skip
    constants = {
        "HEAD_DIM_V": v.shape[-1], "BLOCK_DV": block_dim(v.shape[-1]), "HAS_SINKS": sinks is not None,
        "IS_PACKED": q.dim() == 3, "num_warps": 8, "num_stages": 1,
    }  # fmt: skip
    launch_kernel(attention_combine_kernel, (num_seqs, heads_q), args, constants)
