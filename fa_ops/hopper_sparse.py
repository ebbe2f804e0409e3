"""Skip-softmax on sm_90: the opaque op of the sparse forward kernel, and its launch.

`fa_ops.hopper.refusal` says when it is taken.
"""

from typing import Any

import torch
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled

from fa_ops import hopper
from fa_ops.launching import launch_compiled, leading_strides, multi_processors
from fa_ops_meta import outputs
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS

_library = torch.library.Library("modelopt", "FRAGMENT")
_library.define(
    "_varlen_attention_sparse_sm90(Tensor q, Tensor k, Tensor v, Tensor b_start_loc, Tensor b_seq_len, "
    "Tensor b_start_loc_k, Tensor b_seq_len_k, Tensor? key_mask, Tensor threshold, float softmax_scale, "
    "SymInt window_right, int skip_block_q, int skip_block_k) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    b_start_loc_k: Tensor,
    b_seq_len_k: Tensor,
    key_mask: Tensor | None,
    threshold: Tensor,
    softmax_scale: float,
    window_right: int,
    skip_block_q: int,
    skip_block_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out, lse, block_bits, counts) of what `hopper.unsupported` lets through; index tensors are contiguous,
    threshold is (B, Hq), of any strides."""
    from fa_ops.kernels.configs import HOPPER_SPARSE_TILES
    from fa_ops.kernels.hopper_sparse import CONSUMERS, ROWS, hopper_sparse_forward_kernel

    out, lse = outputs.empty_forward(q, v)
    block_bits, counts = outputs.empty_skip(q, k, b_seq_len, (skip_block_q, skip_block_k))
    block_bits.zero_()
    counts.zero_()
    num_seqs, rows_q, rows_k, heads = b_seq_len.shape[0], q.shape[-3], k.shape[-3], q.shape[-2]
    if num_seqs * rows_q * rows_k * heads == 0:
        return out.zero_(), lse.fill_(float("-inf")), block_bits, counts
    group_size = heads // k.shape[-2]
    q, k, v = (hopper.for_copy_engine(t) for t in (q, k, v))
    if sum((n - 1) * stride for n, stride in zip(threshold.shape, threshold.stride(), strict=True)) >= 2**31:
        threshold = threshold.contiguous()  # the kernel's indices have 32 bits
    tile = HOPPER_SPARSE_TILES[q.shape[-1]]
    assert (ROWS.value, tile.block_n) == (skip_block_q, skip_block_k)
    with torch.cuda.device_of(q):
        listing = hopper.plan_tile_list(
            q, k, v, b_seq_len, key_mask, -1, window_right, ROWS.value * CONSUMERS.value, tile.block_n, skip_block_q
        )
        tiles = hopper.list_tiles(listing, out, lse, b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, key_mask)
        args = (
            hopper.ragged_descriptor(q, ROWS.value), hopper.ragged_descriptor(k, tile.block_n),
            hopper.ragged_descriptor(v, tile.block_n), hopper.ragged_descriptor(out, ROWS.value),
            out, lse, tiles, tiles[-1], threshold, block_bits, counts,
            rows_q, heads, group_size, group_size * hopper.heads_at_once(k, b_seq_len, k.shape[-2]), num_seqs,
            softmax_scale, window_right,
            *leading_strides(threshold), *leading_strides(block_bits),
        )  # fmt: skip
        constants = {
            "HEAD_DIM": q.shape[-1], "BLOCK_N": tile.block_n, "K_STAGES": tile.k_stages, "V_STAGES": tile.v_stages,
            "CONSUMER_REGISTERS": tile.consumer_registers, "PRODUCER_REGISTERS": tile.producer_registers,
            "HAS_RIGHT": window_right >= 0, "VISIT_ORDER": VISIT_ORDERS.index(VISIT_ORDER), "num_warps": 4,
        }  # fmt: skip
        programs = min(multi_processors(q.device), listing.bound * heads)
        launch_compiled(hopper_sparse_forward_kernel, (programs,), args, constants)
    return out, lse, block_bits, counts


_library.impl("_varlen_attention_sparse_sm90", launch, "CUDA")
torch.library.register_fake(
    "modelopt::_varlen_attention_sparse_sm90",
    lambda q, k, v, start, length, start_k, length_k, key_mask, threshold, scale, right, block_q, block_k: (
        *outputs.empty_forward(q, v),
        *outputs.empty_skip(q, k, length, (block_q, block_k)),
    ),
    lib=_library,
)
forward = torch.ops.modelopt._varlen_attention_sparse_sm90.default


def attend(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`launch`, behind its opaque op where the body that calls it is traced."""
    return forward(*args) if is_wrap_triton_enabled() else launch(*args)
