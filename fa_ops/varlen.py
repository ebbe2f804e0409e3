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
    position = torch.arange(1, mask.shape[1] + 1, device=mask.device, dtype=torch.int32)
    end = (position * mask).amax(1) if mask.shape[1] else position.new_zeros(mask.shape[0])
    behind = ((mask.shape[1] + 1 - position) * mask).amax(1) if mask.shape[1] else end
    start = torch.where(end > 0, mask.shape[1] - behind, 0)
    return start.to(torch.int32), (end - start).to(torch.int32)
