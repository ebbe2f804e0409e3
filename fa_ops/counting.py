"""Counts what skip-softmax would keep of dense attention, by the kernel or on the CPU: calibration's half of the op."""

from torch import Tensor

from fa_ops.cpu_skip import count_kept_cpu
from fa_ops.launching import (
    HAS_TRITON,
    IS_INTERPRETED,
    device_of,
    grid,
    leading_strides,
    mask_strides,
    require_triton,
    strides_of,
    tile_of,
    with_positive_scale,
)
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS

if HAS_TRITON:
    from fa_ops.kernels.configs import block_dim
    from fa_ops.kernels.counting import count_kept_kernel


def count_kept(
    q: Tensor, k: Tensor, b_start_loc: Tensor, b_seq_len: Tensor, b_start_loc_k: Tensor, b_seq_len_k: Tensor,
    key_mask: Tensor | None, trials: Tensor, scale: float, softcap: float, left: int, right: int, br: int, bc: int,
    kept: Tensor, order: str = VISIT_ORDER,
) -> None:  # fmt: skip
    """Fills `kept` as `count_kept_cpu` does, whose arguments these are, on q's device."""
    if q.device.type == "cpu" and not IS_INTERPRETED:
        count_kept_cpu(
            q, k, b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, key_mask, trials, scale, softcap, left, right,
            br, bc, kept, order,
        )  # fmt: skip
        return
    require_triton(q)
    num_seqs, rows_q, rows_k, num_trials = b_seq_len.shape[0], q.shape[-3], k.shape[-3], trials.shape[0]
    if num_seqs * rows_q == 0:
        return
    b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, trials = (
        t.contiguous() for t in (b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, trials)
    )
    q, scale = with_positive_scale(q, scale)
    tile, is_packed = tile_of("forward", q, k, (br, bc)), q.dim() == 3
    with device_of(q):
        count_kept_kernel[grid(num_seqs, rows_q, br, q.shape[-2], is_packed)](
            q, k, trials, kept, b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k,
            b_seq_len if key_mask is None else key_mask,
            scale, softcap, left, right, num_seqs, rows_q, rows_k, num_trials,
            *strides_of(q), *strides_of(k), *mask_strides(key_mask), *leading_strides(kept),
            GROUP_SIZE=q.shape[-2] // k.shape[-2], HEAD_DIM=q.shape[-1], BLOCK_D=block_dim(q.shape[-1]),
            BLOCK_M=br, BLOCK_N=bc, BLOCK_TRIALS=1 << num_trials.bit_length(),
            HAS_LEFT=left >= 0, HAS_RIGHT=right >= 0, HAS_SOFTCAP=softcap > 0.0,
            IS_PACKED=is_packed, HAS_KEY_MASK=key_mask is not None, VISIT_ORDER=VISIT_ORDERS.index(order),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
