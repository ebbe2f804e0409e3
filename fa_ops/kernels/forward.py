"""The forward kernel: one program computes one tile of query rows of one head (FlashAttention-2, arXiv 2307.08691).

With scores S = scale * Q K^T, running maximum m and running sum l of a row over the key blocks visited so far:

    m' = max(m, rowmax(S)),  P = exp(S - m'),  l' = exp(m - m') l + rowsum(P),  acc' = exp(m - m') acc + P V,

and at the end out = acc / l, lse = m + log(l). S and m are held unscaled, and all exponentials are base 2.
A softcap replaces S by softcap * tanh(S / softcap); a sink is one more score of each row, and has no value.
With skip-softmax (skip.py) a dropped block ends at its row maxima: no exponentials, no V, no product with it.
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
    find_keys,
    find_unowned,
    is_visible,
    key_range,
    load_keys,
    load_own_rows,
    padded_tile,
    scan_lengths,
    store_rows,
    tanh,
    turn_queries,
    wrap_rows,
)
from fa_ops.kernels.skip import load_log_threshold, mark_kept, row_margins, sees_block, visit


@triton.jit
def _attend(
    acc, l_i, m_i, q, offs_m, n0, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr, block_table_ptr,
    scale, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt, stride_ms,
    page_size, num_pages, stride_pn,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the keys [n0, n0 + BLOCK_N)."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_key = n0 + offs_n < len_k
    page, row = find_keys(block_table_ptr, start_k, n0, offs_n, is_key, page_size, num_pages, stride_pn, PAGING)
    if HAS_KEY_MASK:
        is_key = tl.load(key_mask_ptr + (row + offs_n) * stride_ms, mask=is_key, other=0) != 0
    k = load_keys(k_ptr, stride_kb, stride_kt, page, row, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, MASKED, PAGING)
    v = load_keys(v_ptr, stride_vb, stride_vt, page, row, offs_n, offs_dv, is_key, HEAD_DIM_V, BLOCK_DV, MASKED, PAGING)
    s = _scores(
        q, k, is_key, offs_m, n0 + offs_n, len_q, len_k, cap_scale, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, MASKED,
    )  # fmt: skip
    return _accumulate(acc, l_i, m_i, s, tl.max(s, 1), v, scale, MASKED)


@triton.jit
def _scores(
    q, k, is_key, offs_m, offs_n, len_q, len_k, cap_scale, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Q K^T, unscaled; capped, and -inf where a row does not see a key."""
    s = dot_rows(q, k)
    if HAS_SOFTCAP:
        s = tanh(s * cap_scale)
    if MASKED:
        s = _mask(s, is_key, offs_m, offs_n, len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, HAS_KEY_MASK)
    return s


@triton.jit
def _mask(
    s, is_key, offs_m, offs_n, len_q, len_k, window_left, window_right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    visible = is_visible(offs_m[:, None], offs_n[None, :], len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT)
    if HAS_KEY_MASK:
        visible = visible & is_key[None, :]
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _attend_sparsely(
    acc, l_i, m_i, q, offs_m, begin, full, full_end, end, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr,
    block_table_ptr, bits_row_ptr, log_threshold, scale, cap_scale, window_left, window_right,
    stride_kb, stride_kt, stride_vb, stride_vt, stride_ms, page_size, num_pages, stride_pn,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr, VISIT_ORDER: tl.constexpr,
):  # fmt: skip
    """The online softmax over the blocks in [begin, end) that are kept, and how many are visited and dropped."""
    if HAS_KEY_MASK:
        # skip.here since the blocks decide where block_bits are written (see primitives.py)
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
    offs_n = tl.arange(0, BLOCK_N)
    m_first = m_i
    m_before = m_i
    num_visited = 0
    num_dropped = 0
    segment = -1
    count = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N)
    for step in tl.range(0, count):
        n0 = begin + visit(step, count, VISIT_ORDER) * BLOCK_N
        is_key = n0 + offs_n < len_k
        page, row = find_keys(block_table_ptr, start_k, n0, offs_n, is_key, page_size, num_pages, stride_pn, PAGING)
        if HAS_KEY_MASK:
            is_key = tl.load(key_mask_ptr + (row + offs_n) * stride_ms, mask=is_key, other=0) != 0
        k = load_keys(
            k_ptr, stride_kb, stride_kt, page, row, offs_n, tl.arange(0, BLOCK_D), is_key, HEAD_DIM, BLOCK_D, True,
            PAGING,
        )  # fmt: skip
        s = _scores(
            q, k, is_key, offs_m, n0 + offs_n, len_q, len_k, cap_scale, window_left, window_right,
            HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, False,
        )  # fmt: skip
        if (n0 < full) | (n0 >= full_end):
            s = _mask(
                s, is_key, offs_m, n0 + offs_n, len_q, len_k, window_left, window_right,
                HAS_LEFT, HAS_RIGHT, HAS_KEY_MASK,
            )  # fmt: skip
        s_max = tl.max(s, 1)
        margins, has_vote, m_before, m_first, segment = row_margins(
            s_max, offs_m, n0, len_q, scale, m_before, m_first, segment, num_visited == 0
        )
        is_visited = tl.max(has_vote.to(tl.int32), 0) != 0
        is_kept = tl.max((has_vote & ((margins < log_threshold) == 0)).to(tl.int32), 0) != 0
        num_visited += is_visited.to(tl.int32)
        num_dropped += (is_visited & (is_kept == 0)).to(tl.int32)
        if is_kept:
            v = load_keys(
                v_ptr, stride_vb, stride_vt, page, row, offs_n, tl.arange(0, BLOCK_DV), is_key, HEAD_DIM_V, BLOCK_DV,
                True, PAGING,
            )  # fmt: skip
            acc, l_i, m_i = _accumulate(acc, l_i, m_i, s, s_max, v, scale, True)
            mark_kept(bits_row_ptr, n0 // BLOCK_N)
    return acc, l_i, m_i, num_visited, num_dropped


@triton.jit
def _accumulate(acc, l_i, m_i, s, s_max, v, scale, MASKED: tl.constexpr):
    """The step of the online softmax for a block's scores, their row maxima and its values."""
    m_new = tl.maximum(m_i, s_max)
    m_finite = m_new
    if MASKED:
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    scale_log2 = scale * LOG2E
    if v.dtype == tl.float32:
        p = tl.exp2((s - m_finite[:, None]) * scale_log2)
    else:
        p = tl.exp2(s * scale_log2 - (m_finite * scale_log2)[:, None])
    alpha = tl.exp2((m_i - m_finite) * scale_log2)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = add_dot(acc * alpha[:, None], p.to(v.dtype), v)
    return acc, l_i, m_new


@triton.jit(do_not_specialize=COUNTS)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr,
    b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr, block_table_ptr, sinks_ptr,
    threshold_ptr, block_bits_ptr, counts_ptr,
    softmax_scale, softcap, window_left, window_right, num_seqs, rows_q, rows_k, page_size, num_pages,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_ob, stride_ot, stride_oh, stride_lb, stride_lh, stride_mb, stride_ms,
    stride_pb, stride_pn, stride_tb, stride_th, stride_bh, stride_bt,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr, SKIP_SOFTMAX: tl.constexpr,
    VISIT_ORDER: tl.constexpr, LEAVES_SINGLE_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of query rows, Hq), and if packed a program more for each CLEAR_ROWS rows, which clears those of no
    sequence. LEAVES_SINGLE_ROWS: sequences of one row are left to the decode kernel."""
    tile = tl.program_id(0)
    if IS_PACKED:
        tiles = tl.cdiv(rows_q, BLOCK_M) + num_seqs
        if tile >= tiles:
            row = ((tile - tiles).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * CLEAR_ROWS
            rows = row + tl.arange(0, CLEAR_ROWS)
            is_unowned = find_unowned(row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows_q)
            fill_rows(out_ptr, stride_ot, stride_oh, rows, is_unowned, tl.num_programs(1), 0.0, HEAD_DIM_V, BLOCK_DV)
            fill_rows(lse_ptr, 1, stride_lh, rows, is_unowned, tl.num_programs(1), float("-inf"), 1, 1)
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
    start_k = tl.cast(0, tl.int64)
    if PAGING == 0:
        start_k = tl.load(b_start_loc_k_ptr + seq)
    start_k, len_k = clamp_range(start_k, tl.load(b_seq_len_k_ptr + seq), rows_k)
    # the tiles that see the most keys first
    m0 = (count - 1 - index) * BLOCK_M
    if IS_PACKED:
        if m0 >= len_q:
            return
    if LEAVES_SINGLE_ROWS:
        if len_q == 1:
            return

    head = tl.program_id(1).to(tl.int64)
    batch = seq.to(tl.int64)
    head_kv = head // GROUP_SIZE
    q_ptr += batch * stride_qb + head * stride_qh
    if PAGING:
        k_ptr += head_kv * stride_kh
        v_ptr += head_kv * stride_vh
        block_table_ptr += batch * stride_pb
    else:
        k_ptr += batch * stride_kb + head_kv * stride_kh
        v_ptr += batch * stride_vb + head_kv * stride_vh
    if HAS_KEY_MASK:
        key_mask_ptr += batch * stride_mb

    offs_tile = tl.arange(0, BLOCK_M)
    offs_m = m0 + offs_tile
    is_row = offs_m < len_q
    first = start_q + m0
    q = load_own_rows(q_ptr, stride_qt, first, offs_tile, rows_q, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D)
    q, cap_scale, scale = turn_queries(q, softmax_scale, softcap, HAS_SOFTCAP)
    positive_scale = tl.maximum(scale, 1e-30)  # 0 * -inf is NaN

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    begin, full, full_end, end = key_range(
        m0, len_q, len_k, window_left, window_right, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if HAS_KEY_MASK:
        full_end = full
    if m0 >= len_q:
        begin, full, full_end, end = 0, 0, 0, 0
    if SKIP_SOFTMAX:
        bits_row_ptr = block_bits_ptr + head * stride_bh + (tile - index + count - 1 - index).to(tl.int64) * stride_bt
        log_threshold = load_log_threshold(threshold_ptr + batch * stride_tb + head * stride_th)
        acc, l_i, m_i, num_visited, num_dropped = _attend_sparsely(
            acc, l_i, m_i, q, offs_m, begin, full, full_end, end, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr,
            block_table_ptr, bits_row_ptr, log_threshold, positive_scale, cap_scale, window_left, window_right,
            stride_kb, stride_kt, stride_vb, stride_vt, stride_ms, page_size, num_pages, stride_pn,
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING,
            VISIT_ORDER,
        )  # fmt: skip
        counts_ptr += batch * tl.num_programs(1) + head
        tl.atomic_add(counts_ptr, num_visited.to(tl.int64))
        tl.atomic_add(counts_ptr + num_seqs.to(tl.int64) * tl.num_programs(1), num_dropped.to(tl.int64))
    else:
        if HAS_LEFT:
            for n0 in tl.range(begin, full, BLOCK_N):
                acc, l_i, m_i = _attend(
                    acc, l_i, m_i, q, offs_m, n0, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr, block_table_ptr,
                    positive_scale, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt,
                    stride_ms, page_size, num_pages, stride_pn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
                    HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING, True,
                )  # fmt: skip
        for n0 in tl.range(full, full_end, BLOCK_N):
            acc, l_i, m_i = _attend(
                acc, l_i, m_i, q, offs_m, n0, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr, block_table_ptr,
                positive_scale, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt,
                stride_ms, page_size, num_pages, stride_pn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING, False,
            )  # fmt: skip
        for n0 in tl.range(full_end, end, BLOCK_N):
            acc, l_i, m_i = _attend(
                acc, l_i, m_i, q, offs_m, n0, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr, block_table_ptr,
                positive_scale, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt,
                stride_ms, page_size, num_pages, stride_pn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING, True,
            )  # fmt: skip

    m_i = tl.where(m_i == float("-inf"), m_i, m_i * scale)
    if HAS_SINKS:
        # one more score, with no value
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m_new = tl.maximum(m_i, sink)
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - m_finite) * LOG2E)
        l_i = l_i * alpha + tl.exp2((sink - m_finite) * LOG2E)
        acc = acc * alpha[:, None]
        m_i = m_new
    is_empty = (l_i == 0.0) | ~is_row
    l_i = tl.where(is_empty, 1.0, l_i)
    out = tl.where(is_empty[:, None], 0.0, acc / l_i[:, None])
    lse = tl.where(is_empty, float("-inf"), m_i + tl.log(l_i))
    offs_tile = wrap_rows(first, offs_tile, rows_q, IS_PACKED)
    if not IS_PACKED:
        is_row = offs_m < rows_q
    out_ptr += batch * stride_ob + head * stride_oh + first * stride_ot
    store_rows(out_ptr, stride_ot, offs_tile, tl.arange(0, BLOCK_DV), out, is_row, HEAD_DIM_V)
    tl.store(lse_ptr + batch * stride_lb + head * stride_lh + first + offs_tile, lse, mask=is_row)
