"""What every kernel launch needs: Triton, if it is there, the tile, the grid, and the strides of the arguments."""

import functools
from typing import Any

import torch
from torch import Tensor

from fa_ops_meta import checks

try:
    import triton
except ImportError:
    HAS_TRITON = IS_INTERPRETED = False
else:
    from fa_ops.kernels.configs import Tile, architecture, select_tile
    from fa_ops.kernels.primitives import CLEAR_ROWS

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


def require_triton(q: Tensor) -> None:
    if not HAS_TRITON:
        raise ImportError(f"q: device {q.device} given, and Triton is not installed: `pip install triton` (Linux)")


def grid(num_seqs: int, rows: int, block: int, heads: int, is_packed: bool) -> tuple[int, int]:
    """Enough tiles for any lengths: nothing is read back from the device to count them."""
    tiles = (rows + block - 1) // block
    return (tiles + num_seqs if is_packed else num_seqs * tiles), heads


def clearing_grid(num_seqs: int, rows: int, block: int, heads: int, is_packed: bool) -> tuple[int, int]:
    """Beside the tiles, if packed, a program for each CLEAR_ROWS rows, which clears those of no sequence."""
    tiles, _ = grid(num_seqs, rows, block, heads, is_packed)
    rows_at_once = CLEAR_ROWS.value * heads
    return (tiles + (rows + rows_at_once - 1) // rows_at_once if is_packed else tiles), heads


def tile_of(kernel: str, q: Tensor, v: Tensor, skip_blocks: tuple[int, int] | None) -> "Tile":
    arch = "interpreter" if q.device.type == "cpu" else architecture_of(q.device)
    return select_tile(kernel, arch, q.shape[-1], v.shape[-1], q.dtype == torch.float32, skip_blocks)


@functools.cache
def architecture_of(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    checks.check_capability(major, minor, torch.cuda.get_device_name(device))
    return architecture(major, minor)


def device_of(t: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device_of(t)
