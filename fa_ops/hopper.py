"""The forward kernel for sm_90: when it is taken, its opaque op, its launch.

Inductor writes a Triton kernel's source out anew, under `triton.jit`; a Gluon kernel has to sit behind an op of its
own.
"""

import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled

from fa_ops.kernels import tier
from fa_ops.launching import Launch, grid, mask_strides, multi_processors, remember
from fa_ops_meta import outputs

TRITON_VERSIONS = ("3.6", "3.7")  # those whose Gluon compiles it
HEAD_DIMS = (64, 128, 256)
SKIP_BLOCKS = {64: ((64, 128),), 128: ((64, 128),), 256: ((64, 64),)}  # of skip-softmax, by head dimension
ALIGNMENT = 16  # bytes: of the copy engine's addresses and strides
TILE_LIST_WARPS = 4
MAX_ROWS = 2**30  # of a ragged descriptor
CACHED_BYTES = 2**24  # of the L2 cache's 50 MiB, where several parts are at work and results pass through
LEAST_SCALE = 1e-30  # row maxima are taken before scaling, and 0 * -inf is NaN

_library = torch.library.Library("modelopt", "FRAGMENT")
_library.define(
    "_varlen_attention_sm90(Tensor q, Tensor k, Tensor v, Tensor b_start_loc, Tensor b_seq_len, Tensor b_start_loc_k, "
    "Tensor b_seq_len_k, Tensor? key_mask, float softmax_scale, SymInt window_left, SymInt window_right) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def refusal(q: Tensor, *call: Any) -> str | None:
    """Why the portable kernel runs a call, which `unsupported` describes, instead; None if this one does."""
    return device_refusal(q) or unsupported(q, *call)


def device_refusal(q: Tensor) -> str | None:
    """Why kernels for sm_90 do not run on q's device; None if they do."""
    if tier.TIER == "portable":
        return "FA_OPS_KERNEL is 'portable'"
    if q.device.type != "cuda" or _capability(q.device) != (9, 0):
        return f"{q.device} is not of sm_90"
    if _triton_version() not in TRITON_VERSIONS:
        return f"Triton {_triton_version()} is none of {', '.join(TRITON_VERSIONS)}"
    return None


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_seq_len: Tensor,
    softmax_scale: float,
    window_left: int,
    softcap: float,
    sinks: Tensor | None,
    block_table: Tensor | None,
    skip_blocks: tuple[int, int] | None,
) -> str | None:
    """What of a call the kernel does not know, whatever the device; None if nothing. Lengths have no say, since a
    sequence's result must not depend on its neighbours."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {q.dtype}"
    if q.shape[-1] not in HEAD_DIMS or v.shape[-1] != q.shape[-1]:
        return f"head dimensions {q.shape[-1]} and {v.shape[-1]}"
    for name, is_used in (
        ("softmax_scale", softmax_scale < LEAST_SCALE),
        ("window_left", window_left >= 0 and q.shape[-1] > 128),  # it would spill registers
        ("softcap", softcap > 0),
        ("sinks", sinks is not None),
        ("block_table", block_table is not None),
        ("skip_softmax_block", skip_blocks is not None and skip_blocks not in SKIP_BLOCKS[q.shape[-1]]),
        ("window_left with skip_softmax_threshold", window_left >= 0 and skip_blocks is not None),
        ("padded queries of one row", q.dim() == 4 and q.shape[1] == 1),  # 63 of 64 rows would be waste
    ):
        if is_used:
            return name
    for name, t in (("q", q), ("k", k), ("v", v)):
        reason = _unsupported_layout(t)
        if reason is not None:
            return f"{name}: {reason}"
    rows, num_seqs = q.shape[-3], b_seq_len.shape[0]
    tiles = rows // 64 + num_seqs if q.dim() == 3 else (rows // 64 + 1) * num_seqs
    if tiles * max(q.shape[-2], 16) >= 2**31:  # 32-bit indices of a tile and head, and into the list of tiles
        return "number of tiles"
    if skip_blocks is not None and _are_many_blocks(q, k, num_seqs, skip_blocks):
        return "number of blocks"
    return None


def _are_many_blocks(q: Tensor, k: Tensor, num_seqs: int, skip_blocks: tuple[int, int]) -> bool:
    """Whether the sparse kernel's 32-bit indices into lse or block_bits might not do."""
    shape = outputs.skip_shape(q, k, num_seqs, skip_blocks)
    # the larger of the two would be a branch on the length
    return math.prod(shape) >= 2**31 or math.prod(q.shape[:-1]) >= 2**31


def _unsupported_layout(t: Tensor) -> str | None:
    """What keeps the copy engine from reading t; the batch has to lie a whole number of rows apart."""
    shape, strides, offset = t.shape, t.stride(), t.storage_offset()
    elements = ALIGNMENT // t.element_size()
    *outer, stride_d = strides
    are_whole = stride_d == 1 and offset % elements == 0
    for stride in outer:
        are_whole = are_whole and stride > 0 and stride % elements == 0
    if not are_whole:
        return f"strides {tuple(strides)} at offset {offset}"
    rows = shape[-3]
    if len(outer) == 3:
        stride_b, stride_t, _ = outer
        if stride_b % stride_t:
            return f"batch stride {stride_b} is no multiple of the row stride {stride_t}"
        rows += max(stride_b // stride_t, rows) * (shape[0] - 1)
    if rows > MAX_ROWS:
        return f"more than {MAX_ROWS} rows"
    return None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def ragged_descriptor(t: Tensor, block_rows: int) -> Any:
    """What the copy engine needs to know of t, packed or padded, to read tiles (1, 1, 1, block_rows, D) of one head
    inside one sequence: rows past the sequence's end come as zeros.

    The engine knows bounds for each dimension of a tensor, and no others. So rows get three coordinates, (x, y, z) with
    strides (2^34 - s, s, s), s being the row stride, and z has the bound R = 2^30. At x = R, y = first + length and
    z = R - length + row a row past the sequence's end is past R, while addresses, which are taken modulo 2^64, become
    R (2^34 - s) + (first + length) s + (R - length + row) s = (first + row) s, as 2^30 2^34 elements are 0 modulo 2^64
    bytes.
    """
    return ragged(t, block_rows)(t)


def ragged(t: Tensor, block_rows: int, is_contiguous: bool = False) -> Callable[[Tensor], Any]:
    """`ragged_descriptor` of tensors like t; of t's shape and dtype alone, where they are contiguous."""
    *_, heads, dim = t.shape
    *_, stride_t, stride_h, _ = (heads * dim, dim, 1) if is_contiguous else t.stride()
    block = (1, 1, 1, block_rows, dim)
    return functools.partial(
        descriptor_class(),
        shape=[2**31 - 2**16, 2**31 - 2**16, heads, MAX_ROWS, dim],
        strides=[2**34 - stride_t, stride_t, stride_h, stride_t, 1],
        block_shape=block,
        layout=_shared_layout(block, t.dtype),
    )


@functools.cache
def descriptor_class() -> Any:
    """Triton's, without its checks, for which `unsupported` stands: they would take as long as all of a launch."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    class Descriptor(TensorDescriptor):
        def __init__(self, base: Tensor, **fields: Any) -> None:
            self.__dict__.update(fields, base=base)

    return Descriptor


@functools.cache
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout.get_default_for(list(block), getattr(gl, str(dtype).removeprefix("torch.")))


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    b_start_loc_k: Tensor,
    b_seq_len_k: Tensor,
    key_mask: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of what `unsupported` lets through; index tensors are contiguous. Rows of sequences with holes in
    their keys are 0 and -inf: the portable kernel comes after this one."""
    out, lse = outputs.empty_forward(q, v)
    if 0 in (b_seq_len.shape[0], q.shape[-3], k.shape[-3], q.shape[-2]):
        return out.zero_(), lse.fill_(float("-inf"))
    q, k, v = aligned(q), aligned(k), aligned(v)
    with torch.cuda.device_of(q):
        listing, forward, descriptors, counts, window = _plan(q, k, v, b_seq_len, key_mask, window_left, window_right)
        tiles = list_tiles(listing, out, lse, b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, key_mask)
        described = map(operator.call, descriptors, (q, k, v, out))
        forward(*described, out, lse, tiles, *counts, softmax_scale, *window)
    return out, lse


@remember
def _plan(
    q: Tensor, k: Tensor, v: Tensor, b_seq_len: Tensor, key_mask: Tensor | None, window_left: int, window_right: int
) -> tuple["TileList", Launch, tuple[Callable, ...], tuple[int, ...], tuple[int, int]]:
    """What shapes tell of both launches: beside them, what makes descriptors (of out, too), the counts, the window."""
    from fa_ops.kernels.configs import HOPPER_TILES
    from fa_ops.kernels.hopper import ROWS, hopper_forward_kernel

    rows_q, heads, head_dim = q.shape[-3:]
    group_size = heads // k.shape[-2]
    tile = HOPPER_TILES[head_dim]
    if window_right < 0:
        window_right = rows_q  # hides nothing
    listing = plan_tile_list(
        q, k, v, b_seq_len, key_mask, window_left, window_right, ROWS.value * tile.consumers, tile.block_n
    )
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_N": tile.block_n, "STAGES": tile.stages, "CONSUMERS": tile.consumers,
        "CONSUMER_REGISTERS": tile.consumer_registers, "PRODUCER_REGISTERS": tile.producer_registers,
        "HAS_LEFT": window_left >= 0, "num_warps": 4,
    }  # fmt: skip
    programs = min(multi_processors(q.device), listing.bound * heads)
    return (
        listing, Launch(hopper_forward_kernel, (programs,), constants),
        (
            ragged(q, ROWS.value), ragged(k, tile.block_n), ragged(v, tile.block_n),
            ragged(q, ROWS.value, is_contiguous=True),
        ),
        (listing.bound, rows_q, heads, group_size, group_size * heads_at_once(k, b_seq_len, k.shape[-2])),
        (window_left, window_right),
    )  # fmt: skip


def heads_at_once(t: Tensor, b_seq_len: Tensor, heads: int) -> int:
    """How many of `heads` key heads are taken together: those for which two tensors like t, with the rows of a sequence
    of mean length, find room in the L2 cache."""
    rows = t.shape[1] if t.dim() == 4 else max(t.shape[0] // b_seq_len.shape[0], 1)
    size = 2 * rows * math.prod(t.shape[-2:]) * t.element_size() // heads
    return max(n for n in range(1, heads + 1) if heads % n == 0 and n * size <= max(CACHED_BYTES, size))


class TileList(NamedTuple):
    """What shapes tell of the launch of a kernel that lists tiles, `tile_list_kernel` or `backward_tiles_kernel`: it,
    the numbers among its arguments, how many tiles there can be, the shape of their records."""

    launch: Launch
    numbers: tuple[int, ...]
    bound: int
    shape: tuple[int, int]


def plan_tile_list(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_seq_len: Tensor,
    key_mask: Tensor | None,
    window_left: int,
    window_right: int,
    block_m: int,
    block_n: int,
    skip_block_q: int = 0,
) -> TileList:
    from fa_ops.kernels.tiles import RECORD, tile_list_kernel

    num_seqs = b_seq_len.shape[0]
    numbers = (
        window_left, window_right, num_seqs, q.shape[-3], k.shape[-3], *(batch_rows(t) for t in (q, k, v)), q.shape[-2],
        *mask_strides(key_mask),
    )  # fmt: skip
    constants = {
        "HEAD_DIM": q.shape[-1], "BLOCK_M": block_m, "BLOCK_N": block_n,
        "HAS_LEFT": window_left >= 0, "HAS_RIGHT": window_right >= 0, "IS_PACKED": q.dim() == 3,
        "HAS_KEY_MASK": key_mask is not None, "SKIP_BLOCK_Q": skip_block_q,
    }  # fmt: skip
    return tile_list(tile_list_kernel, numbers, constants, q, num_seqs, block_m, RECORD.value)


def tile_list(
    kernel: Any, numbers: tuple[int, ...], constants: dict[str, Any], own: Tensor, num_seqs: int, tile: int, record: int
) -> TileList:
    """A kernel that lists the tiles of `tile` rows of `own`, and clears what no tile with blocks has."""
    from fa_ops.kernels.primitives import CLEAR_ROWS

    rows, is_packed = own.shape[-3], own.dim() == 3
    bound, _ = grid(num_seqs, rows, tile, 1, is_packed)
    pieces = -(-rows // CLEAR_ROWS.value) if is_packed else 0
    launch = Launch(kernel, (bound + pieces,), constants | {"num_warps": TILE_LIST_WARPS})
    return TileList(launch, numbers, bound, (bound + 1, record))


def list_tiles(
    plan: TileList,
    cleared: Tensor,
    cleared_too: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    b_start_loc_k: Tensor,
    b_seq_len_k: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """The tiles of a batch, as the plan's kernel describes them. It clears the rows of the two that no tile with blocks
    has: of out to 0 and of lse to -inf, of dq (given twice), or of dk and dv, to 0."""
    records = b_seq_len.new_empty(plan.shape, dtype=torch.int32)
    plan.launch(
        records, cleared, cleared_too, b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k,
        b_seq_len if key_mask is None else key_mask, *plan.numbers,
    )  # fmt: skip
    return records


def batch_rows(t: Tensor) -> int:
    """The batch stride in rows."""
    return 0 if t.dim() == 3 else t.stride(0) // t.stride(1)


def aligned(t: Tensor) -> Tensor:
    """t itself, but for a storage that begins at an odd address: no allocator of torch's makes one."""
    return t if t.data_ptr() % ALIGNMENT == 0 else t.clone()


def for_copy_engine(t: Tensor) -> Tensor:
    """`aligned`, of an argument of an opaque op, which need not be what the caller of the op asked `unsupported` of."""
    t = aligned(t)
    reason = _unsupported_layout(t)
    if reason is not None:
        raise ValueError(f"modelopt::_varlen_attention_sm90 cannot read a tensor with {reason}")
    return t


_library.impl(
    "_varlen_attention_sm90",
    lambda q, k, v, *rest: launch(for_copy_engine(q), for_copy_engine(k), for_copy_engine(v), *rest),
    "CUDA",
)
torch.library.register_fake(
    "modelopt::_varlen_attention_sm90", lambda q, k, v, *_: outputs.empty_forward(q, v), lib=_library
)
forward = torch.ops.modelopt._varlen_attention_sm90.default


def attend(*args: Any) -> tuple[Tensor, Tensor]:
    """`launch`, behind its opaque op where the body that calls it is traced."""
    return forward(*args) if is_wrap_triton_enabled() else launch(*args)
