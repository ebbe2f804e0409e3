"""Starts and lengths of sequences, from the forms in which callers have them. Nothing here synchronises with a device.

Shapes: B sequences, S positions.
"""

import torch
from torch import Tensor


def from_cu_seqlens(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(b_start_loc, b_seq_len), each (B,) int32, of packed sequences from their cumulative lengths.

    Args:
        cu_seqlens: (B + 1,) int32 or int64: 0, the end of the first sequence, ..., the end of the last.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens: shape {tuple(cu_seqlens.shape)} given; expected (B + 1,)")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: dtype {cu_seqlens.dtype} given; accepted are int32 and int64")
    cu_seqlens = cu_seqlens.to(torch.int32)
    return cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]


def from_lengths(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(b_start_loc, b_seq_len), each (B,) int32, of sequences packed without gaps.

    Args:
        lengths: (B,) int32 or int64, rows of each sequence.
    """
    if lengths.dim() != 1:
        raise ValueError(f"lengths: shape {tuple(lengths.shape)} given; expected (B,)")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths: dtype {lengths.dtype} given; accepted are int32 and int64")
    lengths = lengths.to(torch.int32)
    return (lengths.cumsum(0, dtype=torch.int32) - lengths), lengths


def from_mask(mask: Tensor) -> tuple[Tensor, Tensor]:
    """(b_start_loc, b_seq_len), each (B,) int32: the smallest range of each padded row that holds its True positions.

    A mask with holes inside that range is also the op's ``key_mask``. A row without any True has start 0 and length 0.

    Args:
        mask: (B, S) bool, True for positions that belong to the sequence.
    """
    if mask.dim() != 2:
        raise ValueError(f"mask: shape {tuple(mask.shape)} given; expected (B, S)")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: dtype {mask.dtype} given; accepted is bool")
    if mask.shape[1] == 0:
        start = torch.zeros(mask.shape[0], dtype=torch.int32, device=mask.device)
        return start, start
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.int32)
    end = (position * mask).amax(1)
    start = mask.to(torch.uint8).argmax(1).to(torch.int32)  # the first of equal maxima
    return start, end - start


def document_starts(position_ids: Tensor) -> Tensor:
    """(B, S) bool, or (1, S): True where positions restart, which begins a document.

    A position restarts where it is smaller than its left neighbour, or where both are 0. A gap begins nothing: tokens
    may have been left out.

    Args:
        position_ids: (S,) or (B, S), any integer dtype. Or (C, B, S), positions of text, images and videos along C axes
            (time first): there time goes back, or all axes stay at 0.
    """
    if position_ids.dim() not in (1, 2, 3):
        raise ValueError(f"position_ids: shape {tuple(position_ids.shape)} given; expected (S,), (B, S) or (C, B, S)")
    time = position_ids[0] if position_ids.dim() == 3 else torch.atleast_2d(position_ids)
    is_zero = (position_ids == 0).all(0) if position_ids.dim() == 3 else time == 0
    # rolled, not sliced: a slice of S - 1 positions would be compiled anew for S = 2
    is_first = torch.arange(time.shape[1], device=time.device) == 0
    return is_first | (time < time.roll(1, 1)) | (is_zero & is_zero.roll(1, 1))


def from_document_starts(is_start: Tensor, max_documents: int | None = None) -> tuple[Tensor, Tensor]:
    """(b_start_loc, b_seq_len), each (max_documents,) int32, of the documents that lie in a (B * S, H, D) tensor.

    How many there are is known to the device alone, so the shape is that of a bound. Surplus sequences have length 0.
    More documents than the bound stop the device with an assertion.

    Args:
        is_start: (B, S) bool, True in the first column and where a document begins.
        max_documents: B * S if None. Kernels pay for the bound, not for what it bounds.
    """
    if is_start.dim() != 2:
        raise ValueError(f"is_start: shape {tuple(is_start.shape)} given; expected (B, S)")
    if is_start.dtype != torch.bool:
        raise TypeError(f"is_start: dtype {is_start.dtype} given; accepted is bool")
    document = is_start.flatten().cumsum(0)  # from 1 on
    if max_documents is None:
        max_documents = is_start.numel()
    else:
        torch._assert_async(
            (document[-1:] <= max_documents).all(),
            "packed sequences: more documents than max_documents; give the cumulative lengths (cu_seq_lens_q, "
            "cu_seq_lens_k, of the data collator) instead of position_ids",
        )
    numbers = torch.arange(1, max_documents + 2, device=is_start.device)
    cu_seqlens = torch.searchsorted(document, numbers, out_int32=True)
    return cu_seqlens[:-1], cu_seqlens[1:] - cu_seqlens[:-1]
