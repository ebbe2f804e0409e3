"""Counts for skip-softmax's calibration: what each of many thresholds would drop of dense attention.

Dropping never changes the running maximum, so one pass over the scores, without exponentials or values, tells the
margins of every block (skip.py). A program takes one query tile of one head and counts the blocks that each threshold
keeps.
"""

import triton
import triton.language as tl

from fa_ops.kernels.forward import _scores
from fa_ops.kernels.primitives import (
    COUNTS,
    SCAN_BLOCK,
    clamp_range,
    key_range,
    load_own_rows,
    load_rows,
    padded_tile,
    scan_lengths,
    score_scales,
)
from fa_ops.kernels.skip import load_log_threshold, row_margins, sees_block, visit


@triton.jit
def visited_range(
    offs_m, begin, end, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """(begin, end) from the first to the last of the visited blocks, which have a part in some orders. In a kernel that
    writes where these decide, no function may find them (see primitives.py)."""
    if HAS_KEY_MASK:
        while (begin < end) & (not sees_block(
            offs_m, begin, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
            BLOCK_N, HAS_LEFT, HAS_RIGHT,
        )):  # fmt: skip
            begin += BLOCK_N
        last = begin + tl.maximum(tl.cdiv(end - begin, BLOCK_N) - 1, 0) * BLOCK_N
        while (last > begin) & (not sees_block(
            offs_m, last, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
            BLOCK_N, HAS_LEFT, HAS_RIGHT,
        )):  # fmt: skip
            last -= BLOCK_N
        end = tl.minimum(end, last + BLOCK_N)
    return begin, end


@triton.jit(do_not_specialize=(*COUNTS, "num_trials", "stride_ch", "stride_ct"))
def count_kept_kernel(
    q_ptr, k_ptr, trials_ptr, kept_ptr,
    b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr,
    softmax_scale, softcap, window_left, window_right, num_seqs, rows_q, rows_k, num_trials,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_mb, stride_ms, stride_ch, stride_ct,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_TRIALS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, VISIT_ORDER: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of query rows, Hq), tiles as in the forward. kept (Hq, tiles, num_trials + 1) int32, the last of all
    blocks visited; tiles of no sequence are left as they are. BLOCK_TRIALS: a power of two, more than num_trials."""
    tile = tl.program_id(0)
    seq, index, count = padded_tile(tile, rows_q, BLOCK_M)
    if IS_PACKED:
        seq, first, end, count = 0, 0, 0, 0
        scanned = 0
        while (scanned < num_seqs) & (end <= tile):
            offs = scanned + tl.arange(0, SCAN_BLOCK)
            length = tl.load(b_seq_len_ptr + offs, mask=offs < num_seqs, other=0)
            seq, first, end, count = scan_lengths(length, tile, seq, first, end, rows_q, BLOCK_M)
            scanned += SCAN_BLOCK
        index = tile - first
    if seq >= num_seqs:
        return
    start_q, len_q = clamp_range(tl.load(b_start_loc_ptr + seq), tl.load(b_seq_len_ptr + seq), rows_q)
    start_k, len_k = clamp_range(tl.load(b_start_loc_k_ptr + seq), tl.load(b_seq_len_k_ptr + seq), rows_k)
    # the tiles that see the most keys first
    m0 = (count - 1 - index) * BLOCK_M
    if m0 >= len_q:
        return

    head = tl.program_id(1).to(tl.int64)
    batch = seq.to(tl.int64)
    q_ptr += batch * stride_qb + head * stride_qh
    k_ptr += batch * stride_kb + head // GROUP_SIZE * stride_kh
    if HAS_KEY_MASK:
        key_mask_ptr += batch * stride_mb
    offs_tile = tl.arange(0, BLOCK_M)
    offs_m = m0 + offs_tile
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    q = load_own_rows(q_ptr, stride_qt, start_q + m0, offs_tile, rows_q, offs_d, HEAD_DIM, BLOCK_D)
    cap_scale, scale = score_scales(softmax_scale, softcap, HAS_SOFTCAP)
    scale = tl.maximum(scale, 1e-30)  # 0 * -inf is NaN

    offs_t = tl.arange(0, BLOCK_TRIALS)
    # behind the trials -inf, which drops nothing
    log_trials = load_log_threshold(trials_ptr + offs_t, offs_t < num_trials)
    kept = tl.zeros([BLOCK_TRIALS], tl.int32)
    m_before = tl.full([BLOCK_M], float("-inf"), tl.float32)
    m_first = m_before
    segment = -1
    begin, full, full_end, end = key_range(
        m0, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    begin, end = visited_range(
        offs_m, begin, end, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
        BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_KEY_MASK,
    )  # fmt: skip
    num_blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    for step in tl.range(0, num_blocks):
        n0 = begin + visit(step, num_blocks, VISIT_ORDER) * BLOCK_N
        key = start_k + n0
        is_key = n0 + offs_n < len_k
        if HAS_KEY_MASK:
            is_key = tl.load(key_mask_ptr + (key + offs_n) * stride_ms, mask=is_key, other=0) != 0
        k = load_rows(k_ptr + key * stride_kt, stride_kt, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, True)
        s = _scores(
            q, k, is_key, offs_m, n0 + offs_n, len_q, len_k, cap_scale, window_left, window_right,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, True,
        )  # fmt: skip
        margins, has_vote, m_before, m_first, segment = row_margins(
            tl.max(s, 1), offs_m, n0, len_q, scale, m_before, m_first, segment, step == 0
        )
        is_kept = has_vote[:, None] & ((margins[:, None] < log_trials[None, :]) == 0)
        kept += tl.max(is_kept.to(tl.int32), 0)
    row_ptr = kept_ptr + head * stride_ch + (tile - index + m0 // BLOCK_M).to(tl.int64) * stride_ct
    tl.store(row_ptr + offs_t, kept, mask=offs_t <= num_trials)
