"""The forward kernel: one program computes one tile of query rows of one head (FlashAttention-2, arXiv 2307.08691).

With scores S = scale * Q K^T, running maximum m and running sum l of a row over the key blocks visited so far:

    m' = max(m, rowmax(S)),  P = exp(S - m'),  l' = exp(m - m') l + rowsum(P),  acc' = exp(m - m') acc + P V,

and at the end out = acc / l, lse = m + log(l). S and m are held unscaled, and all exponentials are base 2.
A softcap replaces S by softcap * tanh(S / softcap); a sink is one more score of each row, and has no value.
With skip-softmax (skip.py) STEPS blocks at a time are first looked at: Q K^T and its row maxima decide which are
dropped. Those that are kept follow as dense attention, with their maximum known: no exponentials, no V and no product
with it for the others, and no branch around a product, which would keep loads and products from overlapping.

One loop has all keys, and masks where it must: as loops of their own, the masked ends make ptxas serialise the products
of sm_90 (C7515). Q goes from its load to the products: changed in between, it would be a register operand, which
Triton loads again for every block.
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
    has_holes,
    is_visible,
    key_range,
    load_keys,
    load_own_rows,
    padded_tile,
    scan_lengths,
    score_scales,
    store_rows,
    tanh,
    wrap_rows,
)
from fa_ops.kernels.skip import (
    STEPS,
    load_log_threshold,
    lowest_bit,
    mark_kept,
    pack_bits,
    row_margins,
    sees_block,
    visit,
)

LOOK_TILES = tl.constexpr(2)  # of keys at a time, where scores are only looked at, which leaves room for more


@triton.jit
def _masked_scores(
    q, offs_m, n0, is_masked, start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr, block_table_ptr,
    cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt, stride_ms,
    page_size, num_pages, stride_pn,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr, LOADS_V: tl.constexpr,
):  # fmt: skip
    """(scores, values) of the keys [n0, n0 + BLOCK_N); without LOADS_V the keys stand for the values."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    is_key = n0 + offs_n < len_k
    page, row = find_keys(block_table_ptr, start_k, n0, offs_n, is_key, page_size, num_pages, stride_pn, PAGING)
    if HAS_KEY_MASK:
        is_key = tl.load(key_mask_ptr + (row + offs_n) * stride_ms, mask=is_key, other=0) != 0
    k = load_keys(k_ptr, stride_kb, stride_kt, page, row, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, True, PAGING)
    v = k
    if LOADS_V:
        v = load_keys(
            v_ptr, stride_vb, stride_vt, page, row, offs_n, offs_dv, is_key, HEAD_DIM_V, BLOCK_DV, True, PAGING
        )  # fmt: skip
    s = _scores(
        q, k, is_key, offs_m, n0 + offs_n, len_q, len_k, cap_scale, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, False,
    )  # fmt: skip
    if is_masked:
        s = _mask(
            s, is_key, offs_m, n0 + offs_n, len_q, len_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, HAS_KEY_MASK
        )  # fmt: skip
    return s, v


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
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr, VISIT_ORDER: tl.constexpr,
    SKIP_BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The online softmax over the blocks in [begin, end) that are kept, and how many are visited and dropped."""
    if HAS_KEY_MASK:
        # skip.here since the blocks decide where block_bits are written (see primitives.py)
        while (begin < end) & (not sees_block(
            offs_m, begin, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
            SKIP_BLOCK_K, HAS_LEFT, HAS_RIGHT,
        )):  # fmt: skip
            begin += SKIP_BLOCK_K
        last = begin + tl.maximum(tl.cdiv(end - begin, SKIP_BLOCK_K) - 1, 0) * SKIP_BLOCK_K
        while (last > begin) & (not sees_block(
            offs_m, last, start_k, len_q, len_k, key_mask_ptr, window_left, window_right, stride_ms,
            SKIP_BLOCK_K, HAS_LEFT, HAS_RIGHT,
        )):  # fmt: skip
            last -= SKIP_BLOCK_K
        end = tl.minimum(end, last + SKIP_BLOCK_K)
    m_first = m_i
    m_before = m_i
    num_visited = 0
    num_dropped = 0
    segment = -1
    count = tl.cdiv(tl.maximum(end - begin, 0), SKIP_BLOCK_K)
    offs_step = tl.arange(0, STEPS)
    LOOK_N: tl.constexpr = min(SKIP_BLOCK_K, LOOK_TILES * BLOCK_N)
    LOOKS: tl.constexpr = SKIP_BLOCK_K // LOOK_N
    PARTS: tl.constexpr = SKIP_BLOCK_K // BLOCK_N
    for first_step in tl.range(0, count, STEPS):
        has_vote = tl.zeros([BLOCK_M], tl.int32)
        is_kept = has_vote
        m_new = m_i
        s_max = m_i
        for look in tl.range(0, tl.minimum(count - first_step, STEPS) * LOOKS):
            step = look // LOOKS
            part = look - step * LOOKS
            n_block = begin + visit(first_step + step, count, VISIT_ORDER) * SKIP_BLOCK_K
            n0 = n_block + part * LOOK_N
            s, _ = _masked_scores(
                q, offs_m, n0, (n0 < full) | (n0 >= full_end), start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr,
                block_table_ptr, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt,
                stride_ms, page_size, num_pages, stride_pn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LOOK_N,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING, False,
            )  # fmt: skip
            s_max = tl.maximum(tl.max(s, 1), tl.where(part == 0, float("-inf"), s_max))
            if part == LOOKS - 1:
                margins, votes, m_before, m_first, segment = row_margins(
                    s_max, offs_m, n_block, len_q, scale, m_before, m_first, segment, m_first == float("-inf")
                )
                has_vote |= votes.to(tl.int32) << step
                is_kept |= (votes & ((margins < log_threshold) == 0)).to(tl.int32) << step
                m_new = tl.maximum(m_new, s_max)
        visited = tl.max((has_vote[:, None] >> offs_step[None, :]) & 1, 0)
        kept = tl.max((is_kept[:, None] >> offs_step[None, :]) & 1, 0)
        num_visited += tl.sum(visited, 0)
        num_kept = tl.sum(kept, 0)
        num_dropped += tl.sum(visited, 0) - num_kept
        block = begin // SKIP_BLOCK_K + visit(first_step + offs_step, count, VISIT_ORDER)
        mark_kept(bits_row_ptr, block, kept != 0)

        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - m_finite) * (scale * LOG2E))
        acc = acc * alpha[:, None]
        l_i = l_i * alpha
        m_i = m_new
        steps = pack_bits(kept)
        for part in tl.range(0, num_kept * PARTS):
            n_block = begin + visit(first_step + lowest_bit(steps), count, VISIT_ORDER) * SKIP_BLOCK_K
            n0 = n_block + part % PARTS * BLOCK_N
            steps = tl.where(part % PARTS == PARTS - 1, steps & (steps - 1), steps)
            s, v = _masked_scores(
                q, offs_m, n0, (n0 < full) | (n0 >= full_end), start_k, len_q, len_k, k_ptr, v_ptr,
                key_mask_ptr, block_table_ptr, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb,
                stride_vt, stride_ms, page_size, num_pages, stride_pn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING, True,
            )  # fmt: skip
            p = _exponentials(s, m_finite, scale, v.dtype == tl.float32)
            l_i += tl.sum(p, 1)
            acc = add_dot(acc, p.to(v.dtype), v)
    return acc, l_i, m_i, num_visited, num_dropped


@triton.jit
def _exponentials(s, m, scale, IS_FLOAT32: tl.constexpr):
    """exp(scale * (s - m)) of scores and the maxima of their rows."""
    scale_log2 = scale * LOG2E
    if IS_FLOAT32:
        return tl.exp2((s - m[:, None]) * scale_log2)
    else:
        return tl.exp2(s * scale_log2 - (m * scale_log2)[:, None])


@triton.jit
def _accumulate(acc, l_i, m_i, s, s_max, v, scale, MASKED: tl.constexpr):
    """The step of the online softmax for a block's scores, their row maxima and its values."""
    m_new = tl.maximum(m_i, s_max)
    m_finite = m_new
    if MASKED:
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = _exponentials(s, m_finite, scale, v.dtype == tl.float32)
    alpha = tl.exp2((m_i - m_finite) * (scale * LOG2E))
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
    SKIP_BLOCK_K: tl.constexpr, VISIT_ORDER: tl.constexpr, LEAVES_SINGLE_ROWS: tl.constexpr,
    HOLES_ONLY: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of query rows, Hq), and if packed a program more for each CLEAR_ROWS rows, which clears those of no
    sequence. LEAVES_SINGLE_ROWS: sequences of one row are left to the decode kernel. HOLES_ONLY: those without holes in
    their keys are left to the kernel before this one, with what of its rows belongs to no sequence."""
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
    is_holey = False
    if HAS_KEY_MASK:
        key_mask_ptr += batch * stride_mb
        is_holey = has_holes(key_mask_ptr, start_k, len_k, stride_ms)
    if HOLES_ONLY:
        if not is_holey:
            return

    offs_tile = tl.arange(0, BLOCK_M)
    offs_m = m0 + offs_tile
    is_row = offs_m < len_q
    first = start_q + m0
    q = load_own_rows(q_ptr, stride_qt, first, offs_tile, rows_q, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D)
    cap_scale, scale = score_scales(softmax_scale, softcap, HAS_SOFTCAP)
    positive_scale = tl.maximum(scale, 1e-30)  # 0 * -inf is NaN

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    unit: tl.constexpr = SKIP_BLOCK_K if SKIP_SOFTMAX else BLOCK_N
    begin, full, full_end, end = key_range(
        m0, len_q, len_k, window_left, window_right, BLOCK_M, unit, HAS_LEFT, HAS_RIGHT
    )
    if is_holey:
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
            HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK,
            PAGING, VISIT_ORDER, SKIP_BLOCK_K,
        )  # fmt: skip
        counts_ptr += batch * tl.num_programs(1) + head
        tl.atomic_add(counts_ptr, num_visited.to(tl.int64), sem="relaxed")
        tl.atomic_add(
            counts_ptr + tl.cast(num_seqs, tl.int64) * tl.num_programs(1), num_dropped.to(tl.int64), sem="relaxed"
        )
    else:
        for n0 in tl.range(begin, end, BLOCK_N):
            s, v = _masked_scores(
                q, offs_m, n0, (n0 < full) | (n0 >= full_end), start_k, len_q, len_k, k_ptr, v_ptr, key_mask_ptr,
                block_table_ptr, cap_scale, window_left, window_right, stride_kb, stride_kt, stride_vb, stride_vt,
                stride_ms, page_size, num_pages, stride_pn, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N,
                HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING, True,
            )  # fmt: skip
            acc, l_i, m_i = _accumulate(acc, l_i, m_i, s, tl.max(s, 1), v, positive_scale, True)

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
