"""Shape, dtype and strides of what the ops return: the fakes and the real ops both allocate here, so they agree."""

import torch
from torch import Tensor


def empty_forward(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised (out, lse): out is contiguous, like q with v's head dimension; lse is float32,
    (Hq, total_q) packed or (B, Hq, Sq) padded."""
    *batch, rows, heads, _ = q.shape
    out = q.new_empty((*batch, rows, heads, v.shape[-1]))
    return out, q.new_empty((*batch, heads, rows), dtype=torch.float32)


def empty_skip(q: Tensor) -> tuple[Tensor, Tensor]:
    """(block_bits uint8, counts int64) of skip-softmax: no elements while nothing is skipped."""
    return q.new_empty((0,), dtype=torch.uint8), q.new_empty((0,), dtype=torch.int64)


def empty_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised, contiguous (dq, dk, dv)."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def empty_dsinks(q: Tensor, sinks: Tensor | None) -> Tensor:
    """dsinks, like sinks; no elements, float32, without them."""
    return q.new_empty((0,), dtype=torch.float32) if sinks is None else sinks.new_empty(sinks.shape)
