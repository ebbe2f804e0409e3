"""What every kernel launch needs: Triton, if it is there, and the strides of the arguments."""

import functools
from typing import Any

import torch
from torch import Tensor

try:
    import triton
except ImportError:
    HAS_TRITON = IS_INTERPRETED = False
else:
    HAS_TRITON = True
    IS_INTERPRETED = triton.knobs.runtime.interpret

if IS_INTERPRETED:

    def wrap_triton(kernel: Any, /) -> Any:
        """Interpreted kernels are launched bare: torch 2.11 refuses to wrap them."""
        return kernel
else:
    from torch.library import wrap_triton as wrap_triton


INTERPRETED_MULTI_PROCESSORS = 16


@functools.cache
def multi_processors(device: torch.device) -> int:
    """Of a GPU; a number in the interpreter."""
    if device.type == "cpu":
        return INTERPRETED_MULTI_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def strides_of(t: Tensor) -> tuple[int, int, int]:
    """(batch or page, row, head) strides; packed tensors have no batch."""
    return (0, t.stride(0), t.stride(1)) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


def lse_strides(lse: Tensor) -> tuple[int, int]:
    return (0, lse.stride(0)) if lse.dim() == 2 else (lse.stride(0), lse.stride(1))


def dlse_strides(dlse: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 1) if dlse is None else (*lse_strides(dlse), dlse.stride(-1))


def mask_strides(key_mask: Tensor | None) -> tuple[int, int]:
    return (0, 1) if key_mask is None else (key_mask.stride(0), key_mask.stride(1))


def leading_strides(t: Tensor | None) -> tuple[int, int]:
    """The first two, of a threshold (B, Hq), of block_bits (Hq, tiles, words), of a block_table (B, pages)."""
    return (0, 0) if t is None or t.dim() < 2 else (t.stride(0), t.stride(1))


def page_counts(k: Tensor, block_table: Tensor | None) -> tuple[int, int]:
    """Rows of a page, and pages; of no meaning without a block_table."""
    return (1, 1) if block_table is None else (k.shape[1], k.shape[0])


def paging(k: Tensor, block_table: Tensor | None, block_n: int) -> int:
    """How the kernels find the keys of a block, PAGING of `fa_ops.kernels.primitives.find_keys`."""
    if block_table is None:
        return 0
    return 1 if k.shape[1] % block_n == 0 else 2
