"""The backward kernels, deterministic: one for dQ, one for dK and dV; no atomics, P is recomputed in both.

With P = exp(S - lse), and delta = rowsum(dO * O) - dlse (which is how a gradient of lse enters):

    dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = scale * dS K,  dK = scale * dS^T Q.

Tiles divide the blocks of skip-softmax (skip.py), and the loops run over those of kept blocks alone.
A softcap multiplies dS by 1 - tanh^2. Sinks are in lse, and need nothing more for dQ, dK and dV.
The dQ kernel runs first and leaves delta for the other. Rows that see no key (lse = -inf) take part in nothing.
"""

import triton
import triton.language as tl

from fa_ops.kernels.primitives import (
    CLEAR_ROWS,
    COUNTS,
    LOG2E,
    SCAN_BLOCK,
    add_dot,
    clamp_range,
    dot_rows,
    fill_rows,
    find_unowned,
    has_holes,
    is_visible,
    key_range,
    load_own_rows,
    load_rows,
    padded_tile,
    query_range,
    scan_lengths,
    score_scales,
    sees_keys,
    store_rows,
    tanh,
    tanh_derivative,
    wrap_rows,
)
from fa_ops.kernels.skip import STEPS, first_tile, lowest_bit, pack_bits, was_kept


@triton.jit
def _probabilities(s, lse, scale, IS_FLOAT32: tl.constexpr):
    """P = exp(scale * s - lse); 0 for rows that see nothing, whose lse is -inf. In 16 bits the rounding of lse in the
    log2 domain does not show, and saves a multiplication."""
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    if IS_FLOAT32:
        return tl.exp2((s * scale - lse) * LOG2E)
    else:
        return tl.exp2(s * (scale * LOG2E) - lse * LOG2E)


@triton.jit
def _accumulate_dq(
    dq, q, dout, lse, delta, offs_m, n0, is_masked, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr, scale, cap_scale,
    window_left, window_right, stride_kt, stride_vt, stride_ms,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq + dS K over the keys [n0, n0 + BLOCK_N); `is_masked` says whether a row does not see one, if MASKED."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    key = start_k + n0
    is_key = n0 + offs_n < len_k
    if HAS_KEY_MASK:
        is_key = tl.load(key_mask_ptr + (key + offs_n) * stride_ms, mask=is_key, other=0) != 0
    k = load_rows(k_ptr + key * stride_kt, stride_kt, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, MASKED)
    v = load_rows(v_ptr + key * stride_vt, stride_vt, offs_n, offs_dv, is_key, HEAD_DIM_V, BLOCK_DV, MASKED)
    s = dot_rows(q, k)
    derivative = 1.0
    if HAS_SOFTCAP:
        derivative = tanh_derivative(s * cap_scale)
        s = tanh(s * cap_scale)
    p = _probabilities(s, lse[:, None], scale, q.dtype == tl.float32)
    dp = dot_rows(dout, v)
    ds = p * (dp - delta[:, None]) * derivative
    if MASKED and is_masked:
        visible = is_visible(
            offs_m[:, None], n0 + offs_n[None, :], len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        if HAS_KEY_MASK:
            visible = visible & is_key[None, :]
        ds = tl.where(visible, ds, 0.0)
    return add_dot(dq, ds.to(k.dtype), k)


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, delta_ptr, dq_ptr,
    b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr, block_bits_ptr,
    softmax_scale, softcap, window_left, window_right, num_seqs, rows_q, rows_k,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bh, stride_bt, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh, stride_mb, stride_ms,
    stride_dob, stride_dot, stride_doh, stride_dlb, stride_dlh, stride_dlt, stride_dqb, stride_dqt, stride_dqh,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_DLSE: tl.constexpr,
    SKIP_BLOCK_Q: tl.constexpr, SKIP_BLOCK_K: tl.constexpr, HOLES_ONLY: tl.constexpr,
):  # fmt: skip
    """Grid as the forward's. Writes dq, as the forward writes out, and delta for the rows of sequences. HOLES_ONLY:
    those without holes in their keys are left alone."""
    tile = tl.program_id(0)
    if IS_PACKED:
        tiles = tl.cdiv(rows_q, BLOCK_M) + num_seqs
        if tile >= tiles:
            row = ((tile - tiles).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * CLEAR_ROWS
            rows = row + tl.arange(0, CLEAR_ROWS)
            is_unowned = find_unowned(row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows_q)
            fill_rows(dq_ptr, stride_dqt, stride_dqh, rows, is_unowned, tl.num_programs(1), 0.0, HEAD_DIM, BLOCK_D)
            return
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
    m0 = (count - 1 - index) * BLOCK_M
    if IS_PACKED:
        if m0 >= len_q:
            return

    head = tl.program_id(1).to(tl.int64)
    batch = seq.to(tl.int64)
    head_kv = head // GROUP_SIZE
    q_ptr += batch * stride_qb + head * stride_qh
    out_ptr += batch * stride_ob + head * stride_oh
    dout_ptr += batch * stride_dob + head * stride_doh
    k_ptr += batch * stride_kb + head_kv * stride_kh
    v_ptr += batch * stride_vb + head_kv * stride_vh
    is_holey = False
    if HAS_KEY_MASK:
        key_mask_ptr += batch * stride_mb
        is_holey = has_holes(key_mask_ptr, start_k, len_k, stride_ms)
    if HOLES_ONLY:
        if not is_holey:
            return

    offs_tile = tl.arange(0, BLOCK_M)
    offs_m = m0 + offs_tile
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_row = offs_m < len_q
    first = start_q + m0
    lse = tl.load(lse_ptr + batch * stride_lb + head * stride_lh + first + offs_tile, mask=is_row, other=float("-inf"))
    sees_key = lse != float("-inf")
    q = load_own_rows(q_ptr, stride_qt, first, offs_tile, rows_q, offs_d, HEAD_DIM, BLOCK_D)
    out = load_own_rows(out_ptr, stride_ot, first, offs_tile, rows_q, offs_dv, HEAD_DIM_V, BLOCK_DV)
    dout = load_own_rows(dout_ptr, stride_dot, first, offs_tile, rows_q, offs_dv, HEAD_DIM_V, BLOCK_DV)
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_ptr += batch * stride_dlb + head * stride_dlh
        delta -= tl.load(dlse_ptr + (first + offs_tile) * stride_dlt, mask=sees_key, other=0.0)
    delta = tl.where(sees_key, delta, 0.0)
    tl.store(delta_ptr + batch * stride_lb + head * stride_lh + first + offs_tile, delta, mask=is_row)

    cap_scale, scale = score_scales(softmax_scale, softcap, HAS_SOFTCAP)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin, full, full_end, end = key_range(
        m0, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if is_holey:
        full_end = full
    if m0 >= len_q:
        begin, full, full_end, end = 0, 0, 0, 0
    if SKIP_BLOCK_Q:
        tile_q = first_tile(b_seq_len_ptr, seq, rows_q, SKIP_BLOCK_Q, IS_PACKED) + m0 // SKIP_BLOCK_Q
        bits_row_ptr = block_bits_ptr + head * stride_bh + tile_q * stride_bt
    if SKIP_BLOCK_Q:
        PARTS: tl.constexpr = SKIP_BLOCK_K // BLOCK_N
        for first_step in tl.range(begin // (STEPS * SKIP_BLOCK_K), tl.cdiv(end, STEPS * SKIP_BLOCK_K)):
            blocks = first_step * STEPS + tl.arange(0, STEPS)
            kept = was_kept(bits_row_ptr, blocks, blocks * SKIP_BLOCK_K < end)
            steps = pack_bits(kept)
            for part in tl.range(0, tl.sum(kept, 0) * PARTS):
                n0 = (first_step * STEPS + lowest_bit(steps)) * SKIP_BLOCK_K + part % PARTS * BLOCK_N
                steps = tl.where(part % PARTS == PARTS - 1, steps & (steps - 1), steps)
                dq = _accumulate_dq(
                    dq, q, dout, lse, delta, offs_m, n0, (n0 < full) | (n0 >= full_end), start_k, len_q, len_k,
                    k_ptr, v_ptr, key_mask_ptr, scale, cap_scale, window_left, window_right, stride_kt, stride_vt,
                    stride_ms, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                    HAS_KEY_MASK, True,
                )  # fmt: skip
    elif HAS_LEFT:
        # three loops would serialise wgmma
        for n0 in tl.range(begin, end, BLOCK_N):
            dq = _accumulate_dq(
                dq, q, dout, lse, delta, offs_m, n0, (n0 < full) | (n0 >= full_end), start_k, len_q, len_k,
                k_ptr, v_ptr, key_mask_ptr, scale, cap_scale, window_left, window_right, stride_kt, stride_vt,
                stride_ms, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                HAS_KEY_MASK, True,
            )  # fmt: skip
    else:
        # two loops: a branch in the hot one costs it its scalar registers
        for n0 in tl.range(begin, full_end, BLOCK_N):
            dq = _accumulate_dq(
                dq, q, dout, lse, delta, offs_m, n0, False, start_k, len_q, len_k,
                k_ptr, v_ptr, key_mask_ptr, scale, cap_scale, window_left, window_right, stride_kt, stride_vt,
                stride_ms, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                HAS_KEY_MASK, False,
            )  # fmt: skip
        for n0 in tl.range(full_end, end, BLOCK_N):
            dq = _accumulate_dq(
                dq, q, dout, lse, delta, offs_m, n0, True, start_k, len_q, len_k,
                k_ptr, v_ptr, key_mask_ptr, scale, cap_scale, window_left, window_right, stride_kt, stride_vt,
                stride_ms, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP,
                HAS_KEY_MASK, True,
            )  # fmt: skip

    dq = tl.where(sees_key[:, None], dq * tl.cast(softmax_scale, tl.float32), 0.0)
    offs_tile = wrap_rows(first, offs_tile, rows_q, IS_PACKED)
    if not IS_PACKED:
        is_row = offs_m < rows_q
    dq_ptr += batch * stride_dqb + head * stride_dqh + first * stride_dqt
    store_rows(dq_ptr, stride_dqt, offs_tile, offs_d, dq, is_row, HEAD_DIM)


@triton.jit
def _accumulate_dkv(
    dk, dv, k, v, m0, is_masked, start_q, len_q, len_k, offs_n, q_ptr, dout_ptr, lse_ptr, delta_ptr, scale, cap_scale,
    window_left, window_right, stride_qt, stride_dot,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(dk + dS^T Q, dv + P^T dO) over the query rows [m0, m0 + BLOCK_M); all tiles have the keys as rows."""
    offs_m = tl.arange(0, BLOCK_M)
    row = start_q + m0
    is_row = m0 + offs_m < len_q
    if MASKED:
        lse = tl.load(lse_ptr + row + offs_m, mask=is_row, other=float("-inf"))
        delta = tl.load(delta_ptr + row + offs_m, mask=is_row, other=0.0)
    else:
        lse = tl.load(lse_ptr + row + offs_m)
        delta = tl.load(delta_ptr + row + offs_m)
    q = load_rows(q_ptr + row * stride_qt, stride_qt, offs_m, tl.arange(0, BLOCK_D), is_row, HEAD_DIM, BLOCK_D, MASKED)
    if MASKED:
        # a row that sees nothing may hold NaN in dout, and 0 * NaN is NaN
        if HAS_KEY_MASK:
            is_row = lse != float("-inf")
        else:
            is_row = sees_keys(m0 + offs_m, len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    dout = load_rows(
        dout_ptr + row * stride_dot, stride_dot, offs_m, tl.arange(0, BLOCK_DV), is_row, HEAD_DIM_V, BLOCK_DV, MASKED
    )
    s = dot_rows(k, q)
    derivative = 1.0
    if HAS_SOFTCAP:
        derivative = tanh_derivative(s * cap_scale)
        s = tanh(s * cap_scale)
    p = _probabilities(s, lse[None, :], scale, q.dtype == tl.float32)
    dp = dot_rows(v, dout)
    ds = p * (dp - delta[None, :]) * derivative
    if MASKED and is_masked:
        visible = is_visible(
            (m0 + offs_m)[None, :], offs_n[:, None], len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        p = tl.where(visible, p, 0.0)
        ds = tl.where(visible, ds, 0.0)
    dv = add_dot(dv, p.to(dout.dtype), dout)
    dk = add_dot(dk, ds.to(q.dtype), q)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def attention_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, dout_ptr, delta_ptr, dk_ptr, dv_ptr,
    b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr, block_bits_ptr,
    softmax_scale, softcap, window_left, window_right, num_seqs, rows_q, rows_k,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_bh, stride_bt, stride_lb, stride_lh, stride_mb, stride_ms, stride_dob, stride_dot, stride_doh,
    stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    SKIP_BLOCK_Q: tl.constexpr, SKIP_BLOCK_K: tl.constexpr, HOLES_ONLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of keys, Hkv), and if packed the programs that clear. The query heads of a group are summed by one
    program, in their order."""
    tile = tl.program_id(0)
    if IS_PACKED:
        tiles = tl.cdiv(rows_k, BLOCK_N) + num_seqs
        if tile >= tiles:
            row = ((tile - tiles).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * CLEAR_ROWS
            rows = row + tl.arange(0, CLEAR_ROWS)
            is_unowned = find_unowned(row, b_start_loc_k_ptr, b_seq_len_k_ptr, num_seqs, rows_k)
            fill_rows(dk_ptr, stride_dkt, stride_dkh, rows, is_unowned, tl.num_programs(1), 0.0, HEAD_DIM, BLOCK_D)
            fill_rows(dv_ptr, stride_dvt, stride_dvh, rows, is_unowned, tl.num_programs(1), 0.0, HEAD_DIM_V, BLOCK_DV)
            return
    seq, index, count = padded_tile(tile, rows_k, BLOCK_N)
    if IS_PACKED:
        seq, first, end, count = 0, 0, 0, 0
        scanned = 0
        while (scanned < num_seqs) & (end <= tile):
            offs = scanned + tl.arange(0, SCAN_BLOCK)
            length = tl.load(b_seq_len_k_ptr + offs, mask=offs < num_seqs, other=0)
            seq, first, end, count = scan_lengths(length, tile, seq, first, end, rows_k, BLOCK_N)
            scanned += SCAN_BLOCK
        index = tile - first
    if seq >= num_seqs:
        return
    start_q, len_q = clamp_range(tl.load(b_start_loc_ptr + seq), tl.load(b_seq_len_ptr + seq), rows_q)
    start_k, len_k = clamp_range(tl.load(b_start_loc_k_ptr + seq), tl.load(b_seq_len_k_ptr + seq), rows_k)
    n0 = index * BLOCK_N
    if IS_PACKED:
        if n0 >= len_k:
            return

    head_kv = tl.program_id(1).to(tl.int64)
    batch = seq.to(tl.int64)
    if HOLES_ONLY:
        if not has_holes(key_mask_ptr + batch * stride_mb, start_k, len_k, stride_ms):
            return
    offs_tile = tl.arange(0, BLOCK_N)
    offs_n = n0 + offs_tile
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_key = offs_n < len_k
    is_holey = False
    if HAS_KEY_MASK:
        is_holey = has_holes(key_mask_ptr + batch * stride_mb, start_k + n0, tl.minimum(len_k - n0, BLOCK_N), stride_ms)
        is_key = tl.load(key_mask_ptr + batch * stride_mb + (start_k + offs_n) * stride_ms, mask=is_key, other=0) != 0
    k_ptr += batch * stride_kb + head_kv * stride_kh
    v_ptr += batch * stride_vb + head_kv * stride_vh
    first = start_k + n0
    k = load_own_rows(k_ptr, stride_kt, first, offs_tile, rows_k, offs_d, HEAD_DIM, BLOCK_D)
    v = load_own_rows(v_ptr, stride_vt, first, offs_tile, rows_k, offs_dv, HEAD_DIM_V, BLOCK_DV)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    cap_scale, scale = score_scales(softmax_scale, softcap, HAS_SOFTCAP)
    begin, full, full_end, end = query_range(
        n0, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if is_holey:
        full_end = full
    if n0 >= len_k:
        begin, full, full_end, end = 0, 0, 0, 0
    if SKIP_BLOCK_Q:
        tile_q = first_tile(b_seq_len_ptr, seq, rows_q, SKIP_BLOCK_Q, IS_PACKED)
    for member in range(GROUP_SIZE):
        head = head_kv * GROUP_SIZE + member
        q_head_ptr = q_ptr + batch * stride_qb + head * stride_qh
        dout_head_ptr = dout_ptr + batch * stride_dob + head * stride_doh
        lse_head_ptr = lse_ptr + batch * stride_lb + head * stride_lh
        delta_head_ptr = delta_ptr + batch * stride_lb + head * stride_lh
        if SKIP_BLOCK_Q:
            PARTS: tl.constexpr = SKIP_BLOCK_Q // BLOCK_M
            bits_ptr = block_bits_ptr + head * stride_bh + tile_q * stride_bt
            for first_step in tl.range(begin // (STEPS * SKIP_BLOCK_Q), tl.cdiv(end, STEPS * SKIP_BLOCK_Q)):
                blocks = first_step * STEPS + tl.arange(0, STEPS)
                kept = was_kept(
                    bits_ptr + blocks.to(tl.int64) * stride_bt, n0 // SKIP_BLOCK_K, blocks * SKIP_BLOCK_Q < end
                )  # fmt: skip
                steps = pack_bits(kept)
                for part in tl.range(0, tl.sum(kept, 0) * PARTS):
                    m0 = (first_step * STEPS + lowest_bit(steps)) * SKIP_BLOCK_Q + part % PARTS * BLOCK_M
                    steps = tl.where(part % PARTS == PARTS - 1, steps & (steps - 1), steps)
                    dk, dv = _accumulate_dkv(
                        dk, dv, k, v, m0, (m0 < full) | (m0 >= full_end), start_q, len_q, len_k, offs_n,
                        q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, scale, cap_scale,
                        window_left, window_right, stride_qt, stride_dot, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                        BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, True,
                    )  # fmt: skip
        elif BLOCK_D > 128:
            # three loops would spill more registers
            for m0 in tl.range(begin, end, BLOCK_M):
                dk, dv = _accumulate_dkv(
                    dk, dv, k, v, m0, (m0 < full) | (m0 >= full_end), start_q, len_q, len_k, offs_n,
                    q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, scale, cap_scale,
                    window_left, window_right, stride_qt, stride_dot, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, True,
                )  # fmt: skip
        else:
            if HAS_RIGHT:
                for m0 in tl.range(begin, full, BLOCK_M):
                    dk, dv = _accumulate_dkv(
                        dk, dv, k, v, m0, True, start_q, len_q, len_k, offs_n,
                        q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, scale, cap_scale,
                        window_left, window_right, stride_qt, stride_dot, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                        BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, True,
                    )  # fmt: skip
            for m0 in tl.range(full, full_end, BLOCK_M):
                dk, dv = _accumulate_dkv(
                    dk, dv, k, v, m0, False, start_q, len_q, len_k, offs_n,
                    q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, scale, cap_scale,
                    window_left, window_right, stride_qt, stride_dot, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, False,
                )  # fmt: skip
            for m0 in tl.range(full_end, end, BLOCK_M):
                dk, dv = _accumulate_dkv(
                    dk, dv, k, v, m0, True, start_q, len_q, len_k, offs_n,
                    q_head_ptr, dout_head_ptr, lse_head_ptr, delta_head_ptr, scale, cap_scale,
                    window_left, window_right, stride_qt, stride_dot, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                    BLOCK_M, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, True,
                )  # fmt: skip

    # garbage only where no key is: each key is a row of its own in every product above
    dk = tl.where(is_key[:, None], dk * tl.cast(softmax_scale, tl.float32), 0.0)
    dv = tl.where(is_key[:, None], dv, 0.0)
    offs_tile = wrap_rows(first, offs_tile, rows_k, IS_PACKED)
    is_row = is_key if IS_PACKED else offs_n < rows_k
    dk_ptr += batch * stride_dkb + head_kv * stride_dkh + first * stride_dkt
    dv_ptr += batch * stride_dvb + head_kv * stride_dvh + first * stride_dvt
    store_rows(dk_ptr, stride_dkt, offs_tile, offs_d, dk, is_row, HEAD_DIM)
    store_rows(dv_ptr, stride_dvt, offs_tile, offs_dv, dv, is_row, HEAD_DIM_V)
