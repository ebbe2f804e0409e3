"""The backward kernels for sm_90: when they are taken, their opaque op, their launch. See hopper.py for the forward."""

import functools
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled

from fa_ops import hopper
from fa_ops.launching import (
    Launch,
    dlse_strides,
    grid,
    lse_strides,
    mask_strides,
    multi_processors,
    remember,
    strides_of,
)
from fa_ops_meta import outputs

if TYPE_CHECKING:
    from fa_ops.kernels.configs import HopperTile

HEAD_DIMS = (64, 128)

_library = torch.library.Library("modelopt", "FRAGMENT")
_library.define(
    "_varlen_attention_sm90_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q, Tensor k, Tensor v, "
    "Tensor b_start_loc, Tensor b_seq_len, Tensor b_start_loc_k, Tensor b_seq_len_k, Tensor? key_mask, "
    "float softmax_scale, SymInt window_right, bool has_sinks) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def refusal(q: Tensor, *call: Any) -> str | None:
    """Why the portable kernels run a call, which `unsupported` describes, instead; None if these do."""
    return hopper.device_refusal(q) or unsupported(q, *call)


def unsupported(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_seq_len: Tensor,
    softmax_scale: float,
    window_left: int,
    softcap: float,
    threshold: Tensor | None,
) -> str | None:
    """What of a call the kernels do not know, whatever the device; None if nothing. Sinks are in lse."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"head dimension {q.shape[-1]}"
    for name, is_used in (
        ("window_left", window_left >= 0),  # it would spill registers
        ("skip_softmax_threshold", threshold is not None),
    ):
        if is_used:
            return name
    rows, num_seqs = k.shape[-3], b_seq_len.shape[0]
    tiles = rows // 64 + num_seqs if k.dim() == 3 else (rows // 64 + 1) * num_seqs
    if tiles * max(k.shape[-2], 16) >= 2**31:  # as in hopper.py
        return "number of tiles"
    return hopper.unsupported(q, k, v, b_seq_len, softmax_scale, window_left, softcap, None, None, None)


def launch(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    b_start_loc_k: Tensor,
    b_seq_len_k: Tensor,
    key_mask: Tensor | None,
    softmax_scale: float,
    window_right: int,
    has_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, delta) of what `unsupported` lets through; index tensors are contiguous. delta is like lse, and has
    no elements without sinks, whose gradient needs it. Gradients of sequences with holes in their keys are 0: the
    portable kernels come after these."""
    dq, dk, dv = outputs.empty_backward(q, k, v)
    delta = _delta_without_keys(dlse, lse, has_sinks)
    if 0 in (b_seq_len.shape[0], q.shape[-3], k.shape[-3], q.shape[-2]):
        return dq.zero_(), dk.zero_(), dv.zero_(), delta
    if hopper._unsupported_layout(dout) is not None:
        dout = dout.clone(memory_format=torch.contiguous_format)
    q, k, v, dout = map(hopper.aligned, (q, k, v, dout))
    index = b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k
    with torch.cuda.device_of(q):
        plan = _plan(dout, dlse, out, lse, q, k, v, b_seq_len, b_seq_len_k, key_mask, window_right, has_sinks)
        terms = q.new_empty(plan.terms_shape, dtype=torch.float32)
        plan.terms(out, lse, dout, lse if dlse is None else dlse, terms, delta, *index, *plan.terms_numbers)
        sides = q, dout, k, v
        tiles = hopper.list_tiles(plan.query_tiles, dq, dq, *index, key_mask)
        described = map(operator.call, plan.dq_descriptors, (*sides, dq))
        plan.dq(*described, terms, plan.terms_shape[1], tiles, *plan.dq_counts, softmax_scale, window_right)
        tiles = hopper.list_tiles(plan.key_tiles, dk, dv, *index, key_mask)
        described = map(operator.call, plan.dkv_descriptors, (*sides, terms, dk, dv))
        plan.dkv(*described, tiles, *plan.dkv_counts, softmax_scale, window_right)
    return dq, dk, dv, delta


class _Plan(NamedTuple):
    """What shapes tell of the launches: the kernels on their grids, what makes their descriptors, the numbers among
    their arguments."""

    terms: Launch
    terms_shape: tuple[int, int]
    terms_numbers: tuple[int, ...]
    query_tiles: hopper.TileList
    dq: Launch
    dq_descriptors: tuple[Callable, ...]  # of q, dout, k, v, dq
    dq_counts: tuple[int, ...]
    key_tiles: hopper.TileList
    dkv: Launch
    dkv_descriptors: tuple[Callable, ...]  # of q, dout, k, v, terms, dk, dv
    dkv_counts: tuple[int, ...]


@remember
def _plan(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_seq_len: Tensor,
    b_seq_len_k: Tensor,
    key_mask: Tensor | None,
    window_right: int,
    has_sinks: bool,
) -> _Plan:
    from fa_ops.kernels.backward_tiles import row_terms_kernel
    from fa_ops.kernels.configs import HOPPER_BACKWARD_TILES
    from fa_ops.kernels.hopper import ROWS
    from fa_ops.kernels.hopper_backward import hopper_dkv_kernel, hopper_dq_kernel

    is_packed, num_seqs, rows_q, rows_k = q.dim() == 3, b_seq_len.shape[0], q.shape[-3], k.shape[-3]
    heads, heads_kv, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    group_size = heads // heads_kv
    dq_tile, dkv_tile = HOPPER_BACKWARD_TILES[head_dim]
    block = dkv_tile.block_n
    row_grid = grid(num_seqs, rows_q, block, heads, is_packed)
    terms_shape = 2 * heads, row_grid[0] * block
    terms_constants = {
        "HEAD_DIM": head_dim, "BLOCK": block, "HAS_RIGHT": window_right >= 0, "IS_PACKED": is_packed,
        "HAS_DLSE": dlse is not None, "HAS_DELTA": has_sinks, "num_warps": 4,
    }  # fmt: skip
    lists = q, dout, k, v, b_seq_len, key_mask, window_right, block
    query_tiles = plan_tile_list(*lists, ROWS.value * dq_tile.consumers, dq_tile.block_n, of_keys=False)
    key_tiles = plan_tile_list(*lists, ROWS.value * dkv_tile.consumers, block, of_keys=True)
    programs = multi_processors(q.device)
    return _Plan(
        Launch(row_terms_kernel, row_grid, terms_constants), terms_shape,
        (
            window_right, num_seqs, rows_q, rows_k, terms_shape[1],
            *strides_of(out), *lse_strides(lse), *strides_of(dout), *dlse_strides(dlse),
        ),
        query_tiles,
        Launch(
            hopper_dq_kernel, (min(programs, query_tiles.bound * heads),),
            _constants(dq_tile, head_dim, window_right) | {"BLOCK_N": dq_tile.block_n},
        ),
        (
            *(hopper.ragged(t, ROWS.value) for t in (q, dout)), *(hopper.ragged(t, dq_tile.block_n) for t in (k, v)),
            hopper.ragged(q, ROWS.value, is_contiguous=True),
        ),
        (query_tiles.bound, heads, group_size, group_size * hopper.heads_at_once(k, b_seq_len_k, heads_kv)),
        key_tiles,
        Launch(
            hopper_dkv_kernel, (min(programs, key_tiles.bound * heads_kv),),
            _constants(dkv_tile, head_dim, window_right) | {"BLOCK_M": block},
        ),
        (
            *(hopper.ragged(t, block) for t in (q, dout)), *(hopper.ragged(t, ROWS.value) for t in (k, v)),
            terms_descriptor(terms_shape, block),
            *(hopper.ragged(k, ROWS.value, is_contiguous=True),) * 2,
        ),
        (key_tiles.bound, heads_kv, group_size, hopper.heads_at_once(q, b_seq_len, heads_kv)),
    )  # fmt: skip


def plan_tile_list(
    q: Tensor,
    dout: Tensor,
    k: Tensor,
    v: Tensor,
    b_seq_len: Tensor,
    key_mask: Tensor | None,
    window_right: int,
    terms_block: int,
    tile: int,
    block: int,
    of_keys: bool,
) -> hopper.TileList:
    from fa_ops.kernels.backward_tiles import RECORD, backward_tiles_kernel

    own, num_seqs = k if of_keys else q, b_seq_len.shape[0]
    numbers = (
        window_right, num_seqs, q.shape[-3], k.shape[-3], *(hopper.batch_rows(t) for t in (q, dout, k, v)),
        own.shape[-2], *mask_strides(key_mask),
    )  # fmt: skip
    constants = {
        "HEAD_DIM": own.shape[-1], "TILE": tile, "BLOCK": block, "TERMS_BLOCK": terms_block, "OF_KEYS": of_keys,
        "HAS_RIGHT": window_right >= 0, "IS_PACKED": q.dim() == 3, "HAS_KEY_MASK": key_mask is not None,
    }  # fmt: skip
    return hopper.tile_list(backward_tiles_kernel, numbers, constants, own, num_seqs, tile, RECORD.value)


def _constants(tile: "HopperTile", head_dim: int, window_right: int) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim, "STAGES": tile.stages, "CONSUMERS": tile.consumers,
        "CONSUMER_REGISTERS": tile.consumer_registers, "PRODUCER_REGISTERS": tile.producer_registers,
        "HAS_RIGHT": window_right >= 0, "num_warps": 4,
    }  # fmt: skip


def terms_descriptor(shape: tuple[int, int], block: int) -> Callable[[Tensor], Any]:
    """Makes what the copy engine needs to know of terms (2 Hq, rows), contiguous, to read `block` numbers of a row."""
    return functools.partial(
        hopper.descriptor_class(), shape=list(shape), strides=[shape[1], 1], block_shape=(1, block),
        layout=_terms_layout(),
    )  # fmt: skip


@functools.cache
def _terms_layout() -> Any:
    from triton.experimental.gluon import language as gl

    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def _delta_without_keys(dlse: Tensor | None, lse: Tensor, has_sinks: bool) -> Tensor:
    """delta of rows that see no key, whose out is 0; the kernel writes that of the others."""
    if not has_sinks:
        return lse.new_empty((0,))
    return torch.zeros_like(lse) if dlse is None else torch.neg(dlse, out=torch.empty_like(lse))


def _fake(dout, dlse, out, lse, q, k, v, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_sinks = arguments[-1]
    return *outputs.empty_backward(q, k, v), torch.empty_like(lse) if has_sinks else lse.new_empty((0,))


_library.impl(
    "_varlen_attention_sm90_backward",
    lambda dout, dlse, out, lse, q, k, v, *rest: launch(
        dout, dlse, out, lse, hopper.for_copy_engine(q), hopper.for_copy_engine(k), hopper.for_copy_engine(v), *rest
    ),
    "CUDA",
)
torch.library.register_fake("modelopt::_varlen_attention_sm90_backward", _fake, lib=_library)
backward = torch.ops.modelopt._varlen_attention_sm90_backward.default


def attend(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch`, behind its opaque op where the body that calls it is traced."""
    return backward(*args) if is_wrap_triton_enabled() else launch(*args)
