"""Where the sequences of a Hugging Face batch begin and end, in the op's terms, computed on the device.

A batch is *padded*, with one sequence in each row, or *packed*, with several, one behind the other. Shapes are B rows,
Q query positions, K key positions; queries and keys come as (B, Q, Hq, D) and (B, K, Hkv, D).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fa_ops import varlen
from fa_ops.integrations.huggingface_pattern import ATTENTION_NAME, KeyStates

# Of documents that position_ids tell apart, at least so many are provided for, and one for each so many positions.
MIN_DOCUMENTS, MEAN_LENGTH = 64, 32


class Ranges(NamedTuple):
    """The op's arguments: start and length of each sequence's queries, (sequences,) int32; of its keys too, unless they
    are the same; and the keys to leave out, (B, K) bool."""

    b_start_loc: Tensor
    b_seq_len: Tensor
    b_start_loc_k: Tensor | None = None
    b_seq_len_k: Tensor | None = None
    key_mask: Tensor | None = None


def padded_ranges(
    query: Tensor,
    key: Tensor,
    states: KeyStates,
    is_causal: bool,
    window_size: tuple[int, int],
    is_training: bool,
) -> Ranges:
    """One sequence for each row, from what a mask says of the keys."""
    batch, q_length, kv_length = query.shape[0], query.shape[1], key.shape[1]
    key_mask = states.visible
    if key_mask is not None and is_causal:
        has_window = window_size != (-1, -1)
        return _causal_ranges(key_mask, states.written, q_length, kv_length, has_window, is_training)
    start = torch.zeros(batch, dtype=torch.int32, device=query.device)
    length = torch.full_like(start, q_length)
    if key_mask is not None and window_size == (-1, -1):
        # The keys' padding says nothing of the queries, not even where Q is K: this may be cross-attention.
        return Ranges(start, length, *varlen.from_mask(key_mask), key_mask)
    # The op aligns the ends of both ranges; a window moves with the keys' range, which therefore leaves padding in.
    if q_length == kv_length:
        return Ranges(start, length, key_mask=key_mask)
    return Ranges(start, length, start, torch.full_like(start, kv_length), key_mask)


def _causal_ranges(
    key_mask: Tensor, written: Tensor | None, q_length: int, kv_length: int, has_window: bool, is_training: bool
) -> Ranges:
    start_k, length_k = varlen.from_mask(key_mask)
    if q_length == kv_length and is_training:
        return Ranges(start_k, length_k, key_mask=key_mask)
    if q_length != 1 or has_window:
        # The op aligns the ends of both ranges, so the keys' has to end at the last query, even if that is padding. A
        # single query without a window sees all that is visible, so its keys need not go further.
        end_k = kv_length if written is None else written.sum(-1, dtype=torch.int32)
        length_k = end_k - start_k
    start = (q_length - length_k).clamp(min=0)
    return Ranges(start, q_length - start, start_k, length_k, key_mask)


def packed_ranges(
    query: Tensor,
    key: Tensor,
    states: KeyStates,
    is_packed: bool,
    is_causal: bool,
    is_training: bool,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    position_ids: Tensor | None,
) -> Ranges | None:
    """Sequences in (B * Q, Hq, D) and (B * K, Hkv, D), or None for a batch that is not packed."""
    batch, q_length, kv_length = query.shape[0], query.shape[1], key.shape[1]
    marked = states.visible if is_packed else None
    is_padded = marked is None and states.visible is not None
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if is_padded:
            raise NotImplementedError(
                f"cu_seq_lens_q, cu_seq_lens_k: given with an attention_mask that hides keys; {ATTENTION_NAME} accepts "
                "packed sequences or padding"
            )
        if cu_seq_lens_k is cu_seq_lens_q and q_length == kv_length:
            return Ranges(*varlen.from_cu_seqlens(cu_seq_lens_q))  # which cannot overlap, so nobody has to look
        return Ranges(*varlen.from_cu_seqlens(cu_seq_lens_q), *varlen.from_cu_seqlens(cu_seq_lens_k))
    if position_ids is None or position_ids.shape[-1] == 1 or is_padded or not is_causal:
        return None if marked is None else _document_ranges(marked)
    is_start = varlen.document_starts(position_ids)
    if marked is not None:
        # Compiled, and with a cache, the mask function takes any batch for packed but knows no borders.
        return _document_ranges(marked | is_start)
    # Rows that do not lie one behind the other are copied to make them so: not to find out that nothing is packed.
    is_free = batch == 1 or is_training or key.stride(0) == kv_length * key.stride(1)
    if is_free and is_start.shape == (batch, q_length) and q_length == kv_length:
        return _document_ranges(is_start)
    torch._assert_async(
        ~is_start[:, 1:].any(),
        f"{ATTENTION_NAME}: position_ids restart within a row (packed sequences), which is supported with as many "
        "queries as keys and, of several rows, for position_ids of each, in training or without a cache",
    )
    return None


def _document_ranges(is_start: Tensor) -> Ranges:
    rows, positions = is_start.shape
    bound = min(rows * positions, rows + max(MIN_DOCUMENTS, rows * positions // MEAN_LENGTH))
    return Ranges(*varlen.from_document_starts(is_start, bound))
